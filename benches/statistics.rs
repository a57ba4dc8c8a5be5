//! Medians and their intervals, the line through the times of batches, and the distribution of latencies.

use std::time::Duration;

use hdrhistogram::Histogram;
use rand::{RngExt, SeedableRng, rngs::StdRng};

const RESAMPLES: usize = 10_000;
/// Resamples of what draws from the histograms of all runs, which takes longer than a median.
pub const POOLED_RESAMPLES: usize = 300;
/// Of fewer values an interval would say more than is known.
const FEWEST: usize = 3;

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

/// The 95 % interval of the median; not a number for fewer than three values.
pub fn interval(values: &[f64]) -> (f64, f64) {
    bootstrap(values.len(), RESAMPLES, |drawn| median(&drawn.iter().map(|&index| values[index]).collect::<Vec<_>>()))
}

/// The 95 % interval of a statistic of `count` things, by drawing as many of them again and again with one fixed seed.
/// Not a number when there are fewer than three.
pub fn bootstrap(count: usize, resamples: usize, statistic: impl Fn(&[usize]) -> f64) -> (f64, f64) {
    if count < FEWEST {
        return (f64::NAN, f64::NAN);
    }
    let mut random = StdRng::seed_from_u64(0);
    let mut drawn = vec![0; count];
    let mut found: Vec<f64> = (0..resamples)
        .map(|_| {
            drawn.fill_with(|| random.random_range(0..count));
            statistic(&drawn)
        })
        .collect();
    found.sort_by(f64::total_cmp);
    (found[resamples / 40], found[resamples - 1 - resamples / 40])
}

/// How long a run takes by its number of rows: `row` seconds for each of them, and `fixed` seconds for any.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    pub row: f64,
    pub fixed: f64,
}

/// The line through `(rows, seconds)` with the smallest sum of squared relative errors, so that a batch of one says as
/// much as a batch of 64. Not a number with fewer than two sizes.
pub fn fit(times: &[(usize, f64)]) -> Line {
    let [mut weight, mut x, mut y, mut xx, mut xy] = [0.0; 5];
    for &(rows, seconds) in times {
        let (rows, each) = (rows as f64, 1.0 / (seconds * seconds));
        weight += each;
        x += each * rows;
        y += each * seconds;
        xx += each * rows * rows;
        xy += each * rows * seconds;
    }
    let row = (weight * xy - x * y) / (weight * xx - x * x);
    Line { row, fixed: (y - row * x) / weight }
}

/// Latencies of a run, each kept to a thousandth of itself: a histogram of fixed size, because a list that grows would
/// hold up the one thread that sends whenever it moves.
pub struct Latencies(Histogram<u64>);

/// In nanoseconds. What is shorter is told apart by this much only, and what is longer counts as that long.
const SHORTEST: u64 = 100;
const LONGEST: u64 = 100_000_000_000;
const DIGITS: u8 = 3;

impl Default for Latencies {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "the bounds are constants that a test constructs")]
        let histogram = Histogram::new_with_bounds(SHORTEST, LONGEST, DIGITS).expect("bounds of a histogram");
        Self(histogram)
    }
}

impl Latencies {
    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds those of another run.
    fn add(&mut self, others: &Latencies) {
        // Both have the same bounds, so all of them fit.
        let added = self.0.add(&others.0);
        debug_assert!(added.is_ok(), "{added:?}");
    }

    /// The quantile of several runs taken together.
    pub fn pooled<'a>(runs: impl Iterator<Item = &'a Latencies>, share: f64) -> f64 {
        let mut all = Latencies::default();
        runs.for_each(|run| all.add(run));
        all.quantile(share)
    }

    pub fn count(&self) -> usize {
        self.0.len() as usize
    }

    /// Those that do not exceed `limit`, to a thousandth of it.
    pub fn within(&self, limit: Duration) -> usize {
        self.0.count_between(0, u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX)) as usize
    }

    /// The smallest latency that at least `share` of all do not exceed, in seconds; not a number when there are none.
    pub fn quantile(&self, share: f64) -> f64 {
        if self.0.is_empty() { f64::NAN } else { self.0.value_at_quantile(share) as f64 / 1e9 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_within_a_limit_are_counted() {
        let mut latencies = Latencies::default();
        [1, 50, 99, 102, 400].into_iter().for_each(|millis| latencies.record(Duration::from_millis(millis)));
        assert_eq!(latencies.within(Duration::from_millis(100)), 3);
    }

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
        let many = values(1000);
        let drawn_median = |drawn: &[usize]| median(&drawn.iter().map(|&index| many[index]).collect::<Vec<_>>());
        let (narrow_low, narrow_high) = bootstrap(many.len(), 500, drawn_median);
        assert!(narrow_high - narrow_low < (high - low) / 3.0, "{narrow_low} {narrow_high}");
        // For 1,000 values spread evenly over 0 to 1 theory says 0.5 ± 1.96 · 0.5 / √1000 = 0.5 ± 0.031.
        assert!(
            (narrow_low - 0.469).abs() < 0.015 && (narrow_high - 0.531).abs() < 0.015,
            "{narrow_low} {narrow_high}"
        );
        assert_eq!(interval(&[7.0; 3]), (7.0, 7.0));
        assert!(interval(&[7.0, 8.0]).0.is_nan() && interval(&[7.0, 8.0]).1.is_nan());
    }

    #[test]
    fn the_line_goes_through_all_sizes_alike() {
        let exact: Vec<_> = [1, 2, 4, 8, 64].map(|rows| (rows, 3e-6 + 1e-6 * rows as f64)).into();
        let line = fit(&exact);
        assert!((line.row - 1e-6).abs() < 1e-12 && (line.fixed - 3e-6).abs() < 1e-12, "{line:?}");
        // Off by a tenth at either end: a batch of one pulls as hard as one of 64.
        let mut off = exact.clone();
        off[0].1 *= 1.1;
        off[4].1 *= 1.1;
        let line = fit(&off);
        let errors: Vec<f64> =
            off.iter().map(|&(rows, time)| (line.fixed + line.row * rows as f64) / time - 1.0).collect();
        assert!(errors.iter().all(|error| error.abs() < 0.08), "{errors:?}");
        assert!(fit(&exact[..1]).row.is_nan());
    }

    #[test]
    fn quantiles_are_true_to_a_thousandth() {
        let mut latencies = Latencies::default();
        (1..=1000).rev().for_each(|millis| latencies.record(Duration::from_millis(millis)));
        assert_eq!(latencies.count(), 1000);
        for (share, expected) in [(0.5, 0.5), (0.99, 0.99), (1.0, 1.0)] {
            let found = latencies.quantile(share);
            assert!((found / expected - 1.0).abs() < 1e-3, "{share}: {found}");
        }
        assert!(Latencies::default().quantile(0.5).is_nan());
    }

    #[test]
    fn no_latency_is_lost_at_the_edges() {
        let mut latencies = Latencies::default();
        latencies.record(Duration::ZERO);
        latencies.record(Duration::from_secs(1000));
        assert_eq!(latencies.count(), 2);
        assert!(latencies.quantile(0.5) < 1e-6, "{}", latencies.quantile(0.5));
        let longest = LONGEST as f64 / 1e9;
        assert!((latencies.quantile(1.0) / longest - 1.0).abs() < 1e-3, "{}", latencies.quantile(1.0));
        let mut sum = Latencies::default();
        sum.add(&latencies);
        sum.add(&latencies);
        assert_eq!((sum.count(), sum.quantile(1.0)), (4, latencies.quantile(1.0)));
        assert_eq!(Latencies::pooled([&latencies, &sum].into_iter(), 1.0), latencies.quantile(1.0));
    }
}
