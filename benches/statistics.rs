//! Medians, their intervals, and exact quantiles of latencies.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};

const RESAMPLES: usize = 10_000;

/// The middle value; not a number when there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => (sorted[even / 2 - 1] + sorted[even / 2]) / 2.0,
    }
}

/// The 95 % interval of the median, by drawing from `values` again and again with one fixed seed.
pub fn interval(values: &[f64]) -> (f64, f64) {
    if values.is_empty() {
        return (f64::NAN, f64::NAN);
    }
    let mut random = StdRng::seed_from_u64(0);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let drawn: Vec<f64> = values.iter().map(|_| values[random.random_range(0..values.len())]).collect();
            median(&drawn)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    (medians[RESAMPLES / 40], medians[RESAMPLES - 1 - RESAMPLES / 40])
}

/// Every latency of a run. There are few enough to keep them all, so quantiles are exact, not those of a bucket.
#[derive(Default)]
pub struct Latencies {
    nanos: Vec<u64>,
}

impl Latencies {
    pub fn record(&mut self, latency: Duration) {
        self.nanos.push(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn count(&self) -> usize {
        self.nanos.len()
    }

    /// The smallest latency that at least `share` of all do not exceed, in seconds; not a number when there are none.
    pub fn quantile(&mut self, share: f64) -> f64 {
        self.nanos.sort_unstable();
        let rank = (share * self.nanos.len() as f64).ceil() as usize;
        self.nanos.get(rank.max(1) - 1).map_or(f64::NAN, |&nanos| nanos as f64 / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_stand_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn intervals_hold_the_median_and_shrink_with_more_values() {
        let values =
            |count: usize| -> Vec<f64> { (0..count).map(|i| ((i * 37) % count) as f64 / count as f64).collect() };
        let (low, high) = interval(&values(10));
        assert!(low < median(&values(10)) && median(&values(10)) < high, "{low} {high}");
        let (narrow_low, narrow_high) = interval(&values(1000));
        assert!(narrow_high - narrow_low < (high - low) / 3.0, "{narrow_low} {narrow_high}");
        // For 1,000 values spread evenly over 0 to 1 theory says 0.5 ± 1.96 · 0.5 / √1000 = 0.5 ± 0.031.
        assert!((narrow_low - 0.469).abs() < 0.01 && (narrow_high - 0.531).abs() < 0.01, "{narrow_low} {narrow_high}");
        assert_eq!(interval(&[7.0]), (7.0, 7.0));
    }

    #[test]
    fn quantiles_are_exact() {
        let mut latencies = Latencies::default();
        (1..=1000).rev().for_each(|millis| latencies.record(Duration::from_millis(millis)));
        assert_eq!(latencies.count(), 1000);
        assert_eq!([0.5, 0.99, 1.0].map(|share| latencies.quantile(share)), [0.5, 0.99, 1.0]);
        assert!(Latencies::default().quantile(0.5).is_nan());
    }
}
