//! Every figure, and how it is found.
//!
//! Names are those that later reports keep; `w1` stands for `iris`, a model that costs less than a request.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::{
    inprocess::Model,
    load::{self, Phase, Saturation, Target, between},
    machine::{Moment, Usage, resident},
    pairs::{MAX_STOLEN, Measured, Pairs, Value},
    process::{Process, Programs},
    report::{
        Better::{Higher, Lower},
        Report, say,
    },
    requests::Protocol,
    statistics::median,
    wire::Request,
};

/// Above this share of its core the generator, and not the server, may be what was measured.
const MAX_GENERATOR: f64 = 0.95;
/// With more than this share of the machine in other hands, two programs do not lose alike: the one with more threads
/// gets more of what is left.
const MAX_FOREIGN: f64 = 0.1;
/// A run is void when more than this share of its requests were sent late.
const MAX_LATE: f64 = 0.001;

/// The row of `iris` that is asked about.
const FLOWER: [f32; 4] = [5.7, 2.8, 4.1, 1.3];
const IRIS_BATCHES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const MAGIKA_BATCHES: [usize; 4] = [1, 2, 4, 8];
/// Enough to fill batches of four while the next four wait; more would only wait longer.
const MAGIKA_CONCURRENCY: (usize, usize) = (4, 2);
/// Requests that may be open on a connection of an open loop before they wait in the generator.
const OPEN_STREAMS: usize = 256;
const SWAPS: usize = 20;
/// The server waits for a second without change before it takes new files for complete.
const SETTLING: Duration = Duration::from_millis(900);
/// How long one swap may take.
const SWAP_TIMEOUT: Duration = Duration::from_secs(30);
const MEGABYTE: f64 = 1e6;

/// How long is measured, and how often.
#[derive(Clone, Copy)]
pub struct Pace {
    pairs: usize,
    warm: Duration,
    window: Duration,
    /// For `magika`, of which there are few runs in a second.
    long_window: Duration,
    latency_pairs: usize,
    latency_window: Duration,
    starts: usize,
    steady: Duration,
    sweep: Duration,
}

impl Pace {
    pub const QUICK: Self = Self {
        pairs: 5,
        warm: Duration::from_millis(300),
        window: Duration::from_secs(1),
        long_window: Duration::from_secs(2),
        latency_pairs: 5,
        latency_window: Duration::from_secs(3),
        starts: 5,
        steady: Duration::from_secs(5),
        sweep: Duration::from_millis(300),
    };
    pub const FULL: Self = Self {
        pairs: 10,
        warm: Duration::from_millis(500),
        window: Duration::from_secs(8),
        long_window: Duration::from_secs(6),
        latency_pairs: 10,
        latency_window: Duration::from_secs(6),
        starts: 10,
        steady: Duration::from_secs(20),
        sweep: Duration::from_secs(2),
    };
}

/// Measures, and fills the report.
pub struct Bench {
    programs: Programs,
    pace: Pace,
    iris: PathBuf,
    pub report: Report,
    /// The machine's shares that other processes took, a number for each window.
    foreign: Vec<f64>,
}

impl Bench {
    /// # Errors
    /// When there is no `iris` in `models`.
    pub fn new(programs: Programs, pace: Pace, models: PathBuf, report: Report) -> Result<Self> {
        let iris = models.join("iris/1");
        ensure!(iris.join("model.onnx").is_file(), "{} has no model.onnx", iris.display());
        Ok(Self { programs, pace, iris, report, foreign: Vec::new() })
    }

    /// Measures everything; `magika` is that model's file.
    ///
    /// # Errors
    /// When something that must work does not.
    pub fn measure(&mut self, magika: Option<&Path>) -> Result<()> {
        let magika = magika.map(|file| file.canonicalize().with_context(|| format!("no model at {}", file.display())));
        let magika = magika.transpose()?.and_then(|file| Some(file.parent()?.to_owned()));
        let mut iris = self.load(&self.iris, |index| FLOWER[index % FLOWER.len()].to_le_bytes())?;
        self.sweep(&mut iris)?;
        let rate = self.throughput(&mut iris)?;
        self.added_latency(&iris, rate / 10.0)?;
        self.swaps(&iris, rate / 2.0)?;
        self.start()?;
        self.memory(magika.as_deref())?;
        if let Some(files) = magika {
            self.magika(&files)?;
        }
        let foreign = 100.0 * median(&self.foreign);
        self.report.single("foreign", "other processes' share of the machine meanwhile", "%", Lower, foreign, None);
        Ok(())
    }

    fn load(&self, files: &Path, element: impl Fn(usize) -> [u8; 4]) -> Result<Model> {
        Model::load(&self.programs.onnxruntime, files, self.programs.core, element)
    }

    /// `iris` in-process, alone and in batches.
    fn sweep(&mut self, iris: &mut Model) -> Result<()> {
        for rows in IRIS_BATCHES {
            let (seconds, usage) = iris.run(rows, self.pace.sweep)?;
            let (name, title) =
                (format!("iris_inprocess_{rows}_us"), format!("`iris` in-process, one run with a batch of {rows}"));
            self.report.single(&name, &title, "µs", Lower, seconds * 1e6, disturbance(&usage));
        }
        Ok(())
    }

    /// Requests per second and CPU per request of `iris`, beside the echo; the rate over gRPC.
    fn throughput(&mut self, iris: &mut Model) -> Result<f64> {
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

    /// What the server adds to the echo's latency at `rate` gRPC requests per second.
    fn added_latency(&mut self, iris: &Model, rate: f64) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        let (server, echo) = (self.programs.serve(repository.path())?, self.programs.echo()?);
        let request = Protocol::Grpc.request("iris", iris.row())?;
        let concurrency = (Protocol::Grpc.concurrency().0, OPEN_STREAMS);
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.latency_pairs {
            say(format_args!("iris and echo at 10 % load, pair {pair} of {}", self.pace.latency_pairs));
            let measure = |process| {
                let end = self.pace.warm + self.pace.latency_window;
                let target = target(process, Protocol::Grpc, &request, concurrency);
                let mut run = load::open(&target, rate, pair as u64, between(self.pace.warm, end))?;
                ensure!(run.failed == 0, "{} requests failed at 10 % load", run.failed);
                let value = [0.5, 0.99].map(|share| run.latencies.quantile(share) * 1e6);
                Ok(Measured { value, usage: run.usage, spoiled: is_disturbed(&run.usage) || run.late > MAX_LATE })
            };
            pairs.take(|| measure(&server), || measure(&echo))?;
        }
        for (index, quantile) in ["p50", "p99"].into_iter().enumerate() {
            let mut add = |name: &str, what: &str, value: &dyn Fn(f64, f64) -> f64| {
                let values = pairs.values(|ours: &[f64; 2], echo: &[f64; 2]| value(ours[index], echo[index]));
                let (name, title) =
                    (format!("{name}_{quantile}_us"), format!("`iris`, gRPC at 10 % load: {quantile} {what}"));
                self.report.median(&name, &title, "µs", Lower, &values);
            };
            add("served", "served", &|ours, _| ours);
            add("echo", "of the echo", &|_, echo| echo);
            add("added", "added", &|ours, echo| ours - echo);
        }
        self.foreign.extend(pairs.foreign());
        Ok(())
    }

    /// Twenty new versions of `iris`, one after the other, at `rate` gRPC requests per second.
    fn swaps(&mut self, iris: &Model, rate: f64) -> Result<()> {
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

    /// From exec to ready, above what it takes to load the library and the session.
    fn start(&mut self) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        say(format_args!("{} starts", self.pace.starts));
        let mut pairs = Pairs::new();
        for _ in 0..self.pace.starts {
            let start = || Ok(self.programs.serve(repository.path())?.ready_after.as_secs_f64() * 1e3);
            let load = || Ok(self.programs.session_load(&self.iris)? * 1e3);
            pairs.take(|| watched(start), || watched(load))?;
        }
        let report = &mut self.report;
        report.median("ready_ms", "exec to ready with `iris`", "ms", Lower, &pairs.values(|ready, _| *ready));
        let title = "library and `iris` session loaded in-process";
        report.median("load_ms", title, "ms", Lower, &pairs.values(|_, load| *load));
        let title = "exec to ready above session load";
        report.median("start_ms", title, "ms", Lower, &pairs.values(|ready, load| ready - load));
        Ok(())
    }

    /// Resident memory with no model, and what models add.
    fn memory(&mut self, magika: Option<&Path>) -> Result<()> {
        let measure = |models: &[(&str, &Path)]| -> Result<f64> {
            let repository = repository(models)?;
            let sizes: Vec<f64> = (0..3)
                .map(|_| Ok(resident(self.programs.serve(repository.path())?.id())? / MEGABYTE))
                .collect::<Result<_>>()?;
            Ok(median(&sizes))
        };
        let idle = measure(&[])?;
        let mut added = Vec::new();
        let models = [("iris", Some(self.iris.as_path())), ("magika", magika)];
        for (name, files) in models.into_iter().filter_map(|(name, files)| Some((name, files?))) {
            let file = std::fs::metadata(files.join("model.onnx"))?.len() as f64 / MEGABYTE;
            added.push((name, file, measure(&[(name, files)])? - idle));
        }
        self.report.single("idle_rss_mb", "resident memory, ready with no model", "MB", Lower, idle, None);
        for (name, file, more) in added {
            let title = format!("resident memory that `{name}` adds (its file: {file:.1} MB)");
            self.report.single(&format!("{name}_rss_mb"), &title, "MB", Lower, more, None);
        }
        Ok(())
    }

    /// `magika` served, and the same rows in-process.
    fn magika(&mut self, files: &Path) -> Result<()> {
        let mut model = self.load(files, |index| (index as u32 % 256).to_le_bytes())?;
        let mut best = (f64::NEG_INFINITY, 1);
        for rows in MAGIKA_BATCHES {
            let rate = rows as f64 / model.run(rows, self.pace.sweep)?.0;
            best = if rate > best.0 { (rate, rows) } else { best };
        }
        let rows = best.1;
        let repository = repository(&[("magika", files)])?;
        let server = self.programs.serve(repository.path())?;
        let request = Protocol::Grpc.request("magika", model.row())?;
        let target = target(&server, Protocol::Grpc, &request, MAGIKA_CONCURRENCY);
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.pairs {
            say(format_args!("magika served and in-process, pair {pair} of {}", self.pace.pairs));
            let served = || {
                let run = load::closed(&target, self.pace.warm, self.pace.long_window)?;
                Ok(Measured { value: run.rate, usage: run.usage, spoiled: is_disturbed(&run.usage) })
            };
            let inprocess = || {
                let (seconds, usage) = model.run(rows, self.pace.long_window)?;
                Ok(Measured { value: rows as f64 / seconds, usage, spoiled: is_disturbed(&usage) })
            };
            pairs.take(served, inprocess)?;
        }
        let inprocess = format!("`magika` in-process, batches of {rows}, the best of {MAGIKA_BATCHES:?}");
        let report = &mut self.report;
        report.median("magika_rps", "`magika` served over gRPC", "rows/s", Higher, &pairs.values(|ours, _| *ours));
        report.median("magika_inprocess_rps", &inprocess, "rows/s", Higher, &pairs.values(|_, bare| *bare));
        let ratios = pairs.values(|ours, bare| ours / bare);
        report.median("magika_vs_inprocess", "`magika`: served ÷ in-process", "", Higher, &ratios);
        self.foreign.extend(pairs.foreign());
        Ok(())
    }
}

/// Calls `measure` and watches the machine meanwhile; what is measured is a process of its own, so others are not told
/// from it.
fn watched<T>(measure: impl FnOnce() -> Result<T>) -> Result<Measured<T>> {
    let start = Moment::now(None)?;
    let value = measure()?;
    let usage = start.until(&Moment::now(None)?);
    Ok(Measured { value, usage, spoiled: false })
}

fn is_disturbed(usage: &Usage) -> bool {
    usage.foreign > MAX_FOREIGN
}

/// Why a figure that was taken once does not count, judged by the machine.
fn disturbance(usage: &Usage) -> Option<String> {
    let percent = |share: f64| 100.0 * share;
    if usage.stolen > MAX_STOLEN {
        Some(format!("{:.0} % of the time was stolen", percent(usage.stolen)))
    } else {
        is_disturbed(usage).then(|| format!("other processes took {:.0} % of the machine", percent(usage.foreign)))
    }
}

fn target<'a>(
    process: &Process,
    protocol: Protocol,
    request: &'a Request,
    (connections, streams): (usize, usize),
) -> Target<'a> {
    let address = if protocol == Protocol::Grpc { process.grpc } else { process.rest };
    Target { address, pid: process.id(), request, connections, streams }
}

/// A folder of models, each with one version whose files lie elsewhere.
fn repository(models: &[(&str, &Path)]) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    for (name, files) in models {
        let model = folder.path().join(name);
        std::fs::create_dir(&model)?;
        symlink(files, model.join("1"))?;
    }
    Ok(folder)
}
