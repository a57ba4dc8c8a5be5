//! What tests of texts begin with: small models, texts as tensors, and a session that tells what it was given.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use serde_json::Value;

use super::{Front, IDS, Limits, MASK, Settings, TEXT, TYPES, parts::MOST_TOKENS};
use crate::{
    backend::{Session, Signature, TensorSpec},
    error::Error,
    tensor::{DType, Data, Tensor},
};

/// No limits.
pub const FREE: Limits = Limits { rows: usize::MAX, tokens: MOST_TOKENS, bytes: usize::MAX, deadline: None };

/// A small model with the numbers that transformers gives for it.
pub fn encoder(name: &str) -> (PathBuf, Value) {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/encoders")).join(name);
    let expected = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
    (folder, expected)
}

pub fn spec(name: &str, dtype: DType, shape: &[i64]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
}

/// A graph with the inputs named, and one output.
pub fn graph(inputs: &[&str], output: &str, shape: &[i64]) -> Signature {
    Signature {
        inputs: inputs.iter().map(|name| spec(name, DType::Int64, &[-1, -1])).collect(),
        outputs: vec![spec(output, DType::Fp32, shape)],
        ..Signature::default()
    }
}

pub fn body() -> Signature {
    graph(&[IDS, MASK, TYPES], "last_hidden_state", &[-1, -1, 2])
}

pub fn texts(texts: &[&str]) -> Tensor {
    let data = Data::Strings(texts.iter().map(|text| Bytes::copy_from_slice(text.as_bytes())).collect());
    Tensor::new(TEXT.into(), DType::Bytes, [texts.len()].as_slice().into(), data).unwrap()
}

pub fn pairs(pairs: &[[&str; 2]]) -> Tensor {
    let tensor = texts(&pairs.concat());
    Tensor { shape: [pairs.len(), 2].as_slice().into(), ..tensor }
}

pub fn whole(tensor: &Tensor) -> Vec<i64> {
    let Data::Plain(bytes) = &tensor.data else { panic!("no integers") };
    bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()
}

pub fn reals(tensor: &Tensor) -> Vec<f32> {
    let Data::Plain(bytes) = &tensor.data else { panic!("no floats") };
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

pub fn open(folder: &Path, settings: &Settings, graph: &Signature) -> Arc<Front> {
    Arc::new(Front::read(folder, settings, graph, true).unwrap().unwrap())
}

/// A session that says of each token what its id is, twice, and of padding something that must not count.
pub struct Echo(pub Signature);

impl Session for Echo {
    fn signature(&self) -> &Signature {
        &self.0
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        let names: Vec<&str> = inputs.iter().map(|input| &*input.name).collect();
        assert_eq!(names, [IDS, MASK, TYPES]);
        let (ids, mask) = (whole(&inputs[0]), whole(&inputs[1]));
        let value = |(&id, &mask): (&i64, &i64)| if mask == 1 { id as f32 } else { 1e6 };
        let values = ids.iter().zip(&mask).map(value).flat_map(|value| [value, -value]);
        let data = Data::Plain(values.flat_map(f32::to_le_bytes).collect());
        let shape = inputs[0].shape.iter().copied().chain([2]).collect();
        Ok(vec![Tensor { name: "last_hidden_state".into(), dtype: DType::Fp32, shape, data }])
    }
}
