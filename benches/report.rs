//! Figures and where they go: to the terminal as they are found, then to a JSON file and Markdown tables.

use std::{fmt::Write as _, io::Write as _, path::Path};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::{
    machine,
    pairs::{Value, most_are_void},
    statistics::{interval, median},
    targets::{goal, is_never_negative},
};

/// One number, or the reason why there is none.
#[derive(Serialize)]
pub struct Figure {
    pub name: String,
    /// What it is, for people.
    pub title: String,
    /// `None` when the figure is void.
    pub value: Option<f64>,
    /// The 95 % interval of the median, where the value is one.
    pub low: Option<f64>,
    pub high: Option<f64>,
    /// The number of a figure that is void, for those who want to know why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub raw: Option<f64>,
    pub unit: &'static str,
    pub better: Better,
    pub target: Option<f64>,
    pub stretch: Option<f64>,
    /// Why there is no value that counts.
    pub void: Option<String>,
}

/// A value with its interval, if it has one.
#[derive(Clone, Copy)]
struct Number {
    value: f64,
    low: f64,
    high: f64,
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
    /// Whose figures these are, when they are not ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    figures: Vec<Figure>,
}

impl Report {
    pub fn new(quick: bool) -> Self {
        let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
        let date = now.split('T').next().unwrap_or_default().to_owned();
        Self { date, machine: machine::describe(), commit: commit(), quick, peer: None, figures: Vec::new() }
    }

    /// The figures of another server.
    pub fn of_peer(address: &str, quick: bool) -> Self {
        Self { peer: Some(address.to_owned()), ..Self::new(quick) }
    }

    /// Adds the median of the values that count. With more than half of them void the figure is void, and its raw number
    /// is that of all of them.
    pub fn median(&mut self, name: &str, title: &str, unit: &'static str, better: Better, values: &[Value]) {
        let void = most_are_void("pairs", values.iter().map(|value| value.void.as_ref()));
        let counted = values.iter().filter(|value| value.void.is_none() || void.is_some());
        let counted: Vec<f64> = counted.map(|value| value.number).collect();
        let (low, high) = interval(&counted);
        self.add(name, title, unit, better, Number { value: median(&counted), low, high }, void);
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
        self.add(name, title, unit, better, Number { value, low: f64::NAN, high: f64::NAN }, void);
    }

    /// Adds a number with an interval that was found in another way than that of a median.
    pub fn with_interval(
        &mut self,
        name: &str,
        title: &str,
        unit: &'static str,
        better: Better,
        (value, (low, high)): (f64, (f64, f64)),
        void: Option<String>,
    ) {
        self.add(name, title, unit, better, Number { value, low, high }, void);
    }

    fn add(
        &mut self,
        name: &str,
        title: &str,
        unit: &'static str,
        better: Better,
        number: Number,
        void: Option<String>,
    ) {
        let goal = goal(name);
        // Whoever reads values only must not take a void one for measured.
        let counts = |number: f64| finite(number).filter(|_| void.is_none());
        let figure = Figure {
            name: name.to_owned(),
            title: title.to_owned(),
            value: counts(number.value),
            low: counts(number.low),
            high: counts(number.high),
            raw: finite(number.value).filter(|_| void.is_some()),
            unit,
            better,
            target: goal.map(|goal| goal.target),
            stretch: goal.map(|goal| goal.stretch),
            void,
        };
        let raw = figure.raw.map_or(String::new(), |raw| format!(" ({})", digits(raw)));
        say(format_args!("{:<28} {}{raw}", figure.name, figure.shown()));
        self.figures.push(figure);
    }

    /// Two tables: what is held against a target, and everything else.
    pub fn markdown(&self) -> String {
        let length = if self.quick { "a quick run" } else { "a full run" };
        let (date, commit, machine) = (&self.date, &self.commit, &self.machine);
        let mut text = match &self.peer {
            None => format!(
                "Measured on {date} at commit {commit}, {length} on {machine}: the server on one core, the load \
                 generator on another, unless a figure says otherwise.\n"
            ),
            Some(peer) => format!(
                "Measured on {date} with the load generator of commit {commit}, {length} on {machine}: the server at \
                 {peer}.\n"
            ),
        };
        let (held, free): (Vec<_>, Vec<_>) = self.figures.iter().partition(|figure| figure.target.is_some());
        // Writing to a String cannot fail.
        if !held.is_empty() {
            text.push_str("\n| figure | name | median | 95 % interval | target | stretch | reached |\n");
            text.push_str("|---|---|---|---|---|---|---|\n");
        }
        for figure in held {
            let bound = |bound: Option<f64>| bound.map(|bound| format!("{} {}", figure.better.bound(), digits(bound)));
            let (target, stretch) = (bound(figure.target), bound(figure.stretch));
            let _ = writeln!(
                text,
                "| {} | `{}` | {} | {} | {} | {} | {} |",
                figure.title,
                figure.name,
                figure.shown(),
                figure.interval(),
                target.unwrap_or_default(),
                stretch.unwrap_or_default(),
                figure.reached()
            );
        }
        if !free.is_empty() {
            text.push_str("\n| figure | name | median | 95 % interval |\n|---|---|---|---|\n");
        }
        for figure in free {
            let (title, name, shown, interval) = (&figure.title, &figure.name, figure.shown(), figure.interval());
            let _ = writeln!(text, "| {title} | `{name}` | {shown} | {interval} |");
        }
        text
    }

    /// Writes `NAME.json` and `NAME.md` into `folder`, and, to be kept, under another name beside others.
    ///
    /// # Errors
    /// When a file cannot be written, or `kept` is no plain name.
    pub fn write(&self, folder: &Path, name: &str, kept: Option<(&Path, &str)>) -> Result<()> {
        let json = serde_json::to_string_pretty(self)? + "\n";
        let write = |folder: &Path, name: &str| -> Result<()> {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
            for (ending, text) in [("json", &json), ("md", &self.markdown())] {
                let path = folder.join(format!("{name}.{ending}"));
                std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            }
            Ok(())
        };
        write(folder, name)?;
        if let Some((folder, name)) = kept {
            let plain = name.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter));
            ensure!(plain, "'{name}' is no name for a result: letters, digits, '-', '_' and '.' make one");
            write(folder, name)?;
        }
        Ok(())
    }
}

impl Better {
    /// The sign before a bound.
    fn bound(self) -> char {
        match self {
            Better::Higher => '≥',
            Better::Lower => '≤',
        }
    }

    fn reaches(self, value: f64, bound: f64) -> bool {
        match self {
            Better::Higher => value >= bound,
            Better::Lower => value <= bound,
        }
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

    fn interval(&self) -> String {
        match (self.low, self.high) {
            (Some(low), Some(high)) => format!("{} – {}", digits(low), digits(high)),
            _ => String::new(),
        }
    }

    /// Whether the value is as good as it must be; that of a void figure is not known.
    fn reached(&self) -> &'static str {
        let (Some(value), Some(target), Some(stretch)) = (self.value, self.target, self.stretch) else { return "?" };
        if value < 0.0 && is_never_negative(&self.name) && self.better.reaches(value, target) {
            // How much it is nobody knows, but not so much that the target is missed.
            "yes, as far as noise lets see"
        } else if self.better.reaches(value, stretch) {
            "stretch"
        } else if self.better.reaches(value, target) {
            "yes"
        } else {
            "no"
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
pub fn commit() -> String {
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
        Report {
            date: "2020-02-02".into(),
            machine: "m".into(),
            commit: "c".into(),
            quick: true,
            peer: None,
            figures: Vec::new(),
        }
    }

    #[test]
    fn a_figure_with_more_than_half_of_its_pairs_void_is_void() {
        let mut report = report();
        let values = |numbers: &[(f64, bool)]| -> Vec<Value> {
            let void = |counts: bool| (!counts).then(|| "of noise".to_owned());
            numbers.iter().map(|&(number, counts)| Value { number, void: void(counts) }).collect()
        };
        let half =
            values(&[(10_000.0, true), (1.0, false), (15_000.0, true), (2.0, false), (20_000.0, true), (3.0, false)]);
        report.median("a", "A", "req/s", Better::Higher, &half);
        report.median("b", "B", "", Better::Higher, &values(&[(1.0, true), (2.0, false), (3.0, false)]));
        report.median("c", "C", "", Better::Higher, &values(&[(f64::NAN, false)]));
        let voids: Vec<bool> = report.figures.iter().map(|figure| figure.void.is_some()).collect();
        assert_eq!(voids, [false, true, true]);
        let table = report.markdown();
        assert!(table.contains("| A | `a` | 15,000 req/s | 10,000 – 20,000 |"), "{table}");
        assert!(table.contains("| B | `b` | void: 2 of 3 pairs were void, the first because of noise |  |"), "{table}");
        let json = serde_json::to_value(&report).unwrap();
        let (valid, void, nothing) = (&json["figures"][0], &json["figures"][1], &json["figures"][2]);
        assert_eq!((&valid["value"], valid.get("raw")), (&15_000.0.into(), None));
        assert!(["value", "low", "high"].iter().all(|field| void[field].is_null()), "{void}");
        assert_eq!(void["raw"], 2.0);
        assert!(nothing["value"].is_null() && nothing.get("raw").is_none(), "not a number is no JSON: {nothing}");
    }

    #[test]
    fn figures_are_held_against_their_targets() {
        let mut report = report();
        let counts = |number| [(); 3].map(|()| Value { number, void: None });
        report.median("w1_grpc_vs_echo", "ratio", "", Better::Higher, &counts(0.85));
        report.single("added_p99_us", "added", "µs", Better::Lower, 90.0, None);
        report.single("added_p50_us", "less", "µs", Better::Lower, -3.0, None);
        report.single("instructions", "fewer", "", Better::Lower, -3.0, None);
        report.single("start_ms", "start", "ms", Better::Lower, 100.5, None);
        report.single("swap_failures", "failures", "", Better::Lower, 0.0, None);
        report.single("roofline_w1", "roofline", "", Better::Higher, 1.0, Some("noise".to_owned()));
        report.single("unheard_of", "free", "", Better::Higher, 1.0, None);
        let table = report.markdown();
        let row = |text: &str| assert!(table.contains(text), "{text} is not in\n{table}");
        row("| ratio | `w1_grpc_vs_echo` | 0.85 | 0.85 – 0.85 | ≥ 0.80 | ≥ 0.90 | yes |");
        row("| added | `added_p99_us` | 90.0 µs |  | ≤ 200 | ≤ 100 | stretch |");
        row("| less | `added_p50_us` | -3.00 µs |  | ≤ 50.0 | ≤ 20.0 | yes, as far as noise lets see |");
        row("| fewer | `instructions` | -3.00 |  | ≤ 15,000 | ≤ 6,000 | stretch |");
        row("| start | `start_ms` | 100 ms |  | ≤ 100 | ≤ 30.0 | no |");
        row("| failures | `swap_failures` | 0.00 |  | ≤ 0.00 | ≤ 0.00 | stretch |");
        row("| roofline | `roofline_w1` | void: noise |  | ≥ 0.90 | ≥ 0.95 | ? |");
        row("| free | `unheard_of` | 1.00 |  |");
        report.median("two", "two pairs", "", Better::Higher, &counts(0.5)[..2]);
        let table = report.markdown();
        assert!(table.contains("| two pairs | `two` | 0.50 |  |"), "two values have no interval: {table}");
    }

    #[test]
    fn results_are_written_for_machines_and_kept_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let (out, kept) = (folder.path().join("out"), folder.path().join("kept"));
        let mut report = report();
        report.median("roofline_w3", "r", "", Better::Higher, &[(); 3].map(|()| Value { number: 0.97, void: None }));
        report.write(&out, "report", Some((&kept, "a-1"))).unwrap();
        let read =
            |path: &Path| -> serde_json::Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
        let json = read(&out.join("report.json"));
        assert_eq!(json, read(&kept.join("a-1.json")));
        assert_eq!((&json["machine"], &json["commit"]), (&"m".into(), &"c".into()));
        let figure = &json["figures"][0];
        assert_eq!((&figure["name"], &figure["better"]), (&"roofline_w3".into(), &"higher".into()));
        for (field, value) in [("value", 0.97), ("low", 0.97), ("high", 0.97), ("target", 0.95), ("stretch", 0.98)] {
            assert_eq!(figure[field], value, "{field}");
        }
        assert!(std::fs::read_to_string(kept.join("a-1.md")).unwrap().contains("`roofline_w3`"));
        assert!(report.write(&out, "report", Some((&kept, "../a"))).is_err());
    }

    #[test]
    fn numbers_are_shown_with_the_digits_that_matter() {
        let shown = [0.123, 9.999, 45.67, 123.4, 61_234.5, -1234567.0].map(digits);
        assert_eq!(shown, ["0.12", "10.00", "45.7", "123", "61,234", "-1,234,567"]);
    }
}
