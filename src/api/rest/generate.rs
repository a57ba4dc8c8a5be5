//! The routes of Triton's generate extension.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    response::Response,
    routing::post,
};

use super::{
    Named, RestError,
    body::Reply,
    exchange::{Question, exchange},
};
use crate::api::{
    App,
    codec::{Document, InferCall, InferReply},
    shapes::generate,
};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v2/models/{model}/generate", post(whole))
        .route("/v2/models/{model}/generate_stream", post(stream))
        .route("/v2/models/{model}/versions/{version}/generate", post(whole))
        .route("/v2/models/{model}/versions/{version}/generate_stream", post(stream))
}

async fn whole(State(app): State<Arc<App>>, named: Result<Named, RestError>, request: Request) -> Response {
    answer(&app, named, request, Reply::json).await
}

/// A model here gives one response to a request, so that whatever can fail has failed before the first event, and is
/// answered with its status.
async fn stream(State(app): State<Arc<App>>, named: Result<Named, RestError>, request: Request) -> Response {
    answer(&app, named, request, |json| Reply::event(&json)).await
}

async fn answer(
    app: &Arc<App>,
    named: Result<Named, RestError>,
    request: Request,
    reply: impl FnOnce(Vec<u8>) -> Reply + Send + 'static,
) -> Response {
    let non_finite = app.json_nonfinite;
    let read = |question: &Question| {
        let document = Document::parse(&question.body)?;
        Ok((generate::read(&document, question.signature(), question.limit)?, ()))
    };
    let write = move |outputs: &InferReply<'_>, _: &InferCall, ()| generate::write(outputs, non_finite).map(reply);
    exchange(app, named, request.into(), read, write).await.map(axum::body::Body::new)
}
