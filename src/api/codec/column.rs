//! `Column`: a tensor that grows value by value, as rows of objects, cells of tables and nested arrays bring them.
//!
//! The elements are kept as the bytes they become. These are four times their text at most in JSON (eight bytes for a
//! digit and a comma), eight times in CSV (for a field of which there is only its comma); texts are bounded by the limit
//! that holds for all requests.

use std::{borrow::Cow, fmt::Display};

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use half::{bf16, f16};

use super::{
    document::Json,
    elements::{Element, string, walk},
    literals::masked,
};
use crate::{
    api::text_budget,
    backend::TensorSpec,
    error::Error,
    id::shorten,
    tensor::{DType, Data, Shape, Tensor},
};

/// Senders disagree about the padding at the end, and it says nothing.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What tables leave open or say so of, in the words of the library that writes most of them.
const ABSENT: [&str; 8] = ["", "NaN", "nan", "NA", "N/A", "null", "NULL", "None"];

/// The elements of one input so far.
pub(in crate::api) struct Column<'a> {
    spec: &'a TensorSpec,
    cells: Cells,
}

enum Cells {
    Plain { bytes: Vec<u8>, kind: Kind },
    Strings { texts: Vec<Bytes>, held: usize, limit: usize },
}

/// How elements of one fixed size are read.
#[derive(Clone, Copy)]
struct Kind {
    /// Adds a JSON token's element; false when it is none.
    parse: fn(&str, &mut Vec<u8>) -> bool,
    /// Adds a text field's element; false when it is none.
    parse_field: fn(&str, &mut Vec<u8>) -> bool,
    /// Adds the element that stands for none; false when the type has none.
    absent: fn(&mut Vec<u8>) -> bool,
    wanted: fn() -> String,
}

impl<'a> Column<'a> {
    /// An empty column for an input; `limit` is `limits.max_message_bytes`.
    pub(in crate::api) fn new(spec: &'a TensorSpec, limit: usize) -> Self {
        let plain = |kind| Cells::Plain { bytes: Vec::new(), kind };
        let cells = match spec.dtype {
            DType::Bool => plain(Kind { parse_field: truth, ..Kind::of::<bool>() }),
            DType::Uint8 => plain(Kind::of::<u8>()),
            DType::Uint16 => plain(Kind::of::<u16>()),
            DType::Uint32 => plain(Kind::of::<u32>()),
            DType::Uint64 => plain(Kind::of::<u64>()),
            DType::Int8 => plain(Kind::of::<i8>()),
            DType::Int16 => plain(Kind::of::<i16>()),
            DType::Int32 => plain(Kind::of::<i32>()),
            DType::Int64 => plain(Kind::of::<i64>()),
            DType::Fp16 => plain(Kind::of_float::<f16>()),
            DType::Bf16 => plain(Kind::of_float::<bf16>()),
            DType::Fp32 => plain(Kind::of_float::<f32>()),
            DType::Fp64 => plain(Kind::of_float::<f64>()),
            DType::Bytes => Cells::Strings { texts: Vec::new(), held: 0, limit },
        };
        Self { spec, cells }
    }

    /// Adds a value, an element or a nested array of them, and gives its shape. A text may come as `{"b64": "…"}`.
    ///
    /// # Errors
    /// `InvalidArgument` beginning with `place`, `TooLarge` for more texts than memory is meant for.
    pub(in crate::api) fn push(&mut self, place: impl Display + Copy, value: Json<'_>) -> Result<Shape, Error> {
        if value.text().starts_with('[') {
            return walk(place, value.text(), |index, token| {
                self.add(|| format!("{place}: element {index}"), value.part(token))
            });
        }
        self.add(|| place.to_string(), value)?;
        Ok(Shape::new())
    }

    /// Adds a cell of a table: as `push`, and null is the float that is no number.
    ///
    /// # Errors
    /// As `push`.
    pub(in crate::api) fn push_cell(&mut self, place: impl Display + Copy, value: Json<'_>) -> Result<Shape, Error> {
        if value.is_null()
            && let Cells::Plain { bytes, kind } = &mut self.cells
            && (kind.absent)(bytes)
        {
            return Ok(Shape::new());
        }
        self.push(place, value)
    }

    /// Adds a cell that is written as plain text, a slice of `source` when it is borrowed.
    ///
    /// # Errors
    /// As `push`.
    pub(in crate::api) fn push_field(
        &mut self,
        place: impl Display,
        field: Cow<'_, str>,
        source: &Bytes,
    ) -> Result<(), Error> {
        match &mut self.cells {
            Cells::Strings { .. } => {
                let text = match field {
                    Cow::Borrowed(text) => source.slice_ref(text.as_bytes()),
                    Cow::Owned(text) => text.into(),
                };
                self.add_text(text)
            }
            Cells::Plain { bytes, kind } => {
                let text = field.trim();
                let is_read = (ABSENT.contains(&text) && (kind.absent)(bytes)) || (kind.parse_field)(text, bytes);
                if is_read { Ok(()) } else { Err(wrong(place, (kind.wanted)(), format!("'{}'", shorten(text)))) }
            }
        }
    }

    /// The elements so far, in `shape`.
    ///
    /// # Errors
    /// `InvalidArgument` when they do not fill it.
    pub(in crate::api) fn finish(self, shape: Shape) -> Result<Tensor, Error> {
        let data = match self.cells {
            Cells::Plain { bytes, .. } => Data::Plain(bytes.into()),
            Cells::Strings { texts, .. } => Data::Strings(texts),
        };
        Tensor::new(self.spec.name.clone(), self.spec.dtype, shape, data)
    }

    fn add(&mut self, place: impl FnOnce() -> String, token: Json<'_>) -> Result<(), Error> {
        match &mut self.cells {
            Cells::Plain { bytes, kind } => {
                if (kind.parse)(token.text(), bytes) {
                    return Ok(());
                }
                Err(wrong(place(), (kind.wanted)(), token.shown()))
            }
            Cells::Strings { .. } => {
                let text = match coded(token) {
                    Some(code) => BASE64.decode(&*code).map(Bytes::from).map_err(|_| "base64 in its member 'b64'"),
                    None => string(token.text(), token.source()),
                };
                self.add_text(text.map_err(|wanted| wrong(place(), wanted, token.shown()))?)
            }
        }
    }

    fn add_text(&mut self, text: Bytes) -> Result<(), Error> {
        if let Cells::Strings { texts, held, limit } = &mut self.cells {
            *held += text.len() + size_of::<Bytes>();
            text_budget(*held, *limit)?;
            texts.push(text);
        }
        Ok(())
    }
}

/// The text in an object of the one member `b64`.
pub(in crate::api) fn coded(value: Json<'_>) -> Option<Cow<'_, str>> {
    let mut members = value.members()?;
    let (name, code) = members.next()?.ok()?;
    if name == "b64" && members.next().is_none() { code.string() } else { None }
}

fn wrong(place: impl Display, wanted: impl Display, got: impl Display) -> Error {
    Error::invalid(format!("{place} must be {wanted}, got {got}"))
}

impl Kind {
    fn of<E: Element>() -> Self {
        let parse = |token: &str, out: &mut Vec<u8>| E::parse(token).map(|element| element.put(out)).is_some();
        Self { parse, parse_field: parse, absent: |_| false, wanted: E::wanted }
    }

    fn of_float<E: Element>() -> Self {
        Self {
            parse_field: |field, out| match field {
                "inf" | "+inf" | "Infinity" => literal::<E>("Infinity", out),
                "-inf" | "-Infinity" => literal::<E>("-Infinity", out),
                number => E::parse(number).map(|element| element.put(out)).is_some(),
            },
            absent: |out| literal::<E>("NaN", out),
            ..Self::of::<E>()
        }
    }
}

fn literal<E: Element>(name: &str, out: &mut Vec<u8>) -> bool {
    masked(name).and_then(E::parse).map(|element| element.put(out)).is_some()
}

/// Tables spell the two in many ways.
fn truth(field: &str, out: &mut Vec<u8>) -> bool {
    let value = match field {
        "true" | "True" | "TRUE" | "1" => 1,
        "false" | "False" | "FALSE" | "0" => 0,
        _ => return false,
    };
    out.push(value);
    true
}
