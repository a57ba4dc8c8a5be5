//! Everything over REST: the Open Inference Protocol v2, Triton's extensions, and other servers' shapes of a request.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Body,
    extract::{FromRequestParts, Path, Request, State},
    middleware::map_response_with_state,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{HeaderValue, StatusCode, header, request::Parts};
use serde_json::json;

use super::{
    App, SERVER_NAME,
    listen::{Inference, Routes},
    log, repository, shared_memory, status, triton,
};
use crate::{
    error::{Code, Error},
    id::shorten,
};

mod body;
mod exchange;
pub(super) mod front;
mod generate;
mod invocations;
mod predict;
mod text;

pub(super) use body::read_body;
use exchange::infer;

/// Why the other verbs of Triton's REST interface are refused.
const UNSUPPORTED: [(&str, &str); 3] = [
    ("/v2/cudasharedmemory/{*rest}", "CUDA shared memory is not supported; send tensors in the request"),
    ("/v2/trace/setting", "trace settings are not supported"),
    ("/v2/models/{model}/trace/setting", "trace settings are not supported"),
];

/// Every REST route of the data port.
pub fn routes(app: Arc<App>) -> Routes {
    let mut router = Router::new()
        .route("/v2", get(server_metadata))
        .route("/v2/", get(server_metadata))
        .route("/v2/health/live", get(|| async { Json(json!({ "live": true })) }))
        .route("/v2/health/ready", get(server_ready))
        .route("/v2/models/stats", get(all_statistics))
        .route("/v2/models/{model}", get(model_metadata))
        .route("/v2/models/{model}/ready", get(model_ready))
        .route("/v2/models/{model}/infer", post(escaped))
        .route("/v2/models/{model}/config", get(model_config))
        .route("/v2/models/{model}/stats", get(model_statistics))
        .route("/v2/models/{model}/versions/{version}", get(model_metadata))
        .route("/v2/models/{model}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{model}/versions/{version}/infer", post(escaped))
        .route("/v2/models/{model}/versions/{version}/config", get(model_config))
        .route("/v2/models/{model}/versions/{version}/stats", get(model_statistics))
        .route("/v2/logging", get(log::rest_settings).post(log::rest_change))
        .route("/v2/repository/index", post(repository::rest_index))
        .route("/v2/repository/{repository}/index", post(repository::rest_index))
        .route("/v2/repository/models/{model}/load", post(repository::rest_load))
        .route("/v2/repository/models/{model}/unload", post(repository::rest_unload))
        .route("/v2/repository/{repository}/models/{model}/load", post(repository::rest_load))
        .route("/v2/repository/{repository}/models/{model}/unload", post(repository::rest_unload));
    for (path, reason) in UNSUPPORTED {
        let refuse = move || async move { status::response(&Error::new(Code::Unimplemented, reason)) };
        router = router.route(path, axum::routing::any(refuse));
    }
    let router = router
        .merge(generate::routes())
        .merge(predict::routes())
        .merge(invocations::routes())
        .merge(text::routes())
        .merge(shared_memory::calls::routes())
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_verb)
        .with_state(app.clone());
    let router = router.layer(map_response_with_state(app.clone(), goodbye));
    Routes::from(router).with_inference(Inference::Rest(app))
}

/// An inference whose path is written with escapes; all others are answered in front of the router.
async fn escaped(State(app): State<Arc<App>>, named: Result<Named, RestError>, request: Request) -> Response {
    infer(&app, named, request.into()).await.map(Body::new)
}

async fn goodbye(State(app): State<Arc<App>>, response: Response) -> Response {
    front::say_goodbye(&app, response)
}

pub(super) async fn unknown_path(request: Request) -> Response {
    status::response(&Error::not_found(format!("there is nothing at {}", shorten(request.uri().path()))))
}

pub(super) async fn wrong_verb(request: Request) -> Response {
    let message = format!("{} is not allowed for {}", request.method(), shorten(request.uri().path()));
    RestError { error: Error::invalid(message), status: Some(StatusCode::METHOD_NOT_ALLOWED) }.into_response()
}

/// What the path names, each part only in some of its forms.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
pub(super) struct Named {
    pub(super) repository: String,
    pub(super) model: String,
    pub(super) version: Option<String>,
    /// What a rollout is told.
    pub(super) command: String,
    /// What a version is called.
    pub(super) alias: String,
}

impl FromRequestParts<Arc<App>> for Named {
    type Rejection = RestError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, RestError> {
        let path = Path::<Named>::from_request_parts(parts, app).await;
        path.map(|Path(named)| named).map_err(|rejection| Error::not_found(rejection.body_text()).into())
    }
}

async fn server_metadata(State(app): State<Arc<App>>) -> Response {
    let extensions = app.extensions();
    Json(json!({ "name": SERVER_NAME, "version": env!("CARGO_PKG_VERSION"), "extensions": extensions })).into_response()
}

async fn server_ready(State(app): State<Arc<App>>) -> Response {
    let ready = app.is_ready();
    let code = if ready { StatusCode::OK } else { status::http(Code::NotReady) };
    (code, Json(json!({ "ready": ready }))).into_response()
}

async fn model_ready(State(app): State<Arc<App>>, named: Named) -> Response {
    let answer =
        |code: StatusCode, ready: bool| (code, Json(json!({ "name": named.model, "ready": ready }))).into_response();
    match app.engine.find(&named.model, named.version.as_deref()) {
        Ok(_) => answer(StatusCode::OK, true),
        Err(error) if error.code == Code::NotReady => answer(status::http(error.code), false),
        Err(error) => status::response(&error),
    }
}

async fn model_metadata(State(app): State<Arc<App>>, named: Named) -> Result<Response, RestError> {
    let version = app.engine.find(&named.model, named.version.as_deref())?;
    let catalog = app.engine.catalog().load();
    let tensors = |specs: &[crate::backend::TensorSpec]| -> serde_json::Value {
        triton::metadata_tensors(specs)
            .into_iter()
            .map(|tensor| json!({ "name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape }))
            .collect()
    };
    Ok(Json(json!({
        "name": version.name.as_str(),
        "versions": catalog.deployment(&named.model)?.ready_versions(),
        "platform": version.platform,
        "inputs": tensors(&version.signature.inputs),
        "outputs": tensors(&version.signature.outputs),
    }))
    .into_response())
}

async fn model_config(State(app): State<Arc<App>>, named: Named) -> Result<Response, RestError> {
    let version = app.engine.find(&named.model, named.version.as_deref())?;
    let catalog = app.engine.catalog().load();
    let policy = &catalog.deployment(&named.model)?.policy;
    Ok(Json(triton::config_json(&version, policy)?).into_response())
}

async fn model_statistics(State(app): State<Arc<App>>, named: Named) -> Result<Response, RestError> {
    let catalog = app.engine.catalog().load();
    let entries = triton::statistics_of(&catalog, &named.model, named.version.as_deref().unwrap_or_default())?;
    Ok(Json(triton::statistics_json(&entries)).into_response())
}

async fn all_statistics(State(app): State<Arc<App>>) -> Result<Response, RestError> {
    let catalog = app.engine.catalog().load();
    Ok(Json(triton::statistics_json(&triton::statistics_of(&catalog, "", "")?)).into_response())
}

/// An error, and a status where HTTP has a better one than the code's own.
pub(super) struct RestError {
    error: Error,
    status: Option<StatusCode>,
}

impl From<Error> for RestError {
    fn from(error: Error) -> Self {
        Self { error, status: None }
    }
}

impl IntoResponse for RestError {
    fn into_response(self) -> Response {
        let mut response = status::response(&self.error);
        if let Some(better) = self.status {
            *response.status_mut() = better;
            if better == StatusCode::UNSUPPORTED_MEDIA_TYPE {
                response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate"));
            }
        }
        response
    }
}
