//! Who leaves the queue without a run: those nobody waits for any more, and those that waited too long.

use std::time::Instant;

use super::{Batcher, Cost, Entry, Next};
use crate::{
    metrics::DropReason,
    model::schedule::{Place, TimeoutAction},
};

/// What becomes of a request in its lane at some instant.
pub(super) enum Standing {
    Stays,
    /// Shall let all go first that are in time.
    Late,
    Dead(DropReason),
}

impl<T> Batcher<T> {
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

    /// The entry that was in `lane`, unless it has to leave: for the lane of the late, or for good.
    pub(super) fn keep(
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

    pub(super) fn standing(&self, lane: usize, entry: &Entry<T>, now: Instant, gone: &impl Fn(&T) -> bool) -> Standing {
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
    pub(super) fn forget(&mut self, lane: usize, cost: &Cost) {
        self.lanes[lane].rows -= cost.rows;
        self.lanes[cost.place.level].waiting -= 1;
        self.bytes -= cost.bytes;
        self.len -= 1;
    }
}
