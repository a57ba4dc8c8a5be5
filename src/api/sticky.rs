//! The key of a request that stands in its body: the same bytes whichever protocol brought it.

use std::borrow::Cow;

use super::codec::{InferCall, Parameter};
use crate::{rollout::route::Sticky, tensor::Data};

/// The bytes that a request is drawn by, when its body has them: a parameter as text, a tensor's elements as they lie
/// in memory (little-endian), texts each with its length (4 bytes, little-endian) before it; a single text as it is.
pub(super) fn key<'a>(call: &'a InferCall, sticky: &Sticky) -> Option<Cow<'a, [u8]>> {
    match sticky {
        Sticky::Header(_) => None,
        Sticky::Parameter(name) => call.parameters.get(&**name).map(|parameter| match parameter {
            Parameter::String(text) => Cow::Borrowed(text.as_bytes()),
            Parameter::Bool(value) => Cow::Owned(value.to_string().into_bytes()),
            Parameter::Int(value) => Cow::Owned(value.to_string().into_bytes()),
            Parameter::Uint(value) => Cow::Owned(value.to_string().into_bytes()),
            Parameter::Float(value) => Cow::Owned(value.to_string().into_bytes()),
        }),
        Sticky::Input(name) => {
            let input = call.inputs.iter().find(|input| input.name == *name)?;
            Some(match &input.data {
                Data::Plain(bytes) => Cow::Borrowed(bytes),
                Data::Strings(texts) => match &texts[..] {
                    [text] => Cow::Borrowed(text),
                    texts => {
                        let prefixed = |text: &bytes::Bytes| [&(text.len() as u32).to_le_bytes()[..], text].concat();
                        Cow::Owned(texts.iter().flat_map(prefixed).collect())
                    }
                },
            })
        }
    }
}
