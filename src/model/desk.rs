//! `Desk`: where long texts wait to become tokens, who is let in there, and whose turn it is.
//!
//! One request is read at a time, a bit of it, then a bit of the next: clients take turns, however many requests they have,
//! and so do the requests of each. What waits here and what waits in the queue have one bound together, so that texts which
//! come faster than they are read are refused as requests are that come faster than they run. What has been read stays
//! counted, with its tokens, until the last of its parts is in the queue.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::batcher::{Client, Limits, SPARE};
use crate::{
    error::{Code, Error},
    metrics::{DropReason, VersionMetrics},
};

/// How much of the past still counts, when a bit has been read, for how long the next ones will take.
const MEMORY: f64 = 0.95;

/// The desk of a version.
pub(super) struct Desk {
    state: Mutex<State>,
    limits: Limits,
    metrics: Arc<VersionMetrics>,
}

/// Texts of a request that are to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pile {
    pub client: Client,
    /// What they hold in memory.
    pub bytes: usize,
    /// Bytes that are to be read.
    pub work: usize,
    pub deadline: Option<Instant>,
}

/// What waits in the queue behind the desk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queued {
    pub requests: usize,
    pub bytes: usize,
}

/// A request's place at the desk. Dropped, the request is not read on.
pub(super) struct Seat {
    desk: Arc<Desk>,
    number: u64,
    /// What it counts as when it leaves before it has been read.
    reason: Option<DropReason>,
}

/// Leave to read a bit; dropped, it is the next one's.
pub(super) struct Turn {
    desk: Arc<Desk>,
    number: u64,
}

/// Comes with the turn, or says why there will be none.
type Call = oneshot::Sender<Result<Turn, Error>>;

/// Those that had to make room, and the answers they get.
type Displaced = Vec<(Call, Error)>;

#[derive(Default)]
struct State {
    /// By their numbers, in the order of arrival.
    seats: HashMap<u64, Sitting>,
    parties: HashMap<Client, Party>,
    /// The clients of whom somebody waits for a turn, in the order of their turns.
    order: VecDeque<Client>,
    arrived: u64,
    /// Those that have not been read.
    unread: usize,
    bytes: usize,
    /// Whether somebody has the turn.
    is_taken: bool,
    pace: Pace,
}

struct Sitting {
    client: Client,
    bytes: usize,
    work: usize,
    is_read: bool,
    call: Option<Call>,
}

/// What a client has at the desk.
#[derive(Default)]
struct Party {
    seats: usize,
    unread: usize,
    bytes: usize,
    work: usize,
    /// Those that wait for a turn, in its order.
    line: VecDeque<u64>,
}

/// How long reading has taken of late.
#[derive(Default)]
struct Pace {
    seconds: f64,
    bytes: f64,
}

impl Desk {
    pub fn new(limits: Limits, metrics: Arc<VersionMetrics>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), limits, metrics })
    }

    /// Lets a request in that the queue would take now, with what is `queued` there. Others may have to make room for it.
    ///
    /// # Errors
    /// `Overloaded` when a limit is reached, `DeadlineExceeded` when the deadline would pass before all was read.
    pub fn sit(self: &Arc<Self>, pile: &Pile, queued: Queued, now: Instant) -> Result<Seat, Error> {
        let admitted = self.state.lock().admit(pile, &self.limits, queued, now);
        match admitted {
            Ok((number, displaced)) => {
                tell(displaced);
                Ok(Seat { desk: Arc::clone(self), number, reason: Some(DropReason::Cancelled) })
            }
            Err(error) => {
                let is_late = error.code == Code::DeadlineExceeded;
                self.metrics.dropped(if is_late { DropReason::Deadline } else { DropReason::Overloaded });
                Err(error)
            }
        }
    }

    /// Gives the turn to whose it is, unless somebody has it.
    fn hand_on(self: &Arc<Self>) {
        let next = self.state.lock().grant();
        if let Some((number, call)) = next {
            // Of those that leave just now it comes back, and goes on.
            drop(call.send(Ok(Turn { desk: Arc::clone(self), number })));
        }
    }
}

impl Seat {
    /// Waits for a turn.
    ///
    /// # Errors
    /// `Overloaded` when it had to make room for others.
    pub async fn turn(&mut self) -> Result<Turn, Error> {
        let (call, answer) = oneshot::channel();
        self.desk.state.lock().ask(self.number, call);
        self.desk.hand_on();
        let answer = answer.await.unwrap_or_else(|_| Err(Error::internal("nobody has the turn")));
        if answer.is_err() {
            self.reason = Some(DropReason::Displaced);
        }
        answer
    }

    /// All has been read, and some of it is still to be queued.
    pub fn has_read(&mut self) {
        self.reason = None;
        self.desk.state.lock().has_read(self.number);
    }

    /// It will not be read any further, because of `error`.
    pub fn fails(&mut self, error: &Error, is_timeout: bool) {
        self.reason = match error.code {
            Code::DeadlineExceeded if is_timeout => Some(DropReason::Timeout),
            Code::DeadlineExceeded => Some(DropReason::Deadline),
            Code::Overloaded if matches!(self.reason, Some(DropReason::Displaced)) => self.reason,
            Code::Overloaded => Some(DropReason::Overloaded),
            _ => None,
        };
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.desk.state.lock().leave(self.number);
        if let Some(reason) = self.reason {
            self.desk.metrics.dropped(reason);
        }
    }
}

impl Turn {
    /// Whether anybody waits for what is read.
    pub fn is_wanted(&self) -> bool {
        self.desk.state.lock().seats.contains_key(&self.number)
    }

    /// Tells how long a bit took, what is left to be read after it, and what the request holds in memory now.
    ///
    /// # Errors
    /// `Overloaded` when there is no room for that beside others.
    pub fn done(&self, took: Duration, left: usize, bytes: usize) -> Result<(), Error> {
        let displaced = self.desk.state.lock().advance(self.number, took, left, bytes, self.desk.limits.max_bytes)?;
        tell(displaced);
        Ok(())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.desk.state.lock().is_taken = false;
        self.desk.hand_on();
    }
}

impl State {
    /// The number of a new seat, and who has to leave for it.
    fn admit(&mut self, pile: &Pile, limits: &Limits, queued: Queued, now: Instant) -> Result<(u64, Displaced), Error> {
        let wait = self.pace.of(self.ahead(pile));
        if wait > limits.max_wait {
            let message = format!("the queue is full: the estimated wait is {wait:.1?} (queue.max_wait)");
            return Err(Error::overloaded(message, wait));
        }
        // Who is alone finds out whether there is time.
        if let Some(deadline) = pile.deadline.filter(|_| self.unread > 0) {
            let whole = wait.saturating_add(wait / SPARE).saturating_add(self.pace.of(pile.work));
            if whole > deadline.saturating_duration_since(now) {
                let message = format!("the deadline cannot be met: the estimated wait is {wait:.0?}");
                return Err(Error::new(Code::DeadlineExceeded, message));
            }
        }
        // Where the queue itself is full, it has room for those only who would put others out of it.
        let seats = limits.max_requests.saturating_sub(queued.requests).max(1);
        let waiting = self.bytes.saturating_add(queued.bytes);
        let too_many = usize::from(self.unread >= seats);
        let beside = if self.seats.is_empty() { 0 } else { waiting.saturating_add(pile.bytes) };
        let too_much = beside.saturating_sub(limits.max_bytes);
        let mut displaced = Vec::new();
        if too_many + too_much > 0 {
            let full = if too_many > 0 {
                let waiting = self.unread + queued.requests;
                format!("the queue is full: {waiting} requests wait (queue.max_requests)")
            } else {
                format!("the queue is full: {waiting} bytes wait (queue.max_bytes)")
            };
            let Some(numbers) = self.room(pile, too_many, too_much) else {
                return Err(Error::overloaded(full, wait));
            };
            let message = format!("{full}, and other clients have less waiting than this one");
            let calls = numbers.into_iter().filter_map(|number| self.leave(number));
            displaced = calls.map(|call| (call, Error::overloaded(message.clone(), wait))).collect();
        }
        Ok((self.enter(pile), displaced))
    }

    /// The bytes that are read before all of a new request is, beside its own.
    fn ahead(&self, pile: &Pile) -> usize {
        let own = self.parties.get(&pile.client).map_or(0, |party| party.work);
        // Each of the others has as many turns meanwhile as it needs, or as its client has.
        let turns = own.saturating_add(pile.work);
        let others = self.parties.iter().filter(|(client, _)| **client != pile.client);
        others.map(|(_, party)| party.work.min(turns)).fold(own, usize::saturating_add)
    }

    /// Those that make room for a new request: the newest of the client with the most, which has more even then.
    fn room(&self, pile: &Pile, too_many: usize, too_much: usize) -> Option<Vec<u64>> {
        let (unread, bytes) = self.parties.get(&pile.client).map_or((0, 0), |party| (party.unread, party.bytes));
        let others = self.parties.iter().filter(|(client, _)| **client != pile.client).map(|(_, party)| party);
        let most = |party: &&Party| (if too_much > 0 { party.bytes } else { party.unread }, party.newest());
        let party = others.max_by_key(most)?;
        let has_more =
            if too_much > 0 { party.bytes > bytes.saturating_add(pile.bytes) } else { party.unread > unread + 1 };
        if !has_more {
            return None;
        }
        let mut line: Vec<u64> = party.line.iter().copied().collect();
        line.sort_unstable_by_key(|&number| std::cmp::Reverse(number));
        let mut freed = 0;
        for (place, number) in line.iter().enumerate() {
            freed += self.seats.get(number).map_or(0, |seat| seat.bytes);
            if place + 1 >= too_many && freed >= too_much {
                line.truncate(place + 1);
                return Some(line);
            }
        }
        None
    }

    fn enter(&mut self, pile: &Pile) -> u64 {
        let Pile { client, bytes, work, .. } = *pile;
        self.arrived += 1;
        self.unread += 1;
        self.bytes += bytes;
        let party = self.parties.entry(client).or_default();
        party.seats += 1;
        party.unread += 1;
        party.bytes += bytes;
        party.work += work;
        self.seats.insert(self.arrived, Sitting { client, bytes, work, is_read: false, call: None });
        self.arrived
    }

    fn ask(&mut self, number: u64, call: Call) {
        let Some(seat) = self.seats.get_mut(&number) else { return };
        if seat.call.replace(call).is_some() {
            return;
        }
        let party = self.parties.entry(seat.client).or_default();
        if party.line.is_empty() {
            self.order.push_back(seat.client);
        }
        party.line.push_back(number);
    }

    /// Whose turn it is.
    fn grant(&mut self) -> Option<(u64, Call)> {
        if self.is_taken {
            return None;
        }
        let client = self.order.pop_front()?;
        let line = &mut self.parties.get_mut(&client)?.line;
        let number = line.pop_front()?;
        if !line.is_empty() {
            self.order.push_back(client);
        }
        let call = self.seats.get_mut(&number)?.call.take()?;
        self.is_taken = true;
        Some((number, call))
    }

    /// Tells what a turn came to. Where tokens take more room than there is, the newest requests leave that are still to be
    /// read: of those that came first, some are finished in any case.
    fn advance(
        &mut self,
        number: u64,
        took: Duration,
        left: usize,
        bytes: usize,
        most: usize,
    ) -> Result<Displaced, Error> {
        let Some(seat) = self.seats.get_mut(&number) else { return Ok(Vec::new()) };
        let (client, read, more) = (seat.client, seat.work.saturating_sub(left), bytes.saturating_sub(seat.bytes));
        seat.work -= read;
        seat.bytes += more;
        self.bytes += more;
        if let Some(party) = self.parties.get_mut(&client) {
            party.work -= read;
            party.bytes += more;
        }
        self.pace.observe(read, took);
        let mut displaced = Vec::new();
        while self.bytes > most && self.seats.len() > 1 {
            let waiting = self.parties.values().filter(|party| !party.line.is_empty());
            let newest = waiting.max_by_key(|party| (party.bytes, party.newest())).and_then(Party::newest);
            let wait = self.pace.of(self.parties.values().map(|party| party.work).sum());
            let error = Error::overloaded(
                format!("the queue is full: {} bytes wait (queue.max_bytes), texts and their tokens", self.bytes),
                wait,
            );
            let Some(newest) = newest else { return Err(error) };
            displaced.extend(self.leave(newest).map(|call| (call, error)));
        }
        Ok(displaced)
    }

    fn has_read(&mut self, number: u64) {
        let Some(seat) = self.seats.get_mut(&number).filter(|seat| !seat.is_read) else { return };
        seat.is_read = true;
        self.unread -= 1;
        if let Some(party) = self.parties.get_mut(&seat.client) {
            party.unread -= 1;
            party.work -= std::mem::take(&mut seat.work);
        }
    }

    /// The call that it waited for.
    fn leave(&mut self, number: u64) -> Option<Call> {
        self.has_read(number);
        let Sitting { client, bytes, call, .. } = self.seats.remove(&number)?;
        self.bytes -= bytes;
        let party = self.parties.get_mut(&client)?;
        party.bytes -= bytes;
        party.seats -= 1;
        if call.is_some() {
            party.line.retain(|&other| other != number);
            if party.line.is_empty() {
                self.order.retain(|other| *other != client);
            }
        }
        if party.seats == 0 {
            self.parties.remove(&client);
        }
        call
    }
}

fn tell(displaced: Displaced) {
    for (call, error) in displaced {
        // Who is gone need not be told.
        let _ = call.send(Err(error));
    }
}

impl Party {
    /// The newest of those that wait for a turn.
    fn newest(&self) -> Option<u64> {
        self.line.iter().copied().max()
    }
}

impl Pace {
    fn observe(&mut self, bytes: usize, took: Duration) {
        self.seconds = self.seconds * MEMORY + took.as_secs_f64();
        self.bytes = self.bytes * MEMORY + bytes as f64;
    }

    /// How long so many bytes take; nothing as long as nobody knows.
    fn of(&self, bytes: usize) -> Duration {
        let seconds = if self.bytes > 0.0 { self.seconds / self.bytes * bytes as f64 } else { 0.0 };
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests;
