//! `Connections`: how many reads of all places there are at a time, shared evenly among the places that want some.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::pin,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

/// Bytes that a connection has to bring in the time that it may be silent, so that one that drips is given up. Eight of them
/// at once do so over a link of 10 KB/s.
pub const LEAST: u64 = 32 << 10;

/// All of them. A place alone has as many as there are; what others want it gives up, down to as many as they have.
#[derive(Debug)]
pub struct Connections {
    most: usize,
    places: Mutex<Places>,
    changed: Notify,
}

/// What the places have, and who waits.
#[derive(Debug, Default)]
struct Places {
    /// By place; no entry is zero.
    held: BTreeMap<String, usize>,
    /// Who waits, by place, the longest waiting first; no line is empty.
    waiting: BTreeMap<String, VecDeque<u64>>,
    last: u64,
}

/// One connection, until it is dropped or given away.
pub struct Permit<'a> {
    connections: &'a Connections,
    place: String,
    is_given: bool,
}

/// Leaves the line when it is dropped.
struct Waiting<'a> {
    connections: &'a Connections,
    place: String,
    ticket: u64,
}

/// How much a connection brings, of what it has to bring at least.
pub struct Pace {
    silence: Duration,
    since: Instant,
    came: u64,
}

impl Pace {
    /// For a connection on which nothing may come for `silence`.
    pub fn new(silence: Duration) -> Self {
        Self { silence, since: Instant::now(), came: 0 }
    }

    /// Whether the connection is too slow, now that `bytes` have come. What comes and is passed over comes as none.
    pub fn is_too_slow(&mut self, bytes: u64) -> bool {
        self.came += bytes;
        if bytes == 0 || self.came >= LEAST {
            (self.since, self.came) = (Instant::now(), 0);
        }
        self.since.elapsed() >= self.silence
    }
}

impl Connections {
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), places: Mutex::default(), changed: Notify::new() }
    }

    /// As many as one place may have, when no other wants any.
    pub fn most(&self) -> usize {
        self.most
    }

    /// One for `place`, as soon as it is its turn: those that have fewest come first, and of these who waits longest.
    pub async fn acquire(&self, place: &str) -> Permit<'_> {
        let waiting = self.wait(place);
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.places.lock().take(self.most, place, waiting.ticket) {
                // The next one in the line may have a turn, too.
                self.changed.notify_waiters();
                return Permit { connections: self, place: place.to_owned(), is_given: false };
            }
            changed.await;
        }
    }

    fn wait(&self, place: &str) -> Waiting<'_> {
        let mut places = self.places.lock();
        places.last += 1;
        let ticket = places.last;
        places.waiting.entry(place.to_owned()).or_default().push_back(ticket);
        drop(places);
        // Who has more than his share hears that somebody wants some of it.
        self.changed.notify_waiters();
        Waiting { connections: self, place: place.to_owned(), ticket }
    }
}

impl Permit<'_> {
    /// Ends when a place waits that has so much less than this one that the connection is to be that one's. It is then no
    /// longer ours.
    pub async fn wanted_elsewhere(&mut self) {
        loop {
            let mut changed = pin!(self.connections.changed.notified());
            changed.as_mut().enable();
            if self.connections.places.lock().give(self.connections.most, &self.place) {
                self.is_given = true;
                self.connections.changed.notify_waiters();
                return;
            }
            changed.await;
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if !self.is_given {
            self.connections.places.lock().release(&self.place);
            self.connections.changed.notify_waiters();
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.connections.places.lock().leave(&self.place, self.ticket);
        self.connections.changed.notify_waiters();
    }
}

impl Places {
    fn of(&self, place: &str) -> usize {
        self.held.get(place).copied().unwrap_or_default()
    }

    fn total(&self) -> usize {
        self.held.values().sum()
    }

    /// Takes one for who holds `ticket`, when there is one and it is his turn.
    fn take(&mut self, most: usize, place: &str, ticket: u64) -> bool {
        // Of each place, only who waits longest may be the next.
        let next = self.waiting.iter().filter_map(|(place, line)| Some((self.of(place), *line.front()?))).min();
        if next.is_none_or(|(_, next)| next != ticket) || self.total() >= most {
            return false;
        }
        *self.held.entry(place.to_owned()).or_default() += 1;
        self.leave(place, ticket);
        true
    }

    fn leave(&mut self, place: &str, ticket: u64) {
        let Some(line) = self.waiting.get_mut(place) else { return };
        line.retain(|other| *other != ticket);
        if line.is_empty() {
            self.waiting.remove(place);
        }
    }

    /// Gives one of `place` up, when none is left and a place waits that would still have no more with it than this one
    /// without.
    fn give(&mut self, most: usize, place: &str) -> bool {
        let fewest = self.waiting.keys().map(|place| self.of(place)).min();
        let is_wanted = self.total() >= most && fewest.is_some_and(|fewest| fewest + 1 < self.of(place));
        if is_wanted {
            self.release(place);
        }
        is_wanted
    }

    fn release(&mut self, place: &str) {
        if let Some(held) = self.held.get_mut(place) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn a_place_alone_has_all_and_gives_half_of_them_up() {
        let connections = Connections::new(4);
        let mut first = Vec::new();
        for _ in 0..4 {
            first.push(connections.acquire("a").await);
        }
        assert!(timeout(SOON, connections.acquire("a")).await.is_err());
        assert!(timeout(SOON, first[0].wanted_elsewhere()).await.is_err(), "nobody else wants any");
        let mut second = Vec::new();
        for _ in 0..2 {
            let mut given = first.pop().unwrap();
            let (taken, ()) = tokio::join!(connections.acquire("b"), given.wanted_elsewhere());
            second.push(taken);
        }
        // It is even now, whoever wants more.
        let more = timeout(SOON, async { tokio::join!(connections.acquire("b"), first[0].wanted_elsewhere()) });
        assert!(more.await.is_err());
        assert!(timeout(SOON, connections.acquire("a")).await.is_err());
        drop((first, second));
        assert!(connections.places.lock().held.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_fewest_comes_first_and_who_gives_up_is_out_of_the_line() {
        let connections = Connections::new(2);
        let held = connections.acquire("a").await;
        let freed = connections.acquire("a").await;
        let order = Mutex::new(Vec::new());
        let wait = async |place: &'static str| {
            let permit = connections.acquire(place).await;
            order.lock().push(place);
            tokio::time::sleep(SOON).await;
            drop(permit);
        };
        assert!(timeout(SOON, wait("c")).await.is_err());
        let free = async {
            tokio::time::sleep(SOON).await;
            drop(freed);
        };
        tokio::join!(wait("a"), wait("b"), wait("b"), free);
        assert_eq!(*order.lock(), ["b", "b", "a"]);
        drop(held);
        assert!(connections.places.lock().waiting.is_empty());
    }
}
