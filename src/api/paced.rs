//! A request body whose sender may pause only so long: anywhere, or only within a gRPC message.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http_body::Frame;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::listen::{LAST_CHANCE, STREAM_WINDOW};
use crate::error::{Code, Error};

/// Bytes in front of each gRPC message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// A body that ends in an error when nothing arrives for `limit`.
pub(super) struct Paced<B = Body> {
    body: B,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    messages: Option<Messages>,
}

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Paused(Error),
    /// It ended within a message, or nothing more is read because the server stops.
    #[error("{0}")]
    Refused(Error),
    #[error("the body broke off: {0}")]
    Lost(axum::Error),
}

impl<B> Paced<B> {
    pub(super) fn new(body: B, limit: Duration) -> Self {
        Self { body, limit, timer: None, messages: None }
    }

    /// The body without its pace, as far as it is unread.
    pub(super) fn into_inner(self) -> B {
        self.body
    }

    /// A body of any number of gRPC messages, between which the sender may take any time. Once `closing` is cancelled
    /// it ends between two messages: when, after a moment for what is on the way, nothing more is there; or when it
    /// has given as much as can have been sent by then.
    pub(super) fn of_messages(body: B, limit: Duration, closing: CancellationToken) -> Self {
        let messages = Messages {
            framing: Framing::default(),
            closing: Box::pin(closing.clone().cancelled_owned()),
            token: closing,
            moment: None,
            last: STREAM_WINDOW as usize,
        };
        Self { body, limit, timer: None, messages: Some(messages) }
    }

    /// The time is up; only asked when nothing has arrived.
    fn poll_pause(&mut self, context: &mut Context<'_>) -> Poll<Broken> {
        let limit = self.limit;
        // Most bodies are there at once and never need a timer.
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        timer.as_mut().poll(context).map(|()| {
            let message = format!("the body paused for more than {limit:?} (limits.body_timeout)");
            Broken::Paused(Error::new(Code::DeadlineExceeded, message))
        })
    }
}

impl<B> http_body::Body for Paced<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<axum::BoxError>,
{
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if this.messages.as_ref().is_some_and(Messages::is_done) {
            return Poll::Ready(Some(Err(closing())));
        }
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            if let Some(timer) = &mut this.timer {
                timer.as_mut().reset(Instant::now() + this.limit);
            }
            let frame = frame.map(|frame| frame.map_err(|error| Broken::Lost(axum::Error::new(error))));
            return Poll::Ready(match &mut this.messages {
                None => frame,
                Some(messages) => messages.pass(frame),
            });
        }
        match &mut this.messages {
            Some(messages) if messages.framing.is_between() => {
                ready!(messages.closing.as_mut().poll(context));
                let moment = messages.moment.get_or_insert_with(|| Box::pin(tokio::time::sleep(LAST_CHANCE)));
                moment.as_mut().poll(context).map(|()| Some(Err(closing())))
            }
            _ => this.poll_pause(context).map(|broken| Some(Err(broken))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match &self.messages {
            None => self.body.size_hint(),
            // It may end before its time.
            Some(_) => http_body::SizeHint::default(),
        }
    }
}

fn closing() -> Broken {
    Broken::Refused(Error::new(Code::NotReady, "the server stops; open another stream on another connection"))
}

/// Where a body of messages stands, and when it is to end.
struct Messages {
    framing: Framing,
    token: CancellationToken,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Runs since the server stopped: for requests that the network still has.
    moment: Option<Pin<Box<Sleep>>>,
    /// Bytes still to be read once the server stops. What has been sent by then fits into the stream's window.
    last: usize,
}

impl Messages {
    /// Whether no further message shall be begun.
    fn is_done(&self) -> bool {
        self.last == 0 && self.framing.is_between()
    }

    fn pass(&mut self, frame: Option<Result<Frame<Bytes>, Broken>>) -> Option<Result<Frame<Bytes>, Broken>> {
        let frame = match frame {
            None if !self.framing.is_between() => {
                return Some(Err(Broken::Refused(Error::invalid("the body ended within a message"))));
            }
            Some(Ok(frame)) => frame,
            over => return over,
        };
        match frame.into_data() {
            Ok(data) => Some(Ok(Frame::data(self.follow(data)))),
            Err(trailers) => Some(Ok(trailers)),
        }
    }

    /// Follows the messages in `data`, without those that begin too late.
    fn follow(&mut self, mut data: Bytes) -> Bytes {
        let mut read = 0;
        while read < data.len() && !self.is_done() {
            let taken = self.framing.take(&data[read..]);
            read += taken;
            if self.token.is_cancelled() {
                self.last = self.last.saturating_sub(taken);
            }
        }
        data.truncate(read);
        data
    }
}

/// Finds the ends of messages in bytes that come in pieces.
#[derive(Default)]
struct Framing {
    prefix: [u8; PREFIX],
    /// Bytes of the prefix that are there; none between two messages.
    known: usize,
    /// Bytes of the message that are to come, once its prefix is known.
    left: usize,
}

impl Framing {
    fn is_between(&self) -> bool {
        self.known == 0
    }

    /// Takes `data` up to the end of the present message, or all of it; the number of bytes taken.
    fn take(&mut self, data: &[u8]) -> usize {
        let mut taken = 0;
        if self.known < PREFIX {
            taken = data.len().min(PREFIX - self.known);
            self.prefix[self.known..self.known + taken].copy_from_slice(&data[..taken]);
            self.known += taken;
            if self.known < PREFIX {
                return taken;
            }
            let [_, length @ ..] = self.prefix;
            self.left = u32::from_be_bytes(length) as usize;
        }
        let part = self.left.min(data.len() - taken);
        self.left -= part;
        if self.left == 0 {
            self.known = 0;
        }
        taken + part
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, StreamBody};
    use proptest::prelude::*;
    use tokio::sync::mpsc;
    use tokio_stream::StreamExt;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&(length as u32).to_be_bytes());
        bytes.resize(PREFIX + length, 7);
        bytes
    }

    /// A body that is fed by hand.
    fn fed(closing: &CancellationToken) -> (mpsc::UnboundedSender<Vec<u8>>, Paced) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let frames = tokio_stream::wrappers::UnboundedReceiverStream::new(receiver)
            .map(|data: Vec<u8>| Ok::<_, std::io::Error>(Frame::data(Bytes::from(data))));
        (sender, Paced::of_messages(Body::new(StreamBody::new(frames)), LIMIT, closing.clone()))
    }

    fn is_closing(broken: &Broken) -> bool {
        matches!(broken, Broken::Refused(error) if error.code == Code::NotReady)
    }

    #[tokio::test(start_paused = true)]
    async fn between_messages_there_is_time_and_within_one_there_is_not() {
        let (sender, mut body) = fed(&CancellationToken::new());
        for _ in 0..3 {
            assert!(tokio::time::timeout(LIMIT * 10, body.frame()).await.is_err(), "nothing is to come yet");
            let (first, rest) = (message(4)[..6].to_vec(), message(4)[6..].to_vec());
            sender.send(first).unwrap();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 6);
            assert!(tokio::time::timeout(LIMIT / 2, body.frame()).await.is_err());
            sender.send(rest).unwrap();
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 3);
        }
        sender.send(message(4)[..3].to_vec()).unwrap();
        body.frame().await.unwrap().unwrap();
        let begin = Instant::now();
        assert!(matches!(body.frame().await, Some(Err(Broken::Paused(_)))));
        assert_eq!(begin.elapsed().as_secs(), LIMIT.as_secs());
    }

    #[tokio::test]
    async fn a_body_may_not_end_within_a_message() {
        for (sent, whole) in [(9, true), (8, false), (5, false), (1, false), (0, true)] {
            let (sender, mut body) = fed(&CancellationToken::new());
            sender.send(message(4)[..sent].to_vec()).unwrap();
            drop(sender);
            body.frame().await.unwrap().unwrap();
            match body.frame().await {
                None => assert!(whole, "{sent}"),
                Some(end) => assert!(
                    !whole && matches!(end, Err(Broken::Refused(error)) if error.code == Code::InvalidArgument),
                    "{sent}"
                ),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn when_the_server_stops_what_was_sent_is_read() {
        let closing = CancellationToken::new();
        let (sender, mut body) = fed(&closing);
        sender.send([message(4), message(0), message(9)[..8].to_vec()].concat()).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 22);
        closing.cancel();
        sender.send(message(9)[8..].to_vec()).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 6, "half of it had been read");
        let begin = Instant::now();
        let late = tokio::time::timeout(LAST_CHANCE / 2, body.frame()).await;
        assert!(late.is_err(), "something may be on its way");
        sender.send(message(2)).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap().len(), 7);
        assert!(is_closing(&body.frame().await.unwrap().unwrap_err()));
        assert_eq!(begin.elapsed().as_millis(), LAST_CHANCE.as_millis());

        // Whoever keeps on sending is not listened to for ever, and never cut within a message.
        let (sender, mut body) = fed(&closing);
        let length = STREAM_WINDOW as usize / 4;
        let flood = message(length).repeat(8);
        sender.send(flood[..length].to_vec()).unwrap();
        sender.send(flood[length..].to_vec()).unwrap();
        let mut read = 0;
        let end = loop {
            match body.frame().await.unwrap() {
                Ok(frame) => read += frame.into_data().unwrap().len(),
                Err(end) => break end,
            }
        };
        assert!(is_closing(&end));
        assert_eq!(read, (PREFIX + length) * 4);
    }

    proptest! {
        #[test]
        fn ends_are_found_however_the_bytes_are_cut(
            lengths in proptest::collection::vec(0usize..20, 0..20),
            pieces in proptest::collection::vec(1usize..12, 1..200),
        ) {
            let bytes = lengths.iter().flat_map(|&length| message(length)).collect::<Vec<_>>();
            let mut ends = Vec::new();
            for length in &lengths {
                ends.push(ends.last().unwrap_or(&0) + PREFIX + length);
            }
            let (mut framing, mut found, mut at) = (Framing::default(), Vec::new(), 0);
            for piece in pieces.iter().cycle() {
                let end = bytes.len().min(at + piece);
                if at == end {
                    break;
                }
                while at < end {
                    at += framing.take(&bytes[at..end]);
                    if framing.is_between() {
                        found.push(at);
                    }
                }
            }
            prop_assert_eq!(found, ends);
        }
    }
}
