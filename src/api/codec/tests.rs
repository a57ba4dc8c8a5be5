//! Messages and what they are read as, in tables: every sentence that a caller can get back is here.

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use super::*;
use crate::{
    api::pb::{
        InferParameter, InferTensorContents, ModelInferRequest,
        infer_parameter::ParameterChoice,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    tensor::Data,
};

mod placement;
mod properties;
mod wire;

fn decode(json: &str) -> Result<InferCall, Error> {
    decode_json(&Bytes::copy_from_slice(json.as_bytes()), None)
}

/// The only input of a request whose `inputs` holds `members`.
fn input(members: &str) -> Result<Tensor, Error> {
    decode(&format!(r#"{{"inputs":[{{"name":"x",{members}}}]}}"#)).map(|mut call| call.inputs.remove(0))
}

fn data(datatype: &str, count: usize, data: &str) -> Result<Data, Error> {
    input(&format!(r#""datatype":"{datatype}","shape":[{count}],"data":{data}"#)).map(|tensor| tensor.data)
}

fn plain<const N: usize>(elements: &[[u8; N]]) -> Data {
    Data::Plain(elements.concat().into())
}

fn with_tail(json: &str, tail: &[u8]) -> Result<InferCall, Error> {
    decode_json(&[json.as_bytes(), tail].concat().into(), Some(json.len()))
}

fn encode(tensor: Tensor, non_finite: NonFinite, binary_output: bool) -> Result<Encoded, Error> {
    let reply = InferReply { model: "m", version: "1", id: "", outputs: &[tensor] };
    encode_json(&reply, &JsonOptions { requested: &[], binary_output, non_finite })
}

/// The reply as one body, turned into the request that sends the same tensors.
fn echo(encoded: &Encoded) -> InferCall {
    let json = std::str::from_utf8(&encoded.json).unwrap().replacen("\"outputs\":", "\"inputs\":", 1);
    let tail = encoded.tensors.concat();
    decode_json(&[json.as_bytes(), &tail].concat().into(), encoded.header_length.map(|length| length - 1)).unwrap()
}

#[test]
fn a_request_is_read_whole() {
    let call = decode(
        r#" {"id":"a\"b","outputs":[{"name":"y","parameters":{"binary_data":false,"k":"v"}},{"name":"z"}],
        "parameters":{"timeout":1500,"priority":2,"big":18446744073709551615,"f":0.5,"binary_data_output":true},
        "later":{"nested":[1]},
        "inputs":[{"data":[[1,2],[3,4]],"name":"x","shape":[2,2],"datatype":"INT32","more":null}]} "#,
    )
    .unwrap();
    assert_eq!(call.id, "a\"b");
    assert_eq!((call.timeout, call.priority), (Some(Duration::from_micros(1500)), 2));
    assert!(call.binary_output);
    assert_eq!(call.parameters["priority"], Parameter::Int(2));
    assert_eq!(call.parameters["big"], Parameter::Uint(u64::MAX));
    assert_eq!(call.parameters["f"], Parameter::Float(0.5));
    assert_eq!(call.outputs[0].binary, Some(false));
    assert_eq!(call.outputs[0].parameters["k"], Parameter::String("v".into()));
    assert_eq!((&*call.outputs[1].name, call.outputs[1].binary), ("z", None));
    assert_eq!(&call.inputs[0].shape[..], [2, 2]);
    assert_eq!(call.inputs[0].data, plain(&[1i32, 2, 3, 4].map(i32::to_le_bytes)));

    let call = decode(r#"{"id":null,"parameters":null,"outputs":null,"inputs":[]}"#).unwrap();
    assert_eq!((call.id.as_str(), call.timeout, call.priority, call.outputs.len()), ("", None, 0, 0));
}

#[test]
fn elements_are_exact() {
    let read = |datatype: &str, text: &str| data(datatype, text.split(',').count(), text).unwrap();
    assert_eq!(read("BOOL", "[true,false,1,0]"), plain(&[[1], [0], [1], [0]]));
    assert_eq!(read("INT8", "[-128,127,-0,3.0,1e2]"), plain(&[-128i8, 127, 0, 3, 100].map(i8::to_le_bytes)));
    assert_eq!(read("UINT8", "[0,255,-0]"), plain(&[[0], [255], [0]]));
    assert_eq!(read("UINT64", "[18446744073709551615]"), plain(&[u64::MAX.to_le_bytes()]));
    let wide = [i64::MIN, i64::MAX, 9_007_199_254_740_993];
    let text = "[-9223372036854775808,9223372036854775807,9007199254740993]";
    assert_eq!(read("INT64", text), plain(&wide.map(i64::to_le_bytes)));
    let floats = [1f32, -0.0, 3.402_823_5e38, 1e-45, 0.1];
    assert_eq!(read("FP32", "[1,-0.0,3.4028235e38,1e-45,0.1]"), plain(&floats.map(f32::to_le_bytes)));
    let doubles = [0.1, 5e-324, f64::MAX, 123_456_789.123_456_79];
    assert_eq!(
        read("FP64", "[0.1,5e-324,1.7976931348623157e308,123456789.12345679]"),
        plain(&doubles.map(f64::to_le_bytes))
    );
    let strings = ["", "a]b", "ü\"\\\n", "[\\"].map(|text| Bytes::from_static(text.as_bytes()));
    let text = r#"["", "a]b" , "\u00fc\"\\\n","[\\"]"#;
    assert_eq!(data("BYTES", 4, text).unwrap(), Data::Strings(strings.to_vec()));
}

#[test]
fn strings_without_escapes_are_not_copied() {
    let body = Bytes::from_static(br#"{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["abc"]}]}"#);
    let Data::Strings(strings) = decode_json(&body, None).unwrap().inputs.remove(0).data else { panic!() };
    assert!(body.as_ptr_range().contains(&strings[0].as_ptr()));
}

#[test]
fn wrong_elements_are_named() {
    for (datatype, count, text, message) in [
        ("INT8", 2, "[1,300]", "input 'x': element 1 must be an integer from -128 to 127, got 300"),
        ("INT32", 1, "[1.5]", "element 0 must be an integer from -2147483648 to 2147483647, got 1.5"),
        ("UINT8", 1, "[-1]", "an integer from 0 to 255, got -1"),
        ("UINT64", 1, "[18446744073709551616]", "got 18446744073709551616"),
        ("INT64", 1, "[9223372036854775808.0]", "got 9223372036854775808.0"),
        ("INT8", 1, "[null]", "got null"),
        ("INT8", 1, "[\"1\"]", "got \"1\""),
        ("INT8", 1, "[NaN]", "got NaN"),
        ("BOOL", 1, "[2]", "must be true or false, got 2"),
        ("FP32", 1, "[1e39]", "must be a number that is not out of range for FP32, got 1e39"),
        ("FP64", 1, "[-1e400]", "out of range for FP64, got -1e400"),
        ("FP32", 1, "[\"NaN\"]", "got \"NaN\""),
        ("FP32", 1, "[true]", "got true"),
        ("FP32", 1, "[{\"a\":1}]", "got {\"a\":1}"),
        ("BYTES", 1, "[1]", "element 0 must be a string, got 1"),
        ("BYTES", 1, "[NaN]", "element 0 must be a string, got NaN"),
        ("BYTES", 1, r#"["\ud800"]"#, "whole Unicode characters"),
        ("FP16", 1, "[1]", "FP16 cannot be sent as JSON; send it as binary data"),
        ("BF16", 1, "[1]", "BF16 cannot be sent as JSON; send it as binary data"),
        ("FP8", 1, "[1]", "datatype 'FP8' must be one of BOOL, UINT8"),
        ("INT8", 2, "[1]", "its shape takes 2 elements, and 'data' has 1"),
        ("INT8", 2, "[1,2,3]", "its shape takes 2 elements, and 'data' has 3"),
        ("INT8", 1, "5", "'data' must be an array, got 5"),
        ("INT8", 3, "[[1,2],[3]]", "rows of 2 and of 1 entries"),
        ("INT8", 1, "[[],[1]]", "rows of 0 and of 1 entries"),
        ("INT8", 2, "[1,[2]]", "mixes arrays and elements at element 1"),
        ("INT8", 2, "[[2],1]", "mixes arrays and elements at element 1"),
        ("INT8", 1, "[[[]],[1]]", "mixes arrays and elements at element 0"),
        ("INT8", 1, "[1,]", "line 1 column"),
    ] {
        let error = data(datatype, count, text).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains(message), "{text}: {}", error.message);
    }
}

#[test]
fn nesting_is_free_and_bounded() {
    for text in ["[1,2,3,4]", "[[1,2],[3,4]]", "[[[[1]]],[[[2]]],[[[3]]],[[[4]]]]", "[ [ 1 , 2 ,3, 4\n]\t]"] {
        assert_eq!(data("INT8", 4, text).unwrap(), plain(&[[1], [2], [3], [4]]), "{text}");
    }
    for text in ["[]", "[[],[]]"] {
        assert_eq!(data("INT8", 0, text).unwrap(), plain::<1>(&[]));
    }
    let deep = |depth| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
    assert!(data("INT8", 1, &deep(64)).is_ok());
    assert!(data("INT8", 1, &deep(65)).unwrap_err().message.contains("nested deeper than 64 levels"));
    assert!(data("INT8", 1, &deep(1_000_000)).unwrap_err().message.contains("nested deeper"));
    for place in ["id", "parameters", "inputs", "outputs", "other"] {
        for text in [deep(1_000_000), "[".repeat(1_000_000), "{\"a\":".repeat(1_000_000)] {
            assert!(decode(&format!(r#"{{"{place}":{text},"#)).is_err());
        }
    }
}

#[test]
fn literals_are_numbers_and_nothing_else() {
    let read = data("FP32", 4, "[NaN,-Infinity,Infinity,1]").unwrap();
    assert_eq!(read, plain(&[f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 1.0].map(f32::to_le_bytes)));
    let call = decode(
        r#"{"id":"NaN","inputs":[{"name":"Infinity","datatype":"FP64","shape":[1],"data":[[-Infinity]]},
        {"name":"s","datatype":"BYTES","shape":[2],"data":["NaN","\"-Infinity"]}]}"#,
    )
    .unwrap();
    assert_eq!((call.id.as_str(), &*call.inputs[0].name), ("NaN", "Infinity"));
    assert_eq!(call.inputs[0].data, plain(&[f64::NEG_INFINITY.to_le_bytes()]));
    assert_eq!(call.inputs[1].data, Data::Strings(vec!["NaN".into(), "\"-Infinity".into()]));
    for broken in ["[NaNa]", "[Infinit]", "[--Infinity]", "[NaN"] {
        assert!(data("FP32", 1, broken).is_err(), "{broken}");
    }
    assert!(decode(r#"{"id":NaN,"inputs":[]}"#).unwrap_err().message.contains("id must be a string"));
    assert!(decode(r#"{"parameters":{"a":NaN},"inputs":[]}"#).is_err());
    assert!(input(r#""datatype":"FP32","shape":[NaN],"data":[1]"#).is_err());
}

#[test]
fn broken_messages_say_where() {
    let whole = r#""name":"x","datatype":"INT8","shape":[1],"data":[1]"#;
    for (json, message) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{\"inputs\":\n[}", "line 2 column 2"),
        ("[]", "expected the request to be an object at line 1"),
        (&format!(r#"{{"inputs":[{}{{}}]}}"#, "{},".repeat(4096)), "inputs has more than 4096 entries"),
        ("{} x", "trailing characters at line 1 column 4"),
        ("{}", "the request has no 'inputs'"),
        ("{\"id\":\"a\r\",\"inputs\":[]}", "control character"),
        (r#"{"id":5,"inputs":[]}"#, "id must be a string, got 5"),
        (r#"{"id":"a","id":"b"}"#, "duplicate field `id`"),
        (r#"{"inputs":5}"#, "expected inputs to be an array of objects"),
        (r#"{"inputs":[5]}"#, "expected inputs[0] to be an object"),
        (r#"{"inputs":[["x"]]}"#, "expected inputs[0] to be an object"),
        (r#"{"inputs":[],"outputs":[{"name":"y"},{}]}"#, "outputs[1] has no 'name'"),
        (r#"{"inputs":[],"outputs":[{"name":"y"},{"name":"y"}]}"#, "output 'y' is requested twice"),
        (r#"{"inputs":[{}]}"#, "inputs[0] has no 'name'"),
        (r#"{"inputs":[{"name":"x"}]}"#, "inputs[0] has no 'datatype'"),
        (r#"{"inputs":[{"name":"x","datatype":"INT8"}]}"#, "inputs[0] has no 'shape'"),
        (r#"{"inputs":[{"name":"x","datatype":"INT8","shape":[0]}]}"#, "neither 'data' nor"),
        (r#"{"inputs":[{"name":"x","name":"x"}]}"#, "inputs[0] has 'name' twice"),
        (r#"{"inputs":[{"name":1}]}"#, "must"),
        (r#"{"inputs":[{"name":"x","datatype":8}]}"#, "inputs[0].datatype must be a string, got 8"),
        (r#"{"inputs":[],"parameters":[]}"#, "parameters: invalid type: sequence, expected an object"),
        (r#"{"inputs":[],"parameters":{"a":null}}"#, "parameters: 'a': invalid type: null, expected a string"),
        (r#"{"inputs":[],"parameters":{"a":[1]}}"#, "parameters: 'a': invalid type: sequence"),
        (r#"{"inputs":[],"parameters":{"a":{}}}"#, "parameters: 'a': invalid type: map"),
        (r#"{"inputs":[],"parameters":{"a":1,"a":1}}"#, "parameters: 'a' is given twice"),
        (r#"{"inputs":[],"parameters":{"timeout":-1}}"#, "'timeout' must be a whole number"),
        (r#"{"inputs":[],"parameters":{"timeout":"1"}}"#, "'timeout' must be a whole number"),
        (r#"{"inputs":[],"parameters":{"priority":-1}}"#, "'priority' must be a whole number"),
        (r#"{"inputs":[],"parameters":{"priority":1.5}}"#, "'priority' must be a whole number"),
        (r#"{"inputs":[],"parameters":{"priority":true}}"#, "'priority' must be a whole number"),
        (r#"{"inputs":[],"parameters":{"binary_data_output":1}}"#, "'binary_data_output' must be true or false"),
        (r#"{"inputs":[],"outputs":[{"name":"y","parameters":{"binary_data":1}}]}"#, "output 'y': parameter 'bin"),
    ] {
        let json = json.replace(r#"{"name":1}"#, &format!("{{{}}}", whole.replace("\"x\"", "1")));
        let error = decode(&json).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains(message), "{json}: {}", error.message);
    }
    for (shape, message) in [
        ("[-1]", "input 'x': shape [-1] must give the actual size of every dimension"),
        ("[1.5]", "inputs[0].shape must be an array of integers, got [1.5]"),
        ("2", "inputs[0].shape must be an array of integers, got 2"),
        ("[9223372036854775808]", "must be an array of integers"),
        ("[9223372036854775807,4]", "its shape takes 18446744073709551615 elements"),
        ("[2000000000,4]", "its shape takes 8000000000 elements"),
        (&format!("{:?}", [1; 65]), "shape has 65 dimensions, at most 64"),
    ] {
        let error = input(&format!(r#""datatype":"INT64","shape":{shape},"data":[1]"#)).unwrap_err().message;
        assert!(error.contains(message), "{shape}: {error}");
    }
    assert!(decode_json(&Bytes::from_static(b"{\"id\":\"\xff\"}"), None).is_err());
    assert!(decode_json(&Bytes::from_static(b"{}"), Some(3)).unwrap_err().message.contains("range (0, 2)"));
}

#[test]
fn features_that_are_not_here_are_refused() {
    let with = |place: &str, parameters: &str| {
        let at = |wanted| if place == wanted { format!(r#","parameters":{parameters}"#) } else { String::new() };
        decode(&format!(
            r#"{{"inputs":[{{"name":"x","datatype":"INT8","shape":[1],"data":[1]}}],"outputs":[{{"name":"y"{}}}]{}}}"#,
            at("output"),
            at("request"),
        ))
    };
    for (place, parameters, message) in [
        ("request", r#"{"sequence_id":7}"#, "sequence batching is not supported"),
        ("request", r#"{"sequence_id":"s"}"#, "'sequence_id'"),
        ("request", r#"{"sequence_start":true}"#, "'sequence_start'"),
        ("request", r#"{"headers":"a: b"}"#, "'headers' is reserved"),
    ] {
        let error = with(place, parameters).unwrap_err();
        assert_eq!(error.code, Code::Unimplemented, "{parameters}");
        assert!(error.message.contains(message), "{}", error.message);
    }
    for parameters in [
        r#"{"sequence_id":0,"sequence_start":false,"sequence_end":false}"#,
        r#"{"sequence_id":"","timeout":0,"priority":1}"#,
    ] {
        assert_eq!(with("request", parameters).unwrap().timeout, None);
    }
    for (count, classes) in [("0", None), ("3", Some(3)), ("18446744073709551615", Some(usize::MAX))] {
        let call = with("output", &format!(r#"{{"classification":{count}}}"#)).unwrap();
        assert_eq!(call.outputs[0].classes, classes);
    }
    for count in ["-1", "1.5", "2.0", r#""3""#, "true"] {
        let error = with("output", &format!(r#"{{"classification":{count}}}"#)).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains("output 'y': parameter 'classification' must be a whole number"), "{error}");
    }
    assert!(with("request", r#"{"triton_enable_empty_final_response":true}"#).is_ok());
    for parameters in [r#"{"triton_enable_empty_final_response":1}"#, r#"{"triton_other":true}"#] {
        assert_eq!(with("request", parameters).unwrap_err().code, Code::InvalidArgument, "{parameters}");
    }
}

#[test]
fn binary_tensors_follow_the_json() {
    let json = r#"{"inputs":[
        {"name":"a","datatype":"FP16","shape":[2],"parameters":{"binary_data_size":4}},
        {"name":"j","datatype":"INT8","shape":[1],"data":[9]},
        {"name":"e","datatype":"FP32","shape":[0],"parameters":{"binary_data_size":0}},
        {"name":"s","datatype":"BYTES","shape":[2],"parameters":{"binary_data_size":10}}]}"#;
    let body = Bytes::from([json.as_bytes(), b"\x01\x02\x03\x04\x02\0\0\0hi\0\0\0\0"].concat());
    let call = decode_json(&body, Some(json.len())).unwrap();
    let Data::Plain(first) = &call.inputs[0].data else { panic!() };
    assert_eq!(first.as_ptr(), body[json.len()..].as_ptr(), "copied");
    assert_eq!(call.inputs[1].data, plain(&[[9]]));
    assert_eq!(call.inputs[3].data, Data::Strings(vec!["hi".into(), Bytes::new()]));

    let input =
        |parameters: &str| format!(r#"{{"inputs":[{{"name":"x","datatype":"INT16","shape":[2],{parameters}}}]}}"#);
    let sized = |size: &str| input(&format!(r#""parameters":{{"binary_data_size":{size}}}"#));
    assert!(with_tail(&sized("4"), &[0; 4]).is_ok());
    for (json, tail, message) in [
        (sized("4"), 3, "input 'x': 'binary_data_size' is 4 bytes where 3 are left in the body"),
        (sized("4"), 5, "has 1 bytes of binary data more than"),
        (sized("2"), 2, "takes 4 bytes, got 2"),
        (sized("-4"), 4, "'binary_data_size' must be a whole number of bytes"),
        (sized("4.0"), 4, "'binary_data_size' must be a whole number of bytes"),
        (sized("18446744073709551615"), 4, "18446744073709551615 bytes where 4 are left"),
        (input(r#""data":[1,2],"parameters":{"binary_data_size":4}"#), 4, "has both"),
        (input(r#""data":[1,2]"#), 4, "has 4 bytes of binary data more than"),
    ] {
        let error = with_tail(&json, &vec![0; tail]).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains(message), "{}", error.message);
    }
    let message = decode(&sized("4")).unwrap_err().message;
    assert!(message.ends_with("Inference-Header-Content-Length is missing"), "{message}");
}

#[test]
fn replies_are_written_exactly() {
    let tensor =
        |name: &str, dtype, shape: &[usize], data| Tensor::new(name.into(), dtype, shape.into(), data).unwrap();
    let outputs = [
        tensor("f", DType::Fp32, &[1, 3], plain(&[0.1f32, 1.0, -2.5e-10].map(f32::to_le_bytes))),
        tensor("h", DType::Fp16, &[2], plain(&[[1, 2], [3, 4]])),
        tensor("s", DType::Bytes, &[2], Data::Strings(vec!["a\"".into(), "ü".into()])),
        tensor("b", DType::Bool, &[2], plain(&[[0], [1]])),
        tensor("e", DType::Int64, &[0], plain::<8>(&[])),
    ];
    let reply = InferReply { model: "m", version: "7", id: "i", outputs: &outputs };
    let wants = |name: &str, binary| RequestedOutput {
        name: name.into(),
        parameters: Parameters::new(),
        binary,
        classes: None,
        placement: None,
    };
    let requested = [wants("h", Some(true)), wants("f", None)];
    let options = JsonOptions { requested: &requested, binary_output: false, non_finite: NonFinite::Literal };
    let encoded = encode_json(&reply, &options).unwrap();
    let expected = concat!(
        r#"{"model_name":"m","model_version":"7","id":"i","outputs":["#,
        r#"{"name":"f","datatype":"FP32","shape":[1,3],"data":[0.1,1.0,-2.5e-10]},"#,
        r#"{"name":"h","datatype":"FP16","shape":[2],"parameters":{"binary_data_size":4}},"#,
        r#"{"name":"s","datatype":"BYTES","shape":[2],"data":["a\"","ü"]},"#,
        r#"{"name":"b","datatype":"BOOL","shape":[2],"data":[false,true]},"#,
        r#"{"name":"e","datatype":"INT64","shape":[0],"data":[]}]}"#,
    );
    assert_eq!(encoded.json, expected);
    assert_eq!(encoded.header_length, Some(expected.len()));
    assert_eq!(encoded.tensors, [Bytes::from_static(&[1, 2, 3, 4])]);

    let requested = [wants("f", Some(false))];
    let encoded = encode_json(&reply, &JsonOptions { requested: &requested, binary_output: true, ..options }).unwrap();
    assert_eq!(encoded.tensors.len(), 4);
    assert_eq!(encoded.tensors[1], &b"\x02\0\0\0a\"\x02\0\0\0\xc3\xbc"[..]);
    let plain_reply = encode_json(&InferReply { outputs: &outputs[..1], ..reply }, &options).unwrap();
    assert_eq!(plain_reply.header_length, None);
}

#[test]
fn what_json_cannot_carry_is_refused_or_replaced() {
    let floats = |values: [f64; 3]| {
        Tensor::new("y".into(), DType::Fp64, [3].as_slice().into(), plain(&values.map(f64::to_le_bytes))).unwrap()
    };
    let odd = floats([f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
    let json = |policy| String::from_utf8(encode(odd.clone(), policy, false).unwrap().json.to_vec()).unwrap();
    assert!(json(NonFinite::Literal).contains("[NaN,Infinity,-Infinity]"));
    assert!(json(NonFinite::Null).contains("[null,null,null]"));
    let error = encode(odd, NonFinite::Error, false).unwrap_err();
    assert_eq!(error.message, "output 'y': element 0 is NaN, which JSON cannot carry; request it as binary data");
    assert!(encode(floats([1.0; 3]), NonFinite::Error, false).is_ok());

    let one = |dtype, data| Tensor::new("y".into(), dtype, [1].as_slice().into(), data).unwrap();
    for tensor in [
        one(DType::Fp16, plain(&[[0, 0]])),
        one(DType::Bf16, plain(&[[0, 0]])),
        one(DType::Bytes, Data::Strings(vec![Bytes::from_static(b"\xff")])),
    ] {
        let error = encode(tensor.clone(), NonFinite::Literal, false).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains("request it as binary data"), "{}", error.message);
        assert!(encode(tensor, NonFinite::Literal, true).is_ok());
    }
    assert_eq!(serde_json::to_value(NonFinite::default()).unwrap(), json!("literal"));
}

#[test]
fn complaints_stay_short() {
    // gRPC sends them in a header, and clients take only so much of those.
    let long = "n".repeat(100_000);
    let named = InferInputTensor { name: long.clone(), datatype: "INT8".into(), shape: vec![2], ..Default::default() };
    let proto = ModelInferRequest {
        inputs: vec![named],
        raw_input_contents: vec![Bytes::from_static(b"1")],
        ..Default::default()
    };
    for error in [
        decode(&format!(r#"{{"inputs":[{{"name":"{long}","datatype":"INT8","shape":[2],"data":[1]}}]}}"#)),
        decode(&format!(r#"{{"inputs":[{{"name":"{long}","datatype":"{long}","shape":[2],"data":[1]}}]}}"#)),
        decode(&format!(r#"{{"inputs":"{long}"}}"#)),
        decode(&format!(r#"{{"inputs":[],"parameters":"{long}"}}"#)),
        decode(&format!(r#"{{"inputs":[],"parameters":{{"{long}":[]}}}}"#)),
        decode(&format!(r#"{{"inputs":[{{"name":"{long}","name":0}}]}}"#)),
        decode_proto(proto),
    ]
    .map(Result::unwrap_err)
    {
        assert!(error.message.len() < 600, "{}", error.message);
    }
}

fn request(
    datatype: &str,
    shape: &[i64],
    contents: Option<InferTensorContents>,
    raw: &[&'static [u8]],
) -> ModelInferRequest {
    let input = InferInputTensor {
        name: "x".into(),
        datatype: datatype.into(),
        shape: shape.to_vec(),
        contents,
        ..Default::default()
    };
    let raw_input_contents = raw.iter().map(|bytes| Bytes::from_static(bytes)).collect();
    ModelInferRequest { id: "i".into(), inputs: vec![input], raw_input_contents, ..Default::default() }
}

#[test]
fn typed_contents_have_one_field_each() {
    let int = |values: &[i32]| InferTensorContents { int_contents: values.to_vec(), ..Default::default() };
    let uint = |values: &[u32]| InferTensorContents { uint_contents: values.to_vec(), ..Default::default() };
    let read = |datatype: &str, count, contents| {
        decode_proto(request(datatype, &[count], Some(contents), &[])).map(|mut call| call.inputs.remove(0).data)
    };
    assert_eq!(read("INT8", 2, int(&[-128, 127])).unwrap(), plain(&[[128], [127]]));
    assert_eq!(read("INT16", 1, int(&[-2])).unwrap(), plain(&[(-2i16).to_le_bytes()]));
    assert_eq!(read("INT32", 1, int(&[i32::MIN])).unwrap(), plain(&[i32::MIN.to_le_bytes()]));
    assert_eq!(read("UINT16", 1, uint(&[65535])).unwrap(), plain(&[[255, 255]]));
    let bools = InferTensorContents { bool_contents: vec![true, false], ..Default::default() };
    assert_eq!(read("BOOL", 2, bools).unwrap(), plain(&[[1], [0]]));
    let strings = InferTensorContents { bytes_contents: vec!["a".into()], ..Default::default() };
    assert_eq!(read("BYTES", 1, strings).unwrap(), Data::Strings(vec!["a".into()]));
    for (datatype, count, contents, message) in [
        ("INT8", 2, int(&[0, 128]), "input 'x': element 1 is 128, out of range for INT8"),
        ("UINT16", 1, uint(&[65536]), "element 0 is 65536, out of range for UINT16"),
        ("UINT8", 1, int(&[1]), "UINT8 must be sent in uint_contents, not in int_contents"),
        ("FP16", 1, uint(&[1]), "FP16 must be sent in raw_input_contents"),
        ("INT32", 2, int(&[1]), "takes 8 bytes, got 4"),
        ("INT32", -1, int(&[1]), "none negative"),
        ("", 1, int(&[1]), "datatype '' must be one of"),
        ("INT32", 1, int(&[]), "neither contents nor an entry in raw_input_contents"),
    ] {
        let error = read(datatype, count, contents).unwrap_err();
        assert!(error.message.contains(message), "{}", error.message);
    }
    assert_eq!(read("FP16", 0, int(&[])).unwrap(), plain::<1>(&[]));
    assert_eq!(read("BYTES", 0, int(&[])).unwrap(), Data::Strings(vec![]));
}

#[test]
fn raw_contents_stand_alone_and_are_not_copied() {
    let bytes: &'static [u8] = &[1, 0, 2, 0];
    let call = decode_proto(request("INT16", &[2], Some(InferTensorContents::default()), &[bytes])).unwrap();
    let Data::Plain(read) = &call.inputs[0].data else { panic!() };
    assert_eq!((read.as_ptr(), call.id.as_str()), (bytes.as_ptr(), "i"));
    let both = InferTensorContents { int_contents: vec![1, 2], ..Default::default() };
    for (request, message) in [
        (request("INT16", &[2], Some(both), &[bytes]), "must not be given together with raw_input_contents"),
        (request("INT16", &[2], None, &[bytes, bytes]), "one entry for each of the 1 inputs, got 2"),
        (request("INT16", &[3], None, &[bytes]), "takes 6 bytes, got 4"),
        (request("BYTES", &[1], None, &[bytes]), "claims 131073 bytes where 0 are left"),
        (request("INT16", &[2], None, &[]), "neither contents nor"),
    ] {
        let error = decode_proto(request).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains(message), "{}", error.message);
    }
}

#[test]
fn proto_parameters_mean_the_same() {
    let parameter = |choice| InferParameter { parameter_choice: Some(choice) };
    let mut sent = request("INT8", &[1], None, &[&[1]]);
    sent.parameters.insert("timeout".into(), parameter(ParameterChoice::Int64Param(5)));
    sent.parameters.insert("priority".into(), parameter(ParameterChoice::Uint64Param(3)));
    sent.parameters.insert("text".into(), parameter(ParameterChoice::StringParam("t".into())));
    sent.outputs.push(InferRequestedOutputTensor { name: "y".into(), ..Default::default() });
    let call = decode_proto(sent.clone()).unwrap();
    assert_eq!((call.timeout, call.priority), (Some(Duration::from_micros(5)), 3));
    assert_eq!(&*call.outputs[0].name, "y");

    let mut twice = sent.clone();
    twice.outputs.push(twice.outputs[0].clone());
    assert!(decode_proto(twice).unwrap_err().message.contains("requested twice"));
    let mut empty = sent.clone();
    empty.parameters.insert("none".into(), InferParameter::default());
    assert!(decode_proto(empty).unwrap_err().message.contains("parameter 'none' has no value"));
    sent.parameters.insert("sequence_id".into(), parameter(ParameterChoice::Uint64Param(5)));
    assert_eq!(decode_proto(sent).unwrap_err().code, Code::Unimplemented);
}
