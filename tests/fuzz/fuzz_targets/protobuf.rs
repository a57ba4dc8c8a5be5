//! A gRPC request, read in both ways.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use tidegate::{
    api::{
        codec::{Draft, InferCall, decode_proto},
        pb::ModelInferRequest,
    },
    backend::{Signature, TensorSpec},
    tensor::DType,
};
use tidegate_fuzz::{allowance, check, within};

/// What a message of `length` bytes may hold: an input of two bytes on the wire takes some hundreds in memory, and the
/// list of them grows by doubling. (The server also counts fields before it decodes.)
fn message_allowance(length: usize) -> usize {
    (1 << 20) + 1024 * length
}

/// The call of a usual request to a model that knows the names which it has.
fn read_in_place(message: &Bytes) -> Option<InferCall> {
    let draft = Draft::read(message)?;
    // The reader must not depend on what a signature says beside names.
    let names = ModelInferRequest::decode(message.clone()).expect("what is read in place is protobuf");
    let spec = |name: String| TensorSpec { name: name.into(), dtype: DType::Fp32, shape: Vec::new() };
    let signature = Signature {
        inputs: names.inputs.into_iter().map(|input| spec(input.name)).collect(),
        outputs: names.outputs.into_iter().map(|output| spec(output.name)).collect(),
        ..Signature::default()
    };
    draft.call(message, &signature)
}

fuzz_target!(|data: &[u8]| {
    let data = Bytes::copy_from_slice(data);
    let in_place = within(message_allowance(data.len()) + allowance(data.len()), || read_in_place(&data));
    let Ok(request) = within(message_allowance(data.len()), || ModelInferRequest::decode(data.clone())) else {
        assert_eq!(in_place, None, "it is no protobuf");
        return;
    };
    if let Some(call) = in_place {
        assert_eq!(Ok(call), decode_proto(request.clone()));
    }
    // Maps have no order, so that the bytes may differ while the message does not.
    let again = ModelInferRequest::decode(Bytes::from(request.encode_to_vec())).unwrap();
    assert_eq!(again.encoded_len(), request.encoded_len());
    let call = within(message_allowance(data.len()) + allowance(data.len()), || decode_proto(request));
    check(&call);
    assert_eq!(decode_proto(again).map(|call| call.inputs).ok(), call.map(|call| call.inputs).ok());
});
