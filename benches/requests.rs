//! Requests of one row, encoded once in each of the three ways, and a look at what comes back.

use anyhow::{Context, Result, ensure};
use prost::Message;
use serde_json::{Value, json};
use tidegate::{
    api::pb,
    tensor::{Data, Tensor},
};

use crate::wire::Request;

pub const HEADER_LENGTH: &str = "inference-header-content-length";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

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
    /// For texts, which no benchmark sends.
    pub fn request(self, model: &str, input: &Tensor) -> Result<Request> {
        let Data::Plain(raw) = &input.data else { anyhow::bail!("input '{}' holds texts", input.name) };
        let (name, datatype, shape) = (&*input.name, input.dtype.name(), &input.shape[..]);
        match self {
            Protocol::Grpc => {
                let message = pb::ModelInferRequest {
                    model_name: model.to_owned(),
                    inputs: vec![pb::model_infer_request::InferInputTensor {
                        name: name.to_owned(),
                        datatype: datatype.to_owned(),
                        shape: shape.iter().map(|&size| size as i64).collect(),
                        ..Default::default()
                    }],
                    raw_input_contents: vec![raw.clone()],
                    ..Default::default()
                };
                Ok(Request::Grpc { path: INFER, message: message.encode_to_vec() })
            }
            Protocol::Json => {
                let data: Vec<f32> = raw
                    .chunks_exact(4)
                    .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                    .collect();
                let body = json!({
                    "inputs": [{ "name": name, "datatype": datatype, "shape": shape, "data": shortest(&data)? }]
                });
                Ok(post(model, "", body.to_string().into_bytes()))
            }
            Protocol::Binary => {
                let parameters = json!({ "binary_data_size": raw.len() });
                let header = json!({
                    "parameters": { "binary_data_output": true },
                    "inputs": [{ "name": name, "datatype": datatype, "shape": shape, "parameters": parameters }],
                });
                let mut body = header.to_string().into_bytes();
                let length = format!("{HEADER_LENGTH}: {}\r\n", body.len());
                body.extend_from_slice(raw);
                Ok(post(model, &length, body))
            }
        }
    }

    /// The label that a reply of `iris`, or of the echo, holds.
    ///
    /// # Errors
    /// When it is no such reply.
    pub fn label(self, body: &[u8]) -> Result<i64> {
        let number = |bytes: &[u8]| -> Result<i64> {
            Ok(i64::from_le_bytes(bytes.get(..8).and_then(|bytes| bytes.try_into().ok()).context("no label")?))
        };
        match self {
            Protocol::Grpc => {
                let message = pb::ModelInferResponse::decode(body.get(5..).context("no message")?)?;
                let names: Vec<_> = message.outputs.iter().map(|output| output.name.as_str()).collect();
                ensure!(names == ["label", "probabilities"], "the outputs are {names:?}");
                number(message.raw_output_contents.first().context("no label")?)
            }
            Protocol::Json => {
                let value: Value = serde_json::from_slice(body)?;
                value["outputs"][0]["data"][0].as_i64().with_context(|| format!("no label in {value}"))
            }
            Protocol::Binary => {
                let end = body.len().checked_sub(8 + 3 * size_of::<f32>()).context("no room for the outputs")?;
                let header: Value = serde_json::from_slice(&body[..end])?;
                ensure!(header["outputs"][0]["name"] == "label", "no label in {header}");
                number(&body[end..])
            }
        }
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

/// The elements as a person would write them: 0.2, and not 0.20000000298023224.
fn shortest(data: &[f32]) -> Result<Value> {
    Ok(serde_json::from_str(&serde_json::to_string(data)?)?)
}

fn post(model: &str, extra: &str, body: Vec<u8>) -> Request {
    let head = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nhost: localhost\r\nuser-agent: tidegate-bench\r\n\
         content-length: {}\r\n{extra}\r\n",
        body.len()
    );
    Request::Http1([head.into_bytes(), body].concat())
}
