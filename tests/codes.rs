//! What the server says of a failure is the same over both protocols, whichever method it comes from.

use serde_json::Value;
use tidegate::{
    api::{pb, status},
    error::Code,
};

use crate::{
    commands::{ask, explicit},
    support::{Repository, start},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_code_of_a_failed_load() {
    let repository = Repository::new();
    for code in Code::ALL {
        repository.put(code.as_str(), "1", &format!("fail_load = true\nfail_code = \"{}\"", code.as_str()));
    }
    let running = start(&explicit(&repository)).await;
    for code in Code::ALL {
        let rest = ask(&running, "load", code.as_str()).await;
        assert_eq!(rest.status, status::http(code).as_u16(), "{}", rest.body);
        let request = pb::RepositoryModelLoadRequest { model_name: code.as_str().to_owned(), ..Default::default() };
        let grpc = running.grpc.clone().repository_model_load(request).await.unwrap_err();
        assert_eq!(grpc.code(), status::grpc(code), "{code:?}: {grpc}");
        assert_eq!(grpc.message(), rest.error());
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_that_is_gone_is_no_mistake_of_the_client() {
    let repository = Repository::with("m", "");
    let running = start(&explicit(&repository)).await;
    let folder = repository.0.path();
    let elsewhere = folder.with_extension("elsewhere");
    std::fs::rename(folder, &elsewhere).unwrap();
    let rest = running.post("/v2/repository/index", Value::Null, &[]).await;
    let grpc = running.grpc.clone().repository_index(pb::RepositoryIndexRequest::default()).await.unwrap_err();
    std::fs::rename(&elsewhere, folder).unwrap();
    assert_eq!((rest.status, grpc.code()), (500, tonic::Code::Internal), "{grpc}");
    assert_eq!(grpc.message(), rest.error());
    running.stop().await;
}
