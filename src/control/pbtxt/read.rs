//! From the fields of Triton's model configuration to a `ModelSpec`.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    backend::{Declaration, DeviceKind, InstanceGroup, OptimizationLevel, Options},
    control::spec::ModelSpec,
    error::Error,
    id::shorten,
    model::{
        catalog::VersionPolicy,
        schedule::{Level, LevelSettings, Schedule, TimeoutAction},
        warmup::described::{DescribedInput, DescribedRequest, Filling},
    },
    tensor::DType,
};

/// Fields that ask for what this server does not do; ignoring them would give wrong answers. `[]` stands for any
/// element of a list.
const REFUSED: [&str; 14] = [
    "ensemble_scheduling",
    "sequence_batching",
    "model_transaction_policy.decoupled",
    "batch_input",
    "batch_output",
    "input[].allow_ragged_batch",
    "input[].is_shape_tensor",
    "input[].is_non_linear_format_io",
    "output[].is_shape_tensor",
    "output[].is_non_linear_format_io",
    "model_operations",
    "model_repository_agents",
    "instance_group[].passive",
    "instance_group[].secondary_devices",
];

/// Fields without effect here, which changes no answer; they are noted.
const IGNORED: [&str; 17] = [
    "runtime",
    "cc_model_filenames",
    "metric_tags",
    "model_metrics",
    "response_cache",
    "input[].format",
    "dynamic_batching.preserve_ordering",
    "instance_group[].rate_limiter",
    "instance_group[].host_policy",
    "instance_group[].profile",
    "optimization.priority",
    "optimization.cuda",
    "optimization.execution_accelerators",
    "optimization.input_pinned_memory",
    "optimization.output_pinned_memory",
    "optimization.gather_kernel_buffer_threshold",
    "optimization.eager_batching",
];

/// Keys of model.toml, and the fields that say the same.
const WORDS: [(&str, &str); 12] = [
    ("queue.preferred_batch_sizes", "dynamic_batching.preferred_batch_size"),
    ("queue.default_priority", "dynamic_batching.default_priority_level"),
    ("queue.priority_levels", "dynamic_batching.priority_levels"),
    ("queue.priority.", "dynamic_batching.priority_queue_policy "),
    ("file_name", "default_model_filename"),
    ("inputs: ", "input: "),
    ("outputs: ", "output: "),
    ("labels: ", "output.label_filename: "),
    ("warmup_requests: ", "model_warmup: "),
    ("versions.", "version_policy."),
    ("options.arena_shrinkage", "parameters 'memory.enable_memory_arena_shrinkage'"),
    ("options.memory_arena = false", "parameters 'enable_mem_arena'"),
];

const BACKEND: &str = "onnxruntime";
const PLATFORM: &str = "onnxruntime_onnx";

/// Beginnings of the parameters that ONNX Runtime takes as session configuration.
const SESSION_PREFIXES: [&str; 4] = ["session.", "optimization.", "mlas.", "ep."];

/// What is read of `inference.ModelConfig`; names and meaning as in the protocol, defaults left out.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ModelConfig {
    name: Option<String>,
    platform: Option<String>,
    backend: Option<String>,
    version_policy: Option<Policy>,
    max_batch_size: i64,
    input: Vec<IoTensor>,
    output: Vec<IoTensor>,
    optimization: Optimization,
    dynamic_batching: Option<DynamicBatching>,
    instance_group: Vec<Group>,
    default_model_filename: Option<String>,
    parameters: BTreeMap<String, ParameterValue>,
    model_warmup: Vec<Warmup>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Policy {
    Latest {
        #[serde(default)]
        num_versions: usize,
    },
    All {},
    Specific {
        #[serde(default)]
        versions: Vec<i64>,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct IoTensor {
    name: String,
    data_type: Option<String>,
    dims: Vec<i64>,
    reshape: Option<Reshape>,
    optional: bool,
    label_filename: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Reshape {
    shape: Vec<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Optimization {
    graph: Graph,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Graph {
    level: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DynamicBatching {
    preferred_batch_size: Vec<i64>,
    max_queue_delay_microseconds: u64,
    priority_levels: u64,
    default_priority_level: u64,
    default_queue_policy: QueuePolicy,
    priority_queue_policy: BTreeMap<u64, QueuePolicy>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct QueuePolicy {
    timeout_action: Option<String>,
    default_timeout_microseconds: u64,
    allow_timeout_override: bool,
    max_queue_size: usize,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Group {
    kind: Option<String>,
    count: i64,
    gpus: Vec<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ParameterValue {
    string_value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Warmup {
    name: String,
    batch_size: usize,
    inputs: BTreeMap<String, WarmupInput>,
    count: usize,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WarmupInput {
    data_type: Option<String>,
    dims: Vec<usize>,
    random_data: bool,
    input_data_file: Option<String>,
}

/// The spec that says what the fields say.
///
/// # Errors
/// `InvalidArgument` naming the field.
pub(super) fn spec(fields: &Value) -> Result<ModelSpec, Error> {
    if let Some(field) = REFUSED.into_iter().find(|field| has(fields, field)) {
        return Err(Error::invalid(format!("{} is not supported", field.replace("[]", ""))));
    }
    let config = ModelConfig::deserialize(fields).map_err(|error| Error::invalid(error.to_string()))?;
    let mut notes: Vec<String> = IGNORED
        .into_iter()
        .filter(|field| has(fields, field))
        .map(|field| format!("{} in config.pbtxt has no effect", field.replace("[]", "")))
        .collect();
    let mut spec = config.spec(&mut notes).map_err(Error::invalid)?;
    spec.notes = notes;
    spec.validate().map_err(|message| Error::invalid(in_their_words(&message)))?;
    Ok(spec)
}

/// A complaint about the spec, with the names of the fields that the file has.
fn in_their_words(message: &str) -> String {
    let translated = |part: &str| WORDS.iter().fold(part.to_owned(), |part, (ours, theirs)| part.replace(ours, theirs));
    // What stands in quotes is the author's own.
    let parts = message.split('\'').enumerate();
    let parts = parts.map(|(index, part)| if index % 2 == 0 { translated(part) } else { part.to_owned() });
    parts.collect::<Vec<_>>().join("'")
}

/// Whether a field is there, and not its type's default.
fn has(value: &Value, field: &str) -> bool {
    let (first, rest) = field.split_once('.').map_or((field, None), |(first, rest)| (first, Some(rest)));
    let found = value.get(first.trim_end_matches("[]"));
    let deeper = |value: &Value| rest.is_none_or(|rest| has(value, rest));
    match found {
        Some(Value::Array(list)) if first.ends_with("[]") => list.iter().any(deeper),
        Some(found) => deeper(found),
        None => false,
    }
}

impl ModelConfig {
    fn spec(self, notes: &mut Vec<String>) -> Result<ModelSpec, String> {
        let batch = usize::try_from(self.max_batch_size)
            .map_err(|_| format!("max_batch_size must be 0 or more, is {}", self.max_batch_size))?;
        // Without inputs and outputs the file leaves the rest to the graph, batching included.
        let silent = self.input.is_empty() && self.output.is_empty();
        let declare = |list: Vec<IoTensor>, kind: &str| {
            list.into_iter().map(|tensor| tensor.declare(kind, batch > 0)).collect::<Result<Vec<_>, _>>()
        };
        let label_file =
            |output: &IoTensor| Some((output.name.clone(), PathBuf::from(output.label_filename.as_ref()?)));
        let labels = self.output.iter().filter_map(label_file).collect();
        let mut options = Options::default();
        let mut parameters = BTreeMap::new();
        for (key, ParameterValue { string_value }) in self.parameters {
            if !parameter(&mut options, &key, &string_value)? {
                parameters.insert(key, string_value);
            }
        }
        options.optimization = match self.optimization.graph.level {
            0 => OptimizationLevel::All,
            -1 => OptimizationLevel::Basic,
            1 => OptimizationLevel::Extended,
            2 => OptimizationLevel::Disable,
            level => return Err(format!("optimization.graph.level must be -1, 0, 1 or 2, is {level}")),
        };
        Ok(ModelSpec {
            backend: backend(self.platform, self.backend)?,
            name: self.name,
            file_name: self.default_model_filename,
            instance_group: groups(self.instance_group)?,
            inputs: declare(self.input, "input")?,
            outputs: declare(self.output, "output")?,
            max_batch_size: (batch > 0).then_some(batch),
            batching: if batch > 0 { Some(true) } else { (!silent).then_some(false) },
            versions: versions(self.version_policy),
            labels,
            parameters,
            queue: self.dynamic_batching.map(DynamicBatching::schedule).transpose()?.unwrap_or_default(),
            warmup_requests: warmup(self.model_warmup, batch > 0 || silent, notes)?,
            options,
            ..ModelSpec::default()
        })
    }
}

/// The backend by name; a platform stands for its backend.
fn backend(platform: Option<String>, backend: Option<String>) -> Result<Option<String>, String> {
    match platform {
        Some(platform) if platform != PLATFORM => {
            Err(format!("platform '{}' is not supported; there is {PLATFORM}", shorten(&platform)))
        }
        Some(_) => Ok(Some(backend.unwrap_or_else(|| BACKEND.to_owned()))),
        None => Ok(backend),
    }
}

fn versions(policy: Option<Policy>) -> VersionPolicy {
    match policy {
        None => VersionPolicy::default(),
        Some(Policy::Latest { num_versions }) => VersionPolicy::Latest(num_versions.max(1)),
        Some(Policy::All {}) => VersionPolicy::All,
        Some(Policy::Specific { versions }) => {
            VersionPolicy::Specific(versions.iter().map(ToString::to_string).collect())
        }
    }
}

/// The groups of instances; a file that names none asks for the GPUs when there are any.
fn groups(groups: Vec<Group>) -> Result<Vec<InstanceGroup>, String> {
    if groups.is_empty() {
        return Ok(vec![InstanceGroup::default()]);
    }
    let group = |group: Group| {
        let kind = match group.kind.as_deref() {
            None | Some("KIND_AUTO") => DeviceKind::Auto,
            Some("KIND_CPU") => DeviceKind::Cpu,
            Some("KIND_GPU") => DeviceKind::Gpu,
            Some(kind) => return Err(format!("instance_group.kind {kind} is not supported")),
        };
        let count = usize::try_from(group.count).map_err(|_| format!("instance_group.count is {}", group.count))?;
        let index = |&gpu: &i64| u32::try_from(gpu).map_err(|_| format!("instance_group.gpus holds {gpu}"));
        let gpus = group.gpus.iter().map(index).collect::<Result<_, _>>()?;
        Ok(InstanceGroup { count: (count > 0).then_some(count), kind, gpus })
    };
    groups.into_iter().map(group).collect()
}

impl DynamicBatching {
    fn schedule(self) -> Result<Schedule, String> {
        let level = |number: u64, field: &str| {
            u32::try_from(number).map_err(|_| format!("dynamic_batching.{field} is {number}, too many levels"))
        };
        let size = |&size: &i64| {
            usize::try_from(size).map_err(|_| format!("dynamic_batching.preferred_batch_size holds {size}"))
        };
        let own = |(number, policy): (u64, QueuePolicy)| {
            Ok((level(number, "priority_queue_policy")?, LevelSettings::from(policy.level())))
        };
        let Level { timeout_action, default_timeout, allow_timeout_override, max_size } =
            self.default_queue_policy.level();
        Ok(Schedule {
            max_delay: Duration::from_micros(self.max_queue_delay_microseconds),
            preferred_batch_sizes: self.preferred_batch_size.iter().map(size).collect::<Result<_, _>>()?,
            priority_levels: level(self.priority_levels, "priority_levels")?,
            default_priority: level(self.default_priority_level, "default_priority_level")?,
            timeout_action,
            default_timeout,
            allow_timeout_override,
            max_size,
            priority: self.priority_queue_policy.into_iter().map(own).collect::<Result<_, String>>()?,
        })
    }
}

impl QueuePolicy {
    fn level(self) -> Level {
        let delay = self.timeout_action.as_deref() == Some("DELAY");
        Level {
            timeout_action: if delay { TimeoutAction::Delay } else { TimeoutAction::Reject },
            default_timeout: Duration::from_micros(self.default_timeout_microseconds),
            allow_timeout_override: self.allow_timeout_override,
            max_size: self.max_queue_size,
        }
    }
}

impl IoTensor {
    /// The tensor as clients see it; `batched` puts the batch dimension, which the file leaves out, in front.
    fn declare(self, kind: &str, batched: bool) -> Result<Declaration, String> {
        if self.name.is_empty() {
            return Err(format!("{kind}: every {kind} needs a name"));
        }
        let whole = |dims: Vec<i64>| batched.then_some(-1).into_iter().chain(dims).collect::<Vec<i64>>();
        let datatype = self.data_type.as_deref().map(datatype).transpose();
        Ok(Declaration {
            datatype: datatype.map_err(|error| format!("{kind} '{}': {error}", self.name))?,
            name: self.name,
            shape: (!self.dims.is_empty()).then(|| whole(self.dims)),
            reshape: self.reshape.map(|reshape| whole(reshape.shape)),
            optional: self.optional,
        })
    }
}

/// The protocol's type of a `TYPE_…`.
fn datatype(name: &str) -> Result<DType, String> {
    let short = name.strip_prefix("TYPE_").unwrap_or(name);
    let found = if short == "STRING" { Some(DType::Bytes) } else { DType::parse(short) };
    found.ok_or_else(|| format!("data_type {name} is no type of a tensor"))
}

/// The samples; those without a row are passed over, as Triton does it.
fn warmup(samples: Vec<Warmup>, batched: bool, notes: &mut Vec<String>) -> Result<Vec<DescribedRequest>, String> {
    let (samples, empty): (Vec<_>, Vec<_>) = samples.into_iter().partition(|sample| sample.batch_size > 0);
    let pass_over = |sample: Warmup| format!("model_warmup '{}' has batch_size 0 and is passed over", sample.name);
    notes.extend(empty.into_iter().map(pass_over));
    samples.into_iter().map(|sample| sample.describe(batched)).collect()
}

impl Warmup {
    fn describe(self, batched: bool) -> Result<DescribedRequest, String> {
        if !batched && self.batch_size > 1 {
            let Warmup { name, batch_size, .. } = self;
            return Err(format!("model_warmup '{name}': batch_size is {batch_size}, and the model does not batch"));
        }
        let input = |(name, input): (String, WarmupInput)| {
            let named = |error| format!("model_warmup '{}': input '{name}': {error}", self.name);
            let described = DescribedInput {
                datatype: datatype(input.data_type.as_deref().unwrap_or("TYPE_INVALID")).map_err(named)?,
                dims: input.dims,
                data: match input.input_data_file {
                    Some(file) => Filling::File(file),
                    None if input.random_data => Filling::Random,
                    None => Filling::Zero,
                },
            };
            Ok((name, described))
        };
        Ok(DescribedRequest {
            batch_size: batched.then_some(self.batch_size),
            count: self.count.max(1),
            inputs: self.inputs.into_iter().map(input).collect::<Result<_, String>>()?,
            name: self.name,
        })
    }
}

/// Takes a parameter of Triton's ONNX Runtime backend; `false` when it is none.
fn parameter(options: &mut Options, key: &str, value: &str) -> Result<bool, String> {
    let wrong = |expected: &str| format!("parameters '{key}' must be {expected}, is '{}'", shorten(value));
    let threads = || match value.parse::<usize>() {
        Ok(0) => Ok(None),
        Ok(threads) => Ok(Some(threads)),
        Err(_) => Err(wrong("a number of threads, or 0")),
    };
    let flag = || match value {
        "1" | "true" => Ok(Some(true)),
        "0" | "false" => Ok(Some(false)),
        _ => Err(wrong("0 or 1")),
    };
    let mut cuda = |value: &str| options.cuda.insert(key.to_owned(), value.to_owned());
    match key {
        "intra_op_thread_count" => options.intra_op_threads = threads()?,
        "inter_op_thread_count" => options.inter_op_threads = threads()?,
        "execution_mode" => options.parallel = flag()?,
        "enable_mem_pattern" => options.memory_pattern = flag()?,
        "enable_mem_arena" => options.memory_arena = flag()?,
        "memory.enable_memory_arena_shrinkage" => options.arena_shrinkage = Some(value.to_owned()),
        "cudnn_conv_algo_search" => {
            cuda(match value {
                "0" => "EXHAUSTIVE",
                "1" => "HEURISTIC",
                "2" => "DEFAULT",
                _ => return Err(wrong("0, 1 or 2")),
            });
        }
        "arena_extend_strategy" => {
            cuda(match value {
                "0" => "kNextPowerOfTwo",
                "1" => "kSameAsRequested",
                _ => return Err(wrong("0 or 1")),
            });
        }
        "gpu_mem_limit" => {
            cuda(value.parse::<u64>().map(|_| value).map_err(|_| wrong("a number of bytes"))?);
        }
        "do_copy_in_default_stream" => {
            cuda(if flag()? == Some(true) { "1" } else { "0" });
        }
        key if SESSION_PREFIXES.iter().any(|prefix| key.starts_with(prefix)) => {
            options.session_config.insert(key.to_owned(), value.to_owned());
        }
        _ => return Ok(false),
    }
    Ok(true)
}
