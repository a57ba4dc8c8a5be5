//! `Catalog`: which versions exist and which one serves, as one immutable snapshot that requests read.
//!
//! A request loads the snapshot once, so it never sees half of a change. Exactly one writer exists, and it is not
//! `Clone`; readers are.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use arc_swap::ArcSwap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{ModelVersion, State};
use crate::{
    error::{Code, Error},
    id::{Alias, ModelName, Version, shorten},
    metrics::VersionMetrics,
    rollout::{Rollout, route::Route},
    source::{WriteBack, signed::Outcome},
};

/// Everything the server knows of its models at one moment.
#[derive(Default)]
pub struct Catalog {
    pub deployments: BTreeMap<ModelName, Deployment>,
    /// Whether the first pass over the repository is over: every model was loaded or failed.
    pub complete: bool,
}

/// One model.
#[derive(Default)]
pub struct Deployment {
    /// Ordered by number where both are numbers, else by arrival.
    pub entries: Vec<Entry>,
    /// The stable version, which answers requests that name none and draw none.
    pub default: Option<Version>,
    /// How requests are divided, while they are; all of its versions serve.
    pub route: Option<Route>,
    /// How the last version took over, or takes over now.
    pub rollout: Option<Arc<Rollout>>,
    /// Rises with every change of the route and the rollout.
    pub epoch: u64,
    /// Why the model has no version at all.
    pub problem: Option<String>,
    /// Which of its versions shall serve.
    pub policy: VersionPolicy,
    /// What operators call versions; requests may name them so.
    pub aliases: BTreeMap<Alias, Version>,
    /// What its settings have the registry told that it comes from.
    pub write_back: WriteBack,
}

/// Which of the versions in a repository are served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VersionPolicy {
    /// The so many highest numbers.
    Latest(usize),
    /// Every one.
    All,
    /// These.
    Specific(Vec<String>),
}

impl Default for VersionPolicy {
    fn default() -> Self {
        VersionPolicy::Latest(1)
    }
}

/// One version.
#[derive(Clone)]
pub struct Entry {
    pub version: Version,
    pub state: State,
    /// Why it is in this state; empty when there is nothing to say.
    pub reason: String,
    /// There when the version takes requests.
    pub serving: Option<Arc<ModelVersion>>,
    /// Where its files lie, as far as they were seen.
    pub files: Option<Arc<Path>>,
    /// Whether the files there are others by now than those that serve.
    pub is_outdated: bool,
    /// How the signature was found: of what serves, or else of what was to be loaded last; `None` when nobody looked.
    pub signature: Option<Arc<Outcome>>,
    /// Held here so that a version's series live as long as it is known.
    pub metrics: Arc<VersionMetrics>,
}

impl Catalog {
    /// # Errors
    /// `NotFound` when nobody has heard of the model.
    pub fn deployment(&self, model: &str) -> Result<&Deployment, Error> {
        self.deployments.get(model).ok_or_else(|| Error::not_found(format!("unknown model '{}'", shorten(model))))
    }

    /// The version that shall answer: the named one, or the default.
    ///
    /// # Errors
    /// `NotFound` for unknown models and versions, `NotReady` for those that cannot serve now.
    pub fn find(&self, model: &str, version: Option<&str>) -> Result<&Arc<ModelVersion>, Error> {
        self.deployment(model)?.find(model, version)
    }

    /// Whether every known version serves.
    pub fn all_ready(&self) -> bool {
        self.deployments.values().all(|deployment| {
            deployment.problem.is_none() && deployment.entries.iter().all(|entry| entry.state != State::Failed)
        })
    }

    /// Every version that takes requests.
    pub fn serving(&self) -> impl Iterator<Item = &Arc<ModelVersion>> {
        self.deployments.values().flat_map(|deployment| &deployment.entries).filter_map(|entry| entry.serving.as_ref())
    }
}

impl Deployment {
    /// The version of `model`, which this is, that shall answer: the named one, or the default.
    ///
    /// # Errors
    /// `NotFound` for unknown versions, `NotReady` for those that cannot serve now.
    pub fn find(&self, model: &str, version: Option<&str>) -> Result<&Arc<ModelVersion>, Error> {
        let Some(wanted) = version.or(self.default.as_ref().map(Version::as_str)) else {
            return Err(Error::new(Code::NotReady, self.not_ready(model)));
        };
        let entry = self.entry(wanted).ok_or_else(|| {
            let versions: Vec<&str> = self.entries.iter().map(|entry| entry.version.as_str()).collect();
            Error::not_found(format!(
                "model '{model}' has no version '{}'; its versions are {}",
                shorten(wanted),
                if versions.is_empty() { "none".to_owned() } else { versions.join(", ") }
            ))
        })?;
        entry.serving.as_ref().ok_or_else(|| {
            Error::new(Code::NotReady, format!("model '{model}' version '{wanted}' is not ready: {}", entry.describe()))
        })
    }

    /// The version of that name, or the one that an alias of that name stands for.
    pub fn entry(&self, version: &str) -> Option<&Entry> {
        let find = |version: &str| self.entries.iter().find(|entry| entry.version.as_str() == version);
        find(version).or_else(|| find(self.aliases.get(version)?.as_str()))
    }

    /// The versions that take requests: those that get nothing but copies, whose executors may wait, or all others.
    pub fn serving(&self, only_copies: bool) -> impl Iterator<Item = &Arc<ModelVersion>> {
        let copied = self.route.as_ref().and_then(|route| {
            let version = &route.shadow.as_ref()?.version;
            let answers = route.stable == *version || route.arms.iter().any(|arm| arm.version == *version);
            (!answers).then_some(version)
        });
        let entries = self.entries.iter().filter(move |entry| (copied == Some(&entry.version)) == only_copies);
        entries.filter_map(|entry| entry.serving.as_ref())
    }

    /// Names of the versions that take requests.
    pub fn ready_versions(&self) -> Vec<String> {
        self.entries.iter().filter(|entry| entry.serving.is_some()).map(|entry| entry.version.to_string()).collect()
    }

    fn not_ready(&self, model: &str) -> String {
        let reasons: Vec<String> = match &self.problem {
            Some(problem) => vec![problem.clone()],
            None => {
                let describe = |entry: &Entry| format!("version '{}' is {}", entry.version, entry.describe());
                self.entries.iter().map(describe).collect()
            }
        };
        format!("model '{model}' is not ready: {}", reasons.join("; "))
    }
}

impl Entry {
    fn describe(&self) -> String {
        if self.reason.is_empty() {
            self.state.as_str().to_owned()
        } else {
            format!("{}: {}", self.state.as_str(), self.reason)
        }
    }
}

/// The order of versions: by number where both are numbers; otherwise the one that arrived first stays first.
pub fn insert_in_order<T>(list: &mut Vec<T>, item: T, version: impl Fn(&T) -> &Version) {
    let after = match version(&item).number() {
        None => list.len(),
        Some(number) => list
            .iter()
            .position(|other| version(other).number().is_some_and(|other| other > number))
            .unwrap_or(list.len()),
    };
    list.insert(after, item);
}

struct Shared {
    current: ArcSwap<Catalog>,
}

/// Reads the current snapshot; cheap to clone.
#[derive(Clone)]
pub struct CatalogReader {
    shared: Arc<Shared>,
    changes: watch::Receiver<u64>,
}

/// Publishes snapshots; there is one.
pub struct CatalogWriter {
    shared: Arc<Shared>,
    changes: watch::Sender<u64>,
}

/// A new, empty catalog.
pub fn catalog() -> (CatalogReader, CatalogWriter) {
    let shared = Arc::new(Shared { current: ArcSwap::from_pointee(Catalog::default()) });
    let (sender, receiver) = watch::channel(0);
    (CatalogReader { shared: shared.clone(), changes: receiver }, CatalogWriter { shared, changes: sender })
}

impl CatalogReader {
    pub fn load(&self) -> Arc<Catalog> {
        self.shared.current.load_full()
    }

    /// Wakes whenever a new snapshot was published since the receiver last looked.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
}

impl CatalogWriter {
    /// Replaces the snapshot; cannot fail.
    pub fn publish(&self, catalog: Catalog) {
        self.shared.current.store(Arc::new(catalog));
        self.changes.send_modify(|generation| *generation += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number_else_by_arrival() {
        let mut versions: Vec<Version> = Vec::new();
        for text in ["10", "main", "9", "beta", "11"] {
            insert_in_order(&mut versions, Version::parse(text).unwrap(), |version| version);
        }
        let texts: Vec<&str> = versions.iter().map(Version::as_str).collect();
        assert_eq!(texts, ["9", "10", "main", "beta", "11"]);
    }

    #[test]
    fn unknown_models_are_not_found() {
        let (reader, _writer) = catalog();
        let error = reader.load().find("nope", None).map(|_| ()).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (Code::NotFound, "unknown model 'nope'"));
    }
}
