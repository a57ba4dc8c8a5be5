//! What is done to each row by itself: activations, sums and normalization.

use candle_core::{Device, Result, Tensor, bail};

use super::{
    super::config::Activation,
    functions::{erf, exp, sum},
    rows::{for_chunks, for_rows},
    stored::numbers,
};

/// Scale and shift after normalization.
#[derive(Debug)]
pub struct Norm {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub epsilon: f32,
}

/// `activation(x + bias)`, row by row; `x` is overwritten.
pub fn activate(x: Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
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
pub fn gate(x: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
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

/// `x + bias + residual`, normalized where there is a `norm`; `x` is overwritten.
pub fn combine(x: Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>, norm: Option<&Norm>) -> Result<Tensor> {
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

#[inline(always)]
pub(super) fn add_to(values: &mut [f32], others: &[f32]) {
    values.iter_mut().zip(others).for_each(|(value, other)| *value += other);
}

fn activate_each(values: &mut [f32], activation: Activation) {
    #[inline(always)]
    fn each(values: &mut [f32], of: impl Fn(f32) -> f32) {
        values.iter_mut().for_each(|value| *value = of(*value));
    }
    match activation {
        Activation::Gelu => each(values, |x| {
            let value = 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
            // There the sum is rounding, and x may be large.
            if x < -5.6 { -0.0 } else { value }
        }),
        Activation::GeluTanh => each(values, |x| {
            // 0.5 (1 + tanh y) is the logistic function of 2 y.
            let y = (2.0 / std::f32::consts::PI).sqrt() * x * (1.0 + 0.044715 * x * x);
            x / (1.0 + exp(-2.0 * y))
        }),
        Activation::Relu => each(values, |x| if x < 0.0 { 0.0 } else { x }),
        Activation::Silu => each(values, |x| x / (1.0 + exp(-x))),
        Activation::Tanh => each(values, f32::tanh),
    }
}
