//! Finding model files: in a folder as they are, elsewhere through a [`Source`] whose versions are mirrored.
//!
//! `control` sees folders only. What lies elsewhere is looked at, fetched, verified and published into a folder by
//! `follow`, with its bytes in `cache`; no request and no pass of the reconciler waits for a registry.

mod arrange;
pub mod cache;
pub mod card;
pub mod digest;
mod disk;
mod dvc;
pub mod endpoint;
pub mod follow;
mod hub;
mod layout;
pub mod lineage;
pub mod local;
mod mlflow;
mod object;
mod oci;
mod patience;
pub mod places;
pub mod pointer;
pub mod signed;
pub mod uri;
pub mod write_back;
mod yaml;

use std::{
    collections::BTreeMap,
    ops::Range,
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use thiserror::Error;
use tokio_stream::Stream;

pub use cache::Scratch;
pub use digest::Digest;
pub use lineage::{Lineage, Names};
pub use mlflow::signature::{Field, Form, ModelSignature};
pub use uri::{Scheme, SourceUri};
pub use write_back::{Recorder, WriteBack};

use crate::{
    error::visible,
    id::{ModelName, Version},
};

/// A place where models and their versions are found, and read from.
///
/// Every call may be given up by dropping its future, and says by itself how long it waits for an answer.
#[async_trait]
pub trait Source: Send + Sync {
    /// Where that is, as status and log show it: without credentials.
    fn uri(&self) -> &SourceUri;

    /// How long a version must stay as it is before it is taken for complete. Registries write versions at once.
    fn settle_time(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether a file can be read from its middle on. Where it cannot, each read costs as much as one of all that is before
    /// it, and may take long to begin.
    fn seeks(&self, _file: &RemoteFile) -> bool {
        true
    }

    /// What there is now. The one call that is made again and again, so it is a cheap one.
    ///
    /// # Errors
    /// When the place does not answer, refuses to, or answers what makes no sense. A look at half of a place is an
    /// error too: what it does not show would be taken for gone.
    async fn look(&self) -> Result<Look, SourceError>;

    /// The files of a version that a look has shown, as they are at the revision it had then.
    ///
    /// # Errors
    /// As for a look; `Changed` when the version is at another revision meanwhile.
    async fn artifact(&self, model: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError>;

    /// How far the last call for files has come that has to fetch something to list them.
    fn preparing(&self) -> Option<Arc<Progress>> {
        None
    }

    /// Hears that no file of a version will be read any more: it is published, or never will be.
    fn done(&self, version: &RemoteVersion) {
        let _ = version;
    }

    /// What the place knows of a version beyond its files. It is asked for each version that is fetched,
    /// and now and then for one that is pointed at and of which nothing is known.
    ///
    /// # Errors
    /// As for a look; the version is mirrored all the same.
    async fn lineage(&self, model: &ModelName, version: &RemoteVersion) -> Result<Option<Lineage>, SourceError> {
        let _ = (model, version);
        Ok(None)
    }

    /// What versions of a model are called now, of which a look has just shown this; `None` when the place calls them
    /// nothing, or nothing has changed since it was asked last. Names move while files stay, so this is asked after every
    /// look, and makes a call only when there is reason to.
    ///
    /// # Errors
    /// As for a look; they are called then what they were.
    async fn names(&self, model: &ModelName, shown: &RemoteModel) -> Result<Option<Names>, SourceError> {
        let _ = (model, shown);
        Ok(None)
    }

    /// The place as one that keeps what becomes of its versions, if it does.
    fn recorder(&self) -> Option<&dyn Recorder> {
        None
    }

    /// The bytes `range` of a file, which is never empty and lies within its size.
    ///
    /// # Errors
    /// As for a look; `Changed` when the place knows that the file is another one than was listed. The stream may end
    /// early or go on for too long: whoever reads counts.
    async fn read(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError>;
}

/// The source that a URI speaks of. What it unpacks goes into `scratch`.
///
/// # Errors
/// `Uri` when it is a folder, which needs no source, or the environment's settings for it do not do.
pub fn open(uri: &SourceUri, scratch: Scratch) -> Result<Arc<dyn Source>, SourceError> {
    match uri.scheme() {
        Scheme::S3 | Scheme::Gs | Scheme::Az | Scheme::Http | Scheme::Https => Ok(Arc::new(object::Bucket::open(uri)?)),
        Scheme::Mlflow | Scheme::MlflowHttps | Scheme::Models => Ok(Arc::new(mlflow::Registry::open(uri)?)),
        Scheme::Hf => Ok(Arc::new(hub::Hub::open(uri)?)),
        Scheme::Oci | Scheme::OciHttp => Ok(Arc::new(oci::Artifact::open(uri, scratch)?)),
        Scheme::Dvc => Ok(Arc::new(dvc::Tracked::open(uri)?)),
        Scheme::Folder => Err(SourceError::Uri(format!("source '{uri}': a folder is read as it is"))),
    }
}

/// How long a place may ask to be left alone.
const LONGEST_PATIENCE: Duration = Duration::from_secs(3600);

/// Bytes as they arrive, in pieces of at most a few hundred KiB.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;

/// What a place holds at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    pub models: BTreeMap<ModelName, RemoteModel>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteModel {
    /// In ascending order, as the place counts them.
    pub versions: Vec<RemoteVersion>,
    /// What the pointer (an alias, tag, stage or branch) points at; `None` when the source follows no pointer.
    pub default: Option<Version>,
    /// The files beside the versions: settings, labels, sample requests. Their paths begin at the model's folder.
    pub beside: Vec<RemoteFile>,
}

/// A version as a look shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteVersion {
    pub version: Version,
    /// Changes whenever the version's files do, and is the same as long as they are: a commit, a digest, or what the
    /// place's own tags and times of the files come to.
    pub revision: String,
}

/// Bytes that are to come, and those that have.
#[derive(Debug, Default)]
pub struct Progress {
    pub total: AtomicU64,
    pub fetched: Arc<AtomicU64>,
}

/// A file of a version, or beside the versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Below the version's folder, with `/` between its parts. As the place says it: nobody has checked it yet.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// What the place says the content is. Without one the content is whatever is read, and pinned by that.
    pub digest: Option<Digest>,
    /// Where the source finds the bytes; nobody else reads it.
    pub location: String,
    /// What tells this content from a later one at the same location (an ETag, for instance), when the place says it.
    pub pin: Option<String>,
    /// Files of this place for which it says the same here, and that have one size, have one content, which is fetched
    /// once. It is not checked as a digest is; `None` when the place knows no such thing.
    pub likeness: Option<String>,
}

/// Why something did not come from a source, or is not taken from it. What places say shows without its control characters.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SourceError {
    /// The URI says nothing that can be followed.
    #[error("{}", visible(.0))]
    Uri(String),
    /// No answer, or one that says that it went wrong over there.
    #[error("{} does not answer: {}", visible(place), visible(reason))]
    Unavailable { place: String, reason: String },
    /// An answer that asks for patience.
    #[error("{} wants fewer calls: {}", visible(place), visible(reason))]
    Limited { place: String, reason: String, retry_after: Option<Duration> },
    /// Credentials are missing, wrong or expired.
    #[error("{} refuses: {}", visible(place), visible(reason))]
    Denied { place: String, reason: String },
    /// The model, version, alias or file is not there.
    #[error("{} is not at {}", visible(what), visible(place))]
    NotFound { place: String, what: String },
    /// An answer that cannot be understood.
    #[error("{} answers what makes no sense: {}", visible(place), visible(reason))]
    Senseless { place: String, reason: String },
    /// It is another one than was listed.
    #[error("{} changed while it was read", visible(what))]
    Changed { what: String },
    /// The bytes are not those that were announced.
    #[error("file '{}': {}", visible(file), visible(reason))]
    Corrupt { file: String, reason: String },
    /// It is never published, whoever vouches for it.
    #[error("file '{}' is refused: {}", visible(file), visible(reason))]
    Refused { file: String, reason: String },
    /// There is no room for it.
    #[error("{}", visible(.0))]
    Full(String),
    /// The cache's disk failed.
    #[error("{}: {}", visible(what), visible(reason))]
    Disk { what: String, reason: String },
}

impl SourceError {
    /// Whether the same call may well succeed later, with nothing changed at the place but its health.
    pub fn passes(&self) -> bool {
        !matches!(self, SourceError::Uri(_) | SourceError::Refused { .. })
    }

    /// How long the place asks to be left alone; an hour at most, whatever it says.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            SourceError::Limited { retry_after, .. } => retry_after.map(|wanted| wanted.min(LONGEST_PATIENCE)),
            _ => None,
        }
    }

    /// A failure of the disk at `path`, or the lack of room on it.
    pub fn disk(path: &std::path::Path, error: &std::io::Error) -> Self {
        let what = path.display().to_string();
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                SourceError::Full(format!("the disk of the cache is full: {what}: {error}"))
            }
            _ => SourceError::Disk { what, reason: error.to_string() },
        }
    }
}

/// An error and what it comes from, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_places_say_does_not_write_into_the_log_by_itself() {
        let said = "500\nERROR all is lost\u{1b}[2J\u{202e}".to_owned();
        let shown = r"500\u{a}ERROR all is lost\u{1b}[2J\u{202e}";
        let error = SourceError::Unavailable { place: "mlflow://host/iris@a".into(), reason: said.clone() };
        assert_eq!(error.to_string(), format!("mlflow://host/iris@a does not answer: {shown}"));
        let error = SourceError::Refused { file: said.clone(), reason: said.clone() };
        assert_eq!(error.to_string(), format!("file '{shown}' is refused: {shown}"));
        assert_eq!(SourceError::Uri(said).to_string(), shown);
    }
}
