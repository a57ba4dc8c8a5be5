//! Every shape there and back, what each refuses and in which words, and that no body makes one panic.

use std::slice::from_ref;

use bytes::Bytes;
use half::{bf16, f16};
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

use super::{generate, invocations, invocations::Orient, predict, predict::Format};
use crate::{
    api::codec::{Document, InferCall, InferReply, NonFinite, Parameter},
    backend::{Pairs, Signature, TensorSpec},
    error::{Code, Error},
    tensor::{DType, Data, Tensor},
};

const LIMIT: usize = 1 << 20;

fn spec(name: &str, dtype: DType, shape: &[i64]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
}

fn signature(inputs: Vec<TensorSpec>, outputs: Vec<TensorSpec>) -> Signature {
    Signature { inputs, outputs, ..Signature::default() }
}

fn matrix() -> Signature {
    signature(vec![spec("x", DType::Fp32, &[-1, 2])], vec![])
}

fn pair() -> Signature {
    signature(vec![spec("a", DType::Int32, &[-1]), spec("b", DType::Bytes, &[-1, 1])], vec![])
}

fn language() -> Signature {
    let outputs = vec![spec("language", DType::Bytes, &[-1]), spec("score", DType::Fp32, &[-1, 2])];
    signature(vec![spec("text", DType::Bytes, &[-1])], outputs)
}

fn document(text: &str) -> Document {
    Document::parse(&Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

fn tensor(name: &str, dtype: DType, shape: &[usize], bytes: impl Into<Bytes>) -> Tensor {
    Tensor::new(name.into(), dtype, shape.into(), Data::Plain(bytes.into())).unwrap()
}

fn floats(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    tensor(name, DType::Fp32, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

fn ints(name: &str, shape: &[usize], values: &[i32]) -> Tensor {
    tensor(name, DType::Int32, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

fn texts(name: &str, shape: &[usize], values: &[&[u8]]) -> Tensor {
    let strings = values.iter().map(|value| Bytes::copy_from_slice(value)).collect();
    Tensor::new(name.into(), DType::Bytes, shape.into(), Data::Strings(strings)).unwrap()
}

fn reply(outputs: &[Tensor]) -> InferReply<'_> {
    InferReply { model: "m", version: "1", id: "", outputs }
}

fn parsed(json: Vec<u8>) -> Value {
    serde_json::from_slice(&json).unwrap()
}

fn predicted(text: &str, signature: &Signature) -> Result<(Vec<Tensor>, Format), Error> {
    predict::read(&document(text), signature, LIMIT).map(|(call, format)| (call.inputs, format))
}

fn invoked(text: &str, signature: &Signature) -> Result<(Vec<Tensor>, Orient), Error> {
    invocations::read_json(&document(text), signature, LIMIT).map(|(call, orient)| (call.inputs, orient))
}

fn invoked_csv(text: &str, signature: &Signature) -> Result<Vec<Tensor>, Error> {
    invocations::read_csv(&Bytes::copy_from_slice(text.as_bytes()), signature, LIMIT).map(|(call, _)| call.inputs)
}

fn generated(text: &str, signature: &Signature) -> Result<InferCall, Error> {
    generate::read(&document(text), signature, LIMIT)
}

// --- generate ---------------------------------------------------------------------------------------------------

#[test]
fn members_become_inputs_and_parameters() {
    let call = generated(
        r#"{"text": "hi", "id": "7", "parameters": {"timeout": 5, "temperature": 0.5}, "stream": false}"#,
        &language(),
    )
    .unwrap();
    assert_eq!(call.inputs, [texts("text", &[1], &[b"hi"])]);
    assert_eq!((call.id.as_str(), call.timeout.unwrap().as_micros()), ("7", 5));
    assert_eq!(call.parameters["temperature"], Parameter::Float(0.5));
    assert_eq!(call.parameters["stream"], Parameter::Bool(false));
    let call = generated(r#"{"text": ["a", "b\n"]}"#, &language()).unwrap();
    assert_eq!(call.inputs, [texts("text", &[2], &[b"a", b"b\n"])]);
}

#[test]
fn members_of_parameters_become_inputs_too() {
    let inputs = ["text_input", "bad_words"].map(|name| spec(name, DType::Bytes, &[-1, 1]));
    let inputs = inputs.into_iter().chain([spec("max_tokens", DType::Int32, &[1, 1]), spec("id", DType::Int32, &[1])]);
    let signature = signature(inputs.collect(), vec![spec("text_output", DType::Bytes, &[-1])]);
    let body = r#"{"text_input": "hi", "parameters": {"max_tokens": 20, "bad_words": [""], "seed": 3, "id": 4}}"#;
    let call = generated(body, &signature).unwrap();
    assert_eq!(
        call.inputs,
        [
            texts("text_input", &[1, 1], &[b"hi"]),
            ints("max_tokens", &[1, 1], &[20]),
            texts("bad_words", &[1, 1], &[b""]),
            ints("id", &[1], &[4]),
        ]
    );
    assert_eq!(call.parameters, [("seed".to_owned(), Parameter::Int(3))].into());
    for twice in [
        r#"{"max_tokens": 20, "parameters": {"max_tokens": 20}}"#,
        r#"{"parameters": {"max_tokens": 20}, "max_tokens": 20}"#,
        r#"{"parameters": {"max_tokens": 20, "max_tokens": 20}}"#,
        r#"{"max_tokens": 20, "max_tokens": 20}"#,
    ] {
        assert_eq!(generated(twice, &signature).unwrap_err().message, "input 'max_tokens' is given twice", "{twice}");
    }
}

#[test]
fn generate_refuses_what_fits_nothing() {
    let message = |text: &str| generated(text, &language()).unwrap_err().message;
    assert_eq!(message("[]"), "the request must be an object");
    assert_eq!(message(r#"{"id": 7}"#), "'id' must be a string, got 7");
    assert_eq!(message(r#"{"parameters": 7}"#), "'parameters' must be an object, got 7");
    assert_eq!(
        message(r#"{"texts": ["a"]}"#),
        r#"'texts' is no input, and as a parameter it must be a string, a number or a boolean, got ["a"]"#
    );
    assert_eq!(message(r#"{"a": 1, "parameters": {"a": 1}}"#), "parameter 'a' is given twice");
    assert_eq!(message(r#"{"text": 1}"#), "input 'text' must be a string, got 1");
    assert_eq!(message(r#"{"text": ["a", 1]}"#), "input 'text': element 1 must be a string, got 1");

    let message = |signature: &Signature| generated("{}", signature).unwrap_err().message;
    assert_eq!(message(&matrix()), "generate is for models with text input and output, and no input is BYTES: 'x'");
    let mut only_in = language();
    only_in.outputs.remove(0);
    assert!(message(&only_in).ends_with("no output is BYTES: 'score'"));
    let fixed = signature(vec![spec("x", DType::Bytes, &[2])], vec![spec("y", DType::Bytes, &[2])]);
    assert_eq!(
        generated(r#"{"x": "a"}"#, &fixed).unwrap_err().message,
        r#"input 'x': no request of one row has shape [2] and the elements of "a""#
    );
}

#[test]
fn generated_outputs_are_flat() {
    let outputs = [texts("language", &[1], &["ü".as_bytes()]), floats("score", &[1, 2], &[0.25, f32::NAN])];
    let json = generate::write(&InferReply { id: "7", ..reply(&outputs) }, NonFinite::Null).unwrap();
    assert_eq!(
        parsed(json),
        json!({ "model_name": "m", "model_version": "1", "id": "7", "language": "ü", "score": [0.25, null] })
    );
}

// --- predict ----------------------------------------------------------------------------------------------------

#[test]
fn rows_and_columns() {
    let x = floats("x", &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    for rows in ["[[1, 2], [3, 4.0]]", r#"[{"x": [1, 2]}, {"x": [3, 4e0]}]"#] {
        let read = predicted(&format!(r#"{{"instances": {rows}, "signature_name": "serving_default"}}"#), &matrix());
        assert_eq!(read, Ok((vec![x.clone()], Format::Rows)), "{rows}");
    }
    for columns in ["[[1, 2], [3, 4]]", r#"{"x": [[1, 2], [3, 4]]}"#] {
        let read = predicted(&format!(r#"{{"inputs": {columns}}}"#), &matrix());
        assert_eq!(read, Ok((vec![x.clone()], Format::Columns)), "{columns}");
    }
    let both = vec![ints("a", &[2], &[1, 2]), texts("b", &[2, 1], &[b"x", b"\xff"])];
    let rows = r#"{"instances": [{"a": 1, "b": ["x"]}, {"b": [{"b64": "/w=="}], "a": 2}]}"#;
    assert_eq!(predicted(rows, &pair()), Ok((both.clone(), Format::Rows)));
    let columns = r#"{"inputs": {"a": [1, 2], "b": [["x"], [{"b64": "/w"}]]}}"#;
    assert_eq!(predicted(columns, &pair()), Ok((both, Format::Columns)));
    let coded = r#"{"instances": [{"b64": "aGk="}, "x", {"b64":""}]}"#;
    assert_eq!(predicted(coded, &language()).unwrap().0, [texts("text", &[3], &[b"hi", b"x", b""])]);
    let scalar = signature(vec![spec("x", DType::Fp32, &[])], vec![]);
    assert_eq!(predicted(r#"{"inputs": 5}"#, &scalar).unwrap().0, [floats("x", &[], &[5.0])]);
}

#[test]
fn literals_are_floats() {
    let (inputs, _) = predicted(r#"{"instances": [[NaN, -Infinity]]}"#, &matrix()).unwrap();
    let Data::Plain(bytes) = &inputs[0].data else { panic!() };
    assert!(f32::from_le_bytes(bytes[..4].try_into().unwrap()).is_nan());
    assert_eq!(f32::from_le_bytes(bytes[4..].try_into().unwrap()), f32::NEG_INFINITY);
    let message = predicted(r#"{"instances": [{"a": NaN, "b": ["x"]}]}"#, &pair()).unwrap_err().message;
    assert_eq!(message, "instances[0].a must be an integer from -2147483648 to 2147483647, got NaN");
}

#[test]
fn predict_refuses_by_name() {
    for (text, signature, message) in [
        ("[]", matrix(), "the request must be an object, got []"),
        ("{}", matrix(), "the request has neither 'instances' nor 'inputs'"),
        (r#"{"instances": [], "inputs": []}"#, matrix(), "the request has both 'instances' and 'inputs'"),
        (r#"{"instances": [1], "instances": [1]}"#, matrix(), "the request has 'instances' twice"),
        (r#"{"instances": 1}"#, matrix(), "'instances' must be an array, got 1"),
        (r#"{"instances": []}"#, matrix(), "'instances' has no rows"),
        (
            r#"{"signature_name": "other", "inputs": 1}"#,
            matrix(),
            r#"'signature_name' must be 'serving_default' or absent, got "other""#,
        ),
        (r#"{"instances": [[1], [2, 3]]}"#, matrix(), "'instances' has rows of 1 and of 2 entries before element 3"),
        (
            r#"{"instances": [[1, "x"]]}"#,
            matrix(),
            r#"'instances': element 1 must be a number that is not out of range for FP32, got "x""#,
        ),
        (r#"{"instances": [{"y": 1}]}"#, matrix(), "instances[0] names 'y', which is no input; the inputs are 'x'"),
        (r#"{"instances": [1]}"#, pair(), "instances[0] must be an object with 'a', 'b', got 1"),
        (r#"{"instances": [{"a": 1, "a": 1}]}"#, pair(), "instances[0] has 'a' twice"),
        (r#"{"instances": [{"a": 1}, {}, {"a": 1}]}"#, pair(), "instances[1] has no 'a', which other rows have"),
        (r#"{"instances": [{"a": 1}, {}]}"#, pair(), "instances[1] has no 'a', which other rows have"),
        (
            r#"{"instances": [{"a": 1}, {"a": [1]}]}"#,
            pair(),
            "instances[1].a has shape [1] where those before it have []",
        ),
        (r#"{"inputs": [1]}"#, pair(), "'inputs' must be an object with 'a', 'b', got [1]"),
        (r#"{"inputs": {"c": 1}}"#, pair(), "'inputs' names 'c', which is no input; the inputs are 'a', 'b'"),
        (r#"{"inputs": {"a": [1], "a": [2]}}"#, pair(), "'inputs' has 'a' twice"),
        (r#"{"inputs": {"b64": "!"}}"#, language(), r#"'inputs' must be base64 in its member 'b64', got {"b64": "!"}"#),
        (
            r#"{"inputs": {"a": 2147483648}}"#,
            pair(),
            "inputs.a must be an integer from -2147483648 to 2147483647, got 2147483648",
        ),
    ] {
        let error = predicted(text, &signature).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (Code::InvalidArgument, message), "{text}");
    }
    let deep = format!(r#"{{"inputs": {}1{}}}"#, "[".repeat(65), "]".repeat(65));
    assert_eq!(predicted(&deep, &matrix()).unwrap_err().message, "'inputs' is nested deeper than 64 levels");
}

#[test]
fn predictions_go_back_as_they_came() {
    let label = ints("label", &[2], &[3, 4]);
    let scores = floats("scores", &[2, 1, 2], &[1.0, 2.0, 3.0, 4.5]);
    let bytes = texts("raw_bytes", &[2], &[b"\xff", b"hi"]);
    let write = |outputs: &[Tensor], format| predict::write(&reply(outputs), format, NonFinite::Literal);
    let parsed = |outputs: &[Tensor], format| parsed(write(outputs, format).unwrap());
    assert_eq!(parsed(from_ref(&scores), Format::Rows), json!({ "predictions": [[[1.0, 2.0]], [[3.0, 4.5]]] }));
    assert_eq!(
        parsed(&[label.clone(), scores.clone(), bytes.clone()], Format::Rows),
        json!({ "predictions": [
            { "label": 3, "scores": [[1.0, 2.0]], "raw_bytes": { "b64": "/w==" } },
            { "label": 4, "scores": [[3.0, 4.5]], "raw_bytes": { "b64": "aGk=" } },
        ] })
    );
    assert_eq!(parsed(from_ref(&label), Format::Columns), json!({ "outputs": [3, 4] }));
    assert_eq!(
        parsed(&[label.clone(), scores], Format::Columns),
        json!({ "outputs": { "label": [3, 4], "scores": [[[1.0, 2.0]], [[3.0, 4.5]]] } })
    );
    assert_eq!(parsed(&[floats("e", &[2, 0], &[])], Format::Rows), json!({ "predictions": [[], []] }));
    assert_eq!(parsed(&[floats("s", &[], &[1.5])], Format::Columns), json!({ "outputs": 1.5 }));

    let message = |outputs: &[Tensor]| write(outputs, Format::Rows).unwrap_err().message;
    let words = "so they are no rows; send 'inputs' instead of 'instances'";
    assert_eq!(message(&[floats("s", &[], &[1.5])]), format!("output 's' is a scalar, {words}"));
    assert_eq!(message(&[label, ints("n", &[1], &[1])]), format!("output 'label' has 2 rows and 'n' has 1, {words}"));
    assert_eq!(
        message(&[texts("raw", &[1], &[b"\xff"])]),
        "output 'raw': element 0 is not UTF-8, which JSON cannot carry; request it as binary data from /infer"
    );
}

#[test]
fn floats_of_sixteen_bits_are_numbers() {
    let halves = |dtype| signature(vec![spec("x", dtype, &[-1])], vec![]);
    for (dtype, bits) in [
        (DType::Fp16, [f16::from_f32(0.1).to_bits(), f16::from_f32(-2.0).to_bits()]),
        (DType::Bf16, [bf16::from_f32(0.1).to_bits(), bf16::from_f32(-2.0).to_bits()]),
    ] {
        let (inputs, _) = predicted(r#"{"instances": [0.1, -2]}"#, &halves(dtype)).unwrap();
        let expected = tensor("x", dtype, &[2], bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<_>>());
        assert_eq!(inputs, from_ref(&expected));
        // What goes out comes in again as it was.
        let json = predict::write(&reply(from_ref(&expected)), Format::Columns, NonFinite::Literal).unwrap();
        let back = String::from_utf8(json).unwrap().replace("outputs", "inputs");
        assert_eq!(predicted(&back, &halves(dtype)).unwrap().0, [expected]);
    }
    let message = predicted(r#"{"instances": [65520]}"#, &halves(DType::Fp16)).unwrap_err().message;
    assert_eq!(message, "'instances': element 0 must be a number that is not out of range for FP16, got 65520");
}

#[test]
fn texts_have_a_budget() {
    let body = format!(r#"{{"instances": [{}""]}}"#, r#""","#.repeat(200));
    let error = predict::read(&document(&body), &language(), 1024).unwrap_err();
    assert_eq!(error.code, Code::TooLarge);
    assert!(predict::read(&document(&body), &language(), 8192).is_ok());
}

// --- invocations ------------------------------------------------------------------------------------------------

#[test]
fn tables_become_inputs() {
    let x = vec![floats("x", &[2, 2], &[1.0, 2.0, 3.0, 4.0])];
    for table in [
        r#"{"dataframe_split": {"columns": ["p", "q"], "index": [0, 1], "data": [[1, 2], [3, 4]]}}"#,
        r#"{"dataframe_split": {"columns": [0, 1], "data": [[1, 2], [3, 4]]}}"#,
        r#"{"dataframe_split": {"data": [[1, 2], [3, 4]]}}"#,
        r#"{"dataframe_split": {"columns": ["y", "x"], "data": [["passed over", [1, 2]], [0, [3, 4]]]}}"#,
        r#"{"dataframe_records": [{"p": 1, "q": 2}, {"q": 4, "p": 3}], "params": {"top_k": [1]}}"#,
    ] {
        assert_eq!(invoked(table, &matrix()), Ok((x.clone(), Orient::Records)), "{table}");
    }
    assert_eq!(invoked_csv("p,q\r\n1,2\r\n 3,4.0\r\n", &matrix()), Ok(x.clone()));
    assert_eq!(invoked(r#"{"instances": [[1, 2], [3, 4]]}"#, &matrix()), Ok((x.clone(), Orient::Columns)));
    assert_eq!(invoked(r#"{"inputs": {"x": [[1, 2], [3, 4]]}}"#, &matrix()), Ok((x, Orient::Columns)));

    let both = vec![ints("a", &[2], &[1, 2]), texts("b", &[2, 1], &[b"x, y", b"7"])];
    assert_eq!(invoked_csv("b,a,c\n\"x, y\",1,\n7,2,?\n", &pair()), Ok(both.clone()));
    assert_eq!(
        invoked(r#"{"dataframe_records": [{"b": "x, y", "a": 1}, {"a": 2, "b": "7"}]}"#, &pair()),
        Ok((both, Orient::Records))
    );
    // What a request may leave out, so may a table.
    let optional = Signature { optional: vec!["b".into()], ..pair() };
    assert_eq!(invoked_csv("a,c\n1,\n2,?\n", &optional), Ok(vec![ints("a", &[2], &[1, 2])]));
    assert_eq!(invoked_csv("c\n1\n2\n", &optional), Ok(vec![ints("a", &[2], &[1, 2])]));
    // A column of any name is the elements of a vector; a table may be empty.
    assert_eq!(invoked_csv("message\nhi\n", &language()), Ok(vec![texts("text", &[1], &[b"hi"])]));
    assert_eq!(invoked_csv("p,q\n", &matrix()), Ok(vec![floats("x", &[0, 2], &[])]));
}

#[test]
fn tables_of_texts_or_of_tokens() {
    let encoder = |pairs: Pairs| {
        let inputs = vec![
            spec("text", DType::Bytes, &pairs.shape()),
            spec("input_ids", DType::Int32, &[-1, -1]),
            spec("attention_mask", DType::Int32, &[-1, -1]),
        ];
        let optional = inputs.iter().map(|spec| spec.name.clone()).collect();
        Signature { text: Some(pairs), optional, ..signature(inputs, vec![]) }
    };
    let two = vec![texts("text", &[2], &[b"hi", b"you"])];
    for csv in ["text\nhi\nyou\n", "anything\nhi\nyou\n", "id,text\n7,hi\n8,you\n"] {
        assert_eq!(invoked_csv(csv, &encoder(Pairs::Never)), Ok(two.clone()), "{csv}");
    }
    for table in [
        r#"{"dataframe_split": {"columns": ["text"], "data": [["hi"], ["you"]]}}"#,
        r#"{"dataframe_records": [{"text": "hi"}, {"text": "you"}]}"#,
    ] {
        assert_eq!(invoked(table, &encoder(Pairs::Maybe)), Ok((two.clone(), Orient::Records)), "{table}");
    }
    let ids = vec![ints("input_ids", &[2, 2], &[5, 6, 7, 8])];
    let table = r#"{"dataframe_records": [{"input_ids": [5, 6], "n": 0}, {"input_ids": [7, 8], "n": 1}]}"#;
    assert_eq!(invoked(table, &encoder(Pairs::Never)), Ok((ids, Orient::Records)));
    // Pairs are two columns in their order, or a column of them.
    let pair = vec![texts("text", &[1, 2], &[b"q", b"a"])];
    for pairs in [Pairs::Maybe, Pairs::Always] {
        assert_eq!(invoked_csv("query,passage\nq,a\n", &encoder(pairs)), Ok(pair.clone()), "{pairs:?}");
    }
    let table = r#"{"dataframe_split": {"columns": ["text"], "data": [[["q", "a"]]]}}"#;
    assert_eq!(invoked(table, &encoder(Pairs::Always)), Ok((pair, Orient::Records)));
    let message = invoked_csv("a,b\nq,a\n", &encoder(Pairs::Never)).unwrap_err().message;
    assert!(message.starts_with("the columns 'a', 'b' are neither the input 'text' by name"), "{message}");
}

#[test]
fn what_is_absent_is_no_number() {
    let is_nan = |inputs: Vec<Tensor>| {
        let Data::Plain(bytes) = &inputs[0].data else { panic!() };
        bytes.as_chunks().0.iter().map(|&raw| f32::from_le_bytes(raw).is_nan()).collect::<Vec<_>>()
    };
    assert_eq!(is_nan(invoked_csv("p,q\n,1\nNaN,\n", &matrix()).unwrap()), [true, false, true, true]);
    let (inputs, _) = invoked(r#"{"dataframe_records": [{"p": null, "q": 1}]}"#, &matrix()).unwrap();
    assert_eq!(is_nan(inputs), [true, false]);
    let (inputs, _) = invoked(
        r#"{"dataframe_split": {"columns": ["x"], "data": [[null]]}}"#,
        &signature(vec![spec("x", DType::Fp32, &[-1])], vec![]),
    )
    .unwrap();
    assert_eq!(is_nan(inputs), [true]);
    let signature = signature(vec![spec("p", DType::Fp64, &[-1]), spec("q", DType::Bool, &[-1])], vec![]);
    let inputs = invoked_csv("p,q\ninf,True\n-inf,0\n1e3,FALSE\n", &signature).unwrap();
    let doubles: Vec<u8> =
        [f64::INFINITY, f64::NEG_INFINITY, 1e3].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(inputs, [tensor("p", DType::Fp64, &[3], doubles), tensor("q", DType::Bool, &[3], vec![1, 0, 0])]);
}

#[test]
fn invocations_refuse_by_name() {
    for (text, signature, message) in [
        ("{}", matrix(), "the request must have exactly one of dataframe_split, dataframe_records, instances, inputs"),
        (
            r#"{"inputs": 1, "instances": [1]}"#,
            matrix(),
            "the request must have exactly one of dataframe_split, dataframe_records, instances, inputs",
        ),
        (r#"{"dataframe_split": []}"#, matrix(), "dataframe_split must be an object, got []"),
        (r#"{"dataframe_split": {}}"#, matrix(), "dataframe_split has no 'data'"),
        (r#"{"dataframe_split": {"data": 1}}"#, matrix(), "dataframe_split.data must be an array of rows, got 1"),
        (r#"{"dataframe_split": {"data": []}}"#, matrix(), "dataframe_split has neither 'columns' nor rows"),
        (
            r#"{"dataframe_split": {"columns": 1, "data": []}}"#,
            matrix(),
            "dataframe_split.columns must be an array, got 1",
        ),
        (
            r#"{"dataframe_split": {"columns": [["a"]], "data": []}}"#,
            matrix(),
            r#"dataframe_split.columns[0] must be a string or a number, got ["a"]"#,
        ),
        (r#"{"dataframe_split": {"columns": ["p", "p"], "data": []}}"#, matrix(), "there are two columns 'p'"),
        (
            r#"{"dataframe_split": {"columns": ["p", "q"], "data": [[1, 2], [3]]}}"#,
            matrix(),
            "row 1 has 1 cells for 2 columns",
        ),
        (
            r#"{"dataframe_split": {"columns": ["p", "q"], "data": [[1, 2], {}]}}"#,
            matrix(),
            "dataframe_split.data[1] must be an array, got {}",
        ),
        (
            r#"{"dataframe_split": {"columns": ["p", "q"], "data": [[1, 2], [3, "4"]]}}"#,
            matrix(),
            r#"row 1, column 'q' must be a number that is not out of range for FP32, got "4""#,
        ),
        (
            r#"{"dataframe_split": {"columns": ["p", "q"], "data": [[[1], [2]]]}}"#,
            matrix(),
            "row 0, column 'p' must be one value, got a list",
        ),
        (
            r#"{"dataframe_split": {"columns": ["x"], "data": [[[1, 2]], [[3]]]}}"#,
            matrix(),
            "row 1, column 'x' has shape [1] where the rows before have [2]",
        ),
        (
            r#"{"dataframe_split": {"columns": ["p", "q", "r"], "data": []}}"#,
            matrix(),
            "the columns 'p', 'q', 'r' are neither the input 'x' by name nor, by their number, rows of its shape \
             [-1, 2]",
        ),
        (
            r#"{"dataframe_split": {"columns": ["a", "c"], "data": []}}"#,
            pair(),
            "there is no column 'b'; the inputs are 'a', 'b', the columns 'a', 'c'",
        ),
        (r#"{"dataframe_records": {}}"#, matrix(), "dataframe_records must be an array of objects, got {}"),
        (r#"{"dataframe_records": []}"#, matrix(), "dataframe_records has no rows"),
        (r#"{"dataframe_records": [1]}"#, matrix(), "dataframe_records[0] must be an object, got 1"),
        (
            r#"{"dataframe_records": [{"p": 1, "q": 2}, {"p": 1}]}"#,
            matrix(),
            "dataframe_records[1] has no column 'q', which the first row has",
        ),
        (
            r#"{"dataframe_records": [{"p": 1, "q": 2}, {"p": 1, "r": 2}]}"#,
            matrix(),
            "dataframe_records[1] has the column 'r', which the first row has not",
        ),
        (
            r#"{"dataframe_records": [{"p": 1, "q": 2}, {"p": 1, "p": 2}]}"#,
            matrix(),
            "dataframe_records[1] has 'p' twice",
        ),
        (
            r#"{"dataframe_records": [{"a": null, "b": "x"}]}"#,
            pair(),
            "row 0, column 'a' must be an integer from -2147483648 to 2147483647, got null",
        ),
        (r#"{"inputs": [[1, 2]], "params": []}"#, matrix(), "params must be an object, got []"),
        (
            r#"{"inputs": [[1, 2]], "params": {"timeout": "x"}}"#,
            matrix(),
            "parameter 'timeout' must be a whole number of microseconds, 0 for none",
        ),
    ] {
        let error = invoked(text, &signature).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (Code::InvalidArgument, message), "{text}");
    }
    for (text, message) in [
        ("", "the CSV has no line with the names of its columns"),
        ("a,b\n1\n", "row 0 has 1 cells for 2 columns"),
        ("a,b\n1,x\n,y\n", "row 1, column 'a' must be an integer from -2147483648 to 2147483647, got ''"),
        ("a,b\n1,\"x", "line 2 has a quote that is never closed"),
    ] {
        assert_eq!(invoked_csv(text, &pair()).unwrap_err().message, message, "{text}");
    }
    let wide = format!("{}z\n", "z,".repeat(20_000));
    assert_eq!(invoked_csv(&wide, &matrix()).unwrap_err().message, "the table has more than 16384 columns");
}

#[test]
fn invocations_answer_as_they_were_asked() {
    let label = ints("label", &[2], &[3, 4]);
    let scores = floats("scores", &[2, 2], &[1.0, 2.0, 3.0, 4.5]);
    let parsed = |outputs: &[Tensor], orient| {
        parsed(invocations::write(&reply(outputs), orient, NonFinite::Literal).unwrap())["predictions"].take()
    };
    assert_eq!(parsed(from_ref(&scores), Orient::Records), json!([[1.0, 2.0], [3.0, 4.5]]));
    assert_eq!(
        parsed(&[label.clone(), scores.clone()], Orient::Records),
        json!([{ "label": 3, "scores": [1.0, 2.0] }, { "label": 4, "scores": [3.0, 4.5] }])
    );
    assert_eq!(
        parsed(&[label.clone(), scores], Orient::Columns),
        json!({ "label": [3, 4], "scores": [[1.0, 2.0], [3.0, 4.5]] })
    );
    let uneven = [label, ints("total", &[], &[7])];
    assert_eq!(parsed(&uneven, Orient::Records), json!({ "label": [3, 4], "total": 7 }));
}

// --- all --------------------------------------------------------------------------------------------------------

fn signatures() -> impl Strategy<Value = Signature> {
    let dtype = || proptest::sample::select(DType::ALL.to_vec());
    let shape = || vec(-1i64..4, 0..4);
    let specs = |names: &'static [&'static str]| {
        vec((dtype(), shape()), 1..=names.len()).prop_map(move |specs| {
            specs.iter().zip(names).map(|((dtype, shape), name)| spec(name, *dtype, shape)).collect::<Vec<_>>()
        })
    };
    (specs(&["x", "b64", "id"]), specs(&["y", "z_bytes"])).prop_map(|(inputs, outputs)| signature(inputs, outputs))
}

/// Everything that reads, on one body; what it reads must hold what it says it does.
fn read_all(body: &Bytes, signature: &Signature) {
    let mut calls = vec![invocations::read_csv(body, signature, LIMIT).map(|(call, _)| call)];
    if let Ok(document) = Document::parse(body) {
        calls.push(generate::read(&document, signature, LIMIT));
        calls.push(predict::read(&document, signature, LIMIT).map(|(call, _)| call));
        calls.push(invocations::read_json(&document, signature, LIMIT).map(|(call, _)| call));
    }
    for call in calls {
        match call {
            Err(error) => {
                assert!(
                    matches!(error.code, Code::InvalidArgument | Code::TooLarge | Code::Unimplemented),
                    "{error:?}"
                );
            }
            Ok(call) => {
                for input in call.inputs {
                    assert_eq!(
                        Tensor::new(input.name.clone(), input.dtype, input.shape.clone(), input.data.clone()),
                        Ok(input)
                    );
                }
            }
        }
    }
}

fn json_of(depth: u32) -> impl Strategy<Value = Value> {
    let names = proptest::sample::select(&["x", "b64", "id", "a", "", "columns", "data", "timeout"][..]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0i64..3).prop_map(Value::from),
        any::<f32>().prop_map(Value::from),
        "[a-zA-Z0-9=\"\\\\}é]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(depth, 24, 4, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(names.clone().prop_map(str::to_owned), inner, 0..4)
                .prop_map(|map| map.into_iter().collect()),
        ]
    })
}

proptest! {
    #[test]
    fn bodies_of_every_kind_are_read_or_refused(
        members in vec((
            proptest::sample::select(&[
                "instances", "inputs", "dataframe_split", "dataframe_records", "params", "signature_name", "x", "id",
                "parameters", "other",
            ][..]),
            json_of(4),
        ), 0..3),
        signature in signatures(),
        edits in vec((any::<prop::sample::Index>(), prop::sample::select(&b"[]{}\",:0-9eN\\ \xff\0\n"[..])), 0..3),
    ) {
        let object: Value = members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut body = object.to_string().into_bytes();
        for (index, byte) in edits {
            let at = index.index(body.len());
            body[at] = byte;
        }
        read_all(&body.into(), &signature);
    }

    #[test]
    fn noise_never_panics(noise: Vec<u8>, text in r#"[\[\]{}":,0-9a-zN\\\n -]{0,64}"#, signature in signatures()) {
        read_all(&noise.into(), &signature);
        read_all(&text.into(), &signature);
    }

    #[test]
    fn columns_and_rows_round_trip(rows in 1usize..4, width in 0usize..3, seed: Vec<u8>) {
        for dtype in DType::ALL {
            let count = rows * width * dtype.size().unwrap_or(1);
            let bytes: Vec<u8> = seed.iter().copied().chain([7]).cycle().take(count).map(|byte| byte & 1).collect();
            let given = match dtype.size() {
                Some(_) => tensor("x", dtype, &[rows, width], bytes),
                None => texts("x", &[rows, width], &bytes.chunks(1).collect::<Vec<_>>()),
            };
            let signature = signature(vec![spec("x", dtype, &[-1, -1])], vec![]);
            for (format, names) in [(Format::Columns, ["outputs", "inputs"]), (Format::Rows, ["predictions", "instances"])] {
                let json = predict::write(&reply(from_ref(&given)), format, NonFinite::Error).unwrap();
                let body = String::from_utf8(json).unwrap().replacen(names[0], names[1], 1);
                prop_assert_eq!(&predicted(&body, &signature).unwrap().0[0], &given, "{}", body);
            }
        }
    }

    #[test]
    fn csv_says_what_json_says(values in vec((any::<f32>(), any::<f32>()), 1..5)) {
        prop_assume!(values.iter().all(|(p, q)| p.is_finite() && q.is_finite()));
        let line = |(p, q): &(f32, f32)| format!("{p:?},\"{q:?}\"\n");
        let csv = format!("p,q\n{}", values.iter().map(line).collect::<String>());
        let body = json!({ "instances": values.iter().map(|(p, q)| [p, q]).collect::<Vec<_>>() }).to_string();
        prop_assert_eq!(invoked_csv(&csv, &matrix()).unwrap(), predicted(&body, &matrix()).unwrap().0);
    }
}
