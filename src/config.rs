//! One `Config`, made of the modules' own: file, then environment, then flags; documented from the same source.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value as Json;
use toml::{Table, Value};

use crate::{
    api::{LimitsConfig, auth::Token, client::Clients, codec::NonFinite, shared_memory::SharedMemoryConfig},
    control::{ModelControl, spec::Profile},
    engine::shadow::ShadowConfig,
    logging::LogConfig,
    model::QueueConfig,
    source::{SourceUri, WriteBack, cache::CacheConfig, follow::FollowConfig, signed::SignatureConfig},
};

/// The file that is read when none is named.
pub const DEFAULT_FILE: &str = "tidegate.toml";
const ENVIRONMENT_PREFIX: &str = "TIDEGATE_";

/// Everything an operator may set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of models: `<name>/<version>/model.onnx`. Or where such a repository, or a single model, is mirrored
    /// from: `s3://bucket/prefix`, `gs://…`, `az://container/prefix`, with credentials and endpoints from the
    /// environment (AWS_…, GOOGLE_…, AZURE_…), or `https://host/path` of a web server that speaks WebDAV; a registered
    /// model, `mlflow://host:5000/name@alias` (`/3`, `/Production`, `/latest`; `mlflow+https://…`, `models:/…`), a
    /// repository of a Hugging Face hub, `hf://org/name@revision`, an artifact or image of a registry,
    /// `oci://registry/name:tag` (or `@sha256:…`), or what DVC tracks in a checkout, `dvc://path/to/checkout#name.dvc`.
    #[serde(serialize_with = "without_login")]
    pub models: PathBuf,
    /// Where the server keeps its own files. Default: `.tidegate` inside the models folder, or in the working folder
    /// when the models are mirrored.
    pub data: Option<PathBuf>,
    /// Address of the REST port.
    pub rest: SocketAddr,
    /// Address of the gRPC port.
    pub grpc: SocketAddr,
    /// Address of the operators' port: metrics, probes, admin.
    pub ops: SocketAddr,
    /// What is fetched from elsewhere, and kept.
    pub cache: CacheConfig,
    /// How places elsewhere are followed.
    pub follow: FollowConfig,
    /// Whose models are served.
    pub signatures: SignatureConfig,
    /// What MLflow's registry is told of the versions, when `models` is a model there. One that names its own `source`
    /// has this table in its model.toml.
    pub write_back: WriteBack,
    /// How the repository is followed: "watch", "explicit" or "none".
    pub model_control: ModelControl,
    /// Models to load with explicit control; "*" is all.
    pub load_model: Vec<String>,
    /// Whether a load may bring the model's files along. They are kept in a folder for temporary files (TMPDIR) until
    /// the model is unloaded, never in the repository; one call may bring 1000 files of `limits.max_message_bytes`
    /// together.
    pub allow_model_upload: bool,
    /// The bearer token that changes by request (load, unload, rollouts, logging) need, from everyone. Without one they
    /// are allowed to callers on this machine only, and not with a header `Origin`, `Forwarded`, `X-Forwarded-For` or
    /// `Via`: web pages and proxies speak for others. A proxy on this machine that sends none of these passes for a
    /// caller here, so set a token there. In the environment (TIDEGATE_TOKEN) it does not show in the list of
    /// processes.
    pub token: Option<Token>,
    /// The secret that an MLflow server signs its webhooks with. With it, `POST /hooks/mlflow` on the operators' port has
    /// what follows MLflow look at once, and not at the next interval only.
    pub mlflow_webhook_secret: Option<Token>,
    /// The ONNX Runtime library, or the folder that holds it. Default: beside the binary, ./.onnxruntime, the system's.
    pub onnxruntime: Option<PathBuf>,
    /// How instances and threads divide the cores: "latency" (one instance on all) or "throughput" (one per core).
    pub profile: Profile,
    /// Operator threads of one pool that all models share; then their own thread counts do not count. Default: a pool
    /// per instance.
    pub shared_threads: Option<usize>,
    /// Whether one failed model makes the whole server unready.
    pub strict_readiness: bool,
    /// How NaN and infinities are written in JSON: "literal" (as Triton does), "null" or "error".
    pub json_nonfinite: NonFinite,
    /// Threads that serve connections. Default: half of the cores.
    pub io_threads: Option<usize>,
    /// Models that load at a time. Default: half of the cores.
    pub load_concurrency: Option<usize>,
    /// Bounds of what a client may send, and how slowly.
    pub limits: LimitsConfig,
    /// Bounds of each version's queue; a request for which it has no room is answered at once with "overloaded".
    pub queue: QueueConfig,
    /// Bounds of shadow copies; those beyond them are shed, and live requests notice nothing.
    pub shadow: ShadowConfig,
    /// Tensors in shared memory, for clients on this machine.
    pub shared_memory: SharedMemoryConfig,
    /// How the server stops.
    pub shutdown: ShutdownConfig,
    /// What is written to standard error.
    pub log: LogConfig,
}

/// Writes a place as it may be shown.
fn without_login<S: Serializer>(models: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    match models.to_str().map(SourceUri::parse) {
        Some(Ok(uri)) if uri.folder().is_none() => serializer.collect_str(&uri),
        _ => models.serialize(serializer),
    }
}

impl Default for Config {
    fn default() -> Self {
        let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
        Self {
            models: "./models".into(),
            data: None,
            rest: any(8000),
            grpc: any(8001),
            ops: any(8002),
            cache: CacheConfig::default(),
            follow: FollowConfig::default(),
            signatures: SignatureConfig::default(),
            write_back: WriteBack::default(),
            model_control: ModelControl::default(),
            load_model: Vec::new(),
            allow_model_upload: false,
            token: None,
            mlflow_webhook_secret: None,
            onnxruntime: None,
            profile: Profile::default(),
            shared_threads: None,
            strict_readiness: false,
            json_nonfinite: NonFinite::default(),
            io_threads: None,
            load_concurrency: None,
            limits: LimitsConfig::default(),
            queue: QueueConfig::default(),
            shadow: ShadowConfig::default(),
            shared_memory: SharedMemoryConfig::default(),
            shutdown: ShutdownConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// How the server stops.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownConfig {
    /// How long requests are still accepted after SIGTERM, while readiness is false already.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub drain_delay: Duration,
    /// How long open requests may take after that; also how long a replaced version may take to finish its own.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub drain_timeout: Duration,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { drain_delay: Duration::from_secs(5), drain_timeout: Duration::from_secs(30) }
    }
}

impl Config {
    /// Reads the file (`file`, or the default one if it is there), lays the environment over it and the flags over
    /// that. Also returns the environment variables that look meant for us and are not known.
    ///
    /// # Errors
    /// Naming the file, the variable or the key.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: Table,
    ) -> anyhow::Result<(Self, Vec<String>)> {
        let default_file = Path::new(DEFAULT_FILE);
        let mut table = match file {
            Some(path) => read(path)?,
            None if default_file.is_file() => read(default_file)?,
            None => Table::new(),
        };
        let mut unknown = Vec::new();
        let known = fields();
        for (name, text) in environment {
            let Some(key) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
            let path: Vec<String> = key.split("__").map(str::to_lowercase).collect();
            if known.iter().any(|field| field.path == path) {
                overlay(&mut table, from_environment(&name, &path, &text)?);
            } else if key != "CONFIG" {
                // Kubernetes sets TIDEGATE_PORT and others for a service of our name: strange ones must not stop us.
                unknown.push(name);
            }
        }
        overlay(&mut table, flags);
        let config: Config = Value::Table(table).try_into().context("the configuration is not valid")?;
        config.validate()?;
        Ok((config, unknown))
    }

    fn validate(&self) -> anyhow::Result<()> {
        let positive = [
            ("io_threads", self.io_threads.unwrap_or(1)),
            ("shared_threads", self.shared_threads.unwrap_or(1)),
            ("load_concurrency", self.load_concurrency.unwrap_or(1)),
            ("limits.max_message_bytes", self.limits.max_message_bytes),
            ("limits.max_stream_requests", self.limits.max_stream_requests),
            ("queue.max_rows", self.queue.max_rows),
            ("queue.max_requests", self.queue.max_requests),
            ("queue.max_bytes", self.queue.max_bytes),
            ("shadow.max_requests", self.shadow.max_requests),
            ("shadow.max_bytes", self.shadow.max_bytes),
            ("shared_memory.max_regions", self.shared_memory.max_regions),
            ("cache.connections", self.cache.connections),
        ];
        if let Some((key, _)) = positive.into_iter().find(|&(_, value)| value == 0) {
            bail!("{key} must be at least 1");
        }
        if self.limits.max_message_bytes > u32::MAX as usize {
            bail!("limits.max_message_bytes must be below 4 GiB: gRPC messages cannot be larger");
        }
        let times = [
            ("limits.header_timeout", self.limits.header_timeout),
            ("limits.body_timeout", self.limits.body_timeout),
            ("limits.keepalive_interval", self.limits.keepalive_interval),
            ("follow.interval", self.follow.interval),
            ("follow.max_interval", self.follow.max_interval),
        ];
        if let Some((key, _)) = times.into_iter().find(|(_, value)| value.is_zero()) {
            bail!("{key} must be longer than 0s");
        }
        if !(0.0..=1.0).contains(&self.shadow.max_cpu) {
            bail!("shadow.max_cpu must be 0 to 1, got {}", self.shadow.max_cpu);
        }
        if self.cache.max_bytes == 0 {
            bail!("cache.max_bytes must be at least 1");
        }
        let source = self.source().context("models")?;
        self.write_back.validate("models", source.as_ref()).map_err(anyhow::Error::msg)?;
        Clients::new(self.queue.client_header.as_deref())?;
        if self.model_control != ModelControl::Explicit && !self.load_model.is_empty() {
            bail!("load_model needs model_control = \"explicit\"");
        }
        Ok(())
    }

    /// Where the models are mirrored from; `None` when they are in a folder.
    ///
    /// # Errors
    /// When `models` looks like a URI and is none that is known.
    pub fn source(&self) -> anyhow::Result<Option<SourceUri>> {
        // A path that is no text is no URI.
        let Some(text) = self.models.to_str() else { return Ok(None) };
        let uri = SourceUri::parse(text)?;
        Ok(uri.folder().is_none().then_some(uri))
    }

    /// Where the server's own files lie.
    pub fn data_directory(&self) -> PathBuf {
        let is_mirrored = matches!(self.source(), Ok(Some(_)));
        let beside = || if is_mirrored { PathBuf::from(".tidegate") } else { self.models.join(".tidegate") };
        self.data.clone().unwrap_or_else(beside)
    }

    /// Where fetched files lie.
    pub fn cache_directory(&self) -> PathBuf {
        self.cache.directory.clone().unwrap_or_else(|| self.data_directory().join("cache"))
    }
}

fn read(path: &Path) -> anyhow::Result<Table> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    // Checked by itself first, so that a mistake in the file is shown with its line.
    toml::from_str::<Config>(&text)
        .map_err(|error| without_token(&text, error))
        .with_context(|| format!("{} is not valid", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))
}

/// The error without any line of a file that holds a token, a secret or a place's login, which show nowhere.
fn without_token(text: &str, error: toml::de::Error) -> anyhow::Error {
    if !["token", "secret", "@"].iter().any(|sign| text.contains(sign)) {
        return error.into();
    }
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count();
    if text.lines().nth(line).is_some_and(|line| line.contains("token")) {
        return anyhow::anyhow!("line {}: token must be a text in quotes, of visible ASCII characters", line + 1);
    }
    anyhow::anyhow!("line {}: {}", line + 1, error.message())
}

/// A variable as a table: its text, or what the text means in TOML, whichever the key takes.
fn from_environment(name: &str, path: &[String], text: &str) -> anyhow::Result<Table> {
    let nested = |value: Value| -> Table {
        let nest = |value: Value, key: &String| Value::Table(Table::from_iter([(key.clone(), value)]));
        match path.iter().rev().fold(value, nest) {
            Value::Table(table) => table,
            _ => Table::new(),
        }
    };
    let as_text = nested(Value::String(text.to_owned()));
    let accepted = |table: &Table| Value::Table(table.clone()).try_into::<Config>();
    let Err(error) = accepted(&as_text) else { return Ok(as_text) };
    if let Ok(mut parsed) = toml::from_str::<Table>(&format!("value = {text}"))
        && let Some(value) = parsed.remove("value")
    {
        let parsed = nested(value);
        if accepted(&parsed).is_ok() {
            return Ok(parsed);
        }
    }
    Err(error).with_context(|| format!("environment variable {name} is not valid"))
}

fn overlay(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => overlay(below, above),
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

/// One key as the documentation shows it.
pub struct Field {
    pub path: Vec<String>,
    pub doc: String,
    /// As TOML; `None` when the key has no default.
    pub default: Option<String>,
}

/// Every key of the server's configuration, tables after plain keys.
pub fn fields() -> Vec<Field> {
    fields_of::<Config>(&Config::default())
}

/// Every key of a documented settings type.
pub fn fields_of<T: JsonSchema + Serialize>(defaults: &T) -> Vec<Field> {
    let settings = SchemaSettings::default().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<T>();
    let defaults = Table::try_from(defaults).unwrap_or_default();
    let mut fields = Vec::new();
    collect(schema.as_value(), &defaults, &mut Vec::new(), &mut fields);
    // Plain keys first: in TOML they cannot follow a table.
    fields.sort_by_key(|field| field.path.len() > 1);
    fields
}

fn collect(schema: &Json, defaults: &Table, path: &mut Vec<String>, fields: &mut Vec<Field>) {
    let Some(properties) = schema["properties"].as_object() else { return };
    for (key, property) in properties {
        path.push(key.clone());
        let default = defaults.get(key);
        if property["properties"].is_object() {
            let empty = Table::new();
            collect(property, default.and_then(Value::as_table).unwrap_or(&empty), path, fields);
        } else {
            let doc = property["description"].as_str().unwrap_or_default().replace('\n', " ");
            fields.push(Field { path: path.clone(), doc, default: default.map(ToString::to_string) });
        }
        path.pop();
    }
}

/// The documented default file.
pub fn documented_defaults() -> String {
    let mut text = String::from("# The configuration of Tidegate: every key with its default.\n");
    let mut table: &[String] = &[];
    let fields = fields();
    for field in &fields {
        let (key, parents) = match field.path.split_last() {
            Some(split) => split,
            None => continue,
        };
        if parents != table {
            text.push_str(&format!("\n[{}]\n", parents.join(".")));
            table = parents;
        }
        let assignment = match &field.default {
            Some(default) => format!("{key} = {default}"),
            None => format!("# {key} ="),
        };
        text.push_str(&format!("\n# {}\n{assignment}\n", field.doc));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, environment: &[(&str, &str)], flags: &str) -> anyhow::Result<(Config, Vec<String>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tidegate.toml");
        std::fs::write(&path, file).unwrap();
        let environment = environment.iter().map(|(key, value)| (key.to_string(), value.to_string()));
        Config::load(Some(&path), environment, toml::from_str(flags).unwrap())
    }

    #[test]
    fn flags_win_over_environment_over_file() {
        let file = "models = \"file\"\nrest = \"0.0.0.0:1\"\ngrpc = \"0.0.0.0:1\"\n[queue]\nmax_requests = 7\n";
        let environment = [("TIDEGATE_REST", "0.0.0.0:2"), ("TIDEGATE_GRPC", "0.0.0.0:2")];
        let (config, _) = load(file, &environment, "grpc = \"0.0.0.0:3\"").unwrap();
        assert_eq!(config.models, Path::new("file"));
        assert_eq!((config.rest.port(), config.grpc.port()), (2, 3));
        assert_eq!(config.queue.max_requests, 7);
        assert_eq!(config.queue.max_bytes, QueueConfig::default().max_bytes);
    }

    #[test]
    fn a_login_is_not_shown() {
        let (config, _) = load("models = \"https://ada:s3cret@host/models\"", &[], "").unwrap();
        let shown = toml::to_string(&config).unwrap();
        assert!(shown.contains("models = \"https://host/models\"") && !shown.contains("s3cret"), "{shown}");
    }

    #[test]
    fn environment_takes_text_numbers_and_lists() {
        let environment = [
            ("TIDEGATE_DATA", "1"),
            ("TIDEGATE_QUEUE__MAX_REQUESTS", "5"),
            ("TIDEGATE_SHUTDOWN__DRAIN_DELAY", "2s"),
            ("TIDEGATE_STRICT_READINESS", "true"),
            ("TIDEGATE_MODEL_CONTROL", "explicit"),
            ("TIDEGATE_LOAD_MODEL", "[\"a\", \"b\"]"),
            ("TIDEGATE_TOKEN", "12345"),
            ("TIDEGATE_PORT", "tcp://10.0.0.1:80"),
            ("OTHER", "x"),
        ];
        let (config, unknown) = load("", &environment, "").unwrap();
        assert_eq!(config.data, Some("1".into()));
        assert_eq!(config.queue.max_requests, 5);
        assert_eq!(config.shutdown.drain_delay, Duration::from_secs(2));
        assert!(config.strict_readiness);
        assert_eq!(config.load_model, ["a", "b"]);
        assert!(config.token.is_some() && !format!("{config:?}").contains("12345"));
        assert_eq!(unknown, ["TIDEGATE_PORT"]);
    }

    #[test]
    fn mistakes_are_named() {
        let message = |result: anyhow::Result<(Config, Vec<String>)>| format!("{:#}", result.unwrap_err());
        assert!(message(load("model = \"x\"", &[], "")).contains("model"));
        assert!(message(load("[queue]\nmax = 1", &[], "")).contains("max"));
        assert!(message(load("", &[("TIDEGATE_REST", "here")], "")).contains("TIDEGATE_REST"));
        assert!(message(load("[queue]\nmax_requests = 0", &[], "")).contains("queue.max_requests"));
        assert!(message(load("load_model = [\"a\"]", &[], "")).contains("model_control"));
        for file in [
            "\ntoken = s3cret",
            "token = 53",
            "rest = \"127.0.0.1:0\"\n  token = \"s3cret\\n\"",
            "\"token\" = s3cret",
            "token = \"\"\"\ns3cret",
            "rest = \"x\"; token = \"s3cret\"",
        ] {
            let message = message(load(file, &[], ""));
            assert!(message.contains("line ") && !message.contains("s3") && !message.contains("53"), "{message}");
        }
        let shown = message(load("token = \"s3cret\"\n[queue]\nmax = 1", &[], ""));
        assert!(shown.contains("line 3") && shown.contains("`max`") && !shown.contains("s3"), "{shown}");
        let message = message(load("", &[("TIDEGATE_TOKEN", "two words")], ""));
        assert!(message.contains("TIDEGATE_TOKEN") && !message.contains("words"), "{message}");
    }

    #[test]
    fn the_documented_defaults_are_the_defaults() {
        let text = documented_defaults();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), Config::default(), "{text}");
        assert!(fields().iter().all(|field| !field.doc.is_empty()));
    }
}
