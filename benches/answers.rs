//! What each model under load answers, row by row: the echo builds its replies from this.

use bytes::Bytes;

use crate::stub;

/// One output of a model.
pub struct Output {
    pub name: &'static str,
    pub row: Row,
}

/// What an output holds for each row of the input.
pub enum Row {
    /// One number, in a tensor of one dimension.
    Label(i64),
    Scores(&'static [f32]),
    /// The input's own row.
    Input,
}

impl Row {
    pub fn datatype(&self) -> &'static str {
        match self {
            Row::Label(_) => "INT64",
            Row::Scores(_) | Row::Input => "FP32",
        }
    }

    pub fn shape(&self, input: &[i64]) -> Vec<i64> {
        let rows = rows(input);
        match self {
            Row::Label(_) => vec![rows],
            Row::Scores(scores) => vec![rows, scores.len() as i64],
            Row::Input => input.to_vec(),
        }
    }

    /// All rows, built anew as a model would, little-endian.
    pub fn bytes(&self, shape: &[i64], input: &Bytes) -> Bytes {
        let rows = rows(shape);
        match self {
            Row::Label(label) => (0..rows).flat_map(|_| label.to_le_bytes()).collect(),
            Row::Scores(scores) => (0..rows).flat_map(|_| *scores).flat_map(|score| score.to_le_bytes()).collect(),
            Row::Input => input.clone(),
        }
    }
}

/// Rows of an input, at most as many as a benchmark sends: the echo builds what a request asks for.
fn rows(shape: &[i64]) -> i64 {
    shape.first().copied().unwrap_or(1).clamp(0, 1024)
}

/// What the model gives for the row that is asked: over JSON a number's length and how hard it is to write show.
const IRIS: &[Output] = &[
    Output { name: "label", row: Row::Label(1) },
    Output { name: "probabilities", row: Row::Scores(&[0.0, 0.999_999_6, 0.0]) },
];
const DIGITS: &[Output] = &[Output { name: "logits", row: Row::Scores(&[0.25; 10]) }];
const CONVOLUTION: &[Output] = &[Output { name: "scores", row: Row::Scores(&[0.25; 10]) }];
const IDENTITY: &[Output] = &[Output { name: "same", row: Row::Input }];
const MAGIKA: &[Output] = &[Output { name: "target_label", row: Row::Scores(&[0.0625; 214]) }];
const STUB: &[Output] = &[Output { name: stub::OUTPUT, row: Row::Input }];

/// The outputs of a model, in its order.
pub fn of(model: &str) -> Option<&'static [Output]> {
    match model {
        "iris" => Some(IRIS),
        "digits" => Some(DIGITS),
        "convolution" => Some(CONVOLUTION),
        "identity" => Some(IDENTITY),
        "magika" => Some(MAGIKA),
        stub::MODEL => Some(STUB),
        _ => None,
    }
}
