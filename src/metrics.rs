//! Every metric's name, labels and buckets; typed handles for those who count; the text Prometheus scrapes.
//!
//! Each loaded version counts into a recorder of its own, and a scrape merges them by family. So the series of a
//! version disappear with it, which one shared recorder cannot do, and a hot path holds handles instead of
//! looking names up. Histograms are our own. This file is the only one that may use the raw macros of the `metrics`
//! crate.
#![expect(clippy::disallowed_macros, reason = "the vocabulary itself is written with the raw macros")]

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ::metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use parking_lot::Mutex;

use crate::error::Code;

mod histogram;

use histogram::{Histogram, Scale};

const REQUESTS: &str = "tidegate_requests_total";
const REQUEST_DURATION: &str = "tidegate_request_duration_seconds";
const QUEUE_DURATION: &str = "tidegate_queue_duration_seconds";
const COMPUTE_DURATION: &str = "tidegate_compute_duration_seconds";
const BATCH_SIZE: &str = "tidegate_batch_size";
const INFERENCES: &str = "tidegate_inferences_total";
const EXECUTIONS: &str = "tidegate_executions_total";
const PENDING: &str = "tidegate_pending_requests";
const DROPPED: &str = "tidegate_dropped_requests_total";
const STATE: &str = "tidegate_model_state";
const GOLDEN_CHECK: &str = "tidegate_golden_check";
const LOAD_DURATION: &str = "tidegate_model_load_duration_seconds";
const SHARED_MEMORY_REGIONS: &str = "tidegate_shared_memory_regions";
const SHARED_MEMORY_BYTES: &str = "tidegate_shared_memory_bytes";
const BUILD_INFO: &str = "tidegate_build_info";

/// Upper bounds of every duration histogram, in seconds.
pub const DURATION_BUCKETS: [f64; 17] =
    [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Upper bounds of the batch size histogram, in rows.
pub const BATCH_BUCKETS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Durations are recorded in nanoseconds.
static SECONDS: Scale<{ DURATION_BUCKETS.len() }> = Scale::new(DURATION_BUCKETS, 1e9);
static ROWS: Scale<{ BATCH_BUCKETS.len() }> = Scale::new(BATCH_BUCKETS, 1.0);

type Durations = Histogram<{ DURATION_BUCKETS.len() }>;

/// Batches up to this many rows are told apart in the statistics.
const MAX_EXACT_BATCH: u64 = 1024;

/// A metric family as README documents it.
pub struct Family {
    pub name: &'static str,
    pub kind: Kind,
    /// Labels beside `model` and `version`.
    pub labels: &'static str,
    pub help: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// Every family of our own, in the order README lists them.
pub const FAMILIES: [Family; 15] = [
    Family {
        name: REQUESTS,
        kind: Kind::Counter,
        labels: "protocol, code, variant",
        help: "Inference requests answered",
    },
    Family {
        name: REQUEST_DURATION,
        kind: Kind::Histogram,
        labels: "",
        help: "Seconds from a request's arrival to its answer",
    },
    Family {
        name: QUEUE_DURATION,
        kind: Kind::Histogram,
        labels: "",
        help: "Seconds a request waited for an executor",
    },
    Family {
        name: COMPUTE_DURATION,
        kind: Kind::Histogram,
        labels: "phase",
        help: "Seconds an execution spent gathering inputs, running the graph, and scattering outputs",
    },
    Family { name: BATCH_SIZE, kind: Kind::Histogram, labels: "", help: "Rows per execution" },
    Family { name: INFERENCES, kind: Kind::Counter, labels: "", help: "Rows inferred" },
    Family { name: EXECUTIONS, kind: Kind::Counter, labels: "", help: "Runs of the graph" },
    Family { name: PENDING, kind: Kind::Gauge, labels: "", help: "Requests submitted and not yet answered" },
    Family {
        name: DROPPED,
        kind: Kind::Counter,
        labels: "reason",
        help: "Requests given up before they cost a run: cancelled, deadline, timeout (of the queue), overloaded, or \
               displaced (from a full queue, by a client with less waiting)",
    },
    Family { name: STATE, kind: Kind::Gauge, labels: "state", help: "1 for the state a version is in, else 0" },
    Family { name: LOAD_DURATION, kind: Kind::Gauge, labels: "", help: "Seconds the version took to load and warm" },
    Family {
        name: GOLDEN_CHECK,
        kind: Kind::Gauge,
        labels: "",
        help: "1 when the version passed its latest golden check, 0 when it failed; only with a golden file",
    },
    Family {
        name: SHARED_MEMORY_REGIONS,
        kind: Kind::Gauge,
        labels: "",
        help: "Regions of shared memory that are registered; only with shared_memory.enabled",
    },
    Family {
        name: SHARED_MEMORY_BYTES,
        kind: Kind::Gauge,
        labels: "",
        help: "Bytes of the registered regions; only with shared_memory.enabled",
    },
    Family { name: BUILD_INFO, kind: Kind::Gauge, labels: "version, onnxruntime", help: "Always 1" },
];

/// How a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Rest,
    Grpc,
}

/// How a request came to its version; the label `variant`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// The route has it for what no other version gets.
    #[default]
    Stable,
    /// It drew the version that is to take over.
    Canary,
    /// It drew a named arm.
    Arm,
    /// A copy of another request.
    Shadow,
    /// It asked for the version, or the variant, by name.
    Pinned,
}

impl Way {
    pub const ALL: [Way; 5] = [Way::Stable, Way::Canary, Way::Arm, Way::Shadow, Way::Pinned];

    pub fn as_str(self) -> &'static str {
        match self {
            Way::Stable => "stable",
            Way::Canary => "canary",
            Way::Arm => "arm",
            Way::Shadow => "shadow",
            Way::Pinned => "pinned",
        }
    }
}

/// Why a request was given up before it cost a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    Cancelled,
    Deadline,
    /// The queue timeout of the model's own schedule.
    Timeout,
    Overloaded,
    /// Put out of a full queue by a client with less waiting.
    Displaced,
}

const PROTOCOLS: [&str; 2] = ["rest", "grpc"];
const REASONS: [&str; 5] = ["cancelled", "deadline", "timeout", "overloaded", "displaced"];
const PHASES: [&str; 3] = ["input", "infer", "output"];

/// What one execution cost, phase by phase.
#[derive(Clone, Copy, Debug, Default)]
pub struct Phases {
    pub input: Duration,
    pub infer: Duration,
    pub output: Duration,
}

/// All recorders of a server.
pub struct Metrics {
    server: Scope,
    process: metrics_process::Collector,
    versions: Mutex<HashMap<(String, String), Weak<VersionMetrics>>>,
    unknown: Arc<VersionMetrics>,
}

/// One recorder and the handle that renders it.
struct Scope {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl Metrics {
    /// # Panics
    /// Never: the buckets are constants that are not empty.
    pub fn new(release: &str, onnxruntime: &str) -> Arc<Self> {
        let server = Scope::new();
        let process = metrics_process::Collector::default();
        ::metrics::with_local_recorder(&server.recorder, || {
            process.describe();
            gauge!(BUILD_INFO, "version" => release.to_owned(), "onnxruntime" => onnxruntime.to_owned()).set(1.0);
        });
        let unknown = Arc::new(VersionMetrics::new("", ""));
        Arc::new(Self { server, process, versions: Mutex::default(), unknown })
    }

    /// The counters of a version; the same ones while anybody still holds them.
    pub fn version(&self, model: &str, version: &str) -> Arc<VersionMetrics> {
        let mut versions = self.versions.lock();
        versions.retain(|_, known| known.strong_count() > 0);
        let key = (model.to_owned(), version.to_owned());
        if let Some(known) = versions.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        let fresh = Arc::new(VersionMetrics::new(model, version));
        versions.insert(key, Arc::downgrade(&fresh));
        fresh
    }

    /// The counters of requests that never found a version.
    pub fn unknown(&self) -> &Arc<VersionMetrics> {
        &self.unknown
    }

    /// How many regions of shared memory are registered, and their bytes together.
    pub fn shared_memory(&self, regions: usize, bytes: u64) {
        ::metrics::with_local_recorder(&self.server.recorder, || {
            gauge!(SHARED_MEMORY_REGIONS).set(regions as f64);
            gauge!(SHARED_MEMORY_BYTES).set(bytes as f64);
        });
    }

    /// The exposition text of everything there is.
    pub fn render(&self) -> String {
        ::metrics::with_local_recorder(&self.server.recorder, || self.process.collect());
        let versions: Vec<_> = self.versions.lock().values().filter_map(Weak::upgrade).collect();
        let texts = std::iter::once(self.server.handle.render())
            .chain(std::iter::once(self.unknown.render()))
            .chain(versions.iter().map(|version| version.render()));
        merge_families(texts)
    }
}

impl Scope {
    fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        ::metrics::with_local_recorder(&recorder, || {
            for family in &FAMILIES {
                match family.kind {
                    Kind::Counter => describe_counter!(family.name, family.help),
                    Kind::Gauge => describe_gauge!(family.name, family.help),
                    Kind::Histogram => {}
                }
            }
        });
        Self { recorder, handle }
    }
}

/// The handles of one version, and the running totals that Triton's statistics calls report.
pub struct VersionMetrics {
    scope: Scope,
    labels: [(&'static str, String); 2],
    requests: [[[OnceLock<Counter>; Code::ALL.len() + 1]; Way::ALL.len()]; PROTOCOLS.len()],
    request_duration: Durations,
    execution: OnceLock<ExecutionHandles>,
    dropped: [OnceLock<Counter>; REASONS.len()],
    pub statistics: Statistics,
}

/// What only a version that runs needs.
struct ExecutionHandles {
    queue_duration: Durations,
    compute_duration: [Durations; PHASES.len()],
    batch_size: Histogram<{ BATCH_BUCKETS.len() }>,
    inferences: Counter,
    executions: Counter,
    pending: Gauge,
}

impl VersionMetrics {
    fn new(model: &str, version: &str) -> Self {
        Self {
            scope: Scope::new(),
            labels: [("model", model.to_owned()), ("version", version.to_owned())],
            requests: Default::default(),
            request_duration: Histogram::new(&SECONDS),
            execution: OnceLock::new(),
            dropped: Default::default(),
            statistics: Statistics::default(),
        }
    }

    fn with<T>(&self, register: impl FnOnce(Vec<::metrics::Label>) -> T) -> T {
        let labels = self.labels.iter().map(|(key, value)| ::metrics::Label::new(*key, value.clone())).collect();
        ::metrics::with_local_recorder(&self.scope.recorder, || register(labels))
    }

    fn counter(&self, name: &'static str, more: &[(&'static str, &'static str)]) -> Counter {
        self.with(|labels| counter!(name, joined(labels, more)))
    }

    fn gauge(&self, name: &'static str, more: &[(&'static str, &'static str)]) -> Gauge {
        self.with(|labels| gauge!(name, joined(labels, more)))
    }

    /// The exposition text of the version's families.
    fn render(&self) -> String {
        let mut text = self.scope.handle.render();
        // Names of models and versions have nothing that would have to be escaped.
        let [(model, name), (version, number)] = &self.labels;
        let labels = format!("{model}=\"{name}\",{version}=\"{number}\"");
        // A version that nobody has asked yet has no durations.
        if self.statistics.last_inference_ms.load(Ordering::Relaxed) > 0 {
            head(REQUEST_DURATION, &mut text);
            self.request_duration.render(REQUEST_DURATION, &labels, &mut text);
        }
        if let Some(handles) = self.execution.get() {
            head(QUEUE_DURATION, &mut text);
            handles.queue_duration.render(QUEUE_DURATION, &labels, &mut text);
            head(COMPUTE_DURATION, &mut text);
            for (phase, histogram) in PHASES.iter().zip(&handles.compute_duration) {
                histogram.render(COMPUTE_DURATION, &format!("{labels},phase=\"{phase}\""), &mut text);
            }
            head(BATCH_SIZE, &mut text);
            handles.batch_size.render(BATCH_SIZE, &labels, &mut text);
        }
        text
    }

    /// Counts one answered request; `failure` is `None` for success.
    pub fn request(&self, protocol: Protocol, way: Way, failure: Option<Code>, duration: Duration) {
        let code = failure.map_or(0, |code| code as usize + 1);
        let name = failure.map_or("ok", Code::as_str);
        let labels = || [("protocol", PROTOCOLS[protocol as usize]), ("code", name), ("variant", way.as_str())];
        self.requests[protocol as usize][way as usize][code]
            .get_or_init(|| self.counter(REQUESTS, &labels()))
            .increment(1);
        self.request_duration.record(nanoseconds(duration));
        let tally = if failure.is_none() { &self.statistics.success } else { &self.statistics.fail };
        tally.add(1, duration);
        self.statistics.touch();
    }

    fn execution(&self) -> &ExecutionHandles {
        self.execution.get_or_init(|| ExecutionHandles {
            queue_duration: Histogram::new(&SECONDS),
            compute_duration: PHASES.map(|_| Histogram::new(&SECONDS)),
            batch_size: Histogram::new(&ROWS),
            inferences: self.counter(INFERENCES, &[]),
            executions: self.counter(EXECUTIONS, &[]),
            pending: self.gauge(PENDING, &[]),
        })
    }

    /// Makes the series of a version visible before its first request.
    pub fn prepare(&self) {
        // Not `set`: a version loaded anew shares the gauge with the one it replaces, which may have requests pending.
        self.execution().pending.increment(0.0);
    }

    pub fn submitted(&self) {
        self.execution().pending.increment(1.0);
    }

    pub fn answered(&self) {
        self.execution().pending.decrement(1.0);
    }

    pub fn dropped(&self, reason: DropReason) {
        self.dropped[reason as usize]
            .get_or_init(|| self.counter(DROPPED, &[("reason", REASONS[reason as usize])]))
            .increment(1);
    }

    /// Records how long one request waited for an executor.
    pub fn queued(&self, waited: Duration) {
        self.execution().queue_duration.record(nanoseconds(waited));
        self.statistics.queue.add(1, waited);
    }

    /// Records one successful run of `rows` rows that answered `requests` requests.
    pub fn executed(&self, requests: usize, rows: usize, phases: Phases) {
        let handles = self.execution();
        handles.executions.increment(1);
        handles.inferences.increment(rows as u64);
        handles.batch_size.record(rows as u64);
        let durations = [phases.input, phases.infer, phases.output];
        for (histogram, duration) in handles.compute_duration.iter().zip(durations) {
            histogram.record(nanoseconds(duration));
        }
        self.statistics.executed(requests as u64, rows as u64, durations);
    }

    /// Shows `state` as the one the version is in, out of `all`.
    pub fn state(&self, state: &'static str, all: &[&'static str]) {
        for name in all {
            self.gauge(STATE, &[("state", name)]).set(if *name == state { 1.0 } else { 0.0 });
        }
    }

    /// Shows how the golden check went.
    pub fn golden_check(&self, passed: bool) {
        self.gauge(GOLDEN_CHECK, &[]).set(if passed { 1.0 } else { 0.0 });
    }

    pub fn loaded(&self, took: Duration) {
        self.gauge(LOAD_DURATION, &[]).set(took.as_secs_f64());
    }
}

fn joined(mut labels: Vec<::metrics::Label>, more: &[(&'static str, &'static str)]) -> Vec<::metrics::Label> {
    labels.extend(more.iter().map(|&(key, value)| ::metrics::Label::new(key, value)));
    labels
}

/// The lines in front of a family's samples.
fn head(name: &str, out: &mut String) {
    if let Some(family) = FAMILIES.iter().find(|family| family.name == name) {
        // Writing to a string does not fail.
        let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {}", family.help, family.kind.as_str());
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// How often something happened and how long it took in all.
#[derive(Default)]
pub struct Tally {
    count: AtomicU64,
    ns: AtomicU64,
}

impl Tally {
    fn add(&self, count: u64, each: Duration) {
        self.count.fetch_add(count, Ordering::Relaxed);
        self.ns.fetch_add(nanoseconds(each).saturating_mul(count), Ordering::Relaxed);
    }

    /// Count and nanoseconds.
    pub fn read(&self) -> (u64, u64) {
        (self.count.load(Ordering::Relaxed), self.ns.load(Ordering::Relaxed))
    }
}

/// Running totals per version, as Triton's statistics report them: durations are counted per request.
#[derive(Default)]
pub struct Statistics {
    pub success: Tally,
    pub fail: Tally,
    pub queue: Tally,
    /// Gathering inputs, running the graph, scattering outputs.
    pub compute: [Tally; 3],
    pub inferences: AtomicU64,
    pub executions: AtomicU64,
    /// Milliseconds since the epoch, 0 before the first request.
    pub last_inference_ms: AtomicU64,
    batches: Mutex<BTreeMap<u64, [(u64, u64); 3]>>,
}

impl Statistics {
    fn touch(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_inference_ms.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn executed(&self, requests: u64, rows: u64, durations: [Duration; 3]) {
        self.executions.fetch_add(1, Ordering::Relaxed);
        self.inferences.fetch_add(rows, Ordering::Relaxed);
        let mut batches = self.batches.lock();
        // Large batches share an entry per power of two: how many rows there are is the clients' to choose.
        let size = if rows <= MAX_EXACT_BATCH { rows } else { rows.checked_next_power_of_two().unwrap_or(rows) };
        let batch = batches.entry(size).or_default();
        for ((tally, total), duration) in self.compute.iter().zip(batch).zip(durations) {
            tally.add(requests, duration);
            total.0 += 1;
            total.1 += nanoseconds(duration);
        }
    }

    /// Per batch size in rows: count and nanoseconds of each compute phase.
    pub fn batches(&self) -> BTreeMap<u64, [(u64, u64); 3]> {
        self.batches.lock().clone()
    }
}

/// Joins exposition texts so that each family appears once, with one header.
fn merge_families(texts: impl Iterator<Item = String>) -> String {
    #[derive(Default)]
    struct Lines {
        header: String,
        samples: String,
    }
    let mut families: BTreeMap<String, Lines> = BTreeMap::new();
    for text in texts {
        let mut current = String::new();
        let mut fresh = false;
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(header) = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE ")) {
                let name = header.split(' ').next().unwrap_or_default();
                if name != current {
                    current = name.to_owned();
                    fresh = !families.contains_key(name);
                }
                let family = families.entry(current.clone()).or_default();
                if fresh {
                    family.header.push_str(line);
                    family.header.push('\n');
                }
            } else {
                let family = families.entry(current.clone()).or_default();
                family.samples.push_str(line);
                family.samples.push('\n');
            }
        }
    }
    families.into_values().map(|family| family.header + &family.samples).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_share_families_and_vanish_alone() {
        let metrics = Metrics::new("0.1.0", "1.31.1");
        let one = metrics.version("m", "1");
        let two = metrics.version("m", "2");
        one.request(Protocol::Rest, Way::Stable, None, Duration::from_millis(3));
        two.request(Protocol::Grpc, Way::Stable, Some(Code::NotReady), Duration::from_millis(3));
        let text = metrics.render();
        assert_eq!(text.matches("# TYPE tidegate_requests_total counter").count(), 1);
        assert!(
            text.contains(r#"tidegate_requests_total{model="m",version="1",protocol="rest",code="ok"} 1"#),
            "{text}"
        );
        assert!(text.contains(r#"model="m",version="2",protocol="grpc",code="not_ready"} 1"#), "{text}");
        assert!(text.contains(r#"tidegate_request_duration_seconds_bucket{model="m",version="1",le="0.005"} 1"#));
        drop(one);
        let text = metrics.render();
        assert!(!text.contains(r#"model="m",version="1""#) && text.contains(r#"model="m",version="2""#), "{text}");
    }

    #[test]
    fn a_version_loaded_twice_counts_into_the_same_series() {
        let metrics = Metrics::new("0.1.0", "1.31.1");
        let old = metrics.version("m", "1");
        old.request(Protocol::Rest, Way::Stable, None, Duration::ZERO);
        let new = metrics.version("m", "1");
        drop(old);
        new.request(Protocol::Rest, Way::Stable, None, Duration::ZERO);
        assert!(metrics.render().contains(r#"protocol="rest",code="ok"} 2"#));
    }

    #[test]
    fn statistics_count_requests_and_rows() {
        let metrics = Metrics::new("0.1.0", "1.31.1");
        let version = metrics.version("m", "1");
        let phases = Phases { infer: Duration::from_nanos(10), ..Phases::default() };
        version.executed(3, 8, phases);
        version.executed(1, 8, phases);
        assert_eq!(version.statistics.compute[1].read(), (4, 40));
        assert_eq!(version.statistics.batches()[&8][1], (2, 20));
        assert_eq!(version.statistics.inferences.load(Ordering::Relaxed), 16);
    }
}
