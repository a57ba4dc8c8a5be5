//! `Batcher`: which queued requests run together, and when; pure, so that the policy can be proved.
//!
//! Batch-while-busy: an executor that falls idle takes what is queued at once, unless the model's [`Schedule`] says
//! how long it shall wait for company. A batch takes the shape of the oldest request of the highest level that waits;
//! others of that shape may join it from behind, and from lower levels after all that can of the higher ones. No
//! request is passed over by more than [`MAX_PASSED_OVER`] batches of its own level; those of lower levels wait as
//! long as higher ones have requests. A request is never split.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::{
    schedule::{Level, Place, Schedule, TimeoutAction, earlier},
    service_time::ServiceTime,
};
use crate::{
    error::{Code, Error},
    metrics::DropReason,
};

#[cfg(test)]
mod tests;

/// How many batches may overtake a waiting request of another shape.
pub const MAX_PASSED_OVER: u8 = 4;

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
    pub bytes: usize,
    pub shape: ShapeKey,
    /// Runs by itself, whatever its shape.
    pub alone: bool,
    pub place: Place,
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
    /// Requests to run together; empty when there is nothing to run now.
    pub batch: Vec<Entry<T>>,
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
    /// Rows that are worth grouping; 1 when requests do not share runs.
    group: usize,
    /// Sizes to which batches are cut when they can be, in ascending order.
    preferred: Vec<usize>,
    max_delay: Duration,
    executors: usize,
    service: ServiceTime,
    /// Start and rows of each run in progress.
    running: Vec<(Instant, usize)>,
}

/// Requests that wait in the order of their arrival.
struct Lane<T> {
    queue: VecDeque<Entry<T>>,
    rows: usize,
    level: Level,
    /// Requests of this level that wait here or in the lane of the late.
    waiting: usize,
}

/// What becomes of a request in its lane at some instant.
enum Standing {
    Stays,
    /// Shall let all go first that are in time.
    Late,
    Dead(DropReason),
}

/// Who leads the next batch.
enum Lead {
    Nobody,
    /// Nobody before this instant.
    Later(Instant),
    /// The request at this index of this lane.
    Now(usize, usize),
}

/// Requests of one shape that wait for company.
struct Group {
    /// Where the first of them waits.
    lane: usize,
    index: usize,
    rows: usize,
}

/// What becomes of a request beside a batch that is being formed.
enum Fit {
    Joins,
    /// Others may overtake it.
    Waits,
    /// Nobody behind it may join.
    Ends,
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
            preferred,
            max_delay: schedule.max_delay,
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

    /// The next batch for an idle executor, without the requests that are `gone` or have waited too long.
    ///
    /// A batch that is not empty counts as running until [`finished`](Self::finished) is told.
    pub fn next(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Next<T> {
        let mut next = Next { batch: Vec::new(), dropped: Vec::new(), wake_at: None };
        match self.lead(now, &gone, &mut next) {
            Lead::Nobody => {}
            Lead::Later(instant) => next.wake_at = Some(instant),
            Lead::Now(lane, index) => {
                let limit = self.limit(lane, index, now, &gone);
                let rows = self.form(lane, index, limit, now, &gone, &mut next);
                if !next.batch.is_empty() {
                    self.running.push((now, rows));
                }
            }
        }
        next
    }

    /// The oldest request of the highest level, when batches do not wait for company.
    fn lead(&mut self, now: Instant, gone: &impl Fn(&T) -> bool, next: &mut Next<T>) -> Lead {
        let late = self.late();
        if self.max_delay.is_zero() {
            let top = (0..=late).find(|&lane| self.has_head(lane, now, gone, next));
            return top.map_or(Lead::Nobody, |lane| Lead::Now(lane, 0));
        }
        let mut top = None;
        for lane in 0..late {
            if self.has_head(lane, now, gone, next) {
                top = top.or(Some(lane));
            }
        }
        match top {
            Some(top) => self.lead_in_company(top, now, gone),
            None if self.has_head(late, now, gone, next) => Lead::Now(late, 0),
            None => Lead::Nobody,
        }
    }

    /// Who leads when `top` is the highest level with a request, and batches wait until they are complete.
    ///
    /// Within the highest level the first complete batch goes. When only a lower level has one, the executor will not
    /// be idle any longer, and the highest level goes as it is: waiting for company shall not turn the order around.
    fn lead_in_company(&self, top: usize, now: Instant, gone: &impl Fn(&T) -> bool) -> Lead {
        let levels = &self.lanes[top..self.late()];
        let is_due = |entry: &Entry<T>| self.held_until(entry) <= now;
        if levels.iter().any(|lane| lane.queue.front().is_some_and(is_due)) {
            return Lead::Now(top, 0);
        }
        // Nothing here is older than `max_delay`: there are only as many as arrive in that time and fill no batch.
        let complete = self.preferred.first().copied().unwrap_or(self.group);
        let mut groups: HashMap<&ShapeKey, Group> = HashMap::new();
        let mut wake_at = None;
        for (lane, queue) in levels.iter().enumerate().map(|(place, lane)| (top + place, &lane.queue)) {
            for (index, entry) in queue.iter().enumerate() {
                if !matches!(self.standing(lane, entry, now, gone), Standing::Stays) {
                    continue;
                }
                if lane == top && entry.passed_over >= MAX_PASSED_OVER {
                    return Lead::Now(top, 0);
                }
                wake_at = earlier(wake_at, Some(self.held_until(entry)));
                let group = groups.entry(&entry.cost.shape).or_insert(Group { lane, index, rows: 0 });
                group.rows += entry.cost.rows;
                if entry.cost.alone || group.rows >= complete || is_due(entry) {
                    return Lead::Now(top, if group.lane == top { group.index } else { 0 });
                }
            }
        }
        wake_at.map_or(Lead::Now(top, 0), Lead::Later)
    }

    /// Until when an entry may be held back for company: half of the time it can spare, and `max_delay` at most.
    fn held_until(&self, entry: &Entry<T>) -> Instant {
        let end = entry.queued_at.checked_add(self.max_delay).unwrap_or(entry.queued_at);
        match earlier(entry.cost.place.deadline, entry.cost.place.expires) {
            None => end,
            Some(limit) => {
                let left = limit.saturating_duration_since(entry.queued_at);
                end.min(entry.queued_at + left.saturating_sub(self.service.estimate(entry.cost.rows)) / 2)
            }
        }
    }

    /// How many rows the batch may have that the entry at `index` of `lane` leads.
    fn limit(&self, lane: usize, index: usize, now: Instant, gone: &impl Fn(&T) -> bool) -> usize {
        let Some(first) = self.lanes[lane].queue.get(index).filter(|_| !self.preferred.is_empty()) else {
            return self.group;
        };
        let mut rows = first.cost.rows;
        let behind = self.lanes[lane].queue.range(index + 1..);
        let below = self.lanes[lane + 1..self.late().max(lane + 1)].iter().flat_map(|lane| &lane.queue);
        for entry in behind.chain(below) {
            if matches!(self.standing(lane, entry, now, gone), Standing::Stays) {
                match fit(&first.cost, rows, self.group, entry) {
                    Fit::Joins => rows += entry.cost.rows,
                    Fit::Waits => {}
                    Fit::Ends => break,
                }
            }
            if rows >= self.group {
                break;
            }
        }
        self.preferred.iter().rev().find(|&&size| size <= rows).copied().unwrap_or(self.group)
    }

    /// Takes the entry at `index` of `lane`, and those that may join it up to `limit` rows, out of the queue; returns
    /// their rows.
    fn form(
        &mut self,
        lane: usize,
        mut index: usize,
        limit: usize,
        now: Instant,
        gone: &impl Fn(&T) -> bool,
        next: &mut Next<T>,
    ) -> usize {
        let last = if lane == self.late() { lane } else { self.late() - 1 };
        let mut rows = 0;
        let mut full = false;
        for lane in lane..=last {
            let mut passed: Vec<Entry<T>> = Vec::new();
            // Entries before this index of `passed` have been overtaken by a member of this batch.
            let mut overtaken = 0;
            while !full && let Some(entry) = self.lanes[lane].queue.pop_front() {
                let leads = index == 0;
                index = index.saturating_sub(1);
                let Some(entry) = self.keep(lane, entry, now, gone, next) else { continue };
                let fit = match next.batch.first() {
                    None if leads => Fit::Joins,
                    None => Fit::Waits,
                    Some(first) => fit(&first.cost, rows, limit, &entry),
                };
                match fit {
                    Fit::Joins => {
                        rows += entry.cost.rows;
                        full = entry.cost.alone || rows >= limit;
                        self.forget(lane, &entry.cost);
                        next.batch.push(entry);
                        overtaken = passed.len();
                    }
                    Fit::Waits => passed.push(entry),
                    Fit::Ends => {
                        passed.push(entry);
                        full = true;
                    }
                }
            }
            passed[..overtaken].iter_mut().for_each(|entry| entry.passed_over += 1);
            let queue = &mut self.lanes[lane].queue;
            passed.into_iter().rev().for_each(|entry| queue.push_front(entry));
            if full {
                break;
            }
        }
        rows
    }

    /// Takes the requests that are `gone` or have waited too long out of the queue, wherever they stand in it.
    pub fn purge(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Vec<(Entry<T>, DropReason)> {
        let mut dropped = Vec::new();
        for lane in 0..self.lanes.len() {
            for _ in 0..self.lanes[lane].queue.len() {
                let Some(entry) = self.lanes[lane].queue.pop_front() else { break };
                match self.standing(lane, &entry, now, &gone) {
                    Standing::Dead(reason) => {
                        self.forget(lane, &entry.cost);
                        dropped.push((entry, reason));
                    }
                    Standing::Stays | Standing::Late => self.lanes[lane].queue.push_back(entry),
                }
            }
        }
        dropped
    }

    /// Takes what is `gone` or has waited too long from the front of each level, where the queue timeout ends first.
    pub fn expire(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Vec<(Entry<T>, DropReason)> {
        let mut dropped = Vec::new();
        for lane in 0..self.lanes.len() {
            while let Some(front) = self.lanes[lane].queue.front() {
                let Standing::Dead(reason) = self.standing(lane, front, now, &gone) else { break };
                let Some(entry) = self.lanes[lane].queue.pop_front() else { break };
                self.forget(lane, &entry.cost);
                dropped.push((entry, reason));
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

    /// From now on nothing is held back for company.
    pub fn hurry(&mut self) {
        self.max_delay = Duration::ZERO;
    }

    /// Whether as much waits as one run may take, where runs take more than one request.
    pub fn fills_a_batch(&self) -> bool {
        self.group > 1 && self.lanes.iter().map(|lane| lane.rows).sum::<usize>() >= self.group
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

    /// Whether `lane` has a request; the first one may run then.
    fn has_head(&mut self, lane: usize, now: Instant, gone: &impl Fn(&T) -> bool, next: &mut Next<T>) -> bool {
        while let Some(entry) = self.lanes[lane].queue.front() {
            if matches!(self.standing(lane, entry, now, gone), Standing::Stays) {
                return true;
            }
            if let Some(entry) = self.lanes[lane].queue.pop_front()
                && let Some(entry) = self.keep(lane, entry, now, gone, next)
            {
                self.lanes[lane].queue.push_front(entry);
            }
        }
        false
    }

    /// The entry that was in `lane`, unless it has to leave: for the lane of the late, or for good.
    fn keep(
        &mut self,
        lane: usize,
        entry: Entry<T>,
        now: Instant,
        gone: &impl Fn(&T) -> bool,
        next: &mut Next<T>,
    ) -> Option<Entry<T>> {
        match self.standing(lane, &entry, now, gone) {
            Standing::Stays => return Some(entry),
            Standing::Late => {
                let late = self.late();
                self.lanes[lane].rows -= entry.cost.rows;
                self.lanes[late].rows += entry.cost.rows;
                self.lanes[late].queue.push_back(Entry { passed_over: 0, ..entry });
            }
            Standing::Dead(reason) => {
                self.forget(lane, &entry.cost);
                next.dropped.push((entry, reason));
            }
        }
        None
    }

    fn standing(&self, lane: usize, entry: &Entry<T>, now: Instant, gone: &impl Fn(&T) -> bool) -> Standing {
        let Place { level, deadline, expires } = entry.cost.place;
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Standing::Dead(DropReason::Deadline);
        }
        if gone(&entry.item) {
            return Standing::Dead(DropReason::Cancelled);
        }
        let expired = lane < self.late() && expires.is_some_and(|expires| expires <= now);
        match self.lanes[level].level.timeout_action {
            _ if !expired => Standing::Stays,
            TimeoutAction::Reject => Standing::Dead(DropReason::Timeout),
            TimeoutAction::Delay => Standing::Late,
        }
    }

    /// Counts an entry as gone that was in `lane`.
    fn forget(&mut self, lane: usize, cost: &Cost) {
        self.lanes[lane].rows -= cost.rows;
        self.lanes[cost.place.level].waiting -= 1;
        self.bytes -= cost.bytes;
        self.len -= 1;
    }
}

impl<T> Lane<T> {
    fn new(level: Level) -> Self {
        Self { queue: VecDeque::new(), rows: 0, level, waiting: 0 }
    }
}

/// What becomes of `entry` beside a batch of `rows` rows that `first` leads and that may have `limit`.
///
/// A request of the batch's shape that cannot join ends the batch, or later ones would overtake it; so does one that
/// has been overtaken often enough.
fn fit<T>(first: &Cost, rows: usize, limit: usize, entry: &Entry<T>) -> Fit {
    let same_shape = entry.cost.shape == first.shape;
    if same_shape && !entry.cost.alone && rows + entry.cost.rows <= limit {
        Fit::Joins
    } else if same_shape || entry.passed_over >= MAX_PASSED_OVER {
        Fit::Ends
    } else {
        Fit::Waits
    }
}
