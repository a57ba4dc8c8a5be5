//! `Candle`: runs encoders in the Hugging Face layout, `config.json` beside `model.safetensors`, through candle.
//!
//! To its clients such a model is what an ONNX export of it would be: token ids in, hidden states or logits out.

use std::{path::Path, sync::Arc, thread};

use bytes::Bytes;
use candle_core::DType;

use super::{Backend, ComputeType, Device, Options, Session, Signature, TensorSpec};
use crate::{
    error::{Code, Error},
    tensor::{self, Data, Tensor},
};

mod bodies;
mod config;
mod gpu;
mod heads;
mod inputs;
mod ops;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod threads;
mod weights;

use bodies::{Body, Parts};
use config::Architecture;
use gpu::Turns;
use heads::Head;
use ops::Ops;
use threads::{Spawner, Threads};
use weights::Weights;

/// More operator threads than any machine has cores are a typing error.
const MAX_THREADS: usize = 1024;

/// The threads over which candle divides a product, unless RAYON_NUM_THREADS says how many.
pub fn threads_found() -> usize {
    candle_core::utils::get_num_threads()
}

/// candle, which is compiled in.
pub struct Candle {
    spawner: Spawner,
}

/// What all instances on one device share.
struct Model {
    architecture: Architecture,
    body: Body,
    head: Option<Head>,
    /// On a GPU.
    turns: Option<Turns>,
}

struct CandleSession {
    model: Arc<Model>,
    signature: Arc<Signature>,
    threads: Threads,
}

impl Candle {
    /// Call it from a thread of ordinary priority: operator threads are as patient as executors, and else inherit that
    /// thread's.
    ///
    /// # Errors
    /// `Internal` when the system starts no thread.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { spawner: Spawner::start()? })
    }
}

impl Backend for Candle {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn file_name(&self) -> &'static str {
        weights::FILE_NAME
    }

    fn other_file_names(&self) -> &'static [&'static str] {
        &[weights::INDEX_NAME]
    }

    fn takes_tokens(&self) -> bool {
        true
    }

    fn platform(&self) -> &'static str {
        "candle_safetensors"
    }

    fn gpus(&self) -> usize {
        if cfg!(feature = "cuda") { super::device::nvidia_gpus() } else { 0 }
    }

    fn load(&self, path: &Path, options: &Options, instances: usize) -> Result<Vec<Box<dyn Session>>, Error> {
        check(options)?;
        let device = device(options.device)?;
        let model = Arc::new(Model::read(path, options.dtype, Ops::of(&device), &device)?);

        let instances = instances.max(1);
        let count = if device.is_cpu() { intra_threads(options, instances) } else { 1 };
        let mut signature = model.signature();
        signature.on_thread = device.is_cpu() && count == 1;
        let signature = Arc::new(signature);
        let session = |_| -> Result<Box<dyn Session>, Error> {
            let threads = self.spawner.threads(count)?;
            Ok(Box::new(CandleSession { model: Arc::clone(&model), signature: Arc::clone(&signature), threads }))
        };
        (0..instances).map(session).collect()
    }
}

impl Model {
    fn read(path: &Path, dtype: ComputeType, ops: Ops, device: &candle_core::Device) -> Result<Self, Error> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let architecture = Architecture::read(folder)?;
        let named = |error: Error| Error { message: format!("{}: {}", folder.display(), error.message), ..error };
        let dtype = match dtype {
            ComputeType::Float32 => DType::F32,
            ComputeType::Float16 => DType::F16,
            ComputeType::Bfloat16 => DType::BF16,
        };
        let mut weights = Weights::open(path, dtype, device).map_err(named)?;
        let mut parts = Parts::of(&mut weights, &architecture);
        let body = parts.body(ops, device).map_err(named)?;
        let head = match architecture.classifier {
            Some(classifier) => Some(Head::read(&mut parts, classifier, ops, device).map_err(named)?),
            None => None,
        };
        let turns = if device.is_cpu() { None } else { Some(Turns::new(device).map_err(named)?) };
        Ok(Self { architecture, body, head, turns })
    }

    fn signature(&self) -> Signature {
        let spec = |name: &str, dtype, shape: &[i64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
        let input = |name| spec(name, tensor::DType::Int64, &[-1, -1]);
        let mut inputs = vec![input(inputs::IDS), input(inputs::MASK)];
        if self.architecture.takes_token_types() {
            inputs.push(input(inputs::TYPES));
        }
        let size = |size: usize| i64::try_from(size).unwrap_or(-1);
        let output = match self.architecture.classifier {
            Some(classifier) => spec("logits", tensor::DType::Fp32, &[-1, size(classifier.classes)]),
            None => spec("last_hidden_state", tensor::DType::Fp32, &[-1, -1, size(self.architecture.hidden)]),
        };
        let optional = inputs[1..].iter().map(|spec| spec.name.clone()).collect();
        Signature { inputs, outputs: vec![output], optional, ..Signature::default() }
    }

    fn run(&self, batch: &bodies::Batch) -> candle_core::Result<candle_core::Tensor> {
        match &self.turns {
            Some(turns) => turns.take(|| self.compute(batch)),
            None => self.compute(batch),
        }
    }

    fn compute(&self, batch: &bodies::Batch) -> candle_core::Result<candle_core::Tensor> {
        let hidden = self.body.run(batch)?;
        let output = match &self.head {
            Some(head) => head.run(&hidden, batch)?,
            None => hidden,
        };
        output.to_dtype(DType::F32)?.to_device(&candle_core::Device::Cpu)?.contiguous()
    }
}

impl Session for CandleSession {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let batch = inputs::read(inputs, &self.model.architecture)?;
        let output = self.threads.run(|| self.model.run(&batch)).map_err(|error| failed(&error))?;
        let spec = &self.signature.outputs[0];
        let shape = match spec.shape.as_slice() {
            [_, classes] => [batch.rows, *classes as usize].as_slice().into(),
            _ => [batch.rows, batch.tokens, self.model.architecture.hidden].as_slice().into(),
        };
        let (storage, layout) = output.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else {
            return Err(Error::internal("the output did not come back from the device"));
        };
        let values = storage.as_slice::<f32>().map_err(|error| failed(&error))?;
        let values = layout.contiguous_offsets().and_then(|(start, end)| values.get(start..end)).unwrap_or_default();
        let data = Data::Plain(Bytes::copy_from_slice(bytemuck::cast_slice(values)));
        Ok(vec![
            Tensor::new(spec.name.clone(), spec.dtype, shape, data)
                .map_err(|error| Error::internal(format!("output {}", error.message)))?,
        ])
    }
}

fn check(options: &Options) -> Result<(), Error> {
    if let Some(threads) = options.intra_op_threads
        && !(1..=MAX_THREADS).contains(&threads)
    {
        return Err(Error::invalid(format!("intra_op_threads must be 1 to {MAX_THREADS}, is {threads}")));
    }
    // Others are about how something is done; these would be thought to be done.
    let of_others = [
        ("optimized_model", options.optimized_model.is_some()),
        ("session_config", !options.session_config.is_empty()),
        ("cuda", !options.cuda.is_empty()),
    ];
    match of_others.iter().find(|(_, is_set)| *is_set) {
        Some((name, _)) => Err(Error::invalid(format!("{name} is for ONNX models, and the model runs on candle"))),
        None => Ok(()),
    }
}

fn device(device: Device) -> Result<candle_core::Device, Error> {
    let unavailable = |reason: String| Error::new(Code::NotReady, format!("device '{device}' cannot be had: {reason}"));
    match device {
        Device::Cpu => Ok(candle_core::Device::Cpu),
        Device::Cuda(_) if !cfg!(feature = "cuda") => {
            Err(unavailable("the server was built without the feature cuda, which candle needs for it".to_owned()))
        }
        Device::Cuda(index) => gpu::open(index).map_err(unavailable),
    }
}

/// Threads that share the work of one operator.
fn intra_threads(options: &Options, instances: usize) -> usize {
    options.intra_op_threads.unwrap_or_else(|| {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        (cores / instances).max(1)
    })
}

fn failed(error: &candle_core::Error) -> Error {
    Error::internal(format!("the model failed: {}", tidy(error)))
}

/// candle's message without the backtrace that it may carry.
fn tidy(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
