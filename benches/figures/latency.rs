//! What the server adds to the echo's latency and the model's own time when there is little to do.

use anyhow::{Result, ensure};

use super::{
    Bench, OPEN_STREAMS, in_open_loop, repository, target,
    workload::{Bare, IRIS},
};
use crate::{
    load::{self, between},
    pairs::Pairs,
    report::{Better::Lower, say},
    requests::Protocol,
};

impl Bench {
    /// `iris` at `rate` gRPC requests per second.
    pub(super) fn added_latency(&mut self, iris: &Bare, rate: f64) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        let (server, echo) = (self.programs.serve(repository.path())?, self.programs.echo()?);
        let request = Protocol::Grpc.request("iris", iris.model.row())?;
        let concurrency = ((IRIS.concurrency)(Protocol::Grpc).0, OPEN_STREAMS);
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.latency_pairs {
            say(format_args!("iris and echo at 10 % load, pair {pair} of {}", self.pace.latency_pairs));
            let measure = |process| {
                let end = self.pace.warm + self.pace.latency_window;
                let target = target(process, Protocol::Grpc, &request, concurrency);
                let run = load::open(&target, rate, pair as u64, between(self.pace.warm, end))?;
                ensure!(run.failed == 0, "{} requests failed at 10 % load", run.failed);
                let value = [0.5, 0.99].map(|share| run.latencies.quantile(share) * 1e6);
                Ok(in_open_loop(&run, value))
            };
            pairs.take(|| measure(&server), || measure(&echo))?;
        }
        let single = iris.single * 1e6;
        for (index, quantile) in ["p50", "p99"].into_iter().enumerate() {
            let mut add = |name: &str, what: &str, value: &dyn Fn(f64, f64) -> f64| {
                let values = pairs.values(|ours: &[f64; 2], echo: &[f64; 2]| value(ours[index], echo[index]));
                let (name, title) =
                    (format!("{name}_{quantile}_us"), format!("`iris`, gRPC at 10 % load: {quantile} {what}"));
                self.report.median(&name, &title, "µs", Lower, &values);
            };
            add("served", "served", &|ours, _| ours);
            add("echo", "of the echo", &|_, echo| echo);
            add("added", "served − echo − τ(1)", &|ours, echo| ours - echo - single);
        }
        self.foreign.extend(pairs.foreign());
        Ok(())
    }
}
