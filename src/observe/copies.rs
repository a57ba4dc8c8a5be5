//! What became of the copies that went to a version: how its answers compare with the live ones, and which there are
//! none of.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use parking_lot::Mutex;
use serde::Serialize;

use super::{
    Tally,
    compare::{Difference, compare},
};
use crate::{rollout::judge::Agreement, tensor::Tensor};

/// Why there is no answer to a copy, though the version might have given one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shed {
    /// As many copies waited as may.
    Full,
    /// The processor was busy with other things.
    Busy,
    /// The answer did not come in time, or the version was unloaded before it came.
    Late,
    /// The request has the types of the version that answered it, and this one takes others.
    Untyped,
}

/// Copies without an answer, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Missing {
    pub full: u64,
    pub busy: u64,
    pub late: u64,
    pub untyped: u64,
}

impl Missing {
    pub fn all(&self) -> u64 {
        self.full + self.busy + self.late + self.untyped
    }
}

/// How a version's answers to copies compare with the live ones, since it was loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    pub agreement: Agreement,
    pub missing: Missing,
    /// Those that were compared, in the order in which they were seen first.
    pub outputs: Vec<OutputComparison>,
    /// What could not be compared the last time that something could not.
    pub unlike: Option<String>,
}

/// How one output of the answers compares with the live one.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct OutputComparison {
    pub output: Arc<str>,
    /// Answers in which both had it, or only the live one.
    pub compared: u64,
    /// Those with another label, a number against none, or unlike ones.
    pub disagreed: u64,
    /// Those where the version's was missing, or of another shape or type.
    pub unlike: u64,
    /// Those with numbers that were compared, all of them.
    pub measured: u64,
    /// The largest difference of all elements of all answers.
    pub max_abs: f64,
    /// The mean over answers of the mean over their elements.
    pub mean_abs: f64,
    /// The mean over those answers that have one.
    pub mean_cosine: Option<f64>,
}

/// Counts what becomes of copies.
#[derive(Default)]
pub(super) struct Copies {
    /// Those that are shed are counted by I/O threads, which nobody may hold up.
    shed: [AtomicU64; 4],
    /// What waits for an answer.
    waiting: AtomicUsize,
    bytes: AtomicUsize,
    /// Locked for moments only, since those who count do so when nothing else wants the processor.
    answered: Mutex<Answered>,
}

#[derive(Default)]
struct Answered {
    compared: u64,
    disagreed: u64,
    failed: u64,
    outputs: Vec<Totals>,
    unlike: Option<String>,
}

#[derive(Default)]
struct Totals {
    output: Arc<str>,
    compared: u64,
    disagreed: u64,
    unlike: u64,
    measured: u64,
    max_abs: f64,
    /// Sums over answers.
    mean_abs: f64,
    cosine: f64,
    with_cosine: u64,
}

impl Tally {
    /// Takes room for a copy of so many bytes, of which so many and so many bytes may wait altogether; whether there was
    /// any. One copy may always wait, whatever its size. To be given back with [`leave`](Self::leave).
    pub fn enter(&self, bytes: usize, max_copies: usize, max_bytes: usize) -> bool {
        let waiting = self.copies.waiting.fetch_add(1, Ordering::Relaxed);
        let before = self.copies.bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = waiting < max_copies && (waiting == 0 || before.saturating_add(bytes) <= max_bytes);
        if !fits {
            self.leave(bytes);
        }
        fits
    }

    /// Whether there is no room for another copy, of whatever size.
    pub fn is_full(&self, max_copies: usize, max_bytes: usize) -> bool {
        let waiting = self.copies.waiting.load(Ordering::Relaxed);
        waiting >= max_copies || (waiting > 0 && self.copies.bytes.load(Ordering::Relaxed) > max_bytes)
    }

    /// Gives back the room of a copy.
    pub fn leave(&self, bytes: usize) {
        self.copies.waiting.fetch_sub(1, Ordering::Relaxed);
        self.copies.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Counts the answer to a copy beside the live one. All of the live outputs are compared with those of the same
    /// names; what else the copy's answer has, nobody has asked for.
    pub fn compared(&self, live: &[Tensor], copy: &[Tensor]) {
        let compare = |live: &Tensor| {
            let twin = copy.iter().find(|output| output.name == live.name);
            let found = match twin {
                Some(twin) => compare(live, twin),
                None => Err(format!("output '{}' is missing", live.name)),
            };
            (live.name.clone(), found)
        };
        let found: Vec<(Arc<str>, Result<Difference, String>)> = live.iter().map(compare).collect();
        self.copies.answered.lock().add(found);
    }

    /// Counts a copy that failed, though the live request had gone well.
    pub fn copy_failed(&self) {
        self.copies.answered.lock().failed += 1;
    }

    /// Counts a copy without an answer.
    pub fn shed(&self, reason: Shed) {
        self.copies.shed[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many answers to copies agree with the live ones, and which there are none of.
    pub fn agreement(&self) -> Agreement {
        let missing = self.missing();
        let answered = self.copies.answered.lock();
        let Answered { compared, disagreed, failed, .. } = *answered;
        Agreement { compared, disagreed, failed, missing: missing.all() }
    }

    /// Everything there is to say of copies.
    pub fn comparison(&self) -> Comparison {
        let (agreement, missing) = (self.agreement(), self.missing());
        let answered = self.copies.answered.lock();
        let outputs = answered.outputs.iter().map(OutputComparison::from).collect();
        Comparison { agreement, missing, outputs, unlike: answered.unlike.clone() }
    }

    fn missing(&self) -> Missing {
        let count = |reason: Shed| self.copies.shed[reason as usize].load(Ordering::Relaxed);
        Missing {
            full: count(Shed::Full),
            busy: count(Shed::Busy),
            late: count(Shed::Late),
            untyped: count(Shed::Untyped),
        }
    }
}

impl Answered {
    fn add(&mut self, found: Vec<(Arc<str>, Result<Difference, String>)>) {
        let mut disagreed = false;
        for (output, found) in found {
            let known = self.outputs.iter().position(|totals| totals.output == output);
            let index = known.unwrap_or_else(|| {
                self.outputs.push(Totals { output, ..Totals::default() });
                self.outputs.len() - 1
            });
            disagreed |= self.outputs[index].add(&found);
            self.unlike = found.err().or(self.unlike.take());
        }
        self.compared += 1;
        self.disagreed += u64::from(disagreed);
    }
}

impl Totals {
    /// Whether the two disagree.
    fn add(&mut self, found: &Result<Difference, String>) -> bool {
        let disagrees = found.as_ref().map_or(true, |difference| difference.label_differs);
        self.compared += 1;
        self.disagreed += u64::from(disagrees);
        self.unlike += u64::from(found.is_err());
        if let Some(numbers) = found.as_ref().ok().and_then(|difference| difference.numbers) {
            self.measured += 1;
            self.max_abs = self.max_abs.max(numbers.max_abs);
            self.mean_abs += numbers.mean_abs;
            self.with_cosine += u64::from(numbers.cosine.is_some());
            self.cosine += numbers.cosine.unwrap_or_default();
        }
        disagrees
    }
}

impl From<&Totals> for OutputComparison {
    fn from(totals: &Totals) -> Self {
        Self {
            output: totals.output.clone(),
            compared: totals.compared,
            disagreed: totals.disagreed,
            unlike: totals.unlike,
            measured: totals.measured,
            max_abs: totals.max_abs,
            mean_abs: totals.mean_abs / totals.measured.max(1) as f64,
            mean_cosine: (totals.with_cosine > 0).then(|| totals.cosine / totals.with_cosine as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::Signature,
        tensor::{DType, Data},
    };

    fn floats(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new(name.into(), DType::Fp32, shape.into(), Data::Plain(bytes.into())).unwrap()
    }

    #[test]
    fn answers_are_counted_once_and_outputs_each_for_itself() {
        let tally = Tally::new(&Signature::default());
        assert_eq!(tally.comparison(), Comparison::default());
        let scores =
            |best: usize| floats("scores", &[1, 3], &std::array::from_fn::<f32, 3, _>(|i| f32::from(i == best)));
        let value = |value: f32| floats("value", &[1], &[value]);
        tally.compared(&[scores(0), value(1.0)], &[value(1.5), scores(0), value(9.0)]);
        tally.compared(&[scores(0), value(1.0)], &[scores(1), value(0.0)]);
        tally.compared(&[scores(0), value(1.0)], &[scores(2), value(f32::NAN)]);
        tally.compared(&[scores(0), value(1.0)], &[value(1.0)]);
        tally.copy_failed();
        let sheds = [Shed::Full, Shed::Busy, Shed::Busy, Shed::Late, Shed::Untyped];
        sheds.into_iter().for_each(|reason| tally.shed(reason));
        let found = tally.comparison();
        let agreement = Agreement { compared: 4, disagreed: 3, failed: 1, missing: 5 };
        assert_eq!((found.agreement, tally.agreement()), (agreement, agreement));
        assert_eq!(found.missing, Missing { full: 1, busy: 2, late: 1, untyped: 1 });
        assert_eq!(found.unlike.as_deref(), Some("output 'scores' is missing"));
        let [scores, value] = &found.outputs[..] else { panic!("{found:?}") };
        assert_eq!((&*scores.output, &*value.output), ("scores", "value"));
        assert_eq!((scores.compared, scores.disagreed, scores.unlike, scores.measured), (4, 3, 1, 3));
        assert_eq!((scores.max_abs, scores.mean_cosine), (1.0, Some(1.0 / 3.0)));
        assert_eq!((value.compared, value.disagreed, value.unlike, value.measured), (4, 1, 0, 3));
        assert_eq!((value.max_abs, value.mean_abs), (1.0, 0.5));
        assert_eq!(value.mean_cosine, Some(1.0), "one of the answers has no direction");
    }

    #[test]
    fn so_many_copies_may_wait() {
        let tally = Tally::new(&Signature::default());
        let enter = |bytes| tally.enter(bytes, 3, 100);
        let is_full = || tally.is_full(3, 100);
        assert!(!is_full());
        assert_eq!([500, 1].map(enter), [true, false], "one of any size, and then no more");
        assert!(is_full());
        tally.leave(500);
        assert_eq!([60, 50, 40].map(enter), [true, false, true]);
        assert!(!is_full(), "one without bytes fits");
        assert_eq!([0, 0].map(enter), [true, false]);
        assert!(is_full());
        [60, 40, 0].into_iter().for_each(|bytes| tally.leave(bytes));
        assert!(enter(100));
    }

    #[test]
    fn the_last_thing_that_could_not_be_compared_is_kept() {
        let tally = Tally::new(&Signature::default());
        tally.compared(&[floats("y", &[2], &[0.0; 2])], &[floats("y", &[1], &[0.0])]);
        tally.compared(&[floats("y", &[1], &[0.0])], &[floats("y", &[1], &[0.0])]);
        let found = tally.comparison();
        assert_eq!(found.unlike.as_deref(), Some("output 'y' has shape [1], the live one [2]"));
        assert_eq!((found.agreement.compared, found.agreement.disagreed), (2, 1));
    }
}
