//! What a server in front of a model costs: `make bench` measures it and prints a table.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod answers;
mod counters;
mod counting;
mod echo;
mod encoder;
mod figures;
mod ideal;
mod inprocess;
mod load;
mod machine;
mod pairs;
mod process;
mod report;
mod requests;
mod statistics;
mod stub;
mod targets;
mod texts;
mod wire;

use figures::{Bench, Family, Models, Pace, Peer};
use process::Programs;
use report::Report;
use stub::Stub;

/// The server's allocator, for the echo and for what runs in-process.
#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// Results that matter are kept here.
const RESULTS: &str = "benches/results";
/// Among them what `make bench-counters` has counted.
const COUNTERS: &str = "benches/results/counters.json";

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
        /// The folder of the models that are shipped.
        #[arg(long, default_value = "models")]
        models: PathBuf,
        /// The folder of the models that the scripts in `benches/models` make.
        #[arg(long, default_value = "target/bench/models")]
        made: PathBuf,
        /// The model file of `magika`; without it, its figures are left out.
        #[arg(long)]
        magika: Option<PathBuf>,
        /// The folder of `all-MiniLM-L6-v2`, as Hugging Face has it; without it, the figures of texts are left out.
        #[arg(long)]
        minilm: Option<PathBuf>,
        /// The ONNX Runtime library, or the folder that holds it.
        #[arg(long, env = "ORT_DYLIB_PATH", default_value = ".onnxruntime")]
        onnxruntime: PathBuf,
        /// The folder for `report.json` and `report.md`.
        #[arg(long, default_value = "target/bench")]
        out: PathBuf,
        /// Keep the report under this name in `benches/results`, too.
        #[arg(long, env = "KEEP")]
        keep: Option<String>,
        /// Only these families of figures, with commas between them.
        #[arg(long, env = "FIGURES", value_delimiter = ',')]
        figures: Vec<Family>,
        /// Fewer and shorter windows: minutes instead of most of an hour.
        #[arg(long, env = "QUICK", value_parser = clap::builder::FalseyValueParser::new())]
        quick: bool,
    },
    /// Measure another server of the Open Inference Protocol.
    Peer {
        /// Where its REST port is: http://host:port.
        #[arg(long)]
        rest: String,
        /// Where its gRPC port is, host:port; without it, gRPC is left out.
        #[arg(long)]
        grpc: Option<String>,
        /// A model that it serves.
        #[arg(long, default_value = "iris")]
        model: String,
        /// The folder for `peer.json` and `peer.md`.
        #[arg(long, default_value = "target/bench")]
        out: PathBuf,
        /// Keep the report under this name in `benches/results`, too.
        #[arg(long, env = "KEEP")]
        keep: Option<String>,
        /// Fewer and shorter windows.
        #[arg(long, env = "QUICK", value_parser = clap::builder::FalseyValueParser::new())]
        quick: bool,
    },
    /// Count what no noise can touch, and compare it with what was counted before.
    Counters {
        /// What was counted before.
        #[arg(long, default_value = COUNTERS)]
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
    /// Count so many answers as a server does; for the benchmark itself.
    #[command(hide = true)]
    Tally { answers: usize },
    /// Print the seconds it takes to load a model's session; for the benchmark itself.
    #[command(hide = true)]
    Load { files: PathBuf },
}

fn main() -> Result<()> {
    // As the server does: candle would else read /proc/cpuinfo before each product, and what runs in this process has one core.
    #[expect(
        unsafe_code,
        clippy::disallowed_methods,
        reason = "no other thread exists yet that could read the environment"
    )]
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    }
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
        Command::Tally { answers } => counters::tally::count(answers),
        Command::Load { files } => Ok(writeln!(std::io::stdout(), "{}", inprocess::load_time(&files)?)?),
        Command::Peer { rest, grpc, model, out, keep, quick } => {
            let cores = machine::Cores::choose()?;
            machine::pin(&[cores.generator])?;
            let mut report = Report::of_peer(&rest, quick);
            Peer { rest, grpc, model }.measure(pace(quick), &mut report)?;
            finish(&report, &out, "peer", keep.as_deref())
        }
        Command::Measure { server, models, made, magika, minilm, onnxruntime, out, keep, figures, quick } => {
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
            let models = Models { shipped: models, made, magika, minilm };
            let mut bench = Bench::new(programs, *pace(quick), &models, Report::new(quick))?;
            bench.measure(&figures)?;
            if figures.is_empty() {
                counters::report(Path::new(COUNTERS), &mut bench.report)?;
            }
            finish(&bench.report, &out, "report", keep.as_deref())
        }
    }
}

fn pace(quick: bool) -> &'static Pace {
    if quick { &Pace::QUICK } else { &Pace::FULL }
}

/// Writes the report, and prints it.
fn finish(report: &Report, out: &Path, name: &str, keep: Option<&str>) -> Result<()> {
    report.write(out, name, keep.map(|name| (Path::new(RESULTS), name)))?;
    Ok(writeln!(std::io::stdout(), "{}", report.markdown())?)
}
