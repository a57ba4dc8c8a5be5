//! `Tensor`: a named, shaped block of bytes; how many together become one batch, and one batch becomes many.
//!
//! Row-major, little-endian, never reinterpreted on the way: the bytes a client sent are the bytes a backend reads.

use std::{fmt, sync::Arc};

use bytes::{Bytes, BytesMut};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, shorten};

/// The size of each dimension, outermost first; empty for a scalar.
pub type Shape = smallvec::SmallVec<[usize; 6]>;

/// Element types of the Open Inference Protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    Bytes,
}

impl DType {
    pub const ALL: [DType; 14] = [
        DType::Bool,
        DType::Uint8,
        DType::Uint16,
        DType::Uint32,
        DType::Uint64,
        DType::Int8,
        DType::Int16,
        DType::Int32,
        DType::Int64,
        DType::Fp16,
        DType::Bf16,
        DType::Fp32,
        DType::Fp64,
        DType::Bytes,
    ];

    /// The name on the wire, `FP32` for instance.
    pub fn name(self) -> &'static str {
        match self {
            DType::Bool => "BOOL",
            DType::Uint8 => "UINT8",
            DType::Uint16 => "UINT16",
            DType::Uint32 => "UINT32",
            DType::Uint64 => "UINT64",
            DType::Int8 => "INT8",
            DType::Int16 => "INT16",
            DType::Int32 => "INT32",
            DType::Int64 => "INT64",
            DType::Fp16 => "FP16",
            DType::Bf16 => "BF16",
            DType::Fp32 => "FP32",
            DType::Fp64 => "FP64",
            DType::Bytes => "BYTES",
        }
    }

    pub fn parse(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes per element; `None` for `BYTES`, whose elements vary.
    pub fn size(self) -> Option<usize> {
        match self {
            DType::Bool | DType::Uint8 | DType::Int8 => Some(1),
            DType::Uint16 | DType::Int16 | DType::Fp16 | DType::Bf16 => Some(2),
            DType::Uint32 | DType::Int32 | DType::Fp32 => Some(4),
            DType::Uint64 | DType::Int64 | DType::Fp64 => Some(8),
            DType::Bytes => None,
        }
    }
}

impl Serialize for DType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        DType::parse(&name).ok_or_else(|| {
            let names: Vec<_> = DType::ALL.into_iter().map(DType::name).collect();
            serde::de::Error::custom(format_args!("datatype '{name}' must be one of {}", names.join(", ")))
        })
    }
}

impl JsonSchema for DType {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "DType".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string" })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor's elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Fixed-size elements, row-major and little-endian.
    Plain(Bytes),
    /// One entry per element of a `BYTES` tensor.
    Strings(Vec<Bytes>),
}

/// A named block of elements. `data` always holds exactly the elements that `shape` and `dtype` promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub name: Arc<str>,
    pub dtype: DType,
    pub shape: Shape,
    pub data: Data,
}

/// The number of elements of a shape (1 for a scalar), `None` on overflow.
pub fn elements(shape: &[usize]) -> Option<usize> {
    // A zero anywhere makes the tensor empty, however large its other dimensions are.
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))
}

impl Tensor {
    /// # Errors
    /// `InvalidArgument` when the data does not hold what shape and type promise.
    pub fn new(name: Arc<str>, dtype: DType, shape: Shape, data: Data) -> Result<Self, Error> {
        check(dtype, &shape, &data).map_err(|error| {
            let message = format!("tensor '{}': {}", shorten(&name), error.message);
            Error { message, ..error }
        })?;
        Ok(Self { name, dtype, shape, data })
    }

    /// The size of the first dimension; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Bytes of memory held; for `BYTES` the elements' own and what it takes to tell them apart.
    pub fn byte_len(&self) -> usize {
        match &self.data {
            Data::Plain(bytes) => bytes.len(),
            Data::Strings(strings) => strings.iter().map(|text| text.len() + size_of::<Bytes>()).sum(),
        }
    }

    /// Rows `start..start + count` along the first dimension; shares the bytes.
    ///
    /// # Panics
    /// When the tensor is a scalar or has fewer rows.
    pub fn slice(&self, start: usize, count: usize) -> Tensor {
        let mut shape = self.shape.clone();
        shape[0] = count;
        let row = elements(&self.shape[1..]).unwrap_or(0);
        let data = match &self.data {
            Data::Plain(bytes) => {
                let row_bytes = row * self.dtype.size().unwrap_or(0);
                Data::Plain(bytes.slice(start * row_bytes..(start + count) * row_bytes))
            }
            Data::Strings(strings) => Data::Strings(strings[start * row..(start + count) * row].to_vec()),
        };
        Tensor { name: self.name.clone(), dtype: self.dtype, shape, data }
    }
}

/// Whether the data holds what shape and type promise.
fn check(dtype: DType, shape: &[usize], data: &Data) -> Result<(), Error> {
    let beyond = |what| Error::invalid(format!("shape {shape:?} has more {what} than fit in memory"));
    let count = elements(shape).ok_or_else(|| beyond("elements"))?;
    match (data, dtype.size()) {
        (Data::Plain(bytes), Some(size)) => {
            let expected = count.checked_mul(size).ok_or_else(|| beyond("bytes"))?;
            if bytes.len() != expected {
                return Err(Error::invalid(format!(
                    "shape {shape:?} of {dtype} takes {expected} bytes, got {}",
                    bytes.len()
                )));
            }
            if dtype == DType::Bool && bytes.iter().any(|&byte| byte > 1) {
                return Err(Error::invalid("BOOL elements must be 0 or 1"));
            }
        }
        (Data::Strings(strings), None) => {
            if strings.len() != count {
                return Err(Error::invalid(format!(
                    "shape {shape:?} takes {count} BYTES elements, got {}",
                    strings.len()
                )));
            }
        }
        _ => return Err(Error::internal(format!("{dtype} with the wrong kind of data"))),
    }
    Ok(())
}

/// Stacks tensors of one name, type and row shape along the first dimension; copies each byte once.
///
/// # Panics
/// When `parts` is empty or holds scalars.
pub fn gather(parts: &[&Tensor]) -> Tensor {
    let first = parts[0];
    let mut shape = first.shape.clone();
    shape[0] = parts.iter().map(|part| part.rows()).sum();
    let data = match &first.data {
        Data::Plain(_) => {
            let mut joined = BytesMut::with_capacity(parts.iter().map(|part| part.byte_len()).sum());
            for part in parts {
                if let Data::Plain(bytes) = &part.data {
                    joined.extend_from_slice(bytes);
                }
            }
            Data::Plain(joined.freeze())
        }
        Data::Strings(_) => Data::Strings(
            parts
                .iter()
                .filter_map(|part| match &part.data {
                    Data::Strings(strings) => Some(strings.iter().cloned()),
                    Data::Plain(_) => None,
                })
                .flatten()
                .collect(),
        ),
    };
    Tensor { name: first.name.clone(), dtype: first.dtype, shape, data }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes_of(count: usize) -> Data {
        Data::Plain((0..count).map(|i| i as u8).collect())
    }

    #[test]
    fn names_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(DType::parse(dtype.name()), Some(dtype));
        }
        assert_eq!(DType::parse("FP8"), None);
    }

    #[test]
    fn size_is_checked() {
        let tensor = |shape: &[usize], n| Tensor::new("x".into(), DType::Fp32, shape.into(), bytes_of(n));
        assert!(tensor(&[2, 3], 24).is_ok());
        assert!(tensor(&[], 4).is_ok());
        assert!(tensor(&[0, usize::MAX, usize::MAX], 0).is_ok());
        let message = tensor(&[2, 3], 20).unwrap_err().message;
        assert_eq!(message, "tensor 'x': shape [2, 3] of FP32 takes 24 bytes, got 20");
        assert!(tensor(&[usize::MAX, 2], 4).unwrap_err().message.contains("more elements"));
        assert!(tensor(&[usize::MAX / 2], 4).unwrap_err().message.contains("more bytes"));
        let bool = Tensor::new("b".into(), DType::Bool, [1].as_slice().into(), Data::Plain(Bytes::from_static(&[2])));
        assert!(bool.is_err());
    }

    proptest! {
        #[test]
        fn slices_undo_gather(rows in proptest::collection::vec(0usize..5, 1..6), width in 0usize..4) {
            let parts: Vec<Tensor> = rows.iter().enumerate().map(|(i, &n)| {
                let data = Data::Plain((0..n * width * 2).map(|b| (b * 7 + i) as u8).collect());
                Tensor::new("x".into(), DType::Int16, [n, width].as_slice().into(), data).unwrap()
            }).collect();
            let whole = gather(&parts.iter().collect::<Vec<_>>());
            let mut start = 0;
            for part in &parts {
                prop_assert_eq!(&whole.slice(start, part.rows()), part);
                start += part.rows();
            }
            prop_assert_eq!(start, whole.rows());
        }
    }
}
