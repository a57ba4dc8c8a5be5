//! Heads: what each token takes from those that it sees.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use super::{
    Ops,
    elementwise::add_to,
    functions::{exp, largest, sum},
    rotary::{Rotation, turn},
    rows::{for_chunks, for_rows},
    stored::numbers,
};

/// What takes a token out of sight: finite, also when scores and another such value are added.
const FAR: f32 = f32::MIN / 4.0;

/// Tokens of a block that see but their surroundings: with fewer, products are too small to be fast.
const LEAST_TOKENS: usize = if cfg!(test) { 3 } else { 64 };

/// Texts of one length and how their tokens are split over heads.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub rows: usize,
    pub tokens: usize,
    pub heads: usize,
    pub head_size: usize,
}

/// Queries (divided by the root of a head's size), keys and values, each [rows, heads, tokens, head size].
#[derive(Debug)]
pub struct Heads {
    pub queries: Tensor,
    pub keys: Tensor,
    pub values: Tensor,
}

/// Which tokens a text's tokens may look at.
#[derive(Debug)]
pub struct Mask {
    dims: Dims,
    /// For each text and token, whether it is there; empty when all are.
    present: Vec<bool>,
    /// What is added to scores where they are computed plainly: for padding, [rows * heads, 1, tokens], and for what is
    /// outside of a window, [tokens of a block, as many and the window on both sides].
    pub(super) bias: Option<Tensor>,
    pub(super) far: Option<Tensor>,
}

/// Scores that there are at a time.
#[derive(Debug)]
pub struct Block {
    /// Heads, all texts' counted through.
    pub pairs: Range<usize>,
    /// The tokens that look.
    pub tokens: Range<usize>,
    /// The tokens that they look at.
    pub seen: Range<usize>,
}

impl Dims {
    fn hidden(&self) -> usize {
        self.heads * self.head_size
    }

    /// Heads and tokens of a block that has no more than `most` scores, unless those of one token are more.
    pub(super) fn block(&self, window: Option<usize>, most: usize) -> (usize, usize) {
        let tokens = self.tokens;
        // With as many again around them, half of the scores are of use.
        let length = match window.map(|window| (2 * window).max(LEAST_TOKENS)) {
            Some(length) if tokens > 2 * length => length,
            _ => tokens,
        };
        let width = window.map_or(tokens, |window| tokens.min(length + 2 * window));
        match most / (length * width) {
            0 => (1, (most / width).clamp(1, length)),
            pairs => (pairs, length),
        }
    }
}

impl Mask {
    /// `window` is how far tokens see in the layers where they do not see all.
    ///
    /// # Errors
    /// What candle says.
    pub fn new(ops: Ops, present: Vec<bool>, window: Option<usize>, dims: Dims, device: &Device) -> Result<Self> {
        let mut mask = Self { dims, present: Vec::new(), bias: None, far: None };
        if present.contains(&false) {
            mask.present = present;
        }
        if ops == Ops::Passes {
            return Ok(mask);
        }
        let bias = |is_seen: bool| if is_seen { 0.0 } else { FAR };
        if !mask.present.is_empty() {
            let texts = mask.present.chunks_exact(dims.tokens);
            let lines = texts.flat_map(|text| (0..dims.heads).flat_map(move |_| text));
            let lines: Vec<f32> = lines.map(|&present| bias(present)).collect();
            mask.bias = Some(Tensor::from_vec(lines, (dims.rows * dims.heads, 1, dims.tokens), device)?);
        }
        if let Some(window) = window.filter(|window| window + 1 < dims.tokens) {
            let (_, length) = dims.block(Some(window), ops.most_scores());
            let width = length + 2 * window;
            let line = |token: usize| (0..width).map(move |seen| bias(seen.abs_diff(token + window) <= window));
            let lines: Vec<f32> = (0..length).flat_map(line).collect();
            mask.far = Some(Tensor::from_vec(lines, (length, width), device)?);
        }
        Ok(mask)
    }
}

/// The heads of rows that have queries, keys and values one behind the other.
pub fn split(x: &Tensor, bias: Option<&Tensor>, rotation: Option<&Rotation>, dims: Dims) -> Result<Heads> {
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
    Ok(Heads { queries: part(0, 1.0 / (head_size as f32).sqrt())?, keys: part(1, 1.0)?, values: part(2, 1.0)? })
}

/// What each token takes from those that it sees, in rows again.
pub fn attend(ops: Ops, heads: &Heads, mask: &Mask, window: Option<usize>) -> Result<Tensor> {
    let dims = mask.dims;
    let Dims { rows, tokens, heads: count, head_size } = dims;
    let pairs = rows * count;
    let flat = |x: &Tensor| x.reshape((pairs, tokens, head_size));
    let (queries, keys, values) = (flat(&heads.queries)?, flat(&heads.keys)?.transpose(1, 2)?, flat(&heads.values)?);
    let (count, length) = dims.block(window, ops.most_scores());
    let mut parts = Vec::new();
    for pair in (0..pairs).step_by(count) {
        let pairs = pair..pairs.min(pair + count);
        let of_pairs = |x: &Tensor| x.narrow(0, pairs.start, pairs.len());
        let (queries, keys, values) = (of_pairs(&queries)?, of_pairs(&keys)?, of_pairs(&values)?);
        let mut lines = Vec::new();
        for token in (0..tokens).step_by(length) {
            let looking = token..tokens.min(token + length);
            let seen = match window {
                Some(window) => token.saturating_sub(window)..tokens.min(looking.end + window),
                None => 0..tokens,
            };
            let block = Block { pairs: pairs.clone(), tokens: looking, seen };
            let queries = queries.narrow(1, block.tokens.start, block.tokens.len())?;
            let scores = queries.matmul(&keys.narrow(2, block.seen.start, block.seen.len())?)?;
            let shares = ops.share(scores, mask, window, &block)?;
            lines.push(shares.matmul(&values.narrow(1, block.seen.start, block.seen.len())?)?);
        }
        parts.push(Tensor::cat(&lines, 1)?);
    }
    let heads = Tensor::cat(&parts, 0)?.reshape((rows, dims.heads, tokens, head_size))?;
    heads.transpose(1, 2)?.contiguous()?.reshape((rows * tokens, dims.hidden()))
}

/// `scores` of a block as shares of 1, in place. What sees nothing gets nothing, and no NaN.
pub fn share(scores: Tensor, mask: &Mask, window: Option<usize>, block: &Block) -> Result<Tensor> {
    let Dims { tokens, heads, .. } = mask.dims;
    let (length, seen) = (block.tokens.len(), &block.seen);
    for_rows(&scores, |index, line| {
        let (pair, token) = (block.pairs.start + index / length, block.tokens.start + index % length);
        let near = match window {
            Some(window) => token.saturating_sub(window).max(seen.start)..(token + window + 1).min(seen.end),
            None => seen.clone(),
        };
        let (start, end) = (near.start - seen.start, near.end - seen.start);
        line[..start].fill(0.0);
        line[end..].fill(0.0);
        let line = &mut line[start..end];
        if !mask.present.is_empty() {
            let text = pair / heads * tokens;
            for (score, &present) in line.iter_mut().zip(&mask.present[text + near.start..text + near.end]) {
                *score = if present { *score } else { f32::NEG_INFINITY };
            }
        }
        soften(line);
    })?;
    Ok(scores)
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
