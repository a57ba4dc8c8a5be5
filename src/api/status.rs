//! What each `Code` means in HTTP and in gRPC, in one table.
//!
//! Both protocols answer from the same row, so a client that switches from one to the other sees the same failure.

use std::{error::Error as _, iter::successors, sync::Arc, time::Duration};

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
        Code::Conflict => (409, tonic::Code::Aborted),
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
        let mut status = tonic::Status::new(grpc(error.code), error.message.as_str());
        if let Some(pause) = pause(&error) {
            let millis = i32::try_from(pause.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
            status.metadata_mut().insert(PUSHBACK, millis.into());
        }
        // It never leaves the process; `failure` finds it there.
        status.set_source(Arc::new(error));
        status
    }
}

/// Why a call failed with `status`: our own error as it was made, a refusal of tonic's as we would have made it.
pub fn failure(status: &tonic::Status) -> Error {
    let mut causes = successors(status.source(), |&cause| cause.source());
    let own = causes.find_map(|cause| cause.downcast_ref::<Error>());
    own.cloned().unwrap_or_else(|| Error::new(refused(status.code()), status.message()))
}

/// What we call it when tonic refuses a call with `code` of its own accord.
fn refused(code: tonic::Code) -> Code {
    match code {
        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => Code::TooLarge,
        // What it cannot read, it calls its own failure.
        tonic::Code::Internal | tonic::Code::InvalidArgument => Code::InvalidArgument,
        tonic::Code::Unimplemented => Code::Unimplemented,
        // What it does not know is an error of the connection.
        tonic::Code::Cancelled | tonic::Code::Unknown => Code::Cancelled,
        tonic::Code::Unauthenticated => Code::Unauthenticated,
        tonic::Code::PermissionDenied => Code::Forbidden,
        tonic::Code::NotFound => Code::NotFound,
        tonic::Code::Unavailable => Code::NotReady,
        tonic::Code::DeadlineExceeded => Code::DeadlineExceeded,
        tonic::Code::Ok
        | tonic::Code::AlreadyExists
        | tonic::Code::FailedPrecondition
        | tonic::Code::Aborted
        | tonic::Code::DataLoss => Code::Internal,
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

    #[test]
    fn our_own_errors_are_known_again() {
        for code in Code::ALL {
            let pause = (code == Code::Overloaded).then_some(Duration::from_millis(7));
            let error = Error { code, message: "as it was".to_owned(), retry_after: pause };
            let status = tonic::Status::from(error.clone());
            assert_eq!(failure(&status), error);
            // As the error of a body, it comes back inside of others.
            let status = tonic::Status::from_error(axum::Error::new(axum::Error::new(status)).into());
            assert_eq!(status.code(), grpc(code));
            assert_eq!(failure(&status), error);
        }
    }

    #[test]
    fn refusals_of_the_library_get_our_codes() {
        for (theirs, ours) in [
            (tonic::Code::Internal, Code::InvalidArgument),
            (tonic::Code::OutOfRange, Code::TooLarge),
            (tonic::Code::Unknown, Code::Cancelled),
            (tonic::Code::Unimplemented, Code::Unimplemented),
        ] {
            assert_eq!(failure(&tonic::Status::new(theirs, "why")), Error::new(ours, "why"));
        }
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
