//! gRPC messages: the same call in the compiler's types.
//!
//! Raw contents are slices of the received message. Typed contents are packed into the same layout, so that nothing
//! behind the codec knows which of the two a client chose.

use std::{collections::HashMap, fmt::Display};

use bytes::Bytes;

use super::{
    InferCall, InferReply, Parameter, Parameters, RequestedOutput, binary, declared,
    placement::{BYTE_SIZE, OFFSET, PlacedInput, Placement, REGION},
};
use crate::{
    api::pb::{
        InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, infer_parameter::ParameterChoice,
        model_infer_request::InferInputTensor, model_infer_response::InferOutputTensor,
    },
    error::Error,
    id::shorten,
    tensor::{DType, Data, Tensor, elements},
};

/// Reads a request, its model and version aside.
///
/// # Errors
/// `InvalidArgument` naming the input or the parameter, `Unimplemented` for features that are not here.
pub fn decode_proto(request: ModelInferRequest) -> Result<InferCall, Error> {
    let raw = request.raw_input_contents;
    // Inputs in shared memory have no entry among the raw contents, so they are set apart before these are counted.
    let mut placed = Vec::new();
    let mut sent = Vec::with_capacity(request.inputs.len());
    for mut tensor in request.inputs {
        let label = format!("input '{}'", shorten(&tensor.name));
        let parameters = parameters(&label, std::mem::take(&mut tensor.parameters))?;
        match Placement::read(&label, &parameters)? {
            None => sent.push((label, tensor)),
            Some(placement) => placed.push(placed_input(&label, tensor, placement)?),
        }
    }
    if !raw.is_empty() && raw.len() != sent.len() {
        return Err(Error::invalid(format!(
            "raw_input_contents must have one entry for each of the {} inputs{}, got {}",
            sent.len(),
            if placed.is_empty() { "" } else { " outside shared memory" },
            raw.len()
        )));
    }
    let mut raw = raw.into_iter();
    let inputs = sent.into_iter().map(|(label, tensor)| input(&label, tensor, raw.next())).collect::<Result<_, _>>()?;
    let outputs = request
        .outputs
        .into_iter()
        .map(|output| {
            let sent = parameters(&format!("output '{}'", shorten(&output.name)), output.parameters)?;
            Ok((output.name.into(), sent))
        })
        .collect::<Result<_, Error>>()?;
    let call = InferCall::new(request.id, parameters("the request", request.parameters)?, inputs, outputs)?;
    Ok(InferCall { placed, ..call })
}

/// Writes a reply; outputs are always raw, one entry for each, which is empty for one that `requested` has written to
/// shared memory.
pub fn encode_proto(reply: &InferReply<'_>, requested: &[RequestedOutput]) -> ModelInferResponse {
    let placement = |tensor: &Tensor| {
        requested.iter().find(|requested| requested.name == tensor.name).and_then(|found| found.placement.as_ref())
    };
    let raw = |tensor: &Tensor| match placement(tensor) {
        None => binary::write(&tensor.data),
        Some(_) => Bytes::new(),
    };
    let output = |tensor: &Tensor| InferOutputTensor {
        parameters: placement(tensor).map(|placement| told(placement, &tensor.data)).unwrap_or_default(),
        name: tensor.name.to_string(),
        datatype: tensor.dtype.name().to_owned(),
        // A tensor in memory has no dimension beyond i64, unless it is empty.
        shape: tensor.shape.iter().map(|&size| i64::try_from(size).unwrap_or(i64::MAX)).collect(),
        ..InferOutputTensor::default()
    };
    ModelInferResponse {
        model_name: reply.model.to_owned(),
        model_version: reply.version.to_owned(),
        id: reply.id.to_owned(),
        outputs: reply.outputs.iter().map(output).collect(),
        raw_output_contents: reply.outputs.iter().map(raw).collect(),
        ..ModelInferResponse::default()
    }
}

/// Where an output was written, and how many bytes of it.
fn told(placement: &Placement, data: &Data) -> HashMap<String, InferParameter> {
    let number = |number| ParameterChoice::Int64Param(i64::try_from(number).unwrap_or(i64::MAX));
    [
        (REGION, ParameterChoice::StringParam(placement.region.clone())),
        (OFFSET, number(placement.offset)),
        (BYTE_SIZE, number(binary::length(data) as u64)),
    ]
    .map(|(name, choice)| (name.to_owned(), InferParameter { parameter_choice: Some(choice) }))
    .into()
}

fn placed_input(label: &str, tensor: InferInputTensor, placement: Placement) -> Result<PlacedInput, Error> {
    let (dtype, shape) = declared(label, &tensor.datatype, &tensor.shape)?;
    if tensor.contents.is_some_and(|contents| lengths(&contents).iter().any(|&(_, length)| length > 0)) {
        return Err(Error::invalid(format!("{label} lies in shared memory and must not be sent as well")));
    }
    Ok(PlacedInput { name: tensor.name.into(), dtype, shape, placement })
}

fn input(label: &str, tensor: InferInputTensor, raw: Option<Bytes>) -> Result<Tensor, Error> {
    let (dtype, shape) = declared(label, &tensor.datatype, &tensor.shape)?;
    // A message without a single element says as much as no message.
    let contents = tensor.contents.filter(|contents| lengths(contents).iter().any(|&(_, length)| length > 0));
    let data = match (raw, contents) {
        (Some(_), Some(_)) => {
            return Err(Error::invalid(format!(
                "{label}: contents must not be given together with raw_input_contents in one request"
            )));
        }
        (Some(raw), None) => binary::read(label, dtype, &shape, raw)?,
        (None, Some(contents)) => typed(label, dtype, contents)?,
        (None, None) if elements(&shape) == Some(0) => typed(label, dtype, InferTensorContents::default())?,
        (None, None) => {
            return Err(Error::invalid(format!("{label} has neither contents nor an entry in raw_input_contents")));
        }
    };
    Tensor::new(tensor.name.into(), dtype, shape, data)
}

fn lengths(contents: &InferTensorContents) -> [(&'static str, usize); 8] {
    [
        ("bool_contents", contents.bool_contents.len()),
        ("int_contents", contents.int_contents.len()),
        ("int64_contents", contents.int64_contents.len()),
        ("uint_contents", contents.uint_contents.len()),
        ("uint64_contents", contents.uint64_contents.len()),
        ("fp32_contents", contents.fp32_contents.len()),
        ("fp64_contents", contents.fp64_contents.len()),
        ("bytes_contents", contents.bytes_contents.len()),
    ]
}

/// The one field that may carry a type; `None` for types that travel raw only.
fn field(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::Bool => Some("bool_contents"),
        DType::Int8 | DType::Int16 | DType::Int32 => Some("int_contents"),
        DType::Int64 => Some("int64_contents"),
        DType::Uint8 | DType::Uint16 | DType::Uint32 => Some("uint_contents"),
        DType::Uint64 => Some("uint64_contents"),
        DType::Fp32 => Some("fp32_contents"),
        DType::Fp64 => Some("fp64_contents"),
        DType::Bytes => Some("bytes_contents"),
        DType::Fp16 | DType::Bf16 => None,
    }
}

fn typed(label: &str, dtype: DType, contents: InferTensorContents) -> Result<Data, Error> {
    let stray = lengths(&contents).into_iter().find(|&(name, length)| length > 0 && Some(name) != field(dtype));
    match (field(dtype), stray) {
        (None, Some(_)) => {
            return Err(Error::invalid(format!("{label}: {dtype} must be sent in raw_input_contents")));
        }
        (Some(wanted), Some((given, _))) => {
            return Err(Error::invalid(format!("{label}: {dtype} must be sent in {wanted}, not in {given}")));
        }
        (_, None) => {}
    }
    let (int, uint) = (&contents.int_contents, &contents.uint_contents);
    let packed = match dtype {
        DType::Bool => pack(label, dtype, &contents.bool_contents, |value| Some([value.into()])),
        DType::Int8 => pack(label, dtype, int, |value| Some(i8::try_from(value).ok()?.to_le_bytes())),
        DType::Int16 => pack(label, dtype, int, |value| Some(i16::try_from(value).ok()?.to_le_bytes())),
        DType::Int32 => pack(label, dtype, int, |value| Some(value.to_le_bytes())),
        DType::Int64 => pack(label, dtype, &contents.int64_contents, |value| Some(value.to_le_bytes())),
        DType::Uint8 => pack(label, dtype, uint, |value| Some(u8::try_from(value).ok()?.to_le_bytes())),
        DType::Uint16 => pack(label, dtype, uint, |value| Some(u16::try_from(value).ok()?.to_le_bytes())),
        DType::Uint32 => pack(label, dtype, uint, |value| Some(value.to_le_bytes())),
        DType::Uint64 => pack(label, dtype, &contents.uint64_contents, |value| Some(value.to_le_bytes())),
        DType::Fp32 => pack(label, dtype, &contents.fp32_contents, |value| Some(value.to_le_bytes())),
        DType::Fp64 => pack(label, dtype, &contents.fp64_contents, |value| Some(value.to_le_bytes())),
        DType::Fp16 | DType::Bf16 => Ok(Bytes::new()),
        DType::Bytes => return Ok(Data::Strings(contents.bytes_contents)),
    };
    packed.map(Data::Plain)
}

fn pack<T: Copy + Display, const N: usize>(
    label: &str,
    dtype: DType,
    values: &[T],
    bytes: impl Fn(T) -> Option<[u8; N]>,
) -> Result<Bytes, Error> {
    let mut out = Vec::with_capacity(values.len() * N);
    for (index, &value) in values.iter().enumerate() {
        let packed = bytes(value)
            .ok_or_else(|| Error::invalid(format!("{label}: element {index} is {value}, out of range for {dtype}")))?;
        out.extend_from_slice(&packed);
    }
    Ok(out.into())
}

fn parameters(label: &str, sent: impl IntoIterator<Item = (String, InferParameter)>) -> Result<Parameters, Error> {
    sent.into_iter()
        .map(|(name, parameter)| {
            let value = match parameter.parameter_choice {
                Some(ParameterChoice::BoolParam(value)) => Parameter::Bool(value),
                Some(ParameterChoice::Int64Param(value)) => Parameter::Int(value),
                Some(ParameterChoice::Uint64Param(value)) => Parameter::Uint(value),
                Some(ParameterChoice::DoubleParam(value)) => Parameter::Float(value),
                Some(ParameterChoice::StringParam(value)) => Parameter::String(value),
                None => {
                    return Err(Error::invalid(format!("{label}: parameter '{}' has no value", shorten(&name))));
                }
            };
            Ok((name, value))
        })
        .collect()
}
