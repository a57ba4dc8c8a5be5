//! A gRPC request.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use tidegate::api::{codec::decode_proto, pb::ModelInferRequest};
use tidegate_fuzz::{allowance, check, within};

/// What a message of `length` bytes may hold: an input of two bytes on the wire takes some hundreds in memory, and the
/// list of them grows by doubling. (The server also counts fields before it decodes.)
fn message_allowance(length: usize) -> usize {
    (1 << 20) + 1024 * length
}

fuzz_target!(|data: &[u8]| {
    let data = Bytes::copy_from_slice(data);
    let Ok(request) = within(message_allowance(data.len()), || ModelInferRequest::decode(data.clone())) else {
        return;
    };
    // Maps have no order, so that the bytes may differ while the message does not.
    let again = ModelInferRequest::decode(Bytes::from(request.encode_to_vec())).unwrap();
    assert_eq!(again.encoded_len(), request.encoded_len());
    let call = within(message_allowance(data.len()) + allowance(data.len()), || decode_proto(request));
    check(&call);
    assert_eq!(decode_proto(again).map(|call| call.inputs).ok(), call.map(|call| call.inputs).ok());
});
