//! Artifacts and images of a registry: a model packed as ModelPack says, files pushed with ORAS, or an image with the model
//! in its folder `/models`.
//!
//! A tag is looked at again and again, and a tag that moves is a new version, named by the beginning of the digest that it
//! points at. Everything below that digest is verified. What is packed is downloaded and unpacked when a version's files
//! are listed, since nothing else tells their names; it lies in the cache's scratch folder until the
//! version is published, or for an hour, so that a try that failed for want of room need not download it again.

mod challenge;
mod lineage;
mod manifest;
mod registry;
mod tar;
mod unpack;

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    ops::Range,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout},
};
use tokio_stream::StreamExt;

use self::{
    manifest::{Contents, Descriptor, IMAGE_FOLDER, Manifest, Packing},
    registry::Registry,
    unpack::{Budget, Entry},
};
use super::{
    ByteStream, Digest, Lineage, Look, Names, Progress, RemoteFile, RemoteModel, RemoteVersion, Scheme, Scratch,
    Source, SourceError, SourceUri,
    arrange::arrange,
    cache::{LEAST, Pace},
    digest::Hasher,
    disk,
};
use crate::id::{ModelName, Version};

/// Hexadecimal digits of a digest that name a version: none of a repository's will have the same.
const VERSION_DIGITS: usize = 12;
const DEFAULT_TAG: &str = "latest";
const MAX_TAG: usize = 128;
/// Bytes of an artifact's settings.
const MAX_CONFIG: u64 = 1 << 20;
/// Tries in a row that bring no byte of an archive.
const TRIES: u32 = 3;
/// Tries for one archive, however much each of them brings.
const MOST_TRIES: u32 = 64;
const PAUSE: Duration = Duration::from_millis(250);
/// How long no byte may come.
const SILENCE: Duration = Duration::from_secs(30);
/// How long what was unpacked waits for another try.
const KEPT: Duration = Duration::from_secs(3600);
/// What locations begin with that are in the spool.
const UNPACKED: &str = "unpacked/";

/// What a tag or digest of a repository stands for.
pub struct Artifact {
    uri: SourceUri,
    registry: Registry,
    /// A tag, or a digest with a colon in it.
    reference: String,
    model: ModelName,
    scratch: Scratch,
    /// What was unpacked of the version that is being fetched.
    spool: Mutex<Option<Spool>>,
    /// Of the archives of that version.
    progress: Mutex<Arc<Progress>>,
}

/// What was unpacked of a version.
struct Spool {
    revision: String,
    files: Vec<RemoteFile>,
    folder: Arc<TempDir>,
    since: Instant,
}

/// How a read of an archive ended that did not fail.
enum Reading {
    Over,
    /// The connection is wanted for another place.
    GivenUp,
    /// So little came that the connection is not worth keeping.
    TooSlow,
}

impl Artifact {
    /// # Errors
    /// `Uri` when it names no repository, tag or digest.
    pub fn open(uri: &SourceUri, scratch: Scratch) -> Result<Self, SourceError> {
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
        let settings = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or(home);
        Self::with_settings(uri, scratch, settings.map(|folder| folder.join("config.json")))
    }

    fn with_settings(uri: &SourceUri, scratch: Scratch, settings: Option<PathBuf>) -> Result<Self, SourceError> {
        let (name, reference) = reference(uri.path()).map_err(|reason| {
            SourceError::Uri(format!("source '{uri}': {reason}; expected oci://registry/repository:tag or @sha256:…"))
        })?;
        let single = name.rsplit('/').next().unwrap_or(name);
        let model = ModelName::parse(single).map_err(|error| SourceError::Uri(format!("source '{uri}': {error}")))?;
        let plain = uri.scheme() == Scheme::OciHttp || is_this_machine(uri.authority());
        let registry = Registry::open(uri, name, plain, settings)?;
        Ok(Self {
            uri: uri.clone(),
            registry,
            reference,
            model,
            scratch,
            spool: Mutex::default(),
            progress: Mutex::default(),
        })
    }

    /// The manifest of an artifact, also when `digest` is that of an index.
    async fn manifest(&self, digest: &str) -> Result<Manifest, SourceError> {
        let refused = |reason| self.refused(reason);
        let index = Manifest::read(&self.registry.manifest(digest).await?).map_err(refused)?;
        let Some(chosen) = index.choose().map_err(refused)? else { return Ok(index) };
        // Were it a tag, nothing would hold what it leads to.
        let digest = self.sha256(chosen)?.to_string();
        let manifest = Manifest::read(&self.registry.manifest(&digest).await?).map_err(refused)?;
        match manifest.choose() {
            Ok(None) => Ok(manifest.chosen_from(&index, chosen)),
            _ => Err(self.refused("its index leads to another index".to_owned())),
        }
    }

    /// An artifact's settings; null when it has none that can be read.
    async fn config(&self, manifest: &Manifest) -> Result<serde_json::Value, SourceError> {
        let Some(config) = manifest.config().filter(|config| (3..=MAX_CONFIG).contains(&config.size)) else {
            return Ok(serde_json::Value::Null);
        };
        let mut hasher = Hasher::new(Some(self.sha256(config)?), config.size);
        let reading = async {
            let mut json = Vec::new();
            let mut pieces = self.registry.blob(&config.digest, 0..config.size).await?;
            while let Some(piece) = pieces.next().await {
                let piece = piece?;
                hasher.update(&piece);
                json.extend_from_slice(&piece);
                if json.len() as u64 > config.size {
                    break;
                }
            }
            hasher.finish(&config.digest).map(|_| json)
        };
        let silent = |_| SourceError::Unavailable {
            place: self.uri.to_string(),
            reason: format!("its settings did not come in {SILENCE:?}"),
        };
        let json = timeout(SILENCE, reading).await.map_err(silent)??;
        Ok(serde_json::from_slice(&json).unwrap_or_default())
    }

    /// The tag that is followed; `None` when it is a digest.
    fn tag(&self) -> Option<&str> {
        Some(self.reference.as_str()).filter(|reference| !reference.contains(':'))
    }

    /// The files of an image's folder.
    async fn image(&self, layers: &[Descriptor], spool: &Arc<TempDir>) -> Result<Vec<RemoteFile>, SourceError> {
        let mut left = Budget::of(self.scratch.max_bytes);
        let mut entries = BTreeMap::new();
        for (number, layer) in layers.iter().enumerate() {
            let above = self.unpack(layer, number, Some(IMAGE_FOLDER), spool, &mut left).await?;
            entries = spawn_blocking(move || above.over(entries)).await.map_err(unfinished)?;
        }
        if entries.is_empty() {
            return Err(self.refused(format!("the image has nothing in /{IMAGE_FOLDER}, where its model is expected")));
        }
        entries.into_iter().map(|(path, entry)| unpacked(manifest::in_image(&path).unwrap_or(&path), entry)).collect()
    }

    /// The files of an artifact.
    async fn files(
        &self,
        layers: Vec<(Packing, &Descriptor)>,
        spool: &Arc<TempDir>,
    ) -> Result<Vec<RemoteFile>, SourceError> {
        let mut left = Budget::of(self.scratch.max_bytes);
        let mut files = Vec::new();
        for (number, (packing, layer)) in layers.into_iter().enumerate() {
            match packing {
                Packing::Raw(path) => files.push(RemoteFile {
                    path,
                    size: layer.size,
                    digest: Some(self.sha256(layer)?),
                    location: layer.digest.clone(),
                    pin: None,
                    likeness: None,
                }),
                Packing::Archive(folder) => {
                    let members = self.unpack(layer, number, None, spool, &mut left).await?.members;
                    // Some programs pack a folder under its whole path, others under its name alone.
                    let is_whole = |folder: &String| members.keys().any(|path| unpack::is_below(path, folder));
                    let above = folder.filter(|folder| !is_whole(folder));
                    let above = above.as_deref().and_then(|folder| folder.rsplit_once('/')).map(|(above, _)| above);
                    for (path, entry) in members {
                        let path = above.map_or(path.clone(), |above| format!("{above}/{path}"));
                        files.push(unpacked(&path, entry)?);
                    }
                }
            }
        }
        Ok(files)
    }

    /// Downloads an archive, verifies and unpacks it.
    async fn unpack(
        &self,
        layer: &Descriptor,
        number: usize,
        keep: Option<&'static str>,
        spool: &Arc<TempDir>,
        left: &mut Budget,
    ) -> Result<unpack::Layer, SourceError> {
        let path = spool.path().join(layer.digest.replace(':', "-"));
        if layer.size > left.bytes {
            return Err(
                self.refused(format!("layer {} is larger than the cache may be (cache.max_bytes)", layer.digest))
            );
        }
        self.progress.lock().total.fetch_add(layer.size, Ordering::Relaxed);
        self.download(layer, &path).await?;
        tracing::debug!(source = %self.uri, layer = layer.digest, bytes = layer.size, "downloaded to be unpacked");
        let (spool, mut budget) = (spool.clone(), *left);
        // What is packed lies there as long as what comes out of it.
        budget.bytes -= layer.size;
        let packed = layer.size;
        let unpacking = spawn_blocking(move || {
            let into = spool.path().join(number.to_string());
            std::fs::create_dir(&into).map_err(|error| SourceError::disk(&into, &error))?;
            let unpacked = unpack::unpack(&path, &into, keep, &mut budget)?;
            std::fs::remove_file(&path).map_err(|error| SourceError::disk(&path, &error))?;
            budget.bytes += packed;
            Ok::<_, SourceError>((unpacked, budget))
        });
        let (unpacked, budget) = unpacking.await.map_err(unfinished)??;
        *left = budget;
        Ok(unpacked)
    }

    /// Writes a content into a new file, going on where a connection broke.
    async fn download(&self, layer: &Descriptor, path: &PathBuf) -> Result<(), SourceError> {
        let disk = |error: std::io::Error| SourceError::disk(path, &error);
        let corrupt = |reason: String| SourceError::Corrupt { file: layer.digest.clone(), reason };
        let mut hasher = Hasher::new(Some(self.sha256(layer)?), layer.size);
        let mut file = File::create(path).map_err(disk)?;
        let progress = self.progress.lock().clone();
        let place = self.uri.to_string();
        let unavailable = |reason: String| SourceError::Unavailable { place: place.clone(), reason };
        let (mut position, mut failed, mut tries) = (0, 0, 0);
        while position < layer.size {
            // A registry that knows no ranges would send everything again.
            let seeks = self.registry.seeks();
            let mut permit = self.scratch.connections.acquire(&place).await;
            let before = position;
            let reading = async {
                let mut stream = self.registry.blob(&layer.digest, position..layer.size).await?;
                let silent = || unavailable(format!("no byte of '{}' came in {SILENCE:?}", layer.digest));
                let mut pace = Pace::new(SILENCE);
                loop {
                    let piece = tokio::select! {
                        piece = timeout(SILENCE, stream.next()) => piece.map_err(|_| silent())?,
                        () = permit.wanted_elsewhere(), if seeks => return Ok(Reading::GivenUp),
                    };
                    let Some(piece) = piece else { return Ok(Reading::Over) };
                    let piece = piece?;
                    if piece.len() as u64 > layer.size - position {
                        return Err(corrupt(format!("more bytes come than the {} that were announced", layer.size)));
                    }
                    hasher.update(&piece);
                    file.write_all(&piece).map_err(disk)?;
                    position += piece.len() as u64;
                    progress.fetched.fetch_add(piece.len() as u64, Ordering::Relaxed);
                    if pace.is_too_slow(piece.len() as u64) && position < layer.size {
                        return Ok(Reading::TooSlow);
                    }
                }
            };
            let result: Result<Reading, SourceError> = reading.await;
            drop(permit);
            let (result, has_come) = match result {
                Ok(Reading::GivenUp) => continue,
                Ok(Reading::TooSlow) => {
                    let reason = format!("less than {LEAST} bytes of '{}' came in {SILENCE:?}", layer.digest);
                    (Err(unavailable(reason)), false)
                }
                Ok(Reading::Over) => (Ok(()), position > before),
                Err(error) => (Err(error), position > before),
            };
            tries += 1;
            failed = if has_come { 1 } else { failed + 1 };
            match result {
                Err(error) if !matches!(error, SourceError::Unavailable { .. }) => return Err(error),
                Err(error) if failed >= TRIES || tries >= MOST_TRIES => return Err(error),
                Ok(()) if position < layer.size && (failed >= TRIES || tries >= MOST_TRIES) => {
                    return Err(corrupt(format!("it ends after {position} of {} bytes", layer.size)));
                }
                _ if position < layer.size => tokio::time::sleep(PAUSE * (1 << (failed - 1))).await,
                _ => {}
            }
        }
        hasher.finish(&layer.digest).map(|_| ())
    }

    fn sha256(&self, layer: &Descriptor) -> Result<Digest, SourceError> {
        match Digest::parse(&layer.digest) {
            Ok(digest @ Digest::Sha256(_)) => Ok(digest),
            _ => {
                let digest = crate::error::shorten(&layer.digest);
                Err(self.refused(format!("a part of it has the digest '{digest}'; expected sha256:…")))
            }
        }
    }

    /// What is never taken, as long as it has this digest.
    fn refused(&self, reason: String) -> SourceError {
        SourceError::Refused { file: self.uri.to_string(), reason: crate::error::abridge(&reason) }
    }
}

#[async_trait]
impl Source for Artifact {
    fn uri(&self) -> &SourceUri {
        &self.uri
    }

    fn seeks(&self, file: &RemoteFile) -> bool {
        file.location.starts_with(UNPACKED) || self.registry.seeks()
    }

    async fn look(&self) -> Result<Look, SourceError> {
        let digest = self.registry.digest(&self.reference).await?;
        let revision = digest.to_string();
        let is_over = |spool: &mut Spool| spool.revision != revision || spool.since.elapsed() >= KEPT;
        drop(self.spool.lock().take_if(is_over));
        let version = Version::parse(&digest.hex()[..VERSION_DIGITS])
            .map_err(|error| SourceError::Senseless { place: self.uri.to_string(), reason: error.message })?;
        let model = RemoteModel {
            versions: vec![RemoteVersion { version: version.clone(), revision }],
            default: Some(version),
            beside: Vec::new(),
        };
        Ok(Look { models: BTreeMap::from([(self.model.clone(), model)]) })
    }

    async fn artifact(&self, _: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        let spooled = self.spool.lock().take_if(|spool| spool.revision != version.revision);
        drop(spooled);
        if let Some(spool) = &*self.spool.lock() {
            return Ok(spool.files.clone());
        }
        let folder = &self.scratch.folder;
        let spool = Arc::new(TempDir::new_in(folder).map_err(|error| SourceError::disk(folder, &error))?);
        let manifest = self.manifest(&version.revision).await?;
        let files = match manifest.contents().map_err(|reason| self.refused(reason))? {
            Contents::Image(layers) => self.image(layers, &spool).await?,
            Contents::Files(layers) => self.files(layers, &spool).await?,
        };
        let files = arrange(files).map_err(|reason| self.refused(reason))?;
        // Where nothing was unpacked, another list costs as little as this one.
        if files.iter().any(|file| file.location.starts_with(UNPACKED)) {
            let (revision, since) = (version.revision.clone(), Instant::now());
            *self.spool.lock() = Some(Spool { revision, files: files.clone(), folder: spool, since });
        }
        Ok(files)
    }

    fn preparing(&self) -> Option<Arc<Progress>> {
        let progress = Arc::<Progress>::default();
        *self.progress.lock() = progress.clone();
        Some(progress)
    }

    fn done(&self, version: &RemoteVersion) {
        drop(self.spool.lock().take_if(|spool| spool.revision == version.revision));
    }

    async fn lineage(&self, _: &ModelName, version: &RemoteVersion) -> Result<Option<Lineage>, SourceError> {
        let manifest = self.manifest(&version.revision).await?;
        // Without its settings, what is known is how it is annotated.
        let config = self.config(&manifest).await.unwrap_or_else(|error| {
            tracing::warn!(source = %self.uri, %error, "nothing is known of the artifact's settings");
            serde_json::Value::Null
        });
        Ok(Some(lineage::lineage(manifest.annotations(), &config, self.tag())))
    }

    async fn names(&self, _: &ModelName, shown: &RemoteModel) -> Result<Option<Names>, SourceError> {
        Ok(self.tag().map(|tag| Names::of_pointer(tag, shown)))
    }

    async fn read(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let Some(path) = file.location.strip_prefix(UNPACKED) else {
            return self.registry.blob(&file.location, range).await;
        };
        let gone = || SourceError::Changed { what: file.path.clone() };
        let spool = self.spool.lock().as_ref().map(|spool| spool.folder.clone()).ok_or_else(gone)?;
        disk::read(&spool.path().join(path), range).await
    }
}

/// Unpacking panicked, or the server stops.
fn unfinished(error: tokio::task::JoinError) -> SourceError {
    SourceError::Disk { what: "unpacking".to_owned(), reason: error.to_string() }
}

/// A file that was unpacked.
fn unpacked(path: &str, entry: Entry) -> Result<RemoteFile, SourceError> {
    match entry {
        Entry::File(file) => {
            let mut parts = file.path.iter().rev().map(|part| part.to_string_lossy());
            let (name, layer) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            Ok(RemoteFile {
                path: path.to_owned(),
                size: file.size,
                digest: Some(Digest::Sha256(file.sha256)),
                location: format!("{UNPACKED}{layer}/{name}"),
                pin: None,
                likeness: None,
            })
        }
        Entry::Other(kind) => Err(SourceError::Refused {
            file: crate::error::abridge(path),
            reason: format!("in its archive it is {kind}; expected a plain file"),
        }),
    }
}

/// The repository and the tag or digest of a URI's path.
fn reference(path: &str) -> Result<(&str, String), String> {
    let (name, digest) = path.split_once('@').map_or((path, None), |(name, digest)| (name, Some(digest)));
    // Beside a digest a tag says nothing.
    let (name, tag) = name.split_once(':').map_or((name, None), |(name, tag)| (name, Some(tag)));
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_part = |part: &str| {
        part.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'_' | b'-'))
            && part.bytes().next().is_some_and(is_word)
            && part.bytes().last().is_some_and(is_word)
    };
    if name.is_empty() || !name.split('/').all(is_part) {
        return Err("a repository has lower-case letters, digits, and . _ - / between them".to_owned());
    }
    let is_tag = |tag: &str| {
        (1..=MAX_TAG).contains(&tag.len())
            && !tag.starts_with(['.', '-'])
            && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(format!("a tag has at most {MAX_TAG} letters, digits, and . _ - between them"));
    }
    let reference = match digest.map(Digest::parse) {
        None => tag.unwrap_or(DEFAULT_TAG).to_owned(),
        Some(Ok(digest @ Digest::Sha256(_))) => digest.to_string(),
        Some(_) => return Err("a digest is sha256: and 64 hexadecimal digits".to_owned()),
    };
    Ok((name, reference))
}

/// Whether a registry's traffic does not leave this machine, so that it may go without encryption.
fn is_this_machine(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests;
