//! The policy, by example and by property.

use proptest::prelude::*;

use super::*;
use crate::{
    error::{Code, Error},
    model::schedule::TimeoutAction,
};

mod fair;
mod lengths;
mod simulated;

const LIMITS: Limits = Limits { max_rows: 100, max_requests: 100, max_bytes: 1000, max_wait: Duration::from_secs(30) };

fn cost(rows: usize, shape: usize) -> Cost {
    Cost {
        rows,
        lengths: Lengths::NONE,
        follows: false,
        bytes: rows,
        shape: ShapeKey::from_slice(&[shape]),
        alone: false,
        place: Place::default(),
        client: Client::default(),
    }
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
    (batcher.lanes.iter().map(|lane| lane.work).sum(), batcher.bytes, batcher.len(), waiting)
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
fn who_cannot_be_in_time_any_more_yields_to_those_who_can() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(1, ms(20)), (2, ms(40))]);
    let mut batcher = Batcher::new(LIMITS, &Schedule::default(), 1, 1, service);
    batcher.push(0, until(Some(now + ms(100))), now).unwrap();
    batcher.push(1, cost(1, 1), now).unwrap();
    let next = batcher.next(now + ms(90), |_| false);
    assert_eq!(items(&next), [1]);
    let dropped: Vec<_> = next.dropped.iter().map(|(entry, reason)| (entry.item, *reason)).collect();
    assert_eq!(dropped, [(0, DropReason::Deadline)]);
    batcher.finished(now + ms(90), 1, None);
    batcher.push(2, until(Some(now + ms(100))), now + ms(90)).unwrap();
    assert_eq!(items(&batcher.next(now + ms(90), |_| false)), [2], "with nobody else there, the estimate is tried");
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
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

/// The schedule that `text`, the table `[queue]`, describes.
fn scheduled(text: &str, group: usize, executors: usize) -> Batcher<usize> {
    let schedule: Schedule = toml::from_str(text).unwrap();
    Batcher::new(LIMITS, &schedule, group, executors, ServiceTime::default())
}

const THREE_LEVELS: &str = "priority_levels = 3\ndefault_priority = 2\n";

#[test]
fn only_the_front_of_each_level_expires() {
    let now = Instant::now();
    let later = now + Duration::from_millis(10);
    let schedule = Schedule { priority_levels: 2, default_priority: 1, ..Schedule::default() };
    let mut batcher = Batcher::new(LIMITS, &schedule, 8, 1, ServiceTime::default());
    // In the first level the front is over and the next is not; in the second the front still waits.
    for (item, level, expires) in [(0, 0, now), (1, 0, later), (2, 0, now), (3, 1, later), (4, 1, now)] {
        batcher.push(item, in_level(level, 1, Some(expires)), now - Duration::from_millis(1)).unwrap();
    }
    let expired: Vec<usize> = batcher.expire(now, |_| false).into_iter().map(|(entry, _)| entry.item).collect();
    assert_eq!(expired, [0]);
    assert_eq!(batcher.len(), 4);
    let cancelled: Vec<usize> =
        batcher.expire(now, |&item| item == 1).into_iter().map(|(entry, _)| entry.item).collect();
    assert_eq!(cancelled, [1, 2], "what is gone makes way for what is over");
}

/// A request of the level with index `level` whose queue timeout ends at `expires`.
fn in_level(level: usize, shape: usize, expires: Option<Instant>) -> Cost {
    Cost { place: Place { level, deadline: None, expires }, ..cost(1, shape) }
}

const fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

#[test]
fn higher_levels_run_first_and_lower_ones_fill_up() {
    let now = Instant::now();
    let mut batcher = scheduled(THREE_LEVELS, 3, 1);
    for (item, (level, shape)) in [(2, 1), (1, 1), (1, 2), (0, 2), (2, 2)].into_iter().enumerate() {
        batcher.push(item, in_level(level, shape, None), now).unwrap();
    }
    assert_eq!(items(&batcher.next(now, |_| false)), [3, 2, 4], "the highest level's shape, one level after another");
    assert_eq!(items(&batcher.next(now, |_| false)), [1, 0]);
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
}

#[test]
fn a_level_that_is_full_says_so_and_the_others_take_more() {
    let now = Instant::now();
    let mut batcher = scheduled(&format!("{THREE_LEVELS}max_size = 2\n[priority.1]\nmax_size = 1"), 1, 1);
    let mut push = |item, level| batcher.push(item, in_level(level, 1, None), now).map_err(|(_, error)| error);
    push(0, 0).unwrap();
    let error = push(1, 0).unwrap_err();
    assert_eq!(error.code, Code::Overloaded);
    assert!(error.message.contains("level 1") && error.message.contains("queue.max_size"), "{}", error.message);
    push(2, 1).unwrap();
    push(3, 1).unwrap();
    assert_eq!(push(4, 1).unwrap_err().code, Code::Overloaded);
    assert_eq!(items(&batcher.next(now, |_| false)), [0]);
    batcher.push(5, in_level(0, 1, None), now).unwrap();
}

#[test]
fn only_what_is_ahead_counts_for_the_wait() {
    let now = Instant::now();
    let schedule: Schedule = toml::from_str(THREE_LEVELS).unwrap();
    let service = ServiceTime::from_sweep(&[(1, Duration::from_secs(1)), (2, Duration::from_secs(2))]);
    let mut batcher = Batcher::new(LIMITS, &schedule, 1, 1, service);
    for item in 0..5 {
        batcher.push(item, in_level(1, 1, None), now).unwrap();
    }
    let seconds = [0, 1, 2]
        .map(|level| batcher.estimated_wait(level, batcher.lanes[level].ahead(u64::MAX), now).as_secs_f64().round());
    assert_eq!(seconds, [0.0, 5.0, 5.0]);
    batcher.next(now, |_| false);
    let seconds = [0, 1, 2]
        .map(|level| batcher.estimated_wait(level, batcher.lanes[level].ahead(u64::MAX), now).as_secs_f64().round());
    assert_eq!(seconds, [1.0, 5.0, 5.0], "the run in progress is ahead of everyone");
}

#[test]
fn an_idle_executor_waits_for_company_and_not_for_ever() {
    let now = Instant::now();
    let mut batcher = scheduled("max_delay = '10ms'", 3, 1);
    batcher.push(0, cost(1, 1), now).unwrap();
    batcher.push(1, cost(1, 2), now + ms(4)).unwrap();
    let next = batcher.next(now + ms(4), |_| false);
    assert_eq!((items(&next), next.wake_at), (vec![], Some(now + ms(10))));
    let next = batcher.next(now + ms(10), |_| false);
    assert_eq!(items(&next), [0], "as it is");
    let next = batcher.next(now + ms(10), |_| false);
    assert_eq!((items(&next), next.wake_at), (vec![], Some(now + ms(14))));
    batcher.push(2, cost(1, 1), now + ms(11)).unwrap();
    batcher.push(3, cost(2, 2), now + ms(11)).unwrap();
    assert_eq!(items(&batcher.next(now + ms(11), |_| false)), [1, 3], "complete, whoever came first");
    batcher.hurry();
    assert_eq!(items(&batcher.next(now + ms(11), |_| false)), [2]);
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
}

#[test]
fn who_cannot_be_joined_does_not_wait() {
    let now = Instant::now();
    let mut batcher = scheduled("max_delay = '10ms'", 4, 1);
    batcher.push(0, Cost { alone: true, ..cost(1, 1) }, now).unwrap();
    batcher.push(1, cost(4, 1), now).unwrap();
    batcher.push(2, cost(3, 1), now).unwrap();
    batcher.push(3, cost(2, 1), now).unwrap();
    assert_eq!(items(&batcher.next(now, |_| false)), [0]);
    assert_eq!(items(&batcher.next(now, |_| false)), [1]);
    assert_eq!(items(&batcher.next(now, |_| false)), [2], "the next one does not fit");
    assert_eq!(items(&batcher.next(now, |_| false)), [0usize; 0]);
}

#[test]
fn batches_are_cut_to_a_preferred_size() {
    let now = Instant::now();
    let mut batcher = scheduled("preferred_batch_sizes = [8, 2, 4]", 8, 1);
    (0..15).for_each(|item| drop(batcher.push(item, cost(1, 1), now).unwrap()));
    let sizes: Vec<usize> = (0..5).map(|_| items(&batcher.next(now, |_| false)).len()).collect();
    assert_eq!(sizes, [8, 4, 2, 1, 0], "what reaches none goes as it is when nothing makes it wait");

    let mut batcher = scheduled("preferred_batch_sizes = [4]\nmax_delay = '10ms'", 4, 1);
    (0..7).for_each(|item| drop(batcher.push(item, cost(1, 1), now).unwrap()));
    assert_eq!(items(&batcher.next(now, |_| false)), [0, 1, 2, 3]);
    let next = batcher.next(now, |_| false);
    assert_eq!((items(&next), next.wake_at), (vec![], Some(now + ms(10))));
    assert_eq!(items(&batcher.next(now + ms(10), |_| false)), [4, 5, 6]);
}

#[test]
fn waiting_for_company_turns_no_order_around() {
    let now = Instant::now();
    let mut batcher = scheduled(&format!("{THREE_LEVELS}max_delay = '10ms'"), 2, 1);
    batcher.push(0, in_level(0, 1, None), now).unwrap();
    batcher.push(1, in_level(2, 2, None), now).unwrap();
    assert!(batcher.next(now, |_| false).batch.is_empty());
    batcher.push(2, in_level(2, 2, None), now).unwrap();
    assert_eq!(items(&batcher.next(now, |_| false)), [0], "or the executor would be busy with less urgent requests");
    assert_eq!(items(&batcher.next(now, |_| false)), [1, 2]);
    // Others of its shape complete a batch from whatever level.
    batcher.push(3, in_level(2, 1, None), now).unwrap();
    batcher.push(4, in_level(1, 1, None), now).unwrap();
    assert_eq!(items(&batcher.next(now, |_| false)), [4, 3]);
}

#[test]
fn a_complete_batch_passes_a_waiting_request_over_only_so_often() {
    let now = Instant::now();
    let mut batcher = scheduled("max_delay = '1h'", 2, 1);
    batcher.push(0, cost(1, 1), now).unwrap();
    for round in 0..=usize::from(MAX_PASSED_OVER) {
        let pair = [2 * round + 1, 2 * round + 2];
        pair.iter().for_each(|&item| drop(batcher.push(item, cost(1, 2), now).unwrap()));
        let expected = if round < usize::from(MAX_PASSED_OVER) { pair.to_vec() } else { vec![0] };
        assert_eq!(items(&batcher.next(now, |_| false)), expected);
    }
}

#[test]
fn company_costs_nobody_the_deadline() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(1, ms(20)), (2, ms(40))]);
    let schedule: Schedule = toml::from_str("max_delay = '1s'").unwrap();
    let mut batcher = Batcher::new(LIMITS, &schedule, 4, 1, service);
    batcher.push(0, until(Some(now + ms(100))), now).unwrap();
    let wake_at = batcher.next(now, |_| false).wake_at.unwrap();
    assert!(wake_at.duration_since(now).abs_diff(ms(40)) < ms(1), "half of what the run leaves");
    batcher.push(1, until(Some(now + ms(25))), now).unwrap();
    assert_eq!(items(&batcher.next(wake_at, |_| false)), [0], "the second one's time is over");
    batcher.finished(wake_at, 1, None);
    (2..6).for_each(|item| drop(batcher.push(item, until(Some(wake_at + ms(30))), wake_at).unwrap()));
    assert_eq!(items(&batcher.next(wake_at, |_| false)), [2, 3, 4, 5], "those held back do not make others wait");
}

#[test]
fn what_fills_batches_is_ahead_of_others_though_no_run_has_begun() {
    let now = Instant::now();
    for text in ["", "max_delay = '10ms'"] {
        let service = ServiceTime::from_sweep(&[(1, ms(20)), (4, ms(80))]);
        let schedule: Schedule = toml::from_str(text).unwrap();
        let mut batcher = Batcher::new(LIMITS, &schedule, 4, 1, service);
        (0..40).for_each(|item| drop(batcher.push(item, cost(1, 1), now).unwrap()));
        let error = batcher.push(40, until(Some(now + ms(100))), now).unwrap_err().1;
        assert_eq!(error.code, Code::DeadlineExceeded, "{text}");
        batcher.push(41, until(Some(now + ms(2000))), now).unwrap();
    }
}

#[test]
fn who_waited_too_long_is_rejected_or_steps_back() {
    let now = Instant::now();
    let mut batcher = scheduled(&format!("{THREE_LEVELS}[priority.1]\ntimeout_action = 'delay'\nmax_size = 2"), 1, 1);
    batcher.push(0, in_level(0, 1, Some(now + ms(5))), now).unwrap();
    batcher.push(1, in_level(0, 1, None), now).unwrap();
    batcher.push(2, in_level(1, 1, Some(now + ms(5))), now).unwrap();
    batcher.push(3, in_level(2, 1, None), now).unwrap();
    let later = now + ms(5);
    assert_eq!(items(&batcher.next(later, |_| false)), [1]);
    assert!(batcher.push(4, in_level(0, 1, None), later).is_ok(), "one of two waits, though it is late");
    assert_eq!(batcher.push(5, in_level(0, 1, None), later).unwrap_err().1.code, Code::Overloaded);
    assert_eq!(items(&batcher.next(later, |_| false)), [4]);
    let next = batcher.next(later, |_| false);
    assert_eq!(items(&next), [3]);
    let dropped: Vec<_> = next.dropped.iter().map(|(entry, reason)| (entry.item, *reason)).collect();
    assert_eq!(dropped, [(2, DropReason::Timeout)]);
    assert_eq!(items(&batcher.next(later, |_| false)), [0], "nothing else is left");
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
}

#[test]
fn an_executor_does_not_sleep_over_who_left_at_its_first_look() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(1, ms(20)), (2, ms(40))]);
    let schedule: Schedule = toml::from_str("max_delay = '100ms'\ntimeout_action = 'delay'").unwrap();
    let mut batcher = Batcher::new(LIMITS, &schedule, 4, 1, service);
    batcher.push(0, cost(1, 1), now).unwrap();
    batcher.push(1, in_level(0, 2, Some(now + ms(5))), now).unwrap();
    batcher.push(2, Cost { rows: 4, shape: ShapeKey::from_slice(&[3]), ..until(Some(now + ms(60))) }, now).unwrap();
    // The last one fills a batch, and would be too late; the second steps back.
    assert_eq!(items(&batcher.next(now + ms(10), |_| false)), [0]);
}

#[test]
fn the_late_are_dropped_when_they_are_dead() {
    let now = Instant::now();
    let mut batcher = scheduled("timeout_action = 'delay'", 1, 1);
    let place = Place { level: 0, deadline: Some(now + ms(20)), expires: Some(now + ms(5)) };
    batcher.push(0, Cost { place, ..cost(1, 1) }, now).unwrap();
    batcher.push(1, Cost { place: Place { deadline: None, ..place }, ..cost(1, 1) }, now).unwrap();
    batcher.push(2, cost(1, 1), now).unwrap();
    assert_eq!(items(&batcher.next(now + ms(10), |_| false)), [2]);
    assert_eq!(batcher.purge(now + ms(20), |_| false).len(), 1);
    assert_eq!(batcher.purge(now + ms(20), |&item| item == 1).len(), 1);
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
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

    /// Whatever the schedule: nothing is lost or doubled, order holds within level and shape, the highest level leads,
    /// the late come last, batches keep their limits, and nothing is held back for longer than the delay.
    #[test]
    fn a_schedule_is_kept(
        requests in proptest::collection::vec(
            // Rows, shape, level, queue timeout in ms (0: none), ms since the one before, given up.
            (1usize..6, 0usize..3, 0usize..3, prop_oneof![Just(0u64), 1u64..30], 0u64..4, proptest::bool::weighted(0.1)),
            0..60,
        ),
        preferred in proptest::collection::vec(1usize..9, 0..3),
        knee in 1usize..9,
        delay in prop_oneof![Just(0u64), 1u64..12],
        reject in any::<bool>(),
        every in 1usize..6,
    ) {
        let group = preferred.iter().copied().max().unwrap_or(knee);
        let schedule = Schedule {
            max_delay: ms(delay),
            preferred_batch_sizes: preferred.clone(),
            priority_levels: 3,
            default_priority: 1,
            timeout_action: if reject { TimeoutAction::Reject } else { TimeoutAction::Delay },
            ..Schedule::default()
        };
        let limits = Limits { max_bytes: usize::MAX, ..LIMITS };
        let mut batcher: Batcher<usize> = Batcher::new(limits, &schedule, group, 1, ServiceTime::default());
        let start = Instant::now();
        let mut now = start;
        let gone = |&item: &usize| requests[item].5;
        let shape = |item: usize| requests[item].1;
        let late = |entry: &Entry<usize>, now: Instant| entry.cost.place.expires.is_some_and(|end| end <= now);
        let mut waiting: Vec<(usize, Cost, Instant)> = Vec::new();
        let mut ran: Vec<usize> = Vec::new();
        let mut ran_late = std::collections::HashSet::new();

        let mut look = |batcher: &mut Batcher<usize>, waiting: &mut Vec<(usize, Cost, Instant)>, now: Instant|
         -> Result<Option<Instant>, TestCaseError> {
            let next = batcher.next(now, gone);
            for (entry, reason) in &next.dropped {
                let expected = if gone(&entry.item) { DropReason::Cancelled } else { DropReason::Timeout };
                prop_assert_eq!(*reason, expected);
                prop_assert!(gone(&entry.item) || (reject && late(entry, now)));
                let index = waiting.iter().position(|known| known.0 == entry.item);
                prop_assert!(index.is_some(), "{} twice", entry.item);
                waiting.swap_remove(index.unwrap());
            }
            let alive = |item: usize| !gone(&item);
            let in_time = |known: &&(usize, Cost, Instant)| {
                alive(known.0) && known.1.place.expires.is_none_or(|end| end > now)
            };
            let Some(first) = next.batch.first() else {
                let oldest = waiting.iter().filter(in_time).map(|known| known.2).min();
                prop_assert_eq!(next.wake_at.is_some(), oldest.is_some());
                if let (Some(wake_at), Some(oldest)) = (next.wake_at, oldest) {
                    prop_assert!(now < wake_at && wake_at <= oldest + ms(delay));
                    prop_assert!(wake_at > now, "a busy loop");
                }
                return Ok(next.wake_at);
            };
            prop_assert_eq!(next.wake_at, None);
            let highest = waiting.iter().filter(in_time).map(|known| known.1.place.level).min();
            prop_assert!(next.batch.iter().all(|entry| late(entry, now) == highest.is_none()), "the late come last");
            prop_assert!(highest.is_none_or(|level| first.cost.place.level == level), "the highest level leads");
            let levels: Vec<usize> = next.batch.iter().map(|entry| entry.cost.place.level).collect();
            prop_assert!(highest.is_none() || levels.is_sorted(), "{:?}", levels);
            let rows: usize = next.batch.iter().map(|entry| entry.cost.rows).sum();
            prop_assert!(rows <= group || next.batch.len() == 1, "{} rows of {}", rows, group);
            prop_assert!(next.batch.iter().all(|entry| shape(entry.item) == shape(first.item)));
            for entry in &next.batch {
                let index = waiting.iter().position(|known| known.0 == entry.item);
                prop_assert!(index.is_some(), "{} twice", entry.item);
                waiting.swap_remove(index.unwrap());
                ran.push(entry.item);
                if late(entry, now) {
                    ran_late.insert(entry.item);
                }
            }
            batcher.finished(now, rows, None);
            Ok(Some(now))
        };

        for (index, &(rows, shape, level, timeout, pause, _)) in requests.iter().enumerate() {
            now += ms(pause);
            let expires = (timeout > 0).then(|| now + ms(timeout));
            let cost = Cost { rows, ..in_level(level, shape, expires) };
            waiting.push((index, cost.clone(), now));
            batcher.push(index, cost, now).unwrap();
            if index % every == 0 {
                look(&mut batcher, &mut waiting, now)?;
            }
        }
        while let Some(instant) = look(&mut batcher, &mut waiting, now)? {
            now = now.max(instant);
        }
        prop_assert!(waiting.is_empty(), "{:?}", waiting);
        prop_assert_eq!(counts(&batcher), (0, 0, 0, 0));
        prop_assert!(batcher.running.is_empty());
        for level in 0..3 {
            for of in 0..3 {
                let in_order = |item: &&usize| {
                    requests[**item].1 == of && requests[**item].2 == level && !ran_late.contains(*item)
                };
                let order: Vec<usize> = ran.iter().filter(in_order).copied().collect();
                prop_assert!(order.is_sorted(), "level {} shape {}: {:?}", level, of, order);
            }
        }
    }
}
