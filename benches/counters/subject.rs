//! A program that is counted while it is asked, under a tool that sees what is to be counted.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use tempfile::TempDir;
use tidegate::tensor::Tensor;

use crate::{
    counting::Allocated,
    load::{self, Target},
    machine::Cores,
    process::{self, Process},
    requests::Protocol,
    stub::{self, Stub},
};

/// Requests before those that count: buffers have grown, branches of lazy initialisation are behind.
const WARM: usize = 400;
/// Requests that count. Twice as many give the same counts.
const COUNTED: usize = 2000;
/// Requests of 602 KB, which fill 64 streams twice.
const COPIED: usize = 128;
/// How many requests are open at a time, as connections and streams; HTTP/1.1 has one stream.
const CONCURRENCY: [(Protocol, usize, usize); 3] =
    [(Protocol::Grpc, 4, 16), (Protocol::Json, 64, 1), (Protocol::Binary, 64, 1)];

/// What is counted: the server with a stub for a model, or the echo.
pub struct Subject(Vec<String>);

/// What a request costs a process that no tool watches.
pub struct Costs {
    pub count: f64,
    pub bytes: f64,
    /// Times that a thread of it waited.
    pub switches: f64,
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
        process::start(command, Cores::choose()?.server, tempfile::tempdir()?)
    }

    /// Asks `process` over each protocol, as often as `lengths` says, and calls `done` after each.
    fn ask(
        process: &mut Process,
        row: &Tensor,
        lengths: &[usize],
        mut done: impl FnMut(&mut Process) -> Result<()>,
    ) -> Result<()> {
        for (protocol, connections, streams) in CONCURRENCY {
            let request = protocol.request(stub::MODEL, row)?;
            let address = if protocol == Protocol::Grpc { process.grpc } else { process.rest };
            let target = Target { address, pid: process.id(), request: &request, connections, streams };
            load::exactly(&target, lengths, || done(process)).with_context(|| format!("over {protocol:?}"))?;
        }
        Ok(())
    }

    /// Instructions in user space for each request, by protocol.
    ///
    /// # Errors
    /// When valgrind is missing, or the program fails.
    pub fn instructions(&self, row: &Tensor) -> Result<[f64; 3]> {
        let tool = [
            "valgrind",
            "--tool=callgrind",
            // Threads run in turn, as they do on one core, and not as whoever grabs the lock first.
            "--fair-sched=yes",
            "--callgrind-out-file=profile",
            "--dump-before=*counting*mark*",
        ];
        let mut process = self.start(&tool)?;
        let mut profiles = Vec::new();
        Self::ask(&mut process, row, &[WARM, COUNTED], |process| {
            process.ask("mark")?;
            let path = process.home().join(format!("profile.{}", profiles.len() + 1));
            let text = std::fs::read_to_string(&path).context("callgrind wrote no profile at a mark")?;
            let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse::<f64>().ok());
            profiles.push(totals.context("a profile has no totals")? / COUNTED as f64);
            Ok(())
        })?;
        Ok(each_second(&profiles))
    }

    /// Allocations, and how often threads waited, for each request, by protocol.
    ///
    /// # Errors
    /// When the program fails.
    pub fn allocations(&self, row: &Tensor) -> Result<[Costs; 3]> {
        let mut process = self.start(&[])?;
        let mut marks = Vec::new();
        Self::ask(&mut process, row, &[WARM, COUNTED], |process| {
            let answer = process.ask("mark")?;
            let allocated = Allocated::parse(&answer).with_context(|| format!("not a mark: '{answer}'"))?;
            marks.push((allocated, switches(process.id())?));
            Ok(())
        })?;
        let costs = |pair: usize| {
            let ((before, waited_before), (after, waited)) = (marks[2 * pair], marks[2 * pair + 1]);
            let each = |before: u64, after: u64| after.saturating_sub(before) as f64 / COUNTED as f64;
            Costs {
                count: each(before.count, after.count),
                bytes: each(before.bytes, after.bytes),
                switches: each(waited_before, waited),
            }
        };
        Ok([costs(0), costs(1), costs(2)])
    }

    /// System calls for each request, by protocol.
    ///
    /// # Errors
    /// When strace is missing or may not trace, or the program fails.
    pub fn syscalls(&self, row: &Tensor) -> Result<[f64; 3]> {
        let mut process = self.start(&["strace", "-f", "-qq", "-s8", "-o", "trace"])?;
        Self::ask(&mut process, row, &[WARM, COUNTED], |process| process.ask("mark").map(drop))?;
        let home = process.finish()?;
        let trace = std::fs::read_to_string(home.path().join("trace")).context("strace wrote nothing")?;
        // A mark ends with its answer; the first answers are the addresses.
        let parts: Vec<f64> = trace.split("write(1, \"").map(|part| calls(part) as f64 / COUNTED as f64).collect();
        let marks = parts.len().checked_sub(2 * CONCURRENCY.len() + 1).context("a mark is missing")?;
        Ok(each_second(&parts[marks..]))
    }

    /// Bytes of tensors of `size` that are copied in user space, as a multiple of `size`, over gRPC and REST binary.
    ///
    /// What counts is what goes through `memcpy`, `memmove` and their like, as every copy of a slice of such a size
    /// does; element-wise conversion and the kernel's own copies do not. What a start without requests copies is taken
    /// off.
    ///
    /// # Errors
    /// When valgrind is missing, or the program fails.
    pub fn copies(&self, row: &Tensor, size: usize) -> Result<Vec<(Protocol, f64)>> {
        let copied = |asked: Option<(Protocol, usize, usize)>| -> Result<f64> {
            let tool = ["valgrind", "--tool=dhat", "--mode=copy", "--dhat-out-file=/dev/null", "--log-file=summary"];
            let process = self.start(&tool)?;
            if let Some((protocol, connections, streams)) = asked {
                let request = protocol.request(stub::MODEL, row)?;
                let address = if protocol == Protocol::Grpc { process.grpc } else { process.rest };
                let target = Target { address, pid: process.id(), request: &request, connections, streams };
                load::exactly(&target, &[COPIED], || Ok(()))?;
            }
            total(&process.finish()?)
        };
        let start = copied(None)?;
        let asked = CONCURRENCY.into_iter().filter(|&(protocol, ..)| protocol != Protocol::Json);
        asked.map(|asked| Ok((asked.0, (copied(Some(asked))? - start) / (COPIED * size) as f64))).collect()
    }
}

/// What was counted after the warm-up of each protocol.
fn each_second(counts: &[f64]) -> [f64; 3] {
    [1, 3, 5].map(|index| counts.get(index).copied().unwrap_or(f64::NAN))
}

/// Calls in a part of a trace, in which a call that another thread's interrupts takes two lines.
fn calls(trace: &str) -> usize {
    trace.lines().skip(1).filter(|line| line.contains('(') && !line.contains("resumed>")).count()
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
        let status = std::fs::read_to_string(task?.path().join("status"))?;
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
