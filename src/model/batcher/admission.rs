//! Who gets into the queue, how long it would have to wait there, and who makes room for it.
//!
//! A full queue is no reason to keep a client out that has less waiting than another: what would run last gives way to
//! a request of another client that would run before it. What would run last of a level is by the order of turns the
//! newest request of the client with the most waiting, so nobody within the share that is due to everyone is put out.

use std::time::{Duration, Instant};

use super::{Batcher, Cost, Entry, lane::Lane};
use crate::error::{Code, Error};

/// Who has a deadline is let in when it is met even if the wait turns out longer by this part of it: estimates are a few
/// percent off, and clients that have nothing waiting yet come between. Whoever is refused at once has lost nothing,
/// who waits first and is dropped then has lost the time. With 16 clients at twice the load 8 % of the refused waited
/// for nearly all of their time without this, one in a thousand with a quarter and none with a third (simulated).
const SPARE: u32 = 3;

/// A request that was put out of a full queue, and the answer it gets.
pub type Displaced<T> = (Entry<T>, Error);

/// The last requests of a lane, so many of them, which give way to a new one.
struct Room {
    lane: usize,
    requests: usize,
    /// What the queue is full of.
    full: String,
}

impl<T> Batcher<T> {
    /// Queues a request, or says why not; a refused item comes back to its owner. In a full queue, those that come
    /// back had to make room for it.
    ///
    /// # Errors
    /// `Overloaded` when a limit is reached, `DeadlineExceeded` when the request's own deadline cannot be met.
    pub fn push(&mut self, item: T, cost: Cost, now: Instant) -> Result<Vec<Displaced<T>>, (T, Error)> {
        let (price, room) = match self.admit(&cost, now) {
            Ok(admitted) => admitted,
            Err(error) => return Err((item, error)),
        };
        let displaced = room.map_or_else(Vec::new, |room| self.displace(&room, now));
        self.len += 1;
        self.bytes += cost.bytes;
        let lane = &mut self.lanes[cost.place.level];
        lane.waiting += 1;
        lane.push(Entry { item, cost, queued_at: now, price, passed_over: 0 });
        Ok(displaced)
    }

    /// Whether a request would be queued now.
    ///
    /// # Errors
    /// As `push`.
    pub fn check(&self, cost: &Cost, now: Instant) -> Result<(), Error> {
        self.admit(cost, now).map(|_| ())
    }

    /// What a request costs, and who has to make room for it.
    #[inline]
    fn admit(&self, cost: &Cost, now: Instant) -> Result<(u32, Option<Room>), Error> {
        let level = cost.place.level;
        let price = self.price(cost);
        let round = self.lanes[level].round(cost.client, price);
        let wait = self.estimated_wait(level, self.lanes[level].ahead(round), now);
        let room = match self.full(cost, wait).map(|full| self.room(full, cost, round, wait)) {
            None => None,
            Some(Ok(room)) => Some(room),
            Some(Err(full)) => return Err(Error::overloaded(full, wait)),
        };
        if let Some(deadline) = cost.place.deadline {
            // Refused now is better than late: others with less waiting may still come and run before it.
            let ahead = self.lanes[level].expected_ahead(cost.client, round);
            let wait = self.estimated_wait(level, ahead, now);
            let run = if self.is_idle() && wait.is_zero() { Duration::ZERO } else { self.run_time(cost.work()) };
            if wait.saturating_add(wait / SPARE).saturating_add(run) > deadline.saturating_duration_since(now) {
                let message = format!("the deadline cannot be met: the estimated wait is {wait:.0?}");
                return Err(Error::new(Code::DeadlineExceeded, message));
            }
        }
        Ok((price, room))
    }

    /// What a request is predicted to cost, in the work of a full batch, at least 1. Who runs alone pays the whole run.
    fn price(&self, cost: &Cost) -> u32 {
        let work = cost.work();
        if !cost.alone && work <= self.group {
            return u32::try_from(work.max(1)).unwrap_or(u32::MAX);
        }
        let runs = self.service.relative(work, self.group).unwrap_or(work as f64 / self.group as f64);
        // A float becomes the nearest number there is.
        ((runs * self.group as f64).ceil() as u32).max(1)
    }

    /// Why the queue has no room for a request that would wait for `wait`.
    fn full(&self, cost: &Cost, wait: Duration) -> Option<String> {
        let limits = &self.limits;
        if self.len >= limits.max_requests {
            return Some(format!("the queue is full: {} requests wait (queue.max_requests)", self.len));
        }
        if !self.has_bytes(self.bytes, self.len, cost) {
            return Some(format!("the queue is full: {} bytes wait (queue.max_bytes)", self.bytes));
        }
        // The rest of a request that was let in waits for its own parts as well.
        if wait > limits.max_wait && !cost.follows {
            return Some(format!("the queue is full: the estimated wait is {wait:.1?} (queue.max_wait)"));
        }
        if self.is_level_full(cost.place.level) {
            let (waiting, number) = (self.lanes[cost.place.level].waiting, cost.place.level + 1);
            return Some(format!(
                "the queue is full: {waiting} requests of priority level {number} wait (queue.max_size)"
            ));
        }
        None
    }

    fn is_idle(&self) -> bool {
        self.running.len() < self.executors
    }

    fn has_bytes(&self, bytes: usize, requests: usize, cost: &Cost) -> bool {
        requests == 0 || bytes.saturating_add(cost.bytes) <= self.limits.max_bytes
    }

    fn is_level_full(&self, level: usize) -> bool {
        let Lane { waiting, level, .. } = &self.lanes[level];
        level.max_size > 0 && *waiting >= level.max_size
    }

    /// Who makes room for a request of `round` in a queue that is `full`.
    ///
    /// # Errors
    /// The reason again, when those at the end run before it, are its own client's, or would not make enough room.
    fn room(&self, full: String, cost: &Cost, round: u64, wait: Duration) -> Result<Room, String> {
        if wait > self.limits.max_wait && !cost.follows {
            // Nobody behind it makes that shorter.
            return Err(full);
        }
        let level = cost.place.level;
        // When its own level is full, only that can make room.
        let level_full = self.is_level_full(level);
        let used = (level + 1..self.lanes.len()).rev().find(|&lane| self.lanes[lane].len() > 0);
        let lane = if level_full { level } else { used.unwrap_or(level) };
        let (mut requests, mut bytes) = (0, self.bytes);
        for (turn, entry) in self.lanes[lane].backwards() {
            if entry.cost.client == cost.client || (lane == level && turn.round <= round) {
                break;
            }
            requests += 1;
            bytes -= entry.cost.bytes;
            if self.len - requests < self.limits.max_requests && self.has_bytes(bytes, self.len - requests, cost) {
                return Ok(Room { lane, requests, full });
            }
        }
        Err(full)
    }

    fn displace(&mut self, room: &Room, now: Instant) -> Vec<Displaced<T>> {
        let lane = &self.lanes[room.lane];
        let wait = self.estimated_wait(room.lane, (lane.len(), lane.work), now);
        let displaced = (0..room.requests).filter_map(|_| {
            let turn = self.lanes[room.lane].pop_last_turn()?;
            let entry = self.remove(room.lane, turn, false)?;
            let message = format!("{}, and other clients have less waiting than this one", room.full);
            Some((entry, Error::overloaded(message, wait)))
        });
        displaced.collect()
    }

    /// The estimated time until a request of `level` queued now would start that so many requests of its level run
    /// before, and so much work; zero when an executor is idle.
    pub(super) fn estimated_wait(&self, level: usize, ahead: (usize, usize), now: Instant) -> Duration {
        let above = self.lanes[..level].iter().map(|lane| (lane.len(), lane.work));
        let (requests, work) =
            above.chain([ahead]).fold((0, 0), |(requests, work), (more, of_them)| (requests + more, work + of_them));
        let idle = self.is_idle();
        // What is held back for company keeps nobody waiting; what fills a batch is not held back, and only waits for its
        // executor to look.
        if idle && (requests == 0 || (!self.max_delay.is_zero() && work < self.group)) {
            return Duration::ZERO;
        }
        // A run that takes longer than it should may take as much longer again.
        let left = |&(start, work): &(Instant, usize)| {
            let (whole, gone) = (self.service.estimate(work), now.saturating_duration_since(start));
            whole.checked_sub(gone).unwrap_or_else(|| gone - whole)
        };
        let residual = if idle { Duration::ZERO } else { self.running.iter().map(left).min().unwrap_or_default() };
        let executors = u32::try_from(self.executors).unwrap_or(u32::MAX);
        residual + self.service.estimate_queue(work, requests, self.group) / executors
    }
}
