//! Every family's name, labels and buckets, as README lists them and `/metrics` heads them.

use std::fmt::Write;

use super::histogram::{Histogram, Scale};

pub(super) const REQUESTS: &str = "tidegate_requests_total";
pub(super) const REQUEST_DURATION: &str = "tidegate_request_duration_seconds";
pub(super) const QUEUE_DURATION: &str = "tidegate_queue_duration_seconds";
pub(super) const COMPUTE_DURATION: &str = "tidegate_compute_duration_seconds";
pub(super) const TOKENIZE_DURATION: &str = "tidegate_tokenize_duration_seconds";
pub(super) const TOKENS: &str = "tidegate_tokens_total";
pub(super) const PADDING: &str = "tidegate_padding_tokens_total";
pub(super) const BATCH_SIZE: &str = "tidegate_batch_size";
pub(super) const INFERENCES: &str = "tidegate_inferences_total";
pub(super) const EXECUTIONS: &str = "tidegate_executions_total";
pub(super) const PENDING: &str = "tidegate_pending_requests";
pub(super) const DROPPED: &str = "tidegate_dropped_requests_total";
pub(super) const STATE: &str = "tidegate_model_state";
pub(super) const LOAD_DURATION: &str = "tidegate_model_load_duration_seconds";
pub(super) const GOLDEN_CHECK: &str = "tidegate_golden_check";
pub(super) const SIGNATURE_CHECKS: &str = "tidegate_signature_checks_total";
pub(super) const SHARED_MEMORY_REGIONS: &str = "tidegate_shared_memory_regions";
pub(super) const SHARED_MEMORY_BYTES: &str = "tidegate_shared_memory_bytes";
pub(super) const STATE_STORED: &str = "tidegate_state_stored";
pub(super) const SOURCE_UP: &str = "tidegate_source_up";
pub(super) const SOURCE_ANSWERED: &str = "tidegate_source_last_answer_timestamp_seconds";
pub(super) const SOURCE_PROBLEMS: &str = "tidegate_source_problems";
pub(super) const SOURCE_FETCHING: &str = "tidegate_source_fetching_bytes";
pub(super) const SOURCE_WRITE_BACKS: &str = "tidegate_source_write_backs_total";
pub(super) const PREDICTIONS: &str = "tidegate_predictions_total";
pub(super) const PREDICTION_SCORE: &str = "tidegate_prediction_score";
pub(super) const PREDICTION_VALUE: &str = "tidegate_prediction_value";
pub(super) const PREDICTION_MEAN: &str = "tidegate_prediction_mean";
pub(super) const PREDICTION_STDDEV: &str = "tidegate_prediction_stddev";
pub(super) const PREDICTION_NONFINITE: &str = "tidegate_prediction_nonfinite_total";
pub(super) const ROLLOUT_PHASE: &str = "tidegate_rollout_phase";
pub(super) const ROLLOUT_WEIGHT: &str = "tidegate_rollout_weight_ratio";
pub(super) const ROLLOUT_STEP: &str = "tidegate_rollout_step";
pub(super) const ROLLOUT_STEP_AGE: &str = "tidegate_rollout_step_age_seconds";
pub(super) const ROLLOUT_STEP_DURATION: &str = "tidegate_rollout_step_duration_seconds";
pub(super) const ROLLOUT_VERDICT: &str = "tidegate_rollout_verdict";
pub(super) const SHADOW_COMPARED: &str = "tidegate_shadow_compared_total";
pub(super) const SHADOW_DISAGREED: &str = "tidegate_shadow_disagreed_total";
pub(super) const SHADOW_FAILED: &str = "tidegate_shadow_failed_total";
pub(super) const SHADOW_MISSING: &str = "tidegate_shadow_missing_total";
pub(super) const SHADOW_MAX_DIFFERENCE: &str = "tidegate_shadow_difference_max";
pub(super) const SHADOW_MEAN_DIFFERENCE: &str = "tidegate_shadow_difference_mean";
pub(super) const SHADOW_COSINE: &str = "tidegate_shadow_cosine_mean";
pub(super) const BUILD_INFO: &str = "tidegate_build_info";

/// Upper bounds of every duration histogram, in seconds.
pub const DURATION_BUCKETS: [f64; 17] =
    [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Upper bounds of the batch size histogram, in rows.
pub const BATCH_BUCKETS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Upper bounds of the histogram of scores: finer where classifiers are sure of themselves, and with some above 1 for
/// scores that are no probabilities.
pub const SCORE_BUCKETS: [f64; 20] =
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];

/// Upper bounds of the histogram of values: zero, and powers of four from a thousandth to a million on both sides of it.
/// They are ends of buckets of `stats::histogram`, in which values are counted.
pub const VALUE_BUCKETS: [f64; 33] = value_buckets();

const fn value_buckets() -> [f64; 33] {
    let mut bounds = [0.0; 33];
    let (mut index, mut power) = (0, 1.0 / 1024.0);
    while index < 16 {
        bounds[17 + index] = power;
        bounds[15 - index] = -power;
        power *= 4.0;
        index += 1;
    }
    bounds
}

/// Durations are recorded in nanoseconds.
pub(super) static SECONDS: Scale<{ DURATION_BUCKETS.len() }> = Scale::new(DURATION_BUCKETS, 1e9);
pub(super) static ROWS: Scale<{ BATCH_BUCKETS.len() }> = Scale::new(BATCH_BUCKETS, 1.0);

pub(super) type Durations = Histogram<{ DURATION_BUCKETS.len() }>;

/// A metric family as README documents it.
pub struct Family {
    pub name: &'static str,
    pub kind: Kind,
    /// What there is one series of, or several with more labels.
    pub of: Of,
    /// Labels beside those.
    pub labels: &'static str,
    pub help: &'static str,
}

/// What series are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    Version,
    Rollout,
    Server,
}

impl Of {
    /// The labels that all of them have.
    pub fn labels(self) -> &'static [&'static str] {
        match self {
            Of::Version => &["model", "version"],
            Of::Rollout => &["model", "rollout"],
            Of::Server => &[],
        }
    }
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
pub const FAMILIES: [Family; 44] = [
    Family {
        name: REQUESTS,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "protocol, code, variant",
        help: "Inference requests answered, and, with the variant shadow, copies of them",
    },
    Family {
        name: REQUEST_DURATION,
        of: Of::Version,
        kind: Kind::Histogram,
        labels: "variant",
        help: "Seconds from a request's arrival to its answer",
    },
    Family {
        name: QUEUE_DURATION,
        of: Of::Version,
        kind: Kind::Histogram,
        labels: "",
        help: "Seconds a request waited for an executor",
    },
    Family {
        name: COMPUTE_DURATION,
        of: Of::Version,
        kind: Kind::Histogram,
        labels: "phase",
        help: "Seconds an execution spent gathering inputs, running the graph, and scattering outputs",
    },
    Family {
        name: TOKENIZE_DURATION,
        of: Of::Version,
        kind: Kind::Histogram,
        labels: "",
        help: "Seconds it took to make tokens of a request's texts",
    },
    Family { name: TOKENS, of: Of::Version, kind: Kind::Counter, labels: "", help: "Tokens run, without padding" },
    Family {
        name: PADDING,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "",
        help: "Padding run beside these tokens, so that texts of several lengths share runs",
    },
    Family { name: BATCH_SIZE, of: Of::Version, kind: Kind::Histogram, labels: "", help: "Rows per execution" },
    Family { name: INFERENCES, of: Of::Version, kind: Kind::Counter, labels: "", help: "Rows inferred" },
    Family { name: EXECUTIONS, of: Of::Version, kind: Kind::Counter, labels: "", help: "Runs of the graph" },
    Family {
        name: PENDING,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "",
        help: "Requests submitted and not yet answered",
    },
    Family {
        name: DROPPED,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "reason",
        help: "Requests given up before they cost a run: cancelled, deadline, timeout (of the queue), overloaded, or \
               displaced (from a full queue, by a client with less waiting)",
    },
    Family {
        name: STATE,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "state",
        help: "1 for the state a version is in, else 0",
    },
    Family {
        name: LOAD_DURATION,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "",
        help: "Seconds the version took to load and warm",
    },
    Family {
        name: GOLDEN_CHECK,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "",
        help: "1 when the version passed its latest golden check, 0 when it failed; only with a golden file",
    },
    Family {
        name: SIGNATURE_CHECKS,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "outcome",
        help: "Looks at the version's signature before a load: verified, unsigned or refused; only where signatures are \
               looked at",
    },
    Family {
        name: SHARED_MEMORY_REGIONS,
        of: Of::Server,
        kind: Kind::Gauge,
        labels: "",
        help: "Regions of shared memory that are registered; only with shared_memory.enabled",
    },
    Family {
        name: SHARED_MEMORY_BYTES,
        of: Of::Server,
        kind: Kind::Gauge,
        labels: "",
        help: "Bytes of the registered regions; only with shared_memory.enabled",
    },
    Family {
        name: STATE_STORED,
        of: Of::Server,
        kind: Kind::Gauge,
        labels: "",
        help: "1 when the server's state could be read or stored when that was tried last, else 0: changes are then refused",
    },
    Family {
        name: SOURCE_UP,
        of: Of::Server,
        kind: Kind::Gauge,
        labels: "source",
        help: "1 when the place that models are mirrored from answered when it was looked at last, else 0",
    },
    Family {
        name: SOURCE_ANSWERED,
        of: Of::Server,
        kind: Kind::Gauge,
        labels: "source",
        help: "When that place answered last",
    },
    Family {
        name: SOURCE_PROBLEMS,
        of: Of::Server,
        kind: Kind::Gauge,
        labels: "source",
        help: "Versions and settings there that could not be mirrored when that was tried last",
    },
    Family {
        name: SOURCE_FETCHING,
        of: Of::Server,
        kind: Kind::Gauge,
        labels: "source",
        help: "Bytes still to come of the versions that are being fetched",
    },
    Family {
        name: SOURCE_WRITE_BACKS,
        of: Of::Server,
        kind: Kind::Counter,
        labels: "source, outcome",
        help: "Tries to write tags, metrics or an alias back to that place: written, unchanged (it was so already, or \
               somebody else has moved the alias), denied or failed; only with write_back",
    },
    Family {
        name: PREDICTIONS,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "variant, output, label",
        help: "Answers with each label: the 20 that come most often, and other for the rest; a class of an output with a labels file by its name",
    },
    Family {
        name: PREDICTION_SCORE,
        of: Of::Version,
        kind: Kind::Histogram,
        labels: "variant, output",
        help: "Score of the winning class",
    },
    Family {
        name: PREDICTION_VALUE,
        of: Of::Version,
        kind: Kind::Histogram,
        labels: "variant, output",
        help: "Values of an output of one number",
    },
    Family {
        name: PREDICTION_MEAN,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "variant, output",
        help: "Mean of about the last thousand values of an output of one number",
    },
    Family {
        name: PREDICTION_STDDEV,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "variant, output",
        help: "Standard deviation of about the last thousand values of an output of one number",
    },
    Family {
        name: PREDICTION_NONFINITE,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "variant, output",
        help: "Elements of outputs of floats that are NaN or infinite, of those that are looked at: up to 64 rows of values and \
               scores, and 4096 elements of the rest of an answer",
    },
    Family {
        name: ROLLOUT_PHASE,
        of: Of::Rollout,
        kind: Kind::Gauge,
        labels: "rollout, phase",
        help: "1 for the phase that a model's current or last rollout is in, else 0",
    },
    Family {
        name: ROLLOUT_WEIGHT,
        of: Of::Rollout,
        kind: Kind::Gauge,
        labels: "rollout",
        help: "Share of the requests that the candidate gets, 0 to 1",
    },
    Family {
        name: ROLLOUT_STEP,
        of: Of::Rollout,
        kind: Kind::Gauge,
        labels: "rollout",
        help: "Canary step that the rollout is at, from 0",
    },
    Family {
        name: ROLLOUT_STEP_AGE,
        of: Of::Rollout,
        kind: Kind::Gauge,
        labels: "rollout",
        help: "Seconds since the rollout came to its phase and step",
    },
    Family {
        name: ROLLOUT_STEP_DURATION,
        of: Of::Rollout,
        kind: Kind::Gauge,
        labels: "rollout, bound",
        help: "What the step takes at least (bound min) and at most (max), while it gets copies or requests",
    },
    Family {
        name: ROLLOUT_VERDICT,
        of: Of::Rollout,
        kind: Kind::Gauge,
        labels: "rollout, metric",
        help: "What the judge found last of the candidate: 1 not worse, 0 inconclusive, -1 worse",
    },
    Family {
        name: SHADOW_COMPARED,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "output",
        help: "Answers to copies of requests that were compared with the live ones",
    },
    Family {
        name: SHADOW_DISAGREED,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "output",
        help: "Those with another label, another shape or type, a number against none, or without the output",
    },
    Family {
        name: SHADOW_FAILED,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "",
        help: "Copies that failed where the live answer was good",
    },
    Family {
        name: SHADOW_MISSING,
        of: Of::Version,
        kind: Kind::Counter,
        labels: "reason",
        help: "Copies without an answer: full (as many waited as may), busy (the processor was), late, or untyped (the \
               request had the types of the live version, and the candidate takes others)",
    },
    Family {
        name: SHADOW_MAX_DIFFERENCE,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "output",
        help: "Largest absolute difference of an element from the live one's",
    },
    Family {
        name: SHADOW_MEAN_DIFFERENCE,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "output",
        help: "Mean absolute difference of elements from the live ones",
    },
    Family {
        name: SHADOW_COSINE,
        of: Of::Version,
        kind: Kind::Gauge,
        labels: "output",
        help: "Mean cosine of answers to copies and live ones",
    },
    Family { name: BUILD_INFO, of: Of::Server, kind: Kind::Gauge, labels: "version, onnxruntime", help: "Always 1" },
];

/// The lines in front of a family's samples.
pub(super) fn head(name: &str, out: &mut String) {
    if let Some(family) = FAMILIES.iter().find(|family| family.name == name) {
        // Writing to a string does not fail.
        let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {}", family.help, family.kind.as_str());
    }
}
