//! `Body`: the encoders themselves, from token ids to the last hidden states.
//!
//! candle-transformers has models of the same names. They run on threads that all of the process shares (see `ops`), its
//! ModernBERT computes in 32 bits only, its DistilBERT takes another activation than the models were trained with, and
//! none names the tensor that is missing before it is. Two kinds of layer are enough for all of them: BERT's, which
//! normalizes what it has added, and ModernBERT's, which normalizes before and turns queries and keys with the position.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{
    config::{Activation, Architecture, Family},
    ops::{self, Dims, Mask, Norm, Ops, Rotation},
    weights::Weights,
};
use crate::error::Error;

pub struct Body {
    words: Tensor,
    positions: Option<Tensor>,
    types: Option<Tensor>,
    norm: Norm,
    layers: Vec<Layer>,
    last: Option<Norm>,
    activation: Activation,
    /// The token that has no place, in models that count the others.
    padding: Option<u32>,
    heads: usize,
    head_size: usize,
    /// How far tokens see in the layers where they do not see all.
    window: Option<usize>,
    ops: Ops,
    device: Device,
}

/// Texts of one length, checked: every id has a row in its table.
pub struct Batch {
    pub rows: usize,
    pub tokens: usize,
    pub ids: Vec<u32>,
    /// Whether a token is there; what is not is padding.
    pub present: Vec<bool>,
    pub types: Vec<u32>,
}

/// A matrix and what is added to its products. Files have it as [out, in]; here it is [in, out], which products of few
/// rows read as it lies.
pub struct Linear {
    weight: Tensor,
    pub bias: Option<Tensor>,
}

struct Layer {
    before: bool,
    attention_norm: Option<Norm>,
    attention_in: Linear,
    attention_out: Linear,
    rotation: Option<Arc<Rotation>>,
    window: Option<usize>,
    feed_forward_norm: Norm,
    feed_forward_in: Linear,
    feed_forward_out: Linear,
}

/// What all layers of one run share.
struct Run {
    ops: Ops,
    dims: Dims,
    mask: Mask,
    activation: Activation,
}

/// Reads what an architecture consists of.
pub struct Parts<'a> {
    pub weights: &'a mut Weights,
    pub architecture: &'a Architecture,
    /// What the names of the body's tensors begin with.
    pub prefix: &'static str,
}

impl<'a> Parts<'a> {
    /// Tensors of a body may lie under its name, as they do where something is on top of it.
    pub fn of(weights: &'a mut Weights, architecture: &'a Architecture) -> Self {
        let (prefix, words) = match architecture.family {
            Family::Bert => ("bert.", "embeddings.word_embeddings.weight"),
            Family::Roberta => ("roberta.", "embeddings.word_embeddings.weight"),
            Family::DistilBert => ("distilbert.", "embeddings.word_embeddings.weight"),
            Family::ModernBert => ("model.", "embeddings.tok_embeddings.weight"),
        };
        let is_under = weights.contains(&format!("{prefix}{words}"));
        let is_bare = weights.contains(words);
        let expects_it = architecture.classifier.is_some();
        Self { weights, architecture, prefix: if is_under || (expects_it && !is_bare) { prefix } else { "" } }
    }

    /// # Errors
    /// `InvalidArgument` naming a tensor that is missing or of another shape.
    pub fn linear(&mut self, name: &str, inputs: usize, outputs: usize, has_bias: bool) -> Result<Linear, Error> {
        let weight = self.weights.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = if has_bias { Some(self.weights.tensor(&format!("{name}.bias"), &[outputs])?) } else { None };
        Linear::new(&weight, bias)
    }

    /// # Errors
    /// As `linear`.
    pub fn norm(&mut self, name: &str, has_bias: bool) -> Result<Norm, Error> {
        let shape = [self.architecture.hidden];
        // What was converted from TensorFlow has older names.
        let (weight, bias) = match self.weights.contains(&format!("{name}.gamma")) {
            true => ("gamma", "beta"),
            false => ("weight", "bias"),
        };
        let weight = self.weights.tensor(&format!("{name}.{weight}"), &shape)?;
        let bias = if has_bias { Some(self.weights.tensor(&format!("{name}.{bias}"), &shape)?) } else { None };
        Ok(Norm { weight, bias, epsilon: self.architecture.epsilon as f32 })
    }

    fn table(&mut self, name: &str, rows: usize) -> Result<Tensor, Error> {
        self.weights.tensor(&format!("{}embeddings.{name}.weight", self.prefix), &[rows, self.architecture.hidden])
    }

    /// # Errors
    /// As `linear`, and `Internal` when the device fails.
    pub fn body(&mut self, ops: Ops, device: &Device) -> Result<Body, Error> {
        let Architecture { family, hidden, heads, token_types, .. } = *self.architecture;
        let prefix = self.prefix;
        let is_modern = family == Family::ModernBert;
        let words =
            self.table(if is_modern { "tok_embeddings" } else { "word_embeddings" }, self.architecture.vocabulary)?;
        let positions = match is_modern {
            true => None,
            false => Some(self.table("position_embeddings", self.architecture.positions)?),
        };
        let types = if token_types > 0 { Some(self.table("token_type_embeddings", token_types)?) } else { None };
        let norm_bias = !is_modern || self.architecture.modern.norm_bias;
        let norm =
            self.norm(&format!("{prefix}embeddings.{}", if is_modern { "norm" } else { "LayerNorm" }), norm_bias)?;
        let rotations = if is_modern { Some(self.rotations(device)?) } else { None };
        let mut layers = Vec::new();
        for index in 0..self.architecture.layers {
            layers.push(match &rotations {
                Some(rotations) => self.modern_layer(index, rotations)?,
                None => self.layer(index)?,
            });
        }
        let window = layers.iter().find_map(|layer| layer.window);
        let last = if is_modern { Some(self.norm(&format!("{prefix}final_norm"), norm_bias)?) } else { None };
        Ok(Body {
            words,
            positions,
            types,
            norm,
            layers,
            last,
            activation: self.architecture.activation,
            padding: (family == Family::Roberta).then_some(self.architecture.padding as u32),
            heads,
            head_size: hidden / heads,
            window,
            ops,
            device: device.clone(),
        })
    }

    /// A layer of BERT, RoBERTa or DistilBERT.
    fn layer(&mut self, index: usize) -> Result<Layer, Error> {
        let Architecture { hidden, intermediate, .. } = *self.architecture;
        let prefix = self.prefix;
        let (at, names) = match self.architecture.family {
            Family::DistilBert => (
                format!("{prefix}transformer.layer.{index}"),
                [
                    "attention.q_lin",
                    "attention.k_lin",
                    "attention.v_lin",
                    "attention.out_lin",
                    "sa_layer_norm",
                    "ffn.lin1",
                    "ffn.lin2",
                    "output_layer_norm",
                ],
            ),
            _ => (
                format!("{prefix}encoder.layer.{index}"),
                [
                    "attention.self.query",
                    "attention.self.key",
                    "attention.self.value",
                    "attention.output.dense",
                    "attention.output.LayerNorm",
                    "intermediate.dense",
                    "output.dense",
                    "output.LayerNorm",
                ],
            ),
        };
        let [query, key, value, out, attention_norm, up, down, norm] = names.map(|name| format!("{at}.{name}"));
        let three = |what: &str| [&query, &key, &value].map(|name| format!("{name}.{what}"));
        let weight = self.weights.stacked(&three("weight"), &[hidden, hidden])?;
        let bias = self.weights.stacked(&three("bias"), &[hidden])?;
        let attention_in = Linear::new(&weight, Some(bias))?;
        Ok(Layer {
            before: false,
            attention_in,
            attention_out: self.linear(&out, hidden, hidden, true)?,
            attention_norm: Some(self.norm(&attention_norm, true)?),
            rotation: None,
            window: None,
            feed_forward_in: self.linear(&up, hidden, intermediate, true)?,
            feed_forward_out: self.linear(&down, intermediate, hidden, true)?,
            feed_forward_norm: self.norm(&norm, true)?,
        })
    }

    fn modern_layer(&mut self, index: usize, [global, local]: &[Arc<Rotation>; 2]) -> Result<Layer, Error> {
        let Architecture { hidden, intermediate, modern, .. } = self.architecture;
        let (hidden, intermediate) = (*hidden, *intermediate);
        let window = modern.windows.get(index).copied().flatten();
        let (attention, feed_forward, norm) = (modern.attention_bias, modern.feed_forward_bias, modern.norm_bias);
        let at = format!("{}layers.{index}", self.prefix);
        Ok(Layer {
            before: true,
            // What comes from the table of words is normalized already.
            attention_norm: if index == 0 { None } else { Some(self.norm(&format!("{at}.attn_norm"), norm)?) },
            attention_in: self.linear(&format!("{at}.attn.Wqkv"), hidden, 3 * hidden, attention)?,
            attention_out: self.linear(&format!("{at}.attn.Wo"), hidden, hidden, attention)?,
            rotation: Some(Arc::clone(if window.is_some() { local } else { global })),
            window,
            feed_forward_norm: self.norm(&format!("{at}.mlp_norm"), norm)?,
            feed_forward_in: self.linear(&format!("{at}.mlp.Wi"), hidden, 2 * intermediate, feed_forward)?,
            feed_forward_out: self.linear(&format!("{at}.mlp.Wo"), intermediate, hidden, feed_forward)?,
        })
    }

    /// For attention to the whole text, and to what is near.
    fn rotations(&self, device: &Device) -> Result<[Arc<Rotation>; 2], Error> {
        let rotation = |theta| {
            Rotation::new(self.architecture.positions, self.architecture.head_size(), theta, device)
                .map(Arc::new)
                .map_err(|error| Error::internal(format!("cannot prepare positions: {error}")))
        };
        let modern = &self.architecture.modern;
        let global = rotation(modern.global_theta)?;
        let local = match modern.local_theta == modern.global_theta {
            true => Arc::clone(&global),
            false => rotation(modern.local_theta)?,
        };
        Ok([global, local])
    }
}

impl Linear {
    fn new(weight: &Tensor, bias: Option<Tensor>) -> Result<Self, Error> {
        let turned = weight.t().and_then(|weight| weight.contiguous());
        let weight = turned.map_err(|error| Error::internal(format!("cannot turn a matrix: {error}")))?;
        Ok(Self { weight, bias })
    }

    /// The products of rows, without what is added to them.
    ///
    /// # Errors
    /// What candle says.
    pub fn product(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::product(x, &self.weight)
    }
}

impl Body {
    /// The last hidden states, one row for each token.
    ///
    /// # Errors
    /// What candle says.
    pub fn run(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        let Batch { rows, tokens, .. } = *batch;
        let dims = Dims { rows, tokens, heads: self.heads, head_size: self.head_size };
        let ops = self.ops;
        let mask = Mask::new(ops, batch.present.clone(), self.window, dims, &self.device)?;
        let run = Run { ops, dims, mask, activation: self.activation };
        let mut tables = vec![(&self.words, batch.ids.clone())];
        if let Some(types) = &self.types {
            tables.push((types, batch.types.clone()));
        }
        if let Some(positions) = &self.positions {
            tables.push((positions, self.places(batch)));
        }
        let mut x = ops.normalize(ops.embed(&tables)?, None, None, &self.norm)?;
        for layer in &self.layers {
            x = layer.run(x, &run)?;
        }
        match &self.last {
            Some(norm) => ops.normalize(x, None, None, norm),
            None => Ok(x),
        }
    }

    /// Where each token stands.
    fn places(&self, batch: &Batch) -> Vec<u32> {
        let Some(padding) = self.padding else {
            return (0..batch.rows).flat_map(|_| 0..batch.tokens as u32).collect();
        };
        let mut places = Vec::with_capacity(batch.ids.len());
        for text in batch.ids.chunks_exact(batch.tokens) {
            let mut last = padding;
            places.extend(text.iter().map(|&id| {
                if id == padding {
                    return padding;
                }
                last += 1;
                last
            }));
        }
        places
    }
}

impl Layer {
    fn run(&self, x: Tensor, run: &Run) -> candle_core::Result<Tensor> {
        if self.before { self.run_modern(x, run) } else { self.run_classic(x, run) }
    }

    fn run_classic(&self, x: Tensor, run: &Run) -> candle_core::Result<Tensor> {
        let ops = run.ops;
        let attended = self.attention_out.product(&self.attend(&x, run)?)?;
        let bias = self.attention_out.bias.as_ref();
        let x = match &self.attention_norm {
            Some(norm) => ops.normalize(attended, bias, Some(&x), norm)?,
            None => ops.add(attended, bias, Some(&x))?,
        };
        let inner = self.feed_forward_in.product(&x)?;
        let inner = ops.activate(inner, self.feed_forward_in.bias.as_ref(), run.activation)?;
        let outer = self.feed_forward_out.product(&inner)?;
        ops.normalize(outer, self.feed_forward_out.bias.as_ref(), Some(&x), &self.feed_forward_norm)
    }

    fn run_modern(&self, x: Tensor, run: &Run) -> candle_core::Result<Tensor> {
        let ops = run.ops;
        let attended = match &self.attention_norm {
            Some(norm) => self.attend(&ops.normalize(x.copy()?, None, None, norm)?, run)?,
            None => self.attend(&x, run)?,
        };
        let x = ops.add(self.attention_out.product(&attended)?, self.attention_out.bias.as_ref(), Some(&x))?;
        let inner = ops.normalize(x.copy()?, None, None, &self.feed_forward_norm)?;
        let inner = self.feed_forward_in.product(&inner)?;
        let inner = ops.gate(inner, self.feed_forward_in.bias.as_ref(), run.activation)?;
        ops.add(self.feed_forward_out.product(&inner)?, self.feed_forward_out.bias.as_ref(), Some(&x))
    }

    /// What each token takes from those that it sees.
    fn attend(&self, x: &Tensor, run: &Run) -> candle_core::Result<Tensor> {
        let x = self.attention_in.product(x)?;
        let heads = run.ops.split(x, self.attention_in.bias.as_ref(), self.rotation.as_deref(), run.dims)?;
        run.ops.attend(&heads, &run.mask, self.window)
    }
}
