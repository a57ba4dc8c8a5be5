//! A rollout in words and a bar, as a terminal shows it.

use std::time::Duration;

use humantime_serde::re::humantime::format_duration;

use crate::{
    api::admin::documents::{CopiesStatus, OutputComparedStatus, RolloutStatus, StepStatus, TransitionStatus},
    rollout::{Phase, judge::Finding, name_of},
};

/// Columns of the bar of a step.
const BAR: usize = 24;

/// Where it is, step by step, what the judge sees, and how it goes on; one entry a line.
pub fn lines(status: &RolloutStatus) -> Vec<String> {
    let RolloutStatus { id, stable, candidate, .. } = status;
    let age = whole_seconds(status.step_age_seconds);
    let mut lines = vec![format!("rollout {id}: version {stable} → {candidate}, {} for {age}", name_of(status.phase))];
    lines.push(format!("  {}", steps(status)));
    lines.push(format!("  weight {} %, {}", status.weight_percent, samples(status)));
    if !status.reason.is_empty() {
        lines.push(format!("  {}", status.reason));
    }
    for verdict in &status.verdicts {
        let finding = match verdict.finding {
            Finding::Good => "good",
            Finding::Inconclusive => "unclear",
            Finding::Worse => "WORSE",
        };
        lines.push(format!("  {finding:<8} {}", verdict.reason));
    }
    lines.extend(status.copies.iter().flat_map(copies));
    lines.extend(advice(status).map(|advice| format!("  {advice}")));
    lines
}

/// A change in one line.
pub fn change(transition: &TransitionStatus) -> String {
    let TransitionStatus { at, from, to, weight_percent, reason, .. } = transition;
    format!("{at}  {} → {} at {weight_percent} %: {reason}", name_of(*from), name_of(*to))
}

/// Whether nothing happens any more by itself.
pub fn is_over(phase: Phase) -> bool {
    matches!(phase, Phase::Done | Phase::Aborted | Phase::RolledBack)
}

/// The steps in a row: those behind it, the one it is at, and those to come.
fn steps(status: &RolloutStatus) -> String {
    // Paused or over, it is where it was before.
    let mut before = status.history.iter().rev().map(|transition| transition.from);
    let place = match status.phase {
        Phase::Paused | Phase::Aborted | Phase::RolledBack => before.find(|phase| *phase != Phase::Paused),
        phase => Some(phase),
    };
    let at = match place {
        Some(Phase::Shadow) => 0,
        Some(Phase::Canary) => 1 + status.step,
        Some(Phase::Promoting | Phase::Watching | Phase::Done) => usize::MAX,
        _ => 0,
    };
    let begun = !matches!(place, None | Some(Phase::Pending));
    let failed = matches!(status.phase, Phase::Aborted | Phase::RolledBack);
    let shadow = status.shadow.iter().map(|step| (0, format!("shadow {} %", step.weight_percent)));
    let shares = status.steps.iter().enumerate();
    let shares = shares.map(|(index, step)| (1 + index, format!("{} %", step.weight_percent)));
    let mark = |(index, name): (usize, String)| {
        let mark = match index {
            index if begun && index == at => {
                if failed {
                    '✗'
                } else {
                    '▶'
                }
            }
            index if begun && index < at => '✓',
            _ => '·',
        };
        format!("{mark} {name}")
    };
    shadow.chain(shares).map(mark).collect::<Vec<_>>().join("  ")
}

fn current(status: &RolloutStatus) -> Option<&StepStatus> {
    match status.phase {
        Phase::Shadow => status.shadow.as_ref(),
        Phase::Canary => status.steps.get(status.step),
        _ => None,
    }
}

/// How far the step is, in samples and in time.
fn samples(status: &RolloutStatus) -> String {
    let Some(step) = current(status) else { return format!("{} samples", status.samples) };
    let share = |part: f64, whole: f64| if whole > 0.0 { f64::min(part / whole, 1.0) } else { 1.0 };
    let seen = share(status.samples as f64, step.min_samples as f64);
    let waited = share(status.step_age_seconds, step.min_duration_seconds);
    let full = (f64::min(seen, waited) * BAR as f64) as usize;
    format!(
        "[{}{}] {} of {} samples, at least {} and at most {}",
        "█".repeat(full),
        "░".repeat(BAR - full),
        status.samples,
        step.min_samples,
        whole_seconds(step.min_duration_seconds),
        whole_seconds(step.max_duration_seconds)
    )
}

/// How far the answers to copies are from the live ones, output by output.
fn copies(found: &CopiesStatus) -> impl Iterator<Item = String> {
    let CopiesStatus { compared, failed, missing, outputs, unlike, .. } = found;
    let output = |found: &OutputComparedStatus| {
        let OutputComparedStatus { output, compared, disagreed, max_difference, mean_difference, cosine } = found;
        let mut line = format!("  {:<8} output '{output}': {disagreed} of {compared} answered otherwise", "");
        if let (Some(most), Some(mean)) = (max_difference, mean_difference) {
            line += &format!(", {} apart at most and {} on average", short(*most), short(*mean));
        }
        line + &cosine.map_or_else(String::new, |cosine| format!(", cosine {}", short(cosine)))
    };
    let all = format!("  copies   {compared} compared, {failed} failed, {missing} without an answer");
    let unlike = unlike.iter().map(|unlike| format!("  {:<8} not comparable: {unlike}", ""));
    std::iter::once(all).chain(outputs.iter().map(output)).chain(unlike)
}

/// A number with four digits that say something.
fn short(number: f64) -> String {
    let digits = (3.0 - number.abs().log10().floor()).clamp(0.0, 9.0);
    match number.abs() {
        size if size == 0.0 || (1e-6..1e6).contains(&size) => {
            let text = format!("{number:.*}", digits as usize);
            let cut = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
            cut.to_owned()
        }
        _ => format!("{number:.3e}"),
    }
}

/// What an operator may do now.
fn advice(status: &RolloutStatus) -> Option<String> {
    let model = &status.model;
    match status.phase {
        Phase::Paused if status.passed => Some(format!(
            "it has passed this step: on to what comes next with `tidegate rollout resume {model}`, or give up with \
             abort"
        )),
        Phase::Paused => Some(format!(
            "on to the next step with `tidegate rollout advance {model}`, back to this one with resume, or give up \
             with abort"
        )),
        Phase::Watching => Some(format!("take it back with `tidegate rollout rollback {model}`")),
        _ => None,
    }
}

fn whole_seconds(seconds: f64) -> String {
    format_duration(Duration::from_secs(seconds.clamp(0.0, 1e12) as u64)).to_string()
}

/// A line in pieces of at most `width` characters, broken at spaces where there are some; all but the first are
/// indented.
pub fn fold(line: &str, width: usize) -> Vec<String> {
    const INDENT: &str = "           ";
    let mut pieces = Vec::new();
    let mut rest = line.to_owned();
    while let Some((end, _)) = rest.char_indices().nth(width) {
        let indent = rest.len() - rest.trim_start().len();
        let space = if rest[end..].starts_with(' ') { Some(end) } else { rest[..end].rfind(' ') };
        let cut = space.filter(|cut| *cut > indent).unwrap_or(end);
        let tail = format!("{INDENT}{}", rest[cut..].trim_start());
        pieces.push(rest[..cut].to_owned());
        rest = tail;
    }
    pieces.push(rest);
    pieces
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(phase: &str, step: usize, history: &[(&str, &str)]) -> RolloutStatus {
        let step_of = |percent: f64| {
            json!({ "weight_percent": percent, "min_duration_seconds": 600.0, "min_samples": 100,
                    "max_duration_seconds": 6000.0, "pause": false })
        };
        let transition = |(from, to): &(&str, &str)| {
            json!({ "at": "2026-01-01T00:00:00.000Z", "from": from, "to": to, "step": step, "weight_percent": 5.0,
                    "reason": "as told", "judgement": null })
        };
        let verdict = json!({ "metric": "errors", "finding": "good", "reason": "errors: candidate 1 %, stable 1 %",
                              "stable": 0.01, "candidate": 0.01, "radius": 0.002, "margin": 0.01 });
        serde_json::from_value(json!({
            "id": "m/r3", "model": "m", "phase": phase, "reason": "as told", "step": step,
            "steps": [step_of(1.0), step_of(12.5), step_of(100.0)], "shadow": step_of(100.0), "weight_percent": 12.5,
            "stable": "1", "candidate": "2", "sticky": null, "epoch": 7, "since": "2026-01-01T00:00:00.000Z",
            "step_age_seconds": 300.9, "objective_seconds": 0.1, "samples": 400, "finding": "good",
            "verdicts": [verdict], "passed": false, "copies": null,
            "history": history.iter().map(transition).collect::<Vec<_>>(),
        }))
        .unwrap()
    }

    #[test]
    fn a_step_is_shown_among_the_others_with_what_it_waits_for() {
        let shown = lines(&status("canary", 1, &[("shadow", "canary")]));
        assert_eq!(
            shown,
            [
                "rollout m/r3: version 1 → 2, canary for 5m",
                "  ✓ shadow 100 %  ✓ 1 %  ▶ 12.5 %  · 100 %",
                "  weight 12.5 %, [████████████░░░░░░░░░░░░] 400 of 100 samples, at least 10m and at most 1h 40m",
                "  as told",
                "  good     errors: candidate 1 %, stable 1 %",
            ]
        );
    }

    #[test]
    fn what_is_paused_or_over_stands_where_it_was() {
        let row = |phase, step, history: &[(&str, &str)]| steps(&status(phase, step, history));
        assert_eq!(row("pending", 0, &[]), "· shadow 100 %  · 1 %  · 12.5 %  · 100 %");
        assert_eq!(row("shadow", 0, &[("pending", "shadow")]), "▶ shadow 100 %  · 1 %  · 12.5 %  · 100 %");
        assert_eq!(row("paused", 0, &[("shadow", "paused")]), "▶ shadow 100 %  · 1 %  · 12.5 %  · 100 %");
        let aborted = [("canary", "paused"), ("paused", "aborted")];
        assert_eq!(row("aborted", 1, &aborted), "✓ shadow 100 %  ✓ 1 %  ✗ 12.5 %  · 100 %");
        assert_eq!(row("aborted", 0, &[("pending", "aborted")]), "· shadow 100 %  · 1 %  · 12.5 %  · 100 %");
        assert_eq!(row("watching", 2, &[("promoting", "watching")]), "✓ shadow 100 %  ✓ 1 %  ✓ 12.5 %  ✓ 100 %");
        assert_eq!(row("rolled_back", 2, &[("watching", "rolled_back")]), "✓ shadow 100 %  ✓ 1 %  ✓ 12.5 %  ✓ 100 %");
        let advised = lines(&status("paused", 1, &[("canary", "paused")]));
        assert!(advised.last().unwrap().contains("`tidegate rollout advance m`, back to this one"), "{advised:?}");
        let passed = RolloutStatus { passed: true, ..status("paused", 1, &[("canary", "paused")]) };
        let advised = lines(&passed);
        let words = "  it has passed this step: on to what comes next with `tidegate rollout resume m`, or give up";
        assert!(advised.last().unwrap().starts_with(words), "{advised:?}");
    }

    #[test]
    fn copies_show_how_far_apart_the_answers_are() {
        let output = |output: &str, differences: [Option<f64>; 3]| OutputComparedStatus {
            output: output.to_owned(),
            compared: 1000,
            disagreed: 12,
            max_difference: differences[0],
            mean_difference: differences[1],
            cosine: differences[2],
        };
        let outputs =
            vec![output("label", [None; 3]), output("scores", [Some(0.25), Some(0.012_345_678), Some(0.998_76)])];
        let unlike = Some("output 'y' is missing".to_owned());
        let found = CopiesStatus { compared: 1000, disagreed: 12, failed: 3, missing: 40, outputs, unlike };
        let shown = lines(&RolloutStatus { copies: Some(found), ..status("shadow", 0, &[]) });
        assert_eq!(
            shown[5..],
            [
                "  copies   1000 compared, 3 failed, 40 without an answer",
                "           output 'label': 12 of 1000 answered otherwise",
                "           output 'scores': 12 of 1000 answered otherwise, 0.25 apart at most and 0.01235 on average, \
                 cosine 0.9988",
                "           not comparable: output 'y' is missing",
            ]
        );
        for (number, text) in
            [(0.0, "0"), (1.0, "1"), (123_456.0, "123456"), (-2.5, "-2.5"), (3e-9, "3.000e-9"), (1e30, "1.000e30")]
        {
            assert_eq!(short(number), text);
        }
    }

    #[test]
    fn phases_are_called_as_in_the_api() {
        for text in ["pending", "shadow", "canary", "paused", "promoting", "watching", "done", "aborted", "rolled_back"]
        {
            let parsed: Phase = serde_json::from_value(json!(text)).unwrap();
            assert_eq!(name_of(parsed), text);
            assert_eq!(is_over(parsed), ["done", "aborted", "rolled_back"].contains(&text));
        }
    }

    #[test]
    fn long_lines_are_broken_between_words() {
        assert_eq!(fold("short", 10), ["short"]);
        assert_eq!(fold("  one two three four", 15), ["  one two three", "           four"]);
        let pieces = fold(&format!("  {}", "x".repeat(60)), 40);
        assert!(pieces.len() > 1 && pieces.iter().all(|piece| piece.chars().count() <= 40), "{pieces:?}");
        assert_eq!(pieces.concat().matches('x').count(), 60);
        assert!(fold(&"ü ".repeat(100), 40).iter().all(|piece| piece.chars().count() <= 40));
    }
}
