//! Texts through all-MiniLM-L6-v2, of 8 to 256 tokens each: beside the same model without a server, and beside batches that
//! are counted in texts.
//!
//! Whatever runs in-process makes its tokens itself, as the server does. Rates are in texts of the mean length: a reply
//! counts by its tokens, so that a window which got more of the long ones is not taken for a slow one.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Bench, OPEN_STREAMS, in_closed_loop, order::page, repository, target};
use crate::{
    encoder::{Batching, Encoder, Pass, floats, input},
    load::{self, between},
    machine::memory,
    pairs::{Measured, Pairs, Value, disturbance},
    process::Process,
    report::{
        Better::{Higher, Lower},
        say,
    },
    requests::Protocol,
    statistics::median,
    texts::{self, ROUND, Text},
    wire::Request,
};

const MODEL: &str = "minilm";
const WEIGHTS: &str = "model.safetensors";
/// The texts, one on each line, for whoever runs other things on them: benches/sentence_transformers.py does.
const LISTED: &str = "texts.txt";

/// All texts are twice those of which any window has every length.
const ROUNDS: usize = 2;
/// Connections, and requests on each, under full load: as many as there are texts, which is some seconds of work.
const CONCURRENCY: (usize, usize) = (4, 32);
/// The windows' share that goes before each, until there is a queue to choose from.
const WARM: u32 = 5;
const LOAD: f64 = 0.5;

/// Tokens that a run is said to cost beside its own, of which those that lead to the best batches are the ceiling.
const RUNS: [usize; 4] = [4, 16, 64, 256];
const FEW_RUNS: [usize; 2] = [16, 64];
/// Texts of a batch, of which the best is what a server can do that counts texts. One text is none, and measured beside them.
const ROWS: [usize; 6] = [2, 4, 8, 16, 32, 64];
const FEW_ROWS: [usize; 2] = [2, 8];
const ALONE: Batching = Batching::Fixed(1);
/// Texts whose embeddings are compared, and how far apart they may be.
const COMPARED: usize = 8;
const AGREEMENT: f32 = 1e-4;

/// Tokens that the server has run, and padding beside them.
const TOKENS: &str = "tidegate_tokens_total";
const PADDING: &str = "tidegate_padding_tokens_total";

/// What the server did under full load.
#[derive(Clone, Copy)]
struct Served {
    /// Texts of the mean length per second.
    rate: f64,
    /// CPU seconds for each of them.
    cpu: f64,
    /// The share of the tokens that ran which were padding; not a number when the server does not say.
    padding: f64,
}

/// In-process, within the same seconds.
#[derive(Clone, Copy)]
struct Inprocess {
    candle: Pass,
    fixed: Pass,
    alone: Pass,
    onnx: Pass,
}

/// Encoders, and the batches that take least for each text.
struct Encoders {
    candle: Encoder,
    onnx: Encoder,
    sorted: Batching,
    fixed: Batching,
    onnx_sorted: Batching,
}

impl Bench {
    /// Every figure of texts, when the model is there.
    pub(super) fn texts(&mut self) -> Result<()> {
        let Some(files) = self.minilm.clone() else { return Ok(()) };
        let idle = self.text_memory(&files)?;
        let core = self.programs.core;
        let made = self.made.join(MODEL);
        let mut candle = Encoder::candle(&files, core)?;
        let onnx = Encoder::onnx(&self.programs.onnxruntime, &made.join("1"), core);
        let mut onnx = onnx.context("benches/models/encoder.py makes the graph")?;
        let texts = texts::made_up(ROUNDS, |text| candle.tokens(text))?;
        let lines: String = texts.iter().map(|text| format!("{}\n", text.text)).collect();
        std::fs::write(made.join(LISTED), lines)?;
        let round: Vec<&str> = texts.iter().take(ROUND).map(|text| text.text.as_str()).collect();
        self.tokenization(&mut candle, &round)?;
        let thorough = self.pace.thorough;
        let runs: &[usize] = if thorough { &RUNS } else { &FEW_RUNS };
        let runs: Vec<Batching> = runs.iter().map(|&run| Batching::Sorted(run)).collect();
        let rows: &[usize] = if thorough { &ROWS } else { &FEW_ROWS };
        let rows: Vec<Batching> = rows.iter().map(|&rows| Batching::Fixed(rows)).collect();
        let sorted = self.best_of(&mut candle, "candle", &round, &runs)?;
        let fixed = self.best_of(&mut candle, "candle", &round, &rows)?;
        let onnx_sorted = self.best_of(&mut onnx, "ONNX Runtime", &round, &runs)?;
        let encoders = Encoders { candle, onnx, sorted, fixed, onnx_sorted };
        self.serve_texts(&files, idle, &texts, encoders)
    }

    /// What the model adds to the memory of a server; that of one without it.
    fn text_memory(&mut self, files: &Path) -> Result<f64> {
        say(format_args!("memory of a server with and without {MODEL}"));
        let idle = self.held(&repository(&[])?)?;
        let more = self.held(&repository(&[(MODEL, files)])?)? - idle;
        let weights = weights(files)?;
        let title = format!("`{MODEL}`, {:.0} MB of weights: memory ÷ weights", weights / 1e6);
        self.report.single("text_memory", &title, "", Lower, more / weights, None);
        Ok(idle)
    }

    /// The share of a single text's time that goes into its tokens.
    fn tokenization(&mut self, candle: &mut Encoder, texts: &[&str]) -> Result<()> {
        say(format_args!("{MODEL} in-process, one text at a time"));
        candle.one_at_a_time(&texts[..COMPARED])?;
        let single = candle.one_at_a_time(texts)?;
        let (value, void) = (single.value, single.void());
        let title = format!("`{MODEL}` in-process, one text at a time: tokenization's share of the time");
        self.report.single("text_tokenization", &title, "%", Lower, 100.0 * value.tokenization, void.clone());
        let title = format!("`{MODEL}` in-process, one text at a time: mean");
        self.report.single("text_single_ms", &title, "ms", Lower, 1e3 * value.each, void);
        Ok(())
    }

    /// The batches that take the least CPU time for each text, which others on the machine do not lengthen.
    fn best_of(
        &mut self,
        encoder: &mut Encoder,
        runtime: &str,
        texts: &[&str],
        batchings: &[Batching],
    ) -> Result<Batching> {
        encoder.pass(&texts[..COMPARED], Batching::Fixed(COMPARED))?;
        let mut best = (f64::INFINITY, ALONE);
        for &batching in batchings {
            say(format_args!("{MODEL} in-process on {runtime}, {}", batching.title()));
            let found = encoder.pass(texts, batching)?;
            if found.value.cpu < best.0 {
                best = (found.value.cpu, batching);
            }
            let prefix = if runtime == "candle" { "" } else { "onnx_" };
            let (name, title) = (batching.name(), format!("`{MODEL}` in-process on {runtime}, {}", batching.title()));
            let (rate, padding, void) = (found.value.rate, found.value.padding, found.void());
            self.report.single(&format!("text_{prefix}{name}_rps"), &title, "texts/s", Higher, rate, void);
            if prefix.is_empty() {
                let title = format!("{title}: padding");
                self.report.single(&format!("text_{name}_padding"), &title, "%", Lower, 100.0 * padding, None);
            }
        }
        Ok(best.1)
    }

    /// The server under full load and at half of it, and the encoders beside it.
    fn serve_texts(&mut self, files: &Path, idle: f64, texts: &[Text], mut encoders: Encoders) -> Result<()> {
        let repository = repository(&[(MODEL, files)])?;
        let server = self.programs.serve(repository.path())?;
        let requests = texts.iter().map(|text| Protocol::Grpc.request(MODEL, &input(&text.text)?));
        let requests = requests.collect::<Result<Vec<_>>>()?;
        for (text, request) in texts.iter().zip(&requests).take(COMPARED) {
            compare(&server, request, &text.text, &mut encoders)?;
        }
        let request = Request::in_turn(requests)?;
        let all: Vec<&str> = texts.iter().map(|text| text.text.as_str()).collect();
        let mean = texts.iter().map(|text| text.tokens).sum::<usize>() as f64 / texts.len() as f64;
        let weight = |place: usize| texts[place].tokens as f64 / mean;
        let mut pairs = Pairs::new();
        for pair in 1..=self.pace.text_pairs {
            say(format_args!("{MODEL} under full load, pair {pair} of {}", self.pace.text_pairs));
            let ours = || self.served(&server, &request, weight);
            let theirs = || {
                let candle = encoders.candle.pass(&all, encoders.sorted)?;
                let fixed = encoders.candle.pass(&all, encoders.fixed)?;
                let alone = encoders.candle.pass(&all, ALONE)?;
                let onnx = encoders.onnx.pass(&all, encoders.onnx_sorted)?;
                let all = candle.and(fixed).and(alone).and(onnx);
                Ok(all.map(|(((candle, fixed), alone), onnx)| Inprocess { candle, fixed, alone, onnx }))
            };
            pairs.take(ours, theirs)?;
        }
        self.report_texts(&pairs, &encoders);
        let more = memory(server.id())? - idle;
        let title = format!("`{MODEL}`: memory ÷ weights, after the full load");
        self.report.single("text_memory_after", &title, "", Lower, more / weights(files)?, None);
        self.foreign.extend(pairs.foreign());
        let rates: Vec<f64> = pairs.values(|ours: &Served, _| ours.rate).iter().map(|value| value.number).collect();
        self.text_latency(&server, &request, LOAD * median(&rates))
    }

    /// As many texts as the server takes, and what it says of their tokens meanwhile.
    fn served(&self, server: &Process, request: &Request, weight: impl Fn(usize) -> f64) -> Result<Measured<Served>> {
        let target = target(server, Protocol::Grpc, request, CONCURRENCY);
        let mut counted = Vec::new();
        let look = || {
            let page = page(server.ops, "/metrics")?;
            counted.push((total(&page, TOKENS), total(&page, PADDING)));
            Ok(())
        };
        let window = self.pace.text_window;
        let found = in_closed_loop(load::closed_of(&target, window / WARM, window, weight, look)?);
        let padding = match counted[..] {
            [(Some(tokens), Some(padding)), (Some(more_tokens), Some(more_padding))] => {
                let padding = more_padding - padding;
                padding / (more_tokens - tokens + padding)
            }
            _ => f64::NAN,
        };
        Ok(found.map(|found| Served { rate: found.rate, cpu: found.cpu, padding }))
    }

    fn report_texts(&mut self, pairs: &Pairs<Served, Inprocess>, encoders: &Encoders) {
        let (sorted, fixed, onnx) = (encoders.sorted.title(), encoders.fixed.title(), encoders.onnx_sorted.title());
        let mut add = |name: &str, title: &str, unit, better, value: &dyn Fn(&Served, &Inprocess) -> f64| {
            let values = pairs.values(|ours: &Served, theirs: &Inprocess| value(ours, theirs));
            self.report.median(name, &format!("`{MODEL}`, {title}"), unit, better, &values);
        };
        add("text_rps", "gRPC, texts of 8 to 256 tokens: served", "texts/s", Higher, &|ours, _| ours.rate);
        let title = format!("in-process, {sorted}");
        add("text_inprocess_rps", &title, "texts/s", Higher, &|_, theirs| theirs.candle.rate);
        let title = format!("in-process, {fixed}");
        add("text_fixed_rps", &title, "texts/s", Higher, &|_, theirs| theirs.fixed.rate);
        let title = format!("in-process, {}", ALONE.title());
        add("text_alone_rps", &title, "texts/s", Higher, &|_, theirs| theirs.alone.rate);
        let title = format!("in-process on ONNX Runtime, {onnx}");
        add("text_onnx_rps", &title, "texts/s", Higher, &|_, theirs| theirs.onnx.rate);
        let title = format!("gRPC: served ÷ in-process, {sorted}");
        add("text_vs_inprocess", &title, "", Higher, &|ours, theirs| ours.rate / theirs.candle.rate);
        let title = format!("gRPC: served ÷ in-process, {fixed}");
        add("text_budget_vs_fixed", &title, "", Higher, &|ours, theirs| ours.rate / theirs.fixed.rate);
        let title = format!("gRPC: served ÷ in-process, {}", ALONE.title());
        add("text_vs_alone", &title, "", Higher, &|ours, theirs| ours.rate / theirs.alone.rate);
        let title = format!("in-process: {sorted} ÷ {fixed}");
        add("text_sorted_vs_fixed", &title, "", Higher, &|_, theirs| theirs.candle.rate / theirs.fixed.rate);
        let title = "in-process: candle ÷ ONNX Runtime, each in its best batches";
        add("text_candle_vs_onnx", title, "", Higher, &|_, theirs| theirs.candle.rate / theirs.onnx.rate);
        // Others on the machine do not lengthen CPU time as they do everything else.
        add("text_cpu_ms", "gRPC: server CPU per text", "ms", Lower, &|ours, _| 1e3 * ours.cpu);
        let title = format!("in-process, {sorted}: CPU per text");
        add("text_inprocess_cpu_ms", &title, "ms", Lower, &|_, theirs| 1e3 * theirs.candle.cpu);
        let title = format!("in-process, {fixed}: CPU per text");
        add("text_fixed_cpu_ms", &title, "ms", Lower, &|_, theirs| 1e3 * theirs.fixed.cpu);
        let title = format!("in-process on ONNX Runtime, {onnx}: CPU per text");
        add("text_onnx_cpu_ms", &title, "ms", Lower, &|_, theirs| 1e3 * theirs.onnx.cpu);
        // What is counted and what is not is the same however busy the machine is.
        let silent = |share: f64| share.is_nan().then(|| format!("the server has no series {PADDING}"));
        let shares = pairs.values(|ours: &Served, _| 100.0 * ours.padding).into_iter();
        let shares: Vec<Value> = shares.map(|share| Value { void: silent(share.number), ..share }).collect();
        let title = format!("`{MODEL}`, gRPC: padding's share of the tokens that run");
        self.report.median("text_padding", &title, "%", Lower, &shares);
    }

    /// Latency at half of what the server can do.
    fn text_latency(&mut self, server: &Process, request: &Request, rate: f64) -> Result<()> {
        say(format_args!("{MODEL} at half of its load"));
        let target = target(server, Protocol::Grpc, request, (CONCURRENCY.0, OPEN_STREAMS));
        let (warm, window) = (self.pace.text_window / WARM, self.pace.text_latency_window);
        let run = load::open(&target, rate, 1, between(warm, warm + window))?;
        ensure!(run.failed == 0, "{} texts failed at half of the load", run.failed);
        // Beside texts the milliseconds for which a generator is held up are nothing, and something always is on its way then.
        let void = disturbance(&run.usage);
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let title = format!("`{MODEL}`, gRPC at 50 % load, {rate:.1} texts/s: {name}");
            let millis = 1e3 * run.all.quantile(share);
            self.report.single(&format!("text_{name}_ms"), &title, "ms", Lower, millis, void.clone());
        }
        Ok(())
    }
}

impl Batching {
    /// In names of figures.
    fn name(self) -> String {
        match self {
            Batching::Fixed(rows) => format!("fixed_{rows}"),
            Batching::Sorted(run) => format!("sorted_{run}"),
        }
    }

    fn title(self) -> String {
        match self {
            ALONE => "one at a time".to_owned(),
            Batching::Fixed(rows) => format!("batches of {rows} in order of arrival"),
            Batching::Sorted(run) => format!("sorted, a run taken for {run} tokens"),
        }
    }
}

/// Fails when the server, candle and ONNX Runtime do not have the same embedding for a text.
fn compare(server: &Process, request: &Request, text: &str, encoders: &mut Encoders) -> Result<()> {
    let reply = load::ask(&target(server, Protocol::Grpc, request, (1, 1)))?;
    let served = floats(Protocol::contents(&reply)?.first().context("an answer without an output")?)?;
    for (what, other) in
        [("candle", encoders.candle.embedding(text)?), ("ONNX Runtime", encoders.onnx.embedding(text)?)]
    {
        let apart = served.iter().zip(&other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
        let same = served.len() == other.len() && apart <= AGREEMENT;
        ensure!(same, "the server's embedding is {apart} from the one in-process on {what}: '{text}'");
    }
    Ok(())
}

/// Bytes of the weights in `files`.
fn weights(files: &Path) -> Result<f64> {
    let file = files.join(WEIGHTS);
    let metadata = std::fs::metadata(&file).with_context(|| format!("no weights at {}", file.display()))?;
    Ok(metadata.len() as f64)
}

/// The sum of the model's series of a counter on the metrics page; `None` when there is none.
fn total(page: &str, counter: &str) -> Option<f64> {
    let labels = format!("model=\"{MODEL}\"");
    let values = page.lines().filter_map(|line| {
        let (series, value) = line.trim().strip_prefix(counter)?.strip_prefix('{')?.split_once("} ")?;
        series.split(',').any(|label| label == labels).then(|| value.parse::<f64>().ok())?
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_added_up_over_versions() {
        let page = "tidegate_tokens_total{model=\"minilm\",version=\"1\"} 40\r\n\
                    tidegate_tokens_total{version=\"2\",model=\"minilm\"} 2\n\
                    tidegate_tokens_total{model=\"other\",version=\"1\"} 7\n\
                    tidegate_tokens_total_created{model=\"minilm\",version=\"1\"} 9\n";
        assert_eq!(total(page, TOKENS), Some(42.0));
        assert_eq!(total(page, PADDING), None);
    }
}
