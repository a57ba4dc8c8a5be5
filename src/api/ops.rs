//! The operators' port: metrics, probes and versions, beside what `admin` has.
//!
//! It has a thread of its own, so it answers while the data ports are saturated.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    App,
    admin::{
        self,
        openapi::{self, Operation},
    },
    hooks, rest, scrape, status,
};
use crate::error::Code;

/// The media type of the text that Prometheus scrapes.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

pub fn router(app: Arc<App>) -> Router {
    openapi::router(operations())
        .merge(hooks::router())
        .fallback(rest::unknown_path)
        .method_not_allowed_fallback(rest::wrong_verb)
        .with_state(app)
}

/// Everything there is on the port.
fn operations() -> Vec<Operation> {
    let mut operations = vec![
        Operation::get::<String, _, _>("/metrics", "getMetrics", "Every metric, for Prometheus.", metrics)
            .text(EXPOSITION),
        Operation::get::<Live, _, _>("/healthz", "getLiveness", "Whether the process is alive.", live),
        Operation::get::<Ready, _, _>("/readyz", "getReadiness", "Whether the server is ready.", ready)
            .failing_with::<Ready>(Code::NotReady),
        Operation::get::<Version, _, _>("/version", "getVersion", "What runs here.", version),
        Operation::get::<Map<String, Value>, _, _>("/admin/openapi.json", "getOpenapi", "This document.", document),
    ];
    operations.extend(admin::operations());
    operations
}

#[derive(Serialize, JsonSchema)]
struct Live {
    live: bool,
}

#[derive(Serialize, JsonSchema)]
struct Ready {
    ready: bool,
}

#[derive(Serialize, JsonSchema)]
struct Version {
    name: String,
    version: String,
    /// ONNX Runtime's.
    onnxruntime: String,
}

async fn live() -> Json<Live> {
    Json(Live { live: true })
}

/// Put together when it is asked for: hardly anybody does, and it takes a millisecond.
async fn document() -> Json<Value> {
    Json(openapi::document(&operations()))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let page = scrape::page(&app.engine.catalog().load(), app.sources.read());
    ([(header::CONTENT_TYPE, EXPOSITION)], app.metrics.render(page)).into_response()
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    let ready = app.is_ready();
    let code = if ready { StatusCode::OK } else { status::http(Code::NotReady) };
    (code, Json(Ready { ready })).into_response()
}

async fn version(State(app): State<Arc<App>>) -> Json<Version> {
    Json(Version {
        name: super::SERVER_NAME.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        onnxruntime: app.onnxruntime_version.clone(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_operation_is_described_once() {
        let document = openapi::document(&operations());
        let paths = document["paths"].as_object().unwrap();
        let methods = paths.values().flat_map(|path| path.as_object().unwrap().values());
        let names: BTreeSet<&str> = methods.map(|method| method["operationId"].as_str().unwrap()).collect();
        assert_eq!(names.len(), operations().len());
        for path in ["/metrics", "/admin/openapi.json", "/admin/v1/models/{model}/rollout/{command}"] {
            assert!(paths.contains_key(path), "{path}");
        }
    }

    #[test]
    fn settings_of_a_start_are_described_and_have_no_defaults() {
        let document = openapi::document(&operations());
        let start = &document["components"]["schemas"]["StartRequest"];
        assert_eq!((&start["required"], &start["additionalProperties"]), (&serde_json::json!(["to"]), &false.into()));
        let settings = serde_json::to_value(crate::rollout::plan::Settings::default()).unwrap();
        for (key, _) in settings.as_object().unwrap() {
            assert!(start["properties"][key].is_object(), "{key}");
            assert!(start["properties"][key].get("default").is_none(), "{key}");
        }
    }
}
