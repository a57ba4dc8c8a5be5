//! What stands for a content: SHA-256, or what a registry has instead, and how each is computed from bytes.

use std::fmt;

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::SourceError;

/// A content's digest, by the algorithm that its place uses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Digest {
    Sha256([u8; 32]),
    /// As DVC and object stores have it: it tells accidents, not attacks.
    Md5([u8; 16]),
    /// SHA-1 of `blob`, a space, the length in decimal, NUL and the bytes, as git names them.
    GitSha1([u8; 20]),
}

impl Digest {
    /// SHA-256 of what is whole already.
    pub fn of(bytes: &[u8]) -> Self {
        Digest::Sha256(Sha256::digest(bytes).into())
    }

    /// Reads `sha256:…`, `md5:…` or `git-sha1:…`, in hexadecimal.
    ///
    /// # Errors
    /// `Uri`, with what was expected.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let wrong = || {
            SourceError::Uri(format!(
                "digest '{}': expected sha256:, md5: or git-sha1: and hexadecimal digits",
                crate::error::shorten(text)
            ))
        };
        let (name, hex) = text.split_once(':').ok_or_else(wrong)?;
        Self::from_hex(name, hex).ok_or_else(wrong)
    }

    /// The digest that `hex` writes, by the name of its algorithm.
    pub fn from_hex(algorithm: &str, hex: &str) -> Option<Self> {
        match algorithm {
            "sha256" => decode(hex).map(Digest::Sha256),
            "md5" => decode(hex).map(Digest::Md5),
            "git-sha1" => decode(hex).map(Digest::GitSha1),
            _ => None,
        }
    }

    pub fn algorithm(&self) -> &'static str {
        match self {
            Digest::Sha256(_) => "sha256",
            Digest::Md5(_) => "md5",
            Digest::GitSha1(_) => "git-sha1",
        }
    }

    /// In lower-case hexadecimal, without the algorithm.
    pub fn hex(&self) -> String {
        match self {
            Digest::Sha256(bytes) => encode(bytes),
            Digest::Md5(bytes) => encode(bytes),
            Digest::GitSha1(bytes) => encode(bytes),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// SHA-256 of bytes as they come, and beside it whatever the place announced.
pub struct Hasher {
    sha256: Sha256,
    beside: Option<Beside>,
    announced: Option<Digest>,
}

enum Beside {
    Md5(Md5),
    GitSha1(Sha1),
}

impl Hasher {
    /// For a content of `size` bytes that is announced to be `announced`.
    pub fn new(announced: Option<Digest>, size: u64) -> Self {
        let beside = match announced {
            Some(Digest::Md5(_)) => Some(Beside::Md5(Md5::new())),
            Some(Digest::GitSha1(_)) => {
                Some(Beside::GitSha1(Sha1::new_with_prefix(format!("blob {size}\0").as_bytes())))
            }
            Some(Digest::Sha256(_)) | None => None,
        };
        Self { sha256: Sha256::new(), beside, announced }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        match &mut self.beside {
            Some(Beside::Md5(md5)) => md5.update(bytes),
            Some(Beside::GitSha1(sha1)) => sha1.update(bytes),
            None => {}
        }
    }

    /// The SHA-256 of all bytes.
    ///
    /// # Errors
    /// `Corrupt` when the content is not what was announced, naming `file`.
    pub fn finish(self, file: &str) -> Result<[u8; 32], SourceError> {
        let sha256: [u8; 32] = self.sha256.finalize().into();
        let found = match self.beside {
            Some(Beside::Md5(md5)) => Digest::Md5(md5.finalize().into()),
            Some(Beside::GitSha1(sha1)) => Digest::GitSha1(sha1.finalize().into()),
            None => Digest::Sha256(sha256),
        };
        match self.announced {
            Some(announced) if announced != found => Err(SourceError::Corrupt {
                file: file.to_owned(),
                reason: format!("expected {announced}, got {found}"),
            }),
            _ => Ok(sha256),
        }
    }
}

/// What stands for a version: SHA-256 of its files' lines `path NUL sha256 LF`, sorted by path.
pub fn of_artifact<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8; 32])>) -> Digest {
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort_unstable_by_key(|(path, _)| path.as_bytes());
    let mut hasher = Sha256::new();
    for (path, sha256) in files {
        hasher.update(path.as_bytes());
        hasher.update([0]);
        hasher.update(encode(sha256).as_bytes());
        hasher.update(b"\n");
    }
    Digest::Sha256(hasher.finalize().into())
}

/// What stands for contents in their order: SHA-256 of their digests, one after the other.
pub fn of_digests(digests: &[[u8; 32]]) -> Digest {
    Digest::of(digests.as_flattened())
}

/// One name for several texts, of which another division would have another name.
pub fn of_texts(texts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for text in texts {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    encode(&hasher.finalize())
}

/// Bytes in lower-case hexadecimal.
pub fn encode(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn decode<const N: usize>(hex: &str) -> Option<[u8; N]> {
    if hex.len() != N * 2 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(announced: &str) -> Result<[u8; 32], SourceError> {
        let mut hasher = Hasher::new(Some(Digest::parse(announced).unwrap()), 6);
        hasher.update(b"hel");
        hasher.update(b"lo\n");
        hasher.finish("model.onnx")
    }

    /// By `sha256sum`, `md5sum` and `git hash-object`.
    #[test]
    fn digests_are_those_of_the_tools() {
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(encode(&hash(&format!("sha256:{sha256}")).unwrap()), sha256);
        assert_eq!(encode(&hash("md5:b1946ac92492d2347c6235b4d2611184").unwrap()), sha256);
        assert_eq!(encode(&hash("git-sha1:ce013625030ba8dba906f756967f9e9ca394464a").unwrap()), sha256);
    }

    #[test]
    fn another_content_names_the_file_and_both_digests() {
        let error = hash("md5:00000000000000000000000000000000").unwrap_err().to_string();
        let said = "file 'model.onnx': expected md5:00000000000000000000000000000000, \
                    got md5:b1946ac92492d2347c6235b4d2611184";
        assert_eq!(error, said);
    }

    #[test]
    fn digests_are_written_as_they_are_read() {
        for text in ["md5:b1946ac92492d2347c6235b4d2611184", "git-sha1:ce013625030ba8dba906f756967f9e9ca394464a"] {
            assert_eq!(Digest::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "",
            "sha256",
            "sha256:12",
            "sha1:ce013625030ba8dba906f756967f9e9ca394464a",
            "md5:+1946ac92492d2347c6235b4d2611184",
        ] {
            assert!(Digest::parse(text).is_err(), "{text}");
        }
    }

    /// By `printf 'a\0%s\nb\0%s\n' … | sha256sum`, with the digests of `hello` and a line's end, and of nothing.
    #[test]
    fn an_artifact_is_its_sorted_list() {
        let hello = decode("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03").unwrap();
        let empty = decode("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855").unwrap();
        let (one, other) = (of_artifact([("b", &hello), ("a", &empty)]), of_artifact([("a", &empty), ("b", &hello)]));
        assert_eq!(one, other);
        assert_eq!(one.hex(), "a0c426488d19deebcc3bff6cfac77c192026c2454fb666a2c23ac34cc665b66a");
    }
}
