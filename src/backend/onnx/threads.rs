//! `PoolThreads`: starts the threads of ONNX Runtime's pools from a thread of an executor's priority.
//!
//! On Linux a thread inherits the nice value of the thread that creates it. Models are loaded at low priority, so
//! pools that ONNX Runtime started by itself would stay at low priority for as long as the model serves.

use std::{
    io,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::{self, JoinHandle},
};

use ort::environment::ThreadManager;

use crate::{error::Error, priority};

/// Hands every pool thread to one long-lived thread to start. Cloning is cheap.
#[derive(Clone)]
pub struct PoolThreads {
    orders: Sender<Order>,
}

struct Order {
    work: Box<dyn FnOnce() + Send>,
    started: SyncSender<io::Result<JoinHandle<()>>>,
}

impl PoolThreads {
    /// Starts the spawner; pool threads are as patient as executors, and else inherit the caller's priority.
    ///
    /// The spawner ends with the last clone of the value.
    pub fn start() -> Result<Self, Error> {
        let (orders, receiver) = channel();
        thread::Builder::new()
            .name("ort-spawner".to_owned())
            .spawn(move || spawn_all(receiver))
            .map_err(|error| Error::internal(format!("cannot start thread ort-spawner: {error}")))?;
        Ok(Self { orders })
    }
}

impl ThreadManager for PoolThreads {
    type Thread = JoinHandle<()>;

    fn create(&self, work: impl FnOnce() + Send + 'static) -> ort::Result<JoinHandle<()>> {
        let (started, reply) = sync_channel(1);
        self.orders
            .send(Order { work: Box::new(work), started })
            .map_err(|_| ort::Error::new("thread ort-spawner has ended"))?;
        let thread = reply.recv().map_err(|_| ort::Error::new("thread ort-spawner has ended"))?;
        thread.map_err(|error| ort::Error::new(format!("cannot start thread ort-pool: {error}")))
    }

    fn join(thread: JoinHandle<()>) -> ort::Result<()> {
        thread.join().map_err(|_| ort::Error::new("thread ort-pool panicked"))
    }
}

fn spawn_all(orders: Receiver<Order>) {
    priority::be_patient();
    for Order { work, started } in orders {
        // Nobody waits for the answer only if the thread that asked has died; its pool thread then runs unjoined.
        let _ = started.send(thread::Builder::new().name("ort-pool".to_owned()).spawn(work));
    }
}
