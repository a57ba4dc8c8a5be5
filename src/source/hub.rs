//! The Hugging Face Hub: `hf://org/name`, at `main` or the branch, tag or commit after an `@`. Each commit of it is a
//! version, by its full hash.
//!
//! The environment is that of the Hub's own tools: `HF_ENDPOINT`, `HF_TOKEN` (or the file that `hf auth login` leaves),
//! `HF_HOME`, `HF_HUB_CACHE`, and `HF_HUB_OFFLINE`. What they have downloaded to this machine is not fetched again, and
//! offline it is all there is.

use std::{
    collections::{HashMap, HashSet},
    io::Read,
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use reqwest::{Client, Response, Url, redirect};
use serde::{Deserialize, de::DeserializeOwned};
use tokio_stream::StreamExt;

use super::{
    ByteStream, Digest, Lineage, Look, Names, RemoteFile, RemoteModel, RemoteVersion, Scheme, Source, SourceError,
    SourceUri, chain, digest, disk,
};
use crate::{
    error::{abridge, shorten},
    id::{ModelName, Version},
};

mod choice;
mod downloads;
mod lineage;

use downloads::Downloads;
use lineage::lineage;

const ENDPOINT: &str = "https://huggingface.co";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Without a byte.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an answer in JSON may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the bytes of one read may take: a part of a file over a connection of 30 KB/s.
const BYTES_TIMEOUT: Duration = Duration::from_secs(600);
/// Redirects that are followed for one answer; the Hub itself makes one or two.
const MAX_REDIRECTS: usize = 3;
/// Bytes of one answer in JSON. A page of 1000 files has 300 KB.
const MAX_ANSWER: usize = 16 << 20;
/// Pages of a list of files, at 1000 to a page.
const MAX_PAGES: usize = 100;
/// Files of one commit.
const MAX_FILES: usize = 100_000;
/// Bytes of the file with the token.
const MAX_TOKEN: u64 = 4096;
/// The longest that the Hub may ask to be left alone.
const MAX_PATIENCE: u64 = 3600;

/// What is written in URLs as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A repository, at a revision.
pub struct Hub {
    uri: SourceUri,
    /// `org/name`, or a name alone.
    id: String,
    model: ModelName,
    /// The branch, tag or commit that is followed.
    revision: String,
    environment: Environment,
    client: Client,
    downloads: Option<Downloads>,
    /// The files of the commit that was listed last.
    listed: Mutex<Option<(String, Arc<[Listed]>)>>,
    /// What was read from the downloads, by digest and position.
    read: Mutex<HashSet<(String, u64)>>,
}

/// What the environment says of the Hub.
struct Environment {
    endpoint: Url,
    token: Option<String>,
    /// Where a token is when the environment has none.
    token_file: Option<PathBuf>,
    /// Where the Hub's own tools keep what they download.
    cache: Option<PathBuf>,
    offline: bool,
}

/// A file of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    path: String,
    /// In bytes.
    size: u64,
    digest: Digest,
}

/// The Hub's answer about a revision.
#[derive(Deserialize)]
struct Commit {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// An entry of a commit's tree.
#[derive(Deserialize)]
struct Node {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    /// As git names the content, or the pointer to it that stands in the tree.
    #[serde(default)]
    oid: String,
    lfs: Option<Large>,
}

/// A file that lies outside of git.
#[derive(Deserialize)]
struct Large {
    /// The content's SHA-256.
    oid: String,
    size: u64,
}

/// A request for some bytes of a file.
struct Bytes<'a> {
    commit: &'a str,
    range: &'a Range<u64>,
}

impl Hub {
    /// # Errors
    /// `Uri` when it names no repository, or the environment's settings do not do.
    pub fn open(uri: &SourceUri) -> Result<Self, SourceError> {
        let environment = Environment::read(|name| std::env::var(name).ok())?;
        Self::with(uri, environment)
    }

    fn with(uri: &SourceUri, environment: Environment) -> Result<Self, SourceError> {
        let wrong = |reason: String| SourceError::Uri(format!("source '{uri}': {reason}"));
        if uri.scheme() != Scheme::Hf {
            return Err(wrong("it is no repository of the Hub".to_owned()));
        }
        let written = [uri.authority(), uri.path()].join("/");
        let written = percent_decode_str(written.trim_end_matches('/')).decode_utf8();
        let written = written.map_err(|error| wrong(error.to_string()))?;
        let (id, revision) = written.split_once('@').unwrap_or((&written, "main"));
        let is_name = |part: &str| ModelName::parse(part).is_ok() && !part.contains("..");
        if id.split('/').count() > 2 || !id.split('/').all(is_name) {
            return Err(wrong("expected a repository, such as hf://org/name or hf://org/name@revision".to_owned()));
        }
        let is_part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains("..");
        if !revision.split('/').all(is_part) || revision.chars().any(char::is_control) {
            return Err(wrong("expected a branch, a tag or a commit after the '@'".to_owned()));
        }
        let name = id.rsplit('/').next().unwrap_or(id);
        let model = ModelName::parse(name).map_err(|error| wrong(error.message))?;
        let client = Client::builder()
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            // By hand, so that the token goes nowhere else.
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|error| wrong(chain(&error)))?;
        Ok(Self {
            uri: uri.clone(),
            id: id.to_owned(),
            model,
            revision: revision.to_owned(),
            client,
            downloads: environment.cache.as_deref().map(|cache| Downloads::of(cache, id)),
            environment,
            listed: Mutex::default(),
            read: Mutex::default(),
        })
    }

    /// The branch or tag that is followed; `None` when it is a commit.
    fn branch(&self) -> Option<&str> {
        Some(self.revision.as_str()).filter(|revision| !is_commit(revision))
    }

    /// An address below the endpoint, of parts that are written as they are.
    fn url(&self, path: &str) -> Result<Url, SourceError> {
        let endpoint = self.environment.endpoint.as_str().trim_end_matches('/');
        Url::parse(&format!("{endpoint}/{path}")).map_err(|error| self.senseless(format!("{path}: {error}")))
    }

    /// Asks the Hub, and whoever it sends us to; only the Hub is told the token.
    ///
    /// Bytes may lie on another host. Everything else, and the commit that the bytes are of, is said by the Hub itself.
    async fn get(&self, url: Url, bytes: Option<&Bytes<'_>>, what: &str) -> Result<Response, SourceError> {
        let hub = url.origin();
        let (mut url, mut at_hub, mut is_vouched_for) = (url, true, bytes.is_none());
        for _ in 0..=MAX_REDIRECTS {
            let request = self.client.get(url.clone()).header(header::ACCEPT_ENCODING, "identity");
            let mut request = request.timeout(if bytes.is_some() { BYTES_TIMEOUT } else { CALL_TIMEOUT });
            if at_hub && let Some(token) = self.environment.authorization() {
                request = request.header(header::AUTHORIZATION, token);
            }
            if let Some(Bytes { range, .. }) = bytes {
                request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
            }
            let response = request.send().await.map_err(|error| self.unavailable(&url, what, error))?;
            let status = response.status();
            if !status.is_success() && !status.is_redirection() {
                return Err(self.refusal(status, response.headers(), what));
            }
            let target = match response.headers().get(header::LOCATION).filter(|_| status.is_redirection()) {
                Some(location) => {
                    let location = location.to_str().ok().and_then(|location| url.join(location).ok());
                    let location = location.filter(|location| matches!(location.scheme(), "http" | "https"));
                    Some(location.ok_or_else(|| self.senseless(format!("{status} for {what} leads nowhere")))?)
                }
                None if status.is_redirection() => {
                    return Err(self.senseless(format!("{status} for {what} leads nowhere")));
                }
                None => None,
            };
            let stays = target.as_ref().is_some_and(|target| target.origin() == hub);
            if at_hub && let Some(Bytes { commit, .. }) = bytes {
                is_vouched_for |= self.names_commit(response.headers(), commit, what)?;
            }
            if at_hub && !stays && !is_vouched_for {
                let host = self.environment.host();
                return Err(self.senseless(format!("no X-Repo-Commit for {what}; {host} is not a hub")));
            }
            if bytes.is_none() && target.is_some() && !stays {
                return Err(self.senseless(format!("it sends us to another host for {what}")));
            }
            let Some(target) = target else { return Ok(response) };
            if url.scheme() == "https" && target.scheme() == "http" {
                return Err(self.senseless(format!("it sends us from https to http for {what}")));
            }
            at_hub &= stays;
            url = target;
        }
        Err(self.senseless(format!("more than {MAX_REDIRECTS} redirects for {what}")))
    }

    /// Whether the Hub names the commit that a file is of, and the one that was asked for. What never does is something
    /// else, such as a proxy that wants a login.
    fn names_commit(&self, headers: &HeaderMap, commit: &str, what: &str) -> Result<bool, SourceError> {
        match headers.get("x-repo-commit") {
            Some(found) if found.as_bytes() == commit.as_bytes() => Ok(true),
            Some(_) => Err(SourceError::Changed { what: what.to_owned() }),
            None => Ok(false),
        }
    }

    async fn json<T: DeserializeOwned>(&self, mut response: Response, what: &str) -> Result<T, SourceError> {
        let url = response.url().clone();
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| self.unavailable(&url, what, error))? {
            if body.len() + piece.len() > MAX_ANSWER {
                return Err(self.senseless(format!("more than {MAX_ANSWER} bytes for {what}")));
            }
            body.extend_from_slice(&piece);
        }
        let wrong = |error| self.senseless(format!("expected {what} in JSON of {}: {error}", self.environment.host()));
        serde_json::from_slice(&body).map_err(wrong)
    }

    /// The commit that the revision is at, and the names of its files.
    async fn commit(&self) -> Result<Commit, SourceError> {
        let revision = utf8_percent_encode(&self.revision, PLAIN);
        let what = format!("revision '{}'", shorten(&self.revision));
        let url = self.url(&format!("api/models/{}/revision/{revision}", self.id))?;
        let commit: Commit = self.json(self.get(url, None, &what).await?, &what).await?;
        if !is_commit(&commit.sha) {
            return Err(self.senseless(format!("{what} is at '{}', which is no commit", shorten(&commit.sha))));
        }
        Ok(commit)
    }

    /// The files of a commit.
    async fn files(&self, commit: &str) -> Result<Arc<[Listed]>, SourceError> {
        if self.environment.offline {
            let commit = commit.to_owned();
            return Ok(self.downloaded_by(move |downloads| downloads.list(&commit)).await?.into());
        }
        let before = self.listed.lock().clone();
        if let Some((_, files)) = before.filter(|(before, _)| before == commit) {
            return Ok(files);
        }
        let files: Arc<[Listed]> = self.tree(commit).await?.into();
        *self.listed.lock() = Some((commit.to_owned(), files.clone()));
        self.read.lock().clear();
        Ok(files)
    }

    /// The files of a commit, as the Hub lists them, page by page.
    async fn tree(&self, commit: &str) -> Result<Vec<Listed>, SourceError> {
        let what = "the list of files";
        let first = self.url(&format!("api/models/{}/tree/{commit}?recursive=true&expand=false", self.id))?;
        let (mut next, mut files) = (Some(first), Vec::new());
        for _ in 0..MAX_PAGES {
            let Some(url) = next else { return Ok(files) };
            let response = self.get(url.clone(), None, what).await?;
            next = match response.headers().get(header::LINK).and_then(|link| next_page(link.to_str().ok()?)) {
                Some(link) => {
                    let link = url.join(link).ok().filter(|link| link.origin() == url.origin());
                    Some(link.ok_or_else(|| self.senseless(format!("the next page of {what} is at another host")))?)
                }
                None => None,
            };
            for node in self.json::<Vec<Node>>(response, what).await? {
                if node.kind == "file" {
                    files.push(self.file(node)?);
                }
            }
            if files.len() > MAX_FILES {
                return Err(self.senseless(format!("it has more than {MAX_FILES} files")));
            }
        }
        Err(self.senseless(format!("{what} has more than {MAX_PAGES} pages")))
    }

    fn file(&self, node: Node) -> Result<Listed, SourceError> {
        let (digest, size) = match &node.lfs {
            Some(large) => (Digest::from_hex("sha256", &large.oid), large.size),
            None => (Digest::from_hex("git-sha1", &node.oid), node.size),
        };
        let digest = digest.ok_or_else(|| self.senseless(format!("file '{}' has no digest", abridge(&node.path))))?;
        Ok(Listed { path: node.path, size, digest })
    }

    /// Some bytes of a file, from the Hub.
    async fn fetch(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let what = format!("file '{}'", abridge(&file.path));
        let (commit, path) = file.location.split_once('/').unwrap_or((&file.location, ""));
        let path: Vec<_> = path.split('/').map(|part| utf8_percent_encode(part, PLAIN).to_string()).collect();
        let url = self.url(&format!("{}/resolve/{commit}/{}", self.id, path.join("/")))?;
        let response = self.get(url, Some(&Bytes { commit, range: &range }), &what).await?;
        self.check_range(&response, file, &range, &what)?;
        let (place, name) = (self.uri.to_string(), file.path.clone());
        Ok(Box::pin(response.bytes_stream().map(move |bytes| {
            bytes.map_err(|error| SourceError::Unavailable {
                place: place.clone(),
                reason: format!("while '{name}' was read: {}", abridge(&chain(&error.without_url()))),
            })
        })))
    }

    /// Whether the answer has the bytes that were asked for, as they are.
    fn check_range(
        &self,
        response: &Response,
        file: &RemoteFile,
        range: &Range<u64>,
        what: &str,
    ) -> Result<(), SourceError> {
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        if let Some(encoding) = text(header::CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
            return Err(self.senseless(format!("{what} comes as '{}', asked for as it is", shorten(encoding))));
        }
        let whole = *range == (0..file.size);
        match (response.status(), text(header::CONTENT_RANGE)) {
            (StatusCode::OK, _) if whole => Ok(()),
            (StatusCode::PARTIAL_CONTENT, Some(found)) => {
                let expected = format!("bytes {}-{}/", range.start, range.end - 1);
                match found.strip_prefix(&expected) {
                    Some(total) if total == "*" || total == file.size.to_string() => Ok(()),
                    Some(_) => Err(SourceError::Changed { what: what.to_owned() }),
                    None => Err(self.senseless(format!("expected '{expected}…' of {what}, got '{}'", shorten(found)))),
                }
            }
            (status, _) => Err(self.senseless(format!("expected 206 for a part of {what}, got {status}"))),
        }
    }

    /// What an answer that is none means.
    fn refusal(&self, status: StatusCode, headers: &HeaderMap, what: &str) -> SourceError {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (code, message) = (text("x-error-code"), abridge(text("x-error-message")));
        let said = if message.is_empty() { status.to_string() } else { format!("{status}, {message}") };
        let place = self.uri.to_string();
        match (code, status) {
            ("GatedRepo", _) => SourceError::Denied {
                place,
                reason: format!(
                    "it is gated ({said}); accept its terms at the Hub, and set HF_TOKEN to a token that may read it"
                ),
            },
            // What is private is said not to be there, too.
            ("RepoNotFound", _) => SourceError::NotFound {
                place,
                what: format!("the repository, or it is private and not for this HF_TOKEN ({said}): {what}"),
            },
            ("RevisionNotFound" | "EntryNotFound", _) | (_, StatusCode::NOT_FOUND) => {
                SourceError::NotFound { place, what: what.to_owned() }
            }
            (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => SourceError::Denied {
                place,
                reason: format!("{said} for {what}; set HF_TOKEN to a token that may read it"),
            },
            (_, StatusCode::TOO_MANY_REQUESTS) => {
                let wait =
                    text("retry-after").parse().ok().map(|wait: u64| Duration::from_secs(wait.min(MAX_PATIENCE)));
                SourceError::Limited { place, reason: said, retry_after: wait }
            }
            (_, StatusCode::RANGE_NOT_SATISFIABLE) => SourceError::Changed { what: what.to_owned() },
            _ => SourceError::Unavailable { place, reason: format!("{said} for {what}") },
        }
    }

    fn unavailable(&self, url: &Url, what: &str, error: reqwest::Error) -> SourceError {
        let host = url.host_str().unwrap_or_default();
        // Addresses of other hosts may carry signatures.
        let reason = format!("{host}, for {what}: {}", abridge(&chain(&error.without_url())));
        SourceError::Unavailable { place: self.uri.to_string(), reason }
    }

    fn senseless(&self, reason: String) -> SourceError {
        SourceError::Senseless { place: self.uri.to_string(), reason }
    }

    /// What the downloads say, where they must be.
    async fn downloaded_by<T: Send + 'static>(
        &self,
        find: impl FnOnce(&Downloads) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let missing = || SourceError::NotFound {
            place: self.uri.to_string(),
            what: "the Hub's cache (HF_HUB_CACHE, HF_HOME or HOME; HF_HUB_OFFLINE is set)".to_owned(),
        };
        let downloads = self.downloads.clone().ok_or_else(missing)?;
        let root = downloads.root().to_path_buf();
        disk::off_thread(&root, move || find(&downloads)).await
    }

    /// Bytes of a file from the downloads. When the Hub can be asked, they are believed once: who asks for the same
    /// bytes again has found them wrong.
    async fn downloaded(&self, file: &RemoteFile, range: &Range<u64>) -> Option<ByteStream> {
        let (digest, size) = (file.digest?, file.size);
        self.downloads.as_ref()?;
        let found = self.downloaded_by(move |downloads| Ok(downloads.find(&digest, size))).await;
        let stream = disk::read(&found.ok().flatten()?, range.clone()).await.ok()?;
        let is_first = self.read.lock().insert((digest.hex(), range.start));
        (is_first || self.environment.offline).then_some(stream)
    }
}

/// What stands for the files of a commit, as far as they were downloaded.
fn of_part(commit: &str, files: &[Listed]) -> String {
    let paths = files.iter().map(|file| file.path.as_str());
    digest::of_texts(&std::iter::once(commit).chain(paths).collect::<Vec<_>>())
}

#[async_trait]
impl Source for Hub {
    fn uri(&self) -> &SourceUri {
        &self.uri
    }

    async fn look(&self) -> Result<Look, SourceError> {
        let (commit, has_settings) = if self.environment.offline {
            let revision = self.revision.clone();
            (self.downloaded_by(move |downloads| downloads.commit(&revision)).await?, true)
        } else {
            let commit = self.commit().await?;
            let paths: Vec<&str> = commit.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
            let has_settings = !choice::beside(&paths).is_empty();
            (commit.sha, has_settings)
        };
        // One call, unless settings have to be told from those before.
        let files = if has_settings { self.files(&commit).await? } else { Arc::default() };
        let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
        let beside = choice::beside(&paths).into_iter().map(|path| (path, path));
        let version = Version::parse(&commit).map_err(|error| self.senseless(error.message))?;
        // What was downloaded may be a part of the commit, which another look finds more of, here or at the Hub.
        let revision = if self.environment.offline { of_part(&commit, &files) } else { commit.clone() };
        let model = RemoteModel {
            versions: vec![RemoteVersion { version: version.clone(), revision }],
            default: Some(version),
            beside: chosen(&files, &commit, beside),
        };
        Ok(Look { models: [(self.model.clone(), model)].into() })
    }

    async fn artifact(&self, _: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        let commit = version.version.as_str();
        let files = self.files(commit).await?;
        if self.environment.offline && of_part(commit, &files) != version.revision {
            return Err(SourceError::Changed { what: format!("what was downloaded of commit {commit}") });
        }
        let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
        let missing = |what| SourceError::NotFound { place: format!("{} ({commit})", self.uri), what };
        let chosen_paths = choice::version(&paths).map_err(missing)?;
        Ok(chosen(&files, commit, chosen_paths))
    }

    async fn lineage(&self, _: &ModelName, version: &RemoteVersion) -> Result<Option<Lineage>, SourceError> {
        let commit = version.version.as_str();
        let about = if self.environment.offline {
            serde_json::Value::Null
        } else {
            let what = format!("commit {commit}");
            let url = self.url(&format!("api/models/{}/revision/{commit}", self.id))?;
            self.json(self.get(url, None, &what).await?, &what).await?
        };
        Ok(Some(lineage(&about, commit, self.branch())))
    }

    async fn names(&self, _: &ModelName, shown: &RemoteModel) -> Result<Option<Names>, SourceError> {
        Ok(self.branch().map(|branch| Names::of_pointer(branch, shown)))
    }

    async fn read(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError> {
        if let Some(stream) = self.downloaded(file, &range).await {
            return Ok(stream);
        }
        if self.environment.offline {
            let place = "the Hub's cache on this machine".to_owned();
            return Err(SourceError::NotFound { place, what: format!("file '{}'", abridge(&file.path)) });
        }
        self.fetch(file, range).await
    }
}

impl Environment {
    /// # Errors
    /// `Uri` when the endpoint is none.
    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, SourceError> {
        let set = |name| variable(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        let endpoint = set("HF_ENDPOINT");
        let url = Url::parse(endpoint.as_deref().unwrap_or(ENDPOINT)).ok();
        let is_endpoint = |url: &Url| {
            let is_bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
            matches!(url.scheme(), "http" | "https") && url.has_host() && is_bare && url.fragment().is_none()
        };
        let wrong =
            || "HF_ENDPOINT: expected a URL such as https://huggingface.co, without a login or query".to_owned();
        let user = set("HOME").map(PathBuf::from);
        let caches = set("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(user.as_ref()?.join(".cache")));
        let expand = |path: String| match (path.strip_prefix("~/"), &user) {
            (Some(rest), Some(user)) => user.join(rest),
            _ => PathBuf::from(path),
        };
        let home = set("HF_HOME").map(expand).or_else(|| Some(caches?.join("huggingface")));
        Ok(Self {
            endpoint: url.filter(is_endpoint).ok_or_else(|| SourceError::Uri(wrong()))?,
            token: set("HF_TOKEN"),
            token_file: set("HF_TOKEN_PATH").map(expand).or_else(|| Some(home.as_ref()?.join("token"))),
            cache: set("HF_HUB_CACHE").map(expand).or_else(|| Some(home?.join("hub"))),
            offline: set("HF_HUB_OFFLINE")
                .is_some_and(|set| ["1", "ON", "YES", "TRUE"].contains(&set.to_ascii_uppercase().as_str())),
        })
    }

    /// What the Hub is told; the file is read anew each time, since tokens are replaced.
    fn authorization(&self) -> Option<HeaderValue> {
        let token = self.token.clone().or_else(|| {
            let mut text = String::new();
            let file = std::fs::File::open(self.token_file.as_ref()?).ok()?;
            file.take(MAX_TOKEN).read_to_string(&mut text).ok()?;
            Some(text.trim().to_owned()).filter(|text| !text.is_empty())
        })?;
        let mut value = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    fn host(&self) -> &str {
        self.endpoint.host_str().unwrap_or_default()
    }
}

/// The files that were chosen, at the paths that were chosen for them.
fn chosen<'a>(files: &[Listed], commit: &str, paths: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<RemoteFile> {
    let by_path: HashMap<&str, &Listed> = files.iter().map(|file| (file.path.as_str(), file)).collect();
    let of = |(from, to): (&str, &str)| {
        let file = by_path.get(from)?;
        Some(RemoteFile {
            path: to.to_owned(),
            size: file.size,
            digest: Some(file.digest),
            location: format!("{commit}/{from}"),
            pin: None,
            likeness: None,
        })
    };
    paths.into_iter().filter_map(of).collect()
}

/// Whether a text is a commit's full hash.
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The next page, as a `Link` header names it.
fn next_page(header: &str) -> Option<&str> {
    let mut rest = header;
    loop {
        let (target, after) = rest.split_once('<')?.1.split_once('>')?;
        let parameters = after.split(',').next().unwrap_or_default();
        if parameters.split(';').any(|one| matches!(one.trim(), "rel=\"next\"" | "rel=next")) {
            return Some(target);
        }
        rest = after;
    }
}

#[cfg(test)]
mod tests;
