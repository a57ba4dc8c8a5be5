//! Commands: serve, models, rollout, audit, health, config.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use toml::{Table, Value};

#[cfg(feature = "candle")]
use crate::backend::candle::Candle;
use crate::{
    backend::{Backend, Backends, onnx::OnnxRuntime},
    config::{self, Config},
    control::{
        ModelControl, pbtxt,
        spec::{ModelSpec, Profile},
    },
    logging::Logging,
    model::{State, catalog::Catalog},
    server::Server,
};

mod ask;
mod audit;
mod cache;
mod models;
mod print;
mod rollout;

use ask::{Ops, OpsArgs};
pub use print::seen;
use print::{mention, print, say, unheard};

/// Tidegate serves models over REST and gRPC (Open Inference Protocol v2).
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a folder of models.
    Serve(Box<ServeArgs>),
    /// List the models of a running server with their versions, states and reasons, or show one.
    Models(models::ModelsArgs),
    /// Change which version of a model gets requests: step by step, by hand, and back.
    Rollout(Box<rollout::RolloutArgs>),
    /// Show what was changed by whom and why, or verify the log of it.
    Audit(audit::AuditArgs),
    /// Show, check or empty what is kept of models that are elsewhere.
    Cache(cache::CacheArgs),
    /// Exit with 0 when a running server is ready, else with 1.
    Health(OpsArgs),
    /// Show the configuration.
    Config(ConfigArgs),
}

/// Every option is also an environment variable (TIDEGATE_REST) and a key of the file (rest); options win over the
/// environment, the environment over the file.
#[derive(Args)]
struct ServeArgs {
    /// Folder of models: <NAME>/<VERSION>/model.onnx; or s3://BUCKET/PREFIX, gs://…, az://…, https://…,
    /// mlflow://HOST/NAME@ALIAS, hf://ORG/NAME, oci://HOST/NAME:TAG, dvc://CHECKOUT#FILE.dvc [default: ./models]
    #[arg(long, value_name = "PATH")]
    models: Option<PathBuf>,
    #[command(flatten)]
    file: ConfigFile,
    /// Address for REST [default: 0.0.0.0:8000]
    #[arg(long, value_name = "ADDR")]
    rest: Option<SocketAddr>,
    /// Address for gRPC [default: 0.0.0.0:8001]
    #[arg(long, value_name = "ADDR")]
    grpc: Option<SocketAddr>,
    /// Address for operators: metrics, probes, admin [default: 0.0.0.0:8002]
    #[arg(long, value_name = "ADDR")]
    ops: Option<SocketAddr>,
    /// Folder for the server's own files [default: .tidegate inside the models folder]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Folder for what is fetched from elsewhere [default: cache inside the folder for the server's own files]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// How the folder of models is followed [default: watch]
    #[arg(long, value_name = "MODE")]
    model_control: Option<ModelControl>,
    /// Model to load with explicit control; may be repeated, * is all
    #[arg(long, value_name = "NAME")]
    load_model: Vec<String>,
    /// Let loads bring the model's files along
    #[arg(long)]
    allow_model_upload: bool,
    /// Bearer token that loads, unloads, rollouts and changes to logging need; better as TIDEGATE_TOKEN
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// How instances and threads divide the cores [default: latency]
    #[arg(long, value_name = "PROFILE")]
    profile: Option<Profile>,
    /// Be unready as long as any model has failed
    #[arg(long)]
    strict_readiness: bool,
    /// ONNX Runtime library, or the folder that holds it
    #[arg(long, value_name = "PATH")]
    onnxruntime: Option<PathBuf>,
    /// Log level or filter, "debug" for instance [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

#[derive(Args)]
struct ConfigFile {
    /// Configuration file [default: ./tidegate.toml, when present]
    #[arg(long, value_name = "FILE", env = "TIDEGATE_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Args)]
#[command(arg_required_else_help = true)]
struct ConfigArgs {
    /// Print the documented default file
    #[arg(long)]
    defaults: bool,
    #[command(subcommand)]
    action: Option<ConfigAction>,
}

#[derive(Subcommand)]
enum ConfigAction {
    /// Print a model's config.pbtxt as model.toml, or its model.toml as config.pbtxt.
    Convert {
        /// The file to convert; its extension tells which of the two it is
        file: PathBuf,
    },
}

/// Runs the command line.
///
/// # Errors
/// Whatever kept the command from its work, in one chain of sentences.
pub fn run() -> anyhow::Result<ExitCode> {
    obey(Cli::parse().command).or_else(|error| unheard(&error).ok_or(error))
}

fn obey(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => serve(&args),
        Command::Models(args) => models::models(&args),
        Command::Rollout(args) => rollout::run(&args),
        Command::Audit(args) => audit::run(&args),
        Command::Cache(args) => cache::run(&args),
        Command::Health(args) => health(&args),
        Command::Config(ConfigArgs { action: Some(ConfigAction::Convert { file }), .. }) => convert(&file),
        Command::Config(ConfigArgs { action: None, .. }) => {
            print(&config::documented_defaults())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl ServeArgs {
    /// The options that were given, as the configuration file would say them.
    fn table(&self) -> anyhow::Result<Table> {
        let path = |path: &PathBuf| path.to_str().map(Value::from).context("paths must be UTF-8");
        let mut table = Table::new();
        let mut set = |key: &str, value: Option<Value>| value.map(|value| table.insert(key.to_owned(), value));
        set("models", self.models.as_ref().map(path).transpose()?);
        set("data", self.data.as_ref().map(path).transpose()?);
        set("onnxruntime", self.onnxruntime.as_ref().map(path).transpose()?);
        set("rest", self.rest.map(|address| address.to_string().into()));
        set("grpc", self.grpc.map(|address| address.to_string().into()));
        set("ops", self.ops.map(|address| address.to_string().into()));
        set("model_control", self.model_control.map(Value::try_from).transpose()?);
        set("profile", self.profile.map(Value::try_from).transpose()?);
        set("load_model", (!self.load_model.is_empty()).then(|| self.load_model.clone().into()));
        set("allow_model_upload", self.allow_model_upload.then(|| true.into()));
        set("token", self.token.clone().map(Value::from));
        set("strict_readiness", self.strict_readiness.then(|| true.into()));
        let within = |key: &str, value: Value| Value::Table(Table::from_iter([(key.to_owned(), value)]));
        let cache = self.cache.as_ref().map(path).transpose()?;
        set("cache", cache.map(|directory| within("directory", directory)));
        set("log", self.log_level.as_ref().map(|level| within("level", level.clone().into())));
        Ok(table)
    }
}

impl ConfigFile {
    /// The configuration as the file, the environment and `options` have it, and variables that no key goes by.
    fn load(&self, options: Table) -> anyhow::Result<(Config, Vec<String>)> {
        let environment =
            std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
        Config::load(self.config.as_deref(), environment, options)
    }
}

fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let (config, unknown) = args.file.load(args.table()?)?;
    let logging = Logging::start(&config.log)?;
    if !unknown.is_empty() {
        tracing::warn!(variables = unknown.join(" "), "environment variables that no key goes by are ignored");
    }
    let dylib = std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
    let onnx = OnnxRuntime::open(config.onnxruntime.clone().or(dylib).as_deref(), config.shared_threads)?;
    let onnx = onnx.with_scratch(config.data_directory());
    let version = onnx.version().to_owned();
    // Where a folder has files for several, the first is chosen.
    let backends = Backends::new([
        Arc::new(onnx) as Arc<dyn Backend>,
        #[cfg(feature = "candle")]
        Arc::new(Candle::open()?),
    ]);
    let server = Server::start(&config, backends, &version, logging)?;
    mention(format_args!("tidegate {} with ONNX Runtime {version}", env!("CARGO_PKG_VERSION")));
    mention(format_args!("  REST  http://{}", server.rest));
    mention(format_args!("  gRPC  {}", server.grpc));
    mention(format_args!("  ops   http://{}", server.ops));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(attend(&server, &config))?;
    let cut = server.wait()?;
    if cut > 0 {
        anyhow::bail!("{cut} requests or connections were cut short");
    }
    Ok(ExitCode::SUCCESS)
}

/// Says when the models are ready, and passes signals on.
async fn attend(server: &Server, config: &Config) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut changes = server.catalog().changes();
    let stopper = server.stopper();
    let mut announced = false;
    loop {
        tokio::select! {
            () = stopper.stopped() => return Ok(()),
            _ = terminate.recv() => stopper.stop(config.shutdown.drain_delay),
            _ = interrupt.recv() => stopper.stop(Duration::ZERO),
            // Every new catalog wakes this until the first pass over the repository is over.
            _ = changes.changed(), if !announced => {
                let catalog = server.catalog().load();
                if catalog.complete {
                    announce(&catalog, server);
                    announced = true;
                }
            }
        }
    }
}

fn announce(catalog: &Catalog, server: &Server) {
    let rest = server.rest;
    for (name, deployment) in &catalog.deployments {
        for entry in &deployment.entries {
            let reason = if entry.reason.is_empty() { String::new() } else { format!(" ({})", entry.reason) };
            mention(format_args!("  model {name} {} {}{reason}", entry.version, entry.state.as_str()));
        }
        if let Some(problem) = &deployment.problem {
            mention(format_args!("  model {name} {} ({problem})", State::Failed.as_str()));
        }
    }
    let host = if rest.ip().is_unspecified() { format!("localhost:{}", rest.port()) } else { rest.to_string() };
    let sample = catalog.serving().find_map(|version| {
        let sample = server.models.join(version.name.as_str()).join("request.json");
        sample.is_file().then(|| (version.name.clone(), sample))
    });
    match sample {
        Some((name, sample)) => {
            mention(format_args!("  try   curl http://{host}/v2/models/{name}/infer -d @{}", sample.display()));
        }
        None => mention(format_args!("  try   curl http://{host}/v2")),
    }
}

/// Prints what the file says in the other language, behind comments about what that cannot say.
fn convert(file: &Path) -> anyhow::Result<ExitCode> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).with_context(|| shown.to_string())?;
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("pbtxt") => {
            let spec = pbtxt::parse(&text).with_context(|| shown.to_string())?;
            spec.notes.iter().try_for_each(|note| say(format_args!("# {note}")))?;
            print(&spec.to_toml().map_err(anyhow::Error::msg)?)?;
        }
        Some("toml") => {
            let spec = ModelSpec::from_toml(&text).map_err(anyhow::Error::msg).with_context(|| shown.to_string())?;
            let (text, left_out) = pbtxt::to_text(&spec)?;
            left_out.iter().try_for_each(|key| say(format_args!("# {key} cannot be said here")))?;
            print(&text)?;
        }
        _ => bail!("{shown}: its name must end in .pbtxt or .toml"),
    }
    Ok(ExitCode::SUCCESS)
}

fn health(args: &OpsArgs) -> anyhow::Result<ExitCode> {
    let (status, _) = Ops::new(args)?.fetch("/readyz")?;
    // The exit code is the answer, also for those who do not read.
    mention(format_args!("{}", if status.is_success() { "ready" } else { "not ready" }));
    Ok(if status.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
