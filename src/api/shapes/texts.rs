//! What the shapes for text models share: texts or token ids in, vectors out, and which models are meant.

use bytes::Bytes;

use crate::{
    api::{
        MAX_EXPANSION,
        codec::{Column, Document, InferReply, Json, NonFinite},
    },
    backend::{Signature, TensorSpec},
    error::{Code, Error},
    tensor::{DType, Data, Shape, Tensor},
    text,
};

#[cfg(test)]
mod tests;

/// The input that takes texts.
const TEXT: &str = "text";
/// The inputs that take what a tokenizer makes of them.
const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";

/// Bytes of an id.
const ID: usize = size_of::<i64>();

/// A byte of plain text takes about 1 ns to read; so many more bytes' time go into each item of a list, and each escape.
const ITEM: usize = 32;
const ESCAPE: usize = 4;

/// What a text model is for. Its signature tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each text becomes a vector.
    Embedding,
    /// Each pair of texts gets a score.
    Rerank,
}

/// A request for a text model, read without a look at the model.
pub trait Asked: Sized + Send + Sync + 'static {
    const KIND: Kind;

    /// # Errors
    /// `InvalidArgument` naming the member, `Unimplemented` for what only other servers have.
    fn read(document: &Document, limit: usize) -> Result<Self, Error>;

    /// The model that is asked; `None` for the only one there is.
    fn model(&self) -> Option<&str>;

    /// How many texts there are.
    fn rows(&self) -> usize;

    /// What it wants of its texts.
    fn wish(&self) -> text::Wish {
        text::Wish::default()
    }

    /// Bytes of the tensors that are made of it, beyond the texts themselves, which are slices of its own.
    fn held(&self) -> usize {
        0
    }

    /// What its answer has beside the outputs, as bytes of plain text that take as long to write.
    fn told(&self) -> usize {
        0
    }

    /// The inputs of a model with this signature.
    ///
    /// # Errors
    /// `InvalidArgument` for what the model cannot take, `TooLarge` for more than memory is meant for.
    fn tensors(&self, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error>;

    /// The answer's JSON; `tokens` is how many the model counted.
    ///
    /// # Errors
    /// `InvalidArgument` and `Unimplemented` for what this model's vectors do not allow, `Internal` for outputs that
    /// are no answer.
    fn write(&self, reply: &InferReply<'_>, tokens: u64, non_finite: NonFinite) -> Result<Vec<u8>, Error>;
}

impl Kind {
    /// The output that makes a model one of the kind.
    pub fn output(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Rerank => "rerank_score",
        }
    }

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding model",
            Self::Rerank => "reranking model",
        }
    }

    /// Whether a model with this signature is of the kind.
    pub fn has(self, signature: &Signature) -> bool {
        let (texts, scores) = match self {
            Self::Embedding => (1, 2),
            Self::Rerank => (2, 1),
        };
        let is =
            |spec: &TensorSpec, name, dtype, rank| (&*spec.name, spec.dtype, spec.shape.len()) == (name, dtype, rank);
        signature.inputs.iter().any(|spec| is(spec, TEXT, DType::Bytes, texts))
            && signature.outputs.iter().any(|spec| is(spec, self.output(), DType::Fp32, scores))
    }
}

/// How much plain text is read in the time that this JSON is, as far as that can be seen at a glance.
pub fn weight(json: &[u8]) -> usize {
    let count = |sign: u8| json.iter().filter(|&&byte| byte == sign).count();
    json.len() + ITEM * count(b',') + ESCAPE * count(b'\\')
}

/// Whether a JSON takes longer to read than so many bytes of plain text.
pub fn is_longer(json: &[u8], limit: usize) -> bool {
    // Small ones are not even looked at.
    json.len() > limit || (json.len() > limit / (ITEM + 1) && weight(json) > limit)
}

/// What is to be embedded.
#[derive(Debug, PartialEq)]
pub(super) enum Input {
    Texts(Vec<Bytes>),
    /// Lists of token ids, one after the other, and how long each is.
    Ids {
        ids: Bytes,
        lengths: Vec<usize>,
    },
}

impl Input {
    /// Reads one text, a list of them, one list of token ids, or a list of such lists.
    pub(super) fn read(place: &str, value: Json<'_>, limit: usize) -> Result<Self, Error> {
        if value.text().starts_with('"') {
            return Ok(Self::Texts(vec![text(place, value)?]));
        }
        let first = value.items().map(|mut items| items.next());
        let begins = |wanted: fn(char) -> bool| matches!(first, Some(Some(item)) if item.text().starts_with(wanted));
        match first {
            Some(None) => Ok(Self::Texts(Vec::new())),
            Some(Some(_)) if begins(|first| first == '"') => texts(place, value, limit).map(Self::Texts),
            Some(Some(_)) if begins(|first| first == '[') => lists(place, value),
            Some(Some(_)) if begins(|first| first == '-' || first.is_ascii_digit()) => {
                let spec = id_spec();
                let mut column = Column::new(&spec, limit);
                let shape = column.push(place, value)?;
                tokens(column, vec![shape.first().copied().unwrap_or_default()], |_| place.to_owned())
            }
            _ => Err(Error::invalid(format!(
                "{place} must be a string, a list of strings, a list of token ids or a list of such lists, got {}",
                value.shown()
            ))),
        }
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::Ids { lengths, .. } => lengths.len(),
        }
    }

    /// The tokens that the request itself has.
    pub(super) fn tokens(&self) -> u64 {
        match self {
            Self::Texts(_) => 0,
            Self::Ids { lengths, .. } => lengths.iter().map(|&length| length as u64).sum(),
        }
    }

    /// Bytes of the lists when they are padded, and of their mask; or what tells texts apart.
    pub(super) fn held(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len() * size_of::<Bytes>(),
            Self::Ids { lengths, .. } => {
                let width = lengths.iter().copied().max().unwrap_or_default();
                lengths.len().saturating_mul(width).saturating_mul(2 * ID)
            }
        }
    }

    /// Lists of ids are padded to the longest, and the mask says so.
    pub(super) fn tensors(&self, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error> {
        let (ids, lengths) = match self {
            Self::Texts(texts) => return Ok(vec![pack(TEXT, &[texts.len()], texts.clone())?]),
            Self::Ids { ids, lengths } => (ids, lengths),
        };
        let width = lengths.iter().copied().max().unwrap_or_default();
        let shortest = lengths.iter().copied().min().unwrap_or_default();
        let is_masked = signature.inputs.iter().any(|spec| *spec.name == *MASK);
        if !is_masked && shortest < width {
            return Err(Error::invalid(format!(
                "it has no input '{MASK}', so lists of token ids must be of one length, got {shortest} and {width}"
            )));
        }
        let shape = Shape::from_slice(&[lengths.len(), width]);
        let tensor = |name: &str, bytes: Bytes| integers(signature, name, shape.clone(), bytes);
        if !is_masked {
            return Ok(vec![tensor(IDS, ids.clone())?]);
        }
        let held = lengths.len().saturating_mul(width).saturating_mul(ID);
        if held > limit.saturating_mul(MAX_EXPANSION) {
            return Err(Error::new(
                Code::TooLarge,
                format!(
                    "padded to {width}, the token ids of {} lists take {held} bytes, more than {MAX_EXPANSION} times \
                     limits.max_message_bytes",
                    lengths.len()
                ),
            ));
        }
        let (mut padded, mut mask) = (Vec::with_capacity(held), Vec::with_capacity(held));
        let mut rest = &ids[..];
        for &length in lengths {
            let (own, others) = rest.split_at(length * ID);
            rest = others;
            padded.extend_from_slice(own);
            (0..length).for_each(|_| mask.extend_from_slice(&1_i64.to_le_bytes()));
            padded.resize(padded.len() + (width - length) * ID, 0);
            mask.resize(padded.len(), 0);
        }
        Ok(vec![tensor(IDS, padded.into())?, tensor(MASK, mask.into())?])
    }
}

/// Pairs of the query and each of the texts.
pub(super) fn pairs(query: &Bytes, texts: &[Bytes]) -> Result<Vec<Tensor>, Error> {
    let strings = texts.iter().flat_map(|text| [query.clone(), text.clone()]).collect();
    Ok(vec![pack(TEXT, &[texts.len(), 2], strings)?])
}

/// Reads a list of texts.
pub(super) fn texts(place: &str, value: Json<'_>, limit: usize) -> Result<Vec<Bytes>, Error> {
    let items = value.items();
    let items =
        items.ok_or_else(|| Error::invalid(format!("{place} must be a list of strings, got {}", value.shown())))?;
    let spec = text_spec();
    let mut column = Column::new(&spec, limit);
    let mut count = 0;
    for item in items {
        // Other shapes have other ways to spell a text.
        if !item.text().starts_with('"') {
            return Err(Error::invalid(format!("{place}[{count}] must be a string, got {}", item.shown())));
        }
        column.push(format_args!("{place}[{count}]"), item)?;
        count += 1;
    }
    strings(column, count)
}

/// Reads one text.
pub(super) fn text(place: &str, value: Json<'_>) -> Result<Bytes, Error> {
    let text = value.string().map(|text| Bytes::from(text.into_owned()));
    text.ok_or_else(|| {
        Error::invalid(format!("{place} must be a string of whole Unicode characters, got {}", value.shown()))
    })
}

/// The name of a model; none for an empty one.
pub(super) fn model(value: Option<Json<'_>>) -> Result<Option<String>, Error> {
    let Some(value) = value else { return Ok(None) };
    let name = value.string();
    let name = name.ok_or_else(|| Error::invalid(format!("model must be a string, got {}", value.shown())))?;
    Ok(Some(name.into_owned()).filter(|name| !name.is_empty()))
}

pub(super) fn flag(name: &str, value: Option<Json<'_>>) -> Result<Option<bool>, Error> {
    match value.map(|value| (value, value.text())) {
        None => Ok(None),
        Some((_, "true")) => Ok(Some(true)),
        Some((_, "false")) => Ok(Some(false)),
        Some((value, _)) => Err(Error::invalid(format!("{name} must be true or false, got {}", value.shown()))),
    }
}

/// How long vectors are wanted.
pub(super) fn dimensions(value: Option<Json<'_>>) -> Result<Option<usize>, Error> {
    let Some(value) = value else { return Ok(None) };
    match value.text().parse() {
        Ok(count) if count > 0 => Ok(Some(count)),
        _ => Err(Error::invalid(format!("dimensions must be a whole number, 1 at least, got {}", value.shown()))),
    }
}

/// Refuses more dimensions than a model has, where its signature tells how many these are.
pub(super) fn check_dimensions(wanted: Option<usize>, signature: &Signature) -> Result<(), Error> {
    let output = signature.outputs.iter().find(|spec| *spec.name == *Kind::Embedding.output());
    let width = output.and_then(|spec| usize::try_from(*spec.shape.last()?).ok());
    match (wanted, width) {
        (Some(wanted), Some(width)) if wanted > width => Err(too_many_dimensions(wanted, width)),
        _ => Ok(()),
    }
}

fn too_many_dimensions(wanted: usize, width: usize) -> Error {
    Error::invalid(format!("dimensions must be {width} at most, which its vectors have, got {wanted}"))
}

/// The one output of an answer, which has a row for each text.
pub(super) fn output<'a>(reply: &InferReply<'a>, kind: Kind, rows: usize) -> Result<(&'a Tensor, &'a Bytes), Error> {
    let output = reply.outputs.iter().find(|output| *output.name == *kind.output());
    let plain = output.and_then(|output| match &output.data {
        Data::Plain(bytes) if output.dtype == DType::Fp32 && output.rows() == rows => Some((output, bytes)),
        _ => None,
    });
    plain.ok_or_else(|| {
        let got = output.map(|output| format!("{} {:?}", output.dtype, &output.shape[..]));
        let got = got.as_deref().unwrap_or("none");
        Error::internal(format!("output '{}' must be FP32 with {rows} rows, got {got}", kind.output()))
    })
}

/// The first `dimensions` of every vector, made to have the length 1 if that `is_unit`.
pub(super) fn shaped(vectors: &Tensor, dimensions: Option<usize>, is_unit: bool) -> Result<Tensor, Error> {
    let (Data::Plain(bytes), &[rows, width]) = (&vectors.data, &vectors.shape[..]) else {
        let shape = &vectors.shape[..];
        return Err(Error::internal(format!("output '{}' must be rows of vectors, got {shape:?}", vectors.name)));
    };
    let kept = dimensions.unwrap_or(width);
    if kept > width {
        return Err(too_many_dimensions(kept, width));
    }
    if kept == width && !is_unit {
        return Ok(vectors.clone());
    }
    let mut out = Vec::with_capacity(rows * kept * size_of::<f32>());
    for vector in rows_of(bytes, width) {
        let vector = &vector[..kept];
        let norm = if is_unit { norm(vector) } else { 1.0 };
        // Those that have it already stay as they are, to the last bit; and nothing points nowhere.
        let scale = if is_one(norm) || norm == 0.0 { None } else { Some(norm) };
        for &number in vector {
            let number = f32::from_le_bytes(number);
            let number = scale.map_or(number, |norm| (f64::from(number) / norm) as f32);
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
    let shape = Shape::from_slice(&[rows, kept]);
    Tensor::new(vectors.name.clone(), DType::Fp32, shape, Data::Plain(out.into()))
}

/// Whether every vector has the length 1.
pub(super) fn are_unit(vectors: &Tensor) -> bool {
    match (&vectors.data, &vectors.shape[..]) {
        (Data::Plain(bytes), &[_, width]) => rows_of(bytes, width).all(|vector| is_one(norm(vector))),
        _ => false,
    }
}

fn rows_of(bytes: &Bytes, width: usize) -> impl Iterator<Item = &[[u8; 4]]> {
    // Vectors without numbers have no bytes, and no rows to speak of.
    bytes.as_chunks().0.chunks_exact(width.max(1))
}

fn norm(vector: &[[u8; 4]]) -> f64 {
    vector.iter().map(|&number| f64::from(f32::from_le_bytes(number)).powi(2)).sum::<f64>().sqrt()
}

fn is_one(norm: f64) -> bool {
    (norm - 1.0).abs() < 1e-5
}

/// Integers of 64 bits as the input that the signature has; some graphs take 32.
fn integers(signature: &Signature, name: &str, shape: Shape, bytes: Bytes) -> Result<Tensor, Error> {
    let is_short = signature.inputs.iter().any(|spec| *spec.name == *name && spec.dtype == DType::Int32);
    if !is_short {
        return Tensor::new(name.into(), DType::Int64, shape, Data::Plain(bytes));
    }
    let mut short = Vec::with_capacity(bytes.len() / 2);
    for &long in bytes.as_chunks().0 {
        let long = i64::from_le_bytes(long);
        let id = i32::try_from(long)
            .map_err(|_| Error::invalid(format!("token ids must not be greater than {}, got {long}", i32::MAX)))?;
        short.extend_from_slice(&id.to_le_bytes());
    }
    Tensor::new(name.into(), DType::Int32, shape, Data::Plain(short.into()))
}

fn text_spec() -> TensorSpec {
    TensorSpec { name: TEXT.into(), dtype: DType::Bytes, shape: vec![-1] }
}

fn id_spec() -> TensorSpec {
    TensorSpec { name: IDS.into(), dtype: DType::Int64, shape: vec![-1] }
}

fn pack(name: &str, shape: &[usize], strings: Vec<Bytes>) -> Result<Tensor, Error> {
    Tensor::new(name.into(), DType::Bytes, shape.into(), Data::Strings(strings))
}

fn strings(column: Column<'_>, count: usize) -> Result<Vec<Bytes>, Error> {
    match column.finish(Shape::from_slice(&[count]))?.data {
        Data::Strings(strings) => Ok(strings),
        Data::Plain(_) => Err(Error::internal("texts with the wrong kind of data")),
    }
}

/// Reads a list of lists of token ids.
fn lists(place: &str, value: Json<'_>) -> Result<Input, Error> {
    let spec = id_spec();
    let mut column = Column::new(&spec, 0);
    let mut lengths = Vec::new();
    for (index, item) in value.items().into_iter().flatten().enumerate() {
        let wrong = || {
            Error::invalid(format!(
                "{place}[{index}] must be a list of token ids, as the first is, got {}",
                item.shown()
            ))
        };
        if !item.text().starts_with('[') {
            return Err(wrong());
        }
        match column.push(format_args!("{place}[{index}]"), item)?[..] {
            [0] => return Err(Error::invalid(format!("{place}[{index}] has no token ids"))),
            [length] => lengths.push(length),
            _ => return Err(wrong()),
        }
    }
    tokens(column, lengths, |list| format!("{place}[{list}]"))
}

/// The lists that a column holds one after the other, none of whose ids may be negative.
fn tokens(column: Column<'_>, lengths: Vec<usize>, place: impl Fn(usize) -> String) -> Result<Input, Error> {
    let total = lengths.iter().sum();
    let Data::Plain(ids) = column.finish(Shape::from_slice(&[total]))?.data else {
        return Err(Error::internal("token ids with the wrong kind of data"));
    };
    let value = |id: &[u8; ID]| i64::from_le_bytes(*id);
    if let Some(mut at) = ids.as_chunks().0.iter().position(|id| value(id) < 0) {
        let got = value(&ids.as_chunks().0[at]);
        let mut list = 0;
        while let Some(length) = lengths.get(list).filter(|&&length| at >= length) {
            at -= length;
            list += 1;
        }
        return Err(Error::invalid(format!("{}: token id {at} must not be negative, got {got}", place(list))));
    }
    Ok(Input::Ids { ids, lengths })
}
