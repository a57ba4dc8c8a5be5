//! What a change says: its body field by field, who asks, why, and which epoch they have seen.

use std::fmt;

use http::{HeaderMap, HeaderName, header};
use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    control::command::Asked,
    error::{Error, abridge, is_unseen},
    id::shorten,
};

/// Who asks, when the body does not say it.
pub const AUTHOR: HeaderName = HeaderName::from_static("x-tidegate-author");
const NOBODY: &str = "operator";
/// Characters of an author's name, and of a reason; both are kept for good.
pub const MAX_AUTHOR: usize = 128;
pub const MAX_REASON: usize = 1024;

/// A JSON object whose fields are read one by one, so that a mistake is told with the field's name and its line.
pub struct Fields<'a> {
    text: &'a str,
    fields: Vec<(String, &'a RawValue)>,
}

impl<'a> Fields<'a> {
    /// An empty body is an object without fields.
    ///
    /// # Errors
    /// `InvalidArgument` saying where the body is no JSON object.
    pub fn parse(body: &'a [u8]) -> Result<Self, Error> {
        let text =
            std::str::from_utf8(body).map_err(|error| Error::invalid(format!("the body is no text: {error}")))?;
        if text.trim().is_empty() {
            return Ok(Self { text, fields: Vec::new() });
        }
        let Pairs(fields) = serde_json::from_str(text)
            .map_err(|error| Error::invalid(format!("the body is no JSON object: {}", abridge(&error.to_string()))))?;
        Ok(Self { text, fields })
    }

    /// The value of a field and takes it out; `None` when it is not there, or null.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field, its line and what it takes.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, Error> {
        let Some(index) = self.fields.iter().position(|(field, _)| field == name) else { return Ok(None) };
        let (_, raw) = self.fields.swap_remove(index);
        serde_json::from_str(raw.get()).map_err(|error| self.wrong(name, raw, &error))
    }

    /// Like `take`, for a field that must be there.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, Error> {
        self.take(name)?.ok_or_else(|| Error::invalid(format!("field '{name}' is missing")))
    }

    /// The fields that are left, each of which `T` must know.
    ///
    /// # Errors
    /// `InvalidArgument` naming a field that is unknown or wrong, and its line.
    pub fn rest_as<T: DeserializeOwned>(self) -> Result<serde_json::Map<String, serde_json::Value>, Error> {
        let checked = |(name, raw): &(String, &RawValue)| {
            let alone = format!("{{{}:{}}}", serde_json::Value::from(name.as_str()), raw.get());
            let wrong = |error| self.wrong(name, raw, &error);
            serde_json::from_str::<T>(&alone).map_err(wrong)?;
            Ok((name.clone(), serde_json::from_str(raw.get()).map_err(wrong)?))
        };
        self.fields.iter().map(checked).collect()
    }

    /// # Errors
    /// `InvalidArgument` naming a field that nobody took, and those there are.
    pub fn finish(self, known: &[&str]) -> Result<(), Error> {
        let Some((name, raw)) = self.fields.first() else { return Ok(()) };
        let (name, line) = (shorten(name), self.line(raw));
        Err(Error::invalid(format!("unknown field '{name}' in line {line}; there are {}", known.join(", "))))
    }

    fn wrong(&self, name: &str, raw: &RawValue, error: &serde_json::Error) -> Error {
        // Its own lines are counted from the field's.
        let line = self.line(raw) + error.line().saturating_sub(1);
        let text = error.to_string();
        let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
        Error::invalid(format!("field '{}' in line {line}: {}", shorten(name), abridge(reason)))
    }

    /// The line, from 1, in which a value begins.
    fn line(&self, raw: &RawValue) -> usize {
        let offset = (raw.get().as_ptr() as usize).saturating_sub(self.text.as_ptr() as usize);
        self.text.get(..offset).map_or(1, |before| before.matches('\n').count() + 1)
    }
}

/// The fields of an object as they come, each once.
struct Pairs<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields: Self::Value = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    if fields.iter().any(|(known, _)| *known == name) {
                        return Err(de::Error::custom(format_args!("field '{}' comes twice", shorten(&name))));
                    }
                    fields.push((name, value));
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object).map(Pairs)
    }
}

/// Who asks, why, and at which epoch, from the headers and the fields `author` and `reason`.
///
/// # Errors
/// `InvalidArgument` naming the field or header.
pub fn asked(headers: &HeaderMap, fields: &mut Fields<'_>) -> Result<Asked, Error> {
    let given = |text: &String| !text.trim().is_empty();
    let header = headers.get(AUTHOR).map(|value| value.to_str().map(str::to_owned)).transpose();
    let header = header.map_err(|_| Error::invalid(format!("header {AUTHOR} must be visible ASCII characters")))?;
    let author = fields.take("author")?.filter(given).or(header.filter(given)).unwrap_or_else(|| NOBODY.to_owned());
    let reason: String = fields.take("reason")?.unwrap_or_default();
    for (name, text, most) in [("author", &author, MAX_AUTHOR), ("reason", &reason, MAX_REASON)] {
        let length = text.chars().count();
        if length > most {
            return Err(Error::invalid(format!("field '{name}' takes {most} characters at most, got {length}")));
        }
        // It is shown in terminals and pages, where it must be what it seems to be.
        if text.chars().any(is_unseen) {
            return Err(Error::invalid(format!(
                "field '{name}' must be one line without characters that are not seen, for control or format"
            )));
        }
    }
    Ok(Asked { author, reason, epoch: epoch(headers)? })
}

/// The epoch that If-Match names; `None` when any will do.
///
/// # Errors
/// `InvalidArgument` saying what the header takes.
pub fn epoch(headers: &HeaderMap) -> Result<Option<u64>, Error> {
    let mut values = headers.get_all(header::IF_MATCH).into_iter();
    let (Some(value), more) = (values.next(), values.next()) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" && more.is_none() {
        return Ok(None);
    }
    let quoted = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    let digits = quoted.filter(|_| more.is_none()).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|digits| digits.parse().ok()).map(Some).ok_or_else(|| {
        let text = shorten(text);
        Error::invalid(format!("header If-Match must be one epoch in quotes, as an ETag says it, or *; got '{text}'"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        id::Version,
        rollout::{plan::Settings, route::Sticky},
    };

    fn message<T: fmt::Debug>(result: Result<T, Error>) -> String {
        result.unwrap_err().message
    }

    #[test]
    fn fields_are_read_one_by_one_and_what_is_wrong_has_a_name_and_a_line() {
        let body = b"{\n \"to\": \"2\",\n\n \"sticky\": \"cookie:x\", \"steps\": [1,\n 2, \"three\"] }";
        let mut fields = Fields::parse(body).unwrap();
        assert_eq!(fields.require::<Version>("to").unwrap().as_str(), "2");
        assert_eq!(fields.take::<String>("absent").unwrap(), None);
        assert!(
            message(fields.take::<Sticky>("sticky")).starts_with("field 'sticky' in line 4: sticky must be header")
        );
        let error = message(fields.take::<Vec<f64>>("steps"));
        assert_eq!(error, "field 'steps' in line 5: invalid type: string \"three\", expected f64");
        assert_eq!(message(fields.require::<Version>("to")), "field 'to' is missing");
    }

    #[test]
    fn what_is_no_object_is_told_where_it_is_none() {
        for (body, wrong) in [
            ("[]", "expected an object at line 1"),
            ("{\n\"a\": 1,\n}", "at line 3 column 1"),
            ("{\"a\": 1, \"a\": 2}", "field 'a' comes twice"),
            ("{} {}", "trailing characters at line 1 column 4"),
        ] {
            let error = message(Fields::parse(body.as_bytes()).map(|fields| fields.text.len()));
            assert!(error.starts_with("the body is no JSON object: ") && error.contains(wrong), "{error}");
        }
        assert!(message(Fields::parse(b"\xff").map(|fields| fields.text.len())).contains("no text"));
        assert!(Fields::parse(b" \n").unwrap().finish(&[]).is_ok());
    }

    #[test]
    fn settings_are_checked_by_key() {
        let settings = |text: &str| Fields::parse(text.as_bytes()).unwrap().rest_as::<Settings>();
        let known = settings(r#"{ "steps": [10, 100], "every": "1m", "margins": { "errors": 0.1 } }"#).unwrap();
        assert_eq!(known["every"], json!("1m"));
        assert!(message(settings("{ \"stepps\": [10] }")).contains("unknown field `stepps`, expected one of"));
        let error = message(settings("{\n\"every\": 5 }"));
        assert!(error.starts_with("field 'every' in line 2: invalid type: integer `5`"), "{error}");
    }

    #[test]
    fn nobody_asks_by_name_unless_they_say_so() {
        let mut headers = HeaderMap::new();
        let who = |headers: &HeaderMap, body: &str| {
            let mut fields = Fields::parse(body.as_bytes()).unwrap();
            asked(headers, &mut fields).map(|asked| format!("{}: {}", asked.author, asked.reason))
        };
        assert_eq!(who(&headers, "").unwrap(), "operator: ");
        headers.insert(AUTHOR, "ada".parse().unwrap());
        assert_eq!(who(&headers, r#"{ "reason": "it is time", "author": null }"#).unwrap(), "ada: it is time");
        assert_eq!(who(&headers, r#"{ "author": "grace" }"#).unwrap(), "grace: ");
        let long = format!(r#"{{ "reason": "{}" }}"#, "x".repeat(1025));
        assert_eq!(message(who(&headers, &long)), "field 'reason' takes 1024 characters at most, got 1025");
        for (field, unseen) in [("author", "\\u001b[2J"), ("author", "\\u202eada"), ("reason", "one\\u2028two")] {
            let refused = message(who(&headers, &format!(r#"{{ "{field}": "{unseen}" }}"#)));
            assert!(refused.starts_with(&format!("field '{field}' must be one line without")), "{refused}");
        }
        assert!(message(who(&headers, r#"{ "author": 5 }"#)).starts_with("field 'author' in line 1: invalid type"));
    }

    #[test]
    fn an_epoch_is_a_number_in_quotes() {
        let read = |texts: &[&'static str]| {
            let mut headers = HeaderMap::new();
            texts
                .iter()
                .for_each(|text| assert!(!headers.append(header::IF_MATCH, text.parse().unwrap()) || texts.len() > 1));
            epoch(&headers)
        };
        assert_eq!((read(&[]), read(&["*"]), read(&["\"17\""])), (Ok(None), Ok(None), Ok(Some(17))));
        for wrong in
            [&["17"][..], &["W/\"17\""], &["\"17\", \"18\""], &["\"17\"", "\"18\""], &["\"\""], &["\"-1\""], &[""]]
        {
            assert!(message(read(wrong)).contains("one epoch in quotes"), "{wrong:?}");
        }
    }
}
