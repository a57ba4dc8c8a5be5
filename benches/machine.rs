//! The machine below: which core does what, and what the kernel says processes and hypervisor have used.

use std::{fs, time::Instant};

use anyhow::{Context, Result, bail};
use rustix::{
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

/// What had been used up at one moment.
pub struct Moment {
    at: Instant,
    server: f64,
    own: f64,
    machine: Machine,
}

/// Seconds of all cores together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Machine {
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
    /// The share of the machine's time that the hypervisor gave to others.
    pub stolen: f64,
    /// The share of the machine's time that other processes took.
    pub foreign: f64,
}

impl Moment {
    /// Now, watching this process and, if there is one, the server `pid`.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn now(pid: Option<u32>) -> Result<Self> {
        let stat = |pid: &str| -> Result<f64> {
            let path = format!("/proc/{pid}/stat");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            process_cpu(&text).with_context(|| format!("{path} says {text:?}"))
        };
        let server = pid.map_or(Ok(0.0), |pid| stat(&pid.to_string()))?;
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let machine = machine_cpu(&text).context("/proc/stat has no line of all cores")?;
        let own = clock_gettime(ClockId::ProcessCPUTime);
        let own = own.tv_sec as f64 + own.tv_nsec as f64 / 1e9;
        Ok(Self { at: Instant::now(), server, own, machine })
    }

    pub fn elapsed(&self) -> std::time::Duration {
        self.at.elapsed()
    }

    pub fn until(&self, end: &Moment) -> Usage {
        let machine = |part: fn(&Machine) -> f64| part(&end.machine) - part(&self.machine);
        let total = machine(|machine| machine.total).max(1.0 / USER_HZ);
        let (server, own) = (end.server - self.server, end.own - self.own);
        Usage {
            seconds: (end.at - self.at).as_secs_f64(),
            server,
            own,
            stolen: machine(|machine| machine.stolen) / total,
            foreign: ((machine(|machine| machine.busy) - server - own) / total).max(0.0),
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

/// The line of all cores in the text of `/proc/stat`.
fn machine_cpu(stat: &str) -> Option<Machine> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let seconds: Vec<f64> = line
        .split_whitespace()
        .map(|field| field.parse::<f64>().ok().map(|ticks| ticks / USER_HZ))
        .collect::<Option<_>>()?;
    // Time of guests is part of user time already.
    let &[user, nice, system, idle, wait, irq, softirq, stolen, ..] = seconds.as_slice() else { return None };
    let busy = user + nice + system + irq + softirq;
    Some(Machine { busy, stolen, total: busy + idle + wait + stolen })
}

/// Resident memory of a process in bytes.
pub fn resident(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kilobytes =
        text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kilobytes.map(|kilobytes| kilobytes * 1024.0).with_context(|| format!("{path} has no VmRSS"))
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
        let start = Moment::now(None).unwrap();
        while start.elapsed().as_millis() < 300 {
            std::hint::spin_loop();
        }
        let usage = start.until(&Moment::now(None).unwrap());
        assert!(usage.seconds >= 0.3);
        // Other tests run beside this one, and the machine may be shared.
        assert!(usage.own > 0.05 && usage.server == 0.0, "{usage:?}");
    }

    #[test]
    fn stolen_time_is_a_share_of_all_time() {
        let moment = |text| Moment { at: Instant::now(), server: 0.0, own: 0.0, machine: machine_cpu(text).unwrap() };
        let start = moment("cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2 3\n");
        let end = moment("cpu  150 0 110 830 0 0 0 10 0 0\n");
        let usage = start.until(&end);
        assert!((usage.stolen - 0.1).abs() < 1e-9 && (usage.foreign - 0.6).abs() < 1e-9, "{usage:?}");
    }
}
