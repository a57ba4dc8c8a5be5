//! The load generator: one thread that never sleeps longer than it has to, on a core of its own.
//!
//! Closed loop: every connection always has as many requests open as it may; this finds the most a server can do.
//! Open loop: requests come at random, as if from many strangers, and a late one does not hold up the next; latency
//! counts from the moment at which a request was meant to be sent, so a server that stalls cannot hide it.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read},
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
    wire::{Outbox, Replies, Request, Wire},
};

/// A server that answers nothing for so long answers nothing any more.
const STALL: Duration = Duration::from_secs(20);
/// What is read at once, at most.
const READ: usize = 256 << 10;
/// When an open loop, which never sleeps, has not run for so long, its core was taken from it.
const HELD_UP: Duration = Duration::from_millis(1);
/// What was to be sent meanwhile comes all at once then, and the server needs some time for that: so many times as long.
const AFTERMATH: u32 = 4;

/// Whom to ask what, and over how many connections.
#[derive(Clone)]
pub struct Target<'a> {
    pub address: SocketAddr,
    /// The process whose CPU time counts, if it is one of this machine's.
    pub pid: Option<u32>,
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
///
/// Latencies are those of requests that were not on their way while the generator was held up, nor just after that:
/// all others would tell of the generator's core, not of the server.
#[derive(Default)]
pub struct Arrivals {
    pub latencies: Latencies,
    /// Of requests that were sent in phases of comparison.
    pub steady: Latencies,
    pub failed: usize,
    /// How long failures took among those that counted.
    pub refusals: Latencies,
    /// Of all requests that counted and succeeded, whatever happened to the generator.
    pub all: Latencies,
    /// The share of requests whose latencies say nothing, because the generator was held up.
    pub held_up: f64,
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
            None if count > 0 && now >= warm => begun = Some(Moment::beside(target.pid)?),
            Some(start) => {
                replied += count;
                if count > 0 && start.elapsed() >= window {
                    break start.until(&Moment::beside(target.pid)?);
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
    /// Count their latency as what others are compared with.
    Steady,
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

/// When requests come at `rate` per second from many strangers, as follows from `seed`.
///
/// # Errors
/// When the rate is not positive.
pub fn poisson(rate: f64, seed: u64) -> Result<impl Iterator<Item = Duration>> {
    let mut random = StdRng::seed_from_u64(seed);
    let gaps = Exp::new(rate).ok().filter(|_| rate > 0.0).context("the rate of an open loop must be positive")?;
    let mut next = Duration::ZERO;
    Ok(std::iter::repeat_with(move || {
        next += Duration::from_secs_f64(gaps.sample(&mut random));
        next
    }))
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
    let mut strangers = Strangers::new(target, poisson(rate, seed)?)?;
    loop {
        let current = phase(strangers.generator.now(), &strangers.generator.replies.body)?;
        if current == Phase::End {
            return strangers.finish();
        }
        strangers.turn(current)?;
    }
}

/// Two open loops at a time, each with its own connections: those of `target` at `rate`, and `others` beside it, of
/// which nothing is told.
///
/// # Errors
/// As `open`.
pub fn beside(
    (target, rate): (&Target<'_>, f64),
    (others, flood): (&Target<'_>, f64),
    seed: u64,
    mut phase: impl FnMut(Duration, &[u8]) -> Result<Phase>,
) -> Result<Arrivals> {
    let mut strangers = Strangers::new(target, poisson(rate, seed)?)?;
    let mut others = Strangers::new(others, poisson(flood, !seed)?)?;
    loop {
        let current = phase(strangers.generator.now(), &strangers.generator.replies.body)?;
        if current == Phase::End {
            let arrivals = strangers.finish()?;
            others.finish()?;
            return Ok(arrivals);
        }
        strangers.turn(current)?;
        others.turn(current)?;
    }
}

/// An open loop.
struct Strangers<I> {
    generator: Generator,
    pid: Option<u32>,
    moments: I,
    next: Duration,
    /// Requests whose time has come and for which no connection has room.
    waiting: VecDeque<Duration>,
    /// When phases began.
    phases: Vec<(Duration, Phase)>,
    stalls: Stalls,
    begun: Option<Moment>,
    arrivals: Arrivals,
}

/// When the generator was held up.
#[derive(Default)]
struct Stalls {
    /// When it last ran.
    ran: Duration,
    /// The end of the latest stall and of what follows from it.
    over: Duration,
    /// Requests that were sent where latencies count, and those of them that were on their way during a stall.
    asked: u32,
    spoiled: u32,
}

impl Stalls {
    /// It runs.
    fn run(&mut self, now: Duration) {
        let pause = now.saturating_sub(self.ran);
        self.ran = now;
        if pause > HELD_UP {
            self.over = now + pause * AFTERMATH;
        }
    }

    /// Whether the latency of a request that was meant to be sent at `intended` says something of the server.
    fn is_clear(&mut self, intended: Duration) -> bool {
        let clear = intended >= self.over;
        self.asked += 1;
        self.spoiled += u32::from(!clear);
        clear
    }
}

impl<I: Iterator<Item = Duration>> Strangers<I> {
    fn new(target: &Target<'_>, mut moments: I) -> Result<Self> {
        let next = moments.next().unwrap_or(Duration::MAX);
        Ok(Self {
            generator: Generator::connect(target)?,
            pid: target.pid,
            moments,
            next,
            waiting: VecDeque::new(),
            phases: Vec::new(),
            stalls: Stalls::default(),
            begun: None,
            arrivals: Arrivals::default(),
        })
    }

    /// Sends what is to be sent by now, and takes what has come.
    fn turn(&mut self, current: Phase) -> Result<()> {
        let now = self.generator.now();
        if self.phases.last().is_none_or(|last| last.1 != current) {
            self.phases.push((now, current));
        }
        if self.begun.is_none() && current != Phase::Pass {
            self.begun = Some(Moment::beside(self.pid)?);
        }
        // What came while it did not run is read late, too, and so the stall is known before.
        self.stalls.run(now);
        while self.next <= now {
            self.waiting.push_back(self.next);
            self.next = self.moments.next().unwrap_or(Duration::MAX);
        }
        self.generator.begin_waiting(&mut self.waiting);
        self.generator.turn(Some(Duration::ZERO))?;
        self.record();
        Ok(())
    }

    /// Sends no more, and waits for what was begun: the slowest requests must not be the ones that are left out.
    fn finish(mut self) -> Result<Arrivals> {
        let begun = self.begun.take().context("the run ended before anything counted")?;
        self.arrivals.usage = begun.until(&Moment::beside(self.pid)?);
        let deadline = self.generator.now() + STALL;
        while !self.waiting.is_empty() || self.generator.is_open() {
            ensure!(self.generator.now() < deadline, "requests are not answered within {STALL:?}");
            self.generator.begin_waiting(&mut self.waiting);
            self.stalls.run(self.generator.now());
            self.generator.turn(Some(Duration::ZERO))?;
            self.record();
        }
        self.arrivals.held_up = f64::from(self.stalls.spoiled) / f64::from(self.stalls.asked.max(1));
        Ok(self.arrivals)
    }

    /// Takes the replies; each latency counts as the phase says in which the request was meant to be sent.
    fn record(&mut self) {
        let now = self.generator.now();
        for reply in self.generator.replies.all.drain(..) {
            let phase = self.phases[..self.phases.partition_point(|(begun, _)| *begun <= reply.intended)].last();
            let phase = phase.map_or(Phase::Pass, |(_, phase)| *phase);
            let (took, arrivals) = (now - reply.intended, &mut self.arrivals);
            arrivals.failed += usize::from(!reply.succeeded);
            if phase == Phase::Pass {
                continue;
            }
            if phase == Phase::Count && reply.succeeded {
                arrivals.all.record(took);
            }
            if self.stalls.is_clear(reply.intended) {
                match (reply.succeeded, phase) {
                    (true, Phase::Steady) => arrivals.steady.record(took),
                    (true, _) => arrivals.latencies.record(took),
                    (false, Phase::Count) => arrivals.refusals.record(took),
                    (false, _) => {}
                }
            }
        }
    }
}

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
    out: Outbox,
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
            let mut out = Outbox::default();
            out.push(wire.opening());
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
        // Nothing is open, and something awaited, when the server's window has no room for a single message.
        if (self.is_open() || wait == Some(STALL)) && self.heard.elapsed() > STALL {
            bail!("the server has not answered anything for {STALL:?}, or takes no message of this size");
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
}

impl Connection {
    fn begin(&mut self, intended: Duration) {
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use bytes::Bytes;

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
            let target =
                Target { address, pid: Some(std::process::id()), request: &request, connections: 4, streams: 4 };
            let outputs = protocol.outputs(&ask(&target).unwrap()).unwrap();
            assert_eq!(outputs, ["label INT64 [1]", "probabilities FP32 [1, 3]"], "{protocol:?}");

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
            assert!((230..370).contains(&run.all.count()), "{protocol:?}: {}", run.all.count());
            assert!(run.latencies.count() + run.all.count() / 2 > run.all.count(), "the generator was held up");
            assert_eq!(run.failed, 0);
        }
    }

    #[test]
    fn phases_tell_latencies_apart() {
        let [_, grpc] = echo();
        let request = Protocol::Grpc.request("iris", &flower()).unwrap();
        let target = Target { address: grpc, pid: None, request: &request, connections: 2, streams: 64 };
        let run = open(&target, 400.0, 7, |now, reply| {
            assert!(reply.is_empty() || Protocol::version(reply).is_ok_and(|version| version == 1));
            Ok(match now.as_millis() {
                0..100 => Phase::Pass,
                100..1100 => Phase::Steady,
                1100..1600 => Phase::Count,
                _ => Phase::End,
            })
        });
        let run = run.unwrap();
        // 400 and 200 expected, with deviations of 20 and 14.
        assert!((320..480).contains(&run.steady.count()), "{}", run.steady.count());
        assert!((140..260).contains(&run.latencies.count()), "{}", run.latencies.count());
        assert_eq!(run.failed, 0);
    }

    #[test]
    fn what_was_on_its_way_while_the_generator_was_held_up_says_nothing() {
        let millis = Duration::from_millis;
        let mut stalls = Stalls::default();
        for now in [0, 1, 2, 12, 13] {
            stalls.run(millis(now));
        }
        // From 2 to 12 nothing ran, and what was to be sent then had to come after.
        let clear = [1, 11, 12, 51, 52, 60].map(|intended| stalls.is_clear(millis(intended)));
        assert_eq!(clear, [false, false, false, false, true, true]);
        assert_eq!((stalls.asked, stalls.spoiled), (6, 4));
    }

    #[test]
    fn large_messages_come_back_whole() {
        use tidegate::tensor::{DType, Data, Tensor};
        let [rest, grpc] = echo();
        let bytes: Vec<u8> = (0..300_000_u32).map(|index| index as u8 & 0x3f).collect();
        let image = Tensor::new("image".into(), DType::Fp32, [1, 75_000].as_slice().into(), Data::Plain(bytes.into()));
        let image = image.unwrap();
        for protocol in [Protocol::Grpc, Protocol::Binary] {
            let request = protocol.request("identity", &image).unwrap();
            let address = if protocol == Protocol::Grpc { grpc } else { rest };
            let target = Target { address, pid: None, request: &request, connections: 2, streams: 2 };
            let body = ask(&target).unwrap();
            assert_eq!(protocol.outputs(&body).unwrap(), ["same FP32 [1, 75000]"]);
            let Data::Plain(sent) = &image.data else { panic!() };
            assert!(body.ends_with(sent), "{protocol:?}: {} bytes", body.len());
            let full = closed(&target, Duration::ZERO, Duration::from_millis(100)).unwrap();
            assert!(full.rate > 10.0, "{protocol:?}: {full:?}");
        }
    }

    #[test]
    fn failures_are_noticed() {
        const SERVER_LIVE: &str = "/inference.GRPCInferenceService/ServerLive";
        let [rest, grpc] = echo();
        let broken = [
            (rest, Request::Http1("POST /nowhere HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n".into())),
            (grpc, Request::Grpc { path: SERVER_LIVE, message: Bytes::new(), deadline: None }),
        ];
        for (address, request) in &broken {
            let target =
                Target { address: *address, pid: Some(std::process::id()), request, connections: 2, streams: 2 };
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
        let request = Request::Http1("GET / HTTP/1.1\r\n\r\n".into());
        let target = Target { address, pid: Some(std::process::id()), request: &request, connections: 1, streams: 1 };
        let run = open(&target, 200.0, 7, between(Duration::ZERO, Duration::from_millis(400))).unwrap();
        // About three quarters of all requests were meant for the pause, and waited for half of it on average.
        assert!(run.all.quantile(0.5) > 0.05, "{}", run.all.quantile(0.5));
    }
}
