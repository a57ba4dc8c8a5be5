//! How threads share the processor: some take what others leave, some do not insist, some take it at once.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

pub mod quota;
pub mod usage;

/// The calling thread, and what it starts from now on, run only when no other thread wants the processor; whoever wakes
/// up interrupts it at once. Without privileges there is no way back, so it is for threads that end after their work.
///
/// Niceness is not enough: Linux lets a nice thread that has its turn keep it for a slice of some milliseconds, however
/// nice it is, while a request waits that takes microseconds. Only a thread of the idle class gives way at once.
///
/// Where the system refuses, the thread goes on as it was.
pub fn step_back() {
    #[cfg(target_os = "linux")]
    {
        #[expect(unsafe_code, reason = "the call reads a structure that outlives it, and writes nothing")]
        let refused = unsafe {
            // Zero is the calling thread; what a policy without priorities asks for is priority zero.
            libc::sched_setscheduler(0, libc::SCHED_IDLE, &libc::sched_param { sched_priority: 0 })
        };
        if refused == 0 {
            usage::leave_out_this_thread();
        }
    }
}

/// How long ago the last offer of a thread must be for another one; so whoever has slept makes one at once.
const SPELL: Duration = Duration::from_micros(30);

/// Offers the calling thread's place to whoever waits for it, if its last offer is a while ago: for a thread of the idle
/// class, between two pieces of work.
///
/// Whoever wakes up interrupts a thread of the idle class, but when both wake up at the same moment, as they do on a
/// processor that slept, Linux may begin with the one that has had less of it lately. That is the idle one, and it goes
/// on for as long as it has something to do, or to the next tick. `iris` on one core, asked by one client over REST with
/// copies of all requests: of 5,400 times that the I/O thread woke up in 1.5 s, it found itself behind such a thread 102
/// times, for 190 µs by the median; with offers 6 times in 5,000, for 60 µs. An offer after each copy did no better and
/// took 4 µs for each, half as much again.
///
/// Whoever offers holds nothing that others wait for: as long as somebody takes it and goes on, its next turn is far.
pub fn give_way() {
    thread_local!(static OFFERED: Cell<Option<Instant>> = const { Cell::new(None) });
    let now = Instant::now();
    if OFFERED.get().is_none_or(|last| now.duration_since(last) >= SPELL) {
        std::thread::yield_now();
        OFFERED.set(Some(Instant::now()));
    }
}

/// A thread with this niceness gets a quarter of a core that one ordinary thread wants all of.
#[cfg(target_os = "linux")]
const PATIENT: i32 = 5;

/// The calling thread, and what it starts from now on, runs models or reads long messages: it gives way to I/O threads
/// sooner than another would.
///
/// I/O threads work in bursts, and the answers of a batch are one: after it, Linux has an I/O thread wait until the
/// executor on its core has had as much. Where the executor counts for a third, that is over soon. It goes with the offer
/// that executors make between runs, which by itself costs replies: on one core with runs of 1 ms, at twice the load, those
/// in time were 0.99 of saturation without either, 0.93 with the offer alone, and are 0.97 with both. Niceness of 19 in
/// place of the offer did about as well, and by its weight leaves a model 1.5 % of a core that small requests fill.
pub fn be_patient() {
    // Elsewhere niceness is the whole process's.
    #[cfg(target_os = "linux")]
    {
        // Where it is refused, answers are merely later.
        let _ = rustix::process::nice(PATIENT);
    }
}

/// How long the calling thread wants to keep the processor when it has its turn: the least that Linux allows.
#[cfg(target_os = "linux")]
const SLICE: Duration = Duration::from_micros(100);

/// The calling thread, which never works for long, begins soon after it wakes up, and gets no more of the processor for
/// that.
///
/// Linux lets a thread that runs a model go on for some milliseconds before it looks whether another wants its place,
/// unless that one asks for a shorter turn. Kernels before 6.12 do not know the wish, and take no notice; where the system
/// refuses, the thread goes on as it was.
pub fn be_prompt() {
    #[cfg(target_os = "linux")]
    {
        /// `struct sched_attr` of sched_setattr(2), as its first version has it.
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            size: u32,
            policy: u32,
            flags: u64,
            nice: i32,
            priority: u32,
            runtime: u64,
            deadline: u64,
            period: u64,
        }
        let attributes = Attributes {
            size: size_of::<Attributes>() as u32,
            policy: libc::SCHED_OTHER as u32,
            // Threads that it starts are as others.
            flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
            nice: nice(),
            runtime: SLICE.as_nanos() as u64,
            ..Attributes::default()
        };
        #[expect(unsafe_code, reason = "the call reads a structure that outlives it and says how long it is")]
        unsafe {
            // The first zero is the calling thread, the second that there are no flags.
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
        }
    }
}

#[cfg(target_os = "linux")]
fn nice() -> i32 {
    #[expect(unsafe_code, reason = "the call takes numbers and returns one")]
    unsafe {
        libc::getpriority(libc::PRIO_PROCESS, 0)
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

    /// What the calling thread's turn is to last, in ns; `None` where the kernel does not tell, or knows no such wish.
    fn slice() -> Option<u64> {
        let told = std::fs::read_to_string("/proc/thread-self/sched").ok()?;
        let line = told.lines().find(|line| line.starts_with("se.slice"))?;
        line.split_whitespace().last()?.parse().ok()
    }

    #[test]
    fn only_the_thread_itself_is_prompt() {
        std::thread::spawn(|| {
            let (before, class) = (slice(), policy());
            be_prompt();
            assert_eq!(policy(), class);
            let Some(before) = before else { return };
            assert_eq!(slice(), Some(100_000));
            assert_eq!(std::thread::spawn(slice).join().unwrap(), Some(before), "threads that it starts are as others");
        })
        .join()
        .unwrap();
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn only_the_thread_itself_is_patient() {
        let before = nice();
        std::thread::spawn(move || {
            be_patient();
            assert_eq!(nice(), (before + 5).min(19));
            assert_eq!(std::thread::spawn(nice).join().unwrap(), nice(), "and what it starts");
        })
        .join()
        .unwrap();
        assert_eq!(nice(), before);
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
