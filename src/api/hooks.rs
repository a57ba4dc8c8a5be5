//! What registries tell by themselves: that something has changed. It is a hint and no more; what has changed is looked
//! up at the place.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json, Router,
    extract::{Request, State},
    routing::post,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use http::HeaderMap;
use serde_json::{Value, json};
use sha2::Sha256;

use super::{
    App,
    rest::{RestError, read_body},
};
use crate::error::{Code, Error};

/// How far the sender's clock may be from ours; a message that is older was recorded by somebody.
const TOLERANCE: Duration = Duration::from_secs(300);
/// Bytes of a message; MLflow's have a few hundred.
const LARGEST: usize = 1 << 20;
const ID: &str = "x-mlflow-delivery-id";
const TIMESTAMP: &str = "x-mlflow-timestamp";
const SIGNATURE: &str = "x-mlflow-signature";

pub(super) fn router() -> Router<Arc<App>> {
    Router::new().route("/hooks/mlflow", post(mlflow))
}

/// An MLflow server says that a version, alias or tag was made or deleted: what follows MLflow looks at once.
async fn mlflow(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, RestError> {
    let Some(secret) = &app.mlflow_webhook_secret else {
        return Err(
            Error::not_found("no webhook is expected; set mlflow_webhook_secret to the one that MLflow has").into()
        );
    };
    let (parts, body) = request.into_parts();
    let body = read_body(&app, body, app.limits.max_message_bytes.min(LARGEST)).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    verify(secret.as_bytes(), &parts.headers, &body, now)?;
    let woken = app.sources.wake(|status| status.uri.starts_with("mlflow") || status.uri.starts_with("models:/"));
    tracing::debug!(woken, "MLflow tells of a change");
    Ok(Json(json!({ "woken": woken })))
}

/// Checks that whoever has the secret sent this, and lately.
fn verify(secret: &[u8], headers: &HeaderMap, body: &[u8], now: Duration) -> Result<(), Error> {
    let refused = |reason: String| Error::new(Code::Unauthenticated, reason);
    let header = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.ok_or_else(|| refused(format!("header '{name}' is missing")))
    };
    let (id, timestamp, signature) = (header(ID)?, header(TIMESTAMP)?, header(SIGNATURE)?);
    let given = signature.strip_prefix("v1,").and_then(|text| BASE64_STANDARD.decode(text).ok());
    let given = given.ok_or_else(|| refused(format!("header '{SIGNATURE}' must be 'v1,' and base64")))?;
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).map_err(|error| Error::internal(error.to_string()))?;
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    mac.verify_slice(&given).map_err(|_| refused("the signature is not that of this server's secret".to_owned()))?;
    let sent: u64 =
        timestamp.parse().map_err(|_| refused(format!("header '{TIMESTAMP}' must be seconds since 1970")))?;
    if now.abs_diff(Duration::from_secs(sent)) > TOLERANCE {
        return Err(refused(format!("the message is of {sent}, and more than {TOLERANCE:?} from now")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As MLflow 3.17.2 sent it.
    const BODY: &[u8] = br#"{"entity": "model_version_alias", "action": "created", "timestamp": "2026-11-21T02:47:56.883711+00:00", "data": {"name": "iris-rf", "alias": "champion", "version": "2"}}"#;
    const SENT: Duration = Duration::from_secs(1_795_229_276);

    fn headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ID, "195ce10f-a9c0-4c24-b16e-29ce834d14e5".parse().unwrap());
        headers.insert(TIMESTAMP, "1795229276".parse().unwrap());
        headers.insert(SIGNATURE, "v1,3JZPbmPxGLNK2/DFQMBKQk76nw80MPIPje4ZdxaO4io=".parse().unwrap());
        headers
    }

    #[test]
    fn what_mlflow_signed_is_believed_and_nothing_else() {
        assert_eq!(verify(b"s3cr3t", &headers(), BODY, SENT + Duration::from_secs(10)), Ok(()));
        let refused = |secret: &[u8], headers: &HeaderMap, body: &[u8], now| {
            let error = verify(secret, headers, body, now).unwrap_err();
            assert_eq!(error.code, Code::Unauthenticated);
            error.message
        };
        assert!(refused(b"other", &headers(), BODY, SENT).contains("secret"));
        assert!(refused(b"s3cr3t", &headers(), &BODY[1..], SENT).contains("secret"));
        let late = SENT + TOLERANCE + Duration::from_secs(1);
        assert!(refused(b"s3cr3t", &headers(), BODY, late).contains("from now"));
        for name in [ID, TIMESTAMP, SIGNATURE] {
            let mut headers = headers();
            headers.remove(name);
            assert!(refused(b"s3cr3t", &headers, BODY, SENT).contains(name));
        }
        let mut headers = headers();
        headers.insert(SIGNATURE, "v1,%%".parse().unwrap());
        assert!(refused(b"s3cr3t", &headers, BODY, SENT).contains("base64"));
    }
}
