//! GPUs: opening one, or the reason why it cannot be had, and `Turns` of the instances on it.

use std::{fs, panic};

use candle_core::{Device, Result};
use parking_lot::Mutex;

use super::tidy;
use crate::error::Error;

/// Has one instance run at a time.
///
/// candle gives each thread a queue of its own on the GPU, and those do not wait for one another; but instances share
/// weights, and the memory that multiplication needs.
pub struct Turns {
    device: Device,
    turn: Mutex<()>,
}

impl Turns {
    /// Call it from the thread that has loaded the weights: all other threads will find them there.
    ///
    /// # Errors
    /// `Internal` when they do not arrive.
    pub fn new(device: &Device) -> std::result::Result<Self, Error> {
        let unready = |error| Error::internal(format!("cannot load weights onto the GPU: {}", tidy(&error)));
        device.synchronize().map_err(unready)?;
        Ok(Self { device: device.clone(), turn: Mutex::new(()) })
    }

    /// `work` must end with copying its result from the GPU: with that, all before it is done.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn take<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let _turn = self.turn.lock();
        let result = work();
        if result.is_err() {
            // What was begun may still run; its failure is one that the next run meets again.
            let _ = self.device.synchronize();
        }
        result
    }
}

/// The GPU of that index.
///
/// # Errors
/// The reason, of the driver or of candle.
pub fn open(index: u32) -> std::result::Result<Device, String> {
    if !has_driver() {
        return Err("there is no NVIDIA driver here".to_owned());
    }
    attempt(index)
}

/// Whether the kernel has devices of NVIDIA's, by any of the names that they have: for cards, for boards that are all
/// of NVIDIA's, and for Linux inside of Windows.
fn has_driver() -> bool {
    let is_device = |name: &str| ["nvidia", "nvhost", "nvgpu", "dxg"].iter().any(|start| name.starts_with(start));
    let mut entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    entries.any(|entry| entry.file_name().to_str().is_some_and(is_device))
}

/// What is between candle and the driver panics where one of NVIDIA's libraries is missing.
fn attempt(index: u32) -> std::result::Result<Device, String> {
    match panic::catch_unwind(|| Device::new_cuda(index as usize)) {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => Err(tidy(&error)),
        Err(said) => Err(missing(said.downcast_ref::<String>().map_or("", String::as_str))),
    }
}

/// A panic's words about a library, without the twenty names that it was looked for by.
fn missing(said: &str) -> String {
    let library = said.split('"').nth(1).filter(|_| said.contains("dynamically load"));
    match library {
        Some(library) => {
            format!("NVIDIA's library lib{library} is not here, or not on the path that LD_LIBRARY_PATH is")
        }
        None => format!("opening it panicked: {said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_reasons() {
        let said = "Unable to dynamically load the \"cublas\" shared library - searched for library names: [\"libcublas.so\"].";
        assert!(missing(said).starts_with("NVIDIA's library libcublas is not here"));
        assert_eq!(missing("at the wrong moment"), "opening it panicked: at the wrong moment");
    }

    /// As where there is a driver and one of the libraries is not.
    #[test]
    fn what_is_not_here_is_an_error() {
        if has_driver() {
            return;
        }
        let reason = attempt(0).unwrap_err();
        let expected = if cfg!(feature = "cuda") { "NVIDIA's library libcuda is not here" } else { "cuda" };
        assert!(reason.contains(expected), "{reason}");
    }
}
