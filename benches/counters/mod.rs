//! What a request costs in things that noise cannot touch: instructions, allocations, copies. `make bench-counters`
//! prints them and fails when one has grown.
//!
//! Everything is counted at 64-way concurrency with rows of 4 KB and a model that costs nothing, in the server and in
//! the echo alike; what the server takes above the echo is its own. Only copies are counted with rows of 602 KB, beside
//! which nothing else that is copied shows.
//!
//! Timing still has a say: it decides which requests share a batch, and so how often a thread is woken and how much is
//! gathered. Under valgrind it says nearly the same every time, because threads run in turn.

use std::{io::Write, path::Path};

use anyhow::Result;

use crate::{
    report::{Report, commit, say},
    requests::Protocol,
    stub::{self, Stub},
};

mod baseline;
mod subject;
pub mod tally;

use baseline::{Baseline, Counter};
use subject::Subject;

/// W4 without its spin: 64 requests fill batches of eight however they come.
const SMALL: Stub = Stub { spin: 0, ..stub::W4 };
/// An image of 3 × 224 × 224, and next to nothing.
const IMAGE: usize = 3 * 224 * 224;
const LITTLE: usize = 16;

/// Counts, prints, and compares with `path`, or writes it.
///
/// # Errors
/// When something cannot be counted, or has grown; the message names it.
pub fn run(path: &Path, update: bool) -> Result<()> {
    let counters = count()?;
    let baseline = Baseline::read(path)?;
    writeln!(std::io::stdout(), "{}", baseline.table(&counters))?;
    if update {
        return Baseline::of(&counters, &commit()).write(path);
    }
    baseline.check(&counters)
}

/// Adds what was counted before to a report, if it was.
///
/// # Errors
/// When it cannot be read.
pub fn report(path: &Path, report: &mut Report) -> Result<()> {
    if path.exists() {
        Baseline::read(path)?.report(report);
    } else {
        say(format_args!("there is no {}: what is counted is left out", path.display()));
    }
    Ok(())
}

fn count() -> Result<Vec<Counter>> {
    let row = SMALL.row()?;
    let (server, echo) = (Subject::server(SMALL), Subject::echo());
    let mut counters = Vec::new();
    say(format_args!("counting instructions and allocations"));
    let costs = [server.costs(&row)?, echo.costs(&row)?];
    say(format_args!("counting syscalls and context switches"));
    let syscalls = [server.syscalls(&row)?, echo.syscalls(&row)?];
    let switches = [server.switches(&row)?, echo.switches(&row)?];
    for (index, protocol) in Protocol::ALL.into_iter().enumerate() {
        let mut add = |name, [server, echo]: [f64; 2]| counters.extend(Counter::compared(name, protocol, server, echo));
        add("instructions", costs.each_ref().map(|costs| costs.instructions[index]));
        add("allocations", costs.each_ref().map(|costs| costs.allocations[index]));
        add("allocated_bytes", costs.each_ref().map(|costs| costs.bytes[index]));
        add("syscalls", syscalls.map(|counts| counts[index]));
        add("switches", switches.map(|counts| counts[index]));
    }
    for (name, inputs, outputs) in [("copies_in", IMAGE, LITTLE), ("copies_out", LITTLE, IMAGE)] {
        say(format_args!("counting {name}"));
        let stub = Stub { inputs, outputs, ..SMALL };
        let copies = Subject::server(stub).copies(&stub.row()?, IMAGE * size_of::<f32>())?;
        counters.extend(copies.into_iter().map(|(protocol, copies)| Counter::copies(name, protocol, copies)));
    }
    say(format_args!("counting instructions of counting"));
    counters.push(Counter::tally(tally::instructions()?));
    Ok(counters)
}
