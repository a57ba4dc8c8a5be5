//! The load generator: one thread that never sleeps longer than it has to, on a core of its own.
//!
//! Closed loop: every connection always has as many requests open as it may; this finds the most a server can do.
//! Open loop: requests come at random, as if from many strangers, and a late one does not hold up the next; latency
//! counts from the moment at which a request was meant to be sent, so a server that stalls cannot hide it.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mio::{Events, Interest, Poll, Token, net::TcpStream};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp};

use crate::{
    machine::{Moment, Usage},
    statistics::Latencies,
    wire::{Replies, Request, Wire},
};

/// A server that answers nothing for so long answers nothing any more.
const STALL: Duration = Duration::from_secs(20);
/// What is read at once, at most.
const READ: usize = 256 << 10;
/// A request sent later than this after its time was held up by the generator.
const LATE: Duration = Duration::from_millis(1);

/// Whom to ask what, and over how many connections.
#[derive(Clone)]
pub struct Target<'a> {
    pub address: SocketAddr,
    /// The process whose CPU time counts.
    pub pid: u32,
    pub request: &'a Request,
    pub connections: usize,
    /// Requests that may be open on each connection; over HTTP/1.1 it is always one.
    pub streams: usize,
}

/// What a closed loop found.
#[derive(Clone, Copy, Debug)]
pub struct Saturation {
    /// Replies per second.
    pub rate: f64,
    /// CPU seconds of the server for each reply.
    pub cpu: f64,
    pub usage: Usage,
}

/// What an open loop found.
#[derive(Default)]
pub struct Arrivals {
    pub latencies: Latencies,
    pub failed: usize,
    /// The share of requests that the generator sent late.
    pub late: f64,
    pub usage: Usage,
}

/// Keeps every connection full: for `warm` without looking, then for `window`.
///
/// # Errors
/// When the server cannot be reached, stalls, or fails a single request.
pub fn closed(target: &Target<'_>, warm: Duration, window: Duration) -> Result<Saturation> {
    let mut generator = Generator::connect(target)?;
    let mut begun: Option<Moment> = None;
    let mut replied = 0;
    let usage = loop {
        let now = generator.now();
        for connection in &mut generator.connections {
            while connection.wire.has_room() {
                connection.begin(now);
            }
        }
        generator.turn(Some(STALL))?;
        let replies = &mut generator.replies.all;
        let (count, failed) = (replies.len(), replies.iter().filter(|reply| !reply.succeeded).count());
        replies.clear();
        ensure!(failed == 0, "{failed} of {count} requests failed under full load");
        // The window begins and ends with replies, so that a batch is in it with all of its time or not at all.
        match &begun {
            None if count > 0 && now >= warm => begun = Some(Moment::now(Some(target.pid))?),
            Some(start) => {
                replied += count;
                if count > 0 && start.elapsed() >= window {
                    break start.until(&Moment::now(Some(target.pid))?);
                }
            }
            None => {}
        }
    };
    generator.drain()?;
    let replied = replied as f64;
    Ok(Saturation { rate: replied / usage.seconds, cpu: usage.server / replied, usage })
}

/// Keeps every connection full until so many requests have been answered as `lengths` says, one after the other over
/// the same connections, and calls `done` after each.
///
/// # Errors
/// As `closed`.
pub fn exactly(target: &Target<'_>, lengths: &[usize], mut done: impl FnMut() -> Result<()>) -> Result<()> {
    let mut generator = Generator::connect(target)?;
    for &length in lengths {
        let (mut begun, mut answered) = (0, 0);
        while answered < length {
            for connection in &mut generator.connections {
                while begun < length && connection.wire.has_room() {
                    connection.begin(Duration::ZERO);
                    begun += 1;
                }
            }
            generator.turn(Some(STALL))?;
            let replies = &mut generator.replies;
            ensure!(
                replies.all.iter().all(|reply| reply.succeeded),
                "a request failed: {}",
                String::from_utf8_lossy(&replies.body)
            );
            answered += replies.all.len();
            replies.all.clear();
        }
        done()?;
    }
    Ok(())
}

/// What to do with requests that are meant to be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Send them, but do not count their latency: the server warms up, or what is to be measured has not begun.
    Pass,
    Count,
    /// Send no more.
    End,
}

/// Counts after `warm` and until `end`.
pub fn between(warm: Duration, end: Duration) -> impl FnMut(Duration, &[u8]) -> Result<Phase> {
    move |now, _| {
        Ok(if now >= end {
            Phase::End
        } else if now >= warm {
            Phase::Count
        } else {
            Phase::Pass
        })
    }
}

/// Sends `rate` requests per second at random moments that follow from `seed`, as `phase` says, which is told the time
/// and shown the body of the latest reply.
///
/// # Errors
/// When the server cannot be reached or stalls, or nothing was counted. Requests that fail are counted, whenever they
/// were sent.
pub fn open(
    target: &Target<'_>,
    rate: f64,
    seed: u64,
    mut phase: impl FnMut(Duration, &[u8]) -> Result<Phase>,
) -> Result<Arrivals> {
    let mut generator = Generator::connect(target)?;
    let mut random = StdRng::seed_from_u64(seed);
    let gaps = Exp::new(rate).context("the rate of an open loop must be positive")?;
    let mut gap = || Duration::from_secs_f64(gaps.sample(&mut random));
    let mut arrivals = Arrivals::default();
    // When phases began, and whether requests counted in them.
    let mut phases: Vec<(Duration, bool)> = Vec::new();
    let (mut sent, mut late) = (0u32, 0u32);
    let mut begun: Option<Moment> = None;
    let mut waiting = VecDeque::new();
    let mut next = gap();
    loop {
        let now = generator.now();
        let current = phase(now, &generator.replies.body)?;
        if current == Phase::End {
            break;
        }
        let counts = current == Phase::Count;
        if phases.last().is_none_or(|last| last.1 != counts) {
            phases.push((now, counts));
        }
        if begun.is_none() && counts {
            begun = Some(Moment::now(Some(target.pid))?);
        }
        while next <= now {
            sent += u32::from(counts);
            late += u32::from(counts && now - next > LATE);
            waiting.push_back(next);
            next += gap();
        }
        generator.begin_waiting(&mut waiting);
        generator.turn(Some(Duration::ZERO))?;
        generator.record(&phases, &mut arrivals);
    }
    let begun = begun.context("the run ended before anything counted")?;
    arrivals.usage = begun.until(&Moment::now(Some(target.pid))?);
    arrivals.late = f64::from(late) / f64::from(sent.max(1));
    // What was begun is waited for: the slowest requests must not be the ones that are left out.
    let deadline = generator.now() + STALL;
    while !waiting.is_empty() || generator.is_open() {
        ensure!(generator.now() < deadline, "requests are not answered within {STALL:?}");
        generator.begin_waiting(&mut waiting);
        generator.turn(Some(Duration::from_millis(1)))?;
        generator.record(&phases, &mut arrivals);
    }
    Ok(arrivals)
}

/// Asks once; the body of the reply.
///
/// # Errors
/// When the request fails.
pub fn ask(target: &Target<'_>) -> Result<Vec<u8>> {
    let mut generator = Generator::connect(&Target { connections: 1, streams: 1, ..target.clone() })?;
    generator.begin_waiting(&mut VecDeque::from([Duration::ZERO]));
    generator.drain()?;
    let succeeded = generator.replies.all.iter().all(|reply| reply.succeeded);
    ensure!(succeeded, "the request fails: {}", String::from_utf8_lossy(&generator.replies.body));
    Ok(generator.replies.body)
}

struct Generator {
    poll: Poll,
    events: Events,
    connections: Vec<Connection>,
    /// The connection that gets the next request.
    turn: usize,
    replies: Replies,
    heard: Instant,
    epoch: Instant,
}

struct Connection {
    socket: TcpStream,
    wire: Wire,
    out: Vec<u8>,
    input: Vec<u8>,
    /// Bytes of `input` that were received and not read yet.
    filled: usize,
}

impl Generator {
    fn connect(target: &Target<'_>) -> Result<Self> {
        let poll = Poll::new()?;
        let mut connections = Vec::new();
        for index in 0..target.connections {
            let socket = std::net::TcpStream::connect_timeout(&target.address, STALL)
                .with_context(|| format!("cannot reach {}", target.address))?;
            socket.set_nodelay(true)?;
            socket.set_nonblocking(true)?;
            let mut socket = TcpStream::from_std(socket);
            poll.registry().register(&mut socket, Token(index), Interest::READABLE | Interest::WRITABLE)?;
            let wire = Wire::new(target.request, target.streams)?;
            let out = wire.opening().to_vec();
            connections.push(Connection { socket, wire, out, input: vec![0; READ], filled: 0 });
        }
        let (events, now) = (Events::with_capacity(1024), Instant::now());
        Ok(Self { poll, events, connections, turn: 0, replies: Replies::default(), heard: now, epoch: now })
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn is_open(&self) -> bool {
        self.connections.iter().any(|connection| connection.wire.open() > 0)
    }

    /// Begins what waits, as far as there is room, on one connection after the other.
    fn begin_waiting(&mut self, waiting: &mut VecDeque<Duration>) {
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
    fn turn(&mut self, wait: Option<Duration>) -> Result<()> {
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
        if self.is_open() && self.heard.elapsed() > STALL {
            bail!("the server has not answered anything for {STALL:?}");
        }
        Ok(())
    }

    /// Waits for the replies to all that was begun.
    fn drain(&mut self) -> Result<()> {
        while self.is_open() {
            self.turn(Some(STALL))?;
        }
        Ok(())
    }

    /// Takes the replies; the latency of those counts that were asked for in a phase that counts.
    fn record(&mut self, phases: &[(Duration, bool)], arrivals: &mut Arrivals) {
        let now = self.epoch.elapsed();
        for reply in self.replies.all.drain(..) {
            let phase = phases[..phases.partition_point(|(begun, _)| *begun <= reply.intended)].last();
            match reply.succeeded {
                true if phase.is_some_and(|(_, counts)| *counts) => arrivals.latencies.record(now - reply.intended),
                true => {}
                false => arrivals.failed += 1,
            }
        }
    }
}

impl Connection {
    fn begin(&mut self, intended: Duration) {
        self.wire.begin(intended, &mut self.out);
    }

    fn flush(&mut self) -> Result<()> {
        while !self.out.is_empty() {
            match self.socket.write(&self.out) {
                Ok(0) => bail!("the server has closed the connection"),
                Ok(written) => drop(self.out.drain(..written)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{echo, requests::Protocol};

    /// The addresses of an echo that serves until the tests end.
    fn echo() -> [SocketAddr; 2] {
        let server = echo::Server::bind().unwrap();
        let addresses = server.addresses();
        std::thread::spawn(move || server.serve().unwrap());
        addresses
    }

    fn flower() -> tidegate::tensor::Tensor {
        use tidegate::tensor::{DType, Data, Tensor};
        let bytes: Vec<u8> = [5.7f32, 2.8, 4.1, 1.3].into_iter().flat_map(f32::to_le_bytes).collect();
        Tensor::new("X".into(), DType::Fp32, [1, 4].as_slice().into(), Data::Plain(bytes.into())).unwrap()
    }

    #[test]
    fn both_loops_drive_the_echo_over_every_protocol() {
        let [rest, grpc] = echo();
        for protocol in Protocol::ALL {
            let request = protocol.request("iris", &flower()).unwrap();
            let address = if protocol == Protocol::Grpc { grpc } else { rest };
            let target = Target { address, pid: std::process::id(), request: &request, connections: 4, streams: 4 };
            assert_eq!(protocol.label(&ask(&target).unwrap()).unwrap(), 1, "{protocol:?}");

            let full = closed(&target, Duration::from_millis(20), Duration::from_millis(200)).unwrap();
            assert!(full.rate > 100.0 && full.usage.seconds >= 0.2, "{protocol:?}: {full:?}");

            let mut done = 0;
            exactly(&target, &[10, 0, 100], || {
                done += 1;
                Ok(())
            })
            .unwrap();
            assert_eq!(done, 3);

            let (warm, end) = (Duration::from_millis(100), Duration::from_millis(1100));
            let run = open(&target, 300.0, 7, between(warm, end)).unwrap();
            // 300 expected with a deviation of 17.
            assert!((230..370).contains(&run.latencies.count()), "{protocol:?}: {}", run.latencies.count());
            assert_eq!(run.failed, 0);
        }
    }

    #[test]
    fn failures_are_noticed() {
        let [rest, grpc] = echo();
        let broken = [
            (rest, Request::Http1(b"POST /nowhere HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n".to_vec())),
            (grpc, Request::Grpc { path: "/inference.GRPCInferenceService/ServerLive", message: Vec::new() }),
        ];
        for (address, request) in &broken {
            let target = Target { address: *address, pid: std::process::id(), request, connections: 2, streams: 2 };
            assert!(ask(&target).is_err());
            assert!(closed(&target, Duration::ZERO, Duration::from_millis(50)).is_err());
            let run = open(&target, 500.0, 7, between(Duration::ZERO, Duration::from_millis(100))).unwrap();
            assert!(run.failed > 10 && run.latencies.count() == 0, "{} of {}", run.failed, run.latencies.count());
        }
    }

    #[test]
    fn latency_counts_from_when_a_request_was_meant_to_be_sent() {
        // A server that takes its time for the first request, while one connection is all there is.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut pause = Duration::from_millis(300);
            while stream.read(&mut [0; 64]).is_ok_and(|got| got > 0) {
                std::thread::sleep(std::mem::take(&mut pause));
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            }
        });
        let request = Request::Http1(b"GET / HTTP/1.1\r\n\r\n".to_vec());
        let target = Target { address, pid: std::process::id(), request: &request, connections: 1, streams: 1 };
        let mut run = open(&target, 200.0, 7, between(Duration::ZERO, Duration::from_millis(400))).unwrap();
        // About three quarters of all requests were meant for the pause, and waited for half of it on average.
        assert!(run.latencies.quantile(0.5) > 0.05, "{}", run.latencies.quantile(0.5));
    }
}
