//! A file that is being fetched in parts: which of them are there, and the hash of them all, computed as they come.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::mpsc,
};

use crate::source::{Digest, SourceError, digest::Hasher};

/// Bytes of a part: many enough that the requests for them cost little, few enough that losing one does.
pub(super) const PART: u64 = 16 << 20;
/// Bytes that are hashed at a time.
const HASHED: usize = 256 << 10;

/// The parts of one file. What a process before this one has fetched counts, as long as the machine has not been
/// started anew: parts are not forced to the disk one by one, so a power failure may have taken some of their bytes.
pub(super) struct Partial {
    pub(super) path: PathBuf,
    list: PathBuf,
    file: File,
    size: u64,
    part: u64,
    there: BTreeSet<u64>,
    notes: File,
}

impl Partial {
    /// Opens what is there of the file that goes by `key`, in parts of `part` bytes; nothing counts unless `resumable`.
    pub(super) fn open(folder: &Path, key: &str, size: u64, part: u64, resumable: bool) -> Result<Self, SourceError> {
        let (path, list) = (folder.join(key), folder.join(format!("{key}.parts")));
        let opened = || -> io::Result<Self> {
            let header = format!("{} {size} {part}", boot()?);
            let text = fs::read_to_string(&list).unwrap_or_default();
            let mut lines = text.lines();
            let known = resumable
                && lines.next() == Some(&header)
                && fs::metadata(&path).is_ok_and(|there| there.len() == size);
            // A last line without its end may be the beginning of another number.
            let whole = if text.ends_with('\n') { usize::MAX } else { text.lines().count().saturating_sub(2) };
            let there: BTreeSet<u64> = match known {
                true => lines.take(whole).filter_map(|line| line.parse().ok()).collect(),
                false => BTreeSet::new(),
            };
            let file = File::options().create(true).truncate(!known).read(true).write(true).open(&path)?;
            if !known {
                reserve(&file, size)?;
            }
            let mut notes = File::create(&list)?;
            let lines: String = there.iter().map(|part| format!("{part}\n")).collect();
            notes.write_all(format!("{header}\n{lines}").as_bytes())?;
            Ok(Self { path: path.clone(), list: list.clone(), file, size, part, there, notes })
        };
        opened().map_err(|error| {
            use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
            if matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge) {
                // A file that could not be made as long as it is to be takes room that is wanted elsewhere.
                let _ = (fs::remove_file(&path), fs::remove_file(&list));
            }
            SourceError::disk(&path, &error)
        })
    }

    /// The parts that are not there.
    pub(super) fn missing(&self) -> Vec<(u64, Range<u64>)> {
        let missing = (0..self.size.div_ceil(self.part)).filter(|part| !self.there.contains(part));
        missing.map(|part| (part, self.range(part))).collect()
    }

    /// Bytes that are there, in whole parts.
    pub(super) fn bytes(&self) -> u64 {
        self.there.iter().map(|part| self.range(*part)).map(|range| range.end - range.start).sum()
    }

    fn range(&self, part: u64) -> Range<u64> {
        let start = (part * self.part).min(self.size);
        start..(start + self.part).min(self.size)
    }

    /// Writes to the file, from whichever task.
    pub(super) fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Notes that a part was written.
    pub(super) fn note(&mut self, part: u64) -> Result<(), SourceError> {
        self.there.insert(part);
        self.notes.write_all(format!("{part}\n").as_bytes()).map_err(|error| SourceError::disk(&self.list, &error))
    }

    /// Up to where no byte is missing.
    pub(super) fn contiguous(&self) -> u64 {
        let missing = (0..).find(|part| !self.there.contains(part)).unwrap_or_default();
        (missing * self.part).min(self.size)
    }

    /// Forgets all of it.
    pub(super) fn discard(&self) {
        for path in [&self.path, &self.list] {
            if let Err(error) = fs::remove_file(path) {
                tracing::debug!(file = %path.display(), %error, "cannot be removed");
            }
        }
    }

    /// Forgets the list of parts, once the file has moved on.
    pub(super) fn done(&self) {
        if let Err(error) = fs::remove_file(&self.list) {
            tracing::debug!(file = %self.list.display(), %error, "cannot be removed");
        }
    }

    /// Reads the file as far as it is told that no byte is missing, and hashes it. It ends with the sender.
    pub(super) fn hash(
        &self,
        announced: Option<Digest>,
        name: &str,
        told: mpsc::Receiver<u64>,
    ) -> impl FnOnce() -> Result<[u8; 32], SourceError> + Send + 'static {
        let (path, name, size) = (self.path.clone(), name.to_owned(), self.size);
        move || {
            let disk = |error: io::Error| SourceError::disk(&path, &error);
            let mut hasher = Hasher::new(announced, size);
            let mut file = File::open(&path).map_err(disk)?;
            let mut buffer = vec![0; HASHED];
            let mut hashed = 0;
            for end in told {
                while hashed < end {
                    let wanted = (end - hashed).min(HASHED as u64) as usize;
                    file.read_exact(&mut buffer[..wanted]).map_err(disk)?;
                    hasher.update(&buffer[..wanted]);
                    hashed += wanted as u64;
                }
            }
            hasher.finish(&name)
        }
    }
}

/// Writes `bytes` at `position`.
pub(super) fn write_at(file: &File, bytes: &[u8], position: u64, path: &Path) -> Result<(), SourceError> {
    file.write_all_at(bytes, position).map_err(|error| SourceError::disk(path, &error))
}

/// Makes the file `size` bytes long, on the disk where the file system can: so that a full disk is noticed first.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    use rustix::{fs::FallocateFlags, io::Errno};
    if size == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(size),
        result => result.map_err(Into::into),
    }
}

/// What tells one start of the machine from the next.
fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
