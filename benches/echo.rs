//! Our own stack without a model: the accept code, runtimes, HTTP settings, generated service and allocator of the
//! server. Every request is decoded in full, and every reply is built anew, named and sized as the model's: those of
//! `iris`, or for a model named `stub` one output with the elements that came in.
//!
//! The difference to the server is what finding, checking, queueing and running a model costs.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    extract::Path,
    response::{IntoResponse, Response as HttpResponse},
    routing::post,
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, Serialize};
use tidegate::api::{
    LimitsConfig,
    listen::{IoThreads, Port, Wire},
    pb::{
        self,
        grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

use crate::{requests::HEADER_LENGTH, stub};

const LABEL: i64 = 1;
const PROBABILITIES: [f32; 3] = [0.01, 0.94, 0.05];

/// The echo with its ports open.
pub struct Server {
    rest: Port,
    grpc: Port,
}

impl Server {
    /// # Errors
    /// When a port cannot be opened.
    pub fn bind() -> Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(Self { rest: Port::bind(any, "nothing: it is free")?, grpc: Port::bind(any, "nothing: it is free")? })
    }

    /// Of REST and of gRPC.
    pub fn addresses(&self) -> [SocketAddr; 2] {
        [self.rest.address, self.grpc.address]
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn serve(self) -> Result<()> {
        let limits = LimitsConfig::default();
        let never = CancellationToken::new();
        // As many threads as the server has by itself on one core.
        let (io, _threads) = IoThreads::start(1, &limits, &never, &never)?;
        let service = GrpcInferenceServiceServer::new(Echo).max_decoding_message_size(limits.max_message_bytes);
        let grpc = Routes::new(service).prepare().into_axum_router();
        let rest = Router::new().route("/v2/models/{model}/infer", post(infer));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            tokio::join!(
                io.accept(self.rest, rest, Wire::Http, never.clone()),
                io.accept(self.grpc, grpc, Wire::Grpc, never.clone())
            );
        });
        Ok(())
    }
}

struct Echo;

fn grpc_reply(request: pb::ModelInferRequest) -> Result<pb::ModelInferResponse, Status> {
    let input = request.inputs.first().ok_or_else(|| Status::invalid_argument("no input"))?;
    let rows = input.shape.first().copied().unwrap_or(1);
    let output = |name: &str, datatype: &str, shape: Vec<i64>| pb::model_infer_response::InferOutputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape,
        ..Default::default()
    };
    let (outputs, raw_output_contents) = if request.model_name == stub::MODEL {
        (vec![output(stub::OUTPUT, "FP32", input.shape.clone())], request.raw_input_contents)
    } else {
        let (labels, probabilities) = raw_outputs(rows);
        let outputs = vec![output("label", "INT64", vec![rows]), output("probabilities", "FP32", vec![rows, 3])];
        (outputs, vec![labels, probabilities])
    };
    Ok(pb::ModelInferResponse {
        model_name: request.model_name,
        model_version: "1".to_owned(),
        id: request.id,
        outputs,
        raw_output_contents,
        ..Default::default()
    })
}

fn raw_outputs(rows: i64) -> (Bytes, Bytes) {
    let labels = (0..rows).flat_map(|_| LABEL.to_le_bytes()).collect();
    let probabilities = (0..rows).flat_map(|_| PROBABILITIES).flat_map(f32::to_le_bytes).collect();
    (labels, probabilities)
}

#[derive(Deserialize)]
struct Call {
    #[serde(default)]
    id: String,
    inputs: Vec<Input>,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    data: Option<Vec<f32>>,
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Default, Deserialize, Serialize)]
struct Parameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    binary_data_size: Option<usize>,
}

#[derive(Serialize)]
struct Answer<'a> {
    model_name: &'a str,
    model_version: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    id: String,
    outputs: Vec<Output>,
}

#[derive(Serialize)]
struct Output {
    name: &'static str,
    datatype: &'static str,
    shape: Vec<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<Parameters>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Elements>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Elements {
    Labels(Vec<i64>),
    Floats(Vec<f32>),
}

async fn infer(Path(model): Path<String>, headers: HeaderMap, body: Bytes) -> HttpResponse {
    let length = headers.get(HEADER_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    rest_reply(&model, length, &body)
        .unwrap_or_else(|error| (StatusCode::BAD_REQUEST, format!("{error:#}")).into_response())
}

fn rest_reply(model: &str, header_length: Option<usize>, body: &Bytes) -> Result<HttpResponse> {
    let json = body.get(..header_length.unwrap_or(body.len())).context("the header is longer than the body")?;
    let mut call: Call = serde_json::from_slice(json)?;
    let input = call.inputs.first_mut().context("no input")?;
    let given = match (&input.data, input.parameters.binary_data_size) {
        (Some(data), None) => data.len() * size_of::<f32>(),
        (None, Some(size)) if size == body.len() - json.len() => size,
        _ => anyhow::bail!("input '{}' has no data", input.name),
    };
    let expected = input.shape.iter().product::<i64>() as usize * size_of::<f32>();
    anyhow::ensure!(input.datatype == "FP32" && given == expected, "input '{}' has the wrong size", input.name);

    let rows = input.shape.first().copied().unwrap_or(1);
    let (shape, elements) = (input.shape.clone(), input.data.take());
    let answer = |outputs| Answer { model_name: model, model_version: "1", id: call.id.clone(), outputs };
    let output = |name, datatype, shape, size: Option<usize>, data| Output {
        name,
        datatype,
        shape,
        parameters: size.map(|size| Parameters { binary_data_size: Some(size) }),
        data,
    };
    if model == stub::MODEL {
        return if header_length.is_none() {
            let output = output(stub::OUTPUT, "FP32", shape, None, elements.map(Elements::Floats));
            Ok(Json(answer(vec![output])).into_response())
        } else {
            let raw = &body[json.len()..];
            binary(&answer(vec![output(stub::OUTPUT, "FP32", shape, Some(raw.len()), None)]), &[raw])
        };
    }
    if header_length.is_none() {
        let labels = Elements::Labels((0..rows).map(|_| LABEL).collect());
        let probabilities = Elements::Floats((0..rows).flat_map(|_| PROBABILITIES).collect());
        let outputs = vec![
            output("label", "INT64", vec![rows], None, Some(labels)),
            output("probabilities", "FP32", vec![rows, 3], None, Some(probabilities)),
        ];
        return Ok(Json(answer(outputs)).into_response());
    }
    let (labels, probabilities) = raw_outputs(rows);
    let outputs = vec![
        output("label", "INT64", vec![rows], Some(labels.len()), None),
        output("probabilities", "FP32", vec![rows, 3], Some(probabilities.len()), None),
    ];
    binary(&answer(outputs), &[&labels, &probabilities])
}

fn binary(answer: &Answer<'_>, outputs: &[&[u8]]) -> Result<HttpResponse> {
    let mut body = serde_json::to_vec(answer)?;
    let length = body.len();
    outputs.iter().for_each(|output| body.extend_from_slice(output));
    let headers = [(header::CONTENT_TYPE.as_str(), "application/octet-stream"), (HEADER_LENGTH, &length.to_string())];
    Ok((headers, body).into_response())
}

/// The service with one method that answers and others that do not; the attribute must see them all.
macro_rules! answer_only_inference {
    ($($method:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl GrpcInferenceService for Echo {
            async fn model_infer(
                &self,
                request: Request<pb::ModelInferRequest>,
            ) -> Result<Response<pb::ModelInferResponse>, Status> {
                grpc_reply(request.into_inner()).map(Response::new)
            }

            type ModelStreamInferStream = tonic::codegen::BoxStream<pb::ModelStreamInferResponse>;

            async fn model_stream_infer(
                &self,
                _: Request<tonic::Streaming<pb::ModelInferRequest>>,
            ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
                Err(Status::unimplemented("the echo only infers"))
            }

            $(async fn $method(&self, _: Request<pb::$request>) -> Result<Response<pb::$response>, Status> {
                Err(Status::unimplemented("the echo only infers"))
            })*
        }
    };
}

answer_only_inference! {
    server_live(ServerLiveRequest) -> ServerLiveResponse;
    server_ready(ServerReadyRequest) -> ServerReadyResponse;
    server_metadata(ServerMetadataRequest) -> ServerMetadataResponse;
    model_ready(ModelReadyRequest) -> ModelReadyResponse;
    model_metadata(ModelMetadataRequest) -> ModelMetadataResponse;
    model_config(ModelConfigRequest) -> ModelConfigResponse;
    model_statistics(ModelStatisticsRequest) -> ModelStatisticsResponse;
    repository_index(RepositoryIndexRequest) -> RepositoryIndexResponse;
    repository_model_load(RepositoryModelLoadRequest) -> RepositoryModelLoadResponse;
    repository_model_unload(RepositoryModelUnloadRequest) -> RepositoryModelUnloadResponse;
    system_shared_memory_status(SystemSharedMemoryStatusRequest) -> SystemSharedMemoryStatusResponse;
    system_shared_memory_register(SystemSharedMemoryRegisterRequest) -> SystemSharedMemoryRegisterResponse;
    system_shared_memory_unregister(SystemSharedMemoryUnregisterRequest) -> SystemSharedMemoryUnregisterResponse;
    cuda_shared_memory_status(CudaSharedMemoryStatusRequest) -> CudaSharedMemoryStatusResponse;
    cuda_shared_memory_register(CudaSharedMemoryRegisterRequest) -> CudaSharedMemoryRegisterResponse;
    cuda_shared_memory_unregister(CudaSharedMemoryUnregisterRequest) -> CudaSharedMemoryUnregisterResponse;
    trace_setting(TraceSettingRequest) -> TraceSettingResponse;
    log_settings(LogSettingsRequest) -> LogSettingsResponse;
}
