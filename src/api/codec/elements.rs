//! A tensor's elements as JSON text: straight into their bytes and back, with no value in between.
//!
//! A tensor of a million elements must not pass through a million boxed values, and a 64-bit integer not through a
//! float. The text has been checked by the JSON parser before, so this only needs to tell tokens apart, and it keeps
//! its own stack: nesting costs no calls.

use std::{fmt::Display, io};

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::ser::{CompactFormatter, Formatter};
use smallvec::SmallVec;

use super::{
    MAX_RANK, RESERVED_STRINGS,
    literals::{string_end, unmask},
};
use crate::{
    error::Error,
    id::shorten,
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

/// Reads the elements of a `data` array, flat or nested, of which `expected` should be there.
///
/// `source` must hold `text`; strings without escapes become slices of it.
pub(super) fn read(label: &str, dtype: DType, expected: usize, text: &str, source: &Bytes) -> Result<Data, Error> {
    let data = match dtype {
        DType::Bool => plain::<bool>(label, text, expected),
        DType::Uint8 => plain::<u8>(label, text, expected),
        DType::Uint16 => plain::<u16>(label, text, expected),
        DType::Uint32 => plain::<u32>(label, text, expected),
        DType::Uint64 => plain::<u64>(label, text, expected),
        DType::Int8 => plain::<i8>(label, text, expected),
        DType::Int16 => plain::<i16>(label, text, expected),
        DType::Int32 => plain::<i32>(label, text, expected),
        DType::Int64 => plain::<i64>(label, text, expected),
        DType::Fp32 => plain::<f32>(label, text, expected),
        DType::Fp64 => plain::<f64>(label, text, expected),
        DType::Bytes => return strings(label, text, expected, source),
        DType::Fp16 | DType::Bf16 => {
            return Err(Error::invalid(format!("{label}: {dtype} cannot be sent as JSON; send it as binary data")));
        }
    };
    data.map(Data::Plain)
}

/// Writes the elements as a flat JSON array.
///
/// # Errors
/// `InvalidArgument` when JSON cannot carry the tensor and the caller should ask for binary data.
pub(super) fn write(tensor: &Tensor, non_finite: NonFinite, out: &mut Vec<u8>) -> Result<(), Error> {
    let label = format!("output '{}'", tensor.name);
    let bytes = match &tensor.data {
        Data::Plain(bytes) => bytes,
        Data::Strings(strings) => {
            return list(out, strings, |index, string, out| match std::str::from_utf8(string) {
                Ok(text) => serde_json::to_writer(out, text).map_err(|error| unwritable(error.into())),
                Err(_) => Err(Error::invalid(format!(
                    "{label}: element {index} is not UTF-8, which JSON cannot carry; request it as binary data"
                ))),
            });
        }
    };
    macro_rules! integers {
        ($type:ty, $write:ident) => {
            list(out, bytes.as_chunks().0, |_, &raw, out| {
                CompactFormatter.$write(out, <$type>::from_le_bytes(raw)).map_err(unwritable)
            })
        };
    }
    macro_rules! floats {
        ($type:ty, $write:ident) => {
            list(out, bytes.as_chunks().0, |index, &raw, out| {
                let value = <$type>::from_le_bytes(raw);
                if value.is_finite() {
                    return CompactFormatter.$write(out, value).map_err(unwritable);
                }
                out.extend_from_slice(substitute(&label, index, value.into(), non_finite)?.as_bytes());
                Ok(())
            })
        };
    }
    match tensor.dtype {
        DType::Bool => list(out, bytes, |_, &value, out| {
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
        DType::Fp32 => floats!(f32, write_f32),
        DType::Fp64 => floats!(f64, write_f64),
        DType::Fp16 | DType::Bf16 | DType::Bytes => {
            Err(Error::invalid(format!("{label}: {} cannot be sent as JSON; request it as binary data", tensor.dtype)))
        }
    }
}

/// Calls `leaf` with each element's index and text, and gives their number.
///
/// Flat and nested arrays are both right, whatever the shape; rows of different lengths, and elements beside arrays,
/// are not.
fn walk<'a>(
    label: &str,
    text: &'a str,
    mut leaf: impl FnMut(usize, &'a str) -> Result<(), Error>,
) -> Result<usize, Error> {
    let bytes = text.as_bytes();
    // The entries so far of each array that is open, and how many every array of that depth must have.
    let mut open = SmallVec::<[usize; 8]>::new();
    let mut widths = SmallVec::<[Option<usize>; 8]>::new();
    let mut leaf_depth = None;
    let mut count = 0;
    let mut at = 0;
    if bytes.first() != Some(&b'[') {
        return Err(Error::invalid(format!("{label}: 'data' must be an array, got {}", shorten(text))));
    }
    let mixed = |count| Error::invalid(format!("{label}: 'data' mixes arrays and elements at element {count}"));
    while let Some(&byte) = bytes.get(at) {
        let depth = open.len();
        match byte {
            b',' | b' ' | b'\n' | b'\r' | b'\t' => at += 1,
            b'[' => {
                if depth == MAX_RANK {
                    return Err(Error::invalid(format!("{label}: 'data' is nested deeper than {MAX_RANK} levels")));
                }
                if leaf_depth == Some(depth) {
                    return Err(mixed(count));
                }
                if let Some(entries) = open.last_mut() {
                    *entries += 1;
                }
                if widths.len() == depth {
                    widths.push(None);
                }
                open.push(0);
                at += 1;
            }
            b']' => {
                let entries = open.pop().unwrap_or(0);
                if let Some(width) = widths.get_mut(open.len()) {
                    let width = *width.get_or_insert(entries);
                    if width != entries {
                        return Err(Error::invalid(format!(
                            "{label}: 'data' has rows of {width} and of {entries} entries before element {count}"
                        )));
                    }
                }
                at += 1;
            }
            _ => {
                if leaf_depth != Some(depth) {
                    if leaf_depth.is_some() || widths.len() > depth {
                        return Err(mixed(count));
                    }
                    leaf_depth = Some(depth);
                }
                if let Some(entries) = open.last_mut() {
                    *entries += 1;
                }
                let end = token_end(bytes, at);
                leaf(count, &text[at..end])?;
                count += 1;
                at = end;
            }
        }
    }
    Ok(count)
}

/// The index after the element that starts at `start`.
fn token_end(bytes: &[u8], start: usize) -> usize {
    let rest = bytes[start..].iter();
    let found = match bytes[start] {
        b'"' => return string_end(bytes, start),
        // Of all objects only masked literals are ever read further, and those hold no other object.
        b'{' => rest.copied().position(|byte| byte == b'}').map(|index| index + 1),
        _ => rest.copied().position(|byte| matches!(byte, b',' | b']' | b' ' | b'\n' | b'\r' | b'\t')),
    };
    found.map_or(bytes.len(), |length| start + length)
}

fn plain<E: Element>(label: &str, text: &str, expected: usize) -> Result<Bytes, Error> {
    // The shape is only a claim; each element but the last takes a digit and a comma.
    let mut out = Vec::with_capacity(expected.min(text.len() / 2) * size_of::<E>());
    let count = walk(label, text, |index, token| match E::parse(token) {
        Some(element) => {
            element.put(&mut out);
            Ok(())
        }
        None => Err(wrong(label, index, token, E::wanted())),
    })?;
    check_count(label, expected, count)?;
    Ok(out.into())
}

fn strings(label: &str, text: &str, expected: usize, source: &Bytes) -> Result<Data, Error> {
    let mut out = Vec::with_capacity(expected.min(RESERVED_STRINGS));
    let count = walk(label, text, |index, token| {
        let quoted = token.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        let element = match quoted {
            Some(plain) if !plain.contains('\\') => source.slice_ref(plain.as_bytes()),
            // Checked text may still name half of a surrogate pair.
            Some(_) => match serde_json::from_str::<String>(token) {
                Ok(unescaped) => unescaped.into(),
                Err(_) => return Err(wrong(label, index, token, "a string of whole Unicode characters")),
            },
            None => return Err(wrong(label, index, token, "a string")),
        };
        out.push(element);
        Ok(())
    })?;
    check_count(label, expected, count)?;
    Ok(Data::Strings(out))
}

fn check_count(label: &str, expected: usize, count: usize) -> Result<(), Error> {
    if count == expected {
        return Ok(());
    }
    Err(Error::invalid(format!("{label}: its shape takes {expected} elements, and 'data' has {count}")))
}

fn wrong(label: &str, index: usize, token: &str, wanted: impl Display) -> Error {
    let token = unmask(token).map_or_else(|| shorten(token), str::to_owned);
    Error::invalid(format!("{label}: element {index} must be {wanted}, got {token}"))
}

/// An element of fixed size.
trait Element: Sized {
    /// `None` for the wrong JSON type and for numbers out of range.
    fn parse(token: &str) -> Option<Self>;
    /// What `parse` takes, to follow "must be".
    fn wanted() -> String;
    fn put(self, out: &mut Vec<u8>);
}

impl Element for bool {
    fn parse(token: &str) -> Option<Self> {
        match token {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        }
    }

    fn wanted() -> String {
        "true or false".to_owned()
    }

    fn put(self, out: &mut Vec<u8>) {
        out.push(self.into());
    }
}

macro_rules! integer_elements {
    ($($type:ty),*) => {$(
        impl Element for $type {
            fn parse(token: &str) -> Option<Self> {
                token.parse().ok().or_else(|| Self::try_from(whole(token)?).ok())
            }

            fn wanted() -> String {
                format!("an integer from {} to {}", Self::MIN, Self::MAX)
            }

            fn put(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

integer_elements!(u8, u16, u32, u64, i8, i16, i32, i64);

macro_rules! float_elements {
    ($($type:ident, $name:literal);*) => {$(
        impl Element for $type {
            fn parse(token: &str) -> Option<Self> {
                match token.parse::<Self>() {
                    Ok(value) => value.is_finite().then_some(value),
                    Err(_) => match unmask(token)? {
                        "NaN" => Some(Self::NAN),
                        "Infinity" => Some(Self::INFINITY),
                        _ => Some(Self::NEG_INFINITY),
                    },
                }
            }

            fn wanted() -> String {
                concat!("a number that is not out of range for ", $name).to_owned()
            }

            fn put(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

float_elements!(f32, "FP32"; f64, "FP64");

/// An integer written as a float, `3.0` or `1e3`; only as far as a float counts without gaps.
fn whole(token: &str) -> Option<i64> {
    const GAPLESS: f64 = 9_007_199_254_740_992.0;
    let value: f64 = token.parse().ok()?;
    (value.fract() == 0.0 && value.abs() <= GAPLESS).then_some(value as i64)
}

fn list<T>(
    out: &mut Vec<u8>,
    items: &[T],
    mut write: impl FnMut(usize, &T, &mut Vec<u8>) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(b'[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(index, item, out)?;
    }
    out.push(b']');
    Ok(())
}

fn substitute(label: &str, index: usize, value: f64, non_finite: NonFinite) -> Result<&'static str, Error> {
    let literal = match value {
        value if value.is_nan() => "NaN",
        value if value > 0.0 => "Infinity",
        _ => "-Infinity",
    };
    match non_finite {
        NonFinite::Literal => Ok(literal),
        NonFinite::Null => Ok("null"),
        NonFinite::Error => Err(Error::invalid(format!(
            "{label}: element {index} is {literal}, which JSON cannot carry; request it as binary data"
        ))),
    }
}

/// Writing to memory does not fail; should it ever, that is not the caller's doing.
pub(super) fn unwritable(error: io::Error) -> Error {
    Error::internal(format!("the reply could not be written as JSON: {error}"))
}
