//! A gRPC reply as the bytes that go out, written without a message object in between.
//!
//! Field by field it is what the compiler's types would write. Outputs from `LARGE` on are not copied: their own bytes
//! are pieces of the reply.

use std::mem::take;

use bytes::Bytes;
use prost::Message;
use smallvec::SmallVec;

use super::{InferReply, binary};
use crate::{
    error::{Code, Error},
    tensor::{Data, Tensor},
};

/// Bytes from which an output is a piece by itself. A piece costs a frame of its own, about as much as copying this
/// many bytes.
const LARGE: usize = 4096;

/// Bytes in front of each message: that it is not compressed, and its length.
const PREFIX: usize = 5;

/// What is sent, one after the other.
pub type Pieces = SmallVec<[Bytes; 2]>;

/// Writes a reply with the prefix that gRPC puts before a message.
///
/// # Errors
/// `TooLarge` when the length does not fit into the prefix.
pub fn write_reply(reply: &InferReply<'_>) -> Result<Pieces, Error> {
    let texts = [(1, reply.model), (2, reply.version), (3, reply.id)];
    let mut length = texts.iter().map(|(_, text)| text_length(text)).sum::<usize>();
    let mut lent = 0;
    for output in reply.outputs {
        let contents = binary::length(&output.data);
        length += field_length(output_length(output)) + field_length(contents);
        lent += if is_lent(&output.data) { contents } else { 0 };
    }
    let prefix = prefix(length)?;
    let mut pieces = Pieces::new();
    // Filled to the last byte, so that a reply in one piece becomes shared bytes without another allocation.
    let mut out = Vec::with_capacity(PREFIX + length - lent);
    out.extend_from_slice(&prefix);
    for (field, text) in texts {
        put_text(&mut out, field, text);
    }
    for output in reply.outputs {
        put_key(&mut out, 5, output_length(output));
        put_text(&mut out, 1, &output.name);
        put_text(&mut out, 2, output.dtype.name());
        if !output.shape.is_empty() {
            put_key(&mut out, 3, shape_length(output));
            sizes(output).for_each(|size| put_varint(&mut out, size));
        }
    }
    for output in reply.outputs {
        put_key(&mut out, 6, binary::length(&output.data));
        match &output.data {
            Data::Plain(bytes) if is_lent(&output.data) => pieces.extend([take(&mut out).into(), bytes.clone()]),
            data => binary::put(data, &mut out),
        }
    }
    if !out.is_empty() {
        pieces.push(out.into());
    }
    Ok(pieces)
}

/// Writes a message of the compiler's types, for replies that have more than tensors.
///
/// # Errors
/// As `write_reply`.
pub fn write_message(message: &impl Message) -> Result<Pieces, Error> {
    let length = message.encoded_len();
    let mut out = Vec::with_capacity(PREFIX + length);
    out.extend_from_slice(&prefix(length)?);
    message.encode(&mut out).map_err(|error| Error::internal(format!("the reply cannot be written: {error}")))?;
    Ok(Pieces::from_iter([Bytes::from(out)]))
}

/// What stands in front of a message of `length` bytes that is not compressed.
fn prefix(length: usize) -> Result<[u8; PREFIX], Error> {
    let [a, b, c, d] = u32::try_from(length).map(u32::to_be_bytes).map_err(|_| {
        Error::new(Code::TooLarge, format!("the reply takes {length} bytes, and a gRPC message may have {}", u32::MAX))
    })?;
    Ok([0, a, b, c, d])
}

fn is_lent(data: &Data) -> bool {
    matches!(data, Data::Plain(bytes) if bytes.len() >= LARGE)
}

/// The length of an output's message, without its contents.
fn output_length(output: &Tensor) -> usize {
    let shape = if output.shape.is_empty() { 0 } else { field_length(shape_length(output)) };
    text_length(&output.name) + text_length(output.dtype.name()) + shape
}

fn shape_length(output: &Tensor) -> usize {
    sizes(output).map(varint_length).sum()
}

/// A tensor in memory has no dimension beyond i64, unless it is empty.
fn sizes(output: &Tensor) -> impl Iterator<Item = u64> {
    output.shape.iter().map(|&size| u64::try_from(size).unwrap_or(u64::MAX).min(i64::MAX as u64))
}

/// Nothing is written of an empty text.
fn text_length(text: &str) -> usize {
    if text.is_empty() { 0 } else { field_length(text.len()) }
}

/// The length of a field of so many bytes, with its key and its own length in front.
fn field_length(bytes: usize) -> usize {
    1 + varint_length(bytes as u64) + bytes
}

fn varint_length(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn put_text(out: &mut Vec<u8>, field: u8, text: &str) {
    if !text.is_empty() {
        put_key(out, field, text.len());
        out.extend_from_slice(text.as_bytes());
    }
}

/// Begins a field of `length` bytes.
fn put_key(out: &mut Vec<u8>, field: u8, length: usize) {
    out.push(field << 3 | 2);
    put_varint(out, length as u64);
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
