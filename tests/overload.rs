//! More than the server can do: refusals are quick and clear, operators get through, slow clients hold nothing up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{Repository, config, diary, eventually, infer_message, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_answers_at_once_over_both_protocols() {
    let repository = Repository::new();
    let [gate, file] = [".gate", ".diary"].map(|name| repository.0.path().join(name));
    repository.put("m", "1", &format!("gate = '{}'\ndiary = '{}'", gate.display(), file.display()));
    repository.settings("m", "batching = false");
    let mut tight = config(&repository);
    tight.queue.max_requests = 2;
    let running = Arc::new(start(&tight).await);
    let ask = || {
        let running = running.clone();
        tokio::spawn(async move { running.infer("m", &[1.0]).await })
    };
    // One runs and two wait, until the gate opens.
    std::fs::write(&gate, "").unwrap();
    std::fs::write(&file, "").unwrap();
    let mut accepted = vec![ask()];
    eventually("one runs", async || diary(&file).len() == 1).await;
    accepted.extend([ask(), ask()]);
    let pending = r#"tidegate_pending_requests{model="m",version="1"}"#;
    eventually("two wait", async || running.metric(pending).await == 3.0).await;

    let reply = running.infer("m", &[1.0]).await;
    assert_eq!(reply.status, 429);
    let retry_after: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!(retry_after >= 1);
    assert!(reply.error().contains("queue.max_requests"), "{}", reply.error());
    let status = running.grpc.clone().model_infer(infer_message("m", &[1.0])).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    std::fs::remove_file(&gate).unwrap();
    for request in accepted {
        assert_eq!(request.await.unwrap().status, 200);
    }
    let dropped = r#"tidegate_dropped_requests_total{model="m",version="1",reason="overloaded"}"#;
    assert_eq!(running.metric(dropped).await, 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_has_so_many_rows_over_both_protocols() {
    let repository = Repository::with("free", "");
    repository.put("limited", "1", "");
    repository.settings("limited", "max_batch_size = 5");
    let mut narrow = config(&repository);
    narrow.queue.max_rows = 3;
    let running = start(&narrow).await;
    for (model, most, key) in [("free", 3, "queue.max_rows"), ("limited", 5, "max_batch_size")] {
        assert_eq!(running.infer(model, &vec![1.0; most]).await.status, 200, "{model}");
        let reply = running.infer(model, &vec![1.0; most + 1]).await;
        assert_eq!(reply.status, 400, "{}", reply.body);
        let expected = format!("model '{model}': a request may have {most} rows at most ({key}), got {}", most + 1);
        assert_eq!(reply.error(), expected);
        let status = running.grpc.clone().model_infer(infer_message(model, &vec![1.0; most + 1])).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, &*expected));
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_port_answers_while_the_data_ports_are_saturated() {
    let repository = Repository::with("m", "sleep_ms = 5");
    let running = Arc::new(start(&config(&repository)).await);
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..64)
        .map(|_| {
            let (running, stop) = (running.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    running.infer("m", &[1.0; 1000]).await;
                }
            })
        })
        .collect();
    let mut times = Vec::new();
    for _ in 0..20 {
        let start = Instant::now();
        assert_eq!(running.ops("/readyz").await.0, 200);
        times.push(start.elapsed());
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    times.sort();
    // This process is client and server at once, so the client's own scheduling is in here, too.
    assert!(times[10] < Duration::from_millis(100), "{times:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_clients_are_let_go_and_hold_nobody_up() {
    let repository = Repository::with("m", "");
    let mut impatient = config(&repository);
    impatient.limits.header_timeout = Duration::from_millis(300);
    impatient.limits.body_timeout = Duration::from_millis(300);
    let running = start(&impatient).await;
    let silent = [running.rest_address, running.grpc_address];
    let mut connections = Vec::new();
    for address in silent {
        connections.push(TcpStream::connect(address).await.unwrap());
    }
    let mut half_preface = TcpStream::connect(running.grpc_address).await.unwrap();
    half_preface.write_all(b"PRI *").await.unwrap();
    connections.push(half_preface);
    let mut half_header = TcpStream::connect(running.rest_address).await.unwrap();
    half_header.write_all(b"POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\n").await.unwrap();
    let mut half_body = TcpStream::connect(running.rest_address).await.unwrap();
    half_body
        .write_all(b"POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{\"inputs\"")
        .await
        .unwrap();
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);

    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(5), half_body.read(&mut answer)).await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(text.starts_with("HTTP/1.1 408") && text.contains("limits.body_timeout"), "{text}");
    connections.push(half_header);
    for mut connection in connections {
        let closed = tokio::time::timeout(Duration::from_secs(5), async {
            while !matches!(connection.read(&mut answer).await, Ok(0) | Err(_)) {}
        });
        assert!(closed.await.is_ok(), "a slow connection stays open");
    }
}
