//! What a request meets on its way: batches, neighbours that fail, deadlines, readiness.

use std::{sync::Arc, time::Duration};

use tidegate::control::ModelControl;

use crate::support::{Repository, config, eventually, infer_message, message_values, start, start_unready, try_start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_share_runs_and_get_their_own_rows() {
    let repository = Repository::with("m", "scale = 3.0\nsleep_ms = 20");
    let running = Arc::new(start(&config(&repository)).await);
    let clients = (0..40).map(|client| {
        let running = running.clone();
        tokio::spawn(async move {
            let values: Vec<f32> = (0..client % 4 + 1).map(|row| (client * 10 + row) as f32).collect();
            let expected: Vec<f64> = values.iter().map(|value| f64::from(value * 3.0)).collect();
            assert_eq!(running.infer("m", &values).await.values(), expected);
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let executions = running.metric(r#"tidegate_executions_total{model="m",version="1"}"#).await;
    assert!(executions < 20.0, "{executions} runs for 40 requests");
    assert_eq!(running.metric(r#"tidegate_inferences_total{model="m",version="1"}"#).await, 100.0);
    let ok = r#"tidegate_requests_total{model="m",version="1",protocol="rest",code="ok",variant="stable"}"#;
    assert_eq!(running.metric(ok).await, 40.0);
    assert_eq!(running.metric(r#"tidegate_queue_duration_seconds_count{model="m",version="1"}"#).await, 40.0);
    assert_eq!(running.metric(r#"tidegate_pending_requests{model="m",version="1"}"#).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_offender_of_a_batch_gets_the_error() {
    let repository = Repository::with("m", "sleep_ms = 20\nrefuse = 13.0\npanic = 14.0");
    let running = Arc::new(start(&config(&repository)).await);
    let clients = (0..30).map(|value| {
        let running = running.clone();
        tokio::spawn(async move {
            let reply = running.infer("m", &[value as f32]).await;
            match value {
                13 => assert_eq!((reply.status, reply.error()), (400, "model 'm': the script refuses this value")),
                14 => assert_eq!((reply.status, reply.error()), (500, "model 'm': the backend panicked")),
                _ => assert_eq!(reply.values(), [f64::from(value)]),
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_are_kept_over_both_protocols() {
    let repository = Repository::with("m", "sleep_ms = 300");
    let running = start(&config(&repository)).await;
    let hurried = running.infer_request("m", &[1.0], &[("x-request-timeout-ms", "50")]);
    let reply = running.send(hurried).await.unwrap();
    assert_eq!(reply.status, 504, "{}", reply.body);

    let mut grpc = running.grpc.clone();
    let mut request = tonic::Request::new(infer_message("m", &[1.0]));
    request.set_timeout(Duration::from_millis(50));
    assert_eq!(grpc.model_infer(request).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);

    let mut garbled = tonic::Request::new(infer_message("m", &[1.0]));
    garbled.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    assert_eq!(grpc.model_infer(garbled).await.unwrap_err().code(), tonic::Code::InvalidArgument);

    let mut message = infer_message("m", &[1.0]);
    let timeout = tidegate::api::pb::infer_parameter::ParameterChoice::Int64Param(50_000);
    message
        .parameters
        .insert("timeout".to_owned(), tidegate::api::pb::InferParameter { parameter_choice: Some(timeout) });
    assert_eq!(grpc.model_infer(message).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);

    let failed = |protocol: &str| {
        format!(
            r#"tidegate_requests_total{{model="m",version="1",protocol="{protocol}",code="deadline_exceeded",variant="stable"}}"#
        )
    };
    assert_eq!(running.metric(&failed("rest")).await, 1.0);
    assert_eq!(running.metric(&failed("grpc")).await, 2.0);
    let response = grpc.model_infer(infer_message("m", &[2.0])).await.unwrap().into_inner();
    assert_eq!(message_values(&response), [2.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_whose_client_has_gone_cost_no_run() {
    let repository = Repository::with("m", "sleep_ms = 100");
    repository.settings("m", "batching = false");
    let running = Arc::new(start(&config(&repository)).await);
    let patient = tokio::spawn({
        let running = running.clone();
        async move { running.infer("m", &[1.0]).await.status }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let gone: Vec<_> = (0..5)
        .map(|_| {
            let running = running.clone();
            tokio::spawn(async move { running.infer("m", &[2.0]).await.status })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(30)).await;
    gone.iter().for_each(tokio::task::JoinHandle::abort);
    assert_eq!(patient.await.unwrap(), 200);
    let dropped = r#"tidegate_dropped_requests_total{model="m",version="1",reason="cancelled"}"#;
    eventually("the dropped requests are counted", async || running.metric(dropped).await == 5.0).await;
    let cancelled =
        r#"tidegate_requests_total{model="m",version="1",protocol="rest",code="cancelled",variant="stable"}"#;
    assert_eq!(running.metric(cancelled).await, 5.0);
    assert_eq!(running.metric(r#"tidegate_executions_total{model="m",version="1"}"#).await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_waits_for_the_first_pass_only() {
    let empty = Repository::new();
    assert_eq!(start(&config(&empty)).await.get("/v2/health/ready").await.0, 200, "an empty repository is ready");

    let slow = Repository::with("m", "load_ms = 500");
    slow.put("broken", "1", "fail_load = true");
    let running = start_unready(&config(&slow));
    assert_eq!(running.get("/v2/health/ready").await.0, 503);
    assert_eq!(running.get("/v2/health/live").await.0, 200);
    let reply = running.infer("m", &[1.0]).await;
    assert!(matches!(reply.status, 404 | 503), "{}", reply.status);
    eventually("ready", async || running.ops("/readyz").await.0 == 200).await;
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);
    let reply = running.infer("broken", &[1.0]).await;
    assert_eq!(reply.status, 503);
    let unready =
        r#"tidegate_requests_total{model="broken",version="1",protocol="rest",code="not_ready",variant="stable"}"#;
    assert_eq!(running.metric(unready).await, 1.0);
    assert!(reply.error().contains("'broken'") && reply.error().contains("the script says so"), "{}", reply.error());

    running.stop().await;
    let mut strict = config(&slow);
    strict.strict_readiness = true;
    let running = start_unready(&strict);
    eventually("the model answers", async || running.infer("m", &[1.0]).await.status == 200).await;
    assert_eq!(running.get("/v2/health/ready").await.0, 503, "strict readiness minds the broken model");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn explicit_control_loads_what_is_named_and_none_stays_as_it_is() {
    let repository = Repository::with("a", "");
    repository.put("b", "1", "");
    let mut explicit = config(&repository);
    explicit.model_control = ModelControl::Explicit;
    explicit.load_model = vec!["b".to_owned(), "typo".to_owned()];
    let running = start(&explicit).await;
    let reply = running.infer("typo", &[1.0]).await;
    assert_eq!(reply.status, 503, "a model that was asked for and is not there shows as failed");
    assert!(reply.error().contains("no version"), "{}", reply.error());
    assert_eq!(running.infer("a", &[1.0]).await.status, 404);
    assert_eq!(running.infer("b", &[1.0]).await.status, 200);
    running.stop().await;

    let mut fixed = config(&repository);
    fixed.model_control = ModelControl::None;
    let running = start(&fixed).await;
    repository.put("c", "1", "");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(running.infer("c", &[1.0]).await.status, 404);
    assert_eq!(running.infer("a", &[1.0]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn model_settings_are_honoured() {
    let repository = Repository::with("m", "");
    repository.settings("m", "max_batch_size = 4\ninstances = 2\nversions = \"all\"");
    repository.put("m", "2", "scale = 2.0");
    let running = start(&config(&repository)).await;
    assert_eq!(running.infer("m", &[1.0]).await.values(), [2.0], "the highest version answers");
    let pinned = running.infer_request("m/versions/1", &[1.0], &[]);
    assert_eq!(running.send(pinned).await.unwrap().values(), [1.0]);
    let reply = running.infer("m", &[0.0; 5]).await;
    assert_eq!(reply.status, 400);
    assert!(reply.error().contains("4 rows at most (max_batch_size), got 5"), "{}", reply.error());
    let (_, config) = running.get("/v2/models/m/config").await;
    assert_eq!(config["max_batch_size"], 4);
    assert_eq!(config["instance_group"][0]["count"], 2);
    assert_eq!(config["input"][0]["dims"], serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_requests_harm_nobody() {
    let repository = Repository::with("m", "sleep_ms = 5");
    let running = start(&config(&repository)).await;
    for _ in 0..3 {
        assert_eq!(running.infer("m", &[]).await.values(), [0.0; 0]);
    }
    assert_eq!(running.infer("m", &[2.0]).await.values(), [2.0]);
    assert_eq!(running.metric(r#"tidegate_inferences_total{model="m",version="1"}"#).await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_server_is_told_about_the_first() {
    let repository = Repository::with("m", "");
    let running = start(&config(&repository)).await;
    let message = |result: anyhow::Result<_>| result.map(|_: tidegate::server::Server| ()).unwrap_err().to_string();
    let error = message(try_start(&config(&repository)));
    assert!(error.contains("in use by process") && error.contains(&std::process::id().to_string()), "{error}");

    let other = tempfile::tempdir().unwrap();
    let mut same_port = config(&repository);
    same_port.data = Some(other.path().to_path_buf());
    same_port.rest = running.rest_address;
    let error = message(try_start(&same_port));
    assert!(error.contains(&running.rest_address.port().to_string()) && error.contains("--rest"), "{error}");
}
