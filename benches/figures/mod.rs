//! Every figure, and how it is found: a file for each family.
//!
//! Names are those that later reports keep; `w1` stands for `iris`, a model that costs less than a request.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use tempfile::TempDir;

use crate::{
    load::{Arrivals, Saturation, Target},
    machine::{Moment, Usage},
    pairs::Measured,
    process::{Process, Programs},
    report::{Better::Lower, Report},
    requests::Protocol,
    statistics::median,
    wire::Request,
};

mod latency;
mod loading;
mod memory;
mod order;
mod peer;
mod queue;
mod shadow;
mod shared_memory;
mod start;
mod swap;
mod text;
mod throughput;
mod workload;

pub use peer::Peer;

/// A run is void when the latencies of more than this share of its requests say nothing.
const MAX_HELD_UP: f64 = 0.3;
/// Above this share of its core the generator, and not the server, may be what was measured.
const MAX_GENERATOR: f64 = 0.95;

/// Requests that may be open on a connection of an open loop before they wait in the generator.
const OPEN_STREAMS: usize = 256;

/// How long is measured, and how often.
#[derive(Clone, Copy)]
pub struct Pace {
    pairs: usize,
    /// Of what comes second: two cores, and shared memory.
    second_pairs: usize,
    warm: Duration,
    window: Duration,
    /// The model alone, beside the windows of server and echo, unless its runs are slow: then it has a window as well.
    bare: Duration,
    latency_pairs: usize,
    latency_window: Duration,
    queue_pairs: usize,
    queue_window: Duration,
    starts: usize,
    /// Before each swap.
    steady: Duration,
    /// Each batch in-process; beside other things, in the same seconds, it is less.
    sweep: Duration,
    short_sweep: Duration,
    /// Loads of another model, each beside some time without.
    loads: usize,
    /// Servers started for each figure of memory.
    memory_starts: usize,
    /// Loads and unloads after which memory must be what it was.
    cycles: usize,
    /// Of texts, each of which takes some ten milliseconds.
    text_pairs: usize,
    text_window: Duration,
    text_latency_window: Duration,
    /// Whether there is time for variants of figures that have no target of their own.
    thorough: bool,
}

impl Pace {
    /// By the sum of its windows, pauses and starts 325 s on two cores, of 360 that a quick run may take.
    pub const QUICK: Self = Self {
        pairs: 5,
        second_pairs: 3,
        warm: Duration::from_millis(100),
        window: Duration::from_secs(1),
        bare: Duration::from_millis(300),
        latency_pairs: 3,
        latency_window: Duration::from_secs(1),
        queue_pairs: 3,
        queue_window: Duration::from_secs(1),
        starts: 5,
        steady: Duration::from_millis(200),
        sweep: Duration::from_millis(100),
        short_sweep: Duration::from_millis(50),
        loads: 3,
        memory_starts: 1,
        cycles: 100,
        text_pairs: 2,
        text_window: Duration::from_secs(4),
        text_latency_window: Duration::from_secs(6),
        thorough: false,
    };
    /// By the same sum 57 minutes, of an hour.
    pub const FULL: Self = Self {
        pairs: 10,
        second_pairs: 6,
        warm: Duration::from_millis(500),
        window: Duration::from_secs(5),
        bare: Duration::from_secs(2),
        latency_pairs: 10,
        latency_window: Duration::from_secs(6),
        queue_pairs: 5,
        queue_window: Duration::from_secs(8),
        starts: 10,
        steady: Duration::from_secs(1),
        sweep: Duration::from_secs(2),
        short_sweep: Duration::from_millis(250),
        loads: 15,
        memory_starts: 3,
        cycles: 1000,
        text_pairs: 5,
        text_window: Duration::from_secs(16),
        text_latency_window: Duration::from_secs(60),
        thorough: true,
    };
}

/// Where models lie.
pub struct Models {
    /// The folder of those that are shipped.
    pub shipped: PathBuf,
    /// The folder of those that are made for the benchmark.
    pub made: PathBuf,
    /// The model file of `magika`.
    pub magika: Option<PathBuf>,
    /// The folder of `all-MiniLM-L6-v2`.
    pub minilm: Option<PathBuf>,
}

/// Figures that are found together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Family {
    /// `iris` under full load.
    Small,
    /// `digits` and large images under full load.
    Larger,
    SharedMemory,
    Magika,
    Latency,
    /// Beside the ideal queue, under overload, and with clients that want too much.
    Queue,
    Swap,
    /// `iris` while copies of all requests go to another version.
    Shadow,
    Start,
    Memory,
    /// `iris` while another model is loaded.
    Loading,
    /// Texts of many lengths through `all-MiniLM-L6-v2`.
    Text,
    /// `iris` with both cores.
    BothCores,
}

/// Measures, and fills the report.
pub struct Bench {
    programs: Programs,
    pace: Pace,
    models: PathBuf,
    made: PathBuf,
    iris: PathBuf,
    /// The folder of `magika`'s version.
    magika: Option<PathBuf>,
    /// The folder of all-MiniLM-L6-v2.
    minilm: Option<PathBuf>,
    pub report: Report,
    /// The cores' shares that other processes took, a number for each window.
    foreign: Vec<f64>,
}

impl Bench {
    /// # Errors
    /// When a model is not where it should be.
    pub fn new(programs: Programs, pace: Pace, models: &Models, report: Report) -> Result<Self> {
        let there = |path: &Path| path.canonicalize().with_context(|| format!("there is no {}", path.display()));
        let (shipped, made) = (there(&models.shipped)?, there(&models.made)?);
        let iris = there(&shipped.join("iris/1"))?;
        let magika = models.magika.as_deref().map(there).transpose()?;
        let magika = magika.and_then(|file| Some(file.parent()?.to_owned()));
        let minilm = models.minilm.as_deref().map(there).transpose()?;
        Ok(Self { programs, pace, models: shipped, made, iris, magika, minilm, report, foreign: Vec::new() })
    }

    /// Measures the `families` of figures, or all of them when none is named.
    ///
    /// # Errors
    /// When something that must work does not.
    pub fn measure(&mut self, families: &[Family]) -> Result<()> {
        let begun = Instant::now();
        let all = Family::value_variants();
        let families = if families.is_empty() { all } else { families };
        let mut iris = self.bare(&workload::IRIS)?;
        let rate = if families.contains(&Family::Small) { self.small(&mut iris)? } else { self.full_load(&iris)? };
        for family in all.iter().filter(|family| families.contains(family)) {
            match family {
                Family::Small => {}
                Family::Larger => self.larger()?,
                Family::SharedMemory => self.shared_memory()?,
                Family::Magika => self.magika()?,
                Family::Latency => self.added_latency(&iris, rate / 10.0)?,
                Family::Queue => self.queues()?,
                Family::Swap => self.swaps(&iris, rate / 2.0)?,
                Family::Shadow => self.shadows(&iris, rate / 4.0)?,
                Family::Start => self.start()?,
                Family::Memory => self.memory(self.magika.clone().as_deref())?,
                Family::Loading => self.loading(iris.model.row(), rate * 0.3)?,
                Family::Text => self.texts()?,
                Family::BothCores => self.on_both_cores()?,
            }
        }
        if !self.foreign.is_empty() {
            let foreign = 100.0 * median(&self.foreign);
            self.report.single("foreign", "other processes' share of the cores meanwhile", "%", Lower, foreign, None);
        }
        let took = begun.elapsed().as_secs_f64();
        self.report.single("took_s", "how long it took to measure all of this", "s", Lower, took, None);
        Ok(())
    }
}

/// Calls `measure` and watches this thread's core meanwhile. What is measured is a process of its own that ends with
/// it, so on its core nobody can be told from it.
fn watched<T>(measure: impl FnOnce() -> Result<T>) -> Result<Measured<T>> {
    let start = Moment::here()?;
    let value = measure()?;
    Ok(Measured::new(value, start.until(&Moment::here()?)))
}

/// What was found in an open loop, unless the generator was held up.
fn in_open_loop<T>(run: &Arrivals, value: T) -> Measured<T> {
    Measured::new(value, run.usage).unless(held_up(run))
}

/// What a closed loop found, unless the generator is what was measured.
fn in_closed_loop(found: Saturation) -> Measured<Saturation> {
    Measured::new(found, found.usage).unless(limited(&found.usage))
}

fn held_up(run: &Arrivals) -> Option<String> {
    let share = 100.0 * run.held_up;
    (run.held_up > MAX_HELD_UP).then(|| format!("the generator was held up during {share:.0} % of the requests"))
}

/// The generator had no time left although the server had some.
fn limited(usage: &Usage) -> Option<String> {
    let share = usage.own / usage.seconds;
    (share > MAX_GENERATOR && usage.server / usage.seconds < MAX_GENERATOR)
        .then(|| format!("the generator took {:.0} % of its core", 100.0 * share))
}

fn target<'a>(
    process: &Process,
    protocol: Protocol,
    request: &'a Request,
    (connections, streams): (usize, usize),
) -> Target<'a> {
    let address = if protocol == Protocol::Grpc { process.grpc } else { process.rest };
    Target { address, pid: Some(process.id()), request, connections, streams }
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
