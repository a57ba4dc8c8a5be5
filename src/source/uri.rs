//! Where models come from, as one writes it: `s3://bucket/models`, `mlflow://host:5000/iris@champion`, a path.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::SourceError;
use crate::error::shorten;

/// How a place is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// A folder on this machine.
    Folder,
    /// Amazon S3 and what speaks like it.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
    /// A web server that lists its folders as WebDAV has it.
    Http,
    Https,
    /// An MLflow tracking server over http.
    Mlflow,
    /// An MLflow tracking server over https.
    MlflowHttps,
    /// MLflow's own form, which leaves the server to `MLFLOW_TRACKING_URI`.
    Models,
    /// A repository of the Hugging Face Hub, or of what speaks like it.
    Hf,
    /// A registry of OCI artifacts and images, over http when it is on this machine, else over https.
    Oci,
    /// The same over http.
    OciHttp,
    /// A checkout with DVC's pointer files in it.
    Dvc,
}

/// Every scheme but that of folders, which goes without one.
const SCHEMES: [(&str, Scheme); 12] = [
    ("s3", Scheme::S3),
    ("gs", Scheme::Gs),
    ("az", Scheme::Az),
    ("http", Scheme::Http),
    ("https", Scheme::Https),
    ("mlflow", Scheme::Mlflow),
    ("mlflow+https", Scheme::MlflowHttps),
    ("models", Scheme::Models),
    ("hf", Scheme::Hf),
    ("oci", Scheme::Oci),
    ("oci+http", Scheme::OciHttp),
    ("dvc", Scheme::Dvc),
];

/// A place, parsed as far as all schemes agree.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SourceUri {
    scheme: Scheme,
    /// What credentials stand before the authority: `user:secret`.
    login: Option<String>,
    /// What follows the scheme and the login, without slashes at its end.
    rest: String,
}

impl SourceUri {
    /// # Errors
    /// `Uri` when the scheme is unknown, nothing follows it, or it has a query or fragment that nothing would read.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let wrong = |reason: String| SourceError::Uri(format!("source '{}': {reason}", shorten(&masked(text))));
        if text.is_empty() {
            return Err(wrong("expected a path or a URI such as s3://bucket/models".to_owned()));
        }
        let Some((name, rest)) = split(text) else {
            return Ok(Self { scheme: Scheme::Folder, login: None, rest: text.to_owned() });
        };
        let lowered = name.to_ascii_lowercase();
        let Some((_, scheme)) = SCHEMES.iter().find(|(known, _)| *known == lowered) else {
            let known: Vec<String> = SCHEMES.iter().map(|(name, _)| format!("{name}:")).collect();
            return Err(wrong(format!("scheme '{name}' is not known; expected a path, or one of {}", known.join(" "))));
        };
        let is_web = matches!(
            scheme,
            Scheme::Http | Scheme::Https | Scheme::Mlflow | Scheme::MlflowHttps | Scheme::Oci | Scheme::OciHttp
        );
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        // An `@` after the first slash is an alias, not a login.
        let (login, rest) = match authority.rsplit_once('@') {
            Some((login, _)) if is_web => (Some(login.to_owned()), &rest[login.len() + 1..]),
            _ => (None, rest),
        };
        let is_bucket = matches!(scheme, Scheme::S3 | Scheme::Gs | Scheme::Az);
        // A repository without an organization may have its revision here; tokens are known by how they begin.
        let is_token = *scheme == Scheme::Hf && authority.contains('@') && authority.starts_with("hf_");
        if is_bucket && authority.contains('@') || is_token || *scheme == Scheme::Hf && authority.contains(':') {
            return Err(wrong("credentials are taken from the environment only".to_owned()));
        }
        // The secret of a login that has a slash in it would be part of the path, and shown.
        let port = |host: &str| host.rsplit_once(':').map(|(_, port)| port.bytes().all(|digit| digit.is_ascii_digit()));
        if is_web && path.contains('@') && login.is_none() && port(authority) == Some(false) {
            return Err(SourceError::Uri("source: a slash in a login must be written as %2F".to_owned()));
        }
        let rest = rest.trim_end_matches('/');
        if *scheme == Scheme::Dvc && rest.split_once('#').is_none_or(|(path, file)| path.is_empty() || file.is_empty())
        {
            return Err(wrong(
                "expected a checkout and a file in it, as in dvc://path/to/checkout#iris.onnx.dvc".to_owned(),
            ));
        }
        if rest.is_empty() || (!matches!(scheme, Scheme::Models | Scheme::Dvc) && rest.starts_with('/')) {
            return Err(wrong(match scheme {
                Scheme::Models => "expected a model's name after 'models:/'".to_owned(),
                Scheme::S3 | Scheme::Gs | Scheme::Az => format!("expected a bucket after '{name}://'"),
                Scheme::Hf => "expected a repository, such as hf://org/name or hf://org/name@revision".to_owned(),
                _ => format!("expected a host after '{name}://'"),
            }));
        }
        let unread: &[char] = if *scheme == Scheme::Dvc { &['?'] } else { &['?', '#'] };
        if path.contains(unread) || authority.contains(unread) {
            return Err(wrong("a query or fragment is not read here; write ? and # as %3F and %23".to_owned()));
        }
        if rest.chars().any(|letter| letter.is_control() || letter == ' ') {
            return Err(wrong("spaces and control characters must be percent-encoded".to_owned()));
        }
        Ok(Self { scheme: *scheme, login, rest: rest.to_owned() })
    }

    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The folder, when it is one on this machine.
    pub fn folder(&self) -> Option<PathBuf> {
        (self.scheme == Scheme::Folder).then(|| PathBuf::from(&self.rest))
    }

    /// The bucket, the host and its port, or the checkout.
    pub fn authority(&self) -> &str {
        if let Some((checkout, _)) = self.checkout() {
            return checkout;
        }
        self.rest.split_once('/').map_or(self.rest.as_str(), |(authority, _)| authority)
    }

    /// What follows the authority, without slashes around it; as it was written, so percent-encoded.
    pub fn path(&self) -> &str {
        self.rest.split_once('/').map_or("", |(_, path)| path.trim_start_matches('/'))
    }

    /// The checkout and the file in it, when it is one of DVC's; as they were written, so percent-encoded.
    pub fn checkout(&self) -> Option<(&str, &str)> {
        self.rest.split_once('#').filter(|_| self.scheme == Scheme::Dvc)
    }

    /// The user and the secret of `user:secret@host`, as they were written.
    pub fn login(&self) -> Option<(&str, &str)> {
        self.login.as_deref().map(|login| login.split_once(':').unwrap_or((login, "")))
    }
}

impl<'de> Deserialize<'de> for SourceUri {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// As it may be shown.
impl Serialize for SourceUri {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Without the login: this is what status, log and file names are made of.
impl fmt::Display for SourceUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SCHEMES.iter().find(|(_, scheme)| *scheme == self.scheme) {
            Some((name, Scheme::Models)) => write!(f, "{name}:/{}", self.rest),
            Some((name, _)) => write!(f, "{name}://{}", self.rest),
            None => f.write_str(&self.rest),
        }
    }
}

impl fmt::Debug for SourceUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SourceUri({self})")
    }
}

/// A scheme and what follows it. `models:/` has one slash; a path that has a colon in it is a path.
fn split(text: &str) -> Option<(&str, &str)> {
    if let Some(rest) = text.strip_prefix("models:/") {
        return Some(("models", rest.trim_start_matches('/')));
    }
    let (name, rest) = text.split_once("://")?;
    let is_name = name.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    is_name.then_some((name, rest))
}

/// The text without what may be a secret: before an `@` of the authority, and in a query.
fn masked(text: &str) -> String {
    let Some((name, rest)) = split(text) else { return text.to_owned() };
    let (text, rest) = match text.split_once('?') {
        Some((before, _)) => (before, rest.split('?').next().unwrap_or_default()),
        None => (text, rest),
    };
    let authority = rest.split('/').next().unwrap_or_default();
    match authority.rsplit_once('@') {
        Some((login, _)) => format!("{name}://{}", &rest[login.len() + 1..]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> (Scheme, String, String) {
        let uri = SourceUri::parse(text).unwrap();
        (uri.scheme(), uri.authority().to_owned(), uri.path().to_owned())
    }

    #[test]
    fn places_have_a_scheme_an_authority_and_a_path() {
        let of = |scheme, authority: &str, path: &str| (scheme, authority.to_owned(), path.to_owned());
        assert_eq!(parts("s3://bucket/team/models/"), of(Scheme::S3, "bucket", "team/models"));
        assert_eq!(parts("GS://bucket"), of(Scheme::Gs, "bucket", ""));
        assert_eq!(parts("https://host:8443/a%20b"), of(Scheme::Https, "host:8443", "a%20b"));
        assert_eq!(parts("mlflow://host:5000/iris@champion"), of(Scheme::Mlflow, "host:5000", "iris@champion"));
        assert_eq!(parts("mlflow+https://host/iris/3"), of(Scheme::MlflowHttps, "host", "iris/3"));
        assert_eq!(parts("hf://acme/iris@refs/pr/1"), of(Scheme::Hf, "acme", "iris@refs/pr/1"));
        assert_eq!(parts("hf://gpt2@main"), of(Scheme::Hf, "gpt2@main", ""));
        assert_eq!(parts("oci://host:5000/team/iris:v3"), of(Scheme::Oci, "host:5000", "team/iris:v3"));
        assert_eq!(parts("oci+http://host/iris@sha256:0"), of(Scheme::OciHttp, "host", "iris@sha256:0"));
        let checkout = SourceUri::parse("dvc:///srv/models#sub/iris.onnx.dvc").unwrap();
        assert_eq!(checkout.checkout(), Some(("/srv/models", "sub/iris.onnx.dvc")));
        assert_eq!(checkout.to_string(), "dvc:///srv/models#sub/iris.onnx.dvc");
        assert_eq!(SourceUri::parse("dvc://.#a.dvc").unwrap().checkout(), Some((".", "a.dvc")));
        assert_eq!(SourceUri::parse("models:/iris@champion").unwrap().to_string(), "models:/iris@champion");
        assert_eq!(SourceUri::parse("./models:/here").unwrap().folder(), Some("./models:/here".into()));
        assert_eq!(SourceUri::parse("a/b").unwrap().folder(), Some("a/b".into()));
        assert_eq!(SourceUri::parse("s3://a").unwrap().folder(), None);
    }

    #[test]
    fn a_login_shows_nowhere() {
        let uri = SourceUri::parse("https://ada:s3cr@t@host/models").unwrap();
        assert_eq!(uri.login(), Some(("ada", "s3cr@t")));
        assert_eq!((uri.authority(), uri.to_string()), ("host", "https://host/models".to_owned()));
        assert!(!format!("{uri:?}").contains("s3cr"));
        let error = SourceUri::parse("https://ada:s3cr@host/?x").unwrap_err();
        assert!(!error.to_string().contains("s3cr"), "{error}");
        assert_eq!(SourceUri::parse("mlflow://host/iris@champion").unwrap().login(), None);
    }

    #[test]
    fn what_nothing_reads_is_refused_in_words() {
        let said = |text: &str| SourceUri::parse(text).unwrap_err().to_string();
        assert!(said("").contains("expected a path"));
        assert!(said("ftp://host/models").contains("scheme 'ftp' is not known; expected a path, or one of s3:"));
        assert!(said("s3://").contains("expected a bucket"));
        assert!(said("s3:///models").contains("expected a bucket"));
        assert!(said("https://").contains("expected a host"));
        assert!(said("models:/").contains("expected a model's name"));
        assert!(said("https://host/models?token=1").contains("a query or fragment"));
        assert!(!said("https://host/models?token=SECRET").contains("SECRET"));
        assert!(said("dvc://checkout").contains("as in dvc://path/to/checkout#iris.onnx.dvc"));
        assert!(said("dvc://#a.dvc").contains("expected a checkout"));
        assert!(said("oci://host/iris:v3#x").contains("a query or fragment"));
        assert!(said("s3://KEY:SECRET@bucket").contains("from the environment only"));
        assert!(!said("s3://KEY:SECRET@bucket").contains("SECRET"));
        assert!(said("hf://").contains("expected a repository"));
        for secret in ["hf://ada:SECRET@acme/iris", "hf://hf_SECRET@acme/iris"] {
            let error = said(secret);
            assert!(error.contains("from the environment only") && !error.contains("SECRET"), "{error}");
        }
        let error = said("https://ada:p/ss@host/models");
        assert!(error.contains("%2F") && !error.contains("ss@"), "{error}");
        assert!(SourceUri::parse("mlflow://host:5000/iris@champion").is_ok());
        assert!(said("s3://bucket/a b").contains("percent-encoded"));
    }
}
