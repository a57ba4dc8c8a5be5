//! JSON of any shape, checked once as a whole and then taken apart by scanning: every part is a slice of its text.
//!
//! No tree is built, so a document of a million numbers takes the room of its text, however it is nested.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{
    Parameter,
    literals::{mask, string_end, unmask},
};
use crate::{
    error::{Error, abridge},
    id::shorten,
};

/// A JSON text that is known to be well-formed.
pub struct Document {
    /// With its literals (`NaN` and its like) masked, when it had any.
    source: Bytes,
}

/// A value within a document.
#[derive(Clone, Copy)]
pub(in crate::api) struct Json<'a> {
    text: &'a str,
    source: &'a Bytes,
}

impl Document {
    /// # Errors
    /// `InvalidArgument` when the body is no JSON.
    pub fn parse(body: &Bytes) -> Result<Self, Error> {
        Self::parse_named(body, "the request")
    }

    /// As `parse`, for a text that is called `subject`.
    pub(super) fn parse_named(body: &Bytes, subject: &str) -> Result<Self, Error> {
        let check = |json: &Bytes| match serde_json::from_slice::<&RawValue>(json) {
            Ok(value) => Ok(json.slice_ref(value.get().as_bytes())),
            Err(error) => {
                Err(Error::invalid(format!("{subject} is not the JSON it should be: {}", abridge(&error.to_string()))))
            }
        };
        // Literals are looked for only when there may be some: most senders have none.
        let source = check(body).or_else(|error| check(&mask(body).ok_or(error)?))?;
        Ok(Self { source })
    }

    pub(in crate::api) fn root(&self) -> Json<'_> {
        // The parser has found it to be UTF-8.
        Json { text: std::str::from_utf8(&self.source).unwrap_or_default(), source: &self.source }
    }
}

impl<'a> Json<'a> {
    /// As it was written, but for literals.
    pub(in crate::api) fn text(self) -> &'a str {
        self.text
    }

    /// The bytes that `text` is a slice of.
    pub(super) fn source(self) -> &'a Bytes {
        self.source
    }

    /// The value that `text`, a slice of this one's, says.
    pub(super) fn part(self, text: &'a str) -> Self {
        Self { text, ..self }
    }

    /// For messages: as it was written, and not too long.
    pub(in crate::api) fn shown(self) -> String {
        unmask(self.text).map_or_else(|| shorten(self.text), str::to_owned)
    }

    pub(in crate::api) fn is_null(self) -> bool {
        self.text == "null"
    }

    /// The items of an array, `None` for anything else.
    pub(in crate::api) fn items(self) -> Option<impl Iterator<Item = Json<'a>>> {
        let inside = self.text.strip_prefix('[')?;
        Some(Parts { rest: inside, source: self.source })
    }

    /// The names and values of an object, `None` for anything else. A name with a broken escape is an error.
    pub(in crate::api) fn members(self) -> Option<impl Iterator<Item = Result<(Cow<'a, str>, Json<'a>), Error>>> {
        let inside = self.text.strip_prefix('{').filter(|_| unmask(self.text).is_none())?;
        let mut parts = Parts { rest: inside, source: self.source };
        Some(std::iter::from_fn(move || {
            let name = parts.next()?;
            let value = parts.next()?;
            let named = name.string().ok_or_else(|| {
                Error::invalid(format!("the name {} is not made of whole Unicode characters", name.shown()))
            });
            Some(named.map(|name| (name, value)))
        }))
    }

    /// The text of a string, `None` for anything else and for strings that end in half a character.
    pub(in crate::api) fn string(self) -> Option<Cow<'a, str>> {
        let plain = self.text.strip_prefix('"')?.strip_suffix('"')?;
        if plain.contains('\\') { serde_json::from_str(self.text).ok().map(Cow::Owned) } else { Some(plain.into()) }
    }

    /// `None` for lists, objects and null.
    pub(in crate::api) fn parameter(self) -> Option<Parameter> {
        serde_json::from_str(self.text).ok()
    }
}

/// The values of a well-formed text up to the end of the array or object that it is the inside of; names count.
struct Parts<'a> {
    rest: &'a str,
    source: &'a Bytes,
}

impl<'a> Iterator for Parts<'a> {
    type Item = Json<'a>;

    fn next(&mut self) -> Option<Json<'a>> {
        let is_between = |letter: char| matches!(letter, ',' | ':' | ' ' | '\n' | '\r' | '\t');
        let rest = self.rest.trim_start_matches(is_between);
        if rest.is_empty() || rest.starts_with([']', '}']) {
            self.rest = "";
            return None;
        }
        let (text, rest) = rest.split_at(value_end(rest.as_bytes()));
        self.rest = rest;
        Some(Json { text, source: self.source })
    }
}

/// The length of the value that a well-formed text begins with.
fn value_end(bytes: &[u8]) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => {
                at = string_end(bytes, at);
                if depth == 0 {
                    return at;
                }
                continue;
            }
            b'[' | b'{' => depth += 1,
            b']' | b'}' if depth <= 1 => return if depth == 0 { at } else { at + 1 },
            b']' | b'}' => depth -= 1,
            b',' | b':' | b' ' | b'\n' | b'\r' | b'\t' if depth == 0 => return at,
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn document(text: &str) -> Document {
        Document::parse(&Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    #[test]
    fn parts_are_slices() {
        let document = document(" {\"a\" : [1, [2,3] ,\"x]\\\"\"], \"b\\u0041\":{}, \"c\":null }\n");
        let members: Vec<_> = document.root().members().unwrap().map(Result::unwrap).collect();
        let names: Vec<_> = members.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["a", "bA", "c"]);
        let items: Vec<_> = members[0].1.items().unwrap().map(Json::text).collect();
        assert_eq!(items, ["1", "[2,3]", "\"x]\\\"\""]);
        assert_eq!(members[1].1.members().unwrap().count(), 0);
        assert!(members[2].1.is_null());
        assert!(document.root().items().is_none());
    }

    #[test]
    fn literals_are_no_objects() {
        let document = document("[NaN, -Infinity]");
        for (item, shown) in document.root().items().unwrap().zip(["NaN", "-Infinity"]) {
            assert!(item.members().is_none());
            assert_eq!(item.shown(), shown);
        }
    }

    #[test]
    fn half_characters_have_no_text() {
        let document = document(r#"[{"\ud800": 1}, "\ud800"]"#);
        let items: Vec<_> = document.root().items().unwrap().collect();
        let error = items[0].members().unwrap().next().unwrap().map(|_| ()).unwrap_err();
        assert_eq!(error.message, r#"the name "\ud800" is not made of whole Unicode characters"#);
        assert!(items[1].string().is_none());
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::btree_map("[a-z\"\\\\é]{1,4}", inner, 0..5)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    /// The tree that a parser would have built.
    fn rebuilt(json: Json<'_>) -> Value {
        if let Some(items) = json.items() {
            return items.map(rebuilt).collect();
        }
        if let Some(members) = json.members() {
            return members.map(Result::unwrap).map(|(name, value)| (name.into_owned(), rebuilt(value))).collect();
        }
        json.string().map_or_else(|| serde_json::from_str(json.text()).unwrap(), |text| Value::from(&*text))
    }

    proptest! {
        #[test]
        fn scanning_finds_what_a_parser_finds(value in values(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            prop_assert_eq!(rebuilt(document(&text.unwrap()).root()), value);
        }

        #[test]
        fn noise_never_panics(text in r#"[\[\]{}":,0-9aN\\ -]{0,48}"#) {
            if let Ok(document) = Document::parse(&Bytes::from(text)) {
                let _ = document.root().items().map(Iterator::count);
                let _ = document.root().members().map(Iterator::count);
            }
        }
    }
}
