//! The registry against a server whose answers are the test's, written as MLflow 3.17 gives them.

use std::net::SocketAddr;

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use serde_json::json;
use tokio::net::TcpListener;

use super::*;

/// A request that came.
#[derive(Clone, Debug)]
struct Call {
    /// Below the API's root, with its query.
    target: String,
    headers: HeaderMap,
}

impl Call {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

/// A server on a port of its own, which ends with the test.
struct Server {
    address: SocketAddr,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Server {
    async fn new(answer: impl Fn(&Call) -> Response + Clone + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let calls: Arc<Mutex<Vec<Call>>> = Arc::default();
        let seen = calls.clone();
        let router = Router::new().fallback(move |request: Request| {
            let target = request.uri().path_and_query().unwrap().as_str();
            let target = target.trim_start_matches("/api/2.0/").to_owned();
            let call = Call { target, headers: request.headers().clone() };
            seen.lock().push(call.clone());
            let answer = answer(&call);
            async { answer }
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, calls }
    }

    /// With one answer to everything.
    async fn always(status: u16, headers: &'static [(&'static str, &'static str)], body: &str) -> Self {
        let body = body.to_owned();
        Self::new(move |_| respond(status, headers, body.clone())).await
    }

    fn open(&self, rest: &str) -> Registry {
        self.open_with(rest, Settings::default())
    }

    fn open_with(&self, rest: &str, settings: Settings) -> Registry {
        with(&format!("mlflow://{}/{rest}", self.address), settings).unwrap()
    }

    fn targets(&self) -> Vec<String> {
        self.calls.lock().iter().map(|call| call.target.clone()).collect()
    }

    /// The `Authorization` of the last call.
    fn login(&self) -> Option<String> {
        self.calls.lock().last().unwrap().header("authorization").map(ToOwned::to_owned)
    }
}

fn with(uri: &str, settings: Settings) -> Result<Registry, SourceError> {
    Registry::with(&SourceUri::parse(uri).unwrap(), settings)
}

fn respond(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(body.into()).unwrap()
}

fn of_json(body: &serde_json::Value) -> Response {
    respond(200, &[("content-type", "application/json")], body.to_string())
}

fn error(status: u16, code: &str, message: &str) -> Response {
    respond(status, &[], json!({"error_code": code, "message": message}).to_string())
}

fn version(number: &str) -> serde_json::Value {
    json!({
        "name": "iris", "version": number, "creation_timestamp": 1_795_229_128_394_u64,
        "last_updated_timestamp": 1_795_229_131_363_u64, "current_stage": "Production",
        "source": "models:/m-e5a2", "run_id": "2abf", "status": "READY", "aliases": ["champion"],
    })
}

/// What a look shows: the version and its revision.
async fn shown(registry: &Registry) -> Result<RemoteVersion, SourceError> {
    let look = registry.look().await?;
    let [(name, model)] = &look.models.iter().collect::<Vec<_>>()[..] else { panic!("{look:?}") };
    assert_eq!((name.as_str(), &model.beside), ("iris", &Vec::new()));
    let [version] = &model.versions[..] else { panic!("{model:?}") };
    assert_eq!(model.default.as_ref(), Some(&version.version));
    Ok(version.clone())
}

async fn failure(registry: &Registry) -> SourceError {
    registry.look().await.unwrap_err()
}

#[test]
fn a_uri_points_at_a_version_of_a_model() {
    let read = |text: &str| {
        let (prefix, model, pointer) = parts(&SourceUri::parse(text).unwrap()).map_err(|error| error.to_string())?;
        Ok::<_, String>(format!("{prefix}|{model}|{pointer}"))
    };
    for (text, expected) in [
        ("mlflow://host:5000/iris@champion", "|iris|alias 'champion'"),
        ("mlflow+https://ada:s3@host/iris@champion", "|iris|alias 'champion'"),
        ("mlflow://host/teams/ml/iris@9bad", "teams/ml|iris|alias '9bad'"),
        ("mlflow://host/iris%2Drf/3", "|iris-rf|version 3"),
        ("mlflow://host/mlflow/iris/LATEST", "mlflow|iris|any version"),
        ("mlflow://host/iris/production", "|iris|a version in stage Production"),
        ("models:/iris@champion", "|iris|alias 'champion'"),
        ("models:/iris/12", "|iris|version 12"),
    ] {
        assert_eq!(read(text).as_deref(), Ok(expected), "{text}");
    }
    for text in
        ["mlflow://host", "mlflow://host/iris", "mlflow://host/@champion", "mlflow://host/iris@", "models:/iris"]
    {
        let error = read(text).unwrap_err();
        assert!(error.contains("/model@alias, ") && error.contains("/model/latest"), "{error}");
    }
    assert_eq!(read("mlflow://host/iris@%C3%BC").as_deref(), Ok("|iris|alias 'ü'"));
    for text in [
        "mlflow://host/iris@a%20b",
        "mlflow://host/iris/v3",
        "mlflow://host/iris/03",
        "models:/a/iris/3",
        "models:/m-0123/x@b",
    ] {
        assert!(read(text).unwrap_err().contains("expected "), "{text}");
    }
    let error = read("mlflow://host/a%20b@champion").unwrap_err();
    assert!(error.contains("model name 'a b' must be") && error.ends_with("it is served by that name"), "{error}");
}

#[test]
fn settings_that_do_not_do_are_named() {
    let said = |tracking_uri: Option<&str>| {
        let tracking_uri = tracking_uri.map(ToOwned::to_owned);
        with("models:/iris@a", Settings { tracking_uri, ..Settings::default() }).err().unwrap().to_string()
    };
    assert!(said(None).contains("MLFLOW_TRACKING_URI is not set; expected the tracking server, as http://host:5000"));
    for text in ["sqlite:///mlflow.db", "./mlruns", "databricks", "http://"] {
        assert!(said(Some(text)).contains("MLFLOW_TRACKING_URI: expected a tracking server"), "{text}");
    }
    let tracking_uri = Some("https://ada:s3cr@host/mlflow/".to_owned());
    let registry = with("models:/iris@a", Settings { tracking_uri, ..Settings::default() }).unwrap();
    assert_eq!(registry.client.place(), "models:/iris@a of https://host");
    assert_eq!(below(registry.client.root(), ["api"].into_iter()).as_str(), "https://host/mlflow/api");
}

#[tokio::test]
async fn each_pointer_takes_one_call() {
    let server = Server::new(|call| {
        of_json(&match call.target.split_once('?').unwrap().0 {
            "mlflow/registered-models/get-latest-versions" => {
                json!({"model_versions": [version("9"), version("10"), version("2")]})
            }
            _ => json!({"model_version": version("2")}),
        })
    })
    .await;
    for (rest, found, target) in [
        ("iris@champion", "2", "mlflow/registered-models/alias?name=iris&alias=champion"),
        ("iris/2", "2", "mlflow/model-versions/get?name=iris&version=2"),
        ("iris/latest", "10", "mlflow/registered-models/get-latest-versions?name=iris"),
        ("iris/staging", "10", "mlflow/registered-models/get-latest-versions?name=iris&stages=Staging"),
    ] {
        server.calls.lock().clear();
        assert_eq!(shown(&server.open(rest)).await.unwrap().version.as_str(), found, "{rest}");
        assert_eq!(server.targets(), [target]);
    }
    server.calls.lock().clear();
    shown(&server.open("behind/a%20proxy/iris/2")).await.unwrap();
    assert_eq!(server.targets(), ["/behind/a%20proxy/api/2.0/mlflow/model-versions/get?name=iris&version=2"]);
}

#[tokio::test]
async fn a_revision_stands_for_the_files_and_not_for_what_is_said_of_them() {
    let now = Arc::new(Mutex::new(version("2")));
    let answered = now.clone();
    let server = Server::new(move |_| of_json(&json!({"model_version": *answered.lock()}))).await;
    let registry = server.open("iris@champion");
    let first = shown(&registry).await.unwrap();
    for (key, value) in [
        ("last_updated_timestamp", json!(1)),
        ("current_stage", json!("Archived")),
        ("aliases", json!([])),
        ("tags", json!([{"key": "a", "value": "b"}])),
    ] {
        now.lock()[key] = value;
        assert_eq!(shown(&registry).await.unwrap(), first, "{key}");
    }
    for (key, value) in [("creation_timestamp", json!(1)), ("source", json!("models:/m-2"))] {
        now.lock()[key] = value;
        assert_ne!(shown(&registry).await.unwrap().revision, first.revision, "{key}");
    }
    for status in ["PENDING_REGISTRATION", "FAILED_REGISTRATION"] {
        now.lock()["status"] = json!(status);
        let error = failure(&registry).await.to_string();
        assert!(error.starts_with(&format!("a ready version 2 of model 'iris' (it is {status}) is not at")), "{error}");
    }
    *now.lock() = json!({"version": "../2"});
    assert!(matches!(failure(&registry).await, SourceError::Senseless { .. }));
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    for (status, code, message) in [
        (400, "INVALID_PARAMETER_VALUE", "Registered model alias champion not found."),
        (404, "RESOURCE_DOES_NOT_EXIST", "Registered Model with name=iris not found"),
    ] {
        let server = Server::new(move |_| error(status, code, message)).await;
        let error = failure(&server.open("iris@champion")).await;
        assert!(matches!(error, SourceError::NotFound { .. }));
        let place = format!("mlflow://{}/iris@champion", server.address);
        assert_eq!(error.to_string(), format!("alias 'champion' of model 'iris' is not at {place}"));
    }
    let server = Server::always(200, &[], "{}").await;
    let said = failure(&server.open("iris/production")).await.to_string();
    assert!(said.starts_with("a version in stage Production of model 'iris' is not at"), "{said}");
    let server = Server::new(|_| error(400, "INVALID_PARAMETER_VALUE", "Alias 'v3' is reserved.")).await;
    let error = failure(&server.open("iris@v3")).await;
    assert!(matches!(error, SourceError::Unavailable { .. }) && error.to_string().contains("is reserved"), "{error}");
}

#[tokio::test]
async fn errors_say_what_kind_they_are() {
    let of = |status, headers, body: &'static str| async move {
        failure(&Server::always(status, headers, body).await.open("iris@champion")).await
    };
    let denied = of(401, &[], "You are not authenticated.").await;
    assert!(
        matches!(&denied, SourceError::Denied { reason, .. }
        if reason.starts_with("401 Unauthorized: You are") && reason.contains("MLFLOW_TRACKING_USERNAME")),
        "{denied}"
    );
    assert!(matches!(of(403, &[], "Permission denied").await, SourceError::Denied { .. }));

    let limited = of(429, &[("retry-after", "17")], "").await;
    assert_eq!(limited.retry_after(), Some(std::time::Duration::from_secs(17)));
    assert!(limited.to_string().contains("429 Too Many Requests: no text"), "{limited}");
    assert!(matches!(of(429, &[], "").await, SourceError::Limited { retry_after: None, .. }));

    let page = "<!doctype html>\n<title>404 Not Found</title>";
    let senseless = of(404, &[], page).await.to_string();
    assert!(senseless.contains("<title>404 Not Found</title> (is it an MLflow tracking server?)"), "{senseless}");
    let senseless = of(404, &[], r#"{"detail": "Not Found"}"#).await.to_string();
    assert!(senseless.contains(r#"404 Not Found: {"detail": "Not Found"} (is it"#), "{senseless}");
    let senseless = of(200, &[], page).await.to_string();
    assert!(senseless.contains("expected JSON") && senseless.contains("got: <!doctype html>"), "{senseless}");
    assert!(matches!(of(200, &[], r#"{"files": []}"#).await, SourceError::Senseless { .. }));

    let failed = of(500, &[], r#"{"error_code": "INTERNAL_ERROR", "message": "database is locked"}"#).await;
    assert!(
        matches!(&failed, SourceError::Unavailable { reason, .. }
        if reason == "500 Internal Server Error: database is locked"),
        "{failed}"
    );
    assert!(matches!(of(502, &[], page).await, SourceError::Unavailable { .. }));

    let long = "x ".repeat(6 << 20);
    let failed = failure(&Server::always(500, &[], &long).await.open("iris@champion")).await.to_string();
    assert!(failed.len() < 400, "{failed}");
    let long = failure(&Server::always(200, &[], &long).await.open("iris@champion")).await.to_string();
    assert!(long.contains("more than 8388608 bytes"), "{long}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = format!("mlflow://{}/iris@a", listener.local_addr().unwrap());
    drop(listener);
    let away = failure(&with(&gone, Settings::default()).unwrap()).await;
    assert!(matches!(&away, SourceError::Unavailable { reason, .. } if reason.contains("refused")), "{away}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_not_waited_for() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("mlflow://{}/iris@a", listener.local_addr().unwrap());
    let asked = tokio::time::Instant::now();
    let error = failure(&with(&uri, Settings::default()).unwrap()).await;
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    // It would also end when the connection has been silent for much longer.
    assert!(error.to_string().contains("no answer within 30s"), "{error}");
    assert!(asked.elapsed() < std::time::Duration::from_secs(31), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn logins_come_from_the_environment_or_the_uri() {
    let server = Server::new(|_| of_json(&json!({"model_version": version("2")}))).await;
    let text = |text: &str| Some(text.to_owned());
    let asked = |uri: &str, token: Option<&str>, user: Option<&str>| {
        let (token, username) = (token.map(ToOwned::to_owned), user.map(ToOwned::to_owned));
        let settings = Settings { token, username, password: text("pw"), ..Settings::default() };
        let registry = with(&uri.replace("HOST", &server.address.to_string()), settings).unwrap();
        let server = &server;
        async move {
            shown(&registry).await.unwrap();
            server.login()
        }
    };
    assert_eq!(asked("mlflow://HOST/iris@a", None, None).await, None);
    // base64 of ada:pw, and of bob:s@cret.
    assert_eq!(asked("mlflow://HOST/iris@a", None, Some("ada")).await, text("Basic YWRhOnB3"));
    assert_eq!(asked("mlflow://bob:s%40cret@HOST/iris@a", None, Some("ada")).await, text("Basic Ym9iOnNAY3JldA=="));
    assert_eq!(asked("mlflow://bob:s%40cret@HOST/iris@a", Some("t0k"), Some("ada")).await, text("Bearer t0k"));

    let tracking_uri = Some(format!("http://bob:s%40cret@{}", server.address));
    let settings = Settings { tracking_uri, workspace: text("team-a"), ..Settings::default() };
    shown(&with("models:/iris@a", settings).unwrap()).await.unwrap();
    let last = server.calls.lock().last().unwrap().clone();
    assert_eq!(last.header("authorization"), Some("Basic Ym9iOnNAY3JldA=="));
    assert_eq!(last.header("x-mlflow-workspace"), Some("team-a"));
}

#[tokio::test]
async fn a_login_is_not_carried_to_another_host() {
    let other = Server::new(|_| of_json(&json!({"model_version": version("2")}))).await;
    let elsewhere = format!("http://{}/api/2.0/x?secret=1", other.address);
    let server = Server::new(move |call| match call.target.starts_with("mlflow/model-versions/get?") {
        true => respond(302, &[("location", "/api/2.0/mlflow/here")], ""),
        false if call.target == "mlflow/here" => of_json(&json!({"model_version": version("2")})),
        false => respond(302, &[("location", &elsewhere)], ""),
    })
    .await;
    let open = |rest: &str| server.open_with(rest, Settings { token: Some("t0k".into()), ..Settings::default() });
    let error = failure(&open("iris@a")).await.to_string();
    let told = format!("302 Found: it redirects to http://{}, which is not followed", other.address);
    assert!(error.contains(&told) && !error.contains("secret"), "{error}");
    assert!(other.calls.lock().is_empty());

    shown(&open("iris/2")).await.unwrap();
    assert_eq!((server.targets().len(), server.login().as_deref()), (3, Some("Bearer t0k")));
}

#[test]
fn files_lie_behind_a_proxy_or_in_a_store() {
    let registry = with("mlflow://host:5000/pre/iris@a", Settings::default()).unwrap();
    let place = |text: &str| match registry.place(text) {
        Ok(Place::Proxy { root, path }) => format!("{root} {path}"),
        Ok(Place::Store(container)) => container.to_string(),
        Err(error) => error.to_string(),
    };
    for (text, expected) in [
        ("mlflow-artifacts:/1/models/m-1/artifacts", "http://host:5000/pre 1/models/m-1/artifacts"),
        ("mlflow-artifacts://other:80/1/a", "http://other/pre 1/a"),
        ("http://other/x/api/2.0/mlflow-artifacts/artifacts/1/a", "http://other/x/ 1/a"),
        ("s3://bucket/a b/100%/", "s3://bucket/a%20b/100%25"),
        ("gs://bucket/1", "gs://bucket/1"),
        ("wasbs://box@account.blob.core.windows.net/1/a", "account az://box/1/a"),
        ("abfss://box@account.dfs.core.windows.net/1/a", "account az://box/1/a"),
        ("https://files/1/a", "https://files/1/a"),
    ] {
        assert_eq!(place(text), expected, "{text}");
    }
    for secret in ["sftp://ada:s3cr@host/1", "sftp://host/1?token=s3cr", "sftp://host/1#s3cr"] {
        let error = place(secret);
        assert!(error.contains("lies at 'sftp://host/1'") && !error.contains("s3cr"), "{error}");
    }
    assert!(place("wasbs://box@not-one.blob.core.windows.net/1").contains("--serve-artifacts"));
    for text in ["file:///srv/mlruns/1", "/srv/mlruns/1", "dbfs:/x", "wasbs://account/1", "hdfs://a/b"] {
        let error = place(text);
        assert!(error.contains(&format!("lies at '{text}'")) && error.contains("--serve-artifacts"), "{error}");
    }
}

const SAVED: &str = "flavors:\n  onnx: {data: model.onnx}\n";

/// A registry of one version, whose files `artifacts` answers for: their lists, by folder, and their bytes.
async fn registry_of(
    location: &'static str,
    artifacts: impl Fn(&Call) -> Response + Clone + Send + Sync + 'static,
) -> (Server, Registry, RemoteVersion) {
    let server = Server::new(move |call| match call.target.split('?').next().unwrap() {
        "mlflow/model-versions/get-download-uri" => of_json(&json!({"artifact_uri": location})),
        "mlflow/model-versions/get" => of_json(&json!({"model_version": version("2")})),
        _ => artifacts(call),
    })
    .await;
    let registry = server.open_with("iris/2", Settings { token: Some("t0k".into()), ..Settings::default() });
    let version = shown(&registry).await.unwrap();
    (server, registry, version)
}

async fn artifact(registry: &Registry, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
    registry.artifact(&registry.model, version).await
}

fn list(entries: &[(&str, Option<usize>)]) -> Response {
    let of = |(path, size): &(&str, Option<usize>)| match size {
        Some(0) => json!({"path": path, "is_dir": false}),
        Some(size) => json!({"path": path, "is_dir": false, "file_size": size}),
        None => json!({"path": path, "is_dir": true}),
    };
    of_json(&json!({"files": entries.iter().map(of).collect::<Vec<_>>()}))
}

/// `bytes` as a server that knows ranges gives them.
fn part(call: &Call, bytes: &'static [u8]) -> Response {
    let Some(range) = call.header("range") else { return respond(200, &[], bytes) };
    let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
    let range = format!("bytes {start}-{end}/{}", bytes.len());
    respond(206, &[("content-range", &range)], &bytes[start..=end])
}

async fn text(registry: &Registry, file: &RemoteFile, range: Range<u64>) -> Result<String, SourceError> {
    let mut stream = registry.read(file, range).await?;
    let mut text = Vec::new();
    while let Some(bytes) = stream.next().await {
        text.extend_from_slice(&bytes?);
    }
    Ok(String::from_utf8(text).unwrap())
}

#[tokio::test]
async fn a_folder_is_listed_with_all_that_is_in_it_and_read_in_ranges() {
    let (server, registry, version) = registry_of("mlflow-artifacts:/1/a b/m", |call| match call.target.as_str() {
        "mlflow-artifacts/artifacts?path=1%2Fa+b%2Fm" => {
            list(&[("MLmodel", Some(SAVED.len())), ("model.onnx", Some(10)), ("empty", Some(0)), ("100%", None)])
        }
        "mlflow-artifacts/artifacts?path=1%2Fa+b%2Fm%2F100%25" => list(&[("ä.data", Some(3))]),
        "mlflow-artifacts/artifacts/1/a%20b/m/MLmodel" => part(call, SAVED.as_bytes()),
        "mlflow-artifacts/artifacts/1/a%20b/m/model.onnx" => part(call, b"0123456789"),
        "mlflow-artifacts/artifacts/1/a%20b/m/100%25/%C3%A4.data" => respond(200, &[], "abc"),
        other => panic!("{other}"),
    })
    .await;
    let files = artifact(&registry, &version).await.unwrap();
    let seen: Vec<(&str, u64)> = files.iter().map(|file| (file.path.as_str(), file.size)).collect();
    assert_eq!(seen, [("model.onnx", 10), ("empty", 0), ("100%/ä.data", 3), ("MLmodel", SAVED.len() as u64)]);
    assert!(files.iter().all(|file| registry.seeks(file) && file.pin.as_ref() == Some(&version.revision)));
    assert_eq!(text(&registry, &files[0], 3..6).await.unwrap(), "345");
    assert_eq!(text(&registry, &files[0], 0..10).await.unwrap(), "0123456789");
    assert_eq!(text(&registry, &files[2], 0..3).await.unwrap(), "abc");
    assert!(server.calls.lock().iter().all(|call| call.header("authorization") == Some("Bearer t0k")));

    let other = RemoteVersion { revision: "other".into(), ..version };
    assert!(matches!(artifact(&registry, &other).await, Err(SourceError::Changed { .. })));
}

#[tokio::test]
async fn a_server_without_ranges_is_read_from_the_start() {
    let (_server, registry, version) = registry_of("mlflow-artifacts:/m", |call| match call.target.as_str() {
        "mlflow-artifacts/artifacts?path=m" => list(&[("MLmodel", Some(SAVED.len())), ("model.onnx", Some(10))]),
        "mlflow-artifacts/artifacts/m/MLmodel" => respond(200, &[], SAVED),
        _ => {
            let pieces = ["012", "345", "6789"].map(|piece| Ok::<_, std::io::Error>(bytes::Bytes::from(piece)));
            respond(200, &[], Body::from_stream(tokio_stream::iter(pieces)))
        }
    })
    .await;
    let files = artifact(&registry, &version).await.unwrap();
    let graph = files.iter().find(|file| file.path == "model.onnx").unwrap();
    assert!(!registry.seeks(graph));
    for (range, expected) in [(0..10, "0123456789"), (4..5, "4"), (2..8, "234567"), (9..10, "9")] {
        assert_eq!(text(&registry, graph, range).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn a_file_of_another_size_has_changed() {
    let (_server, registry, version) = registry_of("mlflow-artifacts:/m", |call| match call.target.as_str() {
        "mlflow-artifacts/artifacts?path=m" => list(&[
            ("MLmodel", Some(SAVED.len())),
            ("model.onnx", Some(10)),
            ("a", Some(9)),
            ("b", Some(9)),
            ("c", Some(9)),
        ]),
        "mlflow-artifacts/artifacts/m/MLmodel" => part(call, SAVED.as_bytes()),
        "mlflow-artifacts/artifacts/m/a" => part(call, b"0123456789"),
        "mlflow-artifacts/artifacts/m/b" => respond(416, &[], ""),
        "mlflow-artifacts/artifacts/m/c" => respond(200, &[], "0123456789"),
        _ => respond(206, &[("content-range", "bytes 5-9/10")], "56789"),
    })
    .await;
    let files = artifact(&registry, &version).await.unwrap();
    for file in &files[1..4] {
        let error = text(&registry, file, 0..1).await.unwrap_err();
        assert_eq!(error.to_string(), format!("file '{}' changed while it was read", file.path));
    }
    let error = text(&registry, &files[0], 2..4).await.unwrap_err();
    assert!(matches!(error, SourceError::Senseless { .. }), "{error}");
    assert_eq!(text(&registry, &files[0], 7..10).await.unwrap(), "789");
}

#[tokio::test]
async fn lists_without_an_end_are_given_up() {
    async fn given_up(folder: fn() -> Response) -> (String, usize) {
        let (server, registry, version) = registry_of("mlflow-artifacts:/m", move |call| match call.target.as_str() {
            "mlflow-artifacts/artifacts?path=m" => list(&[("MLmodel", Some(SAVED.len())), ("a", None)]),
            "mlflow-artifacts/artifacts/m/MLmodel" => part(call, SAVED.as_bytes()),
            _ => folder(),
        })
        .await;
        let error = artifact(&registry, &version).await.unwrap_err();
        assert!(matches!(error, SourceError::Senseless { .. }), "{error}");
        (error.to_string(), server.calls.lock().len())
    }
    let (error, calls) = given_up(|| list(&[("a", None)])).await;
    assert!(error.contains("model 'iris' has folders in more than 8 folders") && calls < 20, "{error} after {calls}");
    let (error, calls) = given_up(|| list(&(0..500).map(|_| ("a", None)).collect::<Vec<_>>())).await;
    assert!(error.contains("more than 10000 files or 1000 folders") && calls < 20, "{error} after {calls}");
    let (error, _) = given_up(|| list(&vec![("a", Some(1)); 10_001])).await;
    assert!(error.contains("more than 10000 files or 1000 folders"), "{error}");
    for name in ["..", "../../etc", ""] {
        let (server, registry, version) = registry_of("mlflow-artifacts:/m", move |_| list(&[(name, None)])).await;
        let error = artifact(&registry, &version).await.unwrap_err().to_string();
        assert!(error.contains(&format!("'{name}' as a name in a folder")), "{error}");
        assert_eq!(server.targets().last().unwrap(), "mlflow-artifacts/artifacts?path=m");
    }
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_for_good() {
    async fn said(mlmodel: Option<&'static str>) -> String {
        let (_server, registry, version) = registry_of("mlflow-artifacts:/m", move |call| match call.target.as_str() {
            "mlflow-artifacts/artifacts/m/MLmodel" => part(call, mlmodel.unwrap().as_bytes()),
            _ => list(&[mlmodel.map_or(("model.onnx", Some(1)), |text| ("MLmodel", Some(text.len())))]),
        })
        .await;
        let error = artifact(&registry, &version).await.unwrap_err();
        assert!(!error.passes(), "{error}");
        error.to_string()
    }
    let flavors = "flavors:\n  sklearn: {pickled_model: model.pkl}\n  python_function: {}\n";
    assert!(said(Some(flavors)).await.ends_with("model has flavors python_function, sklearn; Tidegate runs onnx"));
    assert!(said(None).await.contains("there is none"));
    assert!(said(Some("")).await.contains("it has 0 bytes"));
    assert!(said(Some("flavors: [")).await.starts_with("file 'MLmodel' is refused: "));
    assert!(said(Some(SAVED)).await.contains("its graph 'model.onnx' is not among the model's files"));

    let (_server, registry, version) = registry_of("file:///srv/mlruns/1", |_| unreachable!()).await;
    let error = artifact(&registry, &version).await.unwrap_err();
    assert!(!error.passes() && error.to_string().contains("--serve-artifacts"), "{error}");
}

#[tokio::test]
async fn a_version_without_files_may_have_some_later() {
    let (_server, registry, version) = registry_of("mlflow-artifacts:/m", |_| list(&[])).await;
    let error = artifact(&registry, &version).await.unwrap_err();
    assert!(error.passes() && error.to_string().starts_with("any file of model 'iris' is not at "), "{error}");
}

#[tokio::test]
async fn another_host_that_holds_the_artifacts_gets_no_login() {
    let other = Server::new(|call| match call.target.as_str() {
        "mlflow-artifacts/artifacts?path=m" => list(&[("MLmodel", Some(SAVED.len())), ("model.onnx", Some(1))]),
        _ if call.header(header::RANGE.as_str()).is_some() => part(call, SAVED.as_bytes()),
        _ => respond(StatusCode::NOT_FOUND.as_u16(), &[], ""),
    })
    .await;
    let location: &'static str = format!("mlflow-artifacts://{}/m", other.address).leak();
    let (server, registry, version) = registry_of(location, |_| unreachable!()).await;
    let files = artifact(&registry, &version).await.unwrap();
    assert_eq!(files.len(), 2);
    assert_eq!(server.login().as_deref(), Some("Bearer t0k"));
    assert!(other.calls.lock().iter().all(|call| call.header("authorization").is_none()));
    assert_eq!(other.calls.lock().len(), 2);
}

#[tokio::test]
async fn names_are_asked_for_when_they_may_have_moved() {
    let now = Arc::new(Mutex::new((version("2"), json!({"name": "iris"}))));
    let answered = now.clone();
    let server = Server::new(move |call| {
        let (version, model) = &*answered.lock();
        match call.target.starts_with("mlflow/registered-models/get?") {
            true => of_json(&json!({"registered_model": model})),
            false => of_json(&json!({"model_version": version})),
        }
    })
    .await;
    let registry = server.open("iris@champion");
    let names = async || {
        let look = registry.look().await.unwrap();
        let (name, model) = look.models.first_key_value().unwrap();
        registry.names(name, model).await.unwrap()
    };
    now.lock().1["aliases"] = json!([{"alias": "champion", "version": "2"}, {"alias": "old", "version": "1"}]);
    let first = names().await.unwrap();
    let mut known = Lineage { aliases: vec!["champion".into()], stage: Some("Staging".into()), ..Lineage::default() };
    assert!(first.renew("1", &mut known));
    assert_eq!((known.aliases.as_slice(), known.stage.as_deref()), (&["old".to_owned()][..], Some("Staging")));
    assert!(!first.renew("1", &mut known));
    assert_eq!(names().await, None);
    now.lock().0["current_stage"] = json!("Production");
    now.lock().0["tags"] = json!([{"key": "state", "value": "passed"}]);
    now.lock().1["latest_versions"] = json!([{"version": "1", "current_stage": "None"}]);
    let second = names().await.unwrap();
    assert!(second.renew("1", &mut known) && known.stage.is_none());
    let mut known = Lineage::default();
    assert!(second.renew("2", &mut known));
    assert_eq!((known.stage.as_deref(), known.tags["state"].as_str()), (Some("Production"), "passed"));
    assert_eq!(names().await, None);
    let asked = server.targets().into_iter().filter(|target| target.contains("registered-models/get?")).count();
    assert_eq!(asked, 2);
}
