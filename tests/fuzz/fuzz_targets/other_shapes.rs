//! The request shapes of other servers: generate, predict, invocations in JSON and in CSV.
//!
//! The first byte picks the shape, the second the model, the rest is the body.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate::{
    api::{
        codec::{Document, InferCall, InferReply, NonFinite},
        shapes::{generate, invocations, predict},
    },
    backend::{Signature, TensorSpec},
    error::{Code, Error},
    tensor::DType,
};
use tidegate_fuzz::{MAX_MESSAGE, allowance, check, within};

/// Bytes that the tensors of a call may take.
const LIMIT: usize = 1 << 20;

type Read = Result<(InferCall, Answer), Error>;

/// How the answer is written that goes with a request.
type Answer = Box<dyn Fn(&InferReply<'_>) -> Result<Vec<u8>, Error>>;

fuzz_target!(|data: &[u8]| {
    let [shape, model, body @ ..] = data else { return };
    let signature = signature(*model);
    let body = Bytes::copy_from_slice(body);
    // Tensors may fill the limit, and take twice of it while they grow.
    let read = match within(2 * LIMIT + allowance(body.len()), || read(*shape, &body, &signature)) {
        Ok(read) => read,
        Err(error) => {
            assert!(error.code != Code::Internal, "{error}");
            assert!(error.message.len() <= MAX_MESSAGE, "a message of {} bytes", error.message.len());
            return;
        }
    };
    let (call, answer) = read;
    let held: usize = call.inputs.iter().map(|tensor| tensor.byte_len()).sum();
    assert!(held <= LIMIT * call.inputs.len().max(1), "tensors of {held} bytes");
    let reply = InferReply { model: "m", version: "1", id: &call.id, outputs: &call.inputs };
    if let Ok(json) = answer(&reply) {
        Document::parse(&json.into()).unwrap();
    }
    check(&Ok(call));
});

fn read(shape: u8, body: &Bytes, signature: &Signature) -> Read {
    let non_finite = NonFinite::Literal;
    let shape = shape % 4;
    if shape == 0 {
        let (call, orient) = invocations::read_csv(body, signature, LIMIT)?;
        return Ok((call, Box::new(move |reply| invocations::write(reply, orient, non_finite))));
    }
    let document = Document::parse(body)?;
    match shape {
        1 => {
            let call = generate::read(&document, signature, LIMIT)?;
            Ok((call, Box::new(move |reply| generate::write(reply, non_finite))))
        }
        2 => {
            let (call, format) = predict::read(&document, signature, LIMIT)?;
            Ok((call, Box::new(move |reply| predict::write(reply, format, non_finite))))
        }
        _ => {
            let (call, orient) = invocations::read_json(&document, signature, LIMIT)?;
            Ok((call, Box::new(move |reply| invocations::write(reply, orient, non_finite))))
        }
    }
}

/// A model of one or two inputs, `a` and `b`; of one of text, and of none.
fn signature(model: u8) -> Signature {
    let spec = |name: &str, dtype, shape: &[i64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
    let inputs = match model % 8 {
        0 => vec![spec("a", DType::Fp32, &[-1, 2])],
        1 => vec![spec("a", DType::Int32, &[-1]), spec("b", DType::Bytes, &[-1, 1])],
        2 => vec![spec("a", DType::Bytes, &[-1])],
        3 => vec![spec("a", DType::Fp16, &[-1, -1, 2]), spec("b", DType::Bf16, &[])],
        4 => vec![spec("a", DType::Uint64, &[2, 2]), spec("b", DType::Fp64, &[-1, 1, 1])],
        5 => vec![spec("a", DType::Bool, &[-1]), spec("b", DType::Int8, &[-1, -1])],
        6 => vec![spec("a", DType::Int64, &[-1, 0]), spec("b", DType::Uint8, &[-1, i64::MAX])],
        _ => vec![],
    };
    Signature { inputs, outputs: vec![spec("y", DType::Bytes, &[-1])], ..Signature::default() }
}
