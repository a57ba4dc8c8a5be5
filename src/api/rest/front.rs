//! Where every REST request comes in: inferences go straight to their model, all else goes on to the router.
//!
//! To find a route among fifty, hand over the parts of its path, and pass a layer took 5,500 instructions of each
//! inference by callgrind, of 41,000 on its I/O thread.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Router,
    extract::{Request, State},
    response::Response,
};
use http::{HeaderValue, Method, header};
use tower::Service;

use super::{Named, exchange::infer};
use crate::api::App;

/// Every route of the data port.
#[derive(Clone)]
pub(super) struct Front {
    pub(super) app: Arc<App>,
    /// For whatever is no inference in the protocol's own shape.
    pub(super) router: Router,
}

impl Service<Request> for Front {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let app = self.app.clone();
        let named = if request.method() == Method::POST { named(request.uri().path()) } else { None };
        match named {
            Some(named) => Box::pin(async move {
                let response = infer(State(app.clone()), Ok(named), request).await;
                Ok(say_goodbye(&app, response))
            }),
            None => {
                let call = self.router.call(request);
                Box::pin(async move {
                    let Ok(response) = call.await;
                    Ok(say_goodbye(&app, response))
                })
            }
        }
    }
}

/// The model and the version in the path of an inference; `None` for other paths, and for those that are written with
/// escapes, which the router knows too.
fn named(path: &str) -> Option<Named> {
    let place = path.strip_prefix("/v2/models/")?.strip_suffix("/infer")?;
    let (model, version) = match place.split_once('/') {
        None => (place, None),
        Some((model, rest)) => (model, Some(rest.strip_prefix("versions/")?)),
    };
    let is_plain = |name: &str| !name.is_empty() && !name.contains(['/', '%']);
    let is_known = is_plain(model) && version.is_none_or(is_plain);
    is_known.then(|| Named { model: model.to_owned(), version: version.map(str::to_owned), ..Named::default() })
}

/// While the server drains, answers ask clients to come back on another connection: to another replica, or at least
/// not on one that is about to close.
fn say_goodbye(app: &App, mut response: Response) -> Response {
    if app.draining.is_cancelled() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_inferences_are_known() {
        for (path, expected) in [
            ("/v2/models/m/infer", Some(("m", None))),
            ("/v2/models/m/versions/2/infer", Some(("m", Some("2")))),
            ("/v2/models/versions/infer", Some(("versions", None))),
            ("/v2/models//infer", None),
            ("/v2/models/infer", None),
            ("/v2/models/m/infer/", None),
            ("/v2/models/a%2Fb/infer", None),
            ("/v2/models/m/versions/infer", None),
            ("/v2/models/m/versions//infer", None),
            ("/v2/models/m/versions/1/2/infer", None),
            ("/v2/models/m/other/1/infer", None),
            ("/v2/models/m/generate", None),
            ("/v1/models/m/infer", None),
        ] {
            let named = named(path).map(|named| (named.model, named.version));
            let expected = expected.map(|(model, version)| (model.to_owned(), version.map(str::to_owned)));
            assert_eq!(named, expected, "{path}");
        }
    }
}
