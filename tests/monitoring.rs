//! What operators see of rollouts, and that what dashboards and alerts ask for is there.

use std::{collections::BTreeSet, path::PathBuf};

use tidegate::metrics::{FAMILIES, Family, Kind};

use crate::support::{Repository, config, eventually, start};

/// Labels that Prometheus adds, to what it scrapes and to alerts.
const ADDED: [&str; 8] = ["job", "instance", "pod", "namespace", "le", "alertname", "alertstate", "severity"];

fn read(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All expressions and texts of the dashboard, which are the strings of its document.
fn dashboard() -> Vec<String> {
    fn collect(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::String(text) => found.push(text.clone()),
            serde_json::Value::Array(list) => list.iter().for_each(|value| collect(value, found)),
            serde_json::Value::Object(map) => map.values().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    collect(&serde_json::from_str(&read("grafana/tidegate.json")).unwrap(), &mut found);
    found
}

fn texts() -> Vec<(&'static str, String)> {
    let dashboard = dashboard().into_iter().map(|text| ("the dashboard", text));
    let rules = ["prometheus/tidegate.rules.yml", "prometheus/tidegate.test.yml"].map(|file| (file, read(file)));
    dashboard.chain(rules).collect()
}

fn word(text: &str) -> &str {
    let end = text.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(text.len());
    &text[..end]
}

/// Each metric of ours that is named, with the text behind it. Names with a colon are rules' own.
fn named(text: &str) -> Vec<(&str, &str)> {
    let starts = text.match_indices("tidegate_").map(|(start, _)| start);
    let whole =
        |start: &usize| !text[..*start].ends_with(|letter: char| letter.is_ascii_alphanumeric() || letter == '_');
    let split = |start: usize| (word(&text[start..]), &text[start + word(&text[start..]).len()..]);
    starts.filter(whole).map(split).collect()
}

fn family(series: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| {
        let rest = series.strip_prefix(family.name);
        let parts: &[&str] = if family.kind == Kind::Histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
        rest.is_some_and(|rest| parts.contains(&rest) || (rest.is_empty() && family.kind == Kind::Histogram))
    })
}

fn labels(family: &Family) -> impl Iterator<Item = &'static str> {
    let more = family.labels.split(", ").filter(|label| !label.is_empty());
    family.of.labels().iter().copied().chain(more)
}

/// Names of the labels that a selector, right behind a metric's name, asks for.
fn selected(rest: &str) -> Vec<&str> {
    let Some(inside) = rest.strip_prefix('{') else { return Vec::new() };
    let (mut found, mut quoted, mut name) = (Vec::new(), false, Some(0));
    for (place, letter) in inside.char_indices() {
        match letter {
            '"' => quoted = !quoted,
            '=' | '!' if !quoted => found.extend(name.take().map(|start| inside[start..place].trim())),
            ',' if !quoted => name = Some(place + 1),
            '}' if !quoted => break,
            _ => {}
        }
    }
    found
}

/// Names of labels that are grouped and matched by, shown in legends, or told in alerts.
fn mentioned(text: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for opening in ["by (", "on (", "group_left ("] {
        for (start, _) in text.match_indices(opening) {
            let list = text[start + opening.len()..].split(')').next().unwrap();
            found.extend(list.split(',').map(str::trim).filter(|label| !label.is_empty()));
        }
    }
    for opening in ["$labels.", "{{"] {
        let rests = text.match_indices(opening).map(|(start, _)| &text[start + opening.len()..]);
        found.extend(rests.map(word).filter(|label| !label.is_empty()));
    }
    found
}

/// Whatever comes after the first version gets a copy of every request; the judge looks often.
const ALL_COPIED: &str = "[rollout]\non_new_version = 'shadow'\nshadow = 100.0\nevery = '1s'\n";

#[tokio::test]
async fn rollouts_and_copies_are_shown_until_their_model_goes() {
    let repository = Repository::with("m", "scale = 1.0");
    repository.settings("m", ALL_COPIED);
    let mut config = config(&repository);
    // Other tests use the processor meanwhile.
    config.shadow.max_cpu = 1.0;
    let running = start(&config).await;
    assert_eq!(running.metric(r#"tidegate_requests_total{model="m"}"#).await, 0.0);
    let (_, before) = running.ops("/metrics").await;
    assert!(!before.as_str().unwrap().contains("tidegate_rollout"), "there is none: {before}");
    repository.put("m", "2", "scale = 3.0");
    let phase = |phase: &str| format!(r#"tidegate_rollout_phase{{model="m",rollout="m/r1",phase="{phase}"}}"#);
    eventually("copies are made", async || running.metric(&phase("shadow")).await == 1.0).await;
    assert_eq!(running.metric(&phase("canary")).await, 0.0);
    for value in [1.0, 2.0] {
        assert_eq!(running.infer("m", &[value]).await.values(), [f64::from(value)]);
    }
    let copy = |name: &str, more: &str| format!(r#"tidegate_shadow_{name}{{model="m",version="2"{more}}}"#);
    let compared = copy("compared_total", r#",output="y""#);
    eventually("copies are compared", async || running.metric(&compared).await == 2.0).await;
    let series = r#"model="m",version="2",protocol="rest",code="ok",variant="shadow""#;
    for (series, value) in [
        (copy("difference_max", r#",output="y""#), 4.0),
        (copy("difference_mean", r#",output="y""#), 3.0),
        (copy("cosine_mean", r#",output="y""#), 1.0),
        (copy("failed_total", ""), 0.0),
        (copy("missing_total", r#",reason="busy""#), 0.0),
        (format!("tidegate_requests_total{{{series}}}"), 2.0),
        (r#"tidegate_rollout_weight_ratio{model="m",rollout="m/r1"}"#.to_owned(), 0.0),
        (r#"tidegate_rollout_step_duration_seconds{model="m",rollout="m/r1",bound="min"}"#.to_owned(), 1.0),
        (r#"tidegate_rollout_step_duration_seconds{model="m",rollout="m/r1",bound="max"}"#.to_owned(), 1800.0),
        (r#"tidegate_prediction_mean{model="m",version="2",variant="shadow",output="y"}"#.to_owned(), 4.5),
        (r#"tidegate_prediction_mean{model="m",version="1",variant="stable",output="y"}"#.to_owned(), 1.5),
    ] {
        assert_eq!(running.metric(&series).await, value, "{series}");
    }
    let (_, status) = running.ops("/admin/v1/models/m/rollout").await;
    let output = serde_json::json!({ "output": "y", "compared": 2, "disagreed": 0, "max_difference": 4.0,
                                     "mean_difference": 3.0, "cosine": 1.0 });
    let copies = serde_json::json!({ "compared": 2, "disagreed": 0, "failed": 0, "missing": 0, "outputs": [output],
                                     "unlike": null });
    assert_eq!((&status["copies"], &status["passed"]), (&copies, &false.into()), "{status}");
    let verdict = r#"tidegate_rollout_verdict{model="m",rollout="m/r1",metric="no_numbers"}"#;
    let (_, page) = running.ops("/metrics").await;
    eventually("the judge has looked", async || running.ops("/metrics").await.1.as_str().unwrap().contains(verdict))
        .await;
    assert!(page.as_str().unwrap().contains("tidegate_rollout_step_age_seconds{"), "{page}");
    std::fs::remove_dir_all(repository.0.path().join("m")).unwrap();
    eventually("nothing is left of the model", async || {
        !running.ops("/metrics").await.1.as_str().unwrap().contains(r#"model="m""#)
    })
    .await;
}

#[test]
fn every_metric_that_is_asked_for_exists() {
    let mut asked = BTreeSet::new();
    for (place, text) in texts() {
        for (name, rest) in named(&text) {
            let family = family(name).unwrap_or_else(|| panic!("{place} asks for {name}, which is not in FAMILIES"));
            asked.insert(family.name);
            for label in selected(rest) {
                let known = ADDED.contains(&label) || labels(family).any(|known| known == label);
                assert!(known, "{place} asks for {name} by '{label}', which it has not");
            }
        }
    }
    // Those of shared memory, of loading, and of single requests are for a closer look.
    assert!(asked.len() >= 28, "only {asked:?}");
}

#[test]
fn every_label_that_is_shown_exists() {
    let known: BTreeSet<&str> = FAMILIES.iter().flat_map(labels).chain(ADDED).collect();
    for (place, text) in texts() {
        for label in mentioned(&text) {
            assert!(known.contains(label), "{place} mentions the label '{label}', which nothing has: {text}");
        }
    }
}

#[test]
fn names_and_labels_are_found() {
    let text = r#"sum by (model, le) (rate(tidegate_a_bucket{model=~"$model", x!="a,b=c}", le="1"}[5m])) / tidegate_b"#;
    let names: Vec<&str> = named(text).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["tidegate_a_bucket", "tidegate_b"]);
    assert_eq!(selected(named(text)[0].1), ["model", "x", "le"]);
    assert_eq!(mentioned(text), BTreeSet::from(["model", "le"]));
    assert_eq!(mentioned("{{model}} {{ $labels.version }}"), BTreeSet::from(["model", "version"]));
    assert!(family("tidegate_batch_size_bucket").is_some() && family("tidegate_batch_size_total").is_none());
}

#[test]
fn every_alert_says_what_to_do_and_is_tried_both_ways() {
    let (rules, tries) = (read("prometheus/tidegate.rules.yml"), read("prometheus/tidegate.test.yml"));
    let alerts: Vec<&str> = rules.split("      - alert: ").skip(1).collect();
    assert!(alerts.len() >= 10);
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        for part in ["severity:", "summary:", "description:", "runbook:"] {
            assert_eq!(alert.matches(part).count(), 1, "{name} needs one {part}");
        }
        let mut tried = tries.split("alertname: ").filter(|rest| rest.lines().next() == Some(name));
        let fires = |rest: &str| !rest.trim_start_matches(name).trim_start().starts_with("exp_alerts: []");
        let (firing, silent): (Vec<&str>, Vec<&str>) = tried.by_ref().partition(|rest| fires(rest));
        assert!(!firing.is_empty() && !silent.is_empty(), "{name} is not tried both ways");
    }
}
