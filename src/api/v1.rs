//! Status and metadata in the words of TensorFlow Serving and of KServe's V1 protocol, which share their paths.
//!
//! Where both answer at one path, the object has the members of both.

use std::time::UNIX_EPOCH;

use serde_json::{Map, Value, json};

use super::{SERVER_NAME, shapes::predict::SIGNATURE_NAME};
use crate::{
    backend::TensorSpec,
    error::Error,
    id::shorten,
    model::{
        ModelVersion, State,
        catalog::{Catalog, Entry},
    },
    tensor::DType,
};

fn state_name(state: State) -> &'static str {
    match state {
        State::Settling => "START",
        State::Loading => "LOADING",
        State::Ready => "AVAILABLE",
        State::Draining => "UNLOADING",
        State::Failed | State::Held => "END",
    }
}

/// The status of a model's versions, or of the one named, and whether it would answer. A model that is ready is what
/// OpenAI's clients take for one, too.
///
/// # Errors
/// `NotFound` for models and versions nobody has heard of.
pub(super) fn status_json(catalog: &Catalog, model: &str, version: Option<&str>) -> Result<(bool, Value), Error> {
    let deployment = catalog.deployment(model)?;
    let entries: Vec<&Entry> = match version {
        None => deployment.entries.iter().collect(),
        Some(version) => vec![
            deployment
                .entry(version)
                .ok_or_else(|| Error::not_found(format!("model '{model}' has no version '{}'", shorten(version))))?,
        ],
    };
    let status = |entry: &&Entry| {
        let failed = entry.state == State::Failed;
        json!({
            "version": entry.version.as_str(),
            "state": state_name(entry.state),
            "status": {
                "error_code": if failed { "UNKNOWN" } else { "OK" },
                "error_message": if failed { &*entry.reason } else { "" },
            },
        })
    };
    let ready = catalog.find(model, version).is_ok();
    let versions: Vec<Value> = entries.iter().map(status).collect();
    let mut status = json!({ "name": model, "ready": ready, "model_version_status": versions });
    if let (None, Value::Object(status), Some(Value::Object(listed))) =
        (version, &mut status, as_listed(catalog, model))
    {
        status.extend(listed);
    }
    Ok((ready, status))
}

/// The names of all models that are known; and those that are ready, in the words of OpenAI, which has the path too.
pub(super) fn list_json(catalog: &Catalog) -> Value {
    let names = || catalog.deployments.keys().map(|name| name.as_str());
    let data: Vec<Value> = names().filter_map(|name| as_listed(catalog, name)).collect();
    json!({ "models": names().collect::<Vec<_>>(), "object": "list", "data": data })
}

/// A model in the words of OpenAI, if it is ready.
fn as_listed(catalog: &Catalog, model: &str) -> Option<Value> {
    let version = catalog.find(model, None).ok()?;
    let created = version.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Some(json!({ "id": model, "object": "model", "created": created, "owned_by": SERVER_NAME }))
}

/// What a version takes and gives, as TensorFlow's signature definitions say it.
pub(super) fn metadata_json(version: &ModelVersion) -> Value {
    json!({
        "model_spec": { "name": version.name.as_str(), "signature_name": "", "version": version.version.as_str() },
        "metadata": { "signature_def": { "signature_def": { SIGNATURE_NAME: {
            "inputs": tensors(&version.signature.inputs),
            "outputs": tensors(&version.signature.outputs),
            "method_name": "tensorflow/serving/predict",
        } } } },
    })
}

fn tensors(specs: &[TensorSpec]) -> Map<String, Value> {
    let info = |spec: &TensorSpec| {
        // Sizes are 64-bit integers there, which the JSON of protocol buffers writes as strings.
        let dims: Vec<_> = spec.shape.iter().map(|size| json!({ "size": size.to_string(), "name": "" })).collect();
        json!({
            "dtype": dtype_name(spec.dtype),
            "tensor_shape": { "dim": dims, "unknown_rank": false },
            "name": &*spec.name,
        })
    };
    specs.iter().map(|spec| (spec.name.to_string(), info(spec))).collect()
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "DT_BOOL",
        DType::Uint8 => "DT_UINT8",
        DType::Uint16 => "DT_UINT16",
        DType::Uint32 => "DT_UINT32",
        DType::Uint64 => "DT_UINT64",
        DType::Int8 => "DT_INT8",
        DType::Int16 => "DT_INT16",
        DType::Int32 => "DT_INT32",
        DType::Int64 => "DT_INT64",
        DType::Fp16 => "DT_HALF",
        DType::Bf16 => "DT_BFLOAT16",
        DType::Fp32 => "DT_FLOAT",
        DType::Fp64 => "DT_DOUBLE",
        DType::Bytes => "DT_STRING",
    }
}
