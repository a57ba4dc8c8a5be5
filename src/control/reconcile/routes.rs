//! Who gets which version: carrying out what operators ask of routes and rollouts, and taking rollouts further.

use serde_json::json;

use super::{Progress, Reconciler, Rollouts, Tracked, promote};
use crate::{
    control::{
        command::{Asked, Change},
        standing::{ByHand, PassedOver, Split, Standing},
        store::Entry,
        tracked::{PointedBy, TrackedVersion},
    },
    error::{Code, Error},
    id::{Alias, ModelName, Version},
    metrics::Way,
    model::catalog::VersionPolicy,
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
        // What is remembered of a model that has left the repository can still be ended and cleared.
        let (gone, is_remembered) = (Tracked::default(), standing.epoch > 0);
        let Some(model) = self.models.get(name).or(is_remembered.then_some(&gone)) else {
            return Err(Error::not_found(format!("unknown model '{name}'")));
        };
        if let Some(epoch) = asked.epoch.filter(|epoch| *epoch != standing.epoch) {
            let message = format!("it has changed meanwhile: its epoch is {}, not {epoch}", standing.epoch);
            return Err(Error::new(Code::Conflict, message).of_model(name.as_str()));
        }
        let gives_up = matches!(change, Change::Tell(Command::Abort | Command::Rollback));
        let changed = match change {
            Change::Start { to, settings } => self.start(name, model, standing, &asked, &to, settings),
            Change::Tell(command) => tell(name, model, &self.rollouts, standing, &asked, command),
            Change::Route(split) => divide(name, model, standing, &asked, split),
            Change::Alias(alias, to) => call(model, standing, &asked, &alias, to),
            Change::Clear => clear(standing, &asked),
        };
        let (standing, mut entry) = changed.map_err(|error| error.of_model(name.as_str()))?;
        entry.model = name.to_string();
        if gives_up {
            self.give_up(name, standing, entry).await;
            return Ok(());
        }
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
        check_undivided(&standing)?;
        known(model, to)?;
        let stable = model
            .deployment(&standing)
            .default
            .ok_or_else(|| Error::new(Code::NotReady, "no version of it serves yet that a rollout could start from"))?;
        let settings =
            laid_over(&Settings { on_new_version: OnNewVersion::Canary, ..model.settings.clone() }, settings)?;
        let now = promote::now();
        begin(name, &mut standing, [stable, to.clone()], &settings, now)?;
        let details = json!({ "rollout": standing.rollout.as_ref().map(|rollout| &rollout.id), "settings": settings });
        Ok((standing, entry(asked, "start", now, details)))
    }

    /// Has the stable version answer again. Clients are not to wait for the disk.
    async fn give_up(&mut self, name: &ModelName, standing: Standing, entry: Entry) {
        self.rollouts.change_at_once(name, standing, entry);
        self.publish();
        self.rollouts.catch_up().await;
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
            self.try_again(&name).await;
            if let Some(back) =
                self.models.get(&name).and_then(|model| called_back(model, self.rollouts.standing(&name)))
            {
                self.happen(&name, back, REPOSITORY).await;
            }
            self.follow(&name).await;
        }
    }

    /// Who points at a version that was given up before wants it tried again.
    async fn try_again(&mut self, name: &ModelName) {
        let Some(model) = self.models.get(name) else { return };
        let (Some(version), Some(since)) = (model.pointer.version().cloned(), model.pointer.since()) else { return };
        let mut standing = self.rollouts.standing(name).clone();
        if !standing.passed_over.iter().any(|passed| passed.version == version && passed.since < since) {
            return;
        }
        standing.take_back(&version);
        let reason = format!("{} points at version '{version}' again", model.pointed_by);
        let asked = Asked { author: REPOSITORY.to_owned(), reason, epoch: None };
        let mut entry = entry(&asked, "try_again", promote::now(), json!({ "version": version }));
        entry.model = name.to_string();
        if let Err(error) = self.rollouts.change(name, standing, entry).await {
            return tracing::debug!(model = %name, %error, "the version that is pointed at again waits");
        }
        let tracked = self.models.get_mut(name).and_then(|model| model.find(&version));
        let has_failed = |tracked: &&mut TrackedVersion| {
            tracked.serving.is_none() && matches!(tracked.progress, Progress::Failed { .. } | Progress::Held { .. })
        };
        if let Some(tracked) = tracked.filter(has_failed) {
            tracked.progress = Progress::Gone;
        }
    }

    /// What has happened to a model's rollout and was not taken note of.
    fn next_event(&mut self, name: &ModelName) -> Option<(Event, &'static str)> {
        let Some(model) = self.models.get_mut(name) else {
            self.rollouts.look_away(name);
            return None;
        };
        let is_read = !model.found.is_empty();
        let absent = model.find(&self.rollouts.standing(name).running()?.candidate).is_none();
        let gone = self.rollouts.is_gone(name, absent && is_read);
        let standing = self.rollouts.standing(name);
        let rollout = standing.running()?;
        let (phase, stable, candidate) = (rollout.phase, rollout.stable.clone(), rollout.candidate.clone());
        let replaced = replacement(model, standing, rollout);
        let stable = model.find(&stable).and_then(|tracked| tracked.serving.clone()).map(|(version, _)| version);
        let failed = |reason: String| Some((Event::Failed(format!("version '{candidate}' {reason}")), REPOSITORY));
        let Some(tracked) = model.find(&candidate) else {
            return if gone { failed("is gone from the repository".to_owned()) } else { None };
        };
        // Once it has requests, what serves goes on though its new files are no good.
        let needs_files = tracked.serving.is_none() || phase == Phase::Pending;
        match &tracked.progress {
            Progress::Failed { error, .. } if needs_files => return failed(format!("failed: {error}")),
            Progress::Gone if needs_files && tracked.missing_since.is_some() => {
                return failed("is gone from the repository".to_owned());
            }
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
        conclude(name, model, &self.rollouts, &mut standing, &transition);
        let mut entry = logged(&transition, author);
        entry.model = name.to_string();
        tracing::info!(
            model = %name, from = ?transition.from, to = ?transition.to, reason = transition.reason, "rollout"
        );
        if matches!(transition.to, Phase::Aborted | Phase::RolledBack) {
            self.give_up(name, standing, entry).await;
            return true;
        }
        if let Err(error) = self.rollouts.change(name, standing, entry).await {
            tracing::debug!(model = %name, %error, "the rollout waits");
            return false;
        }
        self.publish();
        true
    }

    /// Has a new version take over as its model's settings say, and remembers who answers.
    async fn follow(&mut self, name: &ModelName) {
        let mut standing = self.rollouts.standing(name).clone();
        let Some(model) = self.models.get(name) else { return };
        let policy = model.settings.on_new_version;
        let idle = policy == OnNewVersion::Swap && standing.stable.is_none();
        if idle || standing.running().is_some() || standing.split.is_some() {
            return;
        }
        let Some(answers) = model.deployment(&standing).default else { return };
        let now = promote::now();
        let asked = |reason: &str| Asked { author: REPOSITORY.to_owned(), reason: reason.to_owned(), epoch: None };
        if standing.stable.as_ref() != Some(&answers) {
            // Of versions that come together, the newest is the first; and what is on its way is waited for.
            let decided = model.decided(&standing);
            let is_awaited = |tracked: &TrackedVersion| tracked.selected || decided.as_ref() == Some(&tracked.version);
            if model.versions.iter().any(|tracked| is_awaited(tracked) && tracked.progress.is_under_way()) {
                return;
            }
            let details = json!({ "before": standing.stable, "version": answers });
            standing.stable = Some(answers);
            let mut entry = entry(&asked("it answers by itself"), "serve", now, details);
            entry.model = name.to_string();
            // It is so already, stored or not.
            self.rollouts.change_at_once(name, standing, entry);
            self.publish();
            return self.rollouts.catch_up().await;
        }
        let Some(news) = news(model, &standing, &answers) else { return };
        if matches!(policy, OnNewVersion::Hold | OnNewVersion::Swap) {
            return;
        }
        let settings = model.settings.clone();
        // What a pointer does from the look on that has led here comes after it.
        if let Err(error) = begin(name, &mut standing, [answers, news], &settings, self.looked_at) {
            return tracing::error!(model = %name, %error, "no rollout to the new version");
        }
        let details = json!({ "rollout": standing.rollout.as_ref().map(|rollout| &rollout.id), "settings": settings });
        let mut entry = entry(&asked("a new version"), "start", now, details);
        entry.model = name.to_string();
        match self.rollouts.change(name, standing, entry).await {
            Ok(()) => self.publish(),
            Err(error) => tracing::debug!(model = %name, %error, "the new version waits"),
        }
    }
}

/// The newest version that the policy selects and nobody passes over, when it is newer than the stable one.
fn news(model: &Tracked, standing: &Standing, stable: &Version) -> Option<Version> {
    let newest = model.chosen(standing).next_back()?;
    (model.place(newest) > model.place(stable)).then(|| newest.clone())
}

/// What a rollout is told whose candidate the registry's pointer has left again, for the version it took over from.
fn called_back(model: &Tracked, standing: &Standing) -> Option<Event> {
    let rollout = standing.rollout.as_ref().filter(|_| standing.split.is_none())?;
    let pointed = model.pointer.version().filter(|version| **version == rollout.stable)?;
    let command = match rollout.phase {
        Phase::Pending | Phase::Shadow | Phase::Canary | Phase::Paused => Command::Abort,
        Phase::Promoting | Phase::Watching => Command::Rollback,
        Phase::Done if rollout.needs_both(promote::now()) && model.decided(standing)? == rollout.candidate => {
            Command::Rollback
        }
        Phase::Done | Phase::Aborted | Phase::RolledBack => return None,
    };
    // Who starts a rollout by hand may lead away from what the pointer points at; only a move since then is a word.
    let is_news = model.pointer.since()? >= rollout.begun;
    is_news.then(|| Event::Told(command, format!("{} points at version '{pointed}' again", model.pointed_by)))
}

/// Why a newer version takes a candidate's place, when it does.
fn replacement(model: &Tracked, standing: &Standing, rollout: &Rollout) -> Option<String> {
    let early = matches!(rollout.phase, Phase::Pending | Phase::Shadow | Phase::Canary | Phase::Paused);
    let replaces = early
        && rollout.plan.on_arrival == Arrival::Replace
        && matches!(model.settings.on_new_version, OnNewVersion::Canary | OnNewVersion::Shadow);
    let newer = news(model, standing, &rollout.candidate).filter(|newer| replaces && *newer != rollout.stable)?;
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
    (rollout.objective, rollout.objective_is_given) =
        (settings.latency_objective, settings.latency_objective.is_some());
    standing.take_back(&candidate);
    standing.take_back(&stable);
    (standing.stable, standing.rollout) = (Some(stable), Some(rollout));
    Ok(())
}

/// What else follows from a rollout's change.
fn conclude(name: &ModelName, model: &Tracked, rollouts: &Rollouts, standing: &mut Standing, transition: &Transition) {
    let Some(rollout) = &mut standing.rollout else { return };
    let now = transition.at;
    let (stable, candidate, id) = (rollout.stable.clone(), rollout.candidate.clone(), rollout.id.clone());
    if rollout.weight() == Weight::FULL && rollout.baseline.is_none() {
        let tracked = model.versions.iter().find(|tracked| tracked.version == stable);
        let serving = tracked.and_then(|tracked| tracked.serving.as_ref());
        // What it did last is the best that it can be compared by from now on.
        rollout.baseline = serving.map(|(version, _)| {
            Box::new(rollouts.recent(name, version).unwrap_or_else(|| version.tally.window(Way::Stable)))
        });
    }
    let winner = match transition.to {
        Phase::Aborted | Phase::RolledBack => &stable,
        Phase::Done => &candidate,
        Phase::Promoting => return standing.stable = Some(candidate),
        _ => return,
    };
    // What is newer than the winner would take over by itself. What came before this rollout has had its chance; what
    // came while it ran has its turn, unless that would be without any rollout.
    let (place, swaps) = (|version: &Version| model.place(version), model.swaps());
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
    let is_there = |passed: &PassedOver| model.found.is_empty() || place(&passed.version).is_some();
    standing.passed_over.retain(is_there);
    standing.stable = Some(winner.clone());
}

/// A rollout and shares by hand would both say who gets what.
fn check_undivided(standing: &Standing) -> Result<(), Error> {
    let message = "its requests are divided by hand; clear that first (tidegate rollout overrides clear MODEL)";
    if standing.split.is_some() { Err(Error::new(Code::Conflict, message)) } else { Ok(()) }
}

fn tell(
    name: &ModelName,
    model: &Tracked,
    rollouts: &Rollouts,
    mut standing: Standing,
    asked: &Asked,
    command: Command,
) -> Result<(Standing, Entry), Error> {
    check_undivided(&standing)?;
    let before = standing.clone();
    let rollout = standing
        .rollout
        .as_mut()
        .ok_or_else(|| Error::not_found("it has no rollout; start one (tidegate rollout start MODEL --to VERSION)"))?;
    let answers = rollout.phase == Phase::Done && model.decided(&before).is_some_and(|now| now != rollout.candidate);
    if command == Command::Rollback && answers {
        let message = "another version has taken over since; start a rollout to the one that shall answer";
        return Err(Error::new(Code::Conflict, message));
    }
    let now = promote::now();
    let event = Event::Told(command, asked.reason.clone());
    let Some(transition) = rollout.apply(event, now)?.cloned() else {
        return Err(Error::new(Code::Conflict, "this changes nothing"));
    };
    conclude(name, model, rollouts, &mut standing, &transition);
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
    let usual = || model.deployment(&standing).default;
    let stable = stable.or_else(|| before.as_ref().map(|before| before.route.stable.clone())).or_else(usual);
    let stable = stable.ok_or_else(|| Error::new(Code::NotReady, "no version of it serves yet"))?;
    let mut route = Route { arms, shadow, sticky, ..Route::to(String::new().into(), stable) };
    route.check()?;
    let named = std::iter::once(&route.stable)
        .chain(route.arms.iter().map(|arm| &arm.version))
        .chain(route.shadow.iter().map(|shadow| &shadow.version));
    for version in named {
        known(model, version)?;
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

/// Has an alias stand for another version, or for none.
fn call(
    model: &Tracked,
    mut standing: Standing,
    asked: &Asked,
    alias: &Alias,
    to: Option<Version>,
) -> Result<(Standing, Entry), Error> {
    let now = promote::now();
    let before = standing.aliases.get(alias).and_then(|pointer| pointer.version().cloned());
    match &to {
        None if before.is_none() => return Err(Error::not_found(format!("it has no alias '{alias}'"))),
        None => drop(standing.aliases.remove(alias)),
        Some(_) if model.pointed_by == PointedBy::Registry => {
            return Err(Error::invalid("its source says which version is the one to serve; move the alias there"));
        }
        Some(version) => {
            known(model, version)?;
            let leaves_out = |list: &[String]| !list.iter().any(|listed| listed == version.as_str());
            if model.pointed_by == PointedBy::Alias(alias.to_string())
                && matches!(&model.policy, VersionPolicy::Specific(list) if leaves_out(list))
            {
                let message = format!("versions.specific leaves version '{version}' out; add it there first");
                return Err(Error::invalid(message));
            }
            standing.aliases.entry(alias.clone()).or_default().call(version, now);
        }
    }
    let details = json!({ "alias": alias, "before": before, "after": to });
    Ok((standing, entry(asked, "alias", now, details)))
}

/// # Errors
/// `NotFound` when the repository does not hold the version.
fn known(model: &Tracked, version: &Version) -> Result<(), Error> {
    if model.place(version).is_some() {
        return Ok(());
    }
    let known: Vec<&str> = model.found.iter().map(|found| found.version.as_str()).collect();
    let version = crate::id::shorten(version.as_str());
    Err(Error::not_found(format!("the repository has no version '{version}' of it; it has {}", known.join(", "))))
}

fn clear(standing: Standing, asked: &Asked) -> Result<(Standing, Entry), Error> {
    if let Some(running) = standing.running() {
        return Err(Error::new(Code::Conflict, format!("rollout '{}' runs; abort it first", running.id)));
    }
    let details = json!({ "before": standing });
    // Who serves stays so where new versions do not take over by themselves.
    let Standing { epoch, rollouts, stable, aliases, .. } = standing;
    let cleared = Standing { epoch, rollouts, stable, aliases, ..Standing::default() };
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
