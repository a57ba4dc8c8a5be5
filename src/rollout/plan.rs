//! `Plan`: by which steps a candidate gets a model's traffic, and what it has to show at each.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    judge::Margins,
    route::{Sticky, Weight},
};
use crate::error::Error;

/// A step without samples is given up after so many times its shortest duration, but not before [`PATIENCE`].
const LONGEST: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(30 * 60);
const MIN_SAMPLES: u64 = 100;

/// What becomes of a version that appears in the repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnNewVersion {
    /// It serves as soon as it is ready.
    #[default]
    Swap,
    /// It gets copies, and an operator decides.
    Shadow,
    /// It takes over by the plan's steps.
    Canary,
    /// It is loaded and warm, and gets nothing.
    Hold,
}

/// How versions take over from each other, in the table `[rollout]` of model.toml and in what starts a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What becomes of a version that appears in the repository: "swap", "shadow", "canary" or "hold".
    pub on_new_version: OnNewVersion,
    /// Percent of the requests of which a candidate gets copies before it gets requests; 0 for none, which with
    /// on_new_version = "shadow" stands for all.
    pub shadow: f64,
    /// Percents of the requests, step by step; the last is 100.
    pub steps: Vec<f64>,
    /// How long each step takes at least.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub every: Duration,
    /// Answers of the candidate that each step needs.
    pub min_samples: u64,
    /// How long a step waits for them. Default: ten times `every`, at least 30 minutes.
    #[serde(with = "humantime_serde::option", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub max_duration: Option<Duration>,
    /// Whether an operator has to let each step go on.
    pub manual: bool,
    /// Where the key stands by which a request keeps its version: "header:NAME", "param:NAME" or "input:NAME".
    #[schemars(with = "Option<String>")]
    pub sticky: Option<Sticky>,
    /// What happens when a step takes too long: "pause" or "abort".
    pub on_inconclusive: Inconclusive,
    /// What becomes of a version that arrives while a rollout runs: "queue" or "replace".
    pub on_arrival: Arrival,
    /// How long a promoted version is watched, and taken back when it is worse.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub watch: Duration,
    /// How long the version before stays loaded after the promotion.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub rollback_window: Duration,
    /// What answers should take at most. Default: the stable version's p95 when the rollout starts, and 1 ms at least,
    /// as below that the machine decides.
    #[serde(with = "humantime_serde::option", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub latency_objective: Option<Duration>,
    /// By how much a candidate may be worse.
    pub margins: Margins,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The candidate's share of the requests, or of their copies.
    pub weight: Weight,
    pub min_duration: Duration,
    /// Answers of the candidate that must be seen.
    pub min_samples: u64,
    /// After so long without them it is inconclusive.
    pub max_duration: Duration,
    /// Whether an operator has to let the rollout go on from here.
    #[serde(default)]
    pub pause: bool,
}

/// What happens when a step takes too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Inconclusive {
    /// It waits for an operator.
    #[default]
    Pause,
    Abort,
}

/// What happens to the version that arrives while a rollout runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Arrival {
    /// It has its turn afterwards.
    #[default]
    Queue,
    /// It takes the candidate's place.
    Replace,
}

/// By which steps a candidate gets a model's traffic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Copies first, if any.
    pub shadow: Option<Step>,
    /// Of rising weights; the last one is all.
    pub steps: Vec<Step>,
    #[serde(default)]
    pub margins: Margins,
    #[serde(default)]
    pub on_inconclusive: Inconclusive,
    #[serde(default)]
    pub on_arrival: Arrival,
    /// How long a promoted version is watched, and may be taken back by the judge.
    pub watch: Duration,
    /// How long the version before stays loaded after the promotion.
    pub rollback_window: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            on_new_version: OnNewVersion::default(),
            shadow: 0.0,
            steps: vec![1.0, 5.0, 25.0, 50.0, 100.0],
            every: Duration::from_secs(600),
            min_samples: MIN_SAMPLES,
            max_duration: None,
            manual: false,
            sticky: None,
            on_inconclusive: Inconclusive::default(),
            on_arrival: Arrival::default(),
            watch: Duration::from_secs(600),
            rollback_window: Duration::from_secs(3600),
            latency_objective: None,
            margins: Margins::default(),
        }
    }
}

impl Settings {
    /// # Errors
    /// `InvalidArgument` naming the key.
    pub fn plan(&self) -> Result<Plan, Error> {
        let step = |&percent: &f64| {
            let mut step = Step::new(Weight::from_percent(percent)?, self.every);
            step.min_samples = self.min_samples;
            step.max_duration = self.max_duration.unwrap_or(step.max_duration);
            step.pause = self.manual;
            Ok(step)
        };
        let steps = self.steps.iter().map(step).collect::<Result<Vec<Step>, Error>>();
        // Who wants copies and does not say of how many wants all.
        let copies = self.on_new_version == OnNewVersion::Shadow && self.shadow == 0.0;
        let shadow = if copies { 100.0 } else { self.shadow };
        let shadow = (shadow != 0.0).then(|| step(&shadow)).transpose();
        let named = |key: &'static str| move |error: Error| Error::invalid(format!("rollout.{key}: {error}"));
        let mut shadow = shadow.map_err(named("shadow"))?;
        if let (OnNewVersion::Shadow, Some(step)) = (self.on_new_version, &mut shadow) {
            step.pause = true;
        }
        let plan = Plan {
            shadow,
            steps: steps.map_err(named("steps"))?,
            margins: self.margins.clone(),
            on_inconclusive: self.on_inconclusive,
            on_arrival: self.on_arrival,
            watch: self.watch,
            rollback_window: self.rollback_window,
        };
        plan.check().map_err(named("steps"))?;
        Ok(plan)
    }
}

impl Step {
    /// A step that takes `every`, at least.
    pub fn new(weight: Weight, every: Duration) -> Self {
        Self {
            weight,
            min_duration: every,
            min_samples: MIN_SAMPLES,
            max_duration: PATIENCE.max(every.saturating_mul(LONGEST)),
            pause: false,
        }
    }
}

impl Plan {
    /// # Errors
    /// `InvalidArgument` saying which step is wrong.
    pub fn check(&self) -> Result<(), Error> {
        if self.steps.last().is_none_or(|last| last.weight != Weight::FULL) {
            return Err(Error::invalid("the last step of a rollout must be 100 percent"));
        }
        for pair in self.steps.windows(2) {
            if pair[0].weight >= pair[1].weight {
                let (before, after) = (pair[0].weight.percent(), pair[1].weight.percent());
                return Err(Error::invalid(format!(
                    "each step of a rollout must be more than the one before, got {before} and then {after} percent"
                )));
            }
        }
        let zero = self.shadow.iter().chain(&self.steps).any(|step| step.weight == Weight::NONE);
        if zero {
            return Err(Error::invalid("a step of a rollout must be more than 0 percent"));
        }
        for step in self.shadow.iter().chain(&self.steps) {
            if step.max_duration < step.min_duration {
                return Err(Error::invalid(format!(
                    "the step of {} percent takes {:?} at least and {:?} at most",
                    step.weight.percent(),
                    step.min_duration,
                    step.max_duration
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(percents: &[f64]) -> Plan {
        let step = |&percent: &f64| Step::new(Weight::from_percent(percent).unwrap(), Duration::from_secs(60));
        Plan {
            shadow: None,
            steps: percents.iter().map(step).collect(),
            margins: Margins::default(),
            on_inconclusive: Inconclusive::default(),
            on_arrival: Arrival::default(),
            watch: Duration::from_secs(600),
            rollback_window: Duration::from_secs(3600),
        }
    }

    #[test]
    fn steps_rise_to_all() {
        assert!(plan(&[1.0, 5.0, 25.0, 50.0, 100.0]).check().is_ok());
        for (percents, wrong) in [
            (&[][..], "the last step"),
            (&[1.0, 50.0], "the last step"),
            (&[5.0, 5.0, 100.0], "got 5 and then 5 percent"),
            (&[0.0, 100.0], "more than 0 percent"),
        ] {
            let error = plan(percents).check().unwrap_err();
            assert!(error.message.contains(wrong), "{error}");
        }
        let mut hasty = plan(&[100.0]);
        hasty.steps[0].max_duration = Duration::from_secs(1);
        assert!(hasty.check().unwrap_err().message.contains("60s at least and 1s at most"));
    }

    #[test]
    fn settings_are_words_for_a_plan() {
        let settings = |text: &str| toml::from_str::<Settings>(text).unwrap();
        let plan = settings("shadow = 100\nsteps = [10, 100]\nevery = '1m'\nmanual = true").plan().unwrap();
        assert_eq!(plan.shadow.unwrap().weight, Weight::FULL);
        assert_eq!(plan.steps.len(), 2);
        assert!(plan.steps.iter().all(|step| step.pause && step.max_duration == PATIENCE));
        assert!(Settings::default().plan().is_ok());
        for (text, wrong) in [
            ("steps = [10]", "rollout.steps: the last step"),
            ("steps = [10, 200]", "rollout.steps: a weight must be 0 to 100 percent, got 200"),
            ("shadow = -1", "rollout.shadow: a weight"),
            ("every = '1h'\nmax_duration = '1m'", "rollout.steps: the step of 1 percent takes"),
        ] {
            let error = settings(text).plan().unwrap_err();
            assert!(error.message.starts_with(wrong), "{error}");
        }
    }

    #[test]
    fn a_step_waits_ten_times_as_long_as_it_takes() {
        let step = |minutes: u64| Step::new(Weight::FULL, Duration::from_secs(60 * minutes)).max_duration;
        assert_eq!(step(1), Duration::from_secs(30 * 60));
        assert_eq!(step(10), Duration::from_secs(100 * 60));
    }
}
