//! A model's settings from Triton's model configuration.

use serde::Deserialize;

use super::spec::ModelSpec;
use crate::{error::Error, id::ModelName};

/// The fields that are honoured.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
struct ModelConfig {
    name: String,
    backend: String,
    platform: String,
    max_batch_size: usize,
}

/// Reads a model configuration written as JSON.
///
/// # Errors
/// `InvalidArgument` naming the field that is not honoured or does not fit the model.
pub fn from_json(text: &str, model: &ModelName) -> Result<ModelSpec, Error> {
    let wrong = |what: String| Error::invalid(what).of_model(model.as_str());
    let config: ModelConfig = serde_json::from_str(text).map_err(|error| wrong(format!("config: {error}")))?;
    if !config.name.is_empty() && config.name != model.as_str() {
        return Err(wrong(format!("config: name is '{}'", crate::id::shorten(&config.name))));
    }
    for (field, value, known) in
        [("backend", &config.backend, "onnxruntime"), ("platform", &config.platform, "onnxruntime_onnx")]
    {
        if !value.is_empty() && value != known {
            return Err(wrong(format!("config: {field} must be {known}, got '{}'", crate::id::shorten(value))));
        }
    }
    let max_batch_size = Some(config.max_batch_size).filter(|&rows| rows > 0);
    Ok(ModelSpec { max_batch_size, batching: Some(max_batch_size.is_some()), ..ModelSpec::default() })
}
