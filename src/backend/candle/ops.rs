//! What an encoder does between matrix products, each in one pass over the elements.
//!
//! candle's own operators on elements would do, and on a GPU they do. On a CPU they hand everything of 64 Ki elements or
//! more to threads that all of the process shares, one caller at a time, and that spin for a while after each; what runs
//! here stays in the pool of the session. One pass in place of three or four is the faster way besides.
//!
//! Activations are matrices of one row for each token, rows of a text one after the other. On a CPU they are of 32 bits,
//! whatever the weights are: processors multiply no halves, and what is converted once for each layer is a matrix of
//! weights, not everything between them.

use candle_core::{Device, Result, Tensor};

use super::config::Activation;

mod attention;
mod elementwise;
mod functions;
mod plain;
mod rotary;
mod rows;
mod stored;
#[cfg(test)]
mod tests;

use attention::Block;
pub use attention::{Dims, Heads, Mask};
pub use elementwise::Norm;
pub use rotary::Rotation;
pub use stored::product;

/// What computes between products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// What is written here, for CPUs.
    Passes,
    /// candle's own operators, for all other devices. They give the same on a CPU.
    Plain,
}

impl Ops {
    pub fn of(device: &Device) -> Self {
        if device.is_cpu() { Self::Passes } else { Self::Plain }
    }

    /// The sums of the rows of `tables` that `indices` name: one list for each table.
    pub fn embed(self, tables: &[(&Tensor, Vec<u32>)]) -> Result<Tensor> {
        match self {
            Self::Passes => stored::embed(tables),
            Self::Plain => plain::embed(tables),
        }
    }

    /// `x + bias + residual`; `x` is overwritten.
    pub fn add(self, x: Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Passes => elementwise::combine(x, bias, residual, None),
            Self::Plain => plain::add(x, bias, residual),
        }
    }

    /// The normalized rows of `x + bias + residual`; `x` is overwritten.
    pub fn normalize(self, x: Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>, norm: &Norm) -> Result<Tensor> {
        match self {
            Self::Passes => elementwise::combine(x, bias, residual, Some(norm)),
            Self::Plain => plain::normalize(&plain::add(x, bias, residual)?, norm),
        }
    }

    /// `activation(x + bias)`, row by row; `x` is overwritten.
    pub fn activate(self, x: Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        match self {
            Self::Passes => elementwise::activate(x, bias, activation),
            Self::Plain => plain::activate(&plain::add(x, bias, None)?, activation),
        }
    }

    /// `activation(a) * b` for rows of `x + bias` that are `a` and `b`.
    pub fn gate(self, x: Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        match self {
            Self::Passes => elementwise::gate(&x, bias, activation),
            Self::Plain => plain::gate(&plain::add(x, bias, None)?, activation),
        }
    }

    /// The heads of rows that have queries, keys and values one behind the other.
    pub fn split(self, x: Tensor, bias: Option<&Tensor>, rotation: Option<&Rotation>, dims: Dims) -> Result<Heads> {
        match self {
            Self::Passes => attention::split(&x, bias, rotation, dims),
            Self::Plain => plain::split(&plain::add(x, bias, None)?, rotation, dims),
        }
    }

    /// What each token takes from those that it sees, in rows again.
    pub fn attend(self, heads: &Heads, mask: &Mask, window: Option<usize>) -> Result<Tensor> {
        attention::attend(self, heads, mask, window)
    }

    /// What each token makes of each other one that it sees, `scores` of a block, as shares of 1: 0 for padding and for
    /// what is more than `window` tokens away.
    fn share(self, scores: Tensor, mask: &Mask, window: Option<usize>, block: &Block) -> Result<Tensor> {
        match self {
            Self::Passes => attention::share(scores, mask, window, block),
            Self::Plain => plain::share(&scores, mask, window, block),
        }
    }

    /// Scores that there are at a time: they grow with the square of a text's length, and would take gigabytes. What fits
    /// into a processor's caches is faster besides; a GPU wants more to do at a time.
    fn most_scores(self) -> usize {
        match self {
            // Tests have several blocks, however short their texts are.
            _ if cfg!(test) => 1000,
            Self::Passes => 2 << 20,
            Self::Plain => 64 << 20,
        }
    }
}
