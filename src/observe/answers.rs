//! `Counted`: what the answers of one output were.

use std::sync::Arc;

use crate::{
    backend::TensorSpec,
    metrics::SCORE_BUCKETS,
    rollout::judge::{Answers, Kind},
    stats::{
        histogram::Histogram,
        labels::{Labels, MAX_CLASSES},
        moments::Moments,
    },
    tensor::{DType, Data, Tensor},
};

/// Rows of an answer that are looked at.
const MAX_ROWS: usize = 64;

/// How an output's answers are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Each element is a label.
    Labels,
    /// The label is the index of the largest element of a row.
    Scores,
    /// Each element is a value.
    Values,
}

impl Look {
    /// How an output is looked at, if it is.
    pub(super) fn at(spec: &TensorSpec) -> Option<Self> {
        let width: i64 = match spec.shape.as_slice() {
            [_] => 1,
            [_, width] => *width,
            _ => return None,
        };
        match spec.dtype {
            DType::Fp32 | DType::Fp64 if width == 1 => Some(Self::Values),
            // Scores of more classes are not looked through for the best one.
            DType::Fp32 | DType::Fp64 if (2..=MAX_CLASSES as i64).contains(&width) => Some(Self::Scores),
            DType::Bytes | DType::Bool | DType::Int64 | DType::Int32 | DType::Uint8 if width == 1 => Some(Self::Labels),
            _ => None,
        }
    }
}

/// What the answers of one output were.
#[derive(Clone)]
pub(super) struct Counted {
    pub(super) output: Arc<str>,
    pub(super) seen: Seen,
    /// Elements that were NaN or infinite.
    pub(super) nonfinite: u64,
}

/// What came, by how it is read.
#[derive(Clone)]
pub(super) enum Seen {
    Labels(Labels),
    Scores(Labels, Scores),
    Values(Values),
}

/// What winning classes scored.
#[derive(Clone, Default)]
pub(super) struct Scores {
    /// By bucket of `SCORE_BUCKETS`, and above.
    pub(super) counts: [u64; SCORE_BUCKETS.len() + 1],
    pub(super) sum: f64,
}

#[derive(Clone, Default)]
pub(super) struct Values {
    pub(super) histogram: Histogram,
    pub(super) sum: f64,
    pub(super) moments: Moments,
}

impl Counted {
    pub(super) fn new(output: Arc<str>, look: Look) -> Self {
        let seen = match look {
            Look::Labels => Seen::Labels(Labels::default()),
            Look::Scores => Seen::Scores(Labels::default(), Scores::default()),
            Look::Values => Seen::Values(Values::default()),
        };
        Self { output, seen, nonfinite: 0 }
    }

    /// Counts an answer's rows; whether all of them are numbers.
    pub(super) fn add(&mut self, output: &Tensor) -> bool {
        let before = self.nonfinite;
        match (&mut self.seen, &output.data, output.dtype) {
            (Seen::Labels(labels), Data::Strings(texts), _) => {
                texts.iter().take(MAX_ROWS).for_each(|text| labels.text(text));
            }
            (Seen::Labels(labels), Data::Plain(bytes), dtype) => {
                let size = dtype.size().unwrap_or(1);
                bytes.chunks_exact(size).take(MAX_ROWS).for_each(|bytes| labels.class(integer(bytes)));
            }
            (Seen::Scores(labels, scores), Data::Plain(bytes), dtype) => {
                let width = output.shape.get(1).copied().unwrap_or(1).max(1);
                let mut count = |best: (usize, f64), nonfinite| {
                    self.nonfinite += nonfinite;
                    // A row without a number has no winner.
                    if best.1 > f64::NEG_INFINITY {
                        labels.class(best.0 as i64);
                        scores.add(best.1);
                    }
                };
                if dtype == DType::Fp64 {
                    rows(bytes, width, f64::from_le_bytes).for_each(|(best, nonfinite)| count(best, nonfinite));
                } else {
                    let read = |bytes| f64::from(f32::from_le_bytes(bytes));
                    rows(bytes, width, read).for_each(|(best, nonfinite)| count(best, nonfinite));
                }
            }
            (Seen::Values(values), Data::Plain(bytes), dtype) => {
                let mut count = |value: f64| {
                    if value.is_finite() {
                        values.add(value);
                    } else {
                        self.nonfinite += 1;
                    }
                };
                if dtype == DType::Fp64 {
                    elements(bytes, f64::from_le_bytes).take(MAX_ROWS).for_each(&mut count);
                } else {
                    elements(bytes, f32::from_le_bytes).take(MAX_ROWS).for_each(|value| count(value.into()));
                }
            }
            // A backend gives what its signature says.
            (Seen::Scores(..) | Seen::Values(_), Data::Strings(_), _) => {}
        }
        self.nonfinite == before
    }

    /// What the judge sees of it.
    pub(super) fn answers(&self) -> Answers {
        let kind = match &self.seen {
            Seen::Labels(labels) | Seen::Scores(labels, _) => {
                Kind::Labels { counts: labels.counts(), other: labels.other() }
            }
            Seen::Values(values) => Kind::Values(values.histogram.clone()),
        };
        Answers { output: self.output.clone(), kind }
    }
}

impl Scores {
    fn add(&mut self, score: f64) {
        if score.is_finite() {
            let bucket = SCORE_BUCKETS.partition_point(|&bound| bound < score);
            self.counts[bucket] += 1;
            self.sum += score;
        }
    }
}

impl Values {
    fn add(&mut self, value: f64) {
        self.histogram.add(value);
        self.sum += value;
        self.moments.add(value);
    }
}

fn elements<const SIZE: usize, T>(bytes: &[u8], read: impl Fn([u8; SIZE]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<SIZE>().0.iter().map(move |bytes| read(*bytes))
}

/// The best element of each row with its index, and how many of the row are no numbers.
fn rows<const SIZE: usize>(
    bytes: &[u8],
    width: usize,
    read: impl Fn([u8; SIZE]) -> f64 + Copy,
) -> impl Iterator<Item = ((usize, f64), u64)> {
    bytes.chunks_exact(width * SIZE).take(MAX_ROWS).map(move |row| {
        let (mut best, mut nonfinite) = ((0, f64::NEG_INFINITY), 0);
        for (index, value) in elements(row, read).enumerate() {
            nonfinite += u64::from(!value.is_finite());
            best = if value > best.1 { (index, value) } else { best };
        }
        (best, nonfinite)
    })
}

/// The element of an integer type.
fn integer(bytes: &[u8]) -> i64 {
    match *bytes {
        [a] => a.into(),
        [a, b, c, d] => i32::from_le_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h] => i64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => 0,
    }
}
