//! The routes of TensorFlow Serving's REST interface, which are those of KServe's V1 protocol too.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::StatusCode;

use super::{
    Named, RestError,
    body::Reply,
    exchange::{Question, exchange},
    wrong_verb,
};
use crate::{
    api::{
        App,
        codec::{Document, InferCall, InferReply},
        shapes::predict::{self, Format},
        status, v1,
    },
    error::{Code, Error},
    id::shorten,
};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/models", get(list))
        // A verb is a part of the last segment, and no name has a colon.
        .route("/v1/models/{model}", get(model_status).post(verb))
        .route("/v1/models/{model}/metadata", get(metadata))
        .route("/v1/models/{model}/versions/{version}", get(model_status).post(verb))
        .route("/v1/models/{model}/versions/{version}/metadata", get(metadata))
}

async fn list(State(app): State<Arc<App>>) -> Response {
    Json(v1::list_json(&app.engine.catalog().load())).into_response()
}

/// KServe asks here whether it may send requests, and looks at the status alone.
async fn model_status(State(app): State<Arc<App>>, named: Named, request: Request) -> Result<Response, RestError> {
    if split_verb(&named).is_some() {
        return Ok(wrong_verb(request).await);
    }
    let catalog = app.engine.catalog().load();
    let (ready, body) = v1::status_json(&catalog, &named.model, named.version.as_deref())?;
    let code = if ready { StatusCode::OK } else { status::http(Code::NotReady) };
    Ok((code, Json(body)).into_response())
}

async fn metadata(State(app): State<Arc<App>>, named: Named) -> Result<Response, RestError> {
    let version = app.engine.find(&named.model, named.version.as_deref())?;
    Ok(Json(v1::metadata_json(&version)).into_response())
}

async fn verb(State(app): State<Arc<App>>, named: Result<Named, RestError>, request: Request) -> Response {
    let named = match named {
        Ok(named) => named,
        Err(error) => return predict(&app, Err(error), request).await,
    };
    match split_verb(&named) {
        None => wrong_verb(request).await,
        Some((named, "predict")) => predict(&app, Ok(named), request).await,
        Some((named, verb)) => status::response(&Error::new(
            Code::Unimplemented,
            format!("model '{}': ':{}' is not supported; there is ':predict'", shorten(&named.model), shorten(verb)),
        )),
    }
}

/// What comes before the colon of the last segment, and what comes after it.
fn split_verb(named: &Named) -> Option<(Named, &str)> {
    match &named.version {
        None => {
            let (model, verb) = named.model.split_once(':')?;
            Some((Named { model: model.to_owned(), ..Named::default() }, verb))
        }
        Some(version) => {
            let (version, verb) = version.split_once(':')?;
            let model = named.model.clone();
            Some((Named { model, version: Some(version.to_owned()), ..Named::default() }, verb))
        }
    }
}

async fn predict(app: &Arc<App>, named: Result<Named, RestError>, request: Request) -> Response {
    let non_finite = app.json_nonfinite;
    let read = |question: &Question| {
        let document = Document::parse(&question.body)?;
        predict::read(&document, question.signature(), question.limit)
    };
    let write = move |outputs: &InferReply<'_>, _: &InferCall, format: Format| {
        predict::write(outputs, format, non_finite).map(Reply::json)
    };
    exchange(app, named, request.into(), read, write).await.map(axum::body::Body::new)
}
