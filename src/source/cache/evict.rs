//! What lies in the cache, whether it is whole, and how room is made: contents that no version uses go, the longest
//! unused first.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Cache, is_unused, mirror};
use crate::source::{Digest, RemoteFile, Source, SourceError, digest::Hasher};

/// A content, or what is there of one that is being fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub path: PathBuf,
    /// By its name; `None` of what is not complete.
    pub digest: Option<Digest>,
    /// In bytes, as they count towards the limit.
    pub size: u64,
    /// Whether a version uses it.
    pub used: bool,
    /// When the first or last version began or ceased to use it, in seconds since 1970 and nanoseconds.
    since: (i64, i64),
}

/// Everything that counts towards the limit of the cache in `root`, also of one that a server has open.
///
/// # Errors
/// When the folders cannot be read.
pub fn list(root: &Path) -> Result<Vec<Kept>, SourceError> {
    let listed = || -> io::Result<Vec<Kept>> {
        let mut kept = Vec::new();
        for folder in entries(&root.join("blobs/sha256"))? {
            for (path, metadata) in files(&folder)? {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let digest = Digest::from_hex("sha256", name);
                kept.push(describe(path, &metadata, digest, !is_unused(&metadata)));
            }
        }
        for (path, metadata) in files(&root.join("partial"))? {
            kept.push(describe(path, &metadata, None, false));
        }
        Ok(kept)
    };
    listed().map_err(|error| SourceError::disk(root, &error))
}

/// Reads a content, and whether it is the one that its name says.
///
/// # Errors
/// `Corrupt` when it is not; `Disk` when it cannot be read.
pub fn verify(kept: &Kept) -> Result<(), SourceError> {
    check(&kept.path, kept.digest, kept.size)
}

/// Reads the file at `path`, and whether its content is the one that `digest` says.
pub(super) fn check(path: &Path, digest: Option<Digest>, size: u64) -> Result<(), SourceError> {
    let disk = |error: io::Error| SourceError::disk(path, &error);
    let mut hasher = Hasher::new(digest, size);
    let mut file = File::open(path).map_err(disk)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer).map_err(disk)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    hasher.finish(&path.display().to_string()).map(|_| ())
}

impl Cache {
    /// Makes room for those of the files of `source` that are not here.
    ///
    /// # Errors
    /// `Full` when what is used, with what is to come, is more than the limit; nothing is removed then.
    pub fn make_room_for(&self, source: &dyn Source, files: &[RemoteFile]) -> Result<(), SourceError> {
        let absent = || files.iter().filter(|file| !self.has(source, file));
        let bytes = absent().map(|file| file.size).fold(0, u64::saturating_add);
        self.make_room(bytes, &absent().map(|file| self.key(source, file)).collect())
    }

    /// Makes room for `bytes` more. What is there already of the files that go by the names in `coming` is part of them.
    pub(super) fn make_room(&self, bytes: u64, coming: &BTreeSet<String>) -> Result<(), SourceError> {
        let _linking = self.linking.lock();
        let mut kept = list(&self.root)?;
        kept.retain(|kept| kept.digest.is_some() || !coming.contains(stem(kept)));
        let total: u64 = kept.iter().map(|kept| kept.size).sum();
        let used: u64 = kept.iter().filter(|kept| !self.is_free(kept)).map(|kept| kept.size).sum();
        if used.saturating_add(bytes) > self.max_bytes {
            return Err(SourceError::Full(format!(
                "the cache has no room for {bytes} bytes: versions use {used} of its {} (cache.max_bytes)",
                self.max_bytes
            )));
        }
        self.evict(kept, total.saturating_add(bytes).saturating_sub(self.max_bytes)).map(|_| ())
    }

    /// Removes everything that no version uses, and returns how many bytes that was.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn prune(&self) -> Result<u64, SourceError> {
        let _linking = self.linking.lock();
        let freed = self.evict(list(&self.root)?, u64::MAX)?;
        self.forget_names()?;
        Ok(freed)
    }

    /// Removes a content that is not what its name says, and the versions that use it, so that the next server fetches
    /// them anew.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn discard(self: &Arc<Self>, broken: &Kept) -> Result<(), SourceError> {
        if let Some(digest) = broken.digest {
            mirror::withdraw_users(self, &digest.hex())?;
        }
        fs::remove_file(&broken.path).map_err(|error| SourceError::disk(&broken.path, &error))?;
        self.forget_names()
    }

    /// Removes contents that no version uses until `bytes` are free, and returns how many are.
    fn evict(&self, mut kept: Vec<Kept>, bytes: u64) -> Result<u64, SourceError> {
        kept.retain(|kept| self.is_free(kept));
        // Half a file is worth something as long as somebody goes on with it, which may be soon.
        kept.sort_by_key(|kept| (kept.digest.is_none(), kept.since));
        let mut freed = 0;
        for kept in kept {
            if freed >= bytes {
                break;
            }
            fs::remove_file(&kept.path).map_err(|error| SourceError::disk(&kept.path, &error))?;
            tracing::info!(file = %kept.path.display(), bytes = kept.size, "evicted from the cache");
            freed += kept.size;
        }
        Ok(freed)
    }

    /// Whether it may go: no version uses it, and nobody is fetching it.
    fn is_free(&self, kept: &Kept) -> bool {
        let is_claimed = || self.fetching.lock().get(stem(kept)).is_some_and(|claim| claim.strong_count() > 0);
        !kept.used && (kept.digest.is_some() || !is_claimed())
    }
}

/// What a file that is not complete goes by, and its list of parts.
fn stem(kept: &Kept) -> &str {
    kept.path.file_stem().and_then(|name| name.to_str()).unwrap_or_default()
}

fn describe(path: PathBuf, metadata: &fs::Metadata, digest: Option<Digest>, used: bool) -> Kept {
    // The inode changes whenever a link comes or goes, its content never.
    Kept { path, digest, size: metadata.len(), used, since: (metadata.ctime(), metadata.ctime_nsec()) }
}

fn files(folder: &Path) -> io::Result<Vec<(PathBuf, fs::Metadata)>> {
    let mut files = Vec::new();
    for path in entries(folder)? {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => files.push((path, metadata)),
            // Moved on to its place since the folder was read.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(files)
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
}
