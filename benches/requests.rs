//! Requests of one row, encoded once in each of the three ways, and a look at what comes back.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use prost::Message;
use serde::Deserialize;
use serde_json::{Value, json};
use tidegate::{
    api::pb,
    tensor::{DType, Data, Tensor},
};

use crate::wire::Request;

pub const HEADER_LENGTH: &str = "inference-header-content-length";
pub const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

/// How a request is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Grpc,
    Json,
    Binary,
}

impl Protocol {
    pub const ALL: [Protocol; 3] = [Protocol::Grpc, Protocol::Json, Protocol::Binary];

    /// As the names of figures have it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Grpc => "grpc",
            Protocol::Json => "json",
            Protocol::Binary => "binary",
        }
    }

    /// As people write it.
    pub fn title(self) -> &'static str {
        match self {
            Protocol::Grpc => "gRPC",
            Protocol::Json => "REST JSON",
            Protocol::Binary => "REST binary",
        }
    }

    /// Connections, and requests on each, under full load.
    pub fn concurrency(self) -> (usize, usize) {
        match self {
            Protocol::Grpc => (4, 16),
            Protocol::Json | Protocol::Binary => (16, 1),
        }
    }

    /// A request for `model` with one input.
    ///
    /// # Errors
    /// As `request_of`.
    pub fn request(self, model: &str, input: &Tensor) -> Result<Request> {
        self.request_of(model, std::slice::from_ref(input))
    }

    /// A request for `model`.
    ///
    /// # Errors
    /// Over JSON for half floats, which it has no number for, and for texts that are no UTF-8.
    pub fn request_of(self, model: &str, inputs: &[Tensor]) -> Result<Request> {
        let raw = inputs.iter().map(raw).collect::<Result<Vec<_>>>()?;
        if self == Protocol::Grpc {
            let tensor = |input: &Tensor| pb::model_infer_request::InferInputTensor {
                name: input.name.to_string(),
                datatype: input.dtype.name().to_owned(),
                shape: input.shape.iter().map(|&size| size as i64).collect(),
                ..Default::default()
            };
            let message = pb::ModelInferRequest {
                model_name: model.to_owned(),
                inputs: inputs.iter().map(tensor).collect(),
                raw_input_contents: raw,
                ..Default::default()
            };
            return Ok(Request::Grpc { path: INFER, messages: vec![message.encode_to_vec().into()], deadline: None });
        }
        let binary = self == Protocol::Binary;
        let mut described = Vec::new();
        for (input, raw) in inputs.iter().zip(&raw) {
            let mut one = json!({ "name": &*input.name, "datatype": input.dtype.name(), "shape": &input.shape[..] });
            if binary {
                one["parameters"] = json!({ "binary_data_size": raw.len() });
            } else {
                one["data"] = elements(input)?;
            }
            described.push(one);
        }
        if !binary {
            return Ok(post(model, "", json!({ "inputs": described }).to_string().into_bytes()));
        }
        let header = json!({ "parameters": { "binary_data_output": true }, "inputs": described });
        let mut body = header.to_string().into_bytes();
        let length = format!("{HEADER_LENGTH}: {}\r\n", body.len());
        raw.iter().for_each(|raw| body.extend_from_slice(raw));
        Ok(post(model, &length, body))
    }

    /// The outputs of a reply, each as its name, datatype, shape and bytes of contents, after checking that these fit.
    ///
    /// # Errors
    /// When it is no such reply.
    pub fn outputs(self, body: &[u8]) -> Result<Vec<String>> {
        let describe = |name: &str, datatype: &str, shape: &[i64]| format!("{name} {datatype} {shape:?}");
        let elements = |shape: &[i64]| shape.iter().product::<i64>() as usize;
        if self == Protocol::Grpc {
            let message = pb::ModelInferResponse::decode(body.get(5..).context("no message")?)?;
            let (outputs, raw) = (&message.outputs, &message.raw_output_contents);
            ensure!(outputs.len() == raw.len(), "{} outputs and {} contents", outputs.len(), raw.len());
            for (output, raw) in outputs.iter().zip(raw) {
                let width = DType::parse(&output.datatype).and_then(DType::size).unwrap_or(1);
                ensure!(raw.len() == elements(&output.shape) * width, "'{}': {} bytes", output.name, raw.len());
            }
            return Ok(outputs.iter().map(|one| describe(&one.name, &one.datatype, &one.shape)).collect());
        }
        let Reply { outputs } = serde_json::Deserializer::from_slice(body)
            .into_iter()
            .next()
            .context("an empty reply")?
            .context("no reply of inference")?;
        for output in &outputs {
            let count = elements(&output.shape);
            let width = DType::parse(&output.datatype).and_then(DType::size).unwrap_or(1);
            match (self, &output.data, output.parameters.binary_data_size) {
                (Protocol::Json, Some(data), None) if data.len() == count => {}
                (Protocol::Binary, None, Some(size)) if size == count * width => {}
                _ => anyhow::bail!("'{}' does not hold {count} elements as asked for", output.name),
            }
        }
        Ok(outputs.iter().map(|one| describe(&one.name, &one.datatype, &one.shape)).collect())
    }

    /// The contents of a reply's outputs over gRPC.
    ///
    /// # Errors
    /// When it is no such reply.
    pub fn contents(body: &[u8]) -> Result<Vec<Bytes>> {
        Ok(pb::ModelInferResponse::decode(body.get(5..).context("no message")?)?.raw_output_contents)
    }

    /// The version that gave a reply over gRPC.
    ///
    /// # Errors
    /// When it is no such reply.
    pub fn version(body: &[u8]) -> Result<usize> {
        let message = pb::ModelInferResponse::decode(body.get(5..).context("no message")?)?;
        message.model_version.parse().with_context(|| format!("version '{}'", message.model_version))
    }
}

#[derive(Deserialize)]
struct Reply {
    outputs: Vec<ReplyOutput>,
}

#[derive(Deserialize)]
struct ReplyOutput {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    data: Option<Vec<Value>>,
    #[serde(default)]
    parameters: ReplyParameters,
}

#[derive(Default, Deserialize)]
struct ReplyParameters {
    binary_data_size: Option<usize>,
}

/// The contents as bytes: of texts each behind its length.
fn raw(input: &Tensor) -> Result<Bytes> {
    let texts = match &input.data {
        Data::Plain(raw) => return Ok(raw.clone()),
        Data::Strings(texts) => texts,
    };
    let mut raw = Vec::new();
    for text in texts {
        raw.extend_from_slice(&u32::try_from(text.len()).context("a text is too long")?.to_le_bytes());
        raw.extend_from_slice(text);
    }
    Ok(raw.into())
}

fn elements(input: &Tensor) -> Result<Value> {
    match &input.data {
        Data::Plain(raw) => numbers(input.dtype, raw),
        Data::Strings(texts) => texts
            .iter()
            .map(|text| Ok(Value::from(std::str::from_utf8(text)?)))
            .collect::<Result<Vec<_>>>()
            .map(Value::from),
    }
}

/// The elements as a person would write them: 0.2, and not 0.20000000298023224.
fn numbers(dtype: DType, raw: &[u8]) -> Result<Value> {
    macro_rules! of {
        ($type:ty) => {{
            let elements: Vec<$type> = raw
                .chunks_exact(size_of::<$type>())
                .map(|bytes| bytes.try_into().map(<$type>::from_le_bytes))
                .collect::<Result<_, _>>()?;
            // Through text, because a float of 32 bits as a JSON value is one of 64.
            serde_json::from_str(&serde_json::to_string(&elements)?)?
        }};
    }
    Ok(match dtype {
        DType::Bool => raw.iter().map(|&byte| byte != 0).collect(),
        DType::Uint8 => of!(u8),
        DType::Uint16 => of!(u16),
        DType::Uint32 => of!(u32),
        DType::Uint64 => of!(u64),
        DType::Int8 => of!(i8),
        DType::Int16 => of!(i16),
        DType::Int32 => of!(i32),
        DType::Int64 => of!(i64),
        DType::Fp32 => of!(f32),
        DType::Fp64 => of!(f64),
        DType::Fp16 | DType::Bf16 | DType::Bytes => anyhow::bail!("JSON has no numbers for {dtype}"),
    })
}

fn post(model: &str, extra: &str, body: Vec<u8>) -> Request {
    let head = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nhost: localhost\r\nuser-agent: tidegate-bench\r\n\
         content-length: {}\r\n{extra}\r\n",
        body.len()
    );
    Request::Http1([head.into_bytes(), body].concat().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: DType, shape: &[usize], bytes: &[u8]) -> Tensor {
        Tensor::new(name.into(), dtype, shape.into(), Data::Plain(Bytes::copy_from_slice(bytes))).unwrap()
    }

    #[test]
    fn requests_hold_every_input() {
        let inputs = [
            tensor("a", DType::Fp32, &[1, 2], &[0.2_f32, 3.0].map(f32::to_le_bytes).concat()),
            tensor("b", DType::Int16, &[1], &(-2_i16).to_le_bytes()),
        ];
        let Request::Grpc { messages, .. } = Protocol::Grpc.request_of("m", &inputs).unwrap() else { panic!() };
        let message = pb::ModelInferRequest::decode(messages[0].clone()).unwrap();
        assert_eq!((message.inputs.len(), message.raw_input_contents.len()), (2, 2));

        let body = |protocol: Protocol| {
            let Request::Http1(bytes) = protocol.request_of("m", &inputs).unwrap() else { panic!() };
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("POST /v2/models/m/infer HTTP/1.1\r\n"), "{head}");
            body.to_owned()
        };
        let json: Value = serde_json::from_str(&body(Protocol::Json)).unwrap();
        assert_eq!(json["inputs"][0]["data"].to_string(), "[0.2,3.0]");
        assert_eq!(json["inputs"][1]["data"].to_string(), "[-2]");
        let binary = body(Protocol::Binary);
        let header: Value = serde_json::Deserializer::from_str(&binary).into_iter().next().unwrap().unwrap();
        assert_eq!(header["inputs"][0]["parameters"]["binary_data_size"], 8);
        assert!(Protocol::Json.request_of("m", &[tensor("h", DType::Fp16, &[1], &[0, 0])]).is_err());
    }

    #[test]
    fn texts_are_sent_with_their_lengths() {
        let data = Data::Strings([&b"a"[..], "\u{e9}".as_bytes()].map(Bytes::from_static).to_vec());
        let texts = Tensor::new("t".into(), DType::Bytes, [2].as_slice().into(), data).unwrap();
        let Request::Grpc { messages, .. } = Protocol::Grpc.request("m", &texts).unwrap() else { panic!() };
        let message = pb::ModelInferRequest::decode(messages[0].clone()).unwrap();
        assert_eq!(message.raw_input_contents[0][..], *b"\x01\0\0\0a\x02\0\0\0\xc3\xa9");
        let Request::Http1(bytes) = Protocol::Json.request("m", &texts).unwrap() else { panic!() };
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("\"data\":[\"a\",\"\u{e9}\"]"), "{text}");
        // However many are sent in turn, all are asked the same way.
        let both = || vec![Protocol::Grpc.request("m", &texts).unwrap(), Protocol::Grpc.request("n", &texts).unwrap()];
        assert_eq!(Request::in_turn(both()).unwrap().messages(), 2);
        let [one, other] = both().try_into().unwrap();
        assert!(Request::in_turn(vec![one, other.with_deadline(std::time::Duration::from_secs(1))]).is_err());
        assert!(Request::in_turn(Vec::new()).is_err());
    }

    #[test]
    fn replies_must_hold_what_they_promise() {
        let json = |data: &str| {
            format!(r#"{{"outputs":[{{"name":"o","datatype":"FP32","shape":[1,2],{data}}}]}}"#).into_bytes()
        };
        assert_eq!(Protocol::Json.outputs(&json(r#""data":[1,2]"#)).unwrap(), ["o FP32 [1, 2]"]);
        assert!(Protocol::Json.outputs(&json(r#""data":[1]"#)).is_err());
        assert!(Protocol::Binary.outputs(&json(r#""data":[1,2]"#)).is_err());
        let sized = json(r#""parameters":{"binary_data_size":8}"#);
        assert!(Protocol::Binary.outputs(&[sized.as_slice(), &[0; 8]].concat()).is_ok());
        assert!(Protocol::Grpc.outputs(b"\0\0\0\0\0").unwrap().is_empty());
    }
}
