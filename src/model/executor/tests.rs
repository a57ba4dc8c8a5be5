use std::{sync::mpsc, thread};

use super::{
    testing::{cost, submit},
    *,
};
use crate::{
    backend::Signature,
    metrics::Metrics,
    model::{batcher::Limits, schedule::Schedule, service_time::ServiceTime},
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
    /// The thread of the last run.
    thread: Arc<Mutex<Option<thread::ThreadId>>>,
}

impl Session for Echo {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let shape = &inputs[0].shape;
        *self.thread.lock() = Some(thread::current().id());
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
    thread: Arc<Mutex<Option<thread::ThreadId>>>,
    executors: Vec<thread::JoinHandle<()>>,
}

impl Line {
    fn new(schedule: &str, group: usize, executors: usize) -> Self {
        Self::expecting(ServiceTime::default(), true, schedule, group, executors)
    }

    fn expecting(service: ServiceTime, steady: bool, schedule: &str, group: usize, executors: usize) -> Self {
        let schedule: Schedule = toml::from_str(schedule).unwrap();
        let limits = Limits { max_rows: 100, max_requests: 100, max_bytes: 1 << 20, max_wait: NEVER };
        let batcher = Batcher::new(limits, &schedule, group, executors, service);
        let metrics = Metrics::new("test", "none").version("m", "1");
        let queue = Arc::new(Queue::new(ModelName::parse("m").unwrap(), steady, batcher, metrics));
        let (sender, runs) = mpsc::channel();
        let gate = Arc::new(Mutex::new(()));
        let thread = Arc::default();
        let executor = |_| {
            let (runs, gate, thread) = (sender.clone(), gate.clone(), Arc::clone(&thread));
            let echo = Echo { signature: Signature::default(), runs, gate, thread };
            queue.add(Box::new(echo));
            let queue = queue.clone();
            thread::spawn(move || drop(run(&queue, 0, false)))
        };
        let executors = (0..executors).map(executor).collect();
        Self { queue, gate, runs, thread, executors }
    }

    fn submit(&self, columns: usize) -> Ticket {
        self.submit_for(None, columns).ok().unwrap()
    }

    fn submit_for(&self, visit: Option<&Visit<'_>>, columns: usize) -> Result<Ticket, Refused> {
        submit(&self.queue, visit, columns)
    }

    /// Lets the executors finish what is queued.
    fn end(self) {
        self.queue.close();
        self.executors.into_iter().for_each(|executor| executor.join().unwrap());
    }
}

#[test]
fn what_would_not_be_queued_is_known_beforehand() {
    let line = Line::new("", 1, 0);
    assert_eq!(line.queue.check(&cost(1)), Ok(()));
    let mut tickets: Vec<Ticket> = (0..100).map(|_| line.submit(1)).collect();
    assert_eq!(line.queue.check(&cost(1)).unwrap_err().code, Code::Overloaded);
    // As for those that are queued, who has left makes room sooner or later.
    tickets.pop();
    let begin = Instant::now();
    while line.queue.check(&cost(1)).is_err() {
        assert!(begin.elapsed() < SOON, "nobody has looked for those who left");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_io_thread_wakes_an_executor_for_all_it_has_and_not_for_each_request() {
    let line = Line::new("", 64, 1);
    let io_thread = relay::runtime().build().unwrap();
    let submit = |count| {
        while line.queue.state.lock().idle.is_empty() {
            thread::yield_now();
        }
        (0..count).map(|_| line.submit(3)).collect::<Vec<Ticket>>()
    };
    // An executor that has brought its session back, and does not wait yet, may see the first ones before all came.
    let gathers = async |count, expected: std::ops::RangeInclusive<usize>| {
        for _ in 0..5 {
            for ticket in submit(count) {
                ticket.reply.await.unwrap().unwrap();
            }
            if line.runs.try_iter().next().is_some_and(|rows| expected.contains(&rows)) {
                return true;
            }
        }
        false
    };
    io_thread.block_on(relay::relayed(async {
        assert!(gathers(20, 20..=20).await);
        // A thread that does not come to rest keeps nobody waiting.
        assert!(gathers(40, 32..=40).await);
    }));
    line.end();
}

/// Whether the I/O thread itself runs `count` requests that come at once.
fn runs_itself(mut io_thread: tokio::runtime::Builder, per_row: Duration, steady: bool, count: usize) -> bool {
    let service = ServiceTime::from_sweep(&[(1, per_row), (8, per_row * 8)]);
    let line = Line::expecting(service, steady, "", 8, 1);
    let here = io_thread.build().unwrap().block_on(relay::relayed(async {
        let tickets: Vec<Ticket> = (0..count).map(|_| line.submit(3)).collect();
        for ticket in tickets {
            ticket.reply.await.unwrap().unwrap();
        }
        *line.thread.lock() == Some(thread::current().id())
    }));
    assert_eq!(line.queue.len(), 0);
    line.end();
    here
}

#[test]
fn an_io_thread_runs_small_batches_itself() {
    for (runtime, per_row, steady, itself) in [
        (relay::runtime as fn() -> _, 1, true, true),
        // So long that none is short even when the executor has run eleven, and all of them took no time.
        (relay::runtime, 2000, true, false),
        (relay::runtime, 1, false, false),
        (relay::gathering_runtime, 1, true, false),
    ] {
        // Twelve requests are more than one batch.
        for count in [1, 4, 12] {
            // An executor that comes at that moment may be faster, and a run that is held up makes the next ones seem long:
            // on a busy machine for a long while.
            let start = Instant::now();
            let patient = |tries: &usize| *tries < 10 || (itself && start.elapsed() < SOON);
            let ever = (0..)
                .take_while(patient)
                .any(|_| runs_itself(runtime(), Duration::from_micros(per_row), steady, count));
            assert_eq!(ever, itself, "{count} requests of {per_row} µs");
        }
    }
}

#[cfg(target_os = "linux")]
mod beside_a_spinner {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    const RUNS: usize = 50;

    /// How often the calling thread has lost its core to another one; `None` where the system does not tell.
    fn switches() -> Option<u64> {
        let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"))?;
        line.trim().parse().ok()
    }

    fn spin() {
        let start = Instant::now();
        while start.elapsed() < TURN {}
    }

    struct Spin(Signature, mpsc::Sender<Option<u64>>);

    impl Session for Spin {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
            spin();
            self.1.send(switches()).unwrap();
            Ok(inputs.to_vec())
        }
    }

    /// How often a thread that does `work` lost the core that it shared with one that never rests.
    fn lost(work: impl FnOnce(mpsc::Sender<Option<u64>>) + Send) -> Option<u64> {
        let (sender, seen) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let ours = Arc::new(());
                let theirs = ours.clone();
                let mine = sched_getaffinity(None).unwrap();
                let mut one = CpuSet::new();
                one.set((0..CpuSet::MAX_CPU).find(|&core| mine.is_set(core)).unwrap());
                sched_setaffinity(None, &one).unwrap();
                scope.spawn(move || while Arc::strong_count(&theirs) > 1 {});
                work(sender);
                drop(ours);
            });
        });
        let seen: Vec<Option<u64>> = seen.iter().collect();
        assert_eq!(seen.len(), RUNS);
        Some(seen[RUNS - 1]? - seen[0]?)
    }

    /// The same for a loop of runs, with or without offers in between.
    fn lost_by_a_loop(offers: bool) -> Option<u64> {
        lost(|seen| {
            for _ in 0..RUNS {
                spin();
                seen.send(switches()).unwrap();
                if offers {
                    thread::yield_now();
                }
            }
        })
    }

    fn lost_by_an_executor() -> Option<u64> {
        lost(|seen| {
            let line = Line::new("", 1, 0);
            let tickets: Vec<Ticket> = (0..RUNS).map(|_| line.submit(3)).collect();
            line.queue.close();
            line.queue.add(Box::new(Spin(Signature::default(), seen)));
            drop(run(&line.queue, 0, true));
            tickets.into_iter().for_each(|ticket| drop(ticket.reply.blocking_recv().unwrap().unwrap()));
        })
    }

    #[test]
    fn an_executor_offers_its_core_between_runs() {
        // What else runs on the core may spoil a try.
        let mut tries = Vec::new();
        let fits = (0..5).any(|_| {
            let tried = [lost_by_a_loop(false), lost_by_a_loop(true), lost_by_an_executor()];
            tries.push(tried);
            // A kernel may not tell, or not care for offers.
            let [Some(without), Some(with), Some(executor)] = tried else { return true };
            with <= without + without / 4 || executor > without.midpoint(with)
        });
        assert!(fits, "without offers, with them, and an executor: {tries:?}");
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

/// The answer, though nobody may be left to give it.
fn answered(mut ticket: Ticket) -> Option<Answer> {
    let start = Instant::now();
    while start.elapsed() < SOON {
        match ticket.reply.try_recv() {
            Ok(answer) => return Some(answer),
            Err(oneshot::error::TryRecvError::Empty) => thread::yield_now(),
            Err(oneshot::error::TryRecvError::Closed) => return None,
        }
    }
    None
}

#[test]
fn a_closed_queue_takes_the_rest_of_what_has_begun() {
    let line = Line::new("", 8, 2);
    let visit = line.queue.enter().unwrap();
    line.queue.close();
    assert!(line.queue.enter().is_none());
    assert!(matches!(line.submit_for(None, 3), Err(Refused::Draining(_))));
    for _ in 0..5 {
        let part = line.submit_for(Some(&visit), 3).ok().unwrap();
        answered(part).unwrap().unwrap();
    }
    drop(visit);
    line.end();
}

#[test]
fn whoever_comes_while_the_queue_closes_is_answered_or_turned_away() {
    let mut answers = 0;
    for round in 0..200 {
        let line = Line::new("", 8, 2);
        let queue = &line.queue;
        answers += thread::scope(|scope| {
            let visitors = [0, 1].map(|_| {
                scope.spawn(|| {
                    let Some(visit) = queue.enter() else { return 0 };
                    let parts = (0..3).map(|_| submit(queue, Some(&visit), 3).ok().unwrap());
                    parts.map(|part| answered(part).unwrap().unwrap().len()).sum::<usize>()
                })
            });
            (0..round % 7).for_each(|_| thread::yield_now());
            queue.close();
            visitors.into_iter().map(|visitor| visitor.join().unwrap()).sum::<usize>()
        });
        line.end();
    }
    assert!(answers.is_multiple_of(3));
}

#[test]
fn abandoned_requests_bring_no_more_parts() {
    let line = Line::new("max_delay = '1h'", 8, 1);
    let visit = line.queue.enter().unwrap();
    let part = line.submit_for(Some(&visit), 3).ok().unwrap();
    assert_eq!(line.queue.abandon(&Error::internal("gone")), 1);
    assert_eq!(part.reply.blocking_recv().unwrap().unwrap_err().message, "gone");
    assert!(matches!(line.submit_for(Some(&visit), 3), Err(Refused::Draining(_))));
    // Nobody waits for whoever still holds on.
    line.executors.into_iter().for_each(|executor| executor.join().unwrap());
    drop(visit);
}
