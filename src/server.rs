//! Builds every part in order, runs them, and drains them in reverse.

use std::{
    fs::{File, TryLockError},
    io::{Read, Seek, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use axum::Router;
use bytes::Bytes;
use notify::{RecursiveMode, Watcher};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{
        self, App,
        aside::Aside,
        client::Clients,
        grpc,
        listen::{IoThreads, LONG_MESSAGES, Port, Wire},
        ops, rest,
        shared_memory::{Reach, Regions},
    },
    backend::{Backends, Signature},
    config::Config,
    control::{
        self, ModelControl,
        command::{Orders, commands},
        reconcile::{Loader, Reconciler},
        store::SharedStore,
        upload::Uploads,
    },
    engine::{
        Engine,
        shadow::{ShadowThread, Shadows},
    },
    error::Error,
    logging::Logging,
    metrics::Metrics,
    model::{
        catalog::{CatalogReader, CatalogWriter, catalog},
        load::Decode,
    },
    source::{follow::Followed, places::Places, signed::Signatures},
    tensor::Tensor,
};

mod mirroring;
mod reporting;

use mirroring::{Mirroring, Mirrors, Sourced};

const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// What versions get to end their runs when the drain timeout is used up.
const LAST_MOMENT: Duration = Duration::from_secs(1);

/// A running server.
pub struct Server {
    pub rest: SocketAddr,
    pub grpc: SocketAddr,
    pub ops: SocketAddr,
    /// The folder of models, which may be a mirror.
    pub models: PathBuf,
    app: Arc<App>,
    stop: mpsc::Sender<Duration>,
    control: JoinHandle<anyhow::Result<usize>>,
    ops_thread: JoinHandle<()>,
    ops_closing: CancellationToken,
    /// Held for as long as the server runs.
    _lock: Lock,
}

/// Asks a server to stop, from anywhere.
#[derive(Clone)]
pub struct Stopper(mpsc::Sender<Duration>);

impl Stopper {
    /// Unready at once, serving on for `delay`, then draining. A second call ends the delay.
    pub fn stop(&self, delay: Duration) {
        // A full channel holds two wishes to stop already.
        let _ = self.0.try_send(delay);
    }

    /// Waits until everything is drained.
    pub async fn stopped(&self) {
        self.0.closed().await;
    }
}

impl Server {
    /// Starts all threads; the ports are open when it returns, the models load after that.
    ///
    /// # Errors
    /// Naming the folder that cannot be read, the port in use, or the server that holds the data directory.
    pub fn start(
        config: &Config,
        backends: Backends,
        onnxruntime_version: &str,
        logging: Logging,
    ) -> anyhow::Result<Self> {
        let source = config.source()?;
        if source.is_none() && !config.models.is_dir() {
            bail!("the models folder {} does not exist; name another one with --models", config.models.display());
        }
        let signatures = Arc::new(Signatures::open(&config.signatures)?);
        let data = config.data_directory();
        let mut lock = lock(&data)?;
        let (reader, writer) = catalog();
        let followed = Followed::default();
        let mirroring = source.map(|uri| Mirroring::open(&uri, config, reader.clone(), &followed)).transpose()?;
        let models = mirroring.as_ref().map_or_else(|| config.models.clone(), |mirroring| mirroring.models.clone());
        let uploads = Uploads::open(&data, config.allow_model_upload);
        let rest_port = Port::bind(config.rest, "--rest")?;
        let grpc_port = Port::bind(config.grpc, "--grpc")?;
        let ops_port = Port::bind(config.ops, "--ops")?;
        let (rest, grpc, ops) = (rest_port.address, grpc_port.address, ops_port.address);
        describe(&mut lock, rest).context("cannot write to the data directory")?;

        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let io_threads = config.io_threads.unwrap_or((cores / 2).max(1));
        let metrics = Metrics::new(env!("CARGO_PKG_VERSION"), onnxruntime_version);
        let places = Places::new(config.cache_directory());
        let settings = settings(config, models.clone(), mirroring.is_some(), places.clone(), cores);
        let state = SharedStore::open(&data);
        let (commands, orders) = commands(&settings, backends.clone(), uploads, state.clone());
        let (shadows, shadow_thread) = Shadows::start(&config.shadow)?;
        let app = Arc::new(App {
            engine: Engine::new(reader, shadows),
            commands,
            metrics: metrics.clone(),
            sources: followed.clone(),
            logging,
            limits: config.limits.clone(),
            clients: Clients::new(config.queue.client_header.as_deref())?,
            token: config.token.clone(),
            mlflow_webhook_secret: config.mlflow_webhook_secret.clone(),
            shared_memory: Regions::new(&config.shared_memory, metrics.clone()),
            aside: Aside::new(LONG_MESSAGES * io_threads),
            json_nonfinite: config.json_nonfinite,
            strict_readiness: config.strict_readiness,
            onnxruntime_version: onnxruntime_version.to_owned(),
            in_flight: AtomicUsize::new(0),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
        });
        let loader = Loader {
            backends,
            decode: Decode { sample: decode_sample, example: decode_example, cases: api::codec::decode_cases },
            metrics,
            signatures,
        };
        let ops_closing = CancellationToken::new();
        let ops_thread = start_ops(ops_port, ops::router(app.clone()), config, &ops_closing)?;

        let (stop, stops) = mpsc::channel(2);
        let parts = Parts {
            app: app.clone(),
            settings,
            orders,
            drain_timeout: config.shutdown.drain_timeout,
            io_threads,
            rest_port,
            grpc_port,
            loader,
            writer,
            state,
            shadow_thread,
            mirroring: mirroring.map(Mirroring::start).transpose()?,
            sourced: Sourced {
                places,
                models: models.clone(),
                directory: config.cache_directory(),
                cache: config.cache.clone(),
                follow: config.follow.clone(),
                followed,
                catalog: app.engine.catalog().clone(),
            },
            stops,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let control =
            std::thread::Builder::new().name("control".to_owned()).spawn(move || runtime.block_on(parts.run()))?;
        Ok(Self { rest, grpc, ops, models, app, stop, control, ops_thread, ops_closing, _lock: Lock(lock) })
    }

    /// What the request path sees of the models.
    pub fn catalog(&self) -> &CatalogReader {
        self.app.engine.catalog()
    }

    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Waits until the server was stopped and everything is drained; the number of requests that were cut short.
    ///
    /// # Errors
    /// When a part of the server failed.
    pub fn wait(self) -> anyhow::Result<usize> {
        let cut = match self.control.join() {
            Ok(result) => result,
            Err(_) => bail!("the control thread panicked"),
        };
        // The operators' port answers until the very end.
        self.ops_closing.cancel();
        let _ = self.ops_thread.join();
        cut
    }
}

fn settings(config: &Config, models: PathBuf, is_mirror: bool, places: Places, cores: usize) -> control::Settings {
    control::Settings {
        models,
        is_mirror,
        places,
        control: config.model_control,
        load_models: config.load_model.clone(),
        profile: config.profile,
        cores,
        queue: (&config.queue).into(),
        load_concurrency: config.load_concurrency.unwrap_or((cores / 2).max(1)),
        drain_timeout: config.shutdown.drain_timeout,
        poll_interval: POLL_INTERVAL,
    }
}

/// The tensors of a sample request, which is a REST body.
fn decode_sample(body: &[u8]) -> Result<Vec<Tensor>, Error> {
    let mut call = api::codec::decode_json(&Bytes::copy_from_slice(body), None)?;
    // No client's memory belongs to a model.
    Reach::Off.fetch(&mut call, 0)?;
    Ok(call.inputs)
}

/// The tensors of an example as MLflow keeps it, which is a body of its scoring server.
fn decode_example(body: &[u8], signature: &Signature) -> Result<Vec<Tensor>, Error> {
    let document = api::codec::Document::parse(&Bytes::copy_from_slice(body))?;
    let (mut call, _) = api::shapes::invocations::read_json(&document, signature, usize::MAX)?;
    Reach::Off.fetch(&mut call, 0)?;
    Ok(call.inputs)
}

/// The lock of the data directory. It is given back in so many words: closing the file does not do while a process that
/// was just forked, and does not yet run its own program, has a copy of it.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "the lock of the data directory goes when this process does");
        }
    }
}

/// Makes sure that no other server works in `directory`.
fn lock(directory: &Path) -> anyhow::Result<File> {
    let hint = || format!("cannot use the data directory {}; name another one with --data", directory.display());
    std::fs::create_dir_all(directory).with_context(hint)?;
    let path = directory.join("lock");
    let mut file = File::options().create(true).truncate(false).read(true).write(true).open(path).with_context(hint)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            bail!("the data directory {} is in use by {}", directory.display(), holder.trim());
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(hint),
    }
}

/// Writes into the lock who holds it.
fn describe(lock: &mut File, rest: SocketAddr) -> std::io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "process {} (REST on {rest})", std::process::id())
}

fn start_ops(
    port: Port,
    router: Router,
    config: &Config,
    closing: &CancellationToken,
) -> anyhow::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (limits, closing) = (config.limits.clone(), closing.clone());
    let thread = std::thread::Builder::new().name("ops".to_owned()).spawn(move || {
        runtime.block_on(api::listen::serve_here(port, router, Wire::Http, limits, closing));
    })?;
    Ok(thread)
}

/// Everything that the control thread runs.
struct Parts {
    app: Arc<App>,
    settings: control::Settings,
    orders: Orders,
    drain_timeout: Duration,
    io_threads: usize,
    rest_port: Port,
    grpc_port: Port,
    loader: Loader,
    writer: CatalogWriter,
    state: SharedStore,
    shadow_thread: ShadowThread,
    mirroring: Option<Mirrors>,
    sourced: Sourced,
    stops: mpsc::Receiver<Duration>,
}

impl Parts {
    async fn run(mut self) -> anyhow::Result<usize> {
        let app = self.app.clone();
        let abort = CancellationToken::new();
        let (io, io_threads) = IoThreads::start(self.io_threads, &app.limits, &app.closing, &abort)?;
        let io = Arc::new(io);
        let accepting = [
            (self.rest_port, rest::routes(app.clone()), Wire::Http),
            (self.grpc_port, grpc::routes(app.clone()), Wire::Grpc),
        ]
        .map(|(port, routes, wire)| {
            let (io, closing) = (io.clone(), app.closing.clone());
            tokio::spawn(async move { io.accept(port, routes, wire, closing).await })
        });

        let (kick, kicks) = mpsc::channel(1);
        let following = CancellationToken::new();
        let sourced = tokio::spawn(self.sourced.run(kick.clone(), following.clone()));
        let _watcher = watch(&self.settings, kick);
        let (stop_reconciling, stopped) = oneshot::channel();
        let mut reconciler = Reconciler::new(self.settings, self.loader, self.writer, self.orders, self.state);
        let mirrored = self.mirroring.as_ref().map(|mirrors| (mirrors.mirrored(), mirrors.status()));
        let reconciling = tokio::spawn(async move {
            // An empty mirror is not what there is to serve: the server is not ready until it has been filled.
            if let Some((mirrored, status)) = mirrored {
                reconciler.refuse_until(mirrored, || mirroring::still_waits(&status.read())).await;
            }
            reconciler.run(kicks, stopped).await
        });

        // 1 Not ready any more, and serving on until routers have noticed.
        let delay = self.stops.recv().await.unwrap_or_default();
        app.draining.cancel();
        tracing::info!(?delay, "stopping");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            _ = self.stops.recv() => {}
        }
        // 2 No new connections; those that are open finish what they have begun, and no batch waits to be filled.
        app.closing.cancel();
        for task in accepting {
            let _ = task.await;
        }
        app.engine.catalog().load().serving().for_each(|version| version.hurry());
        // With its senders gone, an I/O thread ends when its last connection does.
        drop(io);
        let deadline = Instant::now() + self.drain_timeout;
        let mut joined =
            tokio::task::spawn_blocking(move || io_threads.into_iter().for_each(|thread| drop(thread.join())));
        let mut cut = 0;
        tokio::select! {
            _ = &mut joined => {}
            () = tokio::time::sleep_until(deadline.into()) => {
                cut += app.in_flight.load(Ordering::Relaxed);
                tracing::warn!(requests = cut, "closing the connections that are still open");
                abort.cancel();
                let _ = joined.await;
            }
        }
        // 3 Nothing more is fetched.
        if let Some(mirroring) = self.mirroring.take() {
            let _ = tokio::task::spawn_blocking(move || mirroring.stop()).await;
        }
        following.cancel();
        if let Ok(Err(error)) = sourced.await {
            tracing::error!(%error, "the places that models name were not followed");
        }
        // 4 Nobody waits for copies, and then the models, in what is left of the time.
        let _ = tokio::task::spawn_blocking(move || self.shadow_thread.stop()).await;
        let left = deadline.saturating_duration_since(Instant::now()).max(LAST_MOMENT);
        let _ = stop_reconciling.send(left);
        cut += reconciling.await.context("the reconciler panicked")?;
        tracing::info!(cut_short = cut, "stopped");
        Ok(cut)
    }
}

/// Kicks the reconciler when the file system tells of a change. The poll finds what it misses.
fn watch(settings: &control::Settings, kick: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    if settings.control != ModelControl::Watch {
        return None;
    }
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading changes nothing, and the reconciler reads. A full channel holds a kick already.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = kick.try_send(());
        }
    });
    let watched = watcher.and_then(|mut watcher| {
        watcher.watch(&settings.models, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    watched
        .inspect_err(|error| tracing::warn!(%error, "no file notifications; the repository is polled every second"))
        .ok()
}
