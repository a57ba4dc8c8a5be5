//! What the targets share: what must be true of everything that decodes, and of everything that does not.

use bytes::Bytes;
use prost::Message;
use tidegate::{
    api::{
        codec::{InferCall, InferReply, JsonOptions, NonFinite, decode_json, decode_proto, encode_json, encode_proto},
        pb::{ModelInferRequest, model_infer_request::InferInputTensor},
    },
    error::{Code, Error},
    tensor::{DType, Data, Tensor},
};

mod memory;

pub use memory::within;

/// Bytes of the longest message that an error may have: gRPC sends it in a header, of which clients take 8 KiB.
pub const MAX_MESSAGE: usize = 4096;

/// Inputs of the largest call that REST takes; gRPC takes more.
const MAX_REST_INPUTS: usize = 4096;

/// Memory that decoding `length` bytes of JSON or binary data may hold. A `BYTES` element or a parameter of a few bytes
/// takes some dozens, and a growing list up to thrice its size.
pub fn allowance(length: usize) -> usize {
    (1 << 20) + 64 * length
}

/// Holds a decoded message against what must be true of it.
///
/// # Panics
/// When something is not.
pub fn check(decoded: &Result<InferCall, Error>) {
    match decoded {
        Ok(call) => check_call(call),
        Err(error) => {
            assert!(matches!(error.code, Code::InvalidArgument | Code::Unimplemented), "{:?}", error.code);
            assert!(error.message.len() <= MAX_MESSAGE, "a message of {} bytes", error.message.len());
        }
    }
}

/// Every tensor holds what it promises, and comes through every encoding that can carry it.
fn check_call(call: &InferCall) {
    for (index, output) in call.outputs.iter().enumerate() {
        assert!(call.outputs[..index].iter().all(|other| other.name != output.name), "{} twice", output.name);
    }
    for placed in &call.placed {
        // Shared memory holds what anybody likes.
        for bytes in [&b""[..], b"\x01\0\0\0\x01", b"\0\0\0\0\x09\0\0\0"] {
            match placed.check_size().and_then(|()| placed.clone().filled(Bytes::from_static(bytes))) {
                Ok(tensor) => check_tensor(&tensor),
                Err(error) => check(&Err(error)),
            }
        }
    }
    call.inputs.iter().for_each(check_tensor);
    assert_eq!(decode_proto(proto_request(&call.inputs)).unwrap().inputs, call.inputs, "gRPC");
    if call.inputs.len() <= MAX_REST_INPUTS {
        assert_eq!(through_rest(&call.inputs, true).unwrap(), call.inputs, "REST binary");
        check_json(&call.inputs);
    }
}

fn check_tensor(tensor: &Tensor) {
    let again = Tensor::new(tensor.name.clone(), tensor.dtype, tensor.shape.clone(), tensor.data.clone());
    assert_eq!(again.as_ref(), Ok(tensor));
}

fn check_json(tensors: &[Tensor]) {
    let can_carry = |tensor: &Tensor| match &tensor.data {
        Data::Strings(strings) => strings.iter().all(|string| std::str::from_utf8(string).is_ok()),
        Data::Plain(_) => !matches!(tensor.dtype, DType::Fp16 | DType::Bf16),
    };
    match through_rest(tensors, false) {
        Err(error) => {
            assert_eq!(error.code, Code::InvalidArgument, "{error}");
            assert!(!tensors.iter().all(can_carry), "REST JSON: {error}");
        }
        Ok(read) => {
            assert_eq!(read.len(), tensors.len());
            for (read, tensor) in read.iter().zip(tensors) {
                assert_eq!((&read.name, read.dtype, &read.shape), (&tensor.name, tensor.dtype, &tensor.shape));
                assert!(same_elements(read, tensor), "REST JSON: {tensor:?} came back as {read:?}");
            }
        }
    }
}

/// Equal bits, or both not a number: JSON has one word for all of those.
fn same_elements(left: &Tensor, right: &Tensor) -> bool {
    let (Data::Plain(a), Data::Plain(b)) = (&left.data, &right.data) else { return left.data == right.data };
    let mut pairs = a.chunks(right.dtype.size().unwrap_or(1)).zip(b.chunks(right.dtype.size().unwrap_or(1)));
    let is_nan = |bytes: &[u8]| match right.dtype {
        DType::Fp32 => f32::from_le_bytes(bytes.try_into().unwrap()).is_nan(),
        DType::Fp64 => f64::from_le_bytes(bytes.try_into().unwrap()).is_nan(),
        _ => false,
    };
    a.len() == b.len() && pairs.all(|(a, b)| a == b || (is_nan(a) && is_nan(b)))
}

/// Sends the tensors as a REST reply does, and reads them as a request.
fn through_rest(tensors: &[Tensor], binary_output: bool) -> Result<Vec<Tensor>, Error> {
    let reply = InferReply { model: "m", version: "1", id: "", outputs: tensors };
    let options = JsonOptions { requested: &[], binary_output, non_finite: NonFinite::Literal };
    let encoded = encode_json(&reply, &options)?;
    let json = std::str::from_utf8(&encoded.json).unwrap().replacen(r#""outputs":"#, r#""inputs":"#, 1);
    let body = [json.as_bytes(), &encoded.tensors.concat()].concat();
    let call = decode_json(&body.into(), encoded.header_length.map(|_| json.len()));
    Ok(call.unwrap().inputs)
}

/// The request that sends the tensors as gRPC does, off the wire.
fn proto_request(tensors: &[Tensor]) -> ModelInferRequest {
    let reply = encode_proto(&InferReply { model: "m", version: "1", id: "", outputs: tensors }, &[]);
    let input = |(name, datatype, shape)| InferInputTensor { name, datatype, shape, ..Default::default() };
    let request = ModelInferRequest {
        inputs: reply.outputs.into_iter().map(|output| input((output.name, output.datatype, output.shape))).collect(),
        raw_input_contents: reply.raw_output_contents,
        ..Default::default()
    };
    ModelInferRequest::decode(Bytes::from(request.encode_to_vec())).unwrap()
}
