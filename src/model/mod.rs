//! A model in memory: its versions from load to unload, its queue, and the threads that run it.

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub mod batcher;
pub mod catalog;
mod crew;
mod desk;
mod executor;
mod file;
pub mod golden;
pub mod labels;
pub mod load;
mod promised;
pub mod relay;
pub mod schedule;
pub mod service_time;
mod texts;
pub mod warmup;
mod watch;

use batcher::{Batcher, Cost, Lengths, Limits, ShapeKey};
use crew::Crew;
use desk::Desk;
pub use executor::Refused;
use executor::{Queue, Ticket, Visit};
use load::{Facts, Loaded};
use schedule::{Level, Place, TimeoutAction, Urgency};

use crate::{
    error::{Code, Error},
    metrics::VersionMetrics,
    observe::Tally,
    tensor::Tensor,
    text::{Front, Part, Wish},
};

/// Bounds of each version's queue, and who shares it. A request for which it has no room is answered at once with
/// "overloaded"; those of clients with more waiting make room for those of others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct QueueConfig {
    /// Rows that one request may have where its model sets no `max_batch_size`.
    pub max_rows: usize,
    /// Requests that may wait per version; beside them as many of one client's whose long texts are to become tokens, and less
    /// than twice as many of all clients'.
    pub max_requests: usize,
    /// Bytes of tensors that may wait per version; beside them as many of long texts and their tokens (estimated), as with requests.
    pub max_bytes: usize,
    /// Longest estimated wait at which a request is still queued; and how long one of long texts may wait for its first turn
    /// to become tokens.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_wait: Duration,
    /// Header (gRPC: metadata key) whose value names the client, for a server behind a proxy that sets it. Waiting
    /// requests of clients run in turns, so that none waits for another's whole backlog. Default, and for requests
    /// without it: each connection is a client.
    pub client_header: Option<String>,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            max_rows: 65_536,
            max_requests: 8192,
            max_bytes: 1 << 30,
            max_wait: Duration::from_secs(30),
            client_header: None,
        }
    }
}

impl From<&QueueConfig> for Limits {
    fn from(config: &QueueConfig) -> Self {
        let QueueConfig { max_rows, max_requests, max_bytes, max_wait, .. } = *config;
        Limits { max_rows, max_requests, max_bytes, max_wait }
    }
}

/// Where a version is on its way; its name is what metrics, index and `tidegate models` show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Files are there and must stay unchanged for a moment before they are trusted.
    Settling,
    /// Being loaded and warmed.
    Loading,
    /// Serving.
    Ready,
    /// Takes no more requests and finishes those it has.
    Draining,
    /// Could not be loaded; the reason says why.
    Failed,
    /// Not loaded by itself, because it was given up before or came at the wrong time; the reason says which.
    Held,
}

impl State {
    /// The names of all states.
    pub const NAMES: [&'static str; 6] = ["settling", "loading", "ready", "draining", "failed", "held"];

    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// Whether and why requests of a version share runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Batching {
    /// Rows that are grouped at most; 1 when requests do not share runs.
    pub group: usize,
    /// Tokens of each of these rows, where rows have lengths: of others there are as many as have no more tokens together,
    /// padding included. Else 1.
    pub row: usize,
    pub enabled: bool,
    /// One sentence for operators.
    pub reason: String,
}

/// A version that serves: a queue and the executors behind it. What is known of it reads as its own.
pub struct ModelVersion {
    facts: Facts,
    /// Whether the first dimension of everything is the request's to choose, so that requests have rows.
    has_rows: bool,
    /// Rows one request may have when its author set no limit.
    max_rows: usize,
    /// Requests that may wait, and bytes of tensors.
    max_requests: usize,
    max_bytes: usize,
    /// What the schedule says of each level of priority.
    levels: Vec<Level>,
    pub instances: usize,
    /// When it was loaded.
    pub since: SystemTime,
    pub metrics: Arc<VersionMetrics>,
    /// What it did, for those who judge it.
    pub tally: Tally,
    /// Where long texts wait to become tokens.
    desk: Arc<Desk>,
    queue: Arc<Queue>,
    crew: Mutex<Crew>,
    in_flight: Arc<AtomicUsize>,
}

impl Deref for ModelVersion {
    type Target = Facts;

    fn deref(&self) -> &Facts {
        &self.facts
    }
}

impl ModelVersion {
    /// Starts the executor threads of a loaded model.
    ///
    /// # Errors
    /// `Internal` when the system gives no thread.
    pub fn start(loaded: Loaded, limits: Limits, metrics: Arc<VersionMetrics>) -> Result<Self, Error> {
        let Loaded { facts, sessions, service } = loaded;
        let instances = sessions.len();
        let Batching { group, row, .. } = facts.batching;
        let mut batcher = Batcher::new(limits, &facts.schedule, group * row, instances, service);
        if facts.text.is_some() {
            batcher = batcher.with_lengths(row, facts.max_batch_size.unwrap_or(usize::MAX));
        }
        let queue = Arc::new(Queue::new(facts.name.clone(), facts.signature.steady, batcher, metrics.clone()));
        metrics.loaded(facts.load_duration);
        metrics.prepare();
        sessions.into_iter().for_each(|session| queue.add(session));
        let crew = Crew::start(queue.clone(), &facts.name, instances)?;
        Ok(Self {
            has_rows: facts.signature.unbatchable().is_none(),
            tally: Tally::new(&facts.signature),
            max_rows: limits.max_rows,
            max_requests: limits.max_requests,
            max_bytes: limits.max_bytes,
            levels: facts.schedule.levels(),
            facts,
            instances,
            since: SystemTime::now(),
            desk: Desk::new(limits),
            metrics,
            queue,
            crew: Mutex::new(crew),
            in_flight: Arc::default(),
        })
    }

    /// Runs `inputs`, which must match the signature and stand in its order; the outputs are in its order too.
    ///
    /// Dropping the future gives the request up before it costs a run.
    ///
    /// # Errors
    /// `Refused::Draining` when the version takes no more requests (look for its successor), else what went wrong.
    #[expect(clippy::manual_async_fn, reason = "an async fn keeps what it is given twice")]
    pub fn infer<'a>(
        &'a self,
        inputs: Vec<Tensor>,
        urgency: &'a Urgency,
        wish: &'a Wish,
    ) -> impl Future<Output = Result<Vec<Tensor>, Refused>> + Send + 'a {
        async move {
            match &self.text {
                None => self.run(inputs, urgency, None).await,
                Some(front) if Front::is_text(&inputs) => Box::pin(self.run_text(front, inputs, urgency, wish)).await,
                Some(front) => Box::pin(self.run_tokens(front, inputs, urgency, wish)).await,
            }
        }
    }

    /// Whether the model can do as a request wants.
    ///
    /// # Errors
    /// `Unimplemented` naming what it cannot.
    pub fn check_wish(&self, wish: &Wish) -> Result<(), Error> {
        let checked = match &self.text {
            None => wish.check_without_tokenizer(),
            Some(front) => front.check_wish(wish),
        };
        checked.map_err(|error| error.of_model(self.name.as_str()))
    }

    #[expect(clippy::manual_async_fn, reason = "an async fn keeps what it is given twice")]
    fn run<'a>(
        &'a self,
        inputs: Vec<Tensor>,
        urgency: &'a Urgency,
        piece: Option<&'a Piece<'a>>,
    ) -> impl Future<Output = Result<Vec<Tensor>, Refused>> + Send + 'a {
        async move {
            let cost = self.cost(&inputs, piece, urgency).map_err(Refused::Error)?;
            let place = cost.place;
            let ticket =
                self.queue.submit(inputs, cost, piece.map(|piece| piece.visit)).map_err(|refused| match refused {
                    Refused::Error(error) => Refused::Error(error.of_model(self.name.as_str())),
                    draining => draining,
                })?;
            let _pending = Pending::new(self);
            let answer = self.answer(ticket, place);
            let answer = match place.deadline {
                None => answer.await,
                Some(deadline) => {
                    tokio::time::timeout_at(deadline.into(), answer).await.unwrap_or_else(|_| Err(self.too_late()))
                }
            };
            answer.map_err(Refused::Error)
        }
    }

    /// Waits for what an executor answers. Who has to leave the queue at some instant does so then, though no
    /// executor may have the time to look.
    async fn answer(&self, mut ticket: Ticket, place: Place) -> Result<Vec<Tensor>, Error> {
        let gone = |_| Err(Error::internal("the executor is gone"));
        let rejected = self.levels[place.level].timeout_action == TimeoutAction::Reject;
        if let Some(expires) = place.expires.filter(|_| rejected) {
            match tokio::time::timeout_at(expires.into(), &mut ticket.reply).await {
                Ok(answer) => return answer.unwrap_or_else(gone),
                Err(_) => self.queue.expire(),
            }
        }
        ticket.reply.await.unwrap_or_else(gone)
    }

    /// What `work` comes to, unless a deadline passes before.
    async fn in_time<T>(
        &self,
        deadline: Option<Instant>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match deadline {
            None => work.await,
            Some(deadline) => {
                tokio::time::timeout_at(deadline.into(), work).await.unwrap_or_else(|_| Err(self.too_late()))
            }
        }
    }

    fn too_late(&self) -> Error {
        Error::new(Code::DeadlineExceeded, format!("model '{}': the deadline passed before the answer", self.name))
    }

    fn cost(&self, inputs: &[Tensor], piece: Option<&Piece<'_>>, urgency: &Urgency) -> Result<Cost, Error> {
        let level = self.schedule.level(urgency.priority);
        let rows = if self.has_rows { inputs.first().map_or(1, Tensor::rows) } else { 1 };
        let uneven = inputs.iter().any(|input| input.rows() != rows);
        let empty = inputs.iter().any(|input| input.shape.contains(&0));
        self.check_rows(inputs)?;
        let trailing = |input: &Tensor| input.shape.iter().skip(1).copied().collect::<ShapeKey>();
        let mut shape: ShapeKey = match &self.text {
            // Texts are all alike that can be padded, but for what is wanted of them.
            Some(front) if front.pads() => ShapeKey::from_slice(&[inputs.len()]),
            _ => inputs.iter().flat_map(trailing).collect(),
        };
        // Requests that leave out different inputs cannot share a run.
        let given = |name: &Arc<str>| usize::from(inputs.iter().any(|input| input.name == *name));
        shape.extend(self.signature.optional.iter().map(given));
        Ok(Cost {
            // An empty tensor may claim any number of rows.
            rows: if empty { 0 } else { rows },
            lengths: piece.map_or(Lengths::NONE, |piece| piece.part.lengths),
            follows: piece.is_some_and(|piece| piece.follows),
            bytes: inputs.iter().map(Tensor::byte_len).sum(),
            shape,
            alone: !self.batching.enabled || uneven || empty,
            place: self.levels[level].place(level, urgency, Instant::now()),
            client: urgency.client,
        })
    }

    /// A graph takes memory for each row, even for one that has no elements.
    fn check_rows(&self, inputs: &[Tensor]) -> Result<(), Error> {
        let (limit, key) = match self.max_batch_size {
            Some(limit) => (limit, "max_batch_size"),
            None => (self.max_rows, "queue.max_rows"),
        };
        let most = inputs.iter().map(Tensor::rows).max().filter(|&rows| self.has_rows && rows > limit);
        most.map_or(Ok(()), |rows| {
            let message = format!("a request may have {limit} rows at most ({key}), got {rows}");
            Err(Error::invalid(message).of_model(self.name.as_str()))
        })
    }

    /// Has the executors run when nothing else wants the processor, for a version that gets only copies; or as usual,
    /// for one that people wait for. Takes as long as starting a thread for each instance, and no request notices.
    ///
    /// Threads get the class of whoever starts them, so the caller's must be the usual one.
    ///
    /// # Errors
    /// `Internal` when the system gives no thread; then all is as it was.
    pub fn set_background(&self, background: bool) -> Result<(), Error> {
        // A version that drains keeps the threads it has, and its crew is being waited for.
        if self.queue.is_closed() { Ok(()) } else { self.crew.lock().set_background(background) }
    }

    /// From now on no batch waits for company.
    pub fn hurry(&self) {
        self.queue.hurry();
    }

    /// Takes no more requests; those already in the queue are answered.
    pub fn close(&self) {
        self.queue.close();
    }

    /// Waits until every queued request is answered and the sessions are gone, which may take `limit`; then gives
    /// up what still waits. Blocks: not for I/O threads. Returns the number of requests that were cut short.
    pub fn drain(&self, limit: Duration) -> usize {
        self.close();
        if self.crew.lock().has_ended(limit) {
            return 0;
        }
        // Threads that are inside a run cannot be stopped; they end by themselves after it.
        let waiting = self.queue.len();
        tracing::warn!(model = %self.name, version = %self.version, waiting, "drain deadline passed");
        self.queue.abandon(&Error::new(
            Code::NotReady,
            format!("model '{}' version '{}' was unloaded before the request could run", self.name, self.version),
        ))
    }

    /// Whether the first dimension of the output counts rows: in models that have rows it always does, in others
    /// where the graph leaves it open and has more dimensions behind it.
    pub fn counts_rows(&self, output: &str) -> bool {
        let spec = self.signature.outputs.iter().find(|spec| *spec.name == *output);
        let open = spec.is_some_and(|spec| spec.shape.len() > 1 && spec.shape[0] < 0);
        self.has_rows || open
    }

    /// Requests submitted and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }
}

impl Drop for ModelVersion {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// A part of a request, and the request's announcement.
struct Piece<'a> {
    part: &'a Part,
    visit: &'a Visit<'a>,
    /// Whether another one was queued before.
    follows: bool,
}

/// Counts a request as pending while it lives.
struct Pending {
    metrics: Arc<VersionMetrics>,
    in_flight: Arc<AtomicUsize>,
}

impl Pending {
    fn new(version: &ModelVersion) -> Self {
        version.metrics.submitted();
        version.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { metrics: version.metrics.clone(), in_flight: version.in_flight.clone() }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.metrics.answered();
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
