//! `Statistics`: the running totals of a version that Triton's statistics calls report.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

use super::nanoseconds;

/// Batches up to this many rows are told apart in the statistics.
const MAX_EXACT_BATCH: u64 = 1024;

/// How often something happened and how long it took in all.
#[derive(Default)]
pub struct Tally {
    count: AtomicU64,
    ns: AtomicU64,
}

impl Tally {
    pub(super) fn add(&self, count: u64, each: Duration) {
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
    pub(super) fn touch(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_inference_ms.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn executed(&self, requests: u64, rows: u64, durations: [Duration; 3]) {
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
