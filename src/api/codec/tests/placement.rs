//! Tensors in shared memory, as both protocols say it.

use super::*;
use crate::tensor::DType;

/// An input in shared memory, its offset not given, as JSON has it.
const PLACED: &str = r#"{"name":"p","datatype":"FP32","shape":[1,2],
    "parameters":{"shared_memory_region":"r","shared_memory_byte_size":8}}"#;

fn place(offset: u64, byte_size: u64) -> Placement {
    Placement { region: "r".to_owned(), offset, byte_size }
}

fn placed_input() -> PlacedInput {
    PlacedInput { name: "p".into(), dtype: DType::Fp32, shape: [1, 2].as_slice().into(), placement: place(0, 8) }
}

fn parameters(placement: &Placement) -> std::collections::HashMap<String, InferParameter> {
    let number = |number: u64| ParameterChoice::Int64Param(number.try_into().unwrap());
    [
        ("shared_memory_region", ParameterChoice::StringParam(placement.region.clone())),
        ("shared_memory_offset", number(placement.offset)),
        ("shared_memory_byte_size", number(placement.byte_size)),
    ]
    .map(|(name, choice)| (name.to_owned(), InferParameter { parameter_choice: Some(choice) }))
    .into()
}

#[test]
fn json_inputs_and_outputs_may_lie_elsewhere() {
    let json = format!(
        r#"{{"inputs":[{PLACED},{{"name":"x","datatype":"INT8","shape":[2],"parameters":{{"binary_data_size":2}}}}],
        "outputs":[{{"name":"y","parameters":
            {{"shared_memory_region":"r","shared_memory_byte_size":16,"shared_memory_offset":8}}}},{{"name":"z"}}]}}"#
    );
    let call = with_tail(&json, &[1, 2]).unwrap();
    assert_eq!(call.placed, [placed_input()]);
    assert_eq!((call.inputs.len(), &*call.inputs[0].name), (1, "x"));
    assert_eq!(call.outputs[0].placement, Some(place(8, 16)));
    assert_eq!(call.outputs[1].placement, None);
}

#[test]
fn proto_inputs_and_outputs_may_lie_elsewhere() {
    let mut sent = request("INT8", &[2], None, &[&[1, 2]]);
    let placed = InferInputTensor {
        name: "p".into(),
        datatype: "FP32".into(),
        shape: vec![1, 2],
        parameters: parameters(&place(0, 8)),
        ..Default::default()
    };
    // First, so that a count of the raw contents that includes it would give them to the wrong input.
    sent.inputs.insert(0, placed.clone());
    let output = |name: &str, parameters| InferRequestedOutputTensor { name: name.into(), parameters };
    sent.outputs = vec![output("y", parameters(&place(8, 16))), output("z", Default::default())];
    let call = decode_proto(sent.clone()).unwrap();
    assert_eq!(call.placed, [placed_input()]);
    assert_eq!(call.inputs[0].data, Data::Plain(Bytes::from_static(&[1, 2])));
    assert_eq!(call.outputs[0].placement, Some(place(8, 16)));
    assert_eq!(call.outputs[1].placement, None);

    sent.raw_input_contents.push(Bytes::from_static(&[0; 8]));
    let message = decode_proto(sent).unwrap_err().message;
    assert!(message.contains("1 inputs outside shared memory, got 2"), "{message}");
    let alone = ModelInferRequest { inputs: vec![placed], ..Default::default() };
    assert_eq!(decode_proto(alone).unwrap().placed.len(), 1);
}

#[test]
fn what_lies_elsewhere_is_not_sent_as_well() {
    let with = |more: &str| decode(&format!(r#"{{"inputs":[{}]}}"#, PLACED.replace(r#""shape""#, more)));
    let message = with(r#""data":[1,2],"shape""#).unwrap_err().message;
    assert_eq!(message, "input 'p' lies in shared memory and must not be sent as well");
    let sized = PLACED.replace(r#""parameters":{"#, r#""parameters":{"binary_data_size":8,"#);
    assert_eq!(with_tail(&format!(r#"{{"inputs":[{sized}]}}"#), &[0; 8]).unwrap_err().message, message);

    let mut sent = request("FP32", &[1, 2], None, &[]);
    sent.inputs[0].name = "p".into();
    sent.inputs[0].parameters = parameters(&place(0, 8));
    sent.inputs[0].contents = Some(InferTensorContents { fp32_contents: vec![1.0, 2.0], ..Default::default() });
    assert_eq!(decode_proto(sent).unwrap_err().message, message);
}

#[test]
fn replies_say_where_outputs_are_and_send_the_others() {
    let tensor = |name: &str, data| Tensor::new(name.into(), DType::Bytes, [1].as_slice().into(), data).unwrap();
    let outputs = ["y", "z"].map(|name| tensor(name, Data::Strings(vec![Bytes::from_static(b"tide")])));
    let reply = InferReply { model: "m", version: "1", id: "", outputs: &outputs };
    let requested = [RequestedOutput {
        name: "y".into(),
        parameters: Parameters::new(),
        binary: None,
        classes: None,
        placement: Some(place(8, 100)),
    }];

    let proto = encode_proto(&reply, &requested);
    // An entry for each, so that clients can count; and how much was written, not what there was room for.
    assert_eq!(proto.raw_output_contents, [Bytes::new(), Bytes::from_static(b"\x04\0\0\0tide")]);
    assert_eq!(proto.outputs[0].parameters, parameters(&place(8, 8)));
    assert!(proto.outputs[1].parameters.is_empty());

    for binary_output in [false, true] {
        let options = JsonOptions { requested: &requested, binary_output, non_finite: NonFinite::Literal };
        let encoded = encode_json(&reply, &options).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&encoded.json).unwrap();
        assert_eq!(
            json["outputs"][0],
            json!({
                "name": "y", "datatype": "BYTES", "shape": [1],
                "parameters": {
                    "shared_memory_region": "r", "shared_memory_offset": 8, "shared_memory_byte_size": 8,
                },
            })
        );
        assert_eq!(encoded.tensors.len(), usize::from(binary_output));
    }
}
