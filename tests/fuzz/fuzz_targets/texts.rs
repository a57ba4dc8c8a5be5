//! The requests for text models: OpenAI's embeddings, and embed and rerank of text-embeddings-inference.
//!
//! The first byte picks the shape, the second the model, the rest is the body.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate::{
    api::{
        codec::{Document, InferReply, NonFinite},
        shapes::{
            openai::Embeddings,
            tei::{Embed, Rerank},
            texts::Asked,
        },
    },
    backend::{Signature, TensorSpec},
    error::{Code, Error},
    tensor::{DType, Data, Tensor},
};
use tidegate_fuzz::{MAX_MESSAGE, allowance, within};

/// `limits.max_message_bytes`.
const LIMIT: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let [shape, model, body @ ..] = data else { return };
    let (signature, body) = (signature(*model), Bytes::copy_from_slice(body));
    match shape % 3 {
        0 => check::<Embeddings>(&body, &signature),
        1 => check::<Embed>(&body, &signature),
        _ => check::<Rerank>(&body, &signature),
    }
});

fn check<T: Asked>(body: &Bytes, signature: &Signature) {
    // Ids and their mask may take twice the limit each, and are bytes of a growing list before.
    let read: Result<_, Error> = within(8 * LIMIT + allowance(body.len()), || {
        let asked = T::read(&Document::parse(body)?, LIMIT)?;
        let tensors = if asked.rows() == 0 { Vec::new() } else { asked.tensors(signature, LIMIT)? };
        Ok((asked, tensors))
    });
    let (asked, tensors) = match read {
        Ok(read) => read,
        Err(error) => return check_error(&error, &[Code::InvalidArgument, Code::Unimplemented, Code::TooLarge]),
    };
    let rows = asked.rows();
    assert!(tensors.iter().all(|tensor| tensor.rows() == rows), "{tensors:?}");
    for width in [0, 1, 2] {
        let shape = if T::KIND.output() == "embedding" { vec![rows, width] } else { vec![rows] };
        let numbers = (0..shape.iter().product()).flat_map(|number| (number as f32 - 1.0).to_le_bytes()).collect();
        let output = Tensor::new(T::KIND.output().into(), DType::Fp32, shape[..].into(), Data::Plain(numbers));
        let reply = InferReply { model: "m", version: "1", id: "", outputs: &[output.unwrap()] };
        match asked.write(&reply, 1, NonFinite::Literal) {
            Ok(json) => drop(Document::parse(&json.into()).unwrap()),
            Err(error) => check_error(&error, &[Code::InvalidArgument, Code::Unimplemented]),
        }
    }
}

fn check_error(error: &Error, codes: &[Code]) {
    assert!(codes.contains(&error.code), "{:?}: {error}", error.code);
    assert!(error.message.len() <= MAX_MESSAGE, "a message of {} bytes", error.message.len());
}

/// A model that takes a mask with its ids, one that takes none, and one whose ids are short.
fn signature(model: u8) -> Signature {
    let spec = |name: &str, dtype, shape: &[i64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
    let ids = if model % 4 < 3 { DType::Int64 } else { DType::Int32 };
    let mut inputs = vec![spec("text", DType::Bytes, &[-1]), spec("input_ids", ids, &[-1, -1])];
    if !model.is_multiple_of(4) {
        inputs.push(spec("attention_mask", ids, &[-1, -1]));
    }
    let width = if model % 4 == 1 { 2 } else { -1 };
    Signature { inputs, outputs: vec![spec("embedding", DType::Fp32, &[-1, width])], ..Signature::default() }
}
