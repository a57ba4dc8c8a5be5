//! What one source holds, as a repository of models: versions that are published whole by one rename, and what is known
//! of each of them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::{Blob, Cache, time_of, vet, write_atomically};
use crate::{
    id::{ModelName, Version},
    source::{
        Digest, Lineage, Names, SourceError, SourceUri, digest,
        endpoint::AT,
        pointer::{POINTER_FILE, Pointer},
    },
};

/// The file in a mirror's folder that says what it goes by. It is empty where nobody knows.
const PLACE_FILE: &str = "place";

/// A source's folder in the cache.
pub struct Mirror {
    cache: Arc<Cache>,
    root: PathBuf,
}

/// What is known of a published version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Where it is from.
    pub uri: String,
    /// The revision it had there.
    pub revision: String,
    /// `sha256:` of its files' lines `path NUL sha256 LF`, sorted by path.
    pub digest: String,
    /// By path below the version's folder.
    pub files: BTreeMap<String, Stored>,
    /// What its place knew of it when it was fetched, and what it is called there now.
    #[serde(default)]
    pub lineage: Option<Lineage>,
}

/// Where a version is from.
pub struct Origin<'a> {
    pub uri: &'a SourceUri,
    pub revision: &'a str,
    pub lineage: Option<Lineage>,
}

/// A file of a published version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// In hexadecimal.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
}

/// What is known of the files beside a model's versions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Beside {
    revision: String,
    files: BTreeMap<String, Stored>,
}

/// A version that is being put together. Dropped, it leaves nothing.
pub struct Staged {
    cache: Arc<Cache>,
    folder: TempDir,
    files: BTreeMap<String, Blob>,
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // Nobody follows its place any more; who does so again opens it anew.
        self.cache.opened.lock().remove(&self.root);
    }
}

impl Mirror {
    /// The mirror that goes by `key` (`endpoint::key`), made when there is none yet.
    ///
    /// # Errors
    /// When its folders cannot be made.
    pub fn open(cache: Arc<Cache>, key: &str) -> Result<Self, SourceError> {
        let root = folder(&cache.root, key);
        if let Some((before, _)) = key.rsplit_once(AT) {
            take_over(&folder(&cache.root, before), &root).map_err(|error| SourceError::disk(&root, &error))?;
        }
        for folder in ["models", "manifests"] {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).map_err(|error| SourceError::disk(&folder, &error))?;
        }
        cache.opened.lock().insert(root.clone());
        let mirror = Self { cache, root };
        mirror.mark(key);
        Ok(mirror)
    }

    /// Notes what it goes by, and that it is used. Without the note it is merely taken for one that nobody uses, some time.
    fn mark(&self, key: &str) {
        let path = self.root.join(PLACE_FILE);
        let is_known = fs::read_to_string(&path).is_ok_and(|known| known == key);
        let marked = if is_known { Ok(()) } else { fs::write(&path, key) };
        if let Err(error) = marked {
            tracing::warn!(file = %path.display(), %error, "what a mirror is of cannot be noted");
        }
        self.touch();
    }

    /// Notes that it is used now.
    pub fn touch(&self) {
        let path = self.root.join(PLACE_FILE);
        let touched = File::options().write(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::warn!(file = %path.display(), %error, "it cannot be noted that a mirror is used");
        }
    }

    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// The repository: `<model>/<version>/…`.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Every version that is published and of which all is known, by model. What is there without a manifest, after a
    /// crash, does not show, and is published once more.
    ///
    /// # Errors
    /// When the folders cannot be read.
    pub fn published(&self) -> Result<BTreeMap<ModelName, BTreeMap<String, Manifest>>, SourceError> {
        let mut published = BTreeMap::new();
        for (name, folder) in folders(&self.models())? {
            let Ok(name) = ModelName::parse(&name) else { continue };
            let mut versions = BTreeMap::new();
            for (version, _) in folders(&folder)? {
                let manifest = Version::parse(&version).ok().and_then(|version| self.manifest(&name, &version));
                versions.extend(manifest.map(|manifest| (version, manifest)));
            }
            published.insert(name, versions);
        }
        Ok(published)
    }

    /// What is known of a version that is published.
    pub fn manifest(&self, model: &ModelName, version: &Version) -> Option<Manifest> {
        let folder = self.models().join(model.as_str()).join(version.as_str());
        read(&self.manifest_path(model, version)).filter(|_| folder.is_dir())
    }

    /// Begins to put a version together.
    ///
    /// # Errors
    /// When there is no room for a folder.
    pub fn stage(&self) -> Result<Staged, SourceError> {
        let staging = self.cache.root.join("staging");
        let folder = TempDir::new_in(&staging).map_err(|error| SourceError::disk(&staging, &error))?;
        Ok(Staged { cache: self.cache.clone(), folder, files: BTreeMap::new() })
    }

    /// Puts what was staged into the repository, in the place of what the version was before; it is seen whole or not
    /// at all. The same files published again are no change.
    ///
    /// # Errors
    /// When the disk fails; the version is then as it was.
    pub fn publish(
        &self,
        model: &ModelName,
        version: &Version,
        staged: Staged,
        origin: Origin<'_>,
    ) -> Result<Manifest, SourceError> {
        let manifest = Manifest {
            uri: origin.uri.to_string(),
            revision: origin.revision.to_owned(),
            digest: staged.digest().to_string(),
            files: stored(&staged.files),
            lineage: origin.lineage,
        };
        let target = self.models().join(model.as_str()).join(version.as_str());
        if self.manifest(model, version).is_none_or(|before| before.files != manifest.files) {
            // Between the two nobody knows what the folder holds, and after a crash it is published once more.
            remove(&self.manifest_path(model, version))?;
            let placed = || -> io::Result<()> {
                sync_folders(staged.folder.path())?;
                let parent = self.models().join(model.as_str());
                fs::create_dir_all(&parent)?;
                place(staged.folder.path(), &target)?;
                File::open(&parent)?.sync_all()
            };
            placed().map_err(|error| SourceError::disk(&target, &error))?;
        }
        self.write(&self.manifest_path(model, version), &manifest)?;
        Ok(manifest)
    }

    /// Writes down what its place knows of a version of which nothing was known when it was mirrored. Whether that is news.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn learn(&self, model: &ModelName, version: &Version, lineage: Lineage) -> Result<bool, SourceError> {
        let Some(manifest) = self.manifest(model, version).filter(|manifest| manifest.lineage.is_none()) else {
            return Ok(false);
        };
        self.write(&self.manifest_path(model, version), &Manifest { lineage: Some(lineage), ..manifest })?;
        Ok(true)
    }

    /// Writes down what the versions of a model are called now. How many are called something else.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn rename(&self, model: &ModelName, names: &Names) -> Result<usize, SourceError> {
        let folder = self.models().join(model.as_str());
        if !folder.is_dir() {
            return Ok(0);
        }
        let mut renamed = 0;
        for (name, _) in folders(&folder)? {
            let Ok(version) = Version::parse(&name) else { continue };
            let Some(mut manifest) = self.manifest(model, &version) else { continue };
            if manifest.lineage.as_mut().is_some_and(|lineage| names.renew(&name, lineage)) {
                self.write(&self.manifest_path(model, &version), &manifest)?;
                renamed += 1;
            }
        }
        Ok(renamed)
    }

    /// Puts the files beside a model's versions there, each by a rename, and takes those away that were there before.
    /// Whether anything changed.
    ///
    /// # Errors
    /// When the disk fails, or a file's path lies within a version.
    pub fn publish_beside(&self, model: &ModelName, staged: &Staged, revision: &str) -> Result<bool, SourceError> {
        let path = self.beside_path(model);
        let before: Beside = read(&path).unwrap_or_default();
        let files = stored(&staged.files);
        let now = Beside { revision: revision.to_owned(), files };
        let is_inside = |name: &&String| {
            let first = name.split_once('/').and_then(|(first, _)| Version::parse(first).ok());
            first.is_some_and(|version| version.number().is_some())
        };
        if let Some(name) = now.files.keys().find(is_inside) {
            let reason = "it lies within a version and is not of it".to_owned();
            return Err(SourceError::Refused { file: name.clone(), reason });
        }
        // A list without a revision is of files that may be there.
        if before.files == now.files && !before.revision.is_empty() {
            self.write(&path, &now)?;
            return Ok(false);
        }
        // Until all is in its place, the list names what may be there, and no revision.
        let mut meanwhile = Beside { revision: String::new(), files: before.files };
        meanwhile.files.extend(now.files.clone());
        self.write(&path, &meanwhile)?;
        let folder = self.models().join(model.as_str());
        // First what goes: where a file was there may be a folder now, and the other way round.
        for name in meanwhile.files.keys().filter(|name| !now.files.contains_key(*name)) {
            remove_below(&folder, name).map_err(|error| SourceError::disk(&folder.join(name), &error))?;
        }
        for name in staged.files.keys() {
            let (from, to) = (staged.folder.path().join(name), folder.join(name));
            let placed = || -> io::Result<()> {
                fs::create_dir_all(to.parent().unwrap_or(&folder))?;
                fs::rename(&from, &to)
            };
            placed().map_err(|error| SourceError::disk(&to, &error))?;
        }
        self.write(&path, &now)?;
        Ok(true)
    }

    /// The revision that the files beside a model's versions had at their place, when all of them are here.
    pub fn beside_revision(&self, model: &ModelName) -> Option<String> {
        read::<Beside>(&self.beside_path(model)).map(|beside| beside.revision)
    }

    /// Has a model's pointer point at a version that is published. Whether it pointed elsewhere.
    ///
    /// # Errors
    /// When the disk fails; it points then where it did.
    pub fn point(&self, model: &ModelName, version: &Version) -> Result<bool, SourceError> {
        let folder = self.models().join(model.as_str());
        let mut pointer = self.pointer(model)?;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let moved = pointer.move_to(version, u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        if moved {
            let path = folder.join(POINTER_FILE);
            write_atomically(&self.cache.root.join("staging"), &path, pointer.text().as_bytes())
                .map_err(|error| SourceError::disk(&path, &error))?;
        }
        Ok(moved)
    }

    /// Where a model's pointer points, and pointed before.
    ///
    /// # Errors
    /// When nobody can tell.
    pub fn pointer(&self, model: &ModelName) -> Result<Pointer, SourceError> {
        let folder = self.models().join(model.as_str());
        Pointer::read(&folder).map_err(|error| SourceError::disk(&folder, &error))
    }

    /// Takes a version out of the repository, at once and whole.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn withdraw(&self, model: &ModelName, version: &Version) -> Result<(), SourceError> {
        remove(&self.manifest_path(model, version))?;
        self.clear(&self.models().join(model.as_str()).join(version.as_str()))
    }

    /// Takes a model out of the repository, with all its versions.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn withdraw_model(&self, model: &ModelName) -> Result<(), SourceError> {
        let manifests = self.root.join("manifests").join(model.as_str());
        fs::remove_dir_all(&manifests).or_else(absent).map_err(|error| SourceError::disk(&manifests, &error))?;
        self.clear(&self.models().join(model.as_str()))
    }

    /// Moves a folder away and deletes it there.
    fn clear(&self, folder: &Path) -> Result<(), SourceError> {
        let cleared = || -> io::Result<()> {
            let away = TempDir::new_in(self.cache.root.join("staging"))?;
            fs::rename(folder, away.path().join("gone")).or_else(absent)?;
            away.close()
        };
        cleared().map_err(|error| SourceError::disk(folder, &error))
    }

    fn manifest_path(&self, model: &ModelName, version: &Version) -> PathBuf {
        self.root.join("manifests").join(model.as_str()).join("versions").join(format!("{version}.json"))
    }

    fn beside_path(&self, model: &ModelName) -> PathBuf {
        self.root.join("manifests").join(model.as_str()).join("beside.json")
    }

    fn write(&self, path: &Path, value: &impl Serialize) -> Result<(), SourceError> {
        let written = || -> io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
            write_atomically(&self.cache.root.join("staging"), path, &serde_json::to_vec_pretty(value)?)
        };
        written().map_err(|error| SourceError::disk(path, &error))
    }
}

/// Marks the mirrors of earlier servers that have not said when they used them: from now on they are not used.
pub(super) fn mark_unknown(root: &Path) -> Result<(), SourceError> {
    for (_, mirror) in folders(&root.join("mirrors"))? {
        let path = mirror.join(PLACE_FILE);
        if !path.exists() {
            File::create(&path).map_err(|error| SourceError::disk(&path, &error))?;
        }
    }
    Ok(())
}

/// Takes the mirror out that was not used for the longest time, at least for `age`, and what goes by it. `None` when there
/// is none.
pub(super) fn withdraw_unused(cache: &Cache, age: Duration) -> Result<Option<String>, SourceError> {
    let opened = cache.opened.lock().clone();
    let mut unused = Vec::new();
    for (name, root) in folders(&cache.root.join("mirrors"))? {
        let since = used_at(&root);
        if !opened.contains(&root) && since.elapsed().is_ok_and(|elapsed| elapsed >= age) {
            unused.push((since, name, root));
        }
    }
    let Some((since, name, root)) = unused.into_iter().min() else { return Ok(None) };
    let place = fs::read_to_string(root.join(PLACE_FILE)).ok().filter(|place| !place.is_empty()).unwrap_or(name);
    let cleared = || -> io::Result<()> {
        let away = TempDir::new_in(cache.root.join("staging"))?;
        fs::rename(&root, away.path().join("gone"))?;
        away.close()
    };
    cleared().map_err(|error| SourceError::disk(&root, &error))?;
    tracing::info!(place, since = ?since.elapsed().unwrap_or_default(), "a mirror makes room that nobody uses any more");
    Ok(Some(place))
}

/// When a server last used the mirror in `root`.
fn used_at(root: &Path) -> SystemTime {
    fs::metadata(root.join(PLACE_FILE)).and_then(|metadata| metadata.modified()).unwrap_or_else(|_| SystemTime::now())
}

/// Has the mirror in `root` be the one that was in `before`, when there is none yet and nobody knows where that one is from.
fn take_over(before: &Path, root: &Path) -> io::Result<()> {
    let is_unknown = fs::metadata(before.join(PLACE_FILE)).map_or(true, |metadata| metadata.len() == 0);
    if root.exists() || !is_unknown {
        return Ok(());
    }
    fs::rename(before, root).or_else(absent)
}

/// The folder of the mirror that goes by `key`, in the cache in `root`.
pub fn folder(root: &Path, key: &str) -> PathBuf {
    let legible: String =
        key.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).take(40).collect();
    root.join("mirrors").join(format!("{legible}-{}", &digest::of_texts(&[key])[..12]))
}

/// What is known of the version whose files lie in `files`, when that is in a mirror.
pub fn manifest_of(files: &Path) -> Option<Manifest> {
    read(&manifest_path(files)?)
}

/// Where that is written down.
pub fn manifest_path(files: &Path) -> Option<PathBuf> {
    let (version, model) = (files.file_name()?.to_str()?, files.parent()?);
    let (name, models) = (model.file_name()?, model.parent()?);
    let root = models.parent().filter(|_| models.file_name().is_some_and(|name| name == "models"))?;
    Some(root.join("manifests").join(name).join("versions").join(format!("{version}.json")))
}

/// A version that has a content.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct User {
    /// `model/version`.
    pub version: String,
    /// When a server last used its mirror.
    pub used: SystemTime,
}

/// The versions that have each content, by its SHA-256 in hexadecimal, in every mirror of the cache in `root`, also of one
/// that a server has open.
///
/// # Errors
/// When the folders cannot be read.
pub fn users(root: &Path) -> Result<BTreeMap<String, Vec<User>>, SourceError> {
    let mut users: BTreeMap<String, Vec<User>> = BTreeMap::new();
    for (_, mirror) in folders(&root.join("mirrors"))? {
        let used = used_at(&mirror);
        for (model, manifests) in folders(&mirror.join("manifests"))? {
            let versions = manifests.join("versions");
            // A model may have settings only.
            let entries = match fs::read_dir(&versions) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(|error| SourceError::disk(&versions, &error))?,
            };
            for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
                let Some(manifest) = read::<Manifest>(&path) else { continue };
                let version = path.file_stem().unwrap_or_default().to_string_lossy();
                for stored in manifest.files.into_values() {
                    let user = User { version: format!("{model}/{version}"), used };
                    users.entry(stored.sha256).or_default().push(user);
                }
            }
        }
    }
    users.values_mut().for_each(|versions| {
        // Of several mirrors that have it, the one that was used last counts.
        versions.sort_unstable_by(|one, other| (&one.version, other.used).cmp(&(&other.version, one.used)));
        versions.dedup_by(|one, other| one.version == other.version);
    });
    Ok(users)
}

/// Takes the versions out, and the files beside versions, that have the content of this SHA-256 in hexadecimal, in every
/// mirror of the cache.
pub(super) fn withdraw_users(cache: &Arc<Cache>, sha256: &str) -> Result<(), SourceError> {
    for (_, root) in folders(&cache.root.join("mirrors"))? {
        let mirror = Mirror { cache: cache.clone(), root };
        for (model, versions) in mirror.published()? {
            for (version, manifest) in versions {
                if let Ok(version) = Version::parse(&version)
                    && manifest.files.values().any(|stored| stored.sha256 == sha256)
                {
                    mirror.withdraw(&model, &version)?;
                }
            }
            let path = mirror.beside_path(&model);
            let Some(beside) = read::<Beside>(&path) else { continue };
            let folder = mirror.models().join(model.as_str());
            for (name, _) in beside.files.iter().filter(|(_, stored)| stored.sha256 == sha256) {
                mirror.write(&path, &Beside { revision: String::new(), files: beside.files.clone() })?;
                remove_below(&folder, name).map_err(|error| SourceError::disk(&folder.join(name), &error))?;
            }
        }
    }
    Ok(())
}

impl Staged {
    /// Adds a content as the file `path`.
    ///
    /// # Errors
    /// `Refused` when the path leaves the folder or is a pickle's; `Disk` when the disk fails.
    pub fn add(&mut self, path: &str, blob: &Blob) -> Result<(), SourceError> {
        vet::path(path)?;
        let target = self.folder.path().join(path);
        let from = self.cache.blob_path(&blob.sha256);
        let added = || -> io::Result<()> {
            fs::create_dir_all(target.parent().unwrap_or(self.folder.path()))?;
            let _linking = self.cache.linking.lock();
            link(&from, &target, blob)
        };
        added().map_err(|error| SourceError::disk(&target, &error))?;
        self.files.insert(path.to_owned(), *blob);
        Ok(())
    }

    /// What stands for the version.
    pub fn digest(&self) -> Digest {
        digest::of_artifact(self.files.iter().map(|(path, blob)| (path.as_str(), &blob.sha256)))
    }
}

fn stored(files: &BTreeMap<String, Blob>) -> BTreeMap<String, Stored> {
    let one = |(path, blob): (&String, &Blob)| {
        (path.clone(), Stored { sha256: digest::encode(&blob.sha256), size: blob.size })
    };
    files.iter().map(one).collect()
}

/// A second name for a content; a copy where the file system gives no more of those.
fn link(from: &Path, to: &Path, blob: &Blob) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(error)
            if matches!(
                Errno::from_io_error(&error),
                Some(Errno::MLINK | Errno::PERM | Errno::OPNOTSUPP | Errno::XDEV)
            ) =>
        {
            fs::copy(from, to)?;
            // The mode of a copy forbids to open it for writing; its time may be set all the same.
            File::open(to)?.set_modified(time_of(&blob.sha256))
        }
        result => result,
    }
}

/// Puts the folder `from` where `to` is, and what was there where `from` was.
fn place(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE) {
        // Nothing is there to be exchanged.
        Err(Errno::NOENT) => fs::rename(from, to),
        // The file system cannot exchange. For a moment there is nothing; who looks then waits before it believes so.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            let away = from.with_extension("before");
            fs::rename(to, &away).or_else(absent)?;
            fs::rename(from, to)?;
            fs::rename(&away, from).or_else(absent)
        }
        result => result.map_err(Into::into),
    }
}

fn sync_folders(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_folders(&entry.path())?;
        }
    }
    File::open(folder)?.sync_all()
}

fn folders(root: &Path) -> Result<Vec<(String, PathBuf)>, SourceError> {
    let listed = || -> io::Result<Vec<(String, PathBuf)>> {
        let mut folders = Vec::new();
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.extend(entry.file_name().into_string().ok().map(|name| (name, entry.path())));
            }
        }
        Ok(folders)
    };
    listed().map_err(|error| SourceError::disk(root, &error))
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::warn!(file = %path.display(), %error, "is made anew"))
        .ok()
}

fn remove(path: &Path) -> Result<(), SourceError> {
    fs::remove_file(path).or_else(absent).map_err(|error| SourceError::disk(path, &error))
}

/// Removes the file `name` below `folder`, which may be none by now, and the folders that nothing is left in.
fn remove_below(folder: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(folder.join(name)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory) => {
            return Ok(());
        }
        result => result.or_else(absent)?,
    }
    for (end, _) in name.rmatch_indices('/') {
        // What still holds something stays.
        if fs::remove_dir(folder.join(&name[..end])).is_err() {
            break;
        }
    }
    Ok(())
}

fn absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
