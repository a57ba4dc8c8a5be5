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
    model::{ModelVersion, Refused, batcher::Client, relay, schedule::Urgency},
    observe::copies::Shed,
    priority::{
        self, quota,
        usage::{self, Used},
    },
    tensor::{Data, Tensor},
    text,
};

/// How long copies are left to gather before they are looked at: waking a thread costs the I/O thread microseconds, as
/// much as a small request's own work.
const GATHERING: Duration = Duration::from_millis(1);
/// Bytes of a tensor that are copied about as fast as they are shared, for which their first clone allocates, too: 160
/// instructions to share them, 167 to copy 16 bytes and 336 to copy 1 KB.
const SMALL: usize = 1024;
/// Copies that are taken on at a time.
const HANDFUL: usize = 256;
/// Share of a quota that the whole process may use before copies are shed. Linux takes what the idle class runs from the
/// quota, too, and when that is used up, nobody runs for the rest of its period.
const MAX_OF_QUOTA: f64 = 0.9;
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
    /// may always wait. An input of more than 1 KiB keeps the request's whole message in memory.
    pub max_bytes: usize,
    /// How long a copy waits for its answer.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_wait: Duration,
    /// Share of all processors, or of the quota of its control group, that the server may use before copies are shed,
    /// from 0 to 1. What runs when nothing else wants the processor does not count: executors of versions that get only
    /// copies, and loading. But a quota pays for that as well, and copies are also shed when 0.9 of it are used by all
    /// together. 1: copies are not shed for the processor's sake.
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
pub struct Original<'a> {
    candidate: &'a Arc<ModelVersion>,
    /// Nothing when it is clear beforehand that there will be no copy, and why.
    inputs: Result<Vec<Tensor>, Shed>,
    text: &'a text::Wish,
    protocol: Protocol,
}

/// A copy that waits for its answer.
struct ShadowCopy {
    candidate: Arc<ModelVersion>,
    inputs: Vec<Tensor>,
    text: text::Wish,
    protocol: Protocol,
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
        let runtime = relay::gathering_runtime().build().map_err(failed)?;
        let (copies, left) = unbounded_channel();
        let (stop, busy) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
        let config = Arc::new(config.clone());
        let worker = Worker { copies: left, busy: busy.clone(), load: Load::new(&config), config: config.clone() };
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("shadow".to_owned()).spawn(move || {
            priority::step_back();
            // With the runtime end the copies that still wait.
            runtime.block_on(relay::relayed(stopped.run_until_cancelled(worker.run())));
        });
        Ok((Self { config, copies, busy }, ShadowThread { thread: thread.map_err(failed)?, stop }))
    }

    /// Keeps the inputs of a request, before they are given to the live version, for a copy to `candidate`: unless none
    /// is taken on now, so that requests do not pay for copies that are not made.
    pub fn keep<'a>(
        &self,
        candidate: &'a Arc<ModelVersion>,
        inputs: &[Tensor],
        text: &'a text::Wish,
        protocol: Protocol,
    ) -> Original<'a> {
        let inputs = match self.refuses(candidate) {
            Some(reason) => Err(reason),
            None => Ok(inputs.iter().map(kept).collect()),
        };
        Original { candidate, inputs, text, protocol }
    }

    /// Why no copy is taken on, whatever its size.
    fn refuses(&self, candidate: &ModelVersion) -> Option<Shed> {
        if self.busy.load(Ordering::Relaxed) {
            return Some(Shed::Busy);
        }
        candidate.tally.is_full(self.config.max_requests, self.config.max_bytes).then_some(Shed::Full)
    }

    /// Leaves a copy of a request that went well; never waits. `outputs` are all of the live version's.
    pub fn offer(&self, original: Original<'_>, outputs: &[Tensor]) {
        let Original { candidate, inputs, text, protocol } = original;
        let inputs = match (inputs, self.refuses(candidate)) {
            (Ok(inputs), None) => inputs,
            (Err(reason), _) | (_, Some(reason)) => return candidate.tally.shed(reason),
        };
        let bytes = inputs.iter().chain(outputs).map(Tensor::byte_len).sum();
        if !candidate.tally.enter(bytes, self.config.max_requests, self.config.max_bytes) {
            return candidate.tally.shed(Shed::Full);
        }
        let live = outputs.iter().map(copied).collect();
        let (candidate, text) = (candidate.clone(), text.of_copy());
        let copy = ShadowCopy { candidate, inputs, text, protocol, live, bytes };
        if let Err(SendError(copy)) = self.copies.send(copy) {
            // The server ends.
            copy.candidate.tally.shed(Shed::Late);
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

/// An input for later. A large one shares its bytes with the live request, whose message is little else; a small one
/// would keep a whole message for nothing, and costs no more when it is copied.
fn kept(input: &Tensor) -> Tensor {
    match &input.data {
        Data::Plain(bytes) if bytes.len() <= SMALL => copied(input),
        _ => input.clone(),
    }
}

/// A tensor with bytes of its own. An answer's are a slice of its batch's, all of which would stay in memory for it, and
/// what copies keep would be many times what is counted of it.
fn copied(Tensor { name, dtype, shape, data }: &Tensor) -> Tensor {
    let data = match data {
        Data::Plain(bytes) => Data::Plain(Bytes::copy_from_slice(bytes)),
        Data::Strings(strings) => {
            let mut rest = Bytes::from(strings.concat());
            Data::Strings(strings.iter().map(|string| rest.split_to(string.len())).collect())
        }
    };
    Tensor { name: name.clone(), dtype: *dtype, shape: shape.clone(), data }
}

impl Drop for ShadowCopy {
    fn drop(&mut self) {
        self.candidate.tally.leave(self.bytes);
    }
}

impl ShadowCopy {
    /// Asks the candidate, and counts what comes of it.
    async fn run(mut self, max_wait: Duration) {
        let inputs = std::mem::take(&mut self.inputs);
        let Self { candidate, text, protocol, .. } = &self;
        priority::give_way();
        let start = Instant::now();
        let answer = ask(candidate, inputs, text, start + max_wait).await;
        let took = start.elapsed();
        priority::give_way();
        let count = |failure| candidate.metrics.request(*protocol, Way::Shadow, failure, took);
        match answer {
            Ok(outputs) => {
                count(None);
                candidate.tally.answered(Way::Shadow, took, &outputs);
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

async fn ask(
    candidate: &ModelVersion,
    inputs: Vec<Tensor>,
    text: &text::Wish,
    deadline: Instant,
) -> Result<Vec<Tensor>, Refused> {
    candidate.check_wish(text).map_err(Refused::Error)?;
    let arranged = candidate.signature.arrange(candidate.name.as_str(), inputs).map_err(Refused::Error)?;
    let lowest = candidate.schedule.priority_levels.into();
    let urgency = Urgency { priority: lowest, deadline: Some(deadline), timeout: None, client: COPIES };
    candidate.infer(arranged, &urgency, text).await
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
            priority::give_way();
            let busy = self.load.is_high(Instant::now(), usage::used);
            self.busy.store(busy, Ordering::Relaxed);
            for copy in handful.drain(..) {
                if busy {
                    copy.candidate.tally.shed(Shed::Busy);
                } else {
                    // It ends by the time that it may wait.
                    tokio::spawn(copy.run(self.config.max_wait));
                }
            }
            sleep(GATHERING).await;
        }
    }
}

/// How busy the processor is with anything but copies; and where the group of processes has a quota, how much of that
/// is used by all.
struct Load {
    cores: f64,
    quota: Option<f64>,
    limit: f64,
    looked: Instant,
    used: Used,
    is_high: bool,
}

impl Load {
    fn new(config: &ShadowConfig) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let quota = quota::of_this_process();
        Self {
            // The standard library rounds a quota down to whole processors, and up to one.
            cores: quota.unwrap_or(cores),
            quota,
            limit: config.max_cpu,
            looked: Instant::now(),
            used: usage::used(),
            is_high: config.max_cpu == 0.0,
        }
    }

    /// Whether the share of processor time `used` since the last look reaches a limit; looks again after [`LOOK`].
    fn is_high(&mut self, now: Instant, used: impl FnOnce() -> Used) -> bool {
        let passed = now.saturating_duration_since(self.looked);
        if passed >= LOOK {
            let used = used();
            let cores = |now: Duration, before: Duration| now.saturating_sub(before).div_duration_f64(passed);
            let insisting = cores(used.insisting, self.used.insisting) / self.cores;
            let of_quota = self.quota.map_or(0.0, |quota| cores(used.all, self.used.all) / quota);
            self.is_high = self.limit < 1.0 && (insisting >= self.limit || of_quota >= MAX_OF_QUOTA);
            (self.looked, self.used) = (now, used);
        }
        self.is_high
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn load(quota: Option<f64>, looked: Instant) -> Load {
        let used = Used { insisting: Duration::from_secs(5), all: Duration::from_secs(9) };
        Load { cores: quota.unwrap_or(2.0), quota, limit: 0.7, looked, used, is_high: false }
    }

    #[test]
    fn the_load_is_measured_since_the_last_look() {
        let start = Instant::now();
        let mut load = load(None, start);
        let mut used = load.used;
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
            used.insisting += Duration::from_secs_f64(more);
            used.all = used.insisting + (now - start);
            assert_eq!(load.is_high(now, || used), high, "{more} s in {passed} s");
            let soon = now + LOOK / 2;
            assert_eq!(load.is_high(soon, || unreachable!()), high, "so soon nobody looks again");
        }
    }

    #[test]
    fn a_quota_is_used_up_by_all_together() {
        let start = Instant::now();
        // Of each second, what insisted and what did not.
        for (quota, limit, insisting, idle, high) in [
            (Some(0.5), 0.7, 0.1, 0.34, false),
            (Some(0.5), 0.7, 0.1, 0.36, true),
            (Some(0.5), 0.7, 0.34, 0.0, false),
            (Some(0.5), 0.7, 0.36, 0.0, true),
            (Some(0.5), 1.0, 0.5, 0.0, false),
            (None, 0.7, 1.3, 0.7, false),
            (None, 1.0, 2.0, 0.0, false),
        ] {
            let mut load = Load { limit, ..load(quota, start) };
            let [insisting, idle] = [insisting, idle].map(Duration::from_secs_f64);
            let used = Used { insisting: load.used.insisting + insisting, all: load.used.all + insisting + idle };
            let found = load.is_high(start + Duration::from_secs(1), || used);
            assert_eq!(found, high, "{insisting:?} and {idle:?} of {quota:?}, limit {limit}");
        }
    }

    #[test]
    fn tensors_have_bytes_of_their_own() {
        let batch = Bytes::from(vec![7; 8 * SMALL]);
        let tensor = |data: Data, dtype, len: usize| Tensor::new("y".into(), dtype, [len].as_slice().into(), data);
        let plain = |size| tensor(Data::Plain(batch.slice(..size)), DType::Uint8, size).unwrap();
        let strings = [0..0, 1..3, 2..SMALL + 9].map(|range| batch.slice(range)).to_vec();
        let strings = tensor(Data::Strings(strings), DType::Bytes, 3).unwrap();
        let shares = |tensor: &Tensor| {
            let within = |bytes: &Bytes| batch.as_ptr_range().contains(&bytes.as_ptr());
            match &tensor.data {
                Data::Plain(bytes) => within(bytes),
                Data::Strings(strings) => strings.iter().any(within),
            }
        };
        for original in [plain(SMALL), plain(2 * SMALL), strings] {
            assert!(shares(&original));
            let copy = copied(&original);
            assert_eq!(copy, original);
            assert!(!shares(&copy), "{original:?}");
        }
        assert_eq!([SMALL, SMALL + 1].map(|size| shares(&kept(&plain(size)))), [false, true]);
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
