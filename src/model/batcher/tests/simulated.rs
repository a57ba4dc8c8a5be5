//! The batcher with one executor in simulated time, beside the ideal batch-while-busy queue.

use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp};

use super::*;

/// A request on its way to the queue.
#[derive(Clone)]
pub struct Arrival {
    pub at: Duration,
    pub cost: Cost,
    /// From its arrival on.
    pub deadline: Option<Duration>,
    /// When its client gives it up.
    pub gone: Option<Duration>,
}

/// What became of a request; times are from its arrival on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    Answered(Duration),
    Refused(Code),
    /// In the queue, after so long.
    Dropped(DropReason, Duration),
    Displaced,
}

/// A model whose runs take a time that depends on their rows only, and that is known.
#[derive(Clone, Copy)]
pub struct Model {
    pub group: usize,
    pub fixed: Duration,
    pub per_row: Duration,
}

/// A spin of 1 ms, whatever the rows.
pub const SPIN: Model = Model { group: 8, fixed: ms(1), per_row: Duration::ZERO };
/// Batches are worth it, and larger ones take longer.
pub const SLOPE: Model = Model { group: 8, fixed: ms(2), per_row: Duration::from_micros(500) };
/// Batches are worth nothing.
pub const LINEAR: Model = Model { group: 1, fixed: Duration::ZERO, per_row: Duration::from_micros(8300) };

impl Model {
    pub fn run(&self, rows: usize) -> Duration {
        self.fixed + self.per_row * u32::try_from(rows).unwrap()
    }

    /// Rows per second of full batches.
    pub fn saturation(&self) -> f64 {
        self.group as f64 / self.run(self.group).as_secs_f64()
    }

    pub fn batcher(&self, limits: Limits) -> Batcher<usize> {
        let sweep: Vec<_> = [1, 2, 4, 8].map(|rows| (rows, self.run(rows))).to_vec();
        Batcher::new(limits, &Schedule::default(), self.group, 1, ServiceTime::from_sweep(&sweep))
    }
}

pub const WIDE: Limits = Limits { max_rows: 100, max_requests: 8192, max_bytes: 1 << 30, max_wait: ms(3_600_000) };

/// Requests of one row and of `client`, at `rate` per second for `seconds`, with gaps as chance has them.
pub fn poisson(seed: u64, client: u64, rate: f64, seconds: f64, deadline: Option<Duration>) -> Vec<Arrival> {
    let mut chance = StdRng::seed_from_u64(seed);
    let gaps = Exp::new(rate).unwrap();
    let mut at = 0.0;
    let mut arrivals = Vec::new();
    loop {
        at += gaps.sample(&mut chance);
        if at > seconds {
            return arrivals;
        }
        let cost = Cost { client: Client(client), ..cost(1, 1) };
        arrivals.push(Arrival { at: Duration::from_secs_f64(at), cost, deadline, gone: None });
    }
}

/// All of them in the order of time.
pub fn merged(streams: Vec<Vec<Arrival>>) -> Vec<Arrival> {
    let mut all: Vec<Arrival> = streams.into_iter().flatten().collect();
    all.sort_by_key(|arrival| arrival.at);
    all
}

/// Lets the batcher and one executor answer `arrivals`; the outcome of each. Runs take exactly what they should.
pub fn simulate(model: Model, limits: Limits, arrivals: &[Arrival]) -> Vec<Outcome> {
    simulate_with(model, limits, arrivals, |expected| (expected, Duration::ZERO))
}

/// The same with runs that take something else, and a while after each until the next begins.
fn simulate_with(
    model: Model,
    limits: Limits,
    arrivals: &[Arrival],
    mut real: impl FnMut(Duration) -> (Duration, Duration),
) -> Vec<Outcome> {
    let zero = Instant::now();
    let mut batcher = model.batcher(limits);
    let mut outcomes: Vec<Option<Outcome>> = vec![None; arrivals.len()];
    let mut coming = arrivals.iter().enumerate().peekable();
    // Start, end, requests and own time of the run in progress.
    let mut run: Option<(Duration, Duration, Vec<usize>, Duration)> = None;
    loop {
        let end = run.as_ref().map(|run| run.1);
        let arrival = coming.peek().map(|(_, arrival)| arrival.at);
        let Some(now) = [end, arrival].into_iter().flatten().min() else { break };
        if end == Some(now) {
            let (start, _, items, took) = run.take().unwrap();
            let rows = items.iter().map(|&item| arrivals[item].cost.rows).sum();
            batcher.finished(zero + start, rows, Some(took));
            items.iter().for_each(|&item| settle(&mut outcomes, item, Outcome::Answered(now - arrivals[item].at)));
        } else {
            let (item, arrival) = coming.next().unwrap();
            let mut cost = arrival.cost.clone();
            cost.place.deadline = arrival.deadline.map(|deadline| zero + now + deadline);
            match batcher.push(item, cost, zero + now) {
                Ok(displaced) => {
                    for (entry, error) in displaced {
                        assert_eq!(error.code, Code::Overloaded);
                        settle(&mut outcomes, entry.item, Outcome::Displaced);
                    }
                }
                Err((item, error)) => settle(&mut outcomes, item, Outcome::Refused(error.code)),
            }
        }
        if run.is_none() {
            let next = batcher.next(zero + now, |&item| arrivals[item].gone.is_some_and(|gone| gone <= now));
            for (entry, reason) in next.dropped {
                settle(&mut outcomes, entry.item, Outcome::Dropped(reason, now - arrivals[entry.item].at));
            }
            assert!(!next.batch.is_empty() || batcher.is_empty(), "an idle executor and a queue with requests");
            if !next.batch.is_empty() {
                let rows = next.batch.iter().map(|entry| entry.cost.rows).sum();
                let items = next.batch.iter().map(|entry| entry.item).collect();
                let (took, between) = real(model.run(rows));
                run = Some((now, now + took + between, items, took));
            }
        }
    }
    assert_eq!(counts(&batcher), (0, 0, 0, 0));
    outcomes.into_iter().map(Option::unwrap).collect()
}

fn settle(outcomes: &mut [Option<Outcome>], item: usize, outcome: Outcome) {
    assert_eq!(outcomes[item].replace(outcome), None, "request {item} is answered twice");
}

/// The latencies of a queue that takes the oldest, up to a group, as soon as it is idle.
fn ideal(model: Model, arrivals: &[Arrival]) -> Vec<Duration> {
    let mut latencies = Vec::new();
    let mut free = Duration::ZERO;
    while let Some(first) = arrivals.get(latencies.len()) {
        let start = free.max(first.at);
        let waiting = arrivals[latencies.len()..].iter().take(model.group).take_while(|arrival| arrival.at <= start);
        let batch: Vec<Duration> = waiting.map(|arrival| arrival.at).collect();
        free = start + model.run(batch.len());
        latencies.extend(batch.into_iter().map(|at| free - at));
    }
    latencies
}

pub fn answered(outcomes: &[Outcome]) -> Vec<Duration> {
    let time = |outcome: &Outcome| if let Outcome::Answered(time) = outcome { Some(*time) } else { None };
    outcomes.iter().filter_map(time).collect()
}

/// Seconds that a share of `latencies` stay within.
pub fn quantile(latencies: &[Duration], share: f64) -> f64 {
    let mut sorted = latencies.to_vec();
    sorted.sort();
    sorted[((sorted.len() - 1) as f64 * share).round() as usize].as_secs_f64()
}

fn mean(latencies: &[Duration]) -> f64 {
    latencies.iter().map(Duration::as_secs_f64).sum::<f64>() / latencies.len() as f64
}

#[test]
fn latencies_are_those_of_the_ideal_queue() {
    for (model, seconds) in [(SPIN, 4.0), (SLOPE, 15.0), (LINEAR, 300.0)] {
        for load in [0.5, 0.8] {
            let rate = load * model.saturation();
            let one = poisson(7, 1, rate, seconds, None);
            let latencies = answered(&simulate(model, WIDE, &one));
            assert_eq!(latencies.len(), one.len(), "nobody is refused at {load}");
            assert_eq!(latencies, ideal(model, &one), "with one client it is that queue");

            let share = |client| poisson(client, client, rate / 8.0, seconds, None);
            let many = merged((1..=8).map(share).collect());
            let latencies = answered(&simulate(model, WIDE, &many));
            let bound = ideal(model, &many);
            assert_eq!(latencies.len(), many.len(), "nobody is refused at {load}");
            let figures = [
                (mean(&latencies), mean(&bound), 1.03),
                (quantile(&latencies, 0.5), quantile(&bound, 0.5), 1.05),
                (quantile(&latencies, 0.99), quantile(&bound, 0.99), 1.25),
            ];
            for (served, ideal, most) in figures {
                assert!(served <= ideal * most, "load {load}: {figures:?}");
            }
        }
    }
}

#[test]
fn at_twice_the_load_nearly_all_runs_are_in_time() {
    for (model, seconds) in [(SPIN, 2.0), (SLOPE, 6.0), (LINEAR, 120.0)] {
        for clients in [1, 2, 10] {
            let deadline = ms(100);
            let rate = 2.0 * model.saturation() / clients as f64;
            let streams = (1..=clients).map(|client| poisson(client, client, rate, seconds, Some(deadline)));
            let outcomes = simulate(model, WIDE, &merged(streams.collect()));
            let latencies = answered(&outcomes);
            let late: Vec<_> = latencies.iter().filter(|&&latency| latency > deadline).collect();
            assert!(late.is_empty(), "{} of {} runs for nothing: {late:?}", late.len(), latencies.len());
            let goodput = latencies.len() as f64 / (model.saturation() * seconds);
            assert!(goodput >= 0.97, "{goodput} with {clients} clients");
        }
    }
}

#[test]
fn refusals_come_at_once_though_runs_vary() {
    for clients in [1, 2, 16] {
        let streams = (1..=clients)
            .map(|client| poisson(client, client, 2.0 * LINEAR.saturation() / clients as f64, 120.0, Some(ms(100))));
        let mut chance = StdRng::seed_from_u64(11);
        let shares = rand_distr::Normal::new(1.0f64, 0.05).unwrap();
        let real = |expected: Duration| {
            (expected.mul_f64(shares.sample(&mut chance).clamp(0.5, 1.5)), Duration::from_micros(100))
        };
        let outcomes = simulate_with(LINEAR, WIDE, &merged(streams.collect()), real);
        let goodput = answered(&outcomes).iter().filter(|&&latency| latency <= ms(100)).count();
        assert!(goodput as f64 >= 0.95 * LINEAR.saturation() * 120.0, "{goodput} with {clients} clients");
        let refused = outcomes.iter().filter(|outcome| !matches!(outcome, Outcome::Answered(_))).count();
        let slow = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Dropped(_, after) if *after > ms(5)));
        let slow = slow.count();
        assert!(slow * 100 <= refused, "{slow} of {refused} refusals come late with {clients} clients");
    }
}

#[test]
fn what_nobody_waits_for_costs_no_run() {
    let mut arrivals = poisson(3, 1, 0.9 * SPIN.saturation(), 2.0, None);
    // Every third is given up half a run after it came.
    arrivals.iter_mut().step_by(3).for_each(|arrival| arrival.gone = Some(arrival.at + SPIN.run(1) / 2));
    let outcomes = simulate(SPIN, WIDE, &arrivals);
    let given_up = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Dropped(DropReason::Cancelled, _)));
    assert!(given_up.count() > arrivals.len() / 10);
    for (arrival, outcome) in arrivals.iter().zip(&outcomes) {
        if let (Some(gone), Outcome::Answered(latency)) = (arrival.gone, outcome) {
            assert!(arrival.at + *latency < gone + SPIN.run(8), "it ran before it was given up");
        }
    }
}
