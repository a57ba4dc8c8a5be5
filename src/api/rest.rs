//! Open Inference Protocol v2 over REST, with Triton's extensions.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{FromRequestParts, Path, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts};
use http_body_util::BodyExt;
use serde_json::json;

use super::{
    App, EXTENSIONS, Record, SERVER_NAME, after, check_size, classify,
    codec::{self, Encoded, InferReply, JsonOptions},
    compression::{self, Encoding},
    log,
    paced::{Broken, Paced},
    repository, status, triton, urgency,
};
use crate::{
    engine,
    error::{Code, Error},
    id::shorten,
    metrics::Protocol,
};

const HEADER_LENGTH: &str = "inference-header-content-length";
const TIMEOUT_MS: &str = "x-request-timeout-ms";
const REQUEST_ID: &str = "x-request-id";

/// JSON answers smaller than this are never compressed.
const COMPRESS_FROM: usize = 1024;

/// Bodies up to this size are joined before they are sent; larger ones go out piece by piece.
const JOIN_UP_TO: usize = 16 << 10;

/// Why the other verbs of Triton's REST interface are refused.
const UNSUPPORTED: [(&str, &str); 6] = [
    ("/v2/models/{model}/generate", "generate is not supported"),
    ("/v2/models/{model}/generate_stream", "generate is not supported"),
    ("/v2/systemsharedmemory/{*rest}", "shared memory is not supported; send tensors in the request"),
    ("/v2/cudasharedmemory/{*rest}", "shared memory is not supported; send tensors in the request"),
    ("/v2/trace/setting", "trace settings are not supported"),
    ("/v2/models/{model}/trace/setting", "trace settings are not supported"),
];

/// Every REST route of the data port.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/v2", get(server_metadata))
        .route("/v2/", get(server_metadata))
        .route("/v2/health/live", get(|| async { Json(json!({ "live": true })) }))
        .route("/v2/health/ready", get(server_ready))
        .route("/v2/models/stats", get(all_statistics))
        .route("/v2/models/{model}", get(model_metadata))
        .route("/v2/models/{model}/ready", get(model_ready))
        .route("/v2/models/{model}/infer", post(infer))
        .route("/v2/models/{model}/config", get(model_config))
        .route("/v2/models/{model}/stats", get(model_statistics))
        .route("/v2/models/{model}/versions/{version}", get(model_metadata))
        .route("/v2/models/{model}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{model}/versions/{version}/infer", post(infer))
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
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_verb)
        .layer(axum::middleware::map_response_with_state(app.clone(), say_goodbye))
        .with_state(app)
}

/// While the server drains, answers ask clients to come back on another connection: to another replica, or at least
/// not on one that is about to close.
async fn say_goodbye(State(app): State<Arc<App>>, mut response: Response) -> Response {
    if app.draining.is_cancelled() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn unknown_path(request: Request) -> Response {
    status::response(&Error::not_found(format!("there is nothing at {}", shorten(request.uri().path()))))
}

async fn wrong_verb(request: Request) -> Response {
    let message = format!("{} is not allowed for {}", request.method(), shorten(request.uri().path()));
    RestError { error: Error::invalid(message), status: Some(StatusCode::METHOD_NOT_ALLOWED) }.into_response()
}

/// Model and version as the path names them.
#[derive(serde::Deserialize)]
struct Named {
    model: String,
    version: Option<String>,
}

impl FromRequestParts<Arc<App>> for Named {
    type Rejection = RestError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, RestError> {
        let path = Path::<Named>::from_request_parts(parts, app).await;
        path.map(|Path(named)| named).map_err(|rejection| Error::not_found(rejection.body_text()).into())
    }
}

async fn server_metadata() -> Response {
    Json(json!({ "name": SERVER_NAME, "version": env!("CARGO_PKG_VERSION"), "extensions": EXTENSIONS })).into_response()
}

async fn server_ready(State(app): State<Arc<App>>) -> Response {
    let ready = app.is_ready();
    let code = if ready { StatusCode::OK } else { status::http(Code::NotReady) };
    (code, Json(json!({ "ready": ready }))).into_response()
}

async fn model_ready(State(app): State<Arc<App>>, named: Named) -> Response {
    let answer =
        |code: StatusCode, ready: bool| (code, Json(json!({ "name": named.model, "ready": ready }))).into_response();
    match app.engine.resolve(&named.model, named.version.as_deref()) {
        Ok(_) => answer(StatusCode::OK, true),
        Err(error) if error.code == Code::NotReady => answer(status::http(error.code), false),
        Err(error) => status::response(&error),
    }
}

async fn model_metadata(State(app): State<Arc<App>>, named: Named) -> Result<Response, RestError> {
    let version = app.engine.resolve(&named.model, named.version.as_deref())?.version;
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
    let version = app.engine.resolve(&named.model, named.version.as_deref())?.version;
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

async fn infer(State(app): State<Arc<App>>, named: Result<Named, RestError>, request: Request) -> Response {
    let mut record = Record::start(&app, Protocol::Rest, request.headers());
    let answer = match named {
        Ok(named) => try_infer(&app, &named, request, &mut record).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(response) => {
            record.finish(None);
            response
        }
        Err(RestError { error, status }) => {
            record.finish(Some(error.code));
            RestError { error, status }.into_response()
        }
    }
}

async fn try_infer(app: &App, named: &Named, request: Request, record: &mut Record) -> Result<Response, RestError> {
    let (parts, body) = request.into_parts();
    let headers = parts.headers;
    if let Some(id) = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()) {
        id.clone_into(&mut record.request_id);
    }
    let version = named.version.as_deref();
    let found = app.engine.resolve(&named.model, version);
    let mut target = found.inspect_err(|_| record.aim_at_unready(&named.model, version))?;
    record.aim(&target);

    let encoding = content_encoding(&headers)?;
    let header_length = header_length(&headers)?;
    let waits = timeout_header(&headers)?;
    let body = read_body(app, body, app.limits.max_message_bytes).await?;
    let body = compression::decode_body(encoding, body, app.limits.max_message_bytes)?;
    let call = match header_length {
        Some(0) => codec::decode_raw(&body, &target.version.signature),
        header_length => codec::decode_json(&body, header_length),
    };
    let call = call.and_then(|call| check_size(call, app.limits.max_message_bytes));
    let call = call.map_err(|error| error.of_model(&named.model))?;
    if !call.id.is_empty() {
        record.request_id.clone_from(&call.id);
    }

    let names: Vec<Arc<str>> = call.outputs.iter().map(|output| output.name.clone()).collect();
    let urgency = urgency(record.started(), &call, after(record.started(), waits));
    let request = engine::Request { inputs: call.inputs, outputs: &names, urgency };
    let outputs = app.engine.infer(&mut target, request).await;
    // It may have run on the successor of the version that was found first.
    record.aim(&target);
    let version = &target.version;
    let outputs = classify(version, &call.outputs, outputs?)?;

    let reply =
        InferReply { model: version.name.as_str(), version: version.version.as_str(), id: &call.id, outputs: &outputs };
    let options =
        JsonOptions { requested: &call.outputs, binary_output: call.binary_output, non_finite: app.json_nonfinite };
    let encoded = codec::encode_json(&reply, &options).map_err(|error| error.of_model(&named.model))?;
    respond(encoded, encoding, &headers)
}

/// Sends the answer, compressed as the request was, or as Accept-Encoding asks when it is all JSON.
fn respond(encoded: Encoded, asked: Encoding, headers: &HeaderMap) -> Result<Response, RestError> {
    let header_length = encoded.header_length;
    let accepted = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
    let encoding = match asked {
        Encoding::Identity if header_length.is_none() && encoded.json.len() >= COMPRESS_FROM => {
            accepted.and_then(compression::accepted).unwrap_or(Encoding::Identity)
        }
        asked => asked,
    };
    let mut pieces: Vec<Bytes> = std::iter::once(encoded.json).chain(encoded.tensors).collect();
    if encoding != Encoding::Identity {
        pieces = vec![compression::encode_body(encoding, &pieces)?];
    }
    let mut response = Response::new(body_of(pieces));
    let headers = response.headers_mut();
    let kind = if header_length.is_some() { "application/octet-stream" } else { "application/json" };
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if let Some(length) = header_length {
        headers.insert(HEADER_LENGTH, HeaderValue::from(length));
    }
    if encoding != Encoding::Identity {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding.name()));
    }
    Ok(response)
}

fn body_of(mut pieces: Vec<Bytes>) -> Body {
    let total: usize = pieces.iter().map(Bytes::len).sum();
    match pieces.len() {
        1 => Body::from(pieces.remove(0)),
        _ if total <= JOIN_UP_TO => {
            let mut joined = BytesMut::with_capacity(total);
            pieces.iter().for_each(|piece| joined.extend_from_slice(piece));
            Body::from(joined.freeze())
        }
        _ => Body::new(Pieces { left: total as u64, pieces: pieces.into() }),
    }
}

/// A body of known length that is sent piece by piece, without copying them together.
struct Pieces {
    pieces: VecDeque<Bytes>,
    left: u64,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        let piece = self.pieces.pop_front();
        self.left -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(http_body::Frame::data(piece))))
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}

/// Reads a whole body, which may take at most `limit` bytes and pause at most `limits.body_timeout`.
pub(super) async fn read_body(app: &App, body: Body, limit: usize) -> Result<Bytes, RestError> {
    let too_large =
        || Error::new(Code::TooLarge, format!("the body is larger than the {limit} bytes of limits.max_message_bytes"));
    let announced = http_body::Body::size_hint(&body).lower();
    if announced > limit as u64 {
        return Err(too_large().into());
    }
    let mut body = Paced::new(body, app.limits.body_timeout);
    let mut first: Option<Bytes> = None;
    let mut rest = BytesMut::new();
    loop {
        let Some(frame) = body.frame().await else { break };
        let frame = frame.map_err(|broken| match broken {
            // Not 504: nothing behind this server is late.
            Broken::Paused(error) => RestError { error, status: Some(StatusCode::REQUEST_TIMEOUT) },
            Broken::Refused(error) => error.into(),
            lost @ Broken::Lost(_) => Error::invalid(lost.to_string()).into(),
        })?;
        let Ok(data) = frame.into_data() else { continue };
        match &first {
            None => first = Some(data),
            Some(start) => {
                if rest.is_empty() {
                    rest.reserve((announced as usize).max(start.len() + data.len()));
                    rest.extend_from_slice(start);
                }
                rest.extend_from_slice(&data);
            }
        }
        if rest.len().max(first.as_ref().map_or(0, Bytes::len)) > limit {
            return Err(too_large().into());
        }
    }
    Ok(if rest.is_empty() { first.unwrap_or_default() } else { rest.freeze() })
}

fn content_encoding(headers: &HeaderMap) -> Result<Encoding, RestError> {
    let Some(value) = headers.get(header::CONTENT_ENCODING) else { return Ok(Encoding::Identity) };
    let text = value.to_str().unwrap_or_default();
    Encoding::parse(text).ok_or_else(|| RestError {
        status: Some(StatusCode::UNSUPPORTED_MEDIA_TYPE),
        error: Error::new(
            Code::Unimplemented,
            format!("content encoding '{}' is not supported; use gzip, deflate or identity", shorten(text)),
        ),
    })
}

fn header_length(headers: &HeaderMap) -> Result<Option<usize>, Error> {
    number_header(headers, HEADER_LENGTH, "Inference-Header-Content-Length")
}

fn timeout_header(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let millis = number_header(headers, TIMEOUT_MS, TIMEOUT_MS)?;
    Ok(millis.map(|millis| Duration::from_millis(millis as u64)))
}

fn number_header(headers: &HeaderMap, key: &str, shown: &str) -> Result<Option<usize>, Error> {
    let Some(value) = headers.get(key) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = if digits { text.parse().ok() } else { None };
    number.map(Some).ok_or_else(|| {
        Error::invalid(format!("header {shown} must be a non-negative integer, got '{}'", shorten(text)))
    })
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
