//! `Histogram`: how often values of each size came, on buckets that are the same everywhere.
//!
//! Buckets are the quarters of octaves, on both sides of zero, so that histograms of different versions can be compared
//! and added up without agreeing on anything before.

use serde::{Deserialize, Serialize};

/// Buckets of an octave, all equally wide: 1, 1.25, 1.5 and 1.75 to 2.
const PARTS: i32 = 4;
/// Octaves below and above one that are told apart: 2⁻²⁴ (a 17-millionth) to 2²⁴.
const OCTAVES: i32 = 24;
/// Buckets of one sign.
const SIDE: usize = (2 * OCTAVES * PARTS) as usize;
/// A double's exponent is its octave, and the first two bits behind it the quarter of that: the highest bits of a number
/// without its sign are its bucket, less those of 2⁻²⁴. That takes 4 instructions where a logarithm takes 60.
const SHIFT: u32 = f64::MANTISSA_DIGITS - 1 - PARTS.ilog2();
const FIRST: u64 = ((f64::MAX_EXP - 1 - OCTAVES) * PARTS) as u64;

/// How often values of each size came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    /// Negative values from the largest, what is nearly zero, positive values to the largest.
    counts: Vec<u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; 2 * SIDE + 1] }
    }
}

impl Histogram {
    /// Counts a finite value.
    pub fn add(&mut self, value: f64) {
        if let Some(count) = self.counts.get_mut(bucket(value)) {
            *count += 1;
        }
    }

    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How many values were above `limit`, as far as buckets tell: those of its own bucket are not.
    pub fn above(&self, limit: f64) -> u64 {
        self.counts.iter().skip(bucket(limit) + 1).sum()
    }

    /// How many values were `limit` at most, where it is the end of a bucket.
    pub fn up_to(&self, limit: f64) -> u64 {
        self.counts.iter().take(bucket(limit) + 1).sum()
    }

    /// The upper end of the bucket with the value that a `share` of all reach at most; `None` of nothing.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let rank = (share * self.total() as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        found.map(end)
    }

    /// Counts what another one has counted, too.
    pub fn join(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count += more);
    }

    /// What came since `earlier`, which this one was before.
    pub fn since(&self, earlier: &Self) -> Self {
        let counts = self.counts.iter().zip(&earlier.counts).map(|(now, then)| now.saturating_sub(*then));
        Self { counts: counts.collect() }
    }
}

/// The index of the bucket that `value` falls into; what is too large falls into the last one. A bucket's upper end
/// belongs to it.
fn bucket(value: f64) -> usize {
    let bits = value.abs().to_bits();
    // Of negative numbers the upper end is the one nearer to zero.
    let inner = if value > 0.0 { bits.saturating_sub(1) } else { bits };
    let Some(part) = (inner >> SHIFT).checked_sub(FIRST) else { return SIDE };
    let part = (part as usize).min(SIDE - 1);
    if value > 0.0 { SIDE + 1 + part } else { SIDE - 1 - part }
}

/// The upper end of a bucket.
fn end(bucket: usize) -> f64 {
    let parts = PARTS as usize;
    let size = |part: usize| ((part / parts) as f64 - f64::from(OCTAVES)).exp2() * (1.0 + (part % parts) as f64 / 4.0);
    match bucket.cmp(&SIDE) {
        std::cmp::Ordering::Less => -size(SIDE - 1 - bucket),
        std::cmp::Ordering::Equal => size(0),
        std::cmp::Ordering::Greater => size(bucket - SIDE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_into_buckets_in_their_order() {
        let values = [-1e30, -3.0, -0.25, -1e-9, 0.0, 1e-9, 1e-6, 0.5, 0.51, 0.9, 1.0, 1e30];
        let found: Vec<usize> = values.iter().map(|&value| bucket(value)).collect();
        assert!(found.is_sorted(), "{found:?}");
        assert_eq!(found[3..6], [SIDE; 3], "nearly zero");
        assert!(found.iter().all(|&bucket| bucket < 2 * SIDE + 1));
        for value in [-100.0, -0.3, 0.001, 0.7, 1234.5] {
            let end = end(bucket(value));
            assert!(value <= end && end - value <= value.abs() * 0.25, "{value} up to {end}");
        }
    }

    #[test]
    fn a_bucket_ends_with_its_upper_end() {
        for number in 0..=2 * SIDE {
            let upper = end(number);
            assert_eq!(bucket(upper), number, "{upper}");
            assert_eq!(bucket(upper.next_up()), (number + 1).min(2 * SIDE), "above {upper}");
        }
        assert_eq!((end(SIDE + 1 + 24 * 4), end(SIDE - 1 - 24 * 4)), (1.25, -1.0));
        let mut histogram = Histogram::default();
        for value in [-4.0, -3.9, 0.0, 1.0, 4.0, 4.1] {
            histogram.add(value);
        }
        assert_eq!([-16.0, -4.0, 0.0, 1.0, 4.0, 16.0].map(|limit| histogram.up_to(limit)), [0, 1, 3, 4, 5, 6]);
        assert_eq!([-4.0, 1.0, 4.0].map(|limit| histogram.above(limit)), [5, 2, 1]);
    }

    #[test]
    fn quantiles_are_right_within_a_bucket() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        (1..=1000).for_each(|value| histogram.add(f64::from(value) / 1000.0));
        for (share, expected) in [(0.5, 0.5), (0.95, 0.95)] {
            let found = histogram.quantile(share).unwrap();
            assert!(found >= expected && found <= expected * 1.25, "{found} for {share}");
        }
        let limit = histogram.quantile(0.95).unwrap();
        assert!(histogram.above(limit) <= 50);
        let before = histogram.clone();
        histogram.add(2.0);
        assert_eq!(histogram.since(&before).total(), 1);
    }
}
