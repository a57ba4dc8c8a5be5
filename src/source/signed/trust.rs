//! Whom signatures are taken from: public keys, and authorities that issue signers' certificates.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use humantime_serde::re::humantime::format_rfc3339_seconds;
use rustls_pki_types::{
    CertificateDer, SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer, UnixTime, pem::PemObject,
};
use webpki::{
    ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, RawPublicKeyEntity, anchor_from_trusted_cert,
    aws_lc_rs::{ECDSA_P256_SHA256, ECDSA_P384_SHA384, ECDSA_P521_SHA512},
};

use super::{
    Refusal, Signer, TrustError,
    der::{self, Facts},
    statement::{Bundle, SignedBy},
};
use crate::{
    error::{abridge, shorten},
    source::Digest,
};

/// What the signing tool signs with, each curve with the one hash that it takes for it.
static ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 3] = [ECDSA_P256_SHA256, ECDSA_P384_SHA384, ECDSA_P521_SHA512];

/// The extended key usage `id-kp-codeSigning`.
static CODE_SIGNING: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x03];

/// Bytes of a file with keys or certificates.
const MAX_FILE: u64 = 1 << 20;

/// Whom the signatures of some models are taken from.
pub struct Trust {
    keys: Vec<Key>,
    roots: Vec<Root>,
    /// Whom a signer's certificate must be of.
    identity: Option<String>,
}

struct Key {
    info: SubjectPublicKeyInfoDer<'static>,
    /// As signatures name it.
    hint: String,
}

struct Root {
    certificate: CertificateDer<'static>,
    facts: Facts,
}

impl Trust {
    /// # Errors
    /// Naming the file, and what it should hold.
    pub fn read(keys: &[PathBuf], certificates: &[PathBuf], identity: Option<&str>) -> Result<Self, TrustError> {
        let mut trust = Self { keys: Vec::new(), roots: Vec::new(), identity: identity.map(str::to_owned) };
        for path in keys {
            trust.keys.extend(read_keys(path)?);
        }
        for path in certificates {
            trust.roots.extend(read_roots(path)?);
        }
        Ok(trust)
    }

    /// Verifies the signature over a bundle's payload as it stands at the time `now`.
    ///
    /// # Errors
    /// In words: what is wrong with it, or whom it would have to be from.
    pub fn verify(&self, bundle: &Bundle, now: SystemTime) -> Result<Signer, Refusal> {
        let message = bundle.message();
        match &bundle.signed_by {
            SignedBy::Key { hint } => Ok(self.verify_with_key(hint.as_deref(), &message, &bundle.signature)?),
            SignedBy::Certificates(chain) => self.verify_with_certificates(chain, &message, &bundle.signature, now),
        }
    }

    fn verify_with_key(&self, hint: Option<&str>, message: &[u8], signature: &[u8]) -> Result<Signer, String> {
        if self.keys.is_empty() {
            return Err("it is signed with a key, and no keys are trusted for this model".to_owned());
        }
        let named: Vec<&Key> = self.keys.iter().filter(|key| hint.is_none_or(|hint| key.hint == hint)).collect();
        if named.is_empty() {
            let trusted: Vec<&str> = self.keys.iter().map(|key| key.hint.as_str()).collect();
            let hint = shorten(hint.unwrap_or_default());
            return Err(format!("it is signed with the key {hint}; expected {}", abridge(&trusted.join(" or "))));
        }
        let holds = |key: &&&Key| {
            let Some(algorithm) = algorithm_of(&key.info) else { return false };
            RawPublicKeyEntity::try_from(&key.info)
                .is_ok_and(|entity| entity.verify_signature(algorithm, message, signature).is_ok())
        };
        match named.iter().find(holds) {
            Some(key) => Ok(Signer { method: "key", key: Some(key.hint.clone()), identity: None }),
            None => Err("the signature over its payload is not of the key that is trusted".to_owned()),
        }
    }

    fn verify_with_certificates(
        &self,
        chain: &[Vec<u8>],
        message: &[u8],
        signature: &[u8],
        now: SystemTime,
    ) -> Result<Signer, Refusal> {
        if self.roots.is_empty() {
            return Err("it is signed with a certificate, and no certificates are trusted for this model".into());
        }
        let chain: Vec<CertificateDer> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let [first, between @ ..] = chain.as_slice() else {
            return Err("it has no certificate of its signer".into());
        };
        let unread = || "the signer's certificate cannot be read".to_owned();
        let leaf = EndEntityCert::try_from(first)
            .map_err(|error| format!("{}: {}", unread(), abridge(&format!("{error:?}"))))?;
        let facts = Facts::read(first).ok_or_else(unread)?;
        let mut refused = None;
        for root in &self.roots {
            match root.vouches_for(&leaf, between, now) {
                Ok(()) => {
                    refused = None;
                    break;
                }
                // The root that has issued it knows best what is wrong.
                Err((webpki::Error::UnknownIssuer, reason)) => drop(refused.get_or_insert(reason.into())),
                // A machine may not know the time yet that has just been started.
                Err((error, reason)) => {
                    refused = Some(Refusal { reason, passes: matches!(error, webpki::Error::CertNotValidYet { .. }) });
                }
            }
        }
        if let Some(refusal) = refused {
            return Err(refusal);
        }
        if !facts.may_sign() {
            return Err("the signer's certificate is not for signatures (its key usage has no digitalSignature)".into());
        }
        let shown = abridge(&facts.names.join(", "));
        if let Some(identity) = &self.identity
            && !facts.names.contains(identity)
        {
            return Err(format!("the signer's certificate is of '{shown}'; expected '{identity}'").into());
        }
        let info = leaf.subject_public_key_info();
        let algorithm = algorithm_of(&info).ok_or(
            "the key of the signer's certificate is on no curve that models are signed with (P-256, 384, 521)",
        )?;
        leaf.verify_signature(algorithm, message, signature)
            .map_err(|_| "the signature over its payload is not of the certificate that it comes with")?;
        Ok(Signer { method: "certificate", key: None, identity: Some(shown) })
    }
}

impl Root {
    /// Whether it has issued a signer's certificate, itself or through authorities `between`, all of which hold `now`.
    fn vouches_for(
        &self,
        leaf: &EndEntityCert<'_>,
        between: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), (webpki::Error, String)> {
        let said = |error: webpki::Error| {
            let reason = in_words(&error);
            (error, reason)
        };
        let anchor = anchor_from_trusted_cert(&self.certificate).map_err(said)?;
        let in_unix = |time: SystemTime| {
            UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
        };
        let path = leaf
            .verify_for_usage(
                ALL_VERIFICATION_ALGS,
                std::slice::from_ref(&anchor),
                between,
                in_unix(now),
                KeyUsage::required_if_present(CODE_SIGNING),
                None,
                None,
            )
            .map_err(said)?;
        let refused = |reason: String| Err((webpki::Error::InvalidCertValidity, reason));
        if now < self.facts.not_before || now > self.facts.not_after {
            let Facts { not_before, not_after, .. } = self.facts;
            let [from, until] = [not_before, not_after].map(format_rfc3339_seconds);
            let reason = format!("the authority's own certificate is valid from {from} to {until} only");
            if now > not_after {
                return refused(reason);
            }
            let [time, not_before] = [now, not_before].map(in_unix);
            return Err((webpki::Error::CertNotValidYet { time, not_before }, reason));
        }
        let mut authorities = 0;
        for authority in path.intermediate_certificates() {
            authorities += 1;
            // Whether it is an authority at all has been checked.
            if !Facts::read(&authority.der()).is_some_and(|facts| facts.may_certify()) {
                return refused(
                    "an authority between is not for certificates (its key usage has no keyCertSign)".into(),
                );
            }
        }
        match self.facts.path_length {
            Some(most) if authorities > most => {
                refused(format!("{authorities} authorities stand between; the trusted one allows {most}"))
            }
            _ => Ok(()),
        }
    }
}

fn read_keys(path: &Path) -> Result<Vec<Key>, TrustError> {
    let pem = read(path)?;
    let wrong = |what: &str| Err(TrustError::new(path, what));
    let mut keys = Vec::new();
    for info in SubjectPublicKeyInfoDer::pem_slice_iter(&pem) {
        let Ok(info) = info else { return wrong("it is no PEM") };
        if algorithm_of(&info).is_none() || RawPublicKeyEntity::try_from(&info).is_err() {
            return wrong("expected a public key on one of the curves P-256, P-384 and P-521");
        }
        keys.push(Key { hint: hint(&info), info });
    }
    match keys.as_slice() {
        [] if memchr::memmem::find(&pem, b"PRIVATE KEY-----").is_some() => {
            wrong("it holds a private key, which belongs to who signs; expected the public one (BEGIN PUBLIC KEY)")
        }
        [] => wrong("expected a public key in PEM (BEGIN PUBLIC KEY)"),
        _ => Ok(keys),
    }
}

fn read_roots(path: &Path) -> Result<Vec<Root>, TrustError> {
    let pem = read(path)?;
    let wrong = |what: &str| Err(TrustError::new(path, what));
    let mut roots = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let Ok(certificate) = certificate else { return wrong("it is no PEM") };
        let Some(facts) = Facts::read(&certificate).filter(|_| anchor_from_trusted_cert(&certificate).is_ok()) else {
            return wrong("it holds a certificate that cannot be read");
        };
        if !facts.may_certify() {
            return wrong("expected certificates of authorities (basic constraints with CA:TRUE), not of signers");
        }
        roots.push(Root { certificate, facts });
    }
    if roots.is_empty() { wrong("expected certificates in PEM (BEGIN CERTIFICATE)") } else { Ok(roots) }
}

fn read(path: &Path) -> Result<Vec<u8>, TrustError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes));
    match read {
        Err(error) => Err(TrustError::new(path, &error.to_string())),
        Ok(size) if size as u64 > MAX_FILE => Err(TrustError::new(path, "it is larger than 1 MiB")),
        Ok(_) => Ok(bytes),
    }
}

/// The algorithm that models are signed by with such a key.
fn algorithm_of(info: &[u8]) -> Option<&'static dyn SignatureVerificationAlgorithm> {
    let algorithm = der::algorithm_of(info)?;
    ALGORITHMS.into_iter().find(|known| known.public_key_alg_id().as_ref() == algorithm)
}

/// What signatures call a key: SHA-256 of its PEM.
fn hint(info: &[u8]) -> String {
    let text = STANDARD.encode(info);
    let mut pem = "-----BEGIN PUBLIC KEY-----\n".to_owned();
    for (index, letter) in text.chars().enumerate() {
        if index > 0 && index % 64 == 0 {
            pem.push('\n');
        }
        pem.push(letter);
    }
    pem.push_str("\n-----END PUBLIC KEY-----\n");
    Digest::of(pem.as_bytes()).hex()
}

fn in_words(error: &webpki::Error) -> String {
    let shown = |time: &UnixTime| {
        format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs().min(MAX_SHOWN))).to_string()
    };
    match error {
        webpki::Error::CertExpired { not_after, .. } => {
            format!("a certificate of its chain has expired on {}", shown(not_after))
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            format!("a certificate of its chain is valid from {} on only", shown(not_before))
        }
        webpki::Error::UnknownIssuer => {
            "the signer's certificate does not come from an authority that is trusted for this model".to_owned()
        }
        webpki::Error::InvalidSignatureForPublicKey => {
            "a certificate of its chain is not signed with the key of the authority that it names".to_owned()
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            "a certificate of its chain is not for signing code (its extended key usage has no codeSigning)".to_owned()
        }
        webpki::Error::CaUsedAsEndEntity => "the signer's certificate is that of an authority".to_owned(),
        error => format!("the chain of its certificates does not hold: {}", abridge(&format!("{error:?}"))),
    }
}

/// The last second that a time can be written for.
const MAX_SHOWN: u64 = 253_402_300_799;
