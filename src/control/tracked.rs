//! What the reconciler keeps in mind of each model: what serves, and where its newest files are on their way.

use std::{
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{spec::ModelSpec, standing::Standing};
use crate::{
    error::Error,
    id::{ModelName, Version},
    metrics::{Metrics, VersionMetrics},
    model::{
        ModelVersion, State,
        catalog::{Deployment, Entry, VersionPolicy, insert_in_order},
    },
    rollout::{self, Moment, plan::OnNewVersion},
    source::{
        SourceUri, WriteBack,
        local::{Fingerprint, FoundModel, FoundVersion, MODEL_FILE, TRITON_FILE},
        pointer::Pointer,
        signed::Outcome,
    },
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
    /// What the registry is told that it comes from.
    pub(super) write_back: WriteBack,
    /// What becomes of new versions.
    pub(super) settings: rollout::plan::Settings,
    /// What the repository held when it was looked at last.
    pub(super) found: Vec<FoundVersion>,
    /// Where its versions come from, when its settings say so.
    pub(super) source: Option<SourceUri>,
    /// Whether the first versions from there are on their way.
    pub(super) is_awaited: bool,
    /// Whether that place has been seen to hold none.
    pub(super) is_bare: bool,
    /// What its registry's pointer pointed at then, or else the alias that it follows.
    pub(super) pointer: Pointer,
    /// Whose pointer that is.
    pub(super) pointed_by: PointedBy,
    /// Whether requests were answered since it last had nothing that serves.
    pub(super) shown: bool,
}

/// Who says which version of a model is the one to serve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum PointedBy {
    /// The place that it comes from.
    Registry,
    /// Operators, by an alias of this name, as soon as it is set.
    Alias(String),
    #[default]
    Nobody,
}

impl fmt::Display for PointedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PointedBy::Registry => f.write_str("the registry"),
            PointedBy::Alias(name) => write!(f, "alias '{name}'"),
            PointedBy::Nobody => f.write_str("nobody"),
        }
    }
}

pub(super) struct TrackedVersion {
    pub(super) version: Version,
    pub(super) metrics: Arc<VersionMetrics>,
    /// What serves, and the files it came from.
    pub(super) serving: Option<(Arc<ModelVersion>, Fingerprint)>,
    pub(super) progress: Progress,
    /// Whether it shall serve, with or without requests.
    pub(super) wanted: bool,
    /// Whether it is among what the version policy selects, of the versions that are not passed over.
    pub(super) selected: bool,
    /// Whether requests may come to it though its files are gone.
    pub(super) needed: bool,
    /// Where its files lay when they were seen last.
    pub(super) files: Option<Arc<Path>>,
    /// What stands for the files as they were seen last, and for those that serve.
    pub(super) stamp: Option<u64>,
    pub(super) served_stamp: Option<u64>,
    /// How the signature of its newest files was found.
    pub(super) signature: Option<Arc<Outcome>>,
    /// Since when the repository does not hold it.
    pub(super) missing_since: Option<Instant>,
}

/// Where the newest files of a version are on their way.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Progress {
    Settling {
        fingerprint: Fingerprint,
        since: Instant,
        /// Why it did not load so far; then these files are tried again.
        failed: Option<String>,
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
        /// When the same files are tried again.
        again: Option<Instant>,
    },
    /// Passed over, and why.
    Held {
        fingerprint: Fingerprint,
        reason: String,
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
            | Progress::Failed { fingerprint, .. }
            | Progress::Held { fingerprint, .. } => Some(*fingerprint),
            Progress::Gone => None,
        }
    }

    /// Whether it failed for a while, and that is over.
    pub(super) fn is_due_again(&self) -> bool {
        matches!(self, Progress::Failed { again: Some(again), .. } if *again <= Instant::now())
    }

    pub(super) fn is_under_way(&self) -> bool {
        matches!(self, Progress::Settling { .. } | Progress::Loading { .. })
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
                selected: false,
                needed: false,
                files: None,
                stamp: None,
                served_stamp: None,
                signature: None,
                missing_since: None,
            };
            insert_in_order(&mut self.versions, fresh, |tracked| &tracked.version);
            self.versions.iter().position(|tracked| tracked.version == *version).unwrap_or_default()
        });
        &mut self.versions[index]
    }

    /// What answers requests that name no version.
    pub(super) fn stable(&self, standing: &Standing) -> Option<Arc<ModelVersion>> {
        let default = self.deployment(standing).default?;
        let tracked = self.versions.iter().find(|tracked| tracked.version == default)?;
        tracked.serving.as_ref().map(|(version, _)| version.clone())
    }

    /// The version that is to answer what draws no other, by all that was decided, whether it can yet or not.
    pub(super) fn decided(&self, standing: &Standing) -> Option<Version> {
        if let Some(route) = standing.route() {
            return Some(route.stable);
        }
        let newest = self.chosen(standing).next_back().cloned();
        let is_there = |version: &Version| self.place(version).is_some();
        match standing.stable.clone().filter(is_there) {
            Some(stable)
                if !self.swaps() || newest.as_ref().map(|newest| self.place(newest)) <= Some(self.place(&stable)) =>
            {
                Some(stable)
            }
            _ => newest,
        }
    }

    pub(super) fn swaps(&self) -> bool {
        self.settings.on_new_version == OnNewVersion::Swap
    }

    /// Where a version stands among those in the repository, of which later ones take over from earlier ones.
    pub(super) fn place(&self, version: &Version) -> Option<usize> {
        self.found.iter().position(|found| found.version == *version)
    }

    /// Whether nobody is to see the model yet: it has just begun to load, and a version is on its way that was decided
    /// to answer before. Whatever is loaded earlier is not to have its requests meanwhile.
    pub(super) fn waits(&self, standing: &Standing) -> bool {
        let remembered = standing.route().is_some() || standing.stable.is_some();
        if self.shown || !remembered {
            return false;
        }
        let (route, decided) = (standing.route(), self.decided(standing));
        self.versions.iter().any(|tracked| {
            let version = &tracked.version;
            let awaited = route.as_ref().map_or(decided.as_ref() == Some(version), |route| route.names(version));
            awaited && tracked.serving.is_none() && tracked.progress.is_under_way()
        })
    }

    /// What requests see of the model.
    pub(super) fn deployment(&self, standing: &Standing) -> Deployment {
        let mut entries: Vec<Entry> = self.versions.iter().map(TrackedVersion::entry).collect();
        if self.waits(standing) {
            entries.iter_mut().for_each(|entry| entry.serving = None);
        }
        let serves =
            |version: &Version| entries.iter().any(|entry| entry.version == *version && entry.serving.is_some());
        let mut route = standing.route();
        let default = route.as_ref().map(|route| route.stable.clone()).filter(serves);
        if let Some(route) = &mut route {
            route.arms.retain(|arm| serves(&arm.version));
            route.shadow.take_if(|shadow| !serves(&shadow.version));
        }
        let route = route.filter(|_| default.is_some());
        let default = default.or_else(|| self.stand_in(standing, serves));
        // Of a newer version than the one that answers, operators want to know why it does not.
        let place = entries.iter().position(|entry| Some(&entry.version) == default.as_ref());
        for entry in entries.iter_mut().skip(place.map_or(usize::MAX, |place| place + 1)) {
            let named = route.as_ref().is_some_and(|route| route.names(&entry.version));
            if entry.serving.is_some() && entry.reason.is_empty() && !named {
                "warm, and gets no requests".clone_into(&mut entry.reason);
            }
        }
        Deployment {
            entries,
            default,
            route,
            rollout: standing.rollout.clone().map(Arc::new),
            epoch: standing.epoch,
            problem: self.problem.clone(),
            policy: self.policy.clone(),
            aliases: standing
                .aliases
                .iter()
                .filter_map(|(alias, pointer)| Some((alias.clone(), pointer.version()?.clone())))
                .collect(),
            write_back: self.write_back.clone(),
        }
    }

    /// The version that answers: the one that was decided on, or the best that there is.
    fn stand_in(&self, standing: &Standing, serves: impl Fn(&Version) -> bool) -> Option<Version> {
        let newest = || self.versions.iter().map(|tracked| &tracked.version).rfind(|version| serves(version)).cloned();
        self.decided(standing)
            .filter(&serves)
            .or_else(|| standing.stable.clone().filter(&serves))
            .or_else(|| self.chosen(standing).rfind(|version| serves(version)).cloned())
            .or_else(newest)
    }

    /// The versions that the version policy selects and that nobody passes over, in ascending order. What stands is asked
    /// anew: it may have changed since the repository was looked at.
    pub(super) fn chosen(&self, standing: &Standing) -> impl DoubleEndedIterator<Item = &Version> {
        let is_selected =
            |version: &Version| self.versions.iter().any(|tracked| tracked.version == *version && tracked.selected);
        let fresh = self.found.iter().filter(|found| standing.passes_over(&found.version, found.stamp).is_none());
        fresh.map(|found| &found.version).filter(move |version| is_selected(version))
    }
}

impl TrackedVersion {
    /// Its files lie where they were found.
    pub(super) fn seen(&mut self, found: &FoundVersion) {
        self.stamp = Some(found.stamp);
        if self.files.as_deref() != Some(&found.files) {
            self.files = Some(found.files.as_path().into());
        }
    }

    pub(super) fn entry(&self) -> Entry {
        let (state, reason) = match (&self.serving, &self.progress) {
            (Some(_), Progress::Failed { error, .. }) => {
                (State::Ready, format!("its new files failed to load: {error}"))
            }
            (Some(_), Progress::Gone) => (State::Ready, "serves until its successor is ready".to_owned()),
            (Some(_), Progress::Settling { failed: Some(failed), .. }) => {
                (State::Ready, format!("its new files wait for another try: {failed}"))
            }
            (Some((version, _)), _) => (State::Ready, note(version)),
            (None, Progress::Settling { failed: Some(failed), .. }) => {
                (State::Settling, format!("waiting for another try: {failed}"))
            }
            (None, Progress::Settling { .. }) => (State::Settling, "waiting for its files to be complete".to_owned()),
            (None, Progress::Loading { .. }) => (State::Loading, String::new()),
            (None, Progress::Failed { error, .. }) => (State::Failed, error.message.clone()),
            (None, Progress::Held { reason, .. }) => (State::Held, reason.clone()),
            (None, Progress::Done { .. } | Progress::Gone) => (State::Draining, String::new()),
        };
        self.metrics.state(state.as_str(), &State::NAMES);
        let serving = self.serving.as_ref().map(|(version, _)| version.clone());
        let signature = serving.as_ref().map_or(self.signature.clone(), |version| version.signature_found.clone());
        Entry {
            version: self.version.clone(),
            state,
            reason,
            serving,
            files: self.files.clone(),
            is_outdated: self.serving.is_some() && self.served_stamp != self.stamp,
            signature,
            metrics: self.metrics.clone(),
        }
    }
}

fn note(version: &ModelVersion) -> String {
    if version.batching.enabled { String::new() } else { format!("not batched: {}", version.batching.reason) }
}

/// A version that shall serve.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) found: FoundVersion,
    /// Whether the version policy selects it.
    pub(super) selected: bool,
    /// Whether requests are, or may soon be, divided so that it gets some.
    pub(super) needed: bool,
}

/// The versions that shall serve, and those that would if they were not passed over.
pub(super) struct Targets {
    pub(super) wanted: Vec<Target>,
    pub(super) held: Vec<(FoundVersion, String)>,
}

/// What shall serve: what the policy selects, passing over those whose present files failed before, so that a broken
/// new version leaves the one before it in place, also after a restart; and whatever stands beside that.
pub(super) fn targets(
    tracked: &[TrackedVersion],
    found: &FoundModel,
    spec: &Result<ModelSpec, Error>,
    standing: &Standing,
    now: Moment,
) -> Targets {
    let failed = |found: &&FoundVersion| {
        tracked.iter().any(|tracked| {
            tracked.version == found.version
                && tracked.serving.is_none()
                && !tracked.progress.is_due_again()
                && matches!(&tracked.progress, Progress::Failed { fingerprint, .. } if *fingerprint == found.fingerprint)
        })
    };
    let passed = |found: &FoundVersion| standing.passes_over(&found.version, found.stamp);
    let sound: Vec<&FoundVersion> = found.versions.iter().filter(|found| !failed(found)).collect();
    // Broken settings fail each version by name, so that they show wherever versions show.
    let policy = spec.as_ref().map(|spec| spec.versions.clone()).unwrap_or_default();
    let fresh: Vec<&FoundVersion> = sound.iter().copied().filter(|found| passed(found).is_none()).collect();
    let selected = select(&policy, &fresh, |found| &found.version);
    let needed = standing.needed(now);
    // Who calls a version by a name wants it there; that of the alias that is followed may still be passed over.
    let follows = spec.as_ref().ok().map(ModelSpec::followed_alias);
    let others = standing.aliases.iter().filter(|(alias, _)| Some(alias.as_str()) != follows);
    let called: Vec<&Version> = others.filter_map(|(_, pointer)| pointer.version()).collect();
    let swaps = spec.as_ref().map_or(OnNewVersion::Swap, |spec| spec.rollout.on_new_version) == OnNewVersion::Swap;
    let place = |version: &Version| found.versions.iter().position(|found| found.version == *version);
    let newest = selected.iter().map(|found| place(&found.version)).max();
    // What was decided on stays, unless something newer takes over by itself.
    let stays = standing.stable.as_ref().filter(|stable| !swaps || newest <= Some(place(stable)));
    let mut targets = Targets { wanted: Vec::new(), held: Vec::new() };
    let is_in = |list: &[&FoundVersion], found: &FoundVersion| list.iter().any(|other| other.version == found.version);
    let otherwise = select(&policy, &sound, |found| &found.version);
    for found in &found.versions {
        let (selected, needed) = (is_in(&selected, found), needed.contains(&found.version));
        let stays = (stays == Some(&found.version) || called.contains(&&found.version)) && !failed(&found);
        if selected || needed || stays {
            targets.wanted.push(Target { found: found.clone(), selected, needed });
        } else if let Some(passed) = passed(found).filter(|_| is_in(&otherwise, found)) {
            targets.held.push((found.clone(), passed.reason.clone()));
        }
    }
    targets
}

/// Which of the versions `offered`, in ascending order, the settings in a model's folder select; by the default policy
/// when the settings are broken, so that there is a version for which they can be seen to be.
pub fn wanted(folder: &Path, model: &ModelName, offered: &[Version]) -> Vec<Version> {
    let settings = [MODEL_FILE, TRITON_FILE].map(|name| folder.join(name)).into_iter().filter(|path| path.is_file());
    let policy = ModelSpec::read(&settings.collect::<Vec<_>>(), model).map(|spec| spec.versions).unwrap_or_default();
    select(&policy, offered, |version| version)
}

/// What a policy selects of versions in ascending order.
fn select<T: Clone>(policy: &VersionPolicy, versions: &[T], version: impl Fn(&T) -> &Version) -> Vec<T> {
    match policy {
        VersionPolicy::Latest(count) => versions.iter().rev().take(*count).cloned().collect(),
        VersionPolicy::All => versions.to_vec(),
        VersionPolicy::Specific(list) => {
            let is_listed = |one: &&T| list.iter().any(|wanted| wanted == version(one).as_str());
            versions.iter().filter(is_listed).cloned().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::source::local;

    /// The versions that shall serve of a folder with versions 1, 2 and 3, of which `failed` failed.
    fn selected(policy: VersionPolicy, failed: &[&str]) -> Vec<String> {
        selected_again(policy, failed, None)
    }

    fn selected_again(policy: VersionPolicy, failed: &[&str], again: Option<Instant>) -> Vec<String> {
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
                Progress::Failed { fingerprint, error: Error::internal("as told"), again }
            } else {
                Progress::Done { fingerprint }
            };
        }
        let spec = Ok(ModelSpec { versions: policy, ..ModelSpec::default() });
        let targets = targets(&model.versions, found, &spec, &Standing::default(), 0).wanted;
        targets.iter().map(|target| target.found.version.to_string()).collect()
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
        // What failed for a while is passed over for that long.
        let now = Instant::now();
        let later = Some(now + Duration::from_secs(60));
        assert_eq!(selected_again(VersionPolicy::Latest(1), &["3"], later), ["2"]);
        assert_eq!(selected_again(VersionPolicy::Latest(1), &["3"], Some(now)), ["3"]);
    }
}
