//! Files that came with a load: written into a temporary folder, and removed when nobody needs them any more.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::{
    error::{Code, Error},
    id::{ModelName, Version, shorten},
};

/// What the names of parameters that carry a file begin with.
pub const PREFIX: &str = "file:";

/// Files that one load may bring.
const MAX_FILES: usize = 1000;
/// Folders that may lie within each other inside a version.
const MAX_DEPTH: usize = 8;
/// Bytes of one name in a path; file systems take no longer ones.
const MAX_NAME: usize = 255;

/// What the names of folders for uploads begin with, among other temporary files.
const FOLDER: &str = "tidegate-uploads-";

/// The file in the data directory that says where uploads are, for whoever cleans up after a killed server.
const RECORD: &str = "uploads";

/// Where uploads go: a folder of this server's own among the system's temporary files, made with the first one, so
/// that the repository is never touched, wherever the data directory lies.
pub struct Uploads {
    record: PathBuf,
    root: Mutex<Option<Arc<TempDir>>>,
    allowed: bool,
    next: AtomicU64,
}

/// A model's folder with its versions; it vanishes with the last reference.
pub(super) struct Upload {
    directory: PathBuf,
    /// The folder around it, which vanishes after it.
    _root: Arc<TempDir>,
}

/// Where the server that works with the data directory `data` keeps its uploads; `None` before the first one.
pub fn directory(data: &Path) -> Option<PathBuf> {
    let path = PathBuf::from(fs::read_to_string(data.join(RECORD)).ok()?);
    path.is_dir().then_some(path)
}

impl Uploads {
    /// Removes what a server that was killed has left; this process must have locked `data`.
    pub fn open(data: &Path, allowed: bool) -> Self {
        let record = data.join(RECORD);
        if let Some(left) = directory(data).filter(|path| is_ours(path))
            && let Err(error) = fs::remove_dir_all(&left)
        {
            tracing::warn!(folder = %left.display(), %error, "old uploads could not be removed");
        }
        // There is none when nothing was uploaded.
        let _ = fs::remove_file(&record);
        Self { record, root: Mutex::default(), allowed, next: AtomicU64::new(0) }
    }

    /// The folder for all uploads, made and put on record when it is not there yet.
    fn root(&self) -> io::Result<Arc<TempDir>> {
        let mut root = self.root.lock();
        if let Some(made) = &*root {
            return Ok(made.clone());
        }
        // Its name cannot be foreseen, and only this user may look into it.
        let private = fs::Permissions::from_mode(0o700);
        let made = Arc::new(tempfile::Builder::new().prefix(FOLDER).permissions(private).tempdir()?);
        fs::write(&self.record, made.path().as_os_str().as_encoded_bytes())?;
        *root = Some(made.clone());
        Ok(made)
    }

    /// Writes `files`, whose names are `file:<version>/<name>`. Blocks.
    ///
    /// # Errors
    /// `Forbidden` when the configuration does not allow it, `InvalidArgument` naming the parameter, `TooLarge` for
    /// too many files, `Internal` when the disk does not take them.
    pub(super) fn write(&self, model: &ModelName, files: &[(String, Bytes)]) -> Result<Arc<Upload>, Error> {
        self.check_allowed()?;
        if files.len() > MAX_FILES {
            let message = format!("{} files were uploaded, more than {MAX_FILES}", files.len());
            return Err(Error::new(Code::TooLarge, message).of_model(model.as_str()));
        }
        let paths = files.iter().map(|(parameter, _)| path(parameter)).collect::<Result<Vec<_>, _>>();
        let paths = paths.map_err(|error| error.of_model(model.as_str()))?;
        let failed = |error: io::Error| Error::internal(format!("model '{model}': uploads cannot be kept: {error}"));
        let root = self.root().map_err(failed)?;
        // Ours alone from here on: what is there already is an error, and nothing in a new folder is a link.
        let directory = root.path().join(format!("{}-{model}", self.next.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&directory).map_err(failed)?;
        let upload = Upload { directory, _root: root };
        for ((parameter, content), path) in files.iter().zip(paths) {
            put(&upload.directory.join(path), content).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
                    let message = format!("parameter '{}' and another one name the same path", shorten(parameter));
                    Error::invalid(message).of_model(model.as_str())
                }
                _ => failed(error),
            })?;
        }
        Ok(Arc::new(upload))
    }

    /// # Errors
    /// `Forbidden` naming the key that allows uploads.
    pub(super) fn check_allowed(&self) -> Result<(), Error> {
        if self.allowed {
            return Ok(());
        }
        Err(Error::new(
            Code::Forbidden,
            format!(
                "uploads ('{PREFIX}…' parameters) are off; allow_model_upload = true (--allow-model-upload) allows them"
            ),
        ))
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        // There is none when nothing was uploaded.
        let _ = fs::remove_file(&self.record);
    }
}

/// Whether a path on record is a folder that this user's server made, and no link.
fn is_ours(path: &Path) -> bool {
    let named = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(FOLDER.as_bytes()));
    let here = |metadata: fs::Metadata| metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw();
    named && fs::symlink_metadata(path).is_ok_and(here)
}

impl Upload {
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            tracing::warn!(folder = %self.directory.display(), %error, "uploaded files could not be removed");
        }
    }
}

fn put(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    File::create_new(path)?.write_all(content)
}

/// The path below the model's folder that a parameter names.
fn path(parameter: &str) -> Result<PathBuf, Error> {
    let wrong =
        |why: &str| Error::invalid(format!("parameter '{}' must be {PREFIX}VERSION/NAME: {why}", shorten(parameter)));
    let rest = parameter.strip_prefix(PREFIX).unwrap_or(parameter);
    let (version, name) = rest.split_once('/').ok_or_else(|| wrong("there is no '/'"))?;
    let number = Version::parse(version).ok().and_then(|version| version.number());
    if number.is_none_or(|number| number == 0) {
        return Err(wrong("the version must be a number from 1 on"));
    }
    let mut path = PathBuf::from(version);
    for (depth, part) in name.split('/').enumerate() {
        if matches!(part, "" | "." | "..") || part.contains('\0') {
            return Err(wrong("the name must be a plain path, without empty parts, '.' and '..'"));
        }
        if part.len() > MAX_NAME || depth >= MAX_DEPTH {
            return Err(wrong(&format!("at most {MAX_DEPTH} folders deep, with names of {MAX_NAME} bytes at most")));
        }
        path.push(part);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(files: &[&str]) -> (Uploads, TempDir, Result<Arc<Upload>, Error>) {
        let data = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(data.path(), true);
        let files: Vec<_> = files.iter().map(|name| (name.to_string(), Bytes::from_static(b"content"))).collect();
        let written = uploads.write(&ModelName::parse("m").unwrap(), &files);
        (uploads, data, written)
    }

    /// The folders in the one on record.
    fn kept(data: &TempDir) -> usize {
        directory(data.path()).map_or(0, |folder| fs::read_dir(folder).unwrap().count())
    }

    #[test]
    fn files_lie_where_they_are_named_until_nobody_needs_them() {
        let names = ["file:1/model.onnx", "file:1/parts/weights.bin", "file:12/model.onnx"];
        let (uploads, data, upload) = write(&names);
        let upload = upload.unwrap();
        let folder = upload.directory().to_owned();
        let root = directory(data.path()).unwrap();
        assert!(folder.starts_with(&root) && !folder.starts_with(data.path()));
        assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o700);
        for file in ["1/model.onnx", "1/parts/weights.bin", "12/model.onnx"] {
            assert_eq!(fs::read(folder.join(file)).unwrap(), b"content");
        }
        drop(upload);
        assert!(!folder.exists() && root.exists());
        drop(uploads);
        assert!(!root.exists());
        assert_eq!(fs::read_dir(data.path()).unwrap().count(), 0, "the record is gone");
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let long = format!("file:1/{}", "x".repeat(256));
        let deep = format!("file:1/{}x", "d/".repeat(8));
        for name in [
            "file:../model.onnx",
            "file:1/../../model.onnx",
            "file:1/..",
            "file:1/./model.onnx",
            "file:1//etc/passwd",
            "file:/etc/passwd",
            "file:1/",
            "file:1",
            "file:",
            "file:0/model.onnx",
            "file:01/model.onnx",
            "file:-1/model.onnx",
            "file:latest/model.onnx",
            "file:1/a\0b",
            &long,
            &deep,
        ] {
            let (_uploads, data, upload) = write(&["file:1/good.onnx", name]);
            let error = upload.map(drop).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument, "{name}");
            assert!(error.message.contains(&shorten(name)), "{error}");
            assert_eq!(directory(data.path()), None, "{name} left something behind");
        }
    }

    #[test]
    fn one_path_twice_is_refused_and_leaves_nothing() {
        for names in [["file:1/a", "file:1/a/b"], ["file:1/a/b", "file:1/a"], ["file:1/a", "file:1/a"]] {
            let (_uploads, data, upload) = write(&names);
            assert_eq!(upload.map(drop).unwrap_err().code, Code::InvalidArgument, "{names:?}");
            assert_eq!(kept(&data), 0);
        }
    }

    #[test]
    fn too_many_files_and_forbidden_ones_are_refused() {
        let names: Vec<String> = (0..=MAX_FILES).map(|number| format!("file:1/{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(write(&names).2.map(drop).unwrap_err().code, Code::TooLarge);

        let data = tempfile::tempdir().unwrap();
        let off = Uploads::open(data.path(), false);
        let error = off.write(&ModelName::parse("m").unwrap(), &[]).map(drop).unwrap_err();
        assert!(error.code == Code::Forbidden && error.message.contains("allow_model_upload"), "{error}");
    }

    #[test]
    fn what_a_killed_server_left_is_removed_and_no_link_is_followed() {
        let (data, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(elsewhere.path().join("precious"), "").unwrap();
        let left = tempfile::Builder::new().prefix(FOLDER).tempdir().unwrap().keep();
        fs::create_dir_all(left.join("0-m/1")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), left.join("0-m/link")).unwrap();
        fs::write(data.path().join(RECORD), left.to_str().unwrap()).unwrap();
        drop(Uploads::open(data.path(), false));
        assert!(!left.exists() && elsewhere.path().join("precious").exists());
    }

    #[test]
    fn only_folders_of_ours_are_removed() {
        let (data, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let link = elsewhere.path().join(format!("{FOLDER}x"));
        let precious = elsewhere.path().join("precious");
        fs::create_dir(&precious).unwrap();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        for recorded in [&precious, &link] {
            fs::write(data.path().join(RECORD), recorded.to_str().unwrap()).unwrap();
            drop(Uploads::open(data.path(), true));
            assert!(recorded.exists(), "{}", recorded.display());
        }
    }
}
