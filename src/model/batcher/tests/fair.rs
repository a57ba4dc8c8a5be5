//! Clients that share a queue: who runs, who waits, and who is let in.

use super::{
    simulated::{LINEAR, Outcome, SLOPE, SPIN, WIDE, answered, merged, poisson, quantile, simulate},
    *,
};

fn of(client: u64, rows: usize) -> Cost {
    Cost { client: Client(client), ..cost(rows, 1) }
}

/// A batcher of groups of `group` whose executor is busy.
fn busy(group: usize, limits: Limits) -> (Batcher<usize>, Instant) {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(1, ms(1000)), (2, ms(2000))]);
    let mut batcher = Batcher::new(limits, &Schedule::default(), group, 1, service);
    batcher.push(usize::MAX, of(99, 1), now).unwrap();
    assert_eq!(batcher.next(now, |_| false).batch.len(), 1);
    (batcher, now)
}

#[test]
fn a_light_client_beside_a_flooder_waits_hardly_longer_than_alone() {
    for (model, seconds) in [(SPIN, 4.0), (SLOPE, 15.0), (LINEAR, 300.0)] {
        let deadline = Some(ms(100));
        let light = poisson(1, 1, 0.1 * model.saturation(), seconds, deadline);
        let flood = poisson(2, 2, model.saturation(), seconds, deadline);
        let alone = quantile(&answered(&simulate(model, WIDE, &light)), 0.99);
        let both = merged(vec![light.clone(), flood]);
        let outcomes = simulate(model, WIDE, &both);
        let of_light: Vec<Outcome> =
            both.iter().zip(&outcomes).filter(|(arrival, _)| arrival.cost.client.0 == 1).map(|(_, &it)| it).collect();
        let beside = answered(&of_light);
        assert_eq!(beside.len(), light.len(), "all of them in time");
        let batch = model.run(model.group).as_secs_f64();
        let beside = quantile(&beside, 0.99);
        assert!(beside <= 1.2 * alone + batch, "{beside} beside, {alone} alone, {batch} a batch");
    }
}

#[test]
fn the_next_batch_is_not_filled_with_the_flood() {
    let (mut batcher, now) = busy(8, WIDE);
    (0..100).for_each(|item| drop(batcher.push(item, of(1, 1), now).unwrap()));
    batcher.push(1000, of(2, 1), now).unwrap();
    batcher.push(1001, of(3, 1), now).unwrap();
    batcher.push(1002, of(2, 1), now).unwrap();
    assert_eq!(items(&batcher.next(now, |_| false)), [0, 1, 2, 3, 4, 1000, 1001, 1002], "beyond what can be saved");
    assert_eq!(items(&batcher.next(now, |_| false)), [5, 6, 7, 8, 9, 10, 11, 12]);
}

#[test]
fn turns_are_counted_in_cost_and_not_in_requests() {
    let (mut batcher, now) = busy(8, WIDE);
    for item in 0..400 {
        batcher.push(item, of(1, 8), now).unwrap();
        batcher.push(1000 + item, of(2, 1), now).unwrap();
    }
    let mut rows = [0, 0];
    for _ in 0..60 {
        for entry in batcher.next(now, |_| false).batch {
            rows[usize::from(entry.item >= 1000)] += entry.cost.rows;
            assert!(rows[0].abs_diff(rows[1]) <= 8, "{rows:?}");
        }
    }
    assert!(rows[0] >= 200, "{rows:?}");

    // Who does not share runs pays whole ones: here a run of 1 row costs as much as one of 8.
    let mut batcher = SPIN.batcher(WIDE);
    for item in 0..400 {
        batcher.push(item, Cost { alone: true, ..of(1, 1) }, now).unwrap();
        batcher.push(1000 + item, of(2, 1), now).unwrap();
    }
    let runs: Vec<usize> = (0..80).map(|_| batcher.next(now, |_| false).batch.len()).collect();
    let alone = runs.iter().filter(|&&size| size == 1).count();
    assert!((35..=45).contains(&alone), "{alone} of 80: {runs:?}");
}

#[test]
fn nobody_gets_ahead_by_sending_one_after_the_other() {
    let (mut batcher, now) = busy(1, WIDE);
    (0..100).for_each(|item| drop(batcher.push(item, of(1, 1), now).unwrap()));
    let mut ran = [0, 0, 0];
    for run in 0..60 {
        if run == 30 {
            // What they had saved is used up.
            ran = [0, 0, 0];
        }
        // Two clients that have never more than one request waiting, and one that has all of them.
        for client in [2, 3] {
            if !batcher.lanes[0].iter().any(|entry| entry.cost.client.0 == client) {
                batcher.push(0, of(client, 1), now).unwrap();
            }
        }
        ran[batcher.next(now, |_| false).batch[0].cost.client.0 as usize - 1] += 1;
    }
    assert_eq!(ran, [10, 10, 10]);
}

#[test]
fn clients_that_are_always_new_starve_nobody() {
    let (mut batcher, now) = busy(1, WIDE);
    (0..10).for_each(|item| drop(batcher.push(item, of(1, 1), now).unwrap()));
    let mut ran = Vec::new();
    for client in 100..400 {
        batcher.push(client as usize, of(client, 1), now).unwrap();
        ran.push(batcher.next(now, |_| false).batch[0].item);
    }
    let places: Vec<usize> = (0..10).map(|item| ran.iter().position(|&it| it == item).unwrap()).collect();
    assert!(places.is_sorted() && places[9] <= 9 * 12 + 1, "{places:?}");
    assert!(batcher.lanes[0].clients() <= 2 * batcher.len() + 64, "clients are forgotten");
}

#[test]
fn cancelled_requests_are_not_charged() {
    let (mut batcher, now) = busy(1, WIDE);
    (0..20).for_each(|item| drop(batcher.push(item, of(1, 1), now).unwrap()));
    (20..40).for_each(|item| drop(batcher.push(item, of(2, 1), now).unwrap()));
    assert_eq!(batcher.purge(now, |&item| item < 20).len(), 20);
    batcher.push(40, of(1, 1), now).unwrap();
    let ran: Vec<usize> = (0..6).flat_map(|_| items(&batcher.next(now, |_| false))).collect();
    assert_eq!(ran, [20, 21, 22, 23, 24, 40]);
}

#[test]
fn a_full_queue_lets_those_in_who_have_less_waiting() {
    for limits in [Limits { max_requests: 20, ..WIDE }, Limits { max_bytes: 20, ..WIDE }] {
        let (mut batcher, now) = busy(1, limits);
        (0..20).for_each(|item| drop(batcher.push(item, of(1, 1), now).unwrap()));
        let error = batcher.push(99, of(1, 1), now).unwrap_err().1;
        assert_eq!(error.code, Code::Overloaded, "the flooder itself has had its share");
        for item in 20..30 {
            let displaced = batcher.push(item, of(2, 1), now).unwrap();
            let newest: Vec<usize> = displaced.iter().map(|(entry, _)| entry.item).collect();
            assert_eq!(newest, [39 - item], "the newest of whoever has most");
            let error = &displaced[0].1;
            assert_eq!(error.code, Code::Overloaded);
            assert!(error.message.contains("queue.max_") && error.retry_after.is_some(), "{error:?}");
        }
        assert_eq!(batcher.push(98, of(2, 1), now).unwrap_err().1.code, Code::Overloaded, "both have half");
        assert_eq!(batcher.push(97, of(1, 1), now).unwrap_err().1.code, Code::Overloaded, "both have half");
        assert_eq!(batcher.push(96, of(3, 1), now).unwrap().len(), 1, "there is a third");
        let ran: Vec<usize> = (0..20).flat_map(|_| items(&batcher.next(now, |_| false))).collect();
        assert_eq!(ran.len(), 20);
        assert_eq!(counts(&batcher), (0, 0, 0, 0));
    }
}

#[test]
fn room_is_made_in_the_level_that_is_full_and_below() {
    let now = Instant::now();
    let schedule: Schedule = toml::from_str(&format!("{THREE_LEVELS}max_size = 8")).unwrap();
    let mut batcher: Batcher<usize> =
        Batcher::new(Limits { max_requests: 17, ..WIDE }, &schedule, 1, 1, ServiceTime::default());
    let at = |level, client| Cost { client: Client(client), ..in_level(level, 1, None) };
    let displaced = |pushed: Result<Vec<Displaced<usize>>, (usize, Error)>| {
        pushed.map(|displaced| displaced.into_iter().map(|(entry, _)| entry.item).collect::<Vec<_>>()).ok()
    };
    for item in 0..8 {
        batcher.push(item, at(1, 1), now).unwrap();
        batcher.push(10 + item, at(2, 2), now).unwrap();
    }
    assert_eq!(displaced(batcher.push(20, at(1, 3), now)), Some(vec![7]), "the level is full, the queue is not");
    assert_eq!(displaced(batcher.push(30, at(0, 1), now)), Some(vec![]));
    assert_eq!(displaced(batcher.push(31, at(0, 2), now)), None, "nobody displaces what is their own");
    assert_eq!(displaced(batcher.push(32, at(0, 3), now)), Some(vec![17]), "what would run last");
    assert_eq!(displaced(batcher.push(33, at(2, 3), now)), Some(vec![16]));
    assert_eq!(displaced(batcher.push(34, at(2, 4), now)), Some(vec![15]));
    assert_eq!(displaced(batcher.push(35, at(2, 5), now)), None, "all the others are within what they have saved");
}

#[test]
fn a_light_client_s_deadline_is_judged_by_its_own_wait() {
    let (mut batcher, now) = busy(1, WIDE);
    let within = |client, time| {
        let mut cost = of(client, 1);
        cost.place.deadline = Some(now + time);
        cost
    };
    (0..15).for_each(|item| drop(batcher.push(item, of(1, 1), now).unwrap()));
    // Its savings are used up.
    for _ in 0..6 {
        batcher.next(now, |_| false);
        batcher.finished(now, 1, None);
    }
    assert_eq!(batcher.push(20, within(1, ms(10_500)), now).unwrap_err().1.code, Code::DeadlineExceeded);
    assert_eq!(batcher.push(21, within(2, ms(1500)), now).unwrap_err().1.code, Code::DeadlineExceeded);
    // The run in progress and its own.
    batcher.push(22, within(2, ms(2500)), now).unwrap();
    assert_eq!(batcher.push(23, within(2, ms(2500)), now).unwrap_err().1.code, Code::DeadlineExceeded, "its second");
    batcher.push(24, within(2, ms(4000)), now).unwrap();
    let patient = Limits { max_wait: ms(9500), ..WIDE };
    let (mut batcher, now) = busy(1, patient);
    let refused = (0..100).find(|&item| batcher.push(item, of(1, 1), now).is_err());
    assert_eq!(refused, Some(9));
    batcher.push(100, of(2, 1), now).unwrap();
}

#[test]
fn the_oldest_expire_wherever_their_turn_is() {
    let (mut batcher, now) = busy(1, WIDE);
    let expiring = |client, after: u64| {
        let mut cost = of(client, 1);
        cost.place.expires = Some(now + ms(after));
        cost
    };
    (0..10).for_each(|item| drop(batcher.push(item, expiring(1, 10), now).unwrap()));
    batcher.push(10, expiring(2, 20), now + ms(10)).unwrap();
    assert_eq!(batcher.lanes[0].iter().nth(5).unwrap().item, 10, "its turn is early");
    let expired: Vec<usize> = batcher.expire(now + ms(10), |_| false).iter().map(|(entry, _)| entry.item).collect();
    assert_eq!(expired, (0..10).collect::<Vec<_>>());
    assert_eq!(items(&batcher.next(now + ms(10), |_| false)), [10]);
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
}

proptest! {
    /// Whatever comes from whom: nothing is lost or doubled, limits hold, a client's requests of one level and shape
    /// run in their order, an idle executor has work while there is any, and who gives way is of another client and
    /// would have run later.
    #[test]
    fn clients_share_and_nothing_is_lost(
        // Client, rows, shape, level, given up, ends of runs after it.
        requests in proptest::collection::vec(
            (0u64..5, 1usize..12, 0usize..3, 0usize..2, proptest::bool::weighted(0.1), 0usize..2), 0..120,
        ),
        group in 1usize..9,
        max_requests in 1usize..40,
        max_bytes in 10usize..200,
    ) {
        let now = Instant::now();
        let schedule = Schedule { priority_levels: 2, default_priority: 1, ..Schedule::default() };
        let limits = Limits { max_requests, max_bytes, ..WIDE };
        let mut batcher: Batcher<usize> = Batcher::new(limits, &schedule, group, 1, ServiceTime::default());
        let mut done = vec![false; requests.len()];
        let mut ran: Vec<usize> = Vec::new();
        let mut take = |batcher: &mut Batcher<usize>, done: &mut Vec<bool>| -> Result<bool, TestCaseError> {
            let next = batcher.next(now, |&item| requests[item].4);
            prop_assert!(!next.batch.is_empty() || batcher.is_empty(), "work is kept back");
            let rows: usize = next.batch.iter().map(|entry| entry.cost.rows).sum();
            prop_assert!(rows <= group || next.batch.len() == 1);
            for entry in next.batch.iter().chain(next.dropped.iter().map(|(entry, _)| entry)) {
                prop_assert!(!std::mem::replace(&mut done[entry.item], true), "{} twice", entry.item);
            }
            prop_assert!(next.dropped.iter().all(|(entry, _)| requests[entry.item].4));
            prop_assert!(next.batch.iter().all(|entry| !requests[entry.item].4));
            ran.extend(next.batch.iter().map(|entry| entry.item));
            batcher.finished(now, rows, None);
            Ok(!next.batch.is_empty())
        };
        for (item, &(client, rows, shape, level, _, runs)) in requests.iter().enumerate() {
            let place = Place { level, ..Place::default() };
            let waiting = batcher.len();
            match batcher.push(item, Cost { place, client: Client(client), ..cost(rows, shape) }, now) {
                Ok(displaced) => {
                    prop_assert!(displaced.len() <= waiting);
                    for (entry, error) in displaced {
                        prop_assert_eq!(error.code, Code::Overloaded);
                        prop_assert!(entry.cost.client != Client(client) && entry.cost.place.level >= level);
                        prop_assert!(!std::mem::replace(&mut done[entry.item], true), "{} twice", entry.item);
                    }
                }
                Err((back, error)) => {
                    prop_assert_eq!((back, error.code), (item, Code::Overloaded));
                    prop_assert!(!std::mem::replace(&mut done[item], true), "{} twice", item);
                }
            }
            prop_assert!(batcher.len() <= max_requests);
            prop_assert!(batcher.bytes <= max_bytes || batcher.len() == 1);
            let rounds: Vec<u64> = batcher.lanes[level].backwards().map(|(turn, _)| turn.round).collect();
            prop_assert!(rounds.is_sorted_by(|later, earlier| later >= earlier), "{:?}", rounds);
            for _ in 0..runs {
                take(&mut batcher, &mut done)?;
            }
        }
        while take(&mut batcher, &mut done)? {}
        prop_assert!(done.iter().all(|&done| done), "{:?}", done);
        prop_assert_eq!(counts(&batcher), (0, 0, 0, 0));
        for (position, &item) in ran.iter().enumerate() {
            let (client, _, shape, level, ..) = requests[item];
            let same = |&&other: &&usize| {
                let (of, _, and, at, ..) = requests[other];
                (of, and, at) == (client, shape, level)
            };
            prop_assert!(ran[position..].iter().filter(same).all(|&later| later >= item), "{:?}", ran);
        }
    }
}
