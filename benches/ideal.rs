//! The queue that no server can beat: one executor that takes what waits the moment it is free, and loses no time.
//!
//! Requests that come while a batch runs form the next one, up to the largest that there may be; a request that comes
//! to an idle executor runs at once, alone. It is fed with the times that batches take and with the very moments at
//! which the generator sends.

use std::time::Duration;

use crate::statistics::Latencies;

/// How long a batch takes by its rows: a line through each pair of neighbours among the sizes that were measured.
#[derive(Clone, Debug)]
pub struct Curve(Vec<(usize, f64)>);

impl Curve {
    /// `times` are rows and seconds, fewest rows first.
    pub fn new(times: Vec<(usize, f64)>) -> Self {
        Self(times)
    }

    /// The largest batch that is worth its wait: the next size gives less than 2 % more rows per second.
    pub fn knee(&self) -> usize {
        let rate = |&(rows, seconds): &(usize, f64)| rows as f64 / seconds;
        let worth = self.0.windows(2).take_while(|pair| rate(&pair[1]) >= 1.02 * rate(&pair[0])).last();
        worth.map(|pair| &pair[1]).or(self.0.first()).map_or(1, |&(rows, _)| rows)
    }

    pub fn time(&self, rows: usize) -> Duration {
        let above = self.0.partition_point(|&(size, _)| size < rows).min(self.0.len().saturating_sub(1));
        let (Some(&low), Some(&high)) = (self.0.get(above.saturating_sub(1)), self.0.get(above)) else {
            return Duration::ZERO;
        };
        let share = if high.0 > low.0 { (rows as f64 - low.0 as f64) / (high.0 as f64 - low.0 as f64) } else { 0.0 };
        Duration::from_secs_f64((low.1 + share * (high.1 - low.1)).max(0.0))
    }

    /// The quantile `share` of latencies with the largest batch that makes it smallest: an ideal queue also knows how
    /// much to batch.
    pub fn best(&self, arrivals: &[Duration], counted: Duration, share: f64) -> f64 {
        let quantile = |&(largest, _): &(usize, f64)| latencies(arrivals, counted, self, largest).quantile(share);
        self.0.iter().map(quantile).fold(f64::NAN, f64::min)
    }
}

/// Latencies of requests that come at `arrivals`, in order; those before `counted` only take their time.
pub fn latencies(arrivals: &[Duration], counted: Duration, curve: &Curve, largest: usize) -> Latencies {
    let mut latencies = Latencies::default();
    let (mut free, mut rest) = (Duration::ZERO, arrivals);
    while let Some(&first) = rest.first() {
        let start = free.max(first);
        let rows = rest.iter().take(largest.max(1)).take_while(|&&arrival| arrival <= start).count();
        let (batch, later) = rest.split_at(rows);
        free = start + curve.time(rows);
        batch.iter().filter(|&&arrival| arrival >= counted).for_each(|&arrival| latencies.record(free - arrival));
        rest = later;
    }
    latencies
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::poisson;

    fn millis(times: &[u64]) -> Vec<Duration> {
        times.iter().copied().map(Duration::from_millis).collect()
    }

    fn close(found: f64, expected: f64) -> bool {
        (found / expected - 1.0).abs() < 0.002
    }

    #[test]
    fn what_comes_during_a_run_shares_the_next_one() {
        let curve = Curve::new(vec![(1, 0.010), (2, 0.012), (4, 0.020)]);
        // Alone from 0 to 10; then three together from 10 to 26; then one that comes late, from 50 to 60.
        let arrivals = millis(&[0, 1, 2, 3, 50]);
        let found = latencies(&arrivals, Duration::ZERO, &curve, 4);
        assert_eq!(found.count(), 5);
        assert!(close(found.quantile(1.0), 0.025), "{}", found.quantile(1.0));
        assert!(close(found.quantile(0.2), 0.010), "{}", found.quantile(0.2));
        // Two together from 10 to 22, and the fourth from 22 to 32.
        let found = latencies(&arrivals, Duration::ZERO, &curve, 2);
        assert!(close(found.quantile(1.0), 0.029), "{}", found.quantile(1.0));
        // What does not count still takes its time.
        let found = latencies(&arrivals, Duration::from_millis(3), &curve, 4);
        assert_eq!(found.count(), 2);
        assert!(close(found.quantile(1.0), 0.023), "{}", found.quantile(1.0));
        assert!(close(curve.best(&arrivals, Duration::ZERO, 1.0), 0.025));
    }

    #[test]
    fn between_and_beyond_the_sizes_lines_go_on() {
        let curve = Curve::new(vec![(1, 0.001), (2, 0.002), (8, 0.005)]);
        let times = [1, 2, 5, 8, 10].map(|rows| curve.time(rows).as_secs_f64());
        let expected = [0.001, 0.002, 0.0035, 0.005, 0.006];
        assert!(times.iter().zip(expected).all(|(time, expected)| (time - expected).abs() < 1e-9), "{times:?}");
        assert_eq!(curve.knee(), 1, "two rows take twice as long");
        assert_eq!(Curve::new(vec![(1, 0.010), (2, 0.015), (4, 0.028), (8, 0.056)]).knee(), 4);
        assert_eq!(Curve::new(vec![(1, 0.001), (8, 0.001)]).knee(), 8);
        assert_eq!(Curve::new(vec![(1, 0.25)]).time(3), Duration::from_millis(250));
    }

    #[test]
    fn without_batches_it_is_the_queue_of_the_textbook() {
        // M/D/1 at a load of one half waits for half a service time on average (Pollaczek and Khinchine): the mean of
        // latencies is 1.5 services. The median of so many is known to a percent or so, the mean better.
        let curve = Curve::new(vec![(1, 0.001)]);
        let arrivals: Vec<Duration> = poisson(500.0, 1).unwrap().take(100_000).collect();
        let found = latencies(&arrivals, Duration::ZERO, &curve, 1);
        let mean = (1..=1000).map(|part| found.quantile((f64::from(part) - 0.5) / 1000.0)).sum::<f64>() / 1000.0;
        assert!((mean / 0.0015 - 1.0).abs() < 0.02, "{mean}");
    }

    #[test]
    fn batches_keep_up_where_single_runs_would_not() {
        let curve = Curve::new(vec![(1, 0.001), (8, 0.001)]);
        let arrivals: Vec<Duration> = poisson(4000.0, 2).unwrap().take(40_000).collect();
        let found = latencies(&arrivals, Duration::ZERO, &curve, 8);
        // At half of what it can do a request waits for the rest of a run, and sits in one.
        assert!((0.0012..0.0016).contains(&found.quantile(0.5)), "{}", found.quantile(0.5));
        assert!(found.quantile(0.99) < 0.003, "{}", found.quantile(0.99));
    }
}
