//! HTTP/1.1 with one request at a time over a connection that is kept.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;

use super::{Outbox, Replies, Reply};

/// More than any head that a server of ours sends.
const MAX_HEAD: usize = 16 << 10;

pub struct Http1 {
    request: Bytes,
    /// When the request without a reply was meant to be sent.
    open: Option<Duration>,
}

impl Http1 {
    pub fn new(request: Bytes) -> Self {
        Self { request, open: None }
    }

    pub fn has_room(&self) -> bool {
        self.open.is_none()
    }

    pub fn begin(&mut self, intended: Duration, out: &mut Outbox) {
        out.push_shared(&self.request);
        self.open = Some(intended);
    }

    pub fn receive(&mut self, bytes: &[u8], replies: &mut Replies) -> Result<usize> {
        let Some(head) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
            ensure!(bytes.len() < MAX_HEAD, "a reply's head does not end");
            return Ok(0);
        };
        let head = &bytes[..head];
        let end = head.len() + 4 + content_length(head)?;
        if bytes.len() < end {
            return Ok(0);
        }
        let intended = self.open.take().context("a reply without a request")?;
        replies.body.clear();
        replies.keep(&bytes[head.len() + 4..end]);
        replies.all.push(Reply { intended, succeeded: head.get(9..12) == Some(b"200"), message: 0 });
        Ok(end)
    }
}

fn content_length(head: &[u8]) -> Result<usize> {
    const NAME: &[u8] = b"content-length:";
    let mut lines = head.split(|&byte| byte == b'\n');
    let length = lines.find_map(|line| {
        let value = line.get(NAME.len()..).filter(|_| line[..NAME.len()].eq_ignore_ascii_case(NAME))?;
        std::str::from_utf8(value).ok()?.trim().parse().ok()
    });
    length.context("a reply has no content-length")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_however_they_are_cut() {
        let reply = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx: y\r\n\r\nhello";
        for cut in 0..reply.len() {
            let (mut wire, mut out, mut replies) =
                (Http1::new(Bytes::from_static(b"GET")), Outbox::default(), Replies::default());
            assert!(wire.has_room());
            wire.begin(Duration::from_secs(3), &mut out);
            assert!(!wire.has_room());
            assert_eq!(wire.receive(&reply[..cut], &mut replies).unwrap(), 0);
            assert_eq!(wire.receive(reply, &mut replies).unwrap(), reply.len());
            assert_eq!(replies.all, [Reply { intended: Duration::from_secs(3), succeeded: true, message: 0 }]);
            assert_eq!((replies.body.as_slice(), wire.has_room()), (&b"hello"[..], true));
        }
    }

    #[test]
    fn other_codes_and_broken_replies_are_no_success() {
        let (mut wire, mut replies) = (Http1::new(Bytes::new()), Replies::default());
        wire.begin(Duration::ZERO, &mut Outbox::default());
        wire.receive(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n", &mut replies).unwrap();
        assert!(!replies.all[0].succeeded);
        assert!(wire.receive(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", &mut replies).is_err(), "not asked for");
        wire.begin(Duration::ZERO, &mut Outbox::default());
        assert!(wire.receive(b"HTTP/1.1 200 OK\r\n\r\n", &mut replies).is_err(), "without a length");
    }
}
