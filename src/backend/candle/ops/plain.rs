//! The same from candle's operators, for devices that are no CPU.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::{ops, rotary_emb::rope};

use super::{
    super::config::Activation,
    attention::{Block, Dims, Heads, Mask},
    elementwise::Norm,
    rotary::Rotation,
};

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
    let looked_up =
        tables.iter().map(|(table, indices)| table.index_select(&Tensor::new(indices.as_slice(), table.device())?, 0));
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

pub fn gate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let parts = x.chunk(2, 1)?;
    activate(&parts[0].contiguous()?, activation)? * parts[1].contiguous()?
}

pub fn split(x: &Tensor, rotation: Option<&Rotation>, dims: Dims) -> Result<Heads> {
    let Dims { rows, tokens, heads, head_size } = dims;
    let parts = x.reshape((rows, tokens, 3, heads, head_size))?.permute((2, 0, 3, 1, 4))?.contiguous()?;
    let (mut queries, mut keys, values) = (parts.get(0)?, parts.get(1)?, parts.get(2)?);
    if let Some(rotation) = rotation {
        let cosines = rotation.cosines.narrow(0, 0, tokens)?.to_dtype(x.dtype())?;
        let sines = rotation.sines.narrow(0, 0, tokens)?.to_dtype(x.dtype())?;
        queries = rope(&queries.contiguous()?, &cosines, &sines)?;
        keys = rope(&keys.contiguous()?, &cosines, &sines)?;
    }
    Ok(Heads { queries: (queries / (head_size as f64).sqrt())?, keys, values })
}

/// Tokens that see none at all, which only padding does, get shares of it.
pub fn share(scores: &Tensor, mask: &Mask, window: Option<usize>, block: &Block) -> Result<Tensor> {
    let Block { pairs, tokens, seen } = block;
    let mut biased = scores.to_dtype(DType::F32)?;
    if let Some(bias) = &mask.bias {
        biased =
            biased.broadcast_add(&bias.narrow(0, pairs.start, pairs.len())?.narrow(2, seen.start, seen.len())?)?;
    }
    if let (Some(window), Some(far)) = (window, &mask.far) {
        // Its columns begin where the first token of a block sees first.
        let start = seen.start + window - tokens.start;
        biased = biased.broadcast_add(&far.narrow(0, 0, tokens.len())?.narrow(1, start, seen.len())?)?;
    }
    ops::softmax_last_dim(&biased)?.to_dtype(scores.dtype())
}
