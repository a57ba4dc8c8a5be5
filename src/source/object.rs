//! Object stores: `s3://`, `gs://` and `az://`, with credentials and endpoints from the environment that their own tools
//! read; and web servers, `http://` and `https://`, that list their folders as WebDAV has it (`PROPFIND`), with the login
//! that stands in the URI.

use std::{collections::BTreeSet, ops::Range, time::Duration};

use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, header};
use object_store::{
    BackoffConfig, ClientConfigKey, ClientOptions, Error, GetOptions, GetRange, ObjectMeta, ObjectStore,
    ObjectStoreExt, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    http::HttpBuilder,
    path::Path,
};
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use tokio_stream::StreamExt;

use super::{
    ByteStream, Look, RemoteFile, RemoteVersion, Scheme, Source, SourceError, SourceUri, chain, layout::Layout,
};
use crate::{
    error::{abridge, shorten},
    id::ModelName,
};

/// Objects below the prefix that a look reads, at 1000 to a call; more is taken for another bucket than was meant.
const MAX_OBJECTS: usize = 100_000;
/// Folders in folders, of web servers; more are taken for a link that leads back to where it is.
const MAX_DEPTH: usize = 32;
/// How long a request may take: a part of a file over a connection of 30 KB/s.
const TIMEOUT: &str = "10 minutes";
const CONNECT_TIMEOUT: &str = "5 seconds";
/// Without a byte.
const READ_TIMEOUT: &str = "30 seconds";
/// Objects are written one by one, so a version is taken when it has not changed for so long.
const SETTLE_TIME: Duration = Duration::from_secs(2);

/// What comes before the status of an answer in the text of an error.
const STATUS: &str = "Server returned non-2xx status code: ";
/// What stands in answers to logins that were good once.
const EXPIRED: [&str; 3] = ["ExpiredToken", "InvalidToken", "TokenRefreshRequired"];

/// What a pin begins with that is no tag, of stores that have none: they cannot be asked for it either.
const WRITTEN: &str = "written ";

/// A prefix of a bucket.
pub struct Bucket {
    uri: SourceUri,
    store: Box<dyn ObjectStore>,
    prefix: Path,
    /// What the last look has seen.
    seen: Mutex<Layout>,
}

impl Bucket {
    /// # Errors
    /// `Uri` when the environment's settings for such a store do not do, or the prefix is none.
    pub fn open(uri: &SourceUri) -> Result<Self, SourceError> {
        Self::of_account(uri, None)
    }

    /// The same of an `account` of Azure, when somebody else than the environment names it.
    ///
    /// # Errors
    /// As for `open`; `Uri` too when the environment names another account, whose credentials it has.
    pub fn of_account(uri: &SourceUri, account: Option<&str>) -> Result<Self, SourceError> {
        let wrong = |reason: String| SourceError::Uri(format!("source '{uri}': {reason}"));
        let name = uri.authority();
        let store = match uri.scheme() {
            Scheme::S3 => {
                let builder = AmazonS3Builder::from_env().with_bucket_name(name).with_retry(retries());
                timeouts()
                    .into_iter()
                    .fold(builder, |builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value))
                    .build()
                    .map(|store| Box::new(store) as Box<dyn ObjectStore>)
            }
            Scheme::Gs => {
                let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(name).with_retry(retries());
                timeouts()
                    .into_iter()
                    .fold(builder, |builder, (key, value)| builder.with_config(GoogleConfigKey::Client(key), value))
                    .build()
                    .map(|store| Box::new(store) as Box<dyn ObjectStore>)
            }
            Scheme::Az => {
                let builder = of_account(MicrosoftAzureBuilder::from_env(), account).map_err(wrong)?;
                let builder = builder.with_container_name(name).with_retry(retries());
                timeouts()
                    .into_iter()
                    .fold(builder, |builder, (key, value)| builder.with_config(AzureConfigKey::Client(key), value))
                    .build()
                    .map(|store| Box::new(store) as Box<dyn ObjectStore>)
            }
            Scheme::Http | Scheme::Https => {
                let options = timeouts()
                    .into_iter()
                    .fold(ClientOptions::new(), |options, (key, value)| options.with_config(key, value))
                    .with_allow_http(uri.scheme() == Scheme::Http)
                    .with_default_headers(login(uri).map_err(wrong)?);
                let scheme = if uri.scheme() == Scheme::Http { "http" } else { "https" };
                HttpBuilder::new()
                    .with_url(format!("{scheme}://{name}"))
                    .with_client_options(options)
                    .with_retry(retries())
                    .build()
                    .map(|store| Box::new(store) as Box<dyn ObjectStore>)
            }
            _ => return Err(wrong("it is no object store".to_owned())),
        };
        let store = store.map_err(|error| wrong(chain(&error)))?;
        let path = percent_decode_str(uri.path()).decode_utf8().map_err(|error| wrong(error.to_string()))?;
        let prefix = Path::parse(path.as_ref()).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { uri: uri.clone(), store, prefix, seen: Mutex::default() })
    }

    /// The name of the model when the prefix holds a single one.
    fn single(&self) -> &str {
        self.prefix.as_ref().rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(self.uri.authority())
    }

    fn failed(&self, error: &Error, what: &str) -> SourceError {
        let text = chain(error);
        let (place, reason) = (self.uri.to_string(), abridge(&said(&text)));
        match error {
            Error::NotFound { .. } => SourceError::NotFound { place, what: what.to_owned() },
            Error::Precondition { .. } => SourceError::Changed { what: what.to_owned() },
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => SourceError::Denied { place, reason },
            Error::InvalidPath { .. } => SourceError::Senseless { place, reason },
            // Of a list, which has no kind of its own.
            _ => match status(&text) {
                Some(401 | 403) => SourceError::Denied { place, reason },
                Some(404) => SourceError::NotFound { place, what: what.to_owned() },
                _ => SourceError::Unavailable { place, reason },
            },
        }
    }

    /// Everything below the prefix.
    async fn objects(&self) -> Result<Vec<ObjectMeta>, SourceError> {
        let failed = |error: Error| self.failed(&error, self.uri.authority());
        let too_many = || SourceError::Senseless {
            place: self.uri.to_string(),
            reason: format!("there are more than {MAX_OBJECTS} objects below it"),
        };
        let mut objects = Vec::new();
        if !matches!(self.uri.scheme(), Scheme::Http | Scheme::Https) {
            let mut listed = self.store.list(Some(&self.prefix));
            while let Some(object) = listed.next().await {
                objects.push(object.map_err(failed)?);
                if objects.len() > MAX_OBJECTS {
                    return Err(too_many());
                }
            }
            return Ok(objects);
        }
        // Many web servers list one folder at a time, and no more.
        let (mut folders, mut seen) = (vec![self.prefix.clone()], 0);
        let depth = |folder: &Path| folder.parts().count() - self.prefix.parts().count();
        while let Some(folder) = folders.pop() {
            if depth(&folder) > MAX_DEPTH {
                let reason =
                    format!("folders lie more than {MAX_DEPTH} deep in each other: {}", shorten(folder.as_ref()));
                return Err(SourceError::Senseless { place: self.uri.to_string(), reason });
            }
            let listed = self.store.list_with_delimiter(Some(&folder)).await.map_err(failed)?;
            let inside = |other: &Path| other.prefix_match(&folder).is_some_and(|mut parts| parts.next().is_some());
            folders.extend(listed.common_prefixes.into_iter().filter(inside));
            objects.extend(listed.objects);
            seen += 1;
            if objects.len() + folders.len() + seen > MAX_OBJECTS {
                return Err(too_many());
            }
        }
        Ok(objects)
    }

    /// The files below the prefix, their paths beginning there.
    pub async fn files(&self) -> Result<Vec<RemoteFile>, SourceError> {
        let objects = self.objects().await?;
        Ok(without_folders(objects.into_iter().filter_map(|object| self.file(object)).collect()))
    }

    /// The object of a path below the prefix, for those who know where it is.
    ///
    /// # Errors
    /// When it is not there, or the store does not answer.
    pub async fn find(&self, path: &str) -> Result<RemoteFile, SourceError> {
        let wrong = |error: object_store::path::Error| SourceError::Senseless {
            place: self.uri.to_string(),
            reason: error.to_string(),
        };
        let below = Path::parse(path).map_err(wrong)?;
        let location: Path = self.prefix.parts().chain(below.parts()).collect();
        let object = self.store.head(&location).await.map_err(|error| self.failed(&error, &format!("'{path}'")))?;
        let what = || SourceError::NotFound { place: self.uri.to_string(), what: format!("'{path}'") };
        self.file(object).ok_or_else(what)
    }

    /// An object as a file, its path beginning at the prefix.
    fn file(&self, object: ObjectMeta) -> Option<RemoteFile> {
        let parts: Vec<_> = object.location.prefix_match(&self.prefix)?.collect();
        let path = parts.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join("/");
        // Amazon's tag of what was written in one piece is its MD5, unless it is encrypted with keys of its own; it is
        // then another for each object. Tags of other stores tell when something was written.
        let is_md5 = |tag: &str| tag.len() == 32 && tag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let likeness = object.e_tag.as_deref().map(|tag| tag.trim_matches('"')).filter(|tag| is_md5(tag));
        let likeness = likeness.filter(|_| self.uri.scheme() == Scheme::S3).map(ToOwned::to_owned);
        Some(RemoteFile {
            path,
            size: object.size,
            digest: None,
            location: object.location.to_string(),
            pin: Some(object.e_tag.clone().unwrap_or_else(|| written(&object))),
            likeness,
        })
    }
}

#[async_trait]
impl Source for Bucket {
    fn uri(&self) -> &SourceUri {
        &self.uri
    }

    fn settle_time(&self) -> Duration {
        SETTLE_TIME
    }

    async fn look(&self) -> Result<Look, SourceError> {
        let layout = Layout::of(self.files().await?, self.single());
        let look = layout.look();
        *self.seen.lock() = layout;
        Ok(look)
    }

    async fn artifact(&self, model: &ModelName, version: &RemoteVersion) -> Result<Vec<RemoteFile>, SourceError> {
        let what = || SourceError::Changed { what: format!("version {} of model '{model}'", version.version) };
        self.seen.lock().artifact(model, version).cloned().ok_or_else(what)
    }

    async fn read(&self, file: &RemoteFile, range: Range<u64>) -> Result<ByteStream, SourceError> {
        let path = Path::parse(&file.location)
            .map_err(|error| SourceError::Refused { file: file.path.clone(), reason: error.to_string() })?;
        let is_tag = |pin: &&String| !pin.starts_with(WRITTEN);
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: file.pin.as_ref().filter(is_tag).cloned(),
            ..GetOptions::default()
        };
        let got = self.store.get_opts(&path, options).await.map_err(|error| self.failed(&error, &file.path))?;
        let (place, name) = (self.uri.to_string(), file.path.clone());
        let is_older = file.pin.as_ref().is_some_and(|pin| !is_tag(&pin) && *pin != written(&got.meta));
        if got.meta.size != file.size || is_older {
            return Err(SourceError::Changed { what: name });
        }
        Ok(Box::pin(got.into_stream().map(move |bytes| {
            bytes.map_err(|error| SourceError::Unavailable {
                place: place.clone(),
                reason: format!("while '{name}' was read: {}", abridge(&chain(&error))),
            })
        })))
    }
}

/// Looks into `account`, when one is named.
fn of_account(builder: MicrosoftAzureBuilder, account: Option<&str>) -> Result<MicrosoftAzureBuilder, String> {
    match (account, builder.get_config_value(&AzureConfigKey::AccountName)) {
        (Some(account), Some(known)) if account != known => Err(format!(
            "it is of the account '{account}', and the environment's credentials are for '{known}' \
             (AZURE_STORAGE_ACCOUNT_NAME)",
            account = shorten(account)
        )),
        (Some(account), None) => Ok(builder.with_account(account)),
        _ => Ok(builder),
    }
}

/// The status of the answer that an error's text is about: some errors say it nowhere else.
fn status(text: &str) -> Option<u16> {
    let (_, answer) = text.split_once(STATUS)?;
    let status = answer.get(..3)?.parse().ok()?;
    // Amazon's answer to a login of yesterday is none of those that mean a login.
    let has_ended = status == 400 && EXPIRED.iter().any(|code| answer.contains(code));
    Some(if has_ended { 401 } else { status })
}

/// An error's text; of one about a store's document, what this says in so many words.
fn said(text: &str) -> String {
    let words = || {
        let (_, answer) = text.split_once(STATUS)?;
        let (status, document) = answer.split_once(": ")?;
        let element = |name: &str| {
            let (_, rest) = document.split_once(&format!("<{name}>"))?;
            rest.split_once("</").map(|(inside, _)| inside)
        };
        Some(format!("{status}: {}: {}", element("Code")?, element("Message")?))
    };
    words().unwrap_or_else(|| text.to_owned())
}

/// What pins an object of a store without tags.
fn written(object: &ObjectMeta) -> String {
    format!("{WRITTEN}{}", object.last_modified.to_rfc3339())
}

/// What a web server wants to see of the URI's login.
fn login(uri: &SourceUri) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    if let Some((user, secret)) = uri.login() {
        let plain = |text| percent_decode_str(text).decode_utf8().map_err(|error| error.to_string());
        let login = BASE64_STANDARD.encode(format!("{}:{}", plain(user)?, plain(secret)?));
        let mut value = HeaderValue::try_from(format!("Basic {login}")).map_err(|error| error.to_string())?;
        value.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, value);
    }
    Ok(headers)
}

fn retries() -> RetryConfig {
    // Short: whoever follows tries again by himself, and says meanwhile that he does.
    RetryConfig { backoff: BackoffConfig::default(), max_retries: 2, retry_timeout: Duration::from_secs(20) }
}

fn timeouts() -> [(ClientConfigKey, &'static str); 3] {
    [
        (ClientConfigKey::Timeout, TIMEOUT),
        (ClientConfigKey::ConnectTimeout, CONNECT_TIMEOUT),
        (ClientConfigKey::ReadTimeout, READ_TIMEOUT),
    ]
}

/// Without the empty objects that stand for folders of the same name, as some tools make them.
fn without_folders(mut files: Vec<RemoteFile>) -> Vec<RemoteFile> {
    let mut folders = BTreeSet::new();
    for file in &files {
        folders.extend(file.path.match_indices('/').map(|(end, _)| file.path[..end].to_owned()));
    }
    files.retain(|file| file.size > 0 || !(file.path.is_empty() || folders.contains(&file.path)));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size: u64) -> RemoteFile {
        RemoteFile { path: path.into(), size, digest: None, location: path.into(), pin: None, likeness: None }
    }

    #[test]
    fn empty_objects_that_stand_for_folders_are_no_files() {
        let files = ["", "iris", "iris/1", "iris/1/model.onnx", "iris/1/empty"].map(|path| file(path, 0)).to_vec();
        let left: Vec<String> = without_folders(files).into_iter().map(|file| file.path).collect();
        assert_eq!(left, ["iris/1/model.onnx", "iris/1/empty"]);
        assert_eq!(without_folders(vec![file("a", 1), file("a/b", 1)]).len(), 2);
    }

    #[test]
    fn a_refused_list_is_told_from_a_store_that_is_away() {
        let bucket = Bucket::open(&SourceUri::parse("s3://bucket/models").unwrap()).unwrap();
        let failed = |said: &str| {
            let text = format!("Error performing GET http://host/ in 2ms - {said}");
            bucket.failed(&Error::Generic { store: "S3", source: text.into() }, "bucket")
        };
        let denied = |error: &SourceError| matches!(error, SourceError::Denied { .. });
        let away = |error: &SourceError| matches!(error, SourceError::Unavailable { .. });
        let refused = failed(&format!(
            "{STATUS}403 Forbidden: <Error><Code>AccessDenied</Code><Message>No way</Message><HostId>9Gjj</HostId></Error>"
        ));
        assert_eq!(refused.to_string(), "s3://bucket/models refuses: 403 Forbidden: AccessDenied: No way");
        assert!(denied(&refused) && denied(&failed(&format!("{STATUS}401 Unauthorized: "))));
        assert!(denied(&failed(&format!("{STATUS}400 Bad Request: <Code>ExpiredToken</Code>"))));
        assert!(away(&failed(&format!("{STATUS}400 Bad Request: <Code>InvalidArgument</Code>"))));
        assert!(away(&failed(&format!("{STATUS}503 Service Unavailable: "))));
        assert!(away(&failed("HTTP error: error sending request")));
        let missing = failed(&format!("{STATUS}404 Not Found: <Code>NoSuchBucket</Code>"));
        assert_eq!(missing.to_string(), "bucket is not at s3://bucket/models");
    }

    #[tokio::test]
    async fn folders_of_a_web_server_have_an_end() {
        let uri = SourceUri::parse("http://host/models").unwrap();
        let bucket = |depth: usize| {
            let store = object_store::memory::InMemory::new();
            let (inside, uri) = (format!("models/{}model.onnx", "a/".repeat(depth)), uri.clone());
            async move {
                store.put_opts(&Path::from(inside), "x".into(), object_store::PutOptions::default()).await.unwrap();
                let bucket =
                    Bucket { uri, store: Box::new(store), prefix: Path::from("models"), seen: Mutex::default() };
                bucket.objects().await
            }
        };
        assert_eq!(bucket(MAX_DEPTH).await.unwrap().len(), 1);
        let error = bucket(MAX_DEPTH + 1).await.unwrap_err().to_string();
        assert!(error.contains("makes no sense: folders lie more than 32 deep in each other: models/a/a/"), "{error}");
    }

    #[test]
    fn a_bucket_is_named_and_its_prefix_is_a_path() {
        let open = |text: &str| Bucket::open(&SourceUri::parse(text).unwrap());
        let bucket = open("s3://bucket/team%20a/iris").unwrap();
        assert_eq!((bucket.prefix.as_ref(), bucket.single()), ("team a/iris", "iris"));
        assert_eq!(open("s3://iris").unwrap().single(), "iris");
        let error = open("s3://bucket/a/%2e%2e/b").err().unwrap().to_string();
        assert!(error.starts_with("source 's3://bucket/a/%2e%2e/b': "), "{error}");
        assert!(open("mlflow://host/models").is_err());
    }

    #[test]
    fn an_account_is_the_one_that_is_named() {
        let environment = MicrosoftAzureBuilder::new;
        let account = |builder: MicrosoftAzureBuilder| builder.get_config_value(&AzureConfigKey::AccountName);
        assert_eq!(account(of_account(environment(), Some("acme")).unwrap()).as_deref(), Some("acme"));
        let other = || environment().with_account("other");
        assert_eq!(account(of_account(other(), None).unwrap()).as_deref(), Some("other"));
        assert_eq!(account(of_account(other(), Some("other")).unwrap()).as_deref(), Some("other"));
        let error = of_account(other(), Some("acme")).unwrap_err();
        assert!(error.contains("of the account 'acme', and the environment's credentials are for 'other'"), "{error}");
    }
}
