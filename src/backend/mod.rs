//! Running a graph: the one trait every model format implements, and what a graph says of its inputs and outputs.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    tensor::{Tensor, gather},
};

#[cfg(feature = "candle")]
pub mod candle;
mod declared;
mod device;
pub mod onnx;
mod signature;

pub use declared::{Declaration, Interface};
pub use device::{Device, DeviceKind, InstanceGroup};
pub use signature::{Pairs, Signature, TensorSpec};

/// Turns a directory of model files into sessions that can run.
pub trait Backend: Send + Sync {
    /// The name that a model's configuration may ask for, `onnxruntime` for instance.
    fn name(&self) -> &'static str;

    /// The name of the file in a version's directory that makes this backend responsible for it.
    fn file_name(&self) -> &'static str;

    /// Further names of that file.
    fn other_file_names(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether its models take tokens, and nothing else, so that they need a tokenizer.
    fn takes_tokens(&self) -> bool {
        false
    }

    /// The platform that metadata reports, `onnxruntime_onnx` for instance.
    fn platform(&self) -> &'static str;

    /// The number of GPUs that its sessions could run on.
    fn gpus(&self) -> usize;

    /// Loads `instances` sessions of the model in the file `model`; they share what they can.
    ///
    /// # Errors
    /// `InvalidArgument` for files that cannot be served, `NotReady` for a device that cannot be had,
    /// `Internal` otherwise; the message names the file or the option.
    fn load(&self, model: &Path, options: &Options, instances: usize) -> Result<Vec<Box<dyn Session>>, Error>;
}

/// One loaded copy of a model, owned and driven by exactly one thread.
pub trait Session: Send {
    fn signature(&self) -> &Signature;

    /// Runs the graph once. `inputs` are in the order of the signature, and only optional ones may be left out; the
    /// results are in its order too.
    ///
    /// # Errors
    /// `InvalidArgument` when the inputs made the run fail, `Internal` otherwise.
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error>;

    /// The inputs of a run that `requests` share, which have the same ones in the same order.
    fn gather(&self, requests: &[&[Tensor]]) -> Vec<Tensor> {
        let inputs = requests.first().map_or(0, |inputs| inputs.len());
        (0..inputs).map(|input| gather(&requests.iter().map(|inputs| &inputs[input]).collect::<Vec<_>>())).collect()
    }
}

/// The backends a server was built with, by the file that marks their format.
#[derive(Clone)]
pub struct Backends(Arc<[Arc<dyn Backend>]>);

impl Backends {
    pub fn new(backends: impl IntoIterator<Item = Arc<dyn Backend>>) -> Self {
        Self(backends.into_iter().collect())
    }

    /// The backend for the model in `directory`, and the model's file there. Its author may have named either; a
    /// folder of the file's name that holds the file will do as well, and the folder `onnx` that Hugging Face has for it.
    ///
    /// # Errors
    /// `InvalidArgument` for a backend that is not built in, and when the directory holds no file that any knows.
    pub fn open(
        &self,
        directory: &Path,
        name: Option<&str>,
        file_name: Option<&str>,
    ) -> Result<(Arc<dyn Backend>, PathBuf), Error> {
        let named: Vec<_> = self.0.iter().filter(|backend| name.is_none_or(|name| backend.name() == name)).collect();
        if named.is_empty() {
            let known: Vec<_> = self.0.iter().map(|backend| backend.name()).collect();
            let name = crate::id::shorten(name.unwrap_or_default());
            return Err(Error::invalid(format!("backend '{name}' is not supported; there is {}", known.join(", "))));
        }
        let file_of = |backend: &dyn Backend| {
            let path = directory.join(file_name.unwrap_or(backend.file_name()));
            let mut paths = vec![path.join(backend.file_name()), path];
            if file_name.is_none() {
                paths.extend(backend.other_file_names().iter().map(|name| directory.join(name)));
            }
            paths.into_iter().find(|path| path.is_file())
        };
        let found = named.iter().find_map(|backend| Some((Arc::clone(backend), file_of(backend.as_ref())?)));
        found.ok_or_else(|| {
            let names: Vec<_> = named.iter().map(|backend| file_name.unwrap_or(backend.file_name())).collect();
            Error::invalid(format!("{} has no {}", directory.display(), names.join(" or ")))
        })
    }

    /// Whether `name` is a model file that some backend opens.
    pub fn knows(&self, name: &str) -> bool {
        self.0.iter().any(|backend| backend.file_name() == name || backend.other_file_names().contains(&name))
    }

    /// The files that mark a directory as a model, most preferred first.
    pub fn file_names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|backend| backend.file_name())
    }
}

/// How much a graph is rewritten before it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizationLevel {
    Disable,
    Basic,
    Extended,
    #[default]
    All,
}

/// The type that a model computes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    #[default]
    Float32,
    Float16,
    Bfloat16,
}

/// What a model's author may say about how its graph runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Where sessions run: "cpu" or "cuda:N". A device that cannot be had fails the model.
    pub device: Device,
    /// The type that candle keeps weights in, whatever they are stored in, and computes with on a GPU: "float32", "float16"
    /// or "bfloat16". On a CPU it computes in 32 bits. An ONNX model's is in its graph.
    pub dtype: ComputeType,
    /// Threads that share the work of one operator. Default: cores ÷ instances, at least 1.
    pub intra_op_threads: Option<usize>,
    /// Threads that run independent operators side by side, in parallel mode.
    pub inter_op_threads: Option<usize>,
    /// Whether independent operators run side by side. Default: when inter_op_threads is above 1.
    pub parallel: Option<bool>,
    /// Whether idle operator threads burn a core while they wait for work.
    pub spinning: bool,
    /// How much the graph is rewritten before it runs: "disable", "basic", "extended" or "all".
    pub optimization: OptimizationLevel,
    /// Whether allocations are planned from the shapes seen before. Default: only when all shapes are fixed.
    pub memory_pattern: Option<bool>,
    /// Whether memory that runs have used is kept for later runs.
    pub memory_arena: Option<bool>,
    /// Arenas that give memory back after each run, in ONNX Runtime's words: "cpu:0;gpu:0" for instance.
    pub arena_shrinkage: Option<String>,
    /// Whether subnormal floats count as zero (faster, less exact).
    pub flush_to_zero: bool,
    /// Whether instances on CPU share weights in a file below the data directory, which takes twice the model's size.
    /// Default: with models of 16 MiB or more.
    pub share_prepacked_weights: Option<bool>,
    /// Where the rewritten graph is written, outside the model's folder, to be served later with
    /// optimization = "disable", which loads faster.
    pub optimized_model: Option<PathBuf>,
    /// Further ONNX Runtime session configuration entries, such as "session.set_denormal_as_zero" = "1".
    pub session_config: BTreeMap<String, String>,
    /// Further options of ONNX Runtime's CUDA provider, such as "gpu_mem_limit" = "4294967296".
    pub cuda: BTreeMap<String, String>,
}
