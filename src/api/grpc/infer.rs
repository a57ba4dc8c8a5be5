//! `ModelInfer`, in front of everything else on the gRPC port.
//!
//! This one method is what the server is for, so its message goes past the router, the layers and the generated
//! service, which cost more than most models: read where it lies (`codec::Draft`), answered with the outputs' own bytes
//! (`codec::write_reply`). What is unusual about the call itself, compression above all, takes the long way, on which
//! it is the same method of the same service.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, body::Body};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, header, request::Parts};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tonic::Status;
use tower::ServiceExt;

use super::{
    Answered, Service,
    edge::{self, EDGE_GRACE, ENCODING, INFER_PATH, Unclaimed},
    unary::{Gathered, Resumed, gather},
};
use crate::{
    api::{
        App, Caller, Record, after,
        auth::Peer,
        codec::{self, Draft, InferCall, InferReply, Pieces},
        message,
        paced::Paced,
        payload::Payload,
        shared_memory::Reach,
    },
    engine::Target,
    error::Error,
    metrics::Protocol,
};

/// What is to be known of a call that can be answered here.
pub(in crate::api) struct Call {
    /// How long its caller waits.
    timeout: Option<Duration>,
}

impl Call {
    /// Looks whether a request is a usual call of `ModelInfer`.
    pub(in crate::api) fn of<B>(request: &Request<B>) -> Option<Self> {
        let headers = request.headers();
        let usual = request.uri().path() == INFER_PATH
            && request.method() == Method::POST
            && headers.get(&ENCODING).is_none_or(|encoding| encoding == "identity");
        // What cannot be read of it, somebody else complains about.
        let timeout = if usual { edge::timeout(headers).ok()? } else { return None };
        Some(Self { timeout })
    }

    /// Answers the call; `router` knows the long way.
    pub(in crate::api) fn answer(
        self,
        request: Request<Incoming>,
        app: Arc<App>,
        router: Router,
        peer: Peer,
    ) -> impl Future<Output = Result<Response<Payload>, Infallible>> + Send {
        let (parts, body) = request.into_parts();
        async move {
            let client = app.clients.of(&parts.headers, Some(&peer));
            let mut record = Record::start(&app, Protocol::Grpc, &parts.headers, client);
            let latest = after(record.started(), self.timeout);
            let gathering = gather(Paced::new(body, app.limits.body_timeout), app.limits.max_message_bytes);
            let gathered = match latest {
                None => gathering.await.map_err(edge::broken),
                // In a box, or every call's future would have room for two.
                Some(latest) => {
                    match tokio::time::timeout_at((latest + EDGE_GRACE).into(), Box::pin(gathering)).await {
                        Ok(gathered) => gathered.map_err(edge::broken),
                        Err(_) => Err(edge::too_late()),
                    }
                }
            };
            let service = Service { app };
            let caller = Caller { headers: &parts.headers, peer: Some(&peer) };
            let answer = match gathered {
                Ok(Gathered::Message(message)) => match read(&service.app, &message, caller, &mut record) {
                    Ok(Some((target, call))) => {
                        drop((parts, router, message));
                        service.run(target, call, latest, &mut record).await.and_then(|answered| answered.write())
                    }
                    // The compiler's types read it, or say what is wrong with it.
                    Ok(None) => {
                        let reach = Reach::of(&service.app, &parts.headers, Some(&peer));
                        Box::pin(in_full(&service, message, latest, caller, &reach, &mut record)).await
                    }
                    Err(error) => Err(error),
                },
                Ok(Gathered::Other(body)) => return Box::pin(reroute(router, parts, body, record, peer)).await,
                Err(error) => Err(error),
            };
            let failure = answer.as_ref().err().map(|error| error.code);
            let mut response = match answer {
                Ok(pieces) => {
                    let mut response = Response::new(Payload::from(pieces));
                    let headers = response.headers_mut();
                    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
                    response
                }
                Err(error) => Status::from(error).into_http(),
            };
            record.mark(response.headers_mut());
            record.finish(failure);
            Ok(response)
        }
    }
}

impl Answered {
    fn write(&self) -> Result<Pieces, Error> {
        let (model, version) = (self.version.name.as_str(), self.version.version.as_str());
        codec::write_reply(&InferReply { model, version, id: &self.id, outputs: &self.outputs })
    }
}

/// Reads a usual message in place, and finds the version it is for; `None` when it is not usual.
fn read(
    app: &App,
    message: &Bytes,
    caller: Caller<'_>,
    record: &mut Record,
) -> Result<Option<(Target, InferCall)>, Error> {
    let Some(draft) = Draft::read(message) else { return Ok(None) };
    record.request_id.push_str(draft.id);
    let mut target = record.resolve(draft.model, Some(draft.version), caller)?;
    let Some(call) = draft.call(message, &target.version.signature) else { return Ok(None) };
    let call = super::check(app, &target, Ok(call))?;
    record.draw(&mut target, &call);
    Ok(Some((target, call)))
}

/// Answers a message that is not usual as the generated service does.
async fn in_full(
    service: &Service,
    message: Bytes,
    latest: Option<Instant>,
    caller: Caller<'_>,
    reach: &Reach,
    record: &mut Record,
) -> Result<Pieces, Error> {
    let response = service.infer(message::decode(message)?, latest, caller, reach, record).await?;
    codec::write_message(&response)
}

/// Hands a call on that has been looked at, with its record.
async fn reroute(
    router: Router,
    parts: Parts,
    body: Resumed,
    record: Record,
    peer: Peer,
) -> Result<Response<Payload>, Infallible> {
    let mut request = Request::from_parts(parts, Body::new(body));
    let unclaimed: Unclaimed = Arc::new(Mutex::new(Some(record)));
    request.extensions_mut().insert(unclaimed);
    request.extensions_mut().insert(peer);
    route(router, request).await
}

/// Asks the router.
pub(in crate::api) async fn route(router: Router, request: Request<Body>) -> Result<Response<Payload>, Infallible> {
    router.oneshot(request).await.map(|response| response.map(Payload::Routed))
}
