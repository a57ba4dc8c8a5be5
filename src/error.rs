//! `Code` and `Error`: the closed list of ways a call can fail, and one failure with its sentence.
//!
//! Every layer answers in these terms; only `api/status.rs` knows what they mean in HTTP and gRPC.

use std::{borrow::Cow, fmt, io, time::Duration};

/// Why a call failed. Deliberately few; introduce a new one only when clients must act differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The caller sent something that can never work.
    InvalidArgument,
    /// No such model, version, path or method target.
    NotFound,
    /// The model or the server exists but cannot answer yet, or no longer.
    NotReady,
    /// A configured size limit was exceeded.
    TooLarge,
    /// A bounded queue is full; worth another try after `Error::retry_after`.
    Overloaded,
    /// The caller's deadline passed, or would certainly pass.
    DeadlineExceeded,
    /// The caller went away.
    Cancelled,
    /// The caller did not say who they are, or not convincingly.
    Unauthenticated,
    /// Not allowed: to this caller, or to anyone by configuration.
    Forbidden,
    /// It cannot be done as things stand now, or somebody else has changed them meanwhile.
    Conflict,
    /// The feature exists in the protocol and not here.
    Unimplemented,
    /// The model or the server failed; the caller did nothing wrong.
    Internal,
}

impl Code {
    /// Every code, for tables and tests.
    pub const ALL: [Code; 12] = [
        Code::InvalidArgument,
        Code::NotFound,
        Code::NotReady,
        Code::TooLarge,
        Code::Overloaded,
        Code::DeadlineExceeded,
        Code::Cancelled,
        Code::Unauthenticated,
        Code::Forbidden,
        Code::Conflict,
        Code::Unimplemented,
        Code::Internal,
    ];

    /// The code in snake_case, as metrics and logs write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::InvalidArgument => "invalid_argument",
            Code::NotFound => "not_found",
            Code::NotReady => "not_ready",
            Code::TooLarge => "too_large",
            Code::Overloaded => "overloaded",
            Code::DeadlineExceeded => "deadline_exceeded",
            Code::Cancelled => "cancelled",
            Code::Unauthenticated => "unauthenticated",
            Code::Forbidden => "forbidden",
            Code::Conflict => "conflict",
            Code::Unimplemented => "unimplemented",
            Code::Internal => "internal",
        }
    }
}

/// A failed call: its code, and a sentence that names the operands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub code: Code,
    pub message: String,
    /// When another try is worth it (set with `Code::Overloaded` only); a load that fails so is tried again.
    pub retry_after: Option<Duration>,
}

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// A model's file that cannot be read: the model's fault where the file is missing or is not what is read of it, and
    /// nobody's where the disk fails, the process lacks something or may not read it.
    pub fn unread(error: &io::Error, message: impl Into<String>) -> Self {
        use io::ErrorKind::{InvalidFilename, IsADirectory, NotADirectory, NotFound};
        let is_of_model = matches!(error.kind(), NotFound | NotADirectory | IsADirectory | InvalidFilename);
        // What the system did not say was found out by who read it.
        let is_found = error.raw_os_error().is_none() && error.kind() != io::ErrorKind::OutOfMemory;
        Self::new(if is_of_model || is_found { Code::InvalidArgument } else { Code::Internal }, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    pub fn overloaded(message: impl Into<String>, retry_after: Duration) -> Self {
        Self { code: Code::Overloaded, message: message.into(), retry_after: Some(retry_after) }
    }

    /// The same failure with the model named in front.
    pub fn of_model(self, model: &str) -> Self {
        Self { message: format!("model '{model}': {}", self.message), ..self }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// At most 64 characters of `text`, for messages that quote what a caller sent.
pub fn shorten(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The beginning and the end of a long `text`, 128 characters of each; for sentences of a library that quote what a
/// caller sent somewhere in the middle.
pub fn abridge(text: &str) -> String {
    const KEPT: usize = 128;
    let head = text.char_indices().nth(KEPT).map(|(end, _)| end);
    let tail = text.char_indices().rev().nth(KEPT - 1).map(|(start, _)| start);
    match (head, tail) {
        (Some(head), Some(tail)) if head < tail => format!("{}…{}", &text[..head], &text[tail..]),
        _ => text.to_owned(),
    }
}

/// Whether a character is not seen itself and may change how a text around it is: a control character, or what Unicode 16
/// calls format characters and separators of lines and paragraphs (Cf, Zl, Zp); some of them turn the text's direction.
pub fn is_unseen(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
                | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2064}'
                | '\u{2066}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}'
                | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0001}'
                | '\u{e0020}'..='\u{e007f}'
        )
}

/// `text` with every character escaped that is not seen itself, for what others say that goes into logs.
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unseen) {
        return Cow::Borrowed(text);
    }
    let shown = |letter: char| if is_unseen(letter) { letter.escape_unicode().to_string() } else { letter.into() };
    Cow::Owned(text.chars().map(shown).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_turns_or_breaks_a_text_is_not_seen() {
        for unseen in ['\0', '\n', '\x1b', '\x7f', '\u{9b}', '\u{200e}', '\u{2028}', '\u{202e}', '\u{2069}', '\u{feff}']
        {
            assert!(is_unseen(unseen), "{unseen:?}");
        }
        assert!(!"Ada’s – größer 版本 \u{301} 🚀 \u{a0}%".chars().any(is_unseen));
    }

    #[test]
    fn what_the_disk_does_is_not_the_models_fault() {
        let code = |error: io::Error| Error::unread(&error, "m").code;
        let errno = |number| code(io::Error::from_raw_os_error(number));
        // No such file, not a folder, a folder.
        assert!([2, 20, 21].into_iter().all(|number| errno(number) == Code::InvalidArgument));
        // May not be read, failed, too many open files, no memory.
        assert!([1, 5, 12, 13, 23, 24].into_iter().all(|number| errno(number) == Code::Internal));
        assert_eq!(code(io::Error::other("not a file")), Code::InvalidArgument);
        assert_eq!(code(io::ErrorKind::UnexpectedEof.into()), Code::InvalidArgument);
        assert_eq!(code(io::ErrorKind::OutOfMemory.into()), Code::Internal);
    }

    #[test]
    fn long_texts_lose_their_end_or_their_middle() {
        let text = "ä".repeat(128) + "ö" + &"ü".repeat(128);
        assert_eq!(shorten(&text), "ä".repeat(64) + "…");
        assert_eq!(abridge(&text), "ä".repeat(128) + "…" + &"ü".repeat(128));
        let short = "ä".repeat(64);
        assert_eq!(shorten(&short), short);
        for short in ["".to_owned(), short, "ä".repeat(256)] {
            assert_eq!(abridge(&short), short);
        }
    }
}
