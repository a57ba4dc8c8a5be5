//! One repository of a registry, as the OCI's distribution protocol has it: challenges are answered, redirects followed, and
//! every answer is bounded.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use reqwest::{Client, Response, Url, redirect::Policy};
use serde::Deserialize;
use tokio::time::timeout;
use tokio_stream::StreamExt;

use super::challenge::Challenge;
use crate::{
    error::abridge,
    source::{ByteStream, Digest, Scheme, SourceError, SourceUri, chain},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Until an answer begins.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Until a manifest, a token or what explains an error is whole.
const TEXT_TIMEOUT: Duration = Duration::from_secs(30);
/// Without a byte.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of a manifest; registries need not take larger ones.
const MAX_MANIFEST: usize = 4 << 20;
/// Bytes of a token's answer, an explained error, or Docker's settings.
const MAX_TEXT: usize = 1 << 20;
const MAX_REDIRECTS: usize = 5;
/// How long a token holds at least, also when it does not say so, and how much before its end it is not used any more.
const TOKEN_AGE: u64 = 60;
const TOKEN_MARGIN: Duration = Duration::from_secs(10);
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                         application/vnd.docker.distribution.manifest.v2+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json";
const DIGEST: &str = "docker-content-digest";

/// Where Docker keeps what `docker.io` stands for, and what it calls the login there.
const DOCKER: [&str; 2] = ["docker.io", "index.docker.io"];
const DOCKER_HOST: &str = "registry-1.docker.io";

/// A repository, spoken to over connections that are kept.
pub struct Registry {
    /// As errors name it.
    place: String,
    /// As logins name it.
    host: String,
    repository: String,
    base: Url,
    client: Client,
    login: Option<(String, String)>,
    /// Docker's settings, which may have a login.
    settings: Option<PathBuf>,
    proof: Mutex<Option<Proof>>,
    /// Whether it has never answered for a range with everything.
    seeks: AtomicBool,
    /// Whether http will do for whoever gives out tokens, wherever that is.
    plain_realms: bool,
}

/// What an authorization header says, and how long it holds.
struct Proof {
    value: HeaderValue,
    until: Option<Instant>,
}

/// Some say it under both names.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

/// Docker's settings, as far as they are logins.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Settings {
    auths: BTreeMap<String, Login>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    /// `user:secret` in base64.
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

impl Registry {
    /// The repository `name` of the registry that `uri` speaks of, over http when `plain`. Docker's settings are read when
    /// the registry asks for a login and the URI has none.
    ///
    /// # Errors
    /// `Uri` when the host is none.
    pub fn open(uri: &SourceUri, name: &str, plain: bool, settings: Option<PathBuf>) -> Result<Self, SourceError> {
        let wrong = |reason: String| SourceError::Uri(format!("source '{uri}': {reason}"));
        let host = uri.authority();
        let is_docker = DOCKER.contains(&host);
        let repository = if is_docker && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
        let base = format!(
            "{}://{}/v2/{repository}/",
            if plain { "http" } else { "https" },
            if is_docker { DOCKER_HOST } else { host }
        );
        let base = Url::parse(&base).map_err(|error| wrong(format!("expected a host: {error}")))?;
        let plainly = |text: &str| percent_decode_str(text).decode_utf8().map(|text| text.into_owned());
        let login = uri.login().map(|(user, secret)| Ok((plainly(user)?, plainly(secret)?))).transpose();
        let login = login.map_err(|error: std::str::Utf8Error| wrong(error.to_string()))?;
        let builder = Client::builder();
        // What may go without encryption because it stays on this machine is not for a proxy either.
        let builder = if plain && uri.scheme() != Scheme::OciHttp { builder.no_proxy() } else { builder };
        let client = builder
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|error| wrong(chain(&error)))?;
        Ok(Self {
            place: uri.to_string(),
            host: host.to_owned(),
            repository,
            base,
            client,
            login,
            settings,
            proof: Mutex::default(),
            seeks: AtomicBool::new(true),
            plain_realms: uri.scheme() == Scheme::OciHttp,
        })
    }

    /// The digest of the manifest that a tag or digest stands for now.
    ///
    /// # Errors
    /// When the registry does not answer, refuses, or has no such tag.
    pub async fn digest(&self, reference: &str) -> Result<Digest, SourceError> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let response = self.send(Method::HEAD, url, &accept()).await?;
        let named = response.headers().get(DIGEST).and_then(|value| value.to_str().ok());
        match (response.status(), named) {
            (StatusCode::OK, Some(named)) => {
                let named = self.sha256(named)?;
                if reference.contains(':') && self.sha256(reference)? != named {
                    let reason = format!("expected {reference}, got {named}");
                    return Err(SourceError::Corrupt { file: "the manifest".to_owned(), reason });
                }
                Ok(named)
            }
            // Some registries know no HEAD, or leave the digest to whoever asks.
            (StatusCode::OK | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED, _) => {
                Ok(Digest::of(&self.manifest(reference).await?))
            }
            _ => Err(self.failure(response, reference).await),
        }
    }

    /// The manifest of a tag or digest. What a digest stands for is verified.
    ///
    /// # Errors
    /// As for `digest`; `Corrupt` when it is another one.
    pub async fn manifest(&self, reference: &str) -> Result<Vec<u8>, SourceError> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let response = self.send(Method::GET, url, &accept()).await?;
        if !response.status().is_success() {
            return Err(self.failure(response, reference).await);
        }
        let manifest = self.text(response, MAX_MANIFEST).await?;
        if reference.contains(':') {
            let (announced, found) = (self.sha256(reference)?, Digest::of(&manifest));
            if announced != found {
                let reason = format!("expected {announced}, got {found}");
                return Err(SourceError::Corrupt { file: "the manifest".to_owned(), reason });
            }
        }
        Ok(manifest)
    }

    /// Whether contents can be read from their middle on, as far as is known.
    pub fn seeks(&self) -> bool {
        self.seeks.load(Ordering::Relaxed)
    }

    /// Bytes of a content. Nobody has verified them.
    ///
    /// # Errors
    /// As for `digest`.
    pub async fn blob(&self, digest: &str, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let mut headers = HeaderMap::new();
        let wanted = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
        headers.extend(HeaderValue::try_from(wanted).map(|value| (header::RANGE, value)));
        let response = self.send(Method::GET, url, &headers).await?;
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let begins = |value: &HeaderValue| {
                    value.to_str().ok()?.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok()
                };
                match response.headers().get(header::CONTENT_RANGE).and_then(begins) {
                    Some(start) if start == range.start => 0,
                    start => {
                        return Err(self.senseless(format!("asked for {range:?} it sends what begins at {start:?}")));
                    }
                }
            }
            // A registry need not know ranges; then it sends everything from the beginning.
            StatusCode::OK => {
                self.seeks.store(false, Ordering::Relaxed);
                range.start
            }
            _ => return Err(self.failure(response, digest).await),
        };
        // Whoever reads counts, but need not be sent what lies after the range.
        let mut left = if response.status() == StatusCode::OK { range.end - range.start } else { u64::MAX };
        let place = self.place.clone();
        let cut = move |piece: reqwest::Result<Bytes>| {
            if left == 0 {
                return None;
            }
            let failed = |error: reqwest::Error| SourceError::Unavailable {
                place: place.clone(),
                reason: abridge(&chain(&error.without_url())),
            };
            Some(piece.map_err(failed).map(|mut piece| {
                let passed = piece.len().min(usize::try_from(skip).unwrap_or(usize::MAX));
                skip -= passed as u64;
                drop(piece.split_to(passed));
                piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                left -= piece.len() as u64;
                piece
            }))
        };
        Ok(Box::pin(response.bytes_stream().map_while(cut)))
    }

    /// Sends a request, with what proves who asks when the registry wants to know.
    async fn send(&self, method: Method, url: Url, headers: &HeaderMap) -> Result<Response, SourceError> {
        let response = self.follow(&method, url.clone(), headers).await?;
        if response.status() != StatusCode::UNAUTHORIZED || response.url().origin() != self.base.origin() {
            return Ok(response);
        }
        let challenges: Vec<Challenge> = response
            .headers()
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(Challenge::read)
            .collect();
        let proof = self.answer(&challenges).await?;
        *self.proof.lock() = Some(proof);
        self.follow(&method, url, headers).await
    }

    /// Sends a request, and again to where it is sent.
    async fn follow(&self, method: &Method, mut url: Url, headers: &HeaderMap) -> Result<Response, SourceError> {
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client.request(method.clone(), url.clone()).headers(headers.clone());
            // Storage behind a registry has signed addresses, and no business with its logins.
            if url.origin() == self.base.origin()
                && let Some(proof) = self.proof()
            {
                request = request.header(header::AUTHORIZATION, proof);
            }
            let response = self.sent(request).await?;
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let Some(location) = location.filter(|_| response.status().is_redirection()) else { return Ok(response) };
            let next = url.join(location).ok().filter(|next| next.scheme() == "https" || next.scheme() == url.scheme());
            url = next.ok_or_else(|| self.senseless("it sends us on to where we do not go".to_owned()))?;
        }
        Err(self.senseless(format!("it sends us on more than {MAX_REDIRECTS} times")))
    }

    async fn sent(&self, request: reqwest::RequestBuilder) -> Result<Response, SourceError> {
        match timeout(ANSWER_TIMEOUT, request.send()).await {
            Ok(sent) => sent.map_err(|error| self.unavailable(chain(&error.without_url()))),
            Err(_) => Err(self.unavailable(format!("nothing in {ANSWER_TIMEOUT:?}"))),
        }
    }

    fn proof(&self) -> Option<HeaderValue> {
        let proof = self.proof.lock();
        let proof = proof.as_ref().filter(|proof| proof.until.is_none_or(|until| Instant::now() < until));
        proof.map(|proof| proof.value.clone())
    }

    /// What answers the registry's question who asks.
    async fn answer(&self, challenges: &[Challenge]) -> Result<Proof, SourceError> {
        let login = self.login()?;
        let find = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
        let Some(challenge) = find("bearer") else {
            let denied = |reason: &str| SourceError::Denied { place: self.place.clone(), reason: reason.to_owned() };
            let Some(_) = find("basic") else {
                return Err(denied("it wants a proof that is neither a login nor a token"));
            };
            let login = login.ok_or_else(|| {
                denied(
                    "it wants a login, and there is none in the source's URI nor for this host in Docker's config.json",
                )
            })?;
            return Ok(Proof { value: self.basic(&login)?, until: None });
        };
        let realm = challenge.parameter("realm").and_then(|realm| Url::parse(realm).ok());
        let is_safe = |realm: &Url| {
            let is_here = realm.host_str() == self.base.host_str();
            realm.scheme() == "https" || realm.scheme() == self.base.scheme() && (is_here || self.plain_realms)
        };
        let mut url = realm
            .filter(is_safe)
            .ok_or_else(|| self.senseless("it does not say where a token is to be had".to_owned()))?;
        let scope = challenge.parameter("scope").map(ToOwned::to_owned);
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        url.query_pairs_mut().extend_pairs(challenge.parameter("service").map(|service| ("service", service)));
        url.query_pairs_mut().append_pair("scope", &scope);
        let mut request = self.client.get(url);
        if let Some(login) = &login {
            request = request.header(header::AUTHORIZATION, self.basic(login)?);
        }
        let asked = Instant::now();
        let response = self.sent(request).await?;
        if !response.status().is_success() {
            return Err(self.failure(response, "a token").await);
        }
        let text = self.text(response, MAX_TEXT).await?;
        let none = || self.senseless("no token is in its answer".to_owned());
        let token: Token = serde_json::from_slice(&text).map_err(|_| none())?;
        let said = [token.token, token.access_token].into_iter().flatten().find(|said| !said.is_empty());
        let said = said.ok_or_else(none)?;
        let age = Duration::from_secs(token.expires_in.unwrap_or_default().max(TOKEN_AGE));
        let until = asked.checked_add(age.saturating_sub(TOKEN_MARGIN.min(age / 2)));
        Ok(Proof { value: self.secret(format!("Bearer {said}"))?, until })
    }

    /// Who we are here, by the URI or Docker's settings, which are read anew: secrets are changed under running servers.
    fn login(&self) -> Result<Option<(String, String)>, SourceError> {
        let Some(path) = self.settings.as_ref().filter(|_| self.login.is_none()) else { return Ok(self.login.clone()) };
        let wrong = |reason: String| SourceError::Denied {
            place: self.place.clone(),
            reason: format!("the login in {} cannot be read: {reason}", path.display()),
        };
        let text = match std::fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.len() > MAX_TEXT as u64 => {
                return Err(wrong(format!("it is over {MAX_TEXT} bytes")));
            }
            _ => std::fs::read(path).map_err(|error| wrong(error.to_string()))?,
        };
        // What serde says would quote the file.
        let settings: Settings =
            serde_json::from_slice(&text).map_err(|error| wrong(format!("line {}", error.line())))?;
        let Some(login) = settings.auths.iter().find(|(key, _)| self.is_named(key)).map(|(_, login)| login) else {
            return Ok(None);
        };
        if let (Some(user), Some(secret)) = (&login.username, &login.password) {
            return Ok(Some((user.clone(), secret.clone())));
        }
        // Empty where a program keeps the secret, which is not run.
        let Some(auth) = login.auth.as_ref().filter(|auth| !auth.is_empty()) else { return Ok(None) };
        let decoded = BASE64_STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let decoded = decoded.ok_or_else(|| wrong("auth is no base64".to_owned()))?;
        let (user, secret) = decoded.split_once(':').ok_or_else(|| wrong("auth has no colon".to_owned()))?;
        Ok(Some((user.to_owned(), secret.trim_end_matches('\0').to_owned())))
    }

    /// Whether a login's key means this registry: `host`, `https://host/v1/`.
    fn is_named(&self, key: &str) -> bool {
        let key = key.split_once("://").map_or(key, |(_, rest)| rest);
        let host = key.split('/').next().unwrap_or_default();
        host == self.host || (DOCKER.contains(&host) && DOCKER.contains(&self.host.as_str()))
    }

    fn basic(&self, (user, secret): &(String, String)) -> Result<HeaderValue, SourceError> {
        self.secret(format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{secret}"))))
    }

    fn secret(&self, text: String) -> Result<HeaderValue, SourceError> {
        let mut value =
            HeaderValue::try_from(text).map_err(|_| self.senseless("its token has odd letters".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn url(&self, path: &str) -> Result<Url, SourceError> {
        self.base.join(path).map_err(|error| self.senseless(error.to_string()))
    }

    fn sha256(&self, text: &str) -> Result<Digest, SourceError> {
        match Digest::parse(text) {
            Ok(digest @ Digest::Sha256(_)) => Ok(digest),
            _ => Err(self.senseless(format!("expected a digest sha256:…, got '{}'", abridge(text)))),
        }
    }

    /// The whole body of an answer.
    async fn text(&self, mut response: Response, most: usize) -> Result<Vec<u8>, SourceError> {
        let mut text = Vec::new();
        let reading = async {
            while let Some(piece) =
                response.chunk().await.map_err(|error| self.unavailable(chain(&error.without_url())))?
            {
                if text.len() + piece.len() > most {
                    return Err(self.senseless(format!("an answer has more than {most} bytes")));
                }
                text.extend_from_slice(&piece);
            }
            Ok(())
        };
        timeout(TEXT_TIMEOUT, reading)
            .await
            .map_err(|_| self.unavailable(format!("it takes over {TEXT_TIMEOUT:?}")))??;
        Ok(text)
    }

    /// What an answer means that is none to what was asked.
    async fn failure(&self, response: Response, what: &str) -> SourceError {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<One>,
        }
        #[derive(Deserialize)]
        struct One {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let status = response.status();
        let retry_after =
            response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let text = self.text(response, MAX_TEXT).await.unwrap_or_default();
        let said = serde_json::from_slice::<Errors>(&text).ok().and_then(|errors| errors.errors.into_iter().next());
        let reason = match said {
            Some(One { code, message }) => abridge(format!("{status}: {code} {message}").trim_end()),
            None => status.to_string(),
        };
        let place = self.place.clone();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => SourceError::Denied { place, reason },
            StatusCode::NOT_FOUND => SourceError::NotFound { place, what: format!("'{what}'") },
            StatusCode::TOO_MANY_REQUESTS => {
                SourceError::Limited { place, reason, retry_after: retry_after.map(Duration::from_secs) }
            }
            _ if status.is_client_error() => SourceError::Senseless { place, reason },
            _ => SourceError::Unavailable { place, reason },
        }
    }

    fn unavailable(&self, reason: String) -> SourceError {
        SourceError::Unavailable { place: self.place.clone(), reason: abridge(&reason) }
    }

    fn senseless(&self, reason: String) -> SourceError {
        SourceError::Senseless { place: self.place.clone(), reason: abridge(&reason) }
    }
}

fn accept() -> HeaderMap {
    HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(MANIFESTS))])
}
