//! One inference over REST from body to answer, the same whichever shape the two have.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::HeaderMap;

use super::{
    Named, RestError,
    body::{self, HEADER_LENGTH, Reply},
};
use crate::{
    api::{
        App, Record, after, check_size, classify,
        codec::{self, InferCall, InferReply, JsonOptions},
        compression,
        shared_memory::Reach,
        urgency,
    },
    engine,
    error::Error,
    metrics::Protocol,
    model::ModelVersion,
};

const TIMEOUT_MS: &str = "x-request-timeout-ms";
const REQUEST_ID: &str = "x-request-id";

/// What a request says, for the function that turns it into tensors.
pub(super) struct Question<'a> {
    pub(super) headers: &'a HeaderMap,
    /// Whole and unpacked.
    pub(super) body: &'a Bytes,
    /// The version that was found for it.
    pub(super) version: &'a ModelVersion,
    /// `limits.max_message_bytes`.
    pub(super) limit: usize,
}

/// `POST …/infer`, the Open Inference Protocol's own shape.
pub(super) async fn infer(State(app): State<Arc<App>>, named: Result<Named, RestError>, request: Request) -> Response {
    let non_finite = app.json_nonfinite;
    let read = |question: &Question<'_>| {
        let length = body::number_header(question.headers, HEADER_LENGTH, "Inference-Header-Content-Length")?;
        let call = match length {
            Some(0) => codec::decode_raw(question.body, &question.version.signature),
            length => codec::decode_json(question.body, length),
        };
        Ok((call?, ()))
    };
    let write = |reply: &InferReply<'_>, call: &InferCall, ()| {
        let options = JsonOptions { requested: &call.outputs, binary_output: call.binary_output, non_finite };
        codec::encode_json(reply, &options).map(Reply::from)
    };
    exchange(&app, named, request, read, write).await
}

/// Has the model that `named` names answer `request`, and counts it.
///
/// `read` turns the question into tensors and into what `write` must know of it to put the answer into words; errors
/// of both need not name the model.
pub(super) async fn exchange<A>(
    app: &Arc<App>,
    named: Result<Named, RestError>,
    request: Request,
    read: impl FnOnce(&Question<'_>) -> Result<(InferCall, A), Error>,
    write: impl FnOnce(&InferReply<'_>, &InferCall, A) -> Result<Reply, Error>,
) -> Response {
    let mut record = Record::start(app, Protocol::Rest, request.headers());
    let answer = match named {
        Ok(named) => try_exchange(app, &named, request, &mut record, read, write).await,
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

async fn try_exchange<A>(
    app: &App,
    named: &Named,
    request: Request,
    record: &mut Record,
    read: impl FnOnce(&Question<'_>) -> Result<(InferCall, A), Error>,
    write: impl FnOnce(&InferReply<'_>, &InferCall, A) -> Result<Reply, Error>,
) -> Result<Response, RestError> {
    let (parts, body) = request.into_parts();
    let headers = parts.headers;
    if let Some(id) = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()) {
        id.clone_into(&mut record.request_id);
    }
    let version = named.version.as_deref();
    let found = app.engine.resolve(&named.model, version);
    let mut target = found.inspect_err(|_| record.aim_at_unready(&named.model, version))?;
    record.aim(&target);

    let encoding = body::content_encoding(&headers)?;
    let waits = timeout_header(&headers)?;
    let limit = app.limits.max_message_bytes;
    let body = body::read_body(app, body, limit).await?;
    let body = compression::decode_body(encoding, body, limit)?;
    let question = Question { headers: &headers, body: &body, version: &target.version, limit };
    let asked = read(&question).and_then(|(mut call, asked)| {
        let places = Reach::of(app, &headers, &parts.extensions).fetch(&mut call, limit)?;
        Ok((check_size(call, limit)?, places, asked))
    });
    let (mut call, places, asked) = asked.map_err(|error| error.of_model(&named.model))?;
    if !call.id.is_empty() {
        record.request_id.clone_from(&call.id);
    }

    let names: Vec<Arc<str>> = call.outputs.iter().map(|output| output.name.clone()).collect();
    let urgency = urgency(record.started(), &call, after(record.started(), waits));
    let inputs = std::mem::take(&mut call.inputs);
    let request = engine::Request { inputs, outputs: &names, urgency };
    let outputs = app.engine.infer(&mut target, request).await;
    // It may have run on the successor of the version that was found first.
    record.aim(&target);
    let version = &target.version;
    let outputs = classify(version, &call.outputs, outputs?)?;
    places.fill(&outputs).map_err(|error| error.of_model(&named.model))?;

    let reply =
        InferReply { model: version.name.as_str(), version: version.version.as_str(), id: &call.id, outputs: &outputs };
    let reply = write(&reply, &call, asked).map_err(|error| error.of_model(&named.model))?;
    body::respond(reply, encoding, &headers)
}

fn timeout_header(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let millis = body::number_header(headers, TIMEOUT_MS, TIMEOUT_MS)?;
    Ok(millis.map(|millis| Duration::from_millis(millis as u64)))
}
