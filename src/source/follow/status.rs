//! What others see of a follower: since when its place is out of reach, what is being fetched, and what did not work.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{
    id::{ModelName, Version},
    source::{Look, Progress, SourceError, write_back::reporter::Outcome},
};

/// Changes of any state so far.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// A follower's state at one moment.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// The place, without credentials.
    pub uri: String,
    /// When it last answered.
    pub answered: Option<SystemTime>,
    /// Since when it does not, and what it said last.
    pub away: Option<(SystemTime, String)>,
    /// Looks in a row that failed.
    pub failures: u32,
    /// Whether all was tried once that there was to mirror.
    pub settled: bool,
    /// Why it is followed no longer, though nobody has stopped it.
    pub given_up: Option<String>,
    /// What the pointer of each model points at, for places that have one.
    pub defaults: BTreeMap<ModelName, Version>,
    /// What is being fetched; `None` stands for the files beside the versions.
    pub fetching: BTreeMap<(ModelName, Option<String>), Fetching>,
    /// What was not mirrored at the last try.
    pub problems: BTreeMap<(ModelName, Option<String>), Problem>,
    /// How it stands with what is written back; `None` when nothing is.
    pub write_back: Option<WrittenBack>,
}

/// How it stands with what is written back to a place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WrittenBack {
    /// When the place took something last, or had it already.
    pub last: Option<SystemTime>,
    /// Since when something could not be written, and why.
    pub failed: Option<(SystemTime, String)>,
    /// What became of the alias when a rollout last promoted or took back a version.
    pub alias: Option<String>,
    /// Tries by what became of them.
    pub tries: BTreeMap<Outcome, u64>,
}

/// A version on its way.
#[derive(Clone, Debug)]
pub struct Fetching {
    /// Bytes of all its files.
    pub total: u64,
    /// Bytes that are there.
    pub fetched: u64,
    pub since: SystemTime,
    counted: Arc<Progress>,
}

/// Why a version is not mirrored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub error: SourceError,
    /// When it was tried first.
    pub since: SystemTime,
}

/// The state as the follower writes it and anybody may read it.
#[derive(Clone, Default)]
pub struct SharedStatus {
    status: Arc<Mutex<Status>>,
    wake: Arc<Notify>,
    changes: Arc<AtomicU64>,
}

/// The states of all followers that there are.
#[derive(Clone, Default)]
pub struct Followed(Arc<Mutex<Vec<SharedStatus>>>);

impl Followed {
    pub fn add(&self, status: &SharedStatus) {
        self.0.lock().push(status.clone());
    }

    pub fn remove(&self, status: &SharedStatus) {
        self.0.lock().retain(|other| !Arc::ptr_eq(&other.status, &status.status));
    }

    /// The states now.
    pub fn read(&self) -> Vec<Status> {
        self.0.lock().iter().map(SharedStatus::read).collect()
    }

    /// None of them is followed any longer.
    pub fn give_up(&self, reason: &str) {
        self.0.lock().iter().for_each(|one| one.give_up(reason.to_owned()));
    }

    /// Has those look at once whose place somebody knows to have changed; how many there are.
    pub fn wake(&self, is_meant: impl Fn(&Status) -> bool) -> usize {
        let followed = self.0.lock();
        followed.iter().filter(|one| is_meant(&one.read())).map(|one| one.wake.notify_one()).count()
    }
}

impl SharedStatus {
    pub(in crate::source) fn new(uri: String) -> Self {
        let status = Arc::new(Mutex::new(Status { uri, ..Status::default() }));
        let shared = Self { status, ..Self::default() };
        shared.changed();
        shared
    }

    /// Notes that the mirror, or what is said of it here, may be another one than before.
    pub(super) fn changed(&self) {
        self.changes.store(CHANGES.fetch_add(1, Ordering::Relaxed), Ordering::Release);
    }

    /// Another number after each change, and no other state's.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Has the follower look at once when it is notified.
    pub(super) fn waker(&self) -> Arc<Notify> {
        self.wake.clone()
    }

    /// All was tried that there was to mirror.
    pub(in crate::source) fn settled(&self) {
        if !std::mem::replace(&mut self.status.lock().settled, true) {
            self.changed();
        }
    }

    /// The state now.
    pub fn read(&self) -> Status {
        let mut status = self.status.lock().clone();
        for one in status.fetching.values_mut() {
            one.total = one.counted.total.load(Ordering::Relaxed);
            one.fetched = one.counted.fetched.load(Ordering::Relaxed);
        }
        status
    }

    /// The place answered; how long it had not, if it had not.
    pub(in crate::source) fn answered(&self, look: &Look) -> Option<Duration> {
        let mut status = self.status.lock();
        let now = SystemTime::now();
        status.answered = Some(now);
        status.failures = 0;
        let defaults = look.models.iter().filter_map(|(name, model)| Some((name.clone(), model.default.clone()?)));
        status.defaults = defaults.collect();
        let (since, _) = status.away.take()?;
        self.changed();
        Some(now.duration_since(since).unwrap_or_default())
    }

    /// The place did not answer; how often in a row now.
    pub(in crate::source) fn failed(&self, error: &SourceError) -> u32 {
        let mut status = self.status.lock();
        let since = status.away.as_ref().map_or_else(SystemTime::now, |(since, _)| *since);
        status.away = Some((since, error.to_string()));
        status.failures = status.failures.saturating_add(1);
        if status.failures == 1 {
            self.changed();
        }
        status.failures
    }

    /// It is followed no longer.
    pub fn give_up(&self, reason: String) {
        let mut status = self.status.lock();
        status.fetching.clear();
        status.given_up = Some(reason);
    }

    pub(super) fn fetching(&self, name: &ModelName, version: Option<&Version>, counted: Arc<Progress>) {
        let fetching = Fetching { total: 0, fetched: 0, since: SystemTime::now(), counted };
        self.status.lock().fetching.insert((name.clone(), version.map(ToString::to_string)), fetching);
    }

    /// A version is mirrored, or is not because of `error`.
    pub(super) fn fetched(&self, name: &ModelName, version: Option<&Version>, error: Option<&SourceError>) {
        let mut status = self.status.lock();
        let key = (name.clone(), version.map(ToString::to_string));
        self.changed();
        status.fetching.remove(&key);
        match error {
            None => drop(status.problems.remove(&key)),
            Some(error) => {
                let since = status.problems.get(&key).map_or_else(SystemTime::now, |problem| problem.since);
                status.problems.insert(key, Problem { error: error.clone(), since });
            }
        }
    }

    /// The models of the last look, where the place has a pointer.
    pub(in crate::source) fn models(&self) -> Vec<ModelName> {
        self.status.lock().defaults.keys().cloned().collect()
    }

    /// Something was tried to be written back.
    pub(in crate::source) fn wrote_back(&self, outcome: Outcome) {
        let mut status = self.status.lock();
        let written = status.write_back.get_or_insert_default();
        *written.tries.entry(outcome).or_default() += 1;
        if matches!(outcome, Outcome::Written | Outcome::Unchanged) {
            written.last = Some(SystemTime::now());
        }
    }

    /// An alias was moved, or was not to be.
    pub(in crate::source) fn alias_moved(&self, said: String) {
        self.status.lock().write_back.get_or_insert_default().alias = Some(said);
    }

    /// Something could not be written back, while the rest is still tried.
    pub(in crate::source) fn not_written_back(&self, since: SystemTime, error: &str) {
        let mut status = self.status.lock();
        status.write_back.get_or_insert_default().failed.get_or_insert_with(|| (since, error.to_owned()));
    }

    /// Whether anything is written back, and since when something could not be, and why.
    pub(in crate::source) fn write_back_stands(&self, is_on: bool, failed: Option<(SystemTime, String)>) {
        let mut status = self.status.lock();
        if is_on {
            status.write_back.get_or_insert_default().failed = failed;
        } else {
            status.write_back = None;
        }
    }

    /// Forgets what is said of versions that are gone.
    pub(super) fn forget(&self, is_gone: impl Fn(&ModelName, Option<&str>) -> bool) {
        self.status.lock().problems.retain(|(name, version), _| !is_gone(name, version.as_deref()));
    }
}
