//! What commands print: lines for people, documents for programs, and nothing that a terminal would obey.

use std::{
    fmt::{self, Write as _},
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Context;
use serde::Serialize;

use crate::error::is_unseen;

/// As shells tell of a program that was ended by SIGPIPE: whoever read what it prints has heard enough.
const UNHEARD: u8 = 128 + 13;

/// Nobody reads standard output any more.
#[derive(Debug)]
struct Unheard;

impl fmt::Display for Unheard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for Unheard {}

/// Prints a line for people.
///
/// # Errors
/// When it cannot be printed; see [`unheard`].
pub fn say(line: fmt::Arguments<'_>) -> anyhow::Result<()> {
    print(&(seen(&line.to_string()) + "\n"))
}

/// Prints a line of a program that has more to do than to print: whether anybody reads it is all the same.
pub fn mention(line: fmt::Arguments<'_>) {
    let _ = say(line);
}

/// Prints a document for programs, one field a line.
///
/// # Errors
/// When it cannot be printed; see [`unheard`].
pub fn say_json(document: &impl Serialize) -> anyhow::Result<()> {
    print(&(seen_in_json(&serde_json::to_string_pretty(document)?) + "\n"))
}

/// Likewise, in one line.
///
/// # Errors
/// When it cannot be printed; see [`unheard`].
pub fn say_json_line(document: &impl Serialize) -> anyhow::Result<()> {
    print(&(seen_in_json(&serde_json::to_string(document)?) + "\n"))
}

/// Prints a text as it is.
///
/// # Errors
/// When it cannot be printed; see [`unheard`].
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let printed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Unheard.into()),
        printed => printed.context("standard output cannot be written"),
    }
}

/// How a command ends that was kept from its work by this error, when that is nothing to complain about.
pub fn unheard(error: &anyhow::Error) -> Option<ExitCode> {
    error.is::<Unheard>().then(|| ExitCode::from(UNHEARD))
}

/// A line in which all can be seen that is there: what controls terminals or turns the text is escaped, as Rust does it.
pub fn seen(line: &str) -> String {
    let mut shown = String::with_capacity(line.len());
    for character in line.chars() {
        if is_unseen(character) { shown.extend(character.escape_unicode()) } else { shown.push(character) }
    }
    shown
}

/// Likewise for a JSON document, which stays the same document: such characters are only in its texts, but for the ends
/// of lines between its fields.
fn seen_in_json(document: &str) -> String {
    let mut shown = String::with_capacity(document.len());
    for character in document.chars() {
        if character == '\n' || !is_unseen(character) {
            shown.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(shown, "\\u{unit:04x}");
            }
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn nothing_reaches_a_terminal_unseen() {
        assert_eq!(seen("größer \u{1b}[2J\u{202e}evil\r\n"), "größer \\u{1b}[2J\\u{202e}evil\\u{d}\\u{a}");
    }

    #[test]
    fn a_document_stays_the_same_document() {
        let document = json!({ "reason": "a\u{202e}b\u{2028}\u{9b}\u{7f}\u{e0001}\n\"ü", "list": [1, "\\u202e"] });
        let shown = seen_in_json(&serde_json::to_string_pretty(&document).unwrap());
        assert!(shown.contains("a\\u202eb\\u2028\\u009b\\u007f\\udb40\\udc01\\n"), "{shown}");
        assert!(!shown.chars().any(|character| is_unseen(character) && character != '\n'));
        assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), document);
    }
}
