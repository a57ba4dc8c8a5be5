//! The one message of a unary call, gathered from the DATA frames it came in.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use http_body_util::BodyExt;
use smallvec::SmallVec;

use crate::api::{
    codec::contents_start,
    paced::{Broken, Paced},
};

/// Bytes in front of each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// What every allocator and every graph is content with.
const ALIGNMENT: usize = 64;

/// What was read of a body.
pub(super) enum Gathered {
    /// One message that is not compressed, and nothing else.
    Message(Bytes),
    /// Something else, to be read by somebody else: what has come, and what is to come.
    Other(Resumed),
}

/// Reads a body that should be one message of at most `limit` bytes.
///
/// A message in a single frame is not copied. One in several is copied once, so that its first tensor is aligned.
///
/// # Errors
/// When the body breaks off.
pub(super) async fn gather<B>(mut body: Paced<B>, limit: usize) -> Result<Gathered, Broken>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<axum::BoxError>,
{
    let Some(first) = data(&mut body).await? else { return Ok(resumed([], body)) };
    let length = match first.first_chunk::<PREFIX>() {
        Some(&[0, length @ ..]) => u32::from_be_bytes(length) as usize,
        _ => return Ok(resumed([first], body)),
    };
    if length > limit || first.len() > PREFIX + length {
        return Ok(resumed([first], body));
    }
    let message = if first.len() == PREFIX + length {
        first.slice(PREFIX..)
    } else {
        let start = contents_start(&first[PREFIX..]).unwrap_or(0);
        let mut joined = BytesMut::with_capacity(length + ALIGNMENT);
        let padding = (joined.as_ptr() as usize + start).wrapping_neg() % ALIGNMENT;
        joined.resize(padding, 0);
        joined.extend_from_slice(&first[PREFIX..]);
        while joined.len() < padding + length {
            let next = data(&mut body).await?;
            match next {
                Some(next) if next.len() <= padding + length - joined.len() => joined.extend_from_slice(&next),
                // It ends too early, or goes on with another message.
                next => {
                    let read = [first.slice(..PREFIX), joined.split_off(padding).freeze(), next.unwrap_or_default()];
                    return Ok(resumed(read, body));
                }
            }
        }
        joined.freeze().slice(padding..)
    };
    // Some clients end the call with a frame of its own.
    while !http_body::Body::is_end_stream(&body) {
        match data(&mut body).await? {
            None => break,
            Some(next) if next.is_empty() => {}
            Some(next) => return Ok(resumed([first.slice(..PREFIX), message, next], body)),
        }
    }
    Ok(Gathered::Message(message))
}

/// The next frame of data; `None` at the end, and before trailers, which mean nothing here.
async fn data<B>(body: &mut Paced<B>) -> Result<Option<Bytes>, Broken>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<axum::BoxError>,
{
    Ok(body.frame().await.transpose()?.and_then(|frame| frame.into_data().ok()))
}

fn resumed<B, const N: usize>(read: [Bytes; N], rest: Paced<B>) -> Gathered
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    let mut read: SmallVec<[Bytes; 3]> = read.into_iter().filter(|bytes| !bytes.is_empty()).collect();
    read.reverse();
    Gathered::Other(Resumed { read, rest: Body::new(rest.into_inner()) })
}

/// A body of which some has been read already.
pub(super) struct Resumed {
    /// The first piece last.
    read: SmallVec<[Bytes; 3]>,
    rest: Body,
}

impl http_body::Body for Resumed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.read.pop() {
            Some(read) => Poll::Ready(Some(Ok(Frame::data(read)))),
            None => Pin::new(&mut self.rest).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::StreamBody;
    use proptest::{collection::vec, prelude::*};
    use prost::Message;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::api::pb::ModelInferRequest;

    const LIMIT: usize = 1000;

    fn message(contents: &[u8]) -> Vec<u8> {
        let request =
            ModelInferRequest { raw_input_contents: vec![Bytes::copy_from_slice(contents)], ..Default::default() };
        request.encode_to_vec()
    }

    fn prefixed(compressed: u8, message: &[u8]) -> Vec<u8> {
        [&[compressed][..], &(message.len() as u32).to_be_bytes(), message].concat()
    }

    /// Reads a body that comes in pieces of these sizes, over and over.
    fn read(bytes: &[u8], sizes: &[usize]) -> Gathered {
        let (mut rest, mut frames) = (bytes, Vec::new());
        for &size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (frame, after) = rest.split_at(size.min(rest.len()));
            frames.push(Bytes::copy_from_slice(frame));
            rest = after;
        }
        let frames = tokio_stream::iter(frames).map(|data| Ok::<_, std::io::Error>(Frame::data(data)));
        let body = Paced::new(StreamBody::new(frames), Duration::from_secs(1));
        run(gather(body, LIMIT)).unwrap_or_else(|broken| panic!("{broken}"))
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    fn other(gathered: Gathered) -> Vec<u8> {
        match gathered {
            Gathered::Message(message) => panic!("{message:?}"),
            Gathered::Other(body) => run(body.collect()).unwrap().to_bytes().to_vec(),
        }
    }

    #[test]
    fn a_message_in_one_frame_is_not_copied() {
        let sent = prefixed(0, &message(&[7; 100]));
        let Gathered::Message(gathered) = read(&sent, &[1000]) else { panic!() };
        assert_eq!(gathered, sent[PREFIX..]);
    }

    #[test]
    fn what_is_no_single_message_is_handed_on_whole() {
        let one = prefixed(0, &message(b"one"));
        for (index, sent) in [
            Vec::new(),
            vec![0, 0, 0],
            prefixed(1, b"compressed"),
            prefixed(2, b"?"),
            prefixed(0, &[0; LIMIT + 1]),
            one[..one.len() - 1].to_vec(),
            [&one[..], &one].concat(),
            [&one[..], b"x"].concat(),
        ]
        .iter()
        .enumerate()
        {
            for sizes in [&[2000][..], &[6], &[7, 1], &[one.len(), 5]] {
                assert_eq!(other(read(sent, sizes)), *sent, "{index} in {sizes:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_pauses_breaks_off() {
        let body = StreamBody::new(tokio_stream::pending::<Result<Frame<Bytes>, std::io::Error>>());
        let broken = gather(Paced::new(body, Duration::from_secs(1)), LIMIT).await.err().unwrap();
        assert!(matches!(broken, Broken::Paused(_)), "{broken}");
    }

    proptest! {
        #[test]
        fn messages_are_found_however_they_are_cut(
            contents in vec(any::<u8>(), 1..300),
            first in 5usize..400,
            sizes in vec(1usize..200, 1..5),
        ) {
            let message = message(&contents);
            let sent = prefixed(0, &message);
            let sizes: Vec<usize> = std::iter::once(first).chain(sizes).collect();
            let Gathered::Message(gathered) = read(&sent, &sizes) else { panic!("{sizes:?}") };
            prop_assert_eq!(&gathered, &message);
            let start = message.len() - contents.len();
            if first < sent.len() && first >= PREFIX + start {
                prop_assert_eq!(gathered[start..].as_ptr() as usize % ALIGNMENT, 0);
            }
        }
    }
}
