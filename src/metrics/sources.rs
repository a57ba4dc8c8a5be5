//! How the places stand that models are mirrored from.

use std::time::SystemTime;

use super::{
    families::{SOURCE_ANSWERED, SOURCE_FETCHING, SOURCE_PROBLEMS, SOURCE_UP, SOURCE_WRITE_BACKS},
    page::Page,
};

/// How a place stands.
pub struct SourceStanding<'a> {
    /// Its URI, without credentials.
    pub source: &'a str,
    /// Whether it answered the last look.
    pub up: bool,
    pub answered: Option<SystemTime>,
    /// What could not be mirrored.
    pub problems: usize,
    /// Bytes still to come of what is being fetched.
    pub fetching: u64,
    /// Tries to write back, by outcome; empty where nothing is.
    pub write_backs: Vec<(&'a str, u64)>,
}

impl Page {
    /// Shows how a place stands.
    pub fn source(&mut self, of: &SourceStanding<'_>) {
        let series = [("source", of.source)];
        self.sample(SOURCE_UP, &series, u8::from(of.up));
        let answered = of.answered.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        if let Some(answered) = answered {
            self.sample(SOURCE_ANSWERED, &series, answered.as_secs_f64());
        }
        self.sample(SOURCE_PROBLEMS, &series, of.problems);
        self.sample(SOURCE_FETCHING, &series, of.fetching);
        for (outcome, count) in &of.write_backs {
            self.sample(SOURCE_WRITE_BACKS, &[("source", of.source), ("outcome", outcome)], count);
        }
    }
}
