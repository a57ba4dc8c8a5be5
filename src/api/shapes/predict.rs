//! TensorFlow Serving's predict, which KServe's V1 protocol took over: rows in `instances` or columns in `inputs`.

use super::{input_index, listed, members};
use crate::{
    api::codec::{
        Column, Document, InferCall, InferReply, Json, NonFinite, Parameters, Spelling, coded, put_json, write_nested,
    },
    backend::Signature,
    error::Error,
    id::shorten,
    tensor::{DType, Shape, Tensor},
};

/// The only signature there is, by the name that TensorFlow gives it.
pub const SIGNATURE_NAME: &str = "serving_default";

/// How the inputs came, and how the outputs go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `instances`, answered with `predictions`: one entry per row.
    Rows,
    /// `inputs`, answered with `outputs`: one entry per tensor.
    Columns,
}

/// Reads a request.
///
/// # Errors
/// `InvalidArgument` naming the row and the input.
pub fn read(document: &Document, signature: &Signature, limit: usize) -> Result<(InferCall, Format), Error> {
    let [name, instances, inputs] = members("the request", document.root(), ["signature_name", "instances", "inputs"])?;
    if let Some(name) = name
        && name.string().is_none_or(|name| !["", SIGNATURE_NAME].contains(&&*name))
    {
        return Err(Error::invalid(format!(
            "'signature_name' must be '{SIGNATURE_NAME}' or absent, got {}",
            name.shown()
        )));
    }
    let (inputs, format) = match (instances, inputs) {
        (Some(instances), None) => (rows(instances, signature, limit)?, Format::Rows),
        (None, Some(inputs)) => (columns(inputs, signature, limit)?, Format::Columns),
        (None, None) => return Err(Error::invalid("the request has neither 'instances' nor 'inputs'")),
        (Some(_), Some(_)) => return Err(Error::invalid("the request has both 'instances' and 'inputs'")),
    };
    Ok((InferCall::new(String::new(), Parameters::new(), inputs, Vec::new())?, format))
}

/// Writes an answer: the outputs themselves when there is one, objects of them by name when there are more.
///
/// # Errors
/// `InvalidArgument` for rows of outputs that have none or not equally many, and when JSON cannot carry an output.
pub fn write(reply: &InferReply<'_>, format: Format, non_finite: NonFinite) -> Result<Vec<u8>, Error> {
    let mut json = Vec::with_capacity(64);
    match format {
        Format::Columns => {
            json.extend_from_slice(br#"{"outputs":"#);
            write_columns(reply.outputs, spelling, non_finite, &mut json)?;
        }
        Format::Rows => {
            let count = row_count(reply.outputs).map_err(|what| {
                Error::invalid(format!("{what}, so they are no rows; send 'inputs' instead of 'instances'"))
            })?;
            json.extend_from_slice(br#"{"predictions":"#);
            match reply.outputs {
                [output] => write_nested(output, None, spelling(output), non_finite, &mut json)?,
                outputs => write_rows(outputs, count, spelling, non_finite, &mut json)?,
            }
        }
    }
    json.push(b'}');
    Ok(json)
}

/// Outputs whose names end so are no texts, by the convention of the servers that this shape comes from.
fn spelling(output: &Tensor) -> Spelling {
    if output.name.ends_with("_bytes") { Spelling::Base64 } else { Spelling::Plain }
}

/// Reads rows and stacks them: values of the one input, or objects with a value for each.
pub(super) fn rows(instances: Json<'_>, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error> {
    let no_list = || Error::invalid(format!("'instances' must be an array, got {}", instances.shown()));
    let first = instances.items().ok_or_else(no_list)?.next();
    let first = first.ok_or_else(|| Error::invalid("'instances' has no rows"))?;
    match signature.sole_input() {
        Some(spec) if !is_named(first, spec.dtype) => {
            let mut column = Column::new(spec, limit);
            let shape = column.push("'instances'", instances)?;
            Ok(vec![column.finish(shape)?])
        }
        _ => named_rows(instances.items().ok_or_else(no_list)?, signature, limit),
    }
}

fn named_rows<'a>(
    instances: impl Iterator<Item = Json<'a>>,
    signature: &Signature,
    limit: usize,
) -> Result<Vec<Tensor>, Error> {
    // Each input's elements so far, the shape of its rows, and how many it has.
    let mut stacks: Vec<_> =
        signature.inputs.iter().map(|spec| (Column::new(spec, limit), None::<Shape>, 0usize)).collect();
    let mut count = 0;
    for (row, instance) in instances.enumerate() {
        let members = instance.members().ok_or_else(|| {
            let names = listed(signature.inputs.iter());
            Error::invalid(format!("instances[{row}] must be an object with {names}, got {}", instance.shown()))
        })?;
        for member in members {
            let (name, value) = member?;
            let index = input_index(signature, &name, format_args!("instances[{row}]"))?;
            let name = &signature.inputs[index].name;
            let (column, shape, filled) = &mut stacks[index];
            if *filled > row {
                return Err(Error::invalid(format!("instances[{row}] has '{name}' twice")));
            }
            if *filled < row {
                return Err(missing(*filled, name));
            }
            let given = column.push(format_args!("instances[{row}].{name}"), value)?;
            *filled += 1;
            let shape = shape.get_or_insert_with(|| given.clone());
            if *shape != given {
                return Err(Error::invalid(format!(
                    "instances[{row}].{name} has shape {:?} where those before it have {:?}",
                    &given[..],
                    &shape[..]
                )));
            }
        }
        count = row + 1;
    }
    let mut tensors = Vec::with_capacity(stacks.len());
    for (spec, (column, shape, filled)) in signature.inputs.iter().zip(stacks) {
        // An input that no row has is left to the check that all requests go through.
        let Some(shape) = shape else { continue };
        if filled < count {
            return Err(missing(filled, &spec.name));
        }
        tensors.push(column.finish(std::iter::once(count).chain(shape).collect())?);
    }
    Ok(tensors)
}

fn missing(row: usize, name: &str) -> Error {
    Error::invalid(format!("instances[{row}] has no '{name}', which other rows have"))
}

/// Reads whole tensors: the one input's value, or an object with a value for each.
pub(super) fn columns(inputs: Json<'_>, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error> {
    if let Some(spec) = signature.sole_input()
        && !is_named(inputs, spec.dtype)
    {
        let mut column = Column::new(spec, limit);
        let shape = column.push("'inputs'", inputs)?;
        return Ok(vec![column.finish(shape)?]);
    }
    let members = inputs.members().ok_or_else(|| {
        let names = listed(signature.inputs.iter());
        Error::invalid(format!("'inputs' must be an object with {names}, got {}", inputs.shown()))
    })?;
    let mut tensors: Vec<Tensor> = Vec::with_capacity(signature.inputs.len());
    for member in members {
        let (name, value) = member?;
        let spec = &signature.inputs[input_index(signature, &name, "'inputs'")?];
        if tensors.iter().any(|tensor| tensor.name == spec.name) {
            return Err(Error::invalid(format!("'inputs' has '{}' twice", shorten(&name))));
        }
        let mut column = Column::new(spec, limit);
        let shape = column.push(format_args!("inputs.{name}"), value)?;
        tensors.push(column.finish(shape)?);
    }
    Ok(tensors)
}

/// Whether a value says which input it is for.
fn is_named(value: Json<'_>, dtype: DType) -> bool {
    value.members().is_some() && !(dtype == DType::Bytes && coded(value).is_some())
}

/// How many rows every output has; else what is wrong with them.
pub(super) fn row_count(outputs: &[Tensor]) -> Result<usize, String> {
    let count = outputs.first().map_or(0, Tensor::rows);
    for output in outputs {
        let name = &output.name;
        if output.shape.is_empty() {
            return Err(format!("output '{name}' is a scalar"));
        }
        if output.rows() != count {
            return Err(format!("output '{}' has {count} rows and '{name}' has {}", outputs[0].name, output.rows()));
        }
    }
    Ok(count)
}

/// Writes the one output, or an object of several.
pub(super) fn write_columns(
    outputs: &[Tensor],
    spelling: impl Fn(&Tensor) -> Spelling,
    non_finite: NonFinite,
    json: &mut Vec<u8>,
) -> Result<(), Error> {
    match outputs {
        [output] => write_nested(output, None, spelling(output), non_finite, json),
        outputs => write_object(outputs, None, spelling, non_finite, json),
    }
}

/// Writes an array of objects, one for each of `count` rows.
pub(super) fn write_rows(
    outputs: &[Tensor],
    count: usize,
    spelling: impl Fn(&Tensor) -> Spelling,
    non_finite: NonFinite,
    json: &mut Vec<u8>,
) -> Result<(), Error> {
    json.push(b'[');
    for row in 0..count {
        if row > 0 {
            json.push(b',');
        }
        write_object(outputs, Some(row), &spelling, non_finite, json)?;
    }
    json.push(b']');
    Ok(())
}

fn write_object(
    outputs: &[Tensor],
    row: Option<usize>,
    spelling: impl Fn(&Tensor) -> Spelling,
    non_finite: NonFinite,
    json: &mut Vec<u8>,
) -> Result<(), Error> {
    json.push(b'{');
    for (index, output) in outputs.iter().enumerate() {
        if index > 0 {
            json.push(b',');
        }
        put_json(json, &*output.name)?;
        json.push(b':');
        write_nested(output, row, spelling(output), non_finite, json)?;
    }
    json.push(b'}');
    Ok(())
}
