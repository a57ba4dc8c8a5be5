//! `Reporter`: keeps a registry up to date on the models that come from it, beside the one who follows it.
//!
//! It compares what is to be said with what was said, so that a failure costs another try and nothing else. What fails is
//! tried again after a pause that grows, each version by itself: one that nobody may write to holds up no other.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Measured, Moved, Promotion, Record, Recorder, Served, Teller, Told};
use crate::{
    id::{ModelName, Version},
    source::{
        Source, SourceError,
        follow::{FollowConfig, SharedStatus, backed_off, jittered},
    },
};

/// How often what is to be said is compared with what was.
const PAUSE: Duration = Duration::from_secs(1);
/// What a registry gets to take what is left to say when the server stops.
const LAST_TRY: Duration = Duration::from_secs(2);
/// The state of a version that was served and is no longer known.
const UNLOADED: &str = "unloaded";

/// Who writes back.
pub struct Reporter {
    source: Arc<dyn Source>,
    teller: Box<dyn Teller>,
    status: SharedStatus,
    config: FollowConfig,
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
    versions: BTreeMap<String, KnownVersion>,
    promotion: Saying<Promotion>,
}

struct KnownVersion {
    record: Saying<Record>,
    /// What it had done by the last time that it was told.
    served: Served,
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
        Self { source, teller, status, config }
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
                sleep(PAUSE).await;
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
        for name in self.status.models() {
            let Some(told) = self.teller.told(&name) else { continue };
            if told.settings.is_off() {
                models.remove(&name);
                continue;
            }
            let known = models.entry(name.clone()).or_default();
            self.say_all(recorder, &name, &told, known, is_last).await;
        }
        let failed = models.values().flat_map(Known::failed).min_by_key(|failed| failed.since);
        self.status.write_back_stands(!models.is_empty(), failed.map(|failed| (failed.since, failed.error.clone())));
    }

    async fn say_all(&self, recorder: &dyn Recorder, name: &ModelName, told: &Told, known: &mut Known, is_last: bool) {
        match &told.promotion {
            Some(promotion) if known.promotion.is_due(promotion) => {
                let result = recorder.promote(promotion).await;
                let result = result.map(|moved| self.moved(name, promotion, moved));
                self.note(&mut known.promotion, promotion.clone(), result, (name, promotion.to.as_str()));
            }
            Some(_) => {}
            None => known.promotion.failed = None,
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
                served: Served::default(),
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
                one.measured = Saying::default();
            }
            // What could be said of it is said.
            if gone.contains(&text) && one.record.failed.is_none() {
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
        if record == Record::default() || !one.record.is_due(&record) {
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
        let now = Instant::now();
        // Somebody may have shortened the interval.
        one.next = one.next.min(now + interval);
        if (now < one.next && !is_last) || !one.measured.may_try() {
            return;
        }
        let Some(served) = self.teller.served(name, version.as_str()) else { return };
        let measured = Measured { served: served.since(&one.served), until: SystemTime::now(), interval };
        if measured.served.requests == 0 {
            (one.served, one.next) = (served, now + interval);
            return;
        }
        let result = recorder.measured(version, &measured).await;
        // After a failure, the next try is of all that came until then.
        if result.is_ok() {
            (one.served, one.next) = (served, now + interval);
        }
        let result = result.map(|()| Outcome::Written);
        self.note(&mut one.measured, (), result, (name, version.as_str()));
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
                let pause = backed_off(self.config.interval, self.config.max_interval, times);
                let pause = error.retry_after().map_or(pause, |wanted| wanted.max(pause));
                let again = Instant::now() + jittered(pause);
                saying.failed = Some(Failed { times, since, again, error: error.to_string() });
            }
        }
    }
}

impl Known {
    fn failed(&self) -> impl Iterator<Item = &Failed> {
        let versions = self.versions.values();
        let of_versions = versions.flat_map(|one| [one.record.failed.as_ref(), one.measured.failed.as_ref()]);
        self.promotion.failed.iter().chain(of_versions.flatten())
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
