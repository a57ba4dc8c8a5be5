//! From a `ModelSpec` to the fields of Triton's model configuration.

use std::{collections::BTreeMap, path::PathBuf};

use serde_json::{Map, Value, json};

use crate::{
    backend::{ComputeType, Declaration, Device, DeviceKind, InstanceGroup, OptimizationLevel, Options},
    control::spec::ModelSpec,
    model::{
        catalog::VersionPolicy,
        golden,
        schedule::{Level, Schedule, TimeoutAction},
        warmup::described::{DescribedRequest, Filling},
    },
    tensor::DType,
};

/// The fields, and the keys of the spec that they cannot say.
pub(super) fn fields(spec: &ModelSpec) -> (Value, Vec<&'static str>) {
    let batched = spec.batching == Some(true) && spec.max_batch_size.is_some();
    let mut fields = Map::new();
    let mut set = |key: &str, value: Option<Value>| value.map(|value| fields.insert(key.to_owned(), value));
    set("name", spec.name.clone().map(Value::from));
    set("backend", spec.backend.clone().map(Value::from));
    set("default_model_filename", spec.file_name.clone().map(Value::from));
    set("max_batch_size", spec.max_batch_size.filter(|_| batched).map(Value::from));
    set("input", list(&spec.inputs, |declared| tensor(declared, batched)));
    set("output", list(&spec.outputs, |declared| output(declared, batched, spec.labels.get(&declared.name))));
    set("version_policy", policy(&spec.versions));
    set("dynamic_batching", (spec.queue != Schedule::default()).then(|| dynamic_batching(&spec.queue)));
    set("instance_group", list(&groups(spec), group));
    set("model_warmup", list(&spec.warmup_requests, warmup));
    set("optimization", level(spec.options.optimization).map(|level| json!({ "graph": { "level": level } })));
    let parameters = parameters(&spec.options).chain(spec.parameters.clone());
    let parameters: Map<_, _> = parameters.map(|(key, value)| (key, json!({ "string_value": value }))).collect();
    set("parameters", (!parameters.is_empty()).then_some(Value::Object(parameters)));
    let left_out = [
        ("profile", spec.profile.is_some()),
        ("batching", spec.batching == Some(true) && !batched),
        // Inputs and outputs are what tells a parser that 0 rows are meant.
        ("batching", spec.batching == Some(false) && spec.inputs.is_empty() && spec.outputs.is_empty()),
        ("batching", spec.batching.is_none() && !(spec.inputs.is_empty() && spec.outputs.is_empty())),
        ("max_batch_size", spec.max_batch_size.is_some() && !batched),
        ("labels", spec.labels.keys().any(|name| !spec.outputs.iter().any(|output| output.name == *name))),
        ("warmup", !spec.warmup.is_empty()),
        ("check_signature", spec.check_signature.is_some()),
        ("golden", spec.golden != golden::Settings::default()),
        ("options.dtype", spec.options.dtype != ComputeType::default()),
        ("options.share_prepacked_weights", spec.options.share_prepacked_weights.is_some()),
        ("options.optimized_model", spec.options.optimized_model.is_some()),
        ("options.cuda", spec.options.cuda.keys().any(|key| cuda_number(key, "").is_none())),
    ];
    let left_out = left_out.into_iter().filter(|(_, missing)| *missing).map(|(key, _)| key).collect();
    (Value::Object(fields), left_out)
}

fn list<T>(items: &[T], field: impl Fn(&T) -> Value) -> Option<Value> {
    (!items.is_empty()).then(|| items.iter().map(field).collect())
}

fn tensor(declared: &Declaration, batched: bool) -> Value {
    let dims = |shape: &Vec<i64>| json!(shape.iter().skip(usize::from(batched)).collect::<Vec<_>>());
    let mut tensor = json!({ "name": declared.name });
    if let Some(datatype) = declared.datatype {
        tensor["data_type"] = type_name(datatype).into();
    }
    if let Some(shape) = &declared.shape {
        tensor["dims"] = dims(shape);
    }
    if let Some(shape) = &declared.reshape {
        tensor["reshape"] = json!({ "shape": dims(shape) });
    }
    if declared.optional {
        tensor["optional"] = true.into();
    }
    tensor
}

fn output(declared: &Declaration, batched: bool, labels: Option<&PathBuf>) -> Value {
    let mut output = tensor(declared, batched);
    if let Some(file) = labels {
        output["label_filename"] = file.display().to_string().into();
    }
    output
}

fn type_name(datatype: DType) -> String {
    format!("TYPE_{}", if datatype == DType::Bytes { "STRING" } else { datatype.name() })
}

fn policy(policy: &VersionPolicy) -> Option<Value> {
    let numbers = |list: &[String]| list.iter().filter_map(|text| text.parse::<i64>().ok()).collect::<Vec<_>>();
    match policy {
        VersionPolicy::Latest(1) => None,
        VersionPolicy::Latest(count) => Some(json!({ "latest": { "num_versions": count } })),
        VersionPolicy::All => Some(json!({ "all": {} })),
        VersionPolicy::Specific(list) => Some(json!({ "specific": { "versions": numbers(list) } })),
    }
}

/// The fields of a schedule, every level with its whole policy.
fn dynamic_batching(queue: &Schedule) -> Value {
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let policy = |level: &Level| {
        json!({
            "timeout_action": if level.timeout_action == TimeoutAction::Delay { "DELAY" } else { "REJECT" },
            "default_timeout_microseconds": micros(level.default_timeout),
            "allow_timeout_override": level.allow_timeout_override,
            "max_queue_size": level.max_size,
        })
    };
    // Without overrides every level is the usual one.
    let usual = Schedule { priority: BTreeMap::new(), ..queue.clone() }.levels();
    let levels = queue.levels();
    let own = |number: &u32| Some((number.to_string(), policy(levels.get(*number as usize - 1)?)));
    json!({
        "preferred_batch_size": queue.preferred_batch_sizes,
        "max_queue_delay_microseconds": micros(queue.max_delay),
        "priority_levels": queue.priority_levels,
        "default_priority_level": queue.default_priority,
        "default_queue_policy": usual.first().map(policy),
        "priority_queue_policy": queue.priority.keys().filter_map(own).collect::<Map<_, _>>(),
    })
}

/// The groups, also when the spec has only a number and a device.
fn groups(spec: &ModelSpec) -> Vec<InstanceGroup> {
    if !spec.instance_group.is_empty() {
        // A group that says nothing is what the file means without one.
        let plain = spec.instance_group.len() == 1 && spec.instance_group[0] == InstanceGroup::default();
        return if plain { Vec::new() } else { spec.instance_group.clone() };
    }
    let (kind, gpus) = match spec.options.device {
        Device::Cpu => (DeviceKind::Cpu, Vec::new()),
        Device::Cuda(index) => (DeviceKind::Gpu, vec![index]),
    };
    vec![InstanceGroup { count: spec.instances, kind, gpus }]
}

fn group(group: &InstanceGroup) -> Value {
    let kind = match group.kind {
        DeviceKind::Auto => "KIND_AUTO",
        DeviceKind::Cpu => "KIND_CPU",
        DeviceKind::Gpu => "KIND_GPU",
    };
    json!({ "kind": kind, "count": group.count.unwrap_or(0), "gpus": group.gpus })
}

fn warmup(request: &DescribedRequest) -> Value {
    let inputs: Map<String, Value> = request
        .inputs
        .iter()
        .map(|(name, input)| {
            let mut value = json!({ "data_type": type_name(input.datatype), "dims": input.dims });
            match &input.data {
                Filling::Zero => value["zero_data"] = true.into(),
                Filling::Random => value["random_data"] = true.into(),
                Filling::File(file) => value["input_data_file"] = file.as_str().into(),
            }
            (name.clone(), value)
        })
        .collect();
    json!({ "name": request.name, "batch_size": request.batch_size.unwrap_or(1), "count": request.count, "inputs": inputs })
}

pub(super) fn level(level: OptimizationLevel) -> Option<i32> {
    match level {
        OptimizationLevel::All => None,
        OptimizationLevel::Basic => Some(-1),
        OptimizationLevel::Extended => Some(1),
        OptimizationLevel::Disable => Some(2),
    }
}

/// The backend's parameters, in Triton's words.
pub(super) fn parameters(options: &Options) -> impl Iterator<Item = (String, String)> {
    let flag = |value: Option<bool>| value.map(|value| usize::from(value).to_string());
    let own = [
        ("intra_op_thread_count", options.intra_op_threads.map(|threads| threads.to_string())),
        ("inter_op_thread_count", options.inter_op_threads.map(|threads| threads.to_string())),
        ("execution_mode", flag(options.parallel)),
        ("enable_mem_pattern", flag(options.memory_pattern)),
        ("enable_mem_arena", flag(options.memory_arena)),
        ("memory.enable_memory_arena_shrinkage", options.arena_shrinkage.clone()),
        ("session.intra_op.allow_spinning", options.spinning.then(|| "1".to_owned())),
        ("session.inter_op.allow_spinning", options.spinning.then(|| "1".to_owned())),
        ("session.set_denormal_as_zero", options.flush_to_zero.then(|| "1".to_owned())),
    ];
    let own = own.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    let cuda = options.cuda.iter().filter_map(|(key, value)| Some((key.clone(), cuda_number(key, value)?)));
    let session = options.session_config.iter().map(|(key, value)| (key.clone(), value.clone()));
    own.chain(cuda).chain(session)
}

/// The value of a CUDA option as the file gives it; `None` for options that it has no parameter for.
fn cuda_number(key: &str, value: &str) -> Option<String> {
    let number = match (key, value) {
        ("cudnn_conv_algo_search", "HEURISTIC") | ("arena_extend_strategy", "kSameAsRequested") => "1",
        ("cudnn_conv_algo_search", "DEFAULT") => "2",
        ("cudnn_conv_algo_search" | "arena_extend_strategy", _) => "0",
        ("gpu_mem_limit" | "do_copy_in_default_stream", value) => value,
        _ => return None,
    };
    Some(number.to_owned())
}
