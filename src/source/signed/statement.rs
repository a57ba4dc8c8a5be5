//! What a signature file says: a Sigstore bundle in JSON, and in its envelope the in-toto statement that is signed.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use crate::{
    error::{abridge, shorten},
    source::{Digest, digest},
};

const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const PAYLOAD: &str = "application/vnd.in-toto+json";
const STATEMENT: &str = "https://in-toto.io/Statement/v1";
const PREDICATE: &str = "https://model_signing/signature/v1.0";
/// What releases of the signing tool before 1.0 wrote.
const OLD_PREDICATE: &str = "https://model_signing/Digests/v0.1";
/// Certificates from the signer's to one that a root has issued; no chain is nearly as long.
const MAX_CHAIN: usize = 8;

/// A signature that nobody has verified yet.
pub struct Bundle {
    pub signed_by: SignedBy,
    /// Not to be read before the signature over it holds.
    payload: Vec<u8>,
    pub signature: Vec<u8>,
}

/// What the signature says of who made it.
pub enum SignedBy {
    /// SHA-256 of the public key's PEM, in hexadecimal, when it says.
    Key { hint: Option<String> },
    /// Certificates in DER, the signer's first.
    Certificates(Vec<Vec<u8>>),
}

/// The files that were signed.
#[derive(Debug, PartialEq, Eq)]
pub struct Statement {
    /// SHA-256 by path below the version's folder.
    pub files: BTreeMap<String, [u8; 32]>,
    pub allows_symlinks: bool,
    /// What the signer left out.
    pub ignored: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BundleDocument {
    media_type: String,
    verification_material: Material,
    dsse_envelope: Option<Envelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    public_key: Option<PublicKey>,
    #[serde(rename = "x509CertificateChain")]
    chain: Option<Chain>,
    certificate: Option<IgnoredAny>,
    tlog_entries: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
struct PublicKey {
    hint: Option<String>,
}

#[derive(Deserialize)]
struct Chain {
    certificates: Vec<Certificate>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    raw_bytes: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Deserialize)]
struct EnvelopeSignature {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatementDocument<'a> {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    predicate_type: String,
    #[serde(borrow)]
    predicate: &'a RawValue,
}

#[derive(Deserialize)]
struct Subject {
    digest: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Predicate {
    serialization: Serialization,
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
struct Serialization {
    method: String,
    hash_type: String,
    #[serde(default)]
    allow_symlinks: bool,
    #[serde(default)]
    ignore_paths: Vec<String>,
}

#[derive(Deserialize)]
struct Resource {
    name: String,
    algorithm: String,
    digest: String,
}

impl Bundle {
    /// # Errors
    /// In words: what it is not, and what was expected.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let document: BundleDocument =
            serde_json::from_slice(text).map_err(|error| in_words("it is no Sigstore bundle in JSON", &error))?;
        let BundleDocument { media_type, verification_material: material, dsse_envelope: envelope } = document;
        if material.certificate.is_some() || material.tlog_entries.is_some_and(|entries| !entries.is_empty()) {
            return Err("keyless signatures are not verified offline; sign with a key or certificate".to_owned());
        }
        if media_type != BUNDLE {
            return Err(format!("expected a bundle of type '{BUNDLE}', got '{}'", shorten(&media_type)));
        }
        let envelope = envelope.ok_or("expected a bundle with a dsseEnvelope")?;
        if envelope.payload_type != PAYLOAD {
            return Err(format!("expected a payload of type '{PAYLOAD}', got '{}'", shorten(&envelope.payload_type)));
        }
        let [signature] = envelope.signatures.as_slice() else {
            return Err(format!("expected one signature in its envelope, got {}", envelope.signatures.len()));
        };
        let signed_by = match (material.public_key, material.chain) {
            (Some(key), None) => SignedBy::Key { hint: key.hint.filter(|hint| !hint.is_empty()) },
            (None, Some(chain)) if (1..=MAX_CHAIN).contains(&chain.certificates.len()) => {
                let decoded = chain.certificates.iter().map(|certificate| decode("rawBytes", &certificate.raw_bytes));
                SignedBy::Certificates(decoded.collect::<Result<_, _>>()?)
            }
            (None, Some(chain)) => {
                return Err(format!("expected 1 to {MAX_CHAIN} certificates, got {}", chain.certificates.len()));
            }
            _ => return Err("expected either a publicKey or an x509CertificateChain".to_owned()),
        };
        let (payload, signature) = (decode("payload", &envelope.payload)?, decode("sig", &signature.sig)?);
        Ok(Self { signed_by, payload, signature })
    }

    /// What the signature is over.
    pub fn message(&self) -> Vec<u8> {
        let head = format!("DSSEv1 {} {PAYLOAD} {} ", PAYLOAD.len(), self.payload.len());
        [head.as_bytes(), &self.payload].concat()
    }

    /// What was signed, for whoever has verified that it was.
    ///
    /// # Errors
    /// In words: what is not as it should be.
    pub fn statement(&self) -> Result<Statement, String> {
        Statement::parse(&self.payload)
    }
}

impl Statement {
    fn parse(payload: &[u8]) -> Result<Self, String> {
        let document: StatementDocument =
            serde_json::from_slice(payload).map_err(|error| in_words("its payload is no statement", &error))?;
        if document.kind != STATEMENT {
            return Err(format!("expected a statement of type '{STATEMENT}', got '{}'", shorten(&document.kind)));
        }
        if document.predicate_type == OLD_PREDICATE {
            return Err("it is of a release of the signing tool before 1.0; sign it anew".to_owned());
        }
        if document.predicate_type != PREDICATE {
            let found = shorten(&document.predicate_type);
            return Err(format!("expected a predicate of type '{PREDICATE}', got '{found}'"));
        }
        let Predicate { serialization, resources } = serde_json::from_str(document.predicate.get())
            .map_err(|error| in_words("its statement has no such predicate", &error))?;
        if serialization.method != "files" {
            let found = shorten(&serialization.method);
            return Err(format!("its method is '{found}'; expected 'files': sign without shards"));
        }
        if serialization.hash_type != "sha256" {
            let found = shorten(&serialization.hash_type);
            return Err(format!("its hash_type is '{found}'; expected 'sha256'"));
        }
        let mut files = BTreeMap::new();
        let mut digests = Vec::with_capacity(resources.len());
        for Resource { name, algorithm, digest } in resources {
            let shown = shorten(&name);
            if !is_inside(&name) {
                return Err(format!("the path '{shown}' is none of a file below the version's folder"));
            }
            let Some(Digest::Sha256(sha256)) = Digest::from_hex(&algorithm, &digest) else {
                let found = shorten(&algorithm);
                return Err(format!(
                    "file '{shown}': expected a digest by sha256 in hexadecimal, got one by '{found}'"
                ));
            };
            digests.push(sha256);
            if files.insert(name, sha256).is_some() {
                return Err(format!("file '{shown}' is listed twice"));
            }
        }
        let [Subject { digest: subject }] = document.subject.as_slice() else {
            return Err(format!("expected one subject, got {}", document.subject.len()));
        };
        let (expected, found) = (subject.get("sha256"), digest::of_digests(&digests));
        let is_same = |expected: &String| Digest::from_hex("sha256", expected) == Some(found);
        if !expected.is_some_and(is_same) {
            let expected = expected.map_or("none".to_owned(), |digest| shorten(digest));
            return Err(format!("its subject's digest is {expected}, and its files come to {}", found.hex()));
        }
        Ok(Self { files, allows_symlinks: serialization.allow_symlinks, ignored: serialization.ignore_paths })
    }
}

/// Whether a path stays in its folder and is written in the one way that a listing of the folder has it.
fn is_inside(path: &str) -> bool {
    !path.contains('\\')
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// What is wrong with a document. Its reader quotes what it did not expect, however long that is.
fn in_words(what: &str, error: &serde_json::Error) -> String {
    format!("{what}: {}", abridge(&error.to_string()))
}

fn decode(what: &str, text: &str) -> Result<Vec<u8>, String> {
    STANDARD.decode(text).map_err(|error| format!("its {what} is not in base64: {error}"))
}
