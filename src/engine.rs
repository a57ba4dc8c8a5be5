//! The request path, top to bottom: find the version, check the inputs, let it run, choose the outputs.

use std::{sync::Arc, time::Instant};

use crate::{
    error::{Code, Error},
    model::{ModelVersion, Refused, catalog::CatalogReader, schedule::Urgency},
    tensor::Tensor,
};

/// Answers inference requests from the versions in the catalog.
#[derive(Clone)]
pub struct Engine {
    catalog: CatalogReader,
}

/// The version that a request will run on, and how it was asked for.
pub struct Target {
    pub version: Arc<ModelVersion>,
    /// Whether the request named the version.
    pinned: bool,
}

/// One request, decoded.
pub struct Request<'a> {
    pub inputs: Vec<Tensor>,
    /// Names of the outputs to return, in that order; empty for all.
    pub outputs: &'a [Arc<str>],
    pub urgency: Urgency,
}

impl Engine {
    pub fn new(catalog: CatalogReader) -> Self {
        Self { catalog }
    }

    pub fn catalog(&self) -> &CatalogReader {
        &self.catalog
    }

    /// Chooses the version for a request; `version` empty or `None` means the default one.
    ///
    /// # Errors
    /// `NotFound` and `NotReady` naming the model.
    pub fn resolve(&self, model: &str, version: Option<&str>) -> Result<Target, Error> {
        let pinned = version.filter(|version| !version.is_empty());
        let version = self.catalog.load().find(model, pinned)?.clone();
        Ok(Target { version, pinned: pinned.is_some() })
    }

    /// Runs the request on `target`, or on its successor when the target stopped taking requests meanwhile.
    ///
    /// # Errors
    /// `InvalidArgument` for inputs or outputs that do not fit the model, else what the queue or the run says.
    pub async fn infer(&self, target: &mut Target, request: Request<'_>) -> Result<Vec<Tensor>, Error> {
        if request.urgency.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Error::new(Code::DeadlineExceeded, "the deadline had passed when the request arrived"));
        }
        let mut inputs = request.inputs;
        // One more look at the catalog makes version changes lossless: a version stops taking requests only after
        // its successor was published.
        for _ in 0..2 {
            let version = &target.version;
            let chosen = choose(version, request.outputs)?;
            let arranged = version.signature.arrange(version.name.as_str(), inputs)?;
            match version.infer(arranged, &request.urgency).await {
                Ok(outputs) => return Ok(select(outputs, &chosen)),
                Err(Refused::Error(error)) => return Err(error),
                Err(Refused::Draining(back)) => inputs = back,
            }
            let pinned = target.pinned.then(|| target.version.version.as_str());
            let successor = self.catalog.load().find(target.version.name.as_str(), pinned)?.clone();
            target.version = successor;
        }
        Err(Error::new(Code::NotReady, format!("model '{}' is being unloaded", target.version.name)))
    }
}

/// Positions of the requested outputs in the signature; empty for all.
fn choose(version: &ModelVersion, names: &[Arc<str>]) -> Result<Vec<usize>, Error> {
    let outputs = &version.signature.outputs;
    names
        .iter()
        .map(|name| {
            outputs.iter().position(|spec| spec.name == *name).ok_or_else(|| {
                let known: Vec<String> = outputs.iter().map(|spec| format!("'{}'", spec.name)).collect();
                Error::invalid(format!(
                    "model '{}' has no output '{}'; its outputs are {}",
                    version.name,
                    crate::id::shorten(name),
                    known.join(", ")
                ))
            })
        })
        .collect()
}

fn select(outputs: Vec<Tensor>, chosen: &[usize]) -> Vec<Tensor> {
    if chosen.is_empty() { outputs } else { chosen.iter().map(|&index| outputs[index].clone()).collect() }
}
