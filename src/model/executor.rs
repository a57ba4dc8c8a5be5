//! Executor threads: each owns a session, pulls batches from the version's queue, and answers its requests.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::batcher::{Batcher, Cost, Entry};
use crate::{
    backend::Session,
    error::{Code, Error},
    id::ModelName,
    metrics::{DropReason, Phases, VersionMetrics},
    tensor::{self, Tensor},
};

/// A request on its way through the queue.
pub(super) struct Job {
    pub inputs: Vec<Tensor>,
    reply: oneshot::Sender<Result<Vec<Tensor>, Error>>,
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
    metrics: Arc<VersionMetrics>,
}

struct State {
    batcher: Batcher<Job>,
    closed: bool,
    purged_at: Instant,
}

/// How often a full queue is searched for requests that nobody waits for: rarely enough to keep refusals cheap.
const PURGE_INTERVAL: Duration = Duration::from_millis(10);

/// The answer to come.
pub(super) struct Ticket {
    pub reply: oneshot::Receiver<Result<Vec<Tensor>, Error>>,
}

impl Queue {
    pub fn new(model: ModelName, batcher: Batcher<Job>, metrics: Arc<VersionMetrics>) -> Self {
        Self {
            state: Mutex::new(State { batcher, closed: false, purged_at: Instant::now() }),
            work: Condvar::new(),
            model,
            metrics,
        }
    }

    pub fn submit(&self, inputs: Vec<Tensor>, cost: Cost) -> Result<Ticket, Refused> {
        let (sender, reply) = oneshot::channel();
        let mut state = self.state.lock();
        if state.closed {
            return Err(Refused::Draining(inputs));
        }
        let now = Instant::now();
        let mut pushed = state.batcher.push(Job { inputs, reply: sender }, cost.clone(), now);
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
                drop(state);
                self.work.notify_one();
                for (entry, error) in displaced {
                    self.metrics.dropped(DropReason::Displaced);
                    answer(entry.item, Err(error.of_model(self.model.as_str())));
                }
                Ok(Ticket { reply })
            }
            Err((_, error)) => {
                drop(state);
                let deadline = error.code == Code::DeadlineExceeded;
                self.metrics.dropped(if deadline { DropReason::Deadline } else { DropReason::Overloaded });
                Err(Refused::Error(error))
            }
        }
    }

    /// From now on no batch waits for company.
    pub fn hurry(&self) {
        self.state.lock().batcher.hurry();
        self.work.notify_all();
    }

    /// Takes no more requests; executors end when the queue is empty.
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
        state.batcher.hurry();
        let mut abandoned = 0;
        loop {
            let now = Instant::now();
            let next = state.batcher.next(now, |_| false);
            let rows = next.batch.iter().map(|entry| entry.cost.rows).sum();
            state.batcher.finished(now, rows, None);
            if next.batch.is_empty() && next.dropped.is_empty() {
                return abandoned;
            }
            for entry in next.batch.into_iter().chain(next.dropped.into_iter().map(|(entry, _)| entry)) {
                abandoned += 1;
                answer(entry.item, Err(error.clone()));
            }
        }
    }

    pub fn len(&self) -> usize {
        self.state.lock().batcher.len()
    }

    /// Answers those whose queue timeout is over, even while every executor is busy.
    pub fn expire(&self) {
        let dropped = self.state.lock().batcher.expire(Instant::now(), |job| job.reply.is_closed());
        self.drop_dead(dropped);
    }

    /// Blocks until there is a batch; `None` when the queue is closed and empty.
    fn take(&self) -> Option<(Instant, Vec<Entry<Job>>)> {
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            let next = state.batcher.next(now, |job| job.reply.is_closed());
            let dropped = !next.dropped.is_empty();
            if dropped {
                self.drop_dead(next.dropped);
            }
            if !next.batch.is_empty() {
                if state.batcher.holds_back() {
                    // This thread may have been the only one with a timer for what still waits for company.
                    self.work.notify_one();
                }
                return Some((now, next.batch));
            }
            match next.wake_at {
                Some(instant) => drop(self.work.wait_until(&mut state, instant)),
                // A request may be given up between two looks at it; then those behind it have not been seen yet.
                None if dropped => {}
                None if state.closed => return None,
                None => self.work.wait(&mut state),
            }
        }
    }

    fn drop_dead(&self, dropped: Vec<(Entry<Job>, DropReason)>) {
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
            answer(entry.item, Err(error.of_model(self.model.as_str())));
        }
    }

    fn finished(&self, start: Instant, rows: usize, took: Option<Duration>) {
        self.state.lock().batcher.finished(start, rows, took);
    }
}

/// Runs batches until the queue is closed and empty.
pub(super) fn run(queue: &Queue, session: &mut dyn Session, model: &str) {
    while let Some((start, batch)) = queue.take() {
        let rows = batch.iter().map(|entry| entry.cost.rows).sum();
        for entry in &batch {
            queue.metrics.queued(start.saturating_duration_since(entry.queued_at));
        }
        let jobs: Vec<Job> = batch.into_iter().map(|entry| entry.item).collect();
        let took = execute(queue, session, model, jobs, rows);
        queue.finished(start, rows, took);
    }
}

/// Runs and answers one batch; the time of the run when it went well.
fn execute(queue: &Queue, session: &mut dyn Session, model: &str, mut jobs: Vec<Job>, rows: usize) -> Option<Duration> {
    if jobs.len() == 1 {
        let job = jobs.pop()?;
        return run_alone(queue, session, model, job, rows);
    }
    match run_together(session, &jobs, rows) {
        Ok((outputs, mut phases)) => {
            let scatter = Instant::now();
            let answers = split(&jobs, &outputs);
            phases.output += scatter.elapsed();
            queue.metrics.executed(jobs.len(), rows, phases);
            jobs.into_iter().zip(answers).for_each(|(job, outputs)| answer(job, Ok(outputs)));
            Some(phases.infer)
        }
        Err(error) => {
            // Only the offender shall get the error: its neighbours run again, each by itself.
            tracing::debug!(model, requests = jobs.len(), %error, "batch failed, running its requests one by one");
            for job in jobs {
                if job.reply.is_closed() {
                    queue.metrics.dropped(DropReason::Cancelled);
                    continue;
                }
                let rows = job_rows(&job);
                run_alone(queue, session, model, job, rows);
            }
            None
        }
    }
}

fn run_alone(queue: &Queue, session: &mut dyn Session, model: &str, job: Job, rows: usize) -> Option<Duration> {
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
            answer(job, Ok(outputs));
            Some(took)
        }
        Err(error) => {
            answer(job, Err(error.of_model(model)));
            None
        }
    }
}

fn run_together(session: &mut dyn Session, jobs: &[Job], rows: usize) -> Result<(Vec<Tensor>, Phases), Error> {
    let gather = Instant::now();
    let inputs: Vec<Tensor> = (0..jobs[0].inputs.len())
        .map(|input| tensor::gather(&jobs.iter().map(|job| &job.inputs[input]).collect::<Vec<_>>()))
        .collect();
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

fn answer(job: Job, result: Result<Vec<Tensor>, Error>) {
    // Whoever asked may have gone; then nobody misses the answer.
    let _ = job.reply.send(result);
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;
    use crate::{
        backend::Signature,
        metrics::Metrics,
        model::{
            batcher::{Client, Limits, ShapeKey},
            schedule::{Place, Schedule},
            service_time::ServiceTime,
        },
        tensor::{DType, Data},
    };

    /// Longer than any test takes.
    const NEVER: Duration = Duration::from_secs(3600);
    /// Longer than a machine that is busy with other things holds a test up.
    const SOON: Duration = Duration::from_secs(20);

    /// Echoes, and tells how many rows each run had; a run waits for `gate` when it has as many columns as rows.
    struct Echo {
        signature: Signature,
        runs: mpsc::Sender<usize>,
        gate: Arc<Mutex<()>>,
    }

    impl Session for Echo {
        fn signature(&self) -> &Signature {
            &self.signature
        }

        fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
            let shape = &inputs[0].shape;
            self.runs.send(shape[0]).unwrap();
            if shape[0] == shape[1] {
                drop(self.gate.lock());
            }
            Ok(inputs.to_vec())
        }
    }

    /// A queue with executors behind it.
    struct Line {
        queue: Arc<Queue>,
        gate: Arc<Mutex<()>>,
        runs: mpsc::Receiver<usize>,
        executors: Vec<thread::JoinHandle<()>>,
    }

    impl Line {
        fn new(schedule: &str, group: usize, executors: usize) -> Self {
            let schedule: Schedule = toml::from_str(schedule).unwrap();
            let limits = Limits { max_rows: 100, max_requests: 100, max_bytes: 1 << 20, max_wait: NEVER };
            let batcher = Batcher::new(limits, &schedule, group, executors, ServiceTime::default());
            let metrics = Metrics::new("test", "none").version("m", "1");
            let queue = Arc::new(Queue::new(ModelName::parse("m").unwrap(), batcher, metrics));
            let (sender, runs) = mpsc::channel();
            let gate = Arc::new(Mutex::new(()));
            let executor = |_| {
                let mut echo = Echo { signature: Signature::default(), runs: sender.clone(), gate: gate.clone() };
                let queue = queue.clone();
                thread::spawn(move || run(&queue, &mut echo, "m"))
            };
            let executors = (0..executors).map(executor).collect();
            Self { queue, gate, runs, executors }
        }

        fn submit(&self, columns: usize) -> Ticket {
            let data = Data::Plain(vec![0; 4 * columns].into());
            let input = Tensor::new("x".into(), DType::Fp32, [1, columns].as_slice().into(), data).unwrap();
            let shape = ShapeKey::from_slice(&[columns]);
            let cost =
                Cost { rows: 1, bytes: 4, shape, alone: false, place: Place::default(), client: Client::default() };
            self.queue.submit(vec![input], cost).ok().unwrap()
        }

        /// Lets the executors finish what is queued.
        fn end(self) {
            self.queue.close();
            self.executors.into_iter().for_each(|executor| executor.join().unwrap());
        }
    }

    #[test]
    fn a_lone_request_runs_when_the_delay_is_over() {
        let line = Line::new("max_delay = '50ms'", 8, 1);
        for _ in 0..2 {
            let start = Instant::now();
            line.submit(3).reply.blocking_recv().unwrap().unwrap();
            assert!(start.elapsed() >= Duration::from_millis(50), "{:?}", start.elapsed());
            assert_eq!(line.runs.recv_timeout(SOON), Ok(1));
        }
        line.end();
    }

    #[test]
    fn the_request_that_completes_a_batch_starts_it() {
        let line = Line::new("max_delay = '1h'\npreferred_batch_sizes = [4]", 4, 1);
        let tickets: Vec<Ticket> = (0..4).map(|_| line.submit(3)).collect();
        for ticket in tickets {
            ticket.reply.blocking_recv().unwrap().unwrap();
        }
        assert_eq!(line.runs.recv_timeout(SOON), Ok(4));
        line.end();
    }

    #[test]
    fn what_waits_is_watched_though_one_executor_goes_off_with_a_batch() {
        let line = Line::new("max_delay = '100ms'", 2, 2);
        let closed = line.gate.lock();
        let lone = line.submit(3);
        let pair = [line.submit(2), line.submit(2)];
        assert_eq!(line.runs.recv_timeout(SOON), Ok(2));
        assert_eq!(line.runs.recv_timeout(SOON), Ok(1), "while the other executor is held up");
        lone.reply.blocking_recv().unwrap().unwrap();
        drop(closed);
        for ticket in pair {
            ticket.reply.blocking_recv().unwrap().unwrap();
        }
        line.end();
    }

    #[test]
    fn draining_does_not_wait_for_company() {
        let line = Line::new("max_delay = '1h'", 8, 2);
        let tickets = [line.submit(3), line.submit(4)];
        line.end();
        for ticket in tickets {
            ticket.reply.blocking_recv().unwrap().unwrap();
        }
    }

    #[test]
    fn who_is_given_up_is_not_waited_for() {
        let line = Line::new("max_delay = '1h'", 2, 1);
        drop(line.submit(3));
        let pair = [line.submit(3), line.submit(3)];
        for ticket in pair {
            ticket.reply.blocking_recv().unwrap().unwrap();
        }
        assert_eq!(line.runs.recv_timeout(SOON), Ok(2));
        line.end();
    }

    #[test]
    fn abandoned_requests_hear_of_it() {
        let line = Line::new("max_delay = '1h'", 8, 1);
        let waiting = line.submit(3);
        assert_eq!(line.queue.abandon(&Error::internal("gone")), 1);
        assert_eq!(waiting.reply.blocking_recv().unwrap().unwrap_err().message, "gone");
        line.end();
    }
}
