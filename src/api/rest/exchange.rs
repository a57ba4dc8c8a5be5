//! One inference over REST from body to answer, the same whichever shape the two have.
//!
//! Long messages are unpacked, read and written on a thread of their own: a JSON of 19 MiB takes 0.1 s to read, in
//! which the I/O thread has other connections to serve.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{body::Body, extract::Request, response::IntoResponse};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response};

use super::{
    Named, RestError,
    body::{self, Arriving, HEADER_LENGTH, Reply},
};
use crate::{
    api::{
        App, Caller, Record, after,
        auth::Peer,
        check_size, classify,
        codec::{self, InferCall, InferReply, JsonOptions},
        compression::{self, Encoding},
        payload::Payload,
        shared_memory::{Places, Reach},
        urgency,
    },
    backend::Signature,
    engine::{self, Target},
    error::{Code, Error},
    metrics::Protocol,
    model::ModelVersion,
    tensor::Tensor,
    text,
};

// Names made beforehand are found without being parsed for each request.
static TIMEOUT_MS: HeaderName = HeaderName::from_static("x-request-timeout-ms");
static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A request for an inference as it comes from the network.
pub(super) struct Arrival<B = Body> {
    pub(super) headers: HeaderMap,
    pub(super) body: B,
    pub(super) peer: Option<Peer>,
}

impl From<Request> for Arrival {
    fn from(request: Request) -> Self {
        let (parts, body) = request.into_parts();
        Self { headers: parts.headers, body, peer: parts.extensions.get().copied() }
    }
}

/// What a request says, for the function that turns it into tensors.
pub(super) struct Question {
    pub(super) headers: HeaderMap,
    /// Whole and unpacked.
    pub(super) body: Bytes,
    /// `limits.max_message_bytes`.
    pub(super) limit: usize,
    /// The version that it is read for.
    version: Arc<ModelVersion>,
    /// Whether it takes its types from there.
    untyped: Cell<bool>,
}

impl Question {
    /// What the version takes, for what the request does not say itself.
    pub(super) fn signature(&self) -> &Signature {
        self.untyped.set(true);
        &self.version.signature
    }
}

/// `POST …/infer`, the Open Inference Protocol's own shape.
pub(super) fn infer<B: Arriving>(
    app: &Arc<App>,
    named: Result<Named, RestError>,
    arrival: Arrival<B>,
) -> impl Future<Output = Response<Payload>> {
    let non_finite = app.json_nonfinite;
    let read = |question: &Question| {
        let length = body::number_header(&question.headers, &HEADER_LENGTH, "Inference-Header-Content-Length")?;
        let call = match length {
            Some(0) => codec::decode_raw(&question.body, question.signature()),
            length => codec::decode_json(&question.body, length),
        };
        Ok((call?, ()))
    };
    let write = move |reply: &InferReply<'_>, call: &InferCall, ()| {
        let options = JsonOptions { requested: &call.outputs, binary_output: call.binary_output, non_finite };
        codec::encode_json(reply, &options).map(Reply::from)
    };
    exchange(app, named, arrival, read, write)
}

/// Has the model that `named` names answer what arrived, and counts it.
///
/// `read` turns the question into tensors and into what `write` must know of it to put the answer into words; errors
/// of both need not name the model.
#[expect(clippy::manual_async_fn, reason = "an async fn keeps what it is given twice")]
pub(super) fn exchange<A: Send + 'static, B: Arriving>(
    app: &Arc<App>,
    named: Result<Named, RestError>,
    arrival: Arrival<B>,
    read: impl Fn(&Question) -> Result<(InferCall, A), Error> + Send + 'static,
    write: impl FnOnce(&InferReply<'_>, &InferCall, A) -> Result<Reply, Error> + Send + 'static,
) -> impl Future<Output = Response<Payload>> {
    async move {
        let client = app.clients.of(&arrival.headers, arrival.peer.as_ref());
        let mut record = Record::start(app, Protocol::Rest, &arrival.headers, client);
        let answer = match named {
            Ok(named) => try_exchange(app, &named, arrival, &mut record, Wishes::default(), read, write).await,
            Err(error) => Err(error),
        };
        conclude(record, answer.map_err(|error| (error.error.code, error.into_response())))
    }
}

/// Counts an answer, and says which version it is from.
pub(super) fn conclude(record: Record, answer: Result<Response<Payload>, (Code, Response<Body>)>) -> Response<Payload> {
    let (mut response, failure) = match answer {
        Ok(response) => (response, None),
        Err((code, refusal)) => (refusal.map(Payload::Routed), Some(code)),
    };
    record.mark(response.headers_mut());
    record.finish(failure);
    response
}

/// What a request wants beside its tensors and its hurry.
#[derive(Default)]
pub(super) struct Wishes {
    pub(super) text: text::Wish,
    /// Bytes that it takes to read it into, beside those of its body.
    pub(super) read: usize,
    /// Bytes that its answer has, beside those of the outputs.
    pub(super) told: usize,
}

/// As `exchange`, for a record that is begun, and without a word of what failed.
pub(super) async fn try_exchange<A: Send + 'static, B: Arriving>(
    app: &App,
    named: &Named,
    arrival: Arrival<B>,
    record: &mut Record,
    wishes: Wishes,
    read: impl Fn(&Question) -> Result<(InferCall, A), Error> + Send + 'static,
    write: impl FnOnce(&InferReply<'_>, &InferCall, A) -> Result<Reply, Error> + Send + 'static,
) -> Result<Response<Payload>, RestError> {
    let Asked { mut target, mut call, places, detail, headers, encoding, latest, refusal } =
        ask(app, named, arrival, record, wishes.read, read).await?;

    let names: Vec<Arc<str>> = call.outputs.iter().map(|output| output.name.clone()).collect();
    let urgency = urgency(record, &call, latest);
    let inputs = std::mem::take(&mut call.inputs);
    let (started, protocol) = (record.started(), record.protocol());
    let request = engine::Request { inputs, outputs: &names, urgency, text: &wishes.text, started, protocol };
    let outputs = app.engine.infer(&mut target, request).await;
    // It may have run on the successor of the version that was found first.
    record.aim(&target);
    let outputs = outputs.map_err(|error| match refusal {
        Some(refusal) if error.code == Code::InvalidArgument => refusal,
        _ => error,
    })?;
    let outputs = classify(&target.version, &call.outputs, outputs)?;
    places.fill(&outputs).map_err(|error| error.of_model(target.version.name.as_str()))?;

    let aside = app.limits.max_inline_bytes;
    let spelled = |output: &&Tensor| encoding != Encoding::Identity || !call.wants_binary(&output.name);
    let is_long = wishes.told + outputs.iter().filter(spelled).map(Tensor::byte_len).sum::<usize>() > aside;
    let tell = move || {
        let version = &target.version;
        let (model, version) = (version.name.as_str(), version.version.as_str());
        let reply = InferReply { model, version, id: &call.id, outputs: &outputs };
        let reply = write(&reply, &call, detail).map_err(|error| error.of_model(model))?;
        body::respond(reply, encoding, headers)
    };
    if is_long { Box::pin(app.aside.run(latest, tell)).await? } else { tell() }
}

/// A request that has been read.
struct Asked<A> {
    target: Target,
    call: InferCall,
    places: Places,
    /// What the answer's shape depends on.
    detail: A,
    headers: HeaderMap,
    encoding: Encoding,
    latest: Option<Instant>,
    /// What the version that was drawn has against it, where another one takes it.
    refusal: Option<Error>,
}

/// Reads what arrived, for the version that it is for, into so many bytes beside those of its body.
async fn ask<A: Send + 'static, B: Arriving>(
    app: &App,
    named: &Named,
    arrival: Arrival<B>,
    record: &mut Record,
    takes: usize,
    read: impl Fn(&Question) -> Result<(InferCall, A), Error> + Send + 'static,
) -> Result<Asked<A>, RestError> {
    let Arrival { headers, body, peer } = arrival;
    if let Some(id) = headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok()) {
        id.clone_into(&mut record.request_id);
    }
    let caller = Caller { headers: &headers, peer: peer.as_ref() };
    let mut target = record.resolve(&named.model, named.version.as_deref(), caller)?;

    let encoding = body::content_encoding(&headers)?;
    let waits = timeout_header(&headers)?;
    let limit = app.limits.max_message_bytes;
    let body = body::read_body(app, body, limit).await?;
    let aside = app.limits.max_inline_bytes;
    let is_long =
        takes > aside || body.len() > aside && (encoding != Encoding::Identity || json_length(&headers, &body) > aside);
    let reach = Reach::of(app, &headers, peer.as_ref());
    let mut question = Question { headers, body, limit, version: target.version.clone(), untyped: Cell::new(false) };
    let undrawn = target.is_undrawn();
    let read = move |question: &Question| {
        let asked = read(question).and_then(|(mut call, detail)| {
            let places = reach.fetch(&mut call, limit)?;
            Ok((check_size(call, limit)?, places, detail))
        });
        asked.map_err(|error| error.of_model(question.version.name.as_str()))
    };
    let look = move || {
        let body = compression::decode_body(encoding, std::mem::take(&mut question.body), limit);
        let asked = body.and_then(|body| {
            question.body = body;
            read(&question)
        });
        if !(undrawn && question.untyped.get()) {
            // It is not read again; and what is long goes where it does not keep connections waiting.
            question.body = Bytes::new();
        }
        (asked, question, read)
    };
    let latest = after(record.started(), waits);
    let (asked, mut question, read) = if is_long { Box::pin(app.aside.run(latest, look)).await? } else { look() };
    let (mut call, mut places, mut detail) = asked?;
    if !call.id.is_empty() {
        record.request_id.clone_from(&call.id);
    }
    record.draw(&mut target, &call);
    let mut refusal = None;
    if question.untyped.get() {
        target.shadow_if_read_like(&question.version.signature, &call.inputs);
        if !target.version.signature.is_read_like(&question.version.signature, &call.inputs) {
            question.version = target.version.clone();
            let look = move || (read(&question), question);
            let again;
            (again, question) = if is_long { Box::pin(app.aside.run(latest, look)).await? } else { look() };
            let fits = |call: &InferCall| {
                let version = &target.version;
                version.signature.arrange(version.name.as_str(), call.inputs.clone())
            };
            match again.and_then(|again| fits(&again.0).map(|_| again)) {
                Ok(again) => (call, places, detail) = again,
                // It refuses what was read for the first version as well, and is to blame for that, as the other takes it.
                Err(error) => refusal = Some(error),
            }
        }
    }
    Ok(Asked { target, call, places, detail, headers: question.headers, encoding, latest, refusal })
}

/// How much of the body is JSON, as far as the headers say.
fn json_length(headers: &HeaderMap, body: &Bytes) -> usize {
    let announced = body::number_header(headers, &HEADER_LENGTH, HEADER_LENGTH.as_str());
    announced.ok().flatten().unwrap_or(body.len())
}

pub(super) fn timeout_header(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let millis = body::number_header(headers, &TIMEOUT_MS, TIMEOUT_MS.as_str())?;
    Ok(millis.map(|millis| Duration::from_millis(millis as u64)))
}
