//! Tidegate, a model inference server: a folder of models in, the Open Inference Protocol out.
//!
//! # Layers
//! Imports run only downward; `tests/architecture.rs` reads them and keeps it so. Modules on one line do not see each
//! other.
//!
//! | layer | modules | what they are |
//! |---|---|---|
//! | 11 | `main` | the exit code |
//! | 10 | [`cli`] | commands |
//! | 9 | [`server`] | builds every part in order, runs them, drains them in reverse |
//! | 8 | [`config`] | one `Config`, composed of the modules' own |
//! | 7 | [`api`] | the only code that knows HTTP, gRPC or JSON |
//! | 6 | [`engine`] · [`control`] | the request path · the slow path; they meet only in the catalog |
//! | 5 | [`model`] | a model in memory: load, warm-up, catalog, batcher, executors |
//! | 4 | [`observe`] · [`text`] | what versions did, counted, and copies compared · texts to tokens, and outputs to answers |
//! | 3 | [`backend`] · [`source`] · [`rollout`] | running a graph · finding its files · who gets which version, and is it going well |
//! | 2 | [`metrics`] · [`logging`] | every metric there is · what is logged |
//! | 1 | [`tensor`] · [`id`] · [`stats`] · [`priority`] · [`heap`] | bricks |
//! | 0 | [`error`] | the closed list of ways to fail |
//!
//! # A request's way
//! 1. `api::listen` accepts on one listener per port and hands the connection to an I/O thread. Inferences go straight on,
//!    all else through a router.
//! 2. `api::rest` or `api::grpc` opens a `Record`, finds the version (`engine` → `model::catalog`, one snapshot; by the
//!    route, where requests are divided), and decodes the body through `api::codec`, other servers' shapes of it through `api::shapes`; raw
//!    tensor bytes are not copied; `api::shared_memory` fetches those that were left in memory instead of being sent.
//! 3. `engine` checks the inputs against the `Signature` and submits them. Of a model that has a tokenizer, `text` makes
//!    tokens of texts first, in parts of about one length: off the I/O threads when they are long, by turns at
//!    `model::desk`, which refuses when it is full. The session behind it makes embeddings, classes or scores of what the
//!    graph gives.
//! 4. `model::batcher` queues, with turns for clients (`api::client` tells them apart), or refuses; an idle thread of
//!    `model::executor`, woken through `model::relay`, takes what may run together, gathers it, runs it, and hands
//!    each request its rows.
//! 5. `engine::shadow` keeps a copy where the route wants one, for a thread of its own that asks the candidate and has
//!    `observe` compare the answers when nothing else wants the processor.
//! 6. `api` encodes the answer, counts it, and only then sends it.
//!
//! # A version's way
//! Models that are elsewhere are mirrored into a folder first: `source::follow` looks at a `Source` again and again, has
//! `source::cache` fetch and verify what is new, and publishes each version by one rename, on a thread of its own. So it
//! is for a whole repository, or for single models whose settings name their place (`source::places`). Where a registry
//! has a pointer (an alias, a tag, a branch), its way is kept beside the versions (`source::pointer`) and decides which of
//! them is the newest; of a folder an alias does (`control::standing`). `source::lineage` is what the registry knows of each,
//! `source::card` what its files say of themselves, and `source::write_back` tells the registry what became of it.
//! `control::reconcile` scans the folder (`source::local`), waits until files settle, and has `model::load` load and
//! warm them on a low-priority thread, once `source::signed` has found them signed where they must be, as `control::spec`
//! says (from model.toml, or through `control::pbtxt` from Triton's config.pbtxt). What the author declares of inputs and outputs is a session before the graph's
//! (`backend::declared`). Clients' wishes to load and unload come in as `control::command`. Warm-up proves that rows are
//! independent before requests may share runs, and `model::golden` asks what has a known answer. Then one new catalog is
//! published, the old version takes no more requests, finishes those it has, and is dropped off the serving threads.
//! Everything that can fail happens before the publish.
//!
//! Where the model wants it, or an operator, the new version takes over step by step instead. `rollout` is the pure part:
//! `Route` draws the version for a key, `Rollout` is the state machine, `judge` compares what both versions did, which
//! `observe` counts. `control::promote` has the judge look and remembers each model's `Standing`, stored before it takes
//! effect (`control::store`); `control::reconcile::routes` turns what operators, judge and repository say into events
//! and new routes. `api::admin` is how operators reach it.
//!
//! # Invariants
//! - A request sees one catalog snapshot. Only when its version began to drain meanwhile, or its gRPC message turns out
//!   to be unusual, does it look once more.
//! - There is one `CatalogWriter`, and it is not `Clone`.
//! - `rollout`, `stats`, `model::batcher`, `model::schedule` and `model::service_time` are pure: time is passed in.
//! - Every queue is bounded, and full means an answer.
//! - One thread at a time has a session: an executor, or for runs of microseconds the I/O thread that queued them.
//! - Executors and a session's pool threads give way to I/O threads, and do not inherit the loader's lower priority;
//!   executors of a version that gets only copies give way to everybody (`model::crew`).
//! - A route is published only with versions that serve; a change of it is stored before, except that of giving a
//!   candidate up.
//! - No live request waits for a copy: what there is no room or processor time for is shed, and counted.
//! - A request is counted exactly once, before its answer leaves; one that is given up counts as cancelled.
//! - No request and no pass of the reconciler waits for a registry. What is mirrored was read whole and checked, and no
//!   path, symlink or pickle of a registry reaches a backend.
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
pub mod text;
