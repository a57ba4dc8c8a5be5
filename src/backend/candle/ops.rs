//! What an encoder does between matrix products, each in one pass over the elements.
//!
//! candle's own operators on elements would do, and on a GPU they do. On a CPU they hand everything of 64 Ki elements or
//! more to threads that all of the process shares, one caller at a time, and that spin for a while after each; what runs
//! here stays in the pool of the session. One pass in place of three or four is the faster way besides.
//!
//! Activations are matrices of one row for each token, rows of a text one after the other. On a CPU they are of 32 bits,
//! whatever the weights are: processors multiply no halves, and what is converted once for each layer is a matrix of
//! weights, not everything between them.

use std::borrow::Cow;

use candle_core::{CpuStorage, D, DType, Device, InplaceOp1, Layout, Result, Storage, StorageRef, Tensor, bail};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::config::Activation;

/// Elements that are worth a thread's while.
const GRAIN: usize = 16 << 10;

/// Rows that are multiplied with a matrix of 16-bit floats as they are, which is faster than to write it in 32 bits: by
/// half for 16 rows, and no longer for 128. There is no such way for bfloat16.
const FEW_ROWS: usize = 64;

/// What takes a token out of sight: finite, also when scores and another such value are added.
const FAR: f32 = f32::MIN / 4.0;

/// Texts of one length and how their tokens are split over heads.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub rows: usize,
    pub tokens: usize,
    pub heads: usize,
    pub head_size: usize,
}

impl Dims {
    fn hidden(&self) -> usize {
        self.heads * self.head_size
    }
}

/// Scale and shift after normalization.
#[derive(Debug)]
pub struct Norm {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub epsilon: f32,
}

/// Cosines and sines for each position, of half a head's size.
#[derive(Debug)]
pub struct Rotation {
    pub cosines: Tensor,
    pub sines: Tensor,
}

impl Rotation {
    /// # Errors
    /// What candle says.
    pub fn new(positions: usize, head_size: usize, theta: f64, device: &Device) -> Result<Self> {
        let frequencies: Vec<f32> =
            (0..head_size / 2).map(|index| (1.0 / theta.powf((2 * index) as f64 / head_size as f64)) as f32).collect();
        // In 32 bits, as the models were trained; halves could not even count the positions.
        let angles = (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let angles: Vec<f32> = angles.collect();
        let table = |of: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle)).collect();
            Tensor::from_vec(values, (positions, head_size / 2), device)
        };
        Ok(Self { cosines: table(f32::cos)?, sines: table(f32::sin)? })
    }
}

/// Which tokens a text's tokens may look at.
#[derive(Debug)]
pub struct Mask {
    /// For each text and token, whether it is there; empty when all are.
    present: Vec<bool>,
    /// What is added to scores where they are not computed here: [rows, 1, 1, tokens].
    bias: Option<Tensor>,
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

/// The products of rows, `x`, and a matrix of weights.
pub fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if x.dtype() == weight.dtype() {
        return x.matmul(weight);
    }
    if weight.dtype() == DType::F16 && x.dim(0)? <= FEW_ROWS {
        return x.to_dtype(DType::F16)?.matmul(weight)?.to_dtype(x.dtype());
    }
    let stored = weight.storage_and_layout();
    let stored = Stored::of(&stored)?;
    let mut widened = vec![0.0; weight.elem_count()];
    for_chunks(&mut widened, GRAIN, |index, chunk| stored.copy_to(index * GRAIN, chunk));
    x.matmul(&Tensor::from_vec(widened, weight.shape(), &Device::Cpu)?)
}

/// `activation(x + bias)`, row by row; `x` is overwritten.
pub fn activate(x: Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return plain::activate(&plain::add(x, bias, None)?, activation);
    }
    let bias = bias.map(Tensor::storage_and_layout);
    let bias = bias.as_ref().map(numbers).transpose()?;
    for_rows(&x, |_, row| {
        if let Some(bias) = &bias {
            add_to(row, bias);
        }
        activate_each(row, activation);
    })?;
    Ok(x)
}

/// `activation(a) * b` for rows of `x + bias` that are `a` and `b`.
pub fn gate(x: Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    if !x.device().is_cpu() {
        let parts = plain::add(x, bias, None)?.chunk(2, 1)?;
        return plain::activate(&parts[0].contiguous()?, activation)? * parts[1].contiguous()?;
    }
    let (rows, both) = x.dims2()?;
    let size = both / 2;
    let x = x.storage_and_layout();
    let x = numbers(&x)?;
    let bias = bias.map(Tensor::storage_and_layout);
    let bias = bias.as_ref().map(numbers).transpose()?;
    let mut gated = vec![0.0; rows * size];
    for_chunks(&mut gated, size, |index, row| {
        let (a, b) = x[index * both..(index + 1) * both].split_at(size);
        row.copy_from_slice(a);
        if let Some(bias) = &bias {
            add_to(row, &bias[..size]);
        }
        activate_each(row, activation);
        match &bias {
            None => row.iter_mut().zip(b).for_each(|(value, b)| *value *= b),
            Some(bias) => {
                for ((value, b), bias) in row.iter_mut().zip(b).zip(&bias[size..]) {
                    *value *= b + bias;
                }
            }
        }
    });
    Tensor::from_vec(gated, (rows, size), &Device::Cpu)
}

/// The normalized rows of `x + bias + residual`; `x` is overwritten.
pub fn normalize(x: Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>, norm: &Norm) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return plain::normalize(&plain::add(x, bias, residual)?, norm);
    }
    combine(x, bias, residual, Some(norm))
}

/// `x + bias + residual`; `x` is overwritten.
pub fn add(x: Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return plain::add(x, bias, residual);
    }
    combine(x, bias, residual, None)
}

fn combine(x: Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>, norm: Option<&Norm>) -> Result<Tensor> {
    if residual.is_some_and(|residual| residual.dims() != x.dims()) {
        bail!("what is to be added has another shape")
    }
    let bias = bias.map(Tensor::storage_and_layout);
    let bias = bias.as_ref().map(numbers).transpose()?;
    let residual = residual.map(Tensor::storage_and_layout);
    let residual = residual.as_ref().map(numbers).transpose()?;
    let weight = norm.map(|norm| norm.weight.storage_and_layout());
    let weight = weight.as_ref().map(numbers).transpose()?;
    let shift = norm.and_then(|norm| norm.bias.as_ref()).map(Tensor::storage_and_layout);
    let shift = shift.as_ref().map(numbers).transpose()?;
    for_rows(&x, |index, row| {
        if let Some(bias) = &bias {
            add_to(row, bias);
        }
        if let Some(residual) = &residual {
            add_to(row, &residual[index * row.len()..(index + 1) * row.len()]);
        }
        let (Some(weight), Some(norm)) = (&weight, norm) else { return };
        let size = row.len() as f32;
        let mean = sum(row, |value| value) / size;
        let variance = sum(row, |value| (value - mean) * (value - mean)) / size;
        let scale = 1.0 / (variance + norm.epsilon).sqrt();
        for (value, weight) in row.iter_mut().zip(&**weight) {
            *value = (*value - mean) * scale * weight;
        }
        if let Some(shift) = &shift {
            add_to(row, shift);
        }
    })?;
    Ok(x)
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

/// Turns the pairs of one element of the first half and one of the second.
fn turn(line: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (first, second) = line.split_at_mut(cosines.len());
    for ((a, b), (cosine, sine)) in first.iter_mut().zip(second).zip(cosines.iter().zip(sines)) {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
}

/// The rows of tokens that [rows, heads, tokens, head size] belongs to.
pub fn merge(x: &Tensor, dims: Dims) -> Result<Tensor> {
    let Dims { rows, tokens, heads, head_size } = dims;
    let x = x.reshape((rows, heads, tokens, head_size))?;
    x.transpose(1, 2)?.contiguous()?.reshape((rows * tokens, dims.hidden()))
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

/// The sums of the rows of `tables` that `indices` name: one list for each table.
pub fn embed(tables: &[(&Tensor, Vec<u32>)]) -> Result<Tensor> {
    let Some((first, indices)) = tables.first() else { bail!("nothing to embed") };
    if !first.device().is_cpu() {
        return plain::embed(tables);
    }
    let (rows, size) = (indices.len(), first.dim(1)?);
    let stored: Vec<_> = tables.iter().map(|(table, _)| table.storage_and_layout()).collect();
    let stored = stored.iter().map(Stored::of).collect::<Result<Vec<_>>>()?;
    let mut embedded = vec![0.0; rows * size];
    for_chunks(&mut embedded, size, |index, line| {
        let mut part = vec![0.0; size];
        for (table, (_, indices)) in stored.iter().zip(tables) {
            table.copy_to(indices[index] as usize * size, &mut part);
            add_to(line, &part);
        }
    });
    Tensor::from_vec(embedded, (rows, size), &Device::Cpu)
}

/// The elements of a tensor that lie one behind the other, as they are stored.
enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Stored<'a> {
    fn of((storage, layout): &'a (StorageRef<'_>, &Layout)) -> Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("elements do not lie one behind the other") };
        match &**storage {
            Storage::Cpu(CpuStorage::F32(values)) => Ok(Self::F32(&values[start..end])),
            Storage::Cpu(CpuStorage::F16(values)) => Ok(Self::F16(&values[start..end])),
            Storage::Cpu(CpuStorage::BF16(values)) => Ok(Self::Bf16(&values[start..end])),
            _ => bail!("neither F32 nor F16 nor BF16 on the CPU"),
        }
    }

    /// Fills `part` with what begins at `start`.
    fn copy_to(&self, start: usize, part: &mut [f32]) {
        let range = start..start + part.len();
        match self {
            Self::F32(values) => part.copy_from_slice(&values[range]),
            Self::F16(values) => values[range].convert_to_f32_slice(part),
            Self::Bf16(values) => values[range].convert_to_f32_slice(part),
        }
    }
}

/// The elements of a tensor of activations, or of few enough weights to convert them each time.
fn numbers<'a>(tensor: &'a (StorageRef<'_>, &Layout)) -> Result<Cow<'a, [f32]>> {
    let stored = Stored::of(tensor)?;
    if let Stored::F32(values) = stored {
        return Ok(Cow::Borrowed(values));
    }
    let mut numbers = vec![0.0; tensor.1.shape().elem_count()];
    stored.copy_to(0, &mut numbers);
    Ok(Cow::Owned(numbers))
}

/// Calls `work` for each row of `x`, whose elements it may overwrite, and the row's number.
fn for_rows(x: &Tensor, work: impl Fn(usize, &mut [f32]) + Send + Sync) -> Result<()> {
    x.inplace_op1(&InPlace(work))
}

/// Calls `work` for each chunk of `size` elements and its number, in the pool of the session.
fn for_chunks(elements: &mut [f32], size: usize, work: impl Fn(usize, &mut [f32]) + Send + Sync) {
    let size = size.max(1);
    if elements.len() < 2 * GRAIN || rayon::current_num_threads() == 1 {
        elements.chunks_mut(size).enumerate().for_each(|(index, chunk)| work(index, chunk));
    } else {
        let least = GRAIN.div_ceil(size);
        elements.par_chunks_mut(size).with_min_len(least).enumerate().for_each(|(index, chunk)| work(index, chunk));
    }
}

struct InPlace<F>(F);

impl<F: Fn(usize, &mut [f32]) + Send + Sync> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(values), Some((start, end))) => {
                let size = layout.dims().last().copied().unwrap_or(1);
                for_chunks(&mut values[start..end], size, &self.0);
                Ok(())
            }
            (CpuStorage::F32(_), None) => bail!("elements do not lie one behind the other"),
            _ => bail!("activations on a CPU are of 32 bits"),
        }
    }
}

#[inline(always)]
fn add_to(values: &mut [f32], others: &[f32]) {
    values.iter_mut().zip(others).for_each(|(value, other)| *value += other);
}

fn activate_each(values: &mut [f32], activation: Activation) {
    #[inline(always)]
    fn each(values: &mut [f32], of: impl Fn(f32) -> f32) {
        values.iter_mut().for_each(|value| *value = of(*value));
    }
    match activation {
        Activation::Gelu => each(values, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))),
        Activation::GeluTanh => each(values, |x| {
            // 0.5 (1 + tanh y) is the logistic function of 2 y.
            let y = (2.0 / std::f32::consts::PI).sqrt() * x * (1.0 + 0.044715 * x * x);
            x / (1.0 + exp(-2.0 * y))
        }),
        Activation::Relu => each(values, |x| if x > 0.0 { x } else { 0.0 }),
        Activation::Silu => each(values, |x| x / (1.0 + exp(-x))),
        Activation::Tanh => each(values, f32::tanh),
    }
}

/// Numbers that are summed side by side, as processors do.
const LANES: usize = 16;

#[inline(always)]
fn sum(values: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += of(*value);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|&value| of(value)).sum::<f32>()
}

#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let larger = |one: f32, other: f32| if other > one { other } else { one };
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *value);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

/// The error function to within 3e-7, without branches: x P(x²) ÷ Q(x²), fitted to 2.5e-8 of it up to 4; beyond, it is 1
/// in 32 bits.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let z = x * x;
    let p = 1.986_984_7e-6;
    let p = p * z + 0.000_284_542_9;
    let p = p * z + 0.003_882_256;
    let p = p * z + 0.053_098_336;
    let p = p * z + 0.193_519_44;
    let p = p * z + std::f32::consts::FRAC_2_SQRT_PI;
    let q = 3.742_110_5e-5;
    let q = q * z + 0.001_185_311_5;
    let q = q * z + 0.015_205_051;
    let q = q * z + 0.115_339_39;
    let q = q * z + 0.504_834_7;
    let q = q * z + 1.0;
    x * p / q
}

/// e to the power of x, to within some units in the last place, without branches; 0 where that is less than the smallest
/// number that is not subnormal, and large, but finite, where it is not.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// What is this large is rounded to whole numbers, and these are its lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let bounded = x.clamp(-87.0, 88.0);
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let rest = bounded - power * LN_2_HIGH - power * LN_2_LOW;
    let series = 1.0 / 5040.0;
    let series = series * rest + 1.0 / 720.0;
    let series = series * rest + 1.0 / 120.0;
    let series = series * rest + 1.0 / 24.0;
    let series = series * rest + 1.0 / 6.0;
    let series = series * rest + 0.5;
    let series = series * rest + 1.0;
    let series = series * rest + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let value = series * f32::from_bits(exponent);
    if x < -87.0 { 0.0 } else { value }
}

/// The same from candle's operators, for devices that are no CPU.
mod plain {
    use candle_core::{DType, Result, Tensor, bail};
    use candle_nn::{ops, rotary_emb::rope};

    use super::{Activation, Dims, FAR, Mask, Norm, Rotation};

    pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
        match activation {
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::Relu => x.relu(),
            Activation::Silu => x.silu(),
            Activation::Tanh => x.tanh(),
        }
    }

    pub fn add(x: Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
        let x = bias.map_or(Ok(x.clone()), |bias| x.broadcast_add(bias))?;
        residual.map_or(Ok(x.clone()), |residual| &x + residual)
    }

    pub fn embed(tables: &[(&Tensor, Vec<u32>)]) -> Result<Tensor> {
        let looked_up = tables
            .iter()
            .map(|(table, indices)| table.index_select(&Tensor::new(indices.as_slice(), table.device())?, 0));
        let mut looked_up = looked_up.collect::<Result<Vec<_>>>()?.into_iter();
        let Some(first) = looked_up.next() else { bail!("nothing to embed") };
        looked_up.try_fold(first, |sum, part| sum + part)
    }

    pub fn normalize(x: &Tensor, norm: &Norm) -> Result<Tensor> {
        let none;
        let bias = match &norm.bias {
            Some(bias) => bias,
            None => {
                none = norm.weight.zeros_like()?;
                &none
            }
        };
        ops::layer_norm(&x.contiguous()?, &norm.weight, bias, norm.epsilon)
    }

    pub fn split(x: &Tensor, rotation: Option<&Rotation>, dims: Dims) -> Result<(Tensor, Tensor, Tensor)> {
        let Dims { rows, tokens, heads, head_size } = dims;
        let parts = x.reshape((rows, tokens, 3, heads, head_size))?.permute((2, 0, 3, 1, 4))?.contiguous()?;
        let (mut queries, mut keys, values) = (parts.get(0)?, parts.get(1)?, parts.get(2)?);
        if let Some(rotation) = rotation {
            let cosines = rotation.cosines.narrow(0, 0, tokens)?.to_dtype(x.dtype())?;
            let sines = rotation.sines.narrow(0, 0, tokens)?.to_dtype(x.dtype())?;
            queries = rope(&queries.contiguous()?, &cosines, &sines)?;
            keys = rope(&keys.contiguous()?, &cosines, &sines)?;
        }
        Ok(((queries / (head_size as f64).sqrt())?, keys, values))
    }

    pub fn attend(scores: &Tensor, mask: &Mask, window: Option<usize>, dims: Dims) -> Result<Tensor> {
        let dtype = scores.dtype();
        let mut scores = scores.to_dtype(DType::F32)?;
        if let Some(bias) = &mask.bias {
            scores = scores.broadcast_add(bias)?;
        }
        if let Some(window) = window.filter(|window| window + 1 < dims.tokens) {
            let place = |index: usize| (index / dims.tokens, index % dims.tokens);
            let far =
                (0..dims.tokens * dims.tokens).map(place).map(|(i, j)| if i.abs_diff(j) > window { FAR } else { 0.0 });
            let far = Tensor::from_vec(far.collect::<Vec<f32>>(), (dims.tokens, dims.tokens), scores.device())?;
            scores = scores.broadcast_add(&far)?;
        }
        ops::softmax_last_dim(&scores)?.to_dtype(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: f32 = 2e-6;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 3.0
            })
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_close(left: &Tensor, right: &Tensor, tolerance: f32) {
        assert_eq!(left.dims(), right.dims());
        for (left, right) in values(left).into_iter().zip(values(right)) {
            assert!((left - right).abs() <= tolerance, "{left} and {right}");
        }
    }

    #[test]
    fn functions_are_close_to_those_of_double_precision() {
        for index in -100_000..=100_000 {
            let x = index as f32 / 1000.0;
            let expected = f64::from(x).exp();
            if x < 88.0 && x > -87.0 {
                assert!((f64::from(exp(x)) / expected - 1.0).abs() < 3e-7, "exp {x}");
            }
            let expected = candle_core::cpu::erf::erf_f64(f64::from(x));
            assert!((f64::from(erf(x)) - expected).abs() < 4e-7, "erf {x}");
        }
        assert_eq!((exp(f32::NEG_INFINITY), exp(-88.0), exp(0.0)), (0.0, 0.0, 1.0));
        assert!(exp(f32::MAX).is_finite());
    }

    #[test]
    fn activations_are_those_of_candle() {
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh]
        {
            let (x, bias) = (random(&[7, 38], 1), random(&[38], 2));
            let expected = plain::activate(&x.broadcast_add(&bias).unwrap(), activation).unwrap();
            let copy = || x.copy().unwrap();
            assert_close(&activate(copy(), Some(&bias), activation).unwrap(), &expected, TOLERANCE);
            let half = |start| expected.narrow(1, start, 19).unwrap();
            let plainly = plain::activate(&x, activation).unwrap();
            assert_close(&activate(copy(), None, activation).unwrap(), &plainly, TOLERANCE);
            let gated = gate(copy(), Some(&bias), activation).unwrap();
            let other = x.broadcast_add(&bias).unwrap().narrow(1, 19, 19).unwrap();
            assert_close(&gated, &(half(0) * other).unwrap(), TOLERANCE * 8.0);
        }
    }

    #[test]
    fn rows_are_normalized_as_candle_does() {
        let (x, bias, residual) = (random(&[5, 37], 1), random(&[37], 2), random(&[5, 37], 3));
        for shift in [None, Some(random(&[37], 5))] {
            let norm = Norm { weight: random(&[37], 4), bias: shift, epsilon: 1e-5 };
            let sum = (x.broadcast_add(&bias).unwrap() + &residual).unwrap();
            let ours = normalize(x.copy().unwrap(), Some(&bias), Some(&residual), &norm).unwrap();
            assert_close(&ours, &plain::normalize(&sum, &norm).unwrap(), TOLERANCE * 4.0);
            assert_close(&add(x.copy().unwrap(), Some(&bias), Some(&residual)).unwrap(), &sum, TOLERANCE);
        }
        assert!(add(x, None, Some(&random(&[37, 5], 3))).unwrap_err().to_string().contains("another shape"));
    }

    #[test]
    fn heads_are_split_and_merged() {
        let dims = Dims { rows: 3, tokens: 5, heads: 2, head_size: 6 };
        let (x, bias) = (random(&[15, 36], 1), random(&[36], 2));
        let rotation = Rotation::new(9, 6, 100.0, &Device::Cpu).unwrap();
        for rotation in [None, Some(&rotation)] {
            let ours = split(&x, Some(&bias), rotation, dims).unwrap();
            let theirs = plain::split(&x.broadcast_add(&bias).unwrap(), rotation, dims).unwrap();
            assert_close(&ours.0, &theirs.0, TOLERANCE * 2.0);
            assert_close(&ours.1, &theirs.1, TOLERANCE * 2.0);
            assert_close(&ours.2, &theirs.2, TOLERANCE);
        }
        // Values have neither bias nor rotation here, and are the last third of each row.
        let (_, _, heads) = split(&x, None, None, dims).unwrap();
        assert_close(&merge(&heads, dims).unwrap(), &x.narrow(1, 24, 12).unwrap(), 0.0);
    }

    #[test]
    fn padding_and_what_is_far_away_is_not_seen() {
        let dims = Dims { rows: 3, tokens: 37, heads: 2, head_size: 1 };
        let present: Vec<bool> = (0..3 * 37).map(|index| index % 37 < [37, 20, 0][index / 37]).collect();
        let bias = present.iter().map(|&present| if present { 0.0 } else { FAR }).collect::<Vec<f32>>();
        let bias = Tensor::from_vec(bias, (3, 1, 1, 37), &Device::Cpu).unwrap();
        let scores = random(&[3, 2, 37, 37], 1);
        for window in [None, Some(4), Some(100)] {
            let mask = Mask { present: present.clone(), bias: Some(bias.clone()) };
            let ours = attend(scores.copy().unwrap(), &mask, window, dims, (0, 0)).unwrap();
            let theirs = plain::attend(&scores, &mask, window, dims).unwrap();
            let first = |tensor: &Tensor, tokens| tensor.narrow(0, 0, 2).unwrap().narrow(2, 0, tokens).unwrap();
            // What sees no token at all gets shares of padding from candle, and none here.
            assert_close(&first(&ours, 20), &first(&theirs, 20), TOLERANCE);
            let nothing = values(&ours.narrow(0, 2, 1).unwrap());
            assert!(nothing.iter().all(|&share| share == 0.0));
            assert!(values(&theirs).iter().all(|share| share.is_finite()));
        }
        let none = Mask::new(vec![true; 3 * 37], dims, &Device::Cpu).unwrap();
        let ours = attend(scores.copy().unwrap(), &none, None, dims, (0, 0)).unwrap();
        assert_close(&ours, &plain::attend(&scores, &none, None, dims).unwrap(), TOLERANCE);
    }

    #[test]
    fn weights_of_halves_are_computed_with_in_32_bits() {
        let x = random(&[5, 37], 1);
        let rows = random(&[FEW_ROWS + 1, 37], 7);
        for dtype in [DType::F16, DType::BF16] {
            let half = |shape: &[usize], seed| random(shape, seed).to_dtype(dtype).unwrap();
            let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
            // Of more than one chunk.
            let weight = half(&[37, 1000], 2);
            assert_close(&product(&rows, &weight).unwrap(), &rows.matmul(&wide(&weight)).unwrap(), 0.0);
            let few = product(&x, &weight).unwrap();
            assert_eq!(few.dtype(), DType::F32);
            assert_close(&few, &x.matmul(&wide(&weight)).unwrap(), 0.1);
            let (bias, scale) = (half(&[37], 3), half(&[37], 4));
            let norm = |of: &dyn Fn(&Tensor) -> Tensor| {
                let norm = Norm { weight: of(&scale), bias: Some(of(&bias)), epsilon: 1e-5 };
                normalize(x.copy().unwrap(), Some(&of(&bias)), Some(&x), &norm).unwrap()
            };
            assert_close(&norm(&|weights| weights.clone()), &norm(&wide), 0.0);
            let (first, second) = (half(&[9, 37], 5), half(&[4, 37], 6));
            let look_up = |first, second| embed(&[(first, vec![8, 0, 3]), (second, vec![1, 3, 1])]).unwrap();
            let embedded = look_up(&first, &second);
            assert_eq!(embedded.dtype(), DType::F32);
            assert_close(&embedded, &look_up(&wide(&first), &wide(&second)), 0.0);
        }
    }

    #[test]
    fn work_is_the_same_on_one_thread_and_on_many() {
        let x = random(&[600, 300], 1);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| values(&activate(x.copy().unwrap(), None, Activation::Gelu).unwrap()))
        };
        assert_eq!(run(1), run(3));
    }
}
