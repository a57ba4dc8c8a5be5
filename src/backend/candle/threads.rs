//! `Threads`: the threads that one session's operators run on, and no others.
//!
//! candle and gemm divide their work over the rayon pool of the thread that calls them, and outside of any over one that
//! the process shares. So each session runs inside its own pool. With one thread that is the calling thread's: nothing
//! is handed over, and the run has the caller's priority.

use std::{
    cell::OnceCell,
    io,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread,
};

use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuilder};

use crate::{error::Error, priority};

thread_local! {
    /// The pool that consists of the current thread; `None` where it is in another pool already. Threads cannot leave a
    /// pool, so there is one for each thread (8 KB, which rayon never frees), whatever sessions it runs.
    static ALONE: OnceCell<Option<ThreadPool>> = const { OnceCell::new() };
}

/// Starts the threads of pools from a thread of an executor's priority, for models are loaded at low priority, and
/// threads inherit that. Ends with the last clone.
#[derive(Clone)]
pub struct Spawner {
    orders: Sender<Order>,
}

pub enum Threads {
    /// The thread that calls, and no other.
    Caller,
    Pool(ThreadPool),
}

struct Order {
    thread: ThreadBuilder,
    started: SyncSender<io::Result<()>>,
}

impl Spawner {
    /// Starts the thread that starts others; call it from a thread of ordinary priority.
    ///
    /// # Errors
    /// `Internal` when the system starts no thread.
    pub fn start() -> Result<Self, Error> {
        let (orders, receiver) = channel();
        thread::Builder::new()
            .name("candle-spawner".to_owned())
            .spawn(move || spawn_all(receiver))
            .map_err(|error| Error::internal(format!("cannot start thread candle-spawner: {error}")))?;
        Ok(Self { orders })
    }

    /// # Errors
    /// `Internal` when the system does not start that many threads.
    pub fn threads(&self, count: usize) -> Result<Threads, Error> {
        if count == 1 {
            return Ok(Threads::Caller);
        }
        let spawn = |thread| {
            let (started, reply) = sync_channel(1);
            let ended = || io::Error::other("thread candle-spawner has ended");
            self.orders.send(Order { thread, started }).map_err(|_| ended())?;
            reply.recv().map_err(|_| ended())?
        };
        ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|_| "candle-pool".to_owned())
            .spawn_handler(spawn)
            .build()
            .map(Threads::Pool)
            .map_err(|error| Error::internal(format!("cannot start {count} threads: {error}")))
    }
}

impl Threads {
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self {
            Threads::Pool(pool) => pool.install(work),
            Threads::Caller => ALONE.with(|alone| match alone.get_or_init(of_this_thread) {
                Some(pool) => pool.install(work),
                None => work(),
            }),
        }
    }
}

fn of_this_thread() -> Option<ThreadPool> {
    ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().ok()
}

fn spawn_all(orders: Receiver<Order>) {
    priority::be_patient();
    for Order { thread, started } in orders {
        let name = thread.name().unwrap_or("candle-pool").to_owned();
        let spawned = thread::Builder::new().name(name).spawn(move || thread.run());
        // Nobody waits for the answer only if the thread that asked has died.
        let _ = started.send(spawned.map(drop));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rayon::prelude::*;

    use super::*;

    /// The threads that take part in something, by name.
    fn at_work(threads: &Threads) -> HashSet<Option<String>> {
        threads.run(|| {
            let names = (0..1000).into_par_iter().map(|_| {
                thread::sleep(std::time::Duration::from_micros(20));
                thread::current().name().map(str::to_owned)
            });
            names.collect()
        })
    }

    #[test]
    fn a_session_of_one_thread_runs_on_its_callers() {
        let spawner = Spawner::start().unwrap();
        let threads = spawner.threads(1).unwrap();
        let other = spawner.threads(1).unwrap();
        let name = thread::current().name().map(str::to_owned);
        assert_eq!(at_work(&threads), HashSet::from([name.clone()]));
        assert_eq!(at_work(&other), HashSet::from([name]));
        let moved = thread::Builder::new().name("elsewhere".to_owned()).spawn(move || at_work(&threads));
        assert_eq!(moved.unwrap().join().unwrap(), HashSet::from([Some("elsewhere".to_owned())]));
    }

    #[test]
    fn a_session_of_many_threads_has_its_own() {
        let threads = Spawner::start().unwrap().threads(3).unwrap();
        assert_eq!(at_work(&threads), HashSet::from([Some("candle-pool".to_owned())]));
        assert_eq!(threads.run(rayon::current_num_threads), 3);
    }
}
