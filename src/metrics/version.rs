//! `VersionMetrics`: the handles of one version, which its hot path counts with.

use std::{sync::OnceLock, time::Duration};

use ::metrics::{Counter, Gauge, counter, gauge};

use super::{
    DropReason, Phases, Protocol, Scope, Way, families,
    families::{Durations, ROWS, SECONDS, head},
    histogram::Histogram,
    nanoseconds,
    statistics::Statistics,
};
use crate::error::Code;

const PROTOCOLS: [&str; 2] = ["rest", "grpc"];
const REASONS: [&str; 5] = ["cancelled", "deadline", "timeout", "overloaded", "displaced"];
const PHASES: [&str; 3] = ["input", "infer", "output"];

/// The handles of one version, and the running totals that Triton's statistics calls report.
pub struct VersionMetrics {
    scope: Scope,
    labels: [(&'static str, String); 2],
    requests: [[[OnceLock<Counter>; Code::ALL.len() + 1]; PROTOCOLS.len()]; Way::ALL.len()],
    /// Of the ways that requests came in.
    request_duration: [OnceLock<Durations>; Way::ALL.len()],
    execution: OnceLock<ExecutionHandles>,
    /// Of a version that takes raw text, and how many tokens it was.
    tokenize: OnceLock<Durations>,
    tokens: OnceLock<[Counter; 2]>,
    dropped: [OnceLock<Counter>; REASONS.len()],
    pub statistics: Statistics,
}

/// What only a version that runs needs.
struct ExecutionHandles {
    queue_duration: Durations,
    compute_duration: [Durations; PHASES.len()],
    batch_size: Histogram<{ families::BATCH_BUCKETS.len() }>,
    inferences: Counter,
    executions: Counter,
    pending: Gauge,
}

impl VersionMetrics {
    pub(super) fn new(model: &str, version: &str) -> Self {
        Self {
            scope: Scope::new(),
            labels: [("model", model.to_owned()), ("version", version.to_owned())],
            requests: Default::default(),
            request_duration: Default::default(),
            execution: OnceLock::new(),
            tokenize: OnceLock::new(),
            tokens: OnceLock::new(),
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
    pub(super) fn render(&self) -> String {
        let mut text = self.scope.handle.render();
        // Names of models and versions have nothing that would have to be escaped.
        let [(model, name), (version, number)] = &self.labels;
        let labels = format!("{model}=\"{name}\",{version}=\"{number}\"");
        let asked = Way::ALL.iter().zip(&self.request_duration).filter_map(|(way, found)| Some((way, found.get()?)));
        for (index, (way, histogram)) in asked.enumerate() {
            if index == 0 {
                head(families::REQUEST_DURATION, &mut text);
            }
            let labels = format!("{labels},variant=\"{}\"", way.as_str());
            histogram.render(families::REQUEST_DURATION, &labels, &mut text);
        }
        if let Some(histogram) = self.tokenize.get() {
            head(families::TOKENIZE_DURATION, &mut text);
            histogram.render(families::TOKENIZE_DURATION, &labels, &mut text);
        }
        if let Some(handles) = self.execution.get() {
            head(families::QUEUE_DURATION, &mut text);
            handles.queue_duration.render(families::QUEUE_DURATION, &labels, &mut text);
            head(families::COMPUTE_DURATION, &mut text);
            for (phase, histogram) in PHASES.iter().zip(&handles.compute_duration) {
                histogram.render(families::COMPUTE_DURATION, &format!("{labels},phase=\"{phase}\""), &mut text);
            }
            head(families::BATCH_SIZE, &mut text);
            handles.batch_size.render(families::BATCH_SIZE, &labels, &mut text);
        }
        text
    }

    /// Counts one answered request; `failure` is `None` for success.
    pub fn request(&self, protocol: Protocol, way: Way, failure: Option<Code>, duration: Duration) {
        let code = failure.map_or(0, |code| code as usize + 1);
        let name = failure.map_or("ok", Code::as_str);
        let labels = || [("protocol", PROTOCOLS[protocol as usize]), ("code", name), ("variant", way.as_str())];
        self.requests[way as usize][protocol as usize][code]
            .get_or_init(|| self.counter(families::REQUESTS, &labels()))
            .increment(1);
        let durations = self.request_duration[way as usize].get_or_init(|| Histogram::new(&SECONDS));
        durations.record(nanoseconds(duration));
        // Triton's statistics are of what clients asked for.
        if way != Way::Shadow {
            let tally = if failure.is_none() { &self.statistics.success } else { &self.statistics.fail };
            tally.add(1, duration);
            self.statistics.touch();
        }
    }

    fn execution(&self) -> &ExecutionHandles {
        self.execution.get_or_init(|| ExecutionHandles {
            queue_duration: Histogram::new(&SECONDS),
            compute_duration: PHASES.map(|_| Histogram::new(&SECONDS)),
            batch_size: Histogram::new(&ROWS),
            inferences: self.counter(families::INFERENCES, &[]),
            executions: self.counter(families::EXECUTIONS, &[]),
            pending: self.gauge(families::PENDING, &[]),
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
            .get_or_init(|| self.counter(families::DROPPED, &[("reason", REASONS[reason as usize])]))
            .increment(1);
    }

    /// Records how long one request waited for an executor.
    pub fn queued(&self, waited: Duration) {
        self.execution().queue_duration.record(nanoseconds(waited));
        self.statistics.queue.add(1, waited);
    }

    /// Records how long it took to make tokens of a request's texts.
    pub fn tokenized(&self, took: Duration) {
        self.tokenize.get_or_init(|| Histogram::new(&SECONDS)).record(nanoseconds(took));
    }

    /// Records a run of so many tokens, and of so much padding.
    pub fn read(&self, tokens: usize, padding: usize) {
        let counted = || [families::TOKENS, families::PADDING].map(|family| self.counter(family, &[]));
        let [read, padded] = self.tokens.get_or_init(counted);
        read.increment(tokens as u64);
        padded.increment(padding as u64);
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
            self.gauge(families::STATE, &[("state", name)]).set(if *name == state { 1.0 } else { 0.0 });
        }
    }

    /// Shows how the golden check went.
    pub fn golden_check(&self, passed: bool) {
        self.gauge(families::GOLDEN_CHECK, &[]).set(if passed { 1.0 } else { 0.0 });
    }

    /// Counts one look at the version's signature.
    pub fn signature_checked(&self, outcome: &'static str) {
        self.counter(families::SIGNATURE_CHECKS, &[("outcome", outcome)]).increment(1);
    }

    pub fn loaded(&self, took: Duration) {
        self.gauge(families::LOAD_DURATION, &[]).set(took.as_secs_f64());
    }
}

fn joined(mut labels: Vec<::metrics::Label>, more: &[(&'static str, &'static str)]) -> Vec<::metrics::Label> {
    labels.extend(more.iter().map(|&(key, value)| ::metrics::Label::new(key, value)));
    labels
}
