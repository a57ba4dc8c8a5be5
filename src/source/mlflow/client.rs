//! Speaks HTTP to an MLflow tracking server: calls that answer in JSON, and files through its proxy.
//!
//! The server's credentials go to the server alone: no redirect to another host is followed, none at all of what
//! changes something, and another host that holds the artifacts gets none.

use std::{
    env,
    future::Future,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{StatusCode, header};
use percent_encoding::percent_decode_str;
use reqwest::{RequestBuilder, Response, Url, redirect::Policy};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::time::timeout;
use tokio_stream::Stream;

use crate::{
    error::abridge,
    source::{ByteStream, Scheme, SourceError, SourceUri, chain},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For a whole call. A server with users of its own takes seconds for each login.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Without a byte of a file. A server that keeps its artifacts in an object store fetches all of it first.
const READ_TIMEOUT: Duration = Duration::from_secs(600);
/// Bytes of an answer; a list of 10,000 files takes two of these megabytes.
const MAX_ANSWER: usize = 8 << 20;
/// Bytes of an error's text that are read.
const MAX_ERROR: usize = 64 << 10;
/// Redirects on one host that are followed.
const MAX_REDIRECTS: usize = 3;

/// Which server, and who asks.
#[derive(Default)]
pub struct Settings {
    /// Where `models:/…` is looked for.
    pub tracking_uri: Option<String>,
    pub token: Option<String>,
    pub username: Option<String>,
    pub password: Option<String>,
    pub workspace: Option<String>,
    /// Whether any certificate does.
    pub insecure_tls: bool,
}

/// A tracking server.
pub struct Client {
    http: reqwest::Client,
    /// For what changes something. A redirect would make another call of it.
    writing: reqwest::Client,
    /// The server's root, below which `api` lies.
    root: Url,
    login: Option<Login>,
    workspace: Option<String>,
    /// What errors call it.
    place: String,
}

enum Login {
    Token(String),
    Password(String, String),
}

/// A file's bytes as they come.
pub struct Opened {
    pub bytes: ByteStream,
    /// Whether the server gave the wanted range, and not the whole file.
    pub is_range: bool,
}

impl Settings {
    /// As MLflow's own clients read them.
    pub fn from_env() -> Self {
        let read = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            tracking_uri: read("MLFLOW_TRACKING_URI"),
            token: read("MLFLOW_TRACKING_TOKEN"),
            username: read("MLFLOW_TRACKING_USERNAME"),
            password: read("MLFLOW_TRACKING_PASSWORD"),
            workspace: read("MLFLOW_WORKSPACE"),
            insecure_tls: read("MLFLOW_TRACKING_INSECURE_TLS").is_some_and(|value| {
                let value = value.to_ascii_lowercase();
                value == "true" || value == "1"
            }),
        }
    }
}

impl Client {
    /// The server that `uri` speaks of, below `prefix` of its host.
    ///
    /// # Errors
    /// `Uri` when it is none, or the settings do not do.
    pub fn new(uri: &SourceUri, prefix: &str, settings: Settings) -> Result<Self, SourceError> {
        let wrong = |reason: String| SourceError::Uri(format!("source '{uri}': {reason}"));
        let plain = |text: &str| {
            percent_decode_str(text).decode_utf8().map(Into::into).map_err(|error| wrong(format!("login: {error}")))
        };
        let (mut root, login) = match uri.scheme() {
            Scheme::Models => {
                let text = settings.tracking_uri.as_deref().ok_or_else(|| {
                    wrong("MLFLOW_TRACKING_URI is not set; expected the tracking server, as http://host:5000".into())
                })?;
                let root = Url::parse(text).ok().filter(|root| matches!(root.scheme(), "http" | "https"));
                let root = root.ok_or_else(|| {
                    wrong("MLFLOW_TRACKING_URI: expected a tracking server, as http://host:5000 or https://host".into())
                })?;
                let login = (!root.username().is_empty() || root.password().is_some())
                    .then(|| (root.username().to_owned(), root.password().unwrap_or_default().to_owned()));
                (root, login)
            }
            scheme => {
                let http = if scheme == Scheme::MlflowHttps { "https" } else { "http" };
                let root = Url::parse(&format!("{http}://{}/{prefix}", uri.authority()));
                let login = uri.login().map(|(user, secret)| (user.to_owned(), secret.to_owned()));
                (root.map_err(|error| wrong(error.to_string()))?, login)
            }
        };
        let place = match uri.scheme() {
            Scheme::Models => format!("{uri} of {}", root.origin().ascii_serialization()),
            _ => uri.to_string(),
        };
        let login = match (settings.token, login, settings.username) {
            (Some(token), ..) => Some(Login::Token(token)),
            (None, Some((user, secret)), _) => Some(Login::Password(plain(&user)?, plain(&secret)?)),
            (None, None, Some(user)) => Some(Login::Password(user, settings.password.unwrap_or_default())),
            (None, None, None) => None,
        };
        // Neither may fail: the URL has a host.
        let _ = (root.set_username(""), root.set_password(None));
        root.set_query(None);
        root.set_fragment(None);
        let client = |redirects: Policy| {
            reqwest::Client::builder()
                .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(READ_TIMEOUT)
                .redirect(redirects)
                .tls_danger_accept_invalid_certs(settings.insecure_tls)
                .build()
                .map_err(|error| wrong(said(error)))
        };
        let http = client(Policy::custom(|attempt| {
            let same = attempt.previous().last().is_some_and(|from| from.origin() == attempt.url().origin());
            if same && attempt.previous().len() <= MAX_REDIRECTS { attempt.follow() } else { attempt.stop() }
        }))?;
        let writing = client(Policy::none())?;
        Ok(Self { http, writing, root, login, workspace: settings.workspace, place })
    }

    /// What errors call the server.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The server's root.
    pub fn root(&self) -> &Url {
        &self.root
    }

    /// Asks the server at `root` for `path` below it, with `query`, for an answer in JSON that is about `what`.
    ///
    /// # Errors
    /// `NotFound` of `what`; else as any look at a place.
    pub async fn call<T: DeserializeOwned>(
        &self,
        root: &Url,
        path: &str,
        query: &[(&str, &str)],
        what: &str,
    ) -> Result<T, SourceError> {
        let mut url = below(root, path.split('/'));
        url.query_pairs_mut().extend_pairs(query);
        let calling = async {
            let mut response = self.accepted(self.send(url, None).await?, what).await?;
            self.body(&mut response, MAX_ANSWER).await
        };
        let body = self.in_time(calling).await?;
        serde_json::from_slice(&body).map_err(|error| {
            let text = String::from_utf8_lossy(&body);
            self.senseless(format!("expected JSON ({error}), got: {}", one_line(&text)))
        })
    }

    /// Has the server change something about `what`, as `body` says. What it answers beside that it did is of no interest.
    ///
    /// # Errors
    /// As for a call; the change may have been made all the same.
    pub async fn change(&self, path: &str, body: &Value, what: &str) -> Result<(), SourceError> {
        let url = below(&self.root, path.split('/'));
        let request = self.writing.post(url.clone()).header(header::CONTENT_TYPE, "application/json");
        let calling = async {
            let sent = self.sent_as_us(request.body(body.to_string()), &url).send().await;
            let mut response = self.accepted(sent.map_err(|error| self.unavailable(said(error)))?, what).await?;
            // Read, so that the connection can be used again.
            self.body(&mut response, MAX_ERROR).await
        };
        self.in_time(calling).await.map(drop)
    }

    /// Opens `range` of the file at `url`, which has `size` bytes and is called `name`.
    ///
    /// # Errors
    /// `Changed` when the server says that it has another size; else as any read.
    pub async fn open(&self, url: Url, range: Range<u64>, size: u64, name: &str) -> Result<Opened, SourceError> {
        let response = self.accepted(self.send(url, Some(&range)).await?, name).await?;
        let changed = || SourceError::Changed { what: format!("file '{name}'") };
        let is_range = response.status() == StatusCode::PARTIAL_CONTENT;
        let (start, total) = if is_range {
            let (start, total) = content_range(&response)
                .ok_or_else(|| self.senseless(format!("a part of '{name}' that does not say which one it is")))?;
            if start > range.start {
                return Err(self.senseless(format!("another part of '{name}' than bytes {range:?}")));
            }
            (start, total)
        } else {
            (0, response.content_length())
        };
        if total.is_some_and(|total| total != size) {
            return Err(changed());
        }
        let (place, name) = (self.place.clone(), name.to_owned());
        let bytes = Window {
            bytes: Box::pin(response.bytes_stream()),
            skip: range.start - start,
            left: range.end - range.start,
            failed: Box::new(move |error| SourceError::Unavailable {
                place: place.clone(),
                reason: format!("while '{name}' was read: {}", said(error)),
            }),
        };
        Ok(Opened { bytes: Box::pin(bytes), is_range })
    }

    /// Waits for `calling` as long as a call may take.
    pub async fn in_time<T>(&self, calling: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
        let late = |_| self.unavailable(format!("no answer within {CALL_TIMEOUT:?}"));
        timeout(CALL_TIMEOUT, calling).await.map_err(late)?
    }

    async fn send(&self, url: Url, range: Option<&Range<u64>>) -> Result<Response, SourceError> {
        let mut request = self.sent_as_us(self.http.get(url.clone()), &url);
        if let Some(range) = range {
            request = request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
        }
        request.send().await.map_err(|error| self.unavailable(said(error)))
    }

    /// The request for `url`, with what says who asks.
    fn sent_as_us(&self, request: RequestBuilder, url: &Url) -> RequestBuilder {
        let is_own = url.origin() == self.root.origin();
        let request = match &self.login {
            Some(Login::Token(token)) if is_own => request.bearer_auth(token),
            Some(Login::Password(user, secret)) if is_own => request.basic_auth(user, Some(secret)),
            _ => request,
        };
        match &self.workspace {
            Some(workspace) => request.header("X-MLFLOW-WORKSPACE", workspace),
            None => request,
        }
    }

    /// The response, unless it is an error about `what`.
    async fn accepted(&self, mut response: Response, what: &str) -> Result<Response, SourceError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if status.is_redirection() {
            return Err(self.senseless(redirected(&response)));
        }
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after = retry_after.and_then(|seconds| seconds.to_str().ok()?.trim().parse().ok());
        // Without its text an error is still one.
        let body = self.in_time(self.body(&mut response, MAX_ERROR)).await.unwrap_or_default();
        let (text, said) = (String::from_utf8_lossy(&body), serde_json::from_slice::<Said>(&body).ok());
        let said = said.filter(|said| !said.error_code.is_empty());
        let reason = match &said {
            Some(said) => format!("{status}: {}", one_line(&said.message)),
            None => format!("{status}: {}", one_line(&text)),
        };
        let place = self.place.clone();
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let hint = match self.login {
                    None => {
                        "; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, say \
                             who asks"
                    }
                    Some(_) => "",
                };
                SourceError::Denied { place, reason: format!("{reason}{hint}") }
            }
            StatusCode::TOO_MANY_REQUESTS => {
                SourceError::Limited { place, reason, retry_after: retry_after.map(Duration::from_secs) }
            }
            StatusCode::RANGE_NOT_SATISFIABLE => SourceError::Changed { what: format!("file '{what}'") },
            _ if said.as_ref().is_some_and(Said::is_missing) => SourceError::NotFound { place, what: what.to_owned() },
            _ if status.is_client_error() && said.is_none() => {
                self.senseless(format!("{reason} (is it an MLflow tracking server?)"))
            }
            _ => SourceError::Unavailable { place, reason },
        })
    }

    /// The body, of which no more than `most` bytes are read.
    async fn body(&self, response: &mut Response, most: usize) -> Result<Bytes, SourceError> {
        let mut body = BytesMut::new();
        while let Some(piece) = response.chunk().await.map_err(|error| self.unavailable(said(error)))? {
            if body.len() + piece.len() > most {
                return Err(self.senseless(format!("more than {most} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    fn unavailable(&self, reason: String) -> SourceError {
        SourceError::Unavailable { place: self.place.clone(), reason }
    }

    pub fn senseless(&self, reason: String) -> SourceError {
        SourceError::Senseless { place: self.place.clone(), reason }
    }
}

/// What MLflow says of an error.
#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    error_code: String,
    #[serde(default)]
    message: String,
}

impl Said {
    /// An alias that is not there is a wrong parameter to MLflow, unlike all else that is not there.
    fn is_missing(&self) -> bool {
        let message = self.message.to_ascii_lowercase();
        self.error_code == "RESOURCE_DOES_NOT_EXIST"
            || self.error_code == "INVALID_PARAMETER_VALUE"
                && message.contains("alias")
                && message.contains("not found")
    }
}

/// `url` with `parts` added to its path, each encoded.
pub fn below<'a>(url: &Url, parts: impl Iterator<Item = &'a str>) -> Url {
    let mut url = url.clone();
    // A URL with a host has a path.
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(parts);
    }
    url
}

/// The first byte of a part, and how many the whole has, if the server knows.
fn content_range(response: &Response) -> Option<(u64, Option<u64>)> {
    let text = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
}

/// Where a redirect that is not followed leads to: the host alone, for what follows it may be a secret.
fn redirected(response: &Response) -> String {
    let location = response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
    let target = location.and_then(|location| response.url().join(location).ok());
    let target = target.map_or_else(|| "nowhere".to_owned(), |target| target.origin().ascii_serialization());
    format!("{}: it redirects to {target}, which is not followed; name that place instead", response.status())
}

/// A text that may be a page, as part of a sentence.
fn one_line(text: &str) -> String {
    let text: Vec<&str> = text.split_whitespace().collect();
    if text.is_empty() { "no text".to_owned() } else { abridge(&text.join(" ")) }
}

/// What is said of an error, without the URL: whoever reads it knows the place.
fn said(error: reqwest::Error) -> String {
    abridge(&chain(&error.without_url()))
}

/// The part of a body that was asked for, of one that has more.
struct Window {
    bytes: Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
    /// Bytes before it.
    skip: u64,
    /// Bytes of it that are to come.
    left: u64,
    failed: Box<dyn Fn(reqwest::Error) -> SourceError + Send>,
}

impl Stream for Window {
    type Item = Result<Bytes, SourceError>;

    /// Bytes that are skipped come as empty ones: whoever waits sees that something comes.
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        Poll::Ready(match ready!(self.bytes.as_mut().poll_next(context)) {
            Some(Ok(mut bytes)) => {
                let skipped = self.skip.min(bytes.len() as u64);
                let mut bytes = bytes.split_off(skipped as usize);
                self.skip -= skipped;
                bytes.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= bytes.len() as u64;
                Some(Ok(bytes))
            }
            Some(Err(error)) => Some(Err((self.failed)(error))),
            None => None,
        })
    }
}
