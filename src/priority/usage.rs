//! How much of the processor the process uses at the cost of others: by all its threads but those of the idle class.

use std::time::Duration;

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

/// Threads of the idle class.
static IDLE: Mutex<Idle> = Mutex::new(Idle { threads: Vec::new(), ended: Duration::ZERO });

struct Idle {
    /// Each thread's number, and the time that it had used when it stepped back.
    threads: Vec<(i32, Duration)>,
    /// What those that have ended used after that.
    ended: Duration,
}

/// Processor time that the process has used so far, without that of threads that had stepped back. A pool thread of a
/// session whose executors have, has not, and counts.
///
/// Where the system does not tell the time of other threads, theirs counts until they end.
pub fn used() -> Duration {
    let idle = IDLE.lock();
    let since = |&(thread, before): &(i32, Duration)| time_of(thread).map(|now| now.saturating_sub(before));
    let stepped_back: Duration = idle.threads.iter().filter_map(since).sum();
    clock(ClockId::ProcessCPUTime).saturating_sub(idle.ended + stepped_back)
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
        let before = clock(ClockId::ThreadCPUTime);
        IDLE.lock().threads.push((thread, before));
        Some(Self { thread, before })
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        let used = clock(ClockId::ThreadCPUTime).saturating_sub(self.before);
        let mut idle = IDLE.lock();
        idle.threads.retain(|(thread, _)| *thread != self.thread);
        idle.ended += used;
    }
}

fn clock(clock: ClockId) -> Duration {
    clock_gettime(clock).try_into().unwrap_or_default()
}

/// The time of another thread, as the scheduler has it: up to a tick behind while it runs.
fn time_of(thread: i32) -> Option<Duration> {
    let told = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    told.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Instant};

    use super::*;

    const WORK: Duration = Duration::from_millis(300);

    /// Uses so much of the processor.
    fn work() {
        let start = clock(ClockId::ThreadCPUTime);
        while clock(ClockId::ThreadCPUTime) - start < WORK {}
    }

    /// What counts of the work of a thread, while it lives and when it has ended; other tests' work counts, too.
    fn counted(steps_back: bool) -> [Duration; 2] {
        let before = used();
        let (done, worked) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            if steps_back {
                super::super::step_back();
            }
            work();
            done.send(()).unwrap();
            let _ = ends.recv();
        });
        worked.recv().unwrap();
        let alive = used() - before;
        drop(end);
        thread.join().unwrap();
        [alive, used() - before]
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn only_the_work_of_threads_that_stepped_back_does_not_count() {
        // Other tests of this process work meanwhile, at times on every core.
        let start = Instant::now();
        let least = |steps_back| {
            let found: Vec<[Duration; 2]> = (0..5).map(|_| counted(steps_back)).collect();
            [0, 1].map(|index| found.iter().map(|counted| counted[index]).min().unwrap())
        };
        let (usual, idle) = (least(false), least(true));
        println!("{usual:?} and {idle:?} of {WORK:?}, {:?}", start.elapsed());
        assert!(usual.iter().all(|counted| *counted >= WORK), "{usual:?}");
        for index in [0, 1] {
            assert!(idle[index] + WORK / 2 < usual[index], "{usual:?}, and stepped back {idle:?}");
        }
    }
}
