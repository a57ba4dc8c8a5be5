//! Writing back, to a registry that keeps what it is told and fails as the test wants.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
    response::Response,
};
use parking_lot::Mutex;
use tokio::net::TcpListener;

use super::{super::client::Settings, *};
use crate::{
    source::{SourceUri, write_back::Served},
    stats::histogram::Histogram,
};

/// What the registry keeps of the model `iris`.
#[derive(Default)]
struct Kept {
    aliases: BTreeMap<String, String>,
    /// By version and key.
    tags: BTreeMap<(String, String), String>,
    /// Bodies of batches of metrics.
    batches: Vec<Value>,
    /// Method and path of each call, and `name=version` or `key` of what it is about.
    calls: Vec<String>,
    /// Answers that come before any other, of calls that change something.
    failures: Vec<(u16, &'static str)>,
    /// Somebody else moves the alias as soon as it is set.
    moved_to: Option<&'static str>,
    run_id: &'static str,
}

struct Mlflow {
    address: SocketAddr,
    kept: Arc<Mutex<Kept>>,
}

impl Mlflow {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let kept = Arc::new(Mutex::new(Kept { run_id: "2abf", ..Kept::default() }));
        let keeps = kept.clone();
        let router = Router::new().fallback(move |request: Request| answer(keeps.clone(), request));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, kept }
    }

    fn open(&self) -> Registry {
        self.open_with(Settings::default())
    }

    fn open_with(&self, settings: Settings) -> Registry {
        let uri = SourceUri::parse(&format!("mlflow://{}/iris@live", self.address)).unwrap();
        Registry::with(&uri, settings).unwrap()
    }

    fn points(&self, alias: &str, version: &str) {
        self.kept.lock().aliases.insert(alias.to_owned(), version.to_owned());
    }

    fn pointed(&self, alias: &str) -> Option<String> {
        self.kept.lock().aliases.get(alias).cloned()
    }

    fn tag(&self, version: &str, key: &str) -> Option<String> {
        self.kept.lock().tags.get(&(version.to_owned(), key.to_owned())).cloned()
    }

    /// The calls since the last look.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.kept.lock().calls)
    }
}

fn respond(status: u16, body: impl Into<Body>) -> Response {
    Response::builder().status(status).header("location", "/elsewhere").body(body.into()).unwrap()
}

/// As MLflow 3.17 answers.
async fn answer(kept: Arc<Mutex<Kept>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let (path, query) = (parts.uri.path().to_owned(), parts.uri.query().unwrap_or_default().to_owned());
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let mut kept = kept.lock();
    let call = path.trim_start_matches("/api/2.0/mlflow/");
    if parts.method == "GET" {
        kept.calls.push(format!("GET {call}"));
        let version = query.rsplit_once("version=").map(|(_, version)| version.to_owned());
        return respond(
            200,
            match call {
                "model-versions/get" => {
                    let version = version.unwrap();
                    let tags = kept.tags.iter().filter(|((of, _), _)| *of == version);
                    let tags: Vec<Value> = tags.map(|((_, key), value)| json!({"key": key, "value": value})).collect();
                    // MLflow leaves out what is empty.
                    let mut found = json!({"version": version, "source": "models:/m-e5a2", "run_id": kept.run_id});
                    if !tags.is_empty() {
                        found["tags"] = json!(tags);
                    }
                    json!({ "model_version": found }).to_string()
                }
                "registered-models/get" => {
                    let aliases = kept.aliases.iter();
                    let aliases: Vec<Value> =
                        aliases.map(|(alias, version)| json!({"alias": alias, "version": version})).collect();
                    let mut found = json!({"name": "iris"});
                    if !aliases.is_empty() {
                        found["aliases"] = json!(aliases);
                    }
                    json!({ "registered_model": found }).to_string()
                }
                _ => return respond(404, "<!doctype html>"),
            },
        );
    }
    assert_eq!((parts.method.as_str(), &parts.headers["content-type"]), ("POST", &"application/json".parse().unwrap()));
    let body: Value = serde_json::from_slice(&body).unwrap();
    let text = |key: &str| body[key].as_str().unwrap().to_owned();
    kept.calls.push(format!("POST {call} {}", body.get("key").or(body.get("alias")).unwrap_or(&json!("metrics"))));
    if let Some((status, said)) = kept.failures.pop() {
        return respond(status, said);
    }
    match call {
        "model-versions/set-tag" => {
            kept.tags.insert((text("version"), text("key")), text("value"));
        }
        "registered-models/alias" => {
            let version = kept.moved_to.map_or_else(|| text("version"), ToOwned::to_owned);
            kept.aliases.insert(text("alias"), version);
        }
        "runs/log-batch" => kept.batches.push(body),
        _ => return respond(404, "<!doctype html>"),
    }
    respond(200, "{}")
}

fn version(text: &str) -> Version {
    Version::parse(text).unwrap()
}

fn promotion(is_undone: bool) -> Promotion {
    let (alias, rollout) = ("champion".to_owned(), "iris/r1 at 17".to_owned());
    Promotion { alias, rollout, from: version("1"), to: version("2"), is_undone }
}

fn record(state: &str) -> Record {
    Record { digest: Some("sha256:00".to_owned()), state: Some(state.to_owned()), rollout: None }
}

fn measured(seconds: &[f64]) -> Measured {
    let mut latency = Histogram::default();
    seconds.iter().for_each(|&seconds| latency.add(seconds));
    let served = Served { requests: 3, errors: 1, latency };
    Measured { served, until: SystemTime::UNIX_EPOCH + Duration::from_secs(125), interval: Duration::from_secs(60) }
}

#[tokio::test]
async fn tags_that_are_there_are_not_written() {
    let server = Mlflow::new().await;
    let registry = server.open();
    assert_eq!(registry.record(&version("2"), &record("ready")).await, Ok(true));
    let set = |key| format!("POST model-versions/set-tag \"{key}\"");
    assert_eq!(server.calls(), ["GET model-versions/get".to_owned(), set(DIGEST), set(STATE)]);
    // As after a restart.
    assert_eq!(server.open().record(&version("2"), &record("ready")).await, Ok(false));
    assert_eq!(server.calls(), ["GET model-versions/get"]);
    let failed = record("failed: the graph has no opset");
    assert_eq!(registry.record(&version("2"), &failed).await, Ok(true));
    assert_eq!(server.calls(), ["GET model-versions/get".to_owned(), set(STATE)]);
    assert_eq!(server.tag("2", STATE), failed.state);
    assert_eq!((server.tag("2", DIGEST), server.tag("2", ROLLOUT)), (failed.digest, None));
}

#[tokio::test]
async fn an_alias_follows_a_rollout_there_and_back_once() {
    let server = Mlflow::new().await;
    let registry = server.open();
    server.points("champion", "1");
    assert_eq!(registry.promote(&promotion(false)).await, Ok(Moved::Written));
    assert_eq!(server.pointed("champion").as_deref(), Some("2"));
    assert_eq!(server.tag("2", ALIAS).as_deref(), Some("champion: set by iris/r1 at 17"));
    server.calls();
    // As after a restart; and who has moved it by hand since is right.
    server.points("champion", "1");
    assert_eq!(server.open().promote(&promotion(false)).await, Ok(Moved::Unchanged));
    assert_eq!(
        (server.calls(), server.pointed("champion").as_deref()),
        (vec!["GET model-versions/get".into()], Some("1"))
    );

    server.points("champion", "2");
    assert_eq!(server.open().promote(&promotion(true)).await, Ok(Moved::Written));
    assert_eq!(server.pointed("champion").as_deref(), Some("1"));
    assert_eq!(server.tag("2", ALIAS).as_deref(), Some("champion: taken back by iris/r1 at 17"));
    server.points("champion", "2");
    assert_eq!(registry.promote(&promotion(true)).await, Ok(Moved::Unchanged));
    assert_eq!(server.pointed("champion").as_deref(), Some("2"));
}

#[tokio::test]
async fn an_alias_that_nobody_has_set_is_set() {
    let server = Mlflow::new().await;
    server.points("other", "7");
    assert_eq!(server.open().promote(&promotion(false)).await, Ok(Moved::Written));
    assert_eq!((server.pointed("champion").as_deref(), server.pointed("other").as_deref()), (Some("2"), Some("7")));
}

#[tokio::test]
async fn an_alias_that_is_there_already_is_somebody_elses() {
    let server = Mlflow::new().await;
    server.points("champion", "2");
    assert_eq!(server.open().promote(&promotion(false)).await, Ok(Moved::Unchanged));
    assert!(!server.calls().iter().any(|call| call.contains("registered-models/alias")));
    assert_eq!(server.tag("2", ALIAS).as_deref(), Some("champion: left alone by iris/r1 at 17"));
    // So it is not set back either.
    assert_eq!(server.open().promote(&promotion(true)).await, Ok(Moved::Unchanged));
    assert_eq!(server.pointed("champion").as_deref(), Some("2"));
}

#[tokio::test]
async fn an_alias_that_somebody_else_has_moved_is_left_alone() {
    let server = Mlflow::new().await;
    let registry = server.open();
    server.points("champion", "7");
    let left = Ok(Moved::LeftAlone("to version 7".to_owned()));
    assert_eq!(registry.promote(&promotion(false)).await, left);
    assert_eq!(registry.promote(&promotion(false)).await, Ok(Moved::Unchanged));
    assert_eq!(server.pointed("champion").as_deref(), Some("7"));

    // The same between a promotion and its rollback.
    let server = Mlflow::new().await;
    let registry = server.open();
    registry.promote(&promotion(false)).await.unwrap();
    server.points("champion", "7");
    assert_eq!(registry.promote(&promotion(true)).await, left);
    let server = Mlflow::new().await;
    let registry = server.open();
    registry.promote(&promotion(false)).await.unwrap();
    server.kept.lock().aliases.clear();
    assert_eq!(registry.promote(&promotion(true)).await, Ok(Moved::LeftAlone("and it is gone".to_owned())));
}

#[tokio::test]
async fn what_is_read_back_has_the_last_word() {
    let server = Mlflow::new().await;
    server.points("champion", "1");
    server.kept.lock().moved_to = Some("9");
    assert_eq!(server.open().promote(&promotion(false)).await, Ok(Moved::LeftAlone("to version 9".to_owned())));
    assert_eq!(server.tag("2", ALIAS).as_deref(), Some("champion: left alone by iris/r1 at 17"));
}

#[tokio::test]
async fn a_promotion_that_was_cut_short_goes_on() {
    // After the word that it is about to be set; and after it was.
    for is_set in [false, true] {
        let server = Mlflow::new().await;
        server.points("champion", if is_set { "2" } else { "1" });
        let said = "champion: to be set by iris/r1 at 17".to_owned();
        server.kept.lock().tags.insert(("2".to_owned(), ALIAS.to_owned()), said);
        server.open().promote(&promotion(false)).await.unwrap();
        assert_eq!(server.pointed("champion").as_deref(), Some("2"));
        assert_eq!(server.tag("2", ALIAS).as_deref(), Some("champion: set by iris/r1 at 17"));
        assert_eq!(server.open().promote(&promotion(true)).await, Ok(Moved::Written));
    }
    // What another rollout has decided is not this one's.
    let server = Mlflow::new().await;
    let said = "champion: set by iris/r1 at 16".to_owned();
    server.kept.lock().tags.insert(("2".to_owned(), ALIAS.to_owned()), said);
    assert_eq!(server.open().promote(&promotion(false)).await, Ok(Moved::Written));
}

#[tokio::test]
async fn metrics_go_to_the_run_that_made_the_version() {
    let server = Mlflow::new().await;
    server.open().measured(&version("2"), &measured(&[0.003, 0.003, 0.1])).await.unwrap();
    let batches = std::mem::take(&mut server.kept.lock().batches);
    let [batch] = &batches[..] else { panic!("{batches:?}") };
    assert_eq!(batch["run_id"], "2abf");
    let metrics = batch["metrics"].as_array().unwrap();
    let value = |key: &str| metrics.iter().find(|metric| metric["key"] == key).unwrap()["value"].as_f64().unwrap();
    assert_eq!((value("serve.requests"), value("serve.errors")), (3.0, 1.0));
    // As far as buckets tell: up to a quarter more.
    assert!((3.0..3.8).contains(&value("serve.p50_ms")), "{metrics:?}");
    assert!((100.0..125.1).contains(&value("serve.p99_ms")), "{metrics:?}");
    for metric in metrics {
        assert_eq!(
            (&metric["timestamp"], &metric["step"], &metric["model_id"]),
            (&json!(125_000), &json!(2), &json!("m-e5a2"))
        );
    }
    // Of failures alone, no latency is known.
    server.open().measured(&version("2"), &measured(&[])).await.unwrap();
    assert_eq!(server.kept.lock().batches[0]["metrics"].as_array().unwrap().len(), 2);

    server.kept.lock().run_id = "";
    let error = server.open().measured(&version("2"), &measured(&[0.1])).await.unwrap_err().to_string();
    assert!(error.starts_with("the run that made version 2 of model 'iris' is not at mlflow://"), "{error}");
}

#[tokio::test]
async fn failures_say_what_kind_they_are() {
    let server = Mlflow::new().await;
    let registry = server.open();
    let fail = async |status, said| {
        server.kept.lock().failures = vec![(status, said)];
        registry.record(&version("2"), &record("ready")).await.unwrap_err()
    };
    let denied = fail(403, "Permission denied").await;
    assert!(
        matches!(&denied, SourceError::Denied { reason, .. } if reason.starts_with("403 Forbidden: Permission denied")),
        "{denied}"
    );
    let failed = fail(500, r#"{"error_code": "INTERNAL_ERROR", "message": "database is locked"}"#).await;
    assert!(matches!(&failed, SourceError::Unavailable { reason, .. } if reason.ends_with("database is locked")));
    // A redirect would make a look of a change, or take the credentials along.
    for status in [302, 307] {
        server.calls();
        let redirected = fail(status, "").await.to_string();
        assert!(redirected.contains("which is not followed"), "{redirected}");
        assert_eq!(server.calls().len(), 2, "{status}");
    }
    assert_eq!(registry.record(&version("2"), &record("ready")).await, Ok(true));
}
