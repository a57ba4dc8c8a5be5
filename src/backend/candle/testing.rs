//! Checkpoints for tests: small encoders of random numbers, written as the real ones are.

use std::{borrow::Cow, path::Path};

use half::{bf16, f16};
use safetensors::{Dtype, View};
use serde_json::{Value, json};

use super::weights;

/// A tensor as a file has it.
#[derive(Clone)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Stored {
    /// 0, 1, 2 and so on.
    pub fn counting(shape: &[usize]) -> Self {
        let count: usize = shape.iter().product();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), values: (0..count).map(|value| value as f32).collect() }
    }
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values.iter();
        Cow::Owned(match self.dtype {
            Dtype::F16 => values.flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
            Dtype::BF16 => values.flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
            Dtype::I32 => values.flat_map(|&value| (value as i32).to_le_bytes()).collect(),
            _ => values.flat_map(|&value| value.to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        self.data().len()
    }
}

pub fn write(path: &Path, tensors: &[(String, Stored)]) {
    let views = tensors.iter().map(|(name, stored)| (name.as_str(), stored));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A small model: its configuration and its tensors.
#[derive(Clone)]
pub struct Checkpoint {
    pub config: Value,
    pub tensors: Vec<(String, Stored)>,
}

/// Numbers as from a random source, the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

pub const VOCABULARY: usize = 40;
pub const HIDDEN: usize = 16;
const INTERMEDIATE: usize = 24;
const POSITIONS: usize = 20;

/// What `model_type` names its tensors; with three classes on top where `is_classifier`.
pub fn checkpoint(model_type: &str, is_classifier: bool) -> Checkpoint {
    let (class, prefix) = match model_type {
        "bert" => ("Bert", "bert."),
        "roberta" => ("Roberta", "roberta."),
        "xlm-roberta" => ("XLMRoberta", "roberta."),
        "camembert" => ("Camembert", "roberta."),
        "distilbert" => ("DistilBert", "distilbert."),
        _ => ("ModernBert", "model."),
    };
    let top = if is_classifier { "ForSequenceClassification" } else { "Model" };
    let mut config = json!({
        "model_type": model_type, "architectures": [format!("{class}{top}")], "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS, "id2label": {"0": "a", "1": "b", "2": "c"},
    });
    let sizes = match model_type {
        "distilbert" => json!({"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": INTERMEDIATE}),
        _ => json!({
            "hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 4,
            "intermediate_size": INTERMEDIATE, "local_attention": 4, "global_attn_every_n_layers": 3,
            "pad_token_id": if prefix == "roberta." { 1 } else { 0 },
            "type_vocab_size": if prefix == "roberta." { 1 } else { 2 },
        }),
    };
    config.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());

    let mut random = Random(7);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let count: usize = shape.iter().product();
        // Scales of normalization are about one.
        let (scale, middle) = if shape.len() == 1 && name.ends_with("weight") { (0.2, 1.0) } else { (0.4, 0.0) };
        let values = (0..count).map(|_| random.next() * scale + middle).collect();
        tensors.push((name, Stored { dtype: Dtype::F32, shape: shape.to_vec(), values }));
    };
    let mut both = |name: String, shape: &[usize]| {
        add(format!("{name}.weight"), shape);
        if class != "ModernBert" || name == "classifier" {
            add(format!("{name}.bias"), &shape[..1]);
        }
    };
    let body = if is_classifier { prefix } else { "" };
    let (h, i) = (HIDDEN, INTERMEDIATE);
    match class {
        "ModernBert" => {
            both(format!("{body}embeddings.norm"), &[h]);
            both(format!("{body}embeddings.tok_embeddings"), &[VOCABULARY, h]);
            for layer in 0..4 {
                let at = format!("{body}layers.{layer}");
                if layer > 0 {
                    both(format!("{at}.attn_norm"), &[h]);
                }
                for (name, shape) in [
                    ("attn.Wqkv", &[3 * h, h][..]),
                    ("attn.Wo", &[h, h]),
                    ("mlp_norm", &[h]),
                    ("mlp.Wi", &[2 * i, h]),
                    ("mlp.Wo", &[h, i]),
                ] {
                    both(format!("{at}.{name}"), shape);
                }
            }
            both(format!("{body}final_norm"), &[h]);
        }
        _ => {
            both(format!("{body}embeddings.LayerNorm"), &[h]);
            let (layers, at, names) = match class {
                "DistilBert" => {
                    (
                        2,
                        "transformer.layer",
                        ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"]
                            .into_iter()
                            .chain(["sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"]),
                    )
                }
                _ => (
                    4,
                    "encoder.layer",
                    ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
                        .into_iter()
                        .chain([
                            "attention.output.LayerNorm",
                            "intermediate.dense",
                            "output.dense",
                            "output.LayerNorm",
                        ]),
                ),
            };
            let shapes: [&[usize]; 8] = [&[h, h], &[h, h], &[h, h], &[h, h], &[h], &[i, h], &[h, i], &[h]];
            for layer in 0..layers {
                for (name, shape) in names.clone().zip(shapes) {
                    both(format!("{body}{at}.{layer}.{name}"), shape);
                }
            }
        }
    }
    if is_classifier {
        let (dense, out) = match class {
            "Bert" => ("bert.pooler.dense", "classifier"),
            "DistilBert" => ("pre_classifier", "classifier"),
            "ModernBert" => ("head.dense", "classifier"),
            _ => ("classifier.dense", "classifier.out_proj"),
        };
        both(dense.to_owned(), &[h, h]);
        both(out.to_owned(), &[3, h]);
        if class == "ModernBert" {
            both("head.norm".to_owned(), &[h]);
        }
    }
    if class != "ModernBert" {
        add(format!("{body}embeddings.word_embeddings.weight"), &[VOCABULARY, h]);
        add(format!("{body}embeddings.position_embeddings.weight"), &[POSITIONS, h]);
        match prefix {
            "bert." => add(format!("{body}embeddings.token_type_embeddings.weight"), &[2, h]),
            "roberta." => add(format!("{body}embeddings.token_type_embeddings.weight"), &[1, h]),
            _ => {}
        }
    }
    Checkpoint { config, tensors }
}

impl Checkpoint {
    pub fn write(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        write(&folder.path().join(weights::FILE_NAME), &self.tensors);
        folder
    }

    /// The same with every tensor called as `rename` says.
    pub fn renamed(&self, rename: impl Fn(&str) -> String) -> Self {
        let tensors = self.tensors.iter().map(|(name, stored)| (rename(name), stored.clone())).collect();
        Self { config: self.config.clone(), tensors }
    }

    pub fn tensor(&mut self, name: &str) -> &mut Stored {
        let found = self.tensors.iter_mut().find(|(known, _)| known == name);
        &mut found.unwrap_or_else(|| panic!("no tensor {name}")).1
    }
}
