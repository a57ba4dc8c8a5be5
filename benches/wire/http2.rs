//! gRPC over HTTP/2: many requests at a time on one connection, each one header block and one message.
//!
//! The first request puts its headers into the server's table and the others point at them, as real clients do. Headers
//! of replies are not decoded: a reply that succeeded has a message and then trailers, one that failed has only
//! trailers, or is reset.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;

use super::{Outbox, Replies, Reply};

/// The preface, settings (no pushes, 8 MiB for each reply), and 1 GiB for all replies together.
pub(super) const OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
    \x00\x00\x0c\x04\x00\x00\x00\x00\x00\
    \x00\x02\x00\x00\x00\x00\
    \x00\x04\x00\x80\x00\x00\
    \x00\x00\x04\x08\x00\x00\x00\x00\x00\
    \x3f\xff\x00\x00";

const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// Of DATA and HEADERS.
const END_STREAM: u8 = 1;
/// Of SETTINGS and PING.
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const INITIAL_WINDOW_SIZE: u16 = 4;
const MAX_FRAME_SIZE: u16 = 5;
/// What both sides may send before they have heard from each other.
const FIRST_WINDOW: usize = 65_535;
const FIRST_FRAME: usize = 16_384;
/// The server may send on after every so many bytes that came from it.
const RETURN_AFTER: usize = 1 << 20;
/// The first entry of the table that the peers fill themselves.
const DYNAMIC: u8 = 62;

pub struct Http2 {
    first: Vec<u8>,
    next: Vec<u8>,
    /// With the five bytes before each; never none.
    messages: Vec<Bytes>,
    /// The place of the one that is sent next.
    turn: usize,
    /// Requests by stream: those of stream `s` are at `s / 2`, modulo the length.
    slots: Vec<Slot>,
    streams: usize,
    stream: u32,
    open: usize,
    /// What the server takes: bytes on this connection, on each stream, and in one frame.
    window: usize,
    stream_window: usize,
    frame: usize,
    /// Bytes that came and are not returned to the server's window.
    unreturned: usize,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    intended: Duration,
    message: usize,
    stream: Option<u32>,
    has_message: bool,
}

impl Http2 {
    /// Sends `messages` in turn.
    ///
    /// # Errors
    /// When there are none, or one is too large.
    pub fn new(path: &str, messages: &[Bytes], streams: usize) -> Result<Self> {
        ensure!(!messages.is_empty(), "there is no message to send");
        let prefixed = |message: &Bytes| -> Result<Bytes> {
            let length = u32::try_from(message.len()).context("the message is too large")?;
            Ok([&[0], &length.to_be_bytes()[..], message].concat().into())
        };
        let messages = messages.iter().map(prefixed).collect::<Result<Vec<_>>>()?;
        // Twice as many slots as streams: those of finished streams come free in any order.
        let slots = vec![Slot::default(); (streams * 2).next_power_of_two()];
        let mut wire = Self {
            // POST and http are in the static table.
            first: vec![0x83, 0x86],
            next: vec![0x83, 0x86],
            messages,
            turn: 0,
            slots,
            streams,
            stream: 1,
            open: 0,
            window: FIRST_WINDOW,
            stream_window: FIRST_WINDOW,
            frame: FIRST_FRAME,
            unreturned: 0,
        };
        // Where the static table has the name, and the name where it has none.
        wire.header(4, "", path)?;
        wire.header(1, "", "localhost")?;
        wire.header(0, "te", "trailers")?;
        wire.header(31, "", "application/grpc")?;
        wire.header(58, "", "tidegate-bench")?;
        Ok(wire)
    }

    /// The first message is the one at `place`, counted on beyond the last.
    pub fn beginning_at(mut self, place: usize) -> Self {
        self.turn = place % self.messages.len();
        self
    }

    /// Every request is given up by the server after so long.
    ///
    /// # Errors
    /// Never: eight digits of milliseconds are a day.
    pub fn with_deadline(mut self, deadline: Duration) -> Result<Self> {
        self.header(0, "grpc-timeout", &format!("{}m", deadline.as_millis().min(99_999_999)))?;
        Ok(self)
    }

    /// Adds a header to every request.
    fn header(&mut self, index: u8, name: &str, value: &str) -> Result<()> {
        self.first.push(0x40 | index);
        for text in [name, value].into_iter().filter(|text| !text.is_empty()) {
            ensure!(text.len() < 127, "header '{text}' is too long for a length of one byte");
            self.first.push(text.len() as u8);
            self.first.extend_from_slice(text.as_bytes());
        }
        // The latest entry of the table comes first, and the others move on.
        self.next[2..].iter_mut().for_each(|entry| *entry += 1);
        self.next.push(0x80 | DYNAMIC);
        Ok(())
    }

    pub fn open(&self) -> usize {
        self.open
    }

    pub fn has_room(&self) -> bool {
        self.open < self.streams
            && self.slots[self.slot(self.stream)].stream.is_none()
            && self.messages[self.turn].len() <= self.window.min(self.stream_window)
    }

    fn slot(&self, stream: u32) -> usize {
        (stream / 2) as usize % self.slots.len()
    }

    pub fn begin(&mut self, intended: Duration, out: &mut Outbox) {
        let block = if self.stream == 1 { &self.first } else { &self.next };
        frame(out, HEADERS, END_HEADERS, self.stream, block);
        let message = self.turn;
        self.turn = (message + 1) % self.messages.len();
        let mut rest = self.messages[message].clone();
        self.window -= rest.len();
        while rest.len() > self.frame {
            head(out, DATA, 0, self.stream, self.frame);
            out.push_shared(&rest.split_to(self.frame));
        }
        head(out, DATA, END_STREAM, self.stream, rest.len());
        out.push_shared(&rest);
        let slot = self.slot(self.stream);
        self.slots[slot] = Slot { intended, message, stream: Some(self.stream), has_message: false };
        self.open += 1;
        self.stream += 2;
    }

    pub fn receive(&mut self, bytes: &[u8], out: &mut Outbox, replies: &mut Replies) -> Result<usize> {
        let mut read = 0;
        while let Some(head) = bytes.get(read..read + HEAD) {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let (kind, flags) = (head[3], head[4]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
            let Some(payload) = bytes.get(read + HEAD..read + HEAD + length) else { break };
            read += HEAD + length;
            match kind {
                DATA => self.data(stream, payload, out, replies)?,
                RST_STREAM => self.finish(stream, false, replies)?,
                HEADERS if flags & END_STREAM != 0 => {
                    let succeeded = self.slots[self.slot(stream)].has_message;
                    self.finish(stream, succeeded, replies)?;
                }
                SETTINGS if flags & ACK == 0 => {
                    self.settings(payload);
                    frame(out, SETTINGS, ACK, 0, &[]);
                }
                PING if flags & ACK == 0 => frame(out, PING, ACK, 0, payload),
                WINDOW_UPDATE if stream == 0 => self.window += number(payload) as usize,
                GOAWAY => bail!("the server ends the connection: {}", String::from_utf8_lossy(payload)),
                _ => {}
            }
        }
        Ok(read)
    }

    fn data(&mut self, stream: u32, payload: &[u8], out: &mut Outbox, replies: &mut Replies) -> Result<()> {
        let slot = self.slot(stream);
        let slot = &mut self.slots[slot];
        ensure!(slot.stream == Some(stream), "a message without a request");
        if !slot.has_message {
            replies.body.clear();
        }
        slot.has_message = true;
        replies.keep(payload);
        self.unreturned += payload.len();
        if self.unreturned >= RETURN_AFTER {
            frame(out, WINDOW_UPDATE, 0, 0, &(self.unreturned as u32).to_be_bytes());
            self.unreturned = 0;
        }
        Ok(())
    }

    fn settings(&mut self, payload: &[u8]) {
        for setting in payload.chunks_exact(6) {
            let value = number(&setting[2..]) as usize;
            match u16::from_be_bytes([setting[0], setting[1]]) {
                INITIAL_WINDOW_SIZE => self.stream_window = value,
                MAX_FRAME_SIZE => self.frame = value,
                _ => {}
            }
        }
    }

    fn finish(&mut self, stream: u32, succeeded: bool, replies: &mut Replies) -> Result<()> {
        let slot = self.slot(stream);
        let slot = &mut self.slots[slot];
        ensure!(slot.stream.take() == Some(stream), "the end of a reply without a request");
        self.open -= 1;
        replies.all.push(Reply { intended: slot.intended, succeeded, message: slot.message });
        Ok(())
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |number, &byte| number << 8 | u32::from(byte))
}

fn frame(out: &mut Outbox, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    head(out, kind, flags, stream, payload.len());
    out.push(payload);
}

/// What comes before a frame's payload.
fn head(out: &mut Outbox, kind: u8, flags: u8, stream: u32, length: usize) {
    // No frame of ours is larger than what a server takes, and that is three bytes.
    let [_, a, b, c] = (length as u32).to_be_bytes();
    let [s, t, u, v] = stream.to_be_bytes();
    out.push(&[a, b, c, kind, flags, s, t, u, v]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(stream: u32, message: Option<&[u8]>) -> Vec<u8> {
        let mut bytes = Outbox::default();
        if let Some(message) = message {
            frame(&mut bytes, HEADERS, END_HEADERS, stream, &[0x88]);
            frame(&mut bytes, DATA, 0, stream, message);
        }
        frame(&mut bytes, HEADERS, END_HEADERS | END_STREAM, stream, &[0x88]);
        bytes.take()
    }

    #[test]
    fn replies_are_matched_in_any_order_and_however_they_are_cut() {
        let mut stream = reply(3, Some(b"second"));
        stream.extend(reply(1, Some(b"first")));
        for cut in 0..stream.len() {
            let (mut wire, mut out, mut replies) =
                (Http2::new("/p", &[Bytes::from_static(b"m")], 2).unwrap(), Outbox::default(), Replies::default());
            wire.begin(Duration::from_secs(1), &mut out);
            wire.begin(Duration::from_secs(2), &mut out);
            assert!(!wire.has_room());
            let read = wire.receive(&stream[..cut], &mut out, &mut replies).unwrap();
            wire.receive(&stream[read..], &mut out, &mut replies).unwrap();
            let times: Vec<_> = replies.all.iter().map(|reply| (reply.intended.as_secs(), reply.succeeded)).collect();
            assert_eq!((times.as_slice(), wire.open()), (&[(2, true), (1, true)][..], 0));
            assert_eq!(replies.body, b"first");
        }
    }

    #[test]
    fn headers_of_later_requests_point_at_those_of_the_first() {
        let mut wire = Http2::new("/p", &[Bytes::from_static(b"m")], 2)
            .unwrap()
            .with_deadline(Duration::from_millis(100))
            .unwrap();
        let mut out = Outbox::default();
        wire.begin(Duration::ZERO, &mut out);
        let first = out.take();
        assert!(first.windows(17).any(|window| window == b"grpc-timeout\x04100m"), "{first:?}");
        wire.begin(Duration::ZERO, &mut out);
        // POST, http, then path, authority, te, content-type, user-agent and grpc-timeout, the latest.
        assert_eq!(out.take()[HEAD..][..8], [0x83, 0x86, 0xc3, 0xc2, 0xc1, 0xc0, 0xbf, 0xbe]);
    }

    #[test]
    fn messages_are_sent_in_turn_and_replies_tell_which_it_was() {
        let messages = [&b"aa"[..], b"bbb", b"c"].map(Bytes::from_static);
        let mut wire = Http2::new("/p", &messages, 4).unwrap().beginning_at(4);
        let (mut out, mut replies) = (Outbox::default(), Replies::default());
        (0..4).for_each(|_| wire.begin(Duration::ZERO, &mut out));
        let sent = out.take();
        let places = messages.each_ref().map(|message| {
            let prefixed = [&[0, 0, 0, 0, message.len() as u8], &message[..]].concat();
            sent.windows(prefixed.len()).filter(|window| *window == prefixed).count()
        });
        assert_eq!(places, [1, 2, 1]);
        for stream in [7, 1, 3] {
            wire.receive(&reply(stream, Some(b"x")), &mut out, &mut replies).unwrap();
        }
        assert_eq!(replies.all.iter().map(|reply| reply.message).collect::<Vec<_>>(), [1, 1, 2]);
        assert!(Http2::new("/p", &[], 4).is_err());
    }

    #[test]
    fn trailers_alone_and_resets_are_failures() {
        let (mut wire, mut replies) = (Http2::new("/p", &[Bytes::from_static(b"m")], 4).unwrap(), Replies::default());
        wire.begin(Duration::ZERO, &mut Outbox::default());
        wire.begin(Duration::ZERO, &mut Outbox::default());
        wire.receive(&reply(1, None), &mut Outbox::default(), &mut replies).unwrap();
        let mut reset = Outbox::default();
        frame(&mut reset, RST_STREAM, 0, 3, &8u32.to_be_bytes());
        wire.receive(&reset.take(), &mut Outbox::default(), &mut replies).unwrap();
        assert_eq!(replies.all.iter().filter(|reply| !reply.succeeded).count(), 2);
        assert!(wire.receive(&reply(5, Some(b"x")), &mut Outbox::default(), &mut replies).is_err(), "nobody asked");
    }

    #[test]
    fn no_more_is_sent_than_the_server_takes() {
        let message = vec![0; 40_000];
        let (mut wire, mut out, mut replies) =
            (Http2::new("/p", &[Bytes::from(message)], 4).unwrap(), Outbox::default(), Replies::default());
        assert!(wire.has_room(), "a window of 65,535 bytes");
        let mut settings = Outbox::default();
        frame(&mut settings, SETTINGS, 0, 0, &[0, 5, 0, 0, 0x80, 0]);
        wire.receive(&settings.take(), &mut out, &mut replies).unwrap();
        assert_eq!(out.take(), [0, 0, 0, SETTINGS, ACK, 0, 0, 0, 0]);
        assert!(wire.has_room());
        wire.begin(Duration::ZERO, &mut out);
        assert!(!wire.has_room(), "the window is used up");
        let sent = out.take();
        // Headers, a frame of 32 KiB, which is what the server takes, and the rest, five bytes before the message.
        let header = usize::from(sent[2]);
        let frames = &sent[HEAD + header..];
        assert_eq!(frames[..HEAD], [0, 0x80, 0, DATA, 0, 0, 0, 0, 1]);
        let rest = &frames[HEAD + 0x8000..];
        assert_eq!(rest[..HEAD], [0, 0x1c, 0x45, DATA, END_STREAM, 0, 0, 0, 1]);
        assert_eq!(rest.len(), HEAD + 40_005 - 0x8000);
        let mut update = Outbox::default();
        frame(&mut update, WINDOW_UPDATE, 0, 0, &40_005u32.to_be_bytes());
        wire.receive(&update.take(), &mut out, &mut replies).unwrap();
        assert!(wire.has_room());
    }
}
