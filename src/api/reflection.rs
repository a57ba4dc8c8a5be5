//! `grpc.reflection.v1` and `v1alpha`: what the services look like, for clients without our .proto files.
//!
//! The server of tonic-reflection ends the stream with the first question that has no answer, over which Python's
//! descriptor pool stumbles. Ours says so in the answer's place, as the protocol has it, and goes on. It answers one
//! question after the other, each when the connection has room for the answer.

use std::{pin::Pin, sync::LazyLock};

use axum::extract::Request as HttpRequest;
use http::Uri;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming, service::Routes};
use tonic_reflection::pb::{
    v1::{
        ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse, ServerReflectionRequest,
        ServerReflectionResponse, ServiceResponse,
        server_reflection_request::MessageRequest,
        server_reflection_response::MessageResponse,
        server_reflection_server::{ServerReflection, ServerReflectionServer},
    },
    {v1, v1alpha},
};
use tower::ServiceExt;

use super::{health, status};
use crate::error::Error;

mod files;

use files::Files;

/// The only method of each service.
pub const V1: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
pub const V1ALPHA: &str = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

/// Everything that is served, each file after those it needs. Both versions of the service list the same.
const DESCRIPTORS: [&[u8]; 4] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin")),
    health::DESCRIPTORS,
    v1::FILE_DESCRIPTOR_SET,
    v1alpha::FILE_DESCRIPTOR_SET,
];

/// Read with the first question: most servers are never asked, and the index of all symbols takes 2 MB.
static FILES: LazyLock<Result<Files, Error>> = LazyLock::new(|| Files::read(&DESCRIPTORS));

/// Adds both services; a question may have up to `limit` bytes.
pub fn add(routes: Routes, limit: usize) -> Routes {
    let service = ServerReflectionServer::new(Reflection).max_decoding_message_size(limit);
    // The messages of both versions are the same, byte for byte: the older one is the newer one by another name.
    let older = service.clone().map_request(|mut request: HttpRequest| {
        *request.uri_mut() = Uri::from_static(V1);
        request
    });
    let mut routes = routes.add_service(service);
    let router = routes.axum_router_mut();
    *router = std::mem::take(router).route_service(V1ALPHA, older);
    routes
}

struct Reflection;

#[tonic::async_trait]
impl ServerReflection for Reflection {
    type ServerReflectionInfoStream = Pin<Box<dyn Stream<Item = Result<ServerReflectionResponse, Status>> + Send>>;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<ServerReflectionRequest>>,
    ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
        let answers = request.into_inner().map(|question| match question {
            Ok(question) => Ok(answer(&FILES, question)),
            Err(refused) => Err(status::failure(&refused).into()),
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

fn answer(files: &Result<Files, Error>, question: ServerReflectionRequest) -> ServerReflectionResponse {
    let files = files.as_ref().map_err(Error::clone);
    let found = files.and_then(|files| find(files, question.message_request.as_ref())).unwrap_or_else(|error| {
        let error_code = status::grpc(error.code).into();
        MessageResponse::ErrorResponse(ErrorResponse { error_code, error_message: error.message })
    });
    ServerReflectionResponse {
        valid_host: question.host.clone(),
        original_request: Some(question),
        message_response: Some(found),
    }
}

fn find(files: &Files, question: Option<&MessageRequest>) -> Result<MessageResponse, Error> {
    let file = match question {
        Some(MessageRequest::FileByFilename(name)) => files.named(name)?,
        Some(MessageRequest::FileContainingSymbol(symbol)) => files.declaring(symbol)?,
        Some(MessageRequest::FileContainingExtension(extension)) => {
            files.extending(&extension.containing_type, extension.extension_number)?
        }
        Some(MessageRequest::AllExtensionNumbersOfType(message)) => {
            let extension_number = files.extensions(message)?;
            let base_type_name = message.clone();
            let numbers = ExtensionNumberResponse { base_type_name, extension_number };
            return Ok(MessageResponse::AllExtensionNumbersResponse(numbers));
        }
        Some(MessageRequest::ListServices(_)) => {
            let service = files.services().map(|name| ServiceResponse { name }).collect();
            return Ok(MessageResponse::ListServicesResponse(ListServiceResponse { service }));
        }
        None => return Err(Error::invalid("the message_request of a question must be one that this server knows")),
    };
    let file_descriptor_proto = files::with_dependencies(file);
    Ok(MessageResponse::FileDescriptorResponse(FileDescriptorResponse { file_descriptor_proto }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_symbol_has_its_file() {
        let files = Files::read(&DESCRIPTORS).unwrap();
        for (symbol, file) in [
            ("inference.GRPCInferenceService", "inference.proto"),
            ("inference.GRPCInferenceService.ModelInfer", "inference.proto"),
            ("inference.ModelInferRequest.InferInputTensor", "inference.proto"),
            ("inference.ModelInferRequest.InferInputTensor.datatype", "inference.proto"),
            ("inference.InferParameter.parameter_choice", "inference.proto"),
            ("inference.ModelConfig", "model_config.proto"),
            ("inference.DataType", "model_config.proto"),
            ("inference.TYPE_FP32", "model_config.proto"),
            ("grpc.health.v1.HealthCheckResponse.SERVING", "health.proto"),
            ("grpc.reflection.v1.ServerReflection", "reflection_v1.proto"),
            ("grpc.reflection.v1alpha.ServerReflection", "reflection_v1alpha.proto"),
        ] {
            assert_eq!(files.declaring(symbol).map(|file| file.name().to_owned()).as_deref(), Ok(file), "{symbol}");
        }
        for symbol in ["", "inference", "inference.", ".inference.ModelConfig", "inference.DataType.TYPE_FP32"] {
            assert!(files.declaring(symbol).is_err(), "{symbol}");
        }
    }

    #[test]
    fn a_question_without_content_is_answered() {
        let question = ServerReflectionRequest { host: "here".to_owned(), message_request: None };
        let answer = answer(&FILES, question.clone());
        assert_eq!((answer.valid_host.as_str(), answer.original_request), ("here", Some(question)));
        let Some(MessageResponse::ErrorResponse(error)) = answer.message_response else { panic!("no error") };
        assert_eq!(error.error_code, i32::from(tonic::Code::InvalidArgument));
    }
}
