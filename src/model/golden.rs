//! The golden check: before a version takes any traffic it answers requests whose answers are known.
//!
//! What a loader cannot see, a graph that runs and gives wrong numbers, is found here, while nobody but the loader has
//! asked it anything. A version that fails is a failed load, so it stays out, and the reason is shown wherever failed
//! loads are.

use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::{file, watch::Watch};
use crate::{
    backend::{Device, Session, Signature},
    error::Error,
    tensor::{DType, Tensor},
};

mod compare;
mod settings;
mod stable;

use compare::{Comparison, Tolerance, compare};
pub use settings::Settings;
pub use stable::Stable;

/// The file that is looked for when the settings name none.
pub const FILE: &str = "golden.json";

/// Bytes of the file, which is read whole; `Settings::file` tells of it.
const MAX_BYTES: u64 = 64 << 20;

/// Runs of a case whose time matters. The first may still have had something to set up, and of five the median is none
/// of the two that were interrupted.
const TIMED_RUNS: usize = 5;

/// A request and the answer it must get.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    pub inputs: Vec<Tensor>,
    /// Some of the model's outputs, or all.
    pub outputs: Vec<Tensor>,
}

/// Turns a golden file in the protocol's JSON into cases; given by the layer that knows JSON.
pub type DecodeCases = fn(&Bytes) -> Result<Vec<Case>, Error>;

/// What a version must pass.
pub struct Check {
    pub settings: Settings,
    /// Where the file may lie; the version's own folder first.
    pub folders: [PathBuf; 2],
    /// What requests get now, to be compared with.
    pub stable: Option<Stable>,
}

/// How a version that passed did.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub cases: usize,
    /// Labels that were compared, over all outputs: the classes of rows of scores, else the elements.
    pub labels: usize,
    /// The share of labels that agreed, of the output with the smallest; 0 to 1.
    pub accuracy: f64,
    /// The largest difference of two floats; infinite where only one was finite, 0 without floats.
    pub max_difference: f64,
    /// What the slowest case took by itself; with `max_latency` the median of several runs, else one run.
    pub latency: Duration,
    /// Stands for the cases and the tolerance: accuracies can be compared when it is the same.
    subject: u64,
}

impl Check {
    /// Has the sessions, one on each device, answer the cases of the file; `None` when there is no file and none is
    /// asked for. `model` is its name.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file, the case, the output, and what was found and expected; what a run or a
    /// comparison with the stable version fails with.
    pub fn run<'a>(
        &self,
        model: &str,
        sessions: impl Iterator<Item = (Device, &'a mut Box<dyn Session>)>,
        decode: DecodeCases,
    ) -> Result<Option<Outcome>, Error> {
        let Some(path) = self.find()? else { return Ok(None) };
        let named =
            |error: Error| Error { message: format!("golden check: {}: {}", path.display(), error.message), ..error };
        let (cases, subject) = self.read(&path, decode).map_err(named)?;
        let mut worst: Option<Outcome> = None;
        for (device, session) in sessions {
            let on_device = |error: Error| match device {
                Device::Cpu => error,
                Device::Cuda(_) => Error { message: format!("on {device}: {}", error.message), ..error },
            };
            let outcome = self.examine(model, session.as_mut(), &cases, subject).map_err(on_device).map_err(named)?;
            worst = Some(match worst {
                None => outcome,
                Some(other) => Outcome {
                    accuracy: outcome.accuracy.min(other.accuracy),
                    max_difference: outcome.max_difference.max(other.max_difference),
                    latency: outcome.latency.max(other.latency),
                    ..outcome
                },
            });
        }
        if let (Some(outcome), Some(allowed), Some(stable)) = (&worst, self.settings.max_accuracy_drop, &self.stable) {
            stable.compare(outcome, &cases, self.tolerance(), allowed).map_err(named)?;
        }
        Ok(worst)
    }

    /// The file, when there is one.
    fn find(&self) -> Result<Option<PathBuf>, Error> {
        let name = self.settings.file.as_deref().unwrap_or(FILE);
        // A link that leads nowhere is there, and fails when it is read.
        let is_there = |path: &PathBuf| !matches!(fs::symlink_metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound);
        let found = self.folders.iter().map(|folder| folder.join(name)).find(is_there);
        match (found, self.settings.wish()) {
            (None, Some(key)) => {
                let [own, beside] = self.folders.each_ref().map(|folder| folder.display());
                let message = format!("golden check: {key} is set, and there is no {name} in {own} nor in {beside}");
                Err(Error::invalid(message))
            }
            (found, _) => Ok(found),
        }
    }

    fn read(&self, path: &Path, decode: DecodeCases) -> Result<(Vec<Case>, u64), Error> {
        let bytes = Bytes::from(file::read(path, MAX_BYTES).map_err(Error::invalid)?);
        let cases = decode(&bytes)?;
        if cases.is_empty() {
            return Err(Error::invalid("it has no cases, which proves nothing"));
        }
        let mut hasher = DefaultHasher::new();
        (bytes, self.settings.max_difference.map(f64::to_bits)).hash(&mut hasher);
        Ok((cases, hasher.finish()))
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::new(self.settings.max_difference)
    }

    /// What one session makes of the cases, which meets every limit but the one against the stable version.
    fn examine(&self, model: &str, session: &mut dyn Session, cases: &[Case], subject: u64) -> Result<Outcome, Error> {
        let mut tally = Tally::default();
        let mut slowest = Duration::ZERO;
        for (index, case) in cases.iter().enumerate() {
            let (comparisons, took) = self.examine_case(model, session, case).map_err(|error| of_case(index, error))?;
            slowest = slowest.max(took);
            tally.add(index, case, comparisons);
        }
        tally.check(self.settings.min_accuracy)?;
        Ok(Outcome {
            cases: cases.len(),
            labels: tally.outputs.values().map(|output| output.labels).sum(),
            accuracy: tally.accuracy(),
            max_difference: tally.max_difference,
            latency: slowest,
            subject,
        })
    }

    fn examine_case(
        &self,
        model: &str,
        session: &mut dyn Session,
        case: &Case,
    ) -> Result<(Vec<Comparison>, Duration), Error> {
        let signature = session.signature().clone();
        case.check(&signature)?;
        let inputs = signature.arrange(model, case.inputs.clone())?;
        let mut times = Vec::with_capacity(TIMED_RUNS);
        let mut outputs = Vec::new();
        for _ in 0..self.settings.max_latency.map_or(1, |_| TIMED_RUNS) {
            let start = Watch::start(signature.on_thread);
            outputs = session.run(&inputs)?;
            times.push(start.elapsed());
        }
        times.sort();
        let took = times[times.len() / 2];
        let comparisons = case.compare(&signature, &outputs, self.tolerance())?;
        for (expected, found) in case.outputs.iter().zip(&comparisons) {
            if let Some(deviation) = found.deviation.as_ref().filter(|_| self.settings.judges_elements(expected.dtype))
            {
                return Err(Error::invalid(format!("output '{}': {deviation}", expected.name)));
            }
        }
        match self.settings.max_latency.filter(|limit| took > *limit) {
            None => Ok((comparisons, took)),
            Some(limit) => Err(Error::invalid(format!(
                "it takes {took:?}, the median of {TIMED_RUNS} runs, and golden.max_latency is {limit:?}"
            ))),
        }
    }
}

fn of_case(index: usize, error: Error) -> Error {
    Error { message: format!("cases[{index}]: {}", error.message), ..error }
}

impl Case {
    /// Whether the model has the outputs that are expected, and something is.
    fn check(&self, signature: &Signature) -> Result<(), Error> {
        if self.outputs.is_empty() {
            return Err(Error::invalid("it expects no output, which proves nothing"));
        }
        for (index, expected) in self.outputs.iter().enumerate() {
            let name = crate::id::shorten(&expected.name);
            let Some(spec) = signature.outputs.iter().find(|spec| spec.name == expected.name) else {
                let known: Vec<String> = signature.outputs.iter().map(|spec| format!("'{}'", spec.name)).collect();
                return Err(Error::invalid(format!(
                    "the model has no output '{name}'; its outputs are {}",
                    known.join(", ")
                )));
            };
            if self.outputs[..index].iter().any(|other| other.name == expected.name) {
                return Err(Error::invalid(format!("output '{name}' is expected twice")));
            }
            if expected.dtype != spec.dtype {
                return Err(Error::invalid(format!("output '{name}' is {}, expected {}", spec.dtype, expected.dtype)));
            }
            if expected.shape.contains(&0) {
                return Err(Error::invalid(format!(
                    "output '{name}' is expected without elements, which proves nothing"
                )));
            }
        }
        Ok(())
    }

    /// Compares each expected output with what was got, in the case's order.
    fn compare(&self, signature: &Signature, got: &[Tensor], tolerance: Tolerance) -> Result<Vec<Comparison>, Error> {
        let one = |expected: &Tensor| {
            let name = &expected.name;
            let got = got.iter().find(|got| got.name == *name);
            let got = got.ok_or_else(|| Error::internal(format!("the run gave no output '{name}'")))?;
            if got.shape != expected.shape {
                let (got, expected) = (&got.shape[..], &expected.shape[..]);
                return Err(Error::invalid(format!("output '{name}' has shape {got:?}, expected {expected:?}")));
            }
            // One number for each row is no row of scores.
            let spec = signature.outputs.iter().find(|spec| spec.name == *name);
            let has_classes = expected.shape.len() > 1 || spec.is_some_and(|spec| spec.shape.first() > Some(&1));
            let scores = has_classes && is_float(expected.dtype) && expected.shape.last() > Some(&1);
            Ok(compare(got, expected, scores, tolerance))
        };
        self.outputs.iter().map(one).collect()
    }
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::Fp16 | DType::Bf16 | DType::Fp32 | DType::Fp64)
}

/// What all cases together showed.
#[derive(Default)]
struct Tally {
    outputs: BTreeMap<Arc<str>, Agreement>,
    max_difference: f64,
}

/// How the labels of one output did.
#[derive(Default)]
struct Agreement {
    labels: usize,
    agreed: usize,
    first_miss: Option<String>,
}

impl Tally {
    fn add(&mut self, index: usize, case: &Case, comparisons: Vec<Comparison>) {
        for (expected, found) in case.outputs.iter().zip(comparisons) {
            let output = self.outputs.entry(expected.name.clone()).or_default();
            output.labels += found.labels;
            output.agreed += found.agreed;
            let miss = found.miss.map(|miss| format!("cases[{index}]: {miss}"));
            output.first_miss = output.first_miss.take().or(miss);
            self.max_difference = self.max_difference.max(found.max_difference);
        }
    }

    /// Of the output with the smallest.
    fn accuracy(&self) -> f64 {
        self.outputs.values().map(Agreement::accuracy).fold(1.0, f64::min)
    }

    fn check(&self, min_accuracy: Option<f64>) -> Result<(), Error> {
        let Some(limit) = min_accuracy else { return Ok(()) };
        let short = self.outputs.iter().find(|(_, output)| output.accuracy() < limit);
        short.map_or(Ok(()), |(name, output)| {
            let Agreement { labels, agreed, first_miss } = output;
            Err(Error::invalid(format!(
                "output '{name}': {agreed} of {labels} labels agree, an accuracy of {:.4}, and golden.min_accuracy is \
                 {limit}; the first that does not: {}",
                output.accuracy(),
                first_miss.as_deref().unwrap_or("none")
            )))
        })
    }
}

impl Agreement {
    fn accuracy(&self) -> f64 {
        self.agreed as f64 / self.labels as f64
    }
}

#[cfg(test)]
mod tests;
