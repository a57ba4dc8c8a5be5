//! `Batcher`: which queued requests run together, and when; pure, so that the policy can be proved.
//!
//! Batch-while-busy: an executor that falls idle takes what is queued at once, unless the model's [`Schedule`] says
//! how long it shall wait for company. Within a level, clients take turns by what their requests are predicted to
//! cost, and each client's own run in the order of their arrival. A batch takes the shape of the request whose turn it
//! is in the highest level that waits; others of that shape may join it from behind, and from lower levels after all
//! that can of the higher ones. No request is passed over by more than [`MAX_PASSED_OVER`] batches that come after it
//! in its own level, or [`MAX_PASSED_OVER_BY_LENGTH`] where rows have lengths; those of lower levels wait as long as
//! higher ones have requests. A request is never split.
//!
//! Where rows have lengths, as texts have, a batch is measured in tokens, padding included, and takes requests of about
//! the length of its first, so that less than a tenth of it is padding.

use std::time::{Duration, Instant};

use super::{
    schedule::{Level, Place, Schedule},
    service_time::ServiceTime,
};
use crate::metrics::DropReason;
pub use crate::text::Lengths;

mod admission;
mod fairness;
mod forming;
mod lane;
mod leaving;

pub use admission::Displaced;
pub use fairness::Client;
use forming::Lead;
use lane::Lane;

#[cfg(test)]
mod tests;

/// How many batches may overtake a waiting request of another shape.
pub const MAX_PASSED_OVER: u8 = 4;
/// How many may overtake one of another length, where rows have lengths. Unless batches wait for company, each of them is led
/// by one whose turn comes before. With fewer, texts of very many lengths would run one by one; with 64, runs beside a flood
/// and many other clients were a sixth full, and are two fifths so (simulated).
pub const MAX_PASSED_OVER_BY_LENGTH: u8 = 250;

/// Every dimension but the first of every input, in the order of the signature.
pub type ShapeKey = smallvec::SmallVec<[usize; 8]>;

/// When a queue is full, all levels together, and what it takes at all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Rows of one request, where its model sets no limit of its own.
    pub max_rows: usize,
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
    pub lengths: Lengths,
    /// Whether it is a part of a request of which another part was queued before.
    pub follows: bool,
    pub bytes: usize,
    pub shape: ShapeKey,
    /// Runs by itself, whatever its shape.
    pub alone: bool,
    pub place: Place,
    /// Whose it is.
    pub client: Client,
}

impl Cost {
    /// What it adds to a run by itself: rows, or tokens where rows have lengths.
    pub fn work(&self) -> usize {
        self.rows.saturating_mul(self.lengths.longest)
    }
}

/// A queued request.
#[derive(Debug)]
pub struct Entry<T> {
    pub item: T,
    pub cost: Cost,
    pub queued_at: Instant,
    /// What it is predicted to cost, in the work of a full batch.
    price: u32,
    passed_over: u8,
}

/// What an idle executor shall do.
#[derive(Debug)]
pub struct Next<T> {
    /// Requests to run together; empty when there is nothing to run now.
    pub batch: Vec<Entry<T>>,
    /// Rows of the batch, or tokens with their padding where rows have lengths.
    pub work: usize,
    /// Requests that nobody waits for any more.
    pub dropped: Vec<(Entry<T>, DropReason)>,
    /// When to ask again if nothing is queued before: what waits for company goes then, with or without it.
    pub wake_at: Option<Instant>,
}

pub struct Batcher<T> {
    /// One for each level, the highest first; the last one is for requests that are late.
    lanes: Vec<Lane<T>>,
    len: usize,
    bytes: usize,
    limits: Limits,
    /// Work that is worth grouping; 1 when requests do not share runs.
    group: usize,
    /// Rows that a batch may have beside that.
    most_rows: usize,
    /// Whether rows have lengths.
    has_lengths: bool,
    /// Sizes to which batches are cut when they can be, in ascending order.
    preferred: Vec<usize>,
    max_delay: Duration,
    executors: usize,
    service: ServiceTime,
    /// Start and work of each run in progress.
    running: Vec<(Instant, usize)>,
}

impl<T> Batcher<T> {
    /// `group` is the largest number of rows that requests are joined to (1: never joined), `executors` the
    /// number of runs that may be in progress at a time.
    pub fn new(limits: Limits, schedule: &Schedule, group: usize, executors: usize, service: ServiceTime) -> Self {
        let group = group.max(1);
        let late = Level::default();
        let mut preferred: Vec<usize> =
            schedule.preferred_batch_sizes.iter().copied().filter(|&size| size <= group).collect();
        preferred.sort_unstable();
        Self {
            lanes: schedule.levels().into_iter().chain([late]).map(Lane::new).collect(),
            len: 0,
            bytes: 0,
            limits,
            group,
            most_rows: usize::MAX,
            has_lengths: false,
            preferred,
            max_delay: schedule.max_delay,
            executors: executors.max(1),
            service,
            running: Vec::with_capacity(executors),
        }
    }

    /// The same for rows that have lengths: `group` and what `service` knows are of tokens then, an ordinary row has `row` of
    /// them, and no batch has more than `most_rows`. It must be empty yet.
    pub fn with_lengths(mut self, row: usize, most_rows: usize) -> Self {
        let row = row.max(1);
        self.lanes.iter_mut().for_each(|lane| lane.take_turns_of(row));
        self.preferred.iter_mut().for_each(|size| *size *= row);
        self.preferred.retain(|&size| size <= self.group);
        Self { most_rows: most_rows.max(1), has_lengths: true, ..self }
    }

    /// The next batch for an idle executor, without the requests that are `gone` or have waited too long.
    ///
    /// A batch that is not empty counts as running until [`finished`](Self::finished) is told.
    pub fn next(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Next<T> {
        let mut next = Next { batch: Vec::new(), work: 0, dropped: Vec::new(), wake_at: None };
        match self.lead(now, &gone, &mut next) {
            Lead::Nobody => {}
            Lead::Later(instant) => next.wake_at = Some(instant),
            Lead::Now(lane, index) => {
                let room = self.room_of(lane, index, now, &gone);
                // Those who will be too late even if they run now give way to those who will not.
                let horizon = now.checked_add(self.service.estimate(room.likely)).unwrap_or(now);
                next.work = self.form(lane, index, &room, Some(horizon), now, &gone, &mut next);
                if next.batch.is_empty() {
                    // The estimate may be wrong, and an idle executor has nothing to lose. Those before the first one may have
                    // left by now.
                    next.work = self.form(lane, 0, &room, None, now, &gone, &mut next);
                }
                if !next.batch.is_empty() {
                    self.running.push((now, next.work));
                }
            }
        }
        next
    }

    /// Tells that the run of so much `work` that started at `start` is over.
    pub fn finished(&mut self, start: Instant, work: usize, took: Option<Duration>) {
        if let Some(index) = self.running.iter().position(|&run| run == (start, work)) {
            self.running.swap_remove(index);
        }
        if let Some(took) = took {
            self.service.observe(work, took);
        }
    }

    /// From now on nothing is held back for company.
    pub fn hurry(&mut self) {
        self.max_delay = Duration::ZERO;
    }

    /// How long all that waits would take one executor; `None` when it is not known, or not to be begun yet.
    pub fn expected(&self) -> Option<Duration> {
        let expected = self.service.estimate_queue(self.waiting(), self.len, self.group);
        (self.max_delay.is_zero() && !expected.is_zero()).then_some(expected)
    }

    /// Whether as much waits as one run may take: nothing is won by waiting for more.
    pub fn fills_a_batch(&self) -> bool {
        self.waiting() >= self.group
    }

    /// How many batches may overtake a waiting request that cannot join them.
    fn most_passed_over(&self) -> u8 {
        if self.has_lengths { MAX_PASSED_OVER_BY_LENGTH } else { MAX_PASSED_OVER }
    }

    /// The work that waits.
    fn waiting(&self) -> usize {
        self.lanes.iter().map(|lane| lane.work).sum()
    }

    /// The time of the run that a request of so much work, queued now, will most likely share.
    fn run_time(&self, work: usize) -> Duration {
        self.service.estimate(work.max(self.group.min(self.waiting().saturating_add(work))))
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The index of the lane of those that are late.
    fn late(&self) -> usize {
        self.lanes.len() - 1
    }
}
