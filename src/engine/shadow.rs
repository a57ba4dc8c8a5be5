//! Shadow copies: some requests also go to a candidate, and its answers are compared with what clients got.
//!
//! All of it comes after the live answer, and at the cost of nobody. An I/O thread keeps the tensors and leaves them with
//! one atomic swap; it takes no lock that a thread of the idle class may hold, and wakes one
//! a millisecond at most. The rest, asking the candidate and comparing, is done by one thread of the idle class. What
//! does not fit into the candidate's room for copies is shed there and then, and so is everything while the server is
//! busy. All that is shed is counted, as missing.
//!
//! In the candidate's own queue copies are of the lowest priority and a client of their own, so they take turns with
//! those who ask for it by name, and are the first to make room for them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, error::SendError, unbounded_channel},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Code, Error},
    metrics::{Protocol, Way},
    model::{ModelVersion, Refused, batcher::Client, schedule::Urgency},
    observe::copies::Shed,
    priority::{self, usage},
    tensor::{Data, Tensor},
};

/// How long copies are left to gather before they are looked at: waking a thread costs the I/O thread microseconds, as
/// much as a small request's own work.
const GATHERING: Duration = Duration::from_millis(1);
/// Bytes of a tensor that are copied about as fast as they are shared, for which their first clone allocates, too: 160
/// instructions to share them, 167 to copy 16 bytes and 336 to copy 1 KB.
const SMALL: usize = 1024;
/// Copies that are taken on at a time.
const HANDFUL: usize = 256;
/// How often it is measured how busy the processor is.
const LOOK: Duration = Duration::from_millis(200);
/// Copies are one client among others in the queue.
const COPIES: Client = Client(u64::MAX);

/// Bounds of shadow copies. Those beyond them are shed, and counted as missing; live requests notice nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ShadowConfig {
    /// Copies that may wait for their answers, per version.
    pub max_requests: usize,
    /// Bytes of tensors that copies, and the answers they are compared with, may keep meanwhile, per version; one copy
    /// may always wait.
    pub max_bytes: usize,
    /// How long a copy waits for its answer.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_wait: Duration,
    /// Share of all processors that the server may use before copies are shed, from 0 to 1. What runs when nothing else
    /// wants the processor does not count: executors of versions that get only copies, and loading.
    pub max_cpu: f64,
}

impl Default for ShadowConfig {
    fn default() -> Self {
        Self { max_requests: 1024, max_bytes: 64 << 20, max_wait: Duration::from_secs(10), max_cpu: 0.7 }
    }
}

/// Where copies are left.
#[derive(Clone)]
pub struct Shadows {
    config: Arc<ShadowConfig>,
    copies: UnboundedSender<ShadowCopy>,
    /// Whether the server is too busy for copies.
    busy: Arc<AtomicBool>,
}

/// The thread that sees to copies.
pub struct ShadowThread {
    thread: JoinHandle<()>,
    stop: CancellationToken,
}

/// A request of which a copy is made if it goes well.
pub struct Original {
    candidate: Arc<ModelVersion>,
    inputs: Vec<Tensor>,
    protocol: Protocol,
}

/// A copy that waits for its answer.
struct ShadowCopy {
    original: Original,
    /// What the client got.
    live: Vec<Tensor>,
    bytes: usize,
}

impl Shadows {
    /// Starts the thread, which ends with [`ShadowThread::stop`].
    ///
    /// # Errors
    /// `Internal` when the system gives no thread, or nothing to wake it by.
    pub fn start(config: &ShadowConfig) -> Result<(Self, ShadowThread), Error> {
        let failed = |error: std::io::Error| Error::internal(format!("cannot start thread shadow: {error}"));
        // With I/O, though there is none: such a runtime is woken by a write to the kernel and not through a lock.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (copies, left) = unbounded_channel();
        let (stop, busy) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
        let config = Arc::new(config.clone());
        let worker = Worker { copies: left, busy: busy.clone(), load: Load::new(&config), config: config.clone() };
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("shadow".to_owned()).spawn(move || {
            priority::step_back();
            // With the runtime end the copies that still wait.
            runtime.block_on(stopped.run_until_cancelled(worker.run()));
        });
        Ok((Self { config, copies, busy }, ShadowThread { thread: thread.map_err(failed)?, stop }))
    }

    /// Leaves a copy of a request that went well; never waits. `outputs` are all of the live version's.
    pub fn offer(&self, original: Original, outputs: &[Tensor]) {
        let candidate = &original.candidate;
        if self.busy.load(Ordering::Relaxed) {
            return candidate.tally.shed(Shed::Busy);
        }
        let bytes = original.inputs.iter().chain(outputs).map(Tensor::byte_len).sum();
        if !candidate.tally.enter(bytes, self.config.max_requests, self.config.max_bytes) {
            return candidate.tally.shed(Shed::Full);
        }
        if let Err(SendError(copy)) = self.copies.send(ShadowCopy { original, live: keep(outputs), bytes }) {
            // The server ends.
            copy.original.candidate.tally.shed(Shed::Late);
        }
    }
}

impl ShadowThread {
    /// Gives up the copies that wait, and waits for the thread to end. Blocks: not for I/O threads.
    pub fn stop(self) {
        self.stop.cancel();
        if self.thread.join().is_err() {
            tracing::error!("the thread of shadow copies panicked");
        }
    }
}

impl Original {
    /// To be called before `inputs` are given to the live version.
    pub fn of(candidate: &Arc<ModelVersion>, inputs: &[Tensor], protocol: Protocol) -> Self {
        Self { candidate: candidate.clone(), inputs: keep(inputs), protocol }
    }
}

/// The tensors for later. Large ones share their bytes with the live request, of which a message's buffer or a whole
/// batch's answer stays in memory; small ones would keep as much for nothing, and cost no more when they are copied.
fn keep(tensors: &[Tensor]) -> Vec<Tensor> {
    let keep = |Tensor { name, dtype, shape, data }: &Tensor| {
        let data = match data {
            Data::Plain(bytes) if bytes.len() <= SMALL => Data::Plain(Bytes::copy_from_slice(bytes)),
            data => data.clone(),
        };
        Tensor { name: name.clone(), dtype: *dtype, shape: shape.clone(), data }
    };
    tensors.iter().map(keep).collect()
}

impl Drop for ShadowCopy {
    fn drop(&mut self) {
        self.original.candidate.tally.leave(self.bytes);
    }
}

impl ShadowCopy {
    /// Asks the candidate, and counts what comes of it.
    async fn run(mut self, max_wait: Duration) {
        let inputs = std::mem::take(&mut self.original.inputs);
        let Original { candidate, protocol, .. } = &self.original;
        let start = Instant::now();
        let answer = ask(candidate, inputs, start + max_wait).await;
        let count = |failure| candidate.metrics.request(*protocol, Way::Shadow, failure, start.elapsed());
        match answer {
            Ok(outputs) => {
                count(None);
                candidate.tally.answered(Way::Shadow, start.elapsed(), &outputs);
                candidate.tally.compared(&self.live, &outputs);
            }
            Err(Refused::Draining(_)) => candidate.tally.shed(Shed::Late),
            Err(Refused::Error(error)) => match error.code {
                Code::Overloaded => candidate.tally.shed(Shed::Full),
                Code::DeadlineExceeded | Code::NotReady => candidate.tally.shed(Shed::Late),
                code => {
                    count(Some(code));
                    candidate.tally.failed(Way::Shadow);
                    candidate.tally.copy_failed();
                    tracing::debug!(version = %candidate.version, %error, "a shadow copy failed");
                }
            },
        }
    }
}

async fn ask(candidate: &ModelVersion, inputs: Vec<Tensor>, deadline: Instant) -> Result<Vec<Tensor>, Refused> {
    let arranged = candidate.signature.arrange(candidate.name.as_str(), inputs).map_err(Refused::Error)?;
    let lowest = candidate.schedule.priority_levels.into();
    let urgency = Urgency { priority: lowest, deadline: Some(deadline), timeout: None, client: COPIES };
    candidate.infer(arranged, &urgency).await
}

/// What the thread does.
struct Worker {
    copies: UnboundedReceiver<ShadowCopy>,
    busy: Arc<AtomicBool>,
    load: Load,
    config: Arc<ShadowConfig>,
}

impl Worker {
    async fn run(mut self) {
        let mut handful = Vec::with_capacity(HANDFUL);
        loop {
            let next = self.copies.recv_many(&mut handful, HANDFUL);
            let ended = if self.busy.load(Ordering::Relaxed) {
                // None come in while it is busy, and somebody has to see when that is over.
                timeout(LOOK, next).await == Ok(0)
            } else {
                next.await == 0
            };
            if ended {
                return;
            }
            let busy = self.load.is_high(Instant::now(), usage::used);
            self.busy.store(busy, Ordering::Relaxed);
            for copy in handful.drain(..) {
                if busy {
                    copy.original.candidate.tally.shed(Shed::Busy);
                } else {
                    // It ends by the time that it may wait.
                    tokio::spawn(copy.run(self.config.max_wait));
                }
            }
            sleep(GATHERING).await;
        }
    }
}

/// How busy the processor is with anything but copies.
struct Load {
    cores: f64,
    limit: f64,
    looked: Instant,
    used: Duration,
    is_high: bool,
}

impl Load {
    fn new(config: &ShadowConfig) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        Self {
            cores,
            limit: config.max_cpu,
            looked: Instant::now(),
            used: usage::used(),
            is_high: config.max_cpu == 0.0,
        }
    }

    /// Whether the share of processor time `used` since the last look reaches the limit; looks again after [`LOOK`].
    fn is_high(&mut self, now: Instant, used: impl FnOnce() -> Duration) -> bool {
        let passed = now.saturating_duration_since(self.looked);
        if passed >= LOOK {
            let used = used();
            let share = used.saturating_sub(self.used).as_secs_f64() / (passed.as_secs_f64() * self.cores);
            self.is_high = share >= self.limit;
            (self.looked, self.used) = (now, used);
        }
        self.is_high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_is_measured_since_the_last_look() {
        let start = Instant::now();
        let mut load = Load { cores: 2.0, limit: 0.7, looked: start, used: Duration::from_secs(5), is_high: false };
        let mut used = Duration::from_secs(5);
        // Seconds since the last look, and the processor time used in them.
        let mut now = start;
        for (passed, more, high) in [
            (0.2, 0.2, false),
            (0.2, 0.279, false),
            (0.2, 0.281, true),
            (1.0, 1.39, false),
            (1.0, 1.41, true),
            (0.2, 0.0, false),
        ] {
            now += Duration::from_secs_f64(passed);
            used += Duration::from_secs_f64(more);
            assert_eq!(load.is_high(now, || used), high, "{more} s in {passed} s");
            let soon = now + LOOK / 2;
            assert_eq!(load.is_high(soon, || unreachable!()), high, "so soon nobody looks again");
        }
    }

    #[test]
    fn a_limit_of_nothing_sheds_from_the_first_copy_on() {
        let mut load = Load::new(&ShadowConfig { max_cpu: 0.0, ..ShadowConfig::default() });
        let start = load.looked;
        assert!(load.is_high(start, || unreachable!()));
        let used = load.used;
        assert!(load.is_high(start + LOOK, || used), "even when the server does nothing");
    }
}
