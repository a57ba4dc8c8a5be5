//! Texts to tokens, by the model's own tokenizer.

use std::{collections::BTreeMap, ops::Range, path::PathBuf, time::Instant};

use bytes::Bytes;
use tokenizers::{
    Encoding, PostProcessor, Tokenizer, TruncationDirection, TruncationParams,
    normalizers::Lowercase,
    utils::truncation::{TruncationStrategy, truncate_encodings},
};

use super::{Settings, Side, Wish, folder::Folder, wrong};
use crate::{
    error::{Code, Error},
    id::shorten,
    tensor::{Data, Tensor},
};

/// Bytes of texts that an I/O thread may encode by itself: some hundred microseconds at most.
const QUICK_BYTES: usize = 256;
/// What a row costs beside its text, in bytes of texts.
const ROW_BYTES: usize = 32;
/// Tokens of a text where no file says how many there may be.
const DEFAULT_LENGTH: usize = 8192;
/// Bytes for each token that the model takes, and bytes in any case, beyond which a text is not even looked at: words are
/// never so long, and who sends a megabyte shall not have all of it tokenized for 512 tokens.
const TOKEN_BYTES: usize = 256;
const LEAST_BYTES: usize = 64 << 10;
/// Prompts that a complaint lists at most.
const SHOWN: usize = 8;

/// The tokens of one text.
pub(super) struct Row {
    pub ids: Vec<u32>,
    /// 0 for tokens of the first text of a pair, 1 for those of the second.
    pub types: Vec<u32>,
}

/// The first text of a pair, which comes with each text that it is held against.
pub(super) struct Query {
    text: Bytes,
    encoding: Encoding,
}

/// The tokenizer, and what the model wants of it.
pub(super) struct Tokens {
    tokenizer: Tokenizer,
    /// Tokens that one text may have.
    max_length: usize,
    truncate: bool,
    /// The end that is cut off.
    direction: TruncationDirection,
    prompt: String,
    /// Those that a request may want instead.
    prompts: BTreeMap<String, String>,
    /// Whether the tokens of a prompt count where all of a text's do.
    includes_prompt: bool,
    /// The id of padding.
    pub padding: u32,
    /// Ids that the model and the tokenizer know.
    vocabulary: u32,
}

/// How the texts of a request become tokens.
struct Manner<'a> {
    truncate: bool,
    direction: TruncationDirection,
    prompt: &'a str,
}

impl Tokens {
    /// # Errors
    /// `InvalidArgument` naming the file that is no tokenizer, or the setting that it cannot follow.
    pub fn new((path, bytes): &(PathBuf, Vec<u8>), folder: &Folder, settings: &Settings) -> Result<Self, Error> {
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| wrong(path, error))?;
        let direction = match folder.truncation_side.as_deref() {
            Some("left") => TruncationDirection::Left,
            Some(_) => TruncationDirection::Right,
            None => tokenizer.get_truncation().map(|truncation| truncation.direction).unwrap_or_default(),
        };
        // Cutting and padding are done here, where it is known what with.
        tokenizer.with_truncation(None).map_err(|error| wrong(path, error))?;
        let padding = tokenizer.get_padding().map(|padding| padding.pad_id);
        tokenizer.with_padding(None);
        if folder.lower_case && tokenizer.get_normalizer().is_none() {
            // Those that have a normalizer are taught by it.
            tokenizer.with_normalizer(Some(Lowercase)).map_err(|error| wrong(path, error))?;
        }
        if let (Some(wanted), Some(most)) = (settings.max_length, folder.most)
            && wanted > most
        {
            return Err(Error::invalid(format!("text.max_length is {wanted}, and the model takes {most} tokens")));
        }
        let max_length = settings.max_length.or(folder.max_length).unwrap_or(DEFAULT_LENGTH);
        let vocabulary = u32::try_from(tokenizer.get_vocab_size(true)).unwrap_or(u32::MAX);
        let tokens = Self {
            max_length,
            truncate: settings.truncate.unwrap_or(true),
            direction,
            prompt: settings.prompt.clone().or_else(|| folder.prompt.clone()).unwrap_or_default(),
            prompts: folder.prompts.clone(),
            includes_prompt: folder.includes_prompt,
            padding: folder.config.pad_token_id.and_then(|id| u32::try_from(id).ok()).or(padding).unwrap_or(0),
            vocabulary: folder.config.vocabulary().unwrap_or(vocabulary).min(vocabulary),
            tokenizer,
        };
        let special = tokens.special(true);
        if max_length <= special {
            let message = format!("texts may have {max_length} tokens (text.max_length, or what the files say)");
            return Err(Error::invalid(format!("{message}, and {special} tokens of a pair are special ones")));
        }
        if !tokens.includes_prompt && !tokens.prompt.is_empty() {
            let message =
                "a prompt that is left out of the pooling (include_prompt) is not supported; set text.prompt = \"\"";
            return Err(Error::invalid(message));
        }
        Ok(tokens)
    }

    /// Whether an I/O thread may encode the texts.
    pub fn is_quick(&self, text: &Tensor, wish: &Wish) -> bool {
        let prompt = self.prompt(wish).map_or(0, str::len);
        text.byte_len().saturating_add(prompt.saturating_mul(text.rows())) <= QUICK_BYTES
    }

    /// What is put before each text.
    ///
    /// # Errors
    /// `Unimplemented` naming the prompts there are.
    pub fn prompt(&self, wish: &Wish) -> Result<&str, Error> {
        let Some(name) = &wish.prompt else { return Ok(&self.prompt) };
        let refused = |message| Err(Error::new(Code::Unimplemented, message));
        match self.prompts.get(&**name) {
            Some(prompt) if prompt.is_empty() || self.includes_prompt => Ok(prompt),
            Some(_) => refused(
                "prompt_name must be absent: a prompt that is left out of the pooling (include_prompt) is not supported"
                    .to_owned(),
            ),
            None => {
                let mut known: Vec<String> =
                    self.prompts.keys().take(SHOWN).map(|name| format!("'{}'", shorten(name))).collect();
                let expected = match self.prompts.len() {
                    0 => "absent, as its files name no prompts".to_owned(),
                    count => {
                        if count > SHOWN {
                            known.push(format!("{} more", count - SHOWN));
                        }
                        format!("one that its files name ({})", known.join(", "))
                    }
                };
                refused(format!("prompt_name must be {expected}, got '{}'", shorten(name)))
            }
        }
    }

    /// Bytes that are tokenized for each row from the one at `start` on, and somewhat more.
    ///
    /// # Errors
    /// As `prompt`.
    pub fn costs<'a>(
        &self,
        text: &'a Tensor,
        wish: &Wish,
        start: usize,
    ) -> Result<impl Iterator<Item = usize> + 'a, Error> {
        let prompt = self.prompt(wish)?.len();
        let strings: &[Bytes] = if let Data::Strings(strings) = &text.data { strings } else { &[] };
        let width = if text.shape.get(1) == Some(&2) { 2 } else { 1 };
        let cost = move |row: usize| {
            let texts = strings.get(row * width..(row + 1) * width).unwrap_or_default();
            // The query of the row before is not tokenized again.
            let is_known = width == 2 && row > 0 && strings.get((row - 1) * width) == texts.first();
            texts[usize::from(is_known).min(texts.len())..].iter().map(|text| text.len() + prompt + ROW_BYTES).sum()
        };
        Ok((start..).map(cost))
    }

    /// The tokens of each text, or of each pair of texts.
    ///
    /// # Errors
    /// `InvalidArgument` naming the row that is no text, or too long a one; `DeadlineExceeded` when it took too long,
    /// `Unimplemented` for prompts that there are not.
    pub fn rows(&self, text: &Tensor, wish: &Wish, deadline: Option<Instant>) -> Result<Vec<Row>, Error> {
        self.rows_at(0..text.rows(), text, wish, deadline, &mut None)
    }

    /// The same for some of them, of which the first may be held against the `query` of the ones before.
    pub fn rows_at(
        &self,
        places: Range<usize>,
        text: &Tensor,
        wish: &Wish,
        deadline: Option<Instant>,
        query: &mut Option<Query>,
    ) -> Result<Vec<Row>, Error> {
        let Data::Strings(texts) = &text.data else {
            return Err(Error::internal("texts that are no strings"));
        };
        if texts.is_empty() {
            return Err(Error::invalid(format!("input '{}' holds no text", text.name)));
        }
        let direction = wish.side.map_or(self.direction, |side| match side {
            Side::Left => TruncationDirection::Left,
            Side::Right => TruncationDirection::Right,
        });
        let truncate = wish.truncate.unwrap_or(self.truncate);
        let manner = &Manner { truncate, direction, prompt: self.prompt(wish)? };
        let width = if text.shape.get(1) == Some(&2) { 2 } else { 1 };
        let mut rows = Vec::with_capacity(places.len());
        for (row, texts) in texts.chunks(width).enumerate().skip(places.start).take(places.len()) {
            if row > 0 && deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(Error::new(Code::DeadlineExceeded, "the deadline passed before its texts were tokens"));
            }
            let of_row = |reason: String| Error::invalid(format!("input '{}', row {row}: {reason}", text.name));
            let (first, second) = (&texts[0], texts.get(1));
            let encoding = match query.take() {
                Some(Query { text, encoding }) if second.is_some() && text == first => encoding,
                _ => self.encode(first, manner).map_err(of_row)?,
            };
            if second.is_some() {
                *query = Some(Query { text: first.clone(), encoding: encoding.clone() });
            }
            let mut second = second.map(|text| self.encode(text, manner)).transpose().map_err(of_row)?;
            if let Some(second) = &mut second {
                // Where no post-processor does it.
                second.set_type_ids(vec![1; second.len()]);
            }
            rows.push(self.row(encoding, second, manner).map_err(of_row)?);
        }
        Ok(rows)
    }

    fn row(&self, first: Encoding, second: Option<Encoding>, manner: &Manner<'_>) -> Result<Row, String> {
        let (first, second) = self.cut(first, second, manner)?;
        let whole = self
            .tokenizer
            .post_process(first, second, true)
            .map_err(|error| format!("it cannot be tokenized: {error}"))?;
        Ok(Row { ids: whole.get_ids().to_vec(), types: whole.get_type_ids().to_vec() })
    }

    /// One text, without special tokens.
    fn encode(&self, text: &[u8], manner: &Manner<'_>) -> Result<Encoding, String> {
        let text = std::str::from_utf8(text).map_err(|error| format!("it is no UTF-8: {error}"))?;
        let text = self.looked_at(text, manner)?;
        let failed = |error| format!("it cannot be tokenized: {error}");
        if manner.prompt.is_empty() {
            return self.tokenizer.encode_fast(text, false).map_err(failed);
        }
        self.tokenizer.encode_fast(format!("{}{text}", manner.prompt), false).map_err(failed)
    }

    /// As much of the text as may be more than the tokens that are wanted of it.
    fn looked_at<'a>(&self, text: &'a str, manner: &Manner<'_>) -> Result<&'a str, String> {
        let most = self.max_length.saturating_mul(TOKEN_BYTES).max(LEAST_BYTES);
        if text.len() <= most {
            return Ok(text);
        }
        if !manner.truncate {
            let tokens = self.max_length;
            return Err(format!("it has {} bytes, and the model takes {tokens} tokens", text.len()));
        }
        Ok(match manner.direction {
            TruncationDirection::Right => &text[..text.floor_char_boundary(most)],
            TruncationDirection::Left => &text[text.ceil_char_boundary(text.len() - most)..],
        })
    }

    /// Makes room for the special tokens: of a pair, the longer text is cut first.
    fn cut(
        &self,
        first: Encoding,
        second: Option<Encoding>,
        manner: &Manner<'_>,
    ) -> Result<(Encoding, Option<Encoding>), String> {
        let most = self.max_length;
        let special = self.special(second.is_some());
        let tokens = first.len() + second.as_ref().map_or(0, Encoding::len) + special;
        if tokens <= most {
            return Ok((first, second));
        }
        if !manner.truncate {
            return Err(format!("it has {tokens} tokens, and the model takes {most}"));
        }
        let params = TruncationParams {
            max_length: most.saturating_sub(special),
            strategy: TruncationStrategy::LongestFirst,
            direction: manner.direction,
            ..TruncationParams::default()
        };
        let cut = truncate_encodings(first, second, &params);
        let (mut first, mut second) = cut.map_err(|error| format!("it cannot be cut: {error}"))?;
        // What was cut off would be put together with all that was cut off of the other text.
        first.take_overflowing();
        if let Some(second) = &mut second {
            second.take_overflowing();
        }
        Ok((first, second))
    }

    /// Tokens that one text may have.
    pub fn longest(&self) -> usize {
        self.max_length
    }

    /// The special tokens of a text, or of a pair.
    fn special(&self, is_pair: bool) -> usize {
        self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(is_pair))
    }

    /// A text of `length` tokens, for warm-up: the same for the same `number`.
    pub fn made_up(&self, number: u32, length: usize) -> Row {
        let length = self.max_length.min(length);
        let mut state = number.wrapping_mul(2_654_435_761).wrapping_add(1);
        let id = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % self.vocabulary.max(2)
        };
        let most = self.vocabulary.max(2);
        let ids = (0..length).map(id).map(|id| if id == self.padding { (id + 1) % most } else { id }).collect();
        Row { ids, types: vec![0; length] }
    }
}
