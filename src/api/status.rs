//! What each `Code` means in HTTP and in gRPC, in one table.
//!
//! Both protocols answer from the same row, so a client that switches from one to the other sees the same failure.

use std::time::Duration;

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};

use crate::error::{Code, Error};

/// The pause that gRPC clients with a retry policy obey, in milliseconds.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

fn row(code: Code) -> (u16, tonic::Code) {
    match code {
        Code::InvalidArgument => (400, tonic::Code::InvalidArgument),
        Code::NotFound => (404, tonic::Code::NotFound),
        Code::NotReady => (503, tonic::Code::Unavailable),
        Code::TooLarge => (413, tonic::Code::ResourceExhausted),
        Code::Overloaded => (429, tonic::Code::ResourceExhausted),
        Code::DeadlineExceeded => (504, tonic::Code::DeadlineExceeded),
        // Not registered, but what proxies have long logged for a client that closed the request.
        Code::Cancelled => (499, tonic::Code::Cancelled),
        Code::Unauthenticated => (401, tonic::Code::Unauthenticated),
        Code::Forbidden => (403, tonic::Code::PermissionDenied),
        Code::Unimplemented => (501, tonic::Code::Unimplemented),
        Code::Internal => (500, tonic::Code::Internal),
    }
}

pub fn http(code: Code) -> StatusCode {
    StatusCode::from_u16(row(code).0).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

pub fn grpc(code: Code) -> tonic::Code {
    row(code).1
}

/// The REST answer to a failed call: `{"error": "…"}`.
pub fn response(error: &Error) -> Response {
    let body = serde_json::json!({ "error": error.message }).to_string();
    let mut response = (http(error.code), Body::from(body)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if error.code == Code::Unauthenticated {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(pause) = pause(error) {
        // Rounded up: a client told to wait for less than it takes comes back for nothing.
        let seconds = pause.as_nanos().div_ceil(1_000_000_000).max(1);
        headers.insert(header::RETRY_AFTER, HeaderValue::from(u64::try_from(seconds).unwrap_or(u64::MAX)));
    }
    response
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let pause = pause(&error);
        let mut status = tonic::Status::new(grpc(error.code), error.message);
        if let Some(pause) = pause {
            let millis = i32::try_from(pause.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
            status.metadata_mut().insert(PUSHBACK, millis.into());
        }
        status
    }
}

/// How long to stay away. A full queue without an estimate still asks for a moment's patience.
fn pause(error: &Error) -> Option<Duration> {
    (error.code == Code::Overloaded).then(|| error.retry_after.unwrap_or(Duration::from_secs(1)))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[test]
    fn codes_differ_in_http() {
        let mut seen: Vec<_> = Code::ALL.into_iter().map(http).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), Code::ALL.len());
        assert_eq!(http(Code::Cancelled).as_u16(), 499);
        assert_eq!(grpc(Code::Overloaded), tonic::Code::ResourceExhausted);
    }

    #[tokio::test]
    async fn errors_become_responses() {
        let response = response(&Error::invalid("a \"bad\" thing"));
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        assert!(!response.headers().contains_key(header::RETRY_AFTER));
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, r#"{"error":"a \"bad\" thing"}"#);
    }

    #[test]
    fn a_pause_is_rounded_up() {
        for (pause, seconds, millis) in [
            (Duration::ZERO, "1", "0"),
            (Duration::from_micros(10), "1", "1"),
            (Duration::from_millis(1001), "2", "1001"),
            (Duration::from_secs(3), "3", "3000"),
            (Duration::MAX, "18446744073709551615", "2147483647"),
        ] {
            let error = Error::overloaded("full", pause);
            let seconds_sent = response(&error).headers()[header::RETRY_AFTER].clone();
            assert!(pause == Duration::MAX || seconds_sent == seconds, "{pause:?}");
            assert_eq!(tonic::Status::from(error).metadata().get(PUSHBACK).unwrap(), millis);
        }
        assert!(tonic::Status::from(Error::internal("x")).metadata().get(PUSHBACK).is_none());
    }
}
