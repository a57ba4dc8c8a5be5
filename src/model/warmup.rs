//! Warm-up: the first runs of a session, the proof that rows are independent, and the sweep of batch sizes.
//!
//! A silently wrong batch is the worst bug a server can have, so grouping requests is switched on only after at least
//! three different rows, with different answers, gave the same answers alone, together and in reverse order.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

use super::{Batching, service_time::ServiceTime, watch::Watch};
use crate::{
    backend::{Session, Signature, TensorSpec},
    error::Error,
    tensor::{DType, Data, Shape, Tensor, elements, gather},
};

pub mod described;

/// The largest batch the sweep tries.
pub const MAX_SWEEP_ROWS: usize = 64;
/// The same for texts, which are made up of few tokens.
pub const MAX_SWEEP_TEXTS: usize = 256;

/// A larger batch is worth it when it yields more than this many times the rows per second.
const WORTHWHILE_GROWTH: f64 = 1.02;
/// The sweep stops after so many sizes that were not: one may have been measured at a bad moment.
const PATIENCE: usize = 2;
const SWEEP_BUDGET: Duration = Duration::from_millis(500);
const RUNS_PER_SIZE: usize = 3;
/// Short runs are repeated for so long, as far as they are not more than so many: of a run of microseconds, preempted
/// and with cold caches behind the requests of others, three say little, and a group of 4 where 64 were right halved
/// what a version could serve after a swap under load.
const SHORT_RUNS: Duration = Duration::from_millis(2);
const MAX_RUNS_PER_SIZE: usize = 100;
/// Rows that the proof needs at least.
const PROOF_ROWS: usize = 3;
/// Made-up rows that are tried to find some that the outputs tell apart.
const CANDIDATES: usize = 16;
const RELATIVE_TOLERANCE: f64 = 1e-4;
const ABSOLUTE_TOLERANCE: f64 = 1e-5;
/// Sizes tried for a free dimension that is not the batch.
const FREE_DIMENSIONS: [usize; 2] = [1, 64];

/// A sample request, arranged for the signature.
#[derive(Clone, Debug)]
pub struct Sample {
    pub name: Arc<str>,
    pub inputs: Vec<Tensor>,
    /// Whether its failure fails the load.
    pub required: bool,
    /// How often it is run.
    pub runs: usize,
}

/// What the author of the model wants of its batches.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// `None`: when it is proved to be safe.
    pub batching: Option<bool>,
    /// The largest batch that the sweep may try.
    pub limit: usize,
    /// Sizes that batches shall have, whatever the sweep finds; empty for what it finds.
    pub sizes: &'a [usize],
}

/// What warm-up found out.
pub struct Warmed {
    pub batching: Batching,
    pub service: ServiceTime,
    /// Inputs of every size that was run, and how often, to warm further sessions of the same version.
    batches: Vec<(Vec<Tensor>, usize)>,
}

/// Runs the samples (made-up ones when there are none), proves independence, and sweeps batch sizes.
///
/// # Errors
/// When a required sample fails.
pub fn warm(session: &mut dyn Session, samples: &[Sample], wanted: &Wanted<'_>, model: &str) -> Result<Warmed, Error> {
    let signature = session.signature().clone();
    let mut batches = Vec::new();
    let mut service = ServiceTime::default();
    for sample in samples {
        let mut start = Watch::start(signature.on_thread);
        let mut result = session.run(&sample.inputs);
        for _ in 1..sample.runs {
            start = Watch::start(signature.on_thread);
            result = result.and_then(|_| session.run(&sample.inputs));
        }
        match result {
            Ok(_) => {
                service = ServiceTime::from_sweep(&[(work_of(&signature, &sample.inputs), start.elapsed())]);
                batches.push((sample.inputs.clone(), sample.runs));
            }
            Err(error) if sample.required => {
                return Err(Error { message: format!("warm-up {}: {error}", sample.name), ..error });
            }
            Err(error) => tracing::warn!(model, sample = %sample.name, %error, "warm-up sample failed"),
        }
    }

    let objection = match wanted.batching {
        Some(false) => Some("switched off in its settings".to_owned()),
        _ if wanted.limit <= 1 => Some("max_batch_size is 1".to_owned()),
        _ => signature.unbatchable(),
    };
    let runs = match warm_rows(session, &signature, batches.first().map(|(inputs, _)| inputs)) {
        Ok(runs) => runs,
        Err(reason) => {
            tracing::warn!(model, reason, "made-up warm-up inputs did not work out");
            return Ok(Warmed { batching: off(objection.unwrap_or(reason)), service, batches });
        }
    };
    let rows: Vec<Vec<Tensor>> = runs.rows.iter().map(|run| run.inputs.clone()).collect();
    if let Some(run) = runs.rows.last() {
        service = ServiceTime::from_sweep(&[(work_of(&signature, &run.inputs), run.took)]);
    }
    let mut proof = || match (wanted.batching, &runs.told_apart) {
        (Some(true), _) => Ok(()),
        (_, Err(reason)) => Err(reason.clone()),
        (_, Ok(())) => prove_independence(session, &runs.rows),
    };
    if let Some(reason) = objection.map_or_else(|| proof().err(), Some) {
        tracing::info!(model, reason, "requests are not batched");
        batches.extend(rows.into_iter().take(1).map(|inputs| (inputs, 1)));
        let batching = Batching { row: length_of(&signature, &runs.rows[0].inputs), ..off(reason) };
        return Ok(Warmed { batching, service, batches });
    }
    let mut sweep = sweep(session, &rows, wanted.limit);
    let row = length_of(&signature, &rows[0]);
    let named = |rows: usize| match row {
        1 => format!("{rows} rows are grouped"),
        row => format!("{} tokens are grouped", rows * row),
    };
    let mut reason = format!("{}, the throughput's knee", named(sweep.group));
    if let Some(&largest) = wanted.sizes.iter().max() {
        sweep.try_sizes(session, &rows, wanted.sizes).map_err(|error| Error {
            message: format!("warm-up with queue.preferred_batch_sizes: {error}"),
            ..error
        })?;
        sweep.group = largest;
        reason = format!("{}, the largest of queue.preferred_batch_sizes", named(largest));
    }
    batches.extend(sweep.batches.into_iter().map(|inputs| (inputs, 1)));
    let batching = Batching { group: sweep.group, row, enabled: true, reason };
    let times: Vec<_> = sweep.times.iter().map(|&(rows, took)| (rows * row, took)).collect();
    Ok(Warmed { batching, service: ServiceTime::from_sweep(&times), batches })
}

/// What one run of `inputs` is to the queue, when nothing is known of other runs.
fn work_of(signature: &Signature, inputs: &[Tensor]) -> usize {
    let rows = if signature.text.is_some() { inputs.first().map_or(1, Tensor::rows) } else { 1 };
    rows.max(1) * length_of(signature, inputs)
}

/// Tokens of a row, where rows have lengths; else 1.
fn length_of(signature: &Signature, row: &[Tensor]) -> usize {
    let tokens = row.first().filter(|input| signature.text.is_some() && input.dtype != DType::Bytes);
    tokens.and_then(|input| input.shape.get(1)).copied().unwrap_or(1).max(1)
}

/// Runs another session of the same version through the sizes that the first one saw.
pub fn rewarm(session: &mut dyn Session, warmed: &Warmed) {
    for (inputs, runs) in &warmed.batches {
        for _ in 0..*runs {
            // The first session ran the same; a failure here shows again with the first request, and there it counts.
            let _ = session.run(inputs);
        }
    }
}

fn off(reason: String) -> Batching {
    Batching { group: 1, row: 1, enabled: false, reason }
}

/// One row that was run by itself.
struct Run {
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    took: Duration,
}

/// Rows (or whole inputs, without a batch dimension) that run.
struct Runs {
    rows: Vec<Run>,
    /// Whether the outputs tell the rows apart: what is the same for every row proves nothing.
    told_apart: Result<(), String>,
}

/// Runs rows one by one: those of the sample first, then made-up ones of its shapes; without a sample, made-up ones of
/// the sizes in `FREE_DIMENSIONS` until one works and tells rows apart.
///
/// # Errors
/// The reason why no made-up row ran.
fn warm_rows(session: &mut dyn Session, signature: &Signature, sample: Option<&Vec<Tensor>>) -> Result<Runs, String> {
    if let Some(sample) = sample {
        return run_alone(session, rows_of_sample(signature, sample));
    }
    let mut outcome = Err("nothing was run".to_owned());
    for free in FREE_DIMENSIONS {
        let runs = run_alone(session, made_up_rows(signature, |spec| Some(fill(&spec.shape, free))));
        match &runs {
            Ok(Runs { told_apart: Ok(()), .. }) => return runs,
            // A size that runs is better than one that does not, though it proves nothing.
            Ok(_) => outcome = runs,
            Err(_) if outcome.is_err() => outcome = runs,
            Err(_) => {}
        }
    }
    outcome
}

/// Runs candidates until at least three have run and every float output differs between some of them.
fn run_alone(session: &mut dyn Session, candidates: Vec<Vec<Tensor>>) -> Result<Runs, String> {
    let on_thread = session.signature().on_thread;
    let start = Watch::start(on_thread);
    let mut rows: Vec<Run> = Vec::new();
    let mut told_apart = Err("warm-up ran no row".to_owned());
    for inputs in candidates {
        let run_start = Watch::start(on_thread);
        match session.run(&inputs) {
            Ok(outputs) => rows.push(Run { inputs, outputs, took: run_start.elapsed() }),
            Err(error) if rows.is_empty() => return Err(format!("made-up warm-up inputs failed: {error}")),
            Err(error) => {
                told_apart = Err(format!("a warm-up run failed: {error}"));
                break;
            }
        }
        told_apart = tell_apart(&rows);
        if rows.len() >= PROOF_ROWS && (told_apart.is_ok() || start.elapsed() > SWEEP_BUDGET) {
            break;
        }
    }
    Ok(Runs { rows, told_apart })
}

/// Float outputs must each differ, in finite values, between some rows; without any, one of the others must. Labels
/// often agree by chance, and they come from the same arithmetic as the scores beside them.
fn tell_apart(rows: &[Run]) -> Result<(), String> {
    let Some(first) = rows.first() else { return Err("warm-up ran no row".to_owned()) };
    let is_float = |output: &Tensor| matches!(output.dtype, DType::Fp32 | DType::Fp64 | DType::Fp16 | DType::Bf16);
    let any_float = first.outputs.iter().any(is_float);
    let differs = |index: usize| rows.iter().any(|row| distinct(&row.outputs[index], &first.outputs[index]));
    let unclear = |name: &str| {
        Err(format!("warm-up could not tell rows apart by output '{name}'; a sample in warmup/*.json helps"))
    };
    if !any_float && !(0..first.outputs.len()).any(differs) {
        return unclear(first.outputs.first().map_or("", |output| &output.name));
    }
    let same = first.outputs.iter().enumerate().find(|(index, output)| is_float(output) && !differs(*index));
    same.map_or(Ok(()), |(_, output)| unclear(&output.name))
}

/// The rows of the sample, then made-up ones of the same shapes.
fn rows_of_sample(signature: &Signature, sample: &[Tensor]) -> Vec<Vec<Tensor>> {
    if signature.unbatchable().is_some() {
        return vec![sample.to_vec()];
    }
    let count = sample.iter().map(Tensor::rows).min().unwrap_or(0);
    let row = |index: usize| sample.iter().map(|input| input.slice(index, 1)).collect::<Vec<_>>();
    let mut rows: Vec<Vec<Tensor>> = Vec::new();
    for candidate in (0..count.min(CANDIDATES)).map(row) {
        if !rows.contains(&candidate) {
            rows.push(candidate);
        }
    }
    rows.extend(made_up_rows(signature, |spec| {
        // What the sample leaves out may be what it must not be given with.
        let mut shape = sample.iter().find(|input| input.name == spec.name)?.shape.clone();
        shape[0] = 1;
        Some(shape)
    }));
    rows
}

/// The declared shape with the first dimension 1 and the other free ones `free`.
fn fill(declared: &[i64], free: usize) -> Shape {
    declared
        .iter()
        .enumerate()
        .map(|(axis, &dim)| match usize::try_from(dim) {
            Ok(size) => size,
            Err(_) if axis == 0 => 1,
            Err(_) => free,
        })
        .collect()
}

/// Inputs of the shapes given, without those that have none.
fn made_up_rows(signature: &Signature, mut shape: impl FnMut(&TensorSpec) -> Option<Shape>) -> Vec<Vec<Tensor>> {
    let mut random = StdRng::seed_from_u64(42);
    (0..CANDIDATES)
        .map(|row| {
            let tensor = |spec: &TensorSpec| Some(made_up(spec, shape(spec)?, row, &mut random));
            signature.inputs.iter().filter_map(tensor).collect()
        })
        .collect()
}

/// Floats from N(0,1), integers 0 and 1, texts of the letter a; different for each `row` where the type allows.
fn made_up(spec: &TensorSpec, shape: Shape, row: usize, random: &mut StdRng) -> Tensor {
    let data = made_up_data(spec.dtype, elements(&shape).unwrap_or(0), row, random);
    Tensor { name: spec.name.clone(), dtype: spec.dtype, shape, data }
}

fn made_up_data(dtype: DType, count: usize, row: usize, random: &mut StdRng) -> Data {
    // The first three rows differ from themselves in reverse order, whatever the others are by chance.
    let mut bit = |index: usize| if index == 0 && row < PROOF_ROWS { row > 0 } else { random.random() };
    match dtype {
        DType::Bytes => Data::Strings(vec![Bytes::from("a".repeat(row + 1)); count]),
        DType::Fp32 => plain(count, |_| normal(random).to_le_bytes()),
        DType::Fp64 => plain(count, |_| f64::from(normal(random)).to_le_bytes()),
        DType::Fp16 => plain(count, |_| half::f16::from_f32(normal(random)).to_le_bytes()),
        DType::Bf16 => plain(count, |_| half::bf16::from_f32(normal(random)).to_le_bytes()),
        DType::Bool | DType::Uint8 | DType::Int8 => plain(count, |index| [u8::from(bit(index))]),
        DType::Uint16 | DType::Int16 => plain(count, |index| u16::from(bit(index)).to_le_bytes()),
        DType::Uint32 | DType::Int32 => plain(count, |index| u32::from(bit(index)).to_le_bytes()),
        DType::Uint64 | DType::Int64 => plain(count, |index| u64::from(bit(index)).to_le_bytes()),
    }
}

fn normal(random: &mut impl Rng) -> f32 {
    StandardNormal.sample(random)
}

fn plain<const N: usize>(count: usize, element: impl FnMut(usize) -> [u8; N]) -> Data {
    Data::Plain((0..count).flat_map(element).collect())
}

/// # Errors
/// The reason why rows may depend on each other.
fn prove_independence(session: &mut dyn Session, rows: &[Run]) -> Result<(), String> {
    let inputs: Vec<Vec<Tensor>> = rows.iter().map(|row| row.inputs.clone()).collect();
    let forward: Vec<usize> = (0..rows.len()).collect();
    let reverse: Vec<usize> = forward.iter().rev().copied().collect();
    for (order, what) in [(forward, "together"), (reverse, "together in reverse order")] {
        let together = session
            .run(&stack(&inputs, &order))
            .map_err(|error| format!("a warm-up run of {} rows {what} failed: {error}", rows.len()))?;
        for (place, &row) in order.iter().enumerate() {
            for (output, expected) in together.iter().zip(&rows[row].outputs) {
                let whole = !output.shape.is_empty() && output.rows() == rows.len();
                if !whole || expected.shape.is_empty() || expected.rows() != 1 {
                    return Err(format!("output '{}' does not have one row for each input row", output.name));
                }
                if !agree(&output.slice(place, 1), expected) {
                    return Err(format!("rows are not independent: output '{}' differs {what}", output.name));
                }
            }
        }
    }
    Ok(())
}

fn stack(rows: &[Vec<Tensor>], order: &[usize]) -> Vec<Tensor> {
    (0..rows[0].len()).map(|input| gather(&order.iter().map(|&row| &rows[row][input]).collect::<Vec<_>>())).collect()
}

/// Floats within the tolerances, everything else equal.
fn agree(left: &Tensor, right: &Tensor) -> bool {
    left.shape == right.shape
        && match (floats(left), floats(right)) {
            (Some(left), Some(right)) => left.iter().zip(&right).all(|(&left, &right)| close(left, right)),
            _ => left.data == right.data,
        }
}

/// Whether two outputs differ in a way that a mix-up of rows could not hide.
fn distinct(left: &Tensor, right: &Tensor) -> bool {
    match (floats(left), floats(right)) {
        (Some(left), Some(right)) => {
            let clear = |(&left, &right): (&f64, &f64)| left.is_finite() && right.is_finite() && !close(left, right);
            left.iter().zip(&right).any(clear)
        }
        _ => left.data != right.data,
    }
}

fn close(left: f64, right: f64) -> bool {
    let near = || (left - right).abs() <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * right.abs();
    left == right || (left.is_nan() && right.is_nan()) || (left.is_finite() && right.is_finite() && near())
}

/// The elements of a float tensor.
pub(super) fn floats(tensor: &Tensor) -> Option<Vec<f64>> {
    let Data::Plain(bytes) = &tensor.data else { return None };
    let read = |size: usize, read: fn(&[u8]) -> f64| Some(bytes.chunks_exact(size).map(read).collect());
    match tensor.dtype {
        DType::Fp32 => read(4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()),
        DType::Fp64 => read(8, |b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])),
        DType::Fp16 => read(2, |b| half::f16::from_le_bytes([b[0], b[1]]).into()),
        DType::Bf16 => read(2, |b| half::bf16::from_le_bytes([b[0], b[1]]).into()),
        _ => None,
    }
}

struct Sweep {
    group: usize,
    times: Vec<(usize, Duration)>,
    batches: Vec<Vec<Tensor>>,
}

/// Runs 1, 2, 4, … rows until more rows per run hardly pay; the group is the smallest that yields nearly the most.
fn sweep(session: &mut dyn Session, rows: &[Vec<Tensor>], limit: usize) -> Sweep {
    let start = Watch::start(session.signature().on_thread);
    let mut sweep = Sweep { group: 1, times: Vec::new(), batches: Vec::new() };
    let (mut best, mut futile) = (0.0, 0);
    let mut speeds: Vec<(usize, f64)> = Vec::new();
    let mut size = 1;
    while size <= limit && (size == 1 || start.elapsed() < SWEEP_BUDGET) {
        let order: Vec<usize> = (0..size).map(|index| index % rows.len()).collect();
        let batch = stack(rows, &order);
        let Some(took) = fastest_run(session, &batch) else { break };
        let speed = size as f64 / took.as_secs_f64().max(1e-9);
        sweep.times.push((size, took));
        sweep.batches.push(batch);
        speeds.push((size, speed));
        futile = if speed < best * WORTHWHILE_GROWTH { futile + 1 } else { 0 };
        best = f64::max(best, speed);
        if futile == PATIENCE {
            break;
        }
        size *= 2;
    }
    let enough = speeds.iter().find(|(_, speed)| speed * WORTHWHILE_GROWTH >= best);
    sweep.group = enough.map_or(1, |&(size, _)| size);
    sweep
}

impl Sweep {
    /// Runs the sizes that were not run yet once each, so that the first batch of that size is not slower than the
    /// next.
    fn try_sizes(&mut self, session: &mut dyn Session, rows: &[Vec<Tensor>], sizes: &[usize]) -> Result<(), Error> {
        for &size in sizes {
            if self.times.iter().any(|&(done, _)| done == size) {
                continue;
            }
            let order: Vec<usize> = (0..size).map(|index| index % rows.len()).collect();
            let batch = stack(rows, &order);
            let start = Watch::start(session.signature().on_thread);
            session
                .run(&batch)
                .map_err(|error| Error { message: format!("a run of {size} rows failed: {error}"), ..error })?;
            self.times.push((size, start.elapsed()));
            self.batches.push(batch);
        }
        Ok(())
    }
}

fn fastest_run(session: &mut dyn Session, batch: &[Tensor]) -> Option<Duration> {
    let on_thread = session.signature().on_thread;
    let begun = Watch::start(on_thread);
    let (mut fastest, mut runs) = (None, 0);
    while runs < RUNS_PER_SIZE || (runs < MAX_RUNS_PER_SIZE && begun.elapsed() < SHORT_RUNS) {
        let start = Watch::start(on_thread);
        session.run(batch).ok()?;
        let took = start.elapsed();
        fastest = Some(fastest.map_or(took, |fastest: Duration| fastest.min(took)));
        runs += 1;
    }
    fastest
}

#[cfg(test)]
mod tests {
    use super::*;

    type Graph = fn(&[f32]) -> Vec<f32>;

    /// A session over one FP32 input of free length; the graph sees all rows of a run at once.
    struct Scripted {
        signature: Signature,
        graph: Graph,
    }

    impl Scripted {
        fn new(graph: Graph) -> Self {
            let spec = |name: &str| TensorSpec { name: name.into(), dtype: DType::Fp32, shape: vec![-1] };
            let signature = Signature { inputs: vec![spec("x")], outputs: vec![spec("y")], ..Signature::default() };
            Self { signature, graph }
        }
    }

    impl Session for Scripted {
        fn signature(&self) -> &Signature {
            &self.signature
        }

        fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
            let Data::Plain(bytes) = &inputs[0].data else { unreachable!() };
            let values: Vec<f32> =
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let outputs = (self.graph)(&values);
            if outputs.is_empty() {
                return Err(Error::internal("refused"));
            }
            let data = Data::Plain(outputs.iter().flat_map(|value| value.to_le_bytes()).collect());
            Ok(vec![Tensor::new("y".into(), DType::Fp32, [outputs.len()].as_slice().into(), data)?])
        }
    }

    fn batching(graph: Graph) -> Batching {
        warmed(graph, &[]).unwrap().batching
    }

    fn warmed(graph: Graph, sizes: &[usize]) -> Result<Warmed, Error> {
        let wanted = Wanted { batching: None, limit: MAX_SWEEP_ROWS, sizes };
        warm(&mut Scripted::new(graph), &[], &wanted, "m")
    }

    #[test]
    fn independent_rows_are_batched() {
        let found = batching(|rows| {
            std::thread::sleep(Duration::from_millis(1));
            rows.iter().map(|row| row * 2.0).collect()
        });
        assert!(found.enabled && found.group >= 16, "{found:?}");
    }

    #[test]
    fn a_model_that_batching_does_not_help_keeps_small_groups() {
        let found = batching(|rows| {
            // Worse than no help, so that a busy machine cannot make it look like some.
            std::thread::sleep(Duration::from_millis(2) * (rows.len() * rows.len()) as u32);
            rows.to_vec()
        });
        assert!(found.enabled && found.group <= 2, "{found:?}");
    }

    #[test]
    fn one_size_measured_at_a_bad_moment_does_not_end_the_sweep() {
        let found = batching(|rows| {
            std::thread::sleep(Duration::from_millis(if rows.len() == 2 { 8 } else { 2 }));
            rows.to_vec()
        });
        assert!(found.enabled && found.group >= 16, "{found:?}");
    }

    #[test]
    fn preferred_sizes_go_beyond_the_knee_and_are_run() {
        let slow: Graph = |rows| {
            std::thread::sleep(Duration::from_millis(1) * rows.len() as u32);
            rows.to_vec()
        };
        let found = warmed(slow, &[3, 24]).unwrap();
        assert_eq!(found.batching.group, 24, "{:?}", found.batching);
        assert!(found.batching.reason.contains("queue.preferred_batch_sizes"), "{}", found.batching.reason);
        for size in [3, 24] {
            assert!(found.batches.iter().any(|(inputs, _)| inputs[0].rows() == size), "{size}");
        }
        let small: Graph = |rows| if rows.len() > 16 { vec![] } else { rows.to_vec() };
        let message = warmed(small, &[24]).map(|_| ()).unwrap_err().message;
        assert!(message.contains("queue.preferred_batch_sizes") && message.contains("24 rows"), "{message}");
        let dependent: Graph = |rows| vec![rows.iter().sum()];
        assert_eq!(warmed(dependent, &[24]).unwrap().batching.group, 1, "wishes prove nothing");
    }

    #[test]
    fn dependent_rows_are_not() {
        let found = batching(|rows| rows.iter().map(|row| row + rows.iter().sum::<f32>()).collect());
        assert!(!found.enabled);
        assert!(found.reason.contains("not independent"), "{}", found.reason);
        let found = batching(|rows| rows.iter().enumerate().map(|(place, row)| row + place as f32).collect());
        assert!(!found.enabled);
    }

    #[test]
    fn outputs_that_prove_nothing_do_not_count() {
        let constant = batching(|rows| vec![1.0; rows.len()]);
        assert!(constant.reason.contains("tell rows apart"), "{}", constant.reason);
        let nothing = batching(|rows| vec![f32::NAN; rows.len()]);
        assert!(nothing.reason.contains("tell rows apart"), "{}", nothing.reason);
    }

    #[test]
    fn made_up_bits_are_not_the_same_backwards() {
        let spec = TensorSpec { name: "x".into(), dtype: DType::Int64, shape: vec![-1] };
        let signature = Signature { inputs: vec![spec], ..Signature::default() };
        let rows = made_up_rows(&signature, |_| Some([1].as_slice().into()));
        assert_ne!(rows[0], rows[2]);
    }

    #[test]
    fn reduced_outputs_and_refused_batches_are_not() {
        assert!(batching(|rows| vec![rows.iter().sum()]).reason.contains("one row for each"));
        assert!(batching(|rows| if rows.len() > 1 { vec![] } else { rows.to_vec() }).reason.contains("refused"));
        assert!(batching(|_| vec![]).reason.contains("made-up"));
    }

    #[test]
    fn only_a_required_sample_fails_the_load() {
        let inputs =
            made_up_rows(&Scripted::new(|rows| rows.to_vec()).signature, |_| Some([1].as_slice().into())).remove(0);
        let warm_with = |required| {
            let sample = Sample { name: "s.json".into(), inputs: inputs.clone(), required, runs: 1 };
            let wanted = Wanted { batching: None, limit: 8, sizes: &[] };
            warm(&mut Scripted::new(|_| vec![]), &[sample], &wanted, "m").map(|warmed| warmed.batching.enabled)
        };
        assert_eq!(warm_with(false), Ok(false));
        assert!(warm_with(true).unwrap_err().message.contains("s.json"));
    }

    #[test]
    fn rows_are_compared_with_tolerance() {
        let tensor = |value: f32| {
            let data = Data::Plain(Bytes::copy_from_slice(&value.to_le_bytes()));
            Tensor::new("y".into(), DType::Fp32, [1].as_slice().into(), data).unwrap()
        };
        assert!(agree(&tensor(1.0), &tensor(1.00005)));
        assert!(agree(&tensor(f32::NAN), &tensor(f32::NAN)));
        assert!(!agree(&tensor(1.0), &tensor(1.001)));
        assert!(agree(&tensor(f32::INFINITY), &tensor(f32::INFINITY)));
        assert!(!agree(&tensor(5.0), &tensor(f32::INFINITY)), "no tolerance covers infinity");
        assert!(!distinct(&tensor(f32::NAN), &tensor(1.0)) && distinct(&tensor(2.0), &tensor(1.0)));
    }
}
