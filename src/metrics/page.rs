//! `Page`: series that are made anew for each scrape, from what somebody else keeps.
//!
//! What changes seldom, or is counted elsewhere already, needs no counter of its own; and its series are gone as soon as
//! nobody has them shown.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write},
};

use super::families::head;

/// The samples of one scrape, by family.
#[derive(Default)]
pub struct Page {
    families: BTreeMap<&'static str, String>,
}

/// How many values were up to each bound of a family, their sum and their number.
pub struct Buckets<'a> {
    pub bounds: &'a [f64],
    /// Up to each bound, those below it included.
    pub up_to: &'a [u64],
    pub sum: f64,
    pub count: u64,
}

/// Names and values of a series' labels.
pub(super) type Pairs<'a> = [(&'static str, &'a str)];

impl Page {
    pub(super) fn sample(&mut self, family: &'static str, labels: &Pairs<'_>, value: impl Display) {
        self.line(family, "", labels, value);
    }

    pub(super) fn histogram(&mut self, family: &'static str, labels: &Pairs<'_>, buckets: &Buckets<'_>) {
        let mut bucket = |bound: &str, count: u64| {
            let bounded: Vec<_> = labels.iter().copied().chain([("le", bound)]).collect();
            self.line(family, "_bucket", &bounded, count);
        };
        for (bound, count) in buckets.bounds.iter().zip(buckets.up_to) {
            bucket(&bound.to_string(), *count);
        }
        bucket("+Inf", buckets.count);
        self.line(family, "_sum", labels, buckets.sum);
        self.line(family, "_count", labels, buckets.count);
    }

    fn line(&mut self, family: &'static str, suffix: &str, labels: &Pairs<'_>, value: impl Display) {
        let text = self.families.entry(family).or_insert_with(|| {
            let mut text = String::new();
            head(family, &mut text);
            text
        });
        // Writing to a string does not fail.
        let _ = writeln!(text, "{family}{suffix}{{{}}} {value}", written(labels));
    }

    /// The exposition text, each family with its head.
    pub(super) fn text(self) -> String {
        self.families.into_values().collect()
    }
}

/// Labels as they stand between the braces.
fn written(labels: &Pairs<'_>) -> String {
    let mut text = String::new();
    for (name, value) in labels {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        for letter in value.chars() {
            match letter {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                letter => text.push(letter),
            }
        }
        text.push('"');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::families, *};

    #[test]
    fn what_clients_named_is_escaped() {
        let mut page = Page::default();
        page.sample(families::PREDICTIONS, &[("model", "m"), ("label", "a\"b\\c\nd\té")], 3);
        let text = page.text();
        let line = text.lines().last().unwrap();
        assert_eq!(line, "tidegate_predictions_total{model=\"m\",label=\"a\\\"b\\\\c\\nd\té\"} 3");
        assert!(text.starts_with("# HELP tidegate_predictions_total "), "{text}");
    }

    #[test]
    fn a_histogram_ends_in_its_count() {
        let mut page = Page::default();
        let buckets = Buckets { bounds: &[-4.0, 0.5], up_to: &[1, 3], sum: -2.5, count: 4 };
        page.histogram(families::PREDICTION_VALUE, &[("model", "m")], &buckets);
        let text = page.text();
        let lines: Vec<&str> = text.lines().skip(2).collect();
        let expected = [
            r#"tidegate_prediction_value_bucket{model="m",le="-4"} 1"#,
            r#"tidegate_prediction_value_bucket{model="m",le="0.5"} 3"#,
            r#"tidegate_prediction_value_bucket{model="m",le="+Inf"} 4"#,
            r#"tidegate_prediction_value_sum{model="m"} -2.5"#,
            r#"tidegate_prediction_value_count{model="m"} 4"#,
        ];
        assert_eq!(lines, expected);
    }
}
