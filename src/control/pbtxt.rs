//! Triton's model configuration: `config.pbtxt`, or the same as JSON, from and to a `ModelSpec`.

use std::sync::LazyLock;

use miette::Diagnostic;
use prost_reflect::{
    DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions,
    text_format::{FormatOptions, ParseError},
};
use serde_json::Value;

use super::spec::ModelSpec;
use crate::{
    backend::{OptimizationLevel, Options},
    error::{Error, abridge},
    id::ModelName,
};

mod colons;
mod read;
mod write;

/// The protocol's messages, `inference.ModelConfig` among them.
const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
const MODEL_CONFIG: &str = "inference.ModelConfig";

static DESCRIPTOR: LazyLock<Option<MessageDescriptor>> = LazyLock::new(|| {
    let pool = DescriptorPool::decode(DESCRIPTORS).ok()?;
    pool.get_message_by_name(MODEL_CONFIG)
});

/// Reads the text of the config.pbtxt of `model`.
///
/// # Errors
/// `InvalidArgument` with line and column where the text is not what it should be, or naming the field that asks for
/// what this server does not do.
pub fn from_text(text: &str, model: &ModelName) -> Result<ModelSpec, Error> {
    let spec = parse(text)?;
    spec.check_name(model).map(|()| spec).map_err(Error::invalid)
}

/// Reads the text of a config.pbtxt, whichever model it is for.
///
/// # Errors
/// As [`from_text`].
pub fn parse(text: &str) -> Result<ModelSpec, Error> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let corrected = colons::insert(text);
    let message = DynamicMessage::parse_text_format(descriptor()?, &corrected.text).map_err(|error| {
        let offset = corrected.original(offset(&error).unwrap_or(corrected.text.len()));
        let (line, column) = position(text, offset);
        Error::invalid(format!("line {line}, column {column}: {}", abridge(&error.to_string())))
    })?;
    spec_of(&message)
}

/// Reads a model configuration in protobuf's JSON, as clients send it with a load request.
///
/// # Errors
/// `InvalidArgument` naming the field, or the place in the JSON.
pub fn from_json(text: &str, model: &ModelName) -> Result<ModelSpec, Error> {
    let mut json = serde_json::Deserializer::from_str(text);
    let message = DynamicMessage::deserialize(descriptor()?, &mut json)
        .and_then(|message| json.end().map(|()| message))
        .map_err(|error| Error::invalid(format!("config: {}", abridge(&error.to_string()))))?;
    let spec = spec_of(&message)?;
    spec.check_name(model).map(|()| spec).map_err(Error::invalid)
}

/// The config.pbtxt that says what `spec` says, and the keys of the spec that it cannot say.
///
/// # Errors
/// `Internal` when the spec cannot be put in these words.
pub fn to_text(spec: &ModelSpec) -> Result<(String, Vec<&'static str>), Error> {
    let (fields, left_out) = write::fields(spec);
    let message = DynamicMessage::deserialize(descriptor()?, &fields)
        .map_err(|error| Error::internal(format!("cannot write config.pbtxt: {error}")))?;
    let text = message.to_text_format_with_options(&FormatOptions::new().pretty(true));
    Ok((format!("{}\n", text.trim_end()), left_out))
}

/// The backend's parameters that say what `options` say, as Triton names and writes them.
pub fn parameters(options: &Options) -> impl Iterator<Item = (String, String)> {
    write::parameters(options)
}

/// The number that stands for an optimization level.
pub fn graph_level(level: OptimizationLevel) -> i32 {
    write::level(level).unwrap_or(0)
}

/// The JSON of an encoded model configuration, every field by its name in the protocol, as Triton answers it.
///
/// # Errors
/// `Internal` for bytes that are no model configuration.
pub fn to_json(encoded: &[u8]) -> Result<Value, Error> {
    let message = DynamicMessage::decode(descriptor()?, encoded)
        .map_err(|error| Error::internal(format!("not a model configuration: {error}")))?;
    json(&message, false)
}

fn descriptor() -> Result<MessageDescriptor, Error> {
    DESCRIPTOR.clone().ok_or_else(|| Error::internal("the descriptor of the model configuration is broken"))
}

/// The spec that says what the message says; complaints may quote names of any length, and stay short all the same.
fn spec_of(message: &DynamicMessage) -> Result<ModelSpec, Error> {
    read::spec(&fields(message)?).map_err(|error| Error { message: abridge(&error.message), ..error })
}

/// The fields that are set, by their names in the protocol.
fn fields(message: &DynamicMessage) -> Result<Value, Error> {
    json(message, true)
}

fn json(message: &DynamicMessage, skip_defaults: bool) -> Result<Value, Error> {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false)
        .skip_default_fields(skip_defaults);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|error| Error::internal(format!("cannot read the model configuration: {error}")))
}

fn offset(error: &ParseError) -> Option<usize> {
    Some(error.labels()?.next()?.offset())
}

/// Line and column of a byte, both from 1; columns count characters.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests;
