//! How much of the processor the process uses: altogether, and at the cost of others, without threads of the idle class.

use std::time::Duration;

use parking_lot::Mutex;

/// Threads of the idle class.
static IDLE: Mutex<Idle> = Mutex::new(Idle { threads: Vec::new(), ended: Duration::ZERO });

struct Idle {
    /// Each thread's number, and the time that it had used when it stepped back.
    threads: Vec<(i32, Duration)>,
    /// What those that have ended used after that.
    ended: Duration,
}

/// Processor time that the process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    /// By threads that had not stepped back. A pool thread of a session whose executors have, has not, and counts.
    ///
    /// Where the system does not tell the time of other threads, theirs counts until they end.
    pub insisting: Duration,
    /// By all threads.
    pub all: Duration,
}

pub fn used() -> Used {
    let left_out = left_out();
    let all = clock(libc::CLOCK_PROCESS_CPUTIME_ID);
    Used { insisting: all.saturating_sub(left_out), all }
}

/// What threads have used since they stepped back.
fn left_out() -> Duration {
    let idle = IDLE.lock();
    let since = |&(thread, before): &(i32, Duration)| time_of(thread).map(|now| now.saturating_sub(before));
    idle.ended + idle.threads.iter().filter_map(since).sum::<Duration>()
}

/// From now on the calling thread's time does not count.
pub(super) fn leave_out_this_thread() {
    thread_local!(static HERE: Option<Here> = Here::new());
    HERE.with(|_| {});
}

/// Lives as long as the thread.
struct Here {
    thread: i32,
    before: Duration,
}

impl Here {
    fn new() -> Option<Self> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let before = clock(libc::CLOCK_THREAD_CPUTIME_ID);
        IDLE.lock().threads.push((thread, before));
        Some(Self { thread, before })
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        let used = clock(libc::CLOCK_THREAD_CPUTIME_ID).saturating_sub(self.before);
        let mut idle = IDLE.lock();
        idle.threads.retain(|(thread, _)| *thread != self.thread);
        idle.ended += used;
    }
}

/// Through libc: what rustix does to find the kernel's own code for it breaks under valgrind.
fn clock(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "the call writes into a structure that outlives it")]
    // A clock that is not known leaves it at nothing.
    unsafe {
        libc::clock_gettime(clock, &raw mut time);
    }
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The time of another thread, as the scheduler has it: up to a tick behind while it runs.
fn time_of(thread: i32) -> Option<Duration> {
    let told = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    told.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const WORK: Duration = Duration::from_millis(50);

    /// What a thread's work adds to what is left out, while it lives and when it has ended, and whether it is known.
    fn left_out_of(step_back: bool) -> ([Duration; 2], bool) {
        let before = left_out();
        let (done, worked) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            if step_back {
                super::super::step_back();
            }
            let start = clock(libc::CLOCK_THREAD_CPUTIME_ID);
            while clock(libc::CLOCK_THREAD_CPUTIME_ID) - start < WORK {}
            done.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            let _ = ends.recv();
        });
        let number = worked.recv().unwrap();
        let known = IDLE.lock().threads.iter().any(|(thread, _)| *thread == number);
        // It may not have come to rest yet.
        let mut alive = left_out() - before;
        while known && alive < WORK {
            std::thread::yield_now();
            alive = left_out() - before;
        }
        drop(end);
        thread.join().unwrap();
        assert!(IDLE.lock().threads.iter().all(|(thread, _)| *thread != number), "it has ended");
        ([alive, left_out() - before], known)
    }

    #[test]
    fn the_work_of_threads_that_stepped_back_is_left_out() {
        // Other tests have such threads, too, so there may be more.
        let (work, known) = left_out_of(true);
        assert!(known && work.iter().all(|left_out| *left_out >= WORK), "{work:?}");
        assert!(!left_out_of(false).1);
        let Used { insisting, all } = used();
        assert!(insisting <= all.saturating_sub(WORK) && all <= clock(libc::CLOCK_PROCESS_CPUTIME_ID));
    }
}
