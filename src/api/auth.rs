//! Who may change the server by request: whoever has the token; without a token, whoever calls from this machine.

use std::{fmt, net::IpAddr};

use http::{HeaderMap, header};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Code, Error};

/// Stands in for the token wherever it would show.
const HIDDEN: &str = "(hidden)";

/// Headers of requests that begin elsewhere, though they come from this machine: in a web page, or before a proxy.
const RELAYED: [&str; 4] = ["origin", "forwarded", "x-forwarded-for", "via"];

/// A bearer token; it never shows in logs or printed configurations.
#[derive(Clone, PartialEq, Eq, JsonSchema)]
pub struct Token(String);

impl Token {
    /// # Errors
    /// When the text cannot be sent in a header; the message does not contain it.
    pub fn parse(text: String) -> Result<Self, Error> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::invalid("token must be one or more visible ASCII characters without spaces"));
        }
        Ok(Self(text))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Compares in a time that depends on the length of `given` only.
    fn is(&self, given: &[u8]) -> bool {
        let wanted = self.0.as_bytes();
        let pairs = given.iter().zip(wanted.iter().cycle());
        let difference = pairs.fold(given.len() ^ wanted.len(), |sum, (a, b)| sum | usize::from(a ^ b));
        // Kept from the optimizer, which might stop at the first difference.
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl Serialize for Token {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(HIDDEN)
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Token::parse(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// The other end of a connection; an extension of every request.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub address: IpAddr,
    /// The connection's number, which no other has on the ports for requests.
    pub connection: u64,
}

/// Checks that a request may change the server.
///
/// # Errors
/// `Unauthenticated` when a token is set and the request has another or none, `Forbidden` when none is set and the
/// request comes from elsewhere, or from a web page or through a proxy on this machine.
pub fn check_admin(token: Option<&Token>, headers: &HeaderMap, peer: Option<&Peer>) -> Result<(), Error> {
    let Some(token) = token else { return check_is_here(headers, peer) };
    match bearer(headers) {
        Some(given) if token.is(given) => Ok(()),
        Some(_) => Err(Error::new(Code::Unauthenticated, "the bearer token is not this server's")),
        None => Err(Error::new(
            Code::Unauthenticated,
            "changes need this server's token, in a header as 'authorization: Bearer TOKEN'",
        )),
    }
}

/// Checks that a request comes from a program on this machine, on its own behalf.
fn check_is_here(headers: &HeaderMap, peer: Option<&Peer>) -> Result<(), Error> {
    // On a socket of both families, IPv4's loopback comes mapped into IPv6.
    let here = peer.is_some_and(|peer| peer.address.to_canonical().is_loopback());
    let seen = RELAYED.iter().find(|name| headers.contains_key(**name));
    let got = match seen {
        None if here => return Ok(()),
        None => String::new(),
        Some(name) => format!(", not for web pages or through proxies, and this request has the header '{name}'"),
    };
    Err(Error::new(
        Code::Forbidden,
        format!(
            "without a token, changes are allowed from the server's own machine only{got}; set one with --token or \
             TIDEGATE_TOKEN"
        ),
    ))
}

/// The token in the authorization header; the scheme is written in any case.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(token: Option<&str>, authorization: Option<&str>, peer: Option<&str>) -> Result<(), Code> {
        let token = token.map(|token| Token::parse(token.to_owned()).unwrap());
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        let peer = peer.map(|peer| Peer { address: peer.parse().unwrap(), connection: 1 });
        check_admin(token.as_ref(), &headers, peer.as_ref()).map_err(|error| error.code)
    }

    #[test]
    fn without_a_token_only_this_machine_may() {
        for here in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(check(None, None, Some(here)), Ok(()), "{here}");
        }
        for elsewhere in ["10.0.0.1", "0.0.0.0", "::ffff:10.0.0.1", "fe80::1", "2001:db8::1"] {
            assert_eq!(check(None, Some("Bearer x"), Some(elsewhere)), Err(Code::Forbidden), "{elsewhere}");
        }
        assert_eq!(check(None, None, None), Err(Code::Forbidden), "whoever is unknown is not here");
    }

    #[test]
    fn without_a_token_nobody_may_relay_others() {
        for (name, value) in [
            ("Origin", "http://localhost:8000"),
            ("origin", "null"),
            ("Forwarded", "for=10.0.0.1"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("x-forwarded-for", ""),
            ("Via", "1.1 proxy"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
            let here = Peer { address: "127.0.0.1".parse().unwrap(), connection: 1 };
            let error = check_admin(None, &headers, Some(&here)).unwrap_err();
            assert_eq!(error.code, Code::Forbidden, "{name}");
            let named = format!("'{}'", name.to_lowercase());
            assert!(error.message.contains(&named) && error.message.contains("--token"), "{error}");

            let token = Token::parse("s3cret".to_owned()).unwrap();
            headers.insert(header::AUTHORIZATION, "Bearer s3cret".parse().unwrap());
            assert_eq!(check_admin(Some(&token), &headers, Some(&here)), Ok(()), "{name}");
        }
    }

    #[test]
    fn a_token_is_needed_from_everyone() {
        for right in ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "] {
            assert_eq!(check(Some("s3cret"), Some(right), Some("10.0.0.1")), Ok(()), "{right}");
        }
        for wrong in ["Bearer", "Bearer ", "Bearer s3cre", "Bearer s3crets", "Bearer s3creT", "Basic s3cret", "s3cret"]
        {
            let answer = check(Some("s3cret"), Some(wrong), Some("127.0.0.1"));
            assert_eq!(answer, Err(Code::Unauthenticated), "{wrong}");
        }
        let repeated = check(Some("s3cret"), Some("Bearer s3crets3cret"), Some("::1"));
        assert_eq!(repeated, Err(Code::Unauthenticated));
        assert_eq!(check(Some("s3cret"), None, Some("127.0.0.1")), Err(Code::Unauthenticated));
    }

    #[test]
    fn the_token_shows_nowhere() {
        let token = Token::parse("s3cret".to_owned()).unwrap();
        assert_eq!(format!("{token:?} {}", serde_json::to_string(&token).unwrap()), "(hidden) \"(hidden)\"");
        for bad in ["", "two words", "smörgås", "new\nline"] {
            let error = Token::parse(bad.to_owned()).unwrap_err();
            assert!(bad.is_empty() || !error.message.contains(bad), "{error}");
        }
    }
}
