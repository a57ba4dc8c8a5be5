//! Operators call versions by names, and the one that a model follows says which version serves.

use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use tidegate::config::Config;

use crate::support::{Reply, Repository, Running, config, eventually, start};

async fn ask(running: &Running, method: &str, alias: &str, body: &Value) -> Reply {
    let uri = format!("{}/admin/v1/models/m/aliases/{alias}", running.ops);
    let request = http::Request::builder().method(method).uri(uri);
    running.send(request.body(Full::from(Bytes::from(body.to_string()))).unwrap()).await.unwrap()
}

async fn call(running: &Running, alias: &str, version: &str) {
    let body = json!({ "version": version, "author": "ada" });
    let reply = ask(running, "PUT", alias, &body).await;
    assert_eq!((reply.status, &reply.body["aliases"][alias]), (200, &json!(version)), "{}", reply.body);
}

async fn answers(running: &Running, model: &str, version: &str) {
    eventually(&format!("version {version} answers"), async || {
        running.infer(model, &[1.0]).await.body["model_version"] == version
    })
    .await;
}

fn three() -> Repository {
    let repository = Repository::with("m", "scale = 1.0");
    repository.put("m", "2", "scale = 2.0");
    repository.put("m", "3", "scale = 3.0");
    repository
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_champion_serves_whatever_is_newer_and_also_after_a_restart() {
    let repository = three();
    let data = tempfile::tempdir().unwrap();
    let config = Config { data: Some(data.path().to_path_buf()), ..config(&repository) };
    let running = start(&config).await;
    answers(&running, "m", "3").await;
    call(&running, "champion", "1").await;
    answers(&running, "m", "1").await;
    repository.put("m", "4", "scale = 4.0");
    call(&running, "champion", "2").await;
    answers(&running, "m", "2").await;
    running.stop().await;

    let running = start(&config).await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "2");
    let (_, audit) = running.ops("/admin/v1/audit?model=m").await;
    let entries = audit["entries"].as_array().unwrap().iter().filter(|entry| entry["action"] == "alias");
    let moves: Vec<String> = entries.map(|entry| format!("{} {}", entry["author"], entry["details"])).collect();
    assert_eq!(
        moves,
        [
            r#""ada" {"after":"1","alias":"champion","before":null}"#,
            r#""ada" {"after":"2","alias":"champion","before":"1"}"#
        ]
    );
    // Without it the newest is the one again.
    assert_eq!(ask(&running, "DELETE", "champion", &json!({})).await.status, 200);
    answers(&running, "m", "4").await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_with_an_alias_is_loaded_and_answers_to_it() {
    let repository = three();
    repository.settings("m", "alias = \"production\"");
    let running = start(&config(&repository)).await;
    call(&running, "production", "2").await;
    call(&running, "challenger", "1").await;
    answers(&running, "m", "2").await;
    answers(&running, "m/versions/challenger", "1").await;
    assert_eq!(running.infer("m/versions/production", &[1.0]).await.values(), [2.0]);
    // It is another name for the version, not another version: nothing of it changes who serves.
    call(&running, "champion", "3").await;
    answers(&running, "m/versions/champion", "3").await;
    assert_eq!(running.infer("m", &[1.0]).await.body["model_version"], "2");
    let (_, details) = running.ops("/admin/v1/models/m/versions/challenger").await;
    assert_eq!(details["version"], "1");
    // What nobody calls by a name any more makes room.
    assert_eq!(ask(&running, "DELETE", "challenger", &json!({})).await.status, 200);
    eventually("version 1 is gone", async || running.infer("m/versions/1", &[1.0]).await.status == 404).await;
    assert_eq!(running.infer("m/versions/challenger", &[1.0]).await.status, 404);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_champion_that_moves_goes_through_the_models_policy_and_back_at_once() {
    let repository = three();
    repository.settings(
        "m",
        "[rollout]\non_new_version = \"canary\"\nsteps = [20, 100]\nevery = \"1h\"\nlatency_objective = \"1s\"",
    );
    let running = start(&config(&repository)).await;
    answers(&running, "m", "3").await;
    call(&running, "champion", "3").await;
    call(&running, "champion", "1").await;
    let rollout = async || running.ops("/admin/v1/models/m/rollout").await.1;
    eventually("a rollout to version 1 begins", async || rollout().await["phase"] == "canary").await;
    assert_eq!((&rollout().await["candidate"], &rollout().await["stable"]), (&json!("1"), &json!("3")));
    call(&running, "champion", "3").await;
    eventually("it is given up", async || rollout().await["phase"] == "aborted").await;
    let status = rollout().await;
    let last = status["history"].as_array().unwrap().last().unwrap();
    assert_eq!(last["reason"], "alias 'champion' points at version '3' again");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_told() {
    let repository = three();
    let running = start(&config(&repository)).await;
    for (method, alias, body, status, said) in [
        ("PUT", "champion", json!({ "version": "9" }), 404, "the repository has no version '9' of it; it has 1, 2, 3"),
        ("PUT", "champion", json!({}), 400, "field 'version' is missing"),
        ("PUT", "champion", json!({ "version": "1", "to": 2 }), 400, "unknown field 'to'"),
        ("PUT", "v2", json!({ "version": "1" }), 400, "neither a number, v1 nor latest"),
        ("DELETE", "champion", json!({}), 404, "it has no alias 'champion'"),
    ] {
        let reply = ask(&running, method, alias, &body).await;
        assert!(reply.status == status && reply.error().contains(said), "{} {}", reply.status, reply.body);
    }
    repository.settings("m", "versions = { specific = [\"2\", \"3\"] }");
    eventually("version 2 serves, too", async || running.infer("m/versions/2", &[1.0]).await.status == 200).await;
    let reply = ask(&running, "PUT", "champion", &json!({ "version": "1" })).await;
    assert!(
        reply.status == 400 && reply.error().contains("versions.specific leaves version '1' out"),
        "{}",
        reply.body
    );
    repository.settings("m", "");
    // Where a registry's pointer says who serves, an alias would say so, too.
    std::fs::write(repository.0.path().join("m/.pointer"), "1 1\n").unwrap();
    answers(&running, "m", "1").await;
    let reply = ask(&running, "PUT", "champion", &json!({ "version": "2" })).await;
    assert!(reply.status == 400 && reply.error().contains("move the alias there"), "{}", reply.body);
    running.stop().await;
}
