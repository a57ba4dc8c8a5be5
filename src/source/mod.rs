//! Finding model files.

pub mod local;
