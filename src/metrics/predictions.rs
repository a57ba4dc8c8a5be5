//! What a version answered, as series.

use super::{
    Way,
    families::{
        PREDICTION_MEAN, PREDICTION_NONFINITE, PREDICTION_SCORE, PREDICTION_STDDEV, PREDICTION_VALUE, PREDICTIONS,
    },
    page::{Buckets, Page},
};

/// Labels of an output that have a series each.
pub const SHOWN_LABELS: usize = 20;
/// The value of the label `label` that stands for all others.
pub const OTHER: &str = "other";

/// What one output of a version answered to requests that came to it in one way.
pub struct Predictions<'a> {
    pub model: &'a str,
    pub version: &'a str,
    pub way: Way,
    pub output: &'a str,
    /// How often each of up to `SHOWN_LABELS` labels came, and all others; `None` of what has no labels.
    pub labels: Option<(Vec<(&'a str, u64)>, u64)>,
    /// What the winning classes scored.
    pub scores: Option<Buckets<'a>>,
    pub values: Option<Buckets<'a>>,
    /// Mean and standard deviation of the last values.
    pub moments: Option<(f64, f64)>,
    /// Elements that were NaN or infinite; `None` of what cannot be.
    pub nonfinite: Option<u64>,
}

impl Page {
    /// Shows what an output answered.
    pub fn predictions(&mut self, of: &Predictions<'_>) {
        let series =
            [("model", of.model), ("version", of.version), ("variant", of.way.as_str()), ("output", of.output)];
        if let Some((labels, other)) = &of.labels {
            let labels = labels.iter().map(|(label, count)| (*label, *count));
            for (label, count) in labels.chain([(OTHER, *other)]) {
                let [model, version, variant, output] = series;
                self.sample(PREDICTIONS, &[model, version, variant, output, ("label", label)], count);
            }
        }
        if let Some(scores) = &of.scores {
            self.histogram(PREDICTION_SCORE, &series, scores);
        }
        if let Some(values) = &of.values {
            self.histogram(PREDICTION_VALUE, &series, values);
        }
        if let Some((mean, deviation)) = of.moments {
            self.sample(PREDICTION_MEAN, &series, mean);
            self.sample(PREDICTION_STDDEV, &series, deviation);
        }
        if let Some(nonfinite) = of.nonfinite {
            self.sample(PREDICTION_NONFINITE, &series, nonfinite);
        }
    }
}
