//! Every figure, and how it is found: a file for each family.
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
    load::Target,
    machine::{Moment, Usage},
    pairs::{MAX_STOLEN, Measured},
    process::{Process, Programs},
    report::{Better::Lower, Report},
    requests::Protocol,
    statistics::median,
    wire::Request,
};

mod latency;
mod magika;
mod memory;
mod start;
mod swap;
mod throughput;

/// With more than this share of the machine in other hands, two programs do not lose alike: the one with more threads
/// gets more of what is left.
const MAX_FOREIGN: f64 = 0.1;
/// A run is void when more than this share of its requests were sent late.
const MAX_LATE: f64 = 0.001;

/// The row of `iris` that is asked about.
const FLOWER: [f32; 4] = [5.7, 2.8, 4.1, 1.3];
/// Requests that may be open on a connection of an open loop before they wait in the generator.
const OPEN_STREAMS: usize = 256;

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
