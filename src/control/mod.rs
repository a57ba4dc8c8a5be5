//! The slow path: what should run, and what does.

pub mod command;
pub mod pbtxt;
mod promote;
pub mod reconcile;
pub mod spec;
pub mod standing;
pub mod store;
mod tracked;
pub mod upload;

pub use tracked::wanted;

use std::{path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::source::places::Places;

/// How the server follows its repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ModelControl {
    /// Changes in the repository are followed.
    #[default]
    Watch,
    /// What is named at start is loaded, and what is asked for later; files that change are loaded when asked for.
    Explicit,
    /// What was there at start is loaded, later changes are ignored.
    None,
}

/// What the reconciler needs to know of the configuration.
#[derive(Clone)]
pub struct Settings {
    pub models: PathBuf,
    /// Whether versions come into the folder whole, so that nobody has to wait for the rest of their files.
    pub is_mirror: bool,
    /// Where models have their versions that name a source of their own.
    pub places: Places,
    pub control: ModelControl,
    /// With explicit control, the models to load; `*` is all.
    pub load_models: Vec<String>,
    pub profile: spec::Profile,
    pub cores: usize,
    pub queue: crate::model::batcher::Limits,
    pub load_concurrency: usize,
    pub drain_timeout: Duration,
    /// How often the repository is looked at, whatever the file system tells.
    pub poll_interval: Duration,
}
