//! Who leads the next batch, and who joins it.

use std::{collections::HashMap, time::Instant};

use super::{Batcher, Cost, Entry, MAX_PASSED_OVER, Next, ShapeKey, lane::Turn, leaving::Standing};
use crate::{metrics::DropReason, model::schedule::earlier};

/// Who leads the next batch.
pub(super) enum Lead {
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
    /// It will be too late, and makes room for those that will not.
    Yields,
}

impl<T> Batcher<T> {
    /// The first request of the highest level, when batches do not wait for company.
    pub(super) fn lead(&mut self, now: Instant, gone: &impl Fn(&T) -> bool, next: &mut Next<T>) -> Lead {
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
        if levels.iter().any(|lane| lane.oldest().is_some_and(is_due)) {
            return Lead::Now(top, 0);
        }
        // Nothing here is older than `max_delay`: there are only as many as arrive in that time and fill no batch.
        let complete = self.preferred.first().copied().unwrap_or(self.group);
        let mut groups: HashMap<&ShapeKey, Group> = HashMap::new();
        let mut wake_at = None;
        for (lane, queue) in levels.iter().enumerate().map(|(place, lane)| (top + place, lane)) {
            for (index, entry) in queue.iter().enumerate() {
                if !matches!(self.standing_of(lane, entry, now, gone), Standing::Stays) {
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
    pub(super) fn limit(&self, lane: usize, index: usize, now: Instant, gone: &impl Fn(&T) -> bool) -> usize {
        if self.preferred.is_empty() {
            return self.group;
        }
        let mut behind = self.lanes[lane].from(index);
        let Some(first) = behind.next() else { return self.group };
        let mut rows = first.cost.rows;
        let below = self.lanes[lane + 1..self.late().max(lane + 1)].iter().flat_map(|lane| lane.iter());
        for entry in behind.chain(below) {
            if matches!(self.standing_of(lane, entry, now, gone), Standing::Stays) {
                match fit(&first.cost, rows, self.group, entry) {
                    Fit::Joins => rows += entry.cost.rows,
                    Fit::Waits | Fit::Yields => {}
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
    /// their rows. Those with a deadline before `horizon` yield to others, and leave when there are others.
    #[expect(clippy::too_many_arguments, reason = "what a look at the queue needs, once")]
    pub(super) fn form(
        &mut self,
        lane: usize,
        mut index: usize,
        limit: usize,
        horizon: Instant,
        now: Instant,
        gone: &impl Fn(&T) -> bool,
        next: &mut Next<T>,
    ) -> usize {
        let last = if lane == self.late() { lane } else { self.late() - 1 };
        let mut rows = 0;
        let mut full = false;
        for lane in lane..=last {
            // Turns that do not run now, and whether they yield.
            let mut passed: Vec<(Turn, bool)> = Vec::new();
            // Entries before this index of `passed` have been overtaken by a member of this batch.
            let mut overtaken = 0;
            while !full && let Some(turn) = self.lanes[lane].pop_turn() {
                let leads = index == 0;
                index = index.saturating_sub(1);
                if !self.keep(lane, turn, now, gone, next) {
                    continue;
                }
                let Some(entry) = self.lanes[lane].entry(turn) else { continue };
                let fit = match next.batch.first() {
                    _ if entry.cost.place.deadline.is_some_and(|deadline| deadline < horizon) => Fit::Yields,
                    None if leads => Fit::Joins,
                    None => Fit::Waits,
                    Some(first) => fit(&first.cost, rows, limit, entry),
                };
                match fit {
                    Fit::Joins => {
                        let Some(entry) = self.remove(lane, turn, true) else { continue };
                        rows += entry.cost.rows;
                        full = entry.cost.alone || rows >= limit;
                        next.batch.push(entry);
                        overtaken = passed.len();
                    }
                    Fit::Waits => passed.push((turn, false)),
                    Fit::Yields => passed.push((turn, true)),
                    Fit::Ends => {
                        passed.push((turn, false));
                        full = true;
                    }
                }
            }
            for (place, (turn, yields)) in passed.into_iter().enumerate().rev() {
                if yields && !next.batch.is_empty() {
                    next.dropped.extend(self.remove(lane, turn, false).map(|entry| (entry, DropReason::Deadline)));
                    continue;
                }
                if place < overtaken {
                    self.lanes[lane].pass_over(turn);
                }
                self.lanes[lane].put_back(turn);
            }
            if full {
                break;
            }
        }
        rows
    }

    /// Whether `lane` has a request; the first one may run then.
    fn has_head(&mut self, lane: usize, now: Instant, gone: &impl Fn(&T) -> bool, next: &mut Next<T>) -> bool {
        while let Some(turn) = self.lanes[lane].pop_turn() {
            if self.keep(lane, turn, now, gone, next) {
                self.lanes[lane].put_back(turn);
                return true;
            }
        }
        false
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
