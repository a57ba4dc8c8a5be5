//! The client's side of HTTP, as little as measuring needs: requests are bytes that were encoded once, replies are only
//! looked at to see where they end and whether they succeeded.
//!
//! A full client would cost about as much as the server. This one costs less than the echo, or else the generator and
//! not the server would be measured.

use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;

mod http1;
mod http2;
mod outbox;

pub use http1::Http1;
pub use http2::Http2;
pub use outbox::Outbox;

/// A request, ready to be sent any number of times.
#[derive(Clone, Debug)]
pub enum Request {
    /// Everything, head and body.
    Http1(Bytes),
    /// A path and the messages that are sent in turn, each behind the five bytes that gRPC puts first.
    Grpc { path: &'static str, messages: Vec<Bytes>, deadline: Option<Duration> },
}

impl Request {
    /// One that asks, in turn, what each of `requests` over gRPC does; they have one path and one deadline.
    ///
    /// # Errors
    /// When there are none, or they are not alike.
    pub fn in_turn(requests: Vec<Request>) -> Result<Self> {
        let mut all = requests.into_iter();
        let Some(Request::Grpc { path, mut messages, deadline }) = all.next() else {
            bail!("only requests over gRPC are sent in turn");
        };
        for request in all {
            match request {
                Request::Grpc { path: other, messages: more, deadline: limit }
                    if other == path && limit == deadline =>
                {
                    messages.extend(more);
                }
                _ => bail!("only requests with one path and one deadline are sent in turn"),
            }
        }
        Ok(Request::Grpc { path, messages, deadline })
    }

    /// How many messages are sent in turn.
    pub fn messages(&self) -> usize {
        match self {
            Request::Http1(_) => 1,
            Request::Grpc { messages, .. } => messages.len(),
        }
    }

    /// The same over gRPC with a deadline, which counts from when the server receives it.
    pub fn with_deadline(self, limit: Duration) -> Self {
        match self {
            Request::Grpc { path, messages, .. } => Request::Grpc { path, messages, deadline: Some(limit) },
            http => http,
        }
    }
}

/// What came back for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// When the request was meant to be sent, as `begin` was told.
    pub intended: Duration,
    pub succeeded: bool,
    /// The place of its message among those that are sent in turn.
    pub message: usize,
}

/// Replies since the last look.
pub struct Replies {
    pub all: Vec<Reply>,
    /// The body of the latest one that had any, as far as it is kept.
    pub body: Vec<u8>,
    /// So much of a body is kept at most: of a large one nobody asks for more than where it came from.
    pub keep: usize,
}

impl Default for Replies {
    fn default() -> Self {
        Self { all: Vec::new(), body: Vec::new(), keep: 4 << 10 }
    }
}

impl Replies {
    fn keep(&mut self, bytes: &[u8]) {
        let room = self.keep.saturating_sub(self.body.len());
        self.body.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

/// One connection's state between bytes in and bytes out.
pub enum Wire {
    Http1(Http1),
    Http2(Http2),
}

impl Wire {
    /// `streams` is the number of requests that may be open at a time; over HTTP/1.1 it is always one. Of messages that are
    /// sent in turn the one at `first` is the first.
    ///
    /// # Errors
    /// When the request is larger than this client can send.
    pub fn new(request: &Request, streams: usize, first: usize) -> Result<Self> {
        Ok(match request {
            Request::Http1(bytes) => Wire::Http1(Http1::new(bytes.clone())),
            Request::Grpc { path, messages, deadline } => {
                let wire = Http2::new(path, messages, streams)?.beginning_at(first);
                Wire::Http2(match *deadline {
                    Some(deadline) => wire.with_deadline(deadline)?,
                    None => wire,
                })
            }
        })
    }

    /// What must be sent before the first request.
    pub fn opening(&self) -> &'static [u8] {
        match self {
            Wire::Http1(_) => &[],
            Wire::Http2(_) => http2::OPENING,
        }
    }

    /// Whether another request may be begun now.
    pub fn has_room(&self) -> bool {
        match self {
            Wire::Http1(wire) => wire.has_room(),
            Wire::Http2(wire) => wire.has_room(),
        }
    }

    /// Requests without a reply.
    pub fn open(&self) -> usize {
        match self {
            Wire::Http1(wire) => usize::from(!wire.has_room()),
            Wire::Http2(wire) => wire.open(),
        }
    }

    /// Adds a request to `out`. There must be room for it.
    pub fn begin(&mut self, intended: Duration, out: &mut Outbox) {
        match self {
            Wire::Http1(wire) => wire.begin(intended, out),
            Wire::Http2(wire) => wire.begin(intended, out),
        }
    }

    /// Reads what came in, and answers where the protocol asks for it. Returns how many bytes were read; those of an
    /// unfinished message are to be given again, with more.
    ///
    /// # Errors
    /// When the peer does not speak the protocol, or ends the connection.
    pub fn receive(&mut self, bytes: &[u8], out: &mut Outbox, replies: &mut Replies) -> Result<usize> {
        match self {
            Wire::Http1(wire) => wire.receive(bytes, replies),
            Wire::Http2(wire) => wire.receive(bytes, out, replies),
        }
    }
}
