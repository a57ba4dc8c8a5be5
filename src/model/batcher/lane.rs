//! `Lane`: the waiting requests of one level, in the order in which they shall run and in that of their arrival.

use std::collections::VecDeque;

use super::{Client, Entry, fairness::Shares};
use crate::model::schedule::Level;

/// No request.
const NONE: u32 = u32::MAX;

/// Requests stay where they are while they wait, for they are large; what is sorted are their turns.
///
/// A request of the only client, or of the one with the most waiting, goes to the end, and one of a client with
/// nothing waiting to the front. Between two clients that both have thousands waiting, a new turn moves up to half of
/// those there are, 16 bytes each: 64 KB when 8192 wait.
pub(super) struct Lane<T> {
    /// By round, and by arrival within a round.
    turns: VecDeque<Turn>,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
    shares: Shares,
    /// Of all that wait here.
    pub work: usize,
    pub level: Level,
    /// Requests of this level that wait here or in the lane of the late.
    pub waiting: usize,
}

/// When a request shall run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    pub round: u64,
    work: u32,
    slot: u32,
}

struct Slot<T> {
    entry: Entry<T>,
    round: u64,
    older: u32,
    newer: u32,
}

impl<T> Lane<T> {
    pub fn new(level: Level) -> Self {
        Self {
            turns: VecDeque::new(),
            slots: Vec::new(),
            free: Vec::new(),
            oldest: NONE,
            newest: NONE,
            shares: Shares::new(1),
            work: 0,
            level,
            waiting: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.turns.len()
    }

    /// The round that a request would get.
    pub fn round(&self, client: Client, price: u32) -> u64 {
        self.shares.round(client, price)
    }

    /// Has clients take turns of `row` each; before anybody waits.
    pub fn take_turns_of(&mut self, row: usize) {
        self.shares = Shares::new(row as u64);
    }

    /// Requests that run before a new one of `round`, and their work.
    pub fn ahead(&self, round: u64) -> (usize, usize) {
        if self.turns.back().is_none_or(|last| last.round <= round) {
            return (self.turns.len(), self.work);
        }
        let requests = self.turns.partition_point(|turn| turn.round <= round);
        let work = |turns: std::collections::vec_deque::Iter<'_, Turn>| turns.map(|turn| turn.work as usize).sum();
        if requests <= self.turns.len() / 2 {
            (requests, work(self.turns.range(..requests)))
        } else {
            let behind: usize = work(self.turns.range(requests..));
            (requests, self.work.saturating_sub(behind))
        }
    }

    /// The same, if every client that waits takes all of its turns until then.
    pub fn expected_ahead(&self, client: Client, round: u64) -> (usize, usize) {
        let (requests, work) = self.ahead(round);
        let (others, own) = self.shares.before(client, round);
        // Its own requests are taken to be as large as all are on average; all of them run before a new one.
        let own_work = own * self.work / self.len().max(1);
        let expected = others.saturating_add(own_work);
        if expected <= work {
            return (requests, work);
        }
        (requests.max(expected.saturating_mul(self.len()) / self.work.max(1)), expected)
    }

    pub fn push(&mut self, entry: Entry<T>) {
        let round = self.shares.enter(entry.cost.client, entry.price);
        let work = u32::try_from(entry.cost.work()).unwrap_or(u32::MAX);
        self.work += entry.cost.work();
        let slot = Some(Slot { entry, round, older: self.newest, newer: NONE });
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                // Memory ends long before the numbers do.
                u32::try_from(self.slots.len() - 1).unwrap_or(NONE)
            }
        };
        let before = self.newest;
        match self.slot(before) {
            Some(older) => older.newer = index,
            None => self.oldest = index,
        }
        self.newest = index;
        let turn = Turn { round, work, slot: index };
        if self.turns.back().is_none_or(|last| last.round <= round) {
            self.turns.push_back(turn);
        } else {
            let place = self.turns.partition_point(|turn| turn.round <= round);
            self.turns.insert(place, turn);
        }
    }

    fn slot(&mut self, index: u32) -> Option<&mut Slot<T>> {
        self.slots.get_mut(index as usize).and_then(Option::as_mut)
    }

    /// The request whose turn it is.
    pub fn entry(&self, turn: Turn) -> Option<&Entry<T>> {
        self.slots.get(turn.slot as usize).and_then(Option::as_ref).map(|slot| &slot.entry)
    }

    /// The requests in the order of their turns.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Entry<T>> {
        self.turns.iter().filter_map(|&turn| self.entry(turn))
    }

    /// The requests whose turns come after the one at `index`, which comes first.
    pub fn from(&self, index: usize) -> impl Iterator<Item = &Entry<T>> {
        self.turns.range(index.min(self.turns.len())..).filter_map(|&turn| self.entry(turn))
    }

    /// The turns from the last to the first.
    pub fn backwards(&self) -> impl Iterator<Item = (Turn, &Entry<T>)> {
        self.turns.iter().rev().filter_map(|&turn| Some((turn, self.entry(turn)?)))
    }

    /// Takes the first turn away; its request is to be [taken](Self::take) or its turn to be put back.
    pub fn pop_turn(&mut self) -> Option<Turn> {
        self.turns.pop_front()
    }

    /// Puts the first turn back.
    pub fn put_back(&mut self, turn: Turn) {
        self.turns.push_front(turn);
    }

    /// Puts a turn behind all others, when all are looked at in order.
    pub fn put_behind(&mut self, turn: Turn) {
        self.turns.push_back(turn);
    }

    /// Takes the last turn away.
    pub fn pop_last_turn(&mut self) -> Option<Turn> {
        self.turns.pop_back()
    }

    /// Notes that a request has been overtaken by a batch of its level.
    pub fn pass_over(&mut self, turn: Turn) {
        if let Some(slot) = self.slot(turn.slot) {
            slot.entry.passed_over = slot.entry.passed_over.saturating_add(1);
        }
    }

    /// Takes the request out whose turn was taken away: it `runs`, in the round that the turn says, or leaves without.
    pub fn take(&mut self, turn: Turn, runs: bool) -> Option<Entry<T>> {
        let Slot { entry, older, newer, .. } = self.slots.get_mut(turn.slot as usize)?.take()?;
        self.free.push(turn.slot);
        match self.slot(older) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slot(newer) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
        self.work -= entry.cost.work();
        if runs {
            self.shares.run(entry.cost.client, turn.round, self.turns.len());
        } else {
            self.shares.refund(entry.cost.client, entry.price);
        }
        Some(entry)
    }

    /// The request that has waited longest.
    pub fn oldest(&self) -> Option<&Entry<T>> {
        self.slots.get(self.oldest as usize).and_then(Option::as_ref).map(|slot| &slot.entry)
    }

    /// Takes away the turn of the request that has waited longest.
    pub fn pop_oldest_turn(&mut self) -> Option<Turn> {
        let (oldest, round) = (self.oldest, self.slot(self.oldest)?.round);
        let first = self.turns.partition_point(|turn| turn.round < round);
        let behind = self.turns.range(first..).position(|turn| turn.slot == oldest)?;
        self.turns.remove(first + behind)
    }

    #[cfg(test)]
    pub fn clients(&self) -> usize {
        self.shares.known()
    }
}
