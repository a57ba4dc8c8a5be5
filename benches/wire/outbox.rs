//! Bytes on their way to a socket: small ones are gathered, large ones are sent from where they lie.
//!
//! Copying 602 KB for every request would cost the generator about as much as the kernel's own copy, and moving up
//! what is left after each partial write several times as much; then it, and not the echo, would be the limit.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, Write},
};

use bytes::Bytes;

/// Blocks of this size and more are not copied.
const LARGE: usize = 16 << 10;
/// Blocks that one write takes.
const BLOCKS: usize = 64;

#[derive(Default)]
pub struct Outbox {
    /// What goes before `tail`, in order.
    blocks: VecDeque<Bytes>,
    tail: Vec<u8>,
    /// Bytes of the first block, or of `tail` when there is none, that are sent already.
    sent: usize,
}

impl Outbox {
    pub fn push(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
    }

    pub fn push_shared(&mut self, bytes: &Bytes) {
        if bytes.len() < LARGE {
            return self.push(bytes);
        }
        if !self.tail.is_empty() {
            // Of a tail that is sent in part only the rest moves on.
            let tail = std::mem::take(&mut self.tail);
            let sent = if self.blocks.is_empty() { std::mem::take(&mut self.sent) } else { 0 };
            self.blocks.push_back(Bytes::from(tail).slice(sent..));
        }
        self.blocks.push_back(bytes.clone());
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.tail.is_empty()
    }

    /// Writes once.
    ///
    /// # Errors
    /// As the socket; `WriteZero` when it takes nothing any more.
    pub fn write(&mut self, socket: &mut impl Write) -> io::Result<()> {
        let written = if self.blocks.is_empty() {
            socket.write(&self.tail[self.sent..])?
        } else {
            let mut slices = [IoSlice::new(&[]); BLOCKS];
            let all = self.blocks.iter().map(Bytes::as_ref).chain([self.tail.as_slice()]);
            let mut count = 0;
            for (index, block) in all.take(BLOCKS).enumerate() {
                slices[index] = IoSlice::new(if index == 0 { &block[self.sent..] } else { block });
                count = index + 1;
            }
            socket.write_vectored(&slices[..count])?
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.sent += written;
        while let Some(block) = self.blocks.front() {
            if self.sent < block.len() {
                return Ok(());
            }
            self.sent -= block.len();
            self.blocks.pop_front();
        }
        if self.sent == self.tail.len() {
            self.tail.clear();
            self.sent = 0;
        }
        Ok(())
    }

    /// Everything that waits, for tests.
    #[cfg(test)]
    pub fn take(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while !self.is_empty() {
            self.write(&mut all).unwrap();
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time.
    struct Narrow {
        width: usize,
        got: Vec<u8>,
    }

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.got.extend_from_slice(&bytes[..bytes.len().min(self.width)]);
            Ok(bytes.len().min(self.width))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_is_sent_once_and_in_order_however_little_a_write_takes() {
        let large = |fill: u8| Bytes::from(vec![fill; LARGE + usize::from(fill)]);
        for width in [1, 3, LARGE - 1, LARGE, 5 * LARGE] {
            let (mut outbox, mut expected) = (Outbox::default(), Vec::new());
            let mut socket = Narrow { width, got: Vec::new() };
            for round in 0..3 {
                for block in [Bytes::from_static(b"head"), large(round), Bytes::from_static(b"between"), large(7)] {
                    outbox.push_shared(&block);
                    expected.extend_from_slice(&block);
                    // Something is always on its way when the next block comes.
                    outbox.write(&mut socket).unwrap();
                }
                outbox.push(b"end");
                expected.extend_from_slice(b"end");
            }
            while !outbox.is_empty() {
                outbox.write(&mut socket).unwrap();
            }
            assert!(socket.got == expected, "{width}: {} of {} bytes", socket.got.len(), expected.len());
        }
    }

    #[test]
    fn several_blocks_go_in_one_write() {
        let mut outbox = Outbox::default();
        outbox.push(b"a");
        outbox.push_shared(&Bytes::from(vec![1; LARGE]));
        outbox.push(b"b");
        let mut all = Vec::new();
        outbox.write(&mut all).unwrap();
        assert_eq!((all.len(), outbox.is_empty()), (LARGE + 2, true));
    }
}
