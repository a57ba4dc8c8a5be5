//! Threads that take only what others leave of the processor.

/// The calling thread, and what it starts from now on, run only when no other thread wants the processor; whoever wakes
/// up interrupts it at once. Without privileges there is no way back, so it is for threads that end after their work.
///
/// Niceness is not enough: Linux lets a nice thread that has its turn keep it for a slice of some milliseconds, however
/// nice it is, while a request waits that takes microseconds. Only a thread of the idle class gives way at once.
///
/// Where the system refuses, the thread goes on as it was.
pub fn step_back() {
    #[expect(unsafe_code, reason = "the call reads a structure that outlives it, and writes nothing")]
    #[cfg(target_os = "linux")]
    unsafe {
        // Zero is the calling thread; what a policy without priorities asks for is priority zero.
        libc::sched_setscheduler(0, libc::SCHED_IDLE, &libc::sched_param { sched_priority: 0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scheduling policy of the calling thread, as the kernel tells it: 5 is `SCHED_IDLE`.
    fn policy() -> u32 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().nth(38).unwrap().parse().unwrap()
    }

    #[test]
    fn only_the_thread_itself_steps_back() {
        let before = policy();
        std::thread::spawn(|| {
            step_back();
            assert_eq!(policy(), 5);
        })
        .join()
        .unwrap();
        assert_eq!(policy(), before);
    }
}
