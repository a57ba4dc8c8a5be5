//! The local store that fetched files lie in: each content once, named by its SHA-256, linked into the versions it is of.
//!
//! ```text
//! blobs/sha256/ab/abcd…   contents; read-only, with a time drawn from the digest (see below)
//! names/…                 what places call a content (an MD5, a location and its ETag) → its SHA-256
//! partial/…               what is being fetched
//! staging/…               versions that are being put together
//! mirrors/NAME/models/    what one source holds, as a repository of models, and beside it what is known of it; when it was
//!                         looked at last is when its file `place` was changed
//! lock                    held by the server that writes here
//! ```
//! Everything comes to its place by a rename, so that a crash leaves at most files in `partial` and `staging`.
//!
//! A blob's time of change says nothing about when it was fetched: it is drawn from the content's digest. What tells
//! versions of a folder apart goes by names, lengths and times (`local`), and so stands for the contents here, after
//! another fetch and on another machine too.

mod connections;
pub mod evict;
mod fetch;
pub mod mirror;
mod partial;
mod vet;

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File, FileTimes, Permissions},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Digest, SourceError, digest, patience::Patience};
pub use connections::{Connections, LEAST, Pace};
pub use vet::{is_pickle_name, list as check_list};

/// What is emptied whenever a server starts.
const STAGING: &str = "staging";

/// Where fetched files are kept, and how they are fetched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// The folder of fetched files; servers do not share one. Default: `cache` in the data directory.
    pub directory: Option<PathBuf>,
    /// Bytes that all files in it may have together. For more, those that no version uses make room, the longest unused
    /// first, and then the mirrors of places that no server has looked at for 30 days; when that does not do, the version
    /// is not fetched.
    pub max_bytes: u64,
    /// Connections that fetch at a time. Places that are fetched from share them evenly.
    pub connections: usize,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { directory: None, max_bytes: 100 << 30, connections: 8 }
    }
}

/// Where a source may put what it has to unpack, how much of it, and over which connections it comes.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// Nothing in it outlives the server.
    pub folder: PathBuf,
    /// What is unpacked does not count among the cache's bytes: until it is published there may be as much again.
    pub max_bytes: u64,
    pub connections: Arc<Connections>,
}

/// A content in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    pub sha256: [u8; 32],
    /// In bytes.
    pub size: u64,
}

/// The store in one folder.
pub struct Cache {
    root: PathBuf,
    max_bytes: u64,
    connections: Arc<Connections>,
    /// Bytes of the parts in which files are fetched.
    part: u64,
    /// Held while a content is fetched, by what names it, so that nobody fetches it beside.
    fetching: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    /// What versions need that are being fetched.
    reserved: Mutex<Vec<Weak<evict::Reserved>>>,
    /// What hosts have asked for that files are fetched from.
    pub(in crate::source) patience: Patience,
    /// Folders of mirrors that are in use.
    opened: Mutex<BTreeSet<PathBuf>>,
    /// Held while contents get or lose a link, so that none is evicted between the look at it and its use.
    linking: Mutex<()>,
    _lock: File,
}

impl Cache {
    /// Opens the store in `root` for a server, which is the only one to write there.
    ///
    /// # Errors
    /// `Disk` when the folder cannot be made or is in use by another process.
    pub fn open(root: &Path, config: &CacheConfig) -> Result<Self, SourceError> {
        for folder in ["blobs/sha256", "names", "partial", "mirrors"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).map_err(|error| SourceError::disk(&folder, &error))?;
        }
        let path = root.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|error| SourceError::disk(&path, &error))?;
        lock.try_lock().map_err(|error| SourceError::Disk {
            what: path.display().to_string(),
            reason: match error {
                fs::TryLockError::WouldBlock => "the cache is in use by another process".to_owned(),
                fs::TryLockError::Error(error) => error.to_string(),
            },
        })?;
        // What was being put together when the last server ended is put together anew.
        let staging = root.join(STAGING);
        match fs::remove_dir_all(&staging) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(SourceError::disk(&staging, &error)),
            _ => fs::create_dir_all(&staging).map_err(|error| SourceError::disk(&staging, &error))?,
        }
        let cache = Self {
            root: root.to_path_buf(),
            max_bytes: config.max_bytes,
            connections: Arc::new(Connections::new(config.connections)),
            part: partial::PART,
            fetching: Mutex::default(),
            reserved: Mutex::default(),
            patience: Patience::default(),
            opened: Mutex::default(),
            linking: Mutex::default(),
            _lock: lock,
        };
        mirror::mark_unknown(root)?;
        // Names without a content are in nobody's way today.
        if let Err(error) = cache.forget_names() {
            tracing::warn!(%error, "names of files that are no longer in the cache are kept");
        }
        Ok(cache)
    }

    /// Where its sources may unpack.
    pub fn scratch(&self) -> Scratch {
        let connections = self.connections.clone();
        Scratch { folder: self.root.join(STAGING), max_bytes: self.max_bytes, connections }
    }

    /// Where the content with this SHA-256 lies, or will.
    fn blob_path(&self, sha256: &[u8; 32]) -> PathBuf {
        blob_path(&self.root, sha256)
    }

    /// The content with this SHA-256, when it is here.
    fn blob(&self, sha256: [u8; 32]) -> Option<Blob> {
        let metadata = fs::metadata(self.blob_path(&sha256)).ok().filter(fs::Metadata::is_file)?;
        Some(Blob { sha256, size: metadata.len() })
    }

    /// What a place calls `name`, when it was fetched before and is still here.
    fn named(&self, name: &str) -> Option<Blob> {
        self.written_of(&fs::read_to_string(self.root.join("names").join(name)).ok()?)
    }

    /// The content that a name's file says, when it is here.
    fn written_of(&self, text: &str) -> Option<Blob> {
        match Digest::from_hex("sha256", text.trim())? {
            Digest::Sha256(sha256) => self.blob(sha256),
            _ => None,
        }
    }

    /// Forgets the names of contents that are no longer here. Names come with every file that is fetched, and would only
    /// become more.
    fn forget_names(&self) -> Result<(), SourceError> {
        let folder = self.root.join("names");
        let forgotten = || -> io::Result<()> {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                // What cannot be read now may be read another time.
                if fs::read(&path).is_ok_and(|text| self.written_of(&String::from_utf8_lossy(&text)).is_none()) {
                    fs::remove_file(&path)?;
                }
            }
            Ok(())
        };
        forgotten().map_err(|error| SourceError::disk(&folder, &error))
    }

    /// Remembers that a place calls this content `name`. Without the note it would only be fetched again.
    fn remember(&self, name: &str, blob: &Blob) {
        let path = self.root.join("names").join(name);
        let written = write_atomically(&self.root.join("partial"), &path, digest::encode(&blob.sha256).as_bytes());
        if let Err(error) = written {
            tracing::warn!(file = %path.display(), %error, "a name of a fetched file cannot be kept");
        }
    }

    /// Moves the finished file at `path` to its place. It is on the disk before anything can link to it.
    fn adopt(&self, path: &Path, blob: &Blob) -> Result<(), SourceError> {
        let target = self.blob_path(&blob.sha256);
        let placed = || -> io::Result<()> {
            // Another file with the same content may have come meanwhile, and be linked to. One that is damaged makes way
            // for this one, and the versions that have a link to it keep that until they are published anew.
            if is_whole(&target, blob) {
                return fs::remove_file(path);
            }
            let file = File::options().write(true).open(path)?;
            file.set_permissions(Permissions::from_mode(0o444))?;
            file.set_times(FileTimes::new().set_modified(time_of(&blob.sha256)))?;
            file.sync_all()?;
            let folder = target.parent().unwrap_or(&self.root);
            fs::create_dir_all(folder)?;
            fs::rename(path, &target)?;
            File::open(folder)?.sync_all()
        };
        placed().map_err(|error| SourceError::disk(&target, &error))
    }

    /// The lock that who fetches what goes by `key` holds.
    fn claim(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetching = self.fetching.lock();
        fetching.retain(|_, claim| claim.strong_count() > 0);
        if let Some(claim) = fetching.get(key).and_then(Weak::upgrade) {
            return claim;
        }
        let claim = Arc::default();
        fetching.insert(key.to_owned(), Arc::downgrade(&claim));
        claim
    }
}

fn blob_path(root: &Path, sha256: &[u8; 32]) -> PathBuf {
    let hex = digest::encode(sha256);
    root.join("blobs/sha256").join(&hex[..2]).join(hex)
}

/// Whether the content at `path` is there and is the one that it should be. Who asks has just fetched it, so reading it
/// costs little beside that.
fn is_whole(path: &Path, blob: &Blob) -> bool {
    let is_long = fs::metadata(path).is_ok_and(|there| there.len() == blob.size);
    is_long && evict::check(path, Some(Digest::Sha256(blob.sha256)), blob.size).is_ok()
}

/// A time in the years 2000 to 2016 that the digest alone decides, to the nanosecond.
fn time_of(sha256: &[u8; 32]) -> SystemTime {
    const YEAR_2000: u64 = 946_684_800;
    let word = |start: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|byte| sha256[start + byte])));
    SystemTime::UNIX_EPOCH + Duration::new(YEAR_2000 + word(0) % (1 << 29), (word(4) % 1_000_000_000) as u32)
}

/// Writes a small file so that it is seen whole or not at all, also after a power failure.
fn write_atomically(scratch: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(scratch)?;
    io::Write::write_all(&mut file, bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Whether nothing but the store itself has a link to a blob.
fn is_unused(metadata: &fs::Metadata) -> bool {
    metadata.nlink() == 1
}

#[cfg(test)]
pub(super) mod tests;
