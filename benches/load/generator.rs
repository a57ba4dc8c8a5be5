//! The generator's connections: what is begun on them is sent, and what comes is read, by one thread in turn.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mio::{Events, Interest, Poll, Token, net::TcpStream};

use super::Target;
use crate::wire::{Outbox, Replies, Wire};

/// A server that answers nothing for so long answers nothing any more.
pub(super) const STALL: Duration = Duration::from_secs(20);
/// What is read at once, at most.
const READ: usize = 256 << 10;

/// Asks once; the body of the reply.
///
/// # Errors
/// When the request fails.
pub fn ask(target: &Target<'_>) -> Result<Vec<u8>> {
    let mut generator = Generator::connect(&Target { connections: 1, streams: 1, ..target.clone() })?;
    generator.replies.keep = usize::MAX;
    let mut waiting = VecDeque::from([Duration::ZERO]);
    // A large message has to wait until the server has said how much it takes.
    while !waiting.is_empty() || generator.is_open() {
        generator.begin_waiting(&mut waiting);
        generator.turn(Some(STALL))?;
    }
    let succeeded = generator.replies.all.iter().all(|reply| reply.succeeded);
    ensure!(succeeded, "the request fails: {}", String::from_utf8_lossy(&generator.replies.body));
    Ok(generator.replies.body)
}

/// Connections to a server, and what has come over them.
pub(super) struct Generator {
    poll: Poll,
    events: Events,
    pub connections: Vec<Connection>,
    /// The connection that gets the next request.
    turn: usize,
    pub replies: Replies,
    heard: Instant,
    epoch: Instant,
}

pub(super) struct Connection {
    socket: TcpStream,
    pub wire: Wire,
    out: Outbox,
    input: Vec<u8>,
    /// Bytes of `input` that were received and not read yet.
    filled: usize,
}

impl Generator {
    pub fn connect(target: &Target<'_>) -> Result<Self> {
        let poll = Poll::new()?;
        let mut connections = Vec::new();
        for index in 0..target.connections {
            let socket = std::net::TcpStream::connect_timeout(&target.address, STALL)
                .with_context(|| format!("cannot reach {}", target.address))?;
            socket.set_nodelay(true)?;
            socket.set_nonblocking(true)?;
            let mut socket = TcpStream::from_std(socket);
            poll.registry().register(&mut socket, Token(index), Interest::READABLE | Interest::WRITABLE)?;
            let wire =
                Wire::new(target.request, target.streams, target.request.messages() * index / target.connections)?;
            let mut out = Outbox::default();
            out.push(wire.opening());
            connections.push(Connection { socket, wire, out, input: vec![0; READ], filled: 0 });
        }
        let (events, now) = (Events::with_capacity(1024), Instant::now());
        Ok(Self { poll, events, connections, turn: 0, replies: Replies::default(), heard: now, epoch: now })
    }

    pub fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    pub fn is_open(&self) -> bool {
        self.connections.iter().any(|connection| connection.wire.open() > 0)
    }

    /// Begins what waits, as far as there is room, on one connection after the other.
    pub fn begin_waiting(&mut self, waiting: &mut VecDeque<Duration>) {
        let count = self.connections.len();
        while let Some(&intended) = waiting.front() {
            let free = (self.turn..self.turn + count).find(|&index| self.connections[index % count].wire.has_room());
            let Some(index) = free else { return };
            self.connections[index % count].begin(intended);
            self.turn = (index + 1) % count;
            waiting.pop_front();
        }
    }

    /// Sends what is to be sent, waits for something to come, and reads it.
    pub fn turn(&mut self, wait: Option<Duration>) -> Result<()> {
        for connection in &mut self.connections {
            connection.flush()?;
        }
        match self.poll.poll(&mut self.events, wait) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => other?,
        }
        for event in self.events.iter().filter(|event| event.is_readable()) {
            self.connections[event.token().0].read(&mut self.replies)?;
            self.heard = Instant::now();
        }
        // Nothing is open, and something awaited, when the server's window has no room for a single message.
        if (self.is_open() || wait == Some(STALL)) && self.heard.elapsed() > STALL {
            bail!("the server has not answered anything for {STALL:?}, or takes no message of this size");
        }
        Ok(())
    }

    /// Waits for the replies to all that was begun.
    pub fn drain(&mut self) -> Result<()> {
        while self.is_open() {
            self.turn(Some(STALL))?;
        }
        Ok(())
    }
}

impl Connection {
    pub fn begin(&mut self, intended: Duration) {
        self.wire.begin(intended, &mut self.out);
    }

    fn flush(&mut self) -> Result<()> {
        while !self.out.is_empty() {
            match self.out.write(&mut self.socket) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WriteZero => bail!("the server has closed the connection"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot send"),
            }
        }
        Ok(())
    }

    fn read(&mut self, replies: &mut Replies) -> Result<()> {
        loop {
            if self.filled == self.input.len() {
                self.input.resize(self.input.len() * 2, 0);
            }
            let room = self.input.len() - self.filled;
            let got = match self.socket.read(&mut self.input[self.filled..]) {
                Ok(0) => bail!("the server has closed the connection"),
                Ok(got) => got,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("cannot receive"),
            };
            self.filled += got;
            let read = self.wire.receive(&self.input[..self.filled], &mut self.out, replies)?;
            self.input.copy_within(read..self.filled, 0);
            self.filled -= read;
            // What comes after a short read is announced anew.
            if got < room {
                return Ok(());
            }
        }
    }
}
