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
    /// Where it stands among the outputs.
    pub(super) place: usize,
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
    pub(super) fn new(output: Arc<str>, place: usize, look: Look) -> Self {
        let seen = match look {
            Look::Labels => Seen::Labels(Labels::default()),
            Look::Scores => Seen::Scores(Labels::default(), Scores::default()),
            Look::Values => Seen::Values(Values::default()),
        };
        Self { output, place, seen, nonfinite: 0 }
    }

    /// Counts an answer's rows; whether all of them are numbers.
    pub(super) fn add(&mut self, output: &Tensor) -> bool {
        let nonfinite = match (&mut self.seen, &output.data) {
            (Seen::Labels(labels), Data::Strings(texts)) => {
                texts.iter().take(MAX_ROWS).for_each(|text| labels.text(text));
                0
            }
            (Seen::Labels(labels), Data::Plain(bytes)) => {
                match output.dtype {
                    DType::Int64 => elements(bytes, MAX_ROWS, i64::from_le_bytes, |label| labels.class(label)),
                    DType::Int32 => elements(bytes, MAX_ROWS, i32::from_le_bytes, |label| labels.class(label.into())),
                    _ => elements(bytes, MAX_ROWS, u8::from_le_bytes, |label| labels.class(label.into())),
                }
                0
            }
            (Seen::Scores(labels, scores), Data::Plain(bytes)) => {
                let width = output.shape.get(1).copied().unwrap_or(1).max(1);
                if output.dtype == DType::Fp64 {
                    winners(bytes, width, f64::from_le_bytes, labels, scores)
                } else {
                    winners(bytes, width, |bytes| f32::from_le_bytes(bytes).into(), labels, scores)
                }
            }
            (Seen::Values(values), Data::Plain(bytes)) => {
                let mut nonfinite = 0;
                let count = |value: f64| if value.is_finite() { values.add(value) } else { nonfinite += 1 };
                if output.dtype == DType::Fp64 {
                    elements(bytes, MAX_ROWS, f64::from_le_bytes, count);
                } else {
                    elements(bytes, MAX_ROWS, |bytes| f32::from_le_bytes(bytes).into(), count);
                }
                nonfinite
            }
            // A backend gives what its signature says.
            (Seen::Scores(..) | Seen::Values(_), Data::Strings(_)) => 0,
        };
        self.nonfinite += nonfinite;
        nonfinite == 0
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

/// Does something with each of the first `most` elements.
fn elements<const SIZE: usize, T>(bytes: &[u8], most: usize, read: impl Fn([u8; SIZE]) -> T, mut each: impl FnMut(T)) {
    // Plain loops, here and below: with iterators in one another, counting an answer of iris took 642 instructions, and
    // not 506.
    for bytes in bytes.as_chunks::<SIZE>().0.iter().take(most) {
        each(read(*bytes));
    }
}

/// Counts the best element of each row as its label; how many elements are no numbers.
fn winners<const SIZE: usize>(
    bytes: &[u8],
    width: usize,
    read: impl Fn([u8; SIZE]) -> f64,
    labels: &mut Labels,
    scores: &mut Scores,
) -> u64 {
    let mut nonfinite = 0;
    for row in bytes.as_chunks::<SIZE>().0.chunks_exact(width).take(MAX_ROWS) {
        let (mut winner, mut best) = (0, f64::NEG_INFINITY);
        for (index, bytes) in row.iter().enumerate() {
            let score = read(*bytes);
            nonfinite += u64::from(!score.is_finite());
            if score > best {
                (winner, best) = (index, score);
            }
        }
        // A row without a number has no winner.
        if best > f64::NEG_INFINITY {
            labels.class(winner as i64);
            scores.add(best);
        }
    }
    nonfinite
}
