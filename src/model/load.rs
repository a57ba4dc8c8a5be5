//! Loading a version: files to warmed sessions, everything that can fail done before anyone is served.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Batching,
    labels::{self, Labels},
    service_time::ServiceTime,
    warmup::{self, Sample},
};
use crate::{
    backend::{Backends, Options, Session, Signature},
    error::Error,
    id::{ModelName, Version},
    tensor::Tensor,
};

/// Turns a sample request in the protocol's JSON into tensors; given by the layer that knows JSON.
pub type DecodeSample = fn(&[u8]) -> Result<Vec<Tensor>, Error>;

/// What a version is to be made of.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: ModelName,
    pub version: Version,
    pub files: PathBuf,
    pub options: Options,
    pub instances: usize,
    pub max_batch_size: Option<usize>,
    /// `None`: when warm-up proves that it is safe.
    pub batching: Option<bool>,
    /// Files with the names of classes, by output.
    pub labels: BTreeMap<String, PathBuf>,
    /// Sample requests the author configured; one that fails, fails the load.
    pub configured_samples: Vec<PathBuf>,
    /// Folders that may hold sample requests.
    pub sample_folders: Vec<PathBuf>,
}

/// A version ready to serve.
pub struct Loaded {
    pub name: ModelName,
    pub version: Version,
    pub sessions: Vec<Box<dyn Session>>,
    pub signature: Signature,
    pub platform: &'static str,
    pub model_file: &'static str,
    pub batching: Batching,
    pub max_batch_size: Option<usize>,
    pub labels: Labels,
    pub service: ServiceTime,
    pub took: Duration,
}

/// Loads, warms and measures; blocks for as long as that takes.
///
/// # Errors
/// What the backend or a configured sample request says.
pub fn load(plan: Plan, backends: &Backends, decode: DecodeSample) -> Result<Loaded, Error> {
    let start = Instant::now();
    let backend = backends.open(&plan.files)?;
    let mut sessions = backend.load(&plan.files, &plan.options, plan.instances)?;
    let Some(first) = sessions.first_mut() else {
        return Err(Error::internal(format!("model '{}': the backend gave no session", plan.name)));
    };
    let signature = first.signature().clone();
    for note in &signature.notes {
        tracing::warn!(model = %plan.name, version = %plan.version, "{note}");
    }
    let labels = labels::read(&plan.labels, &signature).map_err(|error| error.of_model(plan.name.as_str()))?;
    let samples = collect_samples(&plan, &signature, decode)?;
    let rows_limit = plan.max_batch_size.unwrap_or(warmup::MAX_SWEEP_ROWS).min(warmup::MAX_SWEEP_ROWS);
    let warmed = warmup::warm(first.as_mut(), &samples, plan.batching, rows_limit, plan.name.as_str())?;
    for session in &mut sessions[1..] {
        warmup::rewarm(session.as_mut(), &warmed);
    }
    Ok(Loaded {
        name: plan.name,
        version: plan.version,
        sessions,
        signature,
        platform: backend.platform(),
        model_file: backend.file_name(),
        batching: warmed.batching,
        max_batch_size: plan.max_batch_size,
        labels,
        service: warmed.service,
        took: start.elapsed(),
    })
}

/// Configured samples first, then those in the folders. Only a configured one can fail the load.
fn collect_samples(plan: &Plan, signature: &Signature, decode: DecodeSample) -> Result<Vec<Sample>, Error> {
    let read = |path: &Path| -> Result<Vec<Tensor>, Error> {
        let body = std::fs::read(path).map_err(|error| Error::invalid(error.to_string()))?;
        signature.arrange(plan.name.as_str(), decode(&body)?)
    };
    let name = |path: &Path| -> Arc<str> { path.display().to_string().into() };
    let mut samples = Vec::new();
    for path in &plan.configured_samples {
        let inputs =
            read(path).map_err(|error| Error { message: format!("warm-up {}: {error}", path.display()), ..error })?;
        samples.push(Sample { name: name(path), inputs, required: true });
    }
    for path in plan.sample_folders.iter().flat_map(|folder| json_files(folder)) {
        match read(&path) {
            Ok(inputs) => samples.push(Sample { name: name(&path), inputs, required: false }),
            Err(error) => {
                tracing::warn!(model = %plan.name, sample = %path.display(), %error, "warm-up sample skipped");
            }
        }
    }
    Ok(samples)
}

fn json_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    files
}
