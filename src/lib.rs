//! Tidegate, a model inference server: a folder of models in, the Open Inference Protocol out.
//!
//! # Layers
//! Imports run only downward; `tests/architecture.rs` reads them and keeps it so. Modules on one line do not see each
//! other.
//!
//! | layer | modules | what they are |
//! |---|---|---|
//! | 10 | `main` | the exit code |
//! | 9 | [`cli`] | commands |
//! | 8 | [`server`] | builds every part in order, runs them, drains them in reverse |
//! | 7 | [`config`] | one `Config`, composed of the modules' own |
//! | 6 | [`api`] | the only code that knows HTTP, gRPC or JSON |
//! | 5 | [`engine`] · [`control`] | the request path · the slow path; they meet only in the catalog |
//! | 4 | [`model`] | a model in memory: load, warm-up, catalog, batcher, executors |
//! | 3 | [`backend`] · [`source`] | running a graph · finding its files |
//! | 2 | [`metrics`] · [`logging`] | every metric there is · what is logged |
//! | 1 | [`tensor`] · [`id`] · [`priority`] · [`heap`] | bricks |
//! | 0 | [`error`] | the closed list of ways to fail |
//!
//! # A request's way
//! 1. `api::listen` accepts on one listener per port and hands the connection to an I/O thread. Inferences go straight on,
//!    all else through a router.
//! 2. `api::rest` or `api::grpc` opens a `Record`, finds the version (`engine` → `model::catalog`, one snapshot), and
//!    decodes the body through `api::codec`, other servers' shapes of it through `api::shapes`; raw tensor bytes are
//!    not copied; `api::shared_memory` fetches those that were left in memory instead of being sent.
//! 3. `engine` checks the inputs against the `Signature` and submits them.
//! 4. `model::batcher` queues, with turns for clients (`api::client` tells them apart), or refuses; an idle thread of
//!    `model::executor`, woken through `model::relay`, takes what may run together, gathers it, runs it, and hands
//!    each request its rows.
//! 5. `api` encodes the answer, counts it, and only then sends it.
//!
//! # A version's way
//! `control::reconcile` scans the folder (`source::local`), waits until files settle, and has `model::load` load and
//! warm them on a low-priority thread, as `control::spec` says (from model.toml, or through `control::pbtxt` from
//! Triton's config.pbtxt). What the author declares of inputs and outputs is a session before the graph's
//! (`backend::declared`). Clients' wishes to load and unload come in as `control::command`. Warm-up proves that rows are
//! independent before requests may share runs, and `model::golden` asks what has a known answer. Then one new catalog is published, the old version takes no more
//! requests, finishes those it has, and is dropped off the serving threads. Everything that can fail happens before the
//! publish.
//!
//! # Invariants
//! - A request sees one catalog snapshot. Only when its version began to drain meanwhile, or its gRPC message turns out
//!   to be unusual, does it look once more.
//! - There is one `CatalogWriter`, and it is not `Clone`.
//! - `model::batcher`, `model::schedule` and `model::service_time` are pure: time is passed in.
//! - Every queue is bounded, and full means an answer.
//! - One thread at a time has a session: an executor, or for runs of microseconds the I/O thread that queued them.
//! - Executors and a session's pool threads give way to I/O threads, and do not inherit the loader's lower priority.
//! - A request is counted exactly once, before its answer leaves; one that is given up counts as cancelled.
//! - Files are read before they are run: changing them on disk cannot hurt a running version.
//! - Nothing is told to anybody who did not ask: `main` keeps ONNX Runtime's telemetry off before it is loaded.

pub mod api;
pub mod backend;
pub mod cli;
pub mod config;
pub mod control;
pub mod engine;
pub mod error;
pub mod heap;
pub mod id;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod observe;
pub mod priority;
pub mod rollout;
pub mod server;
pub mod source;
pub mod stats;
pub mod tensor;
