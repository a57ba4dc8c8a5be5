//! What the Hub's own tools have downloaded to this machine: read where it lies, and never written.
//!
//! ```text
//! models--acme--iris/
//!   blobs/<etag>             contents, by their SHA-256 (large files) or as git names them
//!   refs/<revision>          the commit that a branch or tag was at
//!   snapshots/<commit>/…     the repository's tree: links to ../../blobs/<etag>
//! ```

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Listed, MAX_FILES, is_commit};
use crate::source::{Digest, SourceError};

/// Folders deeper than this are not looked at: no repository has them.
const MAX_DEPTH: usize = 16;

/// The downloads of one repository. Whoever asks for them waits for their disk.
#[derive(Clone)]
pub struct Downloads {
    root: PathBuf,
}

impl Downloads {
    /// Those of the repository `id` in the tools' cache at `cache`, where there need not be any.
    pub fn of(cache: &Path, id: &str) -> Self {
        Self { root: cache.join(format!("models--{}", id.replace('/', "--"))) }
    }

    /// The commit that a revision was at when it was downloaded.
    ///
    /// # Errors
    /// `NotFound` when it was not, and `Senseless` when that is no commit.
    pub fn commit(&self, revision: &str) -> Result<String, SourceError> {
        if is_commit(revision) {
            return Ok(revision.to_owned());
        }
        let path = self.root.join("refs").join(revision);
        let commit = fs::read_to_string(&path).map_err(|error| self.failed(&path, &error))?;
        let commit = commit.trim();
        if !is_commit(commit) {
            let reason = format!("{} does not name a commit", path.display());
            return Err(SourceError::Senseless { place: self.place(), reason });
        }
        Ok(commit.to_owned())
    }

    /// The files of a commit, as far as they were downloaded.
    ///
    /// # Errors
    /// `NotFound` when nothing was; `Refused` when a file is no link to a blob of the repository.
    pub fn list(&self, commit: &str) -> Result<Vec<Listed>, SourceError> {
        let root = self.root.join("snapshots").join(commit);
        let blobs = self.root.join("blobs");
        let blobs = blobs.canonicalize().map_err(|error| self.failed(&blobs, &error))?;
        let (mut folders, mut files) = (vec![(root.clone(), 0)], Vec::new());
        while let Some((folder, depth)) = folders.pop() {
            let failed = |error: &io::Error| self.failed(&folder, error);
            for entry in fs::read_dir(&folder).map_err(|error| failed(&error))? {
                let entry = entry.map_err(|error| failed(&error))?;
                let (path, kind) = (entry.path(), entry.file_type().map_err(|error| failed(&error))?);
                if kind.is_dir() && depth < MAX_DEPTH {
                    folders.push((path, depth + 1));
                    continue;
                }
                files.push(self.linked(&root, &path, &blobs)?);
                if files.len() + folders.len() > MAX_FILES {
                    let reason = format!("there are more than {MAX_FILES} files in {}", root.display());
                    return Err(SourceError::Senseless { place: self.place(), reason });
                }
            }
        }
        files.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok(files)
    }

    /// The content with this digest, when all `size` of it is here.
    pub fn find(&self, digest: &Digest, size: u64) -> Option<PathBuf> {
        let path = self.root.join("blobs").join(digest.hex());
        let metadata = fs::symlink_metadata(&path).ok()?;
        (metadata.is_file() && metadata.len() == size).then_some(path)
    }

    /// Where they are.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The file at `path` of a snapshot, which is a link to a blob and nothing else.
    fn linked(&self, root: &Path, path: &Path, blobs: &Path) -> Result<Listed, SourceError> {
        let below = path.strip_prefix(root).unwrap_or(path).to_str();
        let Some(below) = below.map(ToOwned::to_owned) else {
            let file = crate::error::shorten(&path.to_string_lossy());
            return Err(SourceError::Refused { file, reason: "its name is no UTF-8".to_owned() });
        };
        let refused = |reason: &str| SourceError::Refused { file: below.clone(), reason: reason.to_owned() };
        let target = fs::read_link(path).map_err(|_| refused("in a snapshot, only links to blobs are read"))?;
        let target = path.parent().unwrap_or(root).join(target);
        let name = target.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let folder = target.parent().and_then(|folder| folder.canonicalize().ok());
        if folder.as_deref() != Some(blobs) {
            return Err(refused("it is a link to something that is no blob of its repository"));
        }
        let digest = Digest::from_hex("sha256", name).or_else(|| Digest::from_hex("git-sha1", name));
        let digest = digest.ok_or_else(|| refused("the name of its blob is no digest"))?;
        let metadata = fs::symlink_metadata(&target).map_err(|error| self.failed(&target, &error))?;
        if !metadata.is_file() {
            return Err(refused("its blob is no file"));
        }
        Ok(Listed { path: below, size: metadata.len(), digest })
    }

    fn failed(&self, path: &Path, error: &io::Error) -> SourceError {
        match error.kind() {
            io::ErrorKind::NotFound => SourceError::NotFound { place: self.place(), what: path.display().to_string() },
            _ => SourceError::disk(path, error),
        }
    }

    fn place(&self) -> String {
        "the Hub's cache on this machine".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    /// By `git hash-object`, of `hello` and a line's end.
    const HELLO: &str = "ce013625030ba8dba906f756967f9e9ca394464a";

    /// As `huggingface_hub` leaves it.
    fn downloaded(cache: &Path) -> Downloads {
        let downloads = Downloads::of(cache, "acme/iris");
        let root = cache.join("models--acme--iris");
        for folder in ["blobs", "refs/refs/pr", &format!("snapshots/{COMMIT}/onnx")] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("blobs").join(HELLO), "hello\n").unwrap();
        for (revision, commit) in [("main", COMMIT), ("refs/pr/1", COMMIT), ("broken", "../../etc")] {
            fs::write(root.join("refs").join(revision), commit).unwrap();
        }
        let snapshot = root.join("snapshots").join(COMMIT);
        symlink(format!("../../blobs/{HELLO}"), snapshot.join("config.json")).unwrap();
        symlink(format!("../../../blobs/{HELLO}"), snapshot.join("onnx/model.onnx")).unwrap();
        downloads
    }

    #[test]
    fn a_snapshot_is_listed_by_its_links() {
        let cache = tempfile::tempdir().unwrap();
        let downloads = downloaded(cache.path());
        for revision in ["main", "refs/pr/1", COMMIT] {
            assert_eq!(downloads.commit(revision).unwrap(), COMMIT);
        }
        let digest = Digest::from_hex("git-sha1", HELLO).unwrap();
        let listed = ["config.json", "onnx/model.onnx"].map(|path| Listed { path: path.to_owned(), size: 6, digest });
        assert_eq!(downloads.list(COMMIT).unwrap(), listed);

        assert!(matches!(downloads.commit("other"), Err(SourceError::NotFound { .. })));
        assert!(matches!(downloads.commit("broken"), Err(SourceError::Senseless { .. })));
        let elsewhere = Downloads::of(cache.path(), "acme/other");
        assert!(matches!(elsewhere.list(COMMIT), Err(SourceError::NotFound { .. })));
    }

    #[test]
    fn links_lead_to_blobs_and_nowhere_else() {
        let cache = tempfile::tempdir().unwrap();
        let downloads = downloaded(cache.path());
        let snapshot = cache.path().join("models--acme--iris/snapshots").join(COMMIT);
        let secret = cache.path().join(HELLO);
        fs::write(&secret, "secret").unwrap();
        fs::write(cache.path().join("models--acme--iris/blobs/name"), "").unwrap();
        symlink(&secret, cache.path().join("models--acme--iris/blobs").join("a".repeat(40))).unwrap();
        let targets = [
            secret.to_str().unwrap().to_owned(),
            "../../blobs/name".to_owned(),
            format!("../../blobs/{}", "a".repeat(40)),
            "../../blobs/..".to_owned(),
            "../..".to_owned(),
        ];
        for target in targets {
            symlink(&target, snapshot.join("bad")).unwrap();
            let error = downloads.list(COMMIT).unwrap_err();
            assert!(matches!(error, SourceError::Refused { .. }), "{target}: {error}");
            fs::remove_file(snapshot.join("bad")).unwrap();
        }
        fs::write(snapshot.join("bad"), "no link").unwrap();
        assert!(downloads.list(COMMIT).unwrap_err().to_string().contains("only links to blobs"));
    }

    #[test]
    fn blobs_are_found_when_they_are_whole() {
        let cache = tempfile::tempdir().unwrap();
        let downloads = downloaded(cache.path());
        let digest = Digest::from_hex("git-sha1", HELLO).unwrap();
        assert_eq!(fs::read(downloads.find(&digest, 6).unwrap()).unwrap(), b"hello\n");
        assert!(downloads.find(&digest, 7).is_none(), "another size is an unfinished or another content");
        let other = Digest::from_hex("git-sha1", &"b".repeat(40)).unwrap();
        assert!(downloads.find(&other, 6).is_none());
    }
}
