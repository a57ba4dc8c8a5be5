//! `ServiceTime`: how long a run of so many rows takes, learned from the warm-up sweep and every run since.

use std::time::Duration;

/// Weight that each run loses when a newer one is seen: the last fifty or so count.
const DECAY: f64 = 0.98;

/// A line `fixed + per_row · rows` through the runs seen, newer ones counting more.
#[derive(Clone, Debug, Default)]
pub struct ServiceTime {
    recent: Moments,
    /// The warm-up sweep never decays, so the line keeps its slope when all recent runs have one size.
    sweep: Moments,
}

/// Weighted sums for a least-squares line.
#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Moments {
    fn add(&mut self, x: f64, y: f64) {
        self.weight += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.xy += x * y;
    }

    fn scaled(self, factor: f64) -> Self {
        Self {
            weight: self.weight * factor,
            x: self.x * factor,
            y: self.y * factor,
            xx: self.xx * factor,
            xy: self.xy * factor,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            weight: self.weight + other.weight,
            x: self.x + other.x,
            y: self.y + other.y,
            xx: self.xx + other.xx,
            xy: self.xy + other.xy,
        }
    }
}

impl ServiceTime {
    /// From pairs of rows and the time a run of so many took.
    pub fn from_sweep(runs: &[(usize, Duration)]) -> Self {
        let mut sweep = Moments::default();
        runs.iter().for_each(|&(rows, took)| sweep.add(rows as f64, took.as_secs_f64()));
        Self { recent: Moments::default(), sweep }
    }

    pub fn observe(&mut self, rows: usize, took: Duration) {
        self.recent = self.recent.scaled(DECAY);
        self.recent.add(rows as f64, took.as_secs_f64());
    }

    /// Seconds a run takes whatever its size, and seconds per row; neither negative.
    fn line(&self) -> (f64, f64) {
        let all = self.recent.plus(self.sweep);
        if all.weight == 0.0 {
            return (0.0, 0.0);
        }
        let (mean_x, mean_y) = (all.x / all.weight, all.y / all.weight);
        let variance = all.xx / all.weight - mean_x * mean_x;
        let covariance = all.xy / all.weight - mean_x * mean_y;
        // Runs of one size only say what that size costs; take all of it as cost per row.
        let slope = if variance > 1e-9 { covariance / variance } else { mean_y / mean_x.max(1.0) };
        let per_row = slope.clamp(0.0, mean_y / mean_x.max(f64::MIN_POSITIVE));
        ((mean_y - per_row * mean_x).max(0.0), per_row)
    }

    /// The expected time of one run of `rows` rows; zero before anything was seen.
    pub fn estimate(&self, rows: usize) -> Duration {
        let (fixed, per_row) = self.line();
        duration(fixed + per_row * rows as f64)
    }

    /// The expected time to run `requests` requests of together `rows` rows in groups of at most `group` rows.
    pub fn estimate_queue(&self, rows: usize, requests: usize, group: usize) -> Duration {
        let (fixed, per_row) = self.line();
        let runs = if group <= 1 { requests } else { rows.div_ceil(group).min(requests) };
        duration(fixed * runs as f64 + per_row * rows as f64)
    }
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2)
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
    fn it_follows_a_model_that_slows_down() {
        let mut service = ServiceTime::from_sweep(&[(1, ms(1)), (2, ms(2))]);
        (0..200).for_each(|_| service.observe(1, ms(10)));
        assert!(service.estimate(1) > ms(8), "{:?}", service.estimate(1));
    }

    #[test]
    fn nothing_seen_costs_nothing() {
        assert_eq!(ServiceTime::default().estimate(100), Duration::ZERO);
    }
}
