//! Listeners: one per port, whose accepted connections are handed to the I/O runtimes in turn.
//!
//! One listener and not one per thread (`SO_REUSEPORT`): a second server on the same port must fail to start
//! instead of quietly taking half of the connections.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use axum::{Router, body::Body};
use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    App, LimitsConfig,
    auth::Peer,
    grpc::infer,
    payload::Payload,
    rest::front,
    seldom::{Seldom, Unwatched},
};
use crate::{model::relay, priority};

const BACKLOG: i32 = 1024;
/// Room for tensors in flight, per request and per connection.
pub(super) const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const MAX_FRAME: u32 = 1 << 20;
/// Connections handed to an I/O runtime that it has not picked up; when full, accepting waits.
const HANDOVER: usize = 256;
/// Long messages that are read or written at the same time beside an I/O thread's connections; more of them wait for
/// a turn in `App::aside`.
pub const LONG_MESSAGES: usize = 2;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes that every HTTP/2 connection begins with.
const HTTP2_PREFACE: usize = 24;
/// Shorter than a client may take for a request's headers.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// How often a REST connection looks whether `limits.header_timeout` is over, in that time.
const LOOKS: u32 = 8;
const PEEK_INTERVAL: Duration = Duration::from_millis(20);
/// How long a connection made just before the port closed may take to send something.
pub(super) const LAST_CHANCE: Duration = Duration::from_millis(200);

/// How connections of a port speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// HTTP/1.1 only.
    Http,
    /// HTTP/2 only.
    Grpc,
}

/// A bound port.
pub struct Port {
    pub address: SocketAddr,
    listener: TcpListener,
}

impl Port {
    /// # Errors
    /// When the port is in use; the message names the port and the flag that changes it.
    pub fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<Self> {
        let bind = || -> io::Result<TcpListener> {
            let domain = if address.is_ipv4() { socket2::Domain::IPV4 } else { socket2::Domain::IPV6 };
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        };
        let listener = bind().map_err(|error| {
            anyhow::anyhow!("cannot listen on {address}: {error}; choose another address with {flag}")
        })?;
        Ok(Self { address: listener.local_addr()?, listener })
    }
}

/// What answers on a port.
#[derive(Clone)]
pub struct Routes {
    router: Router,
    inference: Option<Inference>,
}

/// Inferences that are answered in front of the router.
#[derive(Clone)]
pub(super) enum Inference {
    /// `ModelInfer`.
    Grpc(Arc<App>),
    /// `POST …/infer`.
    Rest(Arc<App>),
}

/// An answer on its way.
type Answering = Pin<Box<dyn Future<Output = Result<Response<Payload>, Infallible>> + Send>>;

impl From<Router> for Routes {
    fn from(router: Router) -> Self {
        Self { router, inference: None }
    }
}

impl Routes {
    pub(super) fn with_inference(self, inference: Inference) -> Self {
        Self { inference: Some(inference), ..self }
    }

    /// In a box: hyper and tokio move what they get a dozen times before they poll it, and these are kilobytes.
    fn answer(&self, mut request: Request<Incoming>, peer: Peer) -> Answering {
        match &self.inference {
            Some(Inference::Grpc(app)) => {
                if let Some(call) = infer::Call::of(&request) {
                    return Box::pin(call.answer(request, app.clone(), self.router.clone(), peer));
                }
            }
            Some(Inference::Rest(app)) => {
                if let Some(call) = front::Call::of(&request) {
                    return Box::pin(call.answer(request, app.clone(), peer));
                }
            }
            None => {}
        }
        request.extensions_mut().insert(peer);
        Box::pin(infer::route(self.router.clone(), request.map(Body::new)))
    }
}

/// A connection on its way to an I/O runtime.
struct Accepted {
    stream: std::net::TcpStream,
    routes: Routes,
    wire: Wire,
    /// From 1 on, in the order of acceptance.
    number: u64,
}

/// Threads that serve connections, each with a runtime of its own.
pub struct IoThreads {
    senders: Vec<mpsc::Sender<Accepted>>,
    /// Connections accepted so far.
    accepted: AtomicU64,
}

impl IoThreads {
    /// Starts `count` threads; they end when this is dropped and their connections are done or aborted.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        count: usize,
        limits: &LimitsConfig,
        closing: &CancellationToken,
        abort: &CancellationToken,
    ) -> io::Result<(Self, Vec<JoinHandle<()>>)> {
        let mut senders = Vec::new();
        let mut threads = Vec::new();
        for index in 0..count.max(1) {
            let (sender, receiver) = mpsc::channel(HANDOVER);
            let runtime = relay::runtime()
                .max_blocking_threads(LONG_MESSAGES)
                .thread_name(format!("io-{index}-long"))
                // These are the threads that the runtime starts; the one that serves connections is below.
                .on_thread_start(priority::be_patient)
                .build()?;
            let context = Context {
                limits: limits.clone(),
                closing: closing.clone(),
                abort: abort.clone(),
                connections: TaskTracker::new(),
            };
            let thread = std::thread::Builder::new().name(format!("io-{index}")).spawn(move || {
                priority::be_prompt();
                runtime.block_on(relay::relayed(context.serve(receiver)));
            })?;
            senders.push(sender);
            threads.push(thread);
        }
        Ok((Self { senders, accepted: AtomicU64::new(0) }, threads))
    }

    /// Accepts connections of `port` until `closing`.
    pub async fn accept(&self, port: Port, routes: impl Into<Routes>, wire: Wire, closing: CancellationToken) {
        let routes = routes.into();
        let listener = match tokio::net::TcpListener::from_std(port.listener) {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(address = %port.address, %error, "cannot listen"),
        };
        let mut last = BACKLOG;
        while let Some(stream) = accept_one(&listener, &closing, &mut last).await {
            let number = self.accepted.fetch_add(1, Ordering::Relaxed) + 1;
            let turn = number % self.senders.len() as u64;
            let accepted = Accepted { stream, routes: routes.clone(), wire, number };
            if self.senders[turn as usize].send(accepted).await.is_err() {
                return;
            }
        }
    }
}

fn prepare(stream: TcpStream) -> io::Result<std::net::TcpStream> {
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(60));
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    stream.into_std()
}

/// What serving a connection needs.
#[derive(Clone)]
struct Context {
    limits: LimitsConfig,
    closing: CancellationToken,
    abort: CancellationToken,
    connections: TaskTracker,
}

impl Context {
    async fn serve(self, mut receiver: mpsc::Receiver<Accepted>) {
        // tokio wakes a runtime, even its own, for each timer that ends before all others: for each request, when all
        // have deadlines. There is always one that ends before most of those.
        let heartbeat = tokio::spawn(async {
            let mut interval = tokio::time::interval(HEARTBEAT);
            loop {
                interval.tick().await;
            }
        });
        // Whoever accepts drops the sender after the last connection; none is forgotten on the way.
        while let Some(accepted) = receiver.recv().await {
            tokio::spawn(self.connections.track_future(self.clone().connection(accepted)));
        }
        self.connections.close();
        tokio::select! {
            () = self.connections.wait() => {}
            () = self.abort.cancelled() => {}
        }
        heartbeat.abort();
    }

    async fn connection(self, accepted: Accepted) {
        let Ok(stream) = TcpStream::from_std(accepted.stream) else { return };
        // Without an address, the peer is gone already.
        let Ok(address) = stream.peer_addr() else { return };
        let peer = Peer { address: address.ip(), connection: accepted.number };
        // The timers of HTTP/1 start with the first byte, those of HTTP/2 after the preface; a connection that does
        // not get so far ends here.
        let needed = if accepted.wire == Wire::Grpc { HTTP2_PREFACE } else { 1 };
        let first_bytes = tokio::time::timeout(self.limits.header_timeout, wait_for(&stream, needed));
        let last_chance = async {
            self.closing.cancelled().await;
            tokio::time::sleep(LAST_CHANCE).await;
        };
        tokio::select! {
            there = first_bytes => if there != Ok(true) { return },
            () = last_chance => return,
        }
        let io = TokioIo::new(stream);
        let begun = Arc::new(AtomicBool::new(false));
        let service = service_fn({
            let (begun, routes) = (begun.clone(), accepted.routes);
            move |request| {
                begun.store(true, Ordering::Relaxed);
                routes.answer(request, peer)
            }
        });
        let builder = self.builder(accepted.wire);
        let connection = builder.serve_connection(io, service);
        tokio::pin!(connection);
        let late = self.closing.is_cancelled() && accepted.wire == Wire::Http;
        let end = std::pin::pin!(async {
            self.closing.cancelled().await;
            if late {
                // Its first request is on the way; the answer to that closes the connection.
                self.abort.cancelled().await;
            }
        });
        // Wakes the connection, which then looks at its times.
        let looks = std::pin::pin!(async {
            let mut looks = tokio::time::interval((self.limits.header_timeout / LOOKS).max(Duration::from_millis(1)));
            loop {
                looks.tick().await;
            }
        });
        let result = tokio::select! {
            biased;
            result = connection.as_mut() => result,
            () = Seldom::new(looks), if accepted.wire == Wire::Http => Ok(()),
            () = Seldom::new(end) => {
                connection.as_mut().graceful_shutdown();
                let useless = async {
                    tokio::time::sleep(LAST_CHANCE).await;
                    if begun.load(Ordering::Relaxed) {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    result = connection => result,
                    () = self.abort.cancelled() => Ok(()),
                    // It has not even sent a request's headers.
                    () = useless => Ok(()),
                }
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "connection ended");
        }
    }

    fn builder(&self, wire: Wire) -> auto::Builder<TokioExecutor> {
        let limits = &self.limits;
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(Unwatched).header_read_timeout(limits.header_timeout);
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_concurrent_streams(limits.max_concurrent_streams)
            .keep_alive_interval(limits.keepalive_interval)
            .keep_alive_timeout(limits.keepalive_interval / 2);
        match wire {
            Wire::Http => builder.http1_only(),
            Wire::Grpc => builder.http2_only(),
        }
    }
}

/// Whether the peer sends at least `needed` bytes, which stay unread.
async fn wait_for(stream: &TcpStream, needed: usize) -> bool {
    let mut bytes = [0; HTTP2_PREFACE];
    loop {
        match stream.peek(&mut bytes[..needed]).await {
            Ok(0) | Err(_) => return false,
            Ok(there) if there >= needed => return true,
            // There is no waiting for the next byte while the first ones are unread.
            Ok(_) => tokio::time::sleep(PEEK_INTERVAL).await,
        }
    }
}

/// Accepts and serves connections of `port` on the calling thread's runtime until `closing`.
pub async fn serve_here(port: Port, router: Router, wire: Wire, limits: LimitsConfig, closing: CancellationToken) {
    let listener = match tokio::net::TcpListener::from_std(port.listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(address = %port.address, %error, "cannot listen"),
    };
    // Whoever still talks when this port closes is cut off: it closes last, when nothing is left to say.
    let context = Context { limits, abort: closing.clone(), closing, connections: TaskTracker::new() };
    let mut last = 0;
    while let Some(stream) = accept_one(&listener, &context.closing, &mut last).await {
        let accepted = Accepted { stream, routes: router.clone().into(), wire, number: 0 };
        tokio::spawn(context.clone().connection(accepted));
    }
}

/// The next connection, ready to be handed on. Once `closing` was cancelled, the `last` ones that wait already, then
/// `None`.
async fn accept_one(
    listener: &tokio::net::TcpListener,
    closing: &CancellationToken,
    last: &mut i32,
) -> Option<std::net::TcpStream> {
    loop {
        if closing.is_cancelled() {
            if *last == 0 {
                return None;
            }
            *last -= 1;
        }
        let accepted = tokio::select! {
            biased;
            // Accepting first: connections made before the port closed are served.
            accepted = listener.accept() => accepted,
            () = closing.cancelled() => return None,
        };
        match accepted {
            Ok((stream, _)) => match prepare(stream) {
                Ok(stream) => return Some(stream),
                Err(error) => tracing::debug!(%error, "a connection was gone before it was served"),
            },
            Err(_) if closing.is_cancelled() => return None,
            Err(error) => {
                // Out of descriptors, most likely: connections that end will free some.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the future of an answer takes.
    fn room<Asked, Answer>(_: impl FnOnce(Asked) -> Answer) -> usize {
        size_of::<Answer>()
    }

    /// With 3.9 KB each and without a box, moving them cost a fifth of a small model's throughput over gRPC and a tenth
    /// over REST, which no count of instructions shows: `rep movsb` is one, however much it moves.
    #[test]
    fn futures_of_inferences_are_small() {
        let grpc = room(|(call, request, app, router, peer): (infer::Call, _, _, _, _)| {
            call.answer(request, app, router, peer)
        });
        let rest = room(|(call, request, app, peer): (front::Call, _, _, _)| call.answer(request, app, peer));
        assert!(grpc <= 2048 && rest <= 2560, "gRPC {grpc}, REST {rest} bytes");
    }
}
