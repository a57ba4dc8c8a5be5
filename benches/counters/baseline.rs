//! What was counted, what was counted before, and whether anything has grown.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{
    report::{Better::Lower, Report},
    requests::Protocol,
};

/// What a counter may grow by, as a share of what it was.
const GROWTH: f64 = 0.05;

/// One number for each request.
#[derive(Clone, Debug, PartialEq)]
pub struct Counter {
    /// As the issue names it over gRPC, with the protocol before it over the others.
    pub name: String,
    pub value: f64,
    /// By how much it may exceed the baseline beside the share that all may; `None` when it may grow at will.
    pub slack: Option<f64>,
}

impl Counter {
    /// What the server takes above the echo, then what each of them takes. The echo may take what it likes.
    pub fn compared(what: &str, protocol: Protocol, server: f64, echo: f64) -> [Self; 3] {
        let name = named(what, protocol);
        // About what repeated counts differ by, so that small differences between large numbers can be compared.
        let slack = match what {
            "instructions" => Some(300.0),
            "allocations" => Some(0.2),
            "allocated_bytes" => Some(200.0),
            _ => None,
        };
        [
            Self { name: name.clone(), value: server - echo, slack },
            Self { name: format!("{name}_server"), value: server, slack },
            Self { name: format!("{name}_echo"), value: echo, slack: None },
        ]
    }

    /// Copies of a tensor in the server.
    pub fn copies(what: &str, protocol: Protocol, value: f64) -> Self {
        Self { name: named(what, protocol), value, slack: Some(0.02) }
    }

    /// Instructions that it takes to count one answer of iris.
    pub fn tally(value: f64) -> Self {
        Self { name: "tally_instructions".to_owned(), value, slack: Some(20.0) }
    }
}

fn named(what: &str, protocol: Protocol) -> String {
    if protocol == Protocol::Grpc { what.to_owned() } else { format!("{}_{what}", protocol.name()) }
}

/// Counters of some commit by their names.
#[derive(Default, Deserialize, Serialize)]
pub struct Baseline {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    commit: Option<String>,
    #[serde(flatten)]
    counters: BTreeMap<String, f64>,
}

impl Baseline {
    /// What was counted at `commit`.
    pub fn of(counters: &[Counter], commit: &str) -> Self {
        // Half a percent of a percent is what is left of any precision.
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        let counters = counters.iter().map(|counter| (counter.name.clone(), rounded(counter.value))).collect();
        Self { commit: Some(commit.to_owned()), counters }
    }

    /// The baseline in `path`; an empty one when there is no such file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no baseline", path.display()))
    }

    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Adds to a report the figures that are counted. Each is that of the protocol that takes most.
    pub fn report(&self, report: &mut Report) {
        let commit = self.commit.as_ref().map_or(String::new(), |commit| format!(", counted at commit {commit}"));
        let each = "a request with rows of 4 KB, 64 at a time";
        let figures = [
            ("instructions", format!("instructions above the echo for {each}")),
            ("allocations", format!("allocations above the echo for {each}")),
            ("copies_in", "copies of an input of 602 KB in user space".to_owned()),
            ("copies_out", "copies of an output of 602 KB in user space".to_owned()),
        ];
        for (name, title) in figures {
            let counted = Protocol::ALL.into_iter().filter_map(|protocol| {
                let value = *self.counters.get(&named(name, protocol))?;
                Some((protocol, value))
            });
            let (mut most, mut all) = (f64::NAN, Vec::new());
            for (protocol, value) in counted {
                most = value.max(most);
                all.push(format!("{} {value:.2}", protocol.title()));
            }
            let void = all.is_empty().then(|| "it was not counted".to_owned());
            let title = format!("{title}, the most of any protocol ({}){commit}", all.join(", "));
            report.single(name, &title, "", Lower, most, void);
        }
    }

    /// Every counter beside what it was, in Markdown.
    pub fn table(&self, counters: &[Counter]) -> String {
        let mut text = "| per request | now | baseline | change |\n|---|---|---|---|\n".to_owned();
        for Counter { name, value, .. } in counters {
            let before = self.counters.get(name).copied();
            let change = before.filter(|before| *before != 0.0).map(|before| 100.0 * (value / before - 1.0));
            let shown = |number: Option<f64>, unit: &str| number.map_or(String::new(), |n| format!("{n:.2}{unit}"));
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| {name} | {value:.2} | {} | {} |", shown(before, ""), shown(change, " %"));
        }
        text
    }

    /// # Errors
    /// Naming what has grown too much, or was never counted before.
    pub fn check(&self, counters: &[Counter]) -> Result<()> {
        let mut wrong = Vec::new();
        for Counter { name, value, slack } in counters {
            let Some(slack) = slack else { continue };
            match self.counters.get(name) {
                Some(before) if *value <= before + GROWTH * before.abs() + slack => {}
                Some(before) => wrong.push(format!("{name} has grown from {before:.2} to {value:.2}")),
                None => wrong.push(format!("{name} has no baseline")),
            }
        }
        if !wrong.is_empty() {
            bail!("{}; if that is wanted, UPDATE_COUNTERS=1 make bench-counters writes it down", wrong.join(", "));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_above_a_twentieth_is_told_by_its_name() {
        let before = Baseline::of(&Counter::compared("instructions", Protocol::Grpc, 90_000.0, 70_000.0), "c");
        let check = |server, echo| before.check(&Counter::compared("instructions", Protocol::Grpc, server, echo));
        check(91_000.0, 70_000.0).unwrap();
        check(60_000.0, 65_000.0).unwrap();
        let error = check(92_000.0, 70_000.0).unwrap_err().to_string();
        assert!(error.contains("instructions has grown from 20000.00 to 22000.00"), "{error}");
        assert!(!error.contains("instructions_server"), "it grew by 2 % only: {error}");
        assert!(check(95_000.0, 75_000.0).unwrap_err().to_string().contains("instructions_server has grown"));
    }

    #[test]
    fn what_was_less_than_the_echo_takes_may_not_grow_to_nothing() {
        let before = Baseline::of(&Counter::compared("allocations", Protocol::Grpc, 20.0, 30.0), "c");
        let check = |server| before.check(&Counter::compared("allocations", Protocol::Grpc, server, 30.0));
        check(20.6).unwrap();
        assert!(check(20.8).unwrap_err().to_string().contains("allocations has grown from -10.00 to -9.20"));
    }

    #[test]
    fn what_is_not_known_or_not_gated_is_told_apart() {
        let none = Baseline::default();
        let copies = [Counter::copies("copies_in", Protocol::Binary, 2.0)];
        assert!(none.check(&copies).unwrap_err().to_string().contains("binary_copies_in has no baseline"));
        none.check(&Counter::compared("syscalls", Protocol::Json, 3.0, 2.0)).unwrap();
        let known = Baseline::of(&copies, "c");
        known.check(&copies).unwrap();
        assert!(known.check(&[Counter { value: 2.2, ..copies[0].clone() }]).is_err());
        assert!(known.table(&copies).contains("| binary_copies_in | 2.00 | 2.00 | 0.00 % |"));
    }

    #[test]
    fn a_baseline_survives_its_file() {
        let path = tempfile::tempdir().unwrap().keep().join("counters.json");
        let counters = Counter::compared("allocations", Protocol::Json, 30.125, 12.0);
        assert!(Baseline::read(&path).unwrap().check(&counters).is_err());
        Baseline::of(&counters, "c").write(&path).unwrap();
        Baseline::read(&path).unwrap().check(&counters).unwrap();
        assert_eq!(Baseline::read(&path).unwrap().commit.as_deref(), Some("c"));
        // Of one that does not say its commit nothing is said of it.
        std::fs::write(&path, r#"{"json_allocations": 18.125, "json_allocations_server": 30.125}"#).unwrap();
        let old = Baseline::read(&path).unwrap();
        old.check(&counters).unwrap();
        assert_eq!(old.commit, None);
    }

    #[test]
    fn the_protocol_that_takes_most_is_reported() {
        let counted = [(Protocol::Grpc, 5_000.0), (Protocol::Json, 16_000.0), (Protocol::Binary, -3.0)];
        let counters = counted.map(|(protocol, above)| Counter::compared("instructions", protocol, above, 0.0));
        let mut report = Report::new(true);
        Baseline::of(&counters.concat(), "abc").report(&mut report);
        let table = report.markdown();
        let all = "gRPC 5000.00, REST JSON 16000.00, REST binary -3.00";
        assert!(table.contains(&format!("({all}), counted at commit abc | `instructions` | 16,000 |")), "{table}");
        assert!(table.contains("| `copies_in` | void: it was not counted |"), "{table}");
    }
}
