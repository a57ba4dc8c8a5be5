//! Tensors as plain bytes: the layout that binary REST bodies and raw gRPC contents share.
//!
//! Fixed-size elements are slices of the received message and never copied. `BYTES` elements are slices too, one for
//! each, found by the little-endian `u32` length in front of it.

use bytes::Bytes;

use super::{InferCall, Parameters, RESERVED_STRINGS};
use crate::{
    backend::Signature,
    error::Error,
    tensor::{DType, Data, Shape, Tensor, elements},
};

/// Bytes of the length in front of a `BYTES` element.
const PREFIX: usize = 4;

/// Reads a body that is nothing but the data of a model's only input, and asks for every output as binary.
///
/// The call is one row: a free first dimension becomes 1, and one further free dimension follows from the number of
/// bytes. A `BYTES` input must hold a single element, which is the whole body without a length in front.
///
/// # Errors
/// `InvalidArgument` when the model takes more than one input, its shape does not follow from the number of bytes, or
/// the bytes do not fill it.
pub fn decode_raw(body: &Bytes, signature: &Signature) -> Result<InferCall, Error> {
    let [spec] = signature.inputs.as_slice() else {
        return Err(Error::invalid(format!(
            "a request without an inference header must be for a model with one input, and this model has {}",
            signature.inputs.len()
        )));
    };
    let mut declared = spec.shape.clone();
    if let Some(first) = declared.first_mut()
        && *first < 0
    {
        *first = 1;
    }
    let (shape, data) = match spec.dtype.size() {
        None => (one_element(&spec.name, &declared)?, Data::Strings(vec![body.clone()])),
        Some(size) => (inferred(&spec.name, &declared, size, body.len())?, Data::Plain(body.clone())),
    };
    let input = Tensor::new(spec.name.clone(), spec.dtype, shape, data)?;
    let mut call = InferCall::new(String::new(), Parameters::new(), vec![input], Vec::new())?;
    call.binary_output = true;
    Ok(call)
}

/// Reads the bytes of a tensor whose type and shape are known.
pub(super) fn read(label: &str, dtype: DType, shape: &Shape, bytes: Bytes) -> Result<Data, Error> {
    match dtype.size() {
        // `Tensor::new` compares the length with the shape.
        Some(_) => Ok(Data::Plain(bytes)),
        None => strings(label, elements(shape), bytes).map(Data::Strings),
    }
}

/// The bytes of a tensor; copies only `BYTES` elements, to put the lengths in front.
pub(in crate::api) fn write(data: &Data) -> Bytes {
    match data {
        Data::Plain(bytes) => bytes.clone(),
        Data::Strings(_) => {
            let mut out = Vec::with_capacity(length(data));
            put(data, &mut out);
            out.into()
        }
    }
}

/// How many bytes `put` writes.
pub(super) fn length(data: &Data) -> usize {
    match data {
        Data::Plain(bytes) => bytes.len(),
        Data::Strings(strings) => strings.iter().map(|string| PREFIX + string.len()).sum(),
    }
}

/// Copies the bytes of a tensor to the end of `out`.
pub(super) fn put(data: &Data, out: &mut Vec<u8>) {
    match data {
        Data::Plain(bytes) => out.extend_from_slice(bytes),
        Data::Strings(strings) => {
            for string in strings {
                // No element comes near 4 GiB: messages are limited far below.
                out.extend_from_slice(&u32::try_from(string.len()).unwrap_or(u32::MAX).to_le_bytes());
                out.extend_from_slice(string);
            }
        }
    }
}

fn strings(label: &str, count: Option<usize>, mut bytes: Bytes) -> Result<Vec<Bytes>, Error> {
    let count = count.unwrap_or(usize::MAX);
    let mut strings = Vec::with_capacity(count.min(RESERVED_STRINGS));
    while let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() {
        let length = u32::from_le_bytes(*prefix) as usize;
        if length > rest.len() {
            return Err(Error::invalid(format!(
                "{label}: BYTES element {} claims {length} bytes where {} are left",
                strings.len(),
                rest.len()
            )));
        }
        if strings.len() == count {
            break;
        }
        let end = PREFIX + length;
        strings.push(bytes.slice(PREFIX..end));
        bytes = bytes.slice(end..);
    }
    if !bytes.is_empty() {
        return Err(Error::invalid(format!(
            "{label}: {} bytes are left after {} BYTES elements",
            bytes.len(),
            strings.len()
        )));
    }
    // `Tensor::new` compares the count with the shape.
    Ok(strings)
}

fn one_element(name: &str, declared: &[i64]) -> Result<Shape, Error> {
    if declared.iter().all(|&size| size == 1 || size < 0) {
        return Ok(declared.iter().map(|_| 1).collect());
    }
    Err(Error::invalid(format!(
        "input '{name}' must hold a single BYTES element in a request without an inference header, \
         and its shape is {declared:?}"
    )))
}

/// Fills the one dimension that is free with what makes `given` bytes.
fn inferred(name: &str, declared: &[i64], size: usize, given: usize) -> Result<Shape, Error> {
    let free = declared.iter().filter(|&&size| size < 0).count();
    if free > 1 {
        return Err(Error::invalid(format!(
            "input '{name}' has more than one free dimension after the first ({declared:?}), \
             and a request without an inference header cannot tell them apart"
        )));
    }
    let known: Shape = declared.iter().filter_map(|&size| usize::try_from(size).ok()).collect();
    let step = elements(&known).and_then(|count| count.checked_mul(size)).unwrap_or(usize::MAX);
    // A step of 0 makes every size right for an empty body; `Tensor::new` refuses any other body.
    let filled = given.checked_div(step).unwrap_or(0);
    if free == 1 && filled.checked_mul(step) != Some(given) {
        return Err(Error::invalid(format!(
            "input '{name}' of shape {declared:?} takes a multiple of {step} bytes, got {given}"
        )));
    }
    Ok(declared.iter().map(|&size| usize::try_from(size).unwrap_or(filled)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::TensorSpec;

    fn signature(dtype: DType, shapes: &[&[i64]]) -> Signature {
        let spec = |shape: &&[i64]| TensorSpec { name: "x".into(), dtype, shape: shape.to_vec() };
        Signature { inputs: shapes.iter().map(spec).collect(), ..Signature::default() }
    }

    fn raw(dtype: DType, shapes: &[&[i64]], body: &'static [u8]) -> Result<Tensor, Error> {
        let mut call = decode_raw(&Bytes::from_static(body), &signature(dtype, shapes))?;
        assert!(call.binary_output);
        Ok(call.inputs.remove(0))
    }

    #[test]
    fn raw_requests_take_their_shape_from_the_model() {
        for (shape, body, expected) in [
            (&[2, 2][..], &[0; 8][..], &[2usize, 2][..]),
            (&[-1, 2], &[0; 4], &[1, 2]),
            (&[-1, -1, 2], &[0; 12], &[1, 3, 2]),
            (&[2, -1], &[0; 12], &[2, 3]),
            (&[-1], &[0; 2], &[1]),
            (&[], &[0; 2], &[]),
            (&[-1, 0, -1], &[], &[1, 0, 0]),
        ] {
            assert_eq!(&raw(DType::Int16, &[shape], body).unwrap().shape[..], expected, "{shape:?}");
        }
        for (shapes, body, message) in [
            (&[][..], &[0; 4][..], "model has 0"),
            (&[&[2][..], &[2]], &[0; 4], "model has 2"),
            (&[&[-1, -1, -1]], &[0; 4], "more than one free dimension"),
            (&[&[-1, -1, 2]], &[0; 6], "a multiple of 4 bytes, got 6"),
            (&[&[-1, 2]], &[0; 6], "takes 4 bytes, got 6"),
            (&[&[-1, 0, -1]], &[0; 6], "multiple of 0 bytes, got 6"),
            (&[&[-1, i64::MAX, i64::MAX, -1]], &[0; 6], "multiple of"),
        ] {
            let error = raw(DType::Int16, shapes, body).unwrap_err().message;
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_raw_string_is_the_whole_body() {
        for shape in [&[1][..], &[-1], &[-1, 1], &[]] {
            let tensor = raw(DType::Bytes, &[shape], b"\x01\0\0\0hello").unwrap();
            assert_eq!(tensor.data, Data::Strings(vec![Bytes::from_static(b"\x01\0\0\0hello")]));
            assert_eq!(tensor.shape.len(), shape.len());
        }
        assert!(raw(DType::Bytes, &[&[2]], b"hello").unwrap_err().message.contains("single BYTES element"));
    }

    #[test]
    fn broken_strings_are_named() {
        let read = |count: usize, bytes: &'static [u8]| {
            read("input 'x'", DType::Bytes, &[count].as_slice().into(), Bytes::from_static(bytes))
        };
        assert_eq!(read(1, b"\x02\0\0\0ab").unwrap(), Data::Strings(vec![Bytes::from_static(b"ab")]));
        assert_eq!(read(usize::MAX, b"\0\0\0\0").unwrap(), Data::Strings(vec![Bytes::new()]));
        for (count, bytes, message) in [
            (1, &b"\x03\0\0\0ab"[..], "input 'x': BYTES element 0 claims 3 bytes where 2 are left"),
            (1, b"\xff\xff\xff\xffab", "input 'x': BYTES element 0 claims 4294967295 bytes where 2 are left"),
            (2, b"\0\0\0\0ab", "input 'x': 2 bytes are left after 1 BYTES elements"),
            (1, b"\0\0\0\0\0\0\0\0", "input 'x': 4 bytes are left after 1 BYTES elements"),
        ] {
            assert_eq!(read(count, bytes).unwrap_err().message, message);
        }
    }
}
