//! What stands behind the question mark of a path.

use std::time::{Duration, SystemTime};

use humantime_serde::re::humantime::parse_rfc3339;

use crate::{error::Error, id::shorten, rollout::Moment};

/// The pairs of a query, each name once.
#[derive(Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// # Errors
    /// `InvalidArgument` naming what comes twice, is unknown or is no text; `known` are the names there are.
    pub fn parse(query: Option<&str>, known: &[&str]) -> Result<Self, Error> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            if !known.contains(&name.as_str()) {
                let (name, known) = (shorten(&name), known.join(", "));
                return Err(Error::invalid(format!("unknown query parameter '{name}'; there are {known}")));
            }
            if pairs.iter().any(|(earlier, _)| *earlier == name) {
                return Err(Error::invalid(format!("query parameter '{name}' comes twice")));
            }
            pairs.push((name, value));
        }
        Ok(Self(pairs))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// # Errors
    /// `InvalidArgument` naming the parameter when it is none from `least` to `most`.
    pub fn number(&self, name: &str, default: u64, [least, most]: [u64; 2]) -> Result<u64, Error> {
        let Some(text) = self.get(name) else { return Ok(default) };
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| {
            let text = shorten(text);
            Error::invalid(format!("query parameter '{name}' must be {least} to {most}, got '{text}'"))
        })
    }

    /// A moment in either form: RFC 3339, or milliseconds since 1970; the beginning of time when it is not there.
    ///
    /// # Errors
    /// `InvalidArgument` naming the parameter.
    pub fn moment(&self, name: &str) -> Result<Moment, Error> {
        let Some(text) = self.get(name) else { return Ok(0) };
        text.parse().ok().or_else(|| from_rfc3339(text)).ok_or_else(|| {
            let text = shorten(text);
            Error::invalid(format!(
                "query parameter '{name}' must be a time like 2026-03-01T12:00:00Z, or milliseconds since 1970; got \
                 '{text}'"
            ))
        })
    }
}

/// Milliseconds since 1970; `None` for what is no time, or one before that.
fn from_rfc3339(text: &str) -> Option<Moment> {
    let zone = text.len().checked_sub(6).and_then(|start| text.split_at_checked(start));
    let (local, minutes) = match zone {
        Some((local, zone)) if zone.starts_with(['+', '-']) => {
            let (hours, minutes) = zone.get(1..)?.split_once(':')?;
            let minutes = hours.parse::<u8>().ok().filter(|hours| *hours < 24).map(i64::from)? * 60
                + minutes.parse::<u8>().ok().filter(|minutes| *minutes < 60).map(i64::from)?;
            (format!("{local}Z"), if zone.starts_with('-') { -minutes } else { minutes })
        }
        _ => (text.to_owned(), 0),
    };
    let since = parse_rfc3339(&local).ok()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let millis = i64::try_from(since.as_millis()).ok()?.checked_sub(minutes * 60_000)?;
    u64::try_from(millis).ok()
}

/// Puts characters in the place of their escapes; a `+` is itself, as in the zone of a time.
fn decode(text: &str) -> Result<String, Error> {
    let wrong = || Error::invalid(format!("the query '{}' is not written in UTF-8 and %XX", shorten(text)));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16)).ok_or_else(wrong);
        let (high, low) = (digit()?, digit()?);
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
        result.unwrap_err().message
    }

    #[test]
    fn pairs_are_known_and_come_once() {
        let query =
            Query::parse(Some("model=iris&&since=2026-03-01T12%3A00:00%2b01:00&limit"), &["model", "since", "limit"])
                .unwrap();
        assert_eq!((query.get("model"), query.get("limit"), query.get("other")), (Some("iris"), Some(""), None));
        assert_eq!(query.get("since"), Some("2026-03-01T12:00:00+01:00"));
        let parse = |text| Query::parse(Some(text), &["model", "limit"]).map(|query| query.0);
        assert_eq!(message(parse("modell=x")), "unknown query parameter 'modell'; there are model, limit");
        assert_eq!(message(parse("model=x&model=y")), "query parameter 'model' comes twice");
        for wrong in ["model=%", "model=%4", "model=%xx", "model=%ff"] {
            assert!(message(parse(wrong)).contains("UTF-8 and %XX"), "{wrong}");
        }
    }

    #[test]
    fn numbers_have_bounds_that_are_told() {
        let number = |text| Query::parse(Some(text), &["limit"]).unwrap().number("limit", 100, [1, 1000]);
        assert_eq!((number(""), number("limit=1000")), (Ok(100), Ok(1000)));
        for wrong in ["limit=0", "limit=1001", "limit=-1", "limit=many", "limit="] {
            assert!(message(number(wrong)).starts_with("query parameter 'limit' must be 1 to 1000, got"), "{wrong}");
        }
    }

    #[test]
    fn moments_come_in_two_forms() {
        let moment = |text: &str| Query::parse(Some(&format!("since={text}")), &["since"]).unwrap().moment("since");
        for (text, expected) in [
            ("1767225600123", 1_767_225_600_123),
            ("2026-01-01T00:00:00.123Z", 1_767_225_600_123),
            ("2026-01-01T02:00:00%2B02:00", 1_767_225_600_000),
            ("2025-12-31T19:30:00-04:30", 1_767_225_600_000),
            ("2026-01-01T02:00:00+02:00", 1_767_225_600_000),
        ] {
            assert_eq!(moment(text), Ok(expected), "{text}");
        }
        for wrong in
            ["", "yesterday", "2026-01-01", "2026-01-01T00:00:00", "-1", "2026-01-01T00:00:00+99:00", "ü+00:00"]
        {
            assert!(message(moment(wrong)).contains("2026-03-01T12:00:00Z, or milliseconds"), "{wrong}");
        }
    }
}
