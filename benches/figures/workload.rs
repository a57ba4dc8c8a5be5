//! The models under load: how each is asked, and how it is run in-process.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Bench, Pace};
use crate::{
    inprocess::Model,
    machine::Usage,
    pairs::disturbance,
    report::Better::{Higher, Lower},
    requests::Protocol,
    statistics::fit,
    stub,
};

/// A model, and what is asked of it.
pub(super) struct Workload {
    /// In the names of figures.
    pub name: &'static str,
    /// In its repository, and to the echo.
    pub model: &'static str,
    /// Connections, and requests on each, under full load.
    pub concurrency: fn(Protocol) -> (usize, usize),
    /// Rows of the batches that are run in-process; none where nothing is compared with that.
    pub batches: &'static [usize],
    /// The elements of the row that is asked about, by their number.
    pub element: fn(usize) -> [u8; 4],
    /// Whether its rate is held against the echo's; of the others only what the echo costs is of use, which a generator
    /// that can give it no more to do does not change.
    pub beside_echo: bool,
}

/// W1: costs less than a request.
pub(super) const IRIS: Workload = Workload {
    name: "w1",
    model: "iris",
    concurrency: Protocol::concurrency,
    batches: &[1, 2, 4, 8, 16, 32, 64],
    element: |index| [5.7_f32, 2.8, 4.1, 1.3][index % 4].to_le_bytes(),
    beside_echo: true,
};
pub(super) const DIGITS: Workload = Workload {
    name: "digits",
    model: "digits",
    concurrency: Protocol::concurrency,
    batches: &[1, 2, 4, 8, 16, 32, 64],
    element: |index| ((index % 17) as f32 / 16.0).to_le_bytes(),
    beside_echo: false,
};
/// W3: images of 602 KB that come back as they are.
pub(super) const IDENTITY: Workload =
    Workload { name: "w3", model: "identity", concurrency: few, batches: &[], element: pixel, beside_echo: true };
/// W3: the same images through a small convolution.
pub(super) const CONVOLUTION: Workload = Workload {
    name: "convolution",
    model: "convolution",
    concurrency: few,
    batches: &[1, 2, 4, 8],
    element: pixel,
    beside_echo: false,
};
/// Some milliseconds a row, which batches do not make cheaper.
pub(super) const MAGIKA: Workload = Workload {
    name: "magika",
    model: "magika",
    concurrency: few,
    batches: &[1, 2, 4, 8],
    element: |index| (index as u32 % 256).to_le_bytes(),
    beside_echo: false,
};

/// W4: a stub whose runs take a millisecond whatever their size.
pub(super) const W4: Workload = Workload {
    name: "w4",
    model: stub::MODEL,
    concurrency: Protocol::concurrency,
    batches: &[1, 2, 4, 8],
    // The stub's own row is asked about.
    element: |_| [0; 4],
    beside_echo: false,
};

/// Enough to fill batches of four while the next four wait; more would only wait longer, and take caches.
fn few(protocol: Protocol) -> (usize, usize) {
    if protocol == Protocol::Grpc { (4, 2) } else { (8, 1) }
}

fn pixel(index: usize) -> [u8; 4] {
    ((index % 251) as f32 / 251.0).to_le_bytes()
}

/// Seconds of a run that is slow.
const SLOW: f64 = 1e-3;

/// A model that is loaded in-process, with what its runs take there.
pub(super) struct Bare {
    pub model: Model,
    /// Seconds of a run with one row.
    pub single: f64,
    /// Rows of the batch that takes the least time for each.
    best: usize,
    /// Whether a run of that batch takes so long that a short window holds few of them.
    slow: bool,
}

impl Bench {
    /// Where a version of the model lies; `None` for the stub, which has no files, and for a model that need not be
    /// there and is not.
    pub(super) fn files(&self, workload: &Workload) -> Option<PathBuf> {
        match workload.model {
            "identity" | "convolution" => Some(self.made.join(workload.model).join("1")),
            "magika" => self.magika.clone(),
            stub::MODEL => None,
            shipped => Some(self.models.join(shipped).join("1")),
        }
    }

    /// Loads the model in-process.
    pub(super) fn load(&self, workload: &Workload) -> Result<Model> {
        if workload.model == stub::MODEL {
            return Model::stub(&stub::W4, self.programs.core);
        }
        let files = self.files(workload).with_context(|| format!("no files of '{}'", workload.model))?;
        Model::load(&self.programs.onnxruntime, &files, self.programs.core, workload.element)
    }

    /// Loads the model in-process and runs it alone and in batches.
    pub(super) fn bare(&mut self, workload: &Workload) -> Result<Bare> {
        let mut model = self.load(workload)?;
        let (mut times, mut best, mut void) = (Vec::new(), (f64::INFINITY, 1, false), None);
        for &rows in workload.batches {
            let (seconds, usage) = model.run(rows, self.pace.sweep)?;
            times.push((rows, seconds));
            // By CPU time, which others on the machine do not lengthen.
            let each = usage.own / usage.seconds * seconds / rows as f64;
            if each < best.0 {
                best = (each, rows, seconds > SLOW);
            }
            let disturbed = disturbance(&usage);
            let name = format!("{}_inprocess_{rows}_us", workload.model);
            let title = format!("`{}` in-process, one run with a batch of {rows}", workload.model);
            self.report.single(&name, &title, "µs", Lower, seconds * 1e6, disturbed.clone());
            void = void.or(disturbed);
        }
        let single = times.first().map_or(f64::NAN, |&(rows, seconds)| seconds / rows as f64);
        let (_, best, slow) = best;
        if times.len() > 1 {
            let (line, model) = (fit(&times), workload.model);
            let mut add = |part: &str, what: &str, value: f64| {
                let (name, title) = (format!("{model}_{part}_us"), format!("`{model}` in-process, fitted: {what}"));
                self.report.single(&name, &title, "µs", Lower, value * 1e6, void.clone());
            };
            add("alpha", "α, each row", line.row);
            add("tau0", "τ0, each batch", line.fixed);
            let title = format!("`{model}` in-process: the batch that takes least for each row");
            self.report.single(&format!("{model}_best_batch"), &title, "rows", Higher, best as f64, None);
        }
        Ok(Bare { model, single, best, slow })
    }
}

impl Bare {
    /// Runs the best batch for a while: rows per second, CPU seconds for each row, and what was used.
    pub(super) fn run(&mut self, pace: &Pace) -> Result<(f64, f64, Usage)> {
        let window = if self.slow { pace.window } else { pace.bare };
        let (seconds, usage) = self.model.run(self.best, window)?;
        let rate = self.best as f64 / seconds;
        Ok((rate, usage.own / (usage.seconds * rate), usage))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;

    use super::*;
    use crate::answers;

    /// Only `iris` is asked over JSON, where a number's length shows.
    #[test]
    fn the_echo_answers_what_iris_does() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let library = std::env::var_os("ORT_DYLIB_PATH").map_or_else(|| root.join(".onnxruntime"), Into::into);
        let mut model = Model::load(&library, &root.join("models/iris/1"), 0, IRIS.element).unwrap();
        let echoed = answers::of("iris").unwrap().iter().map(|output| output.row.bytes(&[1, 4], &Bytes::new()));
        let (echoed, given): (Vec<_>, Vec<_>) = (echoed.collect(), model.outputs().unwrap());
        assert_eq!((echoed.len(), &echoed[0]), (2, &given[0]));
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
        };
        let (echoed, given) = (floats(&echoed[1]), floats(&given[1]));
        // Another processor may add up in another order, and then the last digit is another one.
        let alike = echoed.iter().zip(&given).all(|(echoed, given)| (echoed - given).abs() < 1e-5);
        let [echoed, given] = [echoed, given].map(|floats| serde_json::to_string(&floats).unwrap());
        assert!(alike && echoed.len().abs_diff(given.len()) <= 2, "the echo answers {echoed}, the model {given}");
    }
}
