//! Instances that share weights: ONNX Runtime writes the rewritten graph and its repacked weights into a file once, and
//! every instance maps that file.
//!
//! Each session would otherwise hold weights of its own, repacked for its kernels: four instances of a model with
//! 200 MB of matrices take 840 MB, and 210 MB with one file behind them. Handing ONNX Runtime the weights and a
//! container for repacked ones (`PrepackedWeights`) takes 400 MB, for both forms stay in memory. Results are the same,
//! bit for bit: it is the same graph with the same repacked bytes, only kept elsewhere.
//!
//! The file is no model author's: it lies in a folder that only this user may enter, and is gone once it is mapped, so
//! nobody can change or truncate it under a session. Its disk space comes back with the last instance.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Once,
};

use ort::{logging::LogLevel, session::builder::SessionBuilder};
use tempfile::TempDir;

use super::{Device, Options};

/// Smaller models are loaded as they are: what sharing would save is less than it costs in time and files.
const MIN_BYTES: usize = 16 << 20;

/// Smaller tensors stay in the graph's own file, which is read and not mapped: mapped, each would take whole pages.
const MIN_TENSOR_BYTES: usize = 64 << 10;

/// What the names of folders begin with, for whoever cleans up after a killed server.
const FOLDER: &str = "weights-";

const GRAPH: &str = "model.onnx";

/// Where files of shared weights are made.
pub struct Scratch {
    /// `None`: among the system's temporary files.
    directory: Option<PathBuf>,
    cleaned: Once,
}

/// A rewritten graph and its weights on disk, until the value is dropped; what is mapped stays.
pub struct Written {
    folder: TempDir,
}

impl Scratch {
    /// A directory given must be this process's own by the time the first model is loaded.
    pub fn new(directory: Option<PathBuf>) -> Self {
        Self { directory, cleaned: Once::new() }
    }

    /// An empty folder for one model.
    ///
    /// # Errors
    /// What the file system says.
    pub fn folder(&self) -> std::io::Result<Written> {
        let private = Permissions::from_mode(0o700);
        let mut builder = tempfile::Builder::new();
        builder.prefix(FOLDER).permissions(private);
        let folder = match &self.directory {
            None => builder.tempdir(),
            Some(directory) => {
                self.cleaned.call_once(|| remove_left_overs(directory));
                builder.tempdir_in(directory)
            }
        };
        Ok(Written { folder: folder? })
    }
}

impl Written {
    pub fn graph(&self) -> PathBuf {
        self.folder.path().join(GRAPH)
    }

    /// Has the next session of `builder` write the graph as it is rewritten for this machine, and its weights as they
    /// are repacked.
    ///
    /// # Errors
    /// What ONNX Runtime says of the options.
    pub fn write_with(&self, builder: SessionBuilder) -> ort::Result<SessionBuilder> {
        Ok(builder
            // It warns that the file is of no use on other machines.
            .with_log_level(LogLevel::Error)?
            .with_optimized_model_path(self.graph())?
            .with_config_entry("session.optimized_model_external_initializers_file_name", "weights")?
            .with_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes",
                MIN_TENSOR_BYTES.to_string(),
            )?
            .with_config_entry("session.save_external_prepacked_constant_initializers", "1")?)
    }
}

/// Whether `instances` sessions of a model whose files have `bytes` shall share weights.
pub fn pays(options: &Options, instances: usize, bytes: usize) -> bool {
    // On a device weights lie in its memory, and whoever wants the rewritten graph for himself can have it.
    let possible = instances > 1 && options.device == Device::Cpu && options.optimized_model.is_none();
    possible && options.share_prepacked_weights.unwrap_or(bytes >= MIN_BYTES)
}

/// Removes what a server that was killed while it loaded has left.
fn remove_left_overs(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(FOLDER.as_bytes())) {
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(folder = %entry.path().display(), %error, "old weights could not be removed");
        }
    }
}
