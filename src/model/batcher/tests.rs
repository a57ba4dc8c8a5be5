//! The policy, by example and by property.

use proptest::prelude::*;

use super::*;
use crate::error::Code;

const LIMITS: Limits = Limits { max_requests: 100, max_bytes: 1000, max_wait: Duration::from_secs(30) };

fn cost(rows: usize, shape: usize) -> Cost {
    Cost { rows, bytes: rows, shape: ShapeKey::from_slice(&[shape]), alone: false, place: Place::default() }
}

fn batcher(group: usize) -> Batcher<usize> {
    Batcher::new(LIMITS, &Schedule::default(), group, 1, ServiceTime::default())
}

fn until(deadline: Option<Instant>) -> Cost {
    Cost { place: Place { deadline, ..Place::default() }, ..cost(1, 1) }
}

/// Rows, bytes, requests, and requests by level: all zero when nothing waits.
fn counts<T>(batcher: &Batcher<T>) -> (usize, usize, usize, usize) {
    let waiting = batcher.lanes.iter().map(|lane| lane.waiting).sum();
    (batcher.lanes.iter().map(|lane| lane.rows).sum(), batcher.bytes, batcher.len(), waiting)
}

fn items(next: &Next<usize>) -> Vec<usize> {
    next.batch.iter().map(|entry| entry.item).collect()
}

#[test]
fn same_shapes_join_up_to_the_group() {
    let now = Instant::now();
    let mut batcher = batcher(4);
    for (item, rows) in [1, 2, 2, 1].into_iter().enumerate() {
        batcher.push(item, cost(rows, 7), now).unwrap();
    }
    // The third does not fit, and the fourth may not overtake it.
    assert_eq!(items(&batcher.next(now, |_| false)), [0, 1]);
    assert_eq!(items(&batcher.next(now, |_| false)), [2, 3]);
    assert!(batcher.next(now, |_| false).batch.is_empty());
}

#[test]
fn a_large_or_lonely_request_runs_by_itself() {
    let now = Instant::now();
    let mut batcher = batcher(4);
    batcher.push(0, cost(9, 1), now).unwrap();
    batcher.push(1, Cost { alone: true, ..cost(1, 1) }, now).unwrap();
    batcher.push(2, cost(1, 1), now).unwrap();
    assert_eq!(items(&batcher.next(now, |_| false)), [0]);
    assert_eq!(items(&batcher.next(now, |_| false)), [1]);
    assert_eq!(items(&batcher.next(now, |_| false)), [2]);
}

#[test]
fn nobody_is_passed_over_more_often_than_allowed() {
    let now = Instant::now();
    let mut batcher = batcher(2);
    batcher.push(0, cost(1, 1), now).unwrap();
    batcher.push(99, cost(1, 2), now).unwrap();
    let mut overtaken = 0;
    for item in 1..20 {
        batcher.push(item, cost(1, 1), now).unwrap();
        batcher.push(item + 100, cost(1, 1), now).unwrap();
        let batch = items(&batcher.next(now, |_| false));
        if batch.contains(&99) {
            break;
        }
        overtaken += usize::from(batch.iter().any(|&item| item != 0));
    }
    assert!(overtaken <= usize::from(MAX_PASSED_OVER), "{overtaken}");
}

#[test]
fn dead_requests_cost_no_run() {
    let now = Instant::now();
    let mut batcher = batcher(8);
    let deadline = Some(now + Duration::from_millis(5));
    batcher.push(0, until(deadline), now).unwrap();
    batcher.push(1, cost(1, 1), now).unwrap();
    batcher.push(2, cost(1, 1), now).unwrap();
    let next = batcher.next(now + Duration::from_millis(5), |&item| item == 1);
    assert_eq!(items(&next), [2]);
    let dropped: Vec<_> = next.dropped.iter().map(|(entry, reason)| (entry.item, *reason)).collect();
    assert_eq!(dropped, [(0, DropReason::Deadline), (1, DropReason::Cancelled)]);
}

#[test]
fn the_dead_leave_room_for_the_living() {
    let now = Instant::now();
    let mut batcher =
        Batcher::new(Limits { max_requests: 2, ..LIMITS }, &Schedule::default(), 1, 1, ServiceTime::default());
    batcher.push(0, cost(1, 1), now).unwrap();
    batcher.push(1, cost(1, 1), now).unwrap();
    assert_eq!(batcher.purge(now, |&item| item == 0).len(), 1);
    batcher.push(2, cost(1, 1), now).unwrap();
    assert_eq!(items(&batcher.next(now, |_| false)), [1]);
    assert_eq!(items(&batcher.next(now, |_| false)), [2]);
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
}

#[test]
fn limits_answer_overloaded() {
    let now = Instant::now();
    let limits = Limits { max_requests: 2, ..LIMITS };
    let mut batcher = Batcher::new(limits, &Schedule::default(), 1, 1, ServiceTime::default());
    batcher.push(0, cost(1, 1), now).unwrap();
    batcher.push(1, cost(1, 1), now).unwrap();
    let (item, error) = batcher.push(2, cost(1, 1), now).unwrap_err();
    assert_eq!((item, error.code), (2, Code::Overloaded));

    let mut batcher = self::batcher(1);
    batcher.push(0, Cost { bytes: 5000, ..cost(1, 1) }, now).unwrap();
    assert_eq!(batcher.push(1, cost(1, 1), now).unwrap_err().1.code, Code::Overloaded);
}

#[test]
fn estimates_refuse_hopeless_deadlines_and_endless_queues() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(1, Duration::from_secs(1)), (2, Duration::from_secs(2))]);
    let mut batcher = Batcher::new(LIMITS, &Schedule::default(), 1, 1, service);
    let hurried = until(Some(now + Duration::from_millis(1)));
    // An idle executor is always worth a try, or a wrong estimate could never mend itself.
    batcher.push(0, hurried.clone(), now).unwrap();
    assert_eq!(batcher.push(1, hurried, now).unwrap_err().1.code, Code::DeadlineExceeded);
    let refused = (2..60).find_map(|item| batcher.push(item, cost(1, 1), now).err().map(|(_, error)| (item, error)));
    let (item, error) = refused.unwrap();
    assert_eq!(error.code, Code::Overloaded);
    assert!((30..34).contains(&item), "{item}");
}

proptest! {
    /// Nothing is lost, doubled, reordered within a shape, or grouped beyond the limit.
    #[test]
    fn every_request_runs_exactly_once_and_in_order(
        requests in proptest::collection::vec((1usize..6, 0usize..3, any::<bool>()), 0..80),
        group in 1usize..9,
        every in 1usize..5,
    ) {
        let now = Instant::now();
        let mut batcher = Batcher::new(Limits { max_bytes: usize::MAX, ..LIMITS }, &Schedule::default(), group, 1, ServiceTime::default());
        let mut ran = Vec::new();
        let mut take = |batcher: &mut Batcher<(usize, usize)>| -> Result<bool, TestCaseError> {
            let next = batcher.next(now, |_| false);
            prop_assert!(next.dropped.is_empty());
            let rows: usize = next.batch.iter().map(|entry| entry.cost.rows).sum();
            prop_assert!(rows <= group || next.batch.len() == 1);
            prop_assert!(next.batch.iter().all(|entry| entry.item.1 == next.batch[0].item.1));
            prop_assert!(next.batch.len() == 1 || next.batch.iter().all(|entry| !entry.cost.alone));
            batcher.finished(now, rows, None);
            ran.extend(next.batch.iter().map(|entry| entry.item));
            Ok(!next.batch.is_empty())
        };
        for (index, &(rows, shape, alone)) in requests.iter().enumerate() {
            batcher.push((index, shape), Cost { alone, ..cost(rows, shape) }, now).unwrap();
            if index % every == 0 {
                take(&mut batcher)?;
            }
        }
        while take(&mut batcher)? {}
        prop_assert_eq!(ran.len(), requests.len());
        for shape in 0..3 {
            let of_shape: Vec<usize> = ran.iter().filter(|item| item.1 == shape).map(|item| item.0).collect();
            prop_assert!(of_shape.is_sorted(), "{:?}", of_shape);
            prop_assert_eq!(of_shape.len(), requests.iter().filter(|request| request.1 == shape).count());
        }
        prop_assert_eq!(counts(&batcher), (0, 0, 0, 0));
        prop_assert!(batcher.running.is_empty());
    }
}
