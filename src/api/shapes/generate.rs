//! Triton's generate extension: one flat object in, one flat object out, for models that take and give text.

use super::{MAX_NAMES, listed};
use crate::{
    api::codec::{
        Column, Document, InferCall, InferReply, Json, NonFinite, Parameters, Spelling, put_json, write_flat,
        write_nested,
    },
    backend::{Signature, TensorSpec},
    error::Error,
    id::shorten,
    tensor::{DType, Shape, Tensor, elements},
};

/// Reads a request. Members that name inputs, at the top or in `parameters`, are tensors of one request; `id` is
/// echoed; all others are parameters.
///
/// # Errors
/// `InvalidArgument` for models without text on either side and for members that fit nothing.
pub fn read(document: &Document, signature: &Signature, limit: usize) -> Result<InferCall, Error> {
    check_texts("input", &signature.inputs)?;
    check_texts("output", &signature.outputs)?;
    let members = document.root().members();
    let members = members.ok_or_else(|| Error::invalid("the request must be an object"))?;
    let mut id = String::new();
    let mut known = Known { specs: &signature.inputs, limit, inputs: Vec::new(), parameters: Parameters::new() };
    for (index, member) in members.enumerate() {
        if index == MAX_NAMES {
            return Err(too_many());
        }
        let (name, value) = member?;
        match &*name {
            name if known.spec(name).is_some() => known.add(name, value)?,
            "id" => {
                let text = value.string();
                id =
                    text.ok_or_else(|| Error::invalid(format!("'id' must be a string, got {}", value.shown())))?.into();
            }
            "parameters" => {
                let members = value
                    .members()
                    .ok_or_else(|| Error::invalid(format!("'parameters' must be an object, got {}", value.shown())))?;
                for member in members {
                    let (name, value) = member?;
                    known.add(&name, value)?;
                }
            }
            name => known.add(name, value)?,
        }
    }
    InferCall::new(id, known.parameters, known.inputs, Vec::new())
}

/// What the members read so far say.
struct Known<'a> {
    specs: &'a [TensorSpec],
    limit: usize,
    inputs: Vec<Tensor>,
    parameters: Parameters,
}

impl<'a> Known<'a> {
    fn spec(&self, name: &str) -> Option<&'a TensorSpec> {
        self.specs.iter().find(|spec| *spec.name == *name)
    }

    /// Takes a member: as a tensor when it names an input, else as a parameter.
    fn add(&mut self, name: &str, value: Json<'_>) -> Result<(), Error> {
        let Some(spec) = self.spec(name) else { return self.add_parameter(name, value) };
        if self.inputs.iter().any(|input| *input.name == *name) {
            return Err(Error::invalid(format!("input '{name}' is given twice")));
        }
        self.inputs.push(tensor(spec, value, self.limit)?);
        Ok(())
    }

    fn add_parameter(&mut self, name: &str, value: Json<'_>) -> Result<(), Error> {
        let shown = shorten(name);
        if self.parameters.len() == MAX_NAMES {
            return Err(too_many());
        }
        let parameter = value.parameter().ok_or_else(|| {
            Error::invalid(format!(
                "'{shown}' is no input, and as a parameter it must be a string, a number or a boolean, got {}",
                value.shown()
            ))
        })?;
        match self.parameters.insert(name.to_owned(), parameter) {
            None => Ok(()),
            Some(_) => Err(Error::invalid(format!("parameter '{shown}' is given twice"))),
        }
    }
}

/// Writes an answer: outputs of one element as it is, others as flat lists.
///
/// # Errors
/// `InvalidArgument` when JSON cannot carry an output.
pub fn write(reply: &InferReply<'_>, non_finite: NonFinite) -> Result<Vec<u8>, Error> {
    let mut json = br#"{"model_name":"#.to_vec();
    put_json(&mut json, reply.model)?;
    json.extend_from_slice(br#","model_version":"#);
    put_json(&mut json, reply.version)?;
    if !reply.id.is_empty() {
        json.extend_from_slice(br#","id":"#);
        put_json(&mut json, reply.id)?;
    }
    for output in reply.outputs {
        json.push(b',');
        put_json(&mut json, &*output.name)?;
        json.push(b':');
        if elements(&output.shape) == Some(1) {
            let scalar = Tensor { shape: Shape::new(), ..output.clone() };
            write_nested(&scalar, None, Spelling::Plain, non_finite, &mut json)?;
        } else {
            write_flat(output, Spelling::Plain, non_finite, &mut json)?;
        }
    }
    json.push(b'}');
    Ok(json)
}

fn check_texts(kind: &str, specs: &[TensorSpec]) -> Result<(), Error> {
    if specs.iter().any(|spec| spec.dtype == DType::Bytes) {
        return Ok(());
    }
    let names = listed(specs.iter());
    Err(Error::invalid(format!("generate is for models with text input and output, and no {kind} is BYTES: {names}")))
}

fn too_many() -> Error {
    Error::invalid(format!("the request has more than {MAX_NAMES} members"))
}

fn tensor(spec: &TensorSpec, value: Json<'_>, limit: usize) -> Result<Tensor, Error> {
    let label = format!("input '{}'", spec.name);
    let mut column = Column::new(spec, limit);
    let given = column.push(format_args!("{label}"), value)?;
    // Nested lists say their shape themselves.
    let shape = if given.len() > 1 { Some(given) } else { fitted(&spec.shape, elements(&given).unwrap_or_default()) };
    column.finish(shape.ok_or_else(|| {
        Error::invalid(format!(
            "{label}: no request of one row has shape {:?} and the elements of {}",
            spec.shape,
            value.shown()
        ))
    })?)
}

/// The shape with `count` elements that a declaration allows: its last free dimension takes what the others leave,
/// which are 1 where they are free. `None` when they leave a fraction, or when nothing is free and the count differs.
fn fitted(declared: &[i64], count: usize) -> Option<Shape> {
    let mut shape: Shape = declared.iter().map(|&size| usize::try_from(size).unwrap_or(1)).collect();
    let others = elements(&shape)?;
    match declared.iter().rposition(|&size| size < 0) {
        None => (others == count).then_some(shape),
        Some(free) => {
            shape[free] = count.checked_div(others)?;
            (shape[free] * others == count).then_some(shape)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_fill_the_last_free_dimension() {
        let fitted = |declared: &[i64], count| fitted(declared, count).map(|shape| shape.to_vec());
        assert_eq!(fitted(&[], 1), Some(vec![]));
        assert_eq!(fitted(&[-1], 3), Some(vec![3]));
        assert_eq!(fitted(&[-1, -1], 3), Some(vec![1, 3]));
        assert_eq!(fitted(&[-1, 1], 1), Some(vec![1, 1]));
        assert_eq!(fitted(&[-1, 4], 8), Some(vec![2, 4]));
        assert_eq!(fitted(&[-1, -1, 2], 6), Some(vec![1, 3, 2]));
        assert_eq!(fitted(&[2, 3], 6), Some(vec![2, 3]));
        assert_eq!(fitted(&[-1], 0), Some(vec![0]));
        for (declared, count) in [(&[-1, 4][..], 6), (&[2, 3], 5), (&[], 2), (&[-1, 0], 1)] {
            assert_eq!(fitted(declared, count), None, "{declared:?} {count}");
        }
    }
}
