//! Every figure, and how it is found.
//!
//! What is compared is measured in turn, within seconds, and only the ratios of such pairs are believed: a shared
//! machine is never the same for long. A pair during which the hypervisor took time away does not count.

use std::{
    cell::Cell,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::{
    inprocess::Model,
    load::{self, Saturation, Target},
    machine::{Usage, resident},
    process::{Process, Programs},
    report::{
        Better::{Higher, Lower},
        Report, say,
    },
    requests::Protocol,
    statistics::median,
    wire::Request,
};

/// A pair is void above this share of stolen time.
const MAX_STOLEN: f64 = 0.03;
/// Above this share of its core the generator, and not the server, may be what was measured.
const MAX_GENERATOR: f64 = 0.95;
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
                (format!("iris_inprocess_{rows}_us"), format!("`iris` in-process, {rows} rows at a time"));
            self.report.single(&name, &title, "µs", Lower, seconds * 1e6, stolen(&usage));
        }
        Ok(())
    }

    /// Requests per second and CPU per request of `iris`, beside the echo; the rate over gRPC.
    fn throughput(&mut self, iris: &mut Model) -> Result<f64> {
        let repository = repository(&[("iris", &self.iris)])?;
        let (server, echo) = (self.programs.serve(repository.path())?, self.programs.echo()?);
        let label = iris.label()?;
        let mut rounds: Vec<(Protocol, Request, Vec<(Saturation, Saturation)>)> = Vec::new();
        for protocol in Protocol::ALL {
            let request = protocol.request("iris", iris.row())?;
            let reply = load::ask(&target(&server, protocol, &request, protocol.concurrency()))?;
            ensure!(protocol.label(&reply)? == label, "{protocol:?}: the server's label is not the one in-process");
            protocol
                .label(&load::ask(&target(&echo, protocol, &request, protocol.concurrency()))?)
                .context("the echo")?;
            rounds.push((protocol, request, Vec::new()));
        }
        for round in 0..self.pace.pairs {
            say(format_args!("iris and echo under full load, round {} of {}", round + 1, self.pace.pairs));
            for (protocol, request, pairs) in &mut rounds {
                let measure = |process| {
                    let target = target(process, *protocol, request, protocol.concurrency());
                    load::closed(&target, self.pace.warm, self.pace.window)
                };
                pairs.push(in_turn(round, || measure(&server), || measure(&echo))?);
            }
        }
        let mut rates = Vec::new();
        for (protocol, _, pairs) in &rounds {
            let (name, title) = (protocol.name(), protocol.title());
            let all = pairs.len();
            let counted: Vec<_> =
                pairs.iter().filter(|(ours, echo)| counts(&ours.usage) && counts(&echo.usage)).collect();
            let free = |saturation: &Saturation| saturation.usage.own / saturation.usage.seconds < MAX_GENERATOR;
            let ratios: Vec<_> = counted.iter().filter(|(_, echo)| free(echo)).collect();
            let of = |value: fn(&Saturation, &Saturation) -> f64| -> Vec<f64> {
                counted.iter().map(|(ours, echo)| value(ours, echo)).collect()
            };
            let voided = all - counted.len();
            let report = &mut self.report;
            let mut median_of = |suffix: &str, what: &str, unit, better, values: &[f64]| {
                report.median(
                    &format!("w1_{name}_{suffix}"),
                    &format!("`iris`, {title}: {what}"),
                    unit,
                    better,
                    values,
                    voided,
                );
            };
            let served = of(|ours, _| ours.rate);
            median_of("rps", "served", "req/s", Higher, &served);
            median_of("echo_rps", "echo", "req/s", Higher, &of(|_, echo| echo.rate));
            median_of("cpu_us", "server CPU per request", "µs", Lower, &of(|ours, _| ours.cpu * 1e6));
            median_of("echo_cpu_us", "echo CPU per request", "µs", Lower, &of(|_, echo| echo.cpu * 1e6));
            median_of(
                "generator",
                "generator's share of its core beside the echo",
                "%",
                Lower,
                &of(|_, echo| 100.0 * echo.usage.own / echo.usage.seconds),
            );
            let values: Vec<f64> = ratios.iter().map(|(ours, echo)| ours.rate / echo.rate).collect();
            let (name, title) = (format!("w1_{name}_vs_echo"), format!("`iris`, {title}: served ÷ echo"));
            self.report.median(&name, &title, "", Higher, &values, all - ratios.len());
            self.foreign.extend(pairs.iter().flat_map(|(ours, echo)| [ours.usage.foreign, echo.usage.foreign]));
            rates.push(median(&served));
        }
        let binary: Vec<f64> =
            rounds[2].2.iter().zip(&rounds[1].2).map(|(binary, json)| binary.0.rate / json.0.rate).collect();
        self.report.median("w1_binary_vs_json", "`iris`: REST binary ÷ REST JSON", "", Higher, &binary, 0);
        let rate = rates.first().copied().unwrap_or(f64::NAN);
        ensure!(rate.is_finite(), "every window of full load was void: the machine is too busy to measure on");
        Ok(rate)
    }

    /// What the server adds to the echo's latency at `rate` gRPC requests per second.
    fn added_latency(&mut self, iris: &Model, rate: f64) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        let (server, echo) = (self.programs.serve(repository.path())?, self.programs.echo()?);
        let request = Protocol::Grpc.request("iris", iris.row())?;
        let concurrency = (Protocol::Grpc.concurrency().0, OPEN_STREAMS);
        let mut pairs = Vec::new();
        for pair in 0..self.pace.latency_pairs {
            say(format_args!("iris and echo at 10 % load, pair {} of {}", pair + 1, self.pace.latency_pairs));
            let measure = |process| {
                let end = self.pace.warm + self.pace.latency_window;
                let target = target(process, Protocol::Grpc, &request, concurrency);
                let mut run = load::open(&target, rate, pair as u64, self.pace.warm, |now, _| Ok(now >= end))?;
                ensure!(run.failed == 0, "{} requests failed at 10 % load", run.failed);
                let counts = counts(&run.usage) && run.late <= MAX_LATE;
                Ok((counts, [0.5, 0.99].map(|share| run.latencies.quantile(share) * 1e6)))
            };
            pairs.push(in_turn(pair, || measure(&server), || measure(&echo))?);
        }
        let counted: Vec<_> = pairs.iter().filter(|((ours, _), (echo, _))| *ours && *echo).collect();
        for (index, quantile) in ["p50", "p99"].into_iter().enumerate() {
            let mut add = |name: String, what: &str, value: &dyn Fn(f64, f64) -> f64| {
                let values: Vec<f64> =
                    counted.iter().map(|((_, ours), (_, echo))| value(ours[index], echo[index])).collect();
                let title = format!("`iris`, gRPC at 10 % load: {quantile} {what}");
                self.report.median(&name, &title, "µs", Lower, &values, pairs.len() - counted.len());
            };
            add(format!("served_{quantile}_us"), "served", &|ours, _| ours);
            add(format!("echo_{quantile}_us"), "of the echo", &|_, echo| echo);
            add(format!("added_{quantile}_us"), "added", &|ours, echo| ours - echo);
        }
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
        let mut steady = load::open(&target, rate, 0, self.pace.warm, |now, _| Ok(now >= end))?;
        say(format_args!("iris at 50 % load, {SWAPS} swaps"));
        let publish = |version: usize| {
            let name = version.to_string();
            std::fs::rename(staging.join(&name), repository.path().join("iris").join(&name))
        };
        let (mut asked, mut since) = (1, self.pace.warm);
        let swapping = Cell::new(self.pace.warm);
        let mut during = load::open(&target, rate, 1, self.pace.warm, |now, reply| {
            if now < self.pace.warm {
                return Ok(false);
            }
            // The generator's own replies tell when a version serves; nothing else has to ask.
            if Protocol::version(reply)? == asked {
                if asked > SWAPS {
                    swapping.set(now - self.pace.warm);
                    return Ok(true);
                }
                asked += 1;
                since = now;
                publish(asked)?;
            }
            ensure!(now - since < SWAP_TIMEOUT, "version {asked} does not answer within {SWAP_TIMEOUT:?}");
            Ok(false)
        })?;
        let void = [&steady, &during].into_iter().find_map(|run| {
            let late = (run.late > MAX_LATE).then(|| format!("{:.1} % of requests were sent late", 100.0 * run.late));
            stolen(&run.usage).or(late)
        });
        let p99 = [steady.latencies.quantile(0.99), during.latencies.quantile(0.99)];
        let failures = (steady.failed + during.failed) as f64;
        let report = &mut self.report;
        let asked = format!(
            "{SWAPS} hot swaps at 50 % load: failures among {} requests",
            during.latencies.count() + during.failed
        );
        report.single("swap_failures", &asked, "", Lower, failures, None);
        report.single("swap_steady_p99_us", "p99 without swaps", "µs", Lower, p99[0] * 1e6, void.clone());
        report.single("swap_during_p99_us", "p99 during swaps", "µs", Lower, p99[1] * 1e6, void.clone());
        report.single("swap_p99", "p99 during ÷ without swaps", "", Lower, p99[1] / p99[0], void);
        let each = swapping.get().as_secs_f64() * 1e3 / SWAPS as f64;
        report.single("swap_ms", "one hot swap, from the new files to their first answer", "ms", Lower, each, None);
        Ok(())
    }

    /// From exec to ready, above what it takes to load the library and the session.
    fn start(&mut self) -> Result<()> {
        let repository = repository(&[("iris", &self.iris)])?;
        say(format_args!("{} starts", self.pace.starts));
        let mut pairs = Vec::new();
        for pair in 0..self.pace.starts {
            let start = || Ok(self.programs.serve(repository.path())?.ready_after.as_secs_f64() * 1e3);
            let load = || Ok(self.programs.session_load(&self.iris)? * 1e3);
            pairs.push(in_turn(pair, start, load)?);
        }
        let of = |value: fn(&(f64, f64)) -> f64| -> Vec<f64> { pairs.iter().map(value).collect() };
        let report = &mut self.report;
        report.median("ready_ms", "exec to ready with `iris`", "ms", Lower, &of(|(ready, _)| *ready), 0);
        report.median(
            "load_ms",
            "library and `iris` session loaded in-process",
            "ms",
            Lower,
            &of(|(_, load)| *load),
            0,
        );
        report.median(
            "start_ms",
            "exec to ready above session load",
            "ms",
            Lower,
            &of(|(ready, load)| ready - load),
            0,
        );
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
        let mut pairs = Vec::new();
        for pair in 0..self.pace.pairs {
            say(format_args!("magika served and in-process, pair {} of {}", pair + 1, self.pace.pairs));
            let served = || {
                let saturation = load::closed(&target, self.pace.warm, self.pace.long_window)?;
                Ok((saturation.rate, saturation.usage))
            };
            let inprocess = || {
                let (seconds, usage) = model.run(rows, self.pace.long_window)?;
                Ok((rows as f64 / seconds, usage))
            };
            pairs.push(in_turn(pair, served, inprocess)?);
        }
        let counted: Vec<_> = pairs.iter().filter(|(ours, bare)| counts(&ours.1) && counts(&bare.1)).collect();
        let voided = pairs.len() - counted.len();
        let of = |value: fn(f64, f64) -> f64| -> Vec<f64> {
            counted.iter().map(|(ours, bare)| value(ours.0, bare.0)).collect()
        };
        let inprocess = format!("`magika` in-process, {rows} rows at a time, the best of {MAGIKA_BATCHES:?}");
        let report = &mut self.report;
        report.median("magika_rps", "`magika` served over gRPC", "rows/s", Higher, &of(|ours, _| ours), voided);
        report.median("magika_inprocess_rps", &inprocess, "rows/s", Higher, &of(|_, bare| bare), voided);
        report.median(
            "magika_vs_inprocess",
            "`magika`: served ÷ in-process",
            "",
            Higher,
            &of(|ours, bare| ours / bare),
            voided,
        );
        self.foreign.extend(pairs.iter().flat_map(|(ours, bare)| [ours.1.foreign, bare.1.foreign]));
        Ok(())
    }
}

/// Both, the one that comes first alternating, so that drift favours neither.
fn in_turn<A, B>(turn: usize, first: impl FnOnce() -> Result<A>, second: impl FnOnce() -> Result<B>) -> Result<(A, B)> {
    if turn % 2 == 0 {
        Ok((first()?, second()?))
    } else {
        let second = second()?;
        Ok((first()?, second))
    }
}

fn counts(usage: &Usage) -> bool {
    usage.stolen <= MAX_STOLEN
}

fn stolen(usage: &Usage) -> Option<String> {
    (!counts(usage)).then(|| format!("{:.1} % of the time was stolen", 100.0 * usage.stolen))
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
