//! `Schedule`: the order, the patience and the grouping of a model's waiting requests, as its author wants them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::batcher::Client;

/// More levels than anyone tells apart; every request looks at those above its own.
pub const MAX_PRIORITY_LEVELS: u32 = 256;

/// The table `[queue]` of a model's settings. Without it, requests run in the order of their arrival, and an idle
/// executor takes at once what there is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// How long an idle executor waits for a batch to fill, from the arrival of its oldest request on. A request with
    /// a deadline waits for half of the time it can spare at most, one that does not share its run not at all.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub max_delay: Duration,
    /// Rows that batches shall have: the largest of these sizes that the waiting requests of one shape reach goes at
    /// once, anything less after `max_delay`. Each is run once before the model serves. Where texts are taken, a row is one of
    /// 64 tokens. Default: what warm-up found worth grouping.
    pub preferred_batch_sizes: Vec<usize>,
    /// Levels of priority, at most 256: requests of level 1 run before those of level 2, and so on. 0: all are alike,
    /// and the parameter `priority` has no effect.
    pub priority_levels: u32,
    /// Level of requests that do not name one; to be given with `priority_levels`.
    pub default_priority: u32,
    /// What happens to a request that has waited for its queue timeout: "reject" answers that its deadline passed,
    /// "delay" lets it run when nothing else waits.
    pub timeout_action: TimeoutAction,
    /// Queue timeout: how long a request may wait for its run. 0: as long as its own deadline allows.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub default_timeout: Duration,
    /// Whether, with `timeout_action = "delay"`, a request's parameter `timeout` shortens its queue timeout. In all
    /// other cases that parameter is a deadline for the answer: nobody listens later, so a later run would be wasted.
    pub allow_timeout_override: bool,
    /// Requests that may wait in each level. 0: as many as the server's `queue.max_requests` lets wait altogether.
    pub max_size: usize,
    /// What differs for one level: tables `[queue.priority.N]` with `timeout_action`, `default_timeout`,
    /// `allow_timeout_override` and `max_size`.
    #[serde(serialize_with = "by_name")]
    pub priority: BTreeMap<u32, LevelSettings>,
}

/// TOML's keys are texts.
fn by_name<S: serde::Serializer>(levels: &BTreeMap<u32, LevelSettings>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(levels.iter().map(|(number, level)| (number.to_string(), level)))
}

/// What happens to a request that has waited for its queue timeout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TimeoutAction {
    /// It is answered with "deadline exceeded" and costs no run.
    #[default]
    Reject,
    /// It steps behind every request that is still in time, of whatever level.
    Delay,
}

/// The table `[queue.priority.N]`; what is not given is as in `[queue]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LevelSettings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_action: Option<TimeoutAction>,
    #[serde(with = "humantime_serde::option", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub default_timeout: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_timeout_override: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_size: Option<usize>,
}

/// The settings of one level, defaults filled in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Level {
    pub timeout_action: TimeoutAction,
    /// Zero for none.
    pub default_timeout: Duration,
    pub allow_timeout_override: bool,
    /// Zero for no bound of its own.
    pub max_size: usize,
}

impl From<Level> for LevelSettings {
    fn from(level: Level) -> Self {
        Self {
            timeout_action: Some(level.timeout_action),
            default_timeout: Some(level.default_timeout),
            allow_timeout_override: Some(level.allow_timeout_override),
            max_size: Some(level.max_size),
        }
    }
}

/// How urgent a request is, for whom, and until when anybody waits for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Urgency {
    /// 1 is the highest level, 0 the model's default.
    pub priority: u64,
    /// When the transport gives the call up.
    pub deadline: Option<Instant>,
    /// When the time is over that the request's own parameter `timeout` allows.
    pub timeout: Option<Instant>,
    /// Whose it is: clients take turns.
    pub client: Client,
}

/// Where a request stands in the queue of a model, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Place {
    /// From 0, the highest.
    pub level: usize,
    /// From then on the answer is worth nothing.
    pub deadline: Option<Instant>,
    /// The end of the queue timeout; it means nothing once the request runs.
    pub expires: Option<Instant>,
}

impl Schedule {
    /// Checks the table of a model whose requests may have `max_batch_size` rows.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub fn validate(&self, max_batch_size: Option<usize>) -> Result<(), String> {
        let levels = self.priority_levels;
        if levels > MAX_PRIORITY_LEVELS {
            return Err(format!("queue.priority_levels must be at most {MAX_PRIORITY_LEVELS}, got {levels}"));
        }
        let default = self.default_priority;
        if levels > 0 && !(1..=levels).contains(&default) {
            return Err(format!(
                "queue.default_priority must be 1 to {levels}, the queue.priority_levels, got {default}"
            ));
        }
        if levels == 0 && default > 0 {
            return Err(format!("queue.default_priority is {default}, and queue.priority_levels is not given"));
        }
        if let Some(level) = self.priority.keys().find(|&&level| level == 0 || level > levels) {
            return Err(format!("queue.priority.{level} is none of the {levels} levels of queue.priority_levels"));
        }
        for &size in &self.preferred_batch_sizes {
            if size == 0 {
                return Err("queue.preferred_batch_sizes must be at least 1 each".to_owned());
            }
            if let Some(limit) = max_batch_size.filter(|&limit| size > limit) {
                return Err(format!("queue.preferred_batch_sizes must not exceed max_batch_size, {limit}, got {size}"));
            }
        }
        Ok(())
    }

    /// The settings of every level, the highest first; one when there are no levels.
    pub fn levels(&self) -> Vec<Level> {
        let level = |number: u32| {
            let own = self.priority.get(&number).cloned().unwrap_or_default();
            Level {
                timeout_action: own.timeout_action.unwrap_or(self.timeout_action),
                default_timeout: own.default_timeout.unwrap_or(self.default_timeout),
                allow_timeout_override: own.allow_timeout_override.unwrap_or(self.allow_timeout_override),
                max_size: own.max_size.unwrap_or(self.max_size),
            }
        };
        (1..=self.priority_levels.max(1)).map(level).collect()
    }

    /// The index in [`levels`](Self::levels) of a request that asks for `priority`; a level there is not stands for
    /// the default, as Triton has it.
    pub fn level(&self, priority: u64) -> usize {
        let there = u32::try_from(priority).ok().filter(|level| (1..=self.priority_levels).contains(level));
        there.unwrap_or(self.default_priority).saturating_sub(1) as usize
    }
}

impl Level {
    /// The place of a request that is queued `now` in this level, which has the index `level`.
    pub fn place(&self, level: usize, urgency: &Urgency, now: Instant) -> Place {
        let own_timeout = self.default_timeout;
        let mut expires = if own_timeout.is_zero() { None } else { now.checked_add(own_timeout) };
        let mut deadline = urgency.deadline;
        if self.timeout_action == TimeoutAction::Delay && self.allow_timeout_override {
            expires = earlier(expires, urgency.timeout);
        } else {
            deadline = earlier(deadline, urgency.timeout);
        }
        Place { level, deadline, expires }
    }
}

/// The earlier of two instants, of which there may be none.
pub(super) fn earlier(left: Option<Instant>, right: Option<Instant>) -> Option<Instant> {
    left.into_iter().chain(right).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Schedule {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn levels_inherit_what_they_do_not_say() {
        let schedule = read(
            "priority_levels = 3\ndefault_priority = 2\ndefault_timeout = \"2s\"\nmax_size = 7\n\
             [priority.3]\ntimeout_action = \"delay\"\ndefault_timeout = \"10ms\"\nallow_timeout_override = true\n",
        );
        assert_eq!(schedule.validate(None), Ok(()));
        let two_seconds = Level { default_timeout: Duration::from_secs(2), max_size: 7, ..Level::default() };
        let third = Level {
            timeout_action: TimeoutAction::Delay,
            default_timeout: Duration::from_millis(10),
            allow_timeout_override: true,
            max_size: 7,
        };
        assert_eq!(schedule.levels(), [two_seconds, two_seconds, third]);
        assert_eq!(Schedule::default().levels(), [Level::default()]);
        let written = toml::to_string(&schedule).unwrap();
        assert_eq!(read(&written), schedule, "{written}");
    }

    #[test]
    fn priorities_become_levels() {
        let schedule = Schedule { priority_levels: 3, default_priority: 2, ..Schedule::default() };
        assert_eq!([0, 1, 2, 3].map(|priority| schedule.level(priority)), [1, 0, 1, 2]);
        assert_eq!([4, u64::MAX].map(|priority| schedule.level(priority)), [1, 1], "none such is the default");
        assert_eq!(Schedule::default().level(u64::MAX), 0, "without levels there is nothing to choose");
    }

    #[test]
    fn mistakes_name_the_key() {
        for (text, words) in [
            ("priority_levels = 257\ndefault_priority = 1", "queue.priority_levels must be at most 256"),
            ("priority_levels = 2", "queue.default_priority must be 1 to 2"),
            ("priority_levels = 2\ndefault_priority = 3", "queue.default_priority must be 1 to 2"),
            ("default_priority = 1", "queue.priority_levels is not given"),
            ("priority_levels = 2\ndefault_priority = 1\n[priority.3]", "queue.priority.3"),
            ("[priority.1]", "queue.priority.1"),
            ("preferred_batch_sizes = [4, 0]", "queue.preferred_batch_sizes must be at least 1"),
            ("preferred_batch_sizes = [4, 9]", "must not exceed max_batch_size, 8, got 9"),
        ] {
            let message = read(text).validate(Some(8)).unwrap_err();
            assert!(message.contains(words), "{text}: {message}");
        }
        assert_eq!(read("preferred_batch_sizes = [4, 9]").validate(None), Ok(()));
        for text in ["max_delay = 5", "timeout_action = \"drop\"", "[priority.x]", "[priority.1]\nmax_delay = \"1s\""] {
            assert!(toml::from_str::<Schedule>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_request_s_timeout_is_a_deadline_unless_it_may_replace_the_queue_s() {
        let now = Instant::now();
        let at = |millis| Some(now + Duration::from_millis(millis));
        let urgency = |timeout| Urgency { deadline: at(90), timeout, ..Urgency::default() };
        for (timeout_action, allow_timeout_override) in
            [(TimeoutAction::Reject, false), (TimeoutAction::Reject, true), (TimeoutAction::Delay, false)]
        {
            let default_timeout = Duration::from_millis(50);
            let level = Level { timeout_action, allow_timeout_override, default_timeout, max_size: 0 };
            let place = level.place(3, &urgency(at(20)), now);
            assert_eq!(place, Place { level: 3, deadline: at(20), expires: at(50) });
            assert_eq!(level.place(0, &urgency(None), now).deadline, at(90));
        }
        let timeout_action = TimeoutAction::Delay;
        let delay = Level { timeout_action, allow_timeout_override: true, ..Level::default() };
        assert_eq!(delay.place(0, &urgency(at(20)), now), Place { level: 0, deadline: at(90), expires: at(20) });
        let delay = Level { default_timeout: Duration::from_millis(50), ..delay };
        assert_eq!(delay.place(0, &urgency(at(20)), now).expires, at(20), "a smaller one counts");
        assert_eq!(delay.place(0, &urgency(at(70)), now).expires, at(50), "a larger one does not");
    }
}
