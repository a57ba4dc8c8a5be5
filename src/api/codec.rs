//! The messages of one inference call, the same whichever protocol carried them.
//!
//! REST and gRPC differ only in how they spell a call. What a call may ask for, and what this server answers when it
//! asks for something else, is decided once here, so that the two protocols cannot drift apart.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use crate::{
    error::{Code, Error},
    id::shorten,
    tensor::{DType, Shape, Tensor},
};

mod binary;
mod cases;
mod classification;
mod column;
mod decimal;
mod direct;
mod document;
mod elements;
mod envelope;
mod json;
mod literals;
mod placement;
mod proto;
mod reply;
#[cfg(test)]
mod tests;
mod values;
mod wire;

pub use binary::decode_raw;
pub(super) use binary::write as write_binary;
pub use cases::decode_cases;
pub use classification::classify;
pub(super) use column::{Column, coded};
pub use document::Document;
pub(super) use document::Json;
pub(super) use json::put_json;
pub use json::{Encoded, JsonOptions, decode_json, encode_json};
pub use placement::{PlacedInput, Placement};
pub use proto::{decode_proto, encode_proto};
pub use reply::{Pieces, write_message, write_reply};
pub use values::NonFinite;
pub(super) use values::{Spelling, write_flat, write_nested};
pub(super) use wire::varint;
pub use wire::{Draft, contents_start};

/// More dimensions than any graph has; keeps shapes, and the messages that quote them, short.
const MAX_RANK: usize = 64;

/// `BYTES` elements to make room for on the word of a shape; the rest must arrive first.
const RESERVED_STRINGS: usize = 1024;

/// The request's wish for an answer that says that none follows.
const FINAL_RESPONSE: &str = "triton_enable_empty_final_response";

/// What a caller says beside the tensors, by name.
pub type Parameters = BTreeMap<String, Parameter>;

/// The value of a parameter; never a list, an object or nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Parameter {
    Bool(bool),
    Int(i64),
    /// Only for what `Int` cannot hold when it comes as JSON; gRPC callers choose.
    Uint(u64),
    Float(f64),
    String(String),
}

/// One inference call as it came over the wire, tensors decoded but not yet checked against a model.
#[derive(Clone, Debug, PartialEq)]
pub struct InferCall {
    /// To be echoed; empty when the caller gave none.
    pub id: String,
    /// How long the caller is willing to wait; the parameter `timeout`, in microseconds on the wire.
    pub timeout: Option<Duration>,
    /// Level 1 is the most urgent, 0 is the model's default; the parameter `priority`.
    pub priority: u64,
    pub parameters: Parameters,
    /// In the order of the message; a name given twice is found when the call meets a signature.
    pub inputs: Vec<Tensor>,
    /// Inputs whose elements must be fetched from shared memory yet.
    pub placed: Vec<PlacedInput>,
    /// Without duplicates; empty stands for every output of the model.
    pub outputs: Vec<RequestedOutput>,
    /// Whether outputs go back as binary unless they say otherwise; the parameter `binary_data_output`.
    pub binary_output: bool,
}

/// An output that the caller wants back.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestedOutput {
    pub name: Arc<str>,
    pub parameters: Parameters,
    /// The parameter `binary_data`; overrides `InferCall::binary_output` for this output.
    pub binary: Option<bool>,
    /// How many of the best classes are wanted instead of the values; the parameter `classification`.
    pub classes: Option<usize>,
    /// Where in shared memory the values are to be written, instead of being sent.
    pub placement: Option<Placement>,
}

/// What goes back.
#[derive(Clone, Copy, Debug)]
pub struct InferReply<'a> {
    pub model: &'a str,
    pub version: &'a str,
    /// The caller's own; empty when it gave none.
    pub id: &'a str,
    pub outputs: &'a [Tensor],
}

impl Parameter {
    /// Whether the value says anything but no, zero or nothing.
    fn is_set(&self) -> bool {
        match self {
            Parameter::Bool(value) => *value,
            Parameter::Int(value) => *value != 0,
            Parameter::Uint(value) => *value != 0,
            Parameter::Float(value) => *value != 0.0,
            Parameter::String(value) => !value.is_empty(),
        }
    }

    fn as_unsigned(&self) -> Option<u64> {
        match self {
            Parameter::Int(value) => u64::try_from(*value).ok(),
            Parameter::Uint(value) => Some(*value),
            Parameter::Bool(_) | Parameter::Float(_) | Parameter::String(_) => None,
        }
    }
}

impl InferCall {
    /// Puts a decoded message together and reads the parameters that have a meaning here.
    pub(super) fn new(
        id: String,
        parameters: Parameters,
        inputs: Vec<Tensor>,
        outputs: Vec<(Arc<str>, Parameters)>,
    ) -> Result<Self, Error> {
        for name in ["sequence_id", "sequence_start", "sequence_end"] {
            if parameters.get(name).is_some_and(Parameter::is_set) {
                return Err(Error::new(
                    Code::Unimplemented,
                    format!("sequence batching is not supported, and the request has the parameter '{name}'"),
                ));
            }
        }
        let timeout = unsigned(&parameters, "timeout", "a whole number of microseconds, 0 for none")?;
        let timeout = (timeout > 0).then(|| Duration::from_micros(timeout));
        let priority = unsigned(&parameters, "priority", "a whole number, 1 for the most urgent, 0 for the default")?;
        refuse_reserved(&parameters)?;
        let binary_output = flag(&parameters, "binary_data_output", "the request")?.unwrap_or(false);
        let outputs = requested(outputs)?;
        Ok(Self { id, timeout, priority, parameters, inputs, placed: Vec::new(), outputs, binary_output })
    }

    /// Whether an output goes back as binary data.
    pub(super) fn wants_binary(&self, output: &str) -> bool {
        let requested = self.outputs.iter().find(|requested| *requested.name == *output);
        requested.and_then(|requested| requested.binary).unwrap_or(self.binary_output)
    }
}

/// Names that the protocol keeps for itself must not pass for the caller's own.
fn refuse_reserved(parameters: &Parameters) -> Result<(), Error> {
    if parameters.contains_key("headers") {
        return Err(Error::new(
            Code::Unimplemented,
            "the parameter 'headers' is reserved for headers that are handed on to models, which is not supported",
        ));
    }
    // Every answer of a stream says that it is the final one, whether the request asks for that or not.
    flag(parameters, FINAL_RESPONSE, "the request")?;
    match parameters.keys().find(|name| name.starts_with("triton_") && *name != FINAL_RESPONSE) {
        None => Ok(()),
        Some(name) => Err(Error::invalid(format!(
            "parameter '{}': names that begin with 'triton_' are reserved, and only '{FINAL_RESPONSE}' is known",
            shorten(name)
        ))),
    }
}

/// Reads the parameters of the requested outputs, each of which may be named once.
fn requested(outputs: Vec<(Arc<str>, Parameters)>) -> Result<Vec<RequestedOutput>, Error> {
    if outputs.is_empty() {
        return Ok(Vec::new());
    }
    let mut seen = HashSet::with_capacity(outputs.len());
    outputs
        .into_iter()
        .map(|(name, parameters)| {
            let label = format!("output '{}'", shorten(&name));
            if !seen.insert(name.clone()) {
                return Err(Error::invalid(format!("{label} is requested twice")));
            }
            let placement = Placement::read(&label, &parameters)?;
            let classes = match parameters.get("classification") {
                None => None,
                Some(value) => Some(value.as_unsigned().ok_or_else(|| {
                    let wanted = "a whole number of classes, 0 for the values themselves";
                    Error::invalid(format!("{label}: parameter 'classification' must be {wanted}"))
                })?),
            };
            // More classes than memory can count are as good as all of them.
            let classes = classes.filter(|&count| count > 0).map(|count| usize::try_from(count).unwrap_or(usize::MAX));
            let binary = flag(&parameters, "binary_data", &label)?;
            Ok(RequestedOutput { name, parameters, binary, classes, placement })
        })
        .collect()
}

/// A number that is 0 when it is not given.
fn unsigned(parameters: &Parameters, name: &str, expected: &str) -> Result<u64, Error> {
    let value = parameters.get(name).map_or(Some(0), Parameter::as_unsigned);
    value.ok_or_else(|| Error::invalid(format!("parameter '{name}' must be {expected}")))
}

fn flag(parameters: &Parameters, name: &str, label: &str) -> Result<Option<bool>, Error> {
    match parameters.get(name) {
        None => Ok(None),
        Some(Parameter::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(Error::invalid(format!("{label}: parameter '{name}' must be true or false"))),
    }
}

/// Reads the type and the shape that a message declares for a tensor.
fn declared(label: &str, datatype: &str, shape: &[i64]) -> Result<(DType, Shape), Error> {
    let dtype = DType::parse(datatype).ok_or_else(|| {
        let names: Vec<_> = DType::ALL.into_iter().map(DType::name).collect();
        Error::invalid(format!("{label}: datatype '{}' must be one of {}", shorten(datatype), names.join(", ")))
    })?;
    if shape.len() > MAX_RANK {
        return Err(Error::invalid(format!("{label}: shape has {} dimensions, at most {MAX_RANK}", shape.len())));
    }
    let shape = shape.iter().map(|&size| usize::try_from(size)).collect::<Result<_, _>>().map_err(|_| {
        Error::invalid(format!("{label}: shape {shape:?} must give the actual size of every dimension, none negative"))
    })?;
    Ok((dtype, shape))
}
