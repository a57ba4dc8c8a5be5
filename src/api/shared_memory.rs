//! Triton's system shared memory extension: tensors that a client on this machine leaves in memory instead of sending.
//!
//! A client makes a POSIX shared memory object, registers a part of it as a region, and from then on its requests name
//! the region where their tensors would be. What a region is and how its bytes move is in `region`, what one request
//! may do with regions in `reach`, and the calls that register them in `calls`.
//!
//! # Why regions are not mapped
//! Their owner can shrink the object at any time, and a mapping whose end is gone kills whoever touches it, which would
//! be this server. They can change the bytes at any time as well, which no reference in Rust may point at. So the bytes
//! are read and written through the file descriptor: a shrunk object is a short read and an answer, and what is checked
//! is what runs. For a tensor of 602 KB that costs 45 µs to read and 56 µs to write, where copying out of and into a
//! mapping would cost 18 µs each; a copy out of it would be needed anyway. Both are far below what a socket takes.
//!
//! # Who may
//! Regions are other programs' memory, which this server reads and writes with its own rights. To register, to list, and
//! to name a region in a request takes what a change of the server takes (`auth::check_admin`): the token, or without
//! one, a call from this machine. Keys lead to plain objects in `/dev/shm` only.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Code, Error},
    id::shorten,
    metrics::Metrics,
};

pub(super) mod calls;
mod reach;
mod region;
#[cfg(test)]
mod tests;

pub use reach::{Places, Reach};
use region::Region;

/// The name of the extension in the server's metadata.
pub const EXTENSION: &str = "system_shared_memory";

/// Bytes of a region's longest name.
const MAX_NAME: usize = 255;

/// Tensors in shared memory, for clients on this machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SharedMemoryConfig {
    /// Whether clients may keep tensors in POSIX shared memory (`/dev/shm`) instead of sending them. Whoever may change
    /// the server (see `token`) may then have it read and write every object there that its user may; it never makes
    /// or removes one.
    pub enabled: bool,
    /// Regions that may be registered at a time; each takes a file descriptor.
    pub max_regions: usize,
    /// Bytes of all registered regions together: memory that stays taken until they are unregistered.
    pub max_bytes: u64,
}

impl Default for SharedMemoryConfig {
    fn default() -> Self {
        Self { enabled: false, max_regions: 256, max_bytes: 1 << 30 }
    }
}

/// The regions that clients have registered. One that is unregistered lives on in the requests that use it.
pub struct Regions {
    max_regions: usize,
    max_bytes: u64,
    by_name: Mutex<BTreeMap<String, Arc<Region>>>,
    metrics: Arc<Metrics>,
}

impl Regions {
    /// `None` when the extension is not enabled.
    pub fn new(config: &SharedMemoryConfig, metrics: Arc<Metrics>) -> Option<Arc<Self>> {
        config.enabled.then(|| {
            metrics.shared_memory(0, 0);
            let (max_regions, max_bytes) = (config.max_regions, config.max_bytes);
            Arc::new(Self { max_regions, max_bytes, by_name: Mutex::default(), metrics })
        })
    }

    /// Registers `byte_size` bytes from `offset` on of the object `key` under a name that is free.
    fn register(&self, name: &str, key: &str, offset: u64, byte_size: u64) -> Result<(), Error> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Error::invalid(format!(
                "the name of a shared memory region must have 1 to {MAX_NAME} bytes, got '{}'",
                shorten(name)
            )));
        }
        let region = Region::open(name, key, offset, byte_size)?;
        let mut by_name = self.by_name.lock();
        if by_name.contains_key(name) {
            return Err(Error::invalid(format!(
                "shared memory region '{}' is registered already; unregister it first",
                shorten(name)
            )));
        }
        if by_name.len() >= self.max_regions {
            return Err(Error::new(
                Code::TooLarge,
                format!("there are {} shared memory regions, as many as shared_memory.max_regions", by_name.len()),
            ));
        }
        let taken = total(&by_name);
        if byte_size > self.max_bytes.saturating_sub(taken) {
            return Err(Error::new(
                Code::TooLarge,
                format!(
                    "shared memory region '{}' of {byte_size} bytes and the {taken} bytes of the others are more than \
                     the {} of shared_memory.max_bytes",
                    shorten(name),
                    self.max_bytes
                ),
            ));
        }
        by_name.insert(name.to_owned(), Arc::new(region));
        self.metrics.shared_memory(by_name.len(), total(&by_name));
        Ok(())
    }

    /// Forgets the region, or all of them when the name is empty. One that is not there is forgotten already.
    fn unregister(&self, name: &str) {
        // Kept until the lock is free: to close the last descriptor of a large object may take a while.
        let _gone = {
            let mut by_name = self.by_name.lock();
            let gone = match name {
                "" => std::mem::take(&mut *by_name),
                name => by_name.remove_entry(name).into_iter().collect(),
            };
            self.metrics.shared_memory(by_name.len(), total(&by_name));
            gone
        };
    }

    /// The region, or all of them when the name is empty, by name.
    fn list(&self, name: &str) -> Result<Vec<Arc<Region>>, Error> {
        match name {
            "" => Ok(self.by_name.lock().values().cloned().collect()),
            name => self.find(name).map(|region| vec![region]),
        }
    }

    fn find(&self, name: &str) -> Result<Arc<Region>, Error> {
        let found = self.by_name.lock().get(name).cloned();
        found.ok_or_else(|| Error::not_found(format!("there is no shared memory region '{}'", shorten(name))))
    }
}

fn total(regions: &BTreeMap<String, Arc<Region>>) -> u64 {
    // Cannot overflow: each was compared with what `max_bytes` leaves.
    regions.values().map(|region| region.byte_size).sum()
}
