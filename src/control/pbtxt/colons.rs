//! Puts the colon before a list of messages that protobuf's text format lets writers leave out and our parser wants.

/// A text with colons put in.
pub(super) struct Corrected {
    pub(super) text: String,
    /// Where in `text` they are, ascending.
    inserted: Vec<usize>,
}

impl Corrected {
    /// The place in the original text of a place in this one.
    pub(super) fn original(&self, offset: usize) -> usize {
        offset - self.inserted.partition_point(|&place| place < offset)
    }
}

/// What stands before the place that is looked at, comments and white space aside.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    /// A word that may name a field, and where it ends.
    Name(usize),
    Colon,
    Other,
}

/// Inserts a colon between a field's name and `[`.
pub(super) fn insert(text: &str) -> Corrected {
    let bytes = text.as_bytes();
    let mut places = Vec::new();
    let mut before = Before::Other;
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        at = match bytes[at] {
            b'#' => end_of(bytes, at, |byte| byte != b'\n'),
            quote @ (b'"' | b'\'') => end_of_string(bytes, at, quote),
            byte if is_word(byte) => end_of(bytes, at, is_word),
            _ => at + 1,
        };
        before = match (bytes[start], before) {
            (byte, before) if byte.is_ascii_whitespace() || byte == b'#' => before,
            (b'[', Before::Name(end)) => {
                places.push(end);
                Before::Other
            }
            (b':', _) => Before::Colon,
            // A word behind a colon is a value.
            (byte, Before::Colon) if is_word(byte) => Before::Other,
            (byte, _) if is_word(byte) => Before::Name(at),
            _ => Before::Other,
        };
    }
    let mut corrected = String::with_capacity(text.len() + places.len());
    let mut inserted = Vec::with_capacity(places.len());
    let mut from = 0;
    for place in places {
        corrected.push_str(&text[from..place]);
        inserted.push(corrected.len());
        corrected.push(':');
        from = place;
    }
    corrected.push_str(&text[from..]);
    Corrected { text: corrected, inserted }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn end_of(bytes: &[u8], start: usize, inside: impl Fn(u8) -> bool) -> usize {
    bytes[start..].iter().position(|&byte| !inside(byte)).map_or(bytes.len(), |length| start + length)
}

/// Behind the closing quote, or at the end of the line when there is none.
fn end_of_string(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'\n' => return at,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn corrected(text: &str) -> String {
        insert(text).text
    }

    #[test]
    fn lists_of_messages_get_their_colon() {
        assert_eq!(corrected("input [ {"), "input: [ {");
        assert_eq!(corrected("input[{"), "input:[{");
        assert_eq!(corrected("input # of the [model]\n  [ {"), "input: # of the [model]\n  [ {");
        assert_eq!(corrected("a { b [ { c: 1 } ] }"), "a { b: [ { c: 1 } ] }");
    }

    #[test]
    fn what_is_right_stays() {
        for text in [
            "input: [ {",
            "input {",
            "dims: [ 1, 2 ]",
            "name: \"input [\"",
            "name: 'it\\'s [ {'",
            "# input [ {\n",
            "kind: KIND_CPU",
            "dims :\n[ 1 ]",
            "name: \"never closed\ninput: [ ]",
            "größe: \"ü [\"",
        ] {
            assert_eq!(corrected(text), text);
        }
        assert_eq!(corrected("kind: KIND_CPU [ 1 ]"), "kind: KIND_CPU [ 1 ]");
    }

    proptest! {
        /// Taking the colons out again gives the text, and every place is found again.
        #[test]
        fn places_are_kept(text in "[a-z\\[\\]{}:#\"'\\\\ \n0-9ü]{0,60}") {
            let corrected = insert(&text);
            let mut back = corrected.text.clone().into_bytes();
            for place in corrected.inserted.iter().rev() {
                prop_assert_eq!(back.remove(*place), b':');
            }
            prop_assert_eq!(back, text.as_bytes());
            for (offset, letter) in corrected.text.char_indices() {
                if !corrected.inserted.contains(&offset) {
                    prop_assert!(text[corrected.original(offset)..].starts_with(letter));
                }
            }
        }
    }
}
