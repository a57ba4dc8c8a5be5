//! Inferences over REST, in front of everything else on the port.
//!
//! To find a route among fifty, hand over the parts of its path, and pass its layers took 4,000 instructions of each
//! inference by callgrind, of 34,000 on its I/O thread. So a path that names its model as it is goes past the router;
//! one with escapes does not.

use std::{convert::Infallible, sync::Arc};

use http::{HeaderValue, Method, Request, Response, header};
use hyper::body::Incoming;

use super::{
    Named,
    exchange::{Arrival, infer},
};
use crate::api::{App, auth::Peer, payload::Payload};

/// What is to be known of a request that can be answered here.
pub(in crate::api) struct Call(Named);

impl Call {
    /// Looks whether a request is for an inference in the protocol's own shape.
    pub(in crate::api) fn of<B>(request: &Request<B>) -> Option<Self> {
        let named = if request.method() == Method::POST { named(request.uri().path()) } else { None };
        named.map(Self)
    }

    /// Answers the request.
    pub(in crate::api) fn answer(
        self,
        request: Request<Incoming>,
        app: Arc<App>,
        peer: Peer,
    ) -> impl Future<Output = Result<Response<Payload>, Infallible>> + Send {
        let (parts, body) = request.into_parts();
        let arrival = Arrival { headers: parts.headers, body, peer: Some(peer) };
        async move {
            let response = infer(&app, Ok(self.0), arrival).await;
            Ok(say_goodbye(&app, response))
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
pub(super) fn say_goodbye<B>(app: &App, mut response: Response<B>) -> Response<B> {
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
