//! `Reach`: what one caller may do with regions, and the two moments of a request at which their bytes move.

use std::sync::Arc;

use http::HeaderMap;

use super::{Regions, region::Window};
use crate::{
    api::{
        App,
        auth::Peer,
        codec::{InferCall, Placement, write_binary},
    },
    error::{Code, Error},
    id::shorten,
    tensor::Tensor,
};

/// What of shared memory a caller may use.
pub enum Reach {
    /// Nothing: the extension is not enabled.
    Off,
    /// Nothing, for the reason given.
    Refused(Error),
    Open(Arc<Regions>),
}

/// Where the outputs of a request are to be written.
#[derive(Default)]
pub struct Places(Vec<(Arc<str>, Window)>);

impl Reach {
    /// What the caller with these headers, at this end of the connection, may use.
    pub fn of(app: &App, headers: &HeaderMap, peer: Option<&Peer>) -> Self {
        let Some(regions) = &app.shared_memory else { return Reach::Off };
        match app.check_admin(headers, peer) {
            Ok(()) => Reach::Open(regions.clone()),
            Err(error) => Reach::Refused(error),
        }
    }

    /// The regions, for calls that are about them.
    ///
    /// # Errors
    /// `Unimplemented` when there are none, else what `auth::check_admin` says.
    pub(super) fn regions(&self) -> Result<&Regions, Error> {
        match self {
            Reach::Off => Err(Error::new(
                Code::Unimplemented,
                "shared memory is not supported unless shared_memory.enabled is set; send tensors in the request",
            )),
            Reach::Refused(error) => {
                let message = format!("shared memory is for those who may change the server: {}", error.message);
                Err(Error { message, ..error.clone() })
            }
            Reach::Open(regions) => Ok(regions),
        }
    }

    /// Fetches the inputs that lie in shared memory, up to `limit` bytes, and finds the places of the outputs that are
    /// to go there.
    ///
    /// # Errors
    /// `Unimplemented`, `Unauthenticated` or `Forbidden` when the caller may use no shared memory, `NotFound` and
    /// `InvalidArgument` naming the tensor and the region, `TooLarge` for more than `limit`.
    pub fn fetch(&self, call: &mut InferCall, limit: usize) -> Result<Places, Error> {
        let mut left = limit;
        for input in std::mem::take(&mut call.placed) {
            let of_input = |error: Error| about(&input.name, "input", error);
            input.check_size()?;
            let window = self.window(&input.placement).map_err(of_input)?;
            left = left.checked_sub(window.byte_size).ok_or_else(|| of_input(too_large(limit)))?;
            let bytes = window.read().map_err(of_input)?;
            call.inputs.push(input.filled(bytes)?);
        }
        let wanted = call.outputs.iter().filter_map(|output| Some((&output.name, output.placement.as_ref()?)));
        let places = wanted.map(|(name, placement)| {
            let window = self.window(placement).map_err(|error| about(name, "output", error))?;
            Ok((name.clone(), window))
        });
        places.collect::<Result<_, Error>>().map(Places)
    }

    fn window(&self, placement: &Placement) -> Result<Window, Error> {
        self.regions()?.find(&placement.region)?.window(placement)
    }
}

impl Places {
    /// Writes the outputs that belong there, once all are known to fit.
    ///
    /// # Errors
    /// `InvalidArgument` naming the output and the bytes it takes.
    pub fn fill(&self, outputs: &[Tensor]) -> Result<(), Error> {
        let mut writes = Vec::with_capacity(self.0.len());
        for (name, window) in &self.0 {
            let Some(output) = outputs.iter().find(|output| output.name == *name) else {
                return Err(about(name, "output", Error::internal("the model gave no such output")));
            };
            let bytes = write_binary(&output.data);
            window.check_room(bytes.len()).map_err(|error| about(name, "output", error))?;
            writes.push((name, window, bytes));
        }
        writes
            .into_iter()
            .try_for_each(|(name, window, bytes)| window.write(&bytes).map_err(|error| about(name, "output", error)))
    }
}

/// The error with the tensor named in front.
fn about(name: &str, kind: &str, error: Error) -> Error {
    Error { message: format!("{kind} '{}': {}", shorten(name), error.message), ..error }
}

fn too_large(limit: usize) -> Error {
    let message = format!("the inputs in shared memory take more than the {limit} bytes of limits.max_message_bytes");
    Error::new(Code::TooLarge, message)
}
