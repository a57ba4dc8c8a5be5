//! What `/metrics` shows of the catalog: how rollouts stand, what versions answered, and whether copies agree; and of
//! the places that models come from.
//!
//! Read when somebody scrapes, so that nothing is left of models that went.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    metrics::{CopiesCompared, OutputCompared, Page, RolloutStanding, SourceStanding},
    model::{
        ModelVersion,
        catalog::{Catalog, Deployment},
    },
    observe::copies::{Comparison, Missing, OutputComparison},
    rollout::{self, Phase, Rollout, judge::Finding},
    source::{follow::Status, write_back::reporter::Outcome},
};

/// Everything there is to show of the catalog and of the places now.
pub(super) fn page(catalog: &Catalog, sources: Vec<Status>) -> Page {
    let mut page = Page::default();
    // Models may have one place in common.
    let mut places: BTreeMap<&str, Vec<&Status>> = BTreeMap::new();
    sources.iter().for_each(|source| places.entry(&source.uri).or_default().push(source));
    places.into_iter().for_each(|(uri, followed)| show_place(uri, &followed, &mut page));
    for (name, deployment) in &catalog.deployments {
        let Deployment { rollout, entries, .. } = deployment;
        if let Some(rollout) = rollout {
            show_rollout(name.as_str(), rollout, &mut page);
        }
        for version in entries.iter().filter_map(|entry| entry.serving.as_ref()) {
            if version.predictions {
                version.tally.show(name.as_str(), version.version.as_str(), &version.labels, &mut page);
            }
            show_copies(version, &mut page);
        }
    }
    page
}

fn show_place(uri: &str, followed: &[&Status], page: &mut Page) {
    let is_up = |status: &&Status| status.answered.is_some() && status.away.is_none() && status.given_up.is_none();
    let fetching = followed.iter().flat_map(|status| status.fetching.values());
    page.source(&SourceStanding {
        source: uri,
        up: followed.iter().copied().all(|status| is_up(&status)),
        answered: followed.iter().filter_map(|status| status.answered).min(),
        problems: followed.iter().map(|status| status.problems.len()).sum(),
        fetching: fetching.map(|one| one.total.saturating_sub(one.fetched)).sum(),
        write_backs: write_backs(followed),
    });
}

/// Tries to write back to a place, by outcome; all of them where there was one.
fn write_backs(followed: &[&Status]) -> Vec<(&'static str, u64)> {
    let written: Vec<_> = followed.iter().filter_map(|status| status.write_back.as_ref()).collect();
    let tries = |outcome| written.iter().filter_map(|one| one.tries.get(&outcome)).sum();
    let outcomes = Outcome::ALL.into_iter().filter(|_| !written.is_empty());
    outcomes.map(|outcome| (outcome.as_str(), tries(outcome))).collect()
}

fn show_rollout(model: &str, rollout: &Rollout, page: &mut Page) {
    let phases = Phase::ALL.map(rollout::name_of);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let judged = rollout.judgement.iter().flat_map(|judgement| &judgement.verdicts);
    let verdict = |finding| match finding {
        Finding::Good => 1,
        Finding::Inconclusive => 0,
        Finding::Worse => -1,
    };
    page.rollout(&RolloutStanding {
        model,
        rollout: &rollout.id,
        phase: &rollout::name_of(rollout.phase),
        phases: &phases.each_ref().map(String::as_str),
        weight: rollout.weight().percent() / 100.0,
        step: rollout.step,
        // A clock that was set back counts as one that stands still.
        age: now.saturating_sub(Duration::from_millis(rollout.since)),
        bounds: rollout.current().map(|step| [step.min_duration, step.max_duration]),
        verdicts: judged.map(|found| (found.metric.as_str(), verdict(found.finding))).collect(),
    });
}

fn show_copies(version: &ModelVersion, page: &mut Page) {
    let found = version.tally.comparison();
    if found == Comparison::default() {
        return;
    }
    let numbers = |output: &OutputComparison, number| (output.measured > 0).then_some(number);
    let outputs = found.outputs.iter().map(|output| OutputCompared {
        output: &output.output,
        compared: output.compared,
        disagreed: output.disagreed,
        max_difference: numbers(output, output.max_abs),
        mean_difference: numbers(output, output.mean_abs),
        cosine: output.mean_cosine,
    });
    let Missing { full, busy, late, untyped } = found.missing;
    let missing = [("full", full), ("busy", busy), ("late", late), ("untyped", untyped)];
    page.copies(&CopiesCompared {
        model: version.name.as_str(),
        version: version.version.as_str(),
        failed: found.agreement.failed,
        missing: &missing,
        outputs: outputs.collect(),
    });
}
