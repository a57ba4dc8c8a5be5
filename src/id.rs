//! Names of models, versions and aliases: parsed once at the edge, so that no path or label is ever built from raw input.

use std::{borrow::Borrow, fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::Error;
pub use crate::error::shorten;

const MAX_LENGTH: usize = 128;

/// A model's name: 1–128 of `A–Z a–z 0–9 . _ -`, not starting with a dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ModelName(Arc<str>);

/// A version's text: 1–128 of `A–Z a–z 0–9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Version(Arc<str>);

/// What an operator calls a version (`champion`, `challenger`): a version's text that is no version of a registry and not
/// `latest`, so that it stands for no other one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Alias(Arc<str>);

impl ModelName {
    /// # Errors
    /// `InvalidArgument` when the text is no model name.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if text.starts_with('.') || !is_identifier(text) {
            return Err(Error::invalid(format!(
                "model name '{}' must be 1 to {MAX_LENGTH} of A-Z a-z 0-9 . _ - and not start with a dot",
                shorten(text)
            )));
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Version {
    /// # Errors
    /// `InvalidArgument` when the text is no version.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if !is_identifier(text) {
            return Err(Error::invalid(format!(
                "version '{}' must be 1 to {MAX_LENGTH} of A-Z a-z 0-9 . _ -",
                shorten(text)
            )));
        }
        Ok(Self(text.into()))
    }

    /// The version as a number, when it is a plain one (`7`, not `07` or `v7`).
    pub fn number(&self) -> Option<u64> {
        let canonical = self.0.bytes().all(|b| b.is_ascii_digit()) && (self.0.len() == 1 || !self.0.starts_with('0'));
        if canonical { self.0.parse().ok() } else { None }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Alias {
    /// # Errors
    /// `InvalidArgument` when the text is no alias.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let number = text.strip_prefix(['v', 'V']).unwrap_or(text);
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        if is_number || text.eq_ignore_ascii_case("latest") || !is_identifier(text) {
            return Err(Error::invalid(format!(
                "alias '{}' must be 1 to {MAX_LENGTH} of A-Z a-z 0-9 . _ - and neither a number, v1 nor latest",
                shorten(text)
            )));
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_identifier(text: &str) -> bool {
    (1..=MAX_LENGTH).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

macro_rules! text_id {
    ($id:ident) => {
        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Borrow<str> for $id {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $id {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                $id::parse(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

text_id!(ModelName);
text_id!(Version);
text_id!(Alias);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_identifiers() {
        for good in ["iris", "a", "A-b_c.9", &"x".repeat(128)] {
            assert_eq!(ModelName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".hidden", "a/b", "a b", "ü", "..", &"x".repeat(129)] {
            assert!(ModelName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_alias_stands_for_no_other_version() {
        for good in ["champion", "v3-candidate", "blue.1", "9bad", "v"] {
            assert_eq!(Alias::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "3", "007", "v3", "V12", "latest", "Latest", "a/b", "ü", &"x".repeat(129)] {
            assert!(Alias::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_plain_numbers_are_numeric_versions() {
        let number = |text: &str| Version::parse(text).unwrap().number();
        assert_eq!(number("12"), Some(12));
        assert_eq!(number("0"), Some(0));
        assert_eq!(number("01"), None);
        assert_eq!(number("v1.2"), None);
        assert_eq!(number("99999999999999999999999"), None);
    }
}
