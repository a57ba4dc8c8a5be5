//! Tidegate, a model inference server.

pub mod api;
pub mod backend;
pub mod cli;
pub mod config;
pub mod control;
pub mod engine;
pub mod error;
pub mod id;
pub mod metrics;
pub mod model;
pub mod server;
pub mod source;
pub mod tensor;
