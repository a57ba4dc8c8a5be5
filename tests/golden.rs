//! Versions that give wrong answers to known questions never take any traffic.

use std::{path::Path, sync::Arc};

use serde_json::{Value, json};

use crate::support::{Repository, Running, config, eventually, start, start_onnx};

const IRIS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/iris/1");

/// Adds a version in one rename, its own golden file among its files.
fn put(repository: &Repository, model: &str, version: &str, files: &[(&str, &[u8])]) {
    let folder = repository.0.path().join(model);
    let staging = repository.0.path().join(format!(".{model}-{version}"));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::create_dir_all(&staging).unwrap();
    for (name, content) in files {
        std::fs::write(staging.join(name), content).unwrap();
    }
    std::fs::rename(staging, folder.join(version)).unwrap();
}

fn write(repository: &Repository, path: &str, text: &str) {
    let path = repository.0.path().join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// One case for a scripted model.
fn case(inputs: &[f32], outputs: &[f32]) -> Value {
    let tensor = |name, data: &[f32]| json!({ "name": name, "datatype": "FP32", "shape": [data.len()], "data": data });
    json!({ "inputs": [tensor("x", inputs)], "outputs": [tensor("y", outputs)] })
}

async fn version(running: &Running, model: &str, version: &str) -> Value {
    let (_, status) = running.ops(&format!("/admin/v1/models/{model}")).await;
    let versions = status["versions"].as_array().cloned().unwrap_or_default();
    versions.into_iter().find(|found| found["version"] == version).unwrap_or_default()
}

/// Waits until the version is in the state, and says why it is.
async fn reason(running: &Running, model: &str, number: &str, state: &str) -> String {
    eventually(&format!("version {number} of {model} is {state}"), async || {
        version(running, model, number).await["state"] == state
    })
    .await;
    version(running, model, number).await["reason"].as_str().unwrap().to_owned()
}

async fn metric(running: &Running, model: &str, version: &str) -> f64 {
    running.metric(&format!(r#"tidegate_golden_check{{model="{model}",version="{version}"}}"#)).await
}

/// Models, versions and reasons, as the audit log has them.
async fn kept_out(running: &Running) -> Vec<[String; 3]> {
    let (_, page) = running.ops("/admin/v1/audit?limit=1000").await;
    let entries = page["entries"].as_array().unwrap().iter().filter(|entry| entry["action"] == "kept_out");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    entries.map(|entry| [&entry["model"], &entry["details"]["version"], &entry["reason"]].map(text)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_with_wrong_answers_stays_out_and_says_which() {
    let repository = Repository::new();
    let model = std::fs::read(format!("{IRIS}/model.onnx")).unwrap();
    let right = std::fs::read_to_string(format!("{IRIS}/golden.json")).unwrap();
    put(&repository, "iris", "1", &[("model.onnx", &model), ("golden.json", right.as_bytes())]);
    let running = start_onnx(&config(&repository)).await;
    assert_eq!(reason(&running, "iris", "1", "ready").await, "");
    assert_eq!(metric(&running, "iris", "1").await, 1.0);

    let mut wrong: Value = serde_json::from_str(&right).unwrap();
    wrong[1]["outputs"][1]["data"] = json!([0.25, 0.0, 0.0]);
    let wrong = wrong.to_string();
    put(&repository, "iris", "2", &[("model.onnx", &model), ("golden.json", wrong.as_bytes())]);
    let told = reason(&running, "iris", "2", "failed").await;
    let file = repository.0.path().join("iris/2/golden.json");
    // The last digits are the processor's.
    let words = "cases[1]: output 'probabilities': element 0 is 0.99999";
    let words = [format!("golden check: {}: {words}", file.display()), ", expected 0.25: 0.7".to_owned()];
    assert!(told.starts_with(&words[0]) && told.contains(&words[1]), "{told}");
    assert_eq!(metric(&running, "iris", "2").await, 0.0);
    let request = std::fs::read_to_string(format!("{IRIS}/../request.json")).unwrap();
    let request: Value = serde_json::from_str(&request).unwrap();
    let reply = running.post("/v2/models/iris/infer", request, &[]).await;
    assert_eq!((reply.status, reply.body["model_version"].as_str()), (200, Some("1")), "{}", reply.body);
    let state = running.metric(r#"tidegate_model_state{model="iris",version="2",state="failed"}"#).await;
    assert_eq!(state, 1.0);

    // Right answers, and it serves.
    std::fs::write(&file, &right).unwrap();
    reason(&running, "iris", "2", "ready").await;
    assert_eq!(metric(&running, "iris", "2").await, 1.0);
    assert_eq!(kept_out(&running).await, [["iris".to_owned(), "2".to_owned(), told]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_that_cannot_be_made_is_not_passed() {
    let repository = Repository::new();
    let right = json!([case(&[1.0, 2.0], &[1.0, 2.0])]).to_string();
    let slow = "[golden]\nmax_latency = \"1ms\"";
    let none = json!([{ "inputs": [], "outputs": [] }]).to_string();
    let other = right.replace("\"y\"", "\"z\"");
    let short = json!({ "cases": [case(&[1.0, 2.0], &[1.0])] }).to_string();
    let wrong = json!([case(&[1.0], &[1.0]), case(&[1.0, 2.0, 3.0], &[1.0, 5.0, 7.0])]).to_string();
    let failing = [
        ("missing", "[golden]\nmin_accuracy = 0.5", None, "golden.min_accuracy is set, and there is no golden.json in"),
        ("elsewhere", "[golden]\nfile = \"g.json\"", Some(&*right), "golden.file is set, and there is no g.json in"),
        ("malformed", "", Some("[{"), "malformed/golden.json: the file is not the JSON it should be"),
        ("empty", "", Some("[]"), "empty/golden.json: it has no cases"),
        ("aimless", "", Some(&*none), "cases[0]: it expects no output"),
        ("other", "", Some(&*other), "cases[0]: the model has no output 'z'; its outputs are 'y'"),
        ("short", "", Some(&*short), "cases[0]: output 'y' has shape [2], expected [1]"),
        ("wrong", "", Some(&*wrong), "cases[1]: output 'y': element 2 is 3, expected 7: 4 apart"),
        (
            "inaccurate",
            "[golden]\nmin_accuracy = 0.75",
            Some(&*wrong),
            "output 'y': 2 of 4 labels agree, an accuracy of 0.5000, and golden.min_accuracy is 0.75; the first that \
             does not: cases[1]: element 1 is 2, expected 5",
        ),
        ("slow", slow, Some(&*right), "and golden.max_latency is 1ms"),
    ];
    for (model, settings, golden, _) in failing {
        repository.put(model, "1", "sleep_ms = 2");
        repository.settings(model, settings);
        golden.iter().for_each(|golden| write(&repository, &format!("{model}/golden.json"), golden));
    }
    let passing = [
        ("right", "", Some(&*right)),
        ("quick", "[golden]\nmax_latency = \"10s\"\nmax_difference = 0", Some(&*right)),
        ("accurate", "[golden]\nmin_accuracy = 0.5\nmax_accuracy_drop = 0", Some(&*wrong)),
        ("tolerant", "[golden]\nmax_difference = 4", Some(&*wrong)),
        ("unasked", "", None),
    ];
    for (model, settings, golden) in passing {
        repository.put(model, "1", "");
        repository.settings(model, settings);
        golden.iter().for_each(|golden| write(&repository, &format!("{model}/golden.json"), golden));
    }
    let running = start(&config(&repository)).await;
    for (model, _, _, words) in failing {
        let told = reason(&running, model, "1", "failed").await;
        assert!(told.starts_with("golden check: ") && told.contains(words), "{model}: {told}");
        assert_eq!(running.infer(model, &[1.0]).await.status, 503, "{model}");
    }
    for (model, _, golden) in passing {
        reason(&running, model, "1", "ready").await;
        assert_eq!(metric(&running, model, "1").await, if golden.is_some() { 1.0 } else { 0.0 }, "{model}");
    }
    let (_, page) = running.ops("/metrics").await;
    let page = page.as_str().unwrap();
    assert!(page.contains(r#"tidegate_golden_check{model="slow",version="1"} 0"#), "{page}");
    assert!(!page.contains(r#"tidegate_golden_check{model="unasked""#), "without a file there is nothing to tell");
    assert_eq!(kept_out(&running).await.len(), failing.len());
}

/// Of ten rows, a model that scales by another number than one has three right.
fn ten_rows() -> String {
    let rows = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
    json!([case(&rows, &rows)]).to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_must_not_be_less_accurate_than_the_one_that_serves() {
    let repository = Repository::with("m", "");
    write(&repository, "m/golden.json", &ten_rows());
    repository.settings("m", "[golden]\nmax_accuracy_drop = 0.6");
    let running = start(&config(&repository)).await;
    reason(&running, "m", "1", "ready").await;
    repository.put("m", "2", "scale = 2.0");
    let told = reason(&running, "m", "2", "failed").await;
    let words = "an accuracy of 0.3000 is 0.7000 below that of the stable version '1', 1.0000, and \
                 golden.max_accuracy_drop is 0.6";
    assert!(told.ends_with(words), "{told}");
    assert_eq!(running.infer("m", &[1.0]).await.values(), [1.0]);

    repository.settings("m", "[golden]\nmax_accuracy_drop = 0.7");
    reason(&running, "m", "2", "ready").await;
    eventually("version 2 answers", async || running.infer("m", &[1.0]).await.values() == [2.0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stable_version_without_a_check_is_asked() {
    let repository = Repository::with("m", "");
    let running = start(&config(&repository)).await;
    let settings = |drop: f64| {
        repository.settings("m", &format!("[golden]\nmax_accuracy_drop = {drop}\n[queue]\nmax_delay = \"5ms\""));
    };
    let golden = ten_rows();
    put(&repository, "m", "2", &[("model.script", b"scale = 2.0"), ("golden.json", golden.as_bytes())]);
    settings(0.6);
    // Should a look fall between the two, version 2 has failed for another reason before.
    eventually("version 2 is compared", async || {
        let told = version(&running, "m", "2").await["reason"].as_str().unwrap_or_default().to_owned();
        told.contains("0.7000 below that of the stable version '1', 1.0000")
    })
    .await;
    let asked = running.metric(r#"tidegate_inferences_total{model="m",version="1"}"#).await;
    assert_eq!(asked, 10.0, "its own queue has answered the rows");
    put(&repository, "m", "3", &[("model.script", b"scale = 1.0"), ("golden.json", golden.as_bytes())]);
    reason(&running, "m", "3", "ready").await;

    // What cannot be asked cannot be compared with.
    let refused = ten_rows().replace("7.0", "8.0");
    put(&repository, "m", "4", &[("model.script", b"refuse = 9.0"), ("golden.json", refused.as_bytes())]);
    reason(&running, "m", "4", "ready").await;
    let refused = ten_rows().replace("7.0", "9.0");
    put(&repository, "m", "5", &[("model.script", b""), ("golden.json", refused.as_bytes())]);
    let told = reason(&running, "m", "5", "failed").await;
    let words = "the stable version '4' cannot be compared with (golden.max_accuracy_drop): cases[0]: ";
    assert!(told.contains(words) && told.contains("the script refuses"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stable_version_without_time_does_not_fail_its_successor() {
    let repository = Repository::new();
    let gate = repository.0.path().join("closed");
    repository.put("m", "1", &format!("gate = \"{}\"", gate.display()));
    let mut config = config(&repository);
    config.queue.max_requests = 1;
    let running = Arc::new(start(&config).await);
    reason(&running, "m", "1", "ready").await;
    std::fs::write(&gate, "").unwrap();
    // One that runs and one that waits, and no room for another.
    let ask = |running: Arc<Running>| tokio::spawn(async move { running.infer("m", &[1.0]).await.status });
    let pending = |most: f64| {
        let running = running.clone();
        async move { running.metric(r#"tidegate_pending_requests{model="m",version="1"}"#).await >= most }
    };
    let mut asked = vec![ask(running.clone())];
    eventually("a request runs", async || pending(1.0).await).await;
    asked.push(ask(running.clone()));
    eventually("a request waits", async || pending(2.0).await).await;
    let golden = ten_rows();
    put(&repository, "m", "2", &[("model.script", b"scale = 1.0"), ("golden.json", golden.as_bytes())]);
    repository.settings("m", "[golden]\nmax_accuracy_drop = 0.6");
    let state = async |wanted: &str| version(&running, "m", "2").await["state"] == *wanted;
    eventually("version 2 is loaded", async || state("loading").await).await;
    eventually("its load waits for another try", async || state("settling").await).await;
    let told = version(&running, "m", "2").await["reason"].as_str().unwrap_or_default().to_owned();
    assert!(told.starts_with("waiting for another try: ") && told.contains("stable version '1'"), "{told}");
    std::fs::remove_file(&gate).unwrap();
    reason(&running, "m", "2", "ready").await;
    assert_eq!(kept_out(&running).await, Vec::<[String; 3]>::new());
    for asked in asked {
        assert_eq!(asked.await.unwrap(), 200);
    }
}

/// The shipped models give the answers of what they were made from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shipped_models_pass_their_own_checks() {
    let repository = Repository::new();
    let shipped = Path::new(IRIS).ancestors().nth(2).unwrap();
    for model in ["iris", "digits", "language"] {
        let read = |file: &str| std::fs::read(shipped.join(model).join("1").join(file)).unwrap();
        let files = [("model.onnx", read("model.onnx")), ("golden.json", read("golden.json"))];
        put(&repository, model, "1", &files.each_ref().map(|(name, content)| (*name, &content[..])));
    }
    let running = start_onnx(&config(&repository)).await;
    for model in ["iris", "digits", "language"] {
        reason(&running, model, "1", "ready").await;
        assert_eq!(metric(&running, model, "1").await, 1.0, "{model}");
    }
}
