//! `Rollouts`: what is remembered of every model's routes, and what its judge has seen so far.
//!
//! Every change is stored before it takes effect. Only what protects clients, giving a candidate up, takes effect
//! though it cannot be stored, and is stored as soon as that is possible.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    standing::Standing,
    store::{Entry, SharedStore},
};
use crate::{
    error::Error,
    id::ModelName,
    metrics::{Metrics, Way},
    model::ModelVersion,
    rollout::{
        Moment, Phase, Rollout,
        judge::{Agreement, Evidence, Judgement, Window, judge},
        route::Weight,
    },
};

/// The judge looks at least so often, and at least [`LOOKS`] times in the shortest time of a step.
const LOOK: Duration = Duration::from_secs(10);
const LOOKS: u32 = 5;
/// But no more often than that.
const SHORTEST_LOOK: Duration = Duration::from_millis(50);
/// A candidate that is nowhere to be found for so long is gone: who replaces a folder removes the old one first.
const ABSENCE: Duration = Duration::from_secs(3);
/// Answers of the stable version that are enough to know it by: what its p95 is, for one.
const KNOWN: u64 = 100;
/// The share of the stable version's answers that the objective lets pass.
const OBJECTIVE: f64 = 0.95;
/// Where that is less, answers come as late as the machine has other things to do, and not as the version computes.
const LEAST_OBJECTIVE: Duration = Duration::from_millis(1);

/// Now, as rollouts count time.
pub(super) fn now() -> Moment {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Moment::try_from(since.as_millis()).unwrap_or(Moment::MAX)
}

/// What is remembered of every model.
pub(super) struct Rollouts {
    state: SharedStore,
    metrics: Arc<Metrics>,
    models: BTreeMap<ModelName, Managed>,
    /// Models of which something is stored that cannot be read, and why.
    unknown: BTreeMap<ModelName, Error>,
    /// Why nothing could be read.
    all_unknown: Option<Error>,
    /// For models of which nothing is remembered.
    nothing: Standing,
}

#[derive(Default)]
struct Managed {
    standing: Standing,
    /// What took effect and could not be stored yet.
    unsaved: Option<Entry>,
    /// What the judge compares with.
    look: Option<Look>,
    /// Since when the candidate is nowhere to be found.
    absent_since: Option<Instant>,
}

/// What there was when a step began.
struct Look {
    /// The step, by when it began.
    since: Moment,
    stable: Mark,
    candidate: Mark,
    next: Instant,
}

/// What a version had done at some moment.
struct Mark {
    of: Weak<ModelVersion>,
    window: Window,
    agreement: Agreement,
}

impl Rollouts {
    pub(super) fn new(state: SharedStore, metrics: Arc<Metrics>) -> Self {
        let nothing = Standing::default();
        Self { state, metrics, models: BTreeMap::new(), unknown: BTreeMap::new(), all_unknown: None, nothing }
    }

    /// Reads what is remembered. Without it the server serves what the repository says.
    pub(super) async fn open(&mut self) {
        let standings = self.state.with(|store| store.standings()).await;
        self.metrics.state_stored(standings.is_ok());
        match standings {
            Ok(standings) => {
                for (name, standing) in standings {
                    match standing {
                        Ok(mut standing) => {
                            if let Some(rollout) = &mut standing.rollout {
                                rollout.begin_step_anew(now());
                            }
                            self.models.insert(name, Managed { standing, ..Managed::default() });
                        }
                        Err(error) => {
                            tracing::error!(model = %name, %error, "its routes are not known; changes will be refused");
                            self.unknown.insert(name, error);
                        }
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "rollouts and routes set by hand are not known; changes will be refused");
                self.all_unknown = Some(error);
            }
        }
    }

    pub(super) fn standing(&self, name: &ModelName) -> &Standing {
        self.models.get(name).map_or(&self.nothing, |managed| &managed.standing)
    }

    /// Stores a change, and then has it stand.
    ///
    /// # Errors
    /// `NotReady` when it cannot be stored; then all is as before.
    pub(super) async fn change(&mut self, name: &ModelName, mut standing: Standing, entry: Entry) -> Result<(), Error> {
        // What took effect before is to be known of first.
        self.store_late(name).await?;
        standing.epoch += 1;
        self.save(name, &standing, entry).await?;
        self.stands(name, standing);
        Ok(())
    }

    /// Has a change stand that must not wait for the disk; it is stored by the next `catch_up`.
    pub(super) fn change_at_once(&mut self, name: &ModelName, mut standing: Standing, entry: Entry) {
        standing.epoch += 1;
        self.stands(name, standing);
        if let Some(managed) = self.models.get_mut(name) {
            managed.unsaved = Some(entry);
        }
    }

    fn stands(&mut self, name: &ModelName, standing: Standing) {
        let managed = self.models.entry(name.clone()).or_default();
        (managed.standing, managed.unsaved) = (standing, None);
        let since = managed.standing.running().map(|rollout| rollout.since);
        managed.look.take_if(|look| Some(look.since) != since);
    }

    async fn save(&self, name: &ModelName, standing: &Standing, entry: Entry) -> Result<(), Error> {
        let (name, standing) = (name.clone(), standing.clone());
        if let Some(error) = self.unknown.get(&name).or(self.all_unknown.as_ref()) {
            // What cannot be read is not to be lost.
            return Err(error.clone());
        }
        let saved = self.state.with(move |store| store.save(&name, &standing, &entry)).await;
        let stored = saved.is_ok();
        if self.metrics.state_stored(stored) != stored {
            match &saved {
                Ok(()) => tracing::info!("the server's state can be stored again"),
                Err(error) => tracing::error!(%error, "the server's state cannot be stored"),
            }
        }
        saved
    }

    /// Stores what took effect before it was stored.
    pub(super) async fn catch_up(&mut self) {
        let late = self.models.iter().filter(|(_, managed)| managed.unsaved.is_some());
        for name in late.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            if let Err(error) = self.store_late(&name).await {
                tracing::debug!(model = %name, %error, "a change that took effect is not stored yet");
            }
        }
    }

    async fn store_late(&mut self, name: &ModelName) -> Result<(), Error> {
        let Some(managed) = self.models.get(name) else { return Ok(()) };
        let Some(entry) = managed.unsaved.clone() else { return Ok(()) };
        let standing = managed.standing.clone();
        self.save(name, &standing, entry).await?;
        if let Some(managed) = self.models.get_mut(name) {
            managed.unsaved = None;
        }
        Ok(())
    }

    /// Writes down what happened without changing a route.
    pub(super) async fn log(&self, entry: Entry) {
        if let Err(error) = self.state.with(move |store| store.log(&entry)).await {
            tracing::error!(%error, "the audit log misses an entry");
        }
    }

    /// Keeps what a judge said, though nothing follows from it.
    pub(super) fn judged(&mut self, name: &ModelName, judgement: Judgement) {
        let rollout = self.models.get_mut(name).and_then(|managed| managed.standing.rollout.as_mut());
        if let Some(rollout) = rollout {
            rollout.judgement = Some(judgement);
        }
    }

    /// Models with a rollout that runs.
    pub(super) fn running(&self) -> Vec<ModelName> {
        let running = self.models.iter().filter(|(_, managed)| managed.standing.running().is_some());
        running.map(|(name, _)| name.clone()).collect()
    }

    /// The model is not there at present.
    pub(super) fn look_away(&mut self, name: &ModelName) {
        if let Some(managed) = self.models.get_mut(name) {
            (managed.look, managed.absent_since) = (None, None);
        }
    }

    /// Whether a rollout's candidate, which is nowhere to be found now, has been nowhere for long enough.
    pub(super) fn is_gone(&mut self, name: &ModelName, is_absent: bool) -> bool {
        let Some(managed) = self.models.get_mut(name) else { return false };
        if !is_absent {
            managed.absent_since = None;
            return false;
        }
        managed.absent_since.get_or_insert_with(Instant::now).elapsed() >= ABSENCE
    }

    /// When the next judge has to look; far away without any.
    pub(super) fn next_look(&self) -> Instant {
        let looks = self.models.values().filter(|managed| managed.standing.running().is_some());
        let next = looks.filter_map(|managed| managed.look.as_ref().map(|look| look.next)).min();
        let now = Instant::now();
        next.unwrap_or(now + LOOK).max(now + SHORTEST_LOOK)
    }

    /// What the stable version did in the step that the rollout is at, if that is enough to compare with.
    pub(super) fn recent(&self, name: &ModelName, stable: &Arc<ModelVersion>) -> Option<Window> {
        let look = self.models.get(name)?.look.as_ref()?;
        let window = look.stable.until_now(Some(stable), Way::Stable);
        (window.requests >= KNOWN).then_some(window)
    }

    /// What the judge says of a model's candidate, when it is time for it to look.
    pub(super) fn judge(
        &mut self,
        name: &ModelName,
        stable: Option<&Arc<ModelVersion>>,
        candidate: &Arc<ModelVersion>,
    ) -> Option<Judgement> {
        let managed = self.models.get_mut(name)?;
        let rollout = managed.standing.rollout.as_mut().filter(|rollout| !rollout.is_over())?;
        let phase = rollout.phase_or_paused_in();
        let (stable_way, candidate_way) = match phase {
            Phase::Shadow => (Way::Stable, Way::Shadow),
            Phase::Canary => (Way::Stable, Way::Canary),
            Phase::Watching => (Way::Stable, Way::Stable),
            _ => return None,
        };
        if rollout.objective.is_none() {
            rollout.objective = stable.and_then(|stable| usual_latency(&stable.tally.window(Way::Stable)));
        }
        let now = Instant::now();
        let look = managed.look.take_if(|look| look.since == rollout.since);
        let mut look = look.unwrap_or_else(|| Look {
            since: rollout.since,
            stable: Mark::of(stable, stable_way),
            candidate: Mark::of(Some(candidate), candidate_way),
            next: now,
        });
        let due = look.next <= now;
        let judgement = due.then(|| {
            look.next = now + interval(rollout);
            let alone = rollout.baseline.as_deref().filter(|_| rollout.weight() == Weight::FULL);
            let evidence = Evidence {
                told_only: alone.is_some() && !rollout.objective_is_given,
                stable: alone.cloned().unwrap_or_else(|| look.stable.until_now(stable, stable_way)),
                candidate: look.candidate.until_now(Some(candidate), candidate_way),
                shadow: (phase == Phase::Shadow).then(|| look.candidate.agreement_until_now(candidate)),
                objective: rollout.objective,
            };
            judge(&evidence, &rollout.plan.margins)
        });
        managed.look = Some(look);
        judgement
    }
}

impl Mark {
    fn of(version: Option<&Arc<ModelVersion>>, way: Way) -> Self {
        let window = version.map(|version| version.tally.window(way)).unwrap_or_default();
        let agreement = version.map(|version| version.tally.agreement()).unwrap_or_default();
        Self { of: version.map(Arc::downgrade).unwrap_or_default(), window, agreement }
    }

    /// Whether it is still the same one, and not loaded anew meanwhile, so that it counts from nothing.
    fn is_of(&self, version: &Arc<ModelVersion>) -> bool {
        std::ptr::eq(self.of.as_ptr(), Arc::as_ptr(version))
    }

    /// How the version's answers to copies compared since.
    fn agreement_until_now(&self, version: &Arc<ModelVersion>) -> Agreement {
        let agreement = version.tally.agreement();
        if self.is_of(version) { agreement.since(&self.agreement) } else { agreement }
    }

    /// What the version did since; all it did, when it was loaded anew meanwhile.
    fn until_now(&self, version: Option<&Arc<ModelVersion>>, way: Way) -> Window {
        let Some(version) = version else { return Window::default() };
        let window = version.tally.window(way);
        if self.is_of(version) { window.since(&self.window) } else { window }
    }
}

/// What most of a version's answers take at most, once enough of them are known.
fn usual_latency(window: &Window) -> Option<Duration> {
    let known = window.latency.total() >= KNOWN;
    let seconds = window.latency.quantile(OBJECTIVE).filter(|_| known)?;
    Some(Duration::from_secs_f64(seconds).max(LEAST_OBJECTIVE))
}

/// How often the judge looks in the rollout's phase.
fn interval(rollout: &Rollout) -> Duration {
    let shortest = match rollout.phase_or_paused_in() {
        Phase::Shadow => rollout.plan.shadow.as_ref().map(|step| step.min_duration),
        Phase::Canary => rollout.plan.steps.get(rollout.step).map(|step| step.min_duration),
        _ => Some(rollout.plan.watch),
    };
    (shortest.unwrap_or(LOOK) / LOOKS).clamp(SHORTEST_LOOK, LOOK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::Signature, observe::Tally};

    #[test]
    fn what_is_usual_is_known_from_enough_answers_and_no_less_than_a_millisecond() {
        let usual = |count: u64, took: Duration| {
            let tally = Tally::new(&Signature::default());
            (0..count).for_each(|_| tally.answered(Way::Stable, took, &[]));
            usual_latency(&tally.window(Way::Stable))
        };
        assert_eq!(usual(KNOWN - 1, Duration::from_millis(20)), None);
        assert_eq!(usual(KNOWN, Duration::from_micros(50)), Some(LEAST_OBJECTIVE));
        let found = usual(KNOWN, Duration::from_millis(20)).unwrap();
        assert!((Duration::from_millis(18)..Duration::from_millis(25)).contains(&found), "{found:?}");
    }
}
