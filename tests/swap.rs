//! Versions come and go under load, and nobody notices but by the answers.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::support::{Repository, Running, config, eventually, infer_message, message_values, start};

/// Asks over both protocols until told to stop; every answer must be right for the version that gave it.
pub fn load(
    running: &Arc<Running>,
    stop: &Arc<AtomicBool>,
    answered: &Arc<AtomicUsize>,
) -> Vec<tokio::task::JoinHandle<()>> {
    let scale_of = |version: &str| version.parse::<f32>().unwrap();
    (0..16)
        .map(|client| {
            let (running, stop, answered) = (running.clone(), stop.clone(), answered.clone());
            tokio::spawn(async move {
                let mut grpc = running.grpc.clone();
                let mut asked = 0;
                while !stop.load(Ordering::Relaxed) {
                    asked += 1;
                    let value = (client * 1000 + asked % 1000) as f32;
                    let (version, answer) = if client % 2 == 0 {
                        let reply = running.infer("m", &[value]).await;
                        assert_eq!(reply.status, 200, "{}", reply.body);
                        (reply.body["model_version"].as_str().unwrap().to_owned(), reply.values()[0] as f32)
                    } else {
                        let response = grpc.model_infer(infer_message("m", &[value])).await.unwrap().into_inner();
                        (response.model_version.clone(), message_values(&response)[0])
                    };
                    assert_eq!(answer, value * scale_of(&version), "version {version}");
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_swaps_under_load_fail_and_misroute_nothing() {
    let repository = Repository::with("m", "scale = 1.0\nsleep_ms = 1");
    let running = Arc::new(start(&config(&repository)).await);
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients = load(&running, &stop, &answered);
    for version in 2..=21 {
        let name = version.to_string();
        repository.put("m", &name, &format!("scale = {version}.0\nsleep_ms = 1"));
        eventually("the new version answers", async || running.infer("m", &[1.0]).await.body["model_version"] == name)
            .await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(answered.load(Ordering::Relaxed) > 1000);
    eventually("only the last version is left", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model["versions"].as_array().unwrap().len() == 1
    })
    .await;
    let page = running.ops("/metrics").await.1;
    assert!(!page.as_str().unwrap().contains(r#"model="m",version="20""#), "a version's series vanish with it");
    assert_eq!(running.metric(r#"tidegate_model_state{model="m",version="21",state="ready"}"#).await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_fails_leaves_the_running_one_untouched() {
    let repository = Repository::with("m", "scale = 1.0");
    let running = start(&config(&repository)).await;
    repository.put("m", "2", "fail_load = true");
    eventually("the failure shows", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model["versions"][1]["state"] == "failed"
    })
    .await;
    let (_, model) = running.ops("/admin/v1/models/m").await;
    assert_eq!(model["default_version"], "1");
    assert_eq!(model["versions"][0]["state"], "ready");
    assert!(model["versions"][1]["reason"].as_str().unwrap().contains("the script says so"), "{model}");
    assert_eq!(running.infer("m", &[3.0]).await.values(), [3.0]);
    let load_time = running.metric(r#"tidegate_model_load_duration_seconds{model="m",version="1"}"#).await;
    assert_eq!(running.get("/v2/health/ready").await.0, 200, "a failed model does not unready the server");
    assert_eq!(running.get("/v2/models/m/versions/2/ready").await.0, 503);

    // Mended files are tried again; a restart with a broken newest version serves the one before it.
    running.stop().await;
    let running = start(&config(&repository)).await;
    assert_eq!(running.infer("m", &[3.0]).await.body["model_version"], "1");
    repository.put("m", "2", "scale = 5.0");
    eventually("the mended version answers", async || running.infer("m", &[3.0]).await.values() == [15.0]).await;
    assert!(load_time > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_replaced_in_place_are_loaded_anew() {
    let repository = Repository::with("m", "scale = 1.0");
    let running = start(&config(&repository)).await;
    repository.put("m", "1", "scale = 4.0");
    eventually("the new files answer", async || running.infer("m", &[2.0]).await.values() == [8.0]).await;
    repository.put("m", "1", "fail_load = true");
    eventually("the broken files show", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model["versions"][0]["reason"].as_str().unwrap().contains("failed to load")
    })
    .await;
    assert_eq!(running.infer("m", &[2.0]).await.values(), [8.0]);
    assert_eq!(running.metric(r#"tidegate_pending_requests{model="m",version="1"}"#).await, 0.0);

    // A successor retires what still served, and what failed stays known.
    repository.put("m", "2", "scale = 6.0");
    eventually("the successor answers", async || running.infer("m", &[2.0]).await.values() == [12.0]).await;
    eventually("the old files serve no more", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model["versions"][0]["state"] == "failed" && model["versions"][1]["state"] == "ready"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_change_during_a_load_are_loaded_again() {
    let repository = Repository::with("m", "scale = 1.0\nload_ms = 1500");
    let running = start(&config(&repository)).await;
    repository.put("m", "2", "scale = 2.0\nload_ms = 1500");
    eventually("version 2 loads", async || {
        let (_, model) = running.ops("/admin/v1/models/m").await;
        model["versions"][1]["state"] == "loading"
    })
    .await;
    repository.put("m", "2", "scale = 3.0");
    eventually("version 2 answers", async || running.infer("m", &[1.0]).await.body["model_version"] == "2").await;
    assert_eq!(running.infer("m", &[1.0]).await.values(), [3.0], "the first files of version 2 never serve");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_models_go_and_new_ones_come() {
    let repository = Repository::with("old", "");
    let running = start(&config(&repository)).await;
    repository.put("new", "1", "");
    std::fs::remove_dir_all(repository.0.path().join("old")).unwrap();
    eventually("the new model answers", async || running.infer("new", &[1.0]).await.status == 200).await;
    eventually("the old model is unknown", async || running.infer("old", &[1.0]).await.status == 404).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_new_files_are_is_not_said_of_those_that_serve() {
    let repository = Repository::with("m", "scale = 1.0");
    let running = start(&config(&repository)).await;
    let shown = async || running.ops("/admin/v1/models/m/versions/1").await.1;
    let before = shown().await;
    assert!(before["digest"].as_str().unwrap().starts_with("sha256:") && before["files"].is_array(), "{before}");
    repository.put("m", "1", "not a script");
    eventually("the new files fail", async || {
        shown().await["reason"].as_str().is_some_and(|reason| reason.contains("its new files failed to load"))
    })
    .await;
    let outdated = shown().await;
    assert!(outdated["digest"].is_null() && outdated["files"].as_array().unwrap().is_empty(), "{outdated}");
    assert_eq!(running.infer("m", &[2.0]).await.values(), [2.0]);
    // Settings that fail are none of the files.
    repository.put("m", "1", "scale = 1.0");
    eventually("they serve", async || shown().await["digest"] == before["digest"]).await;
    repository.settings("m", "versions = 7");
    eventually("the settings fail", async || {
        shown().await["reason"].as_str().is_some_and(|reason| reason.contains("failed to load"))
    })
    .await;
    assert_eq!(shown().await["digest"], before["digest"]);
}
