//! Open Inference Protocol v2 over gRPC, with Triton's extensions.
//!
//! The generated service's router is served by our own listeners: tonic's transport server answers an expired
//! deadline with CANCELLED. `ModelInfer` is answered in front of that router (`infer`); every other call passes `edge`.

use std::{sync::Arc, time::Instant};

use tonic::{Request, Response, Status, codec::CompressionEncoding, service::Routes as Services};

use super::{
    App, Caller, Record, SERVER_NAME, check_size, classify,
    codec::{self, InferCall, InferReply, RequestedOutput},
    health,
    listen::{Inference, Routes},
    log, pb, reflection, repository,
    shared_memory::{Places, Reach},
    triton, urgency,
};
use crate::{
    engine::{self, Target},
    error::{Code, Error},
    model::ModelVersion,
    tensor::Tensor,
    text,
};
use pb::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};

pub(super) mod edge;
pub(super) mod infer;
mod stream;
pub(super) mod unary;

use edge::Unclaimed;
use stream::Answers;

/// Every gRPC service of the data port.
pub fn routes(app: Arc<App>) -> Routes {
    let limit = app.limits.max_message_bytes;
    let inference = GrpcInferenceServiceServer::new(Service { app: app.clone() })
        .max_decoding_message_size(limit)
        .max_encoding_message_size(usize::MAX)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate)
        .send_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Deflate);
    let services = Services::new(inference).add_service(health::service(app.clone()));
    let services = reflection::add(services, limit);
    let router = services.prepare().into_axum_router();
    let router = router.layer(axum::middleware::from_fn_with_state(app.clone(), edge::edge));
    Routes::from(router).with_inference(Inference::Grpc(app))
}

#[derive(Clone)]
struct Service {
    app: Arc<App>,
}

/// What a request was answered with.
struct Answered {
    version: Arc<ModelVersion>,
    id: String,
    /// What was asked for; empty for everything.
    wanted: Vec<RequestedOutput>,
    outputs: Vec<Tensor>,
}

impl Service {
    /// What of shared memory the caller may use.
    fn reach<T>(&self, request: &Request<T>) -> Reach {
        Reach::of(&self.app, request.metadata().as_ref(), request.extensions().get())
    }

    /// Answers one request, which the call that carries it wants to have until `latest`.
    async fn infer(
        &self,
        message: pb::ModelInferRequest,
        latest: Option<Instant>,
        caller: Caller<'_>,
        reach: &Reach,
        record: &mut Record,
    ) -> Result<pb::ModelInferResponse, Error> {
        let (target, call, places) = prepare(&self.app, message, caller, reach, record)?;
        let Answered { version, id, wanted, outputs } = self.run(target, call, latest, record).await?;
        let (model, version) = (version.name.as_str(), version.version.as_str());
        places.fill(&outputs).map_err(|error| error.of_model(model))?;
        Ok(codec::encode_proto(&InferReply { model, version, id: &id, outputs: &outputs }, &wanted))
    }

    /// Runs a call on `target`, or on its successor.
    #[expect(clippy::manual_async_fn, reason = "an async fn keeps what it is given twice")]
    fn run(
        &self,
        mut target: Target,
        mut call: InferCall,
        latest: Option<Instant>,
        record: &mut Record,
    ) -> impl Future<Output = Result<Answered, Error>> {
        async move {
            let urgency = urgency(record, &call, latest);
            let names: Vec<Arc<str>> = call.outputs.iter().map(|output| output.name.clone()).collect();
            let (started, protocol) = (record.started(), record.protocol());
            let request = engine::Request {
                inputs: std::mem::take(&mut call.inputs),
                outputs: &names,
                urgency,
                text: text::Wish::NONE,
                started,
                protocol,
            };
            let outputs = self.app.engine.infer(&mut target, request).await;
            // It may have run on the successor of the version that was found first.
            record.aim(&target);
            let outputs = classify(&target.version, &call.outputs, outputs?)?;
            Ok(Answered { version: target.version, id: call.id, wanted: call.outputs, outputs })
        }
    }
}

/// Finds the version that a request is for, and reads the rest of it.
fn prepare(
    app: &App,
    message: pb::ModelInferRequest,
    caller: Caller<'_>,
    reach: &Reach,
    record: &mut Record,
) -> Result<(Target, InferCall, Places), Error> {
    record.request_id.clone_from(&message.id);
    let mut target = record.resolve(&message.model_name, Some(&message.model_version), caller)?;
    let mut places = Places::default();
    let call = codec::decode_proto(message).and_then(|mut call| {
        places = reach.fetch(&mut call, app.limits.max_message_bytes)?;
        Ok(call)
    });
    let call = check(app, &target, call)?;
    record.draw(&mut target, &call);
    Ok((target, call, places))
}

/// What was read of a request for `target`, if it can be run; what is wrong with it names the model.
fn check(app: &App, target: &Target, call: Result<InferCall, Error>) -> Result<InferCall, Error> {
    call.and_then(|call| check_size(call, app.limits.max_message_bytes))
        .map_err(|error| error.of_model(target.version.name.as_str()))
}

fn unimplemented<T>(what: &str) -> Result<Response<T>, Status> {
    Err(Error::new(Code::Unimplemented, format!("{what} is not supported by this server")).into())
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
        match self.app.engine.find(&request.name, Some(&request.version)) {
            Ok(_) => Ok(Response::new(pb::ModelReadyResponse { ready: true })),
            Err(error) if error.code == Code::NotReady => Ok(Response::new(pb::ModelReadyResponse { ready: false })),
            Err(error) => Err(error.into()),
        }
    }

    async fn server_metadata(&self, _: Request<pb::ServerMetadataRequest>) -> Answer<pb::ServerMetadataResponse> {
        Ok(Response::new(pb::ServerMetadataResponse {
            name: SERVER_NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: self.app.extensions().into_iter().map(str::to_owned).collect(),
        }))
    }

    async fn model_metadata(&self, request: Request<pb::ModelMetadataRequest>) -> Answer<pb::ModelMetadataResponse> {
        let request = request.into_inner();
        let version = self.app.engine.find(&request.name, Some(&request.version))?;
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
        let Some(mut record) = unclaimed else { return Err(Error::internal("the call came in past the edge").into()) };
        let latest = edge::latest(record.started(), request.metadata());
        let reach = self.reach(&request);
        let (metadata, extensions, message) = request.into_parts();
        let caller = Caller { headers: metadata.as_ref(), peer: extensions.get() };
        let answer = self.infer(message, latest, caller, &reach, &mut record).await;
        let failure = answer.as_ref().err().map(|error| error.code);
        let mut answer = answer.map(Response::new).map_err(Status::from);
        record.mark(match &mut answer {
            Ok(response) => response.metadata_mut().as_mut(),
            Err(status) => status.metadata_mut().as_mut(),
        });
        record.finish(failure);
        answer
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
        let version = self.app.engine.find(&request.name, Some(&request.version))?;
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
        let request = request.into_inner();
        repository::load(&self.app, &request.repository_name, &request.model_name, request.parameters).await?;
        Ok(Response::new(pb::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<pb::RepositoryModelUnloadRequest>,
    ) -> Answer<pb::RepositoryModelUnloadResponse> {
        let request = request.into_inner();
        repository::unload(&self.app, &request.repository_name, &request.model_name, request.parameters).await?;
        Ok(Response::new(pb::RepositoryModelUnloadResponse {}))
    }

    async fn system_shared_memory_status(
        &self,
        request: Request<pb::SystemSharedMemoryStatusRequest>,
    ) -> Answer<pb::SystemSharedMemoryStatusResponse> {
        let regions = self.reach(&request).status(&request.get_ref().name)?;
        let regions = regions.into_iter().map(|region| (region.name.clone(), region)).collect();
        Ok(Response::new(pb::SystemSharedMemoryStatusResponse { regions }))
    }

    async fn system_shared_memory_register(
        &self,
        request: Request<pb::SystemSharedMemoryRegisterRequest>,
    ) -> Answer<pb::SystemSharedMemoryRegisterResponse> {
        self.reach(&request).register(request.get_ref())?;
        Ok(Response::new(pb::SystemSharedMemoryRegisterResponse {}))
    }

    async fn system_shared_memory_unregister(
        &self,
        request: Request<pb::SystemSharedMemoryUnregisterRequest>,
    ) -> Answer<pb::SystemSharedMemoryUnregisterResponse> {
        self.reach(&request).unregister(&request.get_ref().name)?;
        Ok(Response::new(pb::SystemSharedMemoryUnregisterResponse {}))
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
            self.app.check_admin(request.metadata().as_ref(), request.extensions().get())?;
        }
        Ok(Response::new(log::message(&log::change(&self.app, request.into_inner().settings)?)))
    }
}
