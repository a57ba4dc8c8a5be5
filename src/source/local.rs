//! A folder of models: `<name>/<version>/model.onnx`, or `<name>/model.onnx` as version 1.
//!
//! Symlinks are followed: hub caches and Kubernetes volumes are made of them. Whoever may write into the folder is
//! trusted with what it points at.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use std::hash::{DefaultHasher, Hash, Hasher};

use twox_hash::XxHash3_64;

use super::pointer::Pointer;
use crate::id::{ModelName, Version};

/// Settings of a model, beside its versions.
pub const MODEL_FILE: &str = "model.toml";

/// Settings of a model as Triton writes them, beside its versions.
pub const TRITON_FILE: &str = "config.pbtxt";

/// The folder of sample requests, beside the versions or inside one.
pub const SAMPLES: &str = "warmup";

/// Folders deeper than this are not looked at: no model has them, and a loop of symlinks has no end.
const MAX_DEPTH: usize = 8;

/// A graph beside which there may be weights in other formats, and its folder.
const GRAPH: &str = "onnx/model.onnx";
const GRAPHS: &str = "onnx";

/// What the folder held at one moment.
pub type Scan = BTreeMap<ModelName, FoundModel>;

#[derive(Clone, Debug, Default)]
pub struct FoundModel {
    pub directory: PathBuf,
    /// The settings files; more than one is a mistake.
    pub settings: Vec<PathBuf>,
    /// In the order in which they follow each other: by number, and after that in the order in which a pointer came to
    /// them. The last one is what is to serve, unless something else is decided.
    pub versions: Vec<FoundVersion>,
    /// Where its versions lie.
    pub origin: Origin,
    /// What is known of the alias, tag, stage or branch that the model follows.
    pub pointer: Pointer,
    /// Why nothing else is known of the model: its folder is there and cannot be read at present.
    pub unreadable: Option<String>,
}

/// Where a model's versions lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// In the model's own folder.
    #[default]
    Here,
    /// In another one, which its settings name.
    Elsewhere,
    /// In a mirror of what its settings name: they come there whole.
    Mirrored,
}

impl FoundModel {
    /// Has its versions follow each other as `pointer` came to them.
    pub fn follow(&mut self, pointer: Pointer) {
        self.versions.sort_by_key(|found| (pointer.place(&found.version), found.version.number()));
        self.pointer = pointer;
    }
}

#[derive(Clone, Debug)]
pub struct FoundVersion {
    pub version: Version,
    pub files: PathBuf,
    pub fingerprint: Fingerprint,
    /// Stands for the version's own files, also after a restart and on another machine that has copies of them with
    /// their times.
    pub stamp: u64,
}

/// Stands for the files of a version and the model's settings: it changes when any of them does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    hash: u64,
    newest: SystemTime,
}

impl Fingerprint {
    /// Stands for the same files used with `settings`.
    pub fn with(self, settings: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        (self.hash, settings).hash(&mut hasher);
        Self { hash: hasher.finish(), ..self }
    }

    /// Whether every file was last written at least `age` ago.
    pub fn older_than(&self, age: Duration) -> bool {
        self.newest.elapsed().is_ok_and(|elapsed| elapsed >= age)
    }
}

/// Looks at `root`. `is_model` tells the names of model files that can be opened.
///
/// # Errors
/// When `root` cannot be read, or the process lacks what it takes to look, such as file descriptors: half a look at a
/// repository must not be taken for the disappearance of the other half. A model that cannot be read for another
/// reason is found `unreadable`; what is forbidden or gone is left out.
pub fn scan(root: &Path, is_model: impl Fn(&str) -> bool) -> io::Result<Scan> {
    let mut found = Scan::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
        let directory = entry.path();
        let name = match ModelName::parse(name) {
            Ok(name) => name,
            Err(error) => {
                tracing::debug!(folder = %directory.display(), %error, "folder is no model");
                continue;
            }
        };
        match scan_model(&directory, &is_model) {
            Ok(model) => found.extend(model.map(|model| (name, model))),
            Err(error) if is_shortage(&error) => return Err(error),
            Err(error) => {
                let unreadable = Some(format!("{}: {error}", directory.display()));
                found.insert(name, FoundModel { directory, unreadable, ..FoundModel::default() });
            }
        }
    }
    Ok(found)
}

/// The model in `directory`; `None` when nothing in there looks like one.
///
/// # Errors
/// When something cannot be read for a reason that may pass.
pub fn scan_model(directory: &Path, is_model: &impl Fn(&str) -> bool) -> io::Result<Option<FoundModel>> {
    if !look(directory)?.is_some_and(|metadata| metadata.is_dir()) {
        return Ok(None);
    }
    let mut settings = vec![directory.join(MODEL_FILE), directory.join(TRITON_FILE)];
    settings.retain(|path| path.is_file());
    let pointer = Pointer::read(directory)?;
    let mut versions = Vec::new();
    let mut bare = false;
    let mut folders = 0;
    for path in list(directory)? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let Some(metadata) = look(&path)? else { continue };
        if metadata.is_file() && is_model(name) {
            bare = true;
        } else if metadata.is_dir() {
            let version = Version::parse(name).ok();
            let is_version = |version: &Version| {
                version.number().is_some_and(|number| number > 0) || pointer.place(version).is_some()
            };
            let digits = name.bytes().all(|byte| byte.is_ascii_digit());
            match version.filter(is_version) {
                Some(version) => versions.push((version, path)),
                None if digits => tracing::debug!(folder = %path.display(), "not a version: numbers start with 1 to 9"),
                None => {
                    // Where Hugging Face keeps a graph, of a model without folders for its versions.
                    bare |= name == GRAPHS && is_model(GRAPH) && directory.join(GRAPH).is_file();
                    continue;
                }
            }
            folders += 1;
        }
    }
    if bare && folders == 0 {
        versions.extend(Version::parse("1").ok().map(|version| (version, directory.to_path_buf())));
    }
    if versions.is_empty() && settings.is_empty() {
        return Ok(None);
    }
    versions.sort_by_key(|(version, _)| (pointer.place(version), version.number()));
    let versions = versions
        .into_iter()
        .map(|(version, files)| {
            let fingerprint = fingerprint(&files, directory)?;
            let stamp = stamp(&files)?;
            Ok(FoundVersion { version, files, fingerprint, stamp })
        })
        .collect::<io::Result<Vec<_>>>()?;
    Ok(Some(FoundModel {
        directory: directory.to_path_buf(),
        settings,
        versions,
        origin: Origin::Here,
        pointer,
        unreadable: None,
    }))
}

/// A model whose settings lie in its own folder and whose versions lie in `folder`.
///
/// # Errors
/// When something cannot be read for a reason that may pass.
pub fn scan_elsewhere(
    found: &FoundModel,
    folder: &Path,
    origin: Origin,
    is_model: &impl Fn(&str) -> bool,
) -> io::Result<FoundModel> {
    let there = scan_model(folder, is_model)?.unwrap_or_default();
    let mut versions = there.versions;
    for version in &mut versions {
        version.fingerprint = fingerprint(&version.files, &found.directory)?;
    }
    Ok(FoundModel { versions, origin, pointer: there.pointer, ..found.clone() })
}

/// The fingerprint of a version whose files lie in `files`, in the model folder `model`: of these files, and of the
/// settings, labels and sample requests beside the versions.
///
/// # Errors
/// When something cannot be read for a reason that may pass.
pub fn fingerprint(files: &Path, model: &Path) -> io::Result<Fingerprint> {
    let mut paths = beside(model)?;
    collect(files, 0, &mut paths)?;
    fingerprint_of(paths)
}

/// The fingerprint of what lies beside the versions in the model folder `model`.
///
/// # Errors
/// When something cannot be read for a reason that may pass.
pub fn fingerprint_beside(model: &Path) -> io::Result<Fingerprint> {
    fingerprint_of(beside(model)?)
}

/// Settings, labels and sample requests.
fn beside(model: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for path in list(model)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if [MODEL_FILE, TRITON_FILE, SAMPLES].contains(&name) || name.ends_with(".json") || name.ends_with(".txt") {
            collect(&path, 0, &mut paths)?;
        }
    }
    Ok(paths)
}

fn fingerprint_of(mut paths: Vec<PathBuf>) -> io::Result<Fingerprint> {
    paths.sort();
    paths.dedup();
    let mut hasher = DefaultHasher::new();
    let mut newest = SystemTime::UNIX_EPOCH;
    for path in paths {
        path.hash(&mut hasher);
        // A file that vanished between listing and looking changes the hash as well.
        let Some(metadata) = look(&path)? else { continue };
        metadata.len().hash(&mut hasher);
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        modified.hash(&mut hasher);
        std::os::unix::fs::MetadataExt::ino(&metadata).hash(&mut hasher);
        newest = newest.max(modified);
    }
    Ok(Fingerprint { hash: hasher.finish(), newest })
}

/// What stands for the files of a version: their names below its folder, lengths and times. The settings beside a model
/// that is its own only version are none of its files.
fn stamp(files: &Path) -> io::Result<u64> {
    let mut paths = Vec::new();
    collect(files, 0, &mut paths)?;
    paths.retain(|path| !path.ends_with(MODEL_FILE) && !path.ends_with(TRITON_FILE));
    paths.sort();
    let mut hasher = XxHash3_64::new();
    for path in paths {
        let Some(metadata) = look(&path)? else { continue };
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        hasher.write(path.strip_prefix(files).unwrap_or(&path).as_os_str().as_encoded_bytes());
        hasher.write(&[0]);
        hasher.write(&metadata.len().to_le_bytes());
        hasher.write(&modified.unwrap_or_default().as_nanos().to_le_bytes());
    }
    Ok(hasher.finish())
}

/// The files of a version that lies in `files`, by their paths below it. The settings beside a model that is its own
/// only version are none of them.
///
/// # Errors
/// When the folder cannot be read.
pub fn files_of(files: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    fs::read_dir(files)?;
    let mut paths = Vec::new();
    collect(files, 0, &mut paths)?;
    paths.retain(|path| !path.ends_with(MODEL_FILE) && !path.ends_with(TRITON_FILE));
    let below = |path: PathBuf| (path.strip_prefix(files).unwrap_or(&path).to_string_lossy().into_owned(), path);
    Ok(paths.into_iter().map(below).collect())
}

/// Every file at or below `path`.
fn collect(path: &Path, depth: usize, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    if depth > MAX_DEPTH || !look(path)?.is_some_and(|metadata| metadata.is_dir()) {
        paths.push(path.to_path_buf());
        return Ok(());
    }
    list(path)?.iter().try_for_each(|path| collect(path, depth + 1, paths))
}

/// What a path points at; `None` when nothing is there that we may see.
fn look(path: &Path) -> io::Result<Option<fs::Metadata>> {
    settled(fs::metadata(path).map(Some))
}

/// What a folder holds; nothing when it is gone or closed to us.
fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    settled(fs::read_dir(directory).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()))
}

/// Whether it is the process that lacks something, whatever it looks at.
fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// Takes errors that will not pass by themselves for an empty answer.
fn settled<T: Default>(result: io::Result<T>) -> io::Result<T> {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    match result {
        Err(error)
            if matches!(error.kind(), NotFound | PermissionDenied | NotADirectory)
                || rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::LOOP) =>
        {
            Ok(T::default())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn look(root: &Path) -> Vec<String> {
        let scan = scan(root, |name| name == "model.onnx").unwrap();
        scan.iter()
            .map(|(name, model)| {
                let versions: Vec<&str> = model.versions.iter().map(|found| found.version.as_str()).collect();
                format!("{name}: {}", versions.join(" "))
            })
            .collect()
    }

    #[test]
    fn versions_are_positive_integers_in_numeric_order() {
        let root = tempfile::tempdir().unwrap();
        for path in ["a/10/model.onnx", "a/9/model.onnx", "a/01/model.onnx", "a/0/model.onnx", "a/v3/model.onnx"] {
            write(root.path(), path, "");
        }
        write(root.path(), "bare/model.onnx", "");
        write(root.path(), ".hidden/1/model.onnx", "");
        write(root.path(), "notes/readme.md", "");
        write(root.path(), "file", "");
        assert_eq!(look(root.path()), ["a: 9 10", "bare: 1"]);
    }

    #[test]
    fn where_a_pointer_was_last_comes_last() {
        let root = tempfile::tempdir().unwrap();
        for version in ["1", "2", "10", "fine-tuned", "notes"] {
            write(root.path(), &format!("a/{version}/model.onnx"), "");
        }
        assert_eq!(look(root.path()), ["a: 1 2 10"]);
        let before = scan(root.path(), |_| true).unwrap()["a"].versions[0].fingerprint;
        write(root.path(), "a/.pointer", "10 1\nfine-tuned 2\n2 3\n");
        assert_eq!(look(root.path()), ["a: 1 10 fine-tuned 2"]);
        let after = scan(root.path(), |_| true).unwrap()["a"].clone();
        assert_eq!((after.pointer.version().unwrap().as_str(), after.versions[0].fingerprint), ("2", before));
    }

    #[test]
    fn symlinks_are_followed() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        write(elsewhere.path(), "blob", "weights");
        fs::create_dir_all(root.path().join("m/1")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path().join("blob"), root.path().join("m/1/model.onnx")).unwrap();
        let before = scan(root.path(), |_| true).unwrap()["m"].versions[0].fingerprint;
        write(elsewhere.path(), "blob", "other weights");
        assert_ne!(scan(root.path(), |_| true).unwrap()["m"].versions[0].fingerprint, before);
    }

    #[test]
    fn settings_labels_and_samples_are_part_of_every_fingerprint() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "m/1/model.onnx", "");
        let look = || scan(root.path(), |_| true).unwrap()["m"].versions[0].fingerprint;
        let mut before = look();
        assert_eq!(before, look());
        for file in ["m/model.toml", "m/labels.txt", "m/warmup/a.json", "m/1/weights.bin"] {
            write(root.path(), file, "x");
            assert_ne!(before, look(), "{file}");
            before = look();
        }
        write(root.path(), "m/2/model.onnx", "");
        assert_eq!(before, look(), "another version is another matter");
    }

    #[test]
    fn a_folder_that_cannot_be_read_hides_no_other() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "good/1/model.onnx", "");
        write(root.path(), "bad/1/model.onnx", "");
        // A name longer than any file system takes: neither missing nor forbidden, it just cannot be looked at.
        std::os::unix::fs::symlink("x".repeat(300), root.path().join("bad/1/weights.bin")).unwrap();
        let scan = scan(root.path(), |_| true).unwrap();
        assert_eq!(scan["good"].versions.len(), 1);
        assert!(scan["bad"].unreadable.as_ref().unwrap().contains("bad"), "{:?}", scan["bad"]);
    }

    #[test]
    fn half_a_look_is_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(scan(file.path(), |_| true).is_err(), "the root itself must be a folder");
        assert!(settled(io::Result::<Vec<u8>>::Err(io::Error::from_raw_os_error(24))).is_err(), "too many open files");
        assert!(settled(io::Result::<Vec<u8>>::Err(io::ErrorKind::NotFound.into())).unwrap().is_empty());
    }
}
