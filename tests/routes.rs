//! Who gets which version: the same for the same key, over both protocols, after a restart, while routes change.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use tidegate::{
    api::{
        auth::Token,
        pb::{InferParameter, infer_parameter::ParameterChoice},
    },
    config::Config,
};

use crate::{
    rollout_api::{held, start_held},
    support::{Reply, Repository, Running, config, eventually, infer_message, start},
    swap,
};

/// What answers say of their version.
const SAID: [&str; 4] = ["x-tidegate-version", "x-tidegate-variant", "x-tidegate-rollout", "x-tidegate-sticky"];

async fn change(running: &Running, method: &str, path: &str, body: Value) -> Reply {
    let request = http::Request::builder().method(method).uri(format!("{}/admin/v1/models/m/{path}", running.ops));
    running.send(request.body(Full::from(Bytes::from(body.to_string()))).unwrap()).await.unwrap()
}

async fn divide(running: &Running, percent: f64, sticky: &str) {
    let body = json!({ "stable": "1", "canary": { "version": "2", "percent": percent }, "sticky": sticky });
    let reply = change(running, "PUT", "route", body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
}

fn header<'a>(headers: &'a http::HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

/// What a user gets: over REST, and the same over gRPC, alone or on a stream.
async fn version_for(running: &Running, user: &str) -> String {
    let reply = running.send(running.infer_request("m", &[1.0], &[("x-user-id", user)])).await.unwrap();
    assert_eq!((reply.status, header(&reply.headers, "x-tidegate-sticky")), (200, "true"));
    let mut request = tonic::Request::new(infer_message("m", &[1.0]));
    request.metadata_mut().insert("x-user-id", user.parse().unwrap());
    let answer = running.grpc.clone().model_infer(request).await.unwrap();
    let metadata = answer.metadata().as_ref().clone();
    for name in SAID {
        assert_eq!(header(&metadata, name), header(&reply.headers, name), "{user}: {name}");
    }
    let mut stream = tonic::Request::new(tokio_stream::once(infer_message("m", &[1.0])));
    stream.metadata_mut().insert("x-user-id", user.parse().unwrap());
    let mut answers = running.grpc.clone().model_stream_infer(stream).await.unwrap().into_inner();
    let streamed = answers.message().await.unwrap().unwrap().infer_response.unwrap();
    for name in SAID {
        let said = streamed.parameters[name].parameter_choice.clone();
        assert_eq!(said, Some(ParameterChoice::StringParam(header(&metadata, name).to_owned())), "{user}: {name}");
    }
    let version = header(&reply.headers, "x-tidegate-version").to_owned();
    assert_eq!(reply.body["model_version"], version.as_str());
    assert_eq!(streamed.model_version, version);
    assert_eq!(answer.into_inner().model_version, version);
    let variant = if version == "2" { "canary" } else { "stable" };
    assert_eq!(header(&reply.headers, "x-tidegate-variant"), variant);
    version
}

async fn versions(running: &Running) -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    for user in 0..60 {
        let user = format!("user-{user}");
        versions.insert(user.clone(), version_for(running, &user).await);
    }
    versions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_keep_their_version_over_both_protocols_and_a_restart() {
    let repository = held();
    let data = tempfile::tempdir().unwrap();
    let config = Config { data: Some(data.path().to_path_buf()), ..config(&repository) };
    let running = start_held(&repository, &config).await;
    divide(&running, 30.0, "header:x-user-id").await;
    let before = versions(&running).await;
    let canaries = before.values().filter(|version| *version == "2").count();
    assert!((6..=30).contains(&canaries), "{canaries} of 60 at 30 percent");

    // kill -9 is tried with the real binary; here the server ends in order.
    running.stop().await;
    let running = start(&config).await;
    assert_eq!(versions(&running).await, before);

    divide(&running, 60.0, "header:x-user-id").await;
    let after = versions(&running).await;
    assert!(
        before.iter().all(|(user, version)| version == "1" || after[user] == "2"),
        "weights only move keys one way"
    );
    assert!(after.values().filter(|version| *version == "2").count() > canaries);

    // Without the key, the request's id is drawn, and nobody is promised the same again.
    let reply = running.infer("m", &[1.0]).await;
    assert_eq!(header(&reply.headers, "x-tidegate-sticky"), "false");
    assert_eq!(header(&reply.headers, "x-tidegate-rollout"), "m/r1", "weights do not make another split");
    let mut seen = BTreeMap::new();
    for number in 0..40 {
        let id = format!("id-{number}");
        let request = running.infer_request("m", &[1.0], &[("x-request-id", &id)]);
        *seen
            .entry(header(&running.send(request).await.unwrap().headers, "x-tidegate-version").to_owned())
            .or_insert(0) += 1;
    }
    assert!(seen.len() == 2, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_may_stand_in_parameters_and_inputs() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    for sticky in ["param:user", "input:x"] {
        divide(&running, 50.0, sticky).await;
        let mut seen = BTreeMap::new();
        for user in 0..30_u8 {
            let value = f32::from(user);
            let body = json!({
                "parameters": { "user": user },
                "inputs": [{ "name": "x", "datatype": "FP32", "shape": [1], "data": [value] }]
            });
            let reply = running.post("/v2/models/m/infer", body, &[]).await;
            assert_eq!(header(&reply.headers, "x-tidegate-sticky"), "true");
            let mut message = infer_message("m", &[value]);
            let number = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(user.into())) };
            message.parameters.insert("user".to_owned(), number);
            let answer = running.grpc.clone().model_infer(message).await.unwrap().into_inner();
            assert_eq!(reply.body["model_version"], answer.model_version.as_str(), "{sticky} {user}");
            let scale: f64 = answer.model_version.parse().unwrap();
            assert_eq!(reply.values(), [f64::from(user) * scale]);
            *seen.entry(answer.model_version).or_insert(0) += 1;
        }
        assert_eq!(seen.len(), 2, "{sticky}: {seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn variants_can_be_asked_for_by_those_who_may() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    let body = json!({ "arms": [{ "name": "bold", "version": "2", "percent": 0 }] });
    assert_eq!(change(&running, "PUT", "route", body).await.status, 200);
    let asked = async |variant: &str| {
        running.send(running.infer_request("m", &[1.0], &[("x-tidegate-variant", variant)])).await.unwrap()
    };
    let reply = asked("bold").await;
    assert_eq!((reply.values(), header(&reply.headers, "x-tidegate-variant")), (vec![2.0], "bold"));
    assert_eq!(asked("stable").await.values(), [1.0]);
    let reply = asked("canary").await;
    assert_eq!(reply.status, 404);
    assert_eq!(reply.error(), "model 'm' has no variant 'canary'; it has stable, bold");
    // A version in the URL wins over everything.
    let reply = running
        .post(
            "/v2/models/m/versions/1/infer",
            json!({ "inputs": [{ "name": "x", "datatype": "FP32", "shape": [1], "data": [1] }] }),
            &[("x-tidegate-variant", "bold")],
        )
        .await;
    assert_eq!((reply.values(), header(&reply.headers, "x-tidegate-variant")), (vec![1.0], "stable"));
    running.stop().await;

    let token = Some(Token::parse("s3cret".to_owned()).unwrap());
    let running = start(&Config { token, ..config(&repository) }).await;
    let request = running.infer_request("m", &[1.0], &[("x-tidegate-variant", "stable")]);
    assert_eq!(running.send(request).await.unwrap().status, 401);
    let headers = [("x-tidegate-variant", "stable"), ("authorization", "Bearer s3cret")];
    assert_eq!(running.send(running.infer_request("m", &[1.0], &headers)).await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_say_which_version_they_are_of() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    divide(&running, 100.0, "header:x-user-id").await;
    let reply = running.post("/v2/models/m/infer", json!({ "inputs": [] }), &[("x-user-id", "me")]).await;
    assert_eq!((reply.status, header(&reply.headers, "x-tidegate-version")), (400, "2"));
    let mut message = infer_message("m", &[1.0]);
    message.inputs[0].name = "other".to_owned();
    let status = running.grpc.clone().model_infer(message).await.unwrap_err();
    assert_eq!(status.metadata().get("x-tidegate-version").unwrap(), "2");
    assert_eq!(status.metadata().get("x-tidegate-variant").unwrap(), "canary");
    let reply = running.infer("unknown", &[1.0]).await;
    assert!(reply.headers.get("x-tidegate-version").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_changes_of_the_route_fail_and_misroute_nothing() {
    let repository = held();
    let running = Arc::new(start_held(&repository, &config(&repository)).await);
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = swap::load(&running, &stop, &answered);
    let start = Instant::now();
    for number in 0..1000 {
        let (stable, other) = if number % 2 == 0 { ("1", "2") } else { ("2", "1") };
        let body = match number % 3 {
            0 => json!({ "stable": stable, "canary": { "version": other, "percent": number % 100 } }),
            1 => json!({ "stable": stable, "arms": [{ "name": "a", "version": other, "percent": 50 }] }),
            _ => json!({ "stable": stable }),
        };
        let reply = change(&running, "PUT", "route", body).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        if number % 3 == 2 {
            // From the moment of the answer on, all requests go there.
            assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], stable);
        }
    }
    println!("1,000 changes in {:?}, {} answers meanwhile", start.elapsed(), answered.load(Ordering::Relaxed));
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(answered.load(Ordering::Relaxed) > 1000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_is_one_command_and_takes_effect_with_its_answer() {
    let repository = held();
    let running = Arc::new(start_held(&repository, &config(&repository)).await);
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = swap::load(&running, &stop, &answered);
    for (command, back_in) in [("abort", "aborted"), ("rollback", "rolled_back")] {
        let start = json!({ "to": "2", "steps": [50, 100], "every": "1h", "watch": "1h" });
        assert_eq!(change(&running, "POST", "rollout", start).await.status, 200);
        eventually("both versions answer", async || running.infer("m", &[1.0]).await.body["model_version"] == "2")
            .await;
        if command == "rollback" {
            assert_eq!(change(&running, "POST", "rollout/promote", json!({})).await.status, 200);
            eventually("version 2 is watched", async || {
                running.ops("/admin/v1/models/m/rollout").await.1["phase"] == "watching"
            })
            .await;
            assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "2");
        }
        let reply = change(&running, "POST", &format!("rollout/{command}"), json!({ "reason": "as tried" })).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        for _ in 0..50 {
            assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1");
        }
        assert_eq!(running.ops("/admin/v1/models/m/rollout").await.1["phase"], back_in);
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(answered.load(Ordering::Relaxed) > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_new_versions_swap_a_rollback_leads_back_too() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.put("m", "2", "scale = 2.0");
    let running = start(&config(&repository)).await;
    let answers = async || running.infer("m", &[1.0]).await.body["model_version"].clone();
    assert_eq!(answers().await, "2");
    let plan = json!({ "to": "1", "steps": [50, 100], "every": "1h", "watch": "1h" });
    for (commands, expected) in [(&["abort"][..], "2"), (&["promote", "rollback"], "2")] {
        assert_eq!(change(&running, "POST", "rollout", plan.clone()).await.status, 200);
        eventually("version 1 answers too", async || answers().await == "1").await;
        // A new version waits its turn.
        for command in commands {
            eventually("it can be told", async || {
                change(&running, "POST", &format!("rollout/{command}"), json!({})).await.status == 200
            })
            .await;
        }
        for _ in 0..20 {
            assert_eq!(answers().await, expected);
        }
    }
    repository.put("m", "3", "scale = 3.0");
    eventually("what comes after that takes over by itself", async || answers().await == "3").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_new_versions_swap_those_that_come_during_a_rollout_are_held() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.put("m", "2", "scale = 2.0");
    let running = start(&config(&repository)).await;
    let answers = async || running.infer("m", &[1.0]).await.body["model_version"].clone();
    let plan = json!({ "to": "1", "steps": [100], "every": "1h", "watch": "1h" });
    assert_eq!(change(&running, "POST", "rollout", plan).await.status, 200);
    repository.put("m", "3", "scale = 3.0");
    let state = async || running.ops("/admin/v1/models/m").await.1["versions"][2]["state"].clone();
    eventually("version 3 is warm", async || state().await == "ready").await;
    assert_eq!(answers().await, "1");
    assert_eq!(change(&running, "POST", "rollout/abort", json!({})).await.status, 200);
    for _ in 0..20 {
        assert_eq!(answers().await, "2");
    }
    eventually("version 3 is held", async || state().await == "held").await;
    let reason = running.ops("/admin/v1/models/m").await.1["versions"][2]["reason"].clone();
    assert!(reason.as_str().unwrap().contains("it came while rollout 'm/r1' ran"), "{reason}");
    // Until an operator says otherwise.
    let reply = running
        .send(
            http::Request::delete(format!("{}/admin/v1/overrides?model=m", running.ops)).body(Full::default()).unwrap(),
        )
        .await
        .unwrap();
    assert_eq!(reply.status, 200, "{}", reply.body);
    eventually("version 3 takes over", async || answers().await == "3").await;
}
