//! Open Inference Protocol v2 over gRPC, with Triton's extensions.
//!
//! The generated service's router is served by our own listeners: tonic's transport server answers an expired
//! deadline with CANCELLED. What tonic itself refuses (broken protobuf, too large, unknown compression) is put into
//! our own codes at the edge, so both protocols tell one story.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{Request as HttpRequest, State},
    middleware::Next,
    response::Response as HttpResponse,
};
use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tonic::{Request, Response, Status, codec::CompressionEncoding, metadata::MetadataMap, service::Routes};

use super::{
    App, EXTENSIONS, Record, SERVER_NAME, after, check_size, classify,
    codec::{self, InferReply},
    health, log,
    paced::{Broken, Paced},
    pb, reflection, repository, triton, urgency,
};
use crate::{
    engine,
    error::{Code, Error},
    id::shorten,
    metrics::Protocol,
};
use pb::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};

mod stream;

use stream::Answers;

const INFER_PATH: &str = "/inference.GRPCInferenceService/ModelInfer";
/// Calls whose request bodies hold any number of messages, with pauses between them.
const STREAM_PATHS: [&str; 3] =
    ["/inference.GRPCInferenceService/ModelStreamInfer", reflection::V1, reflection::V1ALPHA];
const ENCODING: &str = "grpc-encoding";
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";
const GRPC_STATUS: &str = "grpc-status";
const GRPC_MESSAGE: &str = "grpc-message";
const GRPC_TIMEOUT: &str = "grpc-timeout";

/// How much later than the handler the edge gives up, so that the handler's more exact answer comes first.
const EDGE_GRACE: Duration = Duration::from_millis(20);

/// Every gRPC service of the data port.
///
/// # Errors
/// `Internal` when the protocol's own descriptors cannot be read.
pub fn router(app: Arc<App>) -> Result<Router, Error> {
    let limit = app.limits.max_message_bytes;
    let inference = GrpcInferenceServiceServer::new(Service { app: app.clone() })
        .max_decoding_message_size(limit)
        .max_encoding_message_size(usize::MAX)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate)
        .send_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Deflate);
    let routes = Routes::new(inference).add_service(health::service(app.clone()));
    let routes = reflection::add(routes)?;
    Ok(routes.prepare().into_axum_router().layer(axum::middleware::from_fn_with_state(app, edge)))
}

/// The record of a request that no handler has picked up yet.
type Unclaimed = Arc<Mutex<Option<Record>>>;

/// What happens to every call before and after tonic sees it.
async fn edge(State(app): State<Arc<App>>, mut request: HttpRequest, next: Next) -> HttpResponse {
    answer_in_kind(request.headers_mut());
    let path = request.uri().path().to_owned();
    let infer = path == INFER_PATH;
    let record = infer.then(|| Record::start(&app, Protocol::Grpc, request.headers()));
    let Ok(timeout) = timeout(request.headers()) else {
        let error = Error::invalid(format!("{GRPC_TIMEOUT} must be up to eight digits and one of H M S m u n"));
        if let Some(record) = record {
            record.finish(Some(error.code));
        }
        return Status::from(error).into_http();
    };
    let deadline = after(Instant::now(), timeout);
    let limit = app.limits.body_timeout;
    let streams = STREAM_PATHS.contains(&path.as_str());
    let pace = |body| match streams {
        true => Paced::of_messages(body, limit, app.closing.clone()),
        false => Paced::new(body, limit),
    };
    let mut request = request.map(|body| Body::new(pace(body).map_err(broken)));
    let unclaimed: Unclaimed = Arc::new(Mutex::new(record));
    request.extensions_mut().insert(unclaimed.clone());
    let call = next.run(request);
    let answer = match deadline {
        None => Ok(call.await),
        Some(deadline) => tokio::time::timeout_at((deadline + EDGE_GRACE).into(), call).await,
    };
    let record = unclaimed.lock().take();
    let Ok(mut response) = answer else {
        let error = Error::new(Code::DeadlineExceeded, "the deadline passed before the request was complete");
        if let Some(record) = record {
            record.finish(Some(error.code));
        }
        return Status::from(error).into_http();
    };
    let Some(code) = refusal(response.headers()) else { return response };
    if code == Code::Unimplemented && !response.headers().contains_key(GRPC_MESSAGE) {
        return Status::unimplemented(format!("there is no method {}", shorten(&path))).into_http();
    }
    // Only what no handler has answered was answered by the library; other services answer for themselves.
    if infer && record.is_none() {
        return response;
    }
    if let Some(record) = record {
        record.finish(Some(code));
    }
    let translated = i32::from(super::status::grpc(code)).to_string();
    if let Ok(value) = HeaderValue::from_str(&translated) {
        response.headers_mut().insert(GRPC_STATUS, value);
    }
    response
}

/// Our code for a call that was refused before any handler saw it.
fn refusal(headers: &HeaderMap) -> Option<Code> {
    let status = headers.get(GRPC_STATUS)?.to_str().ok()?.parse::<i32>().ok()?;
    own_code(tonic::Code::from_i32(status))
}

/// What we call a refusal of tonic's; `None` when it is none.
fn own_code(code: tonic::Code) -> Option<Code> {
    match code {
        tonic::Code::Ok => None,
        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => Some(Code::TooLarge),
        tonic::Code::Internal | tonic::Code::InvalidArgument => Some(Code::InvalidArgument),
        tonic::Code::Unimplemented => Some(Code::Unimplemented),
        tonic::Code::Cancelled | tonic::Code::Unknown => Some(Code::Cancelled),
        tonic::Code::Unauthenticated => Some(Code::Unauthenticated),
        tonic::Code::PermissionDenied => Some(Code::Forbidden),
        tonic::Code::NotFound => Some(Code::NotFound),
        tonic::Code::Unavailable => Some(Code::NotReady),
        tonic::Code::DeadlineExceeded => Some(Code::DeadlineExceeded),
        _ => Some(Code::Internal),
    }
}

/// Answers compressed as the request was and never unasked: Python's clients always claim to accept gzip.
fn answer_in_kind(headers: &mut HeaderMap) {
    match headers.get(ENCODING).cloned() {
        Some(encoding) => headers.insert(ACCEPT_ENCODING, encoding),
        None => headers.remove(ACCEPT_ENCODING),
    };
}

/// What tonic shall answer when a body breaks off.
fn broken(broken: Broken) -> Status {
    match broken {
        Broken::Paused(error) | Broken::Refused(error) => error.into(),
        lost @ Broken::Lost(_) => Status::cancelled(lost.to_string()),
    }
}

/// A header that is there and cannot be read.
struct Malformed;

/// The `grpc-timeout` header.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Malformed> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else { return Ok(None) };
    value.to_str().ok().and_then(parse_timeout).map(Some).ok_or(Malformed)
}

/// When the caller of a call that began at `start` stops waiting; the edge has refused headers that cannot be read.
fn latest(start: Instant, metadata: &MetadataMap) -> Option<Instant> {
    after(start, timeout(metadata.as_ref()).unwrap_or_default())
}

/// Up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[derive(Clone)]
struct Service {
    app: Arc<App>,
}

impl Service {
    fn check_admin<T>(&self, request: &Request<T>) -> Result<(), Error> {
        self.app.check_admin(request.metadata().as_ref(), request.extensions())
    }

    /// Answers one request, which the call that carries it wants to have until `latest`.
    async fn infer(
        &self,
        message: pb::ModelInferRequest,
        latest: Option<Instant>,
        record: &mut Record,
    ) -> Result<pb::ModelInferResponse, Error> {
        record.request_id.clone_from(&message.id);
        let version = Some(message.model_version.as_str());
        let found = self.app.engine.resolve(&message.model_name, version);
        let mut target = found.inspect_err(|_| record.aim_at_unready(&message.model_name, version))?;
        record.aim(&target);
        let call = codec::decode_proto(message)
            .and_then(|call| check_size(call, self.app.limits.max_message_bytes))
            .map_err(|error| error.of_model(target.version.name.as_str()))?;
        let names: Vec<Arc<str>> = call.outputs.iter().map(|output| output.name.clone()).collect();
        let urgency = urgency(record.started(), &call, latest);
        let request = engine::Request { inputs: call.inputs, outputs: &names, urgency };
        let outputs = self.app.engine.infer(&mut target, request).await;
        // It may have run on the successor of the version that was found first.
        record.aim(&target);
        let version = &target.version;
        let outputs = classify(version, &call.outputs, outputs?)?;
        Ok(codec::encode_proto(&InferReply {
            model: version.name.as_str(),
            version: version.version.as_str(),
            id: &call.id,
            outputs: &outputs,
        }))
    }
}

fn unimplemented<T>(what: &str) -> Result<Response<T>, Status> {
    Err(Status::unimplemented(format!("{what} is not supported by this server")))
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<pb::ServerLiveRequest>) -> Answer<pb::ServerLiveResponse> {
        Ok(Response::new(pb::ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<pb::ServerReadyRequest>) -> Answer<pb::ServerReadyResponse> {
        Ok(Response::new(pb::ServerReadyResponse { ready: self.app.is_ready() }))
    }

    async fn model_ready(&self, request: Request<pb::ModelReadyRequest>) -> Answer<pb::ModelReadyResponse> {
        let request = request.into_inner();
        match self.app.engine.resolve(&request.name, Some(&request.version)) {
            Ok(_) => Ok(Response::new(pb::ModelReadyResponse { ready: true })),
            Err(error) if error.code == Code::NotReady => Ok(Response::new(pb::ModelReadyResponse { ready: false })),
            Err(error) => Err(error.into()),
        }
    }

    async fn server_metadata(&self, _: Request<pb::ServerMetadataRequest>) -> Answer<pb::ServerMetadataResponse> {
        Ok(Response::new(pb::ServerMetadataResponse {
            name: SERVER_NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn model_metadata(&self, request: Request<pb::ModelMetadataRequest>) -> Answer<pb::ModelMetadataResponse> {
        let request = request.into_inner();
        let version = self.app.engine.resolve(&request.name, Some(&request.version))?.version;
        let catalog = self.app.engine.catalog().load();
        Ok(Response::new(pb::ModelMetadataResponse {
            name: version.name.to_string(),
            versions: catalog.deployment(&request.name)?.ready_versions(),
            platform: version.platform.to_owned(),
            inputs: triton::metadata_tensors(&version.signature.inputs),
            outputs: triton::metadata_tensors(&version.signature.outputs),
        }))
    }

    async fn model_infer(&self, request: Request<pb::ModelInferRequest>) -> Answer<pb::ModelInferResponse> {
        let unclaimed = request.extensions().get::<Unclaimed>().and_then(|unclaimed| unclaimed.lock().take());
        let Some(mut record) = unclaimed else { return Err(Status::internal("the call came in past the edge")) };
        let latest = latest(record.started(), request.metadata());
        match self.infer(request.into_inner(), latest, &mut record).await {
            Ok(response) => {
                record.finish(None);
                Ok(Response::new(response))
            }
            Err(error) => {
                record.finish(Some(error.code));
                Err(error.into())
            }
        }
    }

    type ModelStreamInferStream = Answers;

    async fn model_stream_infer(
        &self,
        request: Request<tonic::Streaming<pb::ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        Ok(Response::new(Answers::new(self.clone(), request)))
    }

    async fn model_config(&self, request: Request<pb::ModelConfigRequest>) -> Answer<pb::ModelConfigResponse> {
        let request = request.into_inner();
        let version = self.app.engine.resolve(&request.name, Some(&request.version))?.version;
        let catalog = self.app.engine.catalog().load();
        let policy = &catalog.deployment(&request.name)?.policy;
        Ok(Response::new(pb::ModelConfigResponse { config: Some(triton::config(&version, policy)) }))
    }

    async fn model_statistics(
        &self,
        request: Request<pb::ModelStatisticsRequest>,
    ) -> Answer<pb::ModelStatisticsResponse> {
        let request = request.into_inner();
        let catalog = self.app.engine.catalog().load();
        let entries = triton::statistics_of(&catalog, &request.name, &request.version)?;
        let model_stats = entries.iter().map(|(model, entry)| triton::statistics(model, entry)).collect();
        Ok(Response::new(pb::ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<pb::RepositoryIndexRequest>,
    ) -> Answer<pb::RepositoryIndexResponse> {
        let request = request.into_inner();
        let models = repository::index(&self.app, &request.repository_name, request.ready).await?;
        Ok(Response::new(pb::RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<pb::RepositoryModelLoadRequest>,
    ) -> Answer<pb::RepositoryModelLoadResponse> {
        self.check_admin(&request)?;
        let request = request.into_inner();
        repository::load(&self.app, &request.repository_name, &request.model_name, request.parameters).await?;
        Ok(Response::new(pb::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<pb::RepositoryModelUnloadRequest>,
    ) -> Answer<pb::RepositoryModelUnloadResponse> {
        self.check_admin(&request)?;
        let request = request.into_inner();
        repository::unload(&self.app, &request.repository_name, &request.model_name, request.parameters).await?;
        Ok(Response::new(pb::RepositoryModelUnloadResponse {}))
    }

    async fn system_shared_memory_status(
        &self,
        _: Request<pb::SystemSharedMemoryStatusRequest>,
    ) -> Answer<pb::SystemSharedMemoryStatusResponse> {
        unimplemented("shared memory")
    }

    async fn system_shared_memory_register(
        &self,
        _: Request<pb::SystemSharedMemoryRegisterRequest>,
    ) -> Answer<pb::SystemSharedMemoryRegisterResponse> {
        unimplemented("shared memory")
    }

    async fn system_shared_memory_unregister(
        &self,
        _: Request<pb::SystemSharedMemoryUnregisterRequest>,
    ) -> Answer<pb::SystemSharedMemoryUnregisterResponse> {
        unimplemented("shared memory")
    }

    async fn cuda_shared_memory_status(
        &self,
        _: Request<pb::CudaSharedMemoryStatusRequest>,
    ) -> Answer<pb::CudaSharedMemoryStatusResponse> {
        unimplemented("CUDA shared memory")
    }

    async fn cuda_shared_memory_register(
        &self,
        _: Request<pb::CudaSharedMemoryRegisterRequest>,
    ) -> Answer<pb::CudaSharedMemoryRegisterResponse> {
        unimplemented("CUDA shared memory")
    }

    async fn cuda_shared_memory_unregister(
        &self,
        _: Request<pb::CudaSharedMemoryUnregisterRequest>,
    ) -> Answer<pb::CudaSharedMemoryUnregisterResponse> {
        unimplemented("CUDA shared memory")
    }

    async fn trace_setting(&self, _: Request<pb::TraceSettingRequest>) -> Answer<pb::TraceSettingResponse> {
        unimplemented("changing trace settings")
    }

    async fn log_settings(&self, request: Request<pb::LogSettingsRequest>) -> Answer<pb::LogSettingsResponse> {
        if !request.get_ref().settings.is_empty() {
            self.check_admin(&request)?;
        }
        Ok(Response::new(log::message(&log::change(&self.app, request.into_inner().settings)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_parse() {
        assert_eq!(parse_timeout("15m"), Some(Duration::from_millis(15)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse_timeout("1S"), Some(Duration::from_secs(1)));
        for broken in ["", "m", "5", "5x", "123456789m", "-1S"] {
            assert_eq!(parse_timeout(broken), None, "{broken}");
        }
    }

    #[test]
    fn replies_are_compressed_as_requests_are() {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity, deflate, gzip"));
        answer_in_kind(&mut headers);
        assert!(headers.get(ACCEPT_ENCODING).is_none());
        headers.insert(ENCODING, HeaderValue::from_static("gzip"));
        answer_in_kind(&mut headers);
        assert_eq!(headers[ACCEPT_ENCODING], "gzip");
    }
}
