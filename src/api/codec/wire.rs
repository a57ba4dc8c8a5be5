//! A usual gRPC request, read in place: no message object in between, and no copy of anything but numbers.
//!
//! Usual is what clients send all day: names, shapes and raw contents. For anything else (parameters, typed contents,
//! fields of a later protocol, and whatever is wrong) there is nothing to find here, and the compiler's types read the
//! message and say what is the matter with it. So this cannot disagree with them; that it never does is tested.

use bytes::Bytes;
use smallvec::SmallVec;

use super::{InferCall, MAX_RANK, Parameters, RequestedOutput, binary};
use crate::{
    backend::{Signature, TensorSpec},
    tensor::{DType, Shape, Tensor},
};

/// More fields than a usual request has; bounds what repeated ones take in memory.
const MAX_FIELDS: usize = 256;

/// A field of bytes in front of a key.
const LENGTH_DELIMITED: u8 = 2;

/// A request taken apart; its texts and contents are slices of the message.
#[derive(Debug, Default)]
pub struct Draft<'a> {
    pub model: &'a str,
    /// Empty for the default one.
    pub version: &'a str,
    pub id: &'a str,
    inputs: SmallVec<[Input<'a>; 2]>,
    outputs: SmallVec<[&'a str; 4]>,
    contents: SmallVec<[&'a [u8]; 2]>,
}

#[derive(Debug, Default)]
struct Input<'a> {
    name: &'a str,
    datatype: &'a str,
    shape: Shape,
}

impl<'a> Draft<'a> {
    /// Takes a `ModelInferRequest` apart; `None` when it is not a usual one.
    pub fn read(mut message: &'a [u8]) -> Option<Self> {
        let mut draft = Self::default();
        let rest = &mut message;
        for _ in 0..MAX_FIELDS {
            match key(rest) {
                None => return rest.is_empty().then_some(draft),
                Some((1, LENGTH_DELIMITED)) => draft.model = text(rest)?,
                Some((2, LENGTH_DELIMITED)) => draft.version = text(rest)?,
                Some((3, LENGTH_DELIMITED)) => draft.id = text(rest)?,
                Some((5, LENGTH_DELIMITED)) => draft.inputs.push(Input::read(bytes(rest)?)?),
                Some((6, LENGTH_DELIMITED)) => draft.outputs.push(output(bytes(rest)?)?),
                Some((7, LENGTH_DELIMITED)) => draft.contents.push(bytes(rest)?),
                Some(_) => return None,
            }
        }
        None
    }

    /// The call that `message`, of which this is the draft, makes to a model with this signature; `None` when it does
    /// not fit. Names are the signature's own, contents are slices of the message.
    pub fn call(self, message: &Bytes, signature: &Signature) -> Option<InferCall> {
        if self.contents.len() != self.inputs.len() {
            return None;
        }
        let mut inputs = Vec::with_capacity(self.inputs.len());
        for (Input { name, datatype, shape }, contents) in self.inputs.into_iter().zip(self.contents) {
            let dtype = DType::parse(datatype)?;
            // Whoever complains gives no reason: the compiler's types will find it again, and say it.
            let data = binary::read("", dtype, &shape, message.slice_ref(contents)).ok()?;
            inputs.push(Tensor::new(known(&signature.inputs, name)?, dtype, shape, data).ok()?);
        }
        let mut outputs = Vec::with_capacity(self.outputs.len());
        for (index, name) in self.outputs.iter().enumerate() {
            if self.outputs[..index].contains(name) {
                return None;
            }
            let name = known(&signature.outputs, name)?;
            outputs.push(RequestedOutput {
                name,
                parameters: Parameters::new(),
                binary: None,
                classes: None,
                placement: None,
            });
        }
        Some(InferCall {
            id: self.id.to_owned(),
            timeout: None,
            priority: 0,
            parameters: Parameters::new(),
            inputs,
            placed: Vec::new(),
            outputs,
            binary_output: false,
        })
    }
}

impl<'a> Input<'a> {
    fn read(mut message: &'a [u8]) -> Option<Self> {
        let mut input = Self::default();
        let rest = &mut message;
        loop {
            match key(rest) {
                None => return rest.is_empty().then_some(input),
                Some((1, LENGTH_DELIMITED)) => input.name = text(rest)?,
                Some((2, LENGTH_DELIMITED)) => input.datatype = text(rest)?,
                // Packed, and one by one.
                Some((3, LENGTH_DELIMITED)) => {
                    let mut sizes = bytes(rest)?;
                    while !sizes.is_empty() {
                        input.push(varint(&mut sizes)?)?;
                    }
                }
                Some((3, 0)) => input.push(varint(rest)?)?,
                Some(_) => return None,
            }
        }
    }

    fn push(&mut self, size: u64) -> Option<()> {
        // Negative sizes are the large half of the numbers.
        let size = i64::try_from(size).ok().and_then(|size| usize::try_from(size).ok())?;
        (self.shape.len() < MAX_RANK).then(|| self.shape.push(size))
    }
}

/// Where the first tensor's raw contents begin in a message of which this is the beginning.
pub fn contents_start(beginning: &[u8]) -> Option<usize> {
    let mut rest = beginning;
    while let Some((field, LENGTH_DELIMITED)) = key(&mut rest) {
        let length = varint(&mut rest)?;
        if field == 7 {
            return Some(beginning.len() - rest.len());
        }
        rest = rest.get(usize::try_from(length).ok()?..)?;
    }
    None
}

/// The name of a requested output.
fn output(mut message: &[u8]) -> Option<&str> {
    let mut name = "";
    while !message.is_empty() {
        let (1, LENGTH_DELIMITED) = key(&mut message)? else { return None };
        name = text(&mut message)?;
    }
    Some(name)
}

/// The signature's own copy of a name.
fn known(specs: &[TensorSpec], name: &str) -> Option<std::sync::Arc<str>> {
    specs.iter().find(|spec| *spec.name == *name).map(|spec| spec.name.clone())
}

/// The number and the wire type of a field below 16, whose key is a single byte; `None`, with nothing read, for others
/// and at the end.
fn key(rest: &mut &[u8]) -> Option<(u8, u8)> {
    let (&key, after) = rest.split_first().filter(|&(&key, _)| (0x08..0x80).contains(&key))?;
    *rest = after;
    Some((key >> 3, key & 7))
}

fn text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    std::str::from_utf8(bytes(rest)?).ok()
}

fn bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(varint(rest)?).ok()?;
    let (bytes, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(bytes)
}

/// A number of up to ten bytes; `None` when there is none, or one beyond 64 bits.
pub(in crate::api) fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        // Of the tenth byte only one bit is left.
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
