//! What there is to say, at the place that they are from, of the models in the catalog.

use std::collections::BTreeMap;

use crate::{
    error::abridge,
    id::ModelName,
    metrics::Way,
    model::{
        State,
        catalog::{CatalogReader, Deployment, Entry},
    },
    rollout::{Phase, Rollout},
    source::{
        WriteBack,
        cache::mirror,
        write_back::{Promotion, Record, Served, Teller, Told},
    },
};

/// Tells of the models of the catalog.
pub struct Catalogued {
    catalog: CatalogReader,
    /// What is to be told of all of them; of each what its own settings say, without.
    settings: Option<WriteBack>,
}

impl Catalogued {
    pub fn new(catalog: CatalogReader, settings: Option<WriteBack>) -> Self {
        Self { catalog, settings }
    }
}

impl Teller for Catalogued {
    fn told(&self, name: &ModelName) -> Option<Told> {
        let catalog = self.catalog.load();
        let deployment = catalog.deployments.get(name)?;
        let settings = self.settings.as_ref().unwrap_or(&deployment.write_back).clone();
        if settings.is_off() {
            return Some(Told { settings, ..Told::default() });
        }
        let rollout = deployment.rollout.as_deref();
        let mut records: BTreeMap<String, Record> = BTreeMap::new();
        for entry in &deployment.entries {
            let digest = || mirror::manifest_of(entry.files.as_ref()?).map(|manifest| manifest.digest);
            let digest = if settings.tags { digest() } else { None };
            let record = Record { digest, state: state(entry), rollout: None };
            records.insert(entry.version.to_string(), record);
        }
        if let Some((rollout, result)) = rollout.and_then(|rollout| Some((rollout, result(rollout)?))) {
            // Before all that was there at start was looked at, nobody can tell what is not there.
            let state = catalog.complete.then(|| "unloaded".to_owned());
            let gone = || Record { state, ..Record::default() };
            records.entry(rollout.candidate.to_string()).or_insert_with(gone).rollout = Some(result);
        }
        let alias = settings.promoted_alias.as_deref();
        let promotion = alias.zip(rollout).and_then(|(alias, rollout)| promotion(alias, rollout, deployment));
        Some(Told { settings, records, promotion })
    }

    fn served(&self, name: &ModelName, version: &str) -> Option<Served> {
        let catalog = self.catalog.load();
        let version = catalog.deployments.get(name)?.entry(version)?.serving.clone()?;
        let mut served = Served::default();
        // Copies are nobody's requests.
        for way in Way::ALL.into_iter().filter(|way| *way != Way::Shadow) {
            let window = version.tally.window(way);
            served.requests += window.requests;
            served.errors += window.errors;
            served.latency.join(&window.latency);
        }
        Some(served)
    }
}

/// The state of a version when it is one that lasts.
fn state(entry: &Entry) -> Option<String> {
    match entry.state {
        State::Ready => Some(State::Ready.as_str().to_owned()),
        state @ (State::Failed | State::Held) => Some(format!("{}: {}", state.as_str(), abridge(&entry.reason))),
        State::Settling | State::Loading | State::Draining => None,
    }
}

/// How a rollout ended; `None` while nobody knows.
fn result(rollout: &Rollout) -> Option<String> {
    let strategy = if rollout.plan.shadow.is_some() { "shadow, canary" } else { "canary" };
    let why = || rollout.history.last().map(|last| abridge(&last.reason)).unwrap_or_default();
    let result = match rollout.phase {
        Phase::Watching | Phase::Done => "promoted".to_owned(),
        Phase::Aborted => format!("aborted: {}", why()),
        Phase::RolledBack => format!("rolled_back: {}", why()),
        Phase::Pending | Phase::Shadow | Phase::Canary | Phase::Paused | Phase::Promoting => return None,
    };
    Some(format!("{result} ({strategy}, {})", rollout.id))
}

/// What a rollout says of the alias that follows rollouts.
fn promotion(alias: &str, rollout: &Rollout, deployment: &Deployment) -> Option<Promotion> {
    let at = rollout.promoted_at?;
    let is_undone = match rollout.phase {
        // What came after it is not its doing.
        Phase::Watching | Phase::Done if deployment.default.as_ref() == Some(&rollout.candidate) => false,
        Phase::RolledBack => true,
        _ => return None,
    };
    Some(Promotion {
        alias: alias.to_owned(),
        rollout: format!("{} at {at}", rollout.id),
        from: rollout.stable.clone(),
        to: rollout.candidate.clone(),
        is_undone,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::Version,
        rollout::{Command, Event, plan::Settings},
    };

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    /// A rollout from version 1 to 2, and what it says at each moment: its result, and whether the alias is to be at 2.
    fn told(events: Vec<Event>, default: &str) -> Vec<(Option<String>, Option<bool>)> {
        let plan = Settings { steps: vec![100.0], ..Settings::default() }.plan().unwrap();
        let mut rollout = Rollout::new("m/r1".into(), [version("1"), version("2")], plan, None, 0).unwrap();
        let deployment = Deployment { default: Some(version(default)), ..Deployment::default() };
        let says = |rollout: &Rollout| {
            let promotion = promotion("champion", rollout, &deployment);
            (result(rollout), promotion.map(|promotion| !promotion.is_undone))
        };
        let mut told = vec![says(&rollout)];
        for event in events {
            rollout.apply(event, 7).unwrap();
            told.push(says(&rollout));
        }
        told
    }

    #[test]
    fn a_rollout_says_how_it_ended_and_where_its_alias_belongs() {
        let by_hand = |command| Event::Told(command, "as told".to_owned());
        let (promote, rollback) = (by_hand(Command::Promote), by_hand(Command::Rollback));
        let some = |text: &str| Some(format!("{text} (canary, m/r1)"));
        let (promoted, rolled_back) = (some("promoted"), some("rolled_back: as told"));
        assert_eq!(
            told(vec![Event::Ready, promote.clone(), Event::Promoted, rollback], "2"),
            [(None, None), (None, None), (None, None), (promoted.clone(), Some(true)), (rolled_back, Some(false))]
        );
        assert_eq!(
            told(vec![Event::Ready, Event::Failed("no opset".to_owned())], "1").last(),
            Some(&(some("aborted: no opset"), None))
        );
        // Another version has taken over since.
        assert_eq!(told(vec![Event::Ready, promote, Event::Promoted], "3").last(), Some(&(promoted, None)));
    }
}
