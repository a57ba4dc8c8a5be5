//! Who is answered first, who is turned away, and who waits for company: what `[queue]` in model.toml says.

use std::{path::PathBuf, sync::Arc, time::Duration};

use http_body_util::Full;
use serde_json::{Value, json};
use tidegate::{
    api::{
        pb::{InferParameter, infer_parameter::ParameterChoice},
        status,
    },
    error::Code,
};
use tokio::task::JoinHandle;

use crate::support::{Repository, Running, config, diary, eventually, infer_message, message_values, start};

const PENDING: &str = r#"tidegate_pending_requests{model="m",version="1"}"#;
const EXECUTIONS: &str = r#"tidegate_executions_total{model="m",version="1"}"#;
/// The first level is for those that shall keep the executor busy.
const LEVELS: &str = "batching = false\n[queue]\npriority_levels = 3\ndefault_priority = 3\n";

/// The value of the request that keeps the executor busy.
const OCCUPANT: f32 = -1.0;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Rest,
    Grpc,
}

use Way::{Grpc, Rest};

const WAYS: [Way; 2] = [Rest, Grpc];

type Answer = Result<f32, (Code, String)>;

/// A server with the model "m", whose runs wait while the gate is shut.
struct Gated {
    running: Arc<Running>,
    gate: PathBuf,
    diary: PathBuf,
    repository: Repository,
}

impl Gated {
    /// `script` is what the model does beside; `settings` is its model.toml.
    async fn start(script: &str, settings: &str) -> Self {
        let repository = Repository::new();
        let [gate, diary] = [".gate", ".diary"].map(|name| repository.0.path().join(name));
        repository.settings("m", settings);
        repository.put("m", "1", &format!("gate = '{}'\ndiary = '{}'\n{script}", gate.display(), diary.display()));
        let running = Arc::new(start(&config(&repository)).await);
        Self { running, gate, diary, repository }
    }

    /// Shuts the gate and has a request of the highest level wait behind it, in the executor.
    async fn occupy(&self) -> JoinHandle<Answer> {
        std::fs::write(&self.gate, "").unwrap();
        std::fs::write(&self.diary, "").unwrap();
        let occupant = self.send(Rest, OCCUPANT, json!({ "priority": 1 }));
        eventually("it runs", async || self.order_of_runs() == [OCCUPANT]).await;
        occupant
    }

    /// The first values of the runs since the gate was shut; answers may overtake each other.
    fn order_of_runs(&self) -> Vec<f32> {
        diary(&self.diary).iter().map(|line| line.parse().unwrap()).collect()
    }

    fn open(&self) {
        std::fs::remove_file(&self.gate).unwrap();
    }

    /// Waits until so many requests are submitted and not answered.
    async fn wait_for(&self, pending: usize) {
        eventually("requests wait", async || self.running.metric(PENDING).await == pending as f64).await;
    }

    fn send(&self, way: Way, value: f32, parameters: Value) -> JoinHandle<Answer> {
        let running = self.running.clone();
        tokio::spawn(async move { ask(&running, way, value, parameters).await })
    }
}

/// Asks the model "m" for `value`, with `parameters` in the request.
async fn ask(running: &Running, way: Way, value: f32, parameters: Value) -> Answer {
    match way {
        Rest => {
            let input = json!({ "name": "x", "datatype": "FP32", "shape": [1], "data": [value] });
            let body = json!({ "inputs": [input], "parameters": parameters }).to_string();
            let request = http::Request::post(format!("{}/v2/models/m/infer", running.rest)).body(Full::from(body));
            let reply = running.send(request.unwrap()).await.unwrap();
            match Code::ALL.into_iter().find(|&code| status::http(code).as_u16() == reply.status) {
                None => Ok(reply.values()[0] as f32),
                Some(code) => Err((code, reply.error().to_owned())),
            }
        }
        Grpc => {
            let mut message = infer_message("m", &[value]);
            for (name, value) in parameters.as_object().unwrap() {
                let choice = match value {
                    Value::Number(number) if number.is_u64() => ParameterChoice::Uint64Param(number.as_u64().unwrap()),
                    Value::Number(number) => ParameterChoice::Int64Param(number.as_i64().unwrap()),
                    Value::String(text) => ParameterChoice::StringParam(text.clone()),
                    other => panic!("{other}"),
                };
                message.parameters.insert(name.clone(), InferParameter { parameter_choice: Some(choice) });
            }
            match running.grpc.clone().model_infer(message).await {
                Ok(response) => Ok(message_values(response.get_ref())[0]),
                Err(failed) => {
                    // Both mean RESOURCE_EXHAUSTED; what is sent here is never too large.
                    let mut codes = Code::ALL.into_iter().filter(|&code| code != Code::TooLarge);
                    let code = codes.find(|&code| status::grpc(code) == failed.code()).unwrap();
                    Err((code, failed.message().to_owned()))
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_urgent_overtake_those_who_can_wait() {
    let model = Gated::start("", LEVELS).await;
    let occupant = model.occupy().await;
    let mut answers = Vec::new();
    let waiting = [(Rest, 0), (Grpc, 3), (Rest, 2), (Grpc, 2), (Grpc, 1), (Rest, 1)];
    for (index, (way, priority)) in waiting.into_iter().enumerate() {
        answers.push(model.send(way, index as f32, json!({ "priority": priority })));
        model.wait_for(index + 2).await;
    }
    model.open();
    for (index, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.await.unwrap(), Ok(index as f32));
    }
    assert_eq!(model.order_of_runs(), [OCCUPANT, 4.0, 5.0, 2.0, 3.0, 0.0, 1.0]);
    occupant.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_level_there_is_not_is_the_default() {
    let model = Gated::start("", LEVELS).await;
    for way in WAYS {
        assert_eq!(ask(&model.running, way, 1.0, json!({ "priority": 3 })).await, Ok(1.0));
        assert_eq!(ask(&model.running, way, 1.0, json!({ "priority": 4 })).await, Ok(1.0));
        for wrong in [json!(-1), json!("high")] {
            let (code, message) = ask(&model.running, way, 1.0, json!({ "priority": wrong })).await.unwrap_err();
            assert_eq!(code, Code::InvalidArgument);
            assert!(message.contains("model 'm'") && message.contains("'priority'"), "{message}");
        }
    }
    let plain = Gated::start("", "").await;
    for way in WAYS {
        assert_eq!(ask(&plain.running, way, 1.0, json!({ "priority": 99 })).await, Ok(1.0), "without levels");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_level_turns_away_and_the_others_do_not() {
    let model = Gated::start("", &format!("{LEVELS}max_size = 9\n[queue.priority.2]\nmax_size = 2\n")).await;
    let occupant = model.occupy().await;
    let mut waiting = Vec::from(WAYS.map(|way| model.send(way, 1.0, json!({ "priority": 2 }))));
    model.wait_for(3).await;
    for way in WAYS {
        let (code, message) = ask(&model.running, way, 1.0, json!({ "priority": 2 })).await.unwrap_err();
        assert_eq!(code, Code::Overloaded);
        for word in ["model 'm'", "queue.max_size", "level 2"] {
            assert!(message.contains(word), "{message}");
        }
    }
    waiting.extend([1, 3].map(|priority| model.send(Rest, 1.0, json!({ "priority": priority }))));
    model.wait_for(5).await;
    model.open();
    for answer in waiting.into_iter().chain([occupant]) {
        answer.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_timeout_rejects_while_the_executor_is_busy() {
    let model = Gated::start("", &format!("{LEVELS}[queue.priority.2]\ndefault_timeout = '30ms'\n")).await;
    let occupant = model.occupy().await;
    let patient = model.send(Grpc, 7.0, json!({ "priority": 3 }));
    model.wait_for(2).await;
    for way in WAYS {
        let (code, message) = ask(&model.running, way, 1.0, json!({ "priority": 2 })).await.unwrap_err();
        assert_eq!(code, Code::DeadlineExceeded);
        assert!(message.contains("model 'm'") && message.contains("queue.default_timeout"), "{message}");
    }
    // The request's own timeout is a deadline, whatever the queue allows.
    let (code, _) = ask(&model.running, Rest, 1.0, json!({ "priority": 3, "timeout": 20_000 })).await.unwrap_err();
    assert_eq!(code, Code::DeadlineExceeded);
    model.open();
    assert_eq!(patient.await.unwrap(), Ok(7.0));
    occupant.await.unwrap().unwrap();
    let dropped = |reason| format!(r#"tidegate_dropped_requests_total{{model="m",version="1",reason="{reason}"}}"#);
    assert_eq!(model.running.metric(&dropped("timeout")).await, 2.0);
    assert_eq!(model.running.metric(EXECUTIONS).await, 2.0, "the rejected cost no run");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_late_step_back_and_are_answered() {
    let policy = "[queue.priority.2]\ntimeout_action = 'delay'\nallow_timeout_override = true\n";
    let model = Gated::start("", &format!("{LEVELS}{policy}")).await;
    let occupant = model.occupy().await;
    let mut answers = Vec::new();
    // The second one does not mind when it is answered, as long as it is.
    let waiting = [(Rest, 2, 0), (Grpc, 2, 1), (Rest, 2, 1), (Grpc, 3, 0)];
    for (index, (way, priority, timeout)) in waiting.into_iter().enumerate() {
        answers.push(model.send(way, index as f32, json!({ "priority": priority, "timeout": timeout })));
        model.wait_for(index + 2).await;
    }
    model.open();
    for (index, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.await.unwrap(), Ok(index as f32));
    }
    assert_eq!(model.order_of_runs(), [OCCUPANT, 0.0, 3.0, 1.0, 2.0]);
    occupant.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_wait_for_company_but_a_swap_and_a_stop_do_not() {
    let settings = "batching = true\n[queue]\nmax_delay = '1h'\npreferred_batch_sizes = [4]\n";
    let model = Gated::start("", settings).await;
    let four: Vec<_> = [Rest, Rest, Grpc, Grpc].into_iter().map(|way| model.send(way, 2.0, json!({}))).collect();
    for answer in four {
        assert_eq!(answer.await.unwrap(), Ok(2.0));
    }
    assert_eq!(model.running.metric(EXECUTIONS).await, 1.0);
    let lone = model.send(Rest, 3.0, json!({}));
    model.wait_for(1).await;
    // Half of the time that a deadline leaves is not given away to company.
    assert_eq!(ask(&model.running, Grpc, 5.0, json!({ "timeout": 2_000_000 })).await, Ok(5.0));
    assert_eq!(lone.await.unwrap(), Ok(3.0), "in the same batch");
    let lone = model.send(Grpc, 4.0, json!({}));
    model.wait_for(1).await;
    model.repository.put("m", "2", "");
    assert_eq!(lone.await.unwrap(), Ok(4.0), "the version it waits for is replaced");
    let lone = model.send(Rest, 4.0, json!({}));
    let pending = PENDING.replace(r#""1""#, r#""2""#);
    eventually("it waits for the new version", async || model.running.metric(&pending).await == 1.0).await;
    model.running.stopper.stop(Duration::ZERO);
    assert_eq!(lone.await.unwrap(), Ok(4.0));
    let Gated { running, .. } = model;
    assert_eq!(Arc::into_inner(running).unwrap().stop().await, 0);
}
