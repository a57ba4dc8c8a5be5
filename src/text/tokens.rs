//! Texts to tokens, by the model's own tokenizer.

use std::path::PathBuf;

use tokenizers::{
    Encoding, PostProcessor, Tokenizer, TruncationParams,
    utils::truncation::{TruncationStrategy, truncate_encodings},
};

use super::{Settings, folder::Folder, wrong};
use crate::{
    error::Error,
    tensor::{Data, Tensor},
};

/// Bytes of texts that an I/O thread may encode by itself: some ten microseconds.
pub(super) const QUICK_BYTES: usize = 2048;

/// The tokens of one text.
pub(super) struct Row {
    pub ids: Vec<u32>,
    /// 0 for tokens of the first text of a pair, 1 for those of the second.
    pub types: Vec<u32>,
}

/// The tokenizer, and what the model wants of it.
pub(super) struct Tokens {
    tokenizer: Tokenizer,
    /// Tokens that one text may have; `None` where nothing says so.
    max_length: Option<usize>,
    truncate: bool,
    lower_case: bool,
    prompt: String,
    /// The id of padding.
    pub padding: u32,
    vocabulary: u32,
}

impl Tokens {
    /// # Errors
    /// `InvalidArgument` naming the file that is no tokenizer, or the setting that it cannot follow.
    pub fn new((path, bytes): &(PathBuf, Vec<u8>), folder: &Folder, settings: &Settings) -> Result<Self, Error> {
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| wrong(path, error))?;
        // Cutting and padding are done here, where it is known what with.
        tokenizer.with_truncation(None).map_err(|error| wrong(path, error))?;
        let padding = tokenizer.get_padding().map(|padding| padding.pad_id);
        tokenizer.with_padding(None);
        if let (Some(wanted), Some(most)) = (settings.max_length, folder.most)
            && wanted > most
        {
            return Err(Error::invalid(format!("text.max_length is {wanted}, and the model takes {most} tokens")));
        }
        let max_length = settings.max_length.or(folder.max_length);
        let vocabulary = u32::try_from(tokenizer.get_vocab_size(true)).unwrap_or(u32::MAX);
        let tokens = Self {
            max_length,
            truncate: settings.truncate.unwrap_or(true),
            lower_case: folder.lower_case,
            prompt: settings.prompt.clone().or_else(|| folder.prompt.clone()).unwrap_or_default(),
            padding: folder.config.pad_token_id.or(padding).unwrap_or(0),
            vocabulary: folder.config.vocab_size.unwrap_or(vocabulary).min(vocabulary),
            tokenizer,
        };
        let special = tokens.special(true);
        match tokens.max_length {
            Some(most) if most <= special => {
                Err(Error::invalid(format!("text.max_length is {most}, and {special} tokens are special ones")))
            }
            _ => Ok(tokens),
        }
    }

    /// The tokens of each text, or of each pair of texts.
    ///
    /// # Errors
    /// `InvalidArgument` naming the row that is no text, or too long a one.
    pub fn rows(&self, text: &Tensor, truncate: Option<bool>) -> Result<Vec<Row>, Error> {
        let Data::Strings(texts) = &text.data else {
            return Err(Error::internal("texts that are no strings"));
        };
        if texts.is_empty() {
            return Err(Error::invalid(format!("input '{}' holds no text", text.name)));
        }
        let truncate = truncate.unwrap_or(self.truncate);
        let width = if text.shape.get(1) == Some(&2) { 2 } else { 1 };
        texts
            .chunks(width)
            .enumerate()
            .map(|(row, texts)| {
                let of_row = |reason: String| Error::invalid(format!("input '{}', row {row}: {reason}", text.name));
                let mut read = texts
                    .iter()
                    .map(|text| std::str::from_utf8(text).map_err(|error| of_row(format!("it is no UTF-8: {error}"))));
                let first = read.next().unwrap_or(Ok(""))?;
                let second = read.next().transpose()?;
                self.row(first, second, truncate).map_err(of_row)
            })
            .collect()
    }

    fn row(&self, first: &str, second: Option<&str>, truncate: bool) -> Result<Row, String> {
        let first = self.encode(first)?;
        let second = second.map(|text| self.encode(text)).transpose()?;
        let (first, second) = self.cut(first, second, truncate)?;
        let mut whole = self
            .tokenizer
            .post_process(first, second, true)
            .map_err(|error| format!("it cannot be tokenized: {error}"))?;
        let types = whole.get_type_ids().to_vec();
        // What a tokenizer without padding counts is tokens.
        whole.take_overflowing();
        Ok(Row { ids: whole.get_ids().to_vec(), types })
    }

    /// One text, without special tokens.
    fn encode(&self, text: &str) -> Result<Encoding, String> {
        let failed = |error| format!("it cannot be tokenized: {error}");
        if self.prompt.is_empty() && !self.lower_case {
            return self.tokenizer.encode_fast(text, false).map_err(failed);
        }
        let text = format!("{}{text}", self.prompt);
        let text = if self.lower_case { text.to_lowercase() } else { text };
        self.tokenizer.encode_fast(text, false).map_err(failed)
    }

    /// Makes room for the special tokens: of a pair, the longer text is cut first.
    fn cut(
        &self,
        first: Encoding,
        second: Option<Encoding>,
        truncate: bool,
    ) -> Result<(Encoding, Option<Encoding>), String> {
        let Some(most) = self.max_length else { return Ok((first, second)) };
        let special = self.special(second.is_some());
        let tokens = first.len() + second.as_ref().map_or(0, Encoding::len) + special;
        if tokens <= most {
            return Ok((first, second));
        }
        if !truncate {
            return Err(format!("it has {tokens} tokens, and the model takes {most}"));
        }
        let params = TruncationParams {
            max_length: most.saturating_sub(special),
            strategy: TruncationStrategy::LongestFirst,
            ..TruncationParams::default()
        };
        truncate_encodings(first, second, &params).map_err(|error| format!("it cannot be cut: {error}"))
    }

    /// The special tokens of a text, or of a pair.
    fn special(&self, is_pair: bool) -> usize {
        self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(is_pair))
    }

    /// The length to which `length` tokens are padded, so that requests of almost one length share runs: at most an eighth
    /// more, and half of that for most.
    pub fn padded(&self, length: usize) -> usize {
        let step = (length.next_power_of_two() / 16).max(1);
        let padded = length.next_multiple_of(step);
        self.max_length.map_or(padded, |most| padded.min(most.max(length)))
    }

    /// A text of `length` tokens, for warm-up: the same for the same `number`.
    pub fn made_up(&self, number: u32, length: usize) -> Row {
        let length = self.max_length.map_or(length, |most| most.min(length));
        let mut state = number.wrapping_mul(2_654_435_761).wrapping_add(1);
        let id = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % self.vocabulary.max(1)
        };
        let ids: Vec<u32> = (0..length).map(id).map(|id| if id == self.padding { id + 1 } else { id }).collect();
        let ids = ids.into_iter().map(|id| id.min(self.vocabulary.saturating_sub(1))).collect();
        Row { ids, types: vec![0; length] }
    }
}
