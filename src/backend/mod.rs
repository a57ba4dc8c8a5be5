//! Running a graph: the one trait every model format implements, and what a graph says of its inputs and outputs.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Code, Error},
    tensor::{DType, Tensor},
};

mod declared;
pub mod onnx;

pub use declared::{Declaration, Interface};

/// Turns a directory of model files into sessions that can run.
pub trait Backend: Send + Sync {
    /// The name that a model's configuration may ask for, `onnxruntime` for instance.
    fn name(&self) -> &'static str;

    /// The name of the file in a version's directory that makes this backend responsible for it.
    fn file_name(&self) -> &'static str;

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
}

/// The backends a server was built with, by the file that marks their format.
#[derive(Clone)]
pub struct Backends(Arc<[Arc<dyn Backend>]>);

impl Backends {
    pub fn new(backends: impl IntoIterator<Item = Arc<dyn Backend>>) -> Self {
        Self(backends.into_iter().collect())
    }

    /// The backend for the model in `directory`, and the model's file there. Its author may have named either; a
    /// folder of the file's name that holds the file will do as well.
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
            [path.join(backend.file_name()), path].into_iter().find(|path| path.is_file())
        };
        let found = named.iter().find_map(|backend| Some((Arc::clone(backend), file_of(backend.as_ref())?)));
        found.ok_or_else(|| {
            let names: Vec<_> = named.iter().map(|backend| file_name.unwrap_or(backend.file_name())).collect();
            Error::invalid(format!("{} has no {}", directory.display(), names.join(" or ")))
        })
    }

    /// Whether `name` is a model file that some backend opens.
    pub fn knows(&self, name: &str) -> bool {
        self.0.iter().any(|backend| backend.file_name() == name)
    }

    /// The files that mark a directory as a model, most preferred first.
    pub fn file_names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|backend| backend.file_name())
    }
}

/// Where a session runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    #[default]
    Cpu,
    /// An NVIDIA GPU by index.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Device::Cpu);
        }
        text.strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .map(Device::Cuda)
            .ok_or_else(|| format!("device '{text}' must be \"cpu\" or \"cuda:N\""))
    }
}

impl Serialize for Device {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Device {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Device".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string" })
    }
}

/// Copies of a model on devices of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InstanceGroup {
    /// Copies; on GPUs so many on each. Default: what `profile` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
    pub kind: DeviceKind,
    /// Indices of the GPUs to use. Default: every one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<u32>,
}

/// What kind of device a group of instances asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The GPUs when there are any, else the CPU.
    #[default]
    Auto,
    Cpu,
    Gpu,
}

impl InstanceGroup {
    /// The devices of a group on a machine with `gpus` GPUs.
    ///
    /// # Errors
    /// `NotReady` when a GPU is asked for that is not there.
    pub fn devices(&self, gpus: usize) -> Result<Vec<Device>, Error> {
        let all = || (0..u32::try_from(gpus).unwrap_or(u32::MAX)).map(Device::Cuda).collect();
        match self.kind {
            DeviceKind::Cpu => Ok(vec![Device::Cpu]),
            DeviceKind::Auto if gpus == 0 => Ok(vec![Device::Cpu]),
            DeviceKind::Gpu if gpus == 0 => {
                Err(Error::new(Code::NotReady, "instance_group asks for a GPU, and no GPU can be used here"))
            }
            DeviceKind::Auto | DeviceKind::Gpu if self.gpus.is_empty() => Ok(all()),
            DeviceKind::Auto | DeviceKind::Gpu => match self.gpus.iter().find(|&&index| index as usize >= gpus) {
                Some(index) => {
                    let message = format!("instance_group asks for GPU {index}, and the GPUs are 0 to {}", gpus - 1);
                    Err(Error::new(Code::NotReady, message))
                }
                None => Ok(self.gpus.iter().copied().map(Device::Cuda).collect()),
            },
        }
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

/// What a model's author may say about how its graph runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Where sessions run: "cpu" or "cuda:N". A device that cannot be had fails the model.
    pub device: Device,
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
    /// Whether the sessions of one version share a container for repacked weights. Default: with several instances.
    pub share_prepacked_weights: Option<bool>,
    /// Where the rewritten graph is written, outside the model's folder, to be served later with
    /// optimization = "disable", which loads faster.
    pub optimized_model: Option<PathBuf>,
    /// Further ONNX Runtime session configuration entries, such as "session.set_denormal_as_zero" = "1".
    pub session_config: BTreeMap<String, String>,
    /// Further options of ONNX Runtime's CUDA provider, such as "gpu_mem_limit" = "4294967296".
    pub cuda: BTreeMap<String, String>,
}

/// One input or output as the graph declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: Arc<str>,
    pub dtype: DType,
    /// -1 stands for a dimension that the request chooses.
    pub shape: Vec<i64>,
}

/// What a graph takes and gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signature {
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
    /// Names of the inputs that a request may leave out.
    pub optional: Vec<Arc<str>>,
    /// Inputs that the graph has a value for; they become optional ones when the model's author declares them.
    pub defaults: Vec<TensorSpec>,
    /// Things about the graph that an operator should know, such as outputs left out.
    pub notes: Vec<String>,
}

impl TensorSpec {
    /// # Errors
    /// `InvalidArgument` naming what differs from the declaration.
    pub fn check(&self, tensor: &Tensor, model: &str) -> Result<(), Error> {
        let name = &self.name;
        if tensor.dtype != self.dtype {
            return Err(Error::invalid(format!(
                "model '{model}': input '{name}' must be {}, got {}",
                self.dtype, tensor.dtype
            )));
        }
        let fits = tensor.shape.len() == self.shape.len()
            && self
                .shape
                .iter()
                .zip(&tensor.shape)
                .all(|(&declared, &given)| declared < 0 || declared as usize == given);
        if fits {
            Ok(())
        } else {
            Err(Error::invalid(format!(
                "model '{model}': input '{name}' must have shape {:?} (-1 is any size), got {:?}",
                self.shape,
                &tensor.shape[..]
            )))
        }
    }
}

impl Signature {
    /// Puts `inputs` into the order of the signature, optional ones left out, and checks names, types and shapes.
    ///
    /// # Errors
    /// `InvalidArgument` naming the model, the input and what was expected.
    pub fn arrange(&self, model: &str, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, Error> {
        let in_order = inputs.len() == self.inputs.len()
            && self.inputs.iter().zip(&inputs).all(|(spec, tensor)| spec.name == tensor.name);
        let inputs = if in_order { inputs } else { self.reorder(model, inputs)? };
        let mut specs = self.inputs.iter();
        for tensor in &inputs {
            // Only optional inputs lie between a tensor and the one before it.
            if let Some(spec) = specs.find(|spec| spec.name == tensor.name) {
                spec.check(tensor, model)?;
            }
        }
        Ok(inputs)
    }

    fn reorder(&self, model: &str, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, Error> {
        let mut slots: Vec<Option<Tensor>> = vec![None; self.inputs.len()];
        for tensor in inputs {
            let Some(index) = self.inputs.iter().position(|spec| spec.name == tensor.name) else {
                return Err(Error::invalid(format!(
                    "model '{model}' has no input '{}'; its inputs are {}",
                    crate::id::shorten(&tensor.name),
                    self.input_names()
                )));
            };
            if slots[index].is_some() {
                return Err(Error::invalid(format!("model '{model}': input '{}' is given twice", tensor.name)));
            }
            slots[index] = Some(tensor);
        }
        let missing = |(slot, spec): &(&Option<Tensor>, &TensorSpec)| slot.is_none() && !self.is_optional(&spec.name);
        if let Some((_, spec)) = slots.iter().zip(&self.inputs).find(missing) {
            return Err(Error::invalid(format!(
                "model '{model}': input '{}' is missing; its inputs are {}",
                spec.name,
                self.input_names()
            )));
        }
        Ok(slots.into_iter().flatten().collect())
    }

    pub fn is_optional(&self, input: &str) -> bool {
        self.optional.iter().any(|name| &**name == input)
    }

    fn input_names(&self) -> String {
        self.inputs.iter().map(|spec| format!("'{}'", spec.name)).collect::<Vec<_>>().join(", ")
    }

    /// Why requests of this graph cannot share a run, judged by its shapes alone; `None` when they may.
    pub fn unbatchable(&self) -> Option<String> {
        let inputs = self.inputs.iter().map(|spec| ("input", spec));
        let outputs = self.outputs.iter().map(|spec| ("output", spec));
        inputs.chain(outputs).find_map(|(kind, spec)| match spec.shape.first() {
            Some(-1) => None,
            Some(size) => Some(format!("{kind} '{}' has the fixed first dimension {size}", spec.name)),
            None => Some(format!("{kind} '{}' is a scalar", spec.name)),
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::tensor::Data;

    fn spec(name: &str, shape: &[i64]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype: DType::Uint8, shape: shape.to_vec() }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        let count = shape.iter().product();
        Tensor::new(name.into(), DType::Uint8, shape.into(), Data::Plain(Bytes::from(vec![0; count]))).unwrap()
    }

    #[test]
    fn inputs_are_put_in_order_and_checked() {
        let signature = Signature { inputs: vec![spec("a", &[-1, 2]), spec("b", &[-1])], ..Signature::default() };
        let arranged = signature.arrange("m", vec![tensor("b", &[3]), tensor("a", &[3, 2])]).unwrap();
        assert_eq!(&*arranged[0].name, "a");

        let message = |inputs| signature.arrange("m", inputs).unwrap_err().message;
        assert_eq!(message(vec![tensor("a", &[1, 2])]), "model 'm': input 'b' is missing; its inputs are 'a', 'b'");
        assert_eq!(message(vec![tensor("a", &[1, 2]), tensor("a", &[1, 2])]), "model 'm': input 'a' is given twice");
        assert_eq!(message(vec![tensor("c", &[1])]), "model 'm' has no input 'c'; its inputs are 'a', 'b'");
        assert_eq!(
            message(vec![tensor("a", &[1, 3]), tensor("b", &[1])]),
            "model 'm': input 'a' must have shape [-1, 2] (-1 is any size), got [1, 3]"
        );
    }

    #[test]
    fn a_batch_dimension_is_needed_everywhere() {
        let signature = |inputs, outputs| Signature { inputs, outputs, ..Signature::default() };
        assert_eq!(signature(vec![spec("a", &[-1, 2])], vec![spec("y", &[-1])]).unbatchable(), None);
        assert_eq!(
            signature(vec![spec("a", &[-1, 2])], vec![spec("y", &[1])]).unbatchable().unwrap(),
            "output 'y' has the fixed first dimension 1"
        );
        assert_eq!(signature(vec![spec("a", &[])], vec![]).unbatchable().unwrap(), "input 'a' is a scalar");
    }

    #[test]
    fn devices_parse() {
        assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
        assert!("gpu".parse::<Device>().is_err());
        assert_eq!(Device::Cuda(0).to_string(), "cuda:0");
    }
}
