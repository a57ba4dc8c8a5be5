//! Who leaves the queue without a run: those nobody waits for any more, and those that waited too long.

use std::time::Instant;

use super::{Batcher, Entry, Next, lane::Turn};
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
            for _ in 0..self.lanes[lane].len() {
                let Some(turn) = self.lanes[lane].pop_turn() else { break };
                match self.standing(lane, turn, now, &gone) {
                    Standing::Dead(reason) => {
                        dropped.extend(self.remove(lane, turn, false).map(|entry| (entry, reason)));
                    }
                    Standing::Stays | Standing::Late => self.lanes[lane].put_behind(turn),
                }
            }
        }
        dropped
    }

    /// Takes what is `gone` or has waited too long, oldest first and as far as they follow each other, out of each
    /// level, where the queue timeout of the oldest ends first.
    pub fn expire(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Vec<(Entry<T>, DropReason)> {
        let mut dropped = Vec::new();
        for lane in 0..self.lanes.len() {
            while let Some(oldest) = self.lanes[lane].oldest() {
                let Standing::Dead(reason) = self.standing_of(lane, oldest, now, &gone) else { break };
                let Some(turn) = self.lanes[lane].pop_oldest_turn() else { break };
                dropped.extend(self.remove(lane, turn, false).map(|entry| (entry, reason)));
            }
        }
        dropped
    }

    /// Whether the request whose turn was taken from `lane` may run now; if not, it has left for the lane of the late
    /// or for good.
    pub(super) fn keep(
        &mut self,
        lane: usize,
        turn: Turn,
        now: Instant,
        gone: &impl Fn(&T) -> bool,
        next: &mut Next<T>,
    ) -> bool {
        match self.standing(lane, turn, now, gone) {
            Standing::Stays => return true,
            Standing::Late => {
                let late = self.late();
                if let Some(entry) = self.lanes[lane].take(turn, false) {
                    self.lanes[late].push(Entry { passed_over: 0, ..entry });
                }
            }
            Standing::Dead(reason) => {
                next.dropped.extend(self.remove(lane, turn, false).map(|entry| (entry, reason)));
            }
        }
        false
    }

    fn standing(&self, lane: usize, turn: Turn, now: Instant, gone: &impl Fn(&T) -> bool) -> Standing {
        // A turn without a request is nobody's.
        let cancelled = Standing::Dead(DropReason::Cancelled);
        self.lanes[lane].entry(turn).map_or(cancelled, |entry| self.standing_of(lane, entry, now, gone))
    }

    pub(super) fn standing_of(
        &self,
        lane: usize,
        entry: &Entry<T>,
        now: Instant,
        gone: &impl Fn(&T) -> bool,
    ) -> Standing {
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

    /// Takes the request whose turn was taken from `lane` out of the queue, to run or for good.
    pub(super) fn remove(&mut self, lane: usize, turn: Turn, runs: bool) -> Option<Entry<T>> {
        let entry = self.lanes[lane].take(turn, runs)?;
        self.lanes[entry.cost.place.level].waiting -= 1;
        self.bytes -= entry.cost.bytes;
        self.len -= 1;
        Some(entry)
    }
}
