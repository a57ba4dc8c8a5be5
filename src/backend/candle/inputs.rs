//! Requests as batches: everything that could fail inside an operator is refused before.

use super::{bodies::Batch, config::Architecture};
use crate::{
    error::Error,
    tensor::{DType, Data, Tensor},
};

pub const IDS: &str = "input_ids";
pub const MASK: &str = "attention_mask";
pub const TYPES: &str = "token_type_ids";

/// # Errors
/// `InvalidArgument` naming the input, the place and what is expected there.
pub fn read(inputs: &[Tensor], architecture: &Architecture) -> Result<Batch, Error> {
    let find = |name: &str| inputs.iter().find(|input| &*input.name == name);
    let ids = find(IDS).ok_or_else(|| Error::invalid(format!("input '{IDS}' is missing")))?;
    let [rows, tokens] = *ids.shape.as_slice() else {
        return Err(Error::invalid(format!(
            "input '{IDS}' must have one row for each text and one column for each token, has shape {:?}",
            &ids.shape[..]
        )));
    };
    if rows == 0 || tokens == 0 {
        return Err(Error::invalid(format!(
            "input '{IDS}' must have at least one row and one token, has shape {:?}",
            &ids.shape[..]
        )));
    }
    let limit = architecture.limit();
    if tokens > limit {
        return Err(Error::invalid(format!(
            "input '{IDS}' has {tokens} tokens in a row; the model takes at most {limit}"
        )));
    }
    let shape = [rows, tokens];
    let count = rows.saturating_mul(tokens);
    let present = match find(MASK) {
        Some(mask) => numbers(mask, shape, 2, "mask values")?.map(|value| value.map(|value| value == 1)).collect(),
        None => Ok(vec![true; count]),
    };
    let types = match find(TYPES) {
        Some(types) => numbers(types, shape, architecture.token_types, "token types")?.collect(),
        None => Ok(vec![0; if architecture.token_types > 0 { count } else { 0 }]),
    };
    Ok(Batch {
        rows,
        tokens,
        ids: numbers(ids, shape, architecture.vocabulary, "token ids")?.collect::<Result<_, _>>()?,
        present: present?,
        types: types?,
    })
}

/// The elements of `input`, which must have `shape` and be below `limit`.
fn numbers<'a>(
    input: &'a Tensor,
    shape: [usize; 2],
    limit: usize,
    what: &'static str,
) -> Result<impl Iterator<Item = Result<u32, Error>> + 'a, Error> {
    let name = &input.name;
    if input.shape.as_slice() != shape {
        return Err(Error::invalid(format!(
            "input '{name}' must have the shape of '{IDS}', {shape:?}, has {:?}",
            &input.shape[..]
        )));
    }
    let (DType::Int64, Data::Plain(bytes)) = (input.dtype, &input.data) else {
        return Err(Error::invalid(format!("input '{name}' must be {}, is {}", DType::Int64, input.dtype)));
    };
    let (values, _) = bytes.as_chunks::<8>();
    Ok(values.iter().enumerate().map(move |(index, &value)| {
        let value = i64::from_le_bytes(value);
        match u32::try_from(value) {
            Ok(value) if (value as usize) < limit => Ok(value),
            _ => Err(Error::invalid(format!(
                "input '{name}': [{}, {}] is {value}; {what} are 0 to {}",
                index / shape[1],
                index % shape[1],
                limit.saturating_sub(1)
            ))),
        }
    }))
}
