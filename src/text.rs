//! Raw text in: tokens made of what clients send, and what they ask for made of what the graph gives.
//!
//! A version in Hugging Face's layout says in its files how its texts become tokens and what its outputs mean. [`Front`] is
//! that, read once. Tokens are made before a request is queued ([`Front::encode`]), so that requests of about one length
//! share runs whoever sent them; the session behind it takes either, so that samples and golden cases may hold text.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    backend::{Session, Signature, TensorSpec},
    error::{Code, Error},
    tensor::{DType, Data, Tensor, gather},
};

mod folder;
mod heads;
mod parts;
#[cfg(test)]
mod testing;
mod tokens;
mod wish;

use folder::Folder;
use heads::Head;
use parts::pad;
pub use parts::{Encoded, Lengths, Limits, Part, Reading};
use tokens::{Row, Tokens};
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
        Ok(Some(Self { tokens, head, inputs, signature, pads, most, vocabulary }))
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
