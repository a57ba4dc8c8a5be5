//! What the reconciler keeps in mind of each model: what serves, and where its newest files are on their way.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::spec::ModelSpec;
use crate::{
    error::Error,
    id::{ModelName, Version},
    metrics::{Metrics, VersionMetrics},
    model::{
        ModelVersion, State,
        catalog::{Deployment, Entry, VersionPolicy, insert_in_order},
    },
    source::local::{Fingerprint, FoundModel, FoundVersion},
};

/// Files that did not change for so long are complete, and versions not seen for so long are gone: whoever replaces
/// a folder removes the old one first.
pub(super) const SETTLE_TIME: Duration = Duration::from_secs(1);

/// A model the repository holds, or held until its versions are drained.
#[derive(Default)]
pub(super) struct Tracked {
    pub(super) versions: Vec<TrackedVersion>,
    pub(super) problem: Option<String>,
    pub(super) policy: VersionPolicy,
}

pub(super) struct TrackedVersion {
    pub(super) version: Version,
    pub(super) metrics: Arc<VersionMetrics>,
    /// What serves, and the files it came from.
    pub(super) serving: Option<(Arc<ModelVersion>, Fingerprint)>,
    pub(super) progress: Progress,
    /// Whether the version policy selects it.
    pub(super) wanted: bool,
    /// Since when the repository does not hold it.
    pub(super) missing_since: Option<Instant>,
}

/// Where the newest files of a version are on their way.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Progress {
    Settling {
        fingerprint: Fingerprint,
        since: Instant,
    },
    Loading {
        fingerprint: Fingerprint,
        /// Gone with this progress; a load whose turn comes after that need not begin.
        claim: Arc<()>,
    },
    Done {
        fingerprint: Fingerprint,
    },
    Failed {
        fingerprint: Fingerprint,
        error: Error,
    },
    /// No longer in the repository, or not wanted.
    Gone,
}

impl Progress {
    pub(super) fn fingerprint(&self) -> Option<Fingerprint> {
        match self {
            Progress::Settling { fingerprint, .. }
            | Progress::Loading { fingerprint, .. }
            | Progress::Done { fingerprint }
            | Progress::Failed { fingerprint, .. } => Some(*fingerprint),
            Progress::Gone => None,
        }
    }
}

impl Tracked {
    /// Gives up the versions that were not `found` for as long as files need to settle.
    pub(super) fn forget_missing(&mut self, found: &[FoundVersion]) {
        for tracked in &mut self.versions {
            if found.iter().any(|found| found.version == tracked.version) {
                tracked.missing_since = None;
            } else if tracked.missing_since.get_or_insert_with(Instant::now).elapsed() >= SETTLE_TIME {
                tracked.progress = Progress::Gone;
            }
        }
    }

    pub(super) fn find(&mut self, version: &Version) -> Option<&mut TrackedVersion> {
        self.versions.iter_mut().find(|tracked| tracked.version == *version)
    }

    pub(super) fn find_or_insert(
        &mut self,
        name: &ModelName,
        version: &Version,
        metrics: &Metrics,
    ) -> &mut TrackedVersion {
        let index = self.versions.iter().position(|tracked| tracked.version == *version).unwrap_or_else(|| {
            let fresh = TrackedVersion {
                version: version.clone(),
                metrics: metrics.version(name.as_str(), version.as_str()),
                serving: None,
                progress: Progress::Gone,
                wanted: false,
                missing_since: None,
            };
            insert_in_order(&mut self.versions, fresh, |tracked| &tracked.version);
            self.versions.iter().position(|tracked| tracked.version == *version).unwrap_or_default()
        });
        &mut self.versions[index]
    }

    /// What answers requests that name no version.
    pub(super) fn stable(&self) -> Option<Arc<ModelVersion>> {
        self.versions.iter().rev().find_map(|tracked| tracked.serving.as_ref()).map(|(version, _)| version.clone())
    }

    pub(super) fn deployment(&self) -> Deployment {
        let entries: Vec<Entry> = self.versions.iter().map(TrackedVersion::entry).collect();
        let default = entries.iter().rev().find(|entry| entry.serving.is_some()).map(|entry| entry.version.clone());
        Deployment { entries, default, problem: self.problem.clone(), policy: self.policy.clone() }
    }
}

impl TrackedVersion {
    pub(super) fn entry(&self) -> Entry {
        let (state, reason) = match (&self.serving, &self.progress) {
            (Some(_), Progress::Failed { error, .. }) => {
                (State::Ready, format!("its new files failed to load: {error}"))
            }
            (Some(_), Progress::Gone) => (State::Ready, "serves until its successor is ready".to_owned()),
            (Some((version, _)), _) => (State::Ready, note(version)),
            (None, Progress::Settling { .. }) => (State::Settling, "waiting for its files to be complete".to_owned()),
            (None, Progress::Loading { .. }) => (State::Loading, String::new()),
            (None, Progress::Failed { error, .. }) => (State::Failed, error.message.clone()),
            (None, Progress::Done { .. } | Progress::Gone) => (State::Draining, String::new()),
        };
        self.metrics.state(state.as_str(), &State::NAMES);
        Entry {
            version: self.version.clone(),
            state,
            reason,
            serving: self.serving.as_ref().map(|(version, _)| version.clone()),
            metrics: self.metrics.clone(),
        }
    }
}

fn note(version: &ModelVersion) -> String {
    if version.batching.enabled { String::new() } else { format!("not batched: {}", version.batching.reason) }
}

/// The versions that shall serve: what the policy selects, passing over those whose present files failed before, so
/// that a broken new version leaves the one before it in place, also after a restart.
pub(super) fn targets(
    tracked: &[TrackedVersion],
    found: &FoundModel,
    spec: &Result<ModelSpec, Error>,
) -> Vec<FoundVersion> {
    let failed = |found: &&FoundVersion| {
        tracked.iter().any(|tracked| {
            tracked.version == found.version
                && tracked.serving.is_none()
                && matches!(&tracked.progress, Progress::Failed { fingerprint, .. } if *fingerprint == found.fingerprint)
        })
    };
    // Broken settings fail each version by name, so that they show wherever versions show.
    let policy = spec.as_ref().map(|spec| spec.versions.clone()).unwrap_or_default();
    match policy {
        VersionPolicy::Latest(count) => {
            found.versions.iter().rev().filter(|found| !failed(found)).take(count).cloned().collect()
        }
        VersionPolicy::All => found.versions.iter().filter(|found| !failed(found)).cloned().collect(),
        VersionPolicy::Specific(list) => found
            .versions
            .iter()
            .filter(|found| list.iter().any(|wanted| wanted == found.version.as_str()) && !failed(found))
            .cloned()
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::source::local;

    /// The versions that shall serve of a folder with versions 1, 2 and 3, of which `failed` failed.
    fn selected(policy: VersionPolicy, failed: &[&str]) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        for version in ["1", "2", "3"] {
            fs::create_dir_all(root.path().join("m").join(version)).unwrap();
        }
        let found = &local::scan(root.path(), |_| true).unwrap()["m"];
        let metrics = Metrics::new("0", "0");
        let mut model = Tracked::default();
        for found in &found.versions {
            let tracked = model.find_or_insert(&ModelName::parse("m").unwrap(), &found.version, &metrics);
            let fingerprint = found.fingerprint;
            tracked.progress = if failed.contains(&found.version.as_str()) {
                Progress::Failed { fingerprint, error: Error::internal("as told") }
            } else {
                Progress::Done { fingerprint }
            };
        }
        let spec = Ok(ModelSpec { versions: policy, ..ModelSpec::default() });
        let mut names: Vec<_> =
            targets(&model.versions, found, &spec).iter().map(|found| found.version.to_string()).collect();
        names.sort();
        names
    }

    #[test]
    fn policies_select_and_pass_over_what_failed() {
        assert_eq!(selected(VersionPolicy::Latest(1), &[]), ["3"]);
        assert_eq!(selected(VersionPolicy::Latest(2), &[]), ["2", "3"]);
        assert_eq!(selected(VersionPolicy::Latest(1), &["3"]), ["2"]);
        assert_eq!(selected(VersionPolicy::Latest(2), &["2"]), ["1", "3"]);
        assert_eq!(selected(VersionPolicy::All, &["1"]), ["2", "3"]);
        assert_eq!(selected(VersionPolicy::Specific(vec!["1".into(), "9".into()]), &[]), ["1"]);
        assert!(selected(VersionPolicy::Latest(1), &["1", "2", "3"]).is_empty());
    }
}
