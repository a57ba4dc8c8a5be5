//! `Moments`: the mean and the spread of the values that came last.

use serde::{Deserialize, Serialize};

/// A value weighs as much as if so many were looked back on: what a version answered last week does not hide what it
/// answers now.
const MEMORY: u64 = 1000;

/// The mean and the spread of about the last thousand values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    /// Up to `MEMORY`.
    count: u64,
    mean: f64,
    variance: f64,
}

impl Moments {
    /// Takes in a finite value, the way of Welford: sums of squares would lose a small spread about a large mean.
    pub fn add(&mut self, value: f64) {
        self.count = (self.count + 1).min(MEMORY);
        let share = 1.0 / self.count as f64;
        let before = value - self.mean;
        self.mean += before * share;
        self.variance += (before * (value - self.mean) - self.variance) * share;
    }

    /// Mean and standard deviation; `None` of nothing.
    pub fn read(&self) -> Option<(f64, f64)> {
        (self.count > 0).then(|| (self.mean, self.variance.max(0.0).sqrt()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
        let mut moments = Moments::default();
        assert_eq!(moments.read(), None);
        values.into_iter().for_each(|value| moments.add(value));
        moments.read().unwrap()
    }

    #[test]
    fn few_values_have_their_mean_and_standard_deviation() {
        assert_eq!(read([3.0]), (3.0, 0.0));
        let (mean, deviation) = read([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert!((mean - 5.0).abs() < 1e-12 && (deviation - 2.0).abs() < 1e-12, "{mean} ± {deviation}");
        let (mean, deviation) = read((0..1000).map(|index| 1e9 + f64::from(index % 2)));
        assert!((mean - 1e9 - 0.5).abs() < 1e-3 && (deviation - 0.5).abs() < 1e-3, "{mean} ± {deviation}");
    }

    #[test]
    fn what_came_long_ago_is_forgotten() {
        let long_ago = (0..100_000).map(|_| 5.0);
        let (mean, deviation) = read(long_ago.chain((0..10_000).map(|index| 7.0 + f64::from(index % 2))));
        assert!((mean - 7.5).abs() < 0.01 && (deviation - 0.5).abs() < 0.01, "{mean} ± {deviation}");
    }
}
