//! The machine below: which core does what, and what the kernel says processes and hypervisor have used.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::{ClockId, clock_gettime},
};

/// Ticks per second in `/proc`, on every architecture that Linux has today.
const USER_HZ: f64 = 100.0;

/// One core serves, another one asks.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    pub server: usize,
    pub generator: usize,
}

impl Cores {
    /// The first two cores that this process may use.
    ///
    /// # Errors
    /// When there is only one.
    pub fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(None).context("cannot ask for the cores")?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core));
        match (cores.next(), cores.next()) {
            (Some(server), Some(generator)) => Ok(Self { server, generator }),
            _ => bail!("the benchmark needs two cores, one for the server and one to ask from"),
        }
    }
}

/// Binds the calling thread, and what it starts from now on, to some cores.
pub fn pin(cores: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cores.iter().for_each(|&core| set.set(core));
    sched_setaffinity(None, &set).with_context(|| format!("cannot stay on cores {cores:?}"))
}

/// Calls `work` on a thread of its own that is bound to `cores`.
pub fn on_cores<T: Send>(cores: &[usize], work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| pin(cores).and_then(|()| work()));
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// What had been used up at one moment of the cores that are watched: on all others anything may happen.
pub struct Moment {
    at: Instant,
    server: f64,
    own: f64,
    cores: CoreTime,
}

/// Seconds of some cores together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct CoreTime {
    cores: f64,
    busy: f64,
    stolen: f64,
    total: f64,
}

/// What was used between two moments.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// By the clock.
    pub seconds: f64,
    /// CPU of the server.
    pub server: f64,
    /// CPU of this process.
    pub own: f64,
    /// The share of the cores' time that the hypervisor gave to others.
    pub stolen: f64,
    /// The share of the cores' time that other processes took, less what may be an error of the kernel's count: a tick
    /// for each core.
    pub foreign: f64,
}

impl Moment {
    /// Now, on the cores of the calling thread and of the server `pid`; without one the server is somebody else's, who
    /// knows where, and all cores are watched.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn beside(pid: Option<u32>) -> Result<Self> {
        let Some(pid) = pid else { return Self::on(&|_| true, None) };
        let (own, server) = (affinity(None)?, affinity(Some(pid))?);
        Self::on(&|core| own.is_set(core) || server.is_set(core), Some(pid))
    }

    /// Now, on the cores of the calling thread.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn here() -> Result<Self> {
        let own = affinity(None)?;
        Self::on(&|core| own.is_set(core), None)
    }

    fn on(watched: &dyn Fn(usize) -> bool, pid: Option<u32>) -> Result<Self> {
        let stat = |pid: &str| -> Result<f64> {
            let path = format!("/proc/{pid}/stat");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            process_cpu(&text).with_context(|| format!("{path} says {text:?}"))
        };
        let server = pid.map_or(Ok(0.0), |pid| stat(&pid.to_string()))?;
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let cores = core_time(&text, watched).context("/proc/stat has no line of a core that is used")?;
        let own = clock_gettime(ClockId::ProcessCPUTime);
        let own = own.tv_sec as f64 + own.tv_nsec as f64 / 1e9;
        Ok(Self { at: Instant::now(), server, own, cores })
    }

    pub fn elapsed(&self) -> std::time::Duration {
        self.at.elapsed()
    }

    pub fn until(&self, end: &Moment) -> Usage {
        let cores = |part: fn(&CoreTime) -> f64| part(&end.cores) - part(&self.cores);
        let total = cores(|time| time.total).max(1.0 / USER_HZ);
        let (server, own) = (end.server - self.server, end.own - self.own);
        let foreign = cores(|time| time.busy) - server - own - end.cores.cores / USER_HZ;
        Usage {
            seconds: (end.at - self.at).as_secs_f64(),
            server,
            own,
            stolen: cores(|time| time.stolen) / total,
            foreign: (foreign / total).max(0.0),
        }
    }
}

/// User and system time in the text of `/proc/PID/stat`, in seconds.
fn process_cpu(stat: &str) -> Option<f64> {
    // The name in brackets may hold anything, also spaces and brackets; state, the third field, follows the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11);
    let mut next = || times.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / USER_HZ)
}

/// The cores that a process, or the calling thread, may use.
fn affinity(pid: Option<u32>) -> Result<CpuSet> {
    let process = pid.and_then(|pid| Pid::from_raw(pid as i32));
    sched_getaffinity(process).with_context(|| format!("cannot ask for the cores of {pid:?}"))
}

/// The lines of the cores that are `watched` in the text of `/proc/stat`, together.
fn core_time(stat: &str, watched: &dyn Fn(usize) -> bool) -> Option<CoreTime> {
    let mut sum = CoreTime::default();
    for line in stat.lines() {
        let mut fields = line.split_whitespace();
        let core = fields.next().and_then(|name| name.strip_prefix("cpu")?.parse().ok());
        if !core.is_some_and(watched) {
            continue;
        }
        let seconds: Vec<f64> =
            fields.map(|field| field.parse::<f64>().ok().map(|ticks| ticks / USER_HZ)).collect::<Option<_>>()?;
        // Time of guests is part of user time already.
        let &[user, nice, system, idle, wait, irq, softirq, stolen, ..] = seconds.as_slice() else { return None };
        let busy = user + nice + system + irq + softirq;
        sum.cores += 1.0;
        sum.busy += busy;
        sum.stolen += stolen;
        sum.total += busy + idle + wait + stolen;
    }
    (sum.cores > 0.0).then_some(sum)
}

/// Memory of a process in bytes, pages that others use too by its share (PSS): the least that is found in a second, for
/// what is freed is given back a moment later.
pub fn memory(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let mut least = f64::INFINITY;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        least = least.min(proportional(&text).with_context(|| format!("{path} has no Pss"))?);
    }
    Ok(least)
}

/// The proportional set size in the text of `/proc/PID/smaps_rollup`, in bytes.
fn proportional(rollup: &str) -> Option<f64> {
    let kilobytes = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB"))?;
    Some(kilobytes.parse::<f64>().ok()? * 1024.0)
}

/// The processor's name and the number of cores.
pub fn describe() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let cores = text.lines().filter(|line| line.starts_with("processor")).count();
    format!("{}, {cores} cores", model.map_or("unknown processor", |(_, name)| name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_a_process_are_found_behind_any_name() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 9 9 20 0 5 0 1 2 3";
        assert_eq!(process_cpu(stat), Some(3.0));
        assert_eq!(process_cpu("7 (a"), None);
    }

    #[test]
    fn a_spinning_process_uses_what_the_clock_says() {
        let now = || Moment::beside(Some(std::process::id())).unwrap();
        let start = now();
        let end = loop {
            let now = now();
            if now.own - start.own > 0.2 {
                break now;
            }
        };
        let usage = start.until(&end);
        // The kernel counts what processes take in ticks; other tests run beside this one, on as many cores.
        assert!(usage.own > 0.2 && usage.server > 0.15 && usage.seconds > 0.01, "{usage:?}");
    }

    #[test]
    fn only_the_cores_that_are_used_are_watched() {
        let start = "cpu  9 9\ncpu0 100 0 100 800 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0 0 0\n";
        let end = "cpu  9 9\ncpu0 150 0 110 830 0 0 0 10 0 0\ncpu1 0 0 0 100 0 0 0 0\ncpu2 99 0 0 0 0 0 0 1\n";
        let usage = |watched: &dyn Fn(usize) -> bool| {
            let moment = |text| {
                let cores = core_time(text, watched).unwrap();
                Moment { at: Instant::now(), server: 0.0, own: 0.0, cores }
            };
            let usage = moment(start).until(&moment(end));
            [usage.stolen, usage.foreign].map(|share| (share * 1000.0).round())
        };
        // Of the 60 ticks that were taken one may be the kernel's error, for each core.
        assert_eq!(usage(&|core| core == 0), [100.0, 590.0]);
        assert_eq!(usage(&|core| core < 2), [50.0, 290.0]);
        assert_eq!(usage(&|core| core == 1), [0.0, 0.0]);
        assert_eq!(core_time(end, &|core| core == 7), None);
        // A core's name is all of it: cpu1 is not cpu12.
        assert_eq!(core_time("cpu12 1 0 0 0 0 0 0 0\n", &|core| core == 1), None);
    }

    #[test]
    fn memory_is_read_from_the_sum_of_all_mappings() {
        let text = "0-f ---p 0 0:0 0 [rollup]\nRss: 9 kB\nPss:      40 kB\nPss_Dirty: 8 kB\n";
        assert_eq!(proportional(text), Some(40_960.0));
        let before = memory(std::process::id()).unwrap();
        let block = vec![1u8; 32 << 20];
        assert!(memory(std::process::id()).unwrap() > before + 16e6);
        drop(block);
    }
}
