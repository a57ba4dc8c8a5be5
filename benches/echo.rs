//! Our own stack without a model: the accept code, runtimes, HTTP settings, generated service and allocator of the
//! server. Every request is decoded in full, and every reply is built anew, named and sized as that of the model asked.
//!
//! The difference to the server is what finding, checking, queueing and running a model costs.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path},
    response::{IntoResponse, Response as HttpResponse},
    routing::post,
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, Serialize};
use tidegate::{
    api::{
        LimitsConfig,
        listen::{IoThreads, Port, Wire},
        pb::{
            self,
            grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
        },
    },
    tensor::DType,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

use crate::{
    answers::{self, Row},
    requests::HEADER_LENGTH,
};

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
        // As many threads as the server has by itself on fewer than four cores.
        let (io, _threads) = IoThreads::start(1, &limits, &never, &never)?;
        let service = GrpcInferenceServiceServer::new(Echo).max_decoding_message_size(limits.max_message_bytes);
        let grpc = Routes::new(service).prepare().into_axum_router();
        let rest = Router::new()
            .route("/v2/models/{model}/infer", post(infer))
            .layer(DefaultBodyLimit::max(limits.max_message_bytes));
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
    let outputs = answers::of(&request.model_name).ok_or_else(|| Status::not_found(request.model_name.clone()))?;
    let input = request.inputs.first().ok_or_else(|| Status::invalid_argument("no input"))?;
    let raw = request.raw_input_contents.first().ok_or_else(|| Status::invalid_argument("no contents"))?;
    Ok(pb::ModelInferResponse {
        model_version: "1".to_owned(),
        outputs: outputs
            .iter()
            .map(|output| pb::model_infer_response::InferOutputTensor {
                name: output.name.to_owned(),
                datatype: output.row.datatype().to_owned(),
                shape: output.row.shape(&input.shape),
                ..Default::default()
            })
            .collect(),
        raw_output_contents: outputs.iter().map(|output| output.row.bytes(&input.shape, raw)).collect(),
        model_name: request.model_name,
        id: request.id,
        ..Default::default()
    })
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
    Scores(Vec<f32>),
}

impl Elements {
    /// All rows of an output.
    fn new(row: &Row, shape: &[i64], input: Vec<f32>) -> Self {
        let rows = shape.first().map_or(1, |&rows| rows as usize);
        match row {
            Row::Label(label) => Elements::Labels(vec![*label; rows]),
            Row::Scores(scores) => Elements::Scores(scores.repeat(rows)),
            Row::Input => Elements::Scores(input),
        }
    }
}

async fn infer(Path(model): Path<String>, headers: HeaderMap, body: Bytes) -> HttpResponse {
    let length = headers.get(HEADER_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    rest_reply(&model, length, &body)
        .unwrap_or_else(|error| (StatusCode::BAD_REQUEST, format!("{error:#}")).into_response())
}

fn rest_reply(model: &str, header_length: Option<usize>, body: &Bytes) -> Result<HttpResponse> {
    let outputs = answers::of(model).with_context(|| format!("no model '{model}'"))?;
    let json = body.get(..header_length.unwrap_or(body.len())).context("the header is longer than the body")?;
    let Call { id, inputs } = serde_json::from_slice(json)?;
    let input = inputs.into_iter().next().context("no input")?;
    let width = DType::parse(&input.datatype).and_then(DType::size).context("no datatype of a fixed size")?;
    let given = match (&input.data, input.parameters.binary_data_size) {
        (Some(data), None) => data.len() * width,
        (None, Some(size)) if size == body.len() - json.len() => size,
        _ => anyhow::bail!("input '{}' has no data", input.name),
    };
    let expected = input.shape.iter().product::<i64>() as usize * width;
    anyhow::ensure!(given == expected, "input '{}' has the wrong size", input.name);

    let answer = |outputs| Answer { model_name: model, model_version: "1", id, outputs };
    let (data, raw) = (input.data.unwrap_or_default(), body.slice(json.len()..));
    if header_length.is_none() {
        // Only one output may be the input itself, and so the input moves into it.
        let mut data = Some(data);
        let outputs = outputs.iter().map(|output| {
            let shape = output.row.shape(&input.shape);
            let own = if matches!(output.row, Row::Input) { data.take() } else { None };
            let elements = Elements::new(&output.row, &shape, own.unwrap_or_default());
            Output { name: output.name, datatype: output.row.datatype(), shape, parameters: None, data: Some(elements) }
        });
        return Ok(Json(answer(outputs.collect())).into_response());
    }
    let contents: Vec<Bytes> = outputs.iter().map(|output| output.row.bytes(&input.shape, &raw)).collect();
    let outputs = outputs.iter().zip(&contents).map(|(output, content)| Output {
        name: output.name,
        datatype: output.row.datatype(),
        shape: output.row.shape(&input.shape),
        parameters: Some(Parameters { binary_data_size: Some(content.len()) }),
        data: None,
    });
    let mut body = serde_json::to_vec(&answer(outputs.collect()))?;
    let length = body.len();
    body.reserve_exact(contents.iter().map(Bytes::len).sum());
    contents.iter().for_each(|content| body.extend_from_slice(content));
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
