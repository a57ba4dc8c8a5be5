//! What happens to every gRPC call before tonic sees it and after: who may make it, its deadline, the pace of its body,
//! and its record.
//!
//! What tonic itself refuses (broken protobuf, too large, unknown compression) is put into our own codes here, so both
//! protocols tell one story; what our services say passes as it is.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderMap, HeaderName};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tonic::{Status, metadata::MetadataMap};

use crate::{
    api::{
        App, Record, after,
        paced::{Broken, Paced},
        reflection, status,
    },
    error::{Code, Error},
    id::shorten,
    metrics::Protocol,
};

pub(super) const INFER_PATH: &str = "/inference.GRPCInferenceService/ModelInfer";
/// Calls that only some may make; nothing is read of anyone else's.
const ADMIN_PATHS: [&str; 2] =
    ["/inference.GRPCInferenceService/RepositoryModelLoad", "/inference.GRPCInferenceService/RepositoryModelUnload"];
/// Calls whose request bodies hold any number of messages, with pauses between them.
const STREAM_PATHS: [&str; 3] =
    ["/inference.GRPCInferenceService/ModelStreamInfer", reflection::V1, reflection::V1ALPHA];
/// Names made beforehand are found without being parsed for each call.
pub(super) static ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
static ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
pub(in crate::api) static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// How much later than the handler the edge gives up, so that the handler's more exact answer comes first.
pub(super) const EDGE_GRACE: Duration = Duration::from_millis(20);

/// The record of a request that no handler has picked up yet.
pub(super) type Unclaimed = Arc<Mutex<Option<Record>>>;

/// What happens to every call before and after tonic sees it.
pub(super) async fn edge(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    answer_in_kind(request.headers_mut());
    let path = request.uri().path().to_owned();
    if ADMIN_PATHS.contains(&path.as_str())
        && let Err(error) = app.check_admin(request.headers(), request.extensions().get())
    {
        return Status::from(error).into_http();
    }
    // A call that was begun in front of the router brings its record.
    let begun = request.extensions_mut().remove::<Unclaimed>().and_then(|begun| begun.lock().take());
    let record = begun.or_else(|| {
        (path == INFER_PATH).then(|| {
            let client = app.clients.of(request.headers(), request.extensions().get());
            Record::start(&app, Protocol::Grpc, request.headers(), client)
        })
    });
    let Ok(timeout) = timeout(request.headers()) else {
        let error = Error::invalid(format!("{GRPC_TIMEOUT} must be up to eight digits and one of H M S m u n"));
        if let Some(record) = record {
            record.finish(Some(error.code));
        }
        return Status::from(error).into_http();
    };
    let start = record.as_ref().map_or_else(Instant::now, Record::started);
    let deadline = after(start, timeout);
    let limit = app.limits.body_timeout;
    let streams = STREAM_PATHS.contains(&path.as_str());
    let pace = |body| match streams {
        true => Paced::of_messages(body, limit, app.closing.clone()),
        false => Paced::new(body, limit),
    };
    let mut request = request.map(|body| Body::new(pace(body).map_err(|error| Status::from(broken(error)))));
    let unclaimed: Unclaimed = Arc::new(Mutex::new(record));
    request.extensions_mut().insert(unclaimed.clone());
    let call = next.run(request);
    let answer = match deadline {
        None => Ok(call.await),
        Some(deadline) => tokio::time::timeout_at((deadline + EDGE_GRACE).into(), call).await,
    };
    let record = unclaimed.lock().take();
    let Ok(mut response) = answer else {
        let error = too_late();
        if let Some(record) = record {
            record.finish(Some(error.code));
        }
        return Status::from(error).into_http();
    };
    let Some(status) = refusal(&response) else { return response };
    if status.code() == tonic::Code::Unimplemented && status.message().is_empty() {
        let error = Error::new(Code::Unimplemented, format!("there is no method {}", shorten(&path)));
        return Status::from(error).into_http();
    }
    let code = status::failure(&status).code;
    if let Some(record) = record {
        record.finish(Some(code));
    }
    response.headers_mut().insert(&GRPC_STATUS, i32::from(status::grpc(code)).into());
    response
}

/// What a call is told whose deadline passes before all of it is there.
pub(super) fn too_late() -> Error {
    Error::new(Code::DeadlineExceeded, "the deadline passed before the request was complete")
}

/// What a call ended with before its answer began.
fn refusal(response: &Response) -> Option<Status> {
    // Only tonic's own status still knows what it was made of.
    let status = response.extensions().get::<Status>().cloned();
    let status = status.or_else(|| Status::from_header_map(response.headers()));
    status.filter(|status| status.code() != tonic::Code::Ok)
}

/// Answers compressed as the request was and never unasked: Python's clients always claim to accept gzip.
fn answer_in_kind(headers: &mut HeaderMap) {
    match headers.get(&ENCODING).cloned() {
        Some(encoding) => headers.insert(&ACCEPT_ENCODING, encoding),
        None => headers.remove(&ACCEPT_ENCODING),
    };
}

/// What a call fails with whose body breaks off.
pub(super) fn broken(broken: Broken) -> Error {
    match broken {
        Broken::Paused(error) | Broken::Refused(error) => error,
        lost @ Broken::Lost(_) => Error::new(Code::Cancelled, lost.to_string()),
    }
}

/// A header that is there and cannot be read.
pub(super) struct Malformed;

/// The `grpc-timeout` header.
pub(super) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Malformed> {
    let Some(value) = headers.get(&GRPC_TIMEOUT) else { return Ok(None) };
    value.to_str().ok().and_then(parse_timeout).map(Some).ok_or(Malformed)
}

/// When the caller of a call that began at `start` stops waiting; the edge has refused headers that cannot be read.
pub(super) fn latest(start: Instant, metadata: &MetadataMap) -> Option<Instant> {
    after(start, timeout(metadata.as_ref()).unwrap_or_default())
}

/// Up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn timeouts_parse() {
        assert_eq!(parse_timeout("15m"), Some(Duration::from_millis(15)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse_timeout("1S"), Some(Duration::from_secs(1)));
        for broken in ["", "m", "5", "5x", "123456789m", "-1S"] {
            assert_eq!(parse_timeout(broken), None, "{broken}");
        }
    }

    #[test]
    fn replies_are_compressed_as_requests_are() {
        let mut headers = HeaderMap::new();
        headers.insert(&ACCEPT_ENCODING, HeaderValue::from_static("identity, deflate, gzip"));
        answer_in_kind(&mut headers);
        assert!(headers.get(&ACCEPT_ENCODING).is_none());
        headers.insert(&ENCODING, HeaderValue::from_static("gzip"));
        answer_in_kind(&mut headers);
        assert_eq!(headers[&ACCEPT_ENCODING], "gzip");
    }
}
