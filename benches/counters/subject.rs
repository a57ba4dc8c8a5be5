//! A program that is counted while it is asked, under a tool that sees what is to be counted.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, anyhow};
use tempfile::TempDir;
use tidegate::tensor::Tensor;

use crate::{
    counting::Allocated,
    load::{self, Target},
    machine::Cores,
    process::{self, Process},
    requests::Protocol,
    statistics::median,
    stub::{self, Stub},
};

/// Requests before those that count: buffers have grown, branches of lazy initialisation are behind.
const WARM: usize = 400;
/// Requests that count, five times as many, of which the median is taken: once in a second the server looks after its
/// metrics, and a second holds more or fewer requests.
const COUNTED: usize = 400;
const LENGTHS: [usize; 6] = [WARM, COUNTED, COUNTED, COUNTED, COUNTED, COUNTED];
/// Requests of 602 KB, which fill 64 streams; as many more count.
const COPIED: usize = 64;
/// Threads run in turn and to their next wait, as they do on one core, not as whoever grabs valgrind's lock first.
const FAIR: &str = "--fair-sched=yes";
/// How many requests are open at a time, as connections and streams; HTTP/1.1 has one stream.
const CONCURRENCY: [(Protocol, usize, usize); 3] =
    [(Protocol::Grpc, 4, 16), (Protocol::Json, 64, 1), (Protocol::Binary, 64, 1)];

/// What is counted: the server with a stub for a model, or the echo.
pub struct Subject(Vec<String>);

/// What a request costs in user space, by protocol.
pub struct Costs {
    pub instructions: [f64; 3],
    pub allocations: [f64; 3],
    pub bytes: [f64; 3],
}

impl Subject {
    pub fn server(stub: Stub) -> Self {
        Self(stub.arguments())
    }

    pub fn echo() -> Self {
        Self(vec!["echo".to_owned()])
    }

    /// Starts it under `tool`, which is a command with arguments, or nothing.
    fn start(&self, tool: &[&str]) -> Result<Process> {
        let own = std::env::current_exe()?;
        let mut command = match tool {
            [] => Command::new(own),
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(own);
                command
            }
        };
        command.args(&self.0);
        process::start(command, &[Cores::choose()?.server], tempfile::tempdir()?)
    }

    /// Asks `process` over each protocol, and calls `done` after each of `LENGTHS`.
    fn ask(process: &mut Process, row: &Tensor, mut done: impl FnMut(&mut Process) -> Result<()>) -> Result<()> {
        for (protocol, connections, streams) in CONCURRENCY {
            let request = protocol.request(stub::MODEL, row)?;
            let address = if protocol == Protocol::Grpc { process.grpc } else { process.rest };
            let target = Target { address, pid: Some(process.id()), request: &request, connections, streams };
            load::exactly(&target, &LENGTHS, || done(process)).with_context(|| format!("over {protocol:?}"))?;
        }
        Ok(())
    }

    /// Instructions and allocations for each request, by protocol.
    ///
    /// # Errors
    /// When valgrind is missing, or the program fails.
    pub fn costs(&self, row: &Tensor) -> Result<Costs> {
        let tool =
            ["valgrind", "--tool=callgrind", FAIR, "--callgrind-out-file=profile", "--dump-before=*counting*mark*"];
        let mut process = self.start(&tool)?;
        let (mut instructions, mut allocations, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        let mut before = Allocated::default();
        Self::ask(&mut process, row, |process| {
            let answer = process.ask("mark")?;
            let after = Allocated::parse(&answer).with_context(|| format!("not a mark: '{answer}'"))?;
            let profile = process.home().join(format!("profile.{}", instructions.len() + 1));
            let profile = std::fs::read_to_string(&profile).context("callgrind wrote no profile at a mark")?;
            let total = profile.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse::<u64>().ok());
            instructions.push(total.context("a profile has no totals")?);
            allocations.push(after.count - before.count);
            bytes.push(after.bytes - before.bytes);
            before = after;
            Ok(())
        })?;
        Ok(Costs { instructions: each(&instructions)?, allocations: each(&allocations)?, bytes: each(&bytes)? })
    }

    /// How often threads wait for each request, by protocol, when no tool watches.
    ///
    /// # Errors
    /// When the program fails.
    pub fn switches(&self, row: &Tensor) -> Result<[f64; 3]> {
        let mut process = self.start(&[])?;
        let mut waited = Vec::new();
        let mut before = 0;
        Self::ask(&mut process, row, |process| {
            let after = switches(process.id())?;
            waited.push(after.saturating_sub(before));
            before = after;
            Ok(())
        })?;
        each(&waited)
    }

    /// System calls for each request, by protocol.
    ///
    /// # Errors
    /// When strace is missing or may not trace, or the program fails.
    pub fn syscalls(&self, row: &Tensor) -> Result<[f64; 3]> {
        let mut process = self.start(&["strace", "-f", "-qq", "-s8", "-o", "trace"])?;
        Self::ask(&mut process, row, |process| process.ask("mark").map(drop))?;
        let home = process.finish()?;
        let trace = std::fs::read_to_string(home.path().join("trace")).context("strace wrote nothing")?;
        // A mark ends with its answer; the first answers are the addresses.
        let mut parts: Vec<u64> = trace.split("write(1, \"").map(calls).collect();
        // What follows the last mark is the end of the program.
        parts.pop();
        let first = parts.len().checked_sub(LENGTHS.len() * CONCURRENCY.len()).context("a mark is missing")?;
        each(&parts[first..])
    }

    /// Bytes of tensors of `size` that are copied in user space, as a multiple of `size`, over gRPC and REST binary.
    ///
    /// What counts is what goes through `memcpy`, `memmove` and their like, as every copy of a slice of such a size
    /// does; element-wise conversion and the kernel's own copies do not. What half as many requests copy is taken off,
    /// so that the start and the growth of buffers are left out.
    ///
    /// # Errors
    /// When valgrind is missing, or the program fails.
    pub fn copies(&self, row: &Tensor, size: usize) -> Result<Vec<(Protocol, f64)>> {
        let asked = CONCURRENCY.into_iter().filter(|&(protocol, ..)| protocol != Protocol::Json);
        let copies = |(protocol, connections, streams): (Protocol, usize, usize)| {
            let request = protocol.request(stub::MODEL, row)?;
            let copied = |count: usize| {
                let tool =
                    ["valgrind", "--tool=dhat", "--mode=copy", FAIR, "--dhat-out-file=/dev/null", "--log-file=summary"];
                let process = self.start(&tool)?;
                let address = if protocol == Protocol::Grpc { process.grpc } else { process.rest };
                let target = Target { address, pid: Some(process.id()), request: &request, connections, streams };
                load::exactly(&target, &[count], || Ok(()))?;
                total(&process.finish()?)
            };
            Ok((protocol, (copied(2 * COPIED)? - copied(COPIED)?) / (COPIED * size) as f64))
        };
        asked.map(copies).collect()
    }
}

/// What one request takes over each protocol, of what was found at all marks.
fn each(found: &[u64]) -> Result<[f64; 3]> {
    let protocols: Vec<f64> = found
        .chunks_exact(LENGTHS.len())
        .map(|protocol| median(&protocol[1..].iter().map(|&count| count as f64 / COUNTED as f64).collect::<Vec<_>>()))
        .collect();
    protocols.try_into().map_err(|protocols| anyhow!("marks of other than three protocols: {protocols:?}"))
}

/// Calls in a part of a trace, in which a call that another thread's interrupts takes two lines.
fn calls(trace: &str) -> u64 {
    trace.lines().skip(1).filter(|line| line.contains('(') && !line.contains("resumed>")).count() as u64
}

/// Bytes that `dhat` saw copied.
fn total(home: &TempDir) -> Result<f64> {
    let text = std::fs::read_to_string(home.path().join("summary")).context("valgrind wrote no summary")?;
    let number = |line: &str| -> Option<f64> {
        let (_, bytes) = line.split_once("Total:")?;
        bytes.trim().split(' ').next()?.replace(',', "").parse().ok()
    };
    text.lines().find_map(number).with_context(|| format!("no total in valgrind's summary: {text}"))
}

/// How often the threads of a process have waited.
fn switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))? {
        // A thread may end while it is looked at, and takes its number with it.
        let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else { continue };
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.context("a status without switches")?.trim().parse::<u64>()?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_counts_once_however_it_is_interrupted() {
        let trace = "3 42 7\\n\", 5) = 5\n1 recvfrom(9, <unfinished ...>\n2 futex(0x1) = 0\n\
                     1 <... recvfrom resumed>\"a\", 4) = 1\n2 +++ exited with 0 +++\n1 ";
        assert_eq!(calls(trace), 2);
    }

    #[test]
    fn the_median_stands_for_each_protocol_without_its_warm_up() {
        let protocol = |factor: u64| [9_999_999, 400, 400, 800, 80_000, 0].map(|count| count * factor);
        let found: Vec<u64> = [1, 2, 3].into_iter().flat_map(protocol).collect();
        assert_eq!(each(&found).unwrap(), [1.0, 2.0, 3.0]);
        assert!(each(&found[..12]).is_err());
    }

    #[test]
    fn totals_are_read() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("summary"), "==7== DHAT\n==7== Total:     1,234,567 bytes in 8 blocks\n")
            .unwrap();
        assert_eq!(total(&home).unwrap(), 1_234_567.0);
    }

    #[test]
    fn a_process_that_waits_switches() {
        let before = switches(std::process::id()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(switches(std::process::id()).unwrap() > before);
    }
}
