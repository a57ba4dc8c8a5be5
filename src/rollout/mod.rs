//! `Rollout`: how one version takes over from another, step by step, and how it is taken back.
//!
//! A state machine: it is told what happened and at what time, and says what changed. It knows no clock, no file and no
//! model, so that every way through it can be tried.

use std::{sync::Arc, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Code, Error},
    id::Version,
};

pub mod judge;
pub mod plan;
pub mod route;

use judge::{Finding, Judgement, Window};
use plan::{Inconclusive, Plan, Step};
use route::{Arm, Route, Shadow, Sticky, Variant, Weight};

/// A moment, in milliseconds since the epoch of the system's clock: it outlives a restart.
pub type Moment = u64;

/// Where a rollout is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The candidate is not ready yet.
    Pending,
    /// It gets copies.
    Shadow,
    /// It gets a share of the requests: the step's, by index.
    Canary,
    /// An operator has to say how it goes on; until then, who gets what stays as it is, and the judge looks on.
    Paused,
    /// It passed every step, and is to be the stable version.
    Promoting,
    /// It is the stable version, and may be taken back by the judge.
    Watching,
    Done,
    /// The stable version has all requests again, before the candidate was promoted.
    Aborted,
    /// Likewise, after it was promoted.
    RolledBack,
}

impl Phase {
    /// In the order of a rollout's way.
    pub const ALL: [Self; 9] = [
        Self::Pending,
        Self::Shadow,
        Self::Canary,
        Self::Paused,
        Self::Promoting,
        Self::Watching,
        Self::Done,
        Self::Aborted,
        Self::RolledBack,
    ];
}

/// What an operator may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    Pause,
    Resume,
    /// On to the next step, whatever the judge says.
    Advance,
    /// All of it at once.
    Promote,
    Abort,
    Rollback,
}

/// What may happen to a rollout.
#[derive(Clone, Debug)]
pub enum Event {
    /// The candidate is loaded and passed its golden check.
    Ready,
    /// The candidate cannot serve, and why.
    Failed(String),
    /// The judge has looked at the step so far.
    Judged(Judgement),
    /// The new route is published: the candidate is the stable version.
    Promoted,
    /// An operator says so, with a reason.
    Told(Command, String),
}

/// One change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transition {
    pub at: Moment,
    pub from: Phase,
    pub to: Phase,
    /// The canary step it is at now.
    pub step: usize,
    pub weight: Weight,
    pub reason: String,
    /// What the judge saw, when it was the judge.
    pub judgement: Option<Judgement>,
}

/// How one version takes over from another.
///
/// It outlives the program that stored it: fields that come later need a default, here and in all that is in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// `MODEL/rN`.
    pub id: Arc<str>,
    pub stable: Version,
    pub candidate: Version,
    pub plan: Plan,
    pub sticky: Option<Sticky>,
    pub phase: Phase,
    /// The canary step it is at, or was at when it was paused.
    #[serde(default)]
    pub step: usize,
    /// What goes on when it is resumed.
    paused_in: Option<Phase>,
    /// Whether the step was passed that it is paused at, so that the next one is its turn.
    #[serde(default)]
    pub passed: bool,
    /// When it began.
    #[serde(default)]
    pub begun: Moment,
    /// Since when it is in this phase and step.
    pub since: Moment,
    /// When the candidate was promoted.
    pub promoted_at: Option<Moment>,
    /// What answers should take at most; `None` until the stable version has shown what it takes.
    pub objective: Option<Duration>,
    /// Whether somebody said so, and it is not what the stable version usually takes.
    #[serde(default)]
    pub objective_is_given: bool,
    /// What the stable version did while it had requests, once it has none to be compared by.
    pub baseline: Option<Box<Window>>,
    /// What the judge said last.
    pub judgement: Option<Judgement>,
    #[serde(default)]
    pub history: Vec<Transition>,
}

impl Rollout {
    /// A rollout whose candidate is not ready yet.
    ///
    /// # Errors
    /// `InvalidArgument` when the plan cannot be, or leads from a version to itself.
    pub fn new(
        id: Arc<str>,
        [stable, candidate]: [Version; 2],
        plan: Plan,
        sticky: Option<Sticky>,
        now: Moment,
    ) -> Result<Self, Error> {
        plan.check()?;
        if stable == candidate {
            return Err(Error::invalid(format!("version '{stable}' is the stable one already")));
        }
        Ok(Self {
            id,
            stable,
            candidate,
            plan,
            sticky,
            phase: Phase::Pending,
            step: 0,
            paused_in: None,
            passed: false,
            begun: now,
            since: now,
            promoted_at: None,
            objective: None,
            objective_is_given: false,
            baseline: None,
            judgement: None,
            history: Vec::new(),
        })
    }

    /// Whether nothing happens any more by itself.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Done | Phase::Aborted | Phase::RolledBack)
    }

    /// Who gets what now.
    pub fn route(&self) -> Route {
        let phase = self.phase_or_paused_in();
        let stable = match phase {
            Phase::Promoting | Phase::Watching | Phase::Done => &self.candidate,
            _ => &self.stable,
        };
        let mut route = Route { sticky: self.sticky.clone(), ..Route::to(self.id.clone(), stable.clone()) };
        match phase {
            Phase::Shadow => {
                let weight = self.plan.shadow.as_ref().map_or(Weight::NONE, |step| step.weight);
                route.shadow = Some(Shadow { version: self.candidate.clone(), weight });
            }
            Phase::Canary => {
                let (variant, version) = (Variant::Canary, self.candidate.clone());
                route.arms.push(Arm { variant, version, weight: self.weight() });
            }
            _ => {}
        }
        route
    }

    /// The time since `since` is not to count: nobody looked.
    pub fn begin_step_anew(&mut self, now: Moment) {
        if !self.is_over() {
            self.since = now;
        }
    }

    /// Where it is, or where it will go on when it is resumed.
    pub fn phase_or_paused_in(&self) -> Phase {
        self.paused_in.unwrap_or(self.phase)
    }

    /// The candidate's share of the answers.
    pub fn weight(&self) -> Weight {
        match self.phase_or_paused_in() {
            Phase::Canary => self.plan.steps.get(self.step).map_or(Weight::NONE, |step| step.weight),
            Phase::Promoting | Phase::Watching | Phase::Done => Weight::FULL,
            _ => Weight::NONE,
        }
    }

    /// Whether the version before may still be needed.
    pub fn needs_both(&self, now: Moment) -> bool {
        let window = self.plan.rollback_window;
        match self.phase {
            Phase::Done => self.promoted_at.is_some_and(|at| elapsed(at, now) < window),
            Phase::Aborted | Phase::RolledBack => elapsed(self.since, now) < window,
            _ => true,
        }
    }

    /// Takes note of what happened; `None` when it changes nothing.
    ///
    /// # Errors
    /// `Conflict` when an operator asks for what cannot be now, saying what can.
    pub fn apply(&mut self, event: Event, now: Moment) -> Result<Option<&Transition>, Error> {
        let before = self.history.len();
        match event {
            Event::Ready if self.phase == Phase::Pending => self.begin(now),
            Event::Failed(reason) if !self.is_over() => self.fail(now, reason, None),
            Event::Promoted if self.phase == Phase::Promoting => {
                self.promoted_at = Some(now);
                self.go(now, Phase::Watching, "it is the stable version".to_owned(), None);
            }
            Event::Judged(judgement) => self.weigh(judgement, now),
            Event::Told(command, reason) => self.obey(command, reason, now)?,
            Event::Ready | Event::Failed(_) | Event::Promoted => {}
        }
        Ok(self.history.get(before..).and_then(<[Transition]>::last))
    }

    /// To the first step.
    fn begin(&mut self, now: Moment) {
        let first = if self.plan.shadow.is_some() { Phase::Shadow } else { Phase::Canary };
        self.go(now, first, "the candidate is ready".to_owned(), None);
    }

    /// The step it is at, while it takes place.
    pub fn current(&self) -> Option<&Step> {
        match self.phase {
            Phase::Shadow => self.plan.shadow.as_ref(),
            Phase::Canary => self.plan.steps.get(self.step),
            _ => None,
        }
    }

    fn weigh(&mut self, judgement: Judgement, now: Moment) {
        let waited = elapsed(self.since, now);
        if !matches!(self.phase, Phase::Shadow | Phase::Canary | Phase::Watching | Phase::Paused) {
            return;
        }
        self.judgement = Some(judgement.clone());
        if judgement.finding == Finding::Worse {
            let worse = judgement.verdicts.iter().filter(|verdict| verdict.finding == Finding::Worse);
            let reason = worse.map(|verdict| verdict.reason.as_str()).collect::<Vec<_>>().join("; ");
            return self.fail(now, reason, Some(judgement));
        }
        if self.phase == Phase::Paused {
            // Only an operator lets it go on.
            return;
        }
        let Some(step) = self.current() else {
            if waited >= self.plan.watch {
                self.go(now, Phase::Done, "nothing was found while it was watched".to_owned(), Some(judgement));
            }
            return;
        };
        let passed = judgement.finding == Finding::Good && judgement.samples >= step.min_samples;
        if passed && waited >= step.min_duration {
            let reason = format!("passed with {} samples in {waited:?}", judgement.samples);
            if step.pause {
                self.passed = true;
                return self.pause(now, format!("{reason}; the plan has it wait here"), Some(judgement));
            }
            return self.advance(now, reason, Some(judgement));
        }
        if waited >= step.max_duration {
            let open = judgement.verdicts.iter().filter(|verdict| verdict.finding == Finding::Inconclusive);
            let open: Vec<&str> = open.map(|verdict| verdict.metric.as_str()).collect();
            let open = if open.is_empty() { String::new() } else { format!("; open: {}", open.join(", ")) };
            let (samples, wanted) = (judgement.samples, step.min_samples);
            let reason = format!("inconclusive after {waited:?}: {samples} of {wanted} samples{open}");
            match self.plan.on_inconclusive {
                Inconclusive::Pause => self.pause(now, reason, Some(judgement)),
                Inconclusive::Abort => self.fail(now, reason, Some(judgement)),
            }
        }
    }

    fn obey(&mut self, command: Command, reason: String, now: Moment) -> Result<(), Error> {
        let refused = |can: &str| {
            Err(Error::new(Code::Conflict, format!("rollout '{}' is {}: {can}", self.id, name_of(self.phase))))
        };
        match (command, self.phase) {
            (Command::Pause, Phase::Shadow | Phase::Canary) => self.pause(now, reason, None),
            (Command::Pause, _) => return refused("only what gets copies or a share can be paused"),
            (Command::Resume, Phase::Paused) if self.passed => self.advance(now, reason, None),
            (Command::Resume, Phase::Paused) => {
                let phase = self.paused_in.take().unwrap_or(Phase::Canary);
                self.go(now, phase, reason, None);
            }
            (Command::Resume, _) => return refused("only what is paused can be resumed"),
            (Command::Advance, Phase::Shadow | Phase::Canary | Phase::Paused) => self.advance(now, reason, None),
            (Command::Advance, _) => return refused("there is no next step"),
            (Command::Promote, Phase::Shadow | Phase::Canary | Phase::Paused) => {
                self.paused_in = None;
                self.go(now, Phase::Promoting, reason, None);
            }
            (Command::Promote, _) => return refused("only a candidate that is ready can be promoted"),
            (Command::Abort, Phase::Pending | Phase::Shadow | Phase::Canary | Phase::Paused) => {
                self.fail(now, reason, None);
            }
            (Command::Abort, _) => return refused("roll it back instead"),
            (Command::Rollback, Phase::Aborted | Phase::RolledBack) => return refused("the stable version serves"),
            (Command::Rollback, Phase::Done) if !self.needs_both(now) => {
                return refused("its rollback window is over; start a rollout to the version before");
            }
            (Command::Rollback, _) => self.fail(now, reason, None),
        }
        Ok(())
    }

    fn advance(&mut self, now: Moment, reason: String, judgement: Option<Judgement>) {
        let next = match self.paused_in.take().unwrap_or(self.phase) {
            Phase::Canary if self.step + 1 < self.plan.steps.len() => {
                self.step += 1;
                Phase::Canary
            }
            Phase::Canary => Phase::Promoting,
            _ => Phase::Canary,
        };
        self.go(now, next, reason, judgement);
    }

    fn pause(&mut self, now: Moment, reason: String, judgement: Option<Judgement>) {
        self.paused_in = Some(self.phase);
        self.go(now, Phase::Paused, reason, judgement);
    }

    /// All requests to the stable version.
    fn fail(&mut self, now: Moment, reason: String, judgement: Option<Judgement>) {
        self.paused_in = None;
        let promoted = matches!(self.phase, Phase::Promoting | Phase::Watching | Phase::Done);
        let to = if promoted { Phase::RolledBack } else { Phase::Aborted };
        self.go(now, to, reason, judgement);
    }

    fn go(&mut self, now: Moment, to: Phase, reason: String, judgement: Option<Judgement>) {
        let from = std::mem::replace(&mut self.phase, to);
        self.passed &= to == Phase::Paused;
        self.since = now;
        let (step, weight) = (self.step, self.weight());
        self.history.push(Transition { at: now, from, to, step, weight, reason, judgement });
    }
}

/// A phase's name, as answers and the audit log have it.
pub fn name_of(phase: Phase) -> String {
    let quoted = serde_json::to_string(&phase).unwrap_or_default();
    quoted.trim_matches('"').to_owned()
}

/// A clock that was set back counts as one that stands still.
fn elapsed(since: Moment, now: Moment) -> Duration {
    Duration::from_millis(now.saturating_sub(since))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{judge::Margins, plan::Arrival, *};

    const MINUTE: Moment = 60_000;

    fn rollout(shadow: bool, percents: &[f64]) -> Rollout {
        let step = |percent| Step::new(Weight::from_percent(percent).unwrap(), Duration::from_secs(60));
        let plan = Plan {
            shadow: shadow.then(|| step(100.0)),
            steps: percents.iter().copied().map(step).collect(),
            margins: Margins::default(),
            on_inconclusive: Inconclusive::Pause,
            on_arrival: Arrival::Queue,
            watch: Duration::from_secs(600),
            rollback_window: Duration::from_secs(3600),
        };
        let versions = ["1", "2"].map(|text| Version::parse(text).unwrap());
        Rollout::new("m/r1".into(), versions, plan, None, 0).unwrap()
    }

    /// The least that was ever stored. Who adds a field gives it a default, and leaves this as it is.
    #[test]
    fn what_was_stored_long_ago_can_be_read() {
        let stored = r#"{
            "id": "m/r1", "stable": "1", "candidate": "2", "phase": "canary", "since": 7,
            "plan": {
                "steps": [{ "weight": 1000000, "min_duration": { "secs": 60, "nanos": 0 }, "min_samples": 100,
                            "max_duration": { "secs": 1800, "nanos": 0 } }],
                "watch": { "secs": 600, "nanos": 0 }, "rollback_window": { "secs": 3600, "nanos": 0 }
            },
            "judgement": { "finding": "good", "samples": 5, "verdicts": [
                { "metric": "errors", "finding": "good", "reason": "none", "margin": 0.01 }] },
            "history": [{ "at": 7, "from": "pending", "to": "canary", "step": 0, "weight": 1000000, "reason": "ready" }]
        }"#;
        let read: Rollout = serde_json::from_str(stored).unwrap();
        assert_eq!((read.phase, read.weight(), &read.plan.margins), (Phase::Canary, Weight::FULL, &Margins::default()));
        let whole = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<Rollout>(&whole).unwrap(), read);
    }

    fn judged(finding: Finding, samples: u64) -> Event {
        Event::Judged(Judgement { finding, samples, verdicts: Vec::new() })
    }

    fn told(command: Command) -> Event {
        Event::Told(command, "as told".to_owned())
    }

    /// Phases and weights as they came, by event.
    fn run(rollout: &mut Rollout, events: impl IntoIterator<Item = (Moment, Event)>) -> Vec<(Phase, f64)> {
        let mut seen = Vec::new();
        for (now, event) in events {
            rollout.apply(event, now).unwrap();
            seen.push((rollout.phase, rollout.weight().percent()));
        }
        seen
    }

    #[test]
    fn a_good_candidate_passes_every_step_to_the_end() {
        let mut rollout = rollout(true, &[10.0, 50.0, 100.0]);
        let good = |minute| (minute * MINUTE, judged(Finding::Good, 100));
        let seen = run(
            &mut rollout,
            [
                (0, Event::Ready),
                (MINUTE / 2, judged(Finding::Good, 100)),
                good(1),
                good(2),
                good(3),
                good(4),
                (4 * MINUTE, Event::Promoted),
                good(13),
                good(14),
            ],
        );
        let expected = [
            (Phase::Shadow, 0.0),
            (Phase::Shadow, 0.0),
            (Phase::Canary, 10.0),
            (Phase::Canary, 50.0),
            (Phase::Canary, 100.0),
            (Phase::Promoting, 100.0),
            (Phase::Watching, 100.0),
            (Phase::Watching, 100.0),
            (Phase::Done, 100.0),
        ];
        assert_eq!(seen, expected);
        assert_eq!(rollout.route().stable.as_str(), "2");
        assert!(rollout.needs_both(63 * MINUTE) && !rollout.needs_both(65 * MINUTE));
    }

    #[test]
    fn a_step_wants_time_and_samples_and_never_passes_without() {
        let mut rollout = rollout(false, &[10.0, 100.0]);
        let seen = run(
            &mut rollout,
            [
                (0, Event::Ready),
                (5 * MINUTE, judged(Finding::Good, 99)),
                (6 * MINUTE, judged(Finding::Inconclusive, 1_000)),
                (30 * MINUTE, judged(Finding::Good, 99)),
                (40 * MINUTE, judged(Finding::Good, 1_000)),
            ],
        );
        assert_eq!(seen[2], (Phase::Canary, 10.0));
        assert_eq!(seen[3], (Phase::Paused, 10.0), "who gets what stays as it is");
        assert_eq!(seen[4], (Phase::Paused, 10.0), "until an operator says so");
        assert_eq!(run(&mut rollout, [(41 * MINUTE, told(Command::Resume))]), [(Phase::Canary, 10.0)]);
        assert_eq!(run(&mut rollout, [(42 * MINUTE, judged(Finding::Good, 100))]), [(Phase::Canary, 100.0)]);
        rollout.plan.on_inconclusive = Inconclusive::Abort;
        assert_eq!(run(&mut rollout, [(99 * MINUTE, judged(Finding::Good, 0))]), [(Phase::Aborted, 0.0)]);
    }

    #[test]
    fn a_bad_candidate_is_given_up_wherever_it_is() {
        for at in 0..5 {
            let mut rollout = rollout(true, &[10.0, 100.0]);
            let way = [
                (0, Event::Ready),
                (MINUTE, judged(Finding::Good, 100)),
                (2 * MINUTE, judged(Finding::Good, 100)),
                (3 * MINUTE, judged(Finding::Good, 100)),
                (3 * MINUTE, Event::Promoted),
            ];
            run(&mut rollout, way.into_iter().take(at + 1));
            let phase = rollout.phase;
            rollout.apply(judged(Finding::Worse, 5), 4 * MINUTE).unwrap();
            let expected = match phase {
                Phase::Promoting => Phase::Promoting,
                Phase::Watching => Phase::RolledBack,
                _ => Phase::Aborted,
            };
            assert_eq!(rollout.phase, expected, "from {phase:?}");
            rollout.apply(Event::Failed("gone".to_owned()), 5 * MINUTE).unwrap();
            assert!(rollout.is_over());
            assert_eq!(rollout.route(), Route::to("m/r1".into(), rollout.stable.clone()));
        }
    }

    #[test]
    fn the_plan_may_have_it_wait() {
        let mut rollout = rollout(false, &[10.0, 100.0]);
        rollout.plan.steps[0].pause = true;
        let seen = run(&mut rollout, [(0, Event::Ready), (MINUTE, judged(Finding::Good, 100))]);
        assert_eq!(seen[1], (Phase::Paused, 10.0));
        assert_eq!(run(&mut rollout, [(2 * MINUTE, told(Command::Advance))]), [(Phase::Canary, 100.0)]);
    }

    #[test]
    fn operators_are_told_what_cannot_be() {
        let mut rollout = rollout(false, &[10.0, 100.0]);
        for command in [Command::Pause, Command::Resume, Command::Advance, Command::Promote] {
            let error = rollout.apply(told(command), 0).unwrap_err();
            assert_eq!(error.code, Code::Conflict);
            assert!(error.message.starts_with("rollout 'm/r1' is pending: "), "{error}");
        }
        rollout.apply(Event::Ready, 0).unwrap();
        rollout.apply(told(Command::Promote), MINUTE).unwrap();
        assert!(rollout.apply(told(Command::Abort), MINUTE).unwrap_err().message.contains("roll it back"));
        rollout.apply(Event::Promoted, MINUTE).unwrap();
        rollout.apply(judged(Finding::Inconclusive, 0), 20 * MINUTE).unwrap();
        assert_eq!(rollout.phase, Phase::Done);
        let late = rollout.clone().apply(told(Command::Rollback), 99 * MINUTE).unwrap_err();
        assert!(late.message.contains("window is over"), "{late}");
        rollout.apply(told(Command::Rollback), 30 * MINUTE).unwrap();
        assert_eq!((rollout.phase, rollout.route().stable.as_str()), (Phase::RolledBack, "1"));
        assert_eq!(rollout.history.last().unwrap().reason, "as told");
    }

    #[test]
    fn it_outlives_a_restart() {
        let mut before = rollout(true, &[10.0, 100.0]);
        run(&mut before, [(0, Event::Ready), (MINUTE, judged(Finding::Good, 100)), (MINUTE, told(Command::Pause))]);
        let after: Rollout = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
        assert_eq!(after, before);
        assert_eq!(after.route(), before.route());
    }

    #[test]
    fn what_was_passed_goes_on_with_the_next_step_and_what_was_not_with_its_own() {
        let mut rollout = rollout(false, &[10.0, 50.0, 100.0]);
        rollout.plan.steps[0].pause = true;
        let good = |minute| (minute * MINUTE, judged(Finding::Good, 100));
        let seen = run(&mut rollout, [(0, Event::Ready), good(1), good(5), (6 * MINUTE, told(Command::Resume))]);
        let expected = [(Phase::Canary, 10.0), (Phase::Paused, 10.0), (Phase::Paused, 10.0), (Phase::Canary, 50.0)];
        assert_eq!(seen, expected);
        let told = [(7 * MINUTE, told(Command::Pause)), (8 * MINUTE, told(Command::Resume))];
        assert_eq!(run(&mut rollout, told), [(Phase::Paused, 50.0), (Phase::Canary, 50.0)]);
        // Nobody stops looking.
        rollout.apply(super::Event::Told(Command::Pause, String::new()), 9 * MINUTE).unwrap();
        assert_eq!(run(&mut rollout, [(10 * MINUTE, judged(Finding::Worse, 100))]), [(Phase::Aborted, 0.0)]);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let commands =
            [Command::Pause, Command::Resume, Command::Advance, Command::Promote, Command::Abort, Command::Rollback];
        let findings = [Finding::Good, Finding::Inconclusive, Finding::Worse];
        prop_oneof![
            Just(Event::Ready),
            Just(Event::Promoted),
            Just(Event::Failed("failed".to_owned())),
            prop::sample::select(commands.to_vec()).prop_map(told),
            (prop::sample::select(findings.to_vec()), 0..200_u64).prop_map(|(found, samples)| judged(found, samples)),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_somebody_serves_and_what_is_over_stays_over(
            shadow: bool,
            events in prop::collection::vec((0..20_u64, any_event()), 0..60),
        ) {
            let mut rollout = rollout(shadow, &[1.0, 10.0, 100.0]);
            let mut now = 0;
            for (minutes, event) in events {
                now += minutes * MINUTE;
                let mut before = rollout.clone();
                let judged_or_ready = matches!(event, Event::Judged(_) | Event::Ready | Event::Promoted);
                match rollout.apply(event, now) {
                    Ok(Some(transition)) => prop_assert_eq!(transition.from, before.phase),
                    Ok(None) => {
                        // What the judge said is kept.
                        before.judgement.clone_from(&rollout.judgement);
                        prop_assert_eq!(&rollout, &before);
                    }
                    Err(error) => {
                        prop_assert_eq!(error.code, Code::Conflict);
                        prop_assert_eq!(&rollout, &before);
                    }
                }
                let route = rollout.route();
                prop_assert!(route.check().is_ok());
                prop_assert!(route.stable == rollout.stable || route.stable == rollout.candidate);
                if before.is_over() {
                    prop_assert!(rollout == before || rollout.phase == Phase::RolledBack);
                }
                if judged_or_ready && matches!(before.phase, Phase::Aborted | Phase::RolledBack) {
                    prop_assert_eq!(&rollout, &before);
                }
                if judged_or_ready && before.phase == Phase::Paused {
                    // It is guarded, and does not go on by itself.
                    prop_assert!(matches!(rollout.phase, Phase::Paused | Phase::Aborted));
                }
            }
        }
    }
}
