//! `OnnxRuntime`: runs ONNX models through ONNX Runtime.
//!
//! A model and its weights are read into memory before ONNX Runtime sees them: it would map the files, and then
//! whoever truncates one on disk would kill the server.

use std::{
    borrow::Cow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use ort::{
    ErrorCode,
    ep::{self, ArbitrarilyConfigurableExecutionProvider, ExecutionProvider},
    session::{
        HasSelectedOutputs, OutputSelector, RunOptions, SessionInputValue, SessionInputs,
        builder::{AutoDevicePolicy, GraphOptimizationLevel, SessionBuilder},
    },
    value::{Outlet, ValueType},
};
use prost::Message;

use super::{
    Backend, ComputeType, Device, OptimizationLevel, Options, Session, Signature, TensorSpec, device::nvidia_gpus,
};
use crate::{
    error::{Code, Error},
    tensor::{DType, Tensor},
};

mod content;
mod external;
mod graph;
mod library;
mod shared;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod threads;
mod values;

use content::Content;
use graph::{Model, Value};
use library::Library;
use shared::Scratch;

const FILE_NAME: &str = "model.onnx";
/// Where Hugging Face keeps it.
const OTHER_FILE_NAMES: [&str; 1] = ["onnx/model.onnx"];

/// More operator threads than any machine has cores are a typing error.
const MAX_THREADS: usize = 1024;

/// Session entries that would make ONNX Runtime keep pointing at the model's bytes, which live only while it loads.
const BORROWING_ENTRIES: [&str; 2] =
    ["session.use_ort_model_bytes_directly", "session.use_ort_model_bytes_for_initializers"];

/// ONNX Runtime, loaded from a shared library. The library stays loaded until the process ends.
pub struct OnnxRuntime {
    library: Arc<Library>,
    scratch: Scratch,
}

struct OnnxSession {
    session: ort::session::Session,
    run: RunOptions<HasSelectedOutputs>,
    signature: Arc<Signature>,
    device: Device,
    /// Whether a run has succeeded: then the model works, and what fails later is most likely the input's doing.
    proven: bool,
}

impl OnnxRuntime {
    /// Loads the library: `explicit` (a file, or a directory that holds it), or else the first that works of the one
    /// beside the binary, the one in `.onnxruntime/` (which `make setup` unpacks) and the system's.
    ///
    /// With `shared_threads` all sessions share one pool of so many threads, and their own thread counts do not count.
    /// Call it from a thread of ordinary priority: operator threads are as patient as executors, and else inherit that
    /// thread's.
    ///
    /// # Errors
    /// `NotReady` when there is none, naming every file that was tried and what to do.
    pub fn open(explicit: Option<&Path>, shared_threads: Option<usize>) -> Result<Self, Error> {
        Ok(Self { library: Library::open(explicit, shared_threads)?, scratch: Scratch::new(None) })
    }

    /// Has weights that instances share kept below `directory`, which must be on a disk to save memory. Until now they
    /// are among the system's temporary files. No other process may use it.
    #[must_use]
    pub fn with_scratch(self, directory: PathBuf) -> Self {
        Self { scratch: Scratch::new(Some(directory)), ..self }
    }

    /// The version of the loaded library, `1.31.1` for instance.
    pub fn version(&self) -> &str {
        &self.library.version
    }

    /// The file that the library was loaded from.
    pub fn path(&self) -> &Path {
        &self.library.path
    }

    /// A builder for sessions whose messages are logged with `id`.
    fn builder(&self, model: &Model, options: &Options, instances: usize, id: &str) -> Result<SessionBuilder, Error> {
        check(options)?;
        let builder = self.configure(model, options, instances, id).map_err(|error| {
            Error::invalid(format!("onnxruntime does not take the session's options: {}", tidy(error.message())))
        })?;
        let Device::Cuda(index) = options.device else { return Ok(builder) };
        let index = i32::try_from(index).map_err(|_| unavailable(options.device, "no such device"))?;
        let mut provider = ep::CUDA::default().with_device_id(index);
        for (key, value) in &options.cuda {
            provider = provider.with_arbitrary_config(key, value);
        }
        builder
            .with_execution_providers([provider.build().error_on_failure()])
            .map_err(|error| unavailable(options.device, &tidy(error.message())))
    }

    fn configure(&self, model: &Model, options: &Options, instances: usize, id: &str) -> ort::Result<SessionBuilder> {
        let intra = intra_threads(options, instances);
        let inter = inter_threads(options);
        let mut builder = ort::session::Session::builder(&self.library.environment)?
            .with_log_id(id)?
            // `ort` would otherwise let ONNX Runtime pick an accelerator that nobody asked for.
            .with_auto_device(AutoDevicePolicy::PreferCPU)?
            .with_thread_manager(self.library.pool.clone())?
            .with_optimization_level(level(options.optimization))?
            .with_intra_threads(intra)?
            .with_inter_threads(inter)?
            .with_parallel_execution(options.parallel.unwrap_or(inter > 1))?
            .with_intra_op_spinning(options.spinning)?
            .with_inter_op_spinning(options.spinning)?
            .with_memory_pattern(options.memory_pattern.unwrap_or_else(|| model.has_fixed_shapes()))?;
        if options.memory_arena == Some(false) {
            let cpu = ep::CPU::default().with_arena_allocator(false).build().error_on_failure();
            builder = builder.with_execution_providers([cpu])?;
        }
        if options.flush_to_zero {
            builder = builder.with_flush_to_zero()?;
        }
        if let Some(path) = &options.optimized_model {
            builder = builder.with_optimized_model_path(path)?;
        }
        for (key, value) in &options.session_config {
            builder = builder.with_config_entry(key, value)?;
        }
        Ok(builder)
    }
}

impl OnnxRuntime {
    /// Sessions that map one file of weights, which a session of `builder` writes.
    ///
    /// # Errors
    /// What the file system or ONNX Runtime says; the model may load without a file all the same.
    fn load_shared(
        &self,
        model: &Model,
        bytes: &[u8],
        builder: &SessionBuilder,
        options: &Options,
        instances: usize,
        id: &str,
    ) -> Result<Vec<ort::session::Session>, Error> {
        let refused = |error: ort::Error| Error::internal(tidy(error.message()));
        let written =
            self.scratch.folder().map_err(|error| Error::internal(format!("no file can be written: {error}")))?;
        let mut writer = written.write_with(builder.clone()).map_err(refused)?;
        drop(commit(options.device, || writer.commit_from_memory(bytes))?);
        drop(writer);
        // The graph has been rewritten already.
        let options = Options { optimization: OptimizationLevel::Disable, ..options.clone() };
        let mut reader = self.builder(model, &options, instances, id)?;
        (0..instances).map(|_| commit(options.device, || reader.commit_from_file(written.graph()))).collect()
    }
}

impl Backend for OnnxRuntime {
    fn name(&self) -> &'static str {
        "onnxruntime"
    }

    fn file_name(&self) -> &'static str {
        FILE_NAME
    }

    fn other_file_names(&self) -> &'static [&'static str] {
        &OTHER_FILE_NAMES
    }

    fn platform(&self) -> &'static str {
        "onnxruntime_onnx"
    }

    fn gpus(&self) -> usize {
        if ep::CUDA::is_available().unwrap_or(false) { nvidia_gpus() } else { 0 }
    }

    fn load(&self, path: &Path, options: &Options, instances: usize) -> Result<Vec<Box<dyn Session>>, Error> {
        let named = |error: Error| Error { message: format!("{}: {}", path.display(), error.message), ..error };
        let files = path.parent().unwrap_or(Path::new("."));

        let bytes = Content::read(path).map_err(|error| named(Error::unread(&error, error.to_string())))?;
        let model =
            Model::decode(&*bytes).map_err(|error| named(Error::invalid(format!("not an ONNX model: {error}"))))?;
        let weights = external::read(&model, files).map_err(named)?;

        let instances = instances.max(1);
        let external: usize = weights.iter().map(|(_, content)| content.len()).sum();
        let id = files.display().to_string();
        let mut builder = self.builder(&model, options, instances, &id).map_err(named)?;
        for (name, content) in weights {
            builder = builder
                .with_external_initializer_file_in_memory(&name, content)
                .map_err(|error| named(Error::invalid(format!("external data '{name}': {}", tidy(error.message())))))?;
        }

        let mut notes = Vec::new();
        let mut sessions = Vec::new();
        if shared::pays(options, instances, bytes.len() + external) {
            match self.load_shared(&model, &bytes, &builder, options, instances, &id) {
                Ok(shared) => sessions = shared,
                Err(error) => notes.push(format!("its instances hold weights of their own: {error}")),
            }
        }
        while sessions.len() < instances {
            let session = commit(options.device, || builder.commit_from_memory(&bytes)).map_err(named)?;
            sessions.push(session);
        }
        let mut signature = signature(&sessions[0], &model).map_err(named)?;
        // A device's time is shared with whoever else uses it.
        signature.steady &= options.device == Device::Cpu;
        signature.on_thread = options.device == Device::Cpu
            && !self.library.shares_threads
            && intra_threads(options, instances) == 1
            && inter_threads(options) == 1;
        signature.notes.append(&mut notes);
        if options.flush_to_zero {
            // ONNX Runtime sets the flag on its own threads, never on the one that calls it.
            signature
                .notes
                .push("flush_to_zero reaches the operator threads, not the thread that runs the graph".into());
        }
        let signature = Arc::new(signature);
        let wrap = |session| -> Result<Box<dyn Session>, Error> {
            Ok(Box::new(OnnxSession::new(session, &signature, options).map_err(named)?))
        };
        sessions.into_iter().map(wrap).collect()
    }
}

impl OnnxSession {
    fn new(session: ort::session::Session, signature: &Arc<Signature>, options: &Options) -> Result<Self, Error> {
        let names = signature.outputs.iter().map(|spec| &*spec.name);
        let outputs = names.fold(OutputSelector::no_default(), OutputSelector::with);
        let mut run = RunOptions::new()
            .map_err(|error| Error::internal(format!("cannot create run options: {error}")))?
            .with_outputs(outputs);
        if let Some(arenas) = &options.arena_shrinkage {
            run.set("memory.enable_memory_arena_shrinkage", arenas)
                .map_err(|error| Error::invalid(format!("arena_shrinkage: {}", tidy(error.message()))))?;
        }
        Ok(Self { session, run, signature: Arc::clone(signature), device: options.device, proven: false })
    }
}

impl Session for OnnxSession {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let values = inputs.iter().map(values::to_value).collect::<Result<Vec<SessionInputValue<'_>>, Error>>()?;
        let (device, proven) = (self.device, self.proven);
        let values: SessionInputs<'_, '_> = if self.signature.defaults.is_empty() {
            SessionInputs::ValueSlice(&values)
        } else {
            // Optional inputs may be missing, so position does not tell which is which.
            let names = inputs.iter().map(|input| Cow::Borrowed(&*input.name));
            SessionInputs::ValueMap(names.zip(values).collect())
        };
        let outputs = self.session.run_with_options(values, &self.run).map_err(|error| {
            let code = if blames_input(&error, device, proven) { Code::InvalidArgument } else { Code::Internal };
            Error::new(code, format!("the model failed: {}", tidy(error.message())))
        })?;
        let specs = self.signature.outputs.iter();
        let results = specs.zip(outputs.values()).map(|(spec, value)| values::from_value(spec, &value)).collect();
        drop(outputs);
        self.proven = true;
        results
    }
}

/// Whether a failed run is the caller's doing. Operators report shapes and values that they cannot work with as one
/// failure or another, so a model that has run before is trusted more than the input; a device that fails, or memory
/// that runs out, is nobody's input.
fn blames_input(error: &ort::Error, device: Device, proven: bool) -> bool {
    match error.code() {
        ErrorCode::InvalidArgument => true,
        ErrorCode::GenericFailure | ErrorCode::RuntimeException => {
            proven && device == Device::Cpu && !error.message().to_lowercase().contains("alloc")
        }
        _ => false,
    }
}

fn check(options: &Options) -> Result<(), Error> {
    for (name, threads) in
        [("intra_op_threads", options.intra_op_threads), ("inter_op_threads", options.inter_op_threads)]
    {
        if let Some(threads) = threads
            && !(1..=MAX_THREADS).contains(&threads)
        {
            return Err(Error::invalid(format!("{name} must be 1 to {MAX_THREADS}, is {threads}")));
        }
    }
    if options.dtype != ComputeType::default() {
        return Err(Error::invalid("dtype is for models that run on candle; an ONNX model's types are in its graph"));
    }
    match BORROWING_ENTRIES.iter().find(|key| options.session_config.contains_key(**key)) {
        Some(key) => Err(Error::invalid(format!("session_config '{key}' cannot be set here"))),
        None => Ok(()),
    }
}

fn level(level: OptimizationLevel) -> GraphOptimizationLevel {
    match level {
        OptimizationLevel::Disable => GraphOptimizationLevel::Disable,
        OptimizationLevel::Basic => GraphOptimizationLevel::Level1,
        OptimizationLevel::Extended => GraphOptimizationLevel::Level2,
        OptimizationLevel::All => GraphOptimizationLevel::All,
    }
}

fn unavailable(device: Device, reason: &str) -> Error {
    Error::new(Code::NotReady, format!("device '{device}' cannot be had: {reason}"))
}

/// The session that `commit` makes, or why it does not.
fn commit(
    device: Device,
    commit: impl FnOnce() -> ort::Result<ort::session::Session>,
) -> Result<ort::session::Session, Error> {
    // `ort` panics on inputs and outputs of types that it does not know.
    match catch_unwind(AssertUnwindSafe(commit)) {
        Ok(Ok(session)) => Ok(session),
        Ok(Err(error)) => {
            let reason = tidy(error.message());
            let of_device = error.code() == ErrorCode::ExecutionProviderFailure || reason.contains("CUDA");
            match device {
                Device::Cuda(_) if of_device => Err(unavailable(device, &reason)),
                _ => Err(Error::invalid(format!("onnxruntime cannot load the model: {reason}"))),
            }
        }
        Err(_) => Err(Error::invalid("the model has inputs or outputs of an unknown type")),
    }
}

/// Threads that share the work of one operator.
fn intra_threads(options: &Options, instances: usize) -> usize {
    options.intra_op_threads.unwrap_or_else(|| {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        (cores / instances).max(1)
    })
}

/// Threads that run operators beside each other. Asked to run in parallel and not told how many to use, ONNX Runtime
/// takes all cores (0).
fn inter_threads(options: &Options) -> usize {
    options.inter_op_threads.unwrap_or(if options.parallel == Some(true) { 0 } else { 1 })
}

fn signature(session: &ort::session::Session, model: &Model) -> Result<Signature, Error> {
    let mut signature = Signature::default();
    for input in session.inputs() {
        let declared = model.input(input.name());
        if declared.is_some_and(Value::has_unknown_rank) {
            return Err(Error::invalid(format!(
                "input '{}' has no shape; export the model with one, -1 standing for dimensions that vary",
                input.name()
            )));
        }
        let spec = spec(input.name(), input.dtype(), declared).map_err(|kind| {
            Error::invalid(format!("input '{}' is {kind}, which no request can carry", input.name()))
        })?;
        signature.inputs.push(spec);
    }
    for default in session.overridable_initializers() {
        // What cannot be sent keeps the graph's value.
        signature.defaults.extend(spec(default.name(), default.dtype(), model.input(default.name())).ok());
    }
    for output in session.outputs() {
        let declared = model.output(output.name());
        match spec(output.name(), output.dtype(), declared) {
            Ok(spec) => {
                if spec.shape.is_empty() && declared.is_some_and(Value::has_unknown_rank) {
                    signature.notes.push(format!("output '{}' has no shape and is taken for a scalar", spec.name));
                }
                signature.outputs.push(spec);
            }
            Err(kind) => signature.notes.push(left_out(output, &kind)),
        }
    }
    let rows_alone = |spec: &TensorSpec| spec.dtype != DType::Bytes && spec.shape.iter().skip(1).all(|&size| size >= 0);
    signature.steady = model.is_steady() && signature.inputs.iter().all(rows_alone);
    if signature.outputs.is_empty() {
        let reason = if signature.notes.is_empty() { "it has none".to_owned() } else { signature.notes.join("; ") };
        return Err(Error::invalid(format!("the model has no output that a response can carry: {reason}")));
    }
    Ok(signature)
}

/// The tensor that an input or output is, or else what it is instead.
fn spec(name: &str, kind: &ValueType, declared: Option<&Value>) -> Result<TensorSpec, String> {
    match kind {
        // `ort` does not tell sparse tensors from others.
        ValueType::Tensor { .. } if declared.is_some_and(Value::is_sparse) => Err("a sparse tensor".to_owned()),
        ValueType::Tensor { ty, shape, .. } => {
            let dtype: DType = values::dtype(*ty).ok_or_else(|| format!("a tensor of {ty}"))?;
            Ok(TensorSpec { name: name.into(), dtype, shape: shape.iter().map(|&dim| dim.max(-1)).collect() })
        }
        ValueType::Sequence(_) => Err("a sequence".to_owned()),
        ValueType::Map { .. } => Err("a map".to_owned()),
        ValueType::Optional(_) => Err("an optional".to_owned()),
    }
}

fn left_out(output: &Outlet, kind: &str) -> String {
    let zipmap = match output.dtype() {
        ValueType::Sequence(item) if item.is_map() => {
            "; if this is a scikit-learn model, convert it with options={id(model): {'zipmap': False}} to have it"
        }
        _ => "",
    };
    format!("output '{}' is {kind}, which no response can carry, and is left out{zipmap}", output.name())
}

/// ONNX Runtime's message on one line, without the places in its source code and the functions that it names there.
fn tidy(message: &str) -> String {
    let words: Vec<&str> = message.split_whitespace().collect();
    let mut kept = String::new();
    let mut rest = words.as_slice();
    while let Some((word, behind)) = rest.split_first() {
        rest = behind;
        if is_place(word) {
            rest = behind_signature(behind);
            continue;
        }
        if !kept.is_empty() {
            kept.push(' ');
        }
        kept.push_str(word);
    }
    kept
}

/// Whether `word` is like `/src/core/graph.cc:180`.
fn is_place(word: &str) -> bool {
    word.rsplit_once(':').is_some_and(|(file, line)| {
        let source = [".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh"].iter().any(|extension| file.ends_with(extension));
        source && line.parse::<u32>().is_ok()
    })
}

/// What follows a C++ signature like `void a::b(int, c<d(e)>) const [with T = f]`; all of `words` if they are none.
fn behind_signature<'a>(words: &'a [&'a str]) -> &'a [&'a str] {
    let mut depth = 0isize;
    let mut qualified = false;
    for (index, word) in words.iter().enumerate() {
        qualified |= word.contains("::");
        let opens = word.contains('(');
        depth += word.matches('(').count() as isize - word.matches(')').count() as isize;
        if depth <= 0 && (opens || word.contains(')')) {
            let behind = words.get(index + 1..).filter(|_| qualified).unwrap_or(words);
            let behind = behind.strip_prefix(&["const"]).unwrap_or(behind);
            let template = behind.first().is_some_and(|word| *word == "[with");
            let end = behind.iter().position(|word| word.ends_with(']')).filter(|_| template);
            return end.and_then(|end| behind.get(end + 1..)).unwrap_or(behind);
        }
    }
    words
}
