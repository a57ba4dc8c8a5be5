//! An encoder with no server around it: the library's own tokenizer and session, called in a loop on the server's core.

use std::{path::Path, sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tidegate::{
    backend::{Backend, Options, Session, candle::Candle, onnx::OnnxRuntime},
    tensor::{DType, Data, Tensor},
    text::{Front, Limits, Settings, Wish},
};

use crate::{
    machine::{Moment, on_cores},
    pairs::Measured,
};

/// The input that takes raw text.
const INPUT: &str = "text";

/// A loaded encoder.
pub struct Encoder {
    session: Box<dyn Session>,
    front: Arc<Front>,
    core: usize,
}

/// Which texts run together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batching {
    /// So many at a time, in the order in which they come, and each padded to the longest: what a server does that counts
    /// texts.
    Fixed(usize),
    /// Sorted by length, and cut where it costs least if every run costs as much as so many tokens: the best that any server
    /// could do, and more, for it would have to know all texts beforehand.
    Sorted(usize),
}

/// What running some texts took.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Texts per second.
    pub rate: f64,
    /// CPU seconds for each text.
    pub cpu: f64,
    /// The share of the tokens that ran which were padding.
    pub padding: f64,
}

/// What single texts took.
#[derive(Clone, Copy, Debug)]
pub struct Single {
    /// The share of their time that it took to make tokens of them.
    pub tokenization: f64,
    /// Seconds of the whole for each.
    pub each: f64,
}

/// The tokens of one text, behind which there may be padding.
struct Row {
    inputs: Vec<Tensor>,
    tokens: usize,
}

impl Encoder {
    /// Loads the weights in `files` as a server on one core does, to run on candle.
    ///
    /// # Errors
    /// When it cannot be loaded, or takes no text.
    pub fn candle(files: &Path, core: usize) -> Result<Self> {
        Self::open(&Candle::open()?, files, &files.join("model.safetensors"), core)
    }

    /// The same with the graph in `files`, on the ONNX Runtime in `library`.
    ///
    /// # Errors
    /// As `candle`.
    pub fn onnx(library: &Path, files: &Path, core: usize) -> Result<Self> {
        Self::open(&OnnxRuntime::open(Some(library), None)?, files, &files.join("onnx/model.onnx"), core)
    }

    fn open(backend: &dyn Backend, files: &Path, model: &Path, core: usize) -> Result<Self> {
        on_cores(&[core], || {
            let mut session = backend.load(model, &Options::default(), 1)?.pop().context("no session was loaded")?;
            let front = Front::open(files, &Settings::default(), session.as_mut(), true)?;
            let front = front.with_context(|| format!("{} takes no text", files.display()))?;
            Ok(Self { session: front.before(session), front, core })
        })
    }

    /// The tokens of a text, special ones included.
    ///
    /// # Errors
    /// When it cannot be tokenized.
    pub fn tokens(&self, text: &str) -> Result<usize> {
        Ok(self.row(text)?.tokens)
    }

    /// The embedding of a text.
    ///
    /// # Errors
    /// When the run fails.
    pub fn embedding(&mut self, text: &str) -> Result<Vec<f32>> {
        let output = self.session.run(&[input(text)?])?.pop().context("no output")?;
        let Data::Plain(bytes) = &output.data else { anyhow::bail!("output '{}' holds texts", output.name) };
        floats(bytes)
    }

    /// Makes tokens of all `texts` and runs them once.
    ///
    /// # Errors
    /// When a run fails.
    pub fn pass(&mut self, texts: &[&str], batching: Batching) -> Result<Measured<Pass>> {
        let core = self.core;
        on_cores(&[core], || {
            let start = Moment::here()?;
            let rows = texts.iter().map(|text| self.row(text)).collect::<Result<Vec<_>>>()?;
            let lengths: Vec<usize> = rows.iter().map(|row| row.tokens).collect();
            let mut ran = 0;
            for batch in batches(&lengths, batching) {
                let batch: Vec<&Row> = batch.iter().map(|&place| &rows[place]).collect();
                let inputs = together(&batch)?;
                ran += inputs.first().map_or(0, |ids| ids.shape.iter().product());
                self.session.run(&inputs)?;
            }
            let usage = start.until(&Moment::here()?);
            let padding = 1.0 - lengths.iter().sum::<usize>() as f64 / ran as f64;
            let count = texts.len() as f64;
            Ok(Measured::new(Pass { rate: count / usage.seconds, cpu: usage.own / count, padding }, usage))
        })
    }

    /// Runs `texts` one at a time.
    ///
    /// # Errors
    /// When a run fails.
    pub fn one_at_a_time(&mut self, texts: &[&str]) -> Result<Measured<Single>> {
        let core = self.core;
        on_cores(&[core], || {
            let start = Moment::here()?;
            let mut tokenization = 0.0;
            for text in texts {
                let begun = Instant::now();
                let row = self.row(text)?;
                tokenization += begun.elapsed().as_secs_f64();
                self.session.run(&row.inputs)?;
            }
            let usage = start.until(&Moment::here()?);
            let (tokenization, each) = (tokenization / usage.seconds, usage.seconds / texts.len() as f64);
            Ok(Measured::new(Single { tokenization, each }, usage))
        })
    }

    fn row(&self, text: &str) -> Result<Row> {
        let encoded = self.front.encode(&input(text)?, Wish::NONE, &Limits::default())?;
        let tokens = encoded.tokens;
        let [part] = <[_; 1]>::try_from(encoded.parts).ok().context("a text was cut into several parts")?;
        Ok(Row { inputs: part.inputs, tokens })
    }
}

/// The input of one text.
pub fn input(text: &str) -> Result<Tensor> {
    let data = Data::Strings(vec![Bytes::copy_from_slice(text.as_bytes())]);
    Ok(Tensor::new(INPUT.into(), DType::Bytes, [1].as_slice().into(), data)?)
}

/// The numbers of a tensor.
///
/// # Errors
/// When the bytes are no whole ones.
pub fn floats(bytes: &[u8]) -> Result<Vec<f32>> {
    let (numbers, rest) = bytes.as_chunks();
    ensure!(rest.is_empty(), "{} bytes are no floats of 32 bits", bytes.len());
    Ok(numbers.iter().map(|number| f32::from_le_bytes(*number)).collect())
}

/// The places of texts of such `lengths` that run together.
fn batches(lengths: &[usize], batching: Batching) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    let run = match batching {
        Batching::Fixed(rows) => return order.chunks(rows.max(1)).map(<[usize]>::to_vec).collect(),
        Batching::Sorted(run) => run,
    };
    order.sort_by_key(|&place| lengths[place]);
    // What the shortest ones cost, and where the last of their runs begins: that of none, of one, and so on.
    let mut costs = vec![(0, 0)];
    for (end, &place) in order.iter().enumerate() {
        let of = |start: usize| (costs[start].0 + run + (end + 1 - start) * lengths[place], start);
        costs.push((0..=end).map(of).min().unwrap_or_default());
    }
    let mut batches = Vec::new();
    while !order.is_empty() {
        batches.push(order.split_off(costs[order.len()].1));
    }
    batches
}

/// Every input for texts that are padded to the longest.
fn together(rows: &[&Row]) -> Result<Vec<Tensor>> {
    let length = rows.iter().map(|row| row.tokens).max().unwrap_or(0);
    let first = rows.first().context("a batch of no text")?;
    let input = |(place, like): (usize, &Tensor)| -> Result<Tensor> {
        let width = like.dtype.size().with_context(|| format!("input '{}' is no number", like.name))?;
        // What is padding is masked, whatever it is.
        let mut bytes = vec![0; rows.len() * length * width];
        for (row, to) in rows.iter().zip(bytes.chunks_mut(length * width)) {
            let Data::Plain(from) = &row.inputs[place].data else { anyhow::bail!("input '{}' holds texts", like.name) };
            let tokens = row.tokens * width;
            to[..tokens].copy_from_slice(&from[..tokens]);
        }
        let shape = [rows.len(), length].as_slice().into();
        Ok(Tensor::new(like.name.clone(), like.dtype, shape, Data::Plain(bytes.into()))?)
    };
    first.inputs.iter().enumerate().map(input).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder() -> Encoder {
        Encoder::candle(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/encoders/bert-mean")), 0).unwrap()
    }

    #[test]
    fn texts_run_in_order_or_by_length() {
        let lengths = [9, 3, 5, 4, 8];
        assert_eq!(batches(&lengths, Batching::Fixed(2)), [vec![0, 1], vec![2, 3], vec![4]]);
        // The longest come first. Padding 3 to 5 and 4 to 5 takes three tokens, and 8 to 9 one.
        assert_eq!(batches(&lengths, Batching::Sorted(2)), [vec![4, 0], vec![1, 3, 2]]);
        assert_eq!(batches(&lengths, Batching::Sorted(1000)), [[1, 3, 2, 4, 0]]);
        assert_eq!(batches(&lengths, Batching::Sorted(0)).len(), 5, "where runs cost nothing, nothing is padded");
        assert_eq!(batches(&[], Batching::Sorted(2)), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn padding_changes_no_embedding_and_is_counted() {
        let mut encoder = encoder();
        let texts = ["the boat", "the boat waits near the gate", "a"];
        let rows: Vec<Row> = texts.iter().map(|text| encoder.row(text).unwrap()).collect();
        let inputs = together(&rows.iter().collect::<Vec<_>>()).unwrap();
        let longest = rows[1].tokens;
        assert!(inputs.iter().all(|input| input.shape[..] == [3, longest]), "{inputs:?}");
        let Data::Plain(found) = &encoder.session.run(&inputs).unwrap()[0].data else { panic!() };
        let found = floats(found).unwrap();
        let alone: Vec<f32> = texts.iter().flat_map(|text| encoder.embedding(text).unwrap()).collect();
        assert_eq!(found.len(), alone.len());
        let apart = found.iter().zip(&alone).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-5, "{apart}");

        let tokens: usize = rows.iter().map(|row| row.tokens).sum();
        let pass = encoder.pass(&texts, Batching::Fixed(3)).unwrap().value;
        let padding = 1.0 - tokens as f64 / (3 * longest) as f64;
        assert!((pass.padding - padding).abs() < 1e-9 && pass.rate > 0.0, "{pass:?}, and not {padding}");
        assert!(encoder.pass(&texts, Batching::Fixed(1)).unwrap().value.padding.abs() < 1e-9);
        let single = encoder.one_at_a_time(&texts).unwrap().value;
        assert!(single.tokenization > 0.0 && single.tokenization < 1.0 && single.each > 0.0, "{single:?}");
    }
}
