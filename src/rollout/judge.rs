//! Whether a candidate is as good as the version that serves beside it.
//!
//! Both are looked at over the same time, so that a bad hour of the whole system is nobody's fault. What is missing is
//! never taken for good: it is inconclusive. Each metric gets its part of the chance to be wrong, [`ALPHA`] in all.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stats::{
    divergence::Divergence,
    histogram::Histogram,
    sequential::{Difference, Share, Test},
};

/// The share of good candidates that may be given up at a step.
const ALPHA: f64 = 0.05;
/// A candidate that fails more than this share of so many requests is given up at once.
const HOPELESS: (f64, u64) = (0.5, 20);
/// So is one with more than this share of answers that are no numbers, of so many, where the stable version has none.
const NO_NUMBERS: (f64, u64) = (0.001, 50);

/// The smallest difference that a test is made for: a percentage point.
const SMALLEST: f64 = 0.01;

/// What one version did in a time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Window {
    /// Requests that were answered, well or not. What the client is to blame for does not count.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Seconds that good answers took.
    pub latency: Histogram,
    /// Good answers with an output that is looked at.
    pub looked_at: u64,
    /// Those with NaN or infinite values.
    pub no_numbers: u64,
    /// By output.
    pub answers: Vec<Answers>,
}

/// What one output's answers were.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    pub output: Arc<str>,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// How often each label was the answer: so many labels as are told apart, and all others.
    Labels { counts: BTreeMap<Arc<str>, u64>, other: u64 },
    /// How often values of each size were.
    Values(Histogram),
}

impl Window {
    /// What came since `earlier`, which this one was before.
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |answers: &Answers| earlier.answers.iter().find(|other| other.output == answers.output);
        Self {
            requests: self.requests.saturating_sub(earlier.requests),
            errors: self.errors.saturating_sub(earlier.errors),
            latency: self.latency.since(&earlier.latency),
            looked_at: self.looked_at.saturating_sub(earlier.looked_at),
            no_numbers: self.no_numbers.saturating_sub(earlier.no_numbers),
            answers: self.answers.iter().map(|answers| answers.since(before(answers))).collect(),
        }
    }
}

impl Answers {
    fn since(&self, earlier: Option<&Self>) -> Self {
        let kind = match (&self.kind, earlier.map(|earlier| &earlier.kind)) {
            (Kind::Values(now), Some(Kind::Values(then))) => Kind::Values(now.since(then)),
            (Kind::Labels { counts, other }, Some(Kind::Labels { counts: then, other: others })) => Kind::Labels {
                counts: counts
                    .iter()
                    .map(|(label, count)| (label.clone(), count.saturating_sub(*then.get(label).unwrap_or(&0))))
                    .collect(),
                other: other.saturating_sub(*others),
            },
            (kind, _) => kind.clone(),
        };
        Self { output: self.output.clone(), kind }
    }
}

/// How the answers to copies compare with the live ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Agreement {
    pub compared: u64,
    /// Those with another label.
    pub disagreed: u64,
    /// Copies that failed while the live answer was good.
    pub failed: u64,
    /// Copies that were not made or not answered, for want of room.
    pub missing: u64,
}

impl Agreement {
    /// What came since `earlier`, which this one was before.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            compared: self.compared.saturating_sub(earlier.compared),
            disagreed: self.disagreed.saturating_sub(earlier.disagreed),
            failed: self.failed.saturating_sub(earlier.failed),
            missing: self.missing.saturating_sub(earlier.missing),
        }
    }
}

/// What the judge gets to see.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evidence {
    pub stable: Window,
    pub candidate: Window,
    /// While copies go to the candidate.
    pub shadow: Option<Agreement>,
    /// What answers should take at most, if that is known.
    pub objective: Option<Duration>,
    /// Whether answers over the objective are told and not judged: where the stable version's are of another time, in
    /// which there may have been less to do, and the objective is no more than what it usually took then.
    pub told_only: bool,
}

/// By how much a candidate may be worse.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Margins {
    /// Share of requests that fail, above the stable version's.
    pub errors: f64,
    /// Share of answers over the latency objective, above the stable version's.
    pub slow: f64,
    /// Jensen–Shannon divergence of an output's answers from the stable version's, in bits, 0 to 1.
    pub distribution: f64,
    /// Share of copies with another label.
    pub disagreement: f64,
}

impl Default for Margins {
    fn default() -> Self {
        Self { errors: 0.01, slow: 0.05, distribution: 0.1, disagreement: 0.1 }
    }
}

/// What is found of one metric, or of the candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Not worse by more than the margin, as far as known.
    Good,
    /// Too little is known.
    Inconclusive,
    /// Worse for certain, by more than the margin.
    Worse,
}

/// What is found of one metric, in numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Verdict {
    pub metric: String,
    pub finding: Finding,
    /// A sentence with the numbers behind it.
    pub reason: String,
    pub stable: Option<f64>,
    pub candidate: Option<f64>,
    /// How far off the difference may be.
    pub radius: Option<f64>,
    pub margin: f64,
}

/// What is found of the candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Judgement {
    pub finding: Finding,
    /// Answers of the candidate that it rests on.
    pub samples: u64,
    pub verdicts: Vec<Verdict>,
}

/// Looks at everything there is to see.
pub fn judge(evidence: &Evidence, margins: &Margins) -> Judgement {
    let Evidence { stable, candidate, shadow, objective, told_only } = evidence;
    // Without an objective nothing is known of either.
    let slow = |window: &Window| match objective {
        Some(objective) => Share { hits: window.latency.above(objective.as_secs_f64()), of: window.latency.total() },
        None => Share { hits: 0, of: 0 },
    };
    let outputs = candidate.answers.len();
    let alpha = ALPHA / (3 + outputs + usize::from(shadow.is_some())) as f64;
    let mut verdicts = Vec::new();
    match shadow {
        None => {
            verdicts.push(errors(stable, candidate, margins.errors, alpha));
            let mut slow = shares("slow", [slow(stable), slow(candidate)], margins.slow, alpha);
            if *told_only {
                slow.finding = Finding::Good;
                slow.reason.push_str("; told and not judged, as the stable version's is of another time");
            }
            verdicts.push(slow);
        }
        Some(agreement) => {
            // Copies run behind live requests, so that what they take says nothing.
            verdicts.push(failed_copies(agreement, margins.errors, alpha));
            verdicts.push(disagreement(agreement, margins.disagreement, alpha));
        }
    }
    verdicts.push(no_numbers(stable, candidate, alpha));
    for found in &candidate.answers {
        let beside = stable.answers.iter().find(|answers| answers.output == found.output);
        verdicts.push(distribution(beside, found, margins.distribution));
    }
    let samples = shadow.map_or(candidate.requests, |agreement| agreement.compared + agreement.failed);
    let finding = verdicts.iter().map(|verdict| verdict.finding).max().unwrap_or(Finding::Inconclusive);
    Judgement { finding, samples, verdicts }
}

fn errors(stable: &Window, candidate: &Window, margin: f64, alpha: f64) -> Verdict {
    let share = |window: &Window| Share { hits: window.errors, of: window.requests };
    let mut verdict = shares("errors", [share(stable), share(candidate)], margin, alpha);
    let (limit, least) = HOPELESS;
    if candidate.requests >= least && candidate.errors as f64 > limit * candidate.requests as f64 {
        verdict.finding = Finding::Worse;
        verdict.reason = format!("{} of {} requests failed", candidate.errors, candidate.requests);
    }
    verdict
}

/// Compares two shares of which less is better.
fn shares(metric: &str, [stable, candidate]: [Share; 2], margin: f64, alpha: f64) -> Verdict {
    let numbers = |share: Share| match share.value() {
        Some(value) => format!("{:.2} % ({} of {})", value * 100.0, share.hits, share.of),
        None => "nothing".to_owned(),
    };
    let difference = Difference::between(stable, candidate, Test { alpha, size: f64::max(margin, SMALLEST) });
    let finding = match &difference {
        None => Finding::Inconclusive,
        Some(difference) if difference.is_larger(alpha) && difference.estimate > margin => Finding::Worse,
        Some(_) => Finding::Good,
    };
    let within = difference.map_or_else(String::new, |difference| {
        format!(", {:+.2} ± {:.2} points", difference.estimate * 100.0, difference.radius * 100.0)
    });
    Verdict {
        metric: metric.to_owned(),
        finding,
        reason: format!(
            "{metric}: candidate {}, stable {}{within}; {:.2} points more may be",
            numbers(candidate),
            numbers(stable),
            margin * 100.0
        ),
        stable: stable.value(),
        candidate: candidate.value(),
        radius: difference.map(|difference| difference.radius),
        margin,
    }
}

fn failed_copies(agreement: &Agreement, margin: f64, alpha: f64) -> Verdict {
    let seen = Share { hits: agreement.failed, of: agreement.compared + agreement.failed };
    limited("failed_copies", seen, margin, alpha)
}

fn disagreement(agreement: &Agreement, margin: f64, alpha: f64) -> Verdict {
    limited("disagreement", Share { hits: agreement.disagreed, of: agreement.compared }, margin, alpha)
}

/// Compares a share with what it may be.
fn limited(metric: &str, seen: Share, margin: f64, alpha: f64) -> Verdict {
    let difference = Difference::above(margin, seen, Test { alpha, size: f64::max(margin, SMALLEST) });
    let finding = match &difference {
        None => Finding::Inconclusive,
        Some(difference) if difference.is_larger(alpha) => Finding::Worse,
        Some(_) => Finding::Good,
    };
    Verdict {
        metric: metric.to_owned(),
        finding,
        reason: format!("{metric}: {} of {} copies; {:.2} % may be", seen.hits, seen.of, margin * 100.0),
        stable: None,
        candidate: seen.value(),
        radius: difference.map(|difference| difference.radius),
        margin,
    }
}

fn no_numbers(stable: &Window, candidate: &Window, alpha: f64) -> Verdict {
    let (limit, least) = NO_NUMBERS;
    let share = |window: &Window| Share { hits: window.no_numbers, of: window.looked_at };
    let mut verdict = shares("no_numbers", [share(stable), share(candidate)], limit, alpha);
    if candidate.looked_at == 0 && stable.looked_at == 0 {
        // A model whose outputs nobody looks at is judged by the rest.
        verdict.finding = Finding::Good;
        "no_numbers: no output is looked at".clone_into(&mut verdict.reason);
    }
    let none_of_stable = stable.looked_at > 0 && stable.no_numbers == 0;
    let many = candidate.no_numbers as f64 > limit * candidate.looked_at as f64;
    if candidate.looked_at >= least && many && none_of_stable {
        verdict.finding = Finding::Worse;
    }
    verdict
}

fn distribution(stable: Option<&Answers>, candidate: &Answers, margin: f64) -> Verdict {
    let metric = format!("distribution of '{}'", candidate.output);
    let divergence = stable.and_then(|stable| divergence(&stable.kind, &candidate.kind));
    let (finding, reason) = match divergence {
        None => (Finding::Inconclusive, format!("{metric}: one version gave no answer yet")),
        Some(found) => {
            let finding = if found.certain() > margin { Finding::Worse } else { Finding::Good };
            let Divergence { bits, by_chance } = found;
            let reason = if stable.is_some_and(|stable| !alike(&stable.kind, &candidate.kind)) {
                "one version answers with labels and the other with values".to_owned()
            } else {
                format!(
                    "{bits:.3} bits from the stable version's, of which {by_chance:.3} may be chance; {margin:.3} may be"
                )
            };
            (finding, format!("{metric}: {reason}"))
        }
    };
    let candidate = divergence.map(|divergence| divergence.bits);
    let radius = divergence.map(|divergence| divergence.by_chance);
    Verdict { metric, finding, reason, stable: None, candidate, radius, margin }
}

fn divergence(stable: &Kind, candidate: &Kind) -> Option<Divergence> {
    match (stable, candidate) {
        (Kind::Values(stable), Kind::Values(candidate)) => Divergence::between(stable.counts(), candidate.counts()),
        (Kind::Labels { counts: stable, other }, Kind::Labels { counts: candidate, other: others }) => {
            let mut both = vec![[*other, *others]];
            both.extend(stable.iter().map(|(label, count)| [*count, *candidate.get(label).unwrap_or(&0)]));
            let only = candidate.iter().filter(|(label, _)| !stable.contains_key(*label));
            both.extend(only.map(|(_, count)| [0, *count]));
            let side = |index: usize| both.iter().map(|counts| counts[index]).collect::<Vec<u64>>();
            Divergence::between(&side(0), &side(1))
        }
        // Nothing that one of them answers is anything that the other does.
        _ => (answers(stable) > 0 && answers(candidate) > 0).then_some(Divergence { bits: 1.0, by_chance: 0.0 }),
    }
}

fn alike(stable: &Kind, candidate: &Kind) -> bool {
    std::mem::discriminant(stable) == std::mem::discriminant(candidate)
}

fn answers(kind: &Kind) -> u64 {
    match kind {
        Kind::Values(values) => values.total(),
        Kind::Labels { counts, other } => counts.values().sum::<u64>() + other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBJECTIVE: Duration = Duration::from_millis(100);

    fn window(requests: u64, errors: u64) -> Window {
        let mut latency = Histogram::default();
        (errors..requests).for_each(|_| latency.add(0.01));
        Window { requests, errors, latency, looked_at: requests - errors, ..Window::default() }
    }

    fn finding(stable: Window, candidate: Window) -> Finding {
        judge(
            &Evidence { stable, candidate, shadow: None, objective: Some(OBJECTIVE), told_only: false },
            &Margins::default(),
        )
        .finding
    }

    fn labels(counts: &[u64]) -> Vec<Answers> {
        let named = counts.iter().enumerate().map(|(label, &count)| (label.to_string().into(), count));
        vec![Answers { output: "label".into(), kind: Kind::Labels { counts: named.collect(), other: 0 } }]
    }

    #[test]
    fn as_good_is_good_and_worse_is_worse() {
        assert_eq!(finding(window(9_000, 180), window(1_000, 20)), Finding::Good);
        assert_eq!(finding(window(9_000, 180), window(1_000, 100)), Finding::Worse);
        assert_eq!(finding(window(900_000, 18_000), window(900_000, 20_700)), Finding::Good, "less than the margin");
    }

    #[test]
    fn what_is_missing_is_inconclusive() {
        assert_eq!(finding(window(1_000, 10), window(0, 0)), Finding::Inconclusive);
        assert_eq!(finding(window(0, 0), window(1_000, 10)), Finding::Inconclusive);
        let candidate = Window { answers: labels(&[3, 4]), ..window(1_000, 10) };
        assert_eq!(finding(window(1_000, 10), candidate), Finding::Inconclusive);
    }

    #[test]
    fn hopeless_candidates_are_given_up_at_once() {
        assert_eq!(finding(window(0, 0), window(20, 11)), Finding::Worse, "though nothing is known of the other");
        assert_ne!(finding(window(0, 0), window(19, 19)), Finding::Worse);
        let odd = |requests, no_numbers| Window { no_numbers, ..window(requests, 0) };
        assert_eq!(finding(window(500, 0), odd(50, 1)), Finding::Worse);
        assert_ne!(finding(window(500, 0), odd(49, 1)), Finding::Worse);
        assert_ne!(finding(odd(500, 3), odd(50, 1)), Finding::Worse, "the stable version has them as well");
    }

    #[test]
    fn slow_candidates_are_worse() {
        let slow = |requests, slow| {
            let mut window = window(requests, 0);
            (0..slow).for_each(|_| window.latency.add(0.5));
            window
        };
        assert_eq!(finding(slow(9_000, 450), slow(1_000, 60)), Finding::Good);
        assert_eq!(finding(slow(9_000, 450), slow(1_000, 300)), Finding::Worse);
    }

    #[test]
    fn shifted_answers_are_worse_and_chance_is_not() {
        let shifted = |counts: [u64; 3]| Window { answers: labels(&counts), ..window(counts.iter().sum(), 0) };
        assert_eq!(finding(shifted([3_000, 3_000, 3_000]), shifted([330, 340, 330])), Finding::Good);
        assert_eq!(finding(shifted([3_000, 3_000, 3_000]), shifted([1_000, 0, 0])), Finding::Worse);
        let values = |value: f64| {
            let mut histogram = Histogram::default();
            (0..1_000).for_each(|_| histogram.add(value));
            vec![Answers { output: "y".into(), kind: Kind::Values(histogram) }]
        };
        let answered = |answers| Window { answers, ..window(1_000, 0) };
        assert_eq!(finding(answered(values(1.05)), answered(values(1.2))), Finding::Good);
        assert_eq!(finding(answered(values(1.05)), answered(values(2.0))), Finding::Worse);
        // Labels in place of values are worse, once there are some.
        let labelled = |count: u64| {
            vec![Answers { output: "y".into(), kind: Kind::Labels { counts: [("0".into(), count)].into(), other: 0 } }]
        };
        assert_eq!(finding(answered(values(1.05)), answered(labelled(0))), Finding::Inconclusive);
        assert_eq!(finding(answered(values(1.05)), answered(labelled(1))), Finding::Worse);
    }

    #[test]
    fn copies_are_judged_by_what_they_answer_and_not_by_when() {
        let judged = |compared, disagreed, failed| {
            let shadow = Some(Agreement { compared, disagreed, failed, missing: 0 });
            let mut candidate = window(compared, 0);
            (0..compared).for_each(|_| candidate.latency.add(9.0));
            let stable = window(compared, 0);
            judge(
                &Evidence { stable, candidate, shadow, objective: Some(OBJECTIVE), told_only: false },
                &Margins::default(),
            )
        };
        assert_eq!(judged(1_000, 10, 0).finding, Finding::Good);
        assert_eq!(judged(1_000, 400, 0).finding, Finding::Worse);
        assert_eq!(judged(1_000, 0, 200).finding, Finding::Worse);
        assert_eq!(judged(0, 0, 0).finding, Finding::Inconclusive);
        assert_eq!(judged(90, 0, 10).samples, 100);
    }

    #[test]
    fn a_verdict_has_the_numbers_that_it_rests_on() {
        let judged = judge(
            &Evidence {
                stable: window(9_000, 180),
                candidate: window(1_000, 100),
                shadow: None,
                objective: Some(OBJECTIVE),
                told_only: false,
            },
            &Margins::default(),
        );
        let reason = &judged.verdicts[0].reason;
        for part in ["candidate 10.00 % (100 of 1000)", "stable 2.00 % (180 of 9000)", "+8.00 ±", "1.00 points"] {
            assert!(reason.contains(part), "{reason}");
        }
    }
}
