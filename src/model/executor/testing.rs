//! A request as tests of executors and of those who replace them queue it.

use std::sync::Arc;

use super::{Queue, Refused, Ticket, Visit};
use crate::{
    model::{
        batcher::{Client, Cost, Lengths, ShapeKey},
        schedule::Place,
    },
    tensor::{DType, Data, Tensor},
};

/// What a row of so many columns costs, by which it is told from those that cannot share its run.
pub fn cost(columns: usize) -> Cost {
    Cost {
        rows: 1,
        lengths: Lengths::NONE,
        follows: false,
        bytes: 4,
        shape: ShapeKey::from_slice(&[columns]),
        alone: false,
        place: Place::default(),
        client: Client::default(),
    }
}

/// Queues one.
pub fn submit(queue: &Arc<Queue>, visit: Option<&Visit<'_>>, columns: usize) -> Result<Ticket, Refused> {
    let data = Data::Plain(vec![0; 4 * columns].into());
    let input = Tensor::new("x".into(), DType::Fp32, [1, columns].as_slice().into(), data).unwrap();
    queue.submit(vec![input], cost(columns), visit)
}
