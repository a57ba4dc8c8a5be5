//! How many requests a core serves: beside the echo, which has no model, and beside the model, which has no server.
//!
//! The roofline is what a server could do that costs no more than the echo and runs the model in its best batches:
//! 1 / (c_inf(b*) + c_echo), both in CPU seconds for a request, measured on the same core within the same seconds.

use anyhow::{Context, Result, ensure};

use super::{
    Bench, in_closed_loop, repository, target,
    workload::{Bare, CONVOLUTION, DIGITS, IDENTITY, IRIS, MAGIKA, Workload},
};
use crate::{
    load::{self, Saturation},
    pairs::{Measured, Pairs, Value, until_it_counts},
    report::{
        Better::{Higher, Lower},
        say,
    },
    requests::Protocol,
    statistics::median,
};

/// The model without a server.
#[derive(Clone, Copy)]
struct Inprocess {
    /// Rows per second.
    rate: f64,
    /// CPU seconds for each row.
    cpu: f64,
}

/// The server, and in the same seconds the echo and, where the workload has batches, the model itself.
type Rounds = Pairs<Saturation, (Saturation, Option<Inprocess>)>;

/// What is found with one protocol.
struct Found {
    protocol: Protocol,
    rounds: Rounds,
}

impl Bench {
    /// W1 in all three protocols; the rate over gRPC.
    pub(super) fn small(&mut self, iris: &mut Bare) -> Result<f64> {
        let found = self.saturate(&IRIS, &Protocol::ALL, Some(iris), self.pace.pairs)?;
        for found in &found {
            self.beside_the_echo(&IRIS, found, "");
        }
        let rates = |protocol| -> Vec<Value> {
            let of_protocol = found.iter().filter(|found| found.protocol == protocol);
            of_protocol.flat_map(|found| found.rounds.values(|ours, _| ours.rate)).collect()
        };
        let both = rates(Protocol::Binary).into_iter().zip(rates(Protocol::Json));
        let ratios: Vec<Value> = both
            .map(|(binary, json)| Value { number: binary.number / json.number, void: binary.void.or(json.void) })
            .collect();
        self.report.median("w1_binary_vs_json", "`iris`: REST binary ÷ REST JSON", "", Higher, &ratios);
        self.roofline("roofline_w1", &IRIS, &found[0].rounds);
        // What counts, and if nothing does, all: what follows needs some load.
        let rates = rates(Protocol::Grpc);
        let counted: Vec<f64> = rates.iter().filter(|rate| rate.void.is_none()).map(|rate| rate.number).collect();
        let all: Vec<f64> = rates.iter().map(|rate| rate.number).collect();
        Ok(median(if counted.is_empty() { &all } else { &counted }))
    }

    /// How many `iris` requests a core serves over gRPC, not reported: what other loads are a share of.
    pub(super) fn full_load(&self, iris: &Bare) -> Result<f64> {
        let repository = repository(&[(IRIS.model, &self.iris)])?;
        let server = self.programs.serve(repository.path())?;
        let request = Protocol::Grpc.request(IRIS.model, iris.model.row())?;
        let target = target(&server, Protocol::Grpc, &request, (IRIS.concurrency)(Protocol::Grpc));
        let found = until_it_counts(|| Ok(in_closed_loop(load::closed(&target, self.pace.warm, self.pace.window)?)))?;
        Ok(found.value.rate)
    }

    /// `digits`, and images of 602 KB as they are and through a convolution.
    pub(super) fn larger(&mut self) -> Result<()> {
        for found in &self.saturate(&IDENTITY, &[Protocol::Grpc, Protocol::Binary], None, self.pace.pairs)? {
            self.beside_the_echo(&IDENTITY, found, "");
        }
        for (workload, roofline) in [(&DIGITS, "roofline_digits"), (&CONVOLUTION, "roofline_w3")] {
            let mut bare = self.bare(workload)?;
            for found in self.saturate(workload, &[Protocol::Grpc], Some(&mut bare), self.pace.pairs)? {
                self.absolute(workload, &found, "");
                self.roofline(roofline, workload, &found.rounds);
            }
        }
        Ok(())
    }

    /// `magika`, if it is there.
    pub(super) fn magika(&mut self) -> Result<()> {
        if self.files(&MAGIKA).is_none() {
            return Ok(());
        }
        let mut bare = self.bare(&MAGIKA)?;
        for found in self.saturate(&MAGIKA, &[Protocol::Grpc], Some(&mut bare), self.pace.pairs)? {
            self.absolute(&MAGIKA, &found, "");
            self.roofline("roofline_magika", &MAGIKA, &found.rounds);
            let ratio = |ours: &Saturation, theirs: &(Saturation, Option<Inprocess>)| {
                theirs.1.map_or(f64::NAN, |bare| ours.rate / bare.rate)
            };
            let title = "`magika`: served ÷ in-process";
            self.report.median("magika_vs_inprocess", title, "", Higher, &found.rounds.values(ratio));
        }
        Ok(())
    }

    /// W1 with the server, and the echo, on both cores; the generator shares one of them.
    pub(super) fn on_both_cores(&mut self) -> Result<()> {
        let one = self.programs.clone();
        self.programs = one.on_both();
        let protocols = [Protocol::Grpc, Protocol::Json];
        let protocols = if self.pace.thorough { &protocols[..] } else { &protocols[..1] };
        let found = self.saturate(&IRIS, protocols, None, self.pace.second_pairs);
        self.programs = one;
        for found in &found? {
            self.beside_the_echo(&IRIS, found, "_2core");
        }
        Ok(())
    }

    /// Keeps server and echo full in turn, and runs the model in-process beside them.
    fn saturate(
        &mut self,
        workload: &Workload,
        protocols: &[Protocol],
        mut bare: Option<&mut Bare>,
        count: usize,
    ) -> Result<Vec<Found>> {
        let model = workload.model;
        let files = self.files(workload).with_context(|| format!("no files of '{model}'"))?;
        let repository = repository(&[(model, &files)])?;
        let (server, echo) = (self.programs.serve(repository.path())?, self.programs.echo()?);
        let row = match &bare {
            Some(bare) => bare.model.row().clone(),
            None => self.load(workload)?.row().clone(),
        };
        let mut all = Vec::new();
        for &protocol in protocols {
            let request = protocol.request(model, &row)?;
            let concurrency = (workload.concurrency)(protocol);
            let reply = |process| load::ask(&target(process, protocol, &request, concurrency));
            let (ours, theirs) = (reply(&server).context("the server")?, reply(&echo).context("the echo")?);
            if let (Protocol::Grpc, Some(bare)) = (protocol, &mut bare) {
                let same = Protocol::contents(&ours)? == bare.model.outputs()?;
                ensure!(same, "{model}: the server's answer is not the one in-process");
            }
            let (ours, theirs) = (protocol.outputs(&ours)?, protocol.outputs(&theirs)?);
            ensure!(ours == theirs, "{model}, {protocol:?}: the server answers {ours:?}, the echo {theirs:?}");
            all.push((request, Found { protocol, rounds: Pairs::new() }));
        }
        for round in 1..=count {
            say(format_args!("{model} under full load, round {round} of {count}"));
            for (request, Found { protocol, rounds }) in &mut all {
                let measure = |process| {
                    let target = target(process, *protocol, request, (workload.concurrency)(*protocol));
                    load::closed(&target, self.pace.warm, self.pace.window)
                };
                let beside = || -> Result<Measured<(Saturation, Option<Inprocess>)>> {
                    let echo = measure(&echo)?;
                    let echo =
                        if workload.beside_echo { in_closed_loop(echo) } else { Measured::new(echo, echo.usage) };
                    // Rooflines are of gRPC.
                    let beside = bare.as_deref_mut().filter(|_| *protocol == Protocol::Grpc);
                    let Some(bare) = beside else { return Ok(echo.map(|echo| (echo, None))) };
                    let (rate, cpu, usage) = bare.run(&self.pace)?;
                    Ok(echo.and(Measured::new(Some(Inprocess { rate, cpu }), usage)))
                };
                rounds.take(|| measure(&server).map(in_closed_loop), beside)?;
            }
        }
        Ok(all
            .into_iter()
            .map(|(_, found)| {
                self.foreign.extend(found.rounds.foreign());
                found
            })
            .collect())
    }

    /// The server's rate and the echo's, and what both take for it.
    fn absolute(&mut self, workload: &Workload, found: &Found, suffix: &str) {
        let (name, model, title) = (workload.name, workload.model, found.protocol.title());
        let cores = if suffix.is_empty() { "" } else { ", two cores" };
        let mut add = |what: &str,
                       text: &str,
                       unit,
                       better,
                       value: &dyn Fn(&Saturation, &Saturation, Option<Inprocess>) -> f64| {
            let name = format!("{name}_{}_{what}{suffix}", found.protocol.name());
            let values = found.rounds.values(|ours, (echo, bare)| value(ours, echo, *bare));
            self.report.median(&name, &format!("`{model}`, {title}{cores}: {text}"), unit, better, &values);
        };
        add("rps", "served", "req/s", Higher, &|ours, _, _| ours.rate);
        if workload.beside_echo {
            add("echo_rps", "echo", "req/s", Higher, &|_, echo, _| echo.rate);
        }
        add("cpu_us", "server CPU per request", "µs", Lower, &|ours, _, _| ours.cpu * 1e6);
        add("echo_cpu_us", "echo CPU per request", "µs", Lower, &|_, echo, _| echo.cpu * 1e6);
        // What a request costs the generator beside the echo, which answers most: so many would fill its core.
        let ceiling = "the generator's own ceiling";
        add("generator_rps", ceiling, "req/s", Higher, &|_, echo, _| echo.rate * echo.usage.seconds / echo.usage.own);
    }

    fn beside_the_echo(&mut self, workload: &Workload, found: &Found, suffix: &str) {
        self.absolute(workload, found, suffix);
        let name = format!("{}_{}_vs_echo{suffix}", workload.name, found.protocol.name());
        let cores = if suffix.is_empty() { "" } else { ", two cores" };
        let title = format!("`{}`, {}{cores}: served ÷ echo", workload.model, found.protocol.title());
        let ratios = found.rounds.values(|ours, (echo, _)| ours.rate / echo.rate);
        self.report.median(&name, &title, "", Higher, &ratios);
    }

    /// The share of the roofline that is served, and the model's own rate.
    fn roofline(&mut self, name: &str, workload: &Workload, rounds: &Rounds) {
        let model = workload.model;
        let rates = rounds.values(|_, (_, bare)| bare.map_or(f64::NAN, |bare| bare.rate));
        let title = format!("`{model}` in-process, in its best batches");
        self.report.median(&format!("{model}_inprocess_rps"), &title, "rows/s", Higher, &rates);
        let shares =
            rounds.values(|ours, (echo, bare)| ours.rate * (bare.map_or(f64::NAN, |bare| bare.cpu) + echo.cpu));
        let title = format!("`{model}`, gRPC: served ÷ roofline");
        self.report.median(name, &title, "", Higher, &shares);
    }
}
