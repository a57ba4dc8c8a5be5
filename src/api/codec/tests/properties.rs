//! What one codec writes another reads, for any tensor; and no message makes any of them panic.

use bytes::Bytes;
use half::{bf16, f16};
use proptest::{collection::vec, prelude::*};
use prost::Message;

use super::{super::*, echo, encode, request};
use crate::{
    api::pb::{InferTensorContents, ModelInferRequest},
    backend::{Signature, TensorSpec},
    tensor::Data,
};

/// Members of a request, usual ones and others, for requests put together by chance.
const MEMBERS: [&str; 10] = [
    r#""inputs":[INPUT]"#,
    r#""inputs" : [ INPUT, INPUT ]"#,
    r#""inputs":[]"#,
    r#""id":"a b""#,
    r#""id":"\u0041""#,
    "\"id\":\"a\r\"",
    r#""outputs":[{"name":"y"},{"parameters":{"binary_data":true,"classification":2},"name":"z"}]"#,
    r#""outputs":[]"#,
    r#""parameters":{"binary_data_output":true,"timeout":5,"x":"é"}"#,
    r#""parameters":{"priority":-0,"k":"v","f":false}"#,
];
const INPUT_MEMBERS: [&str; 10] = [
    r#""name":"x""#,
    r#""name":"x""#,
    r#""datatype":"FP32""#,
    r#""datatype":"INT16""#,
    r#""datatype":"BYTES""#,
    r#""shape":[ROWS]"#,
    r#""shape":[ROWS,1]"#,
    r#""data":[DATA]"#,
    r#""data":[[DATA]]"#,
    r#""parameters":{"binary_data_size":TAIL}"#,
];
const NUMBERS: [&str; 14] =
    ["0", "-0", "1", "-7", "0.5", "1e3", "32768", "1.5E-3", "16777217", "\"a\"", "NaN", "01", "1.", "true"];

fn shapes() -> impl Strategy<Value = Shape> {
    vec(0usize..4, 0..4).prop_map(Shape::from_vec)
}

/// A tensor of any type; bits that are no number only where the type has them and `finite` does not forbid it.
pub(super) fn tensors(finite: bool) -> impl Strategy<Value = Tensor> {
    let fill = move |(dtype, shape, seed, strings): (DType, Shape, Vec<u8>, Vec<String>)| {
        let count = crate::tensor::elements(&shape).unwrap();
        let Some(size) = dtype.size() else {
            let texts = strings.iter().cycle().take(count).map(|text| Bytes::from(text.clone())).collect();
            return Tensor::new("t".into(), dtype, shape, Data::Strings(texts)).unwrap();
        };
        let mut bytes: Vec<u8> = seed.iter().copied().cycle().take(count * size).collect();
        if dtype == DType::Bool {
            bytes.iter_mut().for_each(|byte| *byte &= 1);
        }
        for element in bytes.chunks_exact_mut(size) {
            let is_finite = match dtype {
                DType::Fp16 => f16::from_le_bytes(element.try_into().unwrap()).is_finite(),
                DType::Bf16 => bf16::from_le_bytes(element.try_into().unwrap()).is_finite(),
                DType::Fp32 => f32::from_le_bytes(element.try_into().unwrap()).is_finite(),
                DType::Fp64 => f64::from_le_bytes(element.try_into().unwrap()).is_finite(),
                _ => true,
            };
            if finite && !is_finite {
                element.fill(1);
            }
        }
        Tensor::new("t".into(), dtype, shape, Data::Plain(bytes.into())).unwrap()
    };
    let strings = vec(any::<String>(), 1..4);
    // Prime, so that elements of every size differ from each other.
    (proptest::sample::select(DType::ALL.to_vec()), shapes(), vec(any::<u8>(), 61), strings).prop_map(fill)
}

/// The same call as gRPC sends it with typed contents, where the type has any.
fn typed_request(tensor: &Tensor) -> Option<ModelInferRequest> {
    let mut contents = InferTensorContents::default();
    macro_rules! fill {
        ($field:ident, $bytes:expr, $type:ty) => {
            contents.$field = $bytes.as_chunks().0.iter().map(|&raw| <$type>::from_le_bytes(raw).into()).collect()
        };
    }
    match (&tensor.data, tensor.dtype) {
        (Data::Strings(strings), _) => contents.bytes_contents = strings.clone(),
        (Data::Plain(bytes), DType::Bool) => contents.bool_contents = bytes.iter().map(|&byte| byte == 1).collect(),
        (Data::Plain(bytes), DType::Int8) => fill!(int_contents, bytes, i8),
        (Data::Plain(bytes), DType::Int16) => fill!(int_contents, bytes, i16),
        (Data::Plain(bytes), DType::Int32) => fill!(int_contents, bytes, i32),
        (Data::Plain(bytes), DType::Int64) => fill!(int64_contents, bytes, i64),
        (Data::Plain(bytes), DType::Uint8) => fill!(uint_contents, bytes, u8),
        (Data::Plain(bytes), DType::Uint16) => fill!(uint_contents, bytes, u16),
        (Data::Plain(bytes), DType::Uint32) => fill!(uint_contents, bytes, u32),
        (Data::Plain(bytes), DType::Uint64) => fill!(uint64_contents, bytes, u64),
        (Data::Plain(bytes), DType::Fp32) => fill!(fp32_contents, bytes, f32),
        (Data::Plain(bytes), DType::Fp64) => fill!(fp64_contents, bytes, f64),
        _ => return None,
    }
    let shape: Vec<i64> = tensor.shape.iter().map(|&size| size as i64).collect();
    let mut sent = request(tensor.dtype.name(), &shape, Some(contents), &[]);
    sent.inputs[0].name = tensor.name.to_string();
    Some(sent)
}

/// The usual request is read as all requests are.
fn same_both_ways(body: &Bytes, header_length: Option<usize>) {
    assert_eq!(decode_json(body, header_length), json::decode_carefully(body, header_length), "{body:?}");
}

proptest! {
    #[test]
    fn json_round_trips(tensor in tensors(true)) {
        prop_assume!(!matches!(tensor.dtype, DType::Fp16 | DType::Bf16));
        let encoded = encode(tensor.clone(), NonFinite::Error, false).unwrap();
        prop_assert!(serde_json::from_slice::<serde_json::Value>(&encoded.json).is_ok());
        prop_assert_eq!(&echo(&encoded).inputs[0], &tensor);
        let usual = String::from_utf8(encoded.json.to_vec()).unwrap().replacen("\"outputs\":", "\"inputs\":", 1);
        let usual = usual.replace(r#""model_name":"m","model_version":"1","#, "");
        same_both_ways(&Bytes::from(usual), None);
    }

    #[test]
    fn literals_round_trip(values: Vec<f32>) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = [values.len()].as_slice().into();
        let tensor = Tensor::new("t".into(), DType::Fp32, shape, Data::Plain(bytes.into())).unwrap();
        let read = echo(&encode(tensor, NonFinite::Literal, false).unwrap()).inputs.remove(0);
        let Data::Plain(bytes) = read.data else { panic!() };
        for (raw, value) in bytes.as_chunks().0.iter().zip(values) {
            let read = f32::from_le_bytes(*raw);
            prop_assert!(read.to_bits() == value.to_bits() || (read.is_nan() && value.is_nan()));
        }
    }

    #[test]
    fn binary_round_trips(tensors in vec(tensors(false), 0..4)) {
        let reply = InferReply { model: "m", version: "1", id: "", outputs: &tensors };
        let options = JsonOptions { requested: &[], binary_output: true, non_finite: NonFinite::Error };
        prop_assert_eq!(&echo(&encode_json(&reply, &options).unwrap()).inputs, &tensors);
    }

    #[test]
    fn proto_round_trips(tensor in tensors(false)) {
        let outputs = [tensor.clone()];
        let reply = encode_proto(&InferReply { model: "m", version: "1", id: "i", outputs: &outputs }, &[]);
        let output = &reply.outputs[0];
        let mut sent = request(&output.datatype, &output.shape, None, &[]);
        sent.inputs[0].name = output.name.clone();
        sent.raw_input_contents = reply.raw_output_contents;
        let sent = ModelInferRequest::decode(Bytes::from(sent.encode_to_vec())).unwrap();
        prop_assert_eq!(&decode_proto(sent).unwrap().inputs[0], &tensor);
        if let Some(sent) = typed_request(&tensor) {
            // Bits of a NaN may change where a float is not carried as bytes.
            if !matches!(tensor.dtype, DType::Fp32 | DType::Fp64) {
                prop_assert_eq!(&decode_proto(sent).unwrap().inputs[0], &tensor);
            } else {
                prop_assert_eq!(decode_proto(sent).unwrap().inputs[0].byte_len(), tensor.byte_len());
            }
        }
    }

    #[test]
    fn noise_never_panics(noise: Vec<u8>, text in r#"[\[\]{}":,0-9a-zN\\ -]{0,64}"#, length: Option<u8>, shape: Vec<i64>) {
        for body in [Bytes::from(noise), Bytes::from(text)] {
            same_both_ways(&body, length.map(usize::from));
            literals::mask(&body);
            for dtype in DType::ALL {
                let spec = TensorSpec { name: "x".into(), dtype, shape: shape.clone() };
                let _ = decode_raw(&body, &Signature { inputs: vec![spec], ..Signature::default() });
            }
            if let Ok(request) = ModelInferRequest::decode(body) {
                let _ = decode_proto(request);
            }
        }
    }

    #[test]
    fn usual_requests_are_read_both_ways(
        members in vec(prop::sample::select(&MEMBERS[..]), 1..7),
        input in vec(prop::sample::select(&INPUT_MEMBERS[..]), 3..6),
        data in prop::sample::subsequence(&NUMBERS[..], 0..6).prop_shuffle(),
        rows in 0usize..7,
        space in prop::sample::select(vec!["", " ", "\n\t"]),
        tail in vec(any::<u8>(), 0..9),
    ) {
        let comma = format!("{space},{space}");
        let fill = |text: &str| {
            text.replace("DATA", &data.join(&comma)).replace("ROWS", &rows.to_string()).replace("TAIL", &tail.len().to_string())
        };
        let input = format!("{{{space}{}{space}}}", input.join(&comma));
        let json = format!("{space}{{{}{space}}}{space}", fill(&members.join(&comma).replace("INPUT", &input)));
        same_both_ways(&Bytes::from(json.clone()), None);
        let body = Bytes::from([json.as_bytes(), &tail].concat());
        same_both_ways(&body, Some(json.len()));
    }

    #[test]
    fn mutations_never_panic(
        tensors in vec(tensors(true), 1..3),
        binary: bool,
        edits in vec((any::<prop::sample::Index>(), prop::sample::select(&b"[]{}\",:0-9eN\\ \xff\0"[..])), 1..6),
        cut: prop::sample::Index,
    ) {
        let reply = InferReply { model: "m", version: "1", id: "i", outputs: &tensors };
        let options = JsonOptions { requested: &[], binary_output: binary, non_finite: NonFinite::Literal };
        let proto = encode_proto(&reply, &[]).encode_to_vec();
        let json = encode_json(&reply, &options).map(|encoded| {
            let json = std::str::from_utf8(&encoded.json).unwrap().replacen("\"outputs\":", "\"inputs\":", 1);
            [json.as_bytes(), &encoded.tensors.concat()].concat()
        });
        for mut body in json.into_iter().chain([proto]) {
            for (index, byte) in &edits {
                let at = index.index(body.len());
                body[at] = *byte;
            }
            let length = cut.index(body.len());
            let body = Bytes::from(body);
            same_both_ways(&body, None);
            same_both_ways(&body, Some(length));
            same_both_ways(&body.slice(..length), None);
            if let Ok(request) = ModelInferRequest::decode(body) {
                let _ = decode_proto(request);
            }
        }
    }
}
