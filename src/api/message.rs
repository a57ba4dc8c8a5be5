//! `MessageCodec`: protobuf messages for tonic, refused before they grow far beyond their size on the wire.
//!
//! An empty sub-message takes two bytes on the wire and more than a hundred in memory, so a message is first counted
//! and then decoded.

use std::marker::PhantomData;

use bytes::Buf;
use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder},
};
use tonic_prost::ProstEncoder;

use super::codec::varint;
use crate::error::Error;

/// Fields at the top level of a message: no model has so many inputs, outputs and parameters.
const MAX_FIELDS: usize = 16_384;

/// The codec of every method of the inference service.
pub(crate) struct MessageCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for MessageCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for MessageCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = MessageDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::default())
    }

    fn decoder(&mut self) -> Self::Decoder {
        MessageDecoder(PhantomData)
    }
}

pub(crate) struct MessageDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for MessageDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        Ok(decode(buffer).map(Some)?)
    }
}

/// Decodes a message that lies in one piece.
///
/// # Errors
/// `InvalidArgument` for more fields than any message of ours has, and for what is no protobuf.
pub(super) fn decode<U: Message + Default>(buffer: impl Buf) -> Result<U, Error> {
    if fields(buffer.chunk()) > MAX_FIELDS {
        return Err(Error::invalid(format!("the message has more than {MAX_FIELDS} fields")));
    }
    U::decode(buffer).map_err(|error| Error::invalid(format!("the message is no valid protobuf: {error}")))
}

/// The number of fields at the top level of a message; of a broken one, those before the break.
fn fields(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let Some(key) = varint(&mut bytes) {
        let skip = match key & 7 {
            0 => varint(&mut bytes).map(|_| 0),
            1 => Some(8),
            2 => varint(&mut bytes),
            5 => Some(4),
            _ => None,
        };
        let Some(rest) = skip.and_then(|skip| bytes.get(usize::try_from(skip).ok()?..)) else { break };
        bytes = rest;
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::api::pb;

    #[test]
    fn fields_are_counted_as_the_message_has_them() {
        let request = pb::ModelInferRequest {
            model_name: "m".to_owned(),
            inputs: vec![Default::default(); 300],
            raw_input_contents: vec![vec![7; 1000].into(); 2],
            ..Default::default()
        };
        assert_eq!(fields(&request.encode_to_vec()), 303);
        assert_eq!(fields(&[]), 0);
    }

    proptest! {
        #[test]
        fn broken_messages_are_counted_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(fields(&bytes) <= bytes.len());
        }
    }
}
