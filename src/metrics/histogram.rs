//! `Histogram`: counts per bucket, which cost a few instructions to raise, and the lines Prometheus reads of them.
//!
//! The exporter's own keeps every value, with the time it came, until a scrape or a sweep sorts it into its bucket: a
//! clock read and a place in memory for each of the two values of a request, and a task that wakes to sweep them up.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
};

/// The buckets of a family.
pub(super) struct Scale<const N: usize> {
    /// Upper bounds in the unit that is shown.
    shown: [f64; N],
    /// The same in the unit that is recorded.
    recorded: [u64; N],
    /// How many of what is recorded are one of what is shown.
    unit: f64,
}

impl<const N: usize> Scale<N> {
    /// `shown` is positive and in ascending order.
    pub(super) const fn new(shown: [f64; N], unit: f64) -> Self {
        let mut recorded = [0; N];
        let mut index = 0;
        while index < N {
            recorded[index] = (shown[index] * unit + 0.5) as u64;
            index += 1;
        }
        Self { shown, recorded, unit }
    }
}

/// How many values fell into each bucket, and their sum.
pub(super) struct Histogram<const N: usize> {
    scale: &'static Scale<N>,
    /// Not cumulative.
    buckets: [AtomicU64; N],
    above: AtomicU64,
    sum: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    pub(super) fn new(scale: &'static Scale<N>) -> Self {
        Self { scale, buckets: [const { AtomicU64::new(0) }; N], above: AtomicU64::new(0), sum: AtomicU64::new(0) }
    }

    pub(super) fn record(&self, value: u64) {
        // Bounds belong to their bucket.
        let index = self.scale.recorded.partition_point(|&bound| bound < value);
        self.buckets.get(index).unwrap_or(&self.above).fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Adds the lines of the series of `family` that has these `labels`, written as they are in the exposition.
    pub(super) fn render(&self, family: &str, labels: &str, out: &mut String) {
        let mut count = 0;
        let mut line = |suffix: &str, bound: Option<&dyn std::fmt::Display>, value: &dyn std::fmt::Display| {
            // Writing to a string does not fail.
            let _ = match bound {
                Some(bound) => writeln!(out, "{family}_{suffix}{{{labels},le=\"{bound}\"}} {value}"),
                None => writeln!(out, "{family}_{suffix}{{{labels}}} {value}"),
            };
        };
        for (bound, bucket) in self.scale.shown.iter().zip(&self.buckets) {
            count += bucket.load(Ordering::Relaxed);
            line("bucket", Some(bound), &count);
        }
        count += self.above.load(Ordering::Relaxed);
        line("bucket", Some(&"+Inf"), &count);
        line("sum", None, &(self.sum.load(Ordering::Relaxed) as f64 / self.scale.unit));
        line("count", None, &count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_belong_to_their_bucket() {
        static SCALE: Scale<3> = Scale::new([5e-5, 1.0, 2.5], 1e9);
        let histogram = Histogram::new(&SCALE);
        for value in [0, 50_000, 50_001, 1_000_000_000, 2_500_000_001] {
            histogram.record(value);
        }
        let mut text = String::new();
        histogram.render("h", "a=\"b\"", &mut text);
        let expected = [
            r#"h_bucket{a="b",le="0.00005"} 2"#,
            r#"h_bucket{a="b",le="1"} 4"#,
            r#"h_bucket{a="b",le="2.5"} 4"#,
            r#"h_bucket{a="b",le="+Inf"} 5"#,
            r#"h_sum{a="b"} 3.500100002"#,
            r#"h_count{a="b"} 5"#,
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    }
}
