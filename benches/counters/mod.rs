//! What a request costs in things that noise cannot touch: instructions, allocations, copies. `make bench-counters`
//! prints them and fails when one has grown.
//!
//! Everything is counted at 64-way concurrency with rows of 4 KB and a model that costs nothing, in the server and in
//! the echo alike; what the server takes above the echo is its own. Only copies are counted with rows of 602 KB, beside
//! which nothing else that is copied shows.
//!
//! Timing still has a say: it decides which requests share a batch, and so how often a thread is woken. Repeated on one
//! machine, counts differ by less than 1 %.

use std::{io::Write, path::Path};

use anyhow::Result;

use crate::{report::say, requests::Protocol, stub::Stub};

mod baseline;
mod subject;

use baseline::{Baseline, Counter};
use subject::Subject;

/// W4: batches of eight are filled at once by 64 requests, however they come.
const SMALL: Stub = Stub { inputs: 1024, outputs: 1024, largest_batch: 8, spin: 0 };
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
        return Baseline::of(&counters).write(path);
    }
    baseline.check(&counters)
}

fn count() -> Result<Vec<Counter>> {
    let row = SMALL.row()?;
    let (server, echo) = (Subject::server(SMALL), Subject::echo());
    let mut counters = Vec::new();
    say(format_args!("counting instructions"));
    let instructions = [server.instructions(&row)?, echo.instructions(&row)?];
    say(format_args!("counting allocations"));
    let allocations = [server.allocations(&row)?, echo.allocations(&row)?];
    say(format_args!("counting syscalls"));
    let syscalls = [server.syscalls(&row)?, echo.syscalls(&row)?];
    for (index, protocol) in Protocol::ALL.into_iter().enumerate() {
        let mut add = |name, [server, echo]: [f64; 2]| counters.extend(Counter::compared(name, protocol, server, echo));
        add("instructions", instructions.each_ref().map(|counts| counts[index]));
        add("allocations", allocations.each_ref().map(|counts| counts[index].count));
        add("allocated_bytes", allocations.each_ref().map(|counts| counts[index].bytes));
        add("syscalls", syscalls.each_ref().map(|counts| counts[index]));
        add("switches", allocations.each_ref().map(|counts| counts[index].switches));
    }
    for (name, inputs, outputs) in [("copies_in", IMAGE, LITTLE), ("copies_out", LITTLE, IMAGE)] {
        say(format_args!("counting {name}"));
        let stub = Stub { inputs, outputs, ..SMALL };
        let copies = Subject::server(stub).copies(&stub.row()?, IMAGE * size_of::<f32>())?;
        counters.extend(copies.into_iter().map(|(protocol, copies)| Counter::copies(name, protocol, copies)));
    }
    Ok(counters)
}
