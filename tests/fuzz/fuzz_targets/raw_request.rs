//! A REST request that is nothing but the data of a model's only input.
//!
//! The first byte picks a type, the second the number of dimensions, which follow as one signed byte each; 127 stands
//! for a size beyond all memory. The rest is the body.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate::{
    api::codec::decode_raw,
    backend::{Signature, TensorSpec},
    tensor::{DType, Data},
};
use tidegate_fuzz::{allowance, check, within};

fuzz_target!(|data: &[u8]| {
    let [dtype, rank, rest @ ..] = data else { return };
    let dtype = DType::ALL[usize::from(*dtype) % DType::ALL.len()];
    let Some((dimensions, body)) = rest.split_at_checked(usize::from(*rank) % 6) else { return };
    let size = |&byte: &u8| if byte == 127 { i64::MAX } else { i64::from(byte as i8).max(-1) };
    let spec = TensorSpec { name: "x".into(), dtype, shape: dimensions.iter().map(size).collect() };
    let signature = Signature { inputs: vec![spec], ..Signature::default() };

    let body = Bytes::copy_from_slice(body);
    let call = within(allowance(body.len()), || decode_raw(&body, &signature));
    check(&call);
    let Ok(call) = call else { return };
    assert!(call.binary_output && call.outputs.is_empty() && call.inputs.len() == 1);
    match &call.inputs[0].data {
        Data::Plain(bytes) => assert_eq!(bytes.as_ptr_range(), body.as_ptr_range()),
        Data::Strings(strings) => assert_eq!(strings, std::slice::from_ref(&body)),
    }
    // What was made to fit the model does.
    signature.arrange("m", call.inputs).unwrap();
});
