//! One version takes over from another, step by step, under load, and is taken back when it is worse.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use tidegate::config::Config;

use crate::support::{Reply, Repository, Running, config, eventually, infer_message, start, start_unready};

/// A plan whose steps take moments.
const PLAN: &str = r#"
    [rollout]
    on_new_version = "canary"
    steps = [20, 50, 100]
    every = "500ms"
    min_samples = 20
    watch = "500ms"
    rollback_window = "60s"
    latency_objective = "100ms"
"#;

/// A server whose data outlives it.
struct Place {
    repository: Repository,
    config: Config,
    _data: tempfile::TempDir,
}

impl Place {
    fn new(settings: &str, script: &str) -> Self {
        let repository = Repository::with("m", script);
        repository.settings("m", settings);
        let data = tempfile::tempdir().unwrap();
        let config = Config { data: Some(data.path().to_path_buf()), ..config(&repository) };
        Self { repository, config, _data: data }
    }
}

/// Clients that ask without a pause, over both protocols, each with a key of its own.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    failed: Arc<AtomicUsize>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    /// `right` says whether a version's answer to 1.0 is as it should be.
    fn start(running: &Arc<Running>, right: fn(&str, f64) -> bool) -> Self {
        let load = Self { stop: Arc::default(), answered: Arc::default(), failed: Arc::default(), clients: Vec::new() };
        let clients = (0..8).map(|client| {
            let (running, stop) = (running.clone(), load.stop.clone());
            let (answered, failed) = (load.answered.clone(), load.failed.clone());
            tokio::spawn(async move {
                let mut grpc = running.grpc.clone();
                while !stop.load(Ordering::Relaxed) {
                    let stable = if client % 2 == 0 {
                        let reply = running.infer("m", &[1.0]).await;
                        let version = reply.headers["x-tidegate-version"].to_str().unwrap().to_owned();
                        // What is no number is no JSON either.
                        if reply.status == 200 && reply.body.is_object() {
                            assert_eq!(reply.body["model_version"], version.as_str());
                            assert!(right(&version, reply.values()[0]), "{}", reply.body);
                        }
                        (version, reply.status == 200)
                    } else {
                        let answer = grpc.model_infer(infer_message("m", &[1.0])).await;
                        let metadata =
                            answer.as_ref().map_or_else(|status| status.metadata(), |answer| answer.metadata());
                        (metadata.get("x-tidegate-version").unwrap().to_str().unwrap().to_owned(), answer.is_ok())
                    };
                    let count = if stable.1 { &answered } else { &failed };
                    count.fetch_add(1, Ordering::Relaxed);
                    assert!(stable.1 || stable.0 != "1", "the stable version failed");
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
        });
        let clients = clients.collect();
        Self { clients, ..load }
    }

    async fn end(self) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
        (self.answered.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }
}

/// What an operator changes of the model.
async fn ask(running: &Running, method: &str, path: &str, body: &Value) -> Reply {
    let request = http::Request::builder().method(method).uri(format!("{}/admin/v1/models/m/{path}", running.ops));
    running.send(request.body(Full::from(Bytes::from(body.to_string()))).unwrap()).await.unwrap()
}

/// The model's rollout as operators see it.
async fn rollout(running: &Running) -> Value {
    running.ops("/admin/v1/models/m/rollout").await.1
}

async fn reaches(running: &Running, phase: &str) -> Value {
    eventually(&format!("the rollout is {phase}"), async || rollout(running).await["phase"] == phase).await;
    rollout(running).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_version_takes_over_step_by_step() {
    // What else the machine does is not held against either version.
    let place = Place::new(&PLAN.replace("100ms", "1m"), "scale = 1.0");
    let running = Arc::new(start(&place.config).await);
    let load = Load::start(&running, |_, value| value == 1.0);
    place.repository.put("m", "2", "scale = 1.0");
    let status = reaches(&running, "done").await;
    let phases: Vec<_> = status["history"].as_array().unwrap().iter().map(|change| &change["to"]).collect();
    assert_eq!(phases, ["canary", "canary", "canary", "promoting", "watching", "done"]);
    assert_eq!(status["id"], "m/r1");
    let (answered, failed) = load.end().await;
    assert!(answered > 100 && failed == 0, "{answered} answered, {failed} failed");
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "2");
    let (_, model) = running.ops("/admin/v1/models/m").await;
    assert_eq!(model["versions"][0]["state"], "ready", "version 1 stays warm for a rollback: {model}");
}

/// A candidate that is given up: its script, and what the reason says. What was known of the rollout then.
async fn is_given_up(plan: &str, script: &str, because: &str) -> Value {
    let place = Place::new(plan, "scale = 1.0");
    let running = Arc::new(start(&place.config).await);
    let load = Load::start(&running, |version, value| version == "2" || value == 1.0);
    place.repository.put("m", "2", script);
    let status = reaches(&running, "aborted").await;
    let reason = status["history"].as_array().unwrap().last().unwrap()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains(because), "{reason}");
    eventually("version 1 has all requests", async || {
        running.infer("m", &[1.0]).await.headers["x-tidegate-version"] == "1"
    })
    .await;
    let (answered, failed) = load.end().await;
    assert!(answered > 20, "{answered} answered, {failed} failed");

    // It is not tried again, also after a restart, until its files change.
    Arc::into_inner(running).unwrap().stop().await;
    let running = start(&place.config).await;
    // A look at the repository that finds another model has looked at this one.
    place.repository.put("other", "1", "");
    eventually("the repository was looked at", async || running.infer("other", &[1.0]).await.status == 200).await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1");
    let status = rollout(&running).await;
    assert_eq!(status["phase"], "aborted", "{status}");
    place.repository.put("m", "2", "scale = 1.0\nsleep_ms = 0");
    eventually("the mended version is tried", async || rollout(&running).await["id"] == "m/r2").await;
    status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_fails_requests_is_given_up() {
    is_given_up(PLAN, "scale = 1.0\nrefuse = 1.0", "requests failed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_is_too_slow_is_given_up() {
    is_given_up(PLAN, "scale = 1.0\nsleep_ms = 150", "slow:").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_objective_the_stable_versions_own_latency_is_one() {
    let plan = PLAN.replace("latency_objective = \"100ms\"", "");
    // Slower than the stable version is on a busy machine.
    let status = is_given_up(&plan, "scale = 1.0\nsleep_ms = 1000", "slow:").await;
    let objective = status["objective_seconds"].as_f64().unwrap();
    assert!((0.001..1.0).contains(&objective), "{objective}: 1 ms at least");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_answers_no_numbers_is_given_up() {
    is_given_up(PLAN, "scale = nan", "no_numbers:").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_answers_otherwise_is_given_up() {
    is_given_up(PLAN, "scale = 100.0", "distribution of 'y'").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_cannot_be_loaded_is_given_up() {
    is_given_up(PLAN, "fail_load = true", "the script says so").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_wants_other_inputs_is_given_up() {
    is_given_up(PLAN, "scale = 1.0\ninput = \"other\"", "requests failed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_are_to_blame_for_says_nothing_of_a_version() {
    let place = Place::new(&PLAN.replace("steps", "sticky = \"header:x-user\"\nsteps"), "scale = 1.0");
    let running = Arc::new(start(&place.config).await);
    place.repository.put("m", "2", "scale = 1.0");
    reaches(&running, "canary").await;
    let ask = async |name: &str, user: usize| {
        let body = json!({ "inputs": [{ "name": name, "datatype": "FP32", "shape": [1], "data": [1] }] });
        running.post("/v2/models/m/infer", body, &[("x-user", &format!("user-{user}"))]).await
    };
    let mut refused = 0;
    for user in 0..400 {
        let reply = ask("nonsense", user).await;
        assert_eq!(reply.status, 400);
        refused += usize::from(reply.headers["x-tidegate-version"] == "2");
    }
    assert!(refused > 20, "{refused}");
    for user in 0..300 {
        assert_eq!(ask("x", user).await.status, 200);
    }
    assert_ne!(rollout(&running).await["phase"], "aborted");
}

/// What answers first after a start is what answered before it.
async fn answers_from_the_first_on(place: &Place, expected: &str) {
    let running = start_unready(&place.config);
    eventually("it answers", async || running.infer("m", &[1.0]).await.status == 200).await;
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], expected);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    eventually("it is ready", async || running.get("/v2/health/ready").await.0 == 200).await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], expected);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_is_held_does_not_slip_in_at_a_restart() {
    let mut place = Place::new("[rollout]\non_new_version = \"hold\"", "scale = 1.0\nload_ms = 1000");
    place.config.load_concurrency = Some(2);
    let running = start(&place.config).await;
    place.repository.put("m", "2", "scale = 2.0");
    eventually("version 2 is warm", async || {
        running.ops("/admin/v1/models/m").await.1["versions"][1]["state"] == "ready"
    })
    .await;
    running.stop().await;
    answers_from_the_first_on(&place, "1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_was_given_up_does_not_slip_in_at_a_restart() {
    let mut place = Place::new("", "scale = 1.0");
    place.repository.put("m", "2", "scale = 2.0\nload_ms = 1000");
    place.config.load_concurrency = Some(1);
    let running = start(&place.config).await;
    let plan = json!({ "to": "1", "steps": [50, 100], "every": "1h" });
    assert_eq!(ask(&running, "POST", "rollout", &plan).await.status, 200);
    reaches(&running, "canary").await;
    assert_eq!(ask(&running, "POST", "rollout/abort", &json!({})).await.status, 200);
    running.stop().await;
    answers_from_the_first_on(&place, "2").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_place_for_the_state_the_server_serves_on() {
    let place = Place::new("", "scale = 1.0");
    let folder = place.config.data.clone().unwrap();
    std::fs::write(folder.join("state.sqlite"), "not a database, but long enough to be looked at as one").unwrap();
    let running = start(&place.config).await;
    assert_eq!(running.infer("m", &[1.0]).await.values(), [1.0]);
    let change = json!({ "stable": "1" });
    let reply = ask(&running, "PUT", "route", &change).await;
    assert_eq!(reply.status, 503);
    assert!(reply.error().contains("state.sqlite"), "{}", reply.body);
    assert_eq!(running.metric("tidegate_state_stored").await, 0.0);
    assert_eq!(rollout(&running).await["phase"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_protects_clients_waits_for_no_disk() {
    // The judge looks when the step begins, and then two seconds later.
    let place = Place::new(&PLAN.replace("500ms", "10s"), "scale = 1.0");
    let running = Arc::new(start(&place.config).await);
    let load = Load::start(&running, |version, value| version == "2" || value == 1.0);
    place.repository.put("m", "2", "scale = 1.0\nrefuse = 1.0");
    reaches(&running, "canary").await;

    // Somebody else has the file for as long as it takes.
    let state = place.config.data.clone().unwrap().join("state.sqlite");
    let holder = rusqlite::Connection::open(&state).unwrap();
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();
    let reply = ask(&running, "PUT", "route", &json!({ "stable": "1" })).await;
    assert!([409, 503].contains(&reply.status), "{}", reply.body);
    reaches(&running, "aborted").await;
    let reply = ask(&running, "PUT", "route", &json!({ "stable": "1" })).await;
    assert_eq!(reply.status, 503, "{}", reply.body);
    assert_eq!(running.infer("m", &[2.0]).await.values(), [2.0]);
    assert_eq!(running.metric("tidegate_state_stored").await, 0.0);
    holder.execute_batch("ROLLBACK").unwrap();
    eventually("the abort is written down", async || {
        let log = running.ops("/admin/v1/audit?model=m").await.1;
        log["entries"].as_array().is_some_and(|entries| entries.iter().any(|entry| entry["action"] == "aborted"))
    })
    .await;
    assert_eq!(running.metric("tidegate_state_stored").await, 1.0);
    load.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_of_one_model_is_kept_and_the_others_are_known() {
    let place = Place::new("", "scale = 1.0");
    place.repository.put("n", "1", "scale = 1.0");
    let running = start(&place.config).await;
    let change = async |running: &Running, model: &str| {
        let request = http::Request::put(format!("{}/admin/v1/models/{model}/route", running.ops));
        running.send(request.body(Full::from(r#"{"stable": "1"}"#)).unwrap()).await.unwrap()
    };
    for model in ["m", "n"] {
        assert_eq!(change(&running, model).await.status, 200);
    }
    running.stop().await;
    let state = rusqlite::Connection::open(place.config.data.as_ref().unwrap().join("state.sqlite")).unwrap();
    state.execute("UPDATE model SET standing = '{\"split\": 7}' WHERE name = 'm'", []).unwrap();

    let running = start(&place.config).await;
    assert_eq!(running.infer("m", &[1.0]).await.values(), [1.0]);
    let refused = change(&running, "m").await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert_eq!(change(&running, "n").await.headers["etag"], "\"2\"");
    running.stop().await;
    let kept: String = state.query_row("SELECT standing FROM model WHERE name = 'm'", [], |row| row.get(0)).unwrap();
    assert_eq!(kept, "{\"split\": 7}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_can_abort_without_a_disk() {
    let place = Place::new("", "scale = 1.0");
    place.repository.put("m", "2", "scale = 2.0");
    let running = start(&place.config).await;
    let plan = json!({ "to": "1", "steps": [50, 100], "every": "1h" });
    assert_eq!(ask(&running, "POST", "rollout", &plan).await.status, 200);
    reaches(&running, "canary").await;
    let holder = rusqlite::Connection::open(place.config.data.as_ref().unwrap().join("state.sqlite")).unwrap();
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(ask(&running, "POST", "rollout/pause", &json!({})).await.status, 503);
    assert_eq!(ask(&running, "POST", "rollout/abort", &json!({})).await.status, 200);
    for _ in 0..20 {
        assert_eq!(running.infer("m", &[1.0]).await.values(), [2.0]);
    }
    holder.execute_batch("ROLLBACK").unwrap();
    eventually("the abort is written down", async || {
        let log = running.ops("/admin/v1/audit?model=m").await.1;
        log["entries"].as_array().is_some_and(|entries| entries.iter().any(|entry| entry["action"] == "aborted"))
    })
    .await;
}
