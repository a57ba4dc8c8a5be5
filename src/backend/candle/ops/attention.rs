//! Heads: what each token takes from those that it sees.

use candle_core::{D, Device, Result, Tensor};

use super::{
    elementwise::add_to,
    functions::{exp, largest, sum},
    plain,
    rotary::{Rotation, turn},
    rows::{for_chunks, for_rows},
    stored::numbers,
};

/// What takes a token out of sight: finite, also when scores and another such value are added.
pub(super) const FAR: f32 = f32::MIN / 4.0;

/// Texts of one length and how their tokens are split over heads.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub rows: usize,
    pub tokens: usize,
    pub heads: usize,
    pub head_size: usize,
}

/// Which tokens a text's tokens may look at.
#[derive(Debug)]
pub struct Mask {
    /// For each text and token, whether it is there; empty when all are.
    pub(super) present: Vec<bool>,
    /// What is added to scores where they are not computed here: [rows, 1, 1, tokens].
    pub(super) bias: Option<Tensor>,
}

impl Dims {
    fn hidden(&self) -> usize {
        self.heads * self.head_size
    }
}

impl Mask {
    /// # Errors
    /// What candle says.
    pub fn new(present: Vec<bool>, dims: Dims, device: &Device) -> Result<Self> {
        if present.iter().all(|&present| present) {
            return Ok(Self { present: Vec::new(), bias: None });
        }
        let bias = if device.is_cpu() {
            None
        } else {
            let bias: Vec<f32> = present.iter().map(|&present| if present { 0.0 } else { FAR }).collect();
            Some(Tensor::from_vec(bias, (dims.rows, 1, 1, dims.tokens), device)?)
        };
        Ok(Self { present, bias })
    }
}

/// Queries (divided by the root of a head's size), keys and values, each [rows, heads, tokens, head size], of rows that
/// have one behind the other.
pub fn split(
    x: &Tensor,
    bias: Option<&Tensor>,
    rotation: Option<&Rotation>,
    dims: Dims,
) -> Result<(Tensor, Tensor, Tensor)> {
    if !x.device().is_cpu() {
        return plain::split(&plain::add(x.clone(), bias, None)?, rotation, dims);
    }
    let Dims { rows, tokens, heads, head_size } = dims;
    let hidden = dims.hidden();
    let x = x.storage_and_layout();
    let x = numbers(&x)?;
    let bias = bias.map(Tensor::storage_and_layout);
    let bias = bias.as_ref().map(numbers).transpose()?;
    let tables = rotation.map(|rotation| (rotation.cosines.storage_and_layout(), rotation.sines.storage_and_layout()));
    let tables = match &tables {
        Some((cosines, sines)) => Some((numbers(cosines)?, numbers(sines)?)),
        None => None,
    };
    let part = |part: usize, scale: f32| {
        let mut values = vec![0.0; rows * tokens * hidden];
        for_chunks(&mut values, tokens * head_size, |index, lines| {
            let (row, head) = (index / heads, index % heads);
            let offset = part * hidden + head * head_size;
            let bias = bias.as_ref().map(|bias| &bias[offset..offset + head_size]);
            for (token, line) in lines.chunks_exact_mut(head_size).enumerate() {
                let start = (row * tokens + token) * 3 * hidden + offset;
                line.copy_from_slice(&x[start..start + head_size]);
                if let Some(bias) = bias {
                    add_to(line, bias);
                }
                if let Some((cosines, sines)) = tables.as_ref().filter(|_| part < 2) {
                    let half = head_size / 2;
                    let angles = token * half..(token + 1) * half;
                    turn(line, &cosines[angles.clone()], &sines[angles]);
                }
                if scale != 1.0 {
                    line.iter_mut().for_each(|value| *value *= scale);
                }
            }
        });
        Tensor::from_vec(values, (rows, heads, tokens, head_size), &Device::Cpu)
    };
    Ok((part(0, 1.0 / (head_size as f32).sqrt())?, part(1, 1.0)?, part(2, 1.0)?))
}

/// What each token makes of each other one that it sees: `scores` [rows, heads, tokens, tokens] as shares of 1, which
/// are 0 for padding and for what is more than `window` tokens away. What sees nothing gets nothing, and no NaN.
///
/// On a CPU, `scores` may be of a part: of some heads, all texts' counted through, and of some of their tokens.
/// `first` is the first of either.
pub fn attend(scores: Tensor, mask: &Mask, window: Option<usize>, dims: Dims, first: (usize, usize)) -> Result<Tensor> {
    if !scores.device().is_cpu() {
        return plain::attend(&scores, mask, window, dims);
    }
    let Dims { tokens, heads, .. } = dims;
    let count = scores.dim(D::Minus2)?;
    for_rows(&scores, |index, line| {
        let (head, token) = (first.0 + index / count, first.1 + index % count);
        let (start, end) = match window {
            Some(window) => (token.saturating_sub(window), (token + window + 1).min(line.len())),
            None => (0, line.len()),
        };
        line[..start].fill(0.0);
        line[end..].fill(0.0);
        let seen = &mut line[start..end];
        if !mask.present.is_empty() {
            let row = head / heads;
            let present = &mask.present[row * tokens + start..row * tokens + end];
            for (score, &present) in seen.iter_mut().zip(present) {
                *score = if present { *score } else { f32::NEG_INFINITY };
            }
        }
        soften(seen);
    })?;
    Ok(scores)
}

/// The rows of tokens that [rows, heads, tokens, head size] belongs to.
pub fn merge(x: &Tensor, dims: Dims) -> Result<Tensor> {
    let Dims { rows, tokens, heads, head_size } = dims;
    let x = x.reshape((rows, heads, tokens, head_size))?;
    x.transpose(1, 2)?.contiguous()?.reshape((rows * tokens, dims.hidden()))
}

/// The shares of 1 that scores stand for.
fn soften(scores: &mut [f32]) {
    let most = largest(scores);
    if most == f32::NEG_INFINITY {
        scores.fill(0.0);
        return;
    }
    for score in scores.iter_mut() {
        *score = exp(*score - most);
    }
    let scale = 1.0 / sum(scores, |share| share);
    for score in scores.iter_mut() {
        *score *= scale;
    }
}
