//! Who gets which version: carrying out what operators ask of routes and rollouts, and taking rollouts further.

use serde_json::json;

use super::{Progress, Reconciler, Tracked, promote};
use crate::{
    control::{
        command::{Asked, Change},
        standing::{ByHand, Split, Standing},
        store::Entry,
    },
    error::{Code, Error},
    id::{ModelName, Version},
    metrics::Way,
    rollout::{
        self, Command, Event, Moment, Phase, Rollout, Transition,
        plan::{Arrival, OnNewVersion, Settings},
        route::{Route, Weight},
    },
};

/// Who is written down for what follows from the files in the repository.
const REPOSITORY: &str = "repository";
/// Who is written down for what a judge found.
const JUDGE: &str = "judge";

impl Reconciler {
    /// Carries out what an operator asks.
    pub(super) async fn change(&mut self, name: &ModelName, asked: Asked, change: Change) -> Result<(), Error> {
        let standing = self.rollouts.standing(name).clone();
        let Some(model) = self.models.get(name) else {
            return Err(Error::not_found(format!("unknown model '{name}'")));
        };
        if let Some(epoch) = asked.epoch.filter(|epoch| *epoch != standing.epoch) {
            let message = format!("it has changed meanwhile: its epoch is {}, not {epoch}", standing.epoch);
            return Err(Error::new(Code::Conflict, message).of_model(name.as_str()));
        }
        let changed = match change {
            Change::Start { to, settings } => self.start(name, model, standing, &asked, &to, settings),
            Change::Tell(command) => tell(model, standing, &asked, command),
            Change::Route(split) => divide(name, model, standing, &asked, split),
            Change::Clear => clear(standing, &asked),
        };
        let (standing, mut entry) = changed.map_err(|error| error.of_model(name.as_str()))?;
        entry.model = name.to_string();
        self.rollouts.change(name, standing, entry).await?;
        self.retry_failed(name);
        self.publish();
        Ok(())
    }

    fn start(
        &self,
        name: &ModelName,
        model: &Tracked,
        mut standing: Standing,
        asked: &Asked,
        to: &Version,
        settings: serde_json::Map<String, serde_json::Value>,
    ) -> Result<(Standing, Entry), Error> {
        if let Some(running) = standing.running() {
            let message = format!("rollout '{}' to version '{}' runs; abort it first", running.id, running.candidate);
            return Err(Error::new(Code::Conflict, message));
        }
        if standing.split.is_some() {
            let message = "its requests are divided by hand; clear that first (tidegate rollout overrides clear MODEL)";
            return Err(Error::new(Code::Conflict, message));
        }
        if !model.found.iter().any(|found| found.version == *to) {
            let known: Vec<&str> = model.found.iter().map(|found| found.version.as_str()).collect();
            let to = crate::id::shorten(to.as_str());
            return Err(Error::not_found(format!(
                "the repository has no version '{to}' of it; it has {}",
                known.join(", ")
            )));
        }
        let stable = model
            .deployment(&standing, false)
            .default
            .ok_or_else(|| Error::new(Code::NotReady, "no version of it serves yet that a rollout could start from"))?;
        let settings =
            laid_over(&Settings { on_new_version: OnNewVersion::Canary, ..model.settings.clone() }, settings)?;
        let now = promote::now();
        begin(name, &mut standing, [stable, to.clone()], &settings, now)?;
        let details = json!({ "rollout": standing.rollout.as_ref().map(|rollout| &rollout.id), "settings": settings });
        Ok((standing, entry(asked, "start", now, details)))
    }

    /// What an operator asks for is tried, though it failed before.
    fn retry_failed(&mut self, name: &ModelName) {
        let needed = self.rollouts.standing(name).needed(promote::now());
        for tracked in self.models.get_mut(name).into_iter().flat_map(|model| &mut model.versions) {
            let idle = matches!(tracked.progress, Progress::Failed { .. } | Progress::Held { .. });
            if idle && tracked.serving.is_none() && needed.contains(&tracked.version) {
                tracked.progress = Progress::Gone;
            }
        }
    }

    /// Takes every rollout as far as it goes now, and begins those that new versions ask for.
    pub(super) async fn promote(&mut self) {
        self.rollouts.catch_up().await;
        for name in self.rollouts.running() {
            // Each event may make way for the next one.
            while let Some((event, author)) = self.next_event(&name) {
                if !self.happen(&name, event, author).await {
                    break;
                }
            }
        }
        let names: Vec<ModelName> = self.models.keys().cloned().collect();
        for name in names {
            self.follow(&name).await;
        }
    }

    /// What has happened to a model's rollout and was not taken note of.
    fn next_event(&mut self, name: &ModelName) -> Option<(Event, &'static str)> {
        let model = self.models.get_mut(name)?;
        let standing = self.rollouts.standing(name);
        let rollout = standing.running()?;
        let (phase, stable, candidate) = (rollout.phase, rollout.stable.clone(), rollout.candidate.clone());
        let replaced = replacement(model, standing, rollout);
        let stable = model.find(&stable).and_then(|tracked| tracked.serving.clone()).map(|(version, _)| version);
        let gone = || Some((Event::Failed(format!("version '{candidate}' is gone from the repository")), REPOSITORY));
        let Some(tracked) = model.find(&candidate) else { return gone() };
        match (&tracked.progress, &tracked.serving) {
            (Progress::Failed { error, .. }, None) => {
                return Some((Event::Failed(format!("version '{candidate}' failed: {error}")), REPOSITORY));
            }
            (Progress::Gone, None) if tracked.missing_since.is_some() => return gone(),
            _ => {}
        }
        if let Some(reason) = replaced {
            return Some((Event::Failed(reason), REPOSITORY));
        }
        let serving = tracked.serving.as_ref().map(|(version, _)| version.clone())?;
        match phase {
            Phase::Pending if matches!(tracked.progress, Progress::Done { .. }) => Some((Event::Ready, REPOSITORY)),
            Phase::Promoting => Some((Event::Promoted, JUDGE)),
            _ => {
                let judgement = self.rollouts.judge(name, stable.as_ref(), &serving)?;
                Some((Event::Judged(judgement), JUDGE))
            }
        }
    }

    /// Takes note of what happened; whether anything changed.
    async fn happen(&mut self, name: &ModelName, event: Event, author: &str) -> bool {
        let mut standing = self.rollouts.standing(name).clone();
        let Some(model) = self.models.get(name) else { return false };
        let now = promote::now();
        let judgement = if let Event::Judged(judgement) = &event { Some(judgement.clone()) } else { None };
        let Some(rollout) = &mut standing.rollout else { return false };
        // Only operators ask for what cannot be.
        let Ok(Some(transition)) = rollout.apply(event, now).map(|transition| transition.cloned()) else {
            if let Some(judgement) = judgement {
                self.rollouts.judged(name, judgement);
                self.publish();
            }
            return false;
        };
        conclude(model, &mut standing, &transition, now);
        let mut entry = logged(&transition, author);
        entry.model = name.to_string();
        tracing::info!(
            model = %name, from = ?transition.from, to = ?transition.to, reason = transition.reason, "rollout"
        );
        if matches!(transition.to, Phase::Aborted | Phase::RolledBack) {
            // Clients are not to wait for the disk.
            self.rollouts.change_at_once(name, standing, entry);
            self.publish();
            self.rollouts.catch_up().await;
            return true;
        }
        if let Err(error) = self.rollouts.change(name, standing, entry).await {
            tracing::error!(model = %name, %error, "the rollout waits");
            return false;
        }
        self.publish();
        true
    }

    /// Has a new version take over as its model's settings say.
    async fn follow(&mut self, name: &ModelName) {
        let mut standing = self.rollouts.standing(name).clone();
        let Some(model) = self.models.get(name) else { return };
        let policy = model.settings.on_new_version;
        if policy == OnNewVersion::Swap || standing.running().is_some() || standing.split.is_some() {
            return;
        }
        let Some(stable) = model.deployment(&standing, false).default else { return };
        let now = promote::now();
        let asked = |reason: &str| Asked { author: REPOSITORY.to_owned(), reason: reason.to_owned(), epoch: None };
        let mut changed = if standing.stable.as_ref() == Some(&stable) {
            let news = news(model, &standing, &stable).filter(|_| policy != OnNewVersion::Hold);
            let Some(news) = news else { return };
            let settings = model.settings.clone();
            if let Err(error) = begin(name, &mut standing, [stable, news], &settings, now) {
                return tracing::error!(model = %name, %error, "no rollout to the new version");
            }
            let details =
                json!({ "rollout": standing.rollout.as_ref().map(|rollout| &rollout.id), "settings": settings });
            (standing, entry(&asked("a new version"), "start", now, details))
        } else {
            // Of versions that come together, the newest is the first.
            if model.versions.iter().any(|tracked| tracked.selected && tracked.progress.is_under_way()) {
                return;
            }
            standing.stable = Some(stable.clone());
            (standing, entry(&asked("the first version that serves"), "serve", now, json!({ "version": stable })))
        };
        changed.1.model = name.to_string();
        if let Err(error) = self.rollouts.change(name, changed.0, changed.1).await {
            return tracing::error!(model = %name, %error, "the new version waits");
        }
        self.publish();
    }
}

/// The newest version that the policy selects and nobody passes over, when it is newer than the stable one.
fn news(model: &Tracked, standing: &Standing, stable: &Version) -> Option<Version> {
    let place = |version: &Version| model.found.iter().position(|found| found.version == *version);
    let newest = model.chosen(standing).next_back()?;
    (place(newest) > place(stable)).then(|| newest.clone())
}

/// Why a newer version takes a candidate's place, when it does.
fn replacement(model: &Tracked, standing: &Standing, rollout: &Rollout) -> Option<String> {
    let early = matches!(rollout.phase, Phase::Pending | Phase::Shadow | Phase::Canary | Phase::Paused);
    let replaces = early
        && rollout.plan.on_arrival == Arrival::Replace
        && matches!(model.settings.on_new_version, OnNewVersion::Canary | OnNewVersion::Shadow);
    let newer = news(model, standing, &rollout.candidate).filter(|_| replaces)?;
    Some(format!("version '{newer}' takes its place"))
}

/// Puts a new rollout in its place.
fn begin(
    name: &ModelName,
    standing: &mut Standing,
    [stable, candidate]: [Version; 2],
    settings: &Settings,
    now: Moment,
) -> Result<(), Error> {
    let id = standing.next_id(name);
    let plan = settings.plan()?;
    let mut rollout = Rollout::new(id, [stable.clone(), candidate.clone()], plan, settings.sticky.clone(), now)?;
    rollout.objective = settings.latency_objective;
    standing.take_back(&candidate);
    standing.take_back(&stable);
    (standing.stable, standing.rollout) = (Some(stable), Some(rollout));
    Ok(())
}

/// What else follows from a rollout's change.
fn conclude(model: &Tracked, standing: &mut Standing, transition: &Transition, now: Moment) {
    let Some(rollout) = &mut standing.rollout else { return };
    let (stable, candidate, id) = (rollout.stable.clone(), rollout.candidate.clone(), rollout.id.clone());
    if rollout.weight() == Weight::FULL && rollout.baseline.is_none() {
        let serving = model.versions.iter().find(|tracked| tracked.version == stable);
        let version = serving.and_then(|tracked| tracked.serving.as_ref());
        rollout.baseline = version.map(|(version, _)| Box::new(version.tally.window(Way::Stable)));
    }
    let winner = match transition.to {
        Phase::Aborted | Phase::RolledBack => &stable,
        Phase::Done => &candidate,
        Phase::Promoting => return standing.stable = Some(candidate),
        _ => return,
    };
    // What is newer than the winner would take over by itself. What came before this rollout has had its chance; what
    // came while it ran has its turn, unless that would be without any rollout.
    let place = |version: &Version| model.found.iter().position(|found| found.version == *version);
    let swaps = model.settings.on_new_version == OnNewVersion::Swap;
    let last = place(&stable).max(place(&candidate));
    for found in model.found.iter().filter(|found| place(&found.version) > place(winner)) {
        let came_later = place(&found.version) > last;
        let reason = match transition.to {
            Phase::Done if found.version == stable => format!("replaced by rollout '{id}'"),
            _ if found.version == candidate => format!("given up by rollout '{id}': {}", transition.reason),
            _ if !came_later => format!("it was there before rollout '{id}'"),
            _ if swaps => format!("it came while rollout '{id}' ran; start a rollout to it, or clear the overrides"),
            _ => continue,
        };
        if found.version == candidate || standing.passes_over(&found.version, found.stamp).is_none() {
            standing.pass_over(&found.version, found.stamp, &reason, now);
        }
    }
    standing.stable = Some(winner.clone());
}

fn tell(model: &Tracked, mut standing: Standing, asked: &Asked, command: Command) -> Result<(Standing, Entry), Error> {
    if standing.split.is_some() {
        let message = "its requests are divided by hand; clear that first (tidegate rollout overrides clear MODEL)";
        return Err(Error::new(Code::Conflict, message));
    }
    let rollout = standing
        .rollout
        .as_mut()
        .ok_or_else(|| Error::not_found("it has no rollout; start one (tidegate rollout start MODEL --to VERSION)"))?;
    let now = promote::now();
    let event = Event::Told(command, asked.reason.clone());
    let Some(transition) = rollout.apply(event, now)?.cloned() else {
        return Err(Error::new(Code::Conflict, "this changes nothing"));
    };
    conclude(model, &mut standing, &transition, now);
    Ok((standing, logged(&transition, &asked.author)))
}

fn divide(
    name: &ModelName,
    model: &Tracked,
    mut standing: Standing,
    asked: &Asked,
    split: Option<Split>,
) -> Result<(Standing, Entry), Error> {
    if let Some(running) = standing.running() {
        let message = format!(
            "rollout '{}' divides its requests; abort it, or go on with it (pause, advance, promote)",
            running.id
        );
        return Err(Error::new(Code::Conflict, message));
    }
    let now = promote::now();
    let before = standing.split.take();
    let Some(Split { stable, arms, shadow, sticky }) = split else {
        return Ok((standing, entry(asked, "route", now, json!({ "before": before, "after": null }))));
    };
    let usual = || model.deployment(&standing, false).default;
    let stable = stable.or_else(|| before.as_ref().map(|before| before.route.stable.clone())).or_else(usual);
    let stable = stable.ok_or_else(|| Error::new(Code::NotReady, "no version of it serves yet"))?;
    let mut route = Route { arms, shadow, sticky, ..Route::to(String::new().into(), stable) };
    route.check()?;
    let named = std::iter::once(&route.stable)
        .chain(route.arms.iter().map(|arm| &arm.version))
        .chain(route.shadow.iter().map(|shadow| &shadow.version));
    for version in named {
        if !model.found.iter().any(|found| found.version == *version) {
            return Err(Error::not_found(format!("the repository has no version '{version}' of it")));
        }
    }
    route.id = match &before {
        Some(before) if before.route.differs_by_weights(&route) => before.route.id.clone(),
        _ => standing.next_id(name),
    };
    let details = json!({ "before": before.map(|before| before.route), "after": route });
    let (author, reason) = (asked.author.clone(), asked.reason.clone());
    standing.split = Some(ByHand { route, author, reason, since: now });
    Ok((standing, entry(asked, "route", now, details)))
}

fn clear(standing: Standing, asked: &Asked) -> Result<(Standing, Entry), Error> {
    if let Some(running) = standing.running() {
        return Err(Error::new(Code::Conflict, format!("rollout '{}' runs; abort it first", running.id)));
    }
    let details = json!({ "before": standing });
    // Who serves stays so where new versions do not take over by themselves.
    let Standing { epoch, rollouts, stable, .. } = standing;
    let cleared = Standing { epoch, rollouts, stable, ..Standing::default() };
    Ok((cleared, entry(asked, "clear", promote::now(), details)))
}

/// The model's own settings with what was asked for in their place.
fn laid_over(own: &Settings, asked: serde_json::Map<String, serde_json::Value>) -> Result<Settings, Error> {
    let wrong = |error: serde_json::Error| Error::invalid(format!("rollout: {error}"));
    let mut settings = serde_json::to_value(own).map_err(wrong)?;
    if let serde_json::Value::Object(settings) = &mut settings {
        settings.extend(asked);
    }
    serde_json::from_value(settings).map_err(wrong)
}

/// What is written down of an operator's change.
fn entry(asked: &Asked, action: &str, at: Moment, details: serde_json::Value) -> Entry {
    Entry {
        at,
        model: String::new(),
        author: asked.author.clone(),
        action: action.to_owned(),
        reason: asked.reason.clone(),
        details: details.to_string(),
    }
}

/// What is written down of a version that did not load, or did not pass its golden check.
pub(super) fn kept_out(name: &ModelName, version: &Version, error: &Error) -> Entry {
    Entry {
        at: promote::now(),
        model: name.to_string(),
        author: REPOSITORY.to_owned(),
        action: "kept_out".to_owned(),
        reason: error.message.clone(),
        details: json!({ "version": version, "code": error.code.as_str() }).to_string(),
    }
}

/// What is written down of a rollout's change.
fn logged(transition: &Transition, author: &str) -> Entry {
    Entry {
        at: transition.at,
        model: String::new(),
        author: author.to_owned(),
        action: rollout::name_of(transition.to),
        reason: transition.reason.clone(),
        details: json!(transition).to_string(),
    }
}
