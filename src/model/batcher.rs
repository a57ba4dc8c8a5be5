//! `Batcher`: which queued requests run together, and when; pure, so that the policy can be proved.
//!
//! Batch-while-busy: an executor that falls idle takes what is queued at once, nobody waits for company. A batch
//! takes the shape of the oldest request; others of that shape may join it from behind, but no request is passed
//! over by more than [`MAX_PASSED_OVER`] batches. A request is never split.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::service_time::ServiceTime;
use crate::{error::Error, metrics::DropReason};

/// How many batches may overtake a waiting request of another shape.
pub const MAX_PASSED_OVER: u8 = 4;

/// Every dimension but the first of every input, in the order of the signature.
pub type ShapeKey = smallvec::SmallVec<[usize; 8]>;

/// When a queue is full.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    pub max_requests: usize,
    /// Payload bytes of all queued requests together.
    pub max_bytes: usize,
    /// Estimated time until a new request would start to run.
    pub max_wait: Duration,
}

/// What a request asks of the queue.
#[derive(Clone, Debug)]
pub struct Cost {
    pub rows: usize,
    pub bytes: usize,
    pub shape: ShapeKey,
    /// Runs by itself, whatever its shape.
    pub alone: bool,
    pub deadline: Option<Instant>,
}

/// A queued request.
#[derive(Debug)]
pub struct Entry<T> {
    pub item: T,
    pub cost: Cost,
    pub queued_at: Instant,
    passed_over: u8,
}

/// What an idle executor shall do.
#[derive(Debug)]
pub struct Next<T> {
    /// Requests to run together, oldest first; empty when nothing is queued.
    pub batch: Vec<Entry<T>>,
    /// Requests that nobody waits for any more.
    pub dropped: Vec<(Entry<T>, DropReason)>,
}

pub struct Batcher<T> {
    queue: VecDeque<Entry<T>>,
    rows: usize,
    bytes: usize,
    limits: Limits,
    /// Rows that are worth grouping; 1 when requests do not share runs.
    group: usize,
    executors: usize,
    service: ServiceTime,
    /// Start and rows of each run in progress.
    running: Vec<(Instant, usize)>,
}

impl<T> Batcher<T> {
    /// `group` is the largest number of rows that requests are joined to (1: never joined), `executors` the
    /// number of runs that may be in progress at a time.
    pub fn new(limits: Limits, group: usize, executors: usize, service: ServiceTime) -> Self {
        Self {
            queue: VecDeque::new(),
            rows: 0,
            bytes: 0,
            limits,
            group: group.max(1),
            executors: executors.max(1),
            service,
            running: Vec::with_capacity(executors),
        }
    }

    /// Queues a request, or says why not; a refused item comes back to its owner.
    ///
    /// # Errors
    /// `Overloaded` when a limit is reached, `DeadlineExceeded` when the request's own deadline cannot be met.
    pub fn push(&mut self, item: T, cost: Cost, now: Instant) -> Result<(), (T, Error)> {
        let wait = self.estimated_wait(now);
        if let Some(full) = self.full(&cost, wait) {
            return Err((item, Error::overloaded(full, wait)));
        }
        if let Some(deadline) = cost.deadline {
            let run = if wait.is_zero() { Duration::ZERO } else { self.service.estimate(cost.rows) };
            if wait.saturating_add(run) > deadline.saturating_duration_since(now) {
                let message = format!("the deadline cannot be met: the estimated wait is {wait:.0?}");
                return Err((item, Error::new(crate::error::Code::DeadlineExceeded, message)));
            }
        }
        self.rows += cost.rows;
        self.bytes += cost.bytes;
        self.queue.push_back(Entry { item, cost, queued_at: now, passed_over: 0 });
        Ok(())
    }

    fn full(&self, cost: &Cost, wait: Duration) -> Option<String> {
        let limits = &self.limits;
        if self.queue.len() >= limits.max_requests {
            return Some(format!("the queue is full: {} requests wait (queue.max_requests)", self.queue.len()));
        }
        if self.bytes.saturating_add(cost.bytes) > limits.max_bytes && !self.queue.is_empty() {
            return Some(format!("the queue is full: {} bytes wait (queue.max_bytes)", self.bytes));
        }
        if wait > limits.max_wait {
            return Some(format!("the queue is full: the estimated wait is {wait:.1?} (queue.max_wait)"));
        }
        None
    }

    /// The estimated time until a request queued now would start; zero when an executor is idle.
    pub fn estimated_wait(&self, now: Instant) -> Duration {
        if self.queue.is_empty() && self.running.len() < self.executors {
            return Duration::ZERO;
        }
        let left = |&(start, rows): &(Instant, usize)| {
            self.service.estimate(rows).saturating_sub(now.saturating_duration_since(start))
        };
        let residual = if self.running.len() < self.executors {
            Duration::ZERO
        } else {
            self.running.iter().map(left).min().unwrap_or_default()
        };
        let executors = u32::try_from(self.executors).unwrap_or(u32::MAX);
        residual + self.service.estimate_queue(self.rows, self.queue.len(), self.group) / executors
    }

    /// The next batch for an idle executor, without the requests that are `gone` or past their deadline.
    ///
    /// A batch that is not empty counts as running until [`finished`](Self::finished) is told.
    pub fn next(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Next<T> {
        let mut next = Next { batch: Vec::new(), dropped: Vec::new() };
        let mut passed: Vec<Entry<T>> = Vec::new();
        let mut rows = 0;
        // Entries before this index of `passed` have been overtaken by a member of this batch.
        let mut overtaken = 0;
        while let Some(entry) = self.queue.pop_front() {
            if let Some(reason) = dead(&entry, now, &gone) {
                self.forget(&entry.cost);
                next.dropped.push((entry, reason));
                continue;
            }
            let Some(first) = next.batch.first() else {
                rows = entry.cost.rows;
                self.forget(&entry.cost);
                let closed = entry.cost.alone || rows >= self.group;
                next.batch.push(entry);
                if closed {
                    break;
                }
                continue;
            };
            let same_shape = entry.cost.shape == first.cost.shape;
            if same_shape && !entry.cost.alone && rows + entry.cost.rows <= self.group {
                rows += entry.cost.rows;
                self.forget(&entry.cost);
                next.batch.push(entry);
                overtaken = passed.len();
                if rows == self.group {
                    break;
                }
                continue;
            }
            // A request of the batch's shape that cannot join ends the batch, or later ones would overtake it;
            // so does one that has been overtaken often enough.
            let ends = same_shape || entry.passed_over >= MAX_PASSED_OVER;
            passed.push(entry);
            if ends {
                break;
            }
        }
        passed[..overtaken].iter_mut().for_each(|entry| entry.passed_over += 1);
        passed.into_iter().rev().for_each(|entry| self.queue.push_front(entry));
        if !next.batch.is_empty() {
            self.running.push((now, rows));
        }
        next
    }

    /// Takes the requests that are `gone` or past their deadline out of the queue, wherever they stand in it.
    pub fn purge(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Vec<(Entry<T>, DropReason)> {
        let mut dropped = Vec::new();
        for entry in std::mem::take(&mut self.queue) {
            match dead(&entry, now, &gone) {
                Some(reason) => {
                    self.forget(&entry.cost);
                    dropped.push((entry, reason));
                }
                None => self.queue.push_back(entry),
            }
        }
        dropped
    }

    /// Tells that the run of `rows` rows that started at `start` is over.
    pub fn finished(&mut self, start: Instant, rows: usize, took: Option<Duration>) {
        if let Some(index) = self.running.iter().position(|&run| run == (start, rows)) {
            self.running.swap_remove(index);
        }
        if let Some(took) = took {
            self.service.observe(rows, took);
        }
    }

    fn forget(&mut self, cost: &Cost) {
        self.rows -= cost.rows;
        self.bytes -= cost.bytes;
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

/// Why nobody waits for the request any more, if so.
fn dead<T>(entry: &Entry<T>, now: Instant, gone: impl Fn(&T) -> bool) -> Option<DropReason> {
    if entry.cost.deadline.is_some_and(|deadline| deadline <= now) {
        return Some(DropReason::Deadline);
    }
    gone(&entry.item).then_some(DropReason::Cancelled)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Code;

    const LIMITS: Limits = Limits { max_requests: 100, max_bytes: 1000, max_wait: Duration::from_secs(30) };

    fn cost(rows: usize, shape: usize) -> Cost {
        Cost { rows, bytes: rows, shape: ShapeKey::from_slice(&[shape]), alone: false, deadline: None }
    }

    fn batcher(group: usize) -> Batcher<usize> {
        Batcher::new(LIMITS, group, 1, ServiceTime::default())
    }

    fn items(next: &Next<usize>) -> Vec<usize> {
        next.batch.iter().map(|entry| entry.item).collect()
    }

    #[test]
    fn same_shapes_join_up_to_the_group() {
        let now = Instant::now();
        let mut batcher = batcher(4);
        for (item, rows) in [1, 2, 2, 1].into_iter().enumerate() {
            batcher.push(item, cost(rows, 7), now).unwrap();
        }
        // The third does not fit, and the fourth may not overtake it.
        assert_eq!(items(&batcher.next(now, |_| false)), [0, 1]);
        assert_eq!(items(&batcher.next(now, |_| false)), [2, 3]);
        assert!(batcher.next(now, |_| false).batch.is_empty());
    }

    #[test]
    fn a_large_or_lonely_request_runs_by_itself() {
        let now = Instant::now();
        let mut batcher = batcher(4);
        batcher.push(0, cost(9, 1), now).unwrap();
        batcher.push(1, Cost { alone: true, ..cost(1, 1) }, now).unwrap();
        batcher.push(2, cost(1, 1), now).unwrap();
        assert_eq!(items(&batcher.next(now, |_| false)), [0]);
        assert_eq!(items(&batcher.next(now, |_| false)), [1]);
        assert_eq!(items(&batcher.next(now, |_| false)), [2]);
    }

    #[test]
    fn nobody_is_passed_over_more_often_than_allowed() {
        let now = Instant::now();
        let mut batcher = batcher(2);
        batcher.push(0, cost(1, 1), now).unwrap();
        batcher.push(99, cost(1, 2), now).unwrap();
        let mut overtaken = 0;
        for item in 1..20 {
            batcher.push(item, cost(1, 1), now).unwrap();
            batcher.push(item + 100, cost(1, 1), now).unwrap();
            let batch = items(&batcher.next(now, |_| false));
            if batch.contains(&99) {
                break;
            }
            overtaken += usize::from(batch.iter().any(|&item| item != 0));
        }
        assert!(overtaken <= usize::from(MAX_PASSED_OVER), "{overtaken}");
    }

    #[test]
    fn dead_requests_cost_no_run() {
        let now = Instant::now();
        let mut batcher = batcher(8);
        let deadline = Some(now + Duration::from_millis(5));
        batcher.push(0, Cost { deadline, ..cost(1, 1) }, now).unwrap();
        batcher.push(1, cost(1, 1), now).unwrap();
        batcher.push(2, cost(1, 1), now).unwrap();
        let next = batcher.next(now + Duration::from_millis(5), |&item| item == 1);
        assert_eq!(items(&next), [2]);
        let dropped: Vec<_> = next.dropped.iter().map(|(entry, reason)| (entry.item, *reason)).collect();
        assert_eq!(dropped, [(0, DropReason::Deadline), (1, DropReason::Cancelled)]);
    }

    #[test]
    fn the_dead_leave_room_for_the_living() {
        let now = Instant::now();
        let mut batcher = Batcher::new(Limits { max_requests: 2, ..LIMITS }, 1, 1, ServiceTime::default());
        batcher.push(0, cost(1, 1), now).unwrap();
        batcher.push(1, cost(1, 1), now).unwrap();
        assert_eq!(batcher.purge(now, |&item| item == 0).len(), 1);
        batcher.push(2, cost(1, 1), now).unwrap();
        assert_eq!(items(&batcher.next(now, |_| false)), [1]);
        assert_eq!(items(&batcher.next(now, |_| false)), [2]);
        assert_eq!((batcher.rows, batcher.bytes), (0, 0));
    }

    #[test]
    fn limits_answer_overloaded() {
        let now = Instant::now();
        let limits = Limits { max_requests: 2, ..LIMITS };
        let mut batcher = Batcher::new(limits, 1, 1, ServiceTime::default());
        batcher.push(0, cost(1, 1), now).unwrap();
        batcher.push(1, cost(1, 1), now).unwrap();
        let (item, error) = batcher.push(2, cost(1, 1), now).unwrap_err();
        assert_eq!((item, error.code), (2, Code::Overloaded));

        let mut batcher = self::batcher(1);
        batcher.push(0, Cost { bytes: 5000, ..cost(1, 1) }, now).unwrap();
        assert_eq!(batcher.push(1, cost(1, 1), now).unwrap_err().1.code, Code::Overloaded);
    }

    #[test]
    fn estimates_refuse_hopeless_deadlines_and_endless_queues() {
        let now = Instant::now();
        let service = ServiceTime::from_sweep(&[(1, Duration::from_secs(1)), (2, Duration::from_secs(2))]);
        let mut batcher = Batcher::new(LIMITS, 1, 1, service);
        let hurried = Cost { deadline: Some(now + Duration::from_millis(1)), ..cost(1, 1) };
        // An idle executor is always worth a try, or a wrong estimate could never mend itself.
        batcher.push(0, hurried.clone(), now).unwrap();
        assert_eq!(batcher.push(1, hurried, now).unwrap_err().1.code, Code::DeadlineExceeded);
        let refused =
            (2..60).find_map(|item| batcher.push(item, cost(1, 1), now).err().map(|(_, error)| (item, error)));
        let (item, error) = refused.unwrap();
        assert_eq!(error.code, Code::Overloaded);
        assert!((30..34).contains(&item), "{item}");
    }

    proptest! {
        /// Nothing is lost, doubled, reordered within a shape, or grouped beyond the limit.
        #[test]
        fn every_request_runs_exactly_once_and_in_order(
            requests in proptest::collection::vec((1usize..6, 0usize..3, any::<bool>()), 0..80),
            group in 1usize..9,
            every in 1usize..5,
        ) {
            let now = Instant::now();
            let mut batcher = Batcher::new(Limits { max_bytes: usize::MAX, ..LIMITS }, group, 1, ServiceTime::default());
            let mut ran = Vec::new();
            let mut take = |batcher: &mut Batcher<(usize, usize)>| -> Result<bool, TestCaseError> {
                let next = batcher.next(now, |_| false);
                prop_assert!(next.dropped.is_empty());
                let rows: usize = next.batch.iter().map(|entry| entry.cost.rows).sum();
                prop_assert!(rows <= group || next.batch.len() == 1);
                prop_assert!(next.batch.iter().all(|entry| entry.item.1 == next.batch[0].item.1));
                prop_assert!(next.batch.len() == 1 || next.batch.iter().all(|entry| !entry.cost.alone));
                batcher.finished(now, rows, None);
                ran.extend(next.batch.iter().map(|entry| entry.item));
                Ok(!next.batch.is_empty())
            };
            for (index, &(rows, shape, alone)) in requests.iter().enumerate() {
                batcher.push((index, shape), Cost { alone, ..cost(rows, shape) }, now).unwrap();
                if index % every == 0 {
                    take(&mut batcher)?;
                }
            }
            while take(&mut batcher)? {}
            prop_assert_eq!(ran.len(), requests.len());
            for shape in 0..3 {
                let of_shape: Vec<usize> = ran.iter().filter(|item| item.1 == shape).map(|item| item.0).collect();
                prop_assert!(of_shape.is_sorted(), "{:?}", of_shape);
                prop_assert_eq!(of_shape.len(), requests.iter().filter(|request| request.1 == shape).count());
            }
            prop_assert_eq!((batcher.rows, batcher.bytes, batcher.len()), (0, 0, 0));
            prop_assert!(batcher.running.is_empty());
        }
    }
}
