//! An alias, tag, stage or branch says which version serves, and going back to the one before is a rollback.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use tidegate::{config::Config, id::Version, source::pointer::Pointer};

use crate::{
    support::{Repository, Running, config, eventually, start},
    swap::load,
};

const CANARY: &str = r#"
    [rollout]
    on_new_version = "canary"
    steps = [20, 100]
    every = "300ms"
    min_samples = 20
    watch = "300ms"
    rollback_window = "60s"
    latency_objective = "1s"
"#;

/// Has the model's pointer come to a version, as a mirror has it.
fn point(repository: &Repository, version: &str) {
    let folder = repository.0.path().join("m");
    let mut pointer = Pointer::read(&folder).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    pointer.move_to(&Version::parse(version).unwrap(), now.try_into().unwrap());
    let staged = repository.0.path().join(".staged");
    std::fs::write(&staged, pointer.text()).unwrap();
    std::fs::rename(staged, folder.join(".pointer")).unwrap();
}

async fn answers(running: &Running, version: &str) {
    let what = format!("version {version} answers");
    eventually(&what, async || running.infer("m", &[1.0]).await.body["model_version"] == version).await;
}

async fn rollout(running: &Running) -> Value {
    running.ops("/admin/v1/models/m/rollout").await.1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pointed_at_serves_whatever_its_number() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.put("m", "2", "scale = 2.0");
    point(&repository, "1");
    let running = Arc::new(start(&config(&repository)).await);
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1", "a greater number says nothing");
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = load(&running, &stop, &answered);
    for version in ["2", "1", "2", "1"] {
        point(&repository, version);
        answers(&running, version).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(answered.load(Ordering::Relaxed) > 200);
    // A version that does not load leaves the one before it in place.
    repository.put("m", "v3", "fail_load = true");
    point(&repository, "v3");
    eventually("version v3 has failed", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model["versions"].as_array().unwrap().iter().any(|one| one["version"] == "v3" && one["state"] == "failed")
    })
    .await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pointer_that_moves_goes_through_the_models_policy_and_back_at_once() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.settings("m", CANARY);
    point(&repository, "1");
    let data = tempfile::tempdir().unwrap();
    let config = Config { data: Some(data.path().to_path_buf()), ..config(&repository) };
    let running = Arc::new(start(&config).await);
    answers(&running, "1").await;

    // On the way there: the rollout is given up, and the next one is another.
    repository.put("m", "2", "scale = 1.0");
    point(&repository, "2");
    eventually("a rollout begins", async || rollout(&running).await["phase"] == "canary").await;
    point(&repository, "1");
    eventually("it is given up", async || rollout(&running).await["phase"] == "aborted").await;
    let status = rollout(&running).await;
    let reason = status["history"].as_array().unwrap().last().unwrap()["reason"].as_str().unwrap().to_owned();
    assert_eq!(reason, "the registry points at version '1' again");
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1");

    // To its end, and back within the rollback window: at once, without steps.
    point(&repository, "2");
    eventually("the second rollout is done", async || {
        for _ in 0..40 {
            assert_eq!(running.infer("m", &[1.0]).await.status, 200);
        }
        let status = rollout(&running).await;
        status["id"] == "m/r2" && status["phase"] == "done"
    })
    .await;
    answers(&running, "2").await;
    point(&repository, "1");
    eventually("it is rolled back", async || rollout(&running).await["phase"] == "rolled_back").await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1");
    assert_eq!(rollout(&running).await["id"], "m/r2");

    // And so it stays after a restart.
    Arc::into_inner(running).unwrap().stop().await;
    let running = start(&config).await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_was_given_up_is_tried_again_when_the_pointer_comes_back() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.settings("m", CANARY);
    point(&repository, "1");
    let running = start(&config(&repository)).await;
    repository.put("m", "2", "fail_load = true");
    point(&repository, "2");
    eventually("it is given up", async || rollout(&running).await["phase"] == "aborted").await;
    assert_eq!(rollout(&running).await["id"], "m/r1");
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(rollout(&running).await["id"], "m/r1", "several looks later");
    point(&repository, "1");
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    point(&repository, "2");
    eventually("it is tried again", async || rollout(&running).await["id"] == "m/r2").await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_by_hand_may_lead_away_from_the_pointer() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.put("m", "2", "scale = 1.0");
    repository.settings("m", "versions = \"all\"");
    point(&repository, "1");
    point(&repository, "2");
    let running = start(&config(&repository)).await;
    answers(&running, "2").await;
    let plan = serde_json::json!({ "to": "1", "steps": [50, 100], "every": "1h" });
    let path = format!("{}/admin/v1/models/m/rollout", running.ops);
    let request = http::Request::post(path).body(http_body_util::Full::from(plan.to_string())).unwrap();
    assert_eq!(running.send(request).await.unwrap().status, 200);
    eventually("the rollout runs", async || rollout(&running).await["phase"] == "canary").await;
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(rollout(&running).await["phase"], "canary", "several looks later");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_models_settings_may_name_another_folder() {
    let (repository, elsewhere) = (Repository::new(), Repository::with("there", "scale = 1.0"));
    let folder = elsewhere.0.path().join("there");
    let settings = format!("source = \"{}\"\nversions = \"all\"", folder.display());
    repository.settings("m", &settings);
    let running = start(&config(&repository)).await;
    assert_eq!(running.infer("m", &[3.0]).await.values(), [3.0]);
    elsewhere.put("there", "2", "scale = 2.0");
    answers(&running, "2").await;
    let reply = running.post("/v2/models/m/versions/1/infer", json_of(3.0), &[]).await;
    assert_eq!(reply.values(), [3.0], "as the settings here say, every version serves");

    // Versions in both places are a mistake, and what runs stays.
    repository.put("m", "7", "scale = 7.0");
    eventually("the mistake shows", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model.to_string().contains("source stands in place of versions in the model's folder")
    })
    .await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "2");
    std::fs::remove_dir_all(repository.0.path().join("m/7")).unwrap();

    std::fs::remove_dir_all(&folder).unwrap();
    eventually("nothing is left", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model["problem"].as_str().is_some_and(|problem| problem.starts_with("source: there is no version of it in"))
    })
    .await;
}

fn json_of(value: f32) -> Value {
    serde_json::json!({ "inputs": [{ "name": "x", "datatype": "FP32", "shape": [1], "data": [value] }] })
}
