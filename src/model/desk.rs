//! `Desk`: where long texts wait to become tokens, and who is let in there.
//!
//! One request is read at a time, a bit of it, then a bit of the next one, whatever their levels. What has been read stays
//! counted until the last of its parts is in the queue. No client may have more here than there is room left for others, so
//! that one alone has as much as the queue's limits say, all together have less than twice as much, and who comes to a crowd
//! of one client's finds room (A. K. Choudhury and E. L. Hahne, "Dynamic queue length thresholds for shared-memory packet
//! switches", 1998).

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::batcher::{Client, Limits};
use crate::error::Error;

/// The desk of a version.
pub(super) struct Desk {
    /// Of all together.
    most: Held,
    state: Mutex<State>,
    max_wait: Duration,
    turn: Arc<Semaphore>,
}

/// A request's place at the desk, until it is dropped.
pub(super) struct Seat {
    desk: Arc<Desk>,
    client: Client,
    held: Held,
    /// Whether it has had a turn.
    is_begun: bool,
}

#[derive(Default)]
struct State {
    all: Held,
    clients: HashMap<Client, Held>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Held {
    /// Those that have not been read.
    requests: usize,
    bytes: usize,
}

impl Desk {
    pub fn new(limits: Limits) -> Arc<Self> {
        let most = Held { requests: limits.max_requests, bytes: limits.max_bytes };
        let turn = Arc::new(Semaphore::new(1));
        Arc::new(Self { most: most.and(most), state: Mutex::default(), max_wait: limits.max_wait, turn })
    }

    /// Lets in a request that will hold so many bytes, with its tokens. It counts as the limit at most, so that there is room
    /// beside a large one, and who finds nobody there is let in whatever the limits are.
    ///
    /// # Errors
    /// `Overloaded` when a limit is reached.
    pub fn sit(self: &Arc<Self>, client: Client, bytes: usize) -> Result<Seat, Error> {
        let held = Held { requests: 1, bytes: bytes.min(self.most.bytes / 2) };
        let mut state = self.state.lock();
        let own = state.clients.get(&client).copied().unwrap_or_default();
        if state.all != Held::default() {
            let (wanted, left) = (own.and(held), self.most.without(state.all.and(held)));
            if wanted.requests > left.requests {
                return Err(full(state.all.requests, "requests", own.requests, "max_requests"));
            }
            if wanted.bytes > left.bytes {
                return Err(full(state.all.bytes, "bytes", own.bytes, "max_bytes"));
            }
        }
        state.all = state.all.and(held);
        state.clients.insert(client, own.and(held));
        Ok(Seat { desk: Arc::clone(self), client, held, is_begun: false })
    }
}

impl Seat {
    /// Waits for a turn, which is the next one's when it is dropped. What has had one is not given up for want of another.
    ///
    /// # Errors
    /// `Overloaded` when the first one takes too long.
    pub async fn turn(&mut self) -> Result<Option<OwnedSemaphorePermit>, Error> {
        let turn = Arc::clone(&self.desk.turn).acquire_owned();
        let turn = if self.is_begun { turn.await } else { self.first(turn).await? };
        self.is_begun = true;
        // It is never closed.
        Ok(turn.ok())
    }

    async fn first<T>(&self, turn: impl Future<Output = T>) -> Result<T, Error> {
        timeout(self.desk.max_wait, turn).await.map_err(|_| {
            let all = self.desk.state.lock().all.requests;
            refusal(format!("{all} requests of long texts take turns to become tokens, and none came (queue.max_wait)"))
        })
    }

    /// All has been read.
    pub fn has_read(&mut self) {
        self.desk.state.lock().take(self.client, Held { requests: self.held.requests, bytes: 0 });
        self.held.requests = 0;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.desk.state.lock().take(self.client, self.held);
    }
}

impl State {
    fn take(&mut self, client: Client, held: Held) {
        self.all = self.all.without(held);
        let own = self.clients.entry(client).or_default();
        *own = own.without(held);
        if *own == Held::default() {
            self.clients.remove(&client);
        }
    }
}

impl Held {
    fn and(self, other: Self) -> Self {
        Self { requests: self.requests.saturating_add(other.requests), bytes: self.bytes.saturating_add(other.bytes) }
    }

    fn without(self, other: Self) -> Self {
        Self { requests: self.requests.saturating_sub(other.requests), bytes: self.bytes.saturating_sub(other.bytes) }
    }
}

fn full(all: usize, what: &str, own: usize, limit: &str) -> Error {
    refusal(format!("{all} {what} of long texts wait to become tokens, {own} of them this client's (queue.{limit})"))
}

fn refusal(reason: String) -> Error {
    Error::overloaded(format!("the queue is full: {reason}"), Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::error::Code;

    fn desk() -> Arc<Desk> {
        let limits = Limits { max_rows: 1, max_requests: 4, max_bytes: 1000, max_wait: Duration::from_secs(60) };
        Desk::new(limits)
    }

    fn sit(desk: &Arc<Desk>, client: u64, bytes: usize) -> Result<Seat, Error> {
        desk.sit(Client(client), bytes)
    }

    fn is_bare(desk: &Desk) -> bool {
        let state = desk.state.lock();
        state.all == Held::default() && state.clients.is_empty()
    }

    #[test]
    fn a_client_has_no_more_than_is_left_for_others() {
        let desk = desk();
        let mut crowd: Vec<Seat> = (0..4).map(|_| sit(&desk, 1, 10).unwrap()).collect();
        let error = sit(&desk, 1, 10).err().unwrap();
        let expected = "the queue is full: 4 requests of long texts wait to become tokens, 4 of them this client's \
                        (queue.max_requests)";
        assert_eq!((error.code, error.message.as_str()), (Code::Overloaded, expected));
        let others = [2, 2, 3].map(|client| sit(&desk, client, 10).unwrap());
        assert!(sit(&desk, 2, 10).is_err() && sit(&desk, 3, 10).is_err());
        assert!(sit(&desk, 4, 10).is_err(), "nothing would be left for others");
        // What has been read makes room.
        crowd.iter_mut().for_each(Seat::has_read);
        assert_eq!(desk.state.lock().all, Held { requests: 3, bytes: 70 });
        let again = sit(&desk, 1, 10).unwrap();
        drop((crowd, others, again));
        assert!(is_bare(&desk));
    }

    #[test]
    fn bytes_are_divided_likewise() {
        let desk = desk();
        let whole = sit(&desk, 1, 5000).unwrap();
        assert!(sit(&desk, 1, 1).is_err() && sit(&desk, 2, 501).is_err());
        drop((sit(&desk, 2, 500).unwrap(), whole));
        let mut first = sit(&desk, 1, 600).unwrap();
        assert!(sit(&desk, 1, 401).is_err(), "more than the limit");
        let second = sit(&desk, 2, 700).unwrap();
        let error = sit(&desk, 2, 1).err().unwrap();
        assert!(error.message.contains("1300 bytes of long texts") && error.message.ends_with("(queue.max_bytes)"));
        first.has_read();
        assert_eq!(desk.state.lock().all, Held { requests: 1, bytes: 1300 }, "they wait to be queued");
        drop((first, second));
        assert!(is_bare(&desk));
    }

    #[tokio::test(start_paused = true)]
    async fn turns_are_taken_in_order_and_outlive_who_left() {
        let desk = desk();
        let [mut one, mut other, mut last] = [1, 1, 2].map(|client| sit(&desk, client, 1).unwrap());
        let turn = one.turn().await.unwrap().unwrap();
        let mut waits = Box::pin(other.turn());
        assert!((&mut waits).now_or_never().is_none(), "one at a time");
        let mut behind = Box::pin(last.turn());
        assert!((&mut behind).now_or_never().is_none());
        drop(waits);
        drop((one, other));
        assert!((&mut behind).now_or_never().is_none(), "it is still being read");
        drop(turn);
        let turn = (&mut behind).now_or_never().unwrap().unwrap();
        let mut next = sit(&desk, 3, 1).unwrap();
        let error = next.turn().await.unwrap_err();
        assert_eq!(error.code, Code::Overloaded);
        assert!(error.message.ends_with("(queue.max_wait)"), "{}", error.message);
        drop(turn);
        drop(next.turn().await.unwrap());
        // It would wait for an hour and more now.
        let _turn = sit(&desk, 4, 1).unwrap().turn().await.unwrap();
        assert!(timeout(Duration::from_secs(3600), next.turn()).await.is_err());
    }
}
