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
    statistics::{Latencies, POOLED_RESAMPLES, bootstrap},
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
                Ok(in_open_loop(&run, ()).map(|()| run.latencies))
            };
            pairs.take(|| measure(&server), || measure(&echo))?;
        }
        self.report_added(&pairs, iris.single);
        self.foreign.extend(pairs.foreign());
        Ok(())
    }

    /// The p50 is the median of pairs. A p99 rests on so few requests of a pair that the pairs are pooled.
    fn report_added(&mut self, pairs: &Pairs<Latencies, Latencies>, single: f64) {
        let title = |quantile: &str, what: &str| format!("`iris`, gRPC at 10 % load: {quantile} {what}");
        let parts: [Part<'_>; 3] = [
            ("served", "served", &|ours, _| ours),
            ("echo", "of the echo", &|_, echo| echo),
            ("added", "served − echo − τ(1)", &|ours, echo| ours - echo - single),
        ];
        for (name, what, value) in parts {
            let values = pairs.values(|ours, echo| 1e6 * value(ours.quantile(0.5), echo.quantile(0.5)));
            self.report.median(&format!("{name}_p50_us"), &title("p50", what), "µs", Lower, &values);
        }
        let (counted, void) = pairs.counted();
        let all: Vec<usize> = (0..counted.len()).collect();
        let pooled = |drawn: &[usize], share: f64| {
            let ours = Latencies::pooled(drawn.iter().map(|&pair| counted[pair].0), share);
            (ours, Latencies::pooled(drawn.iter().map(|&pair| counted[pair].1), share))
        };
        let noise = noise(pooled(&all, 0.5).1, pooled(&all, 0.99).1);
        for (name, what, value) in parts {
            let of = |drawn: &[usize]| {
                let (ours, echo) = pooled(drawn, 0.99);
                1e6 * value(ours, echo)
            };
            let found = (of(&all), bootstrap(all.len(), POOLED_RESAMPLES, of));
            let void = void.clone().or_else(|| noise.clone().filter(|_| name == "added"));
            self.report.with_interval(&format!("{name}_p99_us"), &title("p99", what), "µs", Lower, found, void);
        }
    }
}

/// A figure's name, what it is, and how it follows from the server's latency and the echo's.
type Part<'a> = (&'static str, &'static str, &'a dyn Fn(f64, f64) -> f64);

/// Why nothing can be said of what is added to the echo's p99: there is nothing in the echo that could take so long, so
/// the machine did.
fn noise(p50: f64, p99: f64) -> Option<String> {
    (p99 > 3.0 * p50 + 200e-6).then(|| {
        format!("the echo's own p99 is {:.0} µs beside a p50 of {:.0} µs: the machine stalls", p99 * 1e6, p50 * 1e6)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_that_stalls_is_no_measure() {
        assert_eq!(noise(73e-6, 400e-6), None);
        assert!(noise(73e-6, 795e-6).is_some_and(|reason| reason.contains("795 µs beside a p50 of 73 µs")));
    }
}
