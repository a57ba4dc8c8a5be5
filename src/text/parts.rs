//! Parts of texts: what is tokenized bit by bit, arranged in parts that may run by themselves, and put together again.
//!
//! Texts of a request are sorted by length and divided where padding would be too much, or a run too large; token ids that
//! clients send go the same way.

use std::{sync::Arc, time::Instant};

use bytes::BytesMut;

use super::{
    Front, LOGITS, TEXT, integers,
    tokens::{Query, Row},
    wish::{Scores, Wish},
};
use crate::{
    error::{Code, Error},
    tensor::{DType, Data, Tensor, gather},
};

/// Tokens of one run, padding included, where nobody knows better: more make no run faster.
pub(super) const MOST_TOKENS: usize = 16_384;
/// Bytes of text that one request has encoded before others have their turn: some milliseconds' worth.
const BIT: usize = 8 << 10;
/// The part of its longest row by which others of a part may be shorter. Runs of several parts may have twice as much.
const SPREAD: usize = 20;

/// What tokens of a request there is room and time for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows that may run together.
    pub rows: usize,
    /// Tokens that may run together, padding included.
    pub tokens: usize,
    /// Bytes of tensors.
    pub bytes: usize,
    pub deadline: Option<Instant>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { rows: usize::MAX, tokens: MOST_TOKENS, bytes: usize::MAX, deadline: None }
    }
}

/// Tokens of the rows of a request, where they have lengths and may be padded to those of others; else 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Without padding.
    pub shortest: usize,
    /// Of all rows, with their padding.
    pub longest: usize,
    /// Of all rows together, without padding.
    pub tokens: usize,
}

impl Lengths {
    /// Of rows that have no lengths.
    pub const NONE: Self = Self { shortest: 1, longest: 1, tokens: 0 };
}

/// The texts of a request on their way to become tokens, so that those of others come in between.
pub struct Reading {
    front: Arc<Front>,
    text: Tensor,
    wish: Wish,
    limits: Limits,
    rows: Vec<Row>,
    tokens: usize,
    query: Option<Query>,
}

/// Texts as tokens, in parts that may run by themselves.
pub struct Encoded {
    pub parts: Vec<Part>,
    /// Tokens of all texts, without padding.
    pub tokens: usize,
    rows: usize,
}

/// Texts of about the same length.
pub struct Part {
    /// Their places in the request.
    rows: Vec<usize>,
    pub lengths: Lengths,
    /// Every input of the graph, in its order.
    pub inputs: Vec<Tensor>,
}

impl Front {
    /// The tokens of `text`, which the signature has taken.
    ///
    /// # Errors
    /// `InvalidArgument` naming the row that is no text, or too long a one; `TooLarge` for more tokens than `limits`
    /// allow, `DeadlineExceeded` when it took too long, `Unimplemented` for prompts that there are not.
    pub fn encode(&self, text: &Tensor, wish: &Wish, limits: &Limits) -> Result<Encoded, Error> {
        self.arrange(&self.tokens.rows(text, wish, limits.deadline)?, wish, limits)
    }

    /// The same for texts that are many or long, bit by bit.
    pub fn reading(self: &Arc<Self>, text: Tensor, wish: Wish, limits: Limits) -> Reading {
        Reading { front: Arc::clone(self), text, wish, limits, rows: Vec::new(), tokens: 0, query: None }
    }

    /// What texts and their tokens will hold in memory, by a token for four bytes.
    pub fn bytes_of_texts(&self, texts: &Tensor) -> usize {
        let (bytes, rows) = (texts.byte_len(), texts.rows());
        let most = self.tokens.longest().saturating_mul(rows);
        bytes.saturating_add(self.bytes_of((bytes / 4).saturating_add(2 * rows).min(most)))
    }

    /// What is made of token ids that a client sent: at most all inputs of the graph.
    pub fn bytes_of_ids(&self, inputs: &[Tensor]) -> usize {
        self.bytes_of(inputs.first().map_or(0, |ids| ids.byte_len() / size_of::<i64>()))
    }

    /// What so many tokens take as inputs of the graph.
    fn bytes_of(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.inputs.len() * size_of::<i64>())
    }

    pub(super) fn check_room(&self, name: &str, tokens: usize, limits: &Limits) -> Result<(), Error> {
        let (bytes, most) = (self.bytes_of(tokens), limits.bytes);
        if bytes <= most {
            return Ok(());
        }
        let message = format!("input '{name}' has {tokens} tokens, which take {bytes} bytes; there is room for {most}");
        Err(Error::new(Code::TooLarge, message))
    }

    fn arrange(&self, rows: &[Row], wish: &Wish, limits: &Limits) -> Result<Encoded, Error> {
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        self.check_room(TEXT, tokens, limits)?;
        // A row without a token is one of padding: no graph takes rows of nothing.
        let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len().max(1)).collect();
        let wants_logits = wish.scores == Some(Scores::Raw) && self.head.hides_logits();
        let parts = self.parts(&lengths, limits, |places, length| {
            let mut inputs = self.tensors(&places.iter().map(|&place| &rows[place]).collect::<Vec<_>>(), length);
            if wants_logits {
                let data = Data::Plain(vec![0; places.len()].into());
                let shape = [places.len(), 1].as_slice().into();
                inputs.push(Tensor { name: LOGITS.into(), dtype: DType::Uint8, shape, data });
            }
            inputs
        });
        Ok(Encoded { parts, tokens, rows: rows.len() })
    }

    /// Rows of `lengths` in parts of about one length; `inputs` makes those of the rows at some places, padded to a length.
    fn parts(&self, lengths: &[usize], limits: &Limits, inputs: impl Fn(&[usize], usize) -> Vec<Tensor>) -> Vec<Part> {
        let mut places: Vec<usize> = (0..lengths.len()).collect();
        places.sort_by_key(|&place| lengths[place]);
        let mut parts = Vec::new();
        let mut rest = &places[..];
        while let Some(&first) = rest.first() {
            let shortest = lengths[first];
            let fits = |&(before, &place): &(usize, &usize)| {
                let length = lengths[place];
                let close = if self.pads { length - shortest <= length / SPREAD } else { length == shortest };
                let few = before < limits.rows && length.saturating_mul(before + 1) <= limits.tokens;
                before == 0 || (close && few)
            };
            let (rows, others) = rest.split_at(rest.iter().enumerate().take_while(fits).count());
            rest = others;
            let longest = rows.last().map_or(0, |&place| lengths[place]);
            let tokens = rows.iter().map(|&place| lengths[place]).sum();
            let lengths = Lengths { shortest, longest, tokens };
            parts.push(Part { rows: rows.to_vec(), lengths, inputs: inputs(rows, longest) });
        }
        parts
    }

    /// Tokens that a client sent, complete, as parts like those of texts: without the padding at their ends, where that
    /// makes no difference or is none of the client's.
    pub fn split(&self, inputs: Vec<Tensor>, wish: &Wish, limits: &Limits) -> Encoded {
        let rows = inputs.first().map_or(0, Tensor::rows);
        let width = inputs.first().and_then(|ids| ids.shape.get(1)).copied().unwrap_or(1);
        let lengths = match self.mask(&inputs) {
            Some(mask) if self.pads || wish.padded => without_padding(mask, width),
            _ => vec![width; rows],
        };
        let tokens = lengths.iter().sum();
        let parts = self.parts(&lengths, limits, |places, length| {
            let in_a_row = places.windows(2).all(|pair| pair[1] == pair[0] + 1);
            match places.first() {
                // As it came, without a copy.
                Some(&first) if length == width && in_a_row => {
                    inputs.iter().map(|input| input.slice(first, places.len())).collect()
                }
                _ => inputs.iter().map(|input| cut(input, places, length)).collect(),
            }
        });
        Encoded { parts, tokens, rows }
    }
}

impl Reading {
    /// Makes tokens of some more texts, for a few milliseconds or one text; whether none is left.
    ///
    /// # Errors
    /// As [`Front::encode`].
    pub fn read_on(&mut self) -> Result<bool, Error> {
        let (start, rows, tokens) = (self.rows.len(), self.text.rows(), &self.front.tokens);
        let mut costs = tokens.costs(&self.text, &self.wish, start)?;
        let mut bytes = 0;
        let end = (start..rows).find(|_| {
            let is_full = bytes >= BIT;
            bytes += costs.next().unwrap_or(0);
            is_full
        });
        let end = end.unwrap_or(rows);
        let more = tokens.rows_at(start..end, &self.text, &self.wish, self.limits.deadline, &mut self.query)?;
        self.tokens += more.iter().map(|row| row.ids.len()).sum::<usize>();
        self.rows.extend(more);
        self.front.check_room(TEXT, self.tokens, &self.limits)?;
        Ok(end == rows)
    }

    /// The tokens of all texts, once none is left.
    ///
    /// # Errors
    /// As [`Front::encode`].
    pub fn finish(self) -> Result<Encoded, Error> {
        self.front.arrange(&self.rows, &self.wish, &self.limits)
    }
}

impl Encoded {
    /// The outputs of the whole request from those of its parts, in the parts' order.
    pub fn assemble(&self, mut outputs: Vec<Vec<Tensor>>) -> Vec<Tensor> {
        if let ([part], [_]) = (&self.parts[..], &outputs[..])
            && part.rows.is_sorted()
        {
            return outputs.swap_remove(0);
        }
        let mut places = vec![(0, 0); self.rows];
        for (part, rows) in self.parts.iter().enumerate() {
            rows.rows.iter().enumerate().for_each(|(row, &place)| places[place] = (part, row));
        }
        let count = outputs.first().map_or(0, Vec::len);
        let whole = |output: usize| {
            let rows: Vec<Tensor> = places.iter().map(|&(part, row)| outputs[part][output].slice(row, 1)).collect();
            gather(&rows.iter().collect::<Vec<_>>())
        };
        (0..count).map(whole).collect()
    }
}

/// The length of each row up to its last token that `mask` has, at least 1.
fn without_padding(mask: &Tensor, width: usize) -> Vec<usize> {
    let Data::Plain(bytes) = &mask.data else { return vec![width; mask.rows()] };
    let size = size_of_element(mask.dtype);
    let length = |row: &[u8]| {
        let last = row.chunks_exact(size).rposition(|element| element.iter().any(|&byte| byte != 0));
        last.map_or(1, |last| last + 1)
    };
    bytes.chunks_exact((width * size).max(1)).map(length).collect()
}

/// The first `length` elements of the rows at `places`.
fn cut(input: &Tensor, places: &[usize], length: usize) -> Tensor {
    let shape = [places.len(), length].as_slice().into();
    let Data::Plain(bytes) = &input.data else { return input.clone() };
    let size = size_of_element(input.dtype);
    let width = input.shape.get(1).copied().unwrap_or(1) * size;
    let mut kept = BytesMut::with_capacity(places.len() * length * size);
    places.iter().for_each(|&place| kept.extend_from_slice(&bytes[place * width..][..length * size]));
    Tensor { name: input.name.clone(), dtype: input.dtype, shape, data: Data::Plain(kept.freeze()) }
}

/// Rows with `filler` behind them up to `length` elements.
pub(super) fn pad(input: Tensor, length: usize, filler: i64) -> Tensor {
    let width = input.shape.get(1).copied().unwrap_or(length);
    let Data::Plain(bytes) = &input.data else { return input };
    if width >= length {
        return input;
    }
    let Data::Plain(filler) = integers(input.dtype, std::iter::repeat_n(filler, length - width)) else { return input };
    let mut padded = BytesMut::with_capacity(input.rows() * length * size_of_element(input.dtype));
    for row in bytes.chunks_exact((width * size_of_element(input.dtype)).max(1)) {
        padded.extend_from_slice(row);
        padded.extend_from_slice(&filler);
    }
    let shape = [input.rows(), length].as_slice().into();
    Tensor { shape, data: Data::Plain(padded.freeze()), ..input }
}

fn size_of_element(dtype: DType) -> usize {
    if dtype == DType::Int32 { size_of::<i32>() } else { size_of::<i64>() }
}

#[cfg(test)]
mod tests;
