//! Signed models: whose signature a version's files must have, verified against them before any of them is opened.
//!
//! The signature is the one of OpenSSF's model signing: a Sigstore bundle in the version's folder, `model.sig`, over the
//! SHA-256 of every file, by a key or by a certificate; both hold without asking anybody (`statement`, `trust`). Each
//! file of the folder must be one that was signed, with the content that was signed, and none may be missing that could
//! be missed (`folder`). What the signer left out by name is refused like any other file that is not signed, since
//! anybody might have put it there, all but what version control keeps in a folder, which the server never opens, and
//! the settings of a model that is its own only version.
//!
//! No version's signature covers settings, labels and samples beside the versions: those of a folder are the operator's,
//! those of a mirror are whoever's may write at its place, also `model.toml` that was signed with a single model. Nor does
//! a signature say which model or version the files are: whoever may write there can put an old version, or another model
//! of the same signer, in a version's place. Models that must not be mistaken for each other have keys of their own.

mod der;
mod folder;
mod statement;
mod trust;

use std::{
    fs::{self, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
use rustix::fs::OFlags;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use folder::Seen;
use statement::Bundle;
use trust::Trust;

/// The signature, in a version's folder.
pub const SIGNATURE_FILE: &str = "model.sig";

/// Bytes of a signature; it takes some 200 for each file.
const MAX_SIGNATURE: u64 = 16 << 20;

/// Whose models are served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SignatureConfig {
    /// What becomes of versions without a signature that holds (OpenSSF model signing, the file `model.sig` in the
    /// version's folder): "off" (nobody looks), "warn" (they are served, with a warning) or "enforce" (they are not).
    pub policy: Policy,
    /// Whose signatures hold, for which models; the first entry counts that fits: `models` (a name, in which each `*`
    /// stands for any letters), `keys` (PEM files of public keys, ECDSA on P-256, P-384 or P-521), `certificates` (PEM
    /// files of authorities that issue signers' certificates), `identity` (an e-mail address, host or URI among the
    /// alternative names of the signer's certificate, or its common name) and `policy` for these models. The files are
    /// read at the start. With "enforce", models that no entry fits are not served.
    pub trusted: Vec<Trusted>,
}

/// Whose signatures hold for some models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Trusted {
    /// The models' name, in which each `*` stands for any letters, or none.
    pub models: String,
    /// What becomes of their versions; default: as of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// PEM files of public keys.
    #[serde(default)]
    pub keys: Vec<PathBuf>,
    /// PEM files of authorities.
    #[serde(default)]
    pub certificates: Vec<PathBuf>,
    /// Whom a signer's certificate must be of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
}

/// What becomes of versions without a signature that holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Nobody looks.
    #[default]
    Off,
    /// They are served, with a warning.
    Warn,
    /// They are not served.
    Enforce,
}

/// Why signatures cannot be verified as configured.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("signatures.trusted: {0}")]
pub struct TrustError(String);

/// The configuration, with the keys and certificates that it names.
pub struct Signatures {
    policy: Policy,
    trusted: Vec<(String, Policy, Arc<Trust>)>,
}

/// What is asked of one version's signature, and what was found.
#[derive(Clone)]
pub struct Check {
    policy: Policy,
    /// `None` when nobody is trusted for the model.
    trust: Option<Arc<Trust>>,
    found: Arc<Mutex<Option<Outcome>>>,
}

/// How a version's signature was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub state: State,
    /// What becomes of the version when it is not verified.
    pub policy: Policy,
    pub signer: Option<Signer>,
    /// Why it is not verified.
    pub reason: Option<String>,
    /// Whether the reason may pass while signature, files and trust stay what they are.
    pub passes: bool,
}

/// What a signature is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It holds, and the files are those that were signed.
    Verified,
    /// There is none.
    Unsigned,
    /// There is one, and it is not by somebody who is trusted, or not over these files.
    Refused,
}

/// Who made a signature that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// `key` or `certificate`.
    pub method: &'static str,
    /// SHA-256 of the key's PEM, in hexadecimal.
    pub key: Option<String>,
    /// The names in the signer's certificate.
    pub identity: Option<String>,
}

/// Why a signature does not hold.
#[derive(Debug)]
struct Refusal {
    reason: String,
    passes: bool,
}

/// Files that were verified, as they were then.
#[derive(Debug)]
pub struct Verified {
    files: PathBuf,
    seen: Seen,
}

impl Policy {
    pub fn as_str(self) -> &'static str {
        match self {
            Policy::Off => "off",
            Policy::Warn => "warn",
            Policy::Enforce => "enforce",
        }
    }
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Verified => "verified",
            State::Unsigned => "unsigned",
            State::Refused => "refused",
        }
    }
}

impl<T: Into<String>> From<T> for Refusal {
    fn from(reason: T) -> Self {
        Self { reason: reason.into(), passes: false }
    }
}

impl TrustError {
    fn new(file: &Path, what: &str) -> Self {
        Self(format!("{}: {what}", file.display()))
    }
}

impl Signatures {
    /// Reads the keys and certificates that the configuration names.
    ///
    /// # Errors
    /// Naming the file or the entry, and what was expected of it.
    pub fn open(config: &SignatureConfig) -> Result<Self, TrustError> {
        let mut trusted = Vec::with_capacity(config.trusted.len());
        for entry in &config.trusted {
            let Trusted { models, keys, certificates, identity, .. } = entry;
            let policy = entry.policy.unwrap_or(config.policy);
            let wrong = |what: &str| Err(TrustError(format!("the entry with models = \"{models}\" {what}")));
            if models.is_empty() {
                return wrong("fits no model; expected a name, or \"*\" for all");
            }
            if keys.is_empty() && certificates.is_empty() && policy != Policy::Off {
                return wrong("trusts nobody; expected keys or certificates, or policy = \"off\"");
            }
            if identity.is_some() && certificates.is_empty() {
                return wrong("has an identity, which is looked for in certificates only; expected certificates");
            }
            let trust = Trust::read(keys, certificates, identity.as_deref())?;
            trusted.push((models.clone(), policy, Arc::new(trust)));
        }
        Ok(Self { policy: config.policy, trusted })
    }

    /// What is asked of the versions of a model.
    pub fn check(&self, model: &str) -> Check {
        let entry = self.trusted.iter().find(|(pattern, ..)| fits(pattern, model));
        let (policy, trust) = entry.map_or((self.policy, None), |(_, policy, trust)| (*policy, Some(trust.clone())));
        Check { policy, trust, found: Arc::default() }
    }
}

impl Check {
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// How the signature was found, once that was looked at.
    pub fn found(&self) -> Option<Outcome> {
        self.found.lock().clone()
    }

    /// Takes back that the version is verified, for a `reason` that shows after its files were read.
    pub fn spoil(&self, reason: &str) {
        if let Some(found) = &mut *self.found.lock() {
            *found = Outcome { state: State::Refused, signer: None, reason: Some(reason.to_owned()), ..*found };
        }
    }

    /// Looks at the signature of the version in the folder `files`, and reads all of its files when it holds at the time
    /// `now`. Returns them when they are verified; what was found shows in `found`.
    pub fn run(&self, files: &Path, now: SystemTime) -> Option<Verified> {
        if self.policy == Policy::Off {
            return None;
        }
        let (state, result) = match read(&files.join(SIGNATURE_FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => (State::Unsigned, Err(self.unsigned().into())),
            Err(error) => (State::Refused, Err(folder::unread("it", &error))),
            Ok(signature) => (State::Refused, self.verify(&signature, files, now)),
        };
        let policy = self.policy;
        let (outcome, seen) = match result {
            Ok((signer, seen)) => {
                let (state, signer) = (State::Verified, Some(signer));
                (Outcome { state, policy, signer, reason: None, passes: false }, Some(seen))
            }
            Err(Refusal { reason, passes }) => {
                (Outcome { state, policy, signer: None, reason: Some(reason), passes }, None)
            }
        };
        *self.found.lock() = Some(outcome);
        seen.map(|seen| Verified { files: files.to_path_buf(), seen })
    }

    fn verify(&self, signature: &[u8], files: &Path, now: SystemTime) -> Result<(Signer, Seen), Refusal> {
        let trust = self.trust.as_ref().ok_or_else(nobody)?;
        let bundle = Bundle::parse(signature)?;
        let signer = trust.verify(&bundle, now)?;
        let seen = folder::compare(files, &bundle.statement()?)?;
        Ok((signer, seen))
    }

    fn unsigned(&self) -> String {
        if self.trust.is_none() {
            return nobody();
        }
        format!("there is none; expected the file {SIGNATURE_FILE} in the version's folder")
    }
}

impl Verified {
    /// Whether the signature covers the file at `path`.
    pub fn covers(&self, path: &Path) -> bool {
        let below = path.strip_prefix(&self.files).ok().and_then(Path::to_str);
        below.is_some_and(|below| self.seen.was_compared(below))
    }

    /// Whether the files are still those that were verified, of which some may have other names too by now where nobody
    /// but the server writes (`is_ours`). It costs a look at each, and no reading.
    pub fn still_holds(&self, is_ours: bool) -> bool {
        self.seen.still_holds(&self.files, is_ours)
    }
}

fn nobody() -> String {
    "no entry of signatures.trusted fits this model, so that nobody is trusted to sign it".to_owned()
}

/// The signature file at `path`, which anybody may have put there.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("expected a file"));
    }
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let mut bytes = Vec::new();
    if file.take(MAX_SIGNATURE + 1).read_to_end(&mut bytes)? as u64 > MAX_SIGNATURE {
        return Err(io::Error::other(format!("expected at most {} MiB", MAX_SIGNATURE >> 20)));
    }
    Ok(bytes)
}

/// Whether a name fits a pattern, in which each `*` stands for any letters, or none.
fn fits(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        // The first place where a part fits leaves the most for those that follow.
        let Some((_, after)) = name.split_once(part) else { return false };
        name = after;
    }
    name.ends_with(end)
}

#[cfg(test)]
pub mod tests;
