//! What hot swaps cost those who ask meanwhile.

use std::{os::unix::fs::symlink, time::Duration};

use anyhow::{Result, ensure};

use super::{Bench, MAX_LATE, OPEN_STREAMS, disturbance, repository, target};
use crate::{
    inprocess::Model,
    load::{self, Phase, between},
    report::{Better::Lower, say},
    requests::Protocol,
};

const SWAPS: usize = 20;
/// The server waits for a second without change before it takes new files for complete.
const SETTLING: Duration = Duration::from_millis(900);
/// How long one swap may take.
const SWAP_TIMEOUT: Duration = Duration::from_secs(30);

impl Bench {
    /// Twenty new versions of `iris`, one after the other, at `rate` gRPC requests per second.
    pub(super) fn swaps(&mut self, iris: &Model, rate: f64) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        let staging = repository.path().join(".staging");
        std::fs::create_dir(&staging)?;
        for version in 2..=SWAPS + 1 {
            symlink(&self.iris, staging.join(version.to_string()))?;
        }
        let server = self.programs.serve(repository.path())?;
        let request = Protocol::Grpc.request("iris", iris.row())?;
        let target = target(&server, Protocol::Grpc, &request, (Protocol::Grpc.concurrency().0, OPEN_STREAMS));

        say(format_args!("iris at 50 % load, steady"));
        let end = self.pace.warm + self.pace.steady;
        let mut steady = load::open(&target, rate, 0, between(self.pace.warm, end))?;
        say(format_args!("iris at 50 % load, {SWAPS} swaps"));
        let publish = |version: usize| {
            let name = version.to_string();
            std::fs::rename(staging.join(&name), repository.path().join("iris").join(&name))
        };
        let (mut version, mut since) = (1, self.pace.warm);
        let mut during = load::open(&target, rate, 1, |now, reply| {
            // The generator's own replies tell which version serves; nothing else has to ask.
            if now >= self.pace.warm && Protocol::version(reply).is_ok_and(|serving| serving == version) {
                if version > SWAPS {
                    return Ok(Phase::End);
                }
                version += 1;
                since = now;
                publish(version)?;
            }
            ensure!(
                now.saturating_sub(since) < SWAP_TIMEOUT,
                "version {version} does not answer within {SWAP_TIMEOUT:?}"
            );
            // While new files only lie there nothing is swapped, and what is counted would hide what is not.
            Ok(if now >= since + SETTLING { Phase::Count } else { Phase::Pass })
        })?;
        let void = [&steady, &during].into_iter().find_map(|run| {
            let late = (run.late > MAX_LATE).then(|| format!("{:.1} % of requests were sent late", 100.0 * run.late));
            disturbance(&run.usage).or(late)
        });
        let p99 = [steady.latencies.quantile(0.99), during.latencies.quantile(0.99)];
        let failures = (steady.failed + during.failed) as f64;
        let report = &mut self.report;
        let asked = format!("{SWAPS} hot swaps at 50 % load: failures beside {} answers", during.latencies.count());
        report.single("swap_failures", &asked, "", Lower, failures, None);
        report.single("swap_steady_p99_us", "p99 without swaps", "µs", Lower, p99[0] * 1e6, void.clone());
        report.single("swap_during_p99_us", "p99 during swaps", "µs", Lower, p99[1] * 1e6, void.clone());
        report.single("swap_p99", "p99 during ÷ without swaps", "", Lower, p99[1] / p99[0], void);
        Ok(())
    }
}
