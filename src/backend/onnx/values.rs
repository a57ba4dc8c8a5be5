//! Tensors as ONNX Runtime's values, and back.
//!
//! Inputs lend their own bytes whenever these are aligned for their type; outputs are copied once.

use std::fmt::Debug;

use bytemuck::{NoUninit, Pod};
use bytes::Bytes;
use half::{bf16, f16};
use ort::{
    session::SessionInputValue,
    value::{DynValue, PrimitiveTensorElementType, Shape, TensorElementType, TensorRef},
};

use crate::{
    backend::TensorSpec,
    error::Error,
    tensor::{DType, Data, Tensor},
};

/// The protocol's name for an element type; `None` for those it does not have.
pub fn dtype(element: TensorElementType) -> Option<DType> {
    Some(match element {
        TensorElementType::Bool => DType::Bool,
        TensorElementType::Uint8 => DType::Uint8,
        TensorElementType::Uint16 => DType::Uint16,
        TensorElementType::Uint32 => DType::Uint32,
        TensorElementType::Uint64 => DType::Uint64,
        TensorElementType::Int8 => DType::Int8,
        TensorElementType::Int16 => DType::Int16,
        TensorElementType::Int32 => DType::Int32,
        TensorElementType::Int64 => DType::Int64,
        TensorElementType::Float16 => DType::Fp16,
        TensorElementType::Bfloat16 => DType::Bf16,
        TensorElementType::Float32 => DType::Fp32,
        TensorElementType::Float64 => DType::Fp64,
        TensorElementType::String => DType::Bytes,
        _ => return None,
    })
}

/// # Errors
/// `InvalidArgument` naming the input when ONNX Runtime cannot take its shape or its strings.
pub fn to_value(tensor: &Tensor) -> Result<SessionInputValue<'_>, Error> {
    let bytes = match &tensor.data {
        Data::Plain(bytes) => bytes,
        Data::Strings(strings) => return text(tensor, strings),
    };
    match tensor.dtype {
        DType::Bool => flags(tensor, bytes),
        DType::Uint8 => plain::<u8>(tensor, bytes),
        DType::Uint16 => plain::<u16>(tensor, bytes),
        DType::Uint32 => plain::<u32>(tensor, bytes),
        DType::Uint64 => plain::<u64>(tensor, bytes),
        DType::Int8 => plain::<i8>(tensor, bytes),
        DType::Int16 => plain::<i16>(tensor, bytes),
        DType::Int32 => plain::<i32>(tensor, bytes),
        DType::Int64 => plain::<i64>(tensor, bytes),
        DType::Fp16 => plain::<f16>(tensor, bytes),
        DType::Bf16 => plain::<bf16>(tensor, bytes),
        DType::Fp32 => plain::<f32>(tensor, bytes),
        DType::Fp64 => plain::<f64>(tensor, bytes),
        DType::Bytes => Err(Error::internal(format!("input '{}': BYTES without strings", tensor.name))),
    }
}

/// # Errors
/// `Internal` naming the output when it is not what the graph declared.
pub fn from_value(spec: &TensorSpec, value: &DynValue) -> Result<Tensor, Error> {
    match spec.dtype {
        DType::Bool => copy::<bool>(spec, value),
        DType::Uint8 => copy::<u8>(spec, value),
        DType::Uint16 => copy::<u16>(spec, value),
        DType::Uint32 => copy::<u32>(spec, value),
        DType::Uint64 => copy::<u64>(spec, value),
        DType::Int8 => copy::<i8>(spec, value),
        DType::Int16 => copy::<i16>(spec, value),
        DType::Int32 => copy::<i32>(spec, value),
        DType::Int64 => copy::<i64>(spec, value),
        DType::Fp16 => copy::<f16>(spec, value),
        DType::Bf16 => copy::<bf16>(spec, value),
        DType::Fp32 => copy::<f32>(spec, value),
        DType::Fp64 => copy::<f64>(spec, value),
        DType::Bytes => {
            let (shape, strings) = value.try_extract_strings().map_err(|error| bad_output(spec, &error))?;
            let strings = strings.into_iter().map(Bytes::from).collect();
            output(spec, shape, Data::Strings(strings))
        }
    }
}

fn plain<'a, T>(tensor: &'a Tensor, bytes: &'a [u8]) -> Result<SessionInputValue<'a>, Error>
where
    T: PrimitiveTensorElementType + Pod + Debug,
{
    let shape = shape(tensor)?;
    let value = match bytemuck::try_cast_slice::<u8, T>(bytes) {
        Ok(elements) => TensorRef::from_array_view((shape, elements)).map(SessionInputValue::from),
        // Not aligned for T, which depends on where in the request's buffer the bytes lie.
        Err(_) => {
            let mut elements = vec![T::zeroed(); bytes.len() / size_of::<T>()];
            bytemuck::cast_slice_mut::<T, u8>(&mut elements).copy_from_slice(bytes);
            ort::value::Tensor::from_array((shape, elements)).map(SessionInputValue::from)
        }
    };
    value.map_err(|error| bad_input(tensor, &error))
}

fn flags<'a>(tensor: &'a Tensor, bytes: &'a [u8]) -> Result<SessionInputValue<'a>, Error> {
    let elements = bytemuck::checked::try_cast_slice::<u8, bool>(bytes)
        .map_err(|_| Error::invalid(format!("input '{}': BOOL elements must be 0 or 1", tensor.name)))?;
    TensorRef::from_array_view((shape(tensor)?, elements))
        .map(SessionInputValue::from)
        .map_err(|error| bad_input(tensor, &error))
}

/// ONNX strings end at the first NUL and reach operators as UTF-8, so other bytes cannot be passed on faithfully.
fn text(tensor: &Tensor, strings: &[Bytes]) -> Result<SessionInputValue<'static>, Error> {
    let name = &tensor.name;
    let strings = strings
        .iter()
        .enumerate()
        .map(|(index, string)| match std::str::from_utf8(string) {
            Ok(text) if text.contains('\0') => {
                Err(Error::invalid(format!("input '{name}': element {index} contains a NUL byte")))
            }
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(Error::invalid(format!("input '{name}': element {index} is not UTF-8"))),
        })
        .collect::<Result<Vec<String>, Error>>()?;
    ort::value::Tensor::from_string_array((shape(tensor)?, strings.as_slice()))
        .map(SessionInputValue::from)
        .map_err(|error| bad_input(tensor, &error))
}

/// The shape as ONNX Runtime counts it. Even an empty tensor's other dimensions are multiplied there, so these may not
/// overflow.
fn shape(tensor: &Tensor) -> Result<Shape, Error> {
    let dims = tensor.shape.iter().map(|&dim| i64::try_from(dim).ok());
    let dims: Option<Shape> = dims.collect::<Option<Vec<i64>>>().map(Shape::from);
    dims.filter(|dims| dims.iter().try_fold(1i64, |product, &dim| product.checked_mul(dim)).is_some()).ok_or_else(
        || {
            Error::invalid(format!(
                "input '{}': the dimensions of shape {:?} are too large",
                tensor.name,
                &tensor.shape[..]
            ))
        },
    )
}

fn copy<T>(spec: &TensorSpec, value: &DynValue) -> Result<Tensor, Error>
where
    T: PrimitiveTensorElementType + NoUninit,
{
    let (shape, elements) = value.try_extract_tensor::<T>().map_err(|error| bad_output(spec, &error))?;
    output(spec, shape, Data::Plain(Bytes::copy_from_slice(bytemuck::cast_slice(elements))))
}

fn output(spec: &TensorSpec, shape: &Shape, data: Data) -> Result<Tensor, Error> {
    let shape = shape.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect();
    Tensor::new(spec.name.clone(), spec.dtype, shape, data)
        .map_err(|error| Error::internal(format!("output {}", error.message)))
}

fn bad_input(tensor: &Tensor, error: &ort::Error) -> Error {
    Error::invalid(format!("input '{}': {error}", tensor.name))
}

fn bad_output(spec: &TensorSpec, error: &ort::Error) -> Error {
    Error::internal(format!("output '{}': {error}", spec.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Options, Session, onnx::testing};

    fn identity(dtype: DType, shape: &[i64]) -> Box<dyn Session> {
        let directory = testing::directory(testing::identity(dtype, shape));
        testing::runtime().load(&directory.path().join("model.onnx"), &Options::default(), 1).unwrap().remove(0)
    }

    fn tensor(dtype: DType, shape: &[usize], data: Data) -> Tensor {
        Tensor::new("x".into(), dtype, shape.into(), data).unwrap()
    }

    /// `count` elements with every bit pattern that the type allows, signalling NaNs and negative zeros included.
    fn elements(dtype: DType, count: usize) -> Data {
        match dtype.size() {
            None => Data::Strings((0..count).map(|i| Bytes::from(["", "é", "a b"][i % 3].repeat(i))).collect()),
            Some(_) if dtype == DType::Bool => Data::Plain((0..count).map(|i| (i % 3 == 0) as u8).collect()),
            Some(size) => Data::Plain((0..count * size).map(|i| (i * 151 + 129) as u8).collect()),
        }
    }

    #[test]
    fn every_type_and_shape_passes_through_bit_by_bit() {
        for dtype in DType::ALL {
            for (declared, shape) in [
                (&[-1, 3][..], &[5, 3][..]),
                (&[-1, 3], &[0, 3]),
                (&[-1, -1, -1], &[2, 0, 7]),
                (&[], &[]),
                (&[1], &[1]),
            ] {
                let mut session = identity(dtype, declared);
                assert_eq!(session.signature().inputs[0].shape, declared);
                assert_eq!(session.signature().outputs[0].dtype, dtype);
                let input = tensor(dtype, shape, elements(dtype, shape.iter().product()));
                let output = session.run(std::slice::from_ref(&input)).unwrap().remove(0);
                assert_eq!(output, Tensor { name: "y".into(), ..input });
            }
        }
    }

    #[test]
    fn bytes_need_not_be_aligned() {
        for dtype in DType::ALL {
            let (Some(size), Data::Plain(bytes)) = (dtype.size(), elements(dtype, 16)) else { continue };
            let mut session = identity(dtype, &[-1]);
            for shift in 0..=size {
                let shifted = Bytes::from([&vec![0; shift], &*bytes].concat()).slice(shift..);
                let input = tensor(dtype, &[16], Data::Plain(shifted));
                let output = session.run(&[input]).unwrap().remove(0);
                assert_eq!(output.data, Data::Plain(bytes.clone()), "{dtype} at {shift}");
            }
        }
    }

    #[test]
    fn aligned_bytes_are_lent() {
        let buffer = Bytes::from(vec![0u8; 64]);
        let start = buffer.as_ptr().align_offset(8);
        let input = tensor(DType::Fp64, &[2], Data::Plain(buffer.slice(start..start + 16)));
        let value = to_value(&input).unwrap();
        let (_, elements) = value.try_extract_tensor::<f64>().unwrap();
        assert_eq!(elements.as_ptr().cast::<u8>(), buffer[start..].as_ptr());
    }

    #[test]
    fn strings_that_onnx_cannot_hold_are_refused() {
        let mut session = identity(DType::Bytes, &[-1]);
        let mut message = |strings: &[&'static [u8]]| {
            let strings: Vec<_> = strings.iter().map(|string| Bytes::from_static(string)).collect();
            let error = session.run(&[tensor(DType::Bytes, &[strings.len()], Data::Strings(strings))]).unwrap_err();
            assert_eq!(error.code, crate::error::Code::InvalidArgument);
            error.message
        };
        assert_eq!(message(&[b"a", b"b", b"c", b"\xff"]), "input 'x': element 3 is not UTF-8");
        assert_eq!(message(&[b"a", b"b\0c"]), "input 'x': element 1 contains a NUL byte");
    }

    #[test]
    fn empty_tensors_of_absurd_shapes_are_refused() {
        let mut session = identity(DType::Fp32, &[-1, -1, -1]);
        for shape in [[usize::MAX, 0, 1], [1 << 40, 1 << 40, 0], [0, 1 << 40, 1 << 40]] {
            let result = session.run(&[tensor(DType::Fp32, &shape, Data::Plain(Bytes::new()))]);
            match result {
                // Dimensions after a zero are never multiplied beyond it.
                Ok(outputs) => assert_eq!(&outputs[0].shape[..], shape),
                Err(error) => assert!(error.message.contains("are too large"), "{error}"),
            }
        }
    }
}
