//! What is read in place and written by hand is what the compiler's types read and write.

use proptest::{collection::vec, option, prelude::*, sample::select};
use prost::Message;

use super::{super::*, properties::tensors};
use crate::{
    api::pb::{
        InferParameter, InferTensorContents, ModelInferRequest,
        infer_parameter::ParameterChoice,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    backend::{Signature, TensorSpec},
    tensor::Data,
};
use bytes::Bytes;

fn signature() -> Signature {
    let spec = |name: &str| TensorSpec { name: name.into(), dtype: DType::Fp32, shape: vec![-1] };
    Signature {
        inputs: ["x", "t", "zwölf"].map(spec).to_vec(),
        outputs: ["y", "z"].map(spec).to_vec(),
        ..Signature::default()
    }
}

/// A request that sends tensors as clients do.
fn usual(tensors: &[Tensor], outputs: &[&str]) -> ModelInferRequest {
    let reply = encode_proto(&InferReply { model: "m", version: "1", id: "i", outputs: tensors }, &[]);
    let input = |output: crate::api::pb::model_infer_response::InferOutputTensor| InferInputTensor {
        name: output.name,
        datatype: output.datatype,
        shape: output.shape,
        ..Default::default()
    };
    let output = |name: &&str| InferRequestedOutputTensor { name: (*name).to_owned(), ..Default::default() };
    ModelInferRequest {
        model_name: reply.model_name,
        model_version: reply.model_version,
        id: reply.id,
        inputs: reply.outputs.into_iter().map(input).collect(),
        outputs: outputs.iter().map(output).collect(),
        raw_input_contents: reply.raw_output_contents,
        ..Default::default()
    }
}

/// Reads `message` in both ways and holds the one against the other; whether it could be read in place.
fn compare(message: &[u8]) -> bool {
    let message = Bytes::copy_from_slice(message);
    let Some(draft) = Draft::read(&message) else { return false };
    let full = ModelInferRequest::decode(message.clone()).expect("what is read in place is protobuf");
    assert_eq!((draft.model, draft.version, draft.id), (&*full.model_name, &*full.model_version, &*full.id));
    let Some(call) = draft.call(&message, &signature()) else { return false };
    assert_eq!(Ok(call), decode_proto(full));
    true
}

/// A float tensor of `x`.
fn floats(count: usize) -> Tensor {
    let data = Data::Plain((0..4 * count).map(|byte| byte as u8).collect());
    Tensor::new("x".into(), DType::Fp32, [count].as_slice().into(), data).unwrap()
}

#[test]
fn usual_requests_are_read_in_place() {
    let message = Bytes::from(usual(&[floats(3)], &["z", "y"]).encode_to_vec());
    assert!(compare(&message));
    let call = Draft::read(&message).unwrap().call(&message, &signature()).unwrap();
    let Data::Plain(bytes) = &call.inputs[0].data else { panic!() };
    assert_eq!(message.slice_ref(bytes).as_ptr(), bytes.as_ptr());
    assert!(compare(&usual(&[], &[]).encode_to_vec()));
    assert!(compare(&[]));
    // A shape one by one; and, as everywhere in protobuf, the last of two texts counts and lists go on.
    let one_by_one = [&[0x2a, 13, 0x0a, 1, b'q', 0x0a, 1, b'x', 0x18, 2, 0x12, 2][..], b"I8", &[0x3a, 0]].concat();
    assert!(Draft::read(&one_by_one).is_none(), "a length beyond its field");
    let twice = [usual(&[floats(1)], &["y"]).encode_to_vec(), usual(&[floats(2)], &["z"]).encode_to_vec()].concat();
    assert!(compare(&twice));
    let unpacked =
        [&[0x2a, 17, 0x0a, 1, b'q', 0x0a, 1, b'x', 0x18, 1, 0x12, 5][..], b"UINT8", &[0x18, 2, 0x3a, 2, 8, 9]].concat();
    assert!(compare(&unpacked));
}

#[test]
fn what_is_unusual_or_wrong_is_left_to_others() {
    let request = usual(&[floats(3)], &["y"]);
    let changed = |change: fn(&mut ModelInferRequest)| {
        let mut request = request.clone();
        change(&mut request);
        request.encode_to_vec()
    };
    let parameter = || InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(1)) };
    for (index, message) in [
        changed(|request| request.inputs[0].shape = vec![4]),
        changed(|request| request.inputs[0].shape = vec![-3]),
        changed(|request| request.inputs[0].shape = vec![1; MAX_RANK + 1]),
        changed(|request| request.inputs[0].name = "w".into()),
        changed(|request| request.inputs[0].datatype = "FP33".into()),
        changed(|request| request.inputs[0].contents = Some(InferTensorContents::default())),
        changed(|request| request.outputs[0].name = "w".into()),
        changed(|request| request.outputs.push(request.outputs[0].clone())),
        changed(|request| request.raw_input_contents.clear()),
        changed(|request| request.raw_input_contents.push(Bytes::new())),
        changed(|request| request.inputs = vec![request.inputs[0].clone(); 500]),
        [request.encode_to_vec(), vec![0x98, 6, 1]].concat(),
        [request.encode_to_vec(), vec![0x0a, 1, 0xff]].concat(),
        [request.encode_to_vec(), vec![0x0a, 2, b'm']].concat(),
        [request.encode_to_vec(), vec![0x08, 1]].concat(),
        [request.encode_to_vec(), [&[0x0a][..], &[0xff; 9], &[2]].concat()].concat(),
    ]
    .iter()
    .enumerate()
    {
        assert!(!compare(message), "{index}");
    }
    for place in 0..3 {
        let mut request = request.clone();
        let parameters = match place {
            0 => &mut request.parameters,
            1 => &mut request.inputs[0].parameters,
            _ => &mut request.outputs[0].parameters,
        };
        parameters.insert("p".to_owned(), parameter());
        assert!(!compare(&request.encode_to_vec()));
    }
}

#[test]
fn the_beginning_tells_where_contents_start() {
    let message = usual(&[floats(50), floats(3)], &["y"]).encode_to_vec();
    let start = contents_start(&message[..message.len() / 2]).unwrap();
    assert_eq!(message[start..][..200], *(0..200).collect::<Vec<u8>>());
    assert_eq!(contents_start(&message[..start - 2]), None);
    assert_eq!(contents_start(&usual(&[], &["y"]).encode_to_vec()), None);
}

#[test]
fn large_outputs_are_not_copied() {
    let outputs = [floats(1), floats(5000), floats(2), floats(2000)];
    let reply = InferReply { model: "m", version: "1", id: "", outputs: &outputs };
    let pieces = write_reply(&reply).unwrap();
    assert_eq!(pieces.len(), 4);
    for (piece, output) in [(1, 1), (3, 3)] {
        let Data::Plain(bytes) = &outputs[output].data else { panic!() };
        assert_eq!(pieces[piece].as_ptr(), bytes.as_ptr());
    }
}

fn requests() -> impl Strategy<Value = ModelInferRequest> {
    let names = || select(vec!["x", "t", "zwölf", "w", ""]);
    let datatypes = select(vec!["FP32", "BYTES", "INT8", "BOOL", "", "fp32"]);
    let contents = vec(any::<u8>(), 0..9).prop_map(Bytes::from);
    let input =
        (names(), datatypes, vec(select(vec![0i64, 1, 2, 3, -1, i64::MAX]), 0..3), option::weighted(0.1, 0i32..3));
    let input = input.prop_map(|(name, datatype, shape, typed)| InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape,
        contents: typed
            .map(|value| InferTensorContents { int_contents: vec![value; value as usize], ..Default::default() }),
        ..Default::default()
    });
    let output = select(vec!["y", "z", "w", ""]);
    let output = output.prop_map(|name| InferRequestedOutputTensor { name: name.to_owned(), ..Default::default() });
    let texts = (select(vec!["", "m"]), select(vec!["", "1"]), any::<String>());
    (texts, vec(input, 0..3), vec(output, 0..3), vec(contents, 0..3)).prop_map(
        |((model, version, id), inputs, outputs, raw_input_contents)| ModelInferRequest {
            model_name: model.to_owned(),
            model_version: version.to_owned(),
            id,
            inputs,
            outputs,
            raw_input_contents,
            ..Default::default()
        },
    )
}

proptest! {
    #[test]
    fn both_ways_of_reading_agree(first in requests(), second in option::of(requests())) {
        let second = second.map(|request| request.encode_to_vec()).unwrap_or_default();
        compare(&[first.encode_to_vec(), second].concat());
    }

    #[test]
    fn both_ways_of_reading_agree_on_any_tensor(tensor in tensors(false)) {
        prop_assert!(compare(&usual(&[tensor], &[]).encode_to_vec()));
    }

    #[test]
    fn both_ways_of_reading_agree_on_what_is_broken(
        request in requests(),
        edits in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in option::of(any::<prop::sample::Index>()),
    ) {
        let mut message = request.encode_to_vec();
        prop_assume!(!message.is_empty());
        for (index, byte) in edits {
            let at = index.index(message.len());
            message[at] = byte;
        }
        message.truncate(cut.map_or(message.len(), |cut| cut.index(message.len())));
        compare(&message);
        contents_start(&message);
    }

    #[test]
    fn both_ways_of_writing_agree(outputs in vec(tensors(false), 0..4), id: String, large: bool) {
        let outputs: Vec<_> = outputs.into_iter().chain(large.then(|| floats(1500))).collect();
        let reply = InferReply { model: "m", version: "1", id: &id, outputs: &outputs };
        let message = encode_proto(&reply, &[]);
        let expected = message.encode_to_vec();
        let written = write_reply(&reply).unwrap().concat();
        prop_assert_eq!(&written[..5], [&[0][..], &(expected.len() as u32).to_be_bytes()].concat());
        prop_assert_eq!(&written[5..], expected);
        prop_assert_eq!(write_message(&message).unwrap().concat(), written);
    }
}
