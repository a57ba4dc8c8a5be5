//! The documents of the admin API, as the server writes them and the command line reads them.
//!
//! Shares are in percent, times in seconds, and moments are texts of RFC 3339 with milliseconds. Whoever reads them
//! must bear with fields that are not known here.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    rollout::{
        Phase,
        judge::{Finding, Judgement, Verdict},
    },
    source::{Lineage, ModelSignature, card::Card},
};

/// A model: its versions, and who gets which of them.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ModelStatus {
    pub name: String,
    /// The version that answers requests that name none, but for those that the route gives to another.
    pub default_version: Option<String>,
    /// Why the model has no version at all.
    pub problem: Option<String>,
    pub versions: Vec<VersionStatus>,
    /// The versions that aliases stand for; requests may name a version by its alias.
    #[serde(default)]
    pub aliases: BTreeMap<String, String>,
    /// How requests are divided; null when the default version gets all of them and no rollout is under way.
    pub route: Option<RouteStatus>,
    /// The rollout under way, or the last one.
    pub rollout: Option<RolloutSummary>,
    /// Rises with every change of route or rollout. It is the ETag, and what If-Match has to say.
    pub epoch: u64,
}

/// One version of a model.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct VersionStatus {
    pub version: String,
    pub state: String,
    /// Why it is in this state; empty when there is nothing to say.
    pub reason: String,
    #[serde(flatten)]
    pub serving: Option<ServingStatus>,
}

/// What is known of a version once it serves.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ServingStatus {
    pub instances: usize,
    pub batching: bool,
    pub batching_reason: String,
    pub batch_rows: usize,
    pub max_batch_size: Option<usize>,
    pub pending_requests: usize,
    pub load_seconds: f64,
    pub notes: Vec<String>,
}

/// A version, with what is known of its files.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct VersionDetails {
    pub model: String,
    pub version: String,
    pub state: String,
    /// Why it is in this state; empty when there is nothing to say.
    pub reason: String,
    /// `sha256:` of the files' lines `path NUL sha256 LF`, sorted by path; null when nobody has seen the files, or
    /// those that serve have been replaced by others that do not.
    pub digest: Option<String>,
    pub files: Vec<FileStatus>,
    /// The URI of the place they are from, without credentials; null of a folder's own.
    pub source: Option<String>,
    /// The revision that the version had there.
    pub revision: Option<String>,
    /// What its place knew of it when it was fetched, and its names there as of the last look.
    pub lineage: Option<Lineage>,
    /// The inputs and outputs that MLflow has told clients of, in its own words; null when it has not saved the model.
    pub signature: Option<ModelSignature>,
    /// What its files, or else the run that made it, say of the model.
    pub card: Option<Card>,
    /// What of card and signature could not be read, and why.
    #[serde(default)]
    pub card_notes: Vec<String>,
    /// How it was found to be signed when it was loaded, or was to be; null when nobody looked.
    pub signed: Option<SignatureStatus>,
}

/// What the signature over a version's files is worth.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SignatureStatus {
    /// `verified`, `unsigned`, or `refused`: not by somebody who is trusted, or not over these files.
    pub state: String,
    /// What becomes of the version when it is not verified: `warn` or `enforce`.
    pub policy: String,
    /// `key` or `certificate`; null when it is not verified.
    pub method: Option<String>,
    /// SHA-256 of the key's PEM, in hexadecimal.
    pub key: Option<String>,
    /// The names in the signer's certificate.
    pub identity: Option<String>,
    /// Why it is not verified.
    pub reason: Option<String>,
}

/// A file of a version.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct FileStatus {
    /// Below the version's folder.
    pub path: String,
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// A place that models are mirrored from.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SourceStatus {
    /// Its URI, without credentials.
    pub uri: String,
    /// When it last answered.
    pub answered: Option<String>,
    /// Since when it is out of reach; null when it answered the last look.
    pub away_since: Option<String>,
    /// What went wrong with the last look, when it is out of reach.
    pub error: Option<String>,
    /// Looks in a row that failed.
    pub failures: u32,
    /// Why it is followed no longer, until the server is started anew; null as long as it is.
    pub given_up: Option<String>,
    pub fetching: Vec<FetchingStatus>,
    /// What could not be mirrored when that was tried last.
    pub problems: Vec<SourceProblem>,
    /// How it stands with what is written back there; null when nothing is.
    pub write_back: Option<WriteBackStatus>,
}

/// How it stands with what is written back to a place.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct WriteBackStatus {
    /// When the place took something last, or had it already.
    pub last: Option<String>,
    /// Why something could not be written when that was tried last; null when all was.
    pub error: Option<String>,
    /// When that was tried first.
    pub since: Option<String>,
    /// What became of the alias when a rollout last promoted or took back a version; null when none did since the start.
    pub alias: Option<String>,
}

/// A version on its way from a place.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct FetchingStatus {
    pub model: String,
    /// Null for the files beside the versions: settings, labels.
    pub version: Option<String>,
    pub fetched_bytes: u64,
    pub total_bytes: u64,
    pub since: String,
}

/// Why a version is not mirrored.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct SourceProblem {
    pub model: String,
    /// Null for the files beside the versions: settings, labels.
    pub version: Option<String>,
    pub error: String,
    /// When it was tried first.
    pub since: String,
}

/// How the requests for a model are divided.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RouteStatus {
    /// What keys are drawn by: `MODEL/rN`.
    pub id: String,
    /// Gets what no arm gets.
    pub stable: String,
    pub arms: Vec<ArmStatus>,
    pub shadow: Option<Share>,
    /// Where the key stands by which a request keeps its version; null for the request's id.
    pub sticky: Option<String>,
}

/// A version that gets a share of the requests under a name of its own; the canary's is `canary`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ArmStatus {
    pub name: String,
    pub version: String,
    pub percent: f64,
}

/// A version and its share of the requests, or of their copies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Share {
    pub version: String,
    /// From 0 to 100.
    pub percent: f64,
}

/// A rollout in short.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RolloutSummary {
    pub id: String,
    pub phase: Phase,
    /// The step it is at, as an index of the steps.
    pub step: usize,
    pub weight_percent: f64,
    pub stable: String,
    pub candidate: String,
}

/// A rollout, with what the judge sees and all that happened.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RolloutStatus {
    pub id: String,
    pub model: String,
    pub phase: Phase,
    /// Why it is in this phase and step.
    pub reason: String,
    /// The step it is at, as an index of `steps`.
    pub step: usize,
    pub steps: Vec<StepStatus>,
    /// The step of copies before them, if any.
    pub shadow: Option<StepStatus>,
    /// The candidate's share of the answers now.
    pub weight_percent: f64,
    pub stable: String,
    pub candidate: String,
    /// Where the key stands by which a request keeps its version; null for the request's id.
    pub sticky: Option<String>,
    /// The model's; it is the ETag, and what If-Match has to say.
    pub epoch: u64,
    /// Since when it is in this phase and step.
    pub since: String,
    pub step_age_seconds: f64,
    /// What answers should take at most; null before the first step.
    pub objective_seconds: Option<f64>,
    /// Answers of the candidate that the verdicts rest on.
    pub samples: u64,
    /// What the judge found last; null before it looked.
    pub finding: Option<Finding>,
    /// The same, metric by metric.
    pub verdicts: Vec<Verdict>,
    /// Whether the step was passed that it is paused at: resumed, it goes on to what comes next; else it stays at the
    /// step.
    pub passed: bool,
    /// How the candidate's answers to copies compare with the live ones; null before there were copies, and when it is
    /// not loaded.
    pub copies: Option<CopiesStatus>,
    /// Every change, oldest first.
    pub history: Vec<TransitionStatus>,
}

/// What became of the copies that a version got since it was loaded.
#[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CopiesStatus {
    /// Answers that were compared with the live ones.
    pub compared: u64,
    /// Those with another label in some output.
    pub disagreed: u64,
    /// Copies that failed while the live request went well.
    pub failed: u64,
    /// Copies without an answer: as many waited as may, the processor was busy, or the answer came too late.
    pub missing: u64,
    pub outputs: Vec<OutputComparedStatus>,
    /// What could not be compared the last time that something could not.
    pub unlike: Option<String>,
}

/// How one output of the answers to copies compares with the live one.
#[derive(Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OutputComparedStatus {
    pub output: String,
    pub compared: u64,
    /// Those with another label, a number against none, or of another shape or type.
    pub disagreed: u64,
    /// The largest difference of two elements; null of what is no float.
    pub max_difference: Option<f64>,
    /// The mean over answers of the mean difference of their elements.
    pub mean_difference: Option<f64>,
    /// The mean cosine of answers as vectors.
    pub cosine: Option<f64>,
}

/// One step of a rollout.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct StepStatus {
    /// The candidate's share of the requests, or of their copies.
    pub weight_percent: f64,
    pub min_duration_seconds: f64,
    /// Answers of the candidate that must be seen.
    pub min_samples: u64,
    /// After so long without them it is inconclusive.
    pub max_duration_seconds: f64,
    /// Whether an operator has to let it go on from here.
    pub pause: bool,
}

/// One change of a rollout.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct TransitionStatus {
    pub at: String,
    pub from: Phase,
    pub to: Phase,
    pub step: usize,
    pub weight_percent: f64,
    pub reason: String,
    /// What the judge saw, when it was the judge.
    pub judgement: Option<Judgement>,
}

/// A part of the audit log, oldest first.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct AuditPage {
    pub entries: Vec<AuditEntry>,
    /// Where the entries go on, as path and query; null when these are the last.
    pub next: Option<String>,
}

/// One entry of the audit log.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// Counted from 1, without a gap.
    pub number: u64,
    pub at: String,
    pub model: String,
    /// Who did it: an operator by name, `judge`, or `repository`.
    pub author: String,
    pub action: String,
    pub reason: String,
    /// The numbers behind it.
    pub details: Value,
    /// SHA-256 over this entry and the hash of the one before.
    pub hash: String,
}

/// What of a model is other than its files and settings in the repository have it.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct OverrideStatus {
    pub model: String,
    /// The version that serves where new ones do not take over by themselves.
    pub stable: Option<String>,
    /// How its requests are divided by hand.
    pub route: Option<RouteByHand>,
    /// Versions that do not take over by themselves, until their files change or an operator starts a rollout to them.
    pub passed_over: Vec<PassedOverStatus>,
    /// The rollout under way.
    pub rollout: Option<RolloutSummary>,
}

/// A route, who made it, and why.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct RouteByHand {
    #[serde(flatten)]
    pub route: RouteStatus,
    pub author: String,
    pub reason: String,
    pub since: String,
}

/// A version that does not take over by itself, and why.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct PassedOverStatus {
    pub version: String,
    pub reason: String,
    pub since: String,
}

/// Models of which no override is left.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Cleared {
    pub cleared: Vec<String>,
}

/// Why a call failed.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Refusal {
    pub error: String,
    /// With 409: how the model stands now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ModelStatus>,
}
