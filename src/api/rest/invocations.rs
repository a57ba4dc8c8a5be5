//! The routes of MLflow's scoring server: one for each model, and its own for a server that has only one.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{HeaderMap, StatusCode, header};

use super::{
    Named, RestError,
    body::Reply,
    exchange::{Question, exchange},
};
use crate::{
    api::{
        App,
        codec::{Document, InferCall, InferReply},
        shapes::invocations::{self, Orient},
        status,
    },
    error::{Code, Error},
    id::shorten,
    model::catalog::Catalog,
};

/// Names that a complaint lists at most.
const SHOWN: usize = 8;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/models/{model}/invocations", post(of_model))
        .route("/models/{model}/versions/{version}/invocations", post(of_model))
        .route("/invocations", post(of_the_only_model))
        .route("/ping", get(ping))
        .route("/health", get(ping))
}

/// MLflow's probes look at the status alone.
async fn ping(State(app): State<Arc<App>>) -> Response {
    if app.is_ready() {
        return StatusCode::OK.into_response();
    }
    status::response(&Error::new(Code::NotReady, "the server is not ready"))
}

async fn of_model(State(app): State<Arc<App>>, named: Result<Named, RestError>, request: Request) -> Response {
    answer(&app, named, request).await
}

async fn of_the_only_model(State(app): State<Arc<App>>, request: Request) -> Response {
    let named = only_model(&app.engine.catalog().load());
    answer(&app, named.map_err(RestError::from), request).await
}

/// The one model there is, ready or not: which model answers must not depend on which was loaded first.
fn only_model(catalog: &Catalog) -> Result<Named, Error> {
    let mut names = catalog.deployments.keys();
    match (names.next(), names.next()) {
        (Some(only), None) => Ok(Named { model: only.to_string(), ..Named::default() }),
        (None, _) => Err(Error::not_found("there is no model to answer /invocations")),
        _ => {
            let count = catalog.deployments.len();
            let mut shown: Vec<_> =
                catalog.deployments.keys().take(SHOWN).map(|name| format!("/models/{name}/invocations")).collect();
            if count > SHOWN {
                shown.push(format!("{} more", count - SHOWN));
            }
            Err(Error::invalid(format!("/invocations needs a single model, and there are {}", shown.join(", "))))
        }
    }
}

async fn answer(app: &Arc<App>, named: Result<Named, RestError>, request: Request) -> Response {
    let non_finite = app.json_nonfinite;
    let read = |question: &Question| {
        let signature = question.signature();
        match content(&question.headers)? {
            Content::Csv => invocations::read_csv(&question.body, signature, question.limit),
            Content::Json => invocations::read_json(&Document::parse(&question.body)?, signature, question.limit),
        }
    };
    let write = move |outputs: &InferReply<'_>, _: &InferCall, orient: Orient| {
        invocations::write(outputs, orient, non_finite).map(Reply::json)
    };
    exchange(app, named, request.into(), read, write).await.map(axum::body::Body::new)
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Json,
    Csv,
}

/// What Content-Type says. Anything but CSV is taken for JSON, as on every other route: curl says it sends a form.
fn content(headers: &HeaderMap) -> Result<Content, Error> {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut parts = value.split(';').map(str::trim);
    let is_csv = parts.next().unwrap_or_default().eq_ignore_ascii_case("text/csv");
    for parameter in parts {
        let Some((name, charset)) = parameter.split_once('=') else { continue };
        let charset = charset.trim().trim_matches('"');
        let is_utf8 = ["utf-8", "utf8", "us-ascii"].iter().any(|known| charset.eq_ignore_ascii_case(known));
        if name.trim().eq_ignore_ascii_case("charset") && !is_utf8 {
            return Err(Error::invalid(format!("charset '{}' is not supported; send UTF-8", shorten(charset))));
        }
    }
    Ok(if is_csv { Content::Csv } else { Content::Json })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types() {
        let content = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static(text));
            content(&headers)
        };
        assert_eq!(content("text/csv"), Ok(Content::Csv));
        assert_eq!(content("Text/CSV; header=present; Charset=\"UTF-8\""), Ok(Content::Csv));
        for json in ["application/json", "application/json; charset=utf-8", "application/x-www-form-urlencoded", ""] {
            assert_eq!(content(json), Ok(Content::Json), "{json}");
        }
        let message = content("text/csv; charset=utf-16").unwrap_err().message;
        assert_eq!(message, "charset 'utf-16' is not supported; send UTF-8");
    }
}
