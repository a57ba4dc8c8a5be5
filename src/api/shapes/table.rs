//! `Table`: rows and named columns, as data frames and CSV have them, on their way to being a model's inputs.
//!
//! Columns go by name when there is one for every input that a request must give; columns more than that are passed over,
//! as the servers that tables come from do. Else, for a model of one such input, its columns in their order are the rows
//! of a matrix, or its only column the elements of a vector. Of a model that takes text or tokens, text is the one input
//! unless there is a column of tokens and none of text; two columns are pairs.

use std::{borrow::Cow, collections::HashMap, fmt};

use bytes::Bytes;

use super::{MAX_NAMES, listed};
use crate::{
    api::codec::{Column, Json},
    backend::{Pairs, Signature, TensorSpec},
    error::Error,
    id::shorten,
    tensor::{Shape, Tensor},
};

/// One cell, as it came.
pub(super) enum Cell<'a> {
    Json(Json<'a>),
    /// A field of plain text; a slice of the bytes when it is borrowed.
    Field(Cow<'a, str>, &'a Bytes),
}

/// A table that is being read, row by row.
pub(super) struct Table<'a> {
    /// The names of the columns, in order.
    names: Vec<String>,
    inputs: Vec<Input<'a>>,
    mapping: Mapping,
    rows: usize,
}

/// An input so far.
struct Input<'a> {
    spec: &'a TensorSpec,
    column: Column<'a>,
    /// The shape of each cell, once there is one.
    cell: Option<Shape>,
}

/// Where a column's cells go.
enum Mapping {
    /// To the input at this index, or nowhere.
    Named(Vec<Option<usize>>),
    /// All to the only input.
    Matrix,
}

impl<'a> Table<'a> {
    /// A table without rows; `limit` is `limits.max_message_bytes`.
    ///
    /// # Errors
    /// `InvalidArgument` for columns that do not make up the inputs, or of which two have one name.
    pub(super) fn new(names: Vec<String>, signature: &'a Signature, limit: usize) -> Result<Self, Error> {
        if names.len() > MAX_NAMES {
            return Err(too_wide());
        }
        let mut positions = HashMap::with_capacity(names.len());
        for (position, name) in names.iter().enumerate() {
            if positions.insert(&**name, position).is_some() {
                return Err(Error::invalid(format!("there are two columns '{}'", shorten(name))));
            }
        }
        let has = |spec: &&TensorSpec| positions.contains_key(&*spec.name);
        let specs = inputs_of(signature, has);
        let missing = specs.iter().find(|spec| !has(spec));
        let mapping = match (missing, &specs[..]) {
            (None, specs) => {
                let index = |name: &String| specs.iter().position(|spec| *spec.name == **name);
                Mapping::Named(names.iter().map(index).collect())
            }
            (Some(_), [spec]) => {
                if signature.text != Some(Pairs::Maybe) || names.len() != 2 {
                    check_matrix(spec, &names)?;
                }
                Mapping::Matrix
            }
            (Some(spec), specs) => {
                return Err(Error::invalid(format!(
                    "there is no column '{}'; the inputs are {}, the columns {}",
                    spec.name,
                    listed(specs.iter().copied()),
                    quoted(&names)
                )));
            }
        };
        let input = |spec| Input { spec, column: Column::new(spec, limit), cell: None };
        Ok(Self { inputs: specs.into_iter().map(input).collect(), names, mapping, rows: 0 })
    }

    /// # Errors
    /// `InvalidArgument` naming row and column.
    pub(super) fn push_row<'b>(&mut self, cells: impl ExactSizeIterator<Item = Cell<'b>>) -> Result<(), Error> {
        let row = self.rows;
        if cells.len() > MAX_NAMES {
            return Err(too_wide());
        }
        if cells.len() != self.names.len() {
            let columns = self.names.len();
            return Err(Error::invalid(format!("row {row} has {} cells for {columns} columns", cells.len())));
        }
        for (position, (cell, name)) in cells.zip(&self.names).enumerate() {
            let (index, may_nest) = match &self.mapping {
                Mapping::Matrix => (0, false),
                Mapping::Named(inputs) => match inputs[position] {
                    Some(index) => (index, true),
                    None => continue,
                },
            };
            let place = Place { row, name };
            let input = &mut self.inputs[index];
            let given = match cell {
                Cell::Json(value) => input.column.push_cell(format_args!("{place}"), value)?,
                Cell::Field(text, source) => {
                    input.column.push_field(&place, text, source)?;
                    Shape::new()
                }
            };
            if !may_nest && !given.is_empty() {
                return Err(Error::invalid(format!("{place} must be one value, got a list")));
            }
            let shape = input.cell.get_or_insert_with(|| given.clone());
            if *shape != given {
                return Err(Error::invalid(format!(
                    "{place} has shape {:?} where the rows before have {:?}",
                    &given[..],
                    &shape[..]
                )));
            }
        }
        self.rows += 1;
        Ok(())
    }

    /// The names of the columns, in order.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// The inputs: vectors of a row's cell each, matrices of a row's cells.
    ///
    /// # Errors
    /// `Internal` should a column not hold what was put into it.
    pub(super) fn finish(self) -> Result<Vec<Tensor>, Error> {
        let Self { names, inputs, mapping, rows } = self;
        let shape = |spec: &TensorSpec, cell: Shape| -> Shape {
            let rank = spec.shape.len();
            match mapping {
                Mapping::Matrix if rank == 2 || names.len() > 1 => [rows, names.len()].into_iter().collect(),
                Mapping::Matrix => [rows].into_iter().collect(),
                // One value a row is a row of one where the model has rows.
                Mapping::Named(_) if cell.is_empty() => {
                    std::iter::once(rows).chain(std::iter::repeat_n(1, rank.saturating_sub(1))).collect()
                }
                Mapping::Named(_) => std::iter::once(rows).chain(cell).collect(),
            }
        };
        let tensor = |Input { spec, column, cell }: Input<'_>| column.finish(shape(spec, cell.unwrap_or_default()));
        inputs.into_iter().map(tensor).collect()
    }
}

/// The inputs that are made of a table which `has` columns for some: all that a request must give, and those.
fn inputs_of(signature: &Signature, has: impl Fn(&&TensorSpec) -> bool) -> Vec<&TensorSpec> {
    if let (Some(_), [text, tokens, ..]) = (signature.text, &signature.inputs[..])
        && (has(&text) || !has(&tokens))
    {
        return vec![text];
    }
    let specs: Vec<_> =
        signature.inputs.iter().filter(|spec| has(spec) || !signature.is_optional(&spec.name)).collect();
    // A table that gives nothing is not meant to.
    if specs.is_empty() { signature.inputs.iter().collect() } else { specs }
}

/// Whether the columns can be the rows of the one input, none of them having its name.
fn check_matrix(spec: &TensorSpec, names: &[String]) -> Result<(), Error> {
    let columns = names.len();
    let fits = match spec.shape[..] {
        [_] => columns == 1,
        [_, width] => width < 0 || usize::try_from(width) == Ok(columns),
        _ => false,
    };
    if fits {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the columns {} are neither the input '{}' by name nor, by their number, rows of its shape {:?}",
        quoted(names),
        spec.name,
        spec.shape
    )))
}

pub(super) fn too_wide() -> Error {
    Error::invalid(format!("the table has more than {MAX_NAMES} columns"))
}

/// The first few names, and how many more there are.
fn quoted(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).map(|name| format!("'{}'", shorten(name))).collect::<Vec<_>>().join(", ");
    if let Some(more) = names.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// Rows count from 0, as in data frames.
struct Place<'a> {
    row: usize,
    name: &'a str,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {}, column '{}'", self.row, shorten(self.name))
    }
}
