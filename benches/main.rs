//! What a server in front of a model costs: `make bench` measures it and prints a table.

use std::{io::Write, path::PathBuf};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod counters;
mod counting;
mod echo;
mod figures;
mod inprocess;
mod load;
mod machine;
mod pairs;
mod process;
mod report;
mod requests;
mod statistics;
mod stub;
mod wire;

use figures::{Bench, Pace};
use process::Programs;
use report::Report;
use stub::Stub;

/// The server's allocator, for the echo and for what runs in-process.
#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// Measures the release binary against an echo on the same stack and against the model without a server.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure everything.
    Measure {
        /// The release binary.
        #[arg(long, default_value = "target/release/tidegate")]
        server: PathBuf,
        /// The folder with `iris`.
        #[arg(long, default_value = "models")]
        models: PathBuf,
        /// The model file of `magika`; without it, its figures are left out.
        #[arg(long)]
        magika: Option<PathBuf>,
        /// The ONNX Runtime library, or the folder that holds it.
        #[arg(long, env = "ORT_DYLIB_PATH", default_value = ".onnxruntime")]
        onnxruntime: PathBuf,
        /// Where the figures are written as JSON.
        #[arg(long, default_value = "target/bench.json")]
        json: PathBuf,
        /// Fewer and shorter windows: minutes instead of a quarter of an hour.
        #[arg(long, env = "QUICK", value_parser = clap::builder::FalseyValueParser::new())]
        quick: bool,
    },
    /// Count what no noise can touch, and compare it with what was counted before.
    Counters {
        /// What was counted before.
        #[arg(long, default_value = "benches/results/counters.json")]
        baseline: PathBuf,
        /// Let what is counted now be what later counts are compared with.
        #[arg(long, env = "UPDATE_COUNTERS", value_parser = clap::builder::FalseyValueParser::new())]
        update: bool,
    },
    /// Serve as the echo does until standard input ends; for the benchmark itself.
    #[command(hide = true)]
    Echo,
    /// Serve a model that costs nothing, or so much, until standard input ends; for the benchmark itself.
    #[command(hide = true)]
    Stub(Stub),
    /// Print the seconds it takes to load a model's session; for the benchmark itself.
    #[command(hide = true)]
    Load { files: PathBuf },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Echo => {
            let server = echo::Server::bind()?;
            let [rest, grpc] = server.addresses();
            writeln!(std::io::stdout(), "  REST  http://{rest}\n  gRPC  {grpc}\n  try   asking")?;
            // Serves on until standard input ends, and with it this process.
            let failed = std::thread::spawn(move || server.serve());
            counting::answer()?;
            match failed.is_finished().then(|| failed.join()) {
                Some(Ok(result)) => result,
                Some(Err(_)) => anyhow::bail!("the echo panicked"),
                None => Ok(()),
            }
        }
        Command::Stub(stub) => stub.serve(counting::answer),
        Command::Counters { baseline, update } => {
            process::end_children_on_signals()?;
            counters::run(&baseline, update)
        }
        Command::Load { files } => Ok(writeln!(std::io::stdout(), "{}", inprocess::load_time(&files)?)?),
        Command::Measure { server, models, magika, onnxruntime, json, quick } => {
            process::end_children_on_signals()?;
            let cores = machine::Cores::choose()?;
            let programs = Programs {
                server: server.canonicalize()?,
                onnxruntime: onnxruntime.canonicalize()?,
                core: cores.server,
            };
            machine::pin(cores.generator)?;
            let pace = if quick { Pace::QUICK } else { Pace::FULL };
            let mut bench = Bench::new(programs, pace, models.canonicalize()?, Report::new(quick))?;
            bench.measure(magika.as_deref())?;
            bench.report.write(&json)?;
            Ok(writeln!(std::io::stdout(), "{}", bench.report.markdown())?)
        }
    }
}
