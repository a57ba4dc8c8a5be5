//! `ServiceTime`: how long a run of so many rows takes, learned from the warm-up sweep and every run since.

use std::time::Duration;

/// How much of the past each new run replaces once there is some: the last twenty or so count.
const FRESHNESS: f64 = 0.05;

/// Once enough runs were seen, none counts for more than so many times what was expected, or than the sweep said.
const OUTLIER: f64 = 8.0;

/// A line `fixed + per_row · rows` from the warm-up sweep, times how much slower or faster runs have been since.
///
/// Only the factor is learned online: recent runs are often all of one size, which says nothing of a slope.
#[derive(Clone, Debug)]
pub struct ServiceTime {
    /// Seconds.
    fixed: f64,
    /// Seconds per row.
    per_row: f64,
    factor: f64,
    /// Runs seen; until there are enough, all of them and the sweep count alike.
    seen: u32,
}

impl Default for ServiceTime {
    fn default() -> Self {
        Self { fixed: 0.0, per_row: 0.0, factor: 1.0, seen: 0 }
    }
}

impl ServiceTime {
    /// The least-squares line through pairs of rows and the time a run of so many took.
    pub fn from_sweep(runs: &[(usize, Duration)]) -> Self {
        if runs.is_empty() {
            return Self::default();
        }
        let count = runs.len() as f64;
        let points = || runs.iter().map(|&(rows, took)| (rows as f64, took.as_secs_f64()));
        let mean_x = points().map(|(x, _)| x).sum::<f64>() / count;
        let mean_y = points().map(|(_, y)| y).sum::<f64>() / count;
        let variance: f64 = points().map(|(x, _)| (x - mean_x).powi(2)).sum();
        let covariance: f64 = points().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
        // Runs of one size only say what that size costs; take all of it as cost per row.
        let most = mean_y / mean_x.max(1.0);
        let per_row = if variance > 0.0 { (covariance / variance).clamp(0.0, most) } else { most };
        Self { fixed: (mean_y - per_row * mean_x).max(0.0), per_row, factor: 1.0, seen: 0 }
    }

    pub fn observe(&mut self, rows: usize, took: Duration) {
        if rows == 0 {
            // An empty run says nothing of the others.
            return;
        }
        let expected = self.fixed + self.per_row * rows as f64;
        if expected > 0.0 {
            self.seen = self.seen.saturating_add(1);
            let share = FRESHNESS.max(1.0 / f64::from(self.seen.saturating_add(1)));
            let ratio = took.as_secs_f64() / expected;
            // A run in which the machine stood still says little of those to come.
            let most = if share > FRESHNESS { f64::INFINITY } else { OUTLIER * self.factor.max(1.0) };
            self.factor += share * (ratio.min(most) - self.factor);
        } else {
            // Nothing was measured at warm-up: the first run stands for all.
            self.per_row = took.as_secs_f64() / rows as f64;
        }
    }

    /// The expected time of one run of `rows` rows; zero before anything was seen.
    pub fn estimate(&self, rows: usize) -> Duration {
        duration(self.factor * (self.fixed + self.per_row * rows as f64))
    }

    /// The expected time of a run of `rows` rows in runs of `full` rows; none before anything was seen.
    pub fn relative(&self, rows: usize, full: usize) -> Option<f64> {
        let run = |rows: usize| self.fixed + self.per_row * rows as f64;
        (run(full) > 0.0).then(|| run(rows) / run(full))
    }

    /// The expected time to run `requests` requests of together `rows` rows in groups of at most `group` rows.
    pub fn estimate_queue(&self, rows: usize, requests: usize, group: usize) -> Duration {
        let runs = if group <= 1 { requests } else { rows.div_ceil(group).min(requests) };
        duration(self.factor * (self.fixed * runs as f64 + self.per_row * rows as f64))
    }
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    fn close(left: Duration, right: Duration) -> bool {
        left.abs_diff(right) < right / 20 + Duration::from_micros(1)
    }

    #[test]
    fn a_line_is_found_again() {
        let sweep: Vec<_> = [1usize, 2, 4, 8].iter().map(|&rows| (rows, ms(4 + 2 * rows as u64))).collect();
        let service = ServiceTime::from_sweep(&sweep);
        assert!(close(service.estimate(16), ms(36)));
        assert!(close(service.estimate_queue(64, 64, 8), ms(8 * 4 + 128)));
        assert!(close(service.estimate_queue(64, 64, 1), ms(64 * 4 + 128)));
    }

    #[test]
    fn it_follows_a_model_that_turns_out_slower_or_faster() {
        let sweep: Vec<_> = [1usize, 8, 64].iter().map(|&rows| (rows, ms(10 * rows as u64))).collect();
        let mut service = ServiceTime::from_sweep(&sweep);
        (0..3).for_each(|_| service.observe(1, ms(1000)));
        assert!(service.estimate(1) > ms(700), "a few runs are enough to be careful");
        (0..200).for_each(|_| service.observe(1, ms(1)));
        assert!(close(service.estimate(1), ms(1)), "{:?}", service.estimate(1));
        (0..200).for_each(|_| service.observe(1, ms(50)));
        assert!(close(service.estimate(2), ms(100)), "{:?}", service.estimate(2));
        service.observe(1, ms(60_000));
        assert!(service.estimate(1) < ms(80), "one run in which the machine stood still: {:?}", service.estimate(1));
    }

    #[test]
    fn nothing_seen_costs_nothing_and_the_first_run_stands_for_all() {
        let mut service = ServiceTime::default();
        assert_eq!(service.estimate(100), Duration::ZERO);
        service.observe(0, ms(1000));
        assert_eq!(service.estimate(100), Duration::ZERO, "an empty run says nothing");
        service.observe(2, ms(4));
        assert!(close(service.estimate(10), ms(20)));
    }
}
