//! One version: what its files are, where they are from, and how they were made.

use std::sync::Arc;

use axum::{Json, extract::State};
use tokio::sync::Semaphore;

use super::documents::{FileStatus, SignatureStatus, VersionDetails};
use crate::{
    api::{
        App,
        rest::{Named, RestError},
    },
    error::Error,
    model::catalog::Entry,
    source::{lineage::Provenance, signed::Outcome},
};

/// Who asks for a version in a folder has its files read; that is for one at a time.
static READING: Semaphore = Semaphore::const_new(1);

pub(super) async fn show(State(app): State<Arc<App>>, named: Named) -> Result<Json<VersionDetails>, RestError> {
    let (model, version) = (named.model, named.version.unwrap_or_default());
    let entry = {
        let catalog = app.engine.catalog().load();
        let deployment = catalog.deployment(&model)?;
        deployment.entry(&version).cloned().ok_or_else(|| {
            let known: Vec<&str> = deployment.entries.iter().map(|entry| entry.version.as_str()).collect();
            let version = crate::id::shorten(&version);
            Error::not_found(format!("model '{model}' has no version '{version}'; it has {}", known.join(", ")))
        })?
    };
    // What is known of new files says nothing of those that serve, whose own are gone.
    let Some(files) = entry.files.clone().filter(|_| !entry.is_outdated) else {
        return Ok(Json(details(model, &entry, None)));
    };
    let turn = READING.acquire().await;
    let read = tokio::task::spawn_blocking(move || {
        // It is read to the end, also when nobody waits for it any more.
        let _turn = turn;
        Provenance::of(&files)
    });
    let provenance = read
        .await
        .map_err(|error| Error::internal(error.to_string()))?
        .map_err(|error| Error::internal(format!("model '{model}' version '{version}': {error}")))?;
    Ok(Json(details(model, &entry, Some(provenance))))
}

fn details(model: String, entry: &Entry, found: Option<Provenance>) -> VersionDetails {
    let digest = found.as_ref().map(|found| found.digest.clone());
    let Provenance { files, origin, lineage, card, signature, .. } = found.unwrap_or_default();
    let (source, revision) = origin.unzip();
    let file = |(path, stored): (String, crate::source::cache::mirror::Stored)| FileStatus {
        path,
        bytes: stored.size,
        sha256: stored.sha256,
    };
    VersionDetails {
        model,
        version: entry.version.to_string(),
        state: entry.state.as_str().to_owned(),
        reason: entry.reason.clone(),
        digest,
        files: files.into_iter().map(file).collect(),
        source,
        revision,
        lineage,
        signature,
        card: card.card,
        card_notes: card.notes,
        signed: entry.signature.as_deref().map(signed),
    }
}

fn signed(found: &Outcome) -> SignatureStatus {
    let signer = found.signer.as_ref();
    SignatureStatus {
        state: found.state.as_str().to_owned(),
        policy: found.policy.as_str().to_owned(),
        method: signer.map(|signer| signer.method.to_owned()),
        key: signer.and_then(|signer| signer.key.clone()),
        identity: signer.and_then(|signer| signer.identity.clone()),
        reason: found.reason.clone(),
    }
}
