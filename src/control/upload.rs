//! Files that came with a load: written into a temporary folder, and removed when nobody needs them any more.

use std::{
    fs::{self, DirBuilder, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

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

/// The folder for what is uploaded.
pub struct Uploads {
    root: Arc<Root>,
    allowed: bool,
    next: AtomicU64,
}

/// A model's folder with its versions; it vanishes with the last reference.
pub(super) struct Upload {
    directory: PathBuf,
    /// Dropped after the folder within it is gone.
    _root: Arc<Root>,
}

/// The folder of all uploads, which vanishes when neither they nor `Uploads` need it.
struct Root(PathBuf);

/// The folder for the uploads of the server that works with the data directory `data`: among the system's temporary
/// files, so that it is never in the repository, and found again after the server was killed.
pub fn directory(data: &Path) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    data.canonicalize().unwrap_or_else(|_| data.to_owned()).hash(&mut hasher);
    std::env::temp_dir().join(format!("tidegate-uploads-{:016x}", hasher.finish()))
}

impl Uploads {
    /// Removes what a server that was killed has left; this process must have locked `data`.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn open(data: &Path, allowed: bool) -> io::Result<Self> {
        let root = directory(data);
        match fs::remove_dir_all(&root) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(Self { root: Arc::new(Root(root)), allowed, next: AtomicU64::new(0) }),
        }
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
        let failed = |error: io::Error| Error::internal(format!("model '{model}': {}: {error}", self.root.0.display()));
        let mut private = DirBuilder::new();
        private.mode(0o700);
        private.recursive(true).create(&self.root.0).map_err(failed)?;
        // Ours alone from here on: what is there already is an error, and nothing in a new folder is a link.
        let directory = self.root.0.join(format!("{}-{model}", self.next.fetch_add(1, Ordering::Relaxed)));
        private.recursive(false).create(&directory).map_err(failed)?;
        let upload = Upload { directory, _root: self.root.clone() };
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

impl Drop for Root {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = fs::remove_dir(&self.0);
    }
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

    fn write(files: &[&str]) -> (tempfile::TempDir, Result<Arc<Upload>, Error>) {
        let data = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(data.path(), true).unwrap();
        let files: Vec<_> = files.iter().map(|name| (name.to_string(), Bytes::from_static(b"content"))).collect();
        let written = uploads.write(&ModelName::parse("m").unwrap(), &files);
        (data, written)
    }

    #[test]
    fn files_lie_where_they_are_named_until_nobody_needs_them() {
        let (data, upload) = write(&["file:1/model.onnx", "file:1/parts/weights.bin", "file:12/model.onnx"]);
        let upload = upload.unwrap();
        let directory = upload.directory().to_owned();
        assert!(directory.starts_with(super::directory(data.path())));
        for file in ["1/model.onnx", "1/parts/weights.bin", "12/model.onnx"] {
            assert_eq!(fs::read(directory.join(file)).unwrap(), b"content");
        }
        drop(upload);
        assert!(!directory.exists());
        assert!(!super::directory(data.path()).exists());
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
            let (data, upload) = write(&["file:1/good.onnx", name]);
            let error = upload.map(drop).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument, "{name}");
            assert!(error.message.contains(&shorten(name)), "{error}");
            assert_eq!(fs::read_dir(data.path()).unwrap().count(), 0, "{name} left something behind");
        }
    }

    #[test]
    fn one_path_twice_is_refused_and_leaves_nothing() {
        for names in [["file:1/a", "file:1/a/b"], ["file:1/a/b", "file:1/a"], ["file:1/a", "file:1/a"]] {
            let (data, upload) = write(&names);
            assert_eq!(upload.map(drop).unwrap_err().code, Code::InvalidArgument, "{names:?}");
            assert_eq!(fs::read_dir(super::directory(data.path())).map_or(0, Iterator::count), 0);
        }
    }

    #[test]
    fn too_many_files_and_forbidden_ones_are_refused() {
        let names: Vec<String> = (0..=MAX_FILES).map(|number| format!("file:1/{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(write(&names).1.map(drop).unwrap_err().code, Code::TooLarge);

        let data = tempfile::tempdir().unwrap();
        let off = Uploads::open(data.path(), false).unwrap();
        let error = off.write(&ModelName::parse("m").unwrap(), &[]).map(drop).unwrap_err();
        assert!(error.code == Code::Forbidden && error.message.contains("allow_model_upload"), "{error}");
    }

    #[test]
    fn what_a_killed_server_left_is_removed_and_no_link_is_followed() {
        let (data, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(elsewhere.path().join("precious"), "").unwrap();
        let left = super::directory(data.path()).join("0-m");
        fs::create_dir_all(left.join("1")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), left.join("link")).unwrap();
        Uploads::open(data.path(), false).unwrap();
        assert!(!super::directory(data.path()).exists());
        assert!(elsewhere.path().join("precious").exists());
    }
}
