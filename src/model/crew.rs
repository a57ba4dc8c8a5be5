//! `Crew`: the threads that run a version's batches, and how others take over from them.
//!
//! A version that gets only copies runs in the idle class, of which Linux lets no thread out again. So when it is to
//! serve, and the other way round, the threads are replaced, one for each session: those that there are leave their
//! sessions in the queue after the run they are in, and take no other; requests notice nothing. A session's own pool
//! threads stay as they are, patient (see [`priority::be_patient`]) and not of the idle class.
//!
//! With one exception: by its weight, a thread of the idle class gets 0.3 % of a core that another process fills. There, a
//! run of 1 ms may still take 0.3 s when the version has begun to serve, and with all its sessions in such runs, its first
//! requests wait for it. Publishing the route does not wait in their place: one publication is for all models, and for
//! aborts, too.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use super::executor::{self, Queue};
use crate::{error::Error, id::ModelName, priority};

/// The threads of a version.
pub(super) struct Crew {
    queue: Arc<Queue>,
    model: ModelName,
    instances: usize,
    background: bool,
    /// Also those that end after the run they are in.
    threads: Vec<JoinHandle<()>>,
    /// Disconnected once those that work have ended; they need every session for that, also those of their forerunners.
    ended: Receiver<()>,
}

/// Threads that wait for their shift to begin.
struct Shift {
    threads: Vec<JoinHandle<()>>,
    /// Each waits for the number of its shift, and ends without.
    begin: Vec<Sender<u64>>,
    ended: Receiver<()>,
}

impl Crew {
    /// Starts the threads for `instances` sessions, which lie in the queue.
    ///
    /// # Errors
    /// `Internal` when the system gives no thread.
    pub fn start(queue: Arc<Queue>, model: &ModelName, instances: usize) -> Result<Self, Error> {
        let (_, ended) = channel();
        let model = model.clone();
        let mut crew = Self { queue, model, instances, background: false, threads: Vec::new(), ended };
        crew.relieve()?;
        Ok(crew)
    }

    /// Whether the threads run only when nobody else wants the processor. They get the class of the calling thread,
    /// which must be the usual one.
    ///
    /// # Errors
    /// `Internal` when the system gives no thread; then all is as it was.
    pub fn set_background(&mut self, background: bool) -> Result<(), Error> {
        if background == self.background {
            return Ok(());
        }
        self.background = background;
        self.relieve().inspect_err(|_| self.background = !background)
    }

    /// Puts new threads in place of those there are, unless the queue is closed: then these end soon.
    fn relieve(&mut self) -> Result<(), Error> {
        let Shift { threads, begin, ended } = self.prepare()?;
        // Without the number of a shift, the threads end.
        let Some(shift) = self.queue.change_shift() else { return Ok(()) };
        for thread in begin {
            // Whoever waits for its shift is there to hear of it.
            let _ = thread.send(shift);
        }
        self.threads.retain(|thread| !thread.is_finished());
        self.threads.extend(threads);
        self.ended = ended;
        Ok(())
    }

    fn prepare(&self) -> Result<Shift, Error> {
        let (alive, ended) = channel::<()>();
        let mut shift = Shift { threads: Vec::new(), begin: Vec::new(), ended };
        for index in 0..self.instances {
            let (begin, number) = channel();
            let (queue, background, alive) = (self.queue.clone(), self.background, alive.clone());
            let name = format!("run-{index}-{}", self.model);
            let spawned = std::thread::Builder::new().name(name).spawn(move || {
                let Ok(shift) = number.recv() else { return };
                if background {
                    priority::step_back();
                } else {
                    priority::be_patient();
                }
                let session = executor::run(&queue, shift, background);
                if session.is_some() {
                    // Giving a large session's memory back takes milliseconds that requests of other models need.
                    priority::step_back();
                }
                drop((session, alive));
            });
            let thread =
                spawned.map_err(|error| Error::internal(format!("cannot start an executor thread: {error}")))?;
            shift.threads.push(thread);
            shift.begin.push(begin);
        }
        Ok(shift)
    }

    /// Waits until the threads have ended, which they do when the queue is closed and empty, for `limit` at most;
    /// whether they have.
    pub fn has_ended(&mut self, limit: Duration) -> bool {
        if self.ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            return false;
        }
        for thread in self.threads.drain(..) {
            // A panic was answered where it happened.
            let _ = thread.join();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, AtomicUsize, Ordering},
        thread,
    };

    use super::*;
    use crate::{
        backend::{Session, Signature},
        metrics::Metrics,
        model::{
            batcher::{Batcher, Limits},
            schedule::Schedule,
            service_time::ServiceTime,
        },
        tensor::{DType, Data, Tensor},
    };

    const SOON: Duration = Duration::from_secs(60);
    const INSTANCES: usize = 2;

    /// Answers with the scheduling policy of the thread that runs it, as the kernel tells it: 5 is `SCHED_IDLE`.
    struct Policy(Signature);

    fn policy() -> u8 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().nth(38).unwrap().parse().unwrap()
    }

    impl Session for Policy {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
            let data = Data::Plain(vec![policy(); inputs[0].rows()].into());
            Ok(vec![Tensor::new("policy".into(), DType::Uint8, [inputs[0].rows()].as_slice().into(), data)?])
        }
    }

    fn crew() -> (Arc<Queue>, Crew) {
        let limits = Limits { max_rows: 8, max_requests: 10_000, max_bytes: 1 << 20, max_wait: SOON };
        let batcher = Batcher::new(limits, &Schedule::default(), 4, INSTANCES, ServiceTime::default());
        let name = ModelName::parse("m").unwrap();
        let metrics = Metrics::new("test", "none").version("m", "1");
        let queue = Arc::new(Queue::new(name.clone(), true, batcher, metrics));
        (0..INSTANCES).for_each(|_| queue.add(Box::new(Policy(Signature::default()))));
        (queue.clone(), Crew::start(queue, &name, INSTANCES).unwrap())
    }

    fn submit(queue: &Arc<Queue>) -> Option<executor::Ticket> {
        executor::testing::submit(queue, None, 1).ok()
    }

    /// The policy of the thread that ran a request; `None` when the queue takes no more.
    fn ask(queue: &Arc<Queue>) -> Option<u8> {
        let outputs = submit(queue)?.reply.blocking_recv().unwrap().unwrap();
        let Data::Plain(bytes) = &outputs[0].data else { unreachable!() };
        Some(bytes[0])
    }

    fn end(queue: &Queue, crew: &mut Crew) {
        queue.close();
        assert!(crew.has_ended(SOON));
        assert!(crew.threads.is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_asked_after_a_change_runs_in_the_other_class() {
        let (queue, mut crew) = crew();
        let usual = policy();
        for background in [false, true, true, false, true, false] {
            crew.set_background(background).unwrap();
            for _ in 0..20 {
                assert_eq!(ask(&queue), Some(if background { 5 } else { usual }), "background: {background}");
            }
        }
        end(&queue, &mut crew);
    }

    #[test]
    fn a_thousand_changes_under_load_lose_no_request() {
        let (queue, mut crew) = crew();
        let (over, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let tickets: Vec<_> = (0..5).map(|_| submit(&queue).unwrap()).collect();
                        for ticket in tickets {
                            ticket.reply.blocking_recv().unwrap().unwrap();
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for change in 0..1_000 {
                let before = answered.load(Ordering::Relaxed);
                crew.set_background(change % 2 == 0).unwrap();
                // Now and then somebody must have been answered in between.
                while change % 10 == 0 && answered.load(Ordering::Relaxed) == before {
                    thread::yield_now();
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(answered.into_inner() >= 100);
        assert!(crew.threads.len() < 1_000, "those that have ended are forgotten");
        end(&queue, &mut crew);
    }

    #[test]
    fn a_change_while_the_queue_closes_leaves_nothing_unanswered_and_nobody_behind() {
        for round in 0..200 {
            let (queue, mut crew) = crew();
            let tickets: Vec<_> = (0..20).map(|_| submit(&queue).unwrap()).collect();
            thread::scope(|scope| {
                scope.spawn(|| {
                    (0..round % 7).for_each(|_| thread::yield_now());
                    queue.close();
                });
                for change in 0..4 {
                    crew.set_background(change % 2 == 0).unwrap();
                }
            });
            for ticket in tickets {
                ticket.reply.blocking_recv().unwrap().unwrap();
            }
            assert_eq!(ask(&queue), None);
            end(&queue, &mut crew);
        }
    }
}
