//! Running a graph: the one trait every model format implements, and what a graph says of its inputs and outputs.

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    tensor::{DType, Tensor},
};

pub mod onnx;

/// Turns a directory of model files into sessions that can run.
pub trait Backend: Send + Sync {
    /// The name of the file in a version's directory that makes this backend responsible for it.
    fn file_name(&self) -> &'static str;

    /// The platform that metadata reports, `onnxruntime_onnx` for instance.
    fn platform(&self) -> &'static str;

    /// Loads `instances` sessions that share what they can.
    ///
    /// # Errors
    /// `InvalidArgument` for files that cannot be served, `NotReady` for a device that cannot be had,
    /// `Internal` otherwise; the message names the file or the option.
    fn load(&self, files: &Path, options: &Options, instances: usize) -> Result<Vec<Box<dyn Session>>, Error>;
}

/// One loaded copy of a model, owned and driven by exactly one thread.
pub trait Session: Send {
    fn signature(&self) -> &Signature;

    /// Runs the graph once. `inputs` are in the order of the signature; so are the results.
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

    /// The backend for the files in `directory`.
    ///
    /// # Errors
    /// `InvalidArgument` when the directory holds no file that any backend knows.
    pub fn open(&self, directory: &Path) -> Result<Arc<dyn Backend>, Error> {
        self.0.iter().find(|backend| directory.join(backend.file_name()).is_file()).cloned().ok_or_else(|| {
            let names: Vec<_> = self.0.iter().map(|backend| backend.file_name()).collect();
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
    /// Threads that run independent operators side by side. Above 1 the graph runs in parallel mode.
    pub inter_op_threads: Option<usize>,
    /// Whether idle operator threads burn a core while they wait for work.
    pub spinning: bool,
    /// How much the graph is rewritten before it runs: "disable", "basic", "extended" or "all".
    pub optimization: OptimizationLevel,
    /// Whether allocations are planned from the shapes seen before. Default: only when all shapes are fixed.
    pub memory_pattern: Option<bool>,
    /// Whether subnormal floats count as zero (faster, less exact).
    pub flush_to_zero: bool,
    /// Whether the sessions of one version share a container for repacked weights. Default: with several instances.
    pub share_prepacked_weights: Option<bool>,
    /// Where the rewritten graph is written, outside the model's folder, to be served later with
    /// optimization = "disable", which loads faster.
    pub optimized_model: Option<PathBuf>,
    /// Further ONNX Runtime session configuration entries, such as "session.set_denormal_as_zero" = "1".
    pub session_config: HashMap<String, String>,
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
    /// Puts `inputs` into the order of the signature and checks names, types and shapes.
    ///
    /// # Errors
    /// `InvalidArgument` naming the model, the input and what was expected.
    pub fn arrange(&self, model: &str, inputs: Vec<Tensor>) -> Result<Vec<Tensor>, Error> {
        let in_order = inputs.len() == self.inputs.len()
            && self.inputs.iter().zip(&inputs).all(|(spec, tensor)| spec.name == tensor.name);
        let inputs = if in_order { inputs } else { self.reorder(model, inputs)? };
        for (spec, tensor) in self.inputs.iter().zip(&inputs) {
            spec.check(tensor, model)?;
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
        slots
            .into_iter()
            .zip(&self.inputs)
            .map(|(slot, spec)| {
                slot.ok_or_else(|| {
                    Error::invalid(format!(
                        "model '{model}': input '{}' is missing; its inputs are {}",
                        spec.name,
                        self.input_names()
                    ))
                })
            })
            .collect()
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
