//! Who gets into the queue, and how long it would have to wait there.

use std::time::{Duration, Instant};

use super::{Batcher, Cost, Entry, Lane};
use crate::error::{Code, Error};

impl<T> Batcher<T> {
    /// Queues a request, or says why not; a refused item comes back to its owner.
    ///
    /// # Errors
    /// `Overloaded` when a limit is reached, `DeadlineExceeded` when the request's own deadline cannot be met.
    pub fn push(&mut self, item: T, cost: Cost, now: Instant) -> Result<(), (T, Error)> {
        let level = cost.place.level;
        let wait = self.estimated_wait(level, now);
        if let Some(full) = self.full(&cost, wait) {
            return Err((item, Error::overloaded(full, wait)));
        }
        if let Some(deadline) = cost.place.deadline {
            let run = if wait.is_zero() { Duration::ZERO } else { self.service.estimate(cost.rows) };
            if wait.saturating_add(run) > deadline.saturating_duration_since(now) {
                let message = format!("the deadline cannot be met: the estimated wait is {wait:.0?}");
                return Err((item, Error::new(Code::DeadlineExceeded, message)));
            }
        }
        self.len += 1;
        self.bytes += cost.bytes;
        let lane = &mut self.lanes[level];
        lane.waiting += 1;
        lane.rows += cost.rows;
        lane.queue.push_back(Entry { item, cost, queued_at: now, passed_over: 0 });
        Ok(())
    }

    fn full(&self, cost: &Cost, wait: Duration) -> Option<String> {
        let limits = &self.limits;
        if self.len >= limits.max_requests {
            return Some(format!("the queue is full: {} requests wait (queue.max_requests)", self.len));
        }
        if self.bytes.saturating_add(cost.bytes) > limits.max_bytes && self.len > 0 {
            return Some(format!("the queue is full: {} bytes wait (queue.max_bytes)", self.bytes));
        }
        if wait > limits.max_wait {
            return Some(format!("the queue is full: the estimated wait is {wait:.1?} (queue.max_wait)"));
        }
        let Lane { waiting, level, .. } = &self.lanes[cost.place.level];
        if level.max_size > 0 && *waiting >= level.max_size {
            let number = cost.place.level + 1;
            return Some(format!(
                "the queue is full: {waiting} requests of priority level {number} wait (queue.max_size)"
            ));
        }
        None
    }

    /// The estimated time until a request of `level` queued now would start, as far as those before it decide; zero
    /// when an executor is idle.
    pub fn estimated_wait(&self, level: usize, now: Instant) -> Duration {
        let ahead = self.lanes.iter().take(level + 1);
        let (requests, rows) =
            ahead.fold((0, 0), |(requests, rows), lane| (requests + lane.queue.len(), rows + lane.rows));
        let idle = self.running.len() < self.executors;
        // What is held back for company keeps nobody waiting.
        if idle && (requests == 0 || !self.max_delay.is_zero()) {
            return Duration::ZERO;
        }
        let left = |&(start, rows): &(Instant, usize)| {
            self.service.estimate(rows).saturating_sub(now.saturating_duration_since(start))
        };
        let residual = if idle { Duration::ZERO } else { self.running.iter().map(left).min().unwrap_or_default() };
        let executors = u32::try_from(self.executors).unwrap_or(u32::MAX);
        residual + self.service.estimate_queue(rows, requests, self.group) / executors
    }
}
