//! What those who ask for a model notice when copies of all requests go to another version of it.
//!
//! The same server on one core, with the copies and without them in turn, within seconds of each other. The versions are
//! alike, so with copies the server has twice the models to run, and the answers to compare.
//!
//! Load can be two things, for a quarter of the requests is no quarter of the processor: those that come one at a time do
//! not share what those of full load do, and each takes some 48 µs where these take 13. A quarter of the core is measured
//! with the default settings. A quarter of the requests is 80 % of the core, and by default copies are shed from 70 % on;
//! there none is shed for the processor's sake, and what there is left of it is hardly enough for all copies.

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
const SHED_NONE: &str = "[shadow]\nmax_cpu = 1.0\n";
const OF_THE_CORE: f64 = 0.25;
const CALIBRATIONS: u64 = 3;
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

/// A load at which copies are made.
struct Load {
    name: &'static str,
    title: &'static str,
    /// Of the server.
    config: &'static str,
    /// Requests per second.
    rate: f64,
}

impl Bench {
    /// `iris` over gRPC; `rate` is a quarter of the requests of full load.
    pub(super) fn shadows(&mut self, iris: &Bare, rate: f64) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        let model = repository.path().join("iris");
        symlink(&self.iris, model.join("2"))?;
        std::fs::write(model.join("model.toml"), SETTINGS)?;
        let quiet = {
            let server = self.programs.serve_with(repository.path(), &[])?;
            // The fewer come, the more each takes.
            (0..CALIBRATIONS).try_fold(rate, |rate, seed| -> Result<f64> {
                let usage = self.ask_iris(&server, iris, rate, seed)?.usage;
                Ok(rate * OF_THE_CORE * usage.seconds / usage.server)
            })?
        };
        for load in [
            Load { name: "shadow", title: "with a quarter of the core used", config: "", rate: quiet },
            Load {
                name: "shadow_dense",
                title: "with a quarter of the requests of full load",
                config: SHED_NONE,
                rate,
            },
        ] {
            let file = tempfile::NamedTempFile::new()?;
            std::fs::write(&file, load.config)?;
            let config = file.path().to_str().context("the folder for temporary files has no plain name")?;
            let server = self.programs.serve_with(repository.path(), &["--config", config])?;
            let mut pairs = Pairs::new();
            for pair in 1..=self.pace.latency_pairs {
                let of = self.pace.latency_pairs;
                say(format_args!("iris {}, with copies and without, pair {pair} of {of}", load.title));
                let measure = |route: &str| -> Result<Arrivals> {
                    ask(server.ops, "PUT", "/admin/v1/models/iris/route", route)?;
                    self.ask_iris(&server, iris, load.rate, pair as u64)
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
            self.report_shadows(&load, &pairs);
            self.foreign.extend(pairs.foreign());
        }
        Ok(())
    }

    fn ask_iris(&self, server: &Process, iris: &Bare, rate: f64, seed: u64) -> Result<Arrivals> {
        let request = Protocol::Grpc.request("iris", iris.model.row())?;
        let target = target(server, Protocol::Grpc, &request, ((IRIS.concurrency)(Protocol::Grpc).0, OPEN_STREAMS));
        let run = load::open(&target, rate, seed, between(self.pace.warm, self.pace.warm + self.pace.latency_window))?;
        ensure!(run.failed == 0, "{} of {rate:.0} requests per second failed", run.failed);
        Ok(run)
    }

    fn report_shadows(&mut self, load: &Load, pairs: &Pairs<Shadowed, Alone>) {
        let Load { name, title, .. } = load;
        let (counted, void) = pairs.counted();
        let copied = {
            let rows = |index: usize| counted.iter().map(|(with, _)| with.rows[index]).sum::<f64>();
            rows(1) / rows(0)
        };
        let label = |what: &str| format!("`iris`, gRPC {title}: {what}");
        let copies = label("requests whose copy was run");
        self.report.single(&format!("{name}_copied"), &copies, "%", Higher, 100.0 * copied, void.clone());
        let cpu = median(&counted.iter().map(|(_, without)| without.cpu).collect::<Vec<_>>());
        let used = label("CPU of the server without copies");
        self.report.single(&format!("{name}_off_cpu"), &used, "%", Lower, 100.0 * cpu, void.clone());
        let few = (copied < LEAST_COPIED).then(|| format!("only {:.0} % of the requests had a copy", 100.0 * copied));
        let void = void.or(few);
        let with = |drawn: &[usize]| Latencies::pooled(drawn.iter().map(|&pair| &counted[pair].0.latencies), 0.99);
        let without = |drawn: &[usize]| Latencies::pooled(drawn.iter().map(|&pair| &counted[pair].1.latencies), 0.99);
        let all: Vec<usize> = (0..counted.len()).collect();
        let mut add = |figure: &str, what: &str, unit, scale: f64, value: &dyn Fn(&[usize]) -> f64| {
            let found = (scale * value(&all), bootstrap(all.len(), POOLED_RESAMPLES, |drawn| scale * value(drawn)));
            self.report.with_interval(&format!("{name}_{figure}"), &label(what), unit, Lower, found, void.clone());
        };
        add("off_p99_us", "p99 without copies", "µs", 1e6, &without);
        add("on_p99_us", "p99 with copies of all requests", "µs", 1e6, &with);
        add("p99", "p99 with copies ÷ without", "", 1.0, &|drawn| with(drawn) / without(drawn));
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
