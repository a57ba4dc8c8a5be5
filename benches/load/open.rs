//! The open loop: requests come at random moments, whatever became of those before them.

use std::{collections::VecDeque, time::Duration};

use anyhow::{Context, Result, ensure};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp};

use super::{
    Target,
    generator::{Generator, STALL},
};
use crate::{
    machine::{Moment, Usage},
    statistics::Latencies,
};

/// When an open loop, which never sleeps, has not run for so long, its core was taken from it.
const HELD_UP: Duration = Duration::from_millis(1);
/// What was to be sent meanwhile comes all at once then, and the server needs some time for that: so many times as long.
const AFTERMATH: u32 = 4;

/// What an open loop found.
///
/// Latencies are those of requests that were not on their way while the generator was held up, nor just after that:
/// all others would tell of the generator's core, not of the server.
#[derive(Default)]
pub struct Arrivals {
    pub latencies: Latencies,
    /// Of requests that were sent in phases of comparison.
    pub steady: Latencies,
    pub failed: usize,
    /// How long failures took among those that counted.
    pub refusals: Latencies,
    /// Of all requests that counted and succeeded, whatever happened to the generator.
    pub all: Latencies,
    /// The share of requests whose latencies say nothing, because the generator was held up.
    pub held_up: f64,
    pub usage: Usage,
}

/// What to do with requests that are meant to be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Send them, but do not count their latency: the server warms up, or what is to be measured has not begun.
    Pass,
    /// Count their latency as what others are compared with.
    Steady,
    Count,
    /// Send no more.
    End,
}

/// Counts after `warm` and until `end`; when the generator is held up from the one to the other, once after that.
pub fn between(warm: Duration, end: Duration) -> impl FnMut(Duration, &[u8]) -> Result<Phase> {
    let mut counted = false;
    move |now, _| {
        Ok(if now >= end && counted {
            Phase::End
        } else if now >= warm {
            counted = true;
            Phase::Count
        } else {
            Phase::Pass
        })
    }
}

/// When requests come at `rate` per second from many strangers, as follows from `seed`.
///
/// # Errors
/// When the rate is not positive.
pub fn poisson(rate: f64, seed: u64) -> Result<impl Iterator<Item = Duration>> {
    let mut random = StdRng::seed_from_u64(seed);
    let gaps = Exp::new(rate).ok().filter(|_| rate > 0.0).context("the rate of an open loop must be positive")?;
    let mut next = Duration::ZERO;
    Ok(std::iter::repeat_with(move || {
        next += Duration::from_secs_f64(gaps.sample(&mut random));
        next
    }))
}

/// Sends `rate` requests per second at random moments that follow from `seed`, as `phase` says, which is told the time
/// and shown the body of the latest reply.
///
/// # Errors
/// When the server cannot be reached or stalls, or nothing was counted. Requests that fail are counted, whenever they
/// were sent.
pub fn open(
    target: &Target<'_>,
    rate: f64,
    seed: u64,
    phase: impl FnMut(Duration, &[u8]) -> Result<Phase>,
) -> Result<Arrivals> {
    Strangers::new(target, poisson(rate, seed)?)?.run(phase)
}

/// Two open loops at a time, each with its own connections: those of `target` at `rate`, and `others` beside it, of
/// which nothing is told.
///
/// # Errors
/// As `open`.
pub fn beside(
    (target, rate): (&Target<'_>, f64),
    (others, flood): (&Target<'_>, f64),
    seed: u64,
    mut phase: impl FnMut(Duration, &[u8]) -> Result<Phase>,
) -> Result<Arrivals> {
    let mut strangers = Strangers::new(target, poisson(rate, seed)?)?;
    let mut others = Strangers::new(others, poisson(flood, !seed)?)?;
    loop {
        let now = strangers.generator.now();
        let current = phase(now, &strangers.generator.replies.body)?;
        if current == Phase::End {
            let arrivals = strangers.finish()?;
            others.finish()?;
            return Ok(arrivals);
        }
        strangers.turn(now, current)?;
        others.turn(others.generator.now(), current)?;
    }
}

/// An open loop.
struct Strangers<I> {
    generator: Generator,
    pid: Option<u32>,
    moments: I,
    next: Duration,
    /// Requests whose time has come and for which no connection has room.
    waiting: VecDeque<Duration>,
    /// When phases began.
    phases: Vec<(Duration, Phase)>,
    stalls: Stalls,
    begun: Option<Moment>,
    arrivals: Arrivals,
}

/// When the generator was held up.
struct Stalls {
    /// It is when it did not run for longer than this.
    limit: Duration,
    /// When it last ran.
    ran: Duration,
    /// The end of the latest stall and of what follows from it.
    over: Duration,
    /// Requests that were sent where latencies count, and those of them that were on their way during a stall.
    asked: u32,
    spoiled: u32,
}

impl Default for Stalls {
    fn default() -> Self {
        Self { limit: HELD_UP, ran: Duration::ZERO, over: Duration::ZERO, asked: 0, spoiled: 0 }
    }
}

impl Stalls {
    /// It runs.
    fn run(&mut self, now: Duration) {
        let pause = now.saturating_sub(self.ran);
        self.ran = now;
        if pause > self.limit {
            self.over = now + pause * AFTERMATH;
        }
    }

    /// The share of requests whose latencies say nothing; of none there is nothing to learn either.
    fn share(&self) -> f64 {
        if self.asked == 0 { 1.0 } else { f64::from(self.spoiled) / f64::from(self.asked) }
    }

    /// Whether the latency of a request that was meant to be sent at `intended` says something of the server.
    fn is_clear(&mut self, intended: Duration) -> bool {
        let clear = intended >= self.over;
        self.asked += 1;
        self.spoiled += u32::from(!clear);
        clear
    }
}

impl<I: Iterator<Item = Duration>> Strangers<I> {
    fn new(target: &Target<'_>, mut moments: I) -> Result<Self> {
        let next = moments.next().unwrap_or(Duration::MAX);
        Ok(Self {
            generator: Generator::connect(target)?,
            pid: target.pid,
            moments,
            next,
            waiting: VecDeque::new(),
            phases: Vec::new(),
            stalls: Stalls::default(),
            begun: None,
            arrivals: Arrivals::default(),
        })
    }

    /// Goes on until `phase` says that it is over.
    fn run(mut self, mut phase: impl FnMut(Duration, &[u8]) -> Result<Phase>) -> Result<Arrivals> {
        loop {
            let now = self.generator.now();
            let current = phase(now, &self.generator.replies.body)?;
            if current == Phase::End {
                return self.finish();
            }
            self.turn(now, current)?;
        }
    }

    /// Sends what is to be sent by now, and takes what has come.
    fn turn(&mut self, now: Duration, current: Phase) -> Result<()> {
        if self.phases.last().is_none_or(|last| last.1 != current) {
            self.phases.push((now, current));
        }
        if self.begun.is_none() && current != Phase::Pass {
            self.begun = Some(Moment::beside(self.pid)?);
        }
        // What came while it did not run is read late, too, and so the stall is known before.
        self.stalls.run(now);
        while self.next <= now {
            self.waiting.push_back(self.next);
            self.next = self.moments.next().unwrap_or(Duration::MAX);
        }
        self.generator.begin_waiting(&mut self.waiting);
        self.generator.turn(Some(Duration::ZERO))?;
        self.record();
        Ok(())
    }

    /// Sends no more, and waits for what was begun: the slowest requests must not be the ones that are left out.
    fn finish(mut self) -> Result<Arrivals> {
        let begun = self.begun.take().context("the run ended before anything counted")?;
        self.arrivals.usage = begun.until(&Moment::beside(self.pid)?);
        let deadline = self.generator.now() + STALL;
        while !self.waiting.is_empty() || self.generator.is_open() {
            ensure!(self.generator.now() < deadline, "requests are not answered within {STALL:?}");
            self.generator.begin_waiting(&mut self.waiting);
            self.stalls.run(self.generator.now());
            self.generator.turn(Some(Duration::ZERO))?;
            self.record();
        }
        self.arrivals.held_up = self.stalls.share();
        Ok(self.arrivals)
    }

    /// Takes the replies; each latency counts as the phase says in which the request was meant to be sent.
    fn record(&mut self) {
        let now = self.generator.now();
        for reply in self.generator.replies.all.drain(..) {
            let phase = self.phases[..self.phases.partition_point(|(begun, _)| *begun <= reply.intended)].last();
            let phase = phase.map_or(Phase::Pass, |(_, phase)| *phase);
            let (took, arrivals) = (now - reply.intended, &mut self.arrivals);
            arrivals.failed += usize::from(!reply.succeeded);
            if phase == Phase::Pass {
                continue;
            }
            if phase == Phase::Count && reply.succeeded {
                arrivals.all.record(took);
            }
            if self.stalls.is_clear(reply.intended) {
                match (reply.succeeded, phase) {
                    (true, Phase::Steady) => arrivals.steady.record(took),
                    (true, _) => arrivals.latencies.record(took),
                    (false, Phase::Count) => arrivals.refusals.record(took),
                    (false, _) => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{echo, flower},
        *,
    };
    use crate::requests::Protocol;

    #[test]
    fn phases_tell_latencies_apart() {
        let [_, grpc] = echo();
        let request = Protocol::Grpc.request("iris", &flower()).unwrap();
        let target = Target { address: grpc, pid: None, request: &request, connections: 2, streams: 64 };
        let moments = || poisson(400.0, 7).unwrap();
        let mut strangers = Strangers::new(&target, moments()).unwrap();
        // Other tests take the core from this one all the time, and here that is no matter.
        strangers.stalls.limit = Duration::MAX;
        let mut told: Vec<(Duration, Phase)> = Vec::new();
        let mut phases = [Phase::Pass, Phase::Steady, Phase::Count, Phase::End].into_iter();
        let (mut phase, mut begun) = (phases.next().unwrap(), Duration::ZERO);
        let run = strangers.run(|now, reply| {
            assert!(reply.is_empty() || Protocol::version(reply).is_ok_and(|version| version == 1));
            // However long it does not run, it is told of each phase for at least so long.
            if told.last().is_some_and(|told| told.0 >= begun + Duration::from_millis(200)) {
                (phase, begun) = (phases.next().unwrap(), now);
            }
            told.push((now, phase));
            Ok(phase)
        });
        let run = run.unwrap();
        let first = |phase| told.iter().find(|told| told.1 == phase).map(|told| told.0).unwrap();
        let meant = |from, to| moments().take_while(|&moment| moment < to).filter(|&moment| moment >= from).count();
        let steady = meant(first(Phase::Steady), first(Phase::Count));
        // Nothing is sent after the last time that it may be.
        let counted = meant(first(Phase::Count), told[told.len() - 2].0);
        assert!(steady > 0 && counted > 0, "{steady} {counted}");
        assert_eq!((run.steady.count(), run.latencies.count(), run.failed), (steady, counted, 0));
        assert_eq!(run.all.count(), counted);
    }

    #[test]
    fn what_was_on_its_way_while_the_generator_was_held_up_says_nothing() {
        let millis = Duration::from_millis;
        let mut stalls = Stalls::default();
        for now in [0, 1, 2, 12, 13] {
            stalls.run(millis(now));
        }
        // From 2 to 12 nothing ran, and what was to be sent then had to come after.
        let clear = [1, 11, 12, 51, 52, 60].map(|intended| stalls.is_clear(millis(intended)));
        assert_eq!(clear, [false, false, false, false, true, true]);
        assert_eq!((stalls.share() * 6.0, Stalls::default().share()), (4.0, 1.0));
    }

    #[test]
    fn something_counts_however_late() {
        let millis = Duration::from_millis;
        let mut phase = between(millis(10), millis(20));
        let told = [9, 30, 31].map(|now| phase(millis(now), &[]).unwrap());
        assert_eq!(told, [Phase::Pass, Phase::Count, Phase::End]);
    }
}
