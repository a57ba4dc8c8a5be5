//! `Tally`: what a version did and what its answers were, counted as they leave.
//!
//! Everything a judge or an operator wants to know of a version comes from the differences between two looks at it, so
//! that counting needs to know nothing of rollouts.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::{
    backend::{Signature, TensorSpec},
    metrics::Way,
    rollout::judge::{Agreement, Answers, Kind, Window},
    stats::histogram::Histogram,
    tensor::{DType, Data, Tensor},
};

/// Labels of an output that are told apart; the first so many that come.
const MAX_LABELS: usize = 20;
/// Scores of a row that are looked through for the best one: those of more classes are not looked at.
const MAX_CLASSES: i64 = 4096;
/// Rows of an answer that are looked at.
const MAX_ROWS: usize = 64;

/// What a version did since it was loaded, by the way in which requests came to it.
pub struct Tally {
    looks: Vec<Option<Look>>,
    /// Made when the first such request comes.
    windows: [Mutex<Option<Box<Window>>>; Way::ALL.len()],
    /// What is known of the outputs before there are answers.
    empty: Vec<Answers>,
}

/// How an output's answers are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Each element is a label.
    Labels,
    /// The label is the index of the largest element of a row.
    Scores,
    /// Each element is a value.
    Values,
}

impl Tally {
    pub fn new(signature: &Signature) -> Self {
        let looks: Vec<Option<Look>> = signature.outputs.iter().map(look).collect();
        let seen = looks.iter().zip(&signature.outputs).filter_map(|(look, spec)| Some(((*look)?, spec)));
        let answers = seen.map(|(look, spec)| Answers {
            output: spec.name.clone(),
            kind: match look {
                Look::Labels | Look::Scores => Kind::Labels { counts: Vec::new(), other: 0 },
                Look::Values => Kind::Values(Histogram::default()),
            },
        });
        Self { windows: Default::default(), empty: answers.collect(), looks }
    }

    /// Counts a request that was answered with an error.
    pub fn failed(&self, way: Way) {
        self.with(way, |window| {
            window.requests += 1;
            window.errors += 1;
        });
    }

    /// Counts a request whose client left after a time: it would have taken longer than that.
    pub fn given_up(&self, way: Way, after: Duration) {
        self.with(way, |window| window.latency.add(after.as_secs_f64()));
    }

    /// Counts a good answer: all of the version's outputs, in the order of its signature.
    pub fn answered(&self, way: Way, took: Duration, outputs: &[Tensor]) {
        self.with(way, |window| {
            let Window { requests, latency, looked_at, no_numbers, answers, .. } = window;
            *requests += 1;
            latency.add(took.as_secs_f64());
            if answers.is_empty() {
                return;
            }
            *looked_at += 1;
            let seen = self.looks.iter().zip(outputs).filter_map(|(look, output)| Some(((*look)?, output)));
            let mut odd = false;
            for ((look, output), answers) in seen.zip(answers) {
                odd |= !count(look, output, &mut answers.kind);
            }
            *no_numbers += u64::from(odd);
        });
    }

    /// Everything since the version was loaded.
    pub fn window(&self, way: Way) -> Window {
        let window = self.windows[way as usize].lock();
        window.as_deref().cloned().unwrap_or_else(|| self.nothing())
    }

    /// How the version's answers to copies compare with those that clients got.
    pub fn agreement(&self) -> Agreement {
        Agreement::default()
    }

    fn with(&self, way: Way, work: impl FnOnce(&mut Window)) {
        let mut window = self.windows[way as usize].lock();
        work(window.get_or_insert_with(|| Box::new(self.nothing())));
    }

    fn nothing(&self) -> Window {
        Window { answers: self.empty.clone(), ..Window::default() }
    }
}

/// How an output is looked at, if it is.
fn look(spec: &TensorSpec) -> Option<Look> {
    let width: i64 = match spec.shape.as_slice() {
        [_] => 1,
        [_, width] => *width,
        _ => return None,
    };
    match spec.dtype {
        DType::Fp32 | DType::Fp64 if width == 1 => Some(Look::Values),
        DType::Fp32 | DType::Fp64 if (2..=MAX_CLASSES).contains(&width) => Some(Look::Scores),
        DType::Bytes | DType::Bool | DType::Int64 | DType::Int32 | DType::Uint8 if width == 1 => Some(Look::Labels),
        _ => None,
    }
}

/// Counts an output's rows; whether all of them are numbers.
fn count(look: Look, output: &Tensor, kind: &mut Kind) -> bool {
    match (look, kind) {
        (Look::Values, Kind::Values(histogram)) => {
            let mut fine = true;
            for value in floats(output).take(MAX_ROWS) {
                if value.is_finite() { histogram.add(value) } else { fine = false }
            }
            fine
        }
        (Look::Scores, Kind::Labels { counts, other }) => {
            let width = output.shape.get(1).copied().unwrap_or(1).max(1);
            let mut fine = true;
            let mut values = floats(output);
            for _ in 0..output.rows().min(MAX_ROWS) {
                let mut best = (0, f64::NEG_INFINITY);
                for (index, value) in values.by_ref().take(width).enumerate() {
                    fine &= value.is_finite();
                    best = if value > best.1 { (index, value) } else { best };
                }
                let mut text = itoa::Buffer::new();
                one_more(text.format(best.0).as_bytes(), counts, other);
            }
            fine
        }
        (Look::Labels, Kind::Labels { counts, other }) => {
            match &output.data {
                Data::Strings(labels) => labels.iter().take(MAX_ROWS).for_each(|label| one_more(label, counts, other)),
                Data::Plain(bytes) => {
                    let mut text = itoa::Buffer::new();
                    for label in integers(output.dtype, bytes).take(MAX_ROWS) {
                        one_more(text.format(label).as_bytes(), counts, other);
                    }
                }
            }
            true
        }
        _ => true,
    }
}

fn one_more(label: &[u8], counts: &mut Vec<(Arc<str>, u64)>, other: &mut u64) {
    if let Some((_, count)) = counts.iter_mut().find(|(known, _)| known.as_bytes() == label) {
        *count += 1;
    } else if counts.len() < MAX_LABELS {
        counts.push((String::from_utf8_lossy(label).into(), 1));
    } else {
        *other += 1;
    }
}

fn floats(tensor: &Tensor) -> impl Iterator<Item = f64> + '_ {
    let bytes: &[u8] = if let Data::Plain(bytes) = &tensor.data { bytes } else { &[] };
    let wide = tensor.dtype == DType::Fp64;
    bytes.chunks_exact(if wide { 8 } else { 4 }).map(move |bytes| match *bytes {
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h] => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => f64::NAN,
    })
}

fn integers(dtype: DType, bytes: &Bytes) -> impl Iterator<Item = i64> + '_ {
    bytes.chunks_exact(dtype.size().unwrap_or(1)).map(|bytes| match *bytes {
        [a] => a.into(),
        [a, b, c, d] => i32::from_le_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h] => i64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(outputs: &[(&str, DType, &[i64])]) -> Tally {
        let spec = |&(name, dtype, shape): &(&str, DType, &[i64])| TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        Tally::new(&Signature { outputs: outputs.iter().map(spec).collect(), ..Signature::default() })
    }

    fn floats(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new(name.into(), DType::Fp32, shape.into(), Data::Plain(bytes.into())).unwrap()
    }

    fn labels(window: &Window) -> Vec<(String, u64)> {
        let Kind::Labels { counts, .. } = &window.answers[0].kind else { panic!("values") };
        counts.iter().map(|(label, count)| (label.to_string(), *count)).collect()
    }

    #[test]
    fn the_best_score_is_the_label() {
        let tally = tally(&[("scores", DType::Fp32, &[-1, 3])]);
        tally.answered(
            Way::Stable,
            Duration::from_millis(3),
            &[floats("scores", &[2, 3], &[0.1, 0.7, 0.2, 0.9, 0.0, 0.1])],
        );
        tally.answered(Way::Stable, Duration::from_millis(3), &[floats("scores", &[1, 3], &[0.1, f32::NAN, 0.2])]);
        tally.failed(Way::Stable);
        let window = tally.window(Way::Stable);
        assert_eq!((window.requests, window.errors, window.looked_at, window.no_numbers), (3, 1, 2, 1));
        assert_eq!(window.latency.total(), 2);
        assert_eq!(labels(&window), [("1".to_owned(), 1), ("0".to_owned(), 1), ("2".to_owned(), 1)]);
    }

    #[test]
    fn so_many_labels_are_told_apart() {
        let tally = tally(&[("label", DType::Int64, &[-1])]);
        for label in 0..30_i64 {
            let bytes = label.to_le_bytes().to_vec();
            let output = Tensor::new("label".into(), DType::Int64, [1].as_slice().into(), Data::Plain(bytes.into()));
            tally.answered(Way::Stable, Duration::ZERO, &[output.unwrap()]);
        }
        let window = tally.window(Way::Stable);
        assert_eq!(labels(&window).len(), MAX_LABELS);
        assert!(matches!(window.answers[0].kind, Kind::Labels { other: 10, .. }));
    }

    #[test]
    fn outputs_that_say_nothing_of_a_decision_are_not_looked_at() {
        let tally = tally(&[("image", DType::Fp32, &[-1, 3, 8, 8]), ("y", DType::Fp32, &[-1, 1])]);
        let image = floats("image", &[1, 3, 1, 1], &[f32::NAN; 3]);
        tally.answered(Way::Stable, Duration::ZERO, &[image.clone(), floats("y", &[1, 1], &[2.0])]);
        tally.answered(Way::Stable, Duration::ZERO, &[image, floats("y", &[1, 1], &[f32::INFINITY])]);
        let window = tally.window(Way::Stable);
        assert_eq!((window.answers.len(), window.no_numbers), (1, 1));
        let Kind::Values(histogram) = &window.answers[0].kind else { panic!("labels") };
        assert_eq!(histogram.total(), 1);
    }
}
