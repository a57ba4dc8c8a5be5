//! Loads that bring a configuration or files along; the repository is never touched.

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tidegate::{
    api::pb::{self, model_repository_parameter::ParameterChoice},
    config::Config,
    control::upload,
};

use crate::{
    commands::{ask, explicit},
    support::{Reply, Repository, Running, eventually, start},
};

fn allowing(repository: &Repository) -> Config {
    Config { allow_model_upload: true, ..explicit(repository) }
}

fn file(text: &str) -> Value {
    STANDARD.encode(text).into()
}

async fn load(running: &Running, model: &str, parameters: Value) -> Reply {
    let path = format!("/v2/repository/models/{model}/load");
    running.post(&path, json!({ "parameters": parameters }), &[]).await
}

fn uploads(repository: &Repository) -> usize {
    let folder = upload::directory(&repository.0.path().join(".tidegate"));
    folder.map_or(0, |folder| std::fs::read_dir(folder).unwrap().count())
}

/// Every file below `folder` but the server's own: its lock, its record of where uploads are, its state.
fn listing(folder: &Path) -> Vec<String> {
    let own = |name: &str| name == "lock" || name == "uploads" || name.starts_with("state.sqlite");
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            paths.extend(listing(&entry.path()));
        } else if !own(&entry.file_name().to_string_lossy()) {
            paths.push(entry.path().display().to_string());
        }
    }
    paths.sort();
    paths
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_stands_in_for_the_settings_until_a_plain_load() {
    let repository = Repository::with("m", "scale = 2.0");
    repository.settings("m", "max_batch_size = 8");
    let running = start(&explicit(&repository)).await;
    let rows = async |running: &Running| running.get("/v2/models/m/config").await.1["max_batch_size"].as_i64();
    assert_eq!(ask(&running, "load", "m").await.status, 200);
    assert_eq!(rows(&running).await, Some(8));

    let config = json!({ "config": r#"{"name": "m", "backend": "script", "max_batch_size": 3}"# });
    let reply = load(&running, "m", config.clone()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(rows(&running).await, Some(3));
    assert_eq!(running.infer("m", &[1.0; 4]).await.status, 400);
    assert_eq!(running.infer("m", &[1.0]).await.values(), [2.0], "the files are the repository's");
    assert_eq!(load(&running, "m", config).await.status, 200);

    let mut grpc = running.grpc.clone();
    let text = ParameterChoice::StringParam(r#"{"max_batch_size": 5}"#.to_owned());
    let parameter = pb::ModelRepositoryParameter { parameter_choice: Some(text) };
    let parameters = [("config".to_owned(), parameter)].into();
    let request = pb::RepositoryModelLoadRequest { model_name: "m".to_owned(), parameters, ..Default::default() };
    grpc.repository_model_load(request).await.unwrap();
    assert_eq!(rows(&running).await, Some(5));

    // What cannot be honoured is refused before anything changes.
    let reply = load(&running, "m", json!({ "config": r#"{"ensemble_scheduling": {}}"# })).await;
    assert!(reply.status == 400 && reply.error().contains("ensemble_scheduling"), "{}", reply.body);
    assert_eq!(rows(&running).await, Some(5));
    assert_eq!(ask(&running, "load", "m").await.status, 200);
    assert_eq!(rows(&running).await, Some(8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploaded_files_serve_until_an_unload_or_a_plain_load() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.put("m", "7", "scale = 7.0");
    let before = listing(repository.0.path());
    let running = start(&allowing(&repository)).await;
    assert_eq!(ask(&running, "load", "m").await.status, 200);
    let with = |text: &str| json!({ "config": "{}", "file:2/model.script": file(text) });
    let reply = load(&running, "m", with("scale = 20.0")).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let reply = running.infer("m", &[1.0]).await;
    assert_eq!(reply.body["model_version"], "2", "the upload has the only versions there are now");
    assert_eq!(reply.values(), [20.0]);
    assert_eq!(uploads(&repository), 1);

    let reply = load(&running, "m", with("scale = 30.0")).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(running.infer("m", &[1.0]).await.values(), [30.0]);
    assert_eq!(uploads(&repository), 1, "the folder of the first upload is gone");

    let reply = load(&running, "m", with("fail_load = true")).await;
    assert!(reply.status == 400 && reply.error().contains("the script says so"), "{}", reply.body);
    assert_eq!(running.infer("m", &[1.0]).await.values(), [30.0]);

    assert_eq!(ask(&running, "load", "m").await.status, 200);
    assert_eq!(running.infer("m", &[1.0]).await.values(), [7.0]);
    assert_eq!(uploads(&repository), 0);

    // A model that the repository does not have, over gRPC.
    let content = ParameterChoice::BytesParam("scale = 4.0".into());
    let config = ParameterChoice::StringParam("{}".to_owned());
    let parameters = [("config", config), ("file:1/model.script", content)]
        .map(|(key, value)| (key.to_owned(), pb::ModelRepositoryParameter { parameter_choice: Some(value) }));
    let request = pb::RepositoryModelLoadRequest {
        model_name: "guest".to_owned(),
        parameters: parameters.into(),
        ..Default::default()
    };
    running.grpc.clone().repository_model_load(request).await.unwrap();
    assert_eq!(running.infer("guest", &[1.0]).await.values(), [4.0]);
    assert_eq!(uploads(&repository), 1);
    assert_eq!(ask(&running, "unload", "guest").await.status, 200);
    assert_eq!(uploads(&repository), 0);
    assert_eq!(running.infer("guest", &[1.0]).await.status, 404);
    assert_eq!(ask(&running, "unload", "guest").await.status, 404);
    assert_eq!(listing(repository.0.path()), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_are_off_unless_allowed() {
    let repository = Repository::with("m", "");
    let running = start(&explicit(&repository)).await;
    let reply = load(&running, "m", json!({ "config": "{}", "file:1/model.script": file("") })).await;
    assert_eq!(reply.status, 403);
    assert!(reply.error().contains("allow_model_upload"), "{}", reply.error());
    let content = pb::ModelRepositoryParameter { parameter_choice: Some(ParameterChoice::BytesParam("".into())) };
    let request = pb::RepositoryModelLoadRequest {
        model_name: "m".to_owned(),
        parameters: [("file:1/model.script".to_owned(), content)].into(),
        ..Default::default()
    };
    let status = running.grpc.clone().repository_model_load(request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::PermissionDenied, reply.error()));
    assert_eq!(uploads(&repository), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_that_cannot_be_used_leave_nothing_behind() {
    let repository = Repository::with("m", "");
    let before = listing(repository.0.path());
    let running = start(&allowing(&repository)).await;
    for (parameters, word) in [
        (json!({ "file:1/model.script": file("") }), "'config'"),
        (json!({ "config": "{}", "file:../../m/1/model.script": file("") }), "file:../../m/1/model.script"),
        (json!({ "config": "{}", "file:1/../../../m/1/model.script": file("") }), "plain path"),
        (json!({ "config": "{}", "file:/etc/model.script": file("") }), "number from 1"),
        (json!({ "config": "{}", "file:0/model.script": file("") }), "number from 1"),
        (json!({ "config": "{\"platform\": \"tensorrt_plan\"}", "file:1/model.script": file("") }), "platform"),
        (json!({ "config": "{}", "file:1/a": file(""), "file:1/a/b": file("") }), "same path"),
    ] {
        let reply = load(&running, "m", parameters).await;
        assert_eq!(reply.status, 400, "{}", reply.body);
        assert!(reply.error().contains(word), "{}", reply.error());
        assert_eq!(uploads(&repository), 0, "{word}");
    }
    assert_eq!(running.infer("m", &[1.0]).await.status, 404, "nothing was loaded");
    assert_eq!(listing(repository.0.path()), before);
    // A model is an upload's to bring, and one that is none fails like any other.
    let reply = load(&running, "m", json!({ "config": "{}", "file:1/readme.md": file("hello") })).await;
    assert_eq!(reply.status, 400, "{}", reply.body);
    assert_eq!(ask(&running, "unload", "m").await.status, 200);
    eventually("its folder is gone", async || uploads(&repository) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_left_behind_is_removed_at_the_next_start() {
    let repository = Repository::with("m", "");
    let left = tempfile::Builder::new().prefix("tidegate-uploads-").tempdir().unwrap().keep();
    std::fs::create_dir_all(left.join("3-m/1")).unwrap();
    let data = repository.0.path().join(".tidegate");
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(data.join("uploads"), left.to_str().unwrap()).unwrap();
    assert_eq!(uploads(&repository), 1);
    let running = start(&allowing(&repository)).await;
    assert!(!left.exists());
    let reply = load(&running, "m", json!({ "config": "{}", "file:1/model.script": file("") })).await;
    assert_eq!((reply.status, uploads(&repository)), (200, 1));
    running.stop().await;
    assert_eq!(uploads(&repository), 0, "a server that ends takes its uploads with it");
}
