//! Stopping loses nothing.

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::support::{Repository, config, eventually, infer_message, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_in_flight_is_answered() {
    let repository = Repository::with("m", "sleep_ms = 30");
    repository.settings("m", "batching = false");
    let running = Arc::new(start(&config(&repository)).await);
    let requests: Vec<_> = (0..20)
        .map(|client| {
            let running = running.clone();
            tokio::spawn(async move {
                if client % 2 == 0 {
                    running.infer("m", &[1.0]).await.status == 200
                } else {
                    running.grpc.clone().model_infer(infer_message("m", &[1.0])).await.is_ok()
                }
            })
        })
        .collect();
    let pending = r#"tidegate_pending_requests{model="m",version="1"}"#;
    eventually("most of them wait", async || running.metric(pending).await >= 15.0).await;
    running.stopper.stop(Duration::ZERO);
    for request in requests {
        assert!(request.await.unwrap());
    }
    let running = Arc::into_inner(running).unwrap();
    assert_eq!(running.stop().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_serves_on_for_the_drain_delay_while_not_ready() {
    let repository = Repository::with("m", "");
    let running = start(&config(&repository)).await;
    running.stopper.stop(Duration::from_secs(60));
    eventually("it is not ready", async || running.get("/v2/health/ready").await.0 == 503).await;
    assert_eq!(running.get("/v2/health/live").await.0, 200);
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);
    let start = Instant::now();
    assert_eq!(running.stop().await, 0);
    assert!(start.elapsed() < Duration::from_secs(10), "a second signal ends the delay");
}

/// Whether the kernel reset a connection that no server had accepted: what was sent on it was never read. A server
/// that gives a request up closes the connection without a reset.
fn was_reset(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionReset) || error.source().is_some_and(was_reset)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_only_whole_answers_or_closed_connections() {
    let repository = Repository::with("m", "sleep_ms = 2");
    let running = Arc::new(start(&config(&repository)).await);
    let (stop, wrong) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let (running, stop, wrong) = (running.clone(), stop.clone(), wrong.clone());
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.load(Ordering::Relaxed) {
                    match running.send(running.infer_request("m", &[1.0], &[])).await {
                        Ok(reply) if reply.status == 200 => answered += 1,
                        Ok(_) => {
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                        // The port is closed: from here on nobody is connected.
                        Err(error) if error.is_connect() || was_reset(&error) => break,
                        Err(_) => {
                            wrong.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                answered
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    running.stopper.stop(Duration::from_millis(200));
    let mut answered = 0;
    for client in clients {
        answered += client.await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    assert_eq!(wrong.load(Ordering::Relaxed), 0);
    assert!(answered > 100);
    assert_eq!(Arc::into_inner(running).unwrap().stop().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_drain_timeout_is_kept_and_what_it_cuts_is_told() {
    let repository = Repository::with("m", "sleep_ms = 4000");
    repository.settings("m", "batching = false");
    let mut impatient = config(&repository);
    impatient.shutdown.drain_timeout = Duration::from_millis(500);
    let running = Arc::new(start(&impatient).await);
    let requests: Vec<_> = (0..2)
        .map(|_| {
            let running = running.clone();
            tokio::spawn(async move { running.send(running.infer_request("m", &[1.0], &[])).await.is_ok() })
        })
        .collect();
    let pending = r#"tidegate_pending_requests{model="m",version="1"}"#;
    eventually("both are there", async || running.metric(pending).await == 2.0).await;
    let begin = Instant::now();
    running.stopper.stop(Duration::ZERO);
    for request in requests {
        assert!(!request.await.unwrap(), "nobody could answer in time");
    }
    let running = Arc::into_inner(running).unwrap();
    assert!(running.stop().await >= 2);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_never_came_holds_nothing_up() {
    let repository = Repository::with("m", "");
    let running = start(&config(&repository)).await;
    let mut half = tokio::net::TcpStream::connect(running.rest_address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut half, b"POST /v2/models/m/infer HTTP/1.1\r\nhost:").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begin = Instant::now();
    assert_eq!(running.stop().await, 0);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}
