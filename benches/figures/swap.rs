//! What hot swaps cost those who ask meanwhile.
//!
//! Every swap is a run of its own: some time without a change, and then a load of the next version, from the call to
//! shortly after its end, when the old version is gone, too. Both are seconds apart on the same connections, so a
//! machine that is slow for a while is slow for both.

use std::{os::unix::fs::symlink, path::Path, time::Duration};

use anyhow::{Result, ensure};

use super::{
    Bench, OPEN_STREAMS, in_open_loop,
    order::beside_load,
    repository, target,
    workload::{Bare, IRIS},
};
use crate::{
    load::{self, Arrivals, Phase, Target},
    pairs::most_are_void,
    process::Process,
    report::{Better::Lower, say},
    requests::Protocol,
    statistics::{Latencies, POOLED_RESAMPLES, bootstrap},
};

const SWAPS: usize = 20;
/// How long one swap may take.
const SWAP_TIMEOUT: Duration = Duration::from_secs(30);
/// After the load's end the old version is still drained and dropped.
const AFTERMATH: Duration = Duration::from_millis(100);

impl Bench {
    /// Twenty new versions of `iris`, one after the other, at `rate` gRPC requests per second.
    pub(super) fn swaps(&mut self, iris: &Bare, rate: f64) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        let explicit = ["--model-control", "explicit", "--load-model", "iris"];
        let server = self.programs.serve_with(repository.path(), &explicit)?;
        let request = Protocol::Grpc.request("iris", iris.model.row())?;
        let target = target(&server, Protocol::Grpc, &request, ((IRIS.concurrency)(Protocol::Grpc).0, OPEN_STREAMS));
        let (mut runs, mut failed, mut answered) = (Vec::new(), 0, 0);
        for version in 2..=SWAPS + 1 {
            say(format_args!("iris at 50 % load, swap {} of {SWAPS}", version - 1));
            let run = self.swap(&server, &target, rate, repository.path(), version)?;
            failed += run.failed;
            answered += run.latencies.count();
            let void = in_open_loop(&run, ()).void();
            if let Some(reason) = &void {
                say(format_args!("swap {} is void: {reason}", version - 1));
            }
            runs.push((run, void));
        }
        let void = most_are_void("swaps", runs.iter().map(|(_, void)| void.as_ref()));
        // Of a figure that is void all swaps are shown.
        let counted: Vec<&Arrivals> =
            runs.iter().filter(|(_, spoiled)| spoiled.is_none() || void.is_some()).map(|(run, _)| run).collect();
        let steady = |drawn: &[usize]| Latencies::pooled(drawn.iter().map(|&run| &counted[run].steady), 0.99);
        let during = |drawn: &[usize]| Latencies::pooled(drawn.iter().map(|&run| &counted[run].latencies), 0.99);
        let all: Vec<usize> = (0..counted.len()).collect();
        let mut add = |name: &str, title: &str, unit, scale: f64, value: &dyn Fn(&[usize]) -> f64| {
            let found = (scale * value(&all), bootstrap(all.len(), POOLED_RESAMPLES, |drawn| scale * value(drawn)));
            self.report.with_interval(name, title, unit, Lower, found, void.clone());
        };
        add("swap_steady_p99_us", "p99 without swaps", "µs", 1e6, &steady);
        add("swap_during_p99_us", "p99 during swaps", "µs", 1e6, &during);
        add("swap_p99", "p99 during ÷ without swaps", "", 1.0, &|drawn| during(drawn) / steady(drawn));
        let asked = format!("{SWAPS} hot swaps at 50 % load: failures beside {answered} answers");
        self.report.single("swap_failures", &asked, "", Lower, failed as f64, None);
        Ok(())
    }

    /// Some time without a change, then one swap to `version`.
    fn swap(
        &self,
        server: &Process,
        target: &Target<'_>,
        rate: f64,
        models: &Path,
        version: usize,
    ) -> Result<Arrivals> {
        symlink(&self.iris, models.join("iris").join(version.to_string()))?;
        let swap_at = self.pace.warm + self.pace.steady;
        beside_load(self.programs.core, server.rest, "iris", |load| {
            let mut loaded_at = None;
            load::open(target, rate, version as u64, |now, reply| {
                if now < self.pace.warm {
                    return Ok(Phase::Pass);
                }
                if now < swap_at {
                    return Ok(Phase::Steady);
                }
                load.begin()?;
                if loaded_at.is_none() && load.has_ended() {
                    loaded_at = Some(now);
                }
                ensure!(now < swap_at + SWAP_TIMEOUT, "version {version} does not answer within {SWAP_TIMEOUT:?}");
                let over = loaded_at.is_some_and(|loaded| now >= loaded + AFTERMATH);
                let serves = || Protocol::version(reply).is_ok_and(|serving| serving == version);
                Ok(if over && serves() { Phase::End } else { Phase::Count })
            })
        })
    }
}
