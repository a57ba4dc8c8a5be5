//! MLflow's model registry: `mlflow://host:5000/iris@champion`, `…/iris/3`, `…/iris/Production`, `…/iris/latest`, and
//! `models:/…` of the server in `MLFLOW_TRACKING_URI`; with credentials from the environment, as its own clients read them.
//!
//! A look is one call, which shows the one version that the URI points at. Files come through the server's proxy, or
//! straight from the object store that they lie in.

use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use reqwest::Url;
use serde::Deserialize;
use tokio_stream::StreamExt;

use super::{
    ByteStream, Lineage, Look, Names, Recorder, RemoteFile, RemoteModel, RemoteVersion, Scheme, Source, SourceError,
    SourceUri, digest, object::Bucket,
};
use crate::{
    error::{abridge, shorten},
    id::{ModelName, Version},
};

mod client;
mod flavor;
mod lineage;
pub mod signature;
mod write;

use client::{Client, Settings, below};
use flavor::{Flavors, MLMODEL};
use lineage::{Called, Named, Registered, Run, lineage};

/// Below a server's root.
const API: &str = "api/2.0/mlflow";
const ARTIFACTS: &str = "api/2.0/mlflow-artifacts/artifacts";
/// The stages that there are.
const STAGES: [&str; 4] = ["None", "Staging", "Production", "Archived"];
/// Files of a version; more than any model has.
const MAX_FILES: usize = 10_000;
/// Folders of a version, each of which takes a call.
const MAX_FOLDERS: usize = 1_000;
const MAX_DEPTH: usize = 8;
/// Bytes of `MLmodel`.
const MAX_MLMODEL: u64 = 1 << 20;
/// How often it is asked what versions are called that nothing points at. A call may take a server seconds.
const NAMES_INTERVAL: Duration = Duration::from_secs(60);
/// Object stores that stay open.
const MAX_STORES: usize = 8;
/// What ends the location of a file that the server cannot begin to send in its middle. It is not sent there.
const WHOLE: &str = "whole";
/// What artifacts' locations hold as it is, and URIs do not.
const RESERVED: &AsciiSet = &CONTROLS.add(b' ').add(b'%').add(b'?').add(b'#');

/// A registered model, and what points at one of its versions.
pub struct Registry {
    uri: SourceUri,
    model: ModelName,
    pointer: Pointer,
    client: Client,
    /// By the location of a version's files.
    stores: Mutex<HashMap<String, Arc<Bucket>>>,
    told: Mutex<Told>,
}

/// What the registry has said of names.
#[derive(Default)]
struct Told {
    /// Of the version that it pointed at last.
    pointed: Option<(String, Named)>,
    /// When it was asked for all names, and what was said of that version then.
    asked: Option<(Instant, Option<(String, Named)>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pointer {
    Alias(String),
    Version(String),
    Stage(&'static str),
    Latest,
}

/// Where files of a version lie.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Below `path` of the proxy that the server at `root` is.
    Proxy {
        root: Url,
        path: String,
    },
    Store(Container),
}

/// An object store. As a text it is the URI, and before it the account, if somebody has named one.
#[derive(Debug, PartialEq, Eq)]
struct Container {
    /// Of Azure, where a container is one of an account.
    account: Option<String>,
    uri: SourceUri,
}

impl Registry {
    /// # Errors
    /// `Uri` when it points at no version of a model that could be served, or the environment's settings do not do.
    pub fn open(uri: &SourceUri) -> Result<Self, SourceError> {
        Self::with(uri, Settings::from_env())
    }

    fn with(uri: &SourceUri, settings: Settings) -> Result<Self, SourceError> {
        let (prefix, model, pointer) = parts(uri)?;
        let client = Client::new(uri, &prefix, settings)?;
        Ok(Self { uri: uri.clone(), model, pointer, client, stores: Mutex::default(), told: Mutex::default() })
    }

    /// The version that the pointer points at.
    async fn pointed(&self) -> Result<ModelVersion, SourceError> {
        let (root, name) = (self.client.root(), self.model.as_str());
        let what = format!("{} of model '{name}'", self.pointer);
        match &self.pointer {
            Pointer::Alias(alias) => {
                let path = format!("{API}/registered-models/alias");
                let found: One<ModelVersion> =
                    self.client.call(root, &path, &[("name", name), ("alias", alias)], &what).await?;
                Ok(found.model_version)
            }
            Pointer::Version(version) => self.version(version).await,
            Pointer::Stage(_) | Pointer::Latest => {
                let path = format!("{API}/registered-models/get-latest-versions");
                let mut query = vec![("name", name)];
                if let Pointer::Stage(stage) = self.pointer {
                    query.push(("stages", stage));
                }
                let found: Several = self.client.call(root, &path, &query, &what).await?;
                // One that could not be registered does not stand in the way of those that are.
                let newest = found.model_versions.into_iter().max_by_key(|one| (one.is_ready(), one.number()));
                newest.ok_or_else(|| SourceError::NotFound { place: self.client.place().to_owned(), what })
            }
        }
    }

    async fn version(&self, version: &str) -> Result<ModelVersion, SourceError> {
        let path = format!("{API}/model-versions/get");
        let what = format!("version {version} of model '{}'", self.model);
        let query = [("name", self.model.as_str()), ("version", version)];
        let found: One<ModelVersion> = self.client.call(self.client.root(), &path, &query, &what).await?;
        Ok(found.model_version)
    }

    /// The version as a look shows it, which one does that is being registered, or could not be, not.
    fn shown(&self, found: &ModelVersion) -> Result<RemoteVersion, SourceError> {
        let version = Version::parse(&found.version).ok().filter(|version| version.number().is_some());
        let version = version.ok_or_else(|| {
            self.client.senseless(format!("version '{}' of model '{}'", shorten(&found.version), self.model))
        })?;
        if let Some(status) = found.status.as_deref().filter(|_| !found.is_ready()) {
            let what = format!("a ready version {version} of model '{}' (it is {})", self.model, shorten(status));
            return Err(SourceError::NotFound { place: self.client.place().to_owned(), what });
        }
        // Neither tags nor stages are in it. A number may be given anew, after a version was deleted.
        let created = found.creation_timestamp.to_string();
        let revision = digest::of_texts(&[&found.version, &found.source, &created]);
        Ok(RemoteVersion { version, revision })
    }

    /// Where the files at `location` lie, as MLflow writes it.
    fn place(&self, location: &str) -> Result<Place, SourceError> {
        let unread = || {
            SourceError::Uri(format!(
                "model '{}' lies at '{}', which is read through MLflow only: start its server with --serve-artifacts, \
                 and log the model anew; else s3:, gs:, wasbs:, abfss: and http: are read",
                self.model,
                abridge(&without_login(location))
            ))
        };
        let (scheme, rest) = location.split_once(':').ok_or_else(unread)?;
        let scheme = scheme.to_ascii_lowercase();
        let (authority, path) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_once('/').unwrap_or((rest, "")),
            None => ("", rest),
        };
        let path = path.trim_matches('/');
        let store = |scheme: &str, bucket: &str, account: Option<&str>| {
            let path = utf8_percent_encode(path, RESERVED);
            let uri = SourceUri::parse(&format!("{scheme}://{bucket}/{path}"))?;
            Ok(Place::Store(Container { account: account.map(ToOwned::to_owned), uri }))
        };
        match scheme.as_str() {
            "mlflow-artifacts" => {
                let mut root = self.client.root().clone();
                if !authority.is_empty() {
                    let other = format!("{}://{authority}{}", root.scheme(), root.path());
                    root = Url::parse(&other).map_err(|_| unread())?;
                    // Neither may fail: the URL has a host.
                    let _ = (root.set_username(""), root.set_password(None));
                }
                Ok(Place::Proxy { root, path: path.to_owned() })
            }
            "http" | "https" => match path.split_once(ARTIFACTS) {
                Some((prefix, path)) => {
                    let root = Url::parse(&format!("{scheme}://{authority}/{prefix}")).map_err(|_| unread())?;
                    Ok(Place::Proxy { root, path: path.trim_matches('/').to_owned() })
                }
                None => store(&scheme, authority, None),
            },
            "s3" | "gs" => store(&scheme, authority, None),
            // Credentials are taken from the environment, as for az://.
            "wasb" | "wasbs" | "abfs" | "abfss" => {
                let (container, host) = authority.split_once('@').ok_or_else(unread)?;
                let account = host.split('.').next().filter(|account| is_account(account)).ok_or_else(unread)?;
                store("az", container, Some(account))
            }
            _ => Err(unread()),
        }
    }

    /// What lies in `folder` of the proxy, and its folders, whose names come second.
    async fn listed(
        &self,
        root: &Url,
        path: &str,
        folder: &str,
    ) -> Result<(Vec<RemoteFile>, Vec<String>), SourceError> {
        let inside =
            |name: &str, folder: &str| if folder.is_empty() { name.into() } else { format!("{folder}/{name}") };
        let whole = inside(folder, path).trim_end_matches('/').to_owned();
        let what = format!("folder '{}' of model '{}'", abridge(folder), self.model);
        let found: Listed = self.client.call(root, ARTIFACTS, &[("path", &whole)], &what).await?;
        let (mut files, mut folders) = (Vec::new(), Vec::new());
        for entry in found.files {
            let name = entry.path.as_str();
            if matches!(name, "" | "." | "..") || name.contains('/') {
                return Err(self.client.senseless(format!("'{}' as a name in a folder", shorten(name))));
            }
            let path = inside(name, folder);
            if entry.is_dir {
                folders.push(path);
                continue;
            }
            let size = entry
                .file_size
                .number()
                .ok_or_else(|| self.client.senseless(format!("file '{}' has no size", abridge(&path))))?;
            let location = below(root, ARTIFACTS.split('/').chain(whole.split('/')).chain([name])).to_string();
            files.push(RemoteFile { path, size, digest: None, location, pin: None, likeness: None });
        }
        Ok((files, folders))
    }

    /// The files of a version behind a proxy.
    async fn proxied(&self, root: &Url, path: &str) -> Result<(Flavors, Vec<RemoteFile>), SourceError> {
        let too_much = |what: String| self.client.senseless(format!("model '{}' has {what}", self.model));
        let (mut files, mut folders) = self.listed(root, path, "").await?;
        // First, for a model that cannot be served need not be listed.
        let (flavors, is_range) = self.flavors(&files).await?;
        let mut calls = 1;
        while let Some(folder) = folders.pop() {
            calls += 1;
            if folder.split('/').count() > MAX_DEPTH {
                return Err(too_much(format!("folders in more than {MAX_DEPTH} folders")));
            }
            let (inside, deeper) = self.listed(root, path, &folder).await?;
            files.extend(inside);
            folders.extend(deeper);
            if files.len() > MAX_FILES || calls + folders.len() > MAX_FOLDERS {
                return Err(too_much(format!("more than {MAX_FILES} files or {MAX_FOLDERS} folders")));
            }
        }
        if !is_range {
            files.iter_mut().for_each(|file| file.location = format!("{}#{WHOLE}", file.location));
        }
        Ok((flavors, files))
    }

    /// The files of a version in an object store.
    async fn stored(&self, container: &Container) -> Result<(Flavors, Vec<RemoteFile>), SourceError> {
        let mut files = self.store(&container.to_string())?.files().await?;
        files.iter_mut().for_each(|file| file.location = format!("{container}#{}", file.location));
        let (flavors, _) = self.flavors(&files).await?;
        Ok((flavors, files))
    }

    /// What `MLmodel` says, and whether its bytes came as the range that was asked for.
    async fn flavors(&self, files: &[RemoteFile]) -> Result<(Flavors, bool), SourceError> {
        let refused = |reason: String| SourceError::Refused { file: MLMODEL.to_owned(), reason };
        if files.is_empty() {
            // A volume that is not there yet is an empty folder to the server.
            let (place, what) = (self.client.place().to_owned(), format!("any file of model '{}'", self.model));
            return Err(SourceError::NotFound { place, what });
        }
        let file = files.iter().find(|file| file.path == MLMODEL);
        let file =
            file.ok_or_else(|| refused("there is none, so nothing says what the model's files are".to_owned()))?;
        if !(1..=MAX_MLMODEL).contains(&file.size) {
            return Err(refused(format!("it has {} bytes; expected 1 to {MAX_MLMODEL}", file.size)));
        }
        let reading = async {
            let (mut bytes, is_range) = self.bytes(file, 0..file.size).await?;
            let mut text = Vec::new();
            while let Some(piece) = bytes.next().await {
                text.extend_from_slice(&piece?);
                if text.len() as u64 > file.size {
                    return Err(SourceError::Changed { what: format!("file '{MLMODEL}'") });
                }
            }
            Ok((text, is_range))
        };
        let (text, is_range) = self.client.in_time(reading).await?;
        if (text.len() as u64) < file.size {
            let reason = format!("it ends after {} of {} bytes", text.len(), file.size);
            return Err(SourceError::Corrupt { file: MLMODEL.to_owned(), reason });
        }
        let text = String::from_utf8(text).map_err(|error| refused(error.to_string()))?;
        let flavors = Flavors::parse(&text).map_err(|error| refused(abridge(&error)))?;
        flavors.check()?;
        Ok((flavors, is_range))
    }

    /// The store of files in `container`, in its form as a text.
    fn store(&self, container: &str) -> Result<Arc<Bucket>, SourceError> {
        let mut stores = self.stores.lock();
        if let Some(store) = stores.get(container) {
            return Ok(store.clone());
        }
        let (account, uri) = container.split_once(' ').map_or((None, container), |(account, uri)| (Some(account), uri));
        let store = Arc::new(Bucket::of_account(&SourceUri::parse(uri)?, account)?);
        if stores.len() >= MAX_STORES {
            stores.clear();
        }
        stores.insert(container.to_owned(), store.clone());
        Ok(store)
    }

    /// The bytes `range` of a file, and whether they were the only ones to come.
    async fn bytes(&self, file: &RemoteFile, range: Range<u64>) -> Result<(ByteStream, bool), SourceError> {
        match file.location.split_once('#') {
            Some((container, location)) if location != WHOLE => {
                let file = RemoteFile { location: location.to_owned(), ..file.clone() };
                Ok((self.store(container)?.read(&file, range).await?, true))
            }
            _ => {
                let wrong = |error| SourceError::Refused { file: file.path.clone(), reason: format!("{error}") };
                let url: Url = file.location.parse().map_err(wrong)?;
                let opened = self.client.open(url, range, file.size, &file.path).await?;
                Ok((opened.bytes, opened.is_range))
            }
        }
    }
}

#[async_trait]
impl Source for Registry {
    fn uri(&self) -> &SourceUri {
        &self.uri
    }

    /// A server whose artifacts lie in an object store fetches a file whole, to answer for any part of it.
    fn seeks(&self, file: &RemoteFile) -> bool {
        file.location.split_once('#').is_none_or(|(_, end)| end != WHOLE)
    }

    async fn look(&self) -> Result<Look, SourceError> {
        let pointed = self.pointed().await?;
        let version = self.shown(&pointed)?;
        self.told.lock().pointed = Some((pointed.version, pointed.named));
        let default = Some(version.version.clone());
        let model = RemoteModel { versions: vec![version], default, beside: Vec::new() };
        Ok(Look { models: [(self.model.clone(), model)].into() })
    }

    async fn artifact(&self, model: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        let what = format!("version {} of model '{model}'", version.version);
        if self.shown(&self.version(version.version.as_str()).await?)? != *version {
            return Err(SourceError::Changed { what });
        }
        let query = [("name", self.model.as_str()), ("version", version.version.as_str())];
        let path = format!("{API}/model-versions/get-download-uri");
        let found: Located = self.client.call(self.client.root(), &path, &query, &what).await?;
        let (flavors, mut files) = match self.place(&found.artifact_uri)? {
            Place::Proxy { root, path } => self.proxied(&root, &path).await?,
            Place::Store(container) => self.stored(&container).await?,
        };
        // Nothing tells a file from an earlier one at its place but that it is of this version. What a server says of it
        // (its ETag) is another thing for each answer where the files are in an object store.
        for file in &mut files {
            file.pin.get_or_insert_with(|| version.revision.clone());
        }
        flavors.select(files)
    }

    /// Without its run, which may be deleted or not ours to see, what is known is what the registry says.
    async fn lineage(&self, _: &ModelName, version: &RemoteVersion) -> Result<Option<Lineage>, SourceError> {
        let (root, version) = (self.client.root(), version.version.as_str());
        let what = format!("version {version} of model '{}'", self.model);
        let query = [("name", self.model.as_str()), ("version", version)];
        let path = format!("{API}/model-versions/get");
        let found: One<Registered> = self.client.call(root, &path, &query, &what).await?;
        let version = found.model_version;
        if version.run_id.is_empty() {
            return Ok(Some(lineage(version, None)));
        }
        let what = format!("run '{}'", shorten(&version.run_id));
        let path = format!("{API}/runs/get");
        let run = self.client.call::<OfRun>(root, &path, &[("run_id", &version.run_id)], &what).await;
        let run = run
            .inspect_err(|error| tracing::warn!(model = %self.model, %error, "nothing is known of the version's run"))
            .map(|found| found.run);
        Ok(Some(lineage(version, run.ok())))
    }

    /// The look itself says what the version is called that it shows. When that changes, or from time to time, it is asked
    /// what all are called.
    async fn names(&self, _: &ModelName, _: &RemoteModel) -> Result<Option<Names>, SourceError> {
        let pointed = {
            let mut told = self.told.lock();
            let pointed = told.pointed.clone();
            let is_known = |(at, of): &(Instant, Option<_>)| at.elapsed() < NAMES_INTERVAL && *of == pointed;
            if told.asked.as_ref().is_some_and(is_known) {
                return Ok(None);
            }
            // Also when it is refused, which it may be each time.
            told.asked = Some((Instant::now(), pointed.clone()));
            pointed
        };
        let (root, name) = (self.client.root(), self.model.as_str());
        let path = format!("{API}/registered-models/get");
        let found: Registration = self.client.call(root, &path, &[("name", name)], &format!("model '{name}'")).await?;
        Ok(Some(lineage::names(found.registered_model, pointed)))
    }

    fn recorder(&self) -> Option<&dyn Recorder> {
        Some(self)
    }

    async fn read(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError> {
        Ok(self.bytes(file, range).await?.0)
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pointer::Alias(alias) => write!(f, "alias '{alias}'"),
            Pointer::Version(version) => write!(f, "version {version}"),
            Pointer::Stage(stage) => write!(f, "a version in stage {stage}"),
            Pointer::Latest => f.write_str("any version"),
        }
    }
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(account) = &self.account {
            write!(f, "{account} ")?;
        }
        write!(f, "{}", self.uri)
    }
}

/// What the URI says: where the server is on its host, the model, and what points at a version of it.
fn parts(uri: &SourceUri) -> Result<(String, ModelName, Pointer), SourceError> {
    let wrong = |reason: String| SourceError::Uri(format!("source '{uri}': {reason}"));
    let expected = || {
        let start = if uri.scheme() == Scheme::Models { "models:/" } else { "mlflow://host:5000/" };
        wrong(format!("expected {start}model@alias, {start}model/3, {start}model/Production or {start}model/latest"))
    };
    let plain = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded.map(String::from).map_err(|error| wrong(error.to_string()))
    };
    let path = match uri.scheme() {
        Scheme::Models if uri.path().is_empty() => uri.authority().to_owned(),
        Scheme::Models => format!("{}/{}", uri.authority(), uri.path()),
        _ => uri.path().to_owned(),
    };
    let (before, last) = path.rsplit_once('/').unwrap_or(("", &path));
    // Names may have an `@` in them, which is then not the last one.
    let (prefix, name, pointer) = match last.rsplit_once('@') {
        Some((name, alias)) => (before, name, Pointer::Alias(plain(alias)?)),
        None => {
            let (prefix, name) = before.rsplit_once('/').unwrap_or(("", before));
            let stage = STAGES.into_iter().find(|stage| stage.eq_ignore_ascii_case(last));
            let pointer = match stage {
                Some(stage) => Pointer::Stage(stage),
                None if last.eq_ignore_ascii_case("latest") => Pointer::Latest,
                None => Pointer::Version(last.to_owned()),
            };
            (prefix, name, pointer)
        }
    };
    let is_sound = match &pointer {
        Pointer::Alias(alias) => is_alias(alias),
        Pointer::Version(version) => Version::parse(version).is_ok_and(|version| version.number().is_some()),
        Pointer::Stage(_) | Pointer::Latest => true,
    };
    if name.is_empty() || !is_sound || (uri.scheme() == Scheme::Models && !prefix.is_empty()) {
        return Err(expected());
    }
    let name = ModelName::parse(&plain(name)?)
        .map_err(|error| wrong(format!("{}; it is served by that name", error.message)))?;
    Ok((prefix.to_owned(), name, pointer))
}

/// The location as errors may show it: a query may be a signature.
fn without_login(location: &str) -> String {
    let location = location.split(['?', '#']).next().unwrap_or_default();
    match location.split_once("://") {
        Some((scheme, rest)) => {
            let authority = rest.split('/').next().unwrap_or_default();
            let login = authority.rfind('@').map_or(0, |at| at + 1);
            format!("{scheme}://{}", &rest[login..])
        }
        None => location.to_owned(),
    }
}

fn is_alias(text: &str) -> bool {
    (1..=255).contains(&text.chars().count())
        && text.chars().all(|letter| letter.is_alphanumeric() || matches!(letter, '_' | '-'))
}

/// Whether it may be an account of Azure, whose name becomes part of a host's.
fn is_account(text: &str) -> bool {
    (3..=24).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

#[derive(Deserialize)]
struct One<T> {
    model_version: T,
}

#[derive(Deserialize)]
struct OfRun {
    run: Run,
}

#[derive(Deserialize)]
struct Registration {
    registered_model: Called,
}

#[derive(Deserialize)]
struct Several {
    /// MLflow leaves out what is empty.
    #[serde(default)]
    model_versions: Vec<ModelVersion>,
}

#[derive(Deserialize)]
struct ModelVersion {
    version: String,
    #[serde(default)]
    creation_timestamp: Number,
    #[serde(default)]
    source: String,
    status: Option<String>,
    #[serde(flatten)]
    named: Named,
}

impl ModelVersion {
    fn is_ready(&self) -> bool {
        self.status.as_deref().is_none_or(|status| status == "READY")
    }

    fn number(&self) -> Option<u64> {
        self.version.parse().ok()
    }
}

#[derive(Deserialize)]
struct Located {
    artifact_uri: String,
}

#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    files: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    path: String,
    #[serde(default)]
    is_dir: bool,
    /// Left out of an empty file.
    #[serde(default)]
    file_size: Number,
}

/// A number of 64 bits, which may be written as a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(u64),
    Text(String),
}

impl Default for Number {
    fn default() -> Self {
        Number::Plain(0)
    }
}

impl Number {
    fn number(&self) -> Option<u64> {
        match self {
            Number::Plain(number) => Some(*number),
            Number::Text(text) => text.parse().ok(),
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number::Plain(number) => write!(f, "{number}"),
            Number::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests;
