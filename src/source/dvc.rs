//! What a pointer file of DVC stands for: a file or a folder, in the checkout's cache or in its remote, which is a folder
//! or an object store.
//!
//! The checkout is somebody else's to bring up to date (`git pull`); a pointer that changes is a new version, named by the
//! beginning of its MD5. Contents are verified by their MD5, except those that DVC before 3.0 has added: it has hashed
//! texts otherwise.

mod lineage;
mod pointer;
mod settings;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tokio_stream::StreamExt;

use self::{lineage::Head, pointer::Pointer, settings::Settings};
use super::{
    ByteStream, Digest, Lineage, Look, Names, RemoteFile, RemoteModel, RemoteVersion, Source, SourceError, SourceUri,
    arrange::arrange, digest::Hasher, disk, object::Bucket,
};
use crate::id::{ModelName, Version};

/// Hexadecimal digits of an MD5 that name a version.
const VERSION_DIGITS: usize = 12;
/// Bytes of a pointer, or of a checkout's settings.
const MAX_TEXT: u64 = 1 << 20;
/// Bytes of a folder's list.
const MAX_LIST: u64 = 16 << 20;
/// Files of a folder; more are refused as soon as they are listed.
const MAX_FILES: usize = 10_000;
/// What locations begin with that are on this machine, or in the remote.
const HERE: &str = "here:";
const THERE: &str = "there:";

/// One pointer file in a checkout.
pub struct Tracked {
    uri: SourceUri,
    checkout: PathBuf,
    /// Below the checkout.
    file: PathBuf,
    model: ModelName,
    /// The remote that the last version's files are in.
    bucket: Mutex<Option<Arc<Bucket>>>,
}

/// Where contents are looked for, the nearest first.
struct Stores {
    folders: Vec<PathBuf>,
    bucket: Option<Arc<Bucket>>,
}

/// A file in a folder's list.
#[derive(Deserialize)]
struct Listed {
    md5: String,
    relpath: String,
}

impl Tracked {
    /// # Errors
    /// `Uri` when it names no file in a checkout.
    pub fn open(uri: &SourceUri) -> Result<Self, SourceError> {
        let wrong = |reason: &str| SourceError::Uri(format!("source '{uri}': {reason}"));
        let (checkout, file) = uri.checkout().ok_or_else(|| wrong("expected dvc://path/to/checkout#file.dvc"))?;
        let plain = |text: &str| percent_decode_str(text).decode_utf8().map(|text| PathBuf::from(text.as_ref()));
        let (checkout, file) = (plain(checkout), plain(file));
        let (Ok(checkout), Ok(file)) = (checkout, file) else { return Err(wrong("expected paths in UTF-8")) };
        let name = file.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".dvc"));
        let name = name.filter(|_| file.components().all(|part| matches!(part, Component::Normal(_))));
        let name = name.ok_or_else(|| wrong("expected a file in the checkout whose name ends in .dvc"))?;
        let name = name.strip_suffix(".onnx").or_else(|| name.strip_suffix(".safetensors")).unwrap_or(name);
        let model = ModelName::parse(name).map_err(|error| wrong(&error.message))?;
        Ok(Self { uri: uri.clone(), checkout, file, model, bucket: Mutex::default() })
    }

    /// The pointer's text.
    async fn pointer_text(&self) -> Result<String, SourceError> {
        let text = self.text(&self.checkout.join(&self.file)).await?;
        text.ok_or_else(|| SourceError::NotFound {
            place: self.checkout.display().to_string(),
            what: format!("'{}'", self.file.display()),
        })
    }

    /// What the checkout is at, when it is git's.
    async fn head(&self) -> Result<Head, SourceError> {
        let checkout = self.checkout.clone();
        disk::off_thread(&self.checkout, move || Ok(lineage::head(&checkout))).await
    }

    /// What the pointer says now.
    async fn pointer(&self) -> Result<Pointer, SourceError> {
        self.read_pointer(&self.pointer_text().await?)
    }

    fn read_pointer(&self, text: &str) -> Result<Pointer, SourceError> {
        Pointer::read(text).map_err(|reason| self.senseless(format!("{}: {reason}", self.file.display())))
    }

    /// Where the pointer's contents may be.
    async fn stores(&self, pointer: &Pointer) -> Result<Stores, SourceError> {
        // Settings may be mended, so nothing of them is refused for good.
        let wrong = |reason: String| self.senseless(reason);
        let open = |uri: String| {
            let opened = SourceUri::parse(&uri).and_then(|uri| Bucket::open(&uri));
            opened.map(Arc::new).map_err(|error| wrong(error.to_string()))
        };
        let folder = self.checkout.join(".dvc");
        let mut settings = Settings::default();
        for name in ["config", "config.local"] {
            settings.add(&self.text(&folder.join(name)).await?.unwrap_or_default());
        }
        let cache = settings.get("cache", "dir").map_or_else(|| folder.join("cache"), |path| folder.join(path));
        let mut stores = Stores { folders: vec![cache], bucket: None };
        let Some(remote) = pointer.remote.as_deref().or_else(|| settings.get("core", "remote")) else {
            return Ok(stores);
        };
        let url = settings.get(&format!("remote \"{remote}\""), "url");
        let url = url.ok_or_else(|| wrong(format!("the checkout's remote '{remote}' has no url in .dvc/config")))?;
        match url.split_once("://") {
            None => stores.folders.push(folder.join(url)),
            Some((scheme @ ("s3" | "gs" | "http" | "https"), rest)) => {
                stores.bucket = Some(open(format!("{scheme}://{rest}"))?);
            }
            Some(("azure", rest)) => {
                stores.bucket = Some(open(format!("az://{rest}"))?);
            }
            Some((scheme, _)) => {
                return Err(wrong(format!(
                    "the checkout's remote '{remote}' is at {scheme}://; expected a path, s3://, gs://, azure://, \
                     http:// or https://"
                )));
            }
        }
        Ok(stores)
    }

    /// Where the content of an MD5 is.
    async fn find(&self, stores: &Stores, pointer: &Pointer, md5: &str) -> Result<RemoteFile, SourceError> {
        let (digest, is_list) = match md5.strip_suffix(".dir") {
            Some(digest) => (digest, true),
            None => (md5, false),
        };
        let digest = Digest::from_hex("md5", digest)
            .ok_or_else(|| self.senseless(format!("'{}' is no MD5", crate::error::shorten(md5))))?;
        let hex = digest.hex();
        let path = format!("{}/{}{}", &hex[..2], &hex[2..], if is_list { ".dir" } else { "" });
        let path = if pointer.is_verifiable { format!("files/md5/{path}") } else { path };
        // The list of a folder is written by DVC itself, byte by byte.
        let digest = (pointer.is_verifiable || is_list).then_some(digest);
        for folder in &stores.folders {
            let path = folder.join(&path);
            let wanted = path.clone();
            let looking = move || match wanted.metadata() {
                Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(SourceError::disk(&wanted, &error)),
            };
            if let Some(size) = disk::off_thread(&path, looking).await? {
                let location = format!("{HERE}{}", path.display());
                let (pin, likeness) = (None, None);
                return Ok(RemoteFile { path: md5.to_owned(), size, digest, location, pin, likeness });
            }
        }
        let Some(bucket) = &stores.bucket else {
            let place = stores.folders.last().map_or_else(String::new, |folder| folder.display().to_string());
            return Err(SourceError::NotFound { place, what: format!("'{path}'") });
        };
        let found = bucket.find(&path).await?;
        Ok(RemoteFile { path: md5.to_owned(), digest, location: format!("{THERE}{}", found.location), ..found })
    }

    /// The files of a folder.
    async fn list(&self, stores: &Stores, pointer: &Pointer) -> Result<Vec<RemoteFile>, SourceError> {
        let file = self.find(stores, pointer, &pointer.md5).await?;
        if file.size > MAX_LIST {
            return Err(
                self.senseless(format!("the folder's list has {} bytes; at most {MAX_LIST} are read", file.size))
            );
        }
        let mut json = Vec::new();
        let mut hasher = Hasher::new(file.digest, file.size);
        let mut pieces = self.read_from(stores.bucket.as_ref(), &file, 0..file.size).await?;
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            if (json.len() + piece.len()) as u64 > file.size {
                let reason = format!("more bytes come than the {} that were announced", file.size);
                return Err(SourceError::Corrupt { file: pointer.path.clone(), reason });
            }
            hasher.update(&piece);
            json.extend_from_slice(&piece);
        }
        hasher.finish(&pointer.path)?;
        let listed: Vec<Listed> = serde_json::from_slice(&json)
            .map_err(|error| self.senseless(format!("the list of the folder '{}': {error}", pointer.path)))?;
        if listed.len() > MAX_FILES {
            return Err(self.senseless(format!("the folder has {} files; at most {MAX_FILES} are taken", listed.len())));
        }
        let mut files = Vec::new();
        for one in listed {
            files.push(RemoteFile { path: one.relpath, ..self.find(stores, pointer, &one.md5).await? });
        }
        Ok(files)
    }

    async fn read_from(
        &self,
        bucket: Option<&Arc<Bucket>>,
        file: &RemoteFile,
        range: Range<u64>,
    ) -> Result<ByteStream, SourceError> {
        if let Some(path) = file.location.strip_prefix(HERE) {
            return disk::read(Path::new(path), range).await;
        }
        let location = file.location.strip_prefix(THERE).unwrap_or_default().to_owned();
        let bucket = bucket.ok_or_else(|| SourceError::Changed { what: file.path.clone() })?;
        bucket.read(&RemoteFile { location, ..file.clone() }, range).await
    }

    /// A small file of the checkout; `None` when there is none.
    async fn text(&self, path: &Path) -> Result<Option<String>, SourceError> {
        let wanted = path.to_path_buf();
        let reading = move || {
            let disk = |error: io::Error| SourceError::disk(&wanted, &error);
            let file = match File::open(&wanted) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file.map_err(disk)?,
            };
            let mut text = String::new();
            file.take(MAX_TEXT + 1).read_to_string(&mut text).map_err(disk)?;
            Ok(Some(text))
        };
        let text = disk::off_thread(path, reading).await?;
        if text.as_ref().is_some_and(|text| text.len() as u64 > MAX_TEXT) {
            return Err(self.senseless(format!("{} has over {MAX_TEXT} bytes", path.display())));
        }
        Ok(text)
    }

    fn senseless(&self, reason: String) -> SourceError {
        SourceError::Senseless { place: self.uri.to_string(), reason: crate::error::abridge(&reason) }
    }
}

#[async_trait]
impl Source for Tracked {
    fn uri(&self) -> &SourceUri {
        &self.uri
    }

    async fn look(&self) -> Result<Look, SourceError> {
        let pointer = self.pointer().await?;
        let version = pointer.md5.get(..VERSION_DIGITS).and_then(|name| Version::parse(name).ok());
        let version = version.ok_or_else(|| self.senseless("its MD5 is none".to_owned()))?;
        let model = RemoteModel {
            versions: vec![RemoteVersion { version: version.clone(), revision: pointer.md5 }],
            default: Some(version),
            beside: Vec::new(),
        };
        Ok(Look { models: BTreeMap::from([(self.model.clone(), model)]) })
    }

    async fn artifact(&self, model: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        let pointer = self.pointer().await?;
        check(&pointer, model, version)?;
        let stores = self.stores(&pointer).await?;
        let files = if pointer.md5.ends_with(".dir") {
            self.list(&stores, &pointer).await?
        } else {
            let name = pointer.path.rsplit('/').next().unwrap_or_default().to_owned();
            vec![RemoteFile { path: name, ..self.find(&stores, &pointer, &pointer.md5).await? }]
        };
        *self.bucket.lock() = stores.bucket;
        arrange(files).map_err(|reason| SourceError::Refused { file: self.uri.to_string(), reason })
    }

    async fn lineage(&self, model: &ModelName, version: &RemoteVersion) -> Result<Option<Lineage>, SourceError> {
        let text = self.pointer_text().await?;
        check(&self.read_pointer(&text)?, model, version)?;
        Ok(Some(lineage::lineage(&text, self.head().await?)))
    }

    async fn names(&self, _: &ModelName, shown: &RemoteModel) -> Result<Option<Names>, SourceError> {
        let branch = self.head().await?.branch.filter(|branch| !branch.is_empty());
        // A checkout that is on no branch any more is called nothing.
        Ok(Some(branch.map_or_else(Names::default, |branch| Names::of_pointer(&branch, shown))))
    }

    async fn read(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let bucket = self.bucket.lock().clone();
        self.read_from(bucket.as_ref(), file, range).await
    }
}

/// Whether the pointer still stands for the version.
fn check(pointer: &Pointer, model: &ModelName, version: &RemoteVersion) -> Result<(), SourceError> {
    if pointer.md5 == version.revision {
        return Ok(());
    }
    Err(SourceError::Changed { what: format!("version {} of model '{model}'", version.version) })
}

#[cfg(test)]
mod tests;
