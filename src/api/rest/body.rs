//! Bodies in and out: read whole within their limits, unpacked; sent in pieces, packed as the client likes.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt;
use smallvec::{SmallVec, smallvec};

use super::RestError;
use crate::{
    api::{
        App,
        codec::Encoded,
        compression::{self, Encoding},
        paced::{Broken, Paced},
        payload::Payload,
    },
    error::{Code, Error},
    id::shorten,
};

/// Where the JSON of a message ends and its binary tensors begin.
pub(super) static HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Never compressed: an event must not wait for the next one to fill a block.
const EVENTS: &str = "text/event-stream; charset=utf-8";

/// JSON answers smaller than this are never compressed.
const COMPRESS_FROM: usize = 1024;

/// Bodies up to this size are joined before they are sent; larger ones go out piece by piece.
const JOIN_UP_TO: usize = 16 << 10;

/// An answer ready to be sent.
pub(super) struct Reply {
    media_type: &'static str,
    /// Sent one after the other, as pieces so that tensors need not be copied.
    pieces: SmallVec<[Bytes; 2]>,
    /// What `Inference-Header-Content-Length` must say; `None` when all of it is text.
    header_length: Option<usize>,
}

impl Reply {
    pub(super) fn json(text: impl Into<Bytes>) -> Self {
        Self { media_type: "application/json", pieces: smallvec![text.into()], header_length: None }
    }

    /// A stream of one server-sent event; `json` has no line ends.
    pub(super) fn event(json: &[u8]) -> Self {
        let text = [b"data: ", json, b"\n\n"].concat();
        Self { media_type: EVENTS, pieces: smallvec![text.into()], header_length: None }
    }
}

impl From<Encoded> for Reply {
    fn from(encoded: Encoded) -> Self {
        let header_length = encoded.header_length;
        let media_type = if header_length.is_some() { "application/octet-stream" } else { "application/json" };
        let pieces = std::iter::once(encoded.json).chain(encoded.tensors).collect();
        Self { media_type, pieces, header_length }
    }
}

/// Sends the answer, compressed as the request was, or as Accept-Encoding asks when it is all JSON.
///
/// The request's `headers` make room for the answer's: their memory is there, and hyper uses it for the next request.
///
/// # Errors
/// When it cannot be compressed.
pub(super) fn respond(reply: Reply, asked: Encoding, mut headers: HeaderMap) -> Result<Response<Payload>, RestError> {
    let Reply { media_type, mut pieces, header_length } = reply;
    let encoding = match asked {
        _ if media_type == EVENTS => Encoding::Identity,
        Encoding::Identity
            if header_length.is_none() && pieces.iter().map(Bytes::len).sum::<usize>() >= COMPRESS_FROM =>
        {
            let accepted = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
            accepted.and_then(compression::accepted).unwrap_or(Encoding::Identity)
        }
        asked => asked,
    };
    if encoding != Encoding::Identity {
        pieces = smallvec![compression::encode_body(encoding, &pieces)?];
    }
    headers.clear();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    if let Some(length) = header_length {
        headers.insert(&HEADER_LENGTH, HeaderValue::from(length));
    }
    if encoding != Encoding::Identity {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding.name()));
    }
    let mut response = Response::new(payload(pieces));
    *response.headers_mut() = headers;
    Ok(response)
}

fn payload(mut pieces: SmallVec<[Bytes; 2]>) -> Payload {
    let total: usize = pieces.iter().map(Bytes::len).sum();
    match pieces.len() {
        1 => Payload::Whole(pieces.remove(0)),
        _ if total <= JOIN_UP_TO => {
            let mut joined = BytesMut::with_capacity(total);
            pieces.iter().for_each(|piece| joined.extend_from_slice(piece));
            Payload::Whole(joined.freeze())
        }
        _ => Payload::Routed(Body::new(Pieces { left: total as u64, pieces: pieces.into_iter() })),
    }
}

/// A body of known length that is sent piece by piece, without copying them together.
struct Pieces {
    pieces: smallvec::IntoIter<[Bytes; 2]>,
    left: u64,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        let piece = self.pieces.next();
        self.left -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(http_body::Frame::data(piece))))
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}

/// A body as it comes from the network.
pub(in crate::api) trait Arriving:
    http_body::Body<Data = Bytes, Error: Into<axum::BoxError>> + Unpin
{
}

impl<B: http_body::Body<Data = Bytes, Error: Into<axum::BoxError>> + Unpin> Arriving for B {}

/// Reads a whole body, which may take at most `limit` bytes and pause at most `limits.body_timeout`.
pub(in crate::api) async fn read_body<B: Arriving>(app: &App, body: B, limit: usize) -> Result<Bytes, RestError> {
    let too_large =
        || Error::new(Code::TooLarge, format!("the body is larger than the {limit} bytes of limits.max_message_bytes"));
    let announced = body.size_hint().lower();
    if announced > limit as u64 {
        return Err(too_large().into());
    }
    let mut body = Paced::new(body, app.limits.body_timeout);
    let mut first: Option<Bytes> = None;
    let mut rest = BytesMut::new();
    // Of a body of known length the last frame says that it is the last.
    while !http_body::Body::is_end_stream(&body) {
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

/// How the body is packed.
pub(super) fn content_encoding(headers: &HeaderMap) -> Result<Encoding, RestError> {
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

/// The value of a header that holds a number, called `shown` in complaints.
pub(super) fn number_header(headers: &HeaderMap, key: &HeaderName, shown: &str) -> Result<Option<usize>, Error> {
    let Some(value) = headers.get(key) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = if digits { text.parse().ok() } else { None };
    number.map(Some).ok_or_else(|| {
        Error::invalid(format!("header {shown} must be a non-negative integer, got '{}'", shorten(text)))
    })
}
