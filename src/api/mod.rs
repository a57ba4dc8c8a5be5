//! The only code that knows HTTP, gRPC or JSON: what every protocol shares.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{Engine, Target},
    error::Code,
    metrics::{Metrics, Protocol, VersionMetrics},
};

pub mod codec;
pub mod compression;
pub mod grpc;
mod health;
pub mod listen;
pub mod ops;
pub mod pb;
pub mod rest;
pub mod status;
mod triton;

use codec::NonFinite;

/// The server's name in metadata.
pub const SERVER_NAME: &str = "tidegate";

/// The protocol extensions that work, as server metadata lists them.
pub const EXTENSIONS: [&str; 4] = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"];

/// Bounds of what a client may send, and how slowly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Bytes of one REST body or gRPC message, after decompression.
    pub max_message_bytes: usize,
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
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_message_bytes: 64 << 20,
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(30),
            keepalive_interval: Duration::from_secs(60),
            max_concurrent_streams: 4096,
        }
    }
}

/// What every handler can reach.
pub struct App {
    pub engine: Engine,
    pub metrics: Arc<Metrics>,
    pub limits: LimitsConfig,
    pub json_nonfinite: NonFinite,
    /// Whether a failed model makes the whole server unready.
    pub strict_readiness: bool,
    pub onnxruntime_version: String,
    /// Set when the server was told to stop: not ready any more, still serving.
    pub draining: AtomicBool,
    /// Cancelled when connections and streams shall end.
    pub closing: CancellationToken,
}

impl App {
    pub fn is_ready(&self) -> bool {
        let catalog = self.engine.catalog().load();
        catalog.complete && !self.draining.load(Ordering::Relaxed) && (!self.strict_readiness || catalog.all_ready())
    }
}

/// One inference request's entry in metrics and log; dropped unfinished, it counts as cancelled.
pub struct Record {
    protocol: Protocol,
    start: Instant,
    metrics: Arc<VersionMetrics>,
    model: String,
    version: String,
    pub request_id: String,
    pub traceparent: Option<String>,
    finished: bool,
}

impl Record {
    pub fn start(app: &App, protocol: Protocol, headers: &http::HeaderMap) -> Self {
        let traceparent = headers.get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
        Self {
            protocol,
            start: Instant::now(),
            metrics: app.metrics.unknown().clone(),
            model: String::new(),
            version: String::new(),
            request_id: String::new(),
            traceparent,
            finished: false,
        }
    }

    /// From here on the request counts for `target`.
    pub fn aim(&mut self, target: &Target) {
        self.metrics = target.version.metrics.clone();
        self.model = target.version.name.to_string();
        self.version = target.version.version.to_string();
    }

    pub fn started(&self) -> Instant {
        self.start
    }

    /// Counts the answer; to be called before it is sent, so that whoever has it finds it counted.
    pub fn finish(mut self, failure: Option<Code>) {
        self.count(failure);
    }

    fn count(&mut self, failure: Option<Code>) {
        self.finished = true;
        let took = self.start.elapsed();
        self.metrics.request(self.protocol, failure, took);
        let code = failure.map_or("ok", Code::as_str);
        macro_rules! log {
            ($level:ident) => {
                tracing::$level!(
                    model = self.model,
                    version = self.version,
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
    }
}

/// The earliest of the ways a client may say how long it waits.
pub fn deadline(start: Instant, timeouts: [Option<Duration>; 2]) -> Option<Instant> {
    timeouts.into_iter().flatten().min().and_then(|timeout| start.checked_add(timeout))
}
