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

/// Rows of an answer that are counted by what they say.
const MAX_ROWS: usize = 64;
/// Elements that are compared side by side.
const LANES: usize = 16;
/// Elements of an answer that are looked through for NaN and infinity where nothing else is made of them: of more, so
/// many at even distances, beginning one further with each answer, so that all of them have their turn.
const MAX_SCANNED: usize = 4096;

/// How an output's answers are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Each element is a label.
    Labels,
    /// The label is the index of the largest element of a row.
    Scores,
    /// Each element is a value.
    Values,
    /// They are numbers, or not.
    Finite,
}

impl Look {
    /// How an output is looked at, if it is.
    pub(super) fn at(spec: &TensorSpec) -> Option<Self> {
        let width = match spec.shape.as_slice() {
            [_] => Some(1),
            [_, width] => Some(*width),
            _ => None,
        };
        match (spec.dtype, width) {
            (DType::Fp32 | DType::Fp64, Some(1)) => Some(Self::Values),
            // Where the graph leaves the width open, each answer has its own.
            (DType::Fp32 | DType::Fp64, Some(width)) if width < 0 || is_row(width as usize) => Some(Self::Scores),
            (DType::Fp32 | DType::Fp64 | DType::Fp16 | DType::Bf16, _) => Some(Self::Finite),
            (DType::Bytes | DType::Bool | DType::Int64 | DType::Int32 | DType::Uint8, Some(1)) => Some(Self::Labels),
            _ => None,
        }
    }
}

/// Whether the best of so many scores is a label; more of them are not looked through for it.
fn is_row(width: usize) -> bool {
    (2..=MAX_CLASSES).contains(&width)
}

/// What the answers of one output were.
#[derive(Clone)]
pub(super) struct Counted {
    pub(super) output: Arc<str>,
    /// Where it stands among the outputs.
    pub(super) place: usize,
    pub(super) seen: Seen,
    /// Elements that were NaN or infinite, of those that are looked at.
    pub(super) nonfinite: u64,
    /// Answers that were looked through for them.
    scans: usize,
}

/// What came, by how it is read.
#[derive(Clone)]
pub(super) enum Seen {
    Labels(Labels),
    Scores(Labels, Scores),
    Values(Values),
    Finite,
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
            Look::Finite => Seen::Finite,
        };
        Self { output, place, seen, nonfinite: 0, scans: 0 }
    }

    /// Counts an answer; whether all that is looked at are numbers.
    pub(super) fn add(&mut self, output: &Tensor) -> bool {
        let bytes = match (&mut self.seen, &output.data) {
            (Seen::Labels(labels), Data::Strings(texts)) => {
                texts.iter().take(MAX_ROWS).for_each(|text| labels.text(text));
                return true;
            }
            // A backend gives what its signature says.
            (_, Data::Strings(_)) => return true,
            (_, Data::Plain(bytes)) => &bytes[..],
        };
        let (mut nonfinite, mut seen) = (0, 0);
        match &mut self.seen {
            Seen::Labels(labels) => {
                match output.dtype {
                    DType::Int64 => elements(bytes, i64::from_le_bytes, |label| labels.class(label)),
                    DType::Int32 => elements(bytes, i32::from_le_bytes, |label| labels.class(label.into())),
                    _ => elements(bytes, u8::from_le_bytes, |label| labels.class(label.into())),
                }
                return true;
            }
            Seen::Scores(labels, scores) => {
                if let Some(width) = output.shape.get(1).copied().filter(|&width| is_row(width)) {
                    nonfinite = if output.dtype == DType::Fp64 {
                        let read = |bytes| (f64::from_le_bytes(bytes), f64::from_le_bytes(bytes).is_finite());
                        winners(bytes, width, f64::NEG_INFINITY, read, labels, scores)
                    } else {
                        let read = |bytes| (f32::from_le_bytes(bytes), f32::from_le_bytes(bytes).is_finite());
                        winners(bytes, width, f32::NEG_INFINITY, read, labels, scores)
                    };
                    seen = MAX_ROWS * width;
                }
            }
            Seen::Values(values) => {
                let count = |value: f64| if value.is_finite() { values.add(value) } else { nonfinite += 1 };
                if output.dtype == DType::Fp64 {
                    elements(bytes, f64::from_le_bytes, count);
                } else {
                    elements(bytes, |bytes| f32::from_le_bytes(bytes).into(), count);
                }
                seen = MAX_ROWS;
            }
            Seen::Finite => {}
        }
        nonfinite += self.scan(output.dtype, bytes, seen);
        self.nonfinite += nonfinite;
        nonfinite == 0
    }

    /// How many elements beyond the first ones, which have been `seen`, are no numbers.
    fn scan(&mut self, dtype: DType, bytes: &[u8], seen: usize) -> u64 {
        let size = dtype.size().unwrap_or(1);
        let Some(rest) = bytes.get(seen * size..).filter(|rest| !rest.is_empty()) else { return 0 };
        let turn = self.scans;
        self.scans = turn.wrapping_add(1);
        match dtype {
            // Of the shorter floats, those whose exponent is all ones.
            DType::Fp16 => nonfinite(rest, turn, |bytes| !u16::from_le_bytes(bytes) & 0x7c00 != 0),
            DType::Bf16 => nonfinite(rest, turn, |bytes| !u16::from_le_bytes(bytes) & 0x7f80 != 0),
            DType::Fp64 => nonfinite(rest, turn, |bytes| f64::from_le_bytes(bytes).is_finite()),
            _ => nonfinite(rest, turn, |bytes| f32::from_le_bytes(bytes).is_finite()),
        }
    }

    /// Whether its answers are told apart. Where the graph leaves the width of rows open, none may have been scores.
    pub(super) fn says_something(&self) -> bool {
        match &self.seen {
            Seen::Finite => false,
            Seen::Scores(labels, _) => self.scans == 0 || !labels.is_empty(),
            Seen::Labels(_) | Seen::Values(_) => true,
        }
    }

    /// What the judge sees of it, if there is more to see than whether they are numbers.
    pub(super) fn answers(&self) -> Option<Answers> {
        let kind = match &self.seen {
            _ if !self.says_something() => return None,
            Seen::Finite => return None,
            Seen::Labels(labels) | Seen::Scores(labels, _) => {
                Kind::Labels { counts: labels.counts(), other: labels.other() }
            }
            Seen::Values(values) => Kind::Values(values.histogram.clone()),
        };
        Some(Answers { output: self.output.clone(), kind })
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

/// Does something with each element of the first rows of one.
fn elements<const SIZE: usize, T>(bytes: &[u8], read: impl Fn([u8; SIZE]) -> T, mut each: impl FnMut(T)) {
    // Plain loops, here and below: with iterators in one another, counting an answer of iris took 642 instructions, and
    // not 506.
    for bytes in bytes.as_chunks::<SIZE>().0.iter().take(MAX_ROWS) {
        each(read(*bytes));
    }
}

/// Counts the best element of each row as its label; how many elements are no numbers. `lowest` is below all of them.
fn winners<const SIZE: usize, T: Copy + PartialOrd + Into<f64>>(
    bytes: &[u8],
    width: usize,
    lowest: T,
    read: impl Fn([u8; SIZE]) -> (T, bool),
    labels: &mut Labels,
    scores: &mut Scores,
) -> u64 {
    let mut nonfinite = 0;
    for row in bytes.as_chunks::<SIZE>().0.chunks_exact(width).take(MAX_ROWS) {
        let (winner, best) = if width < LANES {
            let (mut winner, mut best) = (0, lowest);
            for (index, bytes) in row.iter().enumerate() {
                let (score, is_finite) = read(*bytes);
                nonfinite += u64::from(!is_finite);
                if score > best {
                    (winner, best) = (index, score);
                }
            }
            (winner, best)
        } else {
            wide_winner(row, lowest, &read, &mut nonfinite)
        };
        // A row without a number has no winner.
        if best > lowest {
            labels.class(winner as i64);
            scores.add(best.into());
        }
    }
    nonfinite
}

/// The first of the best elements of a row, and where it is. Side by side the processor compares several at a time: of
/// 1024 classes that takes a seventh of the instructions.
fn wide_winner<const SIZE: usize, T: Copy + PartialOrd>(
    row: &[[u8; SIZE]],
    lowest: T,
    read: &impl Fn([u8; SIZE]) -> (T, bool),
    nonfinite: &mut u64,
) -> (usize, T) {
    let (mut bests, mut odd) = ([lowest; LANES], [0_u32; LANES]);
    let (groups, rest) = row.as_chunks::<LANES>();
    let mut look = |group: &[[u8; SIZE]]| {
        for ((bytes, best), odd) in group.iter().zip(&mut bests).zip(&mut odd) {
            let (score, is_finite) = read(*bytes);
            *best = if score > *best { score } else { *best };
            *odd += u32::from(!is_finite);
        }
    };
    groups.iter().for_each(|group| look(group));
    look(rest);
    *nonfinite += u64::from(odd.iter().sum::<u32>());
    let best = bests.into_iter().fold(lowest, |best, score| if score > best { score } else { best });
    let is_best = |bytes: &[u8; SIZE]| read(*bytes).0 == best;
    // Without a branch for each, for the same reason.
    let holds = |group: &[[u8; SIZE]; LANES]| group.iter().fold(false, |found, bytes| found | is_best(bytes));
    let before = groups.iter().position(holds).unwrap_or(groups.len()) * LANES;
    (before + row[before..].iter().position(is_best).unwrap_or(0), best)
}

/// How many elements are no numbers, of those whose `turn` it is.
fn nonfinite<const SIZE: usize>(bytes: &[u8], turn: usize, is_finite: impl Fn([u8; SIZE]) -> bool) -> u64 {
    let elements = bytes.as_chunks::<SIZE>().0;
    let is_not = |bytes: &&[u8; SIZE]| !is_finite(**bytes);
    let stride = elements.len().div_ceil(MAX_SCANNED);
    // All of them in a row take a fraction of an instruction each.
    let found = if stride <= 1 {
        elements.iter().filter(is_not).count()
    } else {
        elements.iter().skip(turn % stride).step_by(stride).filter(is_not).count()
    };
    found as u64
}
