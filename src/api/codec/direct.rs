//! The usual REST request, read in one pass from its bytes into its tensors.
//!
//! What clients send most is plain: known members, names without escapes, numbers in one flat array. A request of four
//! numbers read as such takes 4,200 instructions by callgrind, where finding the texts of its members first took 9,400,
//! and in a large one no number is looked at twice. Everything else, and everything wrong, is left to
//! `json::decode_carefully`, which knows all that is allowed and says what is not; what both read, they read the same.

use bytes::Bytes;

use super::{
    MAX_RANK, Parameter, Parameters, binary,
    decimal::{Decimal, Number},
};
use crate::tensor::{self, DType, Data, Shape, Tensor};

/// Requests with more inputs or outputs are not usual.
const MAX_TENSORS: usize = 64;

/// What a request holds, not yet checked against itself.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) id: Option<String>,
    pub(super) parameters: Option<Parameters>,
    pub(super) inputs: Option<Vec<Tensor>>,
    pub(super) outputs: Option<Vec<(std::sync::Arc<str>, Parameters)>>,
}

/// Reads a request whose JSON is the first `length` bytes of `body`; `None` when it is not a usual one.
pub(super) fn read(body: &Bytes, length: usize) -> Option<Parts> {
    let mut text = Text { bytes: body.get(..length)?, at: 0 };
    let mut parts = Parts::default();
    let mut binary_start = length;
    text.members(|text, name| match name {
        b"id" => set(&mut parts.id, text.string()?.to_owned()),
        b"parameters" => set(&mut parts.parameters, text.parameters()?),
        b"inputs" => {
            let inputs = text.array(|text| input(text, body, &mut binary_start))?;
            set(&mut parts.inputs, inputs)
        }
        b"outputs" => set(&mut parts.outputs, text.array(output)?),
        _ => None,
    })?;
    let is_whole = text.peek().is_none() && binary_start == body.len() && parts.inputs.is_some();
    is_whole.then_some(parts)
}

/// Fills what may be given once.
fn set<T>(place: &mut Option<T>, value: T) -> Option<()> {
    place.replace(value).is_none().then_some(())
}

/// `binary_start` is where the next binary tensor begins.
fn input(text: &mut Text<'_>, body: &Bytes, binary_start: &mut usize) -> Option<Tensor> {
    let (mut name, mut dtype, mut shape, mut data, mut size) = (None, None, None, None, None);
    text.members(|text, member| match member {
        b"name" => set(&mut name, text.string()?),
        b"datatype" => set(&mut dtype, DType::parse(text.string()?)?),
        b"shape" => set(&mut shape, text.shape()?),
        // Its type may come later.
        b"data" => set(&mut data, text.flat_array()?),
        b"parameters" => text.members(|text, parameter| match parameter {
            b"binary_data_size" => set(&mut size, text.size()?),
            _ => None,
        }),
        _ => None,
    })?;
    let (name, dtype, shape) = (name?, dtype?, shape?);
    let data = match (data, size) {
        (Some(elements), None) => numbers(dtype, elements, tensor::elements(&shape)?).map(Data::Plain)?,
        (None, Some(size)) => {
            let end = binary_start.checked_add(size).filter(|&end| end <= body.len())?;
            let bytes = body.slice(*binary_start..end);
            *binary_start = end;
            binary::read("", dtype, &shape, bytes).ok()?
        }
        _ => return None,
    };
    Tensor::new(name.into(), dtype, shape, data).ok()
}

fn output(text: &mut Text<'_>) -> Option<(std::sync::Arc<str>, Parameters)> {
    let (mut name, mut parameters) = (None, None);
    text.members(|text, member| match member {
        b"name" => set(&mut name, text.string()?),
        b"parameters" => set(&mut parameters, text.parameters()?),
        _ => None,
    })?;
    Some((name?.into(), parameters.unwrap_or_default()))
}

/// The bytes of the `expected` numbers that stand in `elements`.
fn numbers(dtype: DType, elements: &[u8], expected: usize) -> Option<Bytes> {
    match dtype {
        DType::Uint8 => all::<u8>(elements, expected),
        DType::Uint16 => all::<u16>(elements, expected),
        DType::Uint32 => all::<u32>(elements, expected),
        DType::Uint64 => all::<u64>(elements, expected),
        DType::Int8 => all::<i8>(elements, expected),
        DType::Int16 => all::<i16>(elements, expected),
        DType::Int32 => all::<i32>(elements, expected),
        DType::Int64 => all::<i64>(elements, expected),
        DType::Fp32 => all::<f32>(elements, expected),
        DType::Fp64 => all::<f64>(elements, expected),
        DType::Bool | DType::Fp16 | DType::Bf16 | DType::Bytes => None,
    }
}

fn all<N: Number>(elements: &[u8], expected: usize) -> Option<Bytes> {
    // The shape is only a claim; each number but the last takes a digit and a comma.
    let mut out = Vec::with_capacity(expected.min(elements.len() / 2 + 1) * size_of::<N>());
    let mut text = Text { bytes: elements, at: 0 };
    let mut count = 0usize;
    text.each(|text| {
        count += 1;
        N::of(&text.number()?)?.put(&mut out);
        Some(())
    })?;
    (count == expected).then(|| out.into())
}

/// JSON up to where it has been read.
struct Text<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Text<'a> {
    /// The next byte that is no space.
    fn peek(&mut self) -> Option<u8> {
        while let b' ' | b'\n' | b'\r' | b'\t' = self.bytes.get(self.at)? {
            self.at += 1;
        }
        self.bytes.get(self.at).copied()
    }

    fn accept(&mut self, byte: u8) -> bool {
        let is_there = self.peek() == Some(byte);
        self.at += usize::from(is_there);
        is_there
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        self.accept(byte).then_some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.quoted()?).ok()
    }

    /// What stands between two quotation marks, when it is ASCII and stands for itself.
    fn quoted(&mut self) -> Option<&'a [u8]> {
        self.take(b'"')?;
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| matches!(byte, b'"' | b'\\' | ..b' ' | 0x80..))?;
        // Not `take`: a line break in the text must not pass for a space before the quotation mark.
        self.at += length + 1;
        (rest[length] == b'"').then_some(&rest[..length])
    }

    // Left to itself, the compiler makes it a call for each element: 1 % more instructions for a request of 4 KB.
    #[inline(always)]
    fn number(&mut self) -> Option<Decimal<'a>> {
        self.peek()?;
        let number = Decimal::read(&self.bytes[self.at..])?;
        self.at += number.length();
        Some(number)
    }

    fn size(&mut self) -> Option<usize> {
        self.number()?.integer().and_then(|size| usize::try_from(size).ok())
    }

    fn shape(&mut self) -> Option<Shape> {
        let mut shape = Shape::new();
        self.take(b'[')?;
        self.items(b']', |text| {
            shape.push(text.size()?);
            (shape.len() <= MAX_RANK).then_some(())
        })?;
        Some(shape)
    }

    /// The inside of an array up to the first closing bracket, unread.
    fn flat_array(&mut self) -> Option<&'a [u8]> {
        self.take(b'[')?;
        let rest = &self.bytes[self.at..];
        let length = memchr::memchr(b']', rest)?;
        self.at += length + 1;
        Some(&rest[..length])
    }

    fn parameters(&mut self) -> Option<Parameters> {
        let mut parameters = Parameters::new();
        self.members(|text, name| {
            let value = match text.peek()? {
                b'"' => Parameter::String(text.string()?.to_owned()),
                b't' => text.word(b"true").map(|()| Parameter::Bool(true))?,
                b'f' => text.word(b"false").map(|()| Parameter::Bool(false))?,
                _ => Parameter::Int(text.number()?.integer()?),
            };
            let name = std::str::from_utf8(name).ok()?;
            parameters.insert(name.to_owned(), value).is_none().then_some(())
        })?;
        Some(parameters)
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.bytes[self.at..].starts_with(word).then(|| self.at += word.len())
    }

    fn members(&mut self, mut member: impl FnMut(&mut Self, &'a [u8]) -> Option<()>) -> Option<()> {
        self.take(b'{')?;
        self.items(b'}', |text| {
            let name = text.quoted()?;
            text.take(b':')?;
            member(text, name)
        })
    }

    fn array<T>(&mut self, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut items = Vec::new();
        self.take(b'[')?;
        self.items(b']', |text| {
            items.push(item(text)?);
            (items.len() <= MAX_TENSORS).then_some(())
        })?;
        Some(items)
    }

    /// What stands between commas, up to `end`.
    fn items(&mut self, end: u8, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        if self.accept(end) {
            return Some(());
        }
        loop {
            item(self)?;
            if self.accept(end) {
                return Some(());
            }
            self.take(b',')?;
        }
    }

    /// What stands between commas, up to the end of the text.
    fn each(&mut self, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        if self.peek().is_none() {
            return Some(());
        }
        loop {
            item(self)?;
            match self.bytes.get(self.at) {
                // An item has to follow.
                Some(b',') => self.at += 1,
                _ if self.peek().is_none() => return Some(()),
                _ => self.take(b',')?,
            }
        }
    }
}
