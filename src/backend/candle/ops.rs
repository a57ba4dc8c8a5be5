//! What an encoder does between matrix products, each in one pass over the elements.
//!
//! candle's own operators on elements would do, and on a GPU they do. On a CPU they hand everything of 64 Ki elements or
//! more to threads that all of the process shares, one caller at a time, and that spin for a while after each; what runs
//! here stays in the pool of the session. One pass in place of three or four is the faster way besides.
//!
//! Activations are matrices of one row for each token, rows of a text one after the other. On a CPU they are of 32 bits,
//! whatever the weights are: processors multiply no halves, and what is converted once for each layer is a matrix of
//! weights, not everything between them.

mod attention;
mod elementwise;
mod functions;
mod plain;
mod rotary;
mod rows;
mod stored;
#[cfg(test)]
mod tests;

pub use attention::{Dims, Mask, attend, merge, split};
pub use elementwise::{Norm, activate, add, gate, normalize};
pub use rotary::Rotation;
pub use stored::{embed, product};
