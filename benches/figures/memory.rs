//! What the server and its models hold in memory, and what of it comes back.
//!
//! Memory is the proportional set size, which other processes and other load do not change.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{Bench, order::order, repository};
use crate::{
    machine::memory,
    report::{Better::Lower, say},
    statistics::median,
};

const MEGABYTE: f64 = 1e6;
/// Numbers of executors that share weights; the one in the middle when there is time for it.
const EXECUTORS: [usize; 3] = [2, 4, 8];
/// Loads and unloads until everything that is kept has been made.
const FIRST_CYCLES: usize = 10;
/// Models are loaded by request.
const EXPLICIT: [&str; 2] = ["--model-control", "explicit"];

impl Bench {
    /// Memory with no model, what models add, and what is left of them.
    pub(super) fn memory(&mut self, magika: Option<&Path>) -> Result<()> {
        say(format_args!("memory of idle servers and of models"));
        let idle = self.held(&repository(&[])?)?;
        self.report.single("idle_mb", "memory, ready with no model", "MB", Lower, idle / MEGABYTE, None);
        let models = [("iris", Some(self.iris.clone())), ("magika", magika.map(Path::to_owned))];
        for (name, files) in models.into_iter().filter_map(|(name, files)| Some((name, files?))) {
            let more = (self.held(&repository(&[(name, &files)])?)? - idle) / MEGABYTE;
            let title = format!("memory that `{name}` adds (its file: {:.1} MB)", size(&files)? / MEGABYTE);
            self.report.single(&format!("{name}_mb"), &title, "MB", Lower, more, None);
        }
        self.weights(idle)?;
        self.cycles()
    }

    /// What a model with 200 MB of matrices adds, with one executor and with several.
    fn weights(&mut self, idle: f64) -> Result<()> {
        let files: PathBuf = self.made.join("wide/1");
        let weights = size(&files)?;
        let ratio = |executors: usize| -> Result<f64> {
            let repository = repository(&[("wide", &files)])?;
            let settings = format!("instances = {executors}\n[options]\nintra_op_threads = 1\n");
            std::fs::write(repository.path().join("wide/model.toml"), settings)?;
            Ok((self.held(&repository)? - idle) / weights)
        };
        let one = ratio(1)?;
        let [few, some, many] = EXECUTORS;
        let executors = if self.pace.thorough { vec![few, some, many] } else { vec![few, many] };
        let several = executors.iter().map(|&count| Ok((count, ratio(count)?))).collect::<Result<Vec<_>>>()?;
        let title = format!("`wide`, {:.0} MB of weights: memory ÷ weights, one executor", weights / MEGABYTE);
        self.report.single("model_memory", &title, "", Lower, one, None);
        let worst = several.iter().map(|(_, ratio)| *ratio).fold(0.0, f64::max);
        let title = format!("`wide`: memory ÷ weights, the most with any of {executors:?} executors");
        self.report.single("executors_memory", &title, "", Lower, worst, None);
        for (executors, ratio) in several {
            let title = format!("`wide`: memory ÷ weights, {executors} executors");
            self.report.single(&format!("executors_memory_{executors}"), &title, "", Lower, ratio, None);
        }
        Ok(())
    }

    /// Memory after many loads and unloads.
    fn cycles(&mut self) -> Result<()> {
        let cycles = self.pace.cycles;
        say(format_args!("{cycles} loads and unloads"));
        let repository = repository(&[("iris", &self.iris)])?;
        let server = self.programs.serve_with(repository.path(), &EXPLICIT)?;
        let mut first = f64::NAN;
        for cycle in 0..cycles {
            if cycle == FIRST_CYCLES {
                first = memory(server.id())?;
            }
            order(server.rest, "iris", "load")?;
            order(server.rest, "iris", "unload")?;
        }
        let last = memory(server.id())?;
        let title = format!("memory after {cycles} loads and unloads ÷ after the first {FIRST_CYCLES}");
        self.report.single("cycles_memory", &title, "", Lower, last / first, None);
        let title = format!("memory after {cycles} loads and unloads");
        self.report.single("cycles_mb", &title, "MB", Lower, last / MEGABYTE, None);
        Ok(())
    }

    /// Bytes that a server of `models` holds when it is ready.
    pub(super) fn held(&self, models: &TempDir) -> Result<f64> {
        let sizes = (0..self.pace.memory_starts)
            .map(|_| memory(self.programs.serve(models.path())?.id()))
            .collect::<Result<Vec<_>>>()?;
        Ok(median(&sizes))
    }
}

/// Bytes of the model file in `files`.
fn size(files: &Path) -> Result<f64> {
    let file = files.join("model.onnx");
    let metadata = std::fs::metadata(&file).with_context(|| format!("no model at {}", file.display()))?;
    Ok(metadata.len() as f64)
}
