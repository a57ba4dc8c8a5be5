//! Comma-separated values (RFC 4180): lines of fields, in quotes where they hold commas, quotes or line ends.
//!
//! Line ends may be LF or CR LF, empty lines are passed over, and a quote within a bare field is a plain letter.

use std::borrow::Cow;

use super::{MAX_NAMES, table::too_wide};
use crate::error::Error;

/// The records of a text.
pub(super) struct Records<'a> {
    rest: &'a str,
    /// The line that `rest` begins in, from 1.
    line: usize,
}

impl<'a> Records<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        // Spreadsheets put a byte order mark in front of UTF-8.
        Self { rest: text.strip_prefix('\u{feff}').unwrap_or(text), line: 1 }
    }

    /// Replaces `fields` by the next record's; false when there is none.
    ///
    /// # Errors
    /// `InvalidArgument` naming the line, for quotes that do not close, or do and the field goes on.
    pub(super) fn read(&mut self, fields: &mut Vec<Cow<'a, str>>) -> Result<bool, Error> {
        fields.clear();
        while let Some(rest) = self.rest.strip_prefix('\n').or_else(|| self.rest.strip_prefix("\r\n")) {
            self.rest = rest;
            self.line += 1;
        }
        if self.rest.is_empty() {
            return Ok(false);
        }
        loop {
            if fields.len() == MAX_NAMES {
                return Err(too_wide());
            }
            let field = match self.rest.strip_prefix('"') {
                Some(inside) => self.quoted(inside)?,
                None => self.bare(),
            };
            fields.push(field);
            match self.rest.strip_prefix(',') {
                Some(rest) => self.rest = rest,
                None => break,
            }
        }
        // Here stands a line end, or nothing.
        let end = self.rest.strip_prefix("\r\n").or_else(|| self.rest.strip_prefix('\n'));
        self.rest = end.unwrap_or_default();
        self.line += 1;
        Ok(true)
    }

    fn bare(&mut self) -> Cow<'a, str> {
        let end = self.rest.find([',', '\n']).unwrap_or(self.rest.len());
        let (mut field, mut rest) = self.rest.split_at(end);
        if rest.starts_with('\n') && field.ends_with('\r') {
            (field, rest) = self.rest.split_at(end - 1);
        }
        self.rest = rest;
        field.into()
    }

    fn quoted(&mut self, inside: &'a str) -> Result<Cow<'a, str>, Error> {
        let line = self.line;
        let mut from = 0;
        loop {
            let Some(found) = inside[from..].find('"') else {
                return Err(Error::invalid(format!("line {line} has a quote that is never closed")));
            };
            let end = from + found;
            let rest = &inside[end + 1..];
            if rest.starts_with('"') {
                from = end + 2;
                continue;
            }
            if !(rest.is_empty() || rest.starts_with([',', '\n']) || rest.starts_with("\r\n")) {
                return Err(Error::invalid(format!("line {line} has a field that goes on after its closing quote")));
            }
            self.rest = rest;
            let field = &inside[..end];
            self.line += field.matches('\n').count();
            return Ok(if field.contains('"') { field.replace("\"\"", "\"").into() } else { field.into() });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn records(text: &str) -> Result<Vec<Vec<String>>, Error> {
        let mut records = Records::new(text);
        let (mut fields, mut all) = (Vec::new(), Vec::new());
        while records.read(&mut fields)? {
            all.push(fields.iter().map(|field| field.clone().into_owned()).collect());
        }
        Ok(all)
    }

    #[test]
    fn fields_and_lines() {
        let text = "\u{feff}a,\"b \"\"c\"\"\",\r\n\r\n\"x\ny\",\"1,2\",it's 5\" wide\n\n";
        assert_eq!(records(text).unwrap(), [["a", "b \"c\"", ""], ["x\ny", "1,2", "it's 5\" wide"]]);
        assert!(records("").unwrap().is_empty());
        assert_eq!(records("a").unwrap(), [["a"]]);
        assert_eq!(records(",").unwrap(), [["", ""]]);
        assert_eq!(records("\"\"").unwrap(), [[""]]);
        assert_eq!(records("a\r").unwrap(), [["a\r"]]);
    }

    #[test]
    fn quotes_must_close() {
        let message = |text: &str| records(text).unwrap_err().message;
        assert_eq!(message("a\n\"x\ny\"\n\"b"), "line 4 has a quote that is never closed");
        assert_eq!(message("\"a\"b"), "line 1 has a field that goes on after its closing quote");
        assert!(message(&",".repeat(MAX_NAMES)).contains("columns"));
    }

    proptest! {
        #[test]
        fn what_is_quoted_comes_back(table in vec(vec(any::<String>(), 3), 0..5)) {
            let quoted = |field: &String| format!("\"{}\"", field.replace('"', "\"\""));
            let line = |row: &Vec<String>| row.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n";
            prop_assert_eq!(records(&table.iter().map(line).collect::<String>()).unwrap(), table);
        }

        #[test]
        fn noise_never_panics(text in "[a\",\r\né]{0,32}") {
            let _ = records(&text);
        }
    }
}
