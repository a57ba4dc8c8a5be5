//! Every family's name, labels and buckets, as README lists them and `/metrics` heads them.

use std::fmt::Write;

use super::histogram::{Histogram, Scale};

pub(super) const REQUESTS: &str = "tidegate_requests_total";
pub(super) const REQUEST_DURATION: &str = "tidegate_request_duration_seconds";
pub(super) const QUEUE_DURATION: &str = "tidegate_queue_duration_seconds";
pub(super) const COMPUTE_DURATION: &str = "tidegate_compute_duration_seconds";
pub(super) const BATCH_SIZE: &str = "tidegate_batch_size";
pub(super) const INFERENCES: &str = "tidegate_inferences_total";
pub(super) const EXECUTIONS: &str = "tidegate_executions_total";
pub(super) const PENDING: &str = "tidegate_pending_requests";
pub(super) const DROPPED: &str = "tidegate_dropped_requests_total";
pub(super) const STATE: &str = "tidegate_model_state";
pub(super) const LOAD_DURATION: &str = "tidegate_model_load_duration_seconds";
pub(super) const SHARED_MEMORY_REGIONS: &str = "tidegate_shared_memory_regions";
pub(super) const SHARED_MEMORY_BYTES: &str = "tidegate_shared_memory_bytes";
pub(super) const BUILD_INFO: &str = "tidegate_build_info";

/// Upper bounds of every duration histogram, in seconds.
pub const DURATION_BUCKETS: [f64; 17] =
    [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Upper bounds of the batch size histogram, in rows.
pub const BATCH_BUCKETS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Durations are recorded in nanoseconds.
pub(super) static SECONDS: Scale<{ DURATION_BUCKETS.len() }> = Scale::new(DURATION_BUCKETS, 1e9);
pub(super) static ROWS: Scale<{ BATCH_BUCKETS.len() }> = Scale::new(BATCH_BUCKETS, 1.0);

pub(super) type Durations = Histogram<{ DURATION_BUCKETS.len() }>;

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
pub const FAMILIES: [Family; 14] = [
    Family { name: REQUESTS, kind: Kind::Counter, labels: "protocol, code", help: "Inference requests answered" },
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

/// The lines in front of a family's samples.
pub(super) fn head(name: &str, out: &mut String) {
    if let Some(family) = FAMILIES.iter().find(|family| family.name == name) {
        // Writing to a string does not fail.
        let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {}", family.help, family.kind.as_str());
    }
}
