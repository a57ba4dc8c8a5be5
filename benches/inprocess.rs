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
    stub::Stub,
};

/// A loaded model and one row for it.
pub struct Model {
    session: Box<dyn Session>,
    row: Tensor,
    core: usize,
}

impl Model {
    /// Loads the model in `files` as a server on one core does. `bytes` makes the elements of the row by their number.
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
    /// Never.
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
        let session = &mut self.session;
        on_cores(&[self.core], || {
            for _ in 0..3 {
                session.run(&batch)?;
            }
            let start = Moment::here()?;
            let mut runs = 0u32;
            while start.elapsed() < window {
                session.run(&batch)?;
                runs += 1;
            }
            let usage = start.until(&Moment::here()?);
            Ok((usage.seconds / f64::from(runs), usage))
        })
    }
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
    }
}
