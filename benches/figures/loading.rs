//! What those who ask for a model notice while another one is loaded and warmed.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use tidegate::tensor::Tensor;

use super::{
    Bench, OPEN_STREAMS, in_open_loop,
    order::{beside_load, order},
    repository, target,
};
use crate::{
    load::{self, Arrivals, Phase, Target, between},
    machine::Moment,
    pairs::{Measured, most_are_void, until_it_counts},
    process::{Process, Programs},
    report::{Better::Lower, say},
    requests::Protocol,
    statistics::median,
};

/// Connections over which `iris` is asked for.
const CONNECTIONS: usize = 4;

/// What was found beside one load, and in some time without one just before it.
struct Found {
    /// Seconds.
    steady: f64,
    during: f64,
    took: f64,
    void: Option<String>,
}

impl Bench {
    /// The p99 of `iris` at `rate` requests per second while `deep` is loaded again and again.
    pub(super) fn loading(&mut self, row: &Tensor, rate: f64) -> Result<()> {
        let shared = "two cores, one of which the generator shares";
        for (programs, suffix, cores) in
            [(self.programs.clone(), "1core", "one core"), (self.programs.on_both(), "2core", shared)]
        {
            let repository = repository(&[("iris", &self.iris), ("deep", &self.made.join("deep/1"))])?;
            let explicit = ["--model-control", "explicit", "--load-model", "iris"];
            let server = programs.serve_with(repository.path(), &explicit)?;
            let request = Protocol::Grpc.request("iris", row)?;
            let target = target(&server, Protocol::Grpc, &request, (CONNECTIONS, OPEN_STREAMS));
            let mut loads = Vec::new();
            for load in 1..=self.pace.loads {
                say(format_args!("iris at 30 % load, deep is loaded on {cores}: {load} of {}", self.pace.loads));
                loads.push(self.load_beside(&programs, &server, &target, rate, load as u64)?);
            }
            // After the others, so that nothing is new to the server here that was not there.
            say(format_args!("deep is loaded on {cores} with nothing asked"));
            let alone = until_it_counts(|| load_alone(&server))?;
            self.report_loads(&loads, &alone, suffix, cores);
        }
        Ok(())
    }

    fn load_beside(
        &self,
        programs: &Programs,
        server: &Process,
        target: &Target<'_>,
        rate: f64,
        seed: u64,
    ) -> Result<Found> {
        let end = self.pace.warm + self.pace.latency_window;
        let mut steady = load::open(target, rate, seed, between(self.pace.warm, end))?;
        let (mut during, took) = load_while_asking(programs, server.rest, target, rate, seed, self.pace.warm)?;
        order(server.rest, "deep", "unload")?;
        let failed = steady.failed + during.failed;
        ensure!(failed == 0, "{failed} requests failed beside a load");
        let void = [&steady, &during].into_iter().find_map(|run| in_open_loop(run, ()).void());
        let p99 = |run: &mut Arrivals| run.latencies.quantile(0.99);
        Ok(Found { steady: p99(&mut steady), during: p99(&mut during), took: took.as_secs_f64(), void })
    }

    fn report_loads(&mut self, loads: &[Found], alone: &Measured<Duration>, suffix: &str, cores: &str) {
        let void = most_are_void("loads", loads.iter().map(|load| load.void.as_ref()));
        let of = |number: fn(&Found) -> f64| {
            let counted = loads.iter().filter(|load| load.void.is_none() || void.is_some());
            median(&counted.map(number).collect::<Vec<_>>())
        };
        let (took, alone_took) = (of(|load| load.took * 1e3), alone.value.as_secs_f64() * 1e3);
        // A server that takes its time with a load can hide it well, so whoever reads the one should read the other.
        let ratio = format!("p99 during a load, which took {took:.0} ms beside {alone_took:.0} ms alone, ÷ without");
        let numbers = [
            ("load_steady_p99_us", "p99 of `iris` at 30 % load", "µs", of(|load| load.steady * 1e6)),
            ("load_during_p99_us", "its p99 while `deep` is loaded", "µs", of(|load| load.during * 1e6)),
            ("load_took_ms", "`deep` loaded and warmed beside it", "ms", took),
            ("load_p99", &ratio, "", of(|load| load.during / load.steady)),
        ];
        for (name, title, unit, value) in numbers {
            let (name, title) = (format!("{name}_{suffix}"), format!("{title}, {cores}"));
            self.report.single(&name, &title, unit, Lower, value, void.clone());
        }
        let (name, title) = (format!("load_alone_ms_{suffix}"), format!("`deep` loaded and warmed alone, {cores}"));
        self.report.single(&name, &title, "ms", Lower, alone_took, alone.void());
    }
}

/// How long the server takes to load `deep` when it has nothing else to do.
fn load_alone(server: &Process) -> Result<Measured<Duration>> {
    let begun = Moment::beside(Some(server.id()))?;
    order(server.rest, "deep", "load")?;
    let took = begun.elapsed();
    let usage = begun.until(&Moment::beside(Some(server.id()))?);
    order(server.rest, "deep", "unload")?;
    Ok(Measured::new(took, usage))
}

/// Asks as `target` says, and meanwhile has the server load `deep`; counts from that order to the answer, which is how
/// long the load took.
fn load_while_asking(
    programs: &Programs,
    rest: SocketAddr,
    target: &Target<'_>,
    rate: f64,
    seed: u64,
    warm: Duration,
) -> Result<(Arrivals, Duration)> {
    beside_load(programs.core, rest, "deep", |load| {
        let (mut begun, mut ended) = (Duration::ZERO, Duration::ZERO);
        let run = load::open(target, rate, seed, |now, _| {
            if now < warm {
                return Ok(Phase::Pass);
            }
            if load.begin()? {
                begun = now;
            }
            ended = now;
            Ok(if load.has_ended() { Phase::End } else { Phase::Count })
        })?;
        Ok((run, ended - begun))
    })
}
