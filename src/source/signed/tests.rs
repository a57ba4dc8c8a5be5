//! Signatures made here, with everything about them that can be wrong; the signing tool's own are in `tests/clients`.

use std::{collections::BTreeMap, os::unix::fs::symlink, time::Duration};

use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, KeyPair,
    },
};
use base64::{Engine, engine::general_purpose::STANDARD};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::source::{Digest, digest};

/// 2026-01-01T00:00:00Z.
const NOW: u64 = 1_767_225_600;
const DAY: u64 = 86_400;
const PAYLOAD: &str = "application/vnd.in-toto+json";

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// Waits for long enough that another change of a file has another time, on any kernel.
pub fn tick() {
    std::thread::sleep(Duration::from_millis(20));
}

struct Signing(EcdsaKeyPair);

impl Signing {
    fn new() -> Self {
        Self::on(&ECDSA_P256_SHA256_ASN1_SIGNING)
    }

    fn on(algorithm: &'static EcdsaSigningAlgorithm) -> Self {
        Self(EcdsaKeyPair::generate(algorithm).unwrap())
    }

    fn info(&self) -> Vec<u8> {
        let info: PublicKeyX509Der = self.0.public_key().as_der().unwrap();
        info.as_ref().to_vec()
    }

    fn pem(&self) -> String {
        pem("PUBLIC KEY", &self.info())
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }

    fn hint(&self) -> String {
        Digest::of(self.pem().as_bytes()).hex()
    }
}

fn pem(kind: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
}

/// A version's folder with files to sign.
pub struct Folder {
    home: TempDir,
    pub files: PathBuf,
}

impl Folder {
    /// One that is signed, and what is to find that it is.
    pub fn signed(policy: Policy) -> (Self, Check) {
        let (folder, key) = (Self::new(), Signing::new());
        folder.sign(&folder.statement(), &key);
        let keys = vec![folder.beside("key.pem", &key.pem())];
        let trusted = vec![Trusted { keys, policy: Some(policy), ..anybody() }];
        let check = Signatures::open(&SignatureConfig { policy, trusted }).unwrap().check("m");
        (folder, check)
    }

    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let folder = Self { files: home.path().join("1"), home };
        folder.write("model.onnx", "graph");
        folder.write("data/weights", "weights");
        folder
    }

    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.files.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn digests(&self) -> BTreeMap<String, String> {
        let (_, found) = folder::list(&self.files).unwrap();
        let of = |path: &String| Digest::of(&fs::read(self.files.join(path)).unwrap()).hex();
        found.keys().map(|path| (path.clone(), of(path))).collect()
    }

    /// The statement over the files as they are.
    fn statement(&self) -> Value {
        statement(&self.digests())
    }

    fn sign(&self, statement: &Value, key: &Signing) {
        self.write(SIGNATURE_FILE, bundle(statement, key, &json!({"publicKey": {"hint": key.hint()}})).to_string());
    }

    /// A file beside the version's folder.
    fn beside(&self, name: &str, content: &str) -> PathBuf {
        let path = self.home.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The trust in keys.
    fn trusting(&self, keys: &[&Signing]) -> Check {
        let pem: String = keys.iter().map(|key| key.pem()).collect();
        self.checked(Trusted { keys: vec![self.beside("keys.pem", &pem)], ..anybody() })
    }

    fn checked(&self, entry: Trusted) -> Check {
        Signatures::open(&SignatureConfig { policy: Policy::Enforce, trusted: vec![entry] }).unwrap().check("m")
    }

    fn run(&self, check: &Check) -> Result<Signer, String> {
        let verified = check.run(&self.files, at(NOW));
        let outcome = check.found().unwrap();
        assert_eq!(verified.is_some(), outcome.state == State::Verified);
        outcome.signer.ok_or_else(|| outcome.reason.unwrap())
    }

    /// Why the version is refused whose signature is of the only key that is trusted.
    fn refusal(&self, key: &Signing) -> String {
        self.run(&self.trusting(&[key])).unwrap_err()
    }
}

fn anybody() -> Trusted {
    Trusted { models: "*".to_owned(), policy: None, keys: vec![], certificates: vec![], identity: None }
}

/// As the signing tool writes it.
fn statement(digests: &BTreeMap<String, String>) -> Value {
    let resource = |(name, digest): (&String, &String)| json!({"name": name, "algorithm": "sha256", "digest": digest});
    let bytes = |digest: &String| match Digest::from_hex("sha256", digest) {
        Some(Digest::Sha256(bytes)) => bytes,
        _ => [0; 32],
    };
    let root = digest::of_digests(&digests.values().map(bytes).collect::<Vec<_>>()).hex();
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "1", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "resources": digests.iter().map(resource).collect::<Vec<_>>(),
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": false,
                "ignore_paths": [".git", ".gitattributes", ".github", ".gitignore", "model.sig"],
            },
        },
    })
}

fn bundle(statement: &Value, key: &Signing, material: &Value) -> Value {
    let payload = statement.to_string();
    let message = format!("DSSEv1 {} {PAYLOAD} {} {payload}", PAYLOAD.len(), payload.len());
    json!({
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": material,
        "dsseEnvelope": {
            "payload": STANDARD.encode(&payload),
            "payloadType": PAYLOAD,
            "signatures": [{"sig": STANDARD.encode(key.sign(message.as_bytes())), "keyid": ""}],
        },
    })
}

#[test]
fn a_signature_by_a_trusted_key_holds_on_every_curve() {
    for curve in [&ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P384_SHA384_ASN1_SIGNING, &ECDSA_P521_SHA512_ASN1_SIGNING] {
        let (folder, key) = (Folder::new(), Signing::on(curve));
        folder.sign(&folder.statement(), &key);
        let signer = folder.run(&folder.trusting(&[&Signing::new(), &key])).unwrap();
        assert_eq!(signer, Signer { method: "key", key: Some(key.hint()), identity: None });
        // Older signatures do not say whose they are.
        let unnamed = bundle(&folder.statement(), &key, &json!({"publicKey": {}, "tlogEntries": []}));
        folder.write(SIGNATURE_FILE, unnamed.to_string());
        assert!(folder.run(&folder.trusting(&[&Signing::new(), &key])).is_ok());
    }
}

#[test]
fn what_is_signed_by_nobody_trusted_is_refused() {
    let (folder, key, other) = (Folder::new(), Signing::new(), Signing::new());
    folder.sign(&folder.statement(), &key);
    let reason = folder.refusal(&other);
    assert_eq!(reason, format!("it is signed with the key {}; expected {}", key.hint(), other.hint()));
    // Who claims another's key has not its signature.
    let claimed = bundle(&folder.statement(), &key, &json!({"publicKey": {"hint": other.hint()}}));
    folder.write(SIGNATURE_FILE, claimed.to_string());
    assert_eq!(folder.refusal(&other), "the signature over its payload is not of the key that is trusted");
    let nobody = Signatures::open(&SignatureConfig { policy: Policy::Warn, trusted: vec![] }).unwrap().check("m");
    assert!(folder.run(&nobody).unwrap_err().contains("no entry of signatures.trusted fits this model"));
    assert_eq!(nobody.found().unwrap().state, State::Refused);
}

#[test]
fn an_unsigned_version_is_told_from_a_refused_one() {
    let (folder, key) = (Folder::new(), Signing::new());
    let check = folder.trusting(&[&key]);
    assert!(folder.run(&check).unwrap_err().contains("expected the file model.sig"));
    assert_eq!(check.found().unwrap().state, State::Unsigned);
    fs::create_dir(folder.files.join(SIGNATURE_FILE)).unwrap();
    let check = folder.trusting(&[&key]);
    assert!(folder.run(&check).unwrap_err().contains("expected a file"));
    assert_eq!(check.found().unwrap().state, State::Refused);
    let off = Signatures::open(&SignatureConfig::default()).unwrap().check("m");
    assert!(off.run(&folder.files, at(NOW)).is_none() && off.found().is_none());
}

#[test]
fn every_file_must_be_what_was_signed() {
    let (folder, key) = (Folder::new(), Signing::new());
    folder.sign(&folder.statement(), &key);
    let digests = folder.digests();
    folder.write("data/weights", "WEIGHTS");
    let reason = folder.refusal(&key);
    assert!(reason.starts_with("file 'data/weights' is not what was signed: expected sha256:"), "{reason}");
    assert!(reason.contains(&digests["data/weights"]) && reason.contains(&Digest::of(b"WEIGHTS").hex()), "{reason}");
    folder.write("data/weights", "weights");
    for path in ["extra.bin", "data/config.pbtxt", "golden.json", "data/model.sig", ".gitmodules", "deep/.git"] {
        folder.write(path, "x");
        let reason = folder.refusal(&key);
        assert_eq!(reason, format!("file '{path}' is not among the files that were signed (nobody has)"));
        fs::remove_file(folder.files.join(path)).unwrap();
    }
    folder.write(".git/config", "x");
    symlink("nowhere", folder.files.join(".gitignore")).unwrap();
    assert!(folder.run(&folder.trusting(&[&key])).is_ok());
    fs::remove_file(folder.files.join("data/weights")).unwrap();
    assert_eq!(folder.refusal(&key), "file 'data/weights' was signed and is missing");
}

#[test]
fn settings_of_a_model_that_is_its_only_version_need_no_signature() {
    let (folder, key) = (Folder::new(), Signing::new());
    folder.sign(&folder.statement(), &key);
    folder.write("model.toml", "instances = 1");
    folder.write("config.pbtxt", "x");
    let verified = folder.trusting(&[&key]).run(&folder.files, at(NOW)).unwrap();
    let covers = |path: &str| verified.covers(&folder.files.join(path));
    assert_eq!(["model.onnx", "model.toml", "config.pbtxt"].map(covers), [true, false, false]);
    folder.sign(&folder.statement(), &key);
    folder.write("model.toml", "instances = 2");
    assert!(folder.refusal(&key).starts_with("file 'model.toml' is not what was signed"));
}

#[test]
fn what_the_signer_left_out_is_not_signed() {
    let (folder, key) = (Folder::new(), Signing::new());
    let mut statement = folder.statement();
    statement["predicate"]["serialization"]["ignore_paths"] = json!(["model.sig", "warmup"]);
    folder.sign(&statement, &key);
    assert!(folder.run(&folder.trusting(&[&key])).is_ok());
    folder.write("warmup/a.json", "{}");
    let reason = folder.refusal(&key);
    assert_eq!(reason, "file 'warmup/a.json' is not among the files that were signed (the signer left it out)");
}

#[test]
fn only_what_is_never_opened_may_be_missing() {
    let (folder, key) = (Folder::new(), Signing::new());
    let mut digests = folder.digests();
    for path in ["model.pkl", "code/train.py", "conda.yaml", "model.toml", ".gitattributes"] {
        digests.insert(path.to_owned(), "00".repeat(32));
    }
    folder.sign(&statement(&digests), &key);
    assert!(folder.run(&folder.trusting(&[&key])).is_ok());
    for path in ["golden.json", "data/model.toml", "labels.txt", "other.onnx"] {
        let more: BTreeMap<_, _> = digests.clone().into_iter().chain([(path.to_owned(), "00".repeat(32))]).collect();
        folder.sign(&statement(&more), &key);
        assert_eq!(folder.refusal(&key), format!("file '{path}' was signed and is missing"));
    }
    // What is there is looked at, whatever it is.
    folder.sign(&statement(&digests), &key);
    folder.write("model.pkl", "x");
    assert!(folder.refusal(&key).starts_with("file 'model.pkl' is not what was signed"));
}

#[test]
fn symlinks_lead_nowhere_unless_they_were_signed() {
    let (folder, key) = (Folder::new(), Signing::new());
    let mut statement = folder.statement();
    folder.sign(&statement, &key);
    let elsewhere = folder.beside("elsewhere", "weights");
    let weights = folder.files.join("data/weights");
    fs::remove_file(&weights).unwrap();
    symlink(&elsewhere, &weights).unwrap();
    assert!(folder.refusal(&key).starts_with("file 'data/weights' is a symlink; expected a file"));
    statement["predicate"]["serialization"]["allow_symlinks"] = json!(true);
    folder.sign(&statement, &key);
    assert!(folder.run(&folder.trusting(&[&key])).is_ok());
    fs::write(&elsewhere, "other").unwrap();
    assert!(folder.refusal(&key).starts_with("file 'data/weights' is not what was signed"));
    fs::remove_file(&weights).unwrap();
    symlink(folder.home.path().join("gone"), &weights).unwrap();
    assert!(folder.refusal(&key).contains("cannot be read"));
    fs::remove_file(&weights).unwrap();
    symlink(folder.home.path(), &weights).unwrap();
    assert_eq!(folder.refusal(&key), "'data/weights' is a symlink to something else; expected files and folders only");
}

#[test]
fn a_pipe_in_the_folder_is_not_waited_for() {
    let (folder, key) = (Folder::new(), Signing::new());
    folder.sign(&folder.statement(), &key);
    let pipe = folder.files.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600), 0)
        .unwrap();
    assert_eq!(folder.refusal(&key), "'pipe' is something else; expected files and folders only");
    fs::rename(&pipe, folder.files.join(SIGNATURE_FILE)).unwrap();
    assert!(folder.refusal(&key).contains("expected a file"));
}

#[test]
fn statements_that_are_signed_and_wrong_are_refused() {
    let (folder, key) = (Folder::new(), Signing::new());
    let change = |pointer: &str, value: Value| {
        let mut statement = folder.statement();
        *statement.pointer_mut(pointer).unwrap() = value;
        folder.sign(&statement, &key);
        folder.refusal(&key)
    };
    let cases = [
        ("/_type", json!("x"), "expected a statement of type 'https://in-toto.io/Statement/v1', got 'x'"),
        ("/predicateType", json!("x"), "expected a predicate of type"),
        ("/predicateType", json!("https://model_signing/Digests/v0.1"), "before 1.0; sign it anew"),
        ("/subject", json!([]), "expected one subject, got 0"),
        ("/subject/0/digest", json!({}), "its subject's digest is none"),
        ("/subject/0/digest/sha256", json!("00".repeat(32)), "its subject's digest is 0000"),
        ("/predicate/serialization/method", json!("shards"), "its method is 'shards'; expected 'files'"),
        ("/predicate/serialization/hash_type", json!("blake3"), "its hash_type is 'blake3'; expected 'sha256'"),
        ("/predicate/resources/0/algorithm", json!("md5"), "file 'data/weights': expected a digest by sha256"),
        ("/predicate/resources/0/digest", json!("00"), "file 'data/weights': expected a digest by sha256"),
        ("/predicate/resources/1/name", json!("data/weights"), "file 'data/weights' is listed twice"),
        ("/predicate/resources", json!(7), "its statement has no such predicate"),
        ("/predicate", json!("x"), "its statement has no such predicate"),
    ];
    for (pointer, value, expected) in cases {
        let reason = change(pointer, value);
        assert!(reason.contains(expected), "{pointer}: {reason}");
    }
    for path in ["../weights", "/etc/passwd", "data//weights", "data/./weights", "", ".", "a\\..\\b", "a\nb"] {
        let reason = change("/predicate/resources/0/name", json!(path));
        assert!(reason.contains("is none of a file below the version's folder"), "{path}: {reason}");
    }
}

#[test]
fn bundles_that_are_none_are_refused() {
    let (folder, key) = (Folder::new(), Signing::new());
    let good = bundle(&folder.statement(), &key, &json!({"publicKey": {"hint": key.hint()}}));
    let refusal = |text: &[u8]| {
        folder.write(SIGNATURE_FILE, text);
        folder.refusal(&key)
    };
    for garbage in [&b""[..], b"garbage", b"[]", b"{}", b"\xff\xfe", &[b'['; 100_000]] {
        let reason = refusal(garbage);
        assert!(reason.contains("it is no Sigstore bundle in JSON"), "{reason}");
    }
    let long = json!({"mediaType": {}, "verificationMaterial": "x".repeat(1 << 20)});
    for text in [long.to_string(), format!("\"{}\"", "x".repeat(1 << 20))] {
        let reason = refusal(text.as_bytes());
        assert!(reason.len() < 400, "a reason of {} bytes", reason.len());
    }
    let keyless = "keyless signatures are not verified offline; sign with a key or certificate";
    let cases = [
        ("/mediaType", json!("x"), "expected a bundle of type"),
        ("/dsseEnvelope/payloadType", json!("x"), "expected a payload of type"),
        ("/dsseEnvelope/signatures", json!([]), "expected one signature in its envelope, got 0"),
        ("/dsseEnvelope/payload", json!("!"), "its payload is not in base64"),
        ("/dsseEnvelope/signatures/0/sig", json!("AAAA"), "the signature over its payload is not of the key"),
        ("/dsseEnvelope", json!(null), "expected a bundle with a dsseEnvelope"),
        ("/verificationMaterial", json!({}), "expected either a publicKey or an x509CertificateChain"),
        ("/verificationMaterial", json!({"certificate": {"rawBytes": ""}}), keyless),
        ("/verificationMaterial", json!({"publicKey": {}, "tlogEntries": [{}]}), keyless),
        ("/verificationMaterial", json!({"x509CertificateChain": {"certificates": []}}), "expected 1 to 8"),
    ];
    for (pointer, value, expected) in cases {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        let reason = refusal(bad.to_string().as_bytes());
        assert!(reason.contains(expected), "{pointer}: {reason}");
    }
    // Another payload under the same signature.
    let mut tampered = good.clone();
    let other = folder.statement().to_string().replace("model.onnx", "other.onnx");
    tampered["dsseEnvelope"]["payload"] = json!(STANDARD.encode(other));
    assert!(refusal(tampered.to_string().as_bytes()).contains("is not of the key that is trusted"));
    let mut huge = good.to_string().into_bytes();
    huge.resize(MAX_SIGNATURE as usize + 1, b' ');
    assert_eq!(refusal(&huge), "it cannot be read: expected at most 16 MiB");
    huge.pop();
    folder.write(SIGNATURE_FILE, huge);
    assert!(folder.run(&folder.trusting(&[&key])).is_ok());
}

#[test]
fn files_that_change_after_they_were_verified_are_noticed() {
    let (folder, key) = (Folder::new(), Signing::new());
    folder.sign(&folder.statement(), &key);
    let verify = || folder.trusting(&[&key]).run(&folder.files, at(NOW)).unwrap();
    let verified = verify();
    assert!(verified.still_holds(false) && verified.still_holds(true));
    assert!(verified.covers(&folder.files.join("model.onnx")));
    assert!(!verified.covers(&folder.files.join(".git/model.onnx")) && !verified.covers(Path::new("/model.onnx")));
    // As somebody would who wants to leave no trace.
    let file = folder.files.join("model.onnx");
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    tick();
    fs::write(&file, "GRAPH").unwrap();
    fs::write(&file, "graph").unwrap();
    fs::File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
    assert!(!verified.still_holds(false));
    let verified = verify();
    tick();
    folder.write("extra", "");
    fs::remove_file(folder.files.join("extra")).unwrap();
    assert!(!verified.still_holds(false) && !verified.still_holds(true));
    let verified = verify();
    tick();
    fs::write(&file, "GRAPH").unwrap();
    assert!(!verified.still_holds(true));
}

#[test]
fn a_mirrors_files_may_get_other_names_while_they_are_loaded() {
    let (folder, key) = (Folder::new(), Signing::new());
    folder.sign(&folder.statement(), &key);
    let verified = folder.trusting(&[&key]).run(&folder.files, at(NOW)).unwrap();
    tick();
    fs::hard_link(folder.files.join("model.onnx"), folder.home.path().join("shared")).unwrap();
    assert!(verified.still_holds(true) && !verified.still_holds(false));
}

#[test]
fn what_was_verified_can_be_taken_back() {
    let (folder, key) = (Folder::new(), Signing::new());
    folder.sign(&folder.statement(), &key);
    let check = folder.trusting(&[&key]);
    check.spoil("nobody has looked yet");
    assert_eq!(check.found(), None);
    folder.run(&check).unwrap();
    check.spoil("it turned out otherwise");
    let found = check.found().unwrap();
    assert_eq!((found.state, found.signer, found.policy), (State::Refused, None, Policy::Enforce));
    assert_eq!(found.reason.as_deref(), Some("it turned out otherwise"));
}

#[test]
fn reasons_that_may_pass_are_told_from_those_that_stay() {
    let passes = |errno: rustix::io::Errno| folder::unread("it", &errno.into()).passes;
    use rustix::io::Errno;
    assert!([Errno::MFILE, Errno::IO, Errno::STALE].into_iter().all(passes));
    assert!(![Errno::NOENT, Errno::ACCESS, Errno::PERM, Errno::NOTDIR, Errno::LOOP].into_iter().any(passes));
    assert!(!folder::unread("it", &io::Error::other("expected a file")).passes);
    let passes = |chain: Chain| {
        let (check, reason) = chain.run();
        let found = check.found().unwrap();
        assert_eq!(found.signer, None, "{reason:?}");
        found.passes
    };
    let mut early = Chain::default();
    early.now -= 11 * DAY;
    assert!(passes(early));
    let mut before_its_root = Chain::default();
    before_its_root.root.days = (1, 100);
    before_its_root.now -= 2 * DAY;
    assert!(passes(before_its_root));
    let mut late = Chain::default();
    late.now += 11 * DAY;
    assert!(!passes(late));
}

#[test]
fn patterns_fit_names() {
    for (pattern, name) in [("*", "m"), ("m", "m"), ("team-*", "team-a"), ("team-*", "team-"), ("*-a-*b", "x-a-y-a-b")]
    {
        assert!(fits(pattern, name), "{pattern} {name}");
    }
    for (pattern, name) in [("", "m"), ("m", "n"), ("team-*", "team"), ("a*a", "a"), ("*b*b", "ab"), ("*.x", "yx")] {
        assert!(!fits(pattern, name), "{pattern} {name}");
    }
}

#[test]
fn the_first_entry_that_fits_counts() {
    let folder = Folder::new();
    let keys = vec![folder.beside("key.pem", &Signing::new().pem())];
    let entry = |models: &str, policy| Trusted { models: models.to_owned(), policy, keys: keys.clone(), ..anybody() };
    let trusted = vec![entry("team-*", None), entry("team-a", Some(Policy::Off)), entry("new-*", Some(Policy::Warn))];
    let signatures = Signatures::open(&SignatureConfig { policy: Policy::Enforce, trusted }).unwrap();
    let policies = ["team-a", "new-b", "other"].map(|model| signatures.check(model).policy());
    assert_eq!(policies, [Policy::Enforce, Policy::Warn, Policy::Enforce]);
    assert!(signatures.check("other").trust.is_none());
}

#[test]
fn a_configuration_that_trusts_nobody_is_an_error() {
    let folder = Folder::new();
    // The Ed25519 key of RFC 8410.
    let file = |name: &str, content: &str| vec![folder.beside(name, content)];
    let info = STANDARD.decode("MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=").unwrap();
    let leaf = pem("CERTIFICATE", &Certificate::default().issue(&Signing::new(), &Signing::new()));
    let entry = |keys: &[PathBuf], certificates: &[PathBuf]| Trusted {
        keys: keys.to_vec(),
        certificates: certificates.to_vec(),
        ..anybody()
    };
    let cases = [
        (entry(&[], &[]), "trusts nobody"),
        (
            Trusted { identity: Some("a".to_owned()), ..entry(&file("k.pem", &Signing::new().pem()), &[]) },
            "has an identity",
        ),
        (Trusted { models: String::new(), ..anybody() }, "fits no model"),
        (entry(&[folder.home.path().join("gone.pem")], &[]), "gone.pem: No such file"),
        (entry(&file("text.pem", "hello"), &[]), "text.pem: expected a public key in PEM"),
        (entry(&file("private.pem", &pem("PRIVATE KEY", b"s3cret")), &[]), "private.pem: it holds a private key"),
        (entry(&file("ed25519.pem", &pem("PUBLIC KEY", &info)), &[]), "one of the curves P-256, P-384 and P-521"),
        (entry(&[], &file("key.pem", &Signing::new().pem())), "key.pem: expected certificates in PEM"),
        (
            entry(&[], &file("bad.pem", &pem("CERTIFICATE", b"x"))),
            "bad.pem: it holds a certificate that cannot be read",
        ),
        (entry(&[], &file("leaf.pem", &leaf)), "leaf.pem: expected certificates of authorities"),
        (entry(&file("long.pem", &"x".repeat((1 << 20) + 1)), &[]), "long.pem: it is larger than 1 MiB"),
    ];
    for (entry, expected) in cases {
        let config = SignatureConfig { policy: Policy::Warn, trusted: vec![entry] };
        let reason = Signatures::open(&config).err().unwrap().to_string();
        assert!(reason.contains(expected) && !reason.contains("s3cret"), "{expected}: {reason}");
    }
}

fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let length = content.len();
    let head = match length {
        0..0x80 => vec![tag, length as u8],
        0x80..0x100 => vec![tag, 0x81, length as u8],
        _ => vec![tag, 0x82, (length >> 8) as u8, length as u8],
    };
    [head, content].concat()
}

/// A certificate to be issued, by default to somebody who signs models.
#[derive(Clone)]
struct Certificate {
    subject: &'static str,
    issuer: &'static str,
    days: (u64, u64),
    /// Whether it is an authority's, and how many may follow.
    authority: Option<Option<u8>>,
    key_usage: Option<u8>,
    /// The last number of the extended key usage: 3 is for signing code, 1 for servers.
    extended: Option<u8>,
    email: Option<&'static str>,
}

impl Default for Certificate {
    fn default() -> Self {
        Self {
            subject: "signer",
            issuer: "between",
            days: (10, 10),
            authority: None,
            key_usage: Some(0x80),
            extended: Some(3),
            email: Some("ada@example.org"),
        }
    }
}

impl Certificate {
    fn authority(subject: &'static str, issuer: &'static str) -> Self {
        let authority = Some(None);
        Self { subject, issuer, authority, key_usage: Some(0x06), extended: None, email: None, days: (100, 100) }
    }

    fn issue(&self, key: &Signing, issuer: &Signing) -> Vec<u8> {
        let sequence = |parts: &[&[u8]]| tlv(0x30, parts);
        // ecdsa-with-SHA256
        let algorithm = sequence(&[&tlv(0x06, &[&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02]])]);
        let name = |text: &str| {
            sequence(&[&tlv(0x31, &[&sequence(&[&tlv(0x06, &[&[0x55, 0x04, 0x03]]), &tlv(0x0c, &[text.as_bytes()])])])])
        };
        let time = |seconds: u64| {
            let text = humantime_serde::re::humantime::format_rfc3339_seconds(at(seconds)).to_string();
            let digits: String = text.chars().filter(|letter| !"-T:".contains(*letter)).collect();
            tlv(0x17, &[&digits.as_bytes()[2..]])
        };
        let extension = |id: u8, is_critical: bool, value: Vec<u8>| {
            let critical = if is_critical { tlv(0x01, &[&[0xff]]) } else { Vec::new() };
            sequence(&[&tlv(0x06, &[&[0x55, 0x1d, id]]), &critical, &tlv(0x04, &[&value])])
        };
        let mut extensions = Vec::new();
        if let Some(most) = self.authority {
            let most = most.map_or(Vec::new(), |most| tlv(0x02, &[&[most]]));
            extensions.push(extension(0x13, true, sequence(&[&tlv(0x01, &[&[0xff]]), &most])));
        }
        if let Some(usage) = self.key_usage {
            extensions.push(extension(0x0f, true, tlv(0x03, &[&[0, usage]])));
        }
        if let Some(usage) = self.extended {
            let id = tlv(0x06, &[&[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, usage]]);
            extensions.push(extension(0x25, false, sequence(&[&id])));
        }
        if let Some(email) = self.email {
            extensions.push(extension(0x11, false, sequence(&[&tlv(0x81, &[email.as_bytes()])])));
        }
        let extensions: Vec<&[u8]> = extensions.iter().map(Vec::as_slice).collect();
        let inner = sequence(&[
            &tlv(0xa0, &[&tlv(0x02, &[&[2]])]),
            &tlv(0x02, &[&[1]]),
            &algorithm,
            &name(self.issuer),
            &sequence(&[&time(NOW - self.days.0 * DAY), &time(NOW + self.days.1 * DAY)]),
            &name(self.subject),
            &key.info(),
            &tlv(0xa3, &[&sequence(&extensions)]),
        ]);
        let signature = tlv(0x03, &[&[0], &issuer.sign(&inner)]);
        sequence(&[&inner, &algorithm, &signature])
    }
}

/// An authority, another between, and a signer, of whom each may be other than they should be.
struct Chain {
    root: Certificate,
    between: Certificate,
    leaf: Certificate,
    identity: Option<&'static str>,
    /// When it is verified.
    now: u64,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            root: Certificate::authority("root", "root"),
            between: Certificate::authority("between", "root"),
            leaf: Certificate::default(),
            identity: None,
            now: NOW,
        }
    }
}

impl Chain {
    fn verify(&self) -> Result<Signer, String> {
        self.run().1
    }

    fn run(&self) -> (Check, Result<Signer, String>) {
        let folder = Folder::new();
        let [root, between, leaf] = [(); 3].map(|()| Signing::new());
        let certificates = [self.leaf.issue(&leaf, &between), self.between.issue(&between, &root)];
        let raw = certificates.map(|der| json!({"rawBytes": STANDARD.encode(der)}));
        let material = json!({"x509CertificateChain": {"certificates": raw}, "tlogEntries": []});
        folder.write(SIGNATURE_FILE, bundle(&folder.statement(), &leaf, &material).to_string());
        // One that has nothing to do with it comes first.
        let (other, key) = (Certificate::authority("other", "other"), Signing::new());
        let roots = pem("CERTIFICATE", &other.issue(&key, &key)) + &pem("CERTIFICATE", &self.root.issue(&root, &root));
        let check = folder.checked(Trusted {
            certificates: vec![folder.beside("roots.pem", &roots)],
            identity: self.identity.map(str::to_owned),
            ..anybody()
        });
        check.run(&folder.files, at(self.now));
        let outcome = check.found().unwrap();
        (check, outcome.signer.ok_or_else(|| outcome.reason.unwrap()))
    }
}

#[test]
fn a_chain_of_certificates_up_to_a_trusted_root_holds() {
    let signer = Chain::default().verify().unwrap();
    assert_eq!((signer.method, signer.identity.as_deref()), ("certificate", Some("ada@example.org, signer")));
    for identity in ["ada@example.org", "signer"] {
        assert!(Chain { identity: Some(identity), ..Chain::default() }.verify().is_ok());
    }
    for (key_usage, extended) in [(None, Some(3)), (Some(0x80), None)] {
        let leaf = Certificate { key_usage, extended, ..Certificate::default() };
        assert!(Chain { leaf, ..Chain::default() }.verify().is_ok());
    }
    let root = Certificate { authority: Some(Some(1)), ..Certificate::authority("root", "root") };
    assert!(Chain { root, ..Chain::default() }.verify().is_ok());
}

#[test]
fn chains_that_do_not_hold_are_refused() {
    let leaf = |change: fn(&mut Certificate)| {
        let mut chain = Chain::default();
        change(&mut chain.leaf);
        chain
    };
    let between = |change: fn(&mut Certificate)| {
        let mut chain = Chain::default();
        change(&mut chain.between);
        chain
    };
    let root = |change: fn(&mut Certificate)| {
        let mut chain = Chain::default();
        change(&mut chain.root);
        chain
    };
    let cases = [
        (
            root(|one| one.days = (10, 0)),
            "own certificate is valid from 2025-12-22T00:00:00Z to 2026-01-01T00:00:00Z only",
        ),
        (
            Chain { now: NOW + 11 * DAY, ..Chain::default() },
            "a certificate of its chain has expired on 2026-01-11T00:00:00Z",
        ),
        (between(|one| one.days = (10, 0)), "has expired on"),
        (leaf(|one| one.extended = Some(1)), "its extended key usage has no codeSigning"),
        (leaf(|one| one.key_usage = Some(0x20)), "its key usage has no digitalSignature"),
        (leaf(|one| (one.key_usage, one.extended) = (None, None)), "its key usage has no digitalSignature"),
        (leaf(|one| one.authority = Some(None)), "is that of an authority"),
        (leaf(|one| one.issuer = "nobody"), "does not come from an authority that is trusted"),
        (between(|one| one.authority = None), "does not hold"),
        (between(|one| one.key_usage = Some(0x80)), "its key usage has no keyCertSign"),
        (between(|one| one.issuer = "elsewhere"), "does not come from an authority that is trusted"),
        (root(|one| one.authority = Some(Some(0))), "1 authorities stand between; the trusted one allows 0"),
        (Chain { identity: Some("eve@example.org"), ..Chain::default() }, "expected 'eve@example.org'"),
    ];
    for (mut chain, expected) in cases {
        // The last moment of what ends now is over a second later.
        chain.now += 1;
        let reason = chain.verify().unwrap_err();
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Bundle::parse(&bytes).map(|bundle| bundle.statement().map(|_| ()));
        let _ = der::Facts::read(&bytes);
        let _ = der::algorithm_of(&bytes);
    }

    #[test]
    fn no_change_to_a_certificate_makes_it_panic(place in 0_usize..400, byte: u8, length in 0_usize..400) {
        let key = Signing::new();
        let mut der = Certificate::default().issue(&key, &key);
        let place = place % der.len();
        der[place] = byte;
        let _ = der::Facts::read(&der);
        let _ = der::Facts::read(&der[..length.min(der.len())]);
    }

    #[test]
    fn no_byte_of_what_was_signed_can_be_another(place: usize, byte: u8) {
        let (folder, key) = (Folder::new(), Signing::new());
        let statement = folder.statement();
        folder.sign(&statement, &key);
        prop_assert!(folder.run(&folder.trusting(&[&key])).is_ok());
        let path = folder.files.join(SIGNATURE_FILE);
        let mut text = fs::read(&path).unwrap();
        let payload = STANDARD.encode(statement.to_string());
        let place = memchr::memmem::find(&text, payload.as_bytes()).unwrap() + place % payload.len();
        prop_assume!(text[place] != byte);
        text[place] = byte;
        fs::write(&path, text).unwrap();
        prop_assert!(folder.run(&folder.trusting(&[&key])).is_err());
    }
}
