//! Every metric's name, labels and buckets; typed handles for those who count; the text Prometheus scrapes.
//!
//! Each loaded version counts into a recorder of its own, and a scrape merges them by family. So the series of a
//! version disappear with it, which one shared recorder cannot do, and a hot path holds handles instead of
//! looking names up. Histograms are our own. This module is the only one that may use the raw macros of the
//! `metrics` crate.
#![expect(clippy::disallowed_macros, reason = "the vocabulary itself is written with the raw macros")]

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ::metrics::{describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use parking_lot::Mutex;

mod exposition;
mod families;
mod histogram;
mod page;
mod predictions;
mod rollouts;
mod sources;
mod statistics;
mod version;

pub use families::{BATCH_BUCKETS, DURATION_BUCKETS, FAMILIES, Family, Kind, Of, SCORE_BUCKETS, VALUE_BUCKETS};
use families::{BUILD_INFO, SHARED_MEMORY_BYTES, SHARED_MEMORY_REGIONS, STATE_STORED};
pub use page::{Buckets, Page};
pub use predictions::{OTHER, Predictions, SHOWN_LABELS};
pub use rollouts::{CopiesCompared, OutputCompared, RolloutStanding};
pub use sources::SourceStanding;
pub use statistics::{Statistics, Tally};
pub use version::VersionMetrics;

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
    /// Whether the server's state could be stored.
    is_stored: AtomicBool,
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
        Arc::new(Self { server, process, versions: Mutex::default(), unknown, is_stored: AtomicBool::new(true) })
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

    /// Whether the server's state could be read or stored; returns what was so before.
    pub fn state_stored(&self, stored: bool) -> bool {
        ::metrics::with_local_recorder(&self.server.recorder, || gauge!(STATE_STORED).set(f64::from(stored)));
        self.is_stored.swap(stored, Ordering::Relaxed)
    }

    /// The exposition text of everything there is, and of `page`.
    pub fn render(&self, page: Page) -> String {
        ::metrics::with_local_recorder(&self.server.recorder, || self.process.collect());
        let versions: Vec<_> = self.versions.lock().values().filter_map(Weak::upgrade).collect();
        let texts = std::iter::once(self.server.handle.render())
            .chain(std::iter::once(self.unknown.render()))
            .chain(versions.iter().map(|version| version.render()))
            .chain(std::iter::once(page.text()));
        exposition::merge_families(texts)
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

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::error::Code;

    #[test]
    fn versions_share_families_and_vanish_alone() {
        let metrics = Metrics::new("0.1.0", "1.31.1");
        let one = metrics.version("m", "1");
        let two = metrics.version("m", "2");
        one.request(Protocol::Rest, Way::Stable, None, Duration::from_millis(3));
        two.request(Protocol::Grpc, Way::Canary, Some(Code::NotReady), Duration::from_millis(3));
        let text = metrics.render(Page::default());
        assert_eq!(text.matches("# TYPE tidegate_requests_total counter").count(), 1);
        assert!(
            text.contains(
                r#"tidegate_requests_total{model="m",version="1",protocol="rest",code="ok",variant="stable"} 1"#
            ),
            "{text}"
        );
        assert!(
            text.contains(r#"model="m",version="2",protocol="grpc",code="not_ready",variant="canary"} 1"#),
            "{text}"
        );
        assert!(text.contains(
            r#"tidegate_request_duration_seconds_bucket{model="m",version="1",variant="stable",le="0.005"} 1"#
        ));
        drop(one);
        let text = metrics.render(Page::default());
        assert!(!text.contains(r#"model="m",version="1""#) && text.contains(r#"model="m",version="2""#), "{text}");
    }

    #[test]
    fn copies_are_no_requests_of_clients() {
        let metrics = Metrics::new("0.1.0", "1.31.1");
        let version = metrics.version("m", "2");
        version.request(Protocol::Grpc, Way::Shadow, None, Duration::from_millis(3));
        version.request(Protocol::Rest, Way::Shadow, Some(Code::Internal), Duration::from_millis(3));
        let text = metrics.render(Page::default());
        for line in [
            r#"tidegate_requests_total{model="m",version="2",protocol="rest",code="internal",variant="shadow"} 1"#,
            r#"tidegate_request_duration_seconds_count{model="m",version="2",variant="shadow"} 2"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert_eq!((version.statistics.success.read(), version.statistics.fail.read()), ((0, 0), (0, 0)));
    }

    #[test]
    fn a_version_loaded_twice_counts_into_the_same_series() {
        let metrics = Metrics::new("0.1.0", "1.31.1");
        let old = metrics.version("m", "1");
        old.request(Protocol::Rest, Way::Stable, None, Duration::ZERO);
        let new = metrics.version("m", "1");
        drop(old);
        new.request(Protocol::Rest, Way::Stable, None, Duration::ZERO);
        assert!(metrics.render(Page::default()).contains(r#"protocol="rest",code="ok",variant="stable"} 2"#));
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
