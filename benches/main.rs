//! What a server in front of a model costs: `make bench` measures it and prints a table.

use std::{io::Write, path::PathBuf};

use anyhow::Result;
use clap::{Parser, Subcommand};

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
mod wire;

use figures::{Bench, Pace};
use process::Programs;
use report::Report;

/// The server's allocator, for the echo and for what runs in-process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
        /// The folder of the models that the scripts in `benches/models` make.
        #[arg(long, default_value = "target/bench/models")]
        made: PathBuf,
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
    /// Serve as the echo does; for the benchmark itself.
    #[command(hide = true)]
    Echo,
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
            server.serve()
        }
        Command::Load { files } => Ok(writeln!(std::io::stdout(), "{}", inprocess::load_time(&files)?)?),
        Command::Measure { server, models, made, magika, onnxruntime, json, quick } => {
            process::end_children_on_signals()?;
            let cores = machine::Cores::choose()?;
            let programs = Programs {
                server: server.canonicalize()?,
                onnxruntime: onnxruntime.canonicalize()?,
                core: cores.server,
                generator: cores.generator,
                both: false,
            };
            machine::pin(&[cores.generator])?;
            let pace = if quick { Pace::QUICK } else { Pace::FULL };
            let mut bench =
                Bench::new(programs, pace, models.canonicalize()?, made.canonicalize()?, Report::new(quick))?;
            bench.measure(magika.as_deref())?;
            bench.report.write(&json)?;
            Ok(writeln!(std::io::stdout(), "{}", bench.report.markdown())?)
        }
    }
}
