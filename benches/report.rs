//! Figures and where they go: to the terminal as they are found, then to a JSON file and a Markdown table.

use std::{fmt::Write as _, io::Write as _, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{
    machine,
    pairs::Value,
    statistics::{interval, median},
};

/// One number, or the reason why there is none.
#[derive(Serialize)]
pub struct Figure {
    pub name: String,
    /// What it is, for people.
    pub title: String,
    pub value: Option<f64>,
    /// The 95 % interval of the median, where the value is one.
    pub low: Option<f64>,
    pub high: Option<f64>,
    pub unit: &'static str,
    pub better: Better,
    /// Why the value does not count.
    pub void: Option<String>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Higher,
    Lower,
}

#[derive(Serialize)]
pub struct Report {
    date: String,
    machine: String,
    commit: String,
    quick: bool,
    figures: Vec<Figure>,
}

impl Report {
    pub fn new(quick: bool) -> Self {
        let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
        let date = now.split('T').next().unwrap_or_default().to_owned();
        Self { date, machine: machine::describe(), commit: commit(), quick, figures: Vec::new() }
    }

    /// Adds the median of the values that count. With more than half of them void the figure is void, and its number,
    /// that of all of them, stays in the JSON for those who want to know why.
    pub fn median(&mut self, name: &str, title: &str, unit: &'static str, better: Better, values: &[Value]) {
        let voided = values.iter().filter(|value| !value.counts).count();
        let void = (voided * 2 > values.len()).then(|| format!("{voided} of {} pairs were void", values.len()));
        let counted = values.iter().filter(|value| value.counts || void.is_some());
        let counted: Vec<f64> = counted.map(|value| value.number).collect();
        let (low, high) = interval(&counted);
        self.add(Figure {
            name: name.to_owned(),
            title: title.to_owned(),
            value: finite(median(&counted)),
            low: finite(low),
            high: finite(high),
            unit,
            better,
            void,
        });
    }

    /// Adds a number that was taken once.
    pub fn single(
        &mut self,
        name: &str,
        title: &str,
        unit: &'static str,
        better: Better,
        value: f64,
        void: Option<String>,
    ) {
        self.add(Figure {
            name: name.to_owned(),
            title: title.to_owned(),
            value: finite(value),
            low: None,
            high: None,
            unit,
            better,
            void,
        });
    }

    fn add(&mut self, figure: Figure) {
        let number = figure
            .value
            .filter(|_| figure.void.is_some())
            .map_or(String::new(), |value| format!(" ({})", digits(value)));
        say(format_args!("{:<28} {}{number}", figure.name, figure.shown()));
        self.figures.push(figure);
    }

    /// The table that README shows.
    pub fn markdown(&self) -> String {
        let length = if self.quick { "a quick run" } else { "a full run" };
        let mut text = format!(
            "Measured on {} at commit {}, {length} on {}: the server on one core, the load generator on another.\n\n\
             | figure | median | 95 % interval |\n|---|---|---|\n",
            self.date, self.commit, self.machine
        );
        for figure in &self.figures {
            let interval = match (figure.low, figure.high) {
                (Some(low), Some(high)) if figure.void.is_none() => format!("{} – {}", digits(low), digits(high)),
                _ => String::new(),
            };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| {} | {} | {interval} |", figure.title, figure.shown());
        }
        text
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self)?;
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Figure {
    fn shown(&self) -> String {
        let value = self.value.map_or("–".to_owned(), |value| format!("{} {}", digits(value), self.unit));
        match &self.void {
            None => value.trim_end().to_owned(),
            Some(reason) => format!("void: {reason}"),
        }
    }
}

/// JSON has no word for what is no number.
fn finite(value: f64) -> Option<f64> {
    Some(value).filter(|value| value.is_finite())
}

/// Three digits that matter, and thousands apart.
fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        small if small < 10.0 => 2,
        middle if middle < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    let (sign, text) = text.strip_prefix('-').map_or(("", text.as_str()), |rest| ("-", rest));
    let (whole, fraction) = text.split_once('.').map_or((text, None), |(whole, fraction)| (whole, Some(fraction)));
    let mut out = sign.to_owned();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if let Some(fraction) = fraction {
        out.push('.');
        out.push_str(fraction);
    }
    out
}

/// Tells whoever waits.
pub fn say(line: std::fmt::Arguments<'_>) {
    // Nobody may be listening, and then it need not be said.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The commit of the working directory, with a plus when files differ from it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = std::process::Command::new("git").args(arguments).output().ok().filter(|out| out.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|files| !files.is_empty());
    let commit = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    format!("{commit}{}", if changed { "+" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report { date: "2020-02-02".into(), machine: "m".into(), commit: "c".into(), quick: true, figures: Vec::new() }
    }

    #[test]
    fn a_figure_with_more_than_half_of_its_pairs_void_is_void() {
        let mut report = report();
        let values = |numbers: &[(f64, bool)]| -> Vec<Value> {
            numbers.iter().map(|&(number, counts)| Value { number, counts }).collect()
        };
        let half = values(&[(10_000.0, true), (1.0, false), (20_000.0, true), (2.0, false)]);
        report.median("a", "A", "req/s", Better::Higher, &half);
        report.median("b", "B", "", Better::Higher, &values(&[(1.0, true), (2.0, false), (3.0, false)]));
        report.median("c", "C", "", Better::Higher, &values(&[(f64::NAN, false)]));
        let voids: Vec<bool> = report.figures.iter().map(|figure| figure.void.is_some()).collect();
        assert_eq!(voids, [false, true, true]);
        let table = report.markdown();
        assert!(table.contains("| A | 15,000 req/s | 10,000 – 20,000 |"), "{table}");
        assert!(table.contains("| B | void: 2 of 3 pairs were void |  |"), "{table}");
        assert_eq!(report.figures[1].value, Some(2.0));
        assert!(serde_json::to_string(&report).unwrap().contains(r#""value":null"#), "not a number is no JSON");
    }

    #[test]
    fn numbers_are_shown_with_the_digits_that_matter() {
        let shown = [0.123, 9.999, 45.67, 123.4, 61_234.5, -1234567.0].map(digits);
        assert_eq!(shown, ["0.12", "10.00", "45.7", "123", "61,234", "-1,234,567"]);
    }
}
