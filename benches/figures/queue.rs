//! How a queue behaves when requests come at random: beside the best that any queue could do, under twice the load that
//! it can bear, and for one client beside another that wants too much.

use std::time::Duration;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use super::{
    Bench, OPEN_STREAMS, in_closed_loop, in_open_loop, repository, target,
    workload::{MAGIKA, W4, Workload},
};
use crate::{
    ideal::Curve,
    inprocess::Model,
    load::{self, Arrivals, Target, between},
    pairs::{Measured, Pairs, until_it_counts},
    process::Process,
    report::{
        Better::{Higher, Lower},
        say,
    },
    requests::Protocol,
    stub,
    wire::Request,
};

/// What every request is sent with.
const DEADLINE: Duration = Duration::from_millis(100);
const LOADS: [(&str, f64); 2] = [("50", 0.5), ("80", 0.8)];
const QUANTILES: [(&str, f64); 2] = [("p50", 0.5), ("p99", 0.99)];
const OVERLOAD: f64 = 2.0;
/// The light client's share of what the server can do, and how much more the other one wants.
const LIGHT: f64 = 0.1;
const FLOOD: f64 = 10.0;
const CONNECTIONS: usize = 4;
/// In names of figures, and how many connections the flooder has, beside a light client on one. To a server that takes
/// turns by connection, four connections are four clients, each of which may have as much as the light one.
const LAYOUTS: [(&str, usize, &str); 2] = [("", 1, "one connection"), ("_4", CONNECTIONS, "four connections")];

/// A model that is served, and how it is asked.
struct Served<'a> {
    workload: &'a Workload,
    server: Process,
    /// With a deadline.
    request: &'a Request,
    /// Without one.
    patient: &'a Request,
    _repository: Option<TempDir>,
}

/// Replies per second under full load, which loads are a share of, and why it does not count if it does not.
struct Saturation {
    rate: f64,
    void: Option<String>,
}

impl Bench {
    /// Every figure of W4 and, when it is there, of `magika`.
    pub(super) fn queues(&mut self) -> Result<()> {
        self.queue(&W4)?;
        if self.files(&MAGIKA).is_some() {
            self.queue(&MAGIKA)?;
        }
        Ok(())
    }

    fn queue(&mut self, workload: &Workload) -> Result<()> {
        let mut model = self.load(workload)?;
        let (server, repository) = match self.files(workload) {
            None => (self.programs.stub(&stub::W4)?, None),
            Some(files) => {
                let repository = repository(&[(workload.model, &files)])?;
                (self.programs.serve(repository.path())?, Some(repository))
            }
        };
        let patient = Protocol::Grpc.request(workload.model, model.row())?;
        let request = patient.clone().with_deadline(DEADLINE);
        let served = Served { workload, server, request: &request, patient: &patient, _repository: repository };
        for (name, share) in LOADS {
            self.beside_ideal(&served, &mut model, name, share)?;
        }
        self.overload(&served)?;
        self.fairness(&served, &mut model)
    }

    /// What it serves under full load at this time, found until it counts.
    fn saturation(&self, served: &Served<'_>) -> Result<Saturation> {
        say(format_args!("{} under full load", served.workload.name));
        let found = until_it_counts(|| self.full(served, self.pace.queue_window / 2))?;
        let void = found.void().map(|reason| format!("what it serves under full load is not known: {reason}"));
        Ok(Saturation { rate: found.value, void })
    }

    fn full(&self, served: &Served<'_>, window: Duration) -> Result<Measured<f64>> {
        let concurrency = (served.workload.concurrency)(Protocol::Grpc);
        let full = target(&served.server, Protocol::Grpc, served.patient, concurrency);
        Ok(in_closed_loop(load::closed(&full, self.pace.warm, window)?).map(|found| found.rate))
    }

    /// Latency beside that of the ideal queue with the echo's round trip.
    fn beside_ideal(&mut self, served: &Served<'_>, model: &mut Model, load: &str, share: f64) -> Result<()> {
        let echo = self.programs.echo()?;
        let (name, batches) = (served.workload.name, served.workload.batches);
        let saturation = self.saturation(served)?;
        let rate = share * saturation.rate;
        let (warm, end) = (self.pace.warm, self.pace.warm + self.pace.queue_window);
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.queue_pairs {
            say(format_args!("{name} at {load} % load, pair {pair} of {}", self.pace.queue_pairs));
            let seed = pair as u64;
            let arrivals: Vec<Duration> = load::poisson(rate, seed)?.take_while(|&arrival| arrival < end).collect();
            let ours = || {
                let run = with_refusals(load::open(&served.client(), rate, seed, between(warm, end))?);
                let quantiles = QUANTILES.map(|(_, share)| run.latencies.quantile(share));
                Ok(in_open_loop(&run, quantiles).unless(saturation.void.clone()))
            };
            let theirs = || {
                let times = model.sweep(batches, self.pace.short_sweep)?;
                // The round trip hardly varies, so a third of the time will do.
                let end = warm + self.pace.queue_window / 3;
                let run = load::open(&served.client_of(&echo), rate, seed, between(warm, end))?;
                ensure!(run.failed == 0, "{} requests to the echo failed", run.failed);
                let both = times.and(in_open_loop(&run, run.latencies.quantile(0.5)));
                Ok(both.map(|(times, trip)| {
                    let curve = Curve::new(times);
                    QUANTILES.map(|(_, share)| curve.best(&arrivals, warm, share) + trip)
                }))
            };
            pairs.take(ours, theirs)?;
        }
        for (index, (quantile, _)) in QUANTILES.into_iter().enumerate() {
            let mut add = |suffix: &str, what: &str, unit, value: &dyn Fn(f64, f64) -> f64| {
                let values = pairs.values(|ours: &[f64; 2], ideal: &[f64; 2]| value(ours[index], ideal[index]));
                let title = format!("`{name}`, gRPC at {load} % load: {quantile} {what}");
                self.report.median(&format!("queue{load}_{quantile}{suffix}_{name}"), &title, unit, Lower, &values);
            };
            add("_served_ms", "served", "ms", &|ours, _| ours * 1e3);
            add("_ideal_ms", "of the ideal queue with the echo's round trip", "ms", &|_, ideal| ideal * 1e3);
            add("", "served ÷ ideal", "", &|ours, ideal| ours / ideal);
        }
        self.foreign.extend(pairs.foreign());
        Ok(())
    }

    /// Twice the load that it can bear.
    fn overload(&mut self, served: &Served<'_>) -> Result<()> {
        let (name, saturation) = (served.workload.name, self.saturation(served)?);
        let (warm, window) = (self.pace.warm, self.pace.queue_window);
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.queue_pairs {
            say(format_args!("{name} at twice its load, pair {pair} of {}", self.pace.queue_pairs));
            let ours = || {
                let rate = OVERLOAD * saturation.rate;
                // As many connections more: every request shall reach the server when it is meant to.
                let flood = Target { connections: 4 * CONNECTIONS, ..served.client() };
                let run = load::open(&flood, rate, pair as u64, between(warm, warm + window))?;
                let good = run.all.within(DEADLINE) as f64 / run.usage.seconds;
                let refused = run.refusals.count() as f64 / (run.refusals.count() + run.latencies.count()) as f64;
                let found = [good, run.refusals.quantile(0.99), refused];
                Ok(in_open_loop(&run, found).unless(saturation.void.clone()))
            };
            pairs.take(ours, || self.full(served, window))?;
        }
        let title = |what: &str| format!("`{name}` at twice its load with deadlines of {DEADLINE:?}: {what}");
        let report = &mut self.report;
        let saturation = pairs.values(|_: &[f64; 3], full: &f64| *full);
        report.median(
            &format!("saturation_{name}"),
            &format!("`{name}` under full load"),
            "req/s",
            Higher,
            &saturation,
        );
        let good = pairs.values(|ours: &[f64; 3], full| ours[0] / full);
        let what = title("replies in time ÷ replies under full load");
        report.median(&format!("goodput_2x_{name}"), &what, "", Higher, &good);
        let slow = pairs.values(|ours: &[f64; 3], _| ours[1] * 1e3);
        report.median(&format!("reject_p99_ms_{name}"), &title("p99 until a refusal"), "ms", Lower, &slow);
        let refused = pairs.values(|ours: &[f64; 3], _| ours[2] * 100.0);
        report.median(&format!("refused_{name}"), &title("requests refused"), "%", Lower, &refused);
        self.foreign.extend(pairs.foreign());
        Ok(())
    }

    /// A client that asks for a tenth of what can be served, beside one that asks for all of it, on connections of their
    /// own.
    fn fairness(&mut self, served: &Served<'_>, model: &mut Model) -> Result<()> {
        let (name, saturation) = (served.workload.name, self.saturation(served)?);
        let rate = LIGHT * saturation.rate;
        let times = until_it_counts(|| model.sweep(served.workload.batches, self.pace.short_sweep))?;
        let void = saturation.void.or_else(|| times.void());
        let curve = Curve::new(times.value);
        let batch = curve.time(curve.knee()).as_secs_f64();
        let (warm, end) = (self.pace.warm, self.pace.warm + self.pace.queue_window);
        let p99 = |run| {
            let run = with_refusals(run);
            in_open_loop(&run, run.latencies.quantile(0.99)).unless(void.clone())
        };
        let layouts = if self.pace.thorough { &LAYOUTS[..] } else { &LAYOUTS[..1] };
        let light = Target { connections: 1, ..served.client() };
        for &(suffix, connections, those) in layouts {
            let flooder = Target { connections, ..served.client() };
            let mut pairs = Pairs::new();
            for pair in 1..=self.pace.queue_pairs {
                say(format_args!("{name} beside a flooder on {those}, pair {pair} of {}", self.pace.queue_pairs));
                let seed = pair as u64;
                let beside = || {
                    let flood = (&flooder, FLOOD * rate);
                    Ok(p99(load::beside((&light, rate), flood, seed, between(warm, end))?))
                };
                let alone = || Ok(p99(load::open(&light, rate, seed, between(warm, end))?));
                pairs.take(beside, alone)?;
            }
            let mut add = |figure: &str, what: &str, unit, value: &dyn Fn(f64, f64) -> f64| {
                let (figure, title) = (format!("{figure}{suffix}_{name}"), format!("`{name}`, a light client: {what}"));
                self.report.median(&figure, &title, unit, Lower, &pairs.values(|beside, alone| value(*beside, *alone)));
            };
            add("light_p99_alone_ms", "p99 alone at 10 % load", "ms", &|_, alone| alone * 1e3);
            let flooder = format!("p99 beside a flooder of ten times as much on {those}");
            add("light_p99_beside_ms", &flooder, "ms", &|beside, _| beside * 1e3);
            let ratio = format!("{flooder}, less one batch, ÷ alone");
            add("fairness_p99", &ratio, "", &|beside, alone| (beside - batch) / alone);
            self.foreign.extend(pairs.foreign());
        }
        Ok(())
    }
}

impl Served<'_> {
    /// Connections that many strangers share.
    fn client(&self) -> Target<'_> {
        self.client_of(&self.server)
    }

    fn client_of(&self, process: &Process) -> Target<'_> {
        target(process, Protocol::Grpc, self.request, (CONNECTIONS, OPEN_STREAMS))
    }
}

/// Where a refusal is no answer, it counts as one that came with the deadline.
fn with_refusals(mut run: Arrivals) -> Arrivals {
    (0..run.refusals.count()).for_each(|_| run.latencies.record(DEADLINE));
    run
}
