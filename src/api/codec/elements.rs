//! A tensor's elements from JSON text, straight into their bytes with no value in between.
//!
//! A tensor of a million elements must not pass through a million boxed values, and a 64-bit integer not through a
//! float. The text has been checked by the JSON parser before, so this only needs to tell tokens apart, and it keeps
//! its own stack: nesting costs no calls.

use std::fmt::Display;

use bytes::Bytes;
use half::{bf16, f16};
use smallvec::SmallVec;

use super::{
    MAX_RANK, RESERVED_STRINGS,
    literals::{string_end, unmask},
    values::Spelling,
};
use crate::{
    error::Error,
    id::shorten,
    tensor::{DType, Data, Shape},
};

/// Reads the elements of a `data` array, flat or nested, of which `expected` should be there.
///
/// `source` must hold `text`; strings without escapes become slices of it. The protocol has no numbers for floats of 16
/// bits, other spellings have.
pub(super) fn read(
    label: &str,
    dtype: DType,
    spelling: Spelling,
    expected: usize,
    text: &str,
    source: &Bytes,
) -> Result<Data, Error> {
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
        DType::Fp16 if spelling != Spelling::Protocol => plain::<f16>(label, text, expected),
        DType::Bf16 if spelling != Spelling::Protocol => plain::<bf16>(label, text, expected),
        DType::Fp16 | DType::Bf16 => {
            return Err(Error::invalid(format!("{label}: {dtype} cannot be sent as JSON; send it as binary data")));
        }
    };
    data.map(Data::Plain)
}

/// Calls `leaf` with each element's index and text, and gives the sizes of the array and of those in it.
///
/// Rows of different lengths, and elements beside arrays, are wrong. `subject` is what the text is called.
pub(super) fn walk<'a>(
    subject: impl Display,
    text: &'a str,
    mut leaf: impl FnMut(usize, &'a str) -> Result<(), Error>,
) -> Result<Shape, Error> {
    let bytes = text.as_bytes();
    // The entries so far of each array that is open, and how many every array of that depth must have.
    let mut open = SmallVec::<[usize; 8]>::new();
    let mut widths = SmallVec::<[Option<usize>; 8]>::new();
    let mut leaf_depth = None;
    let mut count = 0;
    let mut at = 0;
    if bytes.first() != Some(&b'[') {
        return Err(Error::invalid(format!("{subject} must be an array, got {}", shorten(text))));
    }
    let mixed = |count| Error::invalid(format!("{subject} mixes arrays and elements at element {count}"));
    while let Some(&byte) = bytes.get(at) {
        let depth = open.len();
        match byte {
            b',' | b' ' | b'\n' | b'\r' | b'\t' => at += 1,
            b'[' => {
                if depth == MAX_RANK {
                    return Err(Error::invalid(format!("{subject} is nested deeper than {MAX_RANK} levels")));
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
                            "{subject} has rows of {width} and of {entries} entries before element {count}"
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
    Ok(widths.into_iter().map(Option::unwrap_or_default).collect())
}

/// The index after the element that starts at `start`.
fn token_end(bytes: &[u8], start: usize) -> usize {
    let rest = bytes[start..].iter();
    let found = match bytes[start] {
        b'"' => return string_end(bytes, start),
        // No object that means something as an element holds another one, or a brace in a string.
        b'{' => rest.copied().position(|byte| byte == b'}').map(|index| index + 1),
        _ => rest.copied().position(|byte| matches!(byte, b',' | b']' | b' ' | b'\n' | b'\r' | b'\t')),
    };
    found.map_or(bytes.len(), |length| start + length)
}

fn plain<E: Element>(label: &str, text: &str, expected: usize) -> Result<Bytes, Error> {
    // The shape is only a claim; each element but the last takes a digit and a comma.
    let mut out = Vec::with_capacity(expected.min(text.len() / 2) * size_of::<E>());
    let mut count = 0;
    walk(format_args!("{label}: 'data'"), text, |index, token| {
        count = index + 1;
        match E::parse(token) {
            Some(element) => {
                element.put(&mut out);
                Ok(())
            }
            None => Err(wrong(label, index, token, E::wanted())),
        }
    })?;
    check_count(label, expected, count)?;
    Ok(out.into())
}

fn strings(label: &str, text: &str, expected: usize, source: &Bytes) -> Result<Data, Error> {
    let mut out = Vec::with_capacity(expected.min(RESERVED_STRINGS));
    walk(format_args!("{label}: 'data'"), text, |index, token| {
        out.push(string(token, source).map_err(|wanted| wrong(label, index, token, wanted))?);
        Ok(())
    })?;
    check_count(label, expected, out.len())?;
    Ok(Data::Strings(out))
}

/// What a string holds, as a slice of `source` when nothing in it is escaped; else what it should have been.
pub(super) fn string(token: &str, source: &Bytes) -> Result<Bytes, &'static str> {
    let quoted = token.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    match quoted {
        Some(plain) if !plain.contains('\\') => Ok(source.slice_ref(plain.as_bytes())),
        // Checked text may still name half of a surrogate pair.
        Some(_) => match serde_json::from_str::<String>(token) {
            Ok(unescaped) => Ok(unescaped.into()),
            Err(_) => Err("a string of whole Unicode characters"),
        },
        None => Err("a string"),
    }
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
pub(super) trait Element: Sized {
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
    ($($type:ident, $name:literal, $read:expr);*) => {$(
        impl Element for $type {
            fn parse(token: &str) -> Option<Self> {
                match token.parse() {
                    Ok(value) => Some($read(value)).filter(|value| value.is_finite()),
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

// Sixteen bits are rounded from a float so long that no digit of a usual number is lost before.
float_elements!(
    f32, "FP32", std::convert::identity::<f32>;
    f64, "FP64", std::convert::identity::<f64>;
    f16, "FP16", f16::from_f64;
    bf16, "BF16", bf16::from_f64
);

/// An integer written as a float, `3.0` or `1e3`; only as far as a float counts without gaps.
fn whole(token: &str) -> Option<i64> {
    const GAPLESS: f64 = 9_007_199_254_740_992.0;
    let value: f64 = token.parse().ok()?;
    (value.fract() == 0.0 && value.abs() <= GAPLESS).then_some(value as i64)
}
