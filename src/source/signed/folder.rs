//! The files that a version's folder holds, compared with those that were signed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{fs::OFlags, io::Errno};

use super::{Refusal, SIGNATURE_FILE, statement::Statement};
use crate::{
    error::abridge,
    source::{
        cache::is_pickle_name,
        digest::{self, Hasher},
        local::{MODEL_FILE, TRITON_FILE},
    },
};

/// What version control leaves in a folder. The server opens none of it, and the signing tool leaves it out.
const OF_VERSION_CONTROL: [&str; 4] = [".git", ".gitattributes", ".github", ".gitignore"];
/// Endings of programs, and of the descriptions of what they run in.
const PROGRAMS: [&str; 3] = [".py", ".yaml", ".yml"];
/// Files of one version; more than any model has.
const MAX_FILES: usize = 10_000;
const MAX_DEPTH: usize = 32;
/// Bytes that are read of a file at a time.
const CHUNK: usize = 1 << 20;

/// The files as they were when they were verified.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// What stands for each file and folder, by path below the version's folder.
    stamps: BTreeMap<String, Stamp>,
    /// The settings among them that nobody has signed.
    settings: BTreeSet<String>,
}

/// What stands for a file or a folder, and tells that it was written, replaced, renamed or linked. It does not tell of
/// writes through a mapping of a page that was written to before, or of a parent folder that is exchanged and put back:
/// who can do that while a version is loaded has others take for verified what was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// One file to read.
pub(super) struct Found {
    path: PathBuf,
    is_symlink: bool,
}

impl Seen {
    /// Whether the files in `folder` are still those that were verified. Where only the server itself writes, and the
    /// files `is_ours`, they may have got or lost other names meanwhile: versions that share a file are links to it.
    pub fn still_holds(&self, folder: &Path, is_ours: bool) -> bool {
        let Ok((now, _)) = list(folder) else { return false };
        let is_same = |(then, now): (&Stamp, &Stamp)| {
            let changed = if is_ours { now.changed } else { then.changed };
            Stamp { changed, ..*then } == *now
        };
        self.stamps.keys().eq(now.stamps.keys()) && self.stamps.values().zip(now.stamps.values()).all(is_same)
    }

    /// Whether the file at this path was compared with what was signed.
    pub fn was_compared(&self, path: &str) -> bool {
        self.stamps.contains_key(path) && !self.settings.contains(path)
    }
}

/// Whether what lies at this path in a version's folder is no part of the model, signed or not.
pub fn is_beside(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    path == SIGNATURE_FILE || OF_VERSION_CONTROL.contains(&first)
}

/// Whether a version may go without this file though it was signed: it is none that a backend, a tokenizer, a check or a
/// warm-up would open, so that without it the version is the same. Sources leave such files where they are; settings they
/// take for the model's, beside its versions, where no signature covers them.
fn may_be_missing(path: &str) -> bool {
    is_beside(path) || is_pickle_name(path) || PROGRAMS.iter().any(|ending| path.ends_with(ending)) || is_settings(path)
}

/// Whether these are settings. They lie in the folder of a version when the model is its own only one, and are the
/// operator's then; in any other version's folder nobody reads them.
fn is_settings(path: &str) -> bool {
    [MODEL_FILE, TRITON_FILE].contains(&path)
}

/// Compares every file in `folder` with what was signed.
///
/// # Errors
/// In words: the first file that is another one, is not signed, is missing, or cannot be compared.
pub fn compare(folder: &Path, statement: &Statement) -> Result<Seen, Refusal> {
    let (mut seen, found) = list(folder)?;
    let mut left: BTreeSet<&str> = statement.files.keys().map(String::as_str).collect();
    let mut chunk = vec![0; CHUNK];
    for (path, file) in &found {
        let shown = abridge(path);
        let Some(expected) = statement.files.get(path) else {
            if is_settings(path) {
                seen.settings.insert(path.clone());
                continue;
            }
            let is_ignored = |ignored: &String| Path::new(path).starts_with(ignored);
            let why = if statement.ignored.iter().any(is_ignored) { "the signer left it out" } else { "nobody has" };
            return Err(format!("file '{shown}' is not among the files that were signed ({why})").into());
        };
        left.remove(path.as_str());
        if file.is_symlink && !statement.allows_symlinks {
            let what = "is a symlink; expected a file, since it was signed without symlinks";
            return Err(format!("file '{shown}' {what}").into());
        }
        let sha256 = hash(file, &mut chunk).map_err(|error| unread(&format!("file '{shown}'"), &error))?;
        if sha256 != *expected {
            let [expected, found] = [expected, &sha256].map(|sha256| digest::encode(sha256));
            return Err(format!(
                "file '{shown}' is not what was signed: expected sha256:{expected}, got sha256:{found}"
            )
            .into());
        }
    }
    match left.iter().find(|path| !may_be_missing(path)) {
        Some(missing) => Err(format!("file '{}' was signed and is missing", abridge(missing)).into()),
        None => Ok(seen),
    }
}

/// Everything in a folder, and the files to read.
pub(super) fn list(folder: &Path) -> Result<(Seen, BTreeMap<String, Found>), Refusal> {
    let (mut seen, mut found) = (Seen::default(), BTreeMap::new());
    let unread = |path: &Path, error: io::Error| unread(&path.display().to_string(), &error);
    let mut waiting = vec![(String::new(), folder.to_path_buf(), 0)];
    while let Some((below, path, depth)) = waiting.pop() {
        if depth > MAX_DEPTH {
            return Err(format!("folder '{}' is more than {MAX_DEPTH} folders deep", abridge(&below)).into());
        }
        let metadata = fs::metadata(&path).map_err(|error| unread(&path, error))?;
        seen.stamps.insert(below.clone(), Stamp::of(&metadata));
        for entry in fs::read_dir(&path).map_err(|error| unread(&path, error))? {
            let entry = entry.map_err(|error| unread(&path, error))?;
            let (path, name) = (entry.path(), entry.file_name());
            let Some(name) = name.to_str() else {
                return Err(format!("{}: names of signed files are in UTF-8", path.display()).into());
            };
            let below = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
            // What lies in there is part of no model, however much of it there is and wherever it leads.
            if is_beside(&below) {
                continue;
            }
            let entry = fs::symlink_metadata(&path).map_err(|error| unread(&path, error))?;
            let is_symlink = entry.is_symlink();
            let metadata = if is_symlink { fs::metadata(&path).map_err(|error| unread(&path, error))? } else { entry };
            if metadata.is_dir() && !is_symlink {
                waiting.push((below, path, depth + 1));
            } else if metadata.is_file() {
                seen.stamps.insert(below.clone(), Stamp::of(&metadata));
                found.insert(below, Found { path, is_symlink });
            } else {
                let shown = abridge(&below);
                let what = if is_symlink { "a symlink to something else" } else { "something else" };
                return Err(format!("'{shown}' is {what}; expected files and folders only").into());
            }
            if seen.stamps.len() > MAX_FILES {
                return Err(format!("there are more than {MAX_FILES} files").into());
            }
        }
    }
    Ok((seen, found))
}

/// Why something is not read; it may be another time, unless it is not there or not to be read by the server.
pub fn unread(what: &str, error: &io::Error) -> Refusal {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    let stays = matches!(error.kind(), NotFound | PermissionDenied | NotADirectory)
        || matches!(Errno::from_io_error(error), None | Some(Errno::LOOP | Errno::NAMETOOLONG | Errno::NXIO));
    Refusal { reason: format!("{what} cannot be read: {error}"), passes: !stays }
}

fn hash(file: &Found, chunk: &mut [u8]) -> io::Result<[u8; 32]> {
    // Should a pipe have taken the file's place meanwhile, opening it does not wait for somebody to write.
    let flags = if file.is_symlink { OFlags::NONBLOCK } else { OFlags::NONBLOCK | OFlags::NOFOLLOW };
    let opened: File = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(&file.path)?;
    let size = opened.metadata()?.len();
    // One byte more is enough to tell a file that grows all the while.
    let mut content = opened.take(size.saturating_add(1));
    let mut hasher = Hasher::new(None, size);
    loop {
        match content.read(chunk) {
            Ok(0) => break,
            Ok(read) => hasher.update(&chunk[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    hasher.finish("").map_err(io::Error::other)
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}
