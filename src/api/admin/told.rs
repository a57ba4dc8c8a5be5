//! The documents as they are made of what the server knows.

use std::time::{Duration, SystemTime};

use humantime_serde::re::humantime::format_rfc3339_millis;
use serde_json::Value;

use super::documents::{
    ArmStatus, AuditEntry, CopiesStatus, ModelStatus, OutputComparedStatus, OverrideStatus, PassedOverStatus,
    RolloutStatus, RolloutSummary, RouteByHand, RouteStatus, ServingStatus, Share, StepStatus, TransitionStatus,
    VersionStatus,
};
use crate::{
    control::{
        standing::{ByHand, PassedOver, Standing},
        store::Logged,
    },
    id::ModelName,
    model::{
        State,
        catalog::{Deployment, Entry},
    },
    observe::copies::{Comparison, OutputComparison},
    rollout::{
        Moment, Rollout, Transition,
        judge::Agreement,
        plan::Step,
        route::{Arm, Route, Shadow},
    },
};

impl ModelStatus {
    pub fn new(name: &ModelName, deployment: &Deployment) -> Self {
        Self {
            name: name.to_string(),
            default_version: deployment.default.as_ref().map(ToString::to_string),
            problem: deployment.problem.clone(),
            versions: deployment.entries.iter().map(VersionStatus::from).collect(),
            aliases: deployment.aliases.iter().map(|(alias, to)| (alias.to_string(), to.to_string())).collect(),
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
            state: State::as_str(entry.state).to_owned(),
            reason: entry.reason.clone(),
            serving,
        }
    }
}

impl From<&Route> for RouteStatus {
    fn from(route: &Route) -> Self {
        let share = |shadow: &Shadow| Share { version: shadow.version.to_string(), percent: shadow.weight.percent() };
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
    /// A rollout of the `deployment`, as it stands at `now`.
    pub fn new(model: &ModelName, rollout: &Rollout, epoch: u64, deployment: Option<&Deployment>, now: Moment) -> Self {
        let judgement = rollout.judgement.as_ref();
        let last = rollout.history.last();
        let entries = deployment.iter().flat_map(|deployment| &deployment.entries);
        let candidate = entries.into_iter().find(|entry| entry.version == rollout.candidate);
        let comparison = candidate.and_then(|entry| entry.serving.as_ref()).map(|version| version.tally.comparison());
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
            passed: rollout.passed,
            copies: comparison.filter(|found| *found != Comparison::default()).map(CopiesStatus::from),
            history: rollout.history.iter().map(TransitionStatus::from).collect(),
        }
    }
}

impl From<Comparison> for CopiesStatus {
    fn from(Comparison { agreement, missing: _, outputs, unlike }: Comparison) -> Self {
        let outputs = outputs.iter().map(OutputComparedStatus::from).collect();
        let Agreement { compared, disagreed, failed, missing } = agreement;
        Self { compared, disagreed, failed, missing, outputs, unlike }
    }
}

impl From<&OutputComparison> for OutputComparedStatus {
    fn from(found: &OutputComparison) -> Self {
        let measured = |number| (found.measured > 0).then_some(number);
        Self {
            output: found.output.to_string(),
            compared: found.compared,
            disagreed: found.disagreed,
            max_difference: measured(found.max_abs),
            mean_difference: measured(found.mean_abs),
            cosine: found.mean_cosine,
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
fn rfc3339(moment: Moment) -> String {
    const END: Moment = 253_402_300_800_000;
    let moment = if moment < END { moment } else { 0 };
    format_rfc3339_millis(SystemTime::UNIX_EPOCH + Duration::from_millis(moment)).to_string()
}
