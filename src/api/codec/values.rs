//! A tensor's elements as JSON text, flat or nested as its shape is.

use std::{fmt, io};

use base64::{Engine, engine::general_purpose::STANDARD};
use half::{bf16, f16};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::ser::{CompactFormatter, Formatter};

use crate::{
    error::Error,
    tensor::{DType, Data, Tensor},
};

/// What stands in a JSON reply for a float that is no number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// `NaN`, `Infinity` and `-Infinity`, which most clients read and strict JSON parsers refuse.
    #[default]
    Literal,
    /// `null`.
    Null,
    /// The call fails.
    Error,
}

/// How elements are spelled that JSON has no words for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::api) enum Spelling {
    /// Not at all: the protocol has binary data for them.
    Protocol,
    /// Floats of 16 bits as numbers; texts must be UTF-8.
    Plain,
    /// Like `Plain`, and every text as an object with the member `b64`.
    Base64,
}

/// Which elements are written, and how they are nested.
#[derive(Clone, Copy)]
struct Layout<'a> {
    start: usize,
    /// The sizes of the arrays, outermost first; none for an element by itself.
    dims: &'a [usize],
}

impl Layout<'_> {
    fn count(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Writes the elements as one array, whatever the shape.
///
/// # Errors
/// `InvalidArgument` when JSON cannot carry the tensor and the caller should ask for binary data.
pub(in crate::api) fn write_flat(
    tensor: &Tensor,
    spelling: Spelling,
    non_finite: NonFinite,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let count = crate::tensor::elements(&tensor.shape).unwrap_or_default();
    write(tensor, Layout { start: 0, dims: &[count] }, spelling, non_finite, out)
}

/// Writes the elements nested as the shape is; a scalar, and with `row` a row of one dimension, as themselves.
///
/// # Errors
/// As `write_flat`.
pub(in crate::api) fn write_nested(
    tensor: &Tensor,
    row: Option<usize>,
    spelling: Spelling,
    non_finite: NonFinite,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let dims = &tensor.shape[usize::from(row.is_some()).min(tensor.shape.len())..];
    let start = row.unwrap_or_default() * dims.iter().product::<usize>();
    write(tensor, Layout { start, dims }, spelling, non_finite, out)
}

fn write(
    tensor: &Tensor,
    layout: Layout<'_>,
    spelling: Spelling,
    non_finite: NonFinite,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let name = &tensor.name;
    let bytes = match &tensor.data {
        Data::Plain(bytes) => bytes,
        Data::Strings(strings) if spelling == Spelling::Base64 => {
            return nest(out, strings, layout, &mut |_, string, out| {
                out.extend_from_slice(br#"{"b64":""#);
                out.extend_from_slice(STANDARD.encode(string).as_bytes());
                out.extend_from_slice(br#""}"#);
                Ok(())
            });
        }
        Data::Strings(strings) => {
            return nest(out, strings, layout, &mut |index, string, out| match std::str::from_utf8(string) {
                Ok(text) => serde_json::to_writer(out, text).map_err(|error| unwritable(error.into())),
                Err(_) => Err(Error::invalid(format!(
                    "output '{name}': element {index} is not UTF-8, which JSON cannot carry; request it as binary data{}",
                    spelling.hint()
                ))),
            });
        }
    };
    macro_rules! integers {
        ($type:ty, $write:ident) => {
            nest(out, bytes.as_chunks().0, layout, &mut |_, &raw, out| {
                CompactFormatter.$write(out, <$type>::from_le_bytes(raw)).map_err(unwritable)
            })
        };
    }
    macro_rules! floats {
        ($type:ty, $write:ident, $wider:ty) => {
            nest(out, bytes.as_chunks().0, layout, &mut |index, &raw, out| {
                let value: $wider = <$type>::from_le_bytes(raw).into();
                if value.is_finite() {
                    return CompactFormatter.$write(out, value).map_err(unwritable);
                }
                let word = substitute(value.into(), non_finite).map_err(|literal| {
                    Error::invalid(format!(
                        "output '{name}': element {index} is {literal}, which JSON cannot carry; request it as binary \
                         data{}",
                        spelling.hint()
                    ))
                })?;
                out.extend_from_slice(word.as_bytes());
                Ok(())
            })
        };
    }
    match tensor.dtype {
        DType::Bool => nest(out, bytes, layout, &mut |_, &value, out| {
            out.extend_from_slice(if value == 0 { b"false" } else { b"true" });
            Ok(())
        }),
        DType::Uint8 => integers!(u8, write_u8),
        DType::Uint16 => integers!(u16, write_u16),
        DType::Uint32 => integers!(u32, write_u32),
        DType::Uint64 => integers!(u64, write_u64),
        DType::Int8 => integers!(i8, write_i8),
        DType::Int16 => integers!(i16, write_i16),
        DType::Int32 => integers!(i32, write_i32),
        DType::Int64 => integers!(i64, write_i64),
        DType::Fp32 => floats!(f32, write_f32, f32),
        DType::Fp64 => floats!(f64, write_f64, f64),
        DType::Fp16 if spelling != Spelling::Protocol => floats!(f16, write_f32, f32),
        DType::Bf16 if spelling != Spelling::Protocol => floats!(bf16, write_f32, f32),
        DType::Fp16 | DType::Bf16 | DType::Bytes => Err(Error::invalid(format!(
            "output '{name}': {} cannot be sent as JSON; request it as binary data",
            tensor.dtype
        ))),
    }
}

/// Writes `items` from the layout's start on; `element` gets each one's index in the tensor.
fn nest<T>(
    out: &mut Vec<u8>,
    items: &[T],
    layout: Layout<'_>,
    element: &mut impl FnMut(usize, &T, &mut Vec<u8>) -> Result<(), Error>,
) -> Result<(), Error> {
    let Layout { start, dims } = layout;
    let Some((&size, inner)) = dims.split_first() else {
        return element(start, &items[start], out);
    };
    out.push(b'[');
    if inner.is_empty() {
        for (offset, item) in items[start..start + size].iter().enumerate() {
            if offset > 0 {
                out.push(b',');
            }
            element(start + offset, item, out)?;
        }
    } else {
        let inner = Layout { start, dims: inner };
        let count = inner.count();
        for index in 0..size {
            if index > 0 {
                out.push(b',');
            }
            nest(out, items, Layout { start: start + index * count, ..inner }, element)?;
        }
    }
    out.push(b']');
    Ok(())
}

impl Spelling {
    /// Where binary data can be had, for callers of routes that have none.
    fn hint(self) -> impl fmt::Display {
        match self {
            Spelling::Protocol => "",
            Spelling::Plain | Spelling::Base64 => " from /infer",
        }
    }
}

/// What is written for a float that is no number; the literal itself when that is not wanted.
fn substitute(value: f64, non_finite: NonFinite) -> Result<&'static str, &'static str> {
    let literal = match value {
        value if value.is_nan() => "NaN",
        value if value > 0.0 => "Infinity",
        _ => "-Infinity",
    };
    match non_finite {
        NonFinite::Literal => Ok(literal),
        NonFinite::Null => Ok("null"),
        NonFinite::Error => Err(literal),
    }
}

/// Writing to memory does not fail; should it ever, that is not the caller's doing.
pub(super) fn unwritable(error: io::Error) -> Error {
    Error::internal(format!("the reply could not be written as JSON: {error}"))
}
