//! The routes for text models: OpenAI's embeddings, and text-embeddings-inference's embed and rerank.
//!
//! They name their model in the body, or leave it to the server, so the body is read in front of everything else.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use http::{StatusCode, header};
use http_body_util::Full;
use serde_json::json;

use super::{
    Named, RestError,
    body::{self, Reply},
    exchange::{Arrival, Question, Wishes, conclude, timeout_header, try_exchange},
};
use crate::{
    api::{
        App, Record, after,
        codec::{Document, InferCall, InferReply, Parameters},
        compression,
        payload::Payload,
        shapes::{
            openai::Embeddings,
            tei::{Embed, Rerank},
            texts::{self, Asked, Kind},
        },
        status,
    },
    error::{Code, Error},
    metrics::Protocol,
    model::{
        self,
        catalog::{Catalog, Entry},
    },
    text,
};

/// Names that a complaint lists at most.
const SHOWN: usize = 8;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().route("/v1/embeddings", post(embeddings)).route("/embed", post(embed)).route("/rerank", post(rerank))
}

async fn embeddings(State(app): State<Arc<App>>, request: Request) -> Response {
    answer::<Embeddings>(&app, request, refuse_as_openai).await
}

async fn embed(State(app): State<Arc<App>>, request: Request) -> Response {
    answer::<Embed>(&app, request, refuse_as_tei).await
}

async fn rerank(State(app): State<Arc<App>>, request: Request) -> Response {
    answer::<Rerank>(&app, request, refuse_as_tei).await
}

/// A failed call, and how far it came.
struct Refusal {
    stage: Stage,
    error: RestError,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The body was being read.
    Body,
    /// It is JSON, and was to be the request.
    Members,
    /// Its list of texts is empty.
    Empty,
    /// A model was to be chosen.
    Model,
    /// The model that it names, or all there are, do something else.
    Kind,
    /// A version was to answer.
    Run,
}

impl Stage {
    fn refusal(self, error: impl Into<RestError>) -> Refusal {
        Refusal { stage: self, error: error.into() }
    }
}

async fn answer<T: Asked>(app: &Arc<App>, request: Request, refuse: fn(Refusal) -> Response) -> Response {
    let arrival = Arrival::from(request);
    let client = app.clients.of(&arrival.headers, arrival.peer.as_ref());
    let mut record = Record::start(app, Protocol::Rest, &arrival.headers, client);
    let answer = try_answer::<T>(app, arrival, &mut record).await;
    conclude(record, answer.map_err(|refusal| (refusal.error.error.code, refuse(refusal)))).map(Body::new)
}

async fn try_answer<T: Asked>(app: &App, arrival: Arrival, record: &mut Record) -> Result<Response<Payload>, Refusal> {
    let (asked, arrival) = read::<T>(app, arrival, record).await?;
    let named = choose(&app.engine.catalog().load(), T::KIND, asked.model())?;
    let asked = Arc::new(asked);
    let tokens = Arc::new(AtomicU64::new(0));
    let text = text::Wish { tokens: Some(tokens.clone()), padded: true, ..asked.wish() };
    let wishes = Wishes { text, read: asked.held(), told: asked.told() };
    let tensors = {
        let asked = asked.clone();
        move |question: &Question| {
            let inputs = asked.tensors(question.signature(), question.limit)?;
            let outputs = vec![(T::KIND.output().into(), Parameters::new())];
            Ok((InferCall::new(String::new(), Parameters::new(), inputs, outputs)?, ()))
        }
    };
    let non_finite = app.json_nonfinite;
    let write = move |reply: &InferReply<'_>, _: &InferCall, ()| {
        asked.write(reply, tokens.load(Ordering::Relaxed), non_finite).map(Reply::json)
    };
    let answer = try_exchange(app, &named, arrival, record, wishes, tensors, write).await;
    answer.map_err(|error| Stage::Run.refusal(error))
}

/// Reads the body, and gives what is left of the request with the body unpacked.
async fn read<T: Asked>(app: &App, arrival: Arrival, record: &Record) -> Result<(T, Arrival<Full<Bytes>>), Refusal> {
    let Arrival { mut headers, body, peer } = arrival;
    let broken = |error| Stage::Body.refusal(error);
    let encoding = body::content_encoding(&headers).map_err(broken)?;
    headers.remove(header::CONTENT_ENCODING);
    let waits = timeout_header(&headers).map_err(|error| Stage::Body.refusal(error))?;
    let limit = app.limits.max_message_bytes;
    let body = body::read_body(app, body, limit).await.map_err(broken)?;
    let is_long = texts::is_longer(&body, app.limits.max_inline_bytes);
    let look = move || {
        let body = compression::decode_body(encoding, body, limit).map_err(|error| Stage::Body.refusal(error))?;
        let document = Document::parse(&body).map_err(|error| Stage::Body.refusal(error))?;
        let asked = T::read(&document, limit).map_err(|error| Stage::Members.refusal(error))?;
        Ok((asked, body))
    };
    let latest = after(record.started(), waits);
    let looked = if is_long {
        let looked = Box::pin(app.aside.run(latest, look)).await;
        looked.map_err(|error| Stage::Body.refusal(error))?
    } else {
        look()
    };
    let (asked, body) = looked?;
    if asked.rows() == 0 {
        return Err(Stage::Empty.refusal(Error::invalid("the request has an empty list of texts")));
    }
    Ok((asked, Arrival { headers, body: Full::from(body), peer }))
}

/// The model that is named, or the only one of the kind that is ready.
fn choose(catalog: &Catalog, kind: Kind, model: Option<&str>) -> Result<Named, Refusal> {
    let named = |model: &str| Named { model: model.to_owned(), ..Named::default() };
    if let Some(model) = model {
        // What is unknown or not ready is found so by whoever looks for its version.
        let other = catalog.find(model, None).ok().filter(|version| !kind.has(&version.signature));
        return match other {
            None => Ok(named(model)),
            Some(_) => Err(Stage::Kind.refusal(Error::invalid(format!(
                "model '{model}' is no {}, whose signature has 'text' and '{}'",
                kind.name(),
                kind.output()
            )))),
        };
    }
    let is_ready = |name: &&str| catalog.find(name, None).is_ok_and(|version| kind.has(&version.signature));
    let ready: Vec<&str> = catalog.deployments.keys().map(|name| name.as_str()).filter(is_ready).collect();
    match ready[..] {
        [only] => Ok(named(only)),
        [] => Err(none_ready(catalog, kind)),
        [..] => Err(Stage::Model.refusal(Error::invalid(format!(
            "the request names no model, and there are {}: {}",
            ready.len(),
            listed(&ready)
        )))),
    }
}

/// Which model answers is not known before it is loaded; so long as there are some that may be of the kind, they are
/// worth waiting for.
fn none_ready(catalog: &Catalog, kind: Kind) -> Refusal {
    let none = format!("no {} is ready", kind.name());
    let loads = |entry: &Entry| matches!(entry.state, model::State::Settling | model::State::Loading);
    let loading: Vec<&str> = catalog
        .deployments
        .iter()
        .filter(|(name, deployment)| catalog.find(name.as_str(), None).is_err() && deployment.entries.iter().any(loads))
        .map(|(name, _)| name.as_str())
        .collect();
    match (&loading[..], catalog.complete) {
        ([], true) => Stage::Kind.refusal(Error::not_found(none)),
        ([], false) => {
            Stage::Model.refusal(Error::new(Code::NotReady, format!("{none}; models are still being looked for")))
        }
        _ => {
            let message = format!("{none}, and these are loading: {}", listed(&loading));
            Stage::Model.refusal(Error::new(Code::NotReady, message))
        }
    }
}

fn listed(names: &[&str]) -> String {
    let mut shown: Vec<_> = names.iter().take(SHOWN).map(|name| format!("'{name}'")).collect();
    if names.len() > SHOWN {
        shown.push(format!("{} more", names.len() - SHOWN));
    }
    shown.join(", ")
}

/// In OpenAI's shape, of which its clients make exceptions of their own.
fn refuse_as_openai(refusal: Refusal) -> Response {
    let Refusal { stage, error: RestError { error, status } } = refusal;
    // There it is the request that is wrong.
    let is_misspelled = error.code == Code::Unimplemented && stage != Stage::Body;
    let status = status.or(is_misspelled.then_some(StatusCode::BAD_REQUEST)).unwrap_or(status::http(error.code));
    let kind = match status.as_u16() {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let code = match error.code {
        Code::NotFound => Some("model_not_found"),
        Code::Overloaded => Some("rate_limit_exceeded"),
        _ => None,
    };
    let is_about_model = matches!(stage, Stage::Model | Stage::Kind) || error.code == Code::NotFound;
    let param = is_about_model.then_some("model");
    let told = json!({ "error": { "message": error.message, "type": kind, "param": param, "code": code } });
    told_with(error, status, told)
}

/// In the shape of text-embeddings-inference, which has statuses of its own.
fn refuse_as_tei(refusal: Refusal) -> Response {
    let Refusal { stage, error: RestError { error, status } } = refusal;
    let (usual, kind) = match (stage, error.code) {
        (Stage::Kind, _) | (_, Code::Internal) => (StatusCode::FAILED_DEPENDENCY, "Backend"),
        (Stage::Empty, _) => (StatusCode::BAD_REQUEST, "Empty"),
        (_, Code::Overloaded) => (StatusCode::TOO_MANY_REQUESTS, "Overloaded"),
        (_, Code::NotReady) => (StatusCode::SERVICE_UNAVAILABLE, "Unhealthy"),
        (_, Code::DeadlineExceeded) => (status::http(error.code), "Backend"),
        (_, Code::Unimplemented) => (StatusCode::BAD_REQUEST, "Validation"),
        (Stage::Members, Code::InvalidArgument) => (StatusCode::UNPROCESSABLE_ENTITY, "Validation"),
        // Too many texts, mostly, or one that is too long.
        (Stage::Run, Code::InvalidArgument) => (StatusCode::PAYLOAD_TOO_LARGE, "Validation"),
        (_, code) => (status::http(code), "Validation"),
    };
    let told = json!({ "error": error.message, "error_type": kind });
    told_with(error, status.unwrap_or(usual), told)
}

/// The answer to a failed call, with the headers that it has everywhere.
fn told_with(error: Error, status: StatusCode, told: serde_json::Value) -> Response {
    let mut response = RestError { error, status: Some(status) }.into_response();
    *response.body_mut() = Body::from(told.to_string());
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use serde_json::Value;

    use super::*;
    use crate::{
        id::{ModelName, Version},
        metrics::Metrics,
        model::catalog::Deployment,
    };

    #[test]
    fn models_that_load_are_worth_waiting_for() {
        let deployment = |state: model::State| {
            let entry = Entry {
                version: Version::parse("1").unwrap(),
                state,
                reason: String::new(),
                serving: None,
                files: None,
                is_outdated: false,
                signature: None,
                metrics: Metrics::new("0", "0").version("m", "1"),
            };
            Deployment { entries: vec![entry], ..Deployment::default() }
        };
        let refusal = |states: &[model::State], complete: bool| {
            let named =
                |(place, &state): (usize, _)| (ModelName::parse(&format!("m{place}")).unwrap(), deployment(state));
            let catalog = Catalog { deployments: states.iter().enumerate().map(named).collect(), complete };
            let refusal = choose(&catalog, Kind::Embedding, None).map(|_| ()).unwrap_err();
            let told = (refusal.error.error.code, refusal.error.error.message.clone());
            (told, refuse_as_tei(refusal).status().as_u16())
        };
        use model::State::{Failed, Loading, Settling};
        let not_found = (Code::NotFound, "no embedding model is ready".to_owned());
        assert_eq!(refusal(&[], true), (not_found.clone(), 424));
        assert_eq!(refusal(&[Failed], true), (not_found, 424));
        let loading =
            |names: &str| (Code::NotReady, format!("no embedding model is ready, and these are loading: {names}"));
        assert_eq!(refusal(&[Failed, Loading], true), (loading("'m1'"), 503));
        assert_eq!(refusal(&[Settling, Loading], false), (loading("'m0', 'm1'"), 503));
        let early = "no embedding model is ready; models are still being looked for";
        assert_eq!(refusal(&[], false), ((Code::NotReady, early.to_owned()), 503));
    }

    async fn told(response: Response) -> (u16, Value) {
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn openai_has_one_shape_for_all_errors() {
        let wrong = Stage::Members.refusal(Error::invalid("input must be …"));
        let expected = json!({ "error": {
            "message": "input must be …", "type": "invalid_request_error", "param": null, "code": null
        } });
        assert_eq!(told(refuse_as_openai(wrong)).await, (400, expected));
        for (stage, error, status, kind, code, param) in [
            (Stage::Run, Error::not_found("x"), 404, "invalid_request_error", "model_not_found", "model"),
            (
                Stage::Run,
                Error::overloaded("x", std::time::Duration::ZERO),
                429,
                "rate_limit_error",
                "rate_limit_exceeded",
                "",
            ),
            (Stage::Run, Error::new(Code::NotReady, "x"), 503, "server_error", "", ""),
            (Stage::Run, Error::internal("x"), 500, "server_error", "", ""),
            (Stage::Run, Error::new(Code::Unauthenticated, "x"), 401, "invalid_request_error", "", ""),
            (Stage::Model, Error::invalid("x"), 400, "invalid_request_error", "", "model"),
        ] {
            let (got, told) = told(refuse_as_openai(stage.refusal(error))).await;
            let text = |name: &str| told["error"][name].as_str().unwrap_or_default().to_owned();
            assert_eq!((got, text("type").as_str(), text("code").as_str()), (status, kind, code));
            assert_eq!(text("param"), param);
        }
    }

    #[tokio::test]
    async fn tei_has_statuses_of_its_own() {
        for (stage, error, status, kind) in [
            (Stage::Body, Error::invalid("x"), 400, "Validation"),
            (Stage::Members, Error::invalid("x"), 422, "Validation"),
            (Stage::Members, Error::new(Code::Unimplemented, "x"), 400, "Validation"),
            (Stage::Empty, Error::invalid("x"), 400, "Empty"),
            (Stage::Model, Error::invalid("x"), 400, "Validation"),
            (Stage::Kind, Error::not_found("x"), 424, "Backend"),
            (Stage::Run, Error::invalid("x"), 413, "Validation"),
            (Stage::Run, Error::new(Code::TooLarge, "x"), 413, "Validation"),
            (Stage::Run, Error::not_found("x"), 404, "Validation"),
            (Stage::Run, Error::overloaded("x", std::time::Duration::ZERO), 429, "Overloaded"),
            (Stage::Run, Error::new(Code::NotReady, "x"), 503, "Unhealthy"),
            (Stage::Run, Error::internal("x"), 424, "Backend"),
        ] {
            let answer = refuse_as_tei(stage.refusal(error));
            let is_paused = answer.headers().contains_key(header::RETRY_AFTER);
            assert_eq!(is_paused, status == 429);
            assert_eq!(told(answer).await, (status, json!({ "error": "x", "error_type": kind })));
        }
    }
}
