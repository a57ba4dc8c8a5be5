//! Copies of requests go to a candidate; they are compared and counted, and clients never notice.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde_json::json;
use tidegate::{
    config::Config,
    model::ModelVersion,
    observe::copies::{Comparison, Missing},
};

use crate::support::{
    Repository, Running, config, eventually, infer_message, message_values, scheduling_policy, start,
};

/// Whatever comes after the first version gets a copy of every request.
const ALL_COPIED: &str = "batching = false\n[rollout]\non_new_version = 'shadow'\nshadow = 100.0\n";
/// Longer than any test takes.
const NEVER: Duration = Duration::from_secs(3600);

/// A server whose model "m" has a second version that gets copies.
struct Shadowed {
    running: Running,
    /// The second version's runs wait while it is there.
    gate: PathBuf,
    repository: Repository,
}

impl Shadowed {
    async fn start(stable: &str, candidate: &str, set: impl FnOnce(&mut Config)) -> Self {
        let repository = Repository::with("m", stable);
        repository.settings("m", ALL_COPIED);
        let mut config = config(&repository);
        // Other tests use the processor meanwhile.
        config.shadow.max_cpu = 1.0;
        config.shadow.max_wait = NEVER;
        set(&mut config);
        let running = start(&config).await;
        let gate = repository.0.path().join(".gate");
        let shadowed = Self { running, gate, repository };
        shadowed.add(candidate).await;
        shadowed
    }

    async fn add(&self, candidate: &str) {
        let candidate = format!("gate = '{}'\n{candidate}", self.gate.display());
        self.repository.put("m", "2", &candidate);
        eventually("copies are made", async || is_shadowed(&self.running)).await;
    }

    /// Asks for `value` over both protocols; both get the same answer.
    async fn ask(&self, value: f32) -> f32 {
        let reply = self.running.infer("m", &[value]).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert_eq!(reply.body["model_version"], "1");
        let response = self.running.grpc.clone().model_infer(infer_message("m", &[value])).await.unwrap().into_inner();
        assert_eq!(response.model_version, "1");
        assert_eq!(reply.values(), [f64::from(message_values(&response)[0])]);
        message_values(&response)[0]
    }

    /// What became of the copies, once there are so many.
    async fn comparison(&self, copies: u64) -> Comparison {
        let count = || comparison(&self.running);
        eventually("the copies are counted", async || {
            let Comparison { agreement, .. } = count();
            agreement.compared + agreement.failed + agreement.missing >= copies
        })
        .await;
        let found = count();
        let agreement = found.agreement;
        assert_eq!(agreement.compared + agreement.failed + agreement.missing, copies, "{found:?}");
        found
    }
}

fn is_shadowed(running: &Running) -> bool {
    let catalog = running.server.as_ref().unwrap().catalog().load();
    catalog.deployment("m").is_ok_and(|model| model.route.as_ref().is_some_and(|route| route.shadow.is_some()))
}

fn candidate(running: &Running) -> Arc<ModelVersion> {
    let catalog = running.server.as_ref().unwrap().catalog().load();
    catalog.find("m", Some("2")).unwrap().clone()
}

fn comparison(running: &Running) -> Comparison {
    candidate(running).tally.comparison()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_are_compared_and_change_no_answer() {
    let repository = Repository::with("m", "scale = 1.1");
    repository.settings("m", ALL_COPIED);
    let mut config = config(&repository);
    config.shadow.max_cpu = 1.0;
    let running = start(&config).await;
    let gate = repository.0.path().join(".gate");
    let model = Shadowed { running, gate, repository };
    let values = [0.1f32, 3.0, -7.5, 1e30, f32::MIN_POSITIVE];
    let ask_all = async || {
        let mut answers = Vec::new();
        for value in values {
            let message = infer_message("m", &[value, value]);
            let response = model.running.grpc.clone().model_infer(message).await.unwrap().into_inner();
            let reply = model.running.infer("m", &[value]).await;
            answers.push((reply.status, reply.body.to_string(), response));
        }
        answers
    };
    let without = ask_all().await;
    model.add("scale = 2.2").await;
    let with = ask_all().await;
    assert_eq!(with, without, "bit for bit");
    let found = model.comparison(2 * values.len() as u64).await;
    assert_eq!((found.agreement.compared, found.agreement.disagreed), (10, 0), "values are no labels");
    assert_eq!((found.missing, found.unlike), (Missing::default(), None));
    let [output] = &found.outputs[..] else { panic!("{:?}", found.outputs) };
    assert_eq!((&*output.output, output.compared, output.measured), ("y", 10, 10));
    let largest = f64::from(1e30f32 * 2.2) - f64::from(1e30f32 * 1.1);
    assert!((output.max_abs / largest - 1.0).abs() < 1e-6, "{output:?}, not {largest}");
    assert!(output.mean_cosine.is_some_and(|cosine| (cosine - 1.0).abs() < 1e-6), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_answers_no_numbers_disagrees() {
    let model = Shadowed::start("", "scale = nan", |_| {}).await;
    assert_eq!(model.ask(5.0).await, 5.0);
    let found = model.comparison(2).await;
    assert_eq!((found.agreement.compared, found.agreement.disagreed), (2, 2));
    assert_eq!(found.outputs[0].measured, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_fails_or_panics_is_noticed_by_nobody_else() {
    let model = Shadowed::start("refuse = 9.0", "refuse = 7.0\npanic = 8.0", |_| {}).await;
    for value in [6.0, 7.0, 8.0] {
        assert_eq!(model.ask(value).await, value);
    }
    let found = model.comparison(6).await;
    assert_eq!((found.agreement.compared, found.agreement.failed), (2, 4), "{found:?}");
    for (protocol, code, count) in [("rest", "ok", 1.0), ("rest", "internal", 1.0), ("grpc", "invalid_argument", 1.0)] {
        let labels = format!(r#"protocol="{protocol}",code="{code}",variant="shadow""#);
        let series = format!(r#"tidegate_requests_total{{model="m",version="2",{labels}}}"#);
        assert_eq!(model.running.metric(&series).await, count, "{series}");
    }
    assert_eq!(model.running.infer("m", &[9.0]).await.status, 400);
    model.ask(6.0).await;
    let found = model.comparison(8).await;
    assert_eq!((found.agreement.compared, found.agreement.failed), (4, 4), "a request that fails has no copy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inputs_that_do_not_fit_the_candidate_are_failures_of_its_own() {
    let model = Shadowed::start("", "input = 'z'", |_| {}).await;
    assert_eq!(model.ask(1.0).await, 1.0);
    let found = model.comparison(2).await;
    assert_eq!((found.agreement.compared, found.agreement.failed), (0, 2));
    // Without names and types of its own, a request has those of the version that answers it.
    let reply = model.running.post("/v1/models/m:predict", json!({ "instances": [1.0] }), &[]).await;
    assert_eq!((reply.status, &reply.body["predictions"]), (200, &json!([1.0])));
    let found = model.comparison(3).await;
    assert_eq!((found.agreement.failed, found.missing), (2, Missing { untyped: 1, ..Missing::default() }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_candidate_and_no_copy_waits_for_ever() {
    let model = Shadowed::start("", "", |config| config.shadow.max_wait = Duration::from_millis(200)).await;
    std::fs::write(&model.gate, "").unwrap();
    for value in [1.0, 2.0, 3.0] {
        assert_eq!(model.ask(value).await, value);
    }
    let found = model.comparison(6).await;
    assert_eq!(found.missing, Missing { late: 6, ..Missing::default() });
    std::fs::remove_file(&model.gate).unwrap();
    eventually("copies are answered again", async || {
        model.ask(4.0).await;
        comparison(&model.running).agreement.compared > 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_copies_wait_and_no_more() {
    let model = Shadowed::start("", "", |config| config.shadow.max_requests = 3).await;
    std::fs::write(&model.gate, "").unwrap();
    for value in [1.0, 2.0, 3.0, 4.0, 5.0] {
        assert_eq!(model.ask(value).await, value);
    }
    let found = model.comparison(7).await;
    assert_eq!(found.missing, Missing { full: 7, ..Missing::default() });
    std::fs::remove_file(&model.gate).unwrap();
    let found = model.comparison(10).await;
    assert_eq!(found.agreement.compared, 3, "those that had waited are answered");
    model.ask(6.0).await;
    assert_eq!(model.comparison(12).await.agreement.compared, 5, "and there is room again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_keep_so_many_bytes_and_no_more() {
    // An input and an answer of four bytes each.
    let model = Shadowed::start("", "", |config| config.shadow.max_bytes = 20).await;
    std::fs::write(&model.gate, "").unwrap();
    for value in [1.0, 2.0] {
        model.ask(value).await;
    }
    let found = model.comparison(2).await;
    assert_eq!(found.missing, Missing { full: 2, ..Missing::default() });
    std::fs::remove_file(&model.gate).unwrap();
    assert_eq!(model.comparison(4).await.agreement.compared, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn above_the_limit_of_the_processor_copies_are_shed() {
    let model = Shadowed::start("refuse = 9.0", "", |config| config.shadow.max_cpu = 0.0).await;
    for value in [1.0, 2.0, 3.0] {
        assert_eq!(model.ask(value).await, value);
    }
    assert_eq!(model.running.infer("m", &[9.0]).await.status, 400, "there was nothing to compare with");
    let found = model.comparison(6).await;
    assert_eq!(found.missing, Missing { busy: 6, ..Missing::default() });
    assert_eq!(found.agreement.missing, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_does_not_wait_for_copies() {
    let model = Shadowed::start("", "", |_| {}).await;
    std::fs::write(&model.gate, "").unwrap();
    for _ in 0..5 {
        model.ask(1.0).await;
    }
    let candidate = candidate(&model.running);
    eventually("all copies wait", async || candidate.in_flight() == 10).await;
    let given_up = async {
        eventually("the copies are given up", async || candidate.in_flight() == 0).await;
        // Only now can the run end that one of them is in.
        std::fs::remove_file(&model.gate).unwrap();
    };
    let (cut, ()) = tokio::join!(model.running.stop(), given_up);
    assert_eq!(cut, 0, "no request was cut short");
    assert_eq!(candidate.tally.agreement().compared, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg(target_os = "linux")]
async fn a_version_that_gets_only_copies_waits_for_the_processor_and_a_canary_does_not() {
    let steps = "[rollout]\non_new_version = 'canary'\nshadow = 100.0\nsteps = [10.0, 100.0]\nevery = '1s'\n\
                 min_samples = 20\n[rollout.margins]\ndistribution = 1.0\n";
    let repository = Repository::with("m", "tell_policy = true");
    repository.settings("m", steps);
    let mut config = config(&repository);
    config.shadow.max_cpu = 1.0;
    let running = start(&config).await;
    let usual = scheduling_policy();
    assert_eq!(running.infer("m", &[1.0]).await.values(), [f64::from(usual)]);
    repository.put("m", "2", "tell_policy = true");
    let of_the_candidate = async || {
        let reply = running.infer("m/versions/2", &[1.0]).await;
        if reply.status == 200 { reply.values()[0] } else { f64::NAN }
    };
    eventually("it runs when nothing else does", async || of_the_candidate().await == 5.0).await;
    eventually("it runs as the others do", async || {
        running.infer("m", &[1.0]).await;
        !is_shadowed(&running)
    })
    .await;
    assert_eq!(of_the_candidate().await, f64::from(usual));
}
