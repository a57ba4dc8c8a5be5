use std::{
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use super::*;
use crate::metrics::Metrics;

const LIMITS: Limits = Limits { max_rows: 10, max_requests: 4, max_bytes: 1000, max_wait: Duration::from_secs(10) };
const NOTHING: Queued = Queued { requests: 0, bytes: 0 };

fn desk() -> Arc<Desk> {
    Desk::new(LIMITS, Metrics::new("test", "none").version("m", "1"))
}

fn pile(client: u64, bytes: usize) -> Pile {
    Pile { client: Client(client), bytes, work: bytes, deadline: None }
}

fn sit(desk: &Arc<Desk>, client: u64, bytes: usize) -> Result<Seat, Error> {
    desk.sit(&pile(client, bytes), NOTHING, Instant::now())
}

fn refused(sat: Result<Seat, Error>) -> (Code, String) {
    let error = sat.err().expect("a refusal");
    (error.code, error.message)
}

/// What has come of it by now.
fn now<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// So much of a seat's work was read, in so many seconds.
fn read(turn: &Turn, seconds: u64, left: usize) {
    let bytes = turn.desk.state.lock().seats[&turn.number].bytes;
    turn.done(Duration::from_secs(seconds), left, bytes).unwrap();
}

fn is_bare(desk: &Desk) -> bool {
    let state = desk.state.lock();
    state.seats.is_empty()
        && state.parties.is_empty()
        && state.order.is_empty()
        && (state.unread, state.bytes, state.is_taken) == (0, 0, false)
}

#[test]
fn clients_take_turns_and_so_do_the_requests_of_each() {
    let desk = desk();
    let mut seats: Vec<Seat> = [1, 1, 1, 2].map(|client| sit(&desk, client, 10).unwrap()).into();
    let names = ["a", "b", "c", "other"];
    let mut asking: Vec<_> = seats.iter_mut().map(|seat| Some(Box::pin(seat.turn()))).collect();
    let first = asking[0].as_mut().and_then(|asked| now(asked.as_mut())).unwrap().unwrap();
    asking[0] = None;
    assert!(asking.iter_mut().flatten().all(|asked| now(asked.as_mut()).is_none()));
    let mut order = vec![names[0]];
    drop(first);
    while order.len() < names.len() {
        for (asked, name) in asking.iter_mut().zip(names) {
            if let Some(turn) = asked.as_mut().and_then(|asked| now(asked.as_mut())) {
                order.push(name);
                *asked = None;
                drop(turn.unwrap());
            }
        }
    }
    assert_eq!(order, ["a", "b", "other", "c"]);
    drop(asking);
    drop(seats);
    assert!(is_bare(&desk));
}

#[test]
fn a_turn_comes_again_after_those_of_all_others() {
    let desk = desk();
    let [mut one, mut other] = [1, 2].map(|client| sit(&desk, client, 10).unwrap());
    let turn = now(pin!(one.turn())).unwrap().unwrap();
    let mut waits = Box::pin(other.turn());
    assert!(now(waits.as_mut()).is_none(), "one at a time");
    drop(turn);
    let mut again = Box::pin(one.turn());
    assert!(now(again.as_mut()).is_none());
    drop(now(waits.as_mut()).unwrap().unwrap());
    drop(now(again.as_mut()).unwrap().unwrap());
}

#[test]
fn who_leaves_loses_no_turn_of_others() {
    let desk = desk();
    let mut seats: Vec<Seat> = (0..4).map(|client| sit(&desk, client, 10).unwrap()).collect();
    let [first, waits, leaves, last] = &mut seats[..] else { unreachable!() };
    let turn = now(pin!(first.turn())).unwrap().unwrap();
    let mut waits = Box::pin(waits.turn());
    let mut leaves = Box::pin(leaves.turn());
    let mut last = Box::pin(last.turn());
    assert!(now(waits.as_mut()).is_none() && now(leaves.as_mut()).is_none() && now(last.as_mut()).is_none());
    // It is its turn now, of which it never hears.
    drop(turn);
    drop(waits);
    drop(leaves);
    assert!(now(last.as_mut()).unwrap().is_ok());
}

#[test]
fn nobody_reads_for_who_has_left() {
    let desk = desk();
    let mut seat = sit(&desk, 1, 10).unwrap();
    let turn = now(pin!(seat.turn())).unwrap().unwrap();
    assert!(turn.is_wanted());
    drop(seat);
    assert!(!turn.is_wanted());
    // What was read meanwhile changes nothing.
    turn.done(Duration::from_secs(1), 0, 5000).unwrap();
    drop(turn);
    assert!(is_bare(&desk));
}

#[test]
fn a_full_desk_refuses_at_once() {
    let desk = desk();
    let mut seats: Vec<Seat> = (0..4).map(|client| sit(&desk, client, 10).unwrap()).collect();
    let full = "the queue is full: 4 requests wait (queue.max_requests)";
    assert_eq!(refused(sit(&desk, 9, 10)), (Code::Overloaded, full.to_owned()));
    seats.pop();
    drop(sit(&desk, 9, 10).unwrap());
    // What waits in the queue counts, too.
    let queued = Queued { requests: 1, bytes: 0 };
    let now = Instant::now();
    assert_eq!(refused(desk.sit(&pile(9, 10), queued, now)).1, full);
    let queued = Queued { requests: 0, bytes: 900 };
    let full = "the queue is full: 930 bytes wait (queue.max_bytes)";
    assert_eq!(refused(desk.sit(&pile(9, 71), queued, now)), (Code::Overloaded, full.to_owned()));
    drop(desk.sit(&pile(9, 70), queued, now).unwrap());
    // What has been read waits for its runs, with its bytes.
    seats[0].has_read();
    seats.push(sit(&desk, 9, 10).unwrap());
    seats.remove(0);
    assert_eq!(desk.state.lock().bytes, 30);
}

#[test]
fn who_is_alone_is_let_in() {
    let desk = desk();
    let queued = Queued { requests: 100, bytes: 5000 };
    let late = Pile { deadline: Some(Instant::now()), ..pile(1, 5000) };
    let mut seat = desk.sit(&late, queued, Instant::now()).unwrap();
    let turn = now(pin!(seat.turn())).unwrap().unwrap();
    turn.done(Duration::from_secs(100), 10, 50_000).unwrap();
    drop((turn, seat));
    drop(desk.sit(&late, queued, Instant::now()).unwrap());
    assert!(is_bare(&desk));
}

#[test]
fn nobody_is_let_in_to_wait_too_long_or_in_vain() {
    let desk = desk();
    let mut seat = sit(&desk, 1, 300).unwrap();
    let turn = now(pin!(seat.turn())).unwrap().unwrap();
    // A second for 100 bytes.
    read(&turn, 1, 200);
    let now = Instant::now();
    let within = |seconds| Some(now + Duration::from_secs(seconds));
    let of = |bytes, deadline| desk.sit(&Pile { deadline, ..pile(2, bytes) }, NOTHING, now);
    // Others have as many turns meanwhile as it has itself, and no more than they need.
    let message = "the deadline cannot be met: the estimated wait is 1s";
    assert_eq!(refused(of(100, within(2))), (Code::DeadlineExceeded, message.to_owned()));
    drop(of(100, within(3)).unwrap());
    let message = "the deadline cannot be met: the estimated wait is 2s";
    assert_eq!(refused(of(400, within(6))).1, message);
    drop(of(400, within(7)).unwrap());
    drop(of(400, None).unwrap());
    // Now for as much as 11 of them.
    turn.desk.state.lock().pace.observe(0, Duration::from_secs(30));
    let (code, message) = refused(of(200, None));
    assert!(message.ends_with("s (queue.max_wait)"), "{message}");
    assert_eq!(code, Code::Overloaded);
    drop(of(1, None).unwrap());
    drop((turn, seat));
    drop(of(200, within(0)).unwrap());
}

#[test]
fn who_has_most_makes_room() {
    let desk = desk();
    let mut flood: Vec<Seat> = (0..3).map(|_| sit(&desk, 1, 10).unwrap()).collect();
    let mut light = sit(&desk, 2, 10).unwrap();
    let [first, second, third] = &mut flood[..] else { unreachable!() };
    let turn = now(pin!(first.turn())).unwrap().unwrap();
    // The newest arrived leaves, wherever it stands.
    let mut third_asks = Box::pin(third.turn());
    assert!(now(third_asks.as_mut()).is_none());
    let mut asks = Box::pin(second.turn());
    let mut beside = Box::pin(light.turn());
    assert!(now(asks.as_mut()).is_none() && now(beside.as_mut()).is_none());
    assert!(sit(&desk, 1, 10).is_err(), "not for its own");
    let other = sit(&desk, 3, 10).unwrap();
    let error = now(third_asks.as_mut()).unwrap().err().unwrap();
    assert_eq!(error.code, Code::Overloaded);
    assert!(error.message.ends_with("wait (queue.max_requests), and other clients have less waiting than this one"));
    assert!(now(asks.as_mut()).is_none());
    drop(third_asks);
    assert_eq!(third.reason, Some(DropReason::Displaced));
    // With one more they would have as much as the other.
    assert!(sit(&desk, 3, 10).is_err());
    drop((turn, asks, beside));
    drop((flood, light, other));
    assert!(is_bare(&desk));
}

#[test]
fn who_has_most_bytes_makes_room_for_others() {
    let desk = desk();
    let mut flood: Vec<Seat> = (0..2).map(|_| sit(&desk, 1, 450).unwrap()).collect();
    let mut asking: Vec<_> = flood.iter_mut().map(|seat| Box::pin(seat.turn())).collect();
    let turns: Vec<_> = asking.iter_mut().map(|asked| now(asked.as_mut())).collect();
    assert!(turns[0].is_some() && turns[1].is_none());
    assert!(sit(&desk, 2, 900).is_err(), "it would have as much then");
    let light = sit(&desk, 2, 200).unwrap();
    assert!(now(asking[1].as_mut()).unwrap().is_err());
    drop((turns, asking));
    drop((flood, light));
    assert!(is_bare(&desk));
}

#[test]
fn tokens_count_and_the_newest_make_room_for_them() {
    let desk = desk();
    let mut seats: Vec<Seat> = (0..3).map(|client| sit(&desk, client, 100).unwrap()).collect();
    let [first, second, third] = &mut seats[..] else { unreachable!() };
    let turn = now(pin!(first.turn())).unwrap().unwrap();
    let mut third_asks = Box::pin(third.turn());
    let mut second_asks = Box::pin(second.turn());
    assert!(now(second_asks.as_mut()).is_none() && now(third_asks.as_mut()).is_none());
    turn.done(Duration::from_millis(1), 50, 800).unwrap();
    assert_eq!(desk.state.lock().bytes, 1000);
    assert!(now(third_asks.as_mut()).is_none());
    turn.done(Duration::from_millis(1), 10, 810).unwrap();
    let error = now(third_asks.as_mut()).unwrap().err().unwrap();
    assert_eq!(error.message, "the queue is full: 1010 bytes wait (queue.max_bytes), texts and their tokens");
    drop(turn);
    let turn = now(second_asks.as_mut()).unwrap().unwrap();
    let error = turn.done(Duration::from_millis(1), 0, 300).unwrap_err();
    assert_eq!(error.code, Code::Overloaded, "there is nobody left to put out");
    drop((turn, third_asks, second_asks));
    second.fails(&error, false);
    assert_eq!(second.reason, Some(DropReason::Overloaded));
    drop(seats);
    assert!(is_bare(&desk));
}

proptest::proptest! {
    #[test]
    fn whatever_happens_nothing_is_left_behind(
        steps in proptest::collection::vec((0_u64..3, 1_usize..400, 0_u8..5), 1..60)
    ) {
        let desk = desk();
        let mut seats: Vec<Seat> = Vec::new();
        let mut turn: Option<Turn> = None;
        for (client, bytes, step) in steps {
            match step {
                0 | 1 => seats.extend(sit(&desk, client, bytes)),
                2 if !seats.is_empty() => drop(seats.remove(bytes % seats.len())),
                3 => {
                    // Who is told of nothing at once leaves.
                    if let Some(seat) = seats.first_mut() {
                        turn = now(pin!(seat.turn())).and_then(Result::ok).or(turn);
                    }
                }
                _ => {
                    if let Some(turn) = turn.take()
                        && turn.done(Duration::from_millis(1), bytes / 2, bytes * 2).is_err()
                    {
                        seats.retain(|seat| seat.number != turn.number);
                    }
                }
            }
            let state = desk.state.lock();
            let sum = |of: fn(&Sitting) -> usize| state.seats.values().map(of).sum::<usize>();
            assert_eq!(state.bytes, sum(|seat| seat.bytes));
            assert_eq!(state.unread, sum(|seat| usize::from(!seat.is_read)));
            assert!(state.unread <= LIMITS.max_requests);
            assert!(state.bytes <= LIMITS.max_bytes || state.seats.len() == 1);
            assert_eq!(state.parties.values().map(|party| party.bytes).sum::<usize>(), state.bytes);
            assert_eq!(state.parties.values().map(|party| party.work).sum::<usize>(), sum(|seat| seat.work));
        }
        drop(seats);
        drop(turn);
        assert!(is_bare(&desk));
    }
}
