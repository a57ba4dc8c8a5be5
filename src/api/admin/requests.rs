//! What changes are asked with, as the command line writes them; the server reads them field by field (`asked`).

use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde_json::{Map, Value};

use super::documents::{ArmStatus, Share};
use crate::rollout::plan::Settings;

/// Starts a rollout.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(transform = as_the_model_has_it)]
pub struct StartRequest {
    /// The version that shall take over; any in the repository, loaded or not.
    pub to: String,
    #[serde(flatten)]
    pub why: Why,
    /// Laid over the model's own, in its model.toml or by default.
    #[serde(flatten)]
    #[schemars(with = "Settings")]
    pub settings: Map<String, Value>,
}

/// Divides a model's requests by hand. What is left out is not there afterwards.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RouteRequest {
    /// Gets what no arm gets; null for the one that serves now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<Share>,
    /// Of an A/B test, each with a name of its own; all shares are 100 percent together at most.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(default)]
    pub arms: Vec<ArmStatus>,
    /// Gets copies, and nobody its answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Share>,
    /// Where the key stands by which a request keeps its version: "header:NAME", "param:NAME" or "input:NAME".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sticky: Option<String>,
    #[serde(flatten)]
    pub why: Why,
}

/// Has an alias stand for a version.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct AliasRequest {
    /// Any in the repository; it is loaded when it is not.
    pub version: String,
    #[serde(flatten)]
    pub why: Why,
}

/// Who asks, and why; both are kept in the audit log.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct Why {
    /// One line of 128 characters at most. Without it, what the header `x-tidegate-author` says, else "operator".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// One line of 1024 characters at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What is left out is as the model has it, not as it is by default; and what is unknown is refused.
fn as_the_model_has_it(schema: &mut Schema) {
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    for property in properties.into_iter().flat_map(Map::values_mut).filter_map(Value::as_object_mut) {
        property.remove("default");
    }
    schema.insert("additionalProperties".to_owned(), false.into());
}
