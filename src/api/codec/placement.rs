//! Tensors that lie in shared memory: what a message says of where, with the elements themselves elsewhere.
//!
//! The codec reads and writes the words only; `api::shared_memory` moves the bytes.

use std::sync::Arc;

use bytes::Bytes;

use super::{Parameter, Parameters, binary};
use crate::{
    error::Error,
    id::shorten,
    tensor::{DType, Shape, Tensor, elements},
};

/// What the names of all parameters about shared memory begin with.
const PREFIX: &str = "shared_memory_";
pub(super) const REGION: &str = "shared_memory_region";
pub(super) const OFFSET: &str = "shared_memory_offset";
pub(super) const BYTE_SIZE: &str = "shared_memory_byte_size";

/// Where in a region of shared memory a tensor lies, or shall lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    pub region: String,
    /// Bytes from the start of the region.
    pub offset: u64,
    /// Bytes of an input; of an output, the most it may take.
    pub byte_size: u64,
}

/// An input but for its elements, which lie in shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedInput {
    pub name: Arc<str>,
    pub dtype: DType,
    pub shape: Shape,
    pub placement: Placement,
}

impl Placement {
    /// Reads the parameters of the tensor that messages call `label`; `None` when it travels in the message.
    pub(super) fn read(label: &str, parameters: &Parameters) -> Result<Option<Self>, Error> {
        let known = [REGION, OFFSET, BYTE_SIZE];
        let mut about = parameters.keys().map(String::as_str).filter(|name| name.starts_with(PREFIX)).peekable();
        if about.peek().is_none() {
            return Ok(None);
        }
        if let Some(strange) = about.find(|name| !known.contains(name)) {
            return Err(Error::invalid(format!(
                "{label}: parameter '{}' is unknown; there are {}",
                shorten(strange),
                known.join(", ")
            )));
        }
        let must_be = |name: &str, what: &str| Error::invalid(format!("{label}: parameter '{name}' must be {what}"));
        let region = match parameters.get(REGION) {
            Some(Parameter::String(region)) if !region.is_empty() => region.clone(),
            _ => return Err(must_be(REGION, "the name of a registered region")),
        };
        let number =
            |value: &Parameter, name| value.as_unsigned().ok_or_else(|| must_be(name, "a whole number of bytes"));
        let byte_size = parameters.get(BYTE_SIZE).ok_or_else(|| must_be(BYTE_SIZE, "given with the region"))?;
        Ok(Some(Self {
            region,
            offset: parameters.get(OFFSET).map_or(Ok(0), |value| number(value, OFFSET))?,
            byte_size: number(byte_size, BYTE_SIZE)?,
        }))
    }
}

impl PlacedInput {
    /// What messages call it.
    pub fn label(&self) -> String {
        format!("input '{}'", shorten(&self.name))
    }

    /// Compares the declared size with what type and shape take, before a byte is read; `BYTES` elements tell their
    /// own lengths.
    ///
    /// # Errors
    /// `InvalidArgument` naming the input and both sizes.
    pub fn check_size(&self) -> Result<(), Error> {
        let Some(size) = self.dtype.size() else { return Ok(()) };
        let takes = elements(&self.shape).and_then(|count| count.checked_mul(size));
        match takes {
            Some(takes) if takes as u64 == self.placement.byte_size => Ok(()),
            _ => Err(Error::invalid(format!(
                "{}: shape {:?} of {} takes {} bytes, and '{BYTE_SIZE}' is {}",
                self.label(),
                self.shape,
                self.dtype,
                takes.map_or("too many".to_owned(), |takes| takes.to_string()),
                self.placement.byte_size
            ))),
        }
    }

    /// The tensor with the elements that were found at its place.
    ///
    /// # Errors
    /// `InvalidArgument` when they are not what type and shape promise.
    pub fn filled(self, bytes: Bytes) -> Result<Tensor, Error> {
        let data = binary::read(&self.label(), self.dtype, &self.shape, bytes)?;
        Tensor::new(self.name, self.dtype, self.shape, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(parameters: &[(&str, Parameter)]) -> Result<Option<Placement>, Error> {
        let parameters = parameters.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        Placement::read("input 'x'", &parameters)
    }

    #[test]
    fn a_place_needs_a_region_and_a_size() {
        let region = |name: &str| (REGION, Parameter::String(name.to_owned()));
        let size = (BYTE_SIZE, Parameter::Int(8));
        assert_eq!(read(&[("other", Parameter::Bool(true))]), Ok(None));
        let expected = Placement { region: "r".to_owned(), offset: 0, byte_size: 8 };
        assert_eq!(read(&[region("r"), size.clone()]), Ok(Some(expected.clone())));
        let offset = (OFFSET, Parameter::Uint(u64::MAX));
        assert_eq!(read(&[region("r"), size.clone(), offset]), Ok(Some(Placement { offset: u64::MAX, ..expected })));
        for (parameters, named) in [
            (&[region("r")][..], BYTE_SIZE),
            (std::slice::from_ref(&size), REGION),
            (&[region(""), size.clone()], REGION),
            (&[(REGION, Parameter::Int(1)), size.clone()], REGION),
            (&[region("r"), (BYTE_SIZE, Parameter::Int(-8))], BYTE_SIZE),
            (&[region("r"), (BYTE_SIZE, Parameter::Float(8.0))], BYTE_SIZE),
            (&[region("r"), size.clone(), (OFFSET, Parameter::String("0".to_owned()))], OFFSET),
            (&[region("r"), size.clone(), ("shared_memory_ofset", Parameter::Int(0))], "'shared_memory_ofset'"),
        ] {
            let message = read(parameters).unwrap_err().message;
            assert!(message.starts_with("input 'x'") && message.contains(named), "{message}");
        }
    }

    #[test]
    fn the_size_follows_from_type_and_shape() {
        let input = |dtype, shape: &[usize], byte_size| PlacedInput {
            name: "x".into(),
            dtype,
            shape: shape.into(),
            placement: Placement { region: "r".to_owned(), offset: 0, byte_size },
        };
        assert_eq!(input(DType::Fp32, &[2, 3], 24).check_size(), Ok(()));
        assert_eq!(input(DType::Fp32, &[0, usize::MAX], 0).check_size(), Ok(()));
        assert_eq!(input(DType::Bytes, &[2], 1000).check_size(), Ok(()));
        let message = input(DType::Fp32, &[2, 3], 28).check_size().unwrap_err().message;
        assert_eq!(message, "input 'x': shape [2, 3] of FP32 takes 24 bytes, and 'shared_memory_byte_size' is 28");
        let message = input(DType::Fp64, &[usize::MAX, 2], 8).check_size().unwrap_err().message;
        assert!(message.contains("too many"), "{message}");
        let filled = input(DType::Bytes, &[1], 6).filled(Bytes::from_static(b"\x02\0\0\0ab")).unwrap();
        assert_eq!(binary::write(&filled.data), "\x02\0\0\0ab");
        assert!(input(DType::Bytes, &[2], 6).filled(Bytes::from_static(b"\x02\0\0\0ab")).is_err());
    }
}
