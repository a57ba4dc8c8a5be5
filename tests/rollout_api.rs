//! What operators ask and change over HTTP: who may, what is refused and how, and that nobody overwrites another.

use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use tidegate::{api::auth::Token, config::Config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Reply, Repository, Running, config, eventually, start};

/// Two versions of which the second is warm and gets nothing.
pub fn held() -> Repository {
    let repository = Repository::with("m", "scale = 1.0");
    repository.settings("m", "versions = \"all\"\n[rollout]\non_new_version = \"hold\"\n");
    repository
}

/// A server in which version 1 serves and version 2 is ready beside it.
pub async fn start_held(repository: &Repository, config: &Config) -> Running {
    let running = start(config).await;
    repository.put("m", "2", "scale = 2.0");
    eventually("version 2 is ready", async || {
        let versions = running.ops("/admin/v1/models/m").await.1["versions"].clone();
        versions.as_array().is_some_and(|versions| versions.len() == 2 && versions[1]["state"] == "ready")
    })
    .await;
    running
}

async fn ask(running: &Running, method: &str, path: &str, body: &str, headers: &[(&str, &str)]) -> Reply {
    let mut request = http::Request::builder().method(method).uri(format!("{}/admin/v1{path}", running.ops));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    running.send(request.body(Full::from(Bytes::from(body.to_owned()))).unwrap()).await.unwrap()
}

async fn post(running: &Running, path: &str, body: Value) -> Reply {
    ask(running, "POST", path, &body.to_string(), &[]).await
}

fn etag(reply: &Reply) -> &str {
    reply.headers["etag"].to_str().unwrap()
}

const ROLLOUT: &str = "/models/m/rollout";
const ROUTE: &str = "/models/m/route";
const ALIAS: &str = "/models/m/aliases/champion";

/// A rollout that waits for an operator at every step.
fn slow() -> Value {
    json!({ "to": "2", "steps": [10, 50, 100], "every": "1h", "author": "ada", "reason": "better" })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_need_the_token_and_reading_does_not() {
    let repository = Repository::with("m", "");
    let token = Some(Token::parse("s3cret".to_owned()).unwrap());
    let running = start(&Config { token, ..config(&repository) }).await;
    let changes = [
        ("POST", "/models/m/rollout"),
        ("POST", "/models/m/rollout/abort"),
        ("PUT", ROUTE),
        ("DELETE", ROUTE),
        ("PUT", ALIAS),
        ("DELETE", ALIAS),
        ("DELETE", "/overrides"),
    ];
    for (method, path) in changes {
        for wrong in [&[][..], &[("authorization", "Bearer wrong")]] {
            // Refused before the body is looked at.
            let reply = ask(&running, method, path, "{", wrong).await;
            assert_eq!((reply.status, reply.headers["www-authenticate"].to_str().unwrap()), (401, "Bearer"), "{path}");
        }
        let reply = ask(&running, method, path, "{", &[("authorization", "Bearer s3cret")]).await;
        assert_eq!(reply.status, 400, "{path}: {}", reply.body);
    }
    for path in ["/models", "/models/m", "/audit", "/overrides"] {
        assert_eq!(ask(&running, "GET", path, "", &[]).await.status, 200, "{path}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_token_proxies_and_pages_change_nothing() {
    let repository = Repository::with("m", "");
    let running = start(&config(&repository)).await;
    let changes = [("POST", ROLLOUT), ("PUT", ROUTE), ("DELETE", ROUTE), ("PUT", ALIAS), ("DELETE", "/overrides")];
    for (method, path) in changes {
        let reply = ask(&running, method, path, "{}", &[("origin", "http://page")]).await;
        assert_eq!(reply.status, 403, "{path}");
        assert!(reply.error().contains("'origin'"), "{}", reply.error());
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_told_with_field_and_line() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    for (method, path, body, status, word) in [
        ("POST", ROLLOUT, "", 400, "field 'to' is missing"),
        ("POST", ROLLOUT, "{\n\"to\": 2 }", 400, "field 'to' in line 2: invalid type: integer `2`"),
        ("POST", ROLLOUT, "{\n\"to\": \"2\",\n\n\"stepps\": [1] }", 400, "field 'stepps' in line 4: unknown field"),
        ("POST", ROLLOUT, "{ \"to\": \"2\" \"steps\": [1] }", 400, "at line 1 column 13"),
        ("POST", ROLLOUT, "[]", 400, "expected an object"),
        ("POST", ROLLOUT, "{ \"to\": \"2\", \"steps\": [10, 5, 100] }", 400, "got 10 and then 5 percent"),
        ("POST", ROLLOUT, "{ \"to\": \"2\", \"every\": \"soon\" }", 400, "field 'every' in line 1"),
        ("POST", ROLLOUT, "{ \"to\": \"7\" }", 404, "has no version '7'"),
        ("POST", "/models/nosuch/rollout", "{ \"to\": \"2\" }", 404, "unknown model 'nosuch'"),
        ("POST", "/models/.m/rollout", "{ \"to\": \"2\" }", 400, "model name '.m'"),
        ("POST", "/models/m/rollout/stop", "", 404, "pause, resume, advance, promote, abort, rollback"),
        ("POST", "/models/m/rollout/pause", "{ \"to\": \"2\" }", 400, "unknown field 'to' in line 1"),
        ("POST", "/models/m/rollout/pause", "", 404, "no rollout"),
        ("GET", ROLLOUT, "", 404, "model 'm' has had no rollout"),
        ("GET", "/models/nosuch", "", 404, "unknown model 'nosuch'"),
        ("GET", "/models/%FF", "", 404, "Invalid UTF-8 in `model`"),
        ("POST", "/models/%FF/rollout/pause", "", 404, "Invalid UTF-8 in `model`"),
        ("PUT", "/models/%FF/route", "{}", 404, "Invalid UTF-8 in `model`"),
        ("PUT", ROUTE, "{ \"canary\": { \"version\": \"2\", \"percent\": 120 } }", 400, "field 'canary.percent'"),
        ("PUT", ROUTE, "{ \"canary\": { \"version\": \"9\", \"percent\": 10 } }", 404, "no version '9'"),
        ("PUT", ROUTE, "{ \"weights\": {} }", 400, "unknown field 'weights'"),
        ("GET", "/audit?limit=1001", "", 400, "'limit' must be 1 to 1000"),
        ("GET", "/audit?since=yesterday", "", 400, "'since' must be a time"),
        ("GET", "/audit?modle=m", "", 400, "unknown query parameter 'modle'"),
        ("DELETE", "/overrides?models=m", "", 400, "unknown query parameter 'models'"),
        ("GET", "/nowhere", "", 404, "nothing at"),
        ("PATCH", ROUTE, "", 405, "PATCH is not allowed"),
    ] {
        let reply = ask(&running, method, path, body, &[]).await;
        assert_eq!(reply.status, status, "{method} {path} {body}: {}", reply.body);
        assert!(reply.error().contains(word), "{method} {path} {body}: {}", reply.error());
    }
    assert_eq!(
        ask(&running, "GET", "/audit", "", &[]).await.body["entries"].as_array().unwrap().len(),
        1,
        "one serves"
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_is_started_told_and_written_down() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    let reply = post(&running, ROLLOUT, slow()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let status = &reply.body;
    assert_eq!((&status["model"], &status["stable"], &status["candidate"]), (&json!("m"), &json!("1"), &json!("2")));
    assert_eq!(etag(&reply), format!("\"{}\"", status["epoch"]));
    let percents: Vec<&Value> =
        status["steps"].as_array().unwrap().iter().map(|step| &step["weight_percent"]).collect();
    assert_eq!(percents, [&json!(10.0), &json!(50.0), &json!(100.0)]);
    assert_eq!(status["steps"][0]["min_duration_seconds"], 3600.0);
    eventually("it is at the first step", async || {
        running.ops("/admin/v1/models/m/rollout").await.1["phase"] == "canary"
    })
    .await;
    let model = ask(&running, "GET", "/models/m", "", &[]).await;
    assert_eq!(model.body["route"]["arms"], json!([{ "name": "canary", "version": "2", "percent": 10.0 }]));
    assert_eq!((&model.body["rollout"]["phase"], &model.body["default_version"]), (&json!("canary"), &json!("1")));
    assert_eq!(etag(&model), format!("\"{}\"", model.body["epoch"]));

    for (command, phase, weight) in
        [("pause", "paused", 10.0), ("resume", "canary", 10.0), ("advance", "canary", 50.0), ("abort", "aborted", 0.0)]
    {
        let reply = post(&running, &format!("{ROLLOUT}/{command}"), json!({ "reason": command })).await;
        assert_eq!(reply.status, 200, "{command}: {}", reply.body);
        assert_eq!((&reply.body["phase"], &reply.body["weight_percent"]), (&json!(phase), &json!(weight)), "{command}");
        assert_eq!(reply.body["reason"], command);
    }
    let refused = post(&running, &format!("{ROLLOUT}/advance"), json!({})).await;
    assert_eq!(refused.status, 409, "{}", refused.body);
    assert!(refused.error().contains("is aborted"), "{}", refused.error());
    assert_eq!(refused.body["state"]["rollout"]["phase"], "aborted");

    let audit = ask(&running, "GET", "/audit?model=m", "", &[]).await.body;
    let entries = audit["entries"].as_array().unwrap();
    let told: Vec<_> = entries.iter().map(|e| (e["author"].as_str().unwrap(), e["action"].as_str().unwrap())).collect();
    assert_eq!(
        told[1..],
        [
            ("ada", "start"),
            ("repository", "canary"),
            ("operator", "paused"),
            ("operator", "canary"),
            ("operator", "canary"),
            ("operator", "aborted"),
        ]
    );
    assert_eq!((&entries[1]["reason"], &audit["next"]), (&json!("better"), &Value::Null));
    assert_eq!(entries[1]["details"]["settings"]["every"], "1h");
    let overrides = ask(&running, "GET", "/overrides", "", &[]).await.body;
    assert_eq!((&overrides[0]["model"], &overrides[0]["passed_over"][0]["version"]), (&json!("m"), &json!("2")));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_read_page_by_page_without_a_gap() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    for percent in 0..7 {
        let body = json!({ "canary": { "version": "2", "percent": percent } });
        assert_eq!(ask(&running, "PUT", ROUTE, &body.to_string(), &[]).await.status, 200);
    }
    let mut numbers = Vec::new();
    let mut next = Some("/admin/v1/audit?model=m&since=2020-01-01T00:00:00Z&limit=3".to_owned());
    let mut pages = 0;
    while let Some(path) = next {
        let (status, page) = running.ops(&path).await;
        assert_eq!(status, 200, "{path}: {page}");
        numbers.extend(page["entries"].as_array().unwrap().iter().map(|entry| entry["number"].as_u64().unwrap()));
        next = page["next"].as_str().map(str::to_owned);
        pages += 1;
    }
    assert_eq!((numbers, pages), ((1..=8).collect(), 3));
    assert_eq!(running.ops("/admin/v1/audit?model=other").await.1["entries"], json!([]));
    assert_eq!(running.ops("/admin/v1/audit?since=2100-01-01T00:00:00Z").await.1["entries"], json!([]));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_saw_an_old_state_changes_nothing() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    let seen = ask(&running, "GET", "/models/m", "", &[]).await;
    let first = etag(&seen).to_owned();
    let split =
        |percent| json!({ "canary": { "version": "2", "percent": percent }, "sticky": "header:x-user" }).to_string();
    let changed = ask(&running, "PUT", ROUTE, &split(10), &[("if-match", &first)]).await;
    assert_eq!(changed.status, 200, "{}", changed.body);
    assert_ne!(etag(&changed), first);
    assert_eq!(
        (&changed.body["route"]["sticky"], &changed.body["route"]["stable"]),
        (&json!("header:x-user"), &json!("1"))
    );

    let refused = ask(&running, "PUT", ROUTE, &split(20), &[("if-match", &first)]).await;
    assert_eq!(refused.status, 409, "{}", refused.body);
    assert!(refused.error().contains("has changed meanwhile"), "{}", refused.error());
    assert_eq!(refused.body["state"], ask(&running, "GET", "/models/m", "", &[]).await.body, "with the current state");
    assert_eq!(refused.body["state"]["route"]["arms"][0]["percent"], 10.0);
    for (method, path) in [("POST", ROLLOUT), ("DELETE", ROUTE), ("DELETE", "/overrides?model=m")] {
        let body = if method == "POST" { "{ \"to\": \"2\" }" } else { "" };
        assert_eq!(ask(&running, method, path, body, &[("if-match", &first)]).await.status, 409, "{method} {path}");
    }
    for wrong in ["17", "W/\"17\"", "\"17\", \"18\"", "\"\"", "\"x\""] {
        let reply = ask(&running, "PUT", ROUTE, &split(20), &[("if-match", wrong)]).await;
        assert_eq!(reply.status, 400, "{wrong}");
        assert!(reply.error().contains("If-Match"), "{}", reply.error());
    }
    let all = ask(&running, "DELETE", "/overrides", "", &[("if-match", &first)]).await;
    assert_eq!((all.status, all.error().contains("'model'")), (400, true), "{}", all.body);

    // By hand while a rollout runs, and the other way round, are conflicts of their own.
    let busy = post(&running, ROLLOUT, slow()).await;
    assert_eq!((busy.status, busy.error().contains("by hand")), (409, true), "{}", busy.body);
    let any = ask(&running, "DELETE", ROUTE, "{ \"author\": \"eve\" }", &[("if-match", "*")]).await;
    assert_eq!((any.status, &any.body["route"]), (200, &Value::Null), "{}", any.body);
    assert_eq!(post(&running, ROLLOUT, slow()).await.status, 200);
    let busy = ask(&running, "PUT", ROUTE, &split(20), &[]).await;
    assert_eq!((busy.status, busy.error().contains("rollout 'm/r")), (409, true), "{}", busy.body);
    running.stop().await;
}

/// Many operators who saw the same state: one of them has their way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_at_once_one_has_their_way() {
    let repository = held();
    let running = std::sync::Arc::new(start_held(&repository, &config(&repository)).await);
    let seen = etag(&ask(&running, "GET", "/models/m", "", &[]).await).to_owned();
    let asking = (0..8).map(|number| {
        let (running, seen) = (running.clone(), seen.clone());
        tokio::spawn(async move {
            let body = json!({ "canary": { "version": "2", "percent": number } }).to_string();
            let author = format!("operator-{number}");
            let headers = [("if-match", seen.as_str()), ("x-tidegate-author", author.as_str())];
            (number, ask(&running, "PUT", ROUTE, &body, &headers).await)
        })
    });
    let mut winners = Vec::new();
    for asked in asking.collect::<Vec<_>>() {
        let (number, reply) = asked.await.unwrap();
        match reply.status {
            200 => winners.push(number),
            409 => assert!(reply.body["state"]["epoch"].is_u64(), "{}", reply.body),
            _ => panic!("{}", reply.body),
        }
    }
    assert_eq!(winners.len(), 1, "{winners:?}");
    let audit = ask(&running, "GET", "/audit", "", &[]).await.body;
    assert_eq!(audit["entries"].as_array().unwrap().last().unwrap()["author"], format!("operator-{}", winners[0]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overrides_are_listed_and_cleared() {
    let repository = held();
    let running = start_held(&repository, &config(&repository)).await;
    assert_eq!(ask(&running, "GET", "/overrides", "", &[]).await.body, json!([]));
    let body = json!({
        "shadow": { "version": "2", "percent": 50 }, "arms": [{ "name": "blue", "version": "2", "percent": 12.5 }],
        "author": "grace", "reason": "to see",
    });
    assert_eq!(ask(&running, "PUT", ROUTE, &body.to_string(), &[]).await.status, 200);
    let route = &ask(&running, "GET", "/overrides", "", &[]).await.body[0]["route"];
    assert_eq!((&route["author"], &route["reason"]), (&json!("grace"), &json!("to see")));
    assert_eq!(route["arms"], json!([{ "name": "blue", "version": "2", "percent": 12.5 }]));
    assert_eq!(route["shadow"], json!({ "version": "2", "percent": 50.0 }));
    let unknown = ask(&running, "DELETE", "/overrides?model=nosuch", "", &[]).await;
    assert_eq!(unknown.status, 404, "{}", unknown.body);
    let cleared = ask(&running, "DELETE", "/overrides", "", &[]).await;
    assert_eq!((cleared.status, &cleared.body), (200, &json!({ "cleared": ["m"] })));
    assert_eq!(ask(&running, "GET", "/overrides", "", &[]).await.body, json!([]));
    assert_eq!(ask(&running, "GET", "/models/m", "", &[]).await.body["route"], Value::Null);
    running.stop().await;
}

/// A body that stops on its way is given up, and the description says so of every body.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stops_is_not_waited_for() {
    let repository = Repository::with("m", "");
    let mut impatient = config(&repository);
    impatient.limits.body_timeout = std::time::Duration::from_millis(200);
    let running = start(&impatient).await;
    let host = running.ops.trim_start_matches("http://");
    let mut connection = tokio::net::TcpStream::connect(host).await.unwrap();
    let request =
        format!("PUT /admin/v1{ROUTE} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: 99\r\n\r\n{{");
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("{\"error\":"), "{answer}");
    let (_, document) = running.ops("/admin/openapi.json").await;
    let paths = document["paths"].as_object().unwrap().values();
    let bodies = paths.flat_map(|path| path.as_object().unwrap().values()).filter(|operation| {
        let described = operation["responses"]["408"].is_object();
        assert_eq!(operation["requestBody"].is_object(), described, "{operation}");
        described
    });
    assert_eq!(bodies.count(), 7);
    running.stop().await;
}

/// What is described is there, by its own methods only, and what is there is described.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_description_is_of_this_port() {
    let repository = Repository::with("m", "");
    let running = start(&config(&repository)).await;
    let (status, document) = running.ops("/admin/openapi.json").await;
    assert_eq!((status, &document["openapi"]), (200, &json!("3.1.1")));
    for (path, methods) in document["paths"].as_object().unwrap() {
        let filled = path.replace("{model}", "m").replace("{command}", "pause");
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH"] {
            let uri = format!("{}{filled}", running.ops);
            let request = http::Request::builder().method(method).uri(uri).header("origin", "nowhere");
            let reply = running.send(request.body(Full::default()).unwrap()).await.unwrap();
            let described = &methods[method.to_lowercase()];
            assert_eq!(reply.status != 405, described.is_object(), "{method} {path}: {}", reply.body);
            if described.is_object() {
                let known = described["responses"].as_object().unwrap();
                assert!(known.contains_key(&reply.status.to_string()), "{method} {path} answers {}", reply.status);
            }
        }
    }
    running.stop().await;
}
