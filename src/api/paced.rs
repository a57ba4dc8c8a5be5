//! A request body whose sender may pause only so long.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use crate::error::{Code, Error};

/// A body that ends in an error when nothing arrives for `limit`.
pub(super) struct Paced {
    body: Body,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Paused(Error),
    #[error("the body broke off: {0}")]
    Lost(axum::Error),
}

impl Paced {
    pub(super) fn new(body: Body, limit: Duration) -> Self {
        Self { body, limit, timer: None }
    }
}

impl http_body::Body for Paced {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let limit = self.limit;
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            if let Some(timer) = &mut self.timer {
                timer.as_mut().reset(Instant::now() + limit);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Broken::Lost)));
        }
        // Most bodies are there at once and never need a timer.
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match timer.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                let message = format!("the body paused for more than {limit:?} (limits.body_timeout)");
                Poll::Ready(Some(Err(Broken::Paused(Error::new(Code::DeadlineExceeded, message)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
