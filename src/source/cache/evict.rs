//! What lies in the cache, whether it is whole, and how room is made: contents that no version uses go, the longest
//! unused first.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use super::{Cache, is_unused, mirror};
use crate::source::{Digest, RemoteFile, Source, SourceError, digest::Hasher};

/// How long no server may have used a mirror before it makes room for others.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);

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

/// Files of a version that is being fetched: what is here of them stays, and room is kept for the rest, for as long as this
/// is held.
#[derive(Debug)]
pub struct Reserved {
    files: Vec<(RemoteFile, Vec<String>, String)>,
}

/// What versions need that are being fetched.
#[derive(Default)]
struct Coming {
    /// Contents that are here already.
    here: BTreeSet<[u8; 32]>,
    /// Bytes of those that are not, by what they go by while they are fetched.
    absent: BTreeMap<String, u64>,
}

impl Cache {
    /// Makes room for those of the files of `source` that are not here, and keeps it.
    ///
    /// # Errors
    /// `Full` when what is used, with what is to come, is more than the limit; nothing that is in use is removed then.
    pub fn make_room_for(&self, source: &dyn Source, files: &[RemoteFile]) -> Result<Arc<Reserved>, SourceError> {
        let reserve = |file: &RemoteFile| {
            let (names, key) = self.names(source, file);
            (file.clone(), names, key)
        };
        let reserved = Arc::new(Reserved { files: files.iter().map(reserve).collect() });
        self.reserved.lock().push(Arc::downgrade(&reserved));
        // Should there be none, it is no longer reserved when this returns.
        self.make_room()?;
        Ok(reserved)
    }

    /// Makes room for everything that is reserved. What is there already of what is being fetched is part of it.
    pub(super) fn make_room(&self) -> Result<(), SourceError> {
        let _linking = self.linking.lock();
        loop {
            let mut kept = list(&self.root)?;
            // After the list: what is in it by now, and reserved, is known to be here.
            let coming = self.coming();
            let bytes = coming.absent.values().copied().fold(0, u64::saturating_add);
            kept.retain(|kept| kept.digest.is_some() || !coming.absent.contains_key(stem(kept)));
            let total: u64 = kept.iter().map(|kept| kept.size).sum();
            let used: u64 = kept.iter().filter(|kept| !self.is_free(kept, &coming)).map(|kept| kept.size).sum();
            if used.saturating_add(bytes) <= self.max_bytes {
                let missing = total.saturating_add(bytes).saturating_sub(self.max_bytes);
                return self.evict(kept, missing, &coming).map(|_| ());
            }
            // For what is larger than all of the cache nothing needs to go.
            if bytes > self.max_bytes || mirror::withdraw_unused(self, UNUSED)?.is_none() {
                return Err(SourceError::Full(format!(
                    "the cache has no room for {bytes} bytes: versions use {used} of its {} (cache.max_bytes)",
                    self.max_bytes
                )));
            }
        }
    }

    /// What is reserved now.
    fn coming(&self) -> Coming {
        let mut reserved = self.reserved.lock();
        reserved.retain(|reserved| reserved.strong_count() > 0);
        let mut coming = Coming::default();
        for (file, names, key) in reserved.iter().filter_map(Weak::upgrade).flat_map(|one| one.files.clone()) {
            match self.known(&file, &names) {
                Some(blob) => drop(coming.here.insert(blob.sha256)),
                None => drop(coming.absent.insert(key, file.size)),
            }
        }
        coming
    }

    /// Removes everything that no version uses, and returns how many bytes that was; before that the mirrors that no server
    /// has used for `unused`, when it is said.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn prune(&self, unused: Option<Duration>) -> Result<u64, SourceError> {
        let _linking = self.linking.lock();
        while let Some(unused) = unused
            && mirror::withdraw_unused(self, unused)?.is_some()
        {}
        let freed = self.evict(list(&self.root)?, u64::MAX, &self.coming())?;
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
    fn evict(&self, mut kept: Vec<Kept>, bytes: u64, coming: &Coming) -> Result<u64, SourceError> {
        kept.retain(|kept| self.is_free(kept, coming));
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

    /// Whether it may go: no version uses it or is about to, and nobody is fetching it.
    fn is_free(&self, kept: &Kept, coming: &Coming) -> bool {
        let is_needed = |digest| matches!(digest, Digest::Sha256(sha256) if coming.here.contains(&sha256));
        let is_claimed = || self.fetching.lock().get(stem(kept)).is_some_and(|claim| claim.strong_count() > 0);
        !kept.used && kept.digest.map_or_else(|| !is_claimed(), |digest| !is_needed(digest))
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
