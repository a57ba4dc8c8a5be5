//! The same model with no server around it: the library's own backend, called in a loop on the server's core.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use bytes::Bytes;
use tidegate::{
    backend::{Backend, Options, Session, onnx::OnnxRuntime},
    tensor::{Data, Tensor, gather},
};

use crate::{
    machine::{Moment, Usage, on_cores},
    pairs::Measured,
    stub::Stub,
};

/// Runs before those that count. A model whose run takes so long is warm after the first.
const WARM_RUNS: usize = 3;
const WARM: Duration = Duration::from_millis(20);

/// A loaded model and one row for it.
pub struct Model {
    session: Box<dyn Session>,
    row: Tensor,
    core: usize,
}

impl Model {
    /// Loads the model in `files` as a server on one core does. `element` makes each of the row's by its number.
    ///
    /// # Errors
    /// When it cannot be loaded, or takes more than one input of a fixed size.
    pub fn load(library: &Path, files: &Path, core: usize, element: impl Fn(usize) -> [u8; 4]) -> Result<Self> {
        let session = on_cores(&[core], || load(Some(library), files))?;
        let [spec] = session.signature().inputs.as_slice() else { anyhow::bail!("the model has several inputs") };
        let shape: Vec<usize> = spec.shape.iter().map(|&size| usize::try_from(size).unwrap_or(1)).collect();
        let bytes: Vec<u8> = (0..shape.iter().product()).flat_map(element).collect();
        let row = Tensor::new(spec.name.clone(), spec.dtype, shape.as_slice().into(), Data::Plain(Bytes::from(bytes)))?;
        Ok(Self { session, row, core })
    }

    /// The stub without a server.
    ///
    /// # Errors
    /// When the stub's row does not fit its shape.
    pub fn stub(stub: &Stub, core: usize) -> Result<Self> {
        let session = stub.load(Path::new(""), &Options::default(), 1)?.pop().context("no session was loaded")?;
        Ok(Self { session, row: stub.row()?, core })
    }

    pub fn row(&self) -> &Tensor {
        &self.row
    }

    /// The contents of the outputs for the row.
    ///
    /// # Errors
    /// When the run fails, or gives texts.
    pub fn outputs(&mut self) -> Result<Vec<Bytes>> {
        let outputs = self.session.run(std::slice::from_ref(&self.row))?;
        let contents = outputs.into_iter().map(|output| match output.data {
            Data::Plain(bytes) => Ok(bytes),
            Data::Strings(_) => anyhow::bail!("output '{}' holds texts", output.name),
        });
        contents.collect()
    }

    /// Runs batches of `rows` for `window`; seconds of a run, and what was used meanwhile.
    ///
    /// # Errors
    /// When a run fails.
    pub fn run(&mut self, rows: usize, window: Duration) -> Result<(f64, Usage)> {
        let batch = [gather(&vec![&self.row; rows])];
        let session = self.session.as_mut();
        on_cores(&[self.core], || {
            warm(session, &batch)?;
            let start = Moment::here()?;
            let seconds = time(session, &batch, window)?;
            Ok((seconds, start.until(&Moment::here()?)))
        })
    }

    /// Runs batches of every size of `batches` for `window` each; rows and seconds of a run.
    ///
    /// # Errors
    /// When a run fails.
    pub fn sweep(&mut self, batches: &[usize], window: Duration) -> Result<Measured<Vec<(usize, f64)>>> {
        let (row, session) = (&self.row, self.session.as_mut());
        on_cores(&[self.core], || {
            // Watched as a whole: the kernel counts in ticks, which are long beside one window.
            let start = Moment::here()?;
            let mut times = Vec::new();
            for &rows in batches {
                let batch = [gather(&vec![row; rows])];
                warm(session, &batch)?;
                times.push((rows, time(session, &batch, window)?));
            }
            Ok(Measured::new(times, start.until(&Moment::here()?)))
        })
    }
}

fn warm(session: &mut dyn Session, batch: &[Tensor]) -> Result<()> {
    let start = Instant::now();
    for _ in 0..WARM_RUNS {
        session.run(batch)?;
        if start.elapsed() > WARM {
            break;
        }
    }
    Ok(())
}

/// Seconds of one of the whole runs that begin within `window`.
fn time(session: &mut dyn Session, batch: &[Tensor], window: Duration) -> Result<f64> {
    let (start, mut runs) = (Instant::now(), 0u32);
    while start.elapsed() < window {
        session.run(batch)?;
        runs += 1;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(runs))
}

/// Seconds to load the library, its environment and one session.
///
/// # Errors
/// When they cannot be loaded.
pub fn load_time(files: &Path) -> Result<f64> {
    let start = Instant::now();
    let library = std::env::var_os("ORT_DYLIB_PATH");
    let _session = load(library.as_deref().map(Path::new), files)?;
    Ok(start.elapsed().as_secs_f64())
}

fn load(library: Option<&Path>, files: &Path) -> Result<Box<dyn Session>> {
    let runtime = OnnxRuntime::open(library, None)?;
    runtime.load(&files.join(runtime.file_name()), &Options::default(), 1)?.pop().context("no session was loaded")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_model_runs() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let library = std::env::var_os("ORT_DYLIB_PATH").map_or_else(|| root.join(".onnxruntime"), Into::into);
        let flower = [5.1_f32, 3.5, 1.4, 0.2];
        let mut model =
            Model::load(&library, &root.join("models/iris/1"), 0, |index| flower[index % 4].to_le_bytes()).unwrap();
        assert_eq!(model.outputs().unwrap()[0], 0_i64.to_le_bytes().as_slice());
        let times = model.sweep(&[1, 64], Duration::from_millis(20)).unwrap().value;
        assert!(times[0].0 == 1 && times[1].0 == 64 && times[0].1 > 0.0 && times[0].1 < times[1].1, "{times:?}");
    }
}
