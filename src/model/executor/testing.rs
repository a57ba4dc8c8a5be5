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

/// Queues a row of so many columns, by which it is told from those that cannot share its run.
pub fn submit(queue: &Arc<Queue>, visit: Option<&Visit<'_>>, columns: usize) -> Result<Ticket, Refused> {
    let data = Data::Plain(vec![0; 4 * columns].into());
    let input = Tensor::new("x".into(), DType::Fp32, [1, columns].as_slice().into(), data).unwrap();
    let shape = ShapeKey::from_slice(&[columns]);
    let cost = Cost {
        rows: 1,
        lengths: Lengths::NONE,
        follows: false,
        bytes: 4,
        shape,
        alone: false,
        place: Place::default(),
        client: Client::default(),
    };
    queue.submit(vec![input], cost, visit)
}
