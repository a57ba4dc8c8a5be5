//! Executor threads: each brings a session, pulls batches from the version's queue, and answers its requests.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::{
    batcher::{Batcher, Cost, Entry},
    relay::{self, Answer, Outgoing, Relay},
};
use crate::{
    backend::Session,
    error::{Code, Error},
    id::ModelName,
    metrics::{DropReason, Phases, VersionMetrics},
    priority,
    tensor::Tensor,
};

/// A request on its way through the queue.
pub(super) struct Job {
    pub inputs: Vec<Tensor>,
    reply: oneshot::Sender<Answer>,
    /// The way back, if it came through one.
    relay: Option<Arc<Relay>>,
}

/// A request that brings its parts one after the other: a queue that is closed meanwhile takes the rest of them, too.
pub(super) struct Visit<'a> {
    queue: &'a Queue,
}

/// Why a request did not get into the queue.
pub enum Refused {
    /// The version takes no more requests; the inputs come back for another try elsewhere.
    Draining(Vec<Tensor>),
    Error(Error),
}

/// The queue between the I/O threads and the executors of one version.
///
/// Full means `Overloaded`; see `batcher::Limits`.
pub(super) struct Queue {
    state: Mutex<State>,
    work: Condvar,
    model: ModelName,
    /// Whether what a run is expected to take is what it takes.
    steady: bool,
    metrics: Arc<VersionMetrics>,
}

struct State {
    batcher: Batcher<Job>,
    closed: bool,
    /// What waited was given up, and nothing is taken any more.
    abandoned: bool,
    /// Requests that bring their parts one after the other.
    visits: usize,
    purged_at: Instant,
    /// The sessions of executors that wait for work.
    idle: Vec<Box<dyn Session>>,
    /// Executors of earlier shifts take no more batches.
    shift: u64,
}

/// How often a full queue is searched for requests that nobody waits for: rarely enough to keep refusals cheap.
const PURGE_INTERVAL: Duration = Duration::from_millis(10);

/// Runs that are expected to be over by then are done by the I/O thread that queued their requests, when it has nothing
/// else to do and a session is idle: handing them over takes two wakes, and longer than the run of a small model.
const AT_ONCE: Duration = Duration::from_micros(100);

/// The answer to come.
pub(super) struct Ticket {
    pub reply: oneshot::Receiver<Answer>,
}

impl Refused {
    /// The same of a request that had `inputs`.
    pub fn with(self, inputs: Vec<Tensor>) -> Self {
        match self {
            Self::Draining(_) => Self::Draining(inputs),
            error @ Self::Error(_) => error,
        }
    }
}

impl Queue {
    pub fn new(model: ModelName, steady: bool, batcher: Batcher<Job>, metrics: Arc<VersionMetrics>) -> Self {
        Self {
            state: Mutex::new(State {
                batcher,
                closed: false,
                abandoned: false,
                visits: 0,
                purged_at: Instant::now(),
                idle: Vec::new(),
                shift: 0,
            }),
            work: Condvar::new(),
            model,
            steady,
            metrics,
        }
    }

    /// Announces a request of which parts will be queued; `None` when no more requests are taken.
    pub fn enter(&self) -> Option<Visit<'_>> {
        let mut state = self.state.lock();
        if state.closed {
            return None;
        }
        state.visits += 1;
        Some(Visit { queue: self })
    }

    /// Whether a request of this cost would be queued now.
    ///
    /// # Errors
    /// As `submit`, which counts them as this does.
    pub fn check(&self, cost: &Cost) -> Result<(), Error> {
        let mut state = self.state.lock();
        let now = Instant::now();
        let mut checked = state.batcher.check(cost, now);
        if checked.is_err() && now.duration_since(state.purged_at) >= PURGE_INTERVAL {
            state.purged_at = now;
            self.drop_dead(state.batcher.purge(now, |job| job.reply.is_closed()));
            checked = state.batcher.check(cost, now);
        }
        drop(state);
        checked.inspect_err(|error| self.count_refusal(error))
    }

    fn count_refusal(&self, error: &Error) {
        let is_late = error.code == Code::DeadlineExceeded;
        self.metrics.dropped(if is_late { DropReason::Deadline } else { DropReason::Overloaded });
    }

    /// Queues a request, or a part of the one that the `visit` is for.
    pub fn submit(
        self: &Arc<Self>,
        inputs: Vec<Tensor>,
        cost: Cost,
        visit: Option<&Visit<'_>>,
    ) -> Result<Ticket, Refused> {
        let (sender, reply) = oneshot::channel();
        let mut state = self.state.lock();
        if state.abandoned || (state.closed && visit.is_none()) {
            return Err(Refused::Draining(inputs));
        }
        let now = Instant::now();
        let mut pushed = state.batcher.push(Job { inputs, reply: sender, relay: relay::here() }, cost.clone(), now);
        if let Err((job, error)) = pushed {
            pushed = if now.duration_since(state.purged_at) < PURGE_INTERVAL {
                Err((job, error))
            } else {
                state.purged_at = now;
                self.drop_dead(state.batcher.purge(now, |job| job.reply.is_closed()));
                state.batcher.push(job, cost, now)
            };
        }
        match pushed {
            Ok(displaced) => {
                let idle = !state.idle.is_empty();
                let urgent = state.batcher.fills_a_batch() && !self.is_quick(&state);
                drop(state);
                if idle {
                    relay::wake(self, urgent);
                }
                let mut answers = Outgoing::default();
                for (entry, error) in displaced {
                    self.metrics.dropped(DropReason::Displaced);
                    answers.add(entry.item, Err(error.of_model(self.model.as_str())));
                }
                Ok(Ticket { reply })
            }
            Err((_, error)) => {
                drop(state);
                self.count_refusal(&error);
                Err(Refused::Error(error))
            }
        }
    }

    /// Wakes an executor, if one waits.
    pub fn wake(&self) {
        self.work.notify_one();
    }

    /// Sees to it that what is queued runs: here and now if that is quickly done, else on an executor's thread.
    pub fn look_after(&self) {
        let mut state = self.state.lock();
        if !self.is_quick(&state) {
            drop(state);
            return self.wake();
        }
        let Some(mut session) = state.idle.pop() else { return };
        let start = Instant::now();
        let mut now = start;
        // What others have queued meanwhile may be more than is quickly done.
        while now.duration_since(start) < AT_ONCE && self.is_quick(&state) {
            let next = state.batcher.next(now, |job| job.reply.is_closed());
            drop(state);
            self.drop_dead(next.dropped);
            let done = (!next.batch.is_empty()).then(|| execute(self, session.as_mut(), now, next.batch, next.work));
            state = self.state.lock();
            now = Instant::now();
            if let Some(Done { start, work, took }) = done {
                state.batcher.finished(start, work, took);
            }
        }
        state.idle.push(session);
        if state.closed || !state.batcher.is_empty() {
            // An executor that looked meanwhile found no session.
            self.wake();
        }
    }

    /// Whether an I/O thread may run what is queued; the others of its connections wait meanwhile.
    fn is_quick(&self, state: &State) -> bool {
        self.steady && state.batcher.expected().is_some_and(|expected| expected <= AT_ONCE)
    }

    /// From now on no batch waits for company.
    pub fn hurry(&self) {
        self.state.lock().batcher.hurry();
        self.work.notify_all();
    }

    /// Takes no more requests; executors end when the queue is empty and no visitor will bring more.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        // Nobody comes any more for whom a batch could wait.
        state.batcher.hurry();
        drop(state);
        self.work.notify_all();
    }

    /// Gives up what still waits, with `error`.
    pub fn abandon(&self, error: &Error) -> usize {
        let mut state = self.state.lock();
        state.closed = true;
        state.abandoned = true;
        state.batcher.hurry();
        // Whoever waits for what visitors still have is to end.
        self.work.notify_all();
        let mut abandoned = 0;
        let mut answers = Outgoing::default();
        loop {
            let now = Instant::now();
            let next = state.batcher.next(now, |_| false);
            state.batcher.finished(now, next.work, None);
            if next.batch.is_empty() && next.dropped.is_empty() {
                return abandoned;
            }
            for entry in next.batch.into_iter().chain(next.dropped.into_iter().map(|(entry, _)| entry)) {
                abandoned += 1;
                answers.add(entry.item, Err(error.clone()));
            }
        }
    }

    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Whether what waited was given up.
    pub fn is_abandoned(&self) -> bool {
        self.state.lock().abandoned
    }

    pub fn len(&self) -> usize {
        self.state.lock().batcher.len()
    }

    /// Answers those whose queue timeout is over, even while every executor is busy.
    pub fn expire(&self) {
        let dropped = self.state.lock().batcher.expire(Instant::now(), |job| job.reply.is_closed());
        self.drop_dead(dropped);
    }

    /// Has the executors that there are end after their runs and leave their sessions to those of a new shift, whose
    /// number this is; there must be as many of them as sessions. `None` of a closed queue: they finish what is left.
    pub fn change_shift(&self) -> Option<u64> {
        let mut state = self.state.lock();
        if state.closed {
            return None;
        }
        state.shift += 1;
        let shift = state.shift;
        drop(state);
        self.work.notify_all();
        Some(shift)
    }

    /// Blocks until there is a batch, or says that the calling executor is to end: with a session when the queue is
    /// closed and empty, without one when its `shift` is over.
    fn take(&self, shift: u64, background: bool) -> Result<Taken, Option<Box<dyn Session>>> {
        let mut state = self.state.lock();
        loop {
            if background {
                // Before it holds anything that others wait for.
                MutexGuard::unlocked(&mut state, priority::give_way);
            }
            if state.shift != shift {
                // Its session lies there, and whoever woke it meant somebody who works.
                drop(state);
                self.work.notify_one();
                return Err(None);
            }
            let Some(session) = state.idle.pop() else {
                self.work.wait(&mut state);
                continue;
            };
            let now = Instant::now();
            let next = state.batcher.next(now, |job| job.reply.is_closed());
            let dropped = !next.dropped.is_empty();
            if dropped {
                self.drop_dead(next.dropped);
            }
            if !next.batch.is_empty() {
                if !state.idle.is_empty() && !state.batcher.is_empty() {
                    // One wake stands for many requests, and this thread may have been the only one with a timer for
                    // what still waits for company.
                    self.work.notify_one();
                }
                return Ok(Taken { session, start: now, batch: next.batch, work: next.work });
            }
            let over = next.wake_at.is_none() && !dropped && state.is_over();
            if over {
                return Err(Some(session));
            }
            state.idle.push(session);
            match next.wake_at {
                Some(instant) => drop(self.work.wait_until(&mut state, instant)),
                // A request may be given up between two looks at it; then those behind it have not been seen yet.
                None if dropped => {}
                None => self.work.wait(&mut state),
            }
        }
    }

    /// Leaves a session to whoever comes first.
    pub fn add(&self, session: Box<dyn Session>) {
        self.give_back(session, None);
    }

    /// Leaves a session to whoever comes first, after the run `done`.
    fn give_back(&self, session: Box<dyn Session>, done: Option<Done>) {
        let mut state = self.state.lock();
        if let Some(Done { start, work, took }) = done {
            state.batcher.finished(start, work, took);
        }
        state.idle.push(session);
    }

    fn drop_dead(&self, dropped: Vec<(Entry<Job>, DropReason)>) {
        let mut answers = Outgoing::default();
        for (entry, reason) in dropped {
            self.metrics.dropped(reason);
            let error = match reason {
                DropReason::Deadline => {
                    Error::new(Code::DeadlineExceeded, "the deadline could not be met: the request was still queued")
                }
                DropReason::Timeout => {
                    Error::new(Code::DeadlineExceeded, "the request waited too long (queue.default_timeout)")
                }
                _ => Error::new(Code::Cancelled, "the request was cancelled while it was queued"),
            };
            answers.add(entry.item, Err(error.of_model(self.model.as_str())));
        }
    }
}

impl State {
    /// Whether nothing will be queued any more.
    fn is_over(&self) -> bool {
        self.closed && (self.visits == 0 || self.abandoned)
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        state.visits -= 1;
        let over = state.is_over();
        drop(state);
        if over {
            self.queue.work.notify_all();
        }
    }
}

/// A batch and the session to run it.
struct Taken {
    session: Box<dyn Session>,
    start: Instant,
    batch: Vec<Entry<Job>>,
    work: usize,
}

/// A run that is over, and how long it took when it went well.
struct Done {
    start: Instant,
    work: usize,
    took: Option<Duration>,
}

/// How long an executor goes on before it offers its place to whoever waits for the core.
///
/// An I/O thread that has just had its turn is else not let in again before the next tick of the clock, up to 4 ms and
/// several runs later; and the next batch is to have what came meanwhile. On one core at 80 % load, with runs of 1 ms and
/// together with [`priority::be_patient`](crate::priority::be_patient): p99 from 1.74 to 1.27 of the ideal queue's, and
/// that of a light client beside a flooder from 2.1 to 0.6 of what it is alone. As its source has it, Linux makes whoever
/// offers its place wait for a slice when somebody takes it, 1 to 3 ms and more for a nice thread: short runs share one
/// offer. What that leaves them beside a busy I/O thread was not measured.
const TURN: Duration = Duration::from_millis(1);

/// Runs batches until the queue is closed and empty, when one of the version's sessions comes back, or until `shift` is
/// over. In the `background` it gives way to others, and what runs take depends on them: nothing is learnt from that.
pub(super) fn run(queue: &Queue, shift: u64, background: bool) -> Option<Box<dyn Session>> {
    let mut turn = Instant::now();
    loop {
        match queue.take(shift, background) {
            Ok(Taken { mut session, start, batch, work }) => {
                let Done { took, .. } = execute(queue, session.as_mut(), start, batch, work);
                queue.give_back(session, Some(Done { start, work, took: took.filter(|_| !background) }));
            }
            Err(session) => return session,
        }
        if turn.elapsed() >= TURN {
            std::thread::yield_now();
            turn = Instant::now();
        }
    }
}

/// Runs and answers one batch.
fn execute(queue: &Queue, session: &mut dyn Session, start: Instant, batch: Vec<Entry<Job>>, work: usize) -> Done {
    let rows = batch.iter().map(|entry| entry.cost.rows).sum();
    for entry in &batch {
        queue.metrics.queued(start.saturating_duration_since(entry.queued_at));
    }
    let tokens = batch.iter().map(|entry| entry.cost.lengths.tokens).sum();
    let jobs = batch.into_iter().map(|entry| entry.item).collect();
    // An I/O thread that runs it has connections to serve, and an executor a session to bring back.
    let took = std::panic::catch_unwind(AssertUnwindSafe(|| run_batch(queue, session, jobs, rows)));
    let took = took.unwrap_or_else(|_| {
        tracing::error!(model = %queue.model, rows, "a batch was lost to a panic");
        None
    });
    if took.is_some() && tokens > 0 {
        queue.metrics.read(tokens, work.saturating_sub(tokens));
    }
    Done { start, work, took }
}

/// The time of the run when it went well.
fn run_batch(queue: &Queue, session: &mut dyn Session, mut jobs: Vec<Job>, rows: usize) -> Option<Duration> {
    if jobs.len() == 1 {
        return run_alone(queue, session, jobs.pop()?, rows);
    }
    match run_together(session, &jobs, rows) {
        Ok((outputs, mut phases)) => {
            let scatter = Instant::now();
            let answers = split(&jobs, &outputs);
            phases.output += scatter.elapsed();
            queue.metrics.executed(jobs.len(), rows, phases);
            let mut outgoing = Outgoing::default();
            jobs.into_iter().zip(answers).for_each(|(job, outputs)| outgoing.add(job, Ok(outputs)));
            Some(phases.infer)
        }
        Err(error) => {
            // Only the offender shall get the error: its neighbours run again, each by itself.
            tracing::debug!(model = %queue.model, requests = jobs.len(), %error, "batch failed, running its requests one by one");
            for job in jobs {
                if job.reply.is_closed() {
                    queue.metrics.dropped(DropReason::Cancelled);
                    continue;
                }
                let rows = job_rows(&job);
                run_alone(queue, session, job, rows);
            }
            None
        }
    }
}

fn run_alone(queue: &Queue, session: &mut dyn Session, job: Job, rows: usize) -> Option<Duration> {
    let start = Instant::now();
    let result = guarded(session, &job.inputs);
    let took = start.elapsed();
    match result {
        Ok(mut outputs) => {
            let no_rows = job.inputs.first().is_some_and(|input| input.shape.first() == Some(&0));
            if no_rows && session.signature().unbatchable().is_none() {
                // Some graphs give rows where none were asked for.
                outputs
                    .iter_mut()
                    .filter(|output| !output.shape.is_empty())
                    .for_each(|output| *output = output.slice(0, 0));
            }
            queue.metrics.executed(1, rows, Phases { infer: took, ..Phases::default() });
            Outgoing::default().add(job, Ok(outputs));
            Some(took)
        }
        Err(error) => {
            Outgoing::default().add(job, Err(error.of_model(queue.model.as_str())));
            None
        }
    }
}

fn run_together(session: &mut dyn Session, jobs: &[Job], rows: usize) -> Result<(Vec<Tensor>, Phases), Error> {
    let gather = Instant::now();
    let inputs = session.gather(&jobs.iter().map(|job| &job.inputs[..]).collect::<Vec<_>>());
    let infer = Instant::now();
    let outputs = guarded(session, &inputs)?;
    let phases = Phases { input: infer - gather, infer: infer.elapsed(), output: Duration::ZERO };
    if let Some(odd) = outputs.iter().find(|output| output.shape.is_empty() || output.rows() != rows) {
        return Err(Error::internal(format!(
            "output '{}' has shape {:?} for a batch of {rows} rows",
            odd.name,
            &odd.shape[..]
        )));
    }
    Ok((outputs, phases))
}

fn split(jobs: &[Job], outputs: &[Tensor]) -> Vec<Vec<Tensor>> {
    let mut start = 0;
    jobs.iter()
        .map(|job| {
            let count = job_rows(job);
            let answer = outputs.iter().map(|output| output.slice(start, count)).collect();
            start += count;
            answer
        })
        .collect()
}

fn job_rows(job: &Job) -> usize {
    job.inputs.first().map_or(1, Tensor::rows)
}

/// A panic in a backend costs the request that met it, not the executor.
fn guarded(session: &mut dyn Session, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
    std::panic::catch_unwind(AssertUnwindSafe(|| session.run(inputs)))
        .unwrap_or_else(|_| Err(Error::internal("the backend panicked")))
}

impl Outgoing {
    fn add(&mut self, job: Job, answer: Answer) {
        self.send(job.relay, job.reply, answer);
    }
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
