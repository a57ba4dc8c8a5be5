//! `Head`: what classifiers have on top of a body, from hidden states to logits.

use candle_core::{Device, Tensor};

use super::{
    bodies::{Batch, Linear, Parts},
    config::{Activation, Classifier, Family, Pooling},
    ops::{Norm, Ops},
};
use crate::error::Error;

pub struct Head {
    dense: Linear,
    norm: Option<Norm>,
    out: Linear,
    pooling: Pooling,
    activation: Activation,
    ops: Ops,
    device: Device,
}

impl Head {
    /// # Errors
    /// `InvalidArgument` naming a tensor that is missing or of another shape.
    pub fn read(parts: &mut Parts<'_>, classifier: Classifier, ops: Ops, device: &Device) -> Result<Self, Error> {
        let hidden = parts.architecture.hidden;
        let Classifier { classes, pooling, activation, bias } = classifier;
        let pooler = format!("{}pooler.dense", parts.prefix);
        let (dense, out) = match parts.architecture.family {
            Family::Bert => (pooler.as_str(), "classifier"),
            Family::Roberta => ("classifier.dense", "classifier.out_proj"),
            Family::DistilBert => ("pre_classifier", "classifier"),
            Family::ModernBert => ("head.dense", "classifier"),
        };
        let dense = parts.linear(dense, hidden, hidden, bias)?;
        let norm = match parts.architecture.family {
            Family::ModernBert => Some(parts.norm("head.norm", parts.architecture.modern.norm_bias)?),
            _ => None,
        };
        let out = parts.linear(out, hidden, classes, true)?;
        Ok(Self { dense, norm, out, pooling, activation, ops, device: device.clone() })
    }

    /// The logits of each text, given the hidden states of its tokens.
    ///
    /// # Errors
    /// What candle says.
    pub fn run(&self, hidden: &Tensor, batch: &Batch) -> candle_core::Result<Tensor> {
        let pooled = match self.pooling {
            Pooling::First => {
                let firsts = (0..batch.rows).map(|row| (row * batch.tokens) as u32).collect();
                self.ops.embed(&[(hidden, firsts)])?
            }
            Pooling::Mean => self.mean(hidden, batch)?,
        };
        let x = self.ops.activate(self.dense.product(&pooled)?, self.dense.bias.as_ref(), self.activation)?;
        let x = match &self.norm {
            Some(norm) => self.ops.normalize(x, None, None, norm)?,
            None => x,
        };
        self.ops.add(self.out.product(&x)?, self.out.bias.as_ref(), None)
    }

    /// The mean over the tokens that are there; of none, it is zero.
    fn mean(&self, hidden: &Tensor, batch: &Batch) -> candle_core::Result<Tensor> {
        let Batch { rows, tokens, .. } = *batch;
        let shares = batch.present.chunks_exact(tokens).flat_map(|text| {
            let count = text.iter().filter(|&&present| present).count().max(1);
            text.iter().map(move |&present| if present { 1.0 / count as f32 } else { 0.0 })
        });
        let shares = Tensor::from_vec(shares.collect::<Vec<f32>>(), (rows, 1, tokens), &self.device)?;
        let size = hidden.dim(1)?;
        shares.to_dtype(hidden.dtype())?.matmul(&hidden.reshape((rows, tokens, size))?)?.reshape((rows, size))
    }
}
