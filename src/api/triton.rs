//! Triton's read-only extensions in both protocols' words: repository index, model configuration, statistics.

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use prost::Message;
use serde_json::{Value, json};

use super::pb;
use crate::{
    backend::{Declaration, Device, TensorSpec},
    control::pbtxt,
    error::Error,
    metrics::Tally,
    model::{
        ModelVersion, State,
        catalog::{Catalog, Entry, VersionPolicy},
        schedule::{Level, Schedule, TimeoutAction},
    },
    tensor::DType,
};

/// The state names that Triton's clients know.
fn index_state(state: State) -> &'static str {
    match state {
        State::Ready => "READY",
        State::Settling | State::Loading => "LOADING",
        State::Draining => "UNLOADING",
        State::Failed | State::Held => "UNAVAILABLE",
    }
}

/// Every version known; only those that serve when `ready`.
pub fn index(catalog: &Catalog, ready: bool) -> Vec<pb::repository_index_response::ModelIndex> {
    let mut index = Vec::new();
    for (name, deployment) in &catalog.deployments {
        let model = |version: String, state: &str, reason: &str| pb::repository_index_response::ModelIndex {
            name: name.to_string(),
            version,
            state: state.to_owned(),
            reason: reason.to_owned(),
        };
        for entry in &deployment.entries {
            if !ready || entry.serving.is_some() {
                index.push(model(entry.version.to_string(), index_state(entry.state), &entry.reason));
            }
        }
        if let (Some(problem), false, true) = (&deployment.problem, ready, deployment.entries.is_empty()) {
            index.push(model(String::new(), index_state(State::Failed), problem));
        }
    }
    index
}

/// Rows to announce as `max_batch_size`: the author's limit, else the group found at warm-up (a hint, not a limit);
/// 0 when requests are not batched.
fn max_batch_size(version: &ModelVersion) -> i32 {
    let rows = if version.batching.enabled { version.max_batch_size.unwrap_or(version.batching.group) } else { 0 };
    i32::try_from(rows).unwrap_or(i32::MAX)
}

/// The dimensions as a configuration gives them: without the batch dimension when there is one.
fn config_dims(version: &ModelVersion, shape: &[i64]) -> Vec<i64> {
    shape.iter().skip(usize::from(max_batch_size(version) > 0)).copied().collect()
}

fn config_type(dtype: DType) -> pb::DataType {
    match dtype {
        DType::Bool => pb::DataType::TypeBool,
        DType::Uint8 => pb::DataType::TypeUint8,
        DType::Uint16 => pb::DataType::TypeUint16,
        DType::Uint32 => pb::DataType::TypeUint32,
        DType::Uint64 => pb::DataType::TypeUint64,
        DType::Int8 => pb::DataType::TypeInt8,
        DType::Int16 => pb::DataType::TypeInt16,
        DType::Int32 => pb::DataType::TypeInt32,
        DType::Int64 => pb::DataType::TypeInt64,
        DType::Fp16 => pb::DataType::TypeFp16,
        DType::Bf16 => pb::DataType::TypeBf16,
        DType::Fp32 => pb::DataType::TypeFp32,
        DType::Fp64 => pb::DataType::TypeFp64,
        DType::Bytes => pb::DataType::TypeString,
    }
}

/// The configuration that a version runs with, as Triton would write it.
pub fn config(version: &ModelVersion, policy: &VersionPolicy) -> pb::ModelConfig {
    use pb::model_config::SchedulingChoice;
    let interface = &version.interface;
    let input = |spec: &TensorSpec| pb::ModelInput {
        name: spec.name.to_string(),
        data_type: config_type(spec.dtype).into(),
        dims: config_dims(version, &spec.shape),
        reshape: reshape(version, &interface.inputs, spec),
        optional: version.signature.is_optional(&spec.name),
        ..Default::default()
    };
    let output = |spec: &TensorSpec| pb::ModelOutput {
        name: spec.name.to_string(),
        data_type: config_type(spec.dtype).into(),
        dims: config_dims(version, &spec.shape),
        reshape: reshape(version, &interface.outputs, spec),
        label_filename: label_file(version, spec),
        ..Default::default()
    };
    pb::ModelConfig {
        name: version.name.to_string(),
        platform: version.platform.to_owned(),
        backend: version.backend.to_owned(),
        version_policy: Some(pb::ModelVersionPolicy { policy_choice: Some(policy_choice(policy)) }),
        max_batch_size: max_batch_size(version),
        input: version.signature.inputs.iter().map(input).collect(),
        output: version.signature.outputs.iter().map(output).collect(),
        instance_group: version.places.iter().enumerate().map(|(index, place)| group(version, index, place)).collect(),
        default_model_filename: version.model_file.clone(),
        scheduling_choice: version
            .batching
            .enabled
            .then(|| SchedulingChoice::DynamicBatching(dynamic_batching(&version.schedule))),
        optimization: Some(pb::ModelOptimizationPolicy {
            graph: Some(pb::model_optimization_policy::Graph {
                level: pbtxt::graph_level(version.options.optimization),
            }),
            ..Default::default()
        }),
        parameters: pbtxt::parameters(&version.options)
            .chain(version.parameters.clone())
            .map(|(key, string_value)| (key, pb::ModelParameter { string_value }))
            .collect(),
        ..Default::default()
    }
}

/// # Errors
/// `Internal` when the message cannot be read back.
pub fn config_json(version: &ModelVersion, policy: &VersionPolicy) -> Result<Value, Error> {
    pbtxt::to_json(&config(version, policy).encode_to_vec())
}

/// The shape that the graph sees, where the author declared another one to clients.
fn reshape(version: &ModelVersion, declared: &[Declaration], spec: &TensorSpec) -> Option<pb::ModelTensorReshape> {
    let declared = declared.iter().find(|declared| declared.name == *spec.name)?;
    let shape = declared.reshape.as_ref()?;
    Some(pb::ModelTensorReshape { shape: config_dims(version, shape) })
}

/// The name of the file with an output's labels; empty when there is none.
fn label_file(version: &ModelVersion, spec: &TensorSpec) -> String {
    let name = version.label_files.get(&*spec.name).and_then(|path| path.file_name());
    name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn dynamic_batching(schedule: &Schedule) -> pb::ModelDynamicBatching {
    let int = |size: &usize| i32::try_from(*size).unwrap_or(i32::MAX);
    // Without overrides every level is the usual one.
    let usual = Schedule { priority: BTreeMap::new(), ..schedule.clone() }.levels();
    let own = schedule.levels();
    let level = |number: &u32| Some((u64::from(*number), queue_policy(own.get(*number as usize - 1)?)));
    pb::ModelDynamicBatching {
        preferred_batch_size: schedule.preferred_batch_sizes.iter().map(int).collect(),
        max_queue_delay_microseconds: micros(schedule.max_delay),
        priority_levels: schedule.priority_levels.into(),
        default_priority_level: schedule.default_priority.into(),
        default_queue_policy: usual.first().map(queue_policy),
        priority_queue_policy: schedule.priority.keys().filter_map(level).collect(),
        ..Default::default()
    }
}

fn queue_policy(level: &Level) -> pb::ModelQueuePolicy {
    use pb::model_queue_policy::TimeoutAction as Action;
    let action = match level.timeout_action {
        TimeoutAction::Reject => Action::Reject,
        TimeoutAction::Delay => Action::Delay,
    };
    pb::ModelQueuePolicy {
        timeout_action: action.into(),
        default_timeout_microseconds: micros(level.default_timeout),
        allow_timeout_override: level.allow_timeout_override,
        max_queue_size: u32::try_from(level.max_size).unwrap_or(u32::MAX),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn policy_choice(policy: &VersionPolicy) -> pb::model_version_policy::PolicyChoice {
    use pb::model_version_policy::{All, Latest, PolicyChoice, Specific};
    match policy {
        VersionPolicy::Latest(count) => {
            PolicyChoice::Latest(Latest { num_versions: u32::try_from(*count).unwrap_or(u32::MAX) })
        }
        VersionPolicy::All => PolicyChoice::All(All {}),
        VersionPolicy::Specific(list) => {
            PolicyChoice::Specific(Specific { versions: list.iter().filter_map(|text| text.parse().ok()).collect() })
        }
    }
}

fn group(version: &ModelVersion, index: usize, (device, count): &(Device, usize)) -> pb::ModelInstanceGroup {
    use pb::model_instance_group::Kind;
    let (kind, gpus) = match device {
        Device::Cpu => (Kind::Cpu, Vec::new()),
        Device::Cuda(gpu) => (Kind::Gpu, vec![i32::try_from(*gpu).unwrap_or(i32::MAX)]),
    };
    pb::ModelInstanceGroup {
        name: format!("{}_{index}", version.name),
        kind: kind.into(),
        count: i32::try_from(*count).unwrap_or(i32::MAX),
        gpus,
        ..Default::default()
    }
}

/// The entries that a statistics call asks for: one version, all of a model, or everything.
///
/// # Errors
/// `NotFound` for models and versions nobody has heard of.
pub fn statistics_of<'a>(catalog: &'a Catalog, model: &str, version: &str) -> Result<Vec<(&'a str, &'a Entry)>, Error> {
    if model.is_empty() {
        let all = catalog.deployments.iter();
        return Ok(all.flat_map(|(name, d)| d.entries.iter().map(move |entry| (name.as_str(), entry))).collect());
    }
    let (name, deployment) = catalog
        .deployments
        .get_key_value(model)
        .ok_or_else(|| Error::not_found(format!("unknown model '{}'", crate::id::shorten(model))))?;
    let entries: Vec<_> = deployment
        .entries
        .iter()
        .filter(|entry| version.is_empty() || entry.version.as_str() == version)
        .map(|entry| (name.as_str(), entry))
        .collect();
    if entries.is_empty() && !version.is_empty() {
        return Err(Error::not_found(format!("model '{model}' has no version '{}'", crate::id::shorten(version))));
    }
    Ok(entries)
}

pub fn statistics(model: &str, entry: &Entry) -> pb::ModelStatistics {
    let statistics = &entry.metrics.statistics;
    let pair = |(count, ns): (u64, u64)| Some(pb::StatisticDuration { count, ns });
    let tally = |tally: &Tally| pair(tally.read());
    let batch = |(batch_size, phases): (u64, [(u64, u64); 3])| pb::InferBatchStatistics {
        batch_size,
        compute_input: pair(phases[0]),
        compute_infer: pair(phases[1]),
        compute_output: pair(phases[2]),
    };
    pb::ModelStatistics {
        name: model.to_owned(),
        version: entry.version.to_string(),
        last_inference: statistics.last_inference_ms.load(Ordering::Relaxed),
        inference_count: statistics.inferences.load(Ordering::Relaxed),
        execution_count: statistics.executions.load(Ordering::Relaxed),
        inference_stats: Some(pb::InferStatistics {
            success: tally(&statistics.success),
            fail: tally(&statistics.fail),
            queue: tally(&statistics.queue),
            compute_input: tally(&statistics.compute[0]),
            compute_infer: tally(&statistics.compute[1]),
            compute_output: tally(&statistics.compute[2]),
            cache_hit: pair((0, 0)),
            cache_miss: pair((0, 0)),
        }),
        batch_stats: statistics.batches().into_iter().map(batch).collect(),
        ..Default::default()
    }
}

pub fn statistics_json(entries: &[(&str, &Entry)]) -> Value {
    let pair = |pair: Option<pb::StatisticDuration>| {
        let pb::StatisticDuration { count, ns } = pair.unwrap_or_default();
        json!({ "count": count, "ns": ns })
    };
    let version = |(model, entry): &(&str, &Entry)| {
        let of = statistics(model, entry);
        let infer = of.inference_stats.unwrap_or_default();
        let batch = |batch: pb::InferBatchStatistics| {
            json!({
                "batch_size": batch.batch_size,
                "compute_input": pair(batch.compute_input),
                "compute_infer": pair(batch.compute_infer),
                "compute_output": pair(batch.compute_output),
            })
        };
        json!({
            "name": of.name,
            "version": of.version,
            "last_inference": of.last_inference,
            "inference_count": of.inference_count,
            "execution_count": of.execution_count,
            "inference_stats": {
                "success": pair(infer.success),
                "fail": pair(infer.fail),
                "queue": pair(infer.queue),
                "compute_input": pair(infer.compute_input),
                "compute_infer": pair(infer.compute_infer),
                "compute_output": pair(infer.compute_output),
                "cache_hit": pair(infer.cache_hit),
                "cache_miss": pair(infer.cache_miss),
            },
            "batch_stats": of.batch_stats.into_iter().map(batch).collect::<Vec<_>>(),
            "memory_usage": [],
        })
    };
    json!({ "model_stats": entries.iter().map(version).collect::<Vec<_>>() })
}

/// Inputs or outputs as metadata lists them.
pub fn metadata_tensors(specs: &[TensorSpec]) -> Vec<pb::model_metadata_response::TensorMetadata> {
    specs
        .iter()
        .map(|spec| pb::model_metadata_response::TensorMetadata {
            name: spec.name.to_string(),
            datatype: spec.dtype.name().to_owned(),
            shape: spec.shape.clone(),
        })
        .collect()
}
