//! `NaN`, `Infinity` and `-Infinity`: the numbers that JSON has no words for and clients write all the same.
//!
//! A strict parser stops at them. They are rewritten into objects, which are refused in every place but an element of
//! a float tensor, and only after a parse has failed, so that nobody pays for them who does not send them.

use bytes::Bytes;

/// Each literal and the text that stands for it, none of which begins another one's literal.
const LITERALS: [(&str, &str); 3] = [("NaN", r#"{"":0}"#), ("Infinity", r#"{"":1}"#), ("-Infinity", r#"{"":-1}"#)];

/// The same JSON with its literals masked; `None` when it has none outside of strings.
pub(super) fn mask(json: &[u8]) -> Option<Bytes> {
    let mut out = Vec::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(&byte) = json.get(at) {
        match byte {
            b'"' => at = string_end(json, at),
            b'N' | b'I' | b'-' => {
                match LITERALS.iter().find(|(literal, _)| json[at..].starts_with(literal.as_bytes())) {
                    None => at += 1,
                    Some((literal, masked)) => {
                        out.extend_from_slice(&json[copied..at]);
                        out.extend_from_slice(masked.as_bytes());
                        at += literal.len();
                        copied = at;
                    }
                }
            }
            _ => at += 1,
        }
    }
    if copied == 0 {
        return None;
    }
    out.extend_from_slice(&json[copied..]);
    Some(out.into())
}

/// The literal that a masked text stands for.
pub(super) fn unmask(text: &str) -> Option<&'static str> {
    LITERALS.iter().find(|(_, masked)| *masked == text).map(|(literal, _)| *literal)
}

/// The text that stands for a literal.
pub(super) fn masked(literal: &str) -> Option<&'static str> {
    LITERALS.iter().find(|(known, _)| *known == literal).map(|(_, masked)| *masked)
}

/// The index after the string that starts at `start`, or the end of the text when it is never closed.
pub(super) fn string_end(json: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(&byte) = json.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    json.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_literals_outside_of_strings_are_masked() {
        let masked = mask(br#"{"NaN":["-Infinity",NaN,-Infinity,Infinity,"a\"NaN","\\",NaN]}"#).unwrap();
        assert_eq!(masked, r#"{"NaN":["-Infinity",{"":0},{"":-1},{"":1},"a\"NaN","\\",{"":0}]}"#);
        for text in [r#"{"NaN":"Infinity"}"#, "", "\"NaN", "\"\\", "Na", "-1", "-Inf"] {
            assert_eq!(mask(text.as_bytes()), None, "{text}");
        }
        for (literal, masked) in LITERALS {
            assert_eq!(unmask(masked), Some(literal));
            assert_eq!(super::masked(literal), Some(masked));
        }
    }
}
