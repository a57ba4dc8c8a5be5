//! What was counted, what was counted before, and whether anything has grown.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::requests::Protocol;

/// What a counter may grow by.
const GROWTH: f64 = 1.05;

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
}

fn named(what: &str, protocol: Protocol) -> String {
    if protocol == Protocol::Grpc { what.to_owned() } else { format!("{}_{what}", protocol.name()) }
}

/// Counters of some commit by their names.
#[derive(Default, Deserialize, Serialize)]
#[serde(transparent)]
pub struct Baseline(BTreeMap<String, f64>);

impl Baseline {
    pub fn of(counters: &[Counter]) -> Self {
        // Half a percent of a percent is what is left of any precision.
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        Self(counters.iter().map(|counter| (counter.name.clone(), rounded(counter.value))).collect())
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
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Every counter beside what it was, in Markdown.
    pub fn table(&self, counters: &[Counter]) -> String {
        let mut text = "| per request | now | baseline | change |\n|---|---|---|---|\n".to_owned();
        for Counter { name, value, .. } in counters {
            let before = self.0.get(name).copied();
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
            match self.0.get(name) {
                Some(before) if *value <= before.max(0.0) * GROWTH + slack => {}
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
        let before = Baseline::of(&Counter::compared("instructions", Protocol::Grpc, 90_000.0, 70_000.0));
        let check = |server, echo| before.check(&Counter::compared("instructions", Protocol::Grpc, server, echo));
        check(91_000.0, 70_000.0).unwrap();
        check(60_000.0, 65_000.0).unwrap();
        let error = check(92_000.0, 70_000.0).unwrap_err().to_string();
        assert!(error.contains("instructions has grown from 20000.00 to 22000.00"), "{error}");
        assert!(!error.contains("instructions_server"), "it grew by 2 % only: {error}");
        assert!(check(95_000.0, 75_000.0).unwrap_err().to_string().contains("instructions_server has grown"));
    }

    #[test]
    fn what_is_not_known_or_not_gated_is_told_apart() {
        let none = Baseline::default();
        let copies = [Counter::copies("copies_in", Protocol::Binary, 2.0)];
        assert!(none.check(&copies).unwrap_err().to_string().contains("binary_copies_in has no baseline"));
        none.check(&Counter::compared("syscalls", Protocol::Json, 3.0, 2.0)).unwrap();
        let known = Baseline::of(&copies);
        known.check(&copies).unwrap();
        assert!(known.check(&[Counter { value: 2.2, ..copies[0].clone() }]).is_err());
        assert!(known.table(&copies).contains("| binary_copies_in | 2.00 | 2.00 | 0.00 % |"));
    }

    #[test]
    fn a_baseline_survives_its_file() {
        let path = tempfile::tempdir().unwrap().keep().join("counters.json");
        let counters = Counter::compared("allocations", Protocol::Json, 30.125, 12.0);
        assert!(Baseline::read(&path).unwrap().check(&counters).is_err());
        Baseline::of(&counters).write(&path).unwrap();
        Baseline::read(&path).unwrap().check(&counters).unwrap();
    }
}
