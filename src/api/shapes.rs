//! Other servers' request shapes, converted to the same tensors as the Open Inference Protocol's and back.
//!
//! All of this is pure: bodies and signatures in, calls out; outputs in, JSON out. Numbers are read as the type that
//! the model declares, and floats of 16 bits are numbers here too. Whether names, types and shapes fit the model is
//! checked where it is for every request, in `backend::Signature`.

use std::collections::HashSet;

use super::codec::Json;
use crate::{
    backend::{Signature, TensorSpec},
    error::Error,
    id::shorten,
};

mod csv;
pub mod generate;
pub mod invocations;
pub mod openai;
pub mod predict;
mod table;
pub mod tei;
#[cfg(test)]
mod tests;
pub mod texts;

/// More members than any request has in an object, and more columns than any table; each takes many times its text in
/// memory.
const MAX_NAMES: usize = 16_384;

/// The members `names` of an object that is called `place`; `None` for those that are absent or null. Others are
/// passed over.
fn members<'a, const N: usize>(
    place: &str,
    value: Json<'a>,
    names: [&'static str; N],
) -> Result<[Option<Json<'a>>; N], Error> {
    let members =
        value.members().ok_or_else(|| Error::invalid(format!("{place} must be an object, got {}", value.shown())))?;
    let mut found = [None; N];
    let mut seen = HashSet::with_capacity(N);
    for member in members {
        let (name, value) = member?;
        let Some(index) = names.iter().position(|known| *known == name) else { continue };
        if !seen.insert(index) {
            return Err(Error::invalid(format!("{place} has '{}' twice", names[index])));
        }
        found[index] = Some(value).filter(|value| !value.is_null());
    }
    Ok(found)
}

/// The position of the input `name`, which `place` speaks of.
fn input_index(signature: &Signature, name: &str, place: impl std::fmt::Display) -> Result<usize, Error> {
    signature.inputs.iter().position(|spec| *spec.name == *name).ok_or_else(|| {
        Error::invalid(format!(
            "{place} names '{}', which is no input; the inputs are {}",
            shorten(name),
            listed(signature.inputs.iter())
        ))
    })
}

fn listed<'a>(specs: impl Iterator<Item = &'a TensorSpec>) -> String {
    specs.map(|spec| format!("'{}'", spec.name)).collect::<Vec<_>>().join(", ")
}
