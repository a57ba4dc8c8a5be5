//! The body of every answer on the ports for requests.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Frame, SizeHint};

use super::{codec::Pieces, grpc::edge::GRPC_STATUS};

/// The body of an answer.
#[derive(Default)]
pub enum Payload {
    /// Of a router's, or one of many pieces.
    Routed(Body),
    /// All of an answer over REST.
    Whole(Bytes),
    /// One message over gRPC, and that the call succeeded.
    Message(smallvec::IntoIter<[Bytes; 2]>),
    /// Nothing, or nothing more.
    #[default]
    Over,
}

impl From<Pieces> for Payload {
    fn from(pieces: Pieces) -> Self {
        Self::Message(pieces.into_iter())
    }
}

impl http_body::Body for Payload {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match &mut *self {
            Self::Routed(body) => Pin::new(body).poll_frame(context),
            Self::Over => Poll::Ready(None),
            Self::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Self::Over;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Message(pieces) => Poll::Ready(Some(Ok(match pieces.next() {
                Some(piece) => Frame::data(piece),
                None => {
                    *self = Self::Over;
                    let mut trailers = HeaderMap::with_capacity(1);
                    trailers.insert(&GRPC_STATUS, HeaderValue::from_static("0"));
                    Frame::trailers(trailers)
                }
            }))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Routed(body) => body.is_end_stream(),
            Self::Whole(_) | Self::Message(_) => false,
            Self::Over => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Routed(body) => body.size_hint(),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            // Left open, so that no content-length is sent: gRPC has none.
            Self::Message(_) | Self::Over => SizeHint::default(),
        }
    }
}
