//! Who may change the server, and what of its log can be changed.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http_body::Frame;
use http_body_util::StreamBody;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Value, json};
use tidegate::{
    api::{
        auth::Token,
        pb::{self, log_settings_request::SettingValue, log_settings_request::setting_value::ParameterChoice},
    },
    config::Config,
};

use crate::{
    commands::explicit,
    support::{HttpClient, Repository, start},
};

fn log_info(shown: bool) -> pb::LogSettingsRequest {
    let value = SettingValue { parameter_choice: Some(ParameterChoice::BoolParam(shown)) };
    pb::LogSettingsRequest { settings: [("log_info".to_owned(), value)].into() }
}

fn with_token<T>(message: T, token: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_need_the_token_and_nothing_else_does() {
    let repository = Repository::with("m", "");
    let token = Some(Token::parse("s3cret".to_owned()).unwrap());
    let running = start(&Config { token, ..explicit(&repository) }).await;
    let mut grpc = running.grpc.clone();
    let load = || pb::RepositoryModelLoadRequest { model_name: "m".to_owned(), ..Default::default() };
    let unload = || pb::RepositoryModelUnloadRequest { model_name: "m".to_owned(), ..Default::default() };
    let changes = ["/v2/repository/models/m/load", "/v2/repository/models/m/unload", "/v2/logging"];
    for wrong in [None, Some("Bearer s3crets"), Some("Bearer "), Some("Basic s3cret")] {
        let headers: Vec<(&str, &str)> = wrong.map(|value| ("authorization", value)).into_iter().collect();
        for path in changes {
            let reply = running.post(path, Value::Null, &headers).await;
            assert_eq!(reply.status, 401, "{path} with {wrong:?}");
            assert_eq!(reply.headers["www-authenticate"], "Bearer");
            assert!(!reply.error().contains("s3cret"), "{}", reply.error());
        }
    }
    for status in [
        grpc.repository_model_load(load()).await.map(drop).unwrap_err(),
        grpc.repository_model_load(with_token(load(), "wrong")).await.map(drop).unwrap_err(),
        grpc.repository_model_unload(unload()).await.map(drop).unwrap_err(),
        grpc.log_settings(log_info(true)).await.map(drop).unwrap_err(),
    ] {
        assert_eq!(status.code(), tonic::Code::Unauthenticated, "{status:?}");
    }
    assert_eq!(running.infer("m", &[1.0]).await.status, 404, "nothing was loaded");

    let right = [("authorization", "Bearer s3cret")];
    assert_eq!(running.post(changes[0], Value::Null, &right).await.status, 200);
    assert_eq!(running.infer("m", &[1.0]).await.status, 200, "requests need no token");
    assert_eq!(running.get("/v2/logging").await.0, 200, "reading needs no token");
    grpc.log_settings(pb::LogSettingsRequest::default()).await.unwrap();
    assert_eq!(running.post("/v2/repository/index", Value::Null, &[]).await.status, 200);
    grpc.log_settings(with_token(log_info(true), "s3cret")).await.unwrap();
    grpc.repository_model_unload(with_token(unload(), "s3cret")).await.unwrap();
    grpc.repository_model_load(with_token(load(), "s3cret")).await.unwrap();
    assert_eq!(running.post(changes[1], Value::Null, &right).await.status, 200);
    assert_eq!(running.post(changes[2], json!({ "log_info": true }), &right).await.status, 200);
}

/// A stranger's body that is announced and never comes is not waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_read_of_whoever_lacks_the_token() {
    let repository = Repository::with("m", "");
    let token = Some(Token::parse("s3cret".to_owned()).unwrap());
    let running = start(&Config { token, ..explicit(&repository) }).await;
    let client: HttpClient<_> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    for method in ["RepositoryModelLoad", "RepositoryModelUnload"] {
        let body = StreamBody::new(tokio_stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let uri = format!("http://{}/inference.GRPCInferenceService/{method}", running.grpc_address);
        let call = http::Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        let call = client.request(call.body(body).unwrap());
        let answer = tokio::time::timeout(Duration::from_secs(5), call).await.unwrap().unwrap();
        assert_eq!(answer.headers()["grpc-status"], "16", "{method}");
        assert!(answer.headers()["grpc-message"].to_str().unwrap().contains("token"), "{method}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_token_web_pages_and_proxies_change_nothing() {
    let repository = Repository::with("m", "");
    let running = start(&explicit(&repository)).await;
    let changes = ["/v2/repository/models/m/load", "/v2/repository/models/m/unload", "/v2/logging"];
    for name in ["origin", "forwarded", "x-forwarded-for", "via"] {
        for path in changes {
            let reply = running.post(path, Value::Null, &[(name, "somewhere")]).await;
            assert_eq!(reply.status, 403, "{path} with {name}: {}", reply.body);
            assert!(reply.error().contains(name) && reply.error().contains("--token"), "{}", reply.error());
        }
    }
    let mut load =
        tonic::Request::new(pb::RepositoryModelLoadRequest { model_name: "m".to_owned(), ..Default::default() });
    load.metadata_mut().insert("x-forwarded-for", "10.0.0.1".parse().unwrap());
    let status = running.grpc.clone().repository_model_load(load).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    assert_eq!(running.infer("m", &[1.0]).await.status, 404, "nothing was loaded");
    assert_eq!(running.post(changes[0], Value::Null, &[]).await.status, 200);
    let reply = running.send(running.infer_request("m", &[1.0], &[("origin", "http://page")])).await.unwrap();
    assert_eq!(reply.status, 200, "only changes are for callers here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_settings_are_typed_and_change_together_or_not_at_all() {
    let repository = Repository::with("m", "");
    let running = start(&explicit(&repository)).await;
    let default = json!({
        "log_file": "",
        "log_info": true,
        "log_warning": true,
        "log_error": true,
        "log_verbose_level": 0,
        "log_format": "default",
    });
    assert_eq!(running.get("/v2/logging").await, (200, default.clone()));
    let changed = running.post("/v2/logging", json!({ "log_verbose_level": 1, "log_format": "ISO8601" }), &[]).await;
    assert_eq!((changed.status, &changed.body["log_verbose_level"]), (200, &json!(1)));
    assert_eq!((&changed.body["log_format"], &changed.body["log_warning"]), (&json!("ISO8601"), &json!(true)));
    for (wish, status, word) in [
        (json!({ "log_info": false, "log_errors": true }), 400, "log_error,"),
        (json!({ "log_info": false, "log_warning": "no" }), 400, "log_warning"),
        (json!({ "log_info": false, "log_verbose_level": -1 }), 400, "log_verbose_level"),
        (json!({ "log_info": false, "log_verbose_level": 4294967296u64 }), 400, "log_verbose_level"),
        (json!({ "log_info": false, "log_format": "json" }), 400, "ISO8601"),
        (json!({ "log_info": false, "log_format": null }), 400, "log_format"),
        (json!({ "log_info": false, "log_file": "/somewhere" }), 501, "log_file"),
        (json!(["log_info"]), 400, "log settings"),
    ] {
        let reply = running.post("/v2/logging", wish.clone(), &[]).await;
        assert_eq!(reply.status, status, "{wish}");
        assert!(reply.error().contains(word), "{}", reply.error());
        assert_eq!(running.get("/v2/logging").await.1, changed.body, "{wish} changed something");
    }
    let mut grpc = running.grpc.clone();
    let settings = grpc.log_settings(log_info(false)).await.unwrap().into_inner().settings;
    assert_eq!(settings.len(), 6);
    assert_eq!(running.get("/v2/logging").await.1["log_info"], false);
    let told = grpc.log_settings(pb::LogSettingsRequest::default()).await.unwrap().into_inner().settings;
    assert_eq!(told, settings);
    assert_eq!(running.post("/v2/logging", default.clone(), &[]).await.body, default);
}
