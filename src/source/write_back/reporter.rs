//! `Reporter`: keeps a registry up to date on the models that come from it, beside the one who follows it.
//!
//! It compares what is to be said with what was said, so that a failure costs another try and nothing else. What fails is
//! tried again after a pause that grows, each version by itself: one that nobody may write to holds up no other. Only a
//! place that does not answer, or wants fewer calls, is left alone with all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Measured, Moved, Promotion, Record, Recorder, Served, Teller, Told, WriteBack};
use crate::{
    id::{ModelName, Version},
    source::{
        Source, SourceError,
        follow::{FollowConfig, SharedStatus, backed_off, jittered},
    },
};

/// How often what is to be said is compared with what was.
const PAUSE: Duration = Duration::from_secs(1);
/// The same while nothing is to be said: of a hundred models that would be a hundred times a second.
const IDLE_PAUSE: Duration = Duration::from_secs(10);
/// What a registry gets to take what is left to say when the server stops.
const LAST_TRY: Duration = Duration::from_secs(2);
/// Tries after which nothing more is said of a version that is gone: a quarter of an hour with the usual pauses.
const MOST_TRIES: u32 = 10;
/// The state of a version that was served and is no longer known.
const UNLOADED: &str = "unloaded";

/// Who writes back.
pub struct Reporter {
    source: Arc<dyn Source>,
    teller: Box<dyn Teller>,
    status: SharedStatus,
    config: FollowConfig,
    away: Mutex<Option<Away>>,
}

/// A place that does not answer, or wants fewer calls.
#[derive(Clone, Copy)]
struct Away {
    /// How often in a row it did.
    times: u32,
    until: Instant,
    /// Whether all that had not failed was tried since: then what had may be, so that one call that always fails holds up
    /// no other.
    is_over: bool,
}

/// What became of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Written,
    /// It was there already, or is somebody else's to say.
    Unchanged,
    /// Credentials are missing, or give no right to.
    Denied,
    Failed,
}

impl Outcome {
    pub const ALL: [Self; 4] = [Self::Written, Self::Unchanged, Self::Denied, Self::Failed];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Unchanged => "unchanged",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

/// What was said of a model. Bounded by the versions that it has.
#[derive(Default)]
struct Known {
    /// As they were told last.
    settings: WriteBack,
    versions: BTreeMap<String, KnownVersion>,
    promotion: Saying<Promotion>,
    /// A promotion that was tried to be said.
    owed: Option<Promotion>,
}

struct KnownVersion {
    record: Saying<Record>,
    /// What it had done by the last look.
    latest: Served,
    /// What it did until then that the place was not told.
    owed: Served,
    /// What the place may have been told: the same is told again until it says so, and it counts that once.
    telling: Option<Measured>,
    /// When it is told next.
    next: Instant,
    measured: Saying<()>,
}

/// One thing that is said again and again.
struct Saying<T> {
    /// What the place was told last.
    said: Option<T>,
    failed: Option<Failed>,
}

struct Failed {
    times: u32,
    since: SystemTime,
    again: Instant,
    error: String,
}

impl Reporter {
    pub fn new(source: Arc<dyn Source>, teller: Box<dyn Teller>, status: SharedStatus, config: FollowConfig) -> Self {
        Self { source, teller, status, config, away: Mutex::default() }
    }

    /// Writes back as `run` does, but by itself: when that goes wrong, it ends nothing else, and the status says so.
    pub async fn run_apart(self, cancel: CancellationToken) {
        let status = self.status.clone();
        if let Err(error) = tokio::spawn(self.run(cancel)).await {
            let reason = format!("writing back panicked: {error}");
            tracing::error!(
                place = status.read().uri,
                reason,
                "nothing is written back, until the server is started anew"
            );
            status.write_back_stands(true, Some((SystemTime::now(), reason)));
        }
    }

    /// Writes back until it is cancelled, and then once more, for a moment: what was served since, and what had failed, if
    /// that is due.
    pub async fn run(self, cancel: CancellationToken) {
        if self.source.recorder().is_none() {
            return;
        }
        let mut models = BTreeMap::new();
        let working = async {
            loop {
                self.round(&mut models, false).await;
                // Once it is known what is there, and nothing of it is to be told, there is no hurry.
                let is_idle = models.is_empty() && !self.status.models().is_empty();
                sleep(if is_idle { IDLE_PAUSE } else { PAUSE }).await;
            }
        };
        let _: Option<()> = cancel.run_until_cancelled(working).await;
        if timeout(LAST_TRY, self.round(&mut models, true)).await.is_err() {
            tracing::warn!(source = %self.source.uri(), "what was served last is not written back: it took too long");
        }
    }

    /// Says what is not said yet.
    async fn round(&self, models: &mut BTreeMap<ModelName, Known>, is_last: bool) {
        let Some(recorder) = self.source.recorder() else { return };
        let was_over = self.away.lock().is_some_and(|away| away.until <= Instant::now());
        let shown: BTreeSet<ModelName> = self.status.models().into_iter().collect();
        let names: BTreeSet<ModelName> = shown.iter().chain(models.keys()).cloned().collect();
        for name in names {
            let told = match (self.teller.told(&name), models.get(&name)) {
                (Some(told), _) => told,
                // It is gone, and so are its versions; of a server that stops that would be said too soon.
                (None, Some(known)) => {
                    let settings = WriteBack { tags: known.settings.tags && !is_last, ..known.settings.clone() };
                    Told { settings, ..Told::default() }
                }
                (None, None) => continue,
            };
            if told.settings.is_off() {
                models.remove(&name);
                continue;
            }
            let known = models.entry(name.clone()).or_default();
            known.settings = told.settings.clone();
            self.say_all(recorder, &name, &told, known, is_last).await;
            if known.versions.is_empty() && !shown.contains(&name) {
                models.remove(&name);
            }
        }
        if let Some(away) = self.away.lock().as_mut().filter(|away| was_over && away.until <= Instant::now()) {
            away.is_over = true;
        }
        let failed = models.values().flat_map(Known::failed).min_by_key(|failed| failed.since);
        self.status.write_back_stands(!models.is_empty(), failed.map(|failed| (failed.since, failed.error.clone())));
    }

    async fn say_all(&self, recorder: &dyn Recorder, name: &ModelName, told: &Told, known: &mut Known, is_last: bool) {
        match known.next_promotion(told) {
            Some(promotion) if known.promotion.is_due(&promotion) && !self.is_away(known.promotion.failed.as_ref()) => {
                known.owed = Some(promotion.clone());
                let result = match recorder.promote(&promotion).await {
                    // Of a version that was deleted there, nothing is to be said.
                    Err(SourceError::NotFound { what, .. }) => {
                        tracing::debug!(model = %name, what, "is gone, and no alias is moved");
                        Ok(Moved::Unchanged)
                    }
                    result => result,
                };
                if result.is_ok() {
                    known.owed = None;
                }
                let result = result.map(|moved| self.moved(name, &promotion, moved));
                let to = promotion.to.clone();
                self.note(&mut known.promotion, promotion, result, (name, to.as_str()));
            }
            Some(_) => {}
            None => (known.owed, known.promotion.failed) = (None, None),
        }
        let gone: Vec<String> =
            known.versions.keys().filter(|version| !told.records.contains_key(*version)).cloned().collect();
        let unloaded = Record { state: Some(UNLOADED.to_owned()), ..Record::default() };
        let wanted = told.records.clone().into_iter();
        for (text, record) in wanted.chain(gone.iter().map(|version| (version.clone(), unloaded.clone()))) {
            let Ok(version) = Version::parse(&text) else { continue };
            let interval = told.settings.metrics_interval;
            let one = known.versions.entry(text.clone()).or_insert_with(|| KnownVersion {
                record: Saying::default(),
                latest: Served::default(),
                owed: Served::default(),
                telling: None,
                next: Instant::now() + interval,
                measured: Saying::default(),
            });
            if told.settings.tags {
                let record = record.over(one.record.said.as_ref().unwrap_or(&Record::default()));
                self.record(recorder, (name, &version), record, one).await;
            } else {
                one.record = Saying::default();
            }
            if told.settings.metrics {
                self.measure(recorder, (name, &version), one, interval, is_last).await;
            } else {
                (one.owed, one.telling, one.measured) = (Served::default(), None, Saying::default());
            }
            if gone.contains(&text) && (one.is_all_said(told.settings.tags) || one.is_hopeless()) {
                known.versions.remove(&text);
            }
        }
    }

    async fn record(
        &self,
        recorder: &dyn Recorder,
        (name, version): (&ModelName, &Version),
        record: Record,
        one: &mut KnownVersion,
    ) {
        if record == Record::default() || !one.record.is_due(&record) || self.is_away(one.record.failed.as_ref()) {
            return;
        }
        let result = match recorder.record(version, &record).await {
            Ok(true) => Ok(Outcome::Written),
            Ok(false) => Ok(Outcome::Unchanged),
            // Of a version that was deleted there, nothing is to be said.
            Err(SourceError::NotFound { what, .. }) => {
                tracing::debug!(model = %name, %version, what, "is gone, and gets no tags");
                Ok(Outcome::Unchanged)
            }
            Err(error) => Err(error),
        };
        self.note(&mut one.record, record, result, (name, version.as_str()));
    }

    async fn measure(
        &self,
        recorder: &dyn Recorder,
        (name, version): (&ModelName, &Version),
        one: &mut KnownVersion,
        interval: Duration,
        is_last: bool,
    ) {
        let served = self.teller.served(name, version.as_str());
        let is_gone = served.is_none();
        if let Some(served) = served {
            one.owed.add(&served.since(&one.latest));
            one.latest = served;
        }
        loop {
            let now = Instant::now();
            // Somebody may have shortened the interval.
            one.next = one.next.min(now + interval);
            if one.telling.is_none() {
                // Of one that is gone, no more comes.
                if now < one.next && !is_last && !is_gone {
                    return;
                }
                if one.owed.requests == 0 {
                    one.next = now + interval;
                    return;
                }
            }
            if !one.measured.may_try() || self.is_away(one.measured.failed.as_ref()) {
                return;
            }
            let owed = &mut one.owed;
            let fresh = || Measured { served: std::mem::take(owed), until: SystemTime::now(), interval };
            let result = recorder.measured(version, one.telling.get_or_insert_with(fresh)).await;
            let result = match result {
                Ok(()) => Ok(Outcome::Written),
                // Without a run there is nowhere to say it.
                Err(SourceError::NotFound { what, .. }) => {
                    tracing::debug!(model = %name, %version, what, "is not there, and gets no metrics");
                    Ok(Outcome::Unchanged)
                }
                Err(error) => Err(error),
            };
            if result.is_ok() {
                (one.telling, one.next) = (None, now + interval);
            }
            self.note(&mut one.measured, (), result, (name, version.as_str()));
        }
    }

    /// What it means that an alias was moved or not.
    fn moved(&self, name: &ModelName, promotion: &Promotion, moved: Moved) -> Outcome {
        let Promotion { alias, rollout, from, to, is_undone } = promotion;
        let target = if *is_undone { from } else { to };
        let (outcome, said) = match moved {
            Moved::Unchanged => return Outcome::Unchanged,
            Moved::Written => {
                tracing::info!(model = %name, alias, version = %target, rollout, "the alias was moved");
                (Outcome::Written, format!("alias '{alias}' was set to version {target} by {rollout}"))
            }
            Moved::LeftAlone(place) => {
                let said = format!(
                    "alias '{alias}' was not set to version {target} by {rollout}: somebody else has moved it \
                     meanwhile, {place}"
                );
                tracing::warn!(model = %name, said, "the alias is left alone");
                (Outcome::Unchanged, said)
            }
        };
        self.status.alias_moved(said);
        outcome
    }

    /// Whether the place is to be left alone, with what has failed before or with what has not.
    fn is_away(&self, failed: Option<&Failed>) -> bool {
        self.away.lock().is_some_and(|away| away.until > Instant::now() || (failed.is_some() && !away.is_over))
    }

    /// Remembers how a try ended.
    fn note<T>(
        &self,
        saying: &mut Saying<T>,
        wanted: T,
        result: Result<Outcome, SourceError>,
        (name, version): (&ModelName, &str),
    ) {
        match result {
            Ok(outcome) => {
                self.status.wrote_back(outcome);
                *self.away.lock() = None;
                if saying.failed.take().is_some() {
                    tracing::info!(model = %name, version, "can be written back again");
                }
                saying.said = Some(wanted);
            }
            Err(error) => {
                let denied = matches!(error, SourceError::Denied { .. });
                self.status.wrote_back(if denied { Outcome::Denied } else { Outcome::Failed });
                let (times, since) =
                    saying.failed.as_ref().map_or((1, SystemTime::now()), |failed| (failed.times + 1, failed.since));
                // Said once: the status knows since when.
                if times == 1 {
                    tracing::warn!(model = %name, version, %error, "not written back; it is tried again");
                }
                let is_away = matches!(error, SourceError::Unavailable { .. } | SourceError::Limited { .. });
                let mut away = self.away.lock();
                let tried = away.filter(|_| is_away).map_or(times, |away| times.max(away.times + 1));
                let pause = backed_off(self.config.interval, self.config.max_interval, tried);
                let pause = error.retry_after().map_or(pause, |wanted| wanted.max(pause));
                let again = Instant::now() + jittered(pause);
                *away = is_away.then_some(Away { times: tried, until: again, is_over: false });
                let error = error.to_string();
                self.status.not_written_back(since, &error);
                saying.failed = Some(Failed { times, since, again, error });
            }
        }
    }
}

impl Known {
    /// What is to be said of an alias now: what is owed comes before what begins where that ends. Nobody would else find
    /// the alias where the next rollout began.
    fn next_promotion(&self, told: &Told) -> Option<Promotion> {
        told.settings.promoted_alias.as_ref()?;
        let owed = self.owed.as_ref().filter(|owed| match &told.promotion {
            None => !owed.is_undone,
            Some(next) => !owed.is_undone && next.rollout != owed.rollout && next.from == owed.to,
        });
        owed.or(told.promotion.as_ref()).cloned()
    }

    fn failed(&self) -> impl Iterator<Item = &Failed> {
        let versions = self.versions.values();
        let of_versions = versions.flat_map(|one| [one.record.failed.as_ref(), one.measured.failed.as_ref()]);
        self.promotion.failed.iter().chain(of_versions.flatten())
    }
}

impl KnownVersion {
    /// Whether the place has refused for long enough to be told of one that is gone.
    fn is_hopeless(&self) -> bool {
        let has = |failed: &Option<Failed>| failed.as_ref().is_some_and(|failed| failed.times >= MOST_TRIES);
        has(&self.record.failed) || has(&self.measured.failed)
    }

    /// Whether the place knows what there was to say.
    fn is_all_said(&self, tags: bool) -> bool {
        let is_recorded =
            !tags || self.record.said.as_ref().is_some_and(|said| said.state.as_deref() == Some(UNLOADED));
        is_recorded && self.record.failed.is_none() && self.telling.is_none() && self.owed.requests == 0
    }
}

impl<T> Default for Saying<T> {
    fn default() -> Self {
        Self { said: None, failed: None }
    }
}

impl<T> Saying<T> {
    /// Whether it did not fail a moment ago.
    fn may_try(&self) -> bool {
        self.failed.as_ref().is_none_or(|failed| failed.again <= Instant::now())
    }
}

impl<T: PartialEq> Saying<T> {
    fn is_due(&self, wanted: &T) -> bool {
        (self.said.as_ref() != Some(wanted) || self.failed.is_some()) && self.may_try()
    }
}

#[cfg(test)]
mod tests;
