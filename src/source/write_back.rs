//! What is written back to the registry that versions are from: how each stands here, what it did, and which one won.
//!
//! All of it is off until somebody asks for it. Only what is so now is ever written, never what was meanwhile, so nothing
//! queues while a registry is away; and no request, load or rollout waits for it.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Scheme, SourceError, SourceUri};
use crate::{
    id::{ModelName, Version},
    stats::histogram::Histogram,
};

pub mod reporter;

const MINUTE: Duration = Duration::from_secs(60);
/// More often, a registry would have more to do with what is said of the requests than this server with them.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
/// Characters of an alias.
const LONGEST_ALIAS: usize = 255;

/// What a registry is told of the versions that are served from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WriteBack {
    /// Whether versions get the tags `tidegate.digest` (what stands for its files), `tidegate.state` and
    /// `tidegate.rollout` (how its rollout ended).
    pub tags: bool,
    /// Whether the run that made a version gets `serve.requests`, `serve.errors`, `serve.p50_ms` and `serve.p99_ms` of
    /// each interval in which it answered.
    pub metrics: bool,
    /// How often.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub metrics_interval: Duration,
    /// The alias that is set to a version when a rollout has promoted it, and back when it is rolled back. One that
    /// somebody else has moved meanwhile stays where it is. The tag `tidegate.alias` says which rollout was decided upon.
    pub promoted_alias: Option<String>,
}

impl Default for WriteBack {
    fn default() -> Self {
        Self { tags: false, metrics: false, metrics_interval: MINUTE, promoted_alias: None }
    }
}

impl WriteBack {
    pub fn is_off(&self) -> bool {
        !self.tags && !self.metrics && self.promoted_alias.is_none()
    }

    /// Whether it can be, for versions from the place that `key` of the settings names.
    ///
    /// # Errors
    /// What is wrong, naming the key and what was expected.
    pub fn validate(&self, key: &str, place: Option<&SourceUri>) -> Result<(), String> {
        let is_registry =
            |uri: &SourceUri| matches!(uri.scheme(), Scheme::Mlflow | Scheme::MlflowHttps | Scheme::Models);
        if !self.is_off() && !place.is_some_and(is_registry) {
            let place = place.map_or_else(|| "none".to_owned(), |uri| format!("'{uri}'"));
            return Err(format!(
                "write_back is for a model of MLflow's registry: expected {key} to be mlflow://host:5000/name@alias, \
                 mlflow+https://… or models:/…, and it is {place}"
            ));
        }
        if self.metrics_interval < SHORTEST_INTERVAL {
            return Err(format!("write_back.metrics_interval must be at least {SHORTEST_INTERVAL:?}"));
        }
        match &self.promoted_alias {
            Some(alias) if !may_be_set(alias) => Err(format!(
                "write_back.promoted_alias '{}': expected 1 to {LONGEST_ALIAS} letters, digits, _ and -, and neither \
                 'latest' nor 'v' with a number",
                crate::error::shorten(alias)
            )),
            _ => Ok(()),
        }
    }
}

/// A place that keeps what becomes of its versions.
///
/// As for a source, every call may be given up by dropping its future, and says by itself how long it waits. A call that
/// was given up or failed may have been carried out; made again it does no harm.
#[async_trait]
pub trait Recorder: Send + Sync {
    /// Has the place say of a version what the record says; whether it did not yet.
    ///
    /// # Errors
    /// As for a look at the place; `NotFound` when it has no such version any more.
    async fn record(&self, version: &Version, record: &Record) -> Result<bool, SourceError>;

    /// Has an alias follow a rollout that promoted its candidate, unless somebody else has moved the alias meanwhile.
    /// That is decided once for each rollout: who moves the alias afterwards is right.
    ///
    /// # Errors
    /// As for a look at the place.
    async fn promote(&self, promotion: &Promotion) -> Result<Moved, SourceError>;

    /// Keeps what a version did, with the run that made it.
    ///
    /// # Errors
    /// As for a look at the place; `NotFound` when no run is known to have made the version.
    async fn measured(&self, version: &Version, measured: &Measured) -> Result<(), SourceError>;
}

/// What is to be said of a version. What is `None` stays as it is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// What stands for its files: `sha256:…`.
    pub digest: Option<String>,
    /// Its state, and why.
    pub state: Option<String>,
    /// How its rollout ended.
    pub rollout: Option<String>,
}

/// A rollout that has promoted its candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promotion {
    pub alias: String,
    /// The rollout's name and when it promoted the candidate, which no other rollout has in common with it.
    pub rollout: String,
    pub from: Version,
    pub to: Version,
    /// Whether the candidate was taken back since.
    pub is_undone: bool,
}

/// What became of an alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Nothing had to be done, or it was done before.
    Unchanged,
    Written,
    /// Somebody else has moved it; where it is.
    LeftAlone(String),
}

/// What a version has done since it was loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Requests that were answered, well or not.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Seconds that good answers took.
    pub latency: Histogram,
}

/// What a version did in a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measured {
    pub served: Served,
    pub until: SystemTime,
    /// How long it was to be.
    pub interval: Duration,
}

/// What is to be said of a model now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    pub settings: WriteBack,
    /// By version.
    pub records: BTreeMap<String, Record>,
    /// What its last rollout says of the alias, when that is to follow rollouts.
    pub promotion: Option<Promotion>,
}

/// Who knows what is to be said.
pub trait Teller: Send + Sync {
    /// Of a model; `None` when nobody has heard of it. Asked every second.
    fn told(&self, name: &ModelName) -> Option<Told>;

    /// What a version has done, when it is loaded.
    fn served(&self, name: &ModelName, version: &str) -> Option<Served>;
}

impl Record {
    /// This, and what `other` says beside it.
    fn over(self, other: &Self) -> Self {
        let Self { digest, state, rollout } = other;
        Self {
            digest: self.digest.or_else(|| digest.clone()),
            state: self.state.or_else(|| state.clone()),
            rollout: self.rollout.or_else(|| rollout.clone()),
        }
    }
}

impl Served {
    /// What came since `earlier`; all of it, when the version was loaded anew meanwhile.
    fn since(&self, earlier: &Self) -> Self {
        if self.requests < earlier.requests || self.latency.total() < earlier.latency.total() {
            return self.clone();
        }
        Self {
            requests: self.requests - earlier.requests,
            errors: self.errors.saturating_sub(earlier.errors),
            latency: self.latency.since(&earlier.latency),
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.latency.join(&other.latency);
    }
}

impl Measured {
    /// When it ended, in milliseconds since the epoch.
    pub fn moment(&self) -> u64 {
        u64::try_from(self.since_epoch().as_millis()).unwrap_or(u64::MAX)
    }

    /// The intervals since the epoch: it rises across restarts too.
    pub fn step(&self) -> u64 {
        self.since_epoch().as_secs() / self.interval.as_secs().max(1)
    }

    fn since_epoch(&self) -> Duration {
        self.until.duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// Whether MLflow takes it for an alias. It keeps some for its own.
fn may_be_set(alias: &str) -> bool {
    let is_version = alias
        .strip_prefix(['v', 'V'])
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|digit| digit.is_ascii_digit()));
    (1..=LONGEST_ALIAS).contains(&alias.chars().count())
        && alias.chars().all(|letter| letter.is_alphanumeric() || matches!(letter, '_' | '-'))
        && !alias.eq_ignore_ascii_case("latest")
        && !is_version
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(seconds: &[f64]) -> Served {
        let mut latency = Histogram::default();
        seconds.iter().for_each(|&seconds| latency.add(seconds));
        Served { requests: seconds.len() as u64 + 1, errors: 1, latency }
    }

    #[test]
    fn settings_that_cannot_be_are_named() {
        let said = |settings: WriteBack, place: Option<&str>| {
            let place = place.map(|text| SourceUri::parse(text).unwrap());
            settings.validate("source", place.as_ref()).err()
        };
        let on = || WriteBack { tags: true, ..WriteBack::default() };
        for place in ["mlflow://host/iris@a", "mlflow+https://host/iris/3", "models:/iris@a"] {
            assert_eq!(said(on(), Some(place)), None, "{place}");
        }
        let error = said(on(), Some("s3://bucket/iris")).unwrap();
        assert!(error.contains("expected source to be mlflow://host:5000/name@alias"), "{error}");
        assert!(error.ends_with("and it is 's3://bucket/iris'"), "{error}");
        assert!(said(on(), None).unwrap().ends_with("and it is none"));
        assert_eq!(said(WriteBack::default(), None), None);
        let interval = WriteBack { metrics_interval: Duration::from_millis(10), ..WriteBack::default() };
        assert_eq!(said(interval, None).unwrap(), "write_back.metrics_interval must be at least 1s");
        for (alias, fits) in [
            ("champion", true),
            ("9_b-ü", true),
            ("v", true),
            ("", false),
            ("a b", false),
            ("V3", false),
            ("Latest", false),
        ] {
            let settings = WriteBack { promoted_alias: Some(alias.to_owned()), ..WriteBack::default() };
            let error = said(settings, Some("models:/iris@a"));
            assert_eq!(error.is_none(), fits, "{alias}: {error:?}");
            assert!(
                error.is_none_or(|error| error.starts_with(&format!("write_back.promoted_alias '{alias}': expected")))
            );
        }
    }

    #[test]
    fn a_version_that_was_loaded_anew_has_done_what_it_did_since() {
        let (first, second) = (served(&[0.5]), served(&[0.5, 2.0, 2.0]));
        assert_eq!(second.since(&first).requests, 2);
        assert_eq!((second.since(&first).errors, second.since(&first).latency.total()), (0, 2));
        assert_eq!(first.since(&second), first);
    }

    #[test]
    fn steps_count_intervals() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let step = |seconds| Measured { served: served(&[]), until: at(seconds), interval: MINUTE }.step();
        assert_eq!([step(119), step(120), step(180)], [1, 2, 3]);
    }
}
