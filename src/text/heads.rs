//! What the outputs of an encoder mean: an embedding, classes, or how well two texts go together.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Pooling, Scores, Settings,
    folder::{self, Folder},
    wrong,
};
use crate::{
    backend::{Pairs, Signature, TensorSpec},
    error::Error,
    tensor::{DType, Data, Tensor},
};

/// Outputs that hold one vector for each token, under the names that exports give them.
const HIDDEN: [&str; 3] = ["last_hidden_state", "token_embeddings", "hidden_states"];
/// One vector for each text: pooled, and normalized where the model does, by the graph.
const SENTENCE: &str = "sentence_embedding";
const LOGITS: &str = "logits";

/// The outputs of which something is made, for people.
pub(super) const KNOWN: &str = "'last_hidden_state', 'token_embeddings' or 'hidden_states' [-1, -1, n], 'sentence_embedding' or 'logits' [-1, n], in FP32";

const EMBEDDING: &str = "embedding";
const LABEL: &str = "label";
const SCORES: &str = "scores";
const RERANK_SCORE: &str = "rerank_score";

/// By how much answers may differ that are to be the same.
const ROUNDING: f32 = 1e-3;

/// Lengths below which a vector is not made longer.
const SHORTEST: f32 = 1e-12;

/// What is made of which output of the graph.
pub(super) struct Head {
    /// The position of the output among those of the graph.
    output: usize,
    kind: Kind,
}

enum Kind {
    Embedding {
        /// `None` when the graph has pooled already.
        pooling: Option<Pooling>,
        normalize: bool,
        size: i64,
    },
    Classes {
        labels: Vec<Bytes>,
        activation: Activation,
    },
    Rerank(Activation),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Activation {
    Softmax,
    Sigmoid,
    Identity,
}

impl Head {
    /// What the outputs of `graph` are made into; `None` for outputs that it does not know.
    ///
    /// # Errors
    /// `InvalidArgument` when the files say what the graph has not.
    pub fn of(
        graph: &Signature,
        (files, folder): (&std::path::Path, &Folder),
        settings: &Settings,
    ) -> Result<Option<Self>, Error> {
        let find = |name: &str, rank: usize| {
            let is_it =
                |spec: &TensorSpec| &*spec.name == name && spec.shape.len() == rank && spec.dtype == DType::Fp32;
            graph.outputs.iter().position(is_it)
        };
        let size = |output: usize| match graph.outputs[output].shape.last() {
            Some(&size) if size > 0 => Some(size),
            _ => None,
        };
        let config = &folder.config;
        if let Some(output) = find(LOGITS, 2) {
            let named = config.labels(files)?;
            let count = size(output).and_then(|count| usize::try_from(count).ok());
            let labels = match (named, count) {
                (Some(names), Some(count)) if names.len() != count => {
                    let reason = format!("it names {} classes, and the model has {count}", names.len());
                    return Err(wrong(&files.join("config.json"), reason));
                }
                (Some(names), _) => names,
                (None, Some(count)) => (0..count).map(|class| format!("LABEL_{class}")).collect(),
                // Without a word of it, transformers has two.
                (None, None) => vec!["LABEL_0".to_owned(), "LABEL_1".to_owned()],
            };
            let kind = if labels.len() == 1 {
                Kind::Rerank(rerank_activation(folder)?)
            } else {
                let activation = match config.problem_type.as_deref() {
                    Some("multi_label_classification") => Activation::Sigmoid,
                    Some("regression") => Activation::Identity,
                    _ => Activation::Softmax,
                };
                Kind::Classes { labels: labels.into_iter().map(Bytes::from).collect(), activation }
            };
            return Ok(Some(Self { output, kind }));
        }
        if let Some(output) = find(SENTENCE, 2) {
            // The graph has done what the modules say.
            let normalize = settings.normalize.unwrap_or(false);
            let kind = Kind::Embedding { pooling: None, normalize, size: size(output).unwrap_or(-1) };
            return Ok(Some(Self { output, kind }));
        }
        let Some(output) = HIDDEN.iter().find_map(|name| find(name, 3)) else { return Ok(None) };
        let (pooling, normalize) = match (settings.pooling, settings.normalize) {
            (Some(pooling), Some(normalize)) => (Some(pooling), normalize),
            (pooling, normalize) => {
                let modules = folder::modules(files)?;
                let pooling = pooling.or(modules.pooling).or(Some(Pooling::Mean));
                (pooling, normalize.unwrap_or(modules.normalize))
            }
        };
        let told = config.hidden_size.or(config.dim).filter(|size| *size > 0);
        let size = size(output).or(told).unwrap_or(-1);
        Ok(Some(Self { output, kind: Kind::Embedding { pooling, normalize, size } }))
    }

    pub fn pairs(&self) -> Pairs {
        match self.kind {
            Kind::Embedding { .. } => Pairs::Never,
            Kind::Classes { .. } => Pairs::Maybe,
            Kind::Rerank(_) => Pairs::Always,
        }
    }

    /// The outputs that clients see.
    pub fn outputs(&self) -> Vec<TensorSpec> {
        let spec = |name: &str, dtype, shape| TensorSpec { name: name.into(), dtype, shape };
        match &self.kind {
            Kind::Embedding { size, .. } => vec![spec(EMBEDDING, DType::Fp32, vec![-1, *size])],
            Kind::Classes { labels, .. } => {
                let count = i64::try_from(labels.len()).unwrap_or(-1);
                vec![spec(LABEL, DType::Bytes, vec![-1]), spec(SCORES, DType::Fp32, vec![-1, count])]
            }
            Kind::Rerank(_) => vec![spec(RERANK_SCORE, DType::Fp32, vec![-1])],
        }
    }

    /// Whether the scores of pairs are something else than their logits.
    pub fn hides_logits(&self) -> bool {
        matches!(self.kind, Kind::Rerank(Activation::Sigmoid))
    }

    /// The logits of pairs, of what the graph has given.
    pub fn logits(&self, outputs: &[Tensor]) -> Option<Tensor> {
        let logits = outputs.get(self.output)?;
        let shape = [logits.rows()].as_slice().into();
        Some(Tensor { name: RERANK_SCORE.into(), shape, ..logits.clone() })
    }

    /// The scores that are wanted, of the outputs of a run in which logits that are hidden were asked for.
    pub fn scored(&self, mut outputs: Vec<Tensor>, wanted: Scores) -> Vec<Tensor> {
        match (&self.kind, wanted, &outputs[..]) {
            (Kind::Rerank(Activation::Sigmoid), Scores::Raw, [_, _]) => outputs.split_off(1),
            (Kind::Rerank(Activation::Identity), Scores::Unit, [logits]) => {
                let Some(mut scores) = floats(logits) else { return outputs };
                Activation::Sigmoid.apply(&mut scores);
                vec![tensor(RERANK_SCORE, &logits.shape, &scores)]
            }
            _ => outputs,
        }
    }

    /// What clients see, of what the graph has given for `count` rows; `mask` tells tokens from padding.
    ///
    /// # Errors
    /// `Internal` when the output is not what the graph has promised.
    pub fn apply(&self, outputs: &[Tensor], count: usize, mask: Option<&Tensor>) -> Result<Vec<Tensor>, Error> {
        let promised = || Error::internal("the graph gave another output than it had promised to");
        let of_rows = |output: &&Tensor| output.shape.first() == Some(&count);
        let output = outputs.get(self.output).filter(of_rows).ok_or_else(promised)?;
        let values = floats(output).ok_or_else(promised)?;
        match (&self.kind, &output.shape[..]) {
            (Kind::Embedding { pooling: Some(pooling), normalize, .. }, &[rows, tokens, size]) => {
                let mask = mask.map_or_else(|| Some(vec![true; rows * tokens]), |mask| flags(mask, rows * tokens));
                let mask = mask.ok_or_else(promised)?;
                let mut embeddings = Vec::with_capacity(rows * size);
                for row in 0..rows {
                    let (from, to) = (row * tokens, (row + 1) * tokens);
                    let mut embedding = pooling.pool(&values[from * size..to * size], size, &mask[from..to]);
                    if *normalize {
                        normalized(&mut embedding);
                    }
                    embeddings.append(&mut embedding);
                }
                Ok(vec![tensor(EMBEDDING, &[rows, size], &embeddings)])
            }
            (Kind::Embedding { pooling: None, normalize, .. }, &[rows, size]) => {
                let mut values = values;
                if *normalize && size > 0 {
                    values.chunks_exact_mut(size).for_each(normalized);
                }
                Ok(vec![tensor(EMBEDDING, &[rows, size], &values)])
            }
            (Kind::Classes { labels, activation }, &[rows, classes]) if classes == labels.len() => {
                let mut scores = values;
                scores.chunks_exact_mut(classes).for_each(|row| activation.apply(row));
                let best = |row: &[f32]| {
                    // The first of those that are alike.
                    let best = row.iter().enumerate().rev().max_by(|one, other| one.1.total_cmp(other.1));
                    labels[best.map_or(0, |(class, _)| class)].clone()
                };
                let best = Data::Strings(scores.chunks_exact(classes).map(best).collect());
                let shape = [rows].as_slice().into();
                let label = Tensor { name: LABEL.into(), dtype: DType::Bytes, shape, data: best };
                Ok(vec![label, tensor(SCORES, &[rows, classes], &scores)])
            }
            (Kind::Rerank(activation), &[rows, 1]) => {
                let mut scores = values;
                activation.apply(&mut scores);
                Ok(vec![tensor(RERANK_SCORE, &[rows], &scores)])
            }
            _ => Err(promised()),
        }
    }
}

impl Pooling {
    /// One vector of `size` of those of the tokens in `values`, as far as `mask` counts them.
    fn pool(self, values: &[f32], size: usize, mask: &[bool]) -> Vec<f32> {
        let token = |place: usize| values[place * size..(place + 1) * size].to_vec();
        match self {
            Self::Mean => {
                let mut sum = vec![0.0; size];
                for (vector, _) in values.chunks_exact(size.max(1)).zip(mask).filter(|(_, is_token)| **is_token) {
                    sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
                }
                #[expect(clippy::cast_precision_loss, reason = "tokens of a text")]
                let count = mask.iter().filter(|is_token| **is_token).count().max(1) as f32;
                sum.iter_mut().for_each(|sum| *sum /= count);
                sum
            }
            // Padding may be on either side.
            Self::Cls => mask.iter().position(|is_token| *is_token).map_or_else(|| vec![0.0; size], token),
            Self::Last => mask.iter().rposition(|is_token| *is_token).map_or_else(|| vec![0.0; size], token),
        }
    }
}

impl Activation {
    fn apply(self, logits: &mut [f32]) {
        match self {
            Self::Identity => {}
            Self::Sigmoid => logits.iter_mut().for_each(|logit| *logit = 1.0 / (1.0 + (-*logit).exp())),
            Self::Softmax => {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                logits.iter_mut().for_each(|logit| *logit = (*logit - largest).exp());
                let sum: f32 = logits.iter().sum();
                logits.iter_mut().for_each(|value| *value /= sum);
            }
        }
    }
}

/// What a cross-encoder makes of its logit: as sentence-transformers does, a sigmoid unless its files name something else.
///
/// # Errors
/// `InvalidArgument` naming a function that is not known.
fn rerank_activation(folder: &Folder) -> Result<Activation, Error> {
    match folder.activation.as_deref().map(|name| name.rsplit('.').next().unwrap_or(name)) {
        Some("Identity") => Ok(Activation::Identity),
        None | Some("Sigmoid") => Ok(Activation::Sigmoid),
        Some(other) => {
            Err(Error::invalid(format!("activation_fn '{other}' is not supported; there is Sigmoid and Identity")))
        }
    }
}

/// Whether two answers are the same but for rounding.
pub(super) fn agree(one: &Tensor, other: &Tensor) -> bool {
    match (floats(one), floats(other)) {
        (Some(one), Some(other)) => {
            one.len() == other.len()
                && one.iter().zip(&other).all(|(one, other)| (one - other).abs() <= ROUNDING * one.abs().max(1.0))
        }
        // Classes follow from scores, which are compared.
        _ => true,
    }
}

fn normalized(vector: &mut [f32]) {
    let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt().max(SHORTEST);
    vector.iter_mut().for_each(|value| *value /= length);
}

fn floats(tensor: &Tensor) -> Option<Vec<f32>> {
    match (&tensor.data, tensor.dtype) {
        (Data::Plain(bytes), DType::Fp32) => {
            Some(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }
        _ => None,
    }
}

/// Which of `count` elements are not 0.
fn flags(tensor: &Tensor, count: usize) -> Option<Vec<bool>> {
    let Data::Plain(bytes) = &tensor.data else { return None };
    let size = tensor.dtype.size()?;
    let flags: Vec<bool> = bytes.chunks_exact(size).map(|bytes| bytes.iter().any(|byte| *byte != 0)).collect();
    (flags.len() == count).then_some(flags)
}

fn tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    let data = Data::Plain(values.iter().flat_map(|value| value.to_le_bytes()).collect());
    Tensor { name: Arc::from(name), dtype: DType::Fp32, shape: shape.into(), data }
}
