//! Models are loaded and unloaded by request, and nobody is left waiting.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tidegate::{api::pb, config::Config, control::ModelControl};

use crate::{
    support::{LOADED, Reply, Repository, Running, config, diary, eventually, start},
    swap,
};

pub fn explicit(repository: &Repository) -> Config {
    Config { model_control: ModelControl::Explicit, ..config(repository) }
}

pub async fn ask(running: &Running, verb: &str, model: &str) -> Reply {
    running.post(&format!("/v2/repository/models/{model}/{verb}"), Value::Null, &[]).await
}

async fn load(running: &Running, model: &str) {
    let reply = ask(running, "load", model).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
}

/// How often a script with this diary was loaded.
fn loads(file: &Path) -> usize {
    diary(file).iter().filter(|line| *line == LOADED).count()
}

fn grpc_load(model: &str) -> pb::RepositoryModelLoadRequest {
    pb::RepositoryModelLoadRequest { model_name: model.to_owned(), ..Default::default() }
}

fn grpc_unload(model: &str) -> pb::RepositoryModelUnloadRequest {
    pb::RepositoryModelUnloadRequest { model_name: model.to_owned(), ..Default::default() }
}

/// Name, version, state and reason of each entry of the index, which both protocols must tell alike.
async fn index(running: &Running) -> Vec<String> {
    let reply = running.post("/v2/repository/index", Value::Null, &[]).await;
    let field = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_owned();
    let line = |entry: &Value| ["name", "version", "state", "reason"].map(|key| field(entry, key)).join(" ");
    let rest: Vec<String> = reply.body.as_array().unwrap().iter().map(line).collect();
    let request = pb::RepositoryIndexRequest::default();
    let models = running.grpc.clone().repository_index(request).await.unwrap().into_inner().models;
    let grpc: Vec<String> =
        models.into_iter().map(|m| format!("{} {} {} {}", m.name, m.version, m.state, m.reason)).collect();
    assert_eq!(rest, grpc);
    rest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_answers_when_the_model_serves_and_an_unload_at_once() {
    let repository = Repository::with("a", "load_ms = 200");
    repository.put("b", "1", "scale = 2.0");
    repository.put("b", "2", "scale = 3.0");
    let running = start(&explicit(&repository)).await;
    assert_eq!(
        index(&running).await,
        ["a 1 UNAVAILABLE unloaded", "b 1 UNAVAILABLE unloaded", "b 2 UNAVAILABLE unloaded"]
    );
    assert_eq!(running.infer("a", &[1.0]).await.status, 404);
    load(&running, "a").await;
    assert_eq!(running.infer("a", &[1.0]).await.values(), [1.0]);
    running.grpc.clone().repository_model_load(grpc_load("b")).await.unwrap();
    assert_eq!(running.infer("b", &[1.0]).await.values(), [3.0]);
    assert_eq!(index(&running).await, ["a 1 READY ", "b 2 READY "]);

    assert_eq!(ask(&running, "unload", "a").await.status, 200);
    assert_eq!(running.infer("a", &[1.0]).await.status, 404);
    assert_eq!(index(&running).await, ["a 1 UNAVAILABLE unloaded", "b 2 READY "]);
    assert_eq!(ask(&running, "unload", "a").await.status, 200, "what is not loaded may be unloaded");
    running.grpc.clone().repository_model_unload(grpc_unload("b")).await.unwrap();
    let ready = pb::RepositoryIndexRequest { ready: true, ..Default::default() };
    assert!(running.grpc.clone().repository_index(ready).await.unwrap().into_inner().models.is_empty());
    load(&running, "a").await;
    assert_eq!(running.infer("a", &[1.0]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_does_not_wait_for_files_to_settle_and_unchanged_ones_are_not_loaded_again() {
    let repository = Repository::new();
    let running = start(&explicit(&repository)).await;
    // Files settle for a second at least; a busy machine takes longer than that now and then, and not always.
    let (start, mut took) = (Instant::now(), Vec::new());
    while took.last().is_none_or(|took| *took >= Duration::from_millis(900)) {
        assert!(start.elapsed() < Duration::from_secs(120), "{took:?}");
        repository.put(&format!("m{}", took.len()), "1", "load_ms = 200");
        let begin = Instant::now();
        load(&running, &format!("m{}", took.len())).await;
        took.push(begin.elapsed());
    }
    let file = repository.0.path().join(".diary");
    repository.put("m", "1", &format!("diary = '{}'", file.display()));
    load(&running, "m").await;
    load(&running, "m").await;
    assert_eq!(loads(&file), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_that_change_count_from_the_next_load_on() {
    let repository = Repository::with("m", "");
    repository.put("m", "2", "");
    let running = start(&explicit(&repository)).await;
    load(&running, "m").await;
    repository.settings("m", "versions = \"all\"\nmax_batch_size = 2");
    // Longer than the reconciler takes to look around and files to settle.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(index(&running).await, ["m 2 READY "]);
    load(&running, "m").await;
    assert_eq!(index(&running).await, ["m 1 READY ", "m 2 READY "]);
    assert_eq!(running.infer("m", &[1.0; 3]).await.status, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_has_heard_of_is_not_found() {
    let repository = Repository::with("m", "");
    std::fs::create_dir_all(repository.0.path().join("notes")).unwrap();
    repository.settings("empty", "batching = false");
    let running = start(&explicit(&repository)).await;
    let mut grpc = running.grpc.clone();
    for (verb, model) in
        [("load", "nosuch"), ("unload", "nosuch"), ("load", "notes"), ("unload", "notes"), ("load", "empty")]
    {
        let reply = ask(&running, verb, model).await;
        assert_eq!(reply.status, 404, "{verb} {model}");
        assert!(reply.error().contains(&format!("model '{model}'")), "{}", reply.error());
        let status = match verb {
            "load" => grpc.repository_model_load(grpc_load(model)).await.map(drop).unwrap_err(),
            _ => grpc.repository_model_unload(grpc_unload(model)).await.map(drop).unwrap_err(),
        };
        assert_eq!((status.code(), status.message()), (tonic::Code::NotFound, reply.error()));
    }
    for path in ["models/..%2Fm/load", "models/.tidegate/load"] {
        let reply = running.post(&format!("/v2/repository/{path}"), Value::Null, &[]).await;
        assert_eq!(reply.status, 400, "{path}");
    }
    for path in ["index", "models/m/load", "models/m/unload"] {
        let reply = running.post(&format!("/v2/repository/other/{path}"), Value::Null, &[]).await;
        assert_eq!(reply.status, 404, "{path}");
        assert!(reply.error().contains("unknown repository 'other'"), "{}", reply.error());
    }
    let other = pb::RepositoryModelLoadRequest { repository_name: "other".to_owned(), ..grpc_load("m") };
    assert_eq!(grpc.repository_model_load(other).await.unwrap_err().code(), tonic::Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parameters_that_nobody_knows_are_refused() {
    let repository = Repository::with("m", "");
    let running = start(&explicit(&repository)).await;
    let dependents = json!({ "parameters": { "unload_dependents": true }, "comment": "beside the parameters" });
    assert_eq!(running.post("/v2/repository/models/m/unload", dependents, &[]).await.status, 200);
    for (verb, body, word) in [
        ("load", json!({ "parameters": { "confg": "{}" } }), "'confg'"),
        ("load", json!({ "parameters": { "config": { "name": "m" } } }), "'config'"),
        ("load", json!({ "parameters": { "config": "no json" } }), "config"),
        ("load", json!({ "parameters": { "config": "{\"name\": \"other\"}" } }), "other"),
        ("load", json!({ "parameters": { "file:1/model.script": "§" } }), "base64"),
        ("load", json!({ "parameters": { "file:1/model.script": 5 } }), "bytes"),
        ("load", json!([1]), "load request"),
        ("unload", json!({ "parameters": { "unload_dependents": "yes" } }), "unload_dependents"),
        ("unload", json!({ "parameters": { "dependents": true } }), "'dependents'"),
    ] {
        let reply = running.post(&format!("/v2/repository/models/m/{verb}"), body.clone(), &[]).await;
        assert_eq!(reply.status, 400, "{body}");
        assert!(reply.error().contains(word), "{}", reply.error());
    }
    assert_eq!(running.infer("m", &[1.0]).await.status, 404, "nothing was loaded");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_modes_say_what_they_are_and_how_to_change_that() {
    for (mode, name) in [(ModelControl::Watch, "watch"), (ModelControl::None, "none")] {
        let repository = Repository::with("m", "");
        let running = start(&Config { model_control: mode, ..config(&repository) }).await;
        let mut grpc = running.grpc.clone();
        for status in [
            grpc.repository_model_load(grpc_load("m")).await.map(drop).unwrap_err(),
            grpc.repository_model_unload(grpc_unload("m")).await.map(drop).unwrap_err(),
        ] {
            assert_eq!(status.code(), tonic::Code::Unavailable);
            assert!(status.message().contains(&format!("\"{name}\"")), "{}", status.message());
            assert!(status.message().contains("--model-control explicit"), "{}", status.message());
        }
        assert_eq!(ask(&running, "load", "m").await.status, 503);
        assert_eq!(ask(&running, "unload", "m").await.status, 503);
        assert_eq!(running.infer("m", &[1.0]).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loads_under_traffic_lose_no_request() {
    let repository = Repository::with("m", "scale = 1.0\nsleep_ms = 1");
    let running = Arc::new(start(&explicit(&repository)).await);
    load(&running, "m").await;
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = swap::load(&running, &stop, &answered);
    for version in 2..=12 {
        let name = version.to_string();
        repository.put("m", &name, &format!("scale = {version}.0\nsleep_ms = 1"));
        assert_ne!(running.infer("m", &[1.0]).await.body["model_version"], name, "nobody asked for it");
        load(&running, "m").await;
        assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], name);
        let (_, model) = running.ops("/admin/v1/models/m").await;
        assert_eq!(model["versions"].as_array().unwrap().len(), 1, "{model}");
    }
    // Going back works too: version 12 is gone, and 11 is there again without a moment in between.
    std::fs::remove_dir_all(repository.0.path().join("m/12")).unwrap();
    load(&running, "m").await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "11");
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(answered.load(Ordering::Relaxed) > 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unload_answers_before_the_drain_is_over_and_requests_that_run_are_answered() {
    let repository = Repository::new();
    let gate = repository.0.path().join(".gate");
    repository.put("m", "1", &format!("gate = '{}'", gate.display()));
    repository.settings("m", "batching = false");
    let running = Arc::new(start(&explicit(&repository)).await);
    load(&running, "m").await;
    std::fs::write(&gate, "").unwrap();
    let requests: Vec<_> = (0..2)
        .map(|_| {
            let running = running.clone();
            tokio::spawn(async move { running.infer("m", &[1.0]).await.status })
        })
        .collect();
    let pending = r#"tidegate_pending_requests{model="m",version="1"}"#;
    eventually("they wait", async || running.metric(pending).await == 2.0).await;
    // The gate is shut until the model has been loaded again.
    assert_eq!(ask(&running, "unload", "m").await.status, 200);
    assert_eq!(running.infer("m", &[1.0]).await.status, 404);
    repository.put("m", "1", "");
    load(&running, "m").await;
    std::fs::remove_file(&gate).unwrap();
    for request in requests {
        assert_eq!(request.await.unwrap(), 200);
    }
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_fails_says_why_and_is_tried_again_when_asked_again() {
    let repository = Repository::with("m", "fail_load = true");
    let running = start(&explicit(&repository)).await;
    let reply = ask(&running, "load", "m").await;
    assert_eq!(reply.status, 400);
    for word in ["'m'", "version '1'", "the script says so"] {
        assert!(reply.error().contains(word), "{}", reply.error());
    }
    assert!(index(&running).await[0].starts_with("m 1 UNAVAILABLE"), "{:?}", index(&running).await);
    let status = running.grpc.clone().repository_model_load(grpc_load("m")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, reply.error()));

    repository.put("m", "1", "scale = 2.0");
    load(&running, "m").await;
    assert_eq!(running.infer("m", &[1.0]).await.values(), [2.0]);
    repository.put("m", "2", "fail_load = true");
    let reply = ask(&running, "load", "m").await;
    assert_eq!(reply.status, 400);
    assert!(reply.error().contains("version '2'") && reply.error().contains("version 1 serves"), "{}", reply.error());
    assert_eq!(running.infer("m", &[1.0]).await.values(), [2.0], "the old version stays");

    // Settings that cannot be read fail the load as well, and the model runs on as it was.
    std::fs::remove_dir_all(repository.0.path().join("m/2")).unwrap();
    repository.settings("m", "instances = 0");
    let reply = ask(&running, "load", "m").await;
    assert!(reply.status == 400 && reply.error().contains("instances"), "{}", reply.body);
    repository.settings("m", "versions = { specific = [\"7\"] }");
    let reply = ask(&running, "load", "m").await;
    assert!(reply.status == 400 && reply.error().contains("version policy"), "{}", reply.body);
    assert_eq!(running.infer("m", &[1.0]).await.values(), [2.0]);
    std::fs::remove_dir_all(repository.0.path().join("m")).unwrap();
    assert_eq!(ask(&running, "load", "m").await.status, 404);
    assert_eq!(running.infer("m", &[1.0]).await.values(), [2.0]);
    assert_eq!(ask(&running, "unload", "m").await.status, 200);
    assert_eq!(running.infer("m", &[1.0]).await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_change_during_a_load_are_loaded_again_before_it_answers() {
    let repository = Repository::with("m", "scale = 1.0\nload_ms = 700");
    let running = Arc::new(start(&explicit(&repository)).await);
    let asked = tokio::spawn({
        let running = running.clone();
        async move { ask(&running, "load", "m").await.status }
    });
    eventually("it loads", async || running.ops("/admin/v1/models/m").await.1["versions"][0]["state"] == "loading")
        .await;
    repository.put("m", "1", "scale = 5.0");
    assert_eq!(asked.await.unwrap(), 200);
    assert_eq!(running.infer("m", &[1.0]).await.values(), [5.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_for_one_model_at_the_same_time_are_all_answered() {
    let repository = Repository::with("m", "load_ms = 50");
    let running = Arc::new(start(&explicit(&repository)).await);
    let calls: Vec<_> = (0..40)
        .map(|call| {
            let running = running.clone();
            let verb = if call % 3 == 2 { "unload" } else { "load" };
            tokio::spawn(async move {
                let reply = ask(&running, verb, "m").await;
                let overtaken = reply.status == 503 && reply.error().contains("another request to unload it");
                assert!(reply.status == 200 || (verb == "load" && overtaken), "{verb}: {}", reply.body);
            })
        })
        .collect();
    for call in calls {
        tokio::time::timeout(Duration::from_secs(20), call).await.unwrap().unwrap();
    }
    load(&running, "m").await;
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);
    // Loads that nothing comes between share one.
    assert_eq!(ask(&running, "unload", "m").await.status, 200);
    let file = repository.0.path().join(".diary");
    repository.put("m", "1", &format!("load_ms = 1000\ndiary = '{}'", file.display()));
    let together: Vec<_> = (0..5)
        .map(|_| {
            let running = running.clone();
            tokio::spawn(async move { load(&running, "m").await })
        })
        .collect();
    for load in together {
        load.await.unwrap();
    }
    assert_eq!(loads(&file), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_goes_on_when_whoever_asked_for_it_has_gone() {
    let repository = Repository::with("m", "load_ms = 500");
    let running = Arc::new(start(&explicit(&repository)).await);
    let mut hurried = tonic::Request::new(grpc_load("m"));
    hurried.set_timeout(Duration::from_millis(100));
    let status = running.grpc.clone().repository_model_load(hurried).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
    load(&running, "m").await;
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_answers_the_loads_that_wait() {
    let repository = Repository::with("m", "load_ms = 4000");
    let running = Arc::new(start(&explicit(&repository)).await);
    let rest = tokio::spawn({
        let running = running.clone();
        async move { ask(&running, "load", "m").await }
    });
    let grpc = tokio::spawn({
        let running = running.clone();
        async move { running.grpc.clone().repository_model_load(grpc_load("m")).await.unwrap_err() }
    });
    eventually("it loads", async || running.ops("/admin/v1/models/m").await.1["versions"][0]["state"] == "loading")
        .await;
    let begin = Instant::now();
    running.stopper.stop(Duration::ZERO);
    let (rest, grpc) = (rest.await.unwrap(), grpc.await.unwrap());
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert_eq!((rest.status, rest.error()), (503, "the server is stopping"));
    assert_eq!((grpc.code(), grpc.message()), (tonic::Code::Unavailable, "the server is stopping"));
    assert_eq!(Arc::into_inner(running).unwrap().stop().await, 0);
}
