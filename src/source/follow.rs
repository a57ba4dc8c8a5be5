//! Follows a source: looks, decides what is new, fetches and verifies it, and publishes it into a mirror.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map::Entry},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::{
    Look, Progress, RemoteFile, RemoteModel, RemoteVersion, Source, SourceError,
    cache::{
        Cache,
        mirror::{Manifest, Mirror, Origin},
    },
    digest,
    local::{MODEL_FILE, TRITON_FILE},
};
use crate::id::{ModelName, Version};

mod status;

pub use status::{Fetching, Followed, Problem, SharedStatus, Status, WrittenBack};

/// How places of models are followed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FollowConfig {
    /// How often a place is looked at, give or take a tenth.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub interval: Duration,
    /// How far looks draw apart while the place does not answer.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_interval: Duration,
}

impl Default for FollowConfig {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10), max_interval: Duration::from_secs(120) }
    }
}

/// Who versions are mirrored for: what they want, and what becomes of it. Asked at every look.
pub trait Interest: Send + Sync {
    /// Which versions of a model are wanted, of those `offered` in ascending order, as its settings (in the folder given)
    /// say.
    fn wanted(&self, folder: &Path, name: &ModelName, offered: &[Version]) -> Vec<Version>;

    /// What becomes of a version that is published.
    fn fate(&self, name: &ModelName, version: &Version) -> Fate;
}

/// What becomes of a published version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nobody uses it. When it is not wanted either, it makes room.
    Idle,
    /// It serves or is about to, or nobody can tell yet that it will not.
    InUse,
    /// It does not serve, whoever wants it: the version before it has to.
    Failed,
}

/// One source and its mirror.
pub struct Follower {
    source: Arc<dyn Source>,
    cache: Arc<Cache>,
    mirror: Mirror,
    config: FollowConfig,
    interest: Box<dyn Interest>,
    status: SharedStatus,
    kick: Option<mpsc::Sender<()>>,
    /// Since when a revision is seen that is not published.
    fresh: BTreeMap<(ModelName, String), (String, Instant)>,
    /// What failed, so that it is not tried at every look.
    failed: BTreeMap<(ModelName, String), Failed>,
    /// Published versions that nobody wants or uses any more, as of the last look.
    unwanted: BTreeSet<(ModelName, String)>,
    /// Since when models and versions are missing or unwanted: once does not count.
    missing: BTreeMap<(ModelName, Option<String>), tokio::time::Instant>,
    /// When the place was asked what it knows of versions, and said nothing.
    unknown: BTreeMap<(ModelName, String), tokio::time::Instant>,
    /// Looks that were answered so far.
    looks: u32,
    /// Whether there was a look at which nothing had to settle.
    settled: bool,
    /// Whether something was fetched that a pointer may have left meanwhile.
    look_again: bool,
    /// The state of the mirror that was told.
    told: Option<u64>,
    /// When the mirror was said to be in use.
    touched: Instant,
}

/// A try that failed.
struct Failed {
    revision: String,
    times: u32,
    /// `None` when the same revision is never tried again.
    again: Option<Instant>,
}

/// How often the log tells how far something has come that takes long.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Bytes of a model's settings, which are read whole.
const MOST_SETTINGS: u64 = 1 << 20;
/// Looks after which a server is ready although something at the place never settles.
const PATIENCE: u32 = 15;
/// How often a place is asked what it knows of a version while it says nothing.
const LINEAGE_INTERVAL: Duration = Duration::from_secs(300);
/// How often a mirror is said to be in use.
const TOUCH_INTERVAL: Duration = Duration::from_secs(3600);
/// Versions of a model that may fail, one after the other, before no older one is fetched for them: it is not the
/// versions then, and there may be hundreds.
const MOST_FAILED: usize = 3;

/// What name the files beside versions go by, where versions have theirs. It is no version.
const BESIDE: &str = "";

impl Follower {
    pub fn new(source: Arc<dyn Source>, mirror: Mirror, config: FollowConfig, interest: Box<dyn Interest>) -> Self {
        let status = SharedStatus::new(source.uri().to_string());
        Self {
            source,
            cache: mirror.cache().clone(),
            mirror,
            config,
            interest,
            status,
            kick: None,
            fresh: BTreeMap::new(),
            failed: BTreeMap::new(),
            unwanted: BTreeSet::new(),
            missing: BTreeMap::new(),
            unknown: BTreeMap::new(),
            looks: 0,
            settled: false,
            look_again: false,
            told: None,
            touched: Instant::now(),
        }
    }

    /// Writes its state where others read it already.
    pub fn with_status(self, status: SharedStatus) -> Self {
        Self { status, ..self }
    }

    /// Tells whenever the mirror may have changed. Who is told looks at everything that there is, so a look that shows
    /// nothing new is not worth a word.
    pub fn telling(self, kick: mpsc::Sender<()>) -> Self {
        Self { kick: Some(kick), ..self }
    }

    /// The repository that it keeps.
    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// What others see of it.
    pub fn status(&self) -> SharedStatus {
        self.status.clone()
    }

    /// Follows until it is cancelled, which may be in the middle of anything: what is fetched by then stays, and what is
    /// published is whole. `mirrored` turns true after the first look of which all that could be fetched is there.
    pub async fn run(mut self, cancel: CancellationToken, mirrored: watch::Sender<bool>) {
        let waker = self.status.waker();
        loop {
            let pause = tokio::select! {
                () = cancel.cancelled() => return,
                pause = self.round(&mirrored) => pause,
            };
            self.tell();
            tokio::select! {
                () = cancel.cancelled() => return,
                () = sleep(pause) => {}
                () = waker.notified() => {}
            }
        }
    }

    /// Says that the mirror may have changed, when it has.
    fn tell(&mut self) {
        let changes = Some(self.status.changes());
        if let Some(kick) = self.kick.as_ref().filter(|_| self.told != changes) {
            self.told = changes;
            // A full channel holds a kick already.
            let _ = kick.try_send(());
        }
    }

    /// One look and what follows from it; how long to wait before the next.
    async fn round(&mut self, mirrored: &watch::Sender<bool>) -> Duration {
        if self.touched.elapsed() >= TOUCH_INTERVAL {
            self.mirror.touch();
            self.touched = Instant::now();
        }
        let look = match self.look().await.and_then(|look| self.plausible(look)) {
            Ok(look) => look,
            Err(error) => {
                let failures = self.status.failed(&error);
                // Said once: the status knows since when.
                if failures == 1 {
                    tracing::warn!(source = %self.source.uri(), %error, "the models' place is out of reach; what runs stays");
                }
                let pause = backed_off(self.config.interval, self.config.max_interval, failures);
                return jittered(error.retry_after().map_or(pause, |wanted| wanted.max(pause)));
            }
        };
        if let Some(since) = self.status.answered(&look) {
            tracing::info!(source = %self.source.uri(), away = ?since, "the models' place answers again");
        }
        let settled = self.follow(&look).await;
        self.looks = self.looks.saturating_add(1);
        self.settled |= settled;
        if settled || self.looks >= PATIENCE {
            self.status.settled();
            mirrored.send_replace(true);
        }
        if std::mem::take(&mut self.look_again) {
            return Duration::ZERO;
        }
        jittered(if settled { self.config.interval } else { self.source.settle_time().min(self.config.interval) })
    }

    /// What there is, unless its host has asked anybody to be left alone.
    async fn look(&self) -> Result<Look, SourceError> {
        let (patience, uri) = (&self.cache.patience, self.source.uri());
        patience.check(uri)?;
        self.source.look().await.inspect_err(|error| patience.heed(uri, error))
    }

    /// The look, unless it shows nothing of what there was: a prefix mistyped in a policy, or a bucket that somebody
    /// empties to fill it anew, is no reason to stop serving everything.
    fn plausible(&self, look: Look) -> Result<Look, SourceError> {
        let published = self.mirror.published()?;
        if !published.is_empty() && !published.keys().any(|name| look.models.contains_key(name)) {
            let (place, what) = (self.source.uri().to_string(), "any model".to_owned());
            return Err(SourceError::NotFound { place, what });
        }
        Ok(look)
    }

    /// Publishes what is new, takes out what is gone. Whether nothing has to settle yet.
    async fn follow(&mut self, look: &Look) -> bool {
        let mut settled = true;
        self.unwanted.clear();
        for (name, model) in &look.models {
            settled &= self.follow_model(name, model).await;
        }
        if let Err(error) = self.withdraw(look) {
            tracing::error!(source = %self.source.uri(), %error, "what is gone there cannot be removed here");
        }
        let there: BTreeMap<&ModelName, HashSet<&str>> =
            look.models.iter().map(|(name, model)| (name, versions_of(model))).collect();
        let is_there = |name: &ModelName, version: &str| {
            there.get(name).is_some_and(|versions| version == BESIDE || versions.contains(version))
        };
        self.fresh.retain(|(name, version), _| is_there(name, version));
        self.failed.retain(|(name, version), _| is_there(name, version));
        self.unknown.retain(|(name, version), _| is_there(name, version));
        self.status.forget(|name, version| !is_there(name, version.unwrap_or(BESIDE)));
        settled
    }

    async fn follow_model(&mut self, name: &ModelName, model: &RemoteModel) -> bool {
        let mut settled = true;
        // Settings first: they say which versions are wanted, and hold for those.
        let key = (name.clone(), BESIDE.to_owned());
        let revision = revision_of(&model.beside);
        if self.is_due(&key, &revision, &mut settled) {
            let result = self.publish_beside(name, &model.beside).await;
            self.note(&key, None, &revision, result.map(|_| ()));
        }
        // What is never taken leaves the version before it wanted, and so does what fails to load, as in a folder.
        let is_hopeless = |remote: &&RemoteVersion| {
            let failed = self.failed.get(&(name.clone(), remote.version.to_string()));
            failed.is_some_and(|failed| failed.revision == remote.revision && failed.again.is_none())
        };
        let has_failed = |remote: &&RemoteVersion| {
            let published = self.mirror.manifest(name, &remote.version);
            published.is_some_and(|manifest| manifest.revision == remote.revision)
                && self.interest.fate(name, &remote.version) == Fate::Failed
        };
        let hopeful: Vec<&RemoteVersion> = model.versions.iter().filter(|remote| !is_hopeless(remote)).collect();
        let sound: Vec<&RemoteVersion> = hopeful.iter().copied().filter(|remote| !has_failed(remote)).collect();
        let [hopeful, offered] = [hopeful, sound]
            .map(|list| list.into_iter().map(|remote| remote.version.clone()).collect::<Vec<Version>>());
        let folder = self.mirror.models().join(name.as_str());
        let mut came = Vec::new();
        let mut wanted = self.interest.wanted(&folder, name, &offered);
        if hopeful.len() - offered.len() >= MOST_FAILED {
            let sound: HashSet<&Version> = offered.iter().collect();
            let newest_failed = hopeful.iter().rposition(|version| !sound.contains(version));
            let places: HashMap<&Version, usize> = hopeful.iter().enumerate().map(|(at, one)| (one, at)).collect();
            wanted.retain(|version| {
                places.get(version).copied() > newest_failed || self.mirror.manifest(name, version).is_some()
            });
        }
        wanted.extend(model.default.clone());
        let is_wanted: HashSet<Version> = wanted.iter().cloned().collect();
        for remote in &model.versions {
            let published = self.mirror.manifest(name, &remote.version);
            let stale = published.as_ref().is_some_and(|manifest| manifest.revision != remote.revision);
            if published.is_some() && !stale || published.is_none() && !is_wanted.contains(&remote.version) {
                continue;
            }
            let key = (name.clone(), remote.version.to_string());
            if self.is_due(&key, &remote.revision, &mut settled) {
                let result = self.publish(name, remote).await;
                // What did not arrive, or has no room yet, may be read the next time.
                if result.as_ref().err().is_none_or(is_over) {
                    self.source.done(remote);
                }
                let result = result.map(|manifest| {
                    came.push(remote.version.clone());
                    if manifest.lineage.is_none() {
                        self.unknown.insert(key.clone(), tokio::time::Instant::now());
                    }
                    let digest = manifest.digest;
                    tracing::info!(model = %name, version = %remote.version, digest, "mirrored");
                });
                let is_replaced = stale && result.is_ok();
                self.note(&key, Some(&remote.version), &remote.revision, result);
                if is_replaced {
                    // What serves is of older files now, and nobody knows yet.
                    self.tell();
                }
            }
        }
        let selected = self.interest.wanted(&folder, name, &hopeful);
        self.note_unwanted(name, model, &wanted, &selected);
        let pointed =
            model.default.as_ref().and_then(|version| model.versions.iter().find(|it| it.version == *version));
        match pointed {
            // It may have taken long to fetch, and the pointer be elsewhere by now. That look asks for names, too.
            Some(remote) if came.contains(&remote.version) => {
                self.look_again = true;
                return false;
            }
            Some(remote) => {
                if self.point(name, remote) {
                    // It serves without what is said of it.
                    self.tell();
                }
                self.learn(name, remote).await;
            }
            None => {}
        }
        self.rename(name, model).await;
        settled
    }

    /// Asks what the place knows of a version that it points at, when nobody could tell while it was mirrored.
    async fn learn(&mut self, name: &ModelName, remote: &RemoteVersion) {
        let key = (name.clone(), remote.version.to_string());
        let was_asked = self.unknown.get(&key).is_some_and(|asked| asked.elapsed() < LINEAGE_INTERVAL);
        let is_unknown = |manifest: &Manifest| manifest.revision == remote.revision && manifest.lineage.is_none();
        if was_asked
            || !self.mirror.manifest(name, &remote.version).as_ref().is_some_and(is_unknown)
            || self.cache.patience.check(self.source.uri()).is_err()
        {
            return;
        }
        let found = self.source.lineage(name, remote).await;
        let learned = found.and_then(|found| match found {
            Some(lineage) => self.mirror.learn(name, &remote.version, lineage),
            None => Ok(false),
        });
        match learned {
            Ok(true) => {
                self.unknown.remove(&key);
                tracing::info!(model = %name, version = %remote.version, "its lineage is known now");
                return;
            }
            Ok(false) => {}
            Err(error) => {
                self.cache.patience.heed(self.source.uri(), &error);
                tracing::debug!(model = %name, version = %remote.version, %error, "its lineage is still not known");
            }
        }
        self.unknown.insert(key, tokio::time::Instant::now());
    }

    /// Writes down what the place calls its versions now. Without an answer they keep those that they had.
    async fn rename(&self, name: &ModelName, model: &RemoteModel) {
        let named = self.source.names(name, model).await;
        let renamed = named.and_then(|names| names.map_or(Ok(0), |names| self.mirror.rename(name, &names)));
        match renamed {
            Ok(0) => {}
            Ok(renamed) => tracing::info!(model = %name, renamed, "versions have other names at their place now"),
            Err(error) => tracing::debug!(model = %name, %error, "versions may have other names at their place now"),
        }
    }

    /// Has the mirror's pointer follow the one at the place, as soon as the version that it points at is here. Whether it
    /// pointed elsewhere.
    fn point(&self, name: &ModelName, remote: &RemoteVersion) -> bool {
        let version = &remote.version;
        if self.mirror.manifest(name, version).is_none_or(|manifest| manifest.revision != remote.revision) {
            return false;
        }
        let pointed = self.mirror.point(name, version);
        if !matches!(pointed, Ok(false)) {
            self.status.changed();
        }
        match &pointed {
            Ok(true) => tracing::info!(model = %name, %version, "is what the models' place points at"),
            Ok(false) => {}
            Err(error) => tracing::error!(model = %name, %version, %error, "the pointer cannot be moved here"),
        }
        matches!(pointed, Ok(true))
    }

    /// Notes which versions make room: nobody uses them, and all that are wanted are here. Those that were `selected` and
    /// are not `wanted` have failed; as long as others stand in for them, it is remembered of all that did.
    fn note_unwanted(&mut self, name: &ModelName, model: &RemoteModel, wanted: &[Version], selected: &[Version]) {
        let is_here = |version: &Version| self.mirror.manifest(name, version).is_some();
        // What a pointer has pointed at is what one goes back to.
        if !self.settled || model.default.is_some() || !wanted.iter().all(is_here) {
            return;
        }
        let [wanted, selected] = [wanted, selected].map(|list| list.iter().collect::<HashSet<&Version>>());
        let stood_in_for = selected.iter().any(|version| !wanted.contains(version));
        let is_unwanted = |version: &&Version| {
            !wanted.contains(version)
                && !selected.contains(version)
                && is_here(version)
                && match self.interest.fate(name, version) {
                    Fate::Idle => true,
                    Fate::InUse => false,
                    Fate::Failed => !stood_in_for,
                }
        };
        let unwanted = model.versions.iter().map(|remote| &remote.version).filter(is_unwanted);
        self.unwanted.extend(unwanted.map(|version| (name.clone(), version.to_string())));
    }

    /// Whether it is time to fetch this revision: it has settled, and did not fail a moment ago.
    fn is_due(&mut self, key: &(ModelName, String), revision: &str, settled: &mut bool) -> bool {
        if key.1 == BESIDE && self.mirror_has_beside(&key.0, revision) {
            return false;
        }
        if let Some(failed) = self.failed.get(key).filter(|failed| failed.revision == revision)
            && failed.again.is_none_or(|again| Instant::now() < again)
        {
            return false;
        }
        let since = match self.fresh.entry(key.clone()) {
            Entry::Occupied(entry) if entry.get().0 == revision => entry.get().1,
            entry => {
                let now = Instant::now();
                entry.insert_entry((revision.to_owned(), now));
                now
            }
        };
        let due = since.elapsed() >= self.source.settle_time();
        *settled &= due;
        due
    }

    fn mirror_has_beside(&self, name: &ModelName, revision: &str) -> bool {
        self.mirror.beside_revision(name).as_deref() == Some(revision)
    }

    /// Remembers how a try ended.
    fn note(
        &mut self,
        key: &(ModelName, String),
        version: Option<&Version>,
        revision: &str,
        result: Result<(), SourceError>,
    ) {
        let shown = version.map_or("settings", Version::as_str);
        match result {
            Ok(()) => {
                self.failed.remove(key);
                self.fresh.remove(key);
                self.status.fetched(&key.0, version, None);
            }
            Err(error) => {
                self.cache.patience.heed(self.source.uri(), &error);
                let before = self.failed.get(key).filter(|failed| failed.revision == revision);
                let times = before.map_or(0, |failed| failed.times) + 1;
                let pause = backed_off(self.config.interval, self.config.max_interval, times);
                let pause = error.retry_after().map_or(pause, |wanted| wanted.max(pause));
                let again = error.passes().then(|| Instant::now() + jittered(pause));
                tracing::warn!(model = %key.0, version = shown, times, %error, "not mirrored");
                self.failed.insert(key.clone(), Failed { revision: revision.to_owned(), times, again });
                self.status.fetched(&key.0, version, Some(&error));
            }
        }
    }

    async fn publish(&self, name: &ModelName, remote: &RemoteVersion) -> Result<Manifest, SourceError> {
        self.cache.patience.check(self.source.uri())?;
        if let Some(progress) = self.source.preparing() {
            self.status.fetching(name, Some(&remote.version), progress);
        }
        let files = self.source.artifact(name, remote).await?;
        // Asked meanwhile, so that nothing waits for the answer.
        let asked = async {
            let found = self.source.lineage(name, remote).await;
            Ok(found.unwrap_or_else(|error| {
                tracing::warn!(model = %name, version = %remote.version, %error, "nothing is known of its lineage");
                None
            }))
        };
        let (staged, lineage) = tokio::try_join!(self.fetch(name, Some(&remote.version), &files), asked)?;
        let origin = Origin { uri: self.source.uri(), revision: &remote.revision, lineage };
        self.mirror.publish(name, &remote.version, staged, origin)
    }

    async fn publish_beside(&self, name: &ModelName, files: &[RemoteFile]) -> Result<bool, SourceError> {
        let is_settings = |file: &&RemoteFile| [MODEL_FILE, TRITON_FILE].contains(&file.path.as_str());
        if let Some(file) = files.iter().filter(is_settings).find(|file| file.size > MOST_SETTINGS) {
            let reason = format!("settings of {} bytes; at most {MOST_SETTINGS} are read", file.size);
            return Err(SourceError::Refused { file: file.path.clone(), reason });
        }
        let staged = self.fetch(name, None, files).await?;
        self.mirror.publish_beside(name, &staged, &revision_of(files))
    }

    /// Fetches files, one after the other, each over several connections.
    async fn fetch(
        &self,
        name: &ModelName,
        version: Option<&Version>,
        files: &[RemoteFile],
    ) -> Result<super::cache::mirror::Staged, SourceError> {
        super::cache::check_list(files)?;
        let _reserved = self.cache.make_room_for(self.source.as_ref(), files)?;
        let fetched = Arc::new(AtomicU64::new(0));
        let total = files.iter().map(|file| file.size).fold(0, u64::saturating_add);
        self.status.fetching(name, version, Arc::new(Progress { total: total.into(), fetched: fetched.clone() }));
        let mut staged = self.mirror.stage()?;
        let version = version.map(Version::as_str);
        let fetching = async {
            for file in files {
                let blob = self.cache.fetch(&self.source, file, &fetched).await?;
                staged.add(&file.path, &blob)?;
            }
            Ok(staged)
        };
        let tell = || {
            let fetched = fetched.load(Ordering::Relaxed);
            tracing::info!(model = %name, version, fetched_bytes = fetched, total_bytes = total, "is being fetched");
        };
        let staged = telling(fetching, tell).await?;
        let bytes = fetched.load(Ordering::Relaxed);
        tracing::debug!(model = %name, version, files = files.len(), bytes, "fetched");
        Ok(staged)
    }

    /// Takes out what no look has shown, or nobody wanted, for half an interval.
    fn withdraw(&mut self, look: &Look) -> Result<(), SourceError> {
        let mut missing = Vec::new();
        for (name, versions) in self.mirror.published()? {
            match look.models.get(&name) {
                None => missing.push((name, None)),
                Some(model) => {
                    let there = versions_of(model);
                    let mut gone: Vec<String> =
                        versions.into_keys().filter(|version| !there.contains(version.as_str())).collect();
                    if model.default.is_some() {
                        self.spare_pointed_at(&name, &mut gone)?;
                    }
                    missing.extend(gone.into_iter().map(|version| (name.clone(), Some(version))));
                }
            }
        }
        // Much may have been fetched since they were noted.
        self.unwanted.retain(|(name, version)| {
            Version::parse(version).is_ok_and(|version| self.interest.fate(name, &version) != Fate::InUse)
        });
        missing.extend(self.unwanted.iter().map(|(name, version)| (name.clone(), Some(version.clone()))));
        let now = tokio::time::Instant::now();
        let since = |gone: &(ModelName, Option<String>)| self.missing.get(gone).copied().unwrap_or(now);
        self.missing = missing.into_iter().map(|gone| (gone.clone(), since(&gone))).collect();
        let enough = self.config.interval / 2;
        for gone in self.missing.iter().filter(|(_, since)| now - **since >= enough).map(|(gone, _)| gone) {
            let withdrawn = match gone {
                (name, None) => self.mirror.withdraw_model(name),
                (name, Some(version)) => {
                    let version = Version::parse(version)
                        .map_err(|error| SourceError::Disk { what: name.to_string(), reason: error.message })?;
                    self.mirror.withdraw(name, &version)
                }
            };
            // Also when half of it is gone.
            self.status.changed();
            withdrawn?;
            let unwanted =
                gone.1.as_ref().is_some_and(|version| self.unwanted.contains(&(gone.0.clone(), version.clone())));
            let why = if unwanted { "nobody wants it any more" } else { "gone from its place" };
            tracing::info!(model = %gone.0, version = gone.1, why, "no longer mirrored");
        }
        Ok(())
    }

    /// Leaves out of `gone` what a pointer that has moved on pointed at: what is in use, and what it pointed at last, which is
    /// what one goes back to.
    fn spare_pointed_at(&self, name: &ModelName, gone: &mut Vec<String>) -> Result<(), SourceError> {
        let parsed = |version: &String| Version::parse(version).ok();
        let pointer = self.mirror.pointer(name)?;
        let last = gone.iter().max_by_key(|version| parsed(version).and_then(|it| pointer.place(&it))).cloned();
        // What has failed to load may do so later, and cannot be fetched again.
        let in_use = |version: &String| parsed(version).is_some_and(|it| self.interest.fate(name, &it) != Fate::Idle);
        gone.retain(|version| Some(version) != last.as_ref() && !in_use(version));
        Ok(())
    }
}

/// The versions of a model at its place, by name.
fn versions_of(model: &RemoteModel) -> HashSet<&str> {
    model.versions.iter().map(|remote| remote.version.as_str()).collect()
}

/// What stands for files as the place tells of them.
fn revision_of(files: &[RemoteFile]) -> String {
    let mut texts: Vec<[String; 4]> = files
        .iter()
        .map(|file| {
            let digest = file.digest.map(|digest| digest.to_string()).unwrap_or_default();
            [file.path.clone(), file.size.to_string(), digest, file.pin.clone().unwrap_or_default()]
        })
        .collect();
    texts.sort_unstable();
    digest::of_texts(&texts.iter().flatten().map(String::as_str).collect::<Vec<_>>())
}

/// Whether nothing that was read of a version is of use to another try.
fn is_over(error: &SourceError) -> bool {
    !error.passes() || matches!(error, SourceError::Corrupt { .. } | SourceError::Changed { .. })
}

/// Twice as long after each failure, up to `most`.
pub(super) fn backed_off(interval: Duration, most: Duration, failures: u32) -> Duration {
    interval.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(most.max(interval))
}

/// Give or take a tenth, so that servers that were started together do not look together.
pub(super) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.9..1.1))
}

/// Does `work`, and has its progress told from time to time until it is done.
async fn telling<T>(work: impl Future<Output = T>, tell: impl Fn()) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = sleep(PROGRESS_INTERVAL) => tell(),
        }
    }
}

#[cfg(test)]
mod tests;
