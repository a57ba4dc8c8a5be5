//! `Wish`: what a request wants of its texts and scores that the model's files and settings say otherwise.

use std::sync::{Arc, atomic::AtomicU64};

use crate::{
    error::{Code, Error},
    id::shorten,
};

/// What a request wants of its texts; what it does not say is as the model's settings and files have it.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Whether texts that are too long are cut.
    pub truncate: Option<bool>,
    /// The end that they lose.
    pub side: Option<Side>,
    /// The name of the prompt that is put before each.
    pub prompt: Option<Arc<str>>,
    /// What the score of a pair is.
    pub scores: Option<Scores>,
    /// Whether tokens were padded on their way here, so that no graph need see it: not by the client, who may mean it.
    pub padded: bool,
    /// Counts the tokens that its texts are.
    pub tokens: Option<Arc<AtomicU64>>,
}

/// An end of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

/// What the score of a pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// The logit.
    Raw,
    /// From 0 to 1.
    Unit,
}

impl Wish {
    /// What requests want that do not say.
    pub const NONE: &'static Self =
        &Self { truncate: None, side: None, prompt: None, scores: None, padded: false, tokens: None };

    /// The same of a copy, whose tokens nobody pays for and whose scores are compared as the models give them.
    #[must_use]
    pub fn of_copy(&self) -> Self {
        Self { scores: None, tokens: None, ..self.clone() }
    }

    /// Whether a model does as it is told that reads texts by itself, if it reads any.
    ///
    /// # Errors
    /// `Unimplemented` naming what it does not do.
    pub fn check_without_tokenizer(&self) -> Result<(), Error> {
        let refused = |wanted: String| Err(Error::new(Code::Unimplemented, wanted));
        match self {
            Self { prompt: Some(name), .. } => {
                refused(format!("prompt_name must be absent, as it has no tokenizer.json, got '{}'", shorten(name)))
            }
            Self { side: Some(Side::Left), .. } => {
                refused("truncation_direction must be 'Right', as it has no tokenizer.json, got 'Left'".to_owned())
            }
            Self { scores: Some(Scores::Raw), .. } => {
                refused("raw_scores must be false: its scores are as its graph gives them".to_owned())
            }
            _ => Ok(()),
        }
    }
}
