//! The operators' port: metrics, probes, versions and the state of every model.
//!
//! It has a thread of its own, so it answers while the data ports are saturated.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{App, scrape, status};
use crate::{
    error::Code,
    id::ModelName,
    model::{
        State as ModelState,
        catalog::{Deployment, Entry},
    },
};

/// The media type of the text that Prometheus scrapes.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { Json(json!({ "live": true })) }))
        .route("/readyz", get(ready))
        .route("/version", get(version))
        .route("/admin/v1/models", get(models))
        .route("/admin/v1/models/{model}", get(model))
        .fallback(|| async { status::response(&crate::error::Error::not_found("there is nothing at this path")) })
        .with_state(app)
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, EXPOSITION)], app.metrics.render(scrape::page(&app.engine.catalog().load())))
        .into_response()
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    let ready = app.is_ready();
    let code = if ready { StatusCode::OK } else { status::http(Code::NotReady) };
    (code, Json(json!({ "ready": ready }))).into_response()
}

async fn version(State(app): State<Arc<App>>) -> Response {
    Json(json!({
        "name": super::SERVER_NAME,
        "version": env!("CARGO_PKG_VERSION"),
        "onnxruntime": app.onnxruntime_version,
    }))
    .into_response()
}

/// A model as `GET /admin/v1/models` shows it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ModelStatus {
    pub name: String,
    /// The version that answers requests that name none.
    pub default_version: Option<String>,
    /// Why the model has no version at all.
    pub problem: Option<String>,
    pub versions: Vec<VersionStatus>,
}

/// A version as `GET /admin/v1/models` shows it.
#[derive(Debug, Serialize, Deserialize)]
pub struct VersionStatus {
    pub version: String,
    pub state: String,
    pub reason: String,
    #[serde(flatten)]
    pub serving: Option<ServingStatus>,
}

/// What is known of a version once it serves.
#[derive(Debug, Serialize, Deserialize)]
pub struct ServingStatus {
    pub instances: usize,
    pub batching: bool,
    pub batching_reason: String,
    pub batch_rows: usize,
    pub max_batch_size: Option<usize>,
    pub pending_requests: usize,
    pub load_seconds: f64,
    pub notes: Vec<String>,
}

fn model_status(name: &ModelName, deployment: &Deployment) -> ModelStatus {
    ModelStatus {
        name: name.to_string(),
        default_version: deployment.default.as_ref().map(ToString::to_string),
        problem: deployment.problem.clone(),
        versions: deployment.entries.iter().map(version_status).collect(),
    }
}

fn version_status(entry: &Entry) -> VersionStatus {
    let serving = entry.serving.as_ref().map(|version| ServingStatus {
        instances: version.instances,
        batching: version.batching.enabled,
        batching_reason: version.batching.reason.clone(),
        batch_rows: version.batching.group,
        max_batch_size: version.max_batch_size,
        pending_requests: version.in_flight(),
        load_seconds: version.load_duration.as_secs_f64(),
        notes: version.signature.notes.clone(),
    });
    VersionStatus {
        version: entry.version.to_string(),
        state: ModelState::as_str(entry.state).to_owned(),
        reason: entry.reason.clone(),
        serving,
    }
}

async fn models(State(app): State<Arc<App>>) -> Json<Vec<ModelStatus>> {
    let catalog = app.engine.catalog().load();
    Json(catalog.deployments.iter().map(|(name, deployment)| model_status(name, deployment)).collect())
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    let catalog = app.engine.catalog().load();
    match catalog.deployments.get_key_value(name.as_str()) {
        Some((name, deployment)) => Json(model_status(name, deployment)).into_response(),
        None => {
            status::response(&crate::error::Error::not_found(format!("unknown model '{}'", crate::id::shorten(&name))))
        }
    }
}
