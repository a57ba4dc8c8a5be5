//! `Standing`: what is to be remembered of a model beyond its files: who serves, what was tried, who said so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    id::{Alias, ModelName, Version},
    rollout::{
        Moment, Rollout,
        route::{Arm, Route, Shadow, Sticky},
    },
    source::pointer::Pointer,
};

/// What is remembered of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// Rises with every change.
    pub epoch: u64,
    /// How many rollouts and splits the model had; the next one gets the next number.
    pub rollouts: u64,
    /// The version that serves where new ones do not take over by themselves.
    pub stable: Option<Version>,
    /// Versions that are not to be tried by themselves.
    pub passed_over: Vec<PassedOver>,
    /// The last rollout, or the one that runs.
    pub rollout: Option<Rollout>,
    /// How the requests are divided by hand.
    pub split: Option<ByHand>,
    /// What operators call versions.
    pub aliases: BTreeMap<Alias, Pointer>,
}

/// A version that is not to be tried by itself, until its files change or an operator says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    pub version: Version,
    /// Stands for the files it had.
    pub stamp: u64,
    pub reason: String,
    pub since: Moment,
}

/// How an operator divided the requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByHand {
    /// Keys are drawn by its id.
    pub route: Route,
    pub author: String,
    pub reason: String,
    pub since: Moment,
}

/// How the requests are to be divided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Default: the version that is stable now.
    pub stable: Option<Version>,
    pub arms: Vec<Arm>,
    pub shadow: Option<Shadow>,
    pub sticky: Option<Sticky>,
}

impl Standing {
    /// The id of the model's next rollout or split, counted up.
    pub fn next_id(&mut self, model: &ModelName) -> std::sync::Arc<str> {
        self.rollouts += 1;
        format!("{model}/r{}", self.rollouts).into()
    }

    /// Whether a version's files are passed over.
    pub fn passes_over(&self, version: &Version, stamp: u64) -> Option<&PassedOver> {
        self.passed_over.iter().find(|passed| passed.version == *version && passed.stamp == stamp)
    }

    pub fn pass_over(&mut self, version: &Version, stamp: u64, reason: &str, since: Moment) {
        self.take_back(version);
        let (version, reason) = (version.clone(), reason.to_owned());
        self.passed_over.push(PassedOver { version, stamp, reason, since });
    }

    /// A version may be tried again.
    pub fn take_back(&mut self, version: &Version) {
        self.passed_over.retain(|passed| passed.version != *version);
    }

    /// The rollout that is not over.
    pub fn running(&self) -> Option<&Rollout> {
        self.rollout.as_ref().filter(|rollout| !rollout.is_over())
    }

    /// Who gets what, as far as it was decided: by a rollout that runs, or by hand.
    pub fn route(&self) -> Option<Route> {
        self.running().map(Rollout::route).or_else(|| self.split.as_ref().map(|split| split.route.clone()))
    }

    pub fn needs(&self, version: &Version, now: Moment) -> bool {
        self.needed(now).contains(version)
    }

    /// Versions that must serve for as long as this stands.
    pub fn needed(&self, now: Moment) -> Vec<Version> {
        let rollout = self.rollout.iter().filter(|rollout| rollout.needs_both(now));
        let mut needed: Vec<Version> =
            rollout.flat_map(|rollout| [rollout.stable.clone(), rollout.candidate.clone()]).collect();
        if let Some(ByHand { route, .. }) = &self.split {
            needed.push(route.stable.clone());
            needed.extend(route.arms.iter().map(|arm| arm.version.clone()));
            needed.extend(route.shadow.iter().map(|shadow| shadow.version.clone()));
        }
        needed
    }
}
