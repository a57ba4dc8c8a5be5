//! Rows that have lengths: what shares a run, and how much of it is padding.

use proptest::prelude::*;

use super::*;
use crate::error::Code;

/// Longer than any run.
const NEVER: Duration = Duration::from_secs(1 << 30);

/// A request of `rows` texts of `length` tokens.
fn texts(rows: usize, length: usize) -> Cost {
    let lengths = Lengths { shortest: length, longest: length, tokens: rows * length };
    Cost { rows, lengths, shape: ShapeKey::new(), ..cost(1, 1) }
}

/// A batcher whose runs have at most so many tokens, and as many rows.
fn budget(tokens: usize, most_rows: usize) -> Batcher<usize> {
    batcher(tokens).with_lengths(64, most_rows)
}

fn push_all(batcher: &mut Batcher<usize>, lengths: &[usize], now: Instant) {
    lengths.iter().enumerate().for_each(|(item, &length)| drop(batcher.push(item, texts(1, length), now).unwrap()));
}

/// The items of all batches, one after the other.
fn batches(batcher: &mut Batcher<usize>, now: Instant) -> Vec<Vec<usize>> {
    let mut all = Vec::new();
    loop {
        let next = batcher.next(now, |_| false);
        if next.batch.is_empty() {
            return all;
        }
        batcher.finished(now, next.work, None);
        all.push(items(&next));
    }
}

#[test]
fn a_run_is_as_large_as_its_tokens() {
    let now = Instant::now();
    let mut batcher = budget(256, usize::MAX);
    push_all(&mut batcher, &[[128; 3].as_slice(), &[16; 20]].concat(), now);
    let sizes: Vec<usize> = batches(&mut batcher, now).iter().map(Vec::len).collect();
    assert_eq!(sizes, [2, 1, 16, 4], "as many rows as there is room for");
    let mut few = budget(256, 8);
    push_all(&mut few, &[16; 20], now);
    let sizes: Vec<usize> = batches(&mut few, now).iter().map(Vec::len).collect();
    assert_eq!(sizes, [8, 8, 4], "and no more than the model takes");
}

#[test]
fn lengths_share_a_run_when_little_of_it_is_padding() {
    let now = Instant::now();
    let mut batcher = budget(4096, usize::MAX);
    push_all(&mut batcher, &[100, 97, 20, 104, 90, 21, 111, 103], now);
    assert_eq!(batches(&mut batcher, now), [vec![0, 1, 3, 7], vec![2, 5], vec![4], vec![6]]);
    // When there are enough of its own length, nobody needs to be padded.
    let mut batcher = budget(310, usize::MAX);
    push_all(&mut batcher, &[100, 101, 100, 103, 100, 100], now);
    assert_eq!(batches(&mut batcher, now), [vec![0, 2, 4], vec![1, 3, 5]]);
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
}

#[test]
fn the_padding_that_a_request_brings_counts() {
    let now = Instant::now();
    let mut batcher = budget(4096, usize::MAX);
    let lengths = Lengths { shortest: 95, longest: 100, tokens: 195 };
    batcher.push(0, Cost { rows: 2, lengths, ..texts(2, 100) }, now).unwrap();
    batcher.push(1, texts(1, 105), now).unwrap();
    batcher.push(2, texts(1, 102), now).unwrap();
    batcher.push(3, texts(1, 94), now).unwrap();
    assert_eq!(batches(&mut batcher, now), [vec![0, 2, 3], vec![1]], "95 of 105 are less than nine tenths");
}

#[test]
fn a_long_text_delays_short_ones_by_its_own_run_at_most() {
    let now = Instant::now();
    for others in [0, 3] {
        let mut batcher = budget(512, usize::MAX);
        push_all(&mut batcher, &[vec![400; others], vec![8192], vec![16; 32]].concat(), now);
        let all = batches(&mut batcher, now);
        let long = all.iter().position(|batch| batch.contains(&others)).unwrap();
        assert_eq!(all[long], [others], "alone");
        assert_eq!(all[long + 1], (others + 1..others + 33).collect::<Vec<_>>(), "{all:?}");
    }
}

#[test]
fn texts_of_many_lengths_do_not_run_one_by_one() {
    let now = Instant::now();
    let mut batcher = Batcher::new(
        Limits { max_requests: 1000, max_bytes: usize::MAX, ..LIMITS },
        &Schedule::default(),
        1024,
        1,
        ServiceTime::default(),
    )
    .with_lengths(64, usize::MAX);
    // 256 in flight, as clients that send the next text when the last is answered keep them.
    let mut state = 1_u32;
    let mut length = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        8 + (state >> 8) as usize % 249
    };
    (0..256).for_each(|item| drop(batcher.push(item, texts(1, length()), now).unwrap()));
    let (mut work, mut tokens, mut runs) = (0, 0, 0);
    for _ in 0..1000 {
        let next = batcher.next(now, |_| false);
        batcher.finished(now, next.work, None);
        runs += 1;
        work += next.work;
        for entry in next.batch {
            tokens += entry.cost.lengths.tokens;
            batcher.push(entry.item, texts(1, length()), now).unwrap();
        }
    }
    let (padding, filled) = ((work - tokens) as f64 / work as f64, work as f64 / (1024 * runs) as f64);
    assert!(padding < 0.05 && filled > 0.7, "padding {padding:.3}, filled {filled:.3}");
}

#[test]
fn who_waits_for_company_waits_for_about_its_own_length() {
    let now = Instant::now();
    let schedule: Schedule = toml::from_str("max_delay = '10ms'").unwrap();
    let mut batcher: Batcher<usize> =
        Batcher::new(LIMITS, &schedule, 256, 1, ServiceTime::default()).with_lengths(64, usize::MAX);
    push_all(&mut batcher, &[128, 64, 128, 64], now);
    assert_eq!(items(&batcher.next(now, |_| false)), [0, 2], "complete");
    let next = batcher.next(now, |_| false);
    assert_eq!((items(&next), next.wake_at), (vec![], Some(now + ms(10))));
}

#[test]
fn preferred_sizes_are_rows_of_ordinary_length() {
    let now = Instant::now();
    let schedule: Schedule = toml::from_str("preferred_batch_sizes = [2, 4]").unwrap();
    let mut batcher: Batcher<usize> =
        Batcher::new(LIMITS, &schedule, 256, 1, ServiceTime::default()).with_lengths(64, usize::MAX);
    push_all(&mut batcher, &[64; 7], now);
    assert_eq!(batches(&mut batcher, now), [vec![0, 1, 2, 3], vec![4, 5], vec![6]]);
}

#[test]
fn clients_with_texts_take_turns() {
    let now = Instant::now();
    let mut batcher = budget(64, usize::MAX);
    for item in 0..20 {
        batcher.push(item, Cost { client: Client(1), ..texts(1, 64) }, now).unwrap();
    }
    // Who has nothing waiting has saved up a few ordinary rows.
    for item in 20..23 {
        batcher.push(item, Cost { client: Client(2), ..texts(1, 60) }, now).unwrap();
    }
    let order = batches(&mut batcher, now).concat();
    let last = order.iter().position(|&item| item == 22).unwrap();
    assert!(last < 8, "{order:?}");
}

#[test]
fn a_light_client_does_not_wait_for_a_flood_of_many_lengths() {
    let now = Instant::now();
    let limits = Limits { max_requests: 5000, max_bytes: usize::MAX, ..LIMITS };
    let mut batcher =
        Batcher::new(limits, &Schedule::default(), 4096, 1, ServiceTime::default()).with_lengths(64, usize::MAX);
    for item in 0..4000 {
        batcher.push(item, Cost { client: Client(1), ..texts(1, 8 + item * 37 % 249) }, now).unwrap();
    }
    for _ in 0..3 {
        let next = batcher.next(now, |_| false);
        batcher.finished(now, next.work, None);
    }
    batcher.push(4000, Cost { client: Client(2), ..texts(1, 60) }, now).unwrap();
    let place = batches(&mut batcher, now).iter().position(|batch| batch.contains(&4000)).unwrap();
    assert!(place < 5, "batch {place}");
}

#[test]
fn who_leads_in_the_place_of_another_chooses_the_lengths() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(64, ms(5)), (128, ms(10))]);
    let mut batcher: Batcher<usize> =
        Batcher::new(LIMITS, &Schedule::default(), 4096, 1, service).with_lengths(64, usize::MAX);
    batcher
        .push(0, Cost { place: Place { deadline: Some(now + ms(500)), ..Place::default() }, ..texts(1, 8) }, now)
        .unwrap();
    batcher.push(1, texts(1, 250), now).unwrap();
    (2..22).for_each(|item| drop(batcher.push(item, texts(1, 8), now).unwrap()));
    // The first can no longer be in time.
    let late = now + ms(499);
    assert_eq!(items(&batcher.next(late, |_| false)), [1]);
}

#[test]
fn a_short_run_is_not_taken_for_a_full_one() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(64, ms(64)), (128, ms(128))]);
    let mut batcher: Batcher<usize> =
        Batcher::new(Limits { max_wait: NEVER, ..LIMITS }, &Schedule::default(), 4096, 1, service)
            .with_lengths(64, usize::MAX);
    batcher
        .push(0, Cost { place: Place { deadline: Some(now + ms(100)), ..Place::default() }, ..texts(1, 8) }, now)
        .unwrap();
    (1..50).for_each(|item| drop(batcher.push(item, texts(1, 250), now).unwrap()));
    assert_eq!(items(&batcher.next(now, |_| false)), [0], "eight tokens are in time, whatever else waits");
}

#[test]
fn each_is_in_time_by_the_run_that_it_would_have() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(64, ms(64)), (128, ms(128))]);
    let limits = Limits { max_wait: NEVER, ..LIMITS };
    let schedule: Schedule = toml::from_str("priority_levels = 2\ndefault_priority = 1").unwrap();
    let mut batcher: Batcher<usize> = Batcher::new(limits, &schedule, 512, 1, service).with_lengths(64, usize::MAX);
    let place = |level, after| Place { level, deadline: Some(now + ms(after)), ..Place::default() };
    batcher.push(1, Cost { place: place(1, 300), ..texts(1, 8) }, now).unwrap();
    batcher.push(2, Cost { place: place(1, 60_000), ..texts(1, 8) }, now).unwrap();
    // The first to run no longer can be in time; the few tokens of the others are.
    batcher.push(0, Cost { place: place(0, 8200), ..texts(1, 8192) }, now).unwrap();
    let next = batcher.next(now + ms(100), |_| false);
    assert_eq!(items(&next), [1, 2]);
}

#[test]
fn lengths_that_add_up_to_no_preferred_size_still_share_runs() {
    let now = Instant::now();
    let schedule: Schedule = toml::from_str("preferred_batch_sizes = [2, 4]").unwrap();
    let mut batcher: Batcher<usize> =
        Batcher::new(LIMITS, &schedule, 256, 1, ServiceTime::default()).with_lengths(64, usize::MAX);
    push_all(&mut batcher, &[65; 3], now);
    assert_eq!(batches(&mut batcher, now), [vec![0, 1], vec![2]]);
    push_all(&mut batcher, &[100; 3], now);
    assert_eq!(batches(&mut batcher, now), [vec![0, 1], vec![2]]);
}

#[test]
fn the_rest_of_a_request_is_let_in_though_its_own_parts_are_ahead() {
    let now = Instant::now();
    let service = ServiceTime::from_sweep(&[(64, Duration::from_secs(40)), (128, Duration::from_secs(80))]);
    let mut batcher: Batcher<usize> =
        Batcher::new(LIMITS, &Schedule::default(), 64, 1, service).with_lengths(64, usize::MAX);
    batcher.push(0, texts(1, 64), now).unwrap();
    batcher.next(now, |_| false);
    assert_eq!(batcher.push(1, texts(1, 64), now).unwrap_err().1.code, Code::Overloaded);
    batcher.push(1, Cost { follows: true, ..texts(1, 64) }, now).unwrap();
}

proptest! {
    /// Nothing is lost or doubled, padding stays below a tenth, budgets are kept, and nobody is overtaken for ever.
    #[test]
    fn every_text_runs_once_with_little_padding(
        requests in proptest::collection::vec((1usize..4, 1usize..300, 0usize..20), 1..80),
        tokens in 1usize..2000,
        most_rows in 1usize..20,
        every in 1usize..5,
    ) {
        let now = Instant::now();
        let limits = Limits { max_bytes: usize::MAX, ..LIMITS };
        let mut batcher =
            Batcher::new(limits, &Schedule::default(), tokens, 1, ServiceTime::default()).with_lengths(64, most_rows);
        let mut ran = Vec::new();
        let mut take = |batcher: &mut Batcher<usize>| -> Result<bool, TestCaseError> {
            let next = batcher.next(now, |_| false);
            let costs: Vec<&Cost> = next.batch.iter().map(|entry| &entry.cost).collect();
            let rows: usize = costs.iter().map(|cost| cost.rows).sum();
            let longest = costs.iter().map(|cost| cost.lengths.longest).max().unwrap_or(0);
            prop_assert_eq!(next.work, rows * longest);
            prop_assert!(next.batch.len() <= 1 || (rows <= most_rows && next.work <= tokens));
            let shortest = costs.iter().map(|cost| cost.lengths.shortest).min().unwrap_or(0);
            prop_assert!(next.batch.len() <= 1 || shortest * 10 >= longest * 9, "{} beside {}", shortest, longest);
            prop_assert!(next.batch.iter().all(|entry| entry.passed_over <= MAX_PASSED_OVER_BY_LENGTH));
            batcher.finished(now, next.work, None);
            ran.extend(next.batch.iter().map(|entry| entry.item));
            Ok(!next.batch.is_empty())
        };
        for (item, &(rows, longest, spread)) in requests.iter().enumerate() {
            let shortest = longest - longest * spread / 400;
            let lengths = Lengths { shortest, longest, tokens: rows * shortest };
            batcher.push(item, Cost { rows, lengths, ..texts(rows, longest) }, now).unwrap();
            if item % every == 0 {
                take(&mut batcher)?;
            }
        }
        while take(&mut batcher)? {}
        ran.sort_unstable();
        prop_assert_eq!(ran, (0..requests.len()).collect::<Vec<_>>());
        prop_assert_eq!(counts(&batcher), (0, 0, 0, 0));
        prop_assert!(batcher.running.is_empty());
    }
}
