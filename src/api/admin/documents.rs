//! The documents of the admin API, as the server writes them and the command line reads them.
//!
//! Shares are in percent, times in seconds, and moments are texts of RFC 3339 with milliseconds. Whoever reads them must
//! bear with fields that are not known here.

use std::time::{Duration, SystemTime};

use humantime_serde::re::humantime::format_rfc3339_millis;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    control::{
        standing::{ByHand, PassedOver, Standing},
        store::Logged,
    },
    id::ModelName,
    model::{
        State as ModelState,
        catalog::{Deployment, Entry},
    },
    rollout::{
        Moment, Phase, Rollout, Transition,
        judge::{Finding, Judgement, Verdict},
        plan::Step,
        route::{Arm, Route},
    },
};

/// A model: its versions, and who gets which of them.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ModelStatus {
    pub name: String,
    /// The version that answers requests that name none, but for those that the route gives to another.
    pub default_version: Option<String>,
    /// Why the model has no version at all.
    pub problem: Option<String>,
    pub versions: Vec<VersionStatus>,
    /// How requests are divided; null when the default version gets all of them and no rollout is under way.
    pub route: Option<RouteStatus>,
    /// The rollout under way, or the last one.
    pub rollout: Option<RolloutSummary>,
    /// Rises with every change of route or rollout. It is the ETag, and what If-Match has to say.
    pub epoch: u64,
}

/// One version of a model.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct VersionStatus {
    pub version: String,
    pub state: String,
    /// Why it is in this state; empty when there is nothing to say.
    pub reason: String,
    #[serde(flatten)]
    pub serving: Option<ServingStatus>,
}

/// What is known of a version once it serves.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ServingStatus {
    pub instances: usize,
    pub batching: bool,
    pub batching_reason: String,
    pub batch_rows: usize,
    pub max_batch_size: Option<usize>,
    pub pending_requests: usize,
    pub load_seconds: f64,
    pub notes: Vec<String>,
}

/// How the requests for a model are divided.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RouteStatus {
    /// What keys are drawn by: `MODEL/rN`.
    pub id: String,
    /// Gets what no arm gets.
    pub stable: String,
    pub arms: Vec<ArmStatus>,
    pub shadow: Option<Share>,
    /// Where the key stands by which a request keeps its version; null for the request's id.
    pub sticky: Option<String>,
}

/// A version that gets a share of the requests under a name of its own; the canary's is `canary`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ArmStatus {
    pub name: String,
    pub version: String,
    pub percent: f64,
}

/// A version and its share of the requests, or of their copies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Share {
    pub version: String,
    /// From 0 to 100.
    pub percent: f64,
}

/// A rollout in short.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RolloutSummary {
    pub id: String,
    pub phase: Phase,
    /// The step it is at, as an index of the steps.
    pub step: usize,
    pub weight_percent: f64,
    pub stable: String,
    pub candidate: String,
}

/// A rollout, with what the judge sees and all that happened.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RolloutStatus {
    pub id: String,
    pub model: String,
    pub phase: Phase,
    /// Why it is in this phase and step.
    pub reason: String,
    /// The step it is at, as an index of `steps`.
    pub step: usize,
    pub steps: Vec<StepStatus>,
    /// The step of copies before them, if any.
    pub shadow: Option<StepStatus>,
    /// The candidate's share of the answers now.
    pub weight_percent: f64,
    pub stable: String,
    pub candidate: String,
    /// Where the key stands by which a request keeps its version; null for the request's id.
    pub sticky: Option<String>,
    /// The model's; it is the ETag, and what If-Match has to say.
    pub epoch: u64,
    /// Since when it is in this phase and step.
    pub since: String,
    pub step_age_seconds: f64,
    /// What answers should take at most; null before the first step.
    pub objective_seconds: Option<f64>,
    /// Answers of the candidate that the verdicts rest on.
    pub samples: u64,
    /// What the judge found last; null before it looked.
    pub finding: Option<Finding>,
    /// The same, metric by metric.
    pub verdicts: Vec<Verdict>,
    /// Every change, oldest first.
    pub history: Vec<TransitionStatus>,
}

/// One step of a rollout.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct StepStatus {
    /// The candidate's share of the requests, or of their copies.
    pub weight_percent: f64,
    pub min_duration_seconds: f64,
    /// Answers of the candidate that must be seen.
    pub min_samples: u64,
    /// After so long without them it is inconclusive.
    pub max_duration_seconds: f64,
    /// Whether an operator has to let it go on from here.
    pub pause: bool,
}

/// One change of a rollout.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct TransitionStatus {
    pub at: String,
    pub from: Phase,
    pub to: Phase,
    pub step: usize,
    pub weight_percent: f64,
    pub reason: String,
    /// What the judge saw, when it was the judge.
    pub judgement: Option<Judgement>,
}

/// A part of the audit log, oldest first.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct AuditPage {
    pub entries: Vec<AuditEntry>,
    /// Where the entries go on, as path and query; null when these are the last.
    pub next: Option<String>,
}

/// One entry of the audit log.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// Counted from 1, without a gap.
    pub number: u64,
    pub at: String,
    pub model: String,
    /// Who did it: an operator by name, `judge`, or `repository`.
    pub author: String,
    pub action: String,
    pub reason: String,
    /// The numbers behind it.
    pub details: Value,
    /// SHA-256 over this entry and the hash of the one before.
    pub hash: String,
}

/// What of a model is other than its files and settings in the repository have it.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct OverrideStatus {
    pub model: String,
    /// The version that serves where new ones do not take over by themselves.
    pub stable: Option<String>,
    /// How its requests are divided by hand.
    pub route: Option<RouteByHand>,
    /// Versions that do not take over by themselves, until their files change or an operator starts a rollout to them.
    pub passed_over: Vec<PassedOverStatus>,
    /// The rollout under way.
    pub rollout: Option<RolloutSummary>,
}

/// A route, who made it, and why.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RouteByHand {
    #[serde(flatten)]
    pub route: RouteStatus,
    pub author: String,
    pub reason: String,
    pub since: String,
}

/// A version that does not take over by itself, and why.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct PassedOverStatus {
    pub version: String,
    pub reason: String,
    pub since: String,
}

/// Models of which no override is left.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Cleared {
    pub cleared: Vec<String>,
}

/// Why a call failed.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Refusal {
    pub error: String,
    /// With 409: how the model stands now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ModelStatus>,
}

impl ModelStatus {
    pub fn new(name: &ModelName, deployment: &Deployment) -> Self {
        Self {
            name: name.to_string(),
            default_version: deployment.default.as_ref().map(ToString::to_string),
            problem: deployment.problem.clone(),
            versions: deployment.entries.iter().map(VersionStatus::from).collect(),
            route: deployment.route.as_ref().map(RouteStatus::from),
            rollout: deployment.rollout.as_deref().map(RolloutSummary::from),
            epoch: deployment.epoch,
        }
    }
}

impl From<&Entry> for VersionStatus {
    fn from(entry: &Entry) -> Self {
        let serving = entry.serving.as_ref().map(|version| ServingStatus {
            instances: version.instances,
            batching: version.batching.enabled,
            batching_reason: version.batching.reason.clone(),
            batch_rows: version.batching.group,
            max_batch_size: version.max_batch_size,
            pending_requests: version.in_flight(),
            load_seconds: version.load_duration.as_secs_f64(),
            notes: version.signature.notes.clone(),
        });
        Self {
            version: entry.version.to_string(),
            state: ModelState::as_str(entry.state).to_owned(),
            reason: entry.reason.clone(),
            serving,
        }
    }
}

impl From<&Route> for RouteStatus {
    fn from(route: &Route) -> Self {
        let share = |shadow: &crate::rollout::route::Shadow| Share {
            version: shadow.version.to_string(),
            percent: shadow.weight.percent(),
        };
        Self {
            id: route.id.to_string(),
            stable: route.stable.to_string(),
            arms: route.arms.iter().map(ArmStatus::from).collect(),
            shadow: route.shadow.as_ref().map(share),
            sticky: route.sticky.as_ref().map(ToString::to_string),
        }
    }
}

impl From<&Arm> for ArmStatus {
    fn from(arm: &Arm) -> Self {
        Self { name: arm.variant.as_str().to_owned(), version: arm.version.to_string(), percent: arm.weight.percent() }
    }
}

impl From<&Rollout> for RolloutSummary {
    fn from(rollout: &Rollout) -> Self {
        Self {
            id: rollout.id.to_string(),
            phase: rollout.phase,
            step: rollout.step,
            weight_percent: rollout.weight().percent(),
            stable: rollout.stable.to_string(),
            candidate: rollout.candidate.to_string(),
        }
    }
}

impl RolloutStatus {
    /// The rollout of a model with this `epoch`, as it stands at `now`.
    pub fn new(model: &ModelName, rollout: &Rollout, epoch: u64, now: Moment) -> Self {
        let judgement = rollout.judgement.as_ref();
        let last = rollout.history.last();
        Self {
            id: rollout.id.to_string(),
            model: model.to_string(),
            phase: rollout.phase,
            reason: last.map_or_else(String::new, |transition| transition.reason.clone()),
            step: rollout.step,
            steps: rollout.plan.steps.iter().map(StepStatus::from).collect(),
            shadow: rollout.plan.shadow.as_ref().map(StepStatus::from),
            weight_percent: rollout.weight().percent(),
            stable: rollout.stable.to_string(),
            candidate: rollout.candidate.to_string(),
            sticky: rollout.sticky.as_ref().map(ToString::to_string),
            epoch,
            since: rfc3339(rollout.since),
            step_age_seconds: Duration::from_millis(now.saturating_sub(rollout.since)).as_secs_f64(),
            objective_seconds: rollout.objective.map(|objective| objective.as_secs_f64()),
            samples: judgement.map_or(0, |judgement| judgement.samples),
            finding: judgement.map(|judgement| judgement.finding),
            verdicts: judgement.map(|judgement| judgement.verdicts.clone()).unwrap_or_default(),
            history: rollout.history.iter().map(TransitionStatus::from).collect(),
        }
    }
}

impl From<&Step> for StepStatus {
    fn from(step: &Step) -> Self {
        Self {
            weight_percent: step.weight.percent(),
            min_duration_seconds: step.min_duration.as_secs_f64(),
            min_samples: step.min_samples,
            max_duration_seconds: step.max_duration.as_secs_f64(),
            pause: step.pause,
        }
    }
}

impl From<&Transition> for TransitionStatus {
    fn from(transition: &Transition) -> Self {
        Self {
            at: rfc3339(transition.at),
            from: transition.from,
            to: transition.to,
            step: transition.step,
            weight_percent: transition.weight.percent(),
            reason: transition.reason.clone(),
            judgement: transition.judgement.clone(),
        }
    }
}

impl OverrideStatus {
    pub fn new(model: &ModelName, standing: &Standing) -> Self {
        let by_hand = |split: &ByHand| RouteByHand {
            route: RouteStatus::from(&split.route),
            author: split.author.clone(),
            reason: split.reason.clone(),
            since: rfc3339(split.since),
        };
        let passed_over = |passed: &PassedOver| PassedOverStatus {
            version: passed.version.to_string(),
            reason: passed.reason.clone(),
            since: rfc3339(passed.since),
        };
        Self {
            model: model.to_string(),
            stable: standing.stable.as_ref().map(ToString::to_string),
            route: standing.split.as_ref().map(by_hand),
            passed_over: standing.passed_over.iter().map(passed_over).collect(),
            rollout: standing.running().map(RolloutSummary::from),
        }
    }
}

impl From<Logged> for AuditEntry {
    fn from(Logged { number, entry, hash }: Logged) -> Self {
        // What was stored is JSON; shown as a text, should somebody have changed it since.
        let details = serde_json::from_str(&entry.details).unwrap_or(Value::String(entry.details));
        Self {
            number,
            at: rfc3339(entry.at),
            model: entry.model,
            author: entry.author,
            action: entry.action,
            reason: entry.reason,
            details,
            hash,
        }
    }
}

/// A moment as RFC 3339 has it, in UTC. One beyond the year 9999, which it cannot say, is the epoch's beginning.
pub fn rfc3339(moment: Moment) -> String {
    const END: Moment = 253_402_300_800_000;
    let moment = if moment < END { moment } else { 0 };
    format_rfc3339_millis(SystemTime::UNIX_EPOCH + Duration::from_millis(moment)).to_string()
}
