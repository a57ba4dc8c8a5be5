//! What those who ask for a model notice when copies of all requests go to another version of it.
//!
//! The same server on one core, with the copies and without them in turn, within seconds of each other. The versions are
//! alike, so with copies the server has twice the models to run, and the answers to compare.
//!
//! A quarter of the requests is no quarter of the processor: those that come one at a time do not share what those of full
//! load do, and each took some 46 µs where these take 13. That was 85 % of the core, and by default copies are shed from
//! 70 % on. This is about what copies cost while they are made, so here none is shed for the processor's sake; how much of
//! it the server uses without copies stands beside.

use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};

use super::{
    Bench, OPEN_STREAMS, in_open_loop,
    order::{ask, page},
    repository, target,
    workload::{Bare, IRIS},
};
use crate::{
    load::{self, Arrivals, between},
    pairs::{Measured, Pairs},
    process::Process,
    report::{
        Better::{Higher, Lower},
        say,
    },
    requests::Protocol,
    statistics::{Latencies, POOLED_RESAMPLES, bootstrap, median},
};

/// With copies of fewer requests the figure says nothing of copies of all.
const LEAST_COPIED: f64 = 0.9;
/// Both versions are loaded, and which of them serves is said by the route.
const SETTINGS: &str = "versions = \"all\"\n";
const CONFIG: &str = "[shadow]\nmax_cpu = 1.0\n";
const WITHOUT: &str = r#"{"stable": "1"}"#;
const WITH: &str = r#"{"stable": "1", "shadow": {"version": "2", "percent": 100}}"#;

/// What was found with copies.
struct Shadowed {
    latencies: Latencies,
    /// Rows that each version ran meanwhile.
    rows: [f64; 2],
}

/// What was found without.
struct Alone {
    latencies: Latencies,
    /// The server's share of its core.
    cpu: f64,
}

impl Bench {
    /// `iris` at `rate` gRPC requests per second.
    pub(super) fn shadows(&mut self, iris: &Bare, rate: f64) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        let model = repository.path().join("iris");
        symlink(&self.iris, model.join("2"))?;
        std::fs::write(model.join("model.toml"), SETTINGS)?;
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(&file, CONFIG)?;
        let config = file.path().to_str().context("the folder for temporary files has no plain name")?;
        let server = self.programs.serve_with(repository.path(), &["--config", config])?;
        let request = Protocol::Grpc.request("iris", iris.model.row())?;
        let target = target(&server, Protocol::Grpc, &request, ((IRIS.concurrency)(Protocol::Grpc).0, OPEN_STREAMS));
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.latency_pairs {
            say(format_args!("iris at 25 % load, with copies and without, pair {pair} of {}", self.pace.latency_pairs));
            let measure = |route: &str| -> Result<Arrivals> {
                ask(server.ops, "PUT", "/admin/v1/models/iris/route", route)?;
                let end = self.pace.warm + self.pace.latency_window;
                let run = load::open(&target, rate, pair as u64, between(self.pace.warm, end))?;
                ensure!(run.failed == 0, "{} requests failed at 25 % load", run.failed);
                Ok(run)
            };
            let with = || -> Result<Measured<Shadowed>> {
                let before = rows(&server)?;
                let run = measure(WITH)?;
                let after = rows(&server)?;
                let rows = [after[0] - before[0], after[1] - before[1]];
                Ok(in_open_loop(&run, ()).map(|()| Shadowed { latencies: run.latencies, rows }))
            };
            let without = || {
                let run = measure(WITHOUT)?;
                let cpu = run.usage.server / run.usage.seconds;
                Ok(in_open_loop(&run, ()).map(|()| Alone { latencies: run.latencies, cpu }))
            };
            pairs.take(with, without)?;
        }
        self.report_shadows(&pairs);
        self.foreign.extend(pairs.foreign());
        Ok(())
    }

    fn report_shadows(&mut self, pairs: &Pairs<Shadowed, Alone>) {
        let (counted, void) = pairs.counted();
        let copied = {
            let rows = |index: usize| counted.iter().map(|(with, _)| with.rows[index]).sum::<f64>();
            rows(1) / rows(0)
        };
        let share = "requests whose copy was run, at 25 % load, with `shadow.max_cpu = 1`";
        self.report.single("shadow_copied", share, "%", Higher, 100.0 * copied, void.clone());
        let cpu = median(&counted.iter().map(|(_, without)| without.cpu).collect::<Vec<_>>());
        let title = "`iris`, gRPC at 25 % load: CPU of the server without copies";
        self.report.single("shadow_off_cpu", title, "%", Lower, 100.0 * cpu, void.clone());
        let few = (copied < LEAST_COPIED).then(|| format!("only {:.0} % of the requests had a copy", 100.0 * copied));
        let void = void.or(few);
        let with = |drawn: &[usize]| Latencies::pooled(drawn.iter().map(|&pair| &counted[pair].0.latencies), 0.99);
        let without = |drawn: &[usize]| Latencies::pooled(drawn.iter().map(|&pair| &counted[pair].1.latencies), 0.99);
        let all: Vec<usize> = (0..counted.len()).collect();
        let mut add = |name: &str, title: &str, unit, scale: f64, value: &dyn Fn(&[usize]) -> f64| {
            let found = (scale * value(&all), bootstrap(all.len(), POOLED_RESAMPLES, |drawn| scale * value(drawn)));
            self.report.with_interval(name, title, unit, Lower, found, void.clone());
        };
        add("shadow_off_p99_us", "`iris`, gRPC at 25 % load: p99 without copies", "µs", 1e6, &without);
        add("shadow_on_p99_us", "p99 with copies of all requests", "µs", 1e6, &with);
        add("shadow_p99", "p99 with copies ÷ without", "", 1.0, &|drawn| with(drawn) / without(drawn));
    }
}

/// Rows that each of the two versions has run so far.
fn rows(server: &Process) -> Result<[f64; 2]> {
    let page = page(server.ops, "/metrics")?;
    let of = |version: u8| -> Result<f64> {
        let series = format!(r#"tidegate_inferences_total{{model="iris",version="{version}"}} "#);
        let value = page
            .lines()
            .find_map(|line| line.strip_prefix(&series))
            .with_context(|| format!("the metrics page has no series {series}"))?;
        Ok(value.trim().parse()?)
    };
    Ok([of(1)?, of(2)?])
}
