//! Who leads the next batch, and who joins it.

use std::{collections::HashMap, ops::RangeInclusive, time::Instant};

use super::{Batcher, Cost, Entry, Lengths, Next, ShapeKey, lane::Turn, leaving::Standing};
use crate::{metrics::DropReason, model::schedule::earlier};

/// Ranges of lengths that a batch may have, by the share of the longest that the shortest may lack: the narrowest that fills
/// it is taken. All of them keep padding below a tenth.
const SPREADS: [f64; 4] = [0.0, 0.025, 0.05, 0.1];

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
    work: usize,
}

/// What a batch may hold.
#[derive(Clone)]
pub(super) struct Room {
    work: usize,
    rows: usize,
    lengths: RangeInclusive<usize>,
    /// The work that there most likely is for it.
    pub likely: usize,
}

/// What a batch holds.
#[derive(Clone, Copy, Default)]
struct Held {
    rows: usize,
    longest: usize,
}

impl Held {
    fn with(self, cost: &Cost) -> Self {
        Self { rows: self.rows + cost.rows, longest: self.longest.max(cost.lengths.longest) }
    }

    /// With the padding that makes all rows as long as the longest.
    fn work(self) -> usize {
        self.rows.saturating_mul(self.longest)
    }

    fn fits(self, room: &Room) -> bool {
        self.rows <= room.rows && self.work() <= room.work
    }

    fn fills(self, room: &Room) -> bool {
        self.rows >= room.rows || self.work() >= room.work
    }
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
        let mut groups: HashMap<(&ShapeKey, usize), Group> = HashMap::new();
        let mut wake_at = None;
        for (lane, queue) in levels.iter().enumerate().map(|(place, lane)| (top + place, lane)) {
            for (index, entry) in queue.iter().enumerate() {
                if !matches!(self.standing_of(lane, entry, now, gone), Standing::Stays) {
                    continue;
                }
                if lane == top && entry.passed_over >= self.most_passed_over() {
                    return Lead::Now(top, 0);
                }
                wake_at = earlier(wake_at, Some(self.held_until(entry)));
                let alike = (&entry.cost.shape, about(entry.cost.lengths.longest));
                let group = groups.entry(alike).or_insert(Group { lane, index, work: 0 });
                group.work += entry.cost.work();
                if entry.cost.alone || group.work >= complete || is_due(entry) {
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
                end.min(entry.queued_at + left.saturating_sub(self.service.estimate(entry.cost.work())) / 2)
            }
        }
    }

    /// What the batch may hold that the entry at `index` of `lane` leads.
    pub(super) fn room_of(&self, lane: usize, index: usize, now: Instant, gone: &impl Fn(&T) -> bool) -> Room {
        let (lengths, likely) = self.lengths_of(lane, index);
        let room = Room { work: self.group, rows: self.most_rows, lengths, likely };
        if self.preferred.is_empty() {
            return room;
        }
        let mut behind = self.lanes[lane].from(index);
        let Some(first) = behind.next() else { return room };
        let mut held = Held::default().with(&first.cost);
        let below = self.lanes[lane + 1..self.late().max(lane + 1)].iter().flat_map(|lane| lane.iter());
        for entry in behind.chain(below) {
            if matches!(self.standing_of(lane, entry, now, gone), Standing::Stays) {
                match self.fit(&first.cost, held, &room, entry) {
                    Fit::Joins => held = held.with(&entry.cost),
                    Fit::Waits | Fit::Yields => {}
                    Fit::Ends => break,
                }
            }
            if held.fills(&room) {
                break;
            }
        }
        let size = self.preferred.iter().rev().find(|&&size| size <= held.work()).copied();
        // Lengths seldom add up to a size: the row that goes beyond it still belongs to it.
        let work = size.map_or(self.group, |size| (size + held.longest.max(1) - 1).min(self.group));
        Room { work, ..room }
    }

    /// The lengths that may share a run with the entry at `index` of `lane`, as close to its own as fills the run; and how
    /// much work there is of them, up to a full run.
    fn lengths_of(&self, lane: usize, index: usize) -> (RangeInclusive<usize>, usize) {
        if !self.has_lengths {
            return (0..=usize::MAX, self.group.min(self.waiting()));
        }
        let mut waiting = self.lanes[lane].from(index);
        let Some(first) = waiting.next() else { return (0..=usize::MAX, 0) };
        let ranges = SPREADS.map(|spread| around(first.cost.lengths, spread));
        let [.., widest] = &ranges;
        // What waits in each of them and in none before it.
        let mut work = [first.cost.work(), 0, 0, 0];
        let below = self.lanes[lane + 1..self.late().max(lane + 1)].iter().flat_map(|lane| lane.iter());
        for entry in waiting.chain(below) {
            let place = ranges.iter().position(|range| entry.cost.lengths.are_in(range));
            if let Some(place) = place.filter(|_| entry.cost.shape == first.cost.shape) {
                work[place] += entry.cost.work();
                if work[0] >= self.group {
                    break;
                }
            }
        }
        let mut total = 0;
        let narrowest = ranges.iter().zip(work).find(|(_, more)| {
            total += more;
            total >= self.group
        });
        (narrowest.map_or(widest, |(range, _)| range).clone(), total.min(self.group).max(first.cost.work()))
    }

    /// Takes the entry at `index` of `lane`, and those that may join it where there is `room`, out of the queue; returns
    /// their work. Those whose deadline will have passed at its end, the `horizon`, yield to others, and leave when there are
    /// others.
    #[expect(clippy::too_many_arguments, reason = "what a look at the queue needs, once")]
    pub(super) fn form(
        &mut self,
        lane: usize,
        mut index: usize,
        room: &Room,
        horizon: Option<Instant>,
        now: Instant,
        gone: &impl Fn(&T) -> bool,
        next: &mut Next<T>,
    ) -> usize {
        let last = if lane == self.late() { lane } else { self.late() - 1 };
        let mut room = room.clone();
        let mut held = Held::default();
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
                    _ if self.is_too_late(entry, &room, horizon, now) => Fit::Yields,
                    None if leads => Fit::Joins,
                    None => Fit::Waits,
                    Some(first) => self.fit(&first.cost, held, &room, entry),
                };
                match fit {
                    Fit::Joins => {
                        if next.batch.is_empty() && !entry.cost.lengths.are_in(&room.lengths) {
                            // It leads in the place of one that left or yields.
                            room.lengths = around(entry.cost.lengths, 0.0);
                        }
                        let mut turn = turn;
                        // Time does not go past those who still wait, or newcomers would wait for all of them.
                        turn.round = passed.first().map_or(turn.round, |(first, _)| first.round);
                        let Some(entry) = self.remove(lane, turn, true) else { continue };
                        held = held.with(&entry.cost);
                        full = entry.cost.alone || held.fills(&room);
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
        held.work()
    }

    /// Whether `entry` would miss its deadline in the batch, which ends at `horizon`; or, of other lengths, in a run of its own.
    fn is_too_late(&self, entry: &Entry<T>, room: &Room, horizon: Option<Instant>, now: Instant) -> bool {
        let (Some(of_batch), Some(deadline)) = (horizon, entry.cost.place.deadline) else { return false };
        if entry.cost.lengths.are_in(&room.lengths) {
            return deadline < of_batch;
        }
        now.checked_add(self.service.estimate(entry.cost.work())).is_some_and(|alone| deadline < alone)
    }

    /// What becomes of `entry` beside a batch that `first` leads and that holds so much of its `room`.
    ///
    /// A request of the batch's shape that cannot join ends the batch, or later ones would overtake it; so does one that
    /// has been overtaken often enough.
    fn fit(&self, first: &Cost, held: Held, room: &Room, entry: &Entry<T>) -> Fit {
        let is_alike = entry.cost.shape == first.shape && entry.cost.lengths.are_in(&room.lengths);
        if is_alike && !entry.cost.alone && held.with(&entry.cost).fits(room) {
            Fit::Joins
        } else if is_alike || entry.passed_over >= self.most_passed_over() {
            Fit::Ends
        } else {
            Fit::Waits
        }
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

impl Lengths {
    fn are_in(self, range: &RangeInclusive<usize>) -> bool {
        range.contains(&self.shortest) && range.contains(&self.longest)
    }
}

/// The lengths around `lengths` of which the shortest lacks at most the share `spread` of the longest.
fn around(lengths: Lengths, spread: f64) -> RangeInclusive<usize> {
    let (shortest, longest) = (lengths.shortest as f64, lengths.longest as f64);
    let beyond = (shortest / longest / (1.0 - spread)).sqrt().max(1.0);
    // Rounded towards what there is; lengths are far below what a float cannot count.
    ((shortest / beyond).ceil() as usize)..=((longest * beyond).floor() as usize)
}

/// The same number for lengths of which most may share runs.
fn about(length: usize) -> usize {
    let bits = length.checked_ilog2().unwrap_or(0).saturating_sub(3);
    length >> bits << bits
}
