//! `ModelStreamInfer`: any number of requests on one call, each answered once, in the order they came.
//!
//! Up to `limits.max_stream_requests` requests of a stream run side by side, as long as they and the answers that are
//! ready hold no more than `limits.max_message_bytes`; then nothing is read until an answer has left. The connection
//! pulls the answers, so a client that reads none is not read from either, and flow control makes it wait.
//!
//! A request that fails says so in its place and the stream goes on, unless the client asked for the stream to end
//! with the first failure (`triton_grpc_error: true`). What cannot be read as a request always ends the stream, after
//! the answers to the requests before it.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use prost::Message;
use tokio::time::Sleep;
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Status, Streaming};

use super::{
    Service,
    edge::{EDGE_GRACE, latest},
};
use crate::{
    api::{
        Caller, Record,
        auth::Peer,
        pb::{
            InferParameter, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
            infer_parameter::ParameterChoice,
        },
        shared_memory::Reach,
        status,
    },
    error::{Code, Error},
    metrics::Protocol,
    model::batcher::Client,
};

/// The metadata key that asks for failures as the status of the call.
const ERRORS_END_THE_STREAM: &str = "triton_grpc_error";

/// The parameter of an answer that none follows to its request.
const FINAL: &str = "triton_final_response";

/// The answers to a stream of requests.
pub(super) struct Answers {
    service: Service,
    /// What the call began with, for the records of its requests.
    headers: Arc<HeaderMap>,
    peer: Option<Peer>,
    client: Client,
    /// What of shared memory its requests may use.
    reach: Arc<Reach>,
    /// `None` when there are no more.
    requests: Option<Streaming<ModelInferRequest>>,
    /// Oldest first. Dropping one gives it up.
    running: VecDeque<Running>,
    /// Bytes of the requests that run and of the answers that are ready.
    held: Arc<AtomicUsize>,
    /// When the client stops waiting.
    latest: Option<Instant>,
    /// A little later, so that requests that are late can say so themselves.
    end_of_time: Option<Pin<Box<Sleep>>>,
    errors_end_the_stream: bool,
    /// What the stream ends with once everything is answered.
    end: Option<Status>,
}

/// A request on its way.
struct Running {
    id: String,
    /// What went wrong, and the answer in its place.
    answer: AbortOnDropHandle<(Option<Error>, ModelInferResponse, Held)>,
}

impl Answers {
    pub(super) fn new(service: Service, request: Request<Streaming<ModelInferRequest>>) -> Self {
        let reach = Arc::new(service.reach(&request));
        let (metadata, extensions, requests) = request.into_parts();
        let client = service.app.clients.of(metadata.as_ref(), extensions.get());
        let latest = latest(Instant::now(), &metadata);
        let asked = metadata.get(ERRORS_END_THE_STREAM);
        Self {
            service,
            client,
            reach,
            requests: Some(requests),
            running: VecDeque::new(),
            held: Arc::default(),
            latest,
            end_of_time: latest.map(|latest| Box::pin(tokio::time::sleep_until((latest + EDGE_GRACE).into()))),
            errors_end_the_stream: asked.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true")),
            end: None,
            headers: Arc::new(metadata.into_headers()),
            peer: extensions.get().copied(),
        }
    }

    /// Starts the requests that are there, as far as there is room and time.
    fn read(&mut self, context: &mut Context<'_>) {
        if self.latest.is_some_and(|latest| latest + EDGE_GRACE <= Instant::now()) {
            return;
        }
        while self.has_room() {
            let Some(requests) = &mut self.requests else { return };
            match Pin::new(requests).poll_next(context) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(message))) => self.start(message),
                Poll::Ready(Some(Err(status))) => return self.stop_reading(&status),
                Poll::Ready(None) => self.requests = None,
            }
        }
    }

    /// One request may always run, however large it is.
    fn has_room(&self) -> bool {
        let limits = &self.service.app.limits;
        self.running.is_empty()
            || (self.running.len() < limits.max_stream_requests
                && self.held.load(Ordering::Relaxed) < limits.max_message_bytes)
    }

    fn start(&mut self, message: ModelInferRequest) {
        let mut record = Record::start(&self.service.app, Protocol::Grpc, &self.headers, self.client);
        let id = message.id.clone();
        let mut held = Held::new(&self.held, message.encoded_len());
        let (service, reach, latest) = (self.service.clone(), self.reach.clone(), self.latest);
        let (headers, peer) = (self.headers.clone(), self.peer);
        let answer = AbortOnDropHandle::new(tokio::spawn(async move {
            let caller = Caller { headers: &headers, peer: peer.as_ref() };
            let (failure, mut response) = match service.infer(message, latest, caller, &reach, &mut record).await {
                Ok(response) => (None, response),
                Err(error) => (Some(error), ModelInferResponse::default()),
            };
            // One call's metadata cannot tell them for all answers.
            record.tell(|name, text| set(&mut response, name.as_str(), ParameterChoice::StringParam(text.to_owned())));
            held.change(response.encoded_len());
            record.finish(failure.as_ref().map(|error| error.code));
            (failure, response, held)
        }));
        self.running.push_back(Running { id, answer });
    }

    /// The stream will end with what was wrong with the body.
    fn stop_reading(&mut self, refused: &Status) {
        self.requests = None;
        let failure = status::failure(refused);
        // That the server stops is no request that failed.
        if failure.code != Code::NotReady {
            Record::start(&self.service.app, Protocol::Grpc, &self.headers, self.client).finish(Some(failure.code));
        }
        self.end = Some(failure.into());
    }

    fn answer(
        &mut self,
        id: String,
        failure: Option<Error>,
        mut response: ModelInferResponse,
    ) -> Result<ModelStreamInferResponse, Status> {
        let error_message = match failure {
            None => String::new(),
            Some(error) if self.errors_end_the_stream => {
                self.give_up();
                return Err(with_metadata(error.into(), response));
            }
            Some(error) => {
                response.id = id;
                error.message
            }
        };
        set(&mut response, FINAL, ParameterChoice::BoolParam(true));
        Ok(ModelStreamInferResponse { error_message, infer_response: Some(response) })
    }

    /// Nothing more is read or answered.
    fn give_up(&mut self) {
        self.requests = None;
        self.running.clear();
        self.end = None;
        self.end_of_time = None;
    }
}

impl Stream for Answers {
    type Item = Result<ModelStreamInferResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        this.read(context);
        let Some(oldest) = this.running.front_mut() else {
            if this.requests.is_none() {
                this.end_of_time = None;
                return Poll::Ready(this.end.take().map(Err));
            }
            return this.poll_end_of_time(context);
        };
        let Poll::Ready(joined) = Pin::new(&mut oldest.answer).poll(context) else {
            return this.poll_end_of_time(context);
        };
        let id = std::mem::take(&mut oldest.id);
        this.running.pop_front();
        let (failure, response) = match joined {
            Ok((failure, response, _held)) => (failure, response),
            // It has panicked, which the log tells.
            Err(_) => (Some(Error::internal("the request broke down")), ModelInferResponse::default()),
        };
        Poll::Ready(Some(this.answer(id, failure, response)))
    }
}

impl Answers {
    fn poll_end_of_time(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<ModelStreamInferResponse, Status>>> {
        let Some(end) = &mut self.end_of_time else { return Poll::Pending };
        end.as_mut().poll(context).map(|()| {
            self.give_up();
            Some(Err(Error::new(Code::DeadlineExceeded, "the deadline of the stream passed").into()))
        })
    }
}

/// A status with what its answer would have said in parameters.
fn with_metadata(mut status: Status, response: ModelInferResponse) -> Status {
    for (name, parameter) in response.parameters {
        if let Some(ParameterChoice::StringParam(text)) = parameter.parameter_choice
            && let (Ok(name), Ok(text)) = (HeaderName::try_from(name), HeaderValue::try_from(text))
        {
            status.metadata_mut().as_mut().insert(name, text);
        }
    }
    status
}

fn set(response: &mut ModelInferResponse, name: &str, value: ParameterChoice) {
    response.parameters.insert(name.to_owned(), InferParameter { parameter_choice: Some(value) });
}

/// Bytes counted in a total for as long as this lives.
struct Held {
    total: Arc<AtomicUsize>,
    bytes: usize,
}

impl Held {
    fn new(total: &Arc<AtomicUsize>, bytes: usize) -> Self {
        total.fetch_add(bytes, Ordering::Relaxed);
        Self { total: total.clone(), bytes }
    }

    fn change(&mut self, bytes: usize) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
