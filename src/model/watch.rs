//! `Watch`: what a warm-up run takes.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Measures runs on the calling thread.
///
/// Warm-up stays behind requests and may lose the processor in the middle of a run, for longer than the run takes. Runs
/// that use their own thread alone are measured in its processor time, all others by the clock on the wall.
#[derive(Clone, Copy)]
pub(super) struct Watch {
    on_thread: bool,
    start: Duration,
}

impl Watch {
    /// Starts now; `on_thread` says that only the calling thread works.
    pub fn start(on_thread: bool) -> Self {
        Self { on_thread, start: now(on_thread) }
    }

    pub fn elapsed(&self) -> Duration {
        now(self.on_thread).saturating_sub(self.start)
    }
}

fn now(on_thread: bool) -> Duration {
    static EPOCH: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    if on_thread { clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default() } else { EPOCH.elapsed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_uses_no_processor() {
        let (own, wall) = (Watch::start(true), Watch::start(false));
        std::thread::sleep(Duration::from_millis(50));
        assert!(wall.elapsed() >= Duration::from_millis(50));
        assert!(own.elapsed() < Duration::from_millis(25), "{:?}", own.elapsed());
        let end = Instant::now() + Duration::from_secs(10);
        while own.elapsed() < Duration::from_millis(30) {
            assert!(Instant::now() < end, "the processor's time stands still");
        }
    }
}
