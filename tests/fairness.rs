//! Clients that share a model: a flood of one keeps nobody else waiting or out, over both protocols.

use std::{path::PathBuf, sync::Arc};

use tidegate::error::Code;
use tokio::task::JoinHandle;

use crate::support::{
    GrpcClient, Repository, Running, config, diary, eventually, grpc_client, infer_message, message_values, start,
};

const PENDING: &str = r#"tidegate_pending_requests{model="m",version="1"}"#;
const TENANT: &str = "x-tenant";
/// More than a client can have saved up.
const FLOOD: usize = 9;
/// Requests of a new client that run as they come.
const SAVED: usize = 5;
/// What the light client sends, and what keeps the executor busy.
const LIGHT: f32 = 100.0;
const OCCUPANT: f32 = -1.0;

/// How a request travels: REST on a connection that is free, or gRPC on one of its own.
#[derive(Clone)]
enum Way {
    Rest,
    Grpc(Box<GrpcClient>),
}

/// A server with the model "m", whose runs are of one request each and wait while the gate is shut.
struct Gated {
    running: Arc<Running>,
    gate: PathBuf,
    diary: PathBuf,
    _repository: Repository,
}

impl Gated {
    async fn start(max_requests: usize, client_header: Option<&str>) -> Self {
        let repository = Repository::new();
        let [gate, diary] = [".gate", ".diary"].map(|name| repository.0.path().join(name));
        repository.settings("m", "batching = false");
        repository.put("m", "1", &format!("gate = '{}'\ndiary = '{}'", gate.display(), diary.display()));
        let mut config = config(&repository);
        config.queue.max_requests = max_requests;
        config.queue.client_header = client_header.map(str::to_owned);
        let running = Arc::new(start(&config).await);
        Self { running, gate, diary, _repository: repository }
    }

    fn connect(&self) -> Way {
        Way::Grpc(Box::new(grpc_client(self.running.grpc_address)))
    }

    /// Shuts the gate and has the executor wait behind it with a request of nobody else's.
    async fn occupy(&self) -> JoinHandle<Result<f32, Code>> {
        std::fs::write(&self.gate, "").unwrap();
        std::fs::write(&self.diary, "").unwrap();
        let occupant = self.send(&self.connect(), OCCUPANT, "occupant");
        eventually("it runs", async || self.order_of_runs() == [OCCUPANT]).await;
        occupant
    }

    /// The values that were asked for since the gate was shut, in the order in which they ran.
    fn order_of_runs(&self) -> Vec<f32> {
        diary(&self.diary).iter().map(|line| line.parse().unwrap()).collect()
    }

    async fn wait_for(&self, pending: usize) {
        eventually("requests wait", async || self.running.metric(PENDING).await == pending as f64).await;
    }

    fn send(&self, way: &Way, value: f32, tenant: &'static str) -> JoinHandle<Result<f32, Code>> {
        let (running, way) = (self.running.clone(), way.clone());
        tokio::spawn(async move {
            match way {
                Way::Rest => {
                    let request = running.infer_request("m", &[value], &[(TENANT, tenant)]);
                    let reply = running.send(request).await.unwrap();
                    match reply.status {
                        200 => Ok(reply.values()[0] as f32),
                        429 => Err(Code::Overloaded),
                        other => panic!("{other}: {}", reply.body),
                    }
                }
                Way::Grpc(mut client) => {
                    let mut request = tonic::Request::new(infer_message("m", &[value]));
                    request.metadata_mut().insert(TENANT, tenant.parse().unwrap());
                    match client.model_infer(request).await {
                        Ok(response) => Ok(message_values(response.get_ref())[0]),
                        Err(status) if status.code() == tonic::Code::ResourceExhausted => Err(Code::Overloaded),
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        })
    }

    /// Queues a flood over `flood`, then one request over `light`, and opens the gate; the values in the order in
    /// which they ran, for on a busy machine the answers may overtake each other.
    async fn order(&self, flood: &Way, light: &Way) -> Vec<f32> {
        let occupant = self.occupy().await;
        let mut answers = Vec::new();
        for index in 0..=FLOOD {
            let (way, value, tenant) = if index < FLOOD { (flood, index as f32, "a") } else { (light, LIGHT, "b") };
            answers.push((value, self.send(way, value, tenant)));
            self.wait_for(index + 2).await;
        }
        std::fs::remove_file(&self.gate).unwrap();
        occupant.await.unwrap().unwrap();
        for (value, answer) in answers {
            assert_eq!(answer.await.unwrap(), Ok(value));
        }
        self.order_of_runs().split_off(1)
    }

    async fn stop(self) {
        Arc::into_inner(self.running).unwrap().stop().await;
    }
}

/// Whether the light client's request ran behind what a flooder may have saved up at most, and the flood in its order.
fn is_early(mut order: Vec<f32>) -> bool {
    let place = order.iter().position(|&value| value == LIGHT);
    order.retain(|&value| value != LIGHT);
    order.len() == FLOOD && order.is_sorted() && place.is_some_and(|place| place <= SAVED)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_does_not_wait_for_all_of_a_flood() {
    let model = Gated::start(100, None).await;
    for light in [model.connect(), Way::Rest] {
        let order = model.order(&model.connect(), &light).await;
        assert!(is_early(order.clone()), "{order:?}");
    }
    // Connections of REST, each with one request, are all alike.
    assert_eq!(model.order(&Way::Rest, &model.connect()).await.last(), Some(&LIGHT));
    model.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_tells_clients_apart_and_together() {
    let model = Gated::start(100, Some("X-Tenant")).await;
    let shared = model.connect();
    for (flood, light) in [(&shared, &shared), (&Way::Rest, &Way::Rest), (&Way::Rest, &shared), (&shared, &Way::Rest)] {
        let order = model.order(flood, light).await;
        assert!(is_early(order.clone()), "{order:?}");
    }
    model.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_has_room_for_those_with_less_waiting() {
    let model = Gated::start(FLOOD, None).await;
    for (round, light) in [model.connect(), Way::Rest].into_iter().enumerate() {
        let occupant = model.occupy().await;
        let flooder = model.connect();
        let mut flood = Vec::new();
        for index in 0..FLOOD {
            flood.push(model.send(&flooder, index as f32, "a"));
            model.wait_for(index + 2).await;
        }
        let refused = model.send(&flooder, 50.0, "a").await.unwrap();
        assert_eq!(refused, Err(Code::Overloaded), "the flooder gets no more");
        let light = model.send(&light, LIGHT, "b");
        // The gate is still shut: whoever made room hears of it at once.
        assert_eq!(flood.pop().unwrap().await.unwrap(), Err(Code::Overloaded));
        std::fs::remove_file(&model.gate).unwrap();
        assert_eq!(light.await.unwrap(), Ok(LIGHT));
        for (index, answer) in flood.into_iter().enumerate() {
            assert_eq!(answer.await.unwrap(), Ok(index as f32));
        }
        occupant.await.unwrap().unwrap();
        let dropped = |reason| format!(r#"tidegate_dropped_requests_total{{model="m",version="1",reason="{reason}"}}"#);
        assert_eq!(model.running.metric(&dropped("displaced")).await, round as f64 + 1.0);
        assert_eq!(model.running.metric(&dropped("overloaded")).await, round as f64 + 1.0);
    }
    model.stop().await;
}
