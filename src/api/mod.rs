//! The only code that knows HTTP, gRPC or JSON: what every protocol shares.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{
    control::command::Commands,
    engine::{Engine, Target, Wish},
    error::{Code, Error},
    logging::Logging,
    metrics::{Metrics, Protocol, VersionMetrics, Way},
    model::{ModelVersion, batcher::Client, schedule::Urgency},
    rollout::route::Variant,
    source::follow::Followed,
    tensor::{DType, Tensor},
};

pub mod admin;
pub mod aside;
pub mod auth;
pub mod client;
pub mod codec;
pub mod compression;
pub mod grpc;
mod health;
mod hooks;
pub mod listen;
mod log;
mod message;
pub mod ops;
mod paced;
mod payload;
pub mod pb;
mod reflection;
mod repository;
pub mod rest;
mod scrape;
mod seldom;
pub mod shapes;
pub mod shared_memory;
pub mod status;
mod sticky;
mod triton;
mod v1;

use aside::Aside;
use auth::Token;
use client::Clients;
use codec::NonFinite;

/// The server's name in metadata.
pub const SERVER_NAME: &str = "tidegate";

/// The protocol extensions that always work.
const EXTENSIONS: [&str; 9] = [
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
];

/// Whose trace a request is a part of. Names made beforehand are found without being parsed for each request.
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The version that an answer is from.
static VERSION: HeaderName = HeaderName::from_static("x-tidegate-version");
/// What that version is to its model; in a request, the variant that shall answer.
static VARIANT: HeaderName = HeaderName::from_static("x-tidegate-variant");
/// By what the version was drawn.
static ROLLOUT: HeaderName = HeaderName::from_static("x-tidegate-rollout");
/// Whether the next request with the same key gets the same version.
static STICKY: HeaderName = HeaderName::from_static("x-tidegate-sticky");

/// Bounds of what a client may send, and how slowly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Bytes of one REST body or gRPC message, after decompression.
    pub max_message_bytes: usize,
    /// Bytes of a REST message's JSON, or of a compressed body, that are read or written where connections are served;
    /// longer ones get a thread of their own, so that other connections need not wait for them. Of requests for text
    /// models, small items of lists and escapes count for more, as they take longer.
    pub max_inline_bytes: usize,
    /// How long a client may take to send a request's headers; also how long an idle REST connection is kept.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub header_timeout: Duration,
    /// How long a client may pause within a request's body.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub body_timeout: Duration,
    /// How often an idle HTTP/2 connection is asked whether it still lives; half of it later it is closed.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub keepalive_interval: Duration,
    /// Requests that one HTTP/2 connection may have open.
    pub max_concurrent_streams: u32,
    /// Requests of one ModelStreamInfer call that run side by side; the next ones are read when answers have left.
    pub max_stream_requests: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_message_bytes: 64 << 20,
            max_inline_bytes: 256 << 10,
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(60),
            max_concurrent_streams: 4096,
            max_stream_requests: 64,
        }
    }
}

/// What every handler can reach.
pub struct App {
    pub engine: Engine,
    pub commands: Commands,
    pub metrics: Arc<Metrics>,
    /// The places that models are mirrored from.
    pub sources: Followed,
    pub logging: Logging,
    pub limits: LimitsConfig,
    /// Tells apart who shares the queues.
    pub clients: Clients,
    /// What changes by request need from everyone; without it, they must come from this machine.
    pub token: Option<Token>,
    /// What MLflow signs its webhooks with; without it none are believed.
    pub mlflow_webhook_secret: Option<Token>,
    /// `None` when clients may keep no tensors in shared memory.
    pub shared_memory: Option<Arc<shared_memory::Regions>>,
    /// Reads and writes long REST messages.
    pub aside: Aside,
    pub json_nonfinite: NonFinite,
    /// Whether a failed model makes the whole server unready.
    pub strict_readiness: bool,
    pub onnxruntime_version: String,
    /// Inference requests that have arrived and are not answered.
    pub in_flight: AtomicUsize,
    /// Cancelled when the server was told to stop: not ready any more, still serving.
    pub draining: CancellationToken,
    /// Cancelled when connections and streams shall end.
    pub closing: CancellationToken,
}

impl App {
    pub fn is_ready(&self) -> bool {
        let catalog = self.engine.catalog().load();
        catalog.complete && !self.draining.is_cancelled() && (!self.strict_readiness || catalog.all_ready())
    }

    /// The protocol extensions that work, as server metadata lists them.
    pub fn extensions(&self) -> Vec<&'static str> {
        let shared_memory = self.shared_memory.is_some().then_some(shared_memory::EXTENSION);
        EXTENSIONS.into_iter().chain(shared_memory).collect()
    }

    /// Checks that a request may change the server.
    ///
    /// # Errors
    /// See `auth::check_admin`.
    pub fn check_admin(&self, headers: &HeaderMap, peer: Option<&auth::Peer>) -> Result<(), Error> {
        auth::check_admin(self.token.as_ref(), headers, peer)
    }
}

/// Who calls, and what the call says of itself.
#[derive(Clone, Copy)]
pub struct Caller<'a> {
    pub headers: &'a HeaderMap,
    pub peer: Option<&'a auth::Peer>,
}

/// One inference request's entry in metrics and log; dropped unfinished, it counts as cancelled.
pub struct Record {
    app: Arc<App>,
    protocol: Protocol,
    start: Instant,
    /// Where the request counts, when it is known.
    version: Option<Arc<ModelVersion>>,
    /// Where it counts when its version does not serve.
    unready: Option<Arc<VersionMetrics>>,
    pub request_id: String,
    pub traceparent: Option<String>,
    /// Whose request it is.
    client: Client,
    drawn: Drawn,
    finished: bool,
}

/// What is known of how a request came to its version.
#[derive(Default)]
struct Drawn {
    way: Way,
    variant: Option<Variant>,
    rollout: Option<Arc<str>>,
    sticky: Option<bool>,
}

impl Record {
    pub fn start(app: &Arc<App>, protocol: Protocol, headers: &HeaderMap, client: Client) -> Self {
        let traceparent = headers.get(&TRACEPARENT).and_then(|value| value.to_str().ok()).map(str::to_owned);
        app.in_flight.fetch_add(1, Ordering::Relaxed);
        Self {
            app: app.clone(),
            protocol,
            start: Instant::now(),
            version: None,
            unready: None,
            request_id: String::new(),
            traceparent,
            client,
            drawn: Drawn::default(),
            finished: false,
        }
    }

    /// From here on the request counts for `target`.
    pub fn aim(&mut self, target: &Target) {
        let drawn = &self.drawn;
        let alike =
            (drawn.way, drawn.sticky, drawn.variant.as_ref()) == (target.way, target.sticky, Some(&target.variant));
        if alike && self.version.as_ref().is_some_and(|version| Arc::ptr_eq(version, &target.version)) {
            return;
        }
        self.version = Some(target.version.clone());
        self.drawn = Drawn {
            way: target.way,
            variant: Some(target.variant.clone()),
            rollout: target.rollout.clone(),
            sticky: target.sticky,
        };
    }

    /// Says in an answer's headers which version it is from, once one was chosen.
    pub fn mark(&self, headers: &mut HeaderMap) {
        self.tell(|name, text| {
            // Those that come with nearly every answer are not copied.
            let usual = ["stable", "canary", "true", "false"].into_iter().find(|usual| *usual == text);
            // Versions, variants and models have no letter that a header could not have.
            if let Some(value) = usual.map(HeaderValue::from_static).or_else(|| HeaderValue::from_str(text).ok()) {
                headers.insert(name, value);
            }
        });
    }

    /// Tells which version an answer is from, once one was chosen, under the names that headers have.
    pub fn tell(&self, mut tell: impl FnMut(&'static HeaderName, &str)) {
        let (Some(version), Drawn { variant: Some(variant), rollout, sticky, .. }) = (&self.version, &self.drawn)
        else {
            return;
        };
        tell(&VERSION, version.version.as_str());
        tell(&VARIANT, variant.as_str());
        if let Some(rollout) = rollout {
            tell(&ROLLOUT, rollout);
        }
        if let Some(sticky) = sticky {
            tell(&STICKY, if *sticky { "true" } else { "false" });
        }
    }

    /// Chooses the version for a request, and counts the request with it.
    ///
    /// # Errors
    /// `NotFound` and `NotReady` naming the model; `Unauthenticated` and `Forbidden` for a variant that the caller may
    /// not ask for.
    pub fn resolve(&mut self, model: &str, version: Option<&str>, caller: Caller<'_>) -> Result<Target, Error> {
        let Caller { headers, peer } = caller;
        let variant = headers.get(&VARIANT).map(|variant| variant.to_str().unwrap_or_default());
        if variant.is_some() {
            self.app.check_admin(headers, peer)?;
        }
        let header = |name: &str| headers.get(name).map(HeaderValue::as_bytes);
        let wish = Wish { version, variant, request_id: &self.request_id, header: &header };
        let found = self.app.engine.resolve(model, &wish);
        let target = found.inspect_err(|_| self.aim_at_unready(model, version))?;
        self.aim(&target);
        Ok(target)
    }

    /// Chooses the version for a request that was read, where that was not possible before.
    pub fn draw(&mut self, target: &mut Target, call: &codec::InferCall) {
        self.app.engine.draw(target, &self.request_id, |sticky| sticky::key(call, sticky));
        self.aim(target);
    }

    /// The request was for a version that is known and does not serve.
    fn aim_at_unready(&mut self, model: &str, version: Option<&str>) {
        let catalog = self.app.engine.catalog().load();
        let Ok(deployment) = catalog.deployment(model) else { return };
        let named = version.filter(|version| !version.is_empty());
        let entry = named.map_or(deployment.entries.last(), |version| deployment.entry(version));
        if let Some(entry) = entry {
            self.unready = Some(entry.metrics.clone());
        }
    }

    pub fn started(&self) -> Instant {
        self.start
    }

    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Counts the answer; to be called before it is sent, so that whoever has it finds it counted.
    pub fn finish(mut self, failure: Option<Code>) {
        self.count(failure);
    }

    fn count(&mut self, failure: Option<Code>) {
        self.finished = true;
        let took = self.start.elapsed();
        let version = self.version.as_deref();
        let metrics = version.map(|version| &version.metrics).or(self.unready.as_ref());
        metrics.unwrap_or(self.app.metrics.unknown()).request(self.protocol, self.drawn.way, failure, took);
        let code = failure.map_or("ok", Code::as_str);
        macro_rules! log {
            ($level:ident) => {
                tracing::$level!(
                    model = version.map(|version| version.name.as_str()),
                    version = version.map(|version| version.version.as_str()),
                    protocol = ?self.protocol,
                    request_id = self.request_id,
                    traceparent = self.traceparent,
                    code,
                    seconds = took.as_secs_f64(),
                    "request"
                )
            };
        }
        if failure == Some(Code::Internal) { log!(warn) } else { log!(debug) }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            self.count(Some(Code::Cancelled));
        }
        self.app.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a call says of its hurry; its transport gives it up at `deadline`.
pub fn urgency(record: &Record, call: &codec::InferCall, deadline: Option<Instant>) -> Urgency {
    Urgency { priority: call.priority, deadline, timeout: after(record.start, call.timeout), client: record.client }
}

/// The end of a timeout; none when it lies beyond all time.
pub fn after(start: Instant, timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| start.checked_add(timeout))
}

/// How many times the largest message a request's texts may take in memory.
const MAX_EXPANSION: usize = 2;

/// Puts the best classes in the place of the outputs that are wanted so.
fn classify(
    version: &ModelVersion,
    requested: &[codec::RequestedOutput],
    mut outputs: Vec<Tensor>,
) -> Result<Vec<Tensor>, Error> {
    // Outputs come in the order in which they were requested; none were when these are all of the model's.
    for (requested, output) in requested.iter().zip(&mut outputs) {
        if let Some(count) = requested.classes {
            let labels = version.labels.get(&output.name).map_or(&[][..], |labels| labels);
            *output = codec::classify(output, version.counts_rows(&output.name), count, labels)
                .map_err(|error| error.of_model(version.name.as_str()))?;
        }
    }
    Ok(outputs)
}

/// Refuses requests that are small on the wire and huge in memory: a `BYTES` element takes many times the bytes of a
/// short text.
fn check_size(call: codec::InferCall, limit: usize) -> Result<codec::InferCall, Error> {
    let texts = call.inputs.iter().filter(|input| input.dtype == DType::Bytes);
    text_budget(texts.map(Tensor::byte_len).sum(), limit)?;
    Ok(call)
}

/// Refuses texts that take `held` bytes in memory when that is too much for messages of `limit` bytes.
fn text_budget(held: usize, limit: usize) -> Result<(), Error> {
    if held <= limit.saturating_mul(MAX_EXPANSION) {
        return Ok(());
    }
    Err(Error::new(
        Code::TooLarge,
        format!("the texts take {held} bytes in memory, more than {MAX_EXPANSION} times limits.max_message_bytes"),
    ))
}
