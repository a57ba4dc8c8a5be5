//! REST messages: a JSON object, and behind it the tensors that are sent as plain bytes.
//!
//! The object is taken apart into the texts of its members in one pass. Each is then read on its own, so that every
//! complaint can name its place, and the elements of a tensor are read when its type is known, whatever came first.

use std::{borrow::Cow, fmt, sync::Arc};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{
    InferCall, InferReply, NonFinite, Parameters, RequestedOutput, binary, declared,
    direct::{self, Parts},
    elements,
    envelope::{Envelope, Members, ParameterMap, Place},
    literals,
    placement::{BYTE_SIZE, OFFSET, PlacedInput, Placement, REGION},
    values,
    values::Spelling,
};
use crate::{
    error::{Error, abridge},
    id::shorten,
    tensor::{self, Tensor},
};

/// How a reply is to be written.
#[derive(Clone, Copy, Debug)]
pub struct JsonOptions<'a> {
    /// The call's `outputs`.
    pub requested: &'a [RequestedOutput],
    /// The call's `binary_output`.
    pub binary_output: bool,
    pub non_finite: NonFinite,
}

/// A reply ready to be sent: the JSON, then the tensors in order, as pieces so that they need not be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub json: Bytes,
    pub tensors: Vec<Bytes>,
    /// What `Inference-Header-Content-Length` must say; `None` when no output is binary.
    pub header_length: Option<usize>,
}

/// Reads a request of which the first `header_length` bytes are JSON and the rest binary tensors; all of it is JSON
/// when there is none. For a length of 0 see `decode_raw`.
///
/// # Errors
/// `InvalidArgument` naming the place, `Unimplemented` for features that are not here.
pub fn decode_json(body: &Bytes, header_length: Option<usize>) -> Result<InferCall, Error> {
    let length = header_length.unwrap_or(body.len());
    match direct::read(body, length) {
        Some(Parts { id, parameters, inputs, outputs }) => InferCall::new(
            id.unwrap_or_default(),
            parameters.unwrap_or_default(),
            inputs.unwrap_or_default(),
            outputs.unwrap_or_default(),
        ),
        None => decode_carefully(body, header_length),
    }
}

/// As `decode_json`, for whatever may come, and with a word for all that is wrong with it.
pub(super) fn decode_carefully(body: &Bytes, header_length: Option<usize>) -> Result<InferCall, Error> {
    let length = header_length.unwrap_or(body.len());
    if length > body.len() {
        return Err(Error::invalid(format!(
            "inference header size {length} should be in range (0, {}), the length of the body",
            body.len()
        )));
    }
    let mut json = body.slice(..length);
    let mut tail = Tail { rest: body.slice(length..), is_announced: header_length.is_some() };
    let envelope = match Envelope::parse(&json) {
        Ok(envelope) => envelope,
        Err(error) => {
            // Looked for only now: scanning for literals would cost everyone who sends none.
            json = literals::mask(&json).ok_or(error)?;
            Envelope::parse(&json)?
        }
    };

    let id = envelope.id.map(|raw| text(raw, "id")).transpose()?.unwrap_or_default().into_owned();
    let request_parameters = parameters(envelope.parameters, "parameters")?;
    let Some(inputs) = &envelope.inputs else {
        return Err(Error::invalid("the request has no 'inputs'"));
    };
    let mut placed = Vec::new();
    let inputs = inputs
        .iter()
        .enumerate()
        .filter_map(|(index, members)| {
            let place = Place("inputs", index);
            tensor(place, members, Spelling::Protocol, &mut tail, &json, &mut placed).transpose()
        })
        .collect::<Result<_, _>>()?;
    if !tail.rest.is_empty() {
        return Err(Error::invalid(format!(
            "the request has {} bytes of binary data more than its inputs take by their 'binary_data_size'",
            tail.rest.len()
        )));
    }
    let outputs = envelope
        .outputs
        .iter()
        .flatten()
        .enumerate()
        .map(|(index, members)| output(Place("outputs", index), members))
        .collect::<Result<_, _>>()?;
    InferCall::new(id, request_parameters, inputs, outputs).map(|call| InferCall { placed, ..call })
}

/// Writes a reply, outputs that are not asked for as binary in the JSON.
///
/// # Errors
/// `InvalidArgument` when JSON cannot carry an output; the message says to request it as binary data.
pub fn encode_json(reply: &InferReply<'_>, options: &JsonOptions<'_>) -> Result<Encoded, Error> {
    let mut json = Vec::with_capacity(256);
    let mut tensors = Vec::new();
    json.extend_from_slice(br#"{"model_name":"#);
    put_text(&mut json, reply.model)?;
    json.extend_from_slice(br#","model_version":"#);
    put_text(&mut json, reply.version)?;
    if !reply.id.is_empty() {
        json.extend_from_slice(br#","id":"#);
        put_text(&mut json, reply.id)?;
    }
    json.extend_from_slice(br#","outputs":["#);
    for (index, tensor) in reply.outputs.iter().enumerate() {
        if index > 0 {
            json.push(b',');
        }
        json.extend_from_slice(br#"{"name":"#);
        put_text(&mut json, &tensor.name)?;
        json.extend_from_slice(br#","datatype":"#);
        put_text(&mut json, tensor.dtype.name())?;
        json.extend_from_slice(br#","shape":"#);
        put_json(&mut json, &tensor.shape[..])?;
        let requested = options.requested.iter().find(|requested| requested.name == tensor.name);
        if let Some(placement) = requested.and_then(|requested| requested.placement.as_ref()) {
            put_placement(&mut json, placement, binary::length(&tensor.data))?;
        } else if requested.and_then(|requested| requested.binary).unwrap_or(options.binary_output) {
            let bytes = binary::write(&tensor.data);
            json.extend_from_slice(br#","parameters":{"binary_data_size":"#);
            put_json(&mut json, &bytes.len())?;
            json.push(b'}');
            tensors.push(bytes);
        } else {
            json.extend_from_slice(br#","data":"#);
            values::write_flat(tensor, Spelling::Protocol, options.non_finite, &mut json)?;
        }
        json.push(b'}');
    }
    json.extend_from_slice(b"]}");
    let header_length = (!tensors.is_empty()).then_some(json.len());
    Ok(Encoded { json: json.into(), tensors, header_length })
}

/// Where an output was written, and how many bytes of it.
fn put_placement(json: &mut Vec<u8>, placement: &Placement, written: usize) -> Result<(), Error> {
    let told = serde_json::json!({ REGION: placement.region, OFFSET: placement.offset, BYTE_SIZE: written });
    json.extend_from_slice(br#","parameters":"#);
    put_json(json, &told)
}

pub(in crate::api) fn put_json<T: serde::Serialize + ?Sized>(json: &mut Vec<u8>, value: &T) -> Result<(), Error> {
    serde_json::to_writer(json, value).map_err(|error| values::unwritable(error.into()))
}

/// As `put_json`; most texts stand for themselves, and need not be taken apart to be found so.
fn put_text(json: &mut Vec<u8>, text: &str) -> Result<(), Error> {
    if text.bytes().any(|byte| matches!(byte, b'"' | b'\\' | ..b' ')) {
        return put_json(json, text);
    }
    json.push(b'"');
    json.extend_from_slice(text.as_bytes());
    json.push(b'"');
    Ok(())
}

/// The binary tensors that no input has taken yet.
pub(super) struct Tail {
    rest: Bytes,
    /// Whether the request said where its JSON ends.
    is_announced: bool,
}

impl Tail {
    /// Of a text that has none.
    pub(super) fn none() -> Self {
        Self { rest: Bytes::new(), is_announced: true }
    }

    fn take(&mut self, label: &str, size: u64) -> Result<Bytes, Error> {
        match usize::try_from(size) {
            Ok(size) if size <= self.rest.len() => Ok(self.rest.split_to(size)),
            _ => {
                let hint = match self.is_announced {
                    true => "",
                    false => "; the header Inference-Header-Content-Length is missing",
                };
                Err(Error::invalid(format!(
                    "{label}: 'binary_data_size' is {size} bytes where {} are left in the body{hint}",
                    self.rest.len()
                )))
            }
        }
    }
}

/// An input, or an output that is told like one; `None` when it lies in shared memory, and goes to `placed`.
pub(super) fn tensor(
    place: Place,
    members: &Members<'_, 5>,
    spelling: Spelling,
    tail: &mut Tail,
    source: &Bytes,
    placed: &mut Vec<PlacedInput>,
) -> Result<Option<Tensor>, Error> {
    let [name, datatype, shape, parameter_text, data] = *members;
    let name = text(required(name, place, "name")?, format_args!("{place}.name"))?;
    let datatype = text(required(datatype, place, "datatype")?, format_args!("{place}.datatype"))?;
    let shape = required(shape, place, "shape")?;
    let shape: Vec<i64> = serde_json::from_str(shape.get()).map_err(|_| {
        Error::invalid(format!("{place}.shape must be an array of integers, got {}", shorten(shape.get())))
    })?;
    let label = format!("{} '{}'", place.kind(), shorten(&name));
    let (dtype, shape) = declared(&label, &datatype, &shape)?;

    let parameters = parameters(parameter_text, format_args!("{place}.parameters"))?;
    if let Some(placement) = Placement::read(&label, &parameters)? {
        if data.is_some() || parameters.contains_key("binary_data_size") {
            return Err(Error::invalid(format!("{label} lies in shared memory and must not be sent as well")));
        }
        placed.push(PlacedInput { name: name.into(), dtype, shape, placement });
        return Ok(None);
    }
    let data = match (parameters.get("binary_data_size"), data) {
        (Some(_), Some(_)) => {
            return Err(Error::invalid(format!("{label} has both 'data' and the parameter 'binary_data_size'")));
        }
        (None, None) => {
            return Err(Error::invalid(format!("{label} has neither 'data' nor the parameter 'binary_data_size'")));
        }
        (Some(size), None) => {
            let size = size.as_unsigned().ok_or_else(|| {
                Error::invalid(format!("{label}: parameter 'binary_data_size' must be a whole number of bytes"))
            })?;
            binary::read(&label, dtype, &shape, tail.take(&label, size)?)?
        }
        (None, Some(data)) => {
            // What overflows here is refused by `Tensor::new`, or sooner for not being all there.
            let expected = tensor::elements(&shape).unwrap_or(usize::MAX);
            elements::read(&label, dtype, spelling, expected, data.get(), source)?
        }
    };
    Tensor::new(name.into(), dtype, shape, data).map(Some)
}

fn output(place: Place, members: &Members<'_, 2>) -> Result<(Arc<str>, Parameters), Error> {
    let [name, parameter_text] = *members;
    let name = text(required(name, place, "name")?, format_args!("{place}.name"))?;
    Ok((name.into(), parameters(parameter_text, format_args!("{place}.parameters"))?))
}

fn required<'a>(member: Option<&'a RawValue>, place: Place, name: &str) -> Result<&'a RawValue, Error> {
    member.ok_or_else(|| Error::invalid(format!("{place} has no '{name}'")))
}

fn text(raw: &RawValue, place: impl fmt::Display) -> Result<Cow<'_, str>, Error> {
    // The common case borrows; a text with escapes is no plain slice of its JSON.
    let text = serde_json::from_str::<&str>(raw.get()).map(Cow::Borrowed);
    text.or_else(|_| serde_json::from_str::<String>(raw.get()).map(Cow::Owned))
        .map_err(|_| Error::invalid(format!("{place} must be a string, got {}", shorten(raw.get()))))
}

fn parameters(raw: Option<&RawValue>, place: impl fmt::Display) -> Result<Parameters, Error> {
    let Some(raw) = raw else { return Ok(Parameters::new()) };
    serde_json::from_str::<ParameterMap>(raw.get()).map(|map| map.0).map_err(|error| {
        // The position counts from where the parameters start, which helps nobody.
        let message = error.to_string();
        let end = message.rfind(" at line ").unwrap_or(message.len());
        Error::invalid(format!("{place}: {}", abridge(&message[..end])))
    })
}
