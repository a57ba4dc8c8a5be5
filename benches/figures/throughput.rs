//! What `iris`, a model that costs less than a request, costs in-process, and how many requests a core serves, beside
//! the echo.

use anyhow::{Context, Result, ensure};

use super::{Bench, disturbance, is_disturbed, repository, target};
use crate::{
    inprocess::Model,
    load::{self, Saturation},
    pairs::{Measured, Pairs, Value},
    report::{
        Better::{Higher, Lower},
        say,
    },
    requests::Protocol,
    statistics::median,
};

/// Above this share of its core the generator, and not the server, may be what was measured.
const MAX_GENERATOR: f64 = 0.95;
const IRIS_BATCHES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

impl Bench {
    /// `iris` in-process, alone and in batches.
    pub(super) fn sweep(&mut self, iris: &mut Model) -> Result<()> {
        for rows in IRIS_BATCHES {
            let (seconds, usage) = iris.run(rows, self.pace.sweep)?;
            let (name, title) =
                (format!("iris_inprocess_{rows}_us"), format!("`iris` in-process, one run with a batch of {rows}"));
            self.report.single(&name, &title, "µs", Lower, seconds * 1e6, disturbance(&usage));
        }
        Ok(())
    }

    /// Requests per second and CPU per request of `iris`, beside the echo; the rate over gRPC.
    pub(super) fn throughput(&mut self, iris: &mut Model) -> Result<f64> {
        let repository = repository(&[("iris", &self.iris)])?;
        let (server, echo) = (self.programs.serve(repository.path())?, self.programs.echo()?);
        let label = iris.label()?;
        let mut rounds = Vec::new();
        for protocol in Protocol::ALL {
            let request = protocol.request("iris", iris.row())?;
            let label_of = |process| -> Result<i64> {
                protocol.label(&load::ask(&target(process, protocol, &request, protocol.concurrency()))?)
            };
            ensure!(label_of(&server)? == label, "{protocol:?}: the server's label is not the one in-process");
            label_of(&echo).context("the echo")?;
            rounds.push((protocol, request, Pairs::new()));
        }
        for round in 1..=self.pace.pairs {
            say(format_args!("iris and echo under full load, round {round} of {}", self.pace.pairs));
            for (protocol, request, pairs) in &mut rounds {
                let measure = |process| {
                    let target = target(process, *protocol, request, protocol.concurrency());
                    let value = load::closed(&target, self.pace.warm, self.pace.window)?;
                    let usage = value.usage;
                    let spoiled = is_disturbed(&usage) || usage.own / usage.seconds > MAX_GENERATOR;
                    Ok(Measured { value, usage, spoiled })
                };
                pairs.take(|| measure(&server), || measure(&echo))?;
            }
        }
        for (protocol, _, pairs) in &rounds {
            let mut add = |suffix: &str, what: &str, unit, better, value: &dyn Fn(&Saturation, &Saturation) -> f64| {
                let (name, title) = (protocol.name(), protocol.title());
                let (name, title) = (format!("w1_{name}_{suffix}"), format!("`iris`, {title}: {what}"));
                self.report.median(&name, &title, unit, better, &pairs.values(value));
            };
            add("rps", "served", "req/s", Higher, &|ours, _| ours.rate);
            add("echo_rps", "echo", "req/s", Higher, &|_, echo| echo.rate);
            add("vs_echo", "served ÷ echo", "", Higher, &|ours, echo| ours.rate / echo.rate);
            add("cpu_us", "server CPU per request", "µs", Lower, &|ours, _| ours.cpu * 1e6);
            add("echo_cpu_us", "echo CPU per request", "µs", Lower, &|_, echo| echo.cpu * 1e6);
            let generator = "generator's share of its core beside the echo";
            add("generator", generator, "%", Lower, &|_, echo| 100.0 * echo.usage.own / echo.usage.seconds);
            self.foreign.extend(pairs.foreign());
        }
        let rates = |protocol| -> Vec<Value> {
            let of_protocol = rounds.iter().filter(|round| round.0 == protocol);
            of_protocol.flat_map(|(_, _, pairs)| pairs.values(|ours, _| ours.rate)).collect()
        };
        let both = rates(Protocol::Binary).into_iter().zip(rates(Protocol::Json));
        let ratios: Vec<Value> = both
            .map(|(binary, json)| Value { number: binary.number / json.number, counts: binary.counts && json.counts })
            .collect();
        self.report.median("w1_binary_vs_json", "`iris`: REST binary ÷ REST JSON", "", Higher, &ratios);
        // Void or not: what follows needs some load.
        Ok(median(&rates(Protocol::Grpc).iter().map(|rate| rate.number).collect::<Vec<_>>()))
    }
}
