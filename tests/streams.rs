//! Many requests on one call: in order, side by side, bounded, and each counted once.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use prost::Message;
use tidegate::api::pb::{ModelInferRequest, ModelStreamInferResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use crate::support::{HttpClient, Repository, Running, config, eventually, infer_message, message_values, start};

const PATH: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// A stream whose requests are sent by hand.
struct Call {
    requests: mpsc::UnboundedSender<ModelInferRequest>,
    answers: Streaming<ModelStreamInferResponse>,
}

impl Call {
    async fn open(running: &Running) -> Self {
        Self::open_with(running, |_| {}).await
    }

    async fn open_with(
        running: &Running,
        change: impl FnOnce(&mut Request<UnboundedReceiverStream<ModelInferRequest>>),
    ) -> Self {
        let (requests, receiver) = mpsc::unbounded_channel();
        let mut request = Request::new(UnboundedReceiverStream::new(receiver));
        change(&mut request);
        let mut client = running.grpc.clone().max_decoding_message_size(usize::MAX);
        let answers = client.model_stream_infer(request).await.unwrap().into_inner();
        Self { requests, answers }
    }

    fn ask(&self, model: &str, id: usize) {
        let message = ModelInferRequest { id: id.to_string(), ..infer_message(model, &[id as f32]) };
        self.requests.send(message).unwrap();
    }

    async fn next(&mut self) -> Result<Option<ModelStreamInferResponse>, Status> {
        tokio::time::timeout(Duration::from_secs(20), self.answers.message()).await.unwrap()
    }

    async fn answer(&mut self) -> ModelStreamInferResponse {
        self.next().await.unwrap().unwrap()
    }

    /// The next answer must be the right one to the request `id`.
    async fn expect(&mut self, id: usize) {
        let answer = self.answer().await;
        assert_eq!(answer.error_message, "");
        let response = answer.infer_response.unwrap();
        assert_eq!(response.id, id.to_string());
        assert_eq!(message_values(&response), [id as f32]);
        assert_eq!(
            format!("{:?}", response.parameters["triton_final_response"].parameter_choice),
            "Some(BoolParam(true))"
        );
    }
}

async fn requests(running: &Running, model: &str, code: &str) -> f64 {
    let series = format!(
        r#"tidegate_requests_total{{model="{model}",version="1",protocol="grpc",code="{code}",variant="stable"}}"#
    );
    running.metric(&series).await
}

async fn pending(running: &Running, model: &str) -> f64 {
    running.metric(&format!(r#"tidegate_pending_requests{{model="{model}",version="1"}}"#)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_come_in_order_and_requests_run_side_by_side() {
    let repository = Repository::with("slow", "sleep_ms = 1000");
    repository.put("fast", "1", "");
    let running = start(&config(&repository)).await;
    let mut call = Call::open(&running).await;
    call.ask("slow", 0);
    (1..=20).for_each(|id| call.ask("fast", id));
    eventually("the fast ones are done", async || requests(&running, "fast", "ok").await == 20.0).await;
    assert_eq!(requests(&running, "slow", "ok").await, 0.0, "they did not wait for the slow one");
    for id in 0..=20 {
        call.expect(id).await;
    }
    drop(call.requests);
    assert!(call.answers.message().await.unwrap().is_none(), "the stream ends when the client is done");
    assert_eq!(requests(&running, "slow", "ok").await, 1.0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_stands_in_its_place_and_the_stream_goes_on() {
    let repository = Repository::with("m", "refuse = 3.0");
    let running = start(&config(&repository)).await;
    let mut call = Call::open(&running).await;
    call.ask("m", 1);
    call.ask("nosuch", 2);
    call.ask("m", 3);
    call.ask("m", 4);
    call.expect(1).await;
    for (id, word) in [("2", "nosuch"), ("3", "refuses")] {
        let answer = call.answer().await;
        assert!(answer.error_message.contains(word), "{}", answer.error_message);
        let response = answer.infer_response.unwrap();
        assert_eq!((response.id.as_str(), response.outputs.len()), (id, 0));
        assert!(response.parameters.contains_key("triton_final_response"));
    }
    call.expect(4).await;
    assert_eq!(requests(&running, "m", "ok").await, 2.0);
    assert_eq!(requests(&running, "m", "invalid_argument").await, 1.0);
    assert_eq!(requests(&running, "m", "cancelled").await, 0.0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_failure_ends_the_stream_of_whoever_asks_for_that() {
    let repository = Repository::with("m", "refuse = 9.0");
    let running = start(&config(&repository)).await;
    for value in ["true", "false"] {
        let mut call = Call::open_with(&running, |request| {
            request.metadata_mut().insert("triton_grpc_error", value.parse().unwrap());
        })
        .await;
        call.ask("m", 1);
        call.ask("nosuch", 2);
        call.ask("m", 3);
        call.expect(1).await;
        if value == "true" {
            let status = call.next().await.unwrap_err();
            assert_eq!(status.code(), Code::NotFound);
            assert!(status.message().contains("nosuch"), "{status}");
            assert!(call.next().await.unwrap().is_none());
        } else {
            assert!(call.answer().await.error_message.contains("nosuch"));
            call.expect(3).await;
        }
    }
    let mut call = Call::open_with(&running, |request| {
        request.metadata_mut().insert("triton_grpc_error", "true".parse().unwrap());
    })
    .await;
    call.ask("m", 9);
    let status = call.next().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert_eq!(status.metadata().get("x-tidegate-version").unwrap(), "1", "who refused it");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_requests_of_a_stream_run_at_a_time() {
    let repository = Repository::with("m", "sleep_ms = 30");
    repository.settings("m", "batching = false");
    let mut narrow = config(&repository);
    narrow.limits.max_stream_requests = 3;
    let running = start(&narrow).await;
    let mut call = Call::open(&running).await;
    (0..20).for_each(|id| call.ask("m", id));
    let mut most = 0.0_f64;
    for id in 0..20 {
        most = most.max(pending(&running, "m").await);
        call.expect(id).await;
    }
    assert_eq!(most, 3.0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_is_not_read_from() {
    let repository = Repository::with("m", "");
    let mut small = config(&repository);
    small.limits.max_message_bytes = 4 << 20;
    small.queue.max_rows = 1 << 18;
    let running = start(&small).await;
    let mut call = Call::open(&running).await;
    let values = vec![1.0; 1 << 18];
    let message = infer_message("m", &values);
    const ALL: usize = 200;
    (0..ALL).for_each(|_| call.requests.send(message.clone()).unwrap());
    let mut before = -1.0;
    let stuck = async {
        loop {
            let now = requests(&running, "m", "ok").await;
            if now > 0.0 && now == before {
                return now;
            }
            before = now;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let answered = stuck.await;
    // Four or five wait here, the windows of the connection hold a few more.
    assert!(answered < 40.0, "{answered} answers of 1 MiB were made for nobody");
    for _ in 0..ALL {
        assert_eq!(call.answer().await.error_message, "");
    }
    assert_eq!(requests(&running, "m", "ok").await, ALL as f64);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_may_be_as_large_as_any_message() {
    let repository = Repository::with("m", "");
    let mut small = config(&repository);
    small.limits.max_message_bytes = 1 << 20;
    small.queue.max_rows = 1 << 18;
    let running = start(&small).await;
    let mut call = Call::open(&running).await;
    let fits = infer_message("m", &vec![1.0; (1 << 18) - 100]);
    for _ in 0..3 {
        call.requests.send(fits.clone()).unwrap();
    }
    call.requests.send(infer_message("m", &vec![1.0; 1 << 18])).unwrap();
    for _ in 0..3 {
        assert_eq!(call.answer().await.error_message, "");
    }
    assert_eq!(call.next().await.unwrap_err().code(), Code::ResourceExhausted);
    let lost = r#"tidegate_requests_total{model="",version="",protocol="grpc",code="too_large",variant="stable"}"#;
    assert_eq!(running.metric(lost).await, 1.0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_and_the_stream_have_their_deadlines() {
    let repository = Repository::with("m", "sleep_ms = 800");
    repository.put("fast", "1", "");
    let running = start(&config(&repository)).await;
    let mut call = Call::open_with(&running, |request| request.set_timeout(Duration::from_millis(1800))).await;
    let begin = Instant::now();
    let mut hasty = infer_message("m", &[1.0]);
    let timeout = tidegate::api::pb::infer_parameter::ParameterChoice::Int64Param(50_000);
    hasty
        .parameters
        .insert("timeout".to_owned(), tidegate::api::pb::InferParameter { parameter_choice: Some(timeout) });
    call.requests.send(hasty).unwrap();
    assert!(call.answer().await.error_message.contains("deadline"));
    assert!(begin.elapsed() < Duration::from_millis(700), "{:?}", begin.elapsed());
    call.ask("fast", 2);
    call.expect(2).await;
    eventually("the executor is free", async || pending(&running, "m").await == 0.0).await;
    tokio::time::sleep(Duration::from_millis(1400).saturating_sub(begin.elapsed())).await;
    call.ask("m", 3);
    let late = call.answer().await;
    assert!(late.error_message.contains("deadline"), "{}", late.error_message);
    let status = call.next().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert_eq!(requests(&running, "m", "deadline_exceeded").await, 2.0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_a_client_that_went_away_cost_no_run() {
    let repository = Repository::with("m", "sleep_ms = 300");
    repository.settings("m", "batching = false");
    let running = start(&config(&repository)).await;
    let executions = r#"tidegate_executions_total{model="m",version="1"}"#;
    let before = running.metric(executions).await;
    let call = Call::open(&running).await;
    (0..20).for_each(|id| call.ask("m", id));
    eventually("all of them wait", async || pending(&running, "m").await == 20.0).await;
    drop(call);
    eventually("none of them waits", async || requests(&running, "m", "cancelled").await >= 18.0).await;
    assert_eq!(running.infer("m", &[1.0]).await.status, 200);
    let runs = running.metric(executions).await - before;
    assert!(runs <= 4.0, "{runs} runs");
    let answered = requests(&running, "m", "cancelled").await + requests(&running, "m", "ok").await;
    assert_eq!(answered, 20.0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_may_rest_between_requests() {
    let repository = Repository::with("m", "");
    let mut hasty = config(&repository);
    hasty.limits.body_timeout = Duration::from_millis(100);
    let running = start(&hasty).await;
    let mut call = Call::open(&running).await;
    for id in 0..3 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        call.ask("m", id);
        call.expect(id).await;
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_may_not_rest_in_its_middle() {
    let repository = Repository::with("m", "");
    let mut hasty = config(&repository);
    hasty.limits.body_timeout = Duration::from_millis(300);
    let running = start(&hasty).await;
    let (sender, receiver) = mpsc::unbounded_channel();
    let body = StreamBody::new(UnboundedReceiverStream::new(receiver));
    let client: HttpClient<_> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let call = http::Request::post(format!("http://{}{PATH}", running.grpc_address))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let mut answers = client.request(call.body(body).unwrap()).await.unwrap().into_body();

    let message = infer_message("m", &[1.0]).encode_to_vec();
    let mut frame = [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat();
    frame.extend_from_within(..7);
    sender.send(Ok::<_, Infallible>(Frame::data(Bytes::from(frame)))).unwrap();
    assert!(answers.frame().await.unwrap().unwrap().is_data(), "the whole message is answered");
    let end = answers.frame().await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(end["grpc-status"], "4");
    assert!(end["grpc-message"].to_str().unwrap().contains("limits.body_timeout"), "{end:?}");
    let half =
        r#"tidegate_requests_total{model="",version="",protocol="grpc",code="deadline_exceeded",variant="stable"}"#;
    assert_eq!(running.metric(half).await, 1.0);
    drop(sender);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_answers_what_was_sent_and_ends_the_streams() {
    let repository = Repository::with("m", "sleep_ms = 20");
    repository.settings("m", "batching = false");
    let mut narrow = config(&repository);
    narrow.limits.max_stream_requests = 4;
    let running = start(&narrow).await;
    let mut idle = Call::open(&running).await;
    let mut busy = Call::open(&running).await;
    (0..30).for_each(|id| busy.ask("m", id));
    busy.expect(0).await;
    let begin = Instant::now();
    running.stopper.stop(Duration::ZERO);
    for id in 1..30 {
        busy.expect(id).await;
    }
    for call in [&mut idle, &mut busy] {
        let status = call.next().await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "so that clients look for another server");
        assert!(status.message().contains("stops"), "{status}");
    }
    assert_eq!(running.stop().await, 0);
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}
