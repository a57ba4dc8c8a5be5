//! `Patience`: until when hosts want to be left alone, for all who follow something there.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{Scheme, SourceError, SourceUri};

/// What hosts have asked for.
#[derive(Debug, Default)]
pub struct Patience {
    until: Mutex<HashMap<String, Instant>>,
}

impl Patience {
    /// Remembers what the host of `uri` asks for, when `error` is its answer and says so.
    pub fn heed(&self, uri: &SourceUri, error: &SourceError) {
        let Some(pause) = error.retry_after() else { return };
        let until = Instant::now() + pause;
        let mut hosts = self.until.lock();
        hosts.retain(|_, until| *until > Instant::now());
        let known = hosts.entry(host(uri)).or_insert(until);
        *known = until.max(*known);
    }

    /// Whether the host of `uri` may be called.
    ///
    /// # Errors
    /// `Limited` for as long as it may not.
    pub fn check(&self, uri: &SourceUri) -> Result<(), SourceError> {
        let until = self.until.lock().get(&host(uri)).copied();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        match left.filter(|left| *left > Duration::ZERO) {
            None => Ok(()),
            Some(left) => Err(SourceError::Limited {
                place: uri.to_string(),
                reason: "its host has asked for that a moment ago".to_owned(),
                retry_after: Some(left),
            }),
        }
    }
}

/// Whom calls of a place go to. The environment names one server each for the schemes that leave it to it.
fn host(uri: &SourceUri) -> String {
    match uri.scheme() {
        Scheme::Hf | Scheme::Models => format!("{:?}", uri.scheme()),
        _ => uri.authority().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_a_host_asks_for_holds_for_all_of_it_and_for_a_while() {
        let patience = Patience::default();
        let uri = |text: &str| SourceUri::parse(text).unwrap();
        let limited = |seconds: u64| SourceError::Limited {
            place: "place".into(),
            reason: "429".into(),
            retry_after: Some(Duration::from_secs(seconds)),
        };
        patience.heed(&uri("hf://acme/iris"), &limited(60));
        patience.heed(&uri("hf://acme/digits"), &limited(10));
        patience.heed(&uri("oci://host:5000/a"), &SourceError::Full("no room".into()));
        let error = patience.check(&uri("hf://other/model@main")).unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(60)), "{error}");
        patience.heed(&uri("oci://registry/a"), &limited(60));
        patience.check(&uri("oci://registry/b")).unwrap_err();
        for other in ["oci://other/a", "oci://host:5000/a", "mlflow://host:5000/a/1"] {
            patience.check(&uri(other)).unwrap();
        }
        tokio::time::advance(Duration::from_secs(60)).await;
        patience.check(&uri("hf://other/model@main")).unwrap();
    }
}
