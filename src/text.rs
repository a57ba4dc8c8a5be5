//! Raw text in: tokens made of what clients send, and what they ask for made of what the graph gives.
//!
//! A version in Hugging Face's layout says in its files how its texts become tokens and what its outputs mean. [`Front`] is
//! that, read once. Tokens are made before a request is queued ([`Front::encode`]), so that requests of about one length
//! share runs whoever sent them; the session behind it takes either, so that samples and golden cases may hold text.

use std::{path::Path, sync::Arc, time::Instant};

use bytes::{Bytes, BytesMut};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::{
    backend::{Session, Signature, TensorSpec},
    error::{Code, Error},
    tensor::{DType, Data, Tensor, gather},
};

mod folder;
mod heads;
mod tokens;
mod wish;

use folder::Folder;
use heads::Head;
use tokens::{Query, Row, Tokens};
pub use wish::{Scores, Side, Wish};

/// The input that takes raw text.
const TEXT: &str = "text";
/// What graphs of encoder models call their inputs.
const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";
const TYPES: &str = "token_type_ids";
/// What tells a session to give the logits of pairs beside their scores. It is no input of any graph, and for runs of
/// those who want them alone.
const LOGITS: &str = "logits";

/// Tokens of one run, padding included, where nobody knows better: more make no run faster.
const MOST_TOKENS: usize = 16_384;
/// Bytes of text that one request has encoded before others have their turn: some milliseconds' worth.
const BIT: usize = 8 << 10;
/// The part of its longest row by which others of a part may be shorter. Runs of several parts may have twice as much.
const SPREAD: usize = 20;
/// Rows and tokens of each that warm-up is given.
const SAMPLE: (u32, usize) = (4, 64);
/// Tokens of a row, without and with padding, that is to show whether padding changes answers.
const PADDED: (usize, usize) = (21, 48);

/// How raw text is taken, of models that have a tokenizer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Whether raw text is taken. Default: where the files say how. A graph of ONNX is served as it is where they say what is
    /// not supported, with a note; with true it fails.
    pub enabled: Option<bool>,
    /// Whether texts that are too long are cut; else they are refused. Default: true. Requests that may say it themselves
    /// have the last word.
    pub truncate: Option<bool>,
    /// Tokens that a text may have, special ones included. Default: what the model's files say, else 8192. Of a text of more
    /// than 256 bytes for each of them, and 64 KiB, no more is looked at.
    pub max_length: Option<usize>,
    /// What is put before each text, "query: " for instance. Default: the default prompt that the model's files name.
    pub prompt: Option<String>,
    /// How an embedding is made of those of a text's tokens: "mean", "cls" or "last". Default: what the model's files
    /// say, else "mean".
    pub pooling: Option<Pooling>,
    /// Whether embeddings have length 1. Default: what the model's files say, else false.
    pub normalize: Option<bool>,
}

/// How an embedding is made of those of a text's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    Mean,
    Cls,
    Last,
}

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

/// How a model takes text, and what its answers mean.
pub struct Front {
    tokens: Tokens,
    head: Head,
    inputs: Vec<Input>,
    /// Whether the graph tells padding from text.
    pads: bool,
    /// Tokens that a row may have, and ids that there are, as far as the files say.
    most: Option<usize>,
    vocabulary: Option<u32>,
    /// Long texts are encoded by one thread at a time, some of each request in turn.
    pub turns: Arc<Semaphore>,
    /// What the session behind it looks like from outside.
    signature: Signature,
}

/// An input of the graph.
struct Input {
    name: Arc<str>,
    dtype: DType,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ids,
    Mask,
    Types,
}

/// A session that takes text as well as tokens, and answers what the model is asked for.
struct Fronted {
    inner: Box<dyn Session>,
    front: Arc<Front>,
}

impl Front {
    /// Reads the files of a version in `files` whose graph is that of `session`. Unless one is `needed`, there is `None` for
    /// a graph that is no encoder's, or that has no tokenizer.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file and what was expected of it; what a run fails with.
    pub fn open(
        files: &Path,
        settings: &Settings,
        session: &mut dyn Session,
        needed: bool,
    ) -> Result<Option<Arc<Self>>, Error> {
        let Some(mut front) = Self::read(files, settings, session.signature(), needed)? else { return Ok(None) };
        front.pads = front.pads && front.tells_padding(session)?;
        Ok(Some(Arc::new(front)))
    }

    fn read(files: &Path, settings: &Settings, graph: &Signature, needed: bool) -> Result<Option<Self>, Error> {
        let none = |reason: String| if needed { Err(Error::invalid(reason)) } else { Ok(None) };
        let Some(inputs) = inputs_of(graph) else {
            return none(format!(
                "the graph takes no raw text: its inputs are not '{IDS}', '{MASK}' and '{TYPES}', [-1, -1]"
            ));
        };
        let Some(tokenizer) = folder::tokenizer(files)? else {
            return none(format!("{} has no {}, and its model takes tokens", files.display(), folder::TOKENIZER));
        };
        let folder = Folder::read(files)?;
        let Some(head) = Head::of(graph, (files, &folder), settings)? else {
            return none(format!("the graph takes no raw text: none of its outputs is {}", heads::KNOWN));
        };
        let tokens = Tokens::new(&tokenizer, &folder, settings)?;
        let signature = signature(graph, &head);
        let pads = inputs.iter().any(|input| input.kind == Kind::Mask);
        let (most, vocabulary) = (folder.most, folder.config.vocabulary());
        let turns = Arc::new(Semaphore::new(1));
        Ok(Some(Self { tokens, head, inputs, signature, pads, most, vocabulary, turns }))
    }

    /// Whether a row gets the same answer with padding behind it as without.
    fn tells_padding(&self, session: &mut dyn Session) -> Result<bool, Error> {
        // With room for padding, however short texts may be.
        let row = self.tokens.made_up(0, PADDED.0.min(self.tokens.longest() / 2).max(1));
        let length = row.ids.len();
        let mut answer = |length: usize| {
            let inputs = self.tensors(&[&row], length);
            let outputs = session.run(&inputs)?;
            self.head.apply(&outputs, 1, self.mask(&inputs))
        };
        let (alone, padded) = (answer(length)?, answer(self.tokens.longest().min(PADDED.1).max(length))?);
        Ok(alone.iter().zip(&padded).all(|(alone, padded)| heads::agree(alone, padded)))
    }

    fn mask<'a>(&self, inputs: &'a [Tensor]) -> Option<&'a Tensor> {
        inputs.iter().zip(&self.inputs).find(|(_, input)| input.kind == Kind::Mask).map(|(tensor, _)| tensor)
    }

    /// The session that takes text as well.
    pub fn before(self: &Arc<Self>, session: Box<dyn Session>) -> Box<dyn Session> {
        Box::new(Fronted { inner: session, front: Arc::clone(self) })
    }

    /// What operators should know of how it takes text.
    pub fn note(&self) -> Option<&'static str> {
        let has_mask = self.inputs.iter().any(|input| input.kind == Kind::Mask);
        let note = "its answers change with padding, in spite of its mask: only texts of exactly one length share runs";
        (has_mask && !self.pads).then_some(note)
    }

    /// Whether the inputs are text that is to be encoded.
    pub fn is_text(inputs: &[Tensor]) -> bool {
        matches!(inputs, [text] if &*text.name == TEXT)
    }

    /// Whether texts are so few and so short that a thread may encode them that others wait for.
    pub fn is_quick(&self, text: &Tensor, wish: &Wish) -> bool {
        self.tokens.is_quick(text, wish)
    }

    /// Whether the model can do as it is told.
    ///
    /// # Errors
    /// `Unimplemented` naming the prompts that it has.
    pub fn check_wish(&self, wish: &Wish) -> Result<(), Error> {
        self.tokens.prompt(wish).map(|_| ())
    }

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

    fn check_room(&self, name: &str, tokens: usize, limits: &Limits) -> Result<(), Error> {
        let (bytes, most) = (tokens.saturating_mul(self.inputs.len() * size_of::<i64>()), limits.bytes);
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

    /// Whether tokens that a client sent are some that the model knows.
    ///
    /// # Errors
    /// `InvalidArgument` naming the input and what was expected, `TooLarge` for more tokens than `limits` allow.
    pub fn check(&self, inputs: &[Tensor], limits: &Limits) -> Result<(), Error> {
        let Some(ids) = inputs.iter().find(|tensor| &*tensor.name == IDS) else { return Ok(()) };
        self.check_room(IDS, ids.shape.iter().product(), limits)?;
        if let Some(other) = inputs.iter().find(|other| other.shape != ids.shape) {
            let (name, shape, expected) = (&other.name, &other.shape[..], &ids.shape[..]);
            let message = format!("input '{name}' must have the shape of '{IDS}', {expected:?}, got {shape:?}");
            return Err(Error::invalid(message));
        }
        if let (Some(most), Some(&length)) = (self.most, ids.shape.get(1))
            && length > most
        {
            let message = format!("input '{IDS}' has rows of {length} tokens, and the model takes {most}");
            return Err(Error::invalid(message));
        }
        if ids.shape.contains(&0) {
            return Err(Error::invalid(format!("input '{IDS}' has shape {:?}, which holds no token", &ids.shape[..])));
        }
        for tensor in inputs {
            let (what, most) = match &*tensor.name {
                MASK => ("value", 2),
                IDS => ("token", self.vocabulary.map_or(i64::from(i32::MAX), i64::from)),
                _ => continue,
            };
            if let Some((place, found)) = first_outside(tensor, most) {
                let row = place / ids.shape.get(1).copied().unwrap_or(1);
                let message = format!("input '{}', row {row}: there is no {what} {found}", tensor.name);
                return Err(Error::invalid(format!("{message}; there are 0 to {}", most - 1)));
            }
        }
        Ok(())
    }

    /// Tokens that a client sent, in the order of the graph and with what it has left out.
    pub fn complete(&self, inputs: &[Tensor]) -> Vec<Tensor> {
        let given = |name: &str| inputs.iter().find(|tensor| &*tensor.name == name);
        let shape = given(IDS).map(|ids| ids.shape.clone()).unwrap_or_default();
        let complete = |input: &Input| {
            given(&input.name).cloned().unwrap_or_else(|| {
                let value = i64::from(input.kind == Kind::Mask);
                let data = integers(input.dtype, std::iter::repeat_n(value, shape.iter().product()));
                Tensor { name: input.name.clone(), dtype: input.dtype, shape: shape.clone(), data }
            })
        };
        self.inputs.iter().map(complete).collect()
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

    /// Whether rows of other lengths may share a run.
    pub fn pads(&self) -> bool {
        self.pads
    }

    /// What an input of `kind` has where there is no token.
    fn filler(&self, kind: Kind) -> i64 {
        if kind == Kind::Ids { i64::from(self.tokens.padding) } else { 0 }
    }

    /// The outputs with the scores that a request wants, of those of its run.
    pub fn scored(&self, outputs: Vec<Tensor>, wish: &Wish) -> Vec<Tensor> {
        match wish.scores {
            Some(scores) => self.head.scored(outputs, scores),
            None => outputs,
        }
    }

    /// Inputs for warm-up: rows of tokens that differ from each other.
    pub fn sample(&self) -> Vec<Tensor> {
        let (count, length) = SAMPLE;
        let rows: Vec<Row> = (0..count).map(|row| self.tokens.made_up(row, length)).collect();
        let length = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        self.tensors(&rows.iter().collect::<Vec<_>>(), length)
    }

    /// Every input of the graph for texts that are padded to `length` tokens.
    fn tensors(&self, rows: &[&Row], length: usize) -> Vec<Tensor> {
        let of = |input: &Input| {
            let shape = [rows.len(), length].as_slice().into();
            let padding = |row: &Row| length - row.ids.len();
            let pad = |value: i64, row: &Row| std::iter::repeat_n(value, padding(row));
            let data = match input.kind {
                Kind::Ids => integers(
                    input.dtype,
                    rows.iter().flat_map(|row| {
                        row.ids.iter().map(|&id| i64::from(id)).chain(pad(self.filler(Kind::Ids), row))
                    }),
                ),
                Kind::Mask => integers(
                    input.dtype,
                    rows.iter().flat_map(|row| std::iter::repeat_n(1, row.ids.len()).chain(pad(0, row))),
                ),
                Kind::Types => integers(
                    input.dtype,
                    rows.iter().flat_map(|row| row.types.iter().map(|&id| i64::from(id)).chain(pad(0, row))),
                ),
            };
            Tensor { name: input.name.clone(), dtype: input.dtype, shape, data }
        };
        self.inputs.iter().map(of).collect()
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

impl Session for Fronted {
    fn signature(&self) -> &Signature {
        &self.front.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        if let [text] = inputs
            && &*text.name == TEXT
        {
            let encoded = self.front.encode(text, Wish::NONE, &Limits::default())?;
            let outputs = encoded.parts.iter().map(|part| self.run(&part.inputs)).collect::<Result<Vec<_>, Error>>()?;
            return Ok(encoded.assemble(outputs));
        }
        let wants_logits = inputs.iter().any(|input| &*input.name == LOGITS);
        let inputs = self.front.complete(inputs);
        let outputs = self.inner.run(&inputs)?;
        let rows = inputs.first().map_or(0, Tensor::rows);
        let mut answer = self.front.head.apply(&outputs, rows, self.front.mask(&inputs))?;
        if wants_logits {
            answer.extend(self.front.head.logits(&outputs));
        }
        Ok(answer)
    }

    fn gather(&self, requests: &[&[Tensor]]) -> Vec<Tensor> {
        let length = |inputs: &&[Tensor]| inputs.first().and_then(|input| input.shape.get(1)).copied().unwrap_or(0);
        let longest = requests.iter().map(length).max().unwrap_or(0);
        let whole = |index: usize| {
            let of = |inputs: &&[Tensor]| match self.front.inputs.get(index) {
                Some(input) => pad(inputs[index].clone(), longest, self.front.filler(input.kind)),
                // What is no input of the graph has no length.
                None => inputs[index].clone(),
            };
            let parts: Vec<Tensor> = requests.iter().map(of).collect();
            gather(&parts.iter().collect::<Vec<_>>())
        };
        (0..requests.first().map_or(0, |inputs| inputs.len())).map(whole).collect()
    }
}

/// The inputs of a graph that takes tokens; `None` for any other.
fn inputs_of(graph: &Signature) -> Option<Vec<Input>> {
    let input = |spec: &TensorSpec| {
        let kind = match &*spec.name {
            IDS => Kind::Ids,
            MASK => Kind::Mask,
            TYPES => Kind::Types,
            _ => return None,
        };
        let fits = matches!(spec.dtype, DType::Int64 | DType::Int32) && matches!(spec.shape[..], [-1, -1]);
        fits.then(|| Input { name: spec.name.clone(), dtype: spec.dtype, kind })
    };
    let inputs: Vec<Input> = graph.inputs.iter().map(input).collect::<Option<_>>()?;
    inputs.iter().any(|input| input.kind == Kind::Ids).then_some(inputs)
}

/// What the session looks like from outside: text or tokens in, and out what the model is asked for.
fn signature(graph: &Signature, head: &Head) -> Signature {
    let pairs = head.pairs();
    let text = TensorSpec { name: TEXT.into(), dtype: DType::Bytes, shape: pairs.shape() };
    let mut tokens = graph.inputs.clone();
    // The first two are what a request must have one of.
    tokens.sort_by_key(|spec| &*spec.name != IDS);
    let inputs: Vec<TensorSpec> = std::iter::once(text).chain(tokens).collect();
    let optional = inputs.iter().map(|spec| spec.name.clone()).collect();
    let outputs = head.outputs();
    Signature { inputs, outputs, optional, text: Some(pairs), defaults: Vec::new(), steady: false, ..graph.clone() }
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
fn pad(input: Tensor, length: usize, filler: i64) -> Tensor {
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

/// The first number, and its place, that is not from 0 to below `most`.
fn first_outside(tensor: &Tensor, most: i64) -> Option<(usize, i64)> {
    let Data::Plain(bytes) = &tensor.data else { return None };
    let is_outside = |(_, number): &(usize, i64)| !(0..most).contains(number);
    match tensor.dtype {
        DType::Int32 => {
            let numbers = bytes.as_chunks().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes)));
            numbers.enumerate().find(is_outside)
        }
        _ => bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).enumerate().find(is_outside),
    }
}

/// The elements of a tensor of integers.
fn integers(dtype: DType, values: impl Iterator<Item = i64>) -> Data {
    let bytes: Bytes = match dtype {
        #[expect(clippy::cast_possible_truncation, reason = "ids of tokens, far below 2^31")]
        DType::Int32 => values.flat_map(|value| (value as i32).to_le_bytes()).collect(),
        _ => values.flat_map(i64::to_le_bytes).collect(),
    };
    Data::Plain(bytes)
}

/// A file that is not as it must be.
fn wrong(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::new(Code::InvalidArgument, format!("{}: {reason}", path.display()))
}

#[cfg(test)]
mod tests;
