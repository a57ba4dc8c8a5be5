//! What `/metrics` shows of the catalog: how rollouts stand, what versions answered, and whether copies agree; and of
//! the places that models come from.
//!
//! Read when somebody scrapes, so that nothing is left of models that went.

use std::{
    collections::BTreeSet,
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
    source::follow::Status,
};

/// Everything there is to show of the catalog and of the places now.
pub(super) fn page(catalog: &Catalog, sources: Vec<Status>) -> Page {
    let mut page = Page::default();
    let mut shown = BTreeSet::new();
    // Models may have one place in common, which answers them all or none.
    for source in sources.iter().filter(|source| shown.insert(source.uri.as_str())) {
        show_source(source, &mut page);
    }
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

fn show_source(status: &Status, page: &mut Page) {
    page.source(&SourceStanding {
        source: &status.uri,
        up: status.answered.is_some() && status.away.is_none() && status.given_up.is_none(),
        answered: status.answered,
        problems: status.problems.len(),
        fetching: status.fetching.values().map(|one| one.total.saturating_sub(one.fetched)).sum(),
    });
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
