//! MLflow's scoring protocol: data frames, CSV, and TensorFlow Serving's two formats under the same names.

use std::collections::HashMap;

use bytes::Bytes;

use super::{
    MAX_NAMES,
    csv::Records,
    members, predict,
    table::{Cell, Table, too_wide},
};
use crate::{
    api::codec::{Document, InferCall, InferReply, Json, NonFinite, Parameters, Spelling},
    backend::Signature,
    error::Error,
    id::shorten,
    tensor::Tensor,
};

/// The ways of sending inputs, of which a request has one.
const FORMATS: [&str; 4] = ["dataframe_split", "dataframe_records", "instances", "inputs"];

/// The members of `params` that mean something here; others are the model's own, and there is nobody to read them.
const PARAMETERS: [&str; 2] = ["timeout", "priority"];

/// How several outputs go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orient {
    /// As tensors came in: an object of whole outputs.
    Columns,
    /// As a table came in: a list with an object for each row.
    Records,
}

/// Reads a request in JSON.
///
/// # Errors
/// `InvalidArgument` naming the row and the column or the input.
pub fn read_json(document: &Document, signature: &Signature, limit: usize) -> Result<(InferCall, Orient), Error> {
    let [split, records, instances, inputs, params] = members(
        "the request",
        document.root(),
        ["dataframe_split", "dataframe_records", "instances", "inputs", "params"],
    )?;
    let (tensors, orient) = match (split, records, instances, inputs) {
        (Some(split), None, None, None) => (split_table(split, signature, limit)?, Orient::Records),
        (None, Some(records), None, None) => (record_table(records, signature, limit)?, Orient::Records),
        (None, None, Some(instances), None) => (predict::rows(instances, signature, limit)?, Orient::Columns),
        (None, None, None, Some(inputs)) => (predict::columns(inputs, signature, limit)?, Orient::Columns),
        _ => return Err(Error::invalid(format!("the request must have exactly one of {}", FORMATS.join(", ")))),
    };
    let mut parameters = Parameters::new();
    if let Some(params) = params {
        for (name, value) in PARAMETERS.into_iter().zip(members("params", params, PARAMETERS)?) {
            let Some(value) = value else { continue };
            let parameter = value.parameter().ok_or_else(|| {
                Error::invalid(format!("params.{name} must be a string, a number or a boolean, got {}", value.shown()))
            })?;
            parameters.insert(name.to_owned(), parameter);
        }
    }
    Ok((InferCall::new(String::new(), parameters, tensors, Vec::new())?, orient))
}

/// Reads a request in CSV, the first line of which names the columns.
///
/// # Errors
/// `InvalidArgument` naming the line, or the row and the column.
pub fn read_csv(body: &Bytes, signature: &Signature, limit: usize) -> Result<(InferCall, Orient), Error> {
    let text = std::str::from_utf8(body)
        .map_err(|error| Error::invalid(format!("the CSV is not UTF-8 after byte {}", error.valid_up_to())))?;
    let mut records = Records::new(text);
    let mut fields = Vec::new();
    if !records.read(&mut fields)? {
        return Err(Error::invalid("the CSV has no line with the names of its columns"));
    }
    let names = fields.iter().map(|name| name.trim().to_owned()).collect();
    let mut table = Table::new(names, signature, limit)?;
    while records.read(&mut fields)? {
        table.push_row(fields.drain(..).map(|field| Cell::Field(field, body)))?;
    }
    let call = InferCall::new(String::new(), Parameters::new(), table.finish()?, Vec::new())?;
    Ok((call, Orient::Records))
}

/// Writes an answer: the output itself when there is one.
///
/// # Errors
/// `InvalidArgument` when JSON cannot carry an output.
pub fn write(reply: &InferReply<'_>, orient: Orient, non_finite: NonFinite) -> Result<Vec<u8>, Error> {
    let spelling = |_: &Tensor| Spelling::Plain;
    let mut json = br#"{"predictions":"#.to_vec();
    match (orient, reply.outputs, predict::row_count(reply.outputs)) {
        (Orient::Records, [_, _, ..], Ok(rows)) => {
            predict::write_rows(reply.outputs, rows, spelling, non_finite, &mut json)?;
        }
        // Outputs that share no rows are no table, whatever came in.
        _ => predict::write_columns(reply.outputs, spelling, non_finite, &mut json)?,
    }
    json.push(b'}');
    Ok(json)
}

/// `{"columns": […], "data": [[…], …]}`; an `index` means nothing here.
fn split_table(split: Json<'_>, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error> {
    let place = "dataframe_split";
    let [columns, data] = members(place, split, ["columns", "data"])?;
    let data = data.ok_or_else(|| Error::invalid(format!("{place} has no 'data'")))?;
    let mut rows = data
        .items()
        .ok_or_else(|| Error::invalid(format!("{place}.data must be an array of rows, got {}", data.shown())))?
        .peekable();
    let names = match (columns, rows.peek()) {
        (Some(columns), _) => column_names(columns)?,
        // Data frames without names number their columns.
        (None, Some(row)) => {
            let width = row.items().map_or(0, |cells| cells.take(MAX_NAMES + 1).count());
            (0..width).map(|position| position.to_string()).collect()
        }
        (None, None) => return Err(Error::invalid(format!("{place} has neither 'columns' nor rows"))),
    };
    let mut table = Table::new(names, signature, limit)?;
    let mut cells = Vec::new();
    for (index, row) in rows.enumerate() {
        let items = row
            .items()
            .ok_or_else(|| Error::invalid(format!("{place}.data[{index}] must be an array, got {}", row.shown())))?;
        cells.extend(items.take(MAX_NAMES + 1).map(Cell::Json));
        table.push_row(cells.drain(..))?;
    }
    table.finish()
}

fn column_names(columns: Json<'_>) -> Result<Vec<String>, Error> {
    let place = "dataframe_split.columns";
    let items = columns.items();
    let items = items.ok_or_else(|| Error::invalid(format!("{place} must be an array, got {}", columns.shown())))?;
    let mut names = Vec::new();
    for item in items {
        if names.len() == MAX_NAMES {
            return Err(too_wide());
        }
        let is_number = item.text().starts_with(|first: char| first == '-' || first.is_ascii_digit());
        let name = if is_number { Some(item.text().into()) } else { item.string() };
        let name = name.ok_or_else(|| {
            Error::invalid(format!("{place}[{}] must be a string or a number, got {}", names.len(), item.shown()))
        })?;
        names.push(name.into_owned());
    }
    Ok(names)
}

/// A list of objects; the first one says which columns there are.
fn record_table(records: Json<'_>, signature: &Signature, limit: usize) -> Result<Vec<Tensor>, Error> {
    let place = "dataframe_records";
    let mut rows = records
        .items()
        .ok_or_else(|| Error::invalid(format!("{place} must be an array of objects, got {}", records.shown())))?
        .peekable();
    let row_members = |index: usize, row: Json<'_>| {
        Error::invalid(format!("{place}[{index}] must be an object, got {}", row.shown()))
    };
    let first = *rows.peek().ok_or_else(|| Error::invalid(format!("{place} has no rows")))?;
    let mut names = Vec::new();
    for member in first.members().ok_or_else(|| row_members(0, first))? {
        if names.len() == MAX_NAMES {
            return Err(too_wide());
        }
        names.push(member?.0.into_owned());
    }
    let positions: HashMap<String, usize> = names.iter().cloned().zip(0..).collect();
    let mut table = Table::new(names, signature, limit)?;
    let mut cells: Vec<Option<Json<'_>>> = vec![None; table.names().len()];
    let mut in_order = Vec::with_capacity(cells.len());
    for row in rows {
        let index = table.rows();
        cells.fill(None);
        for (position, member) in row.members().ok_or_else(|| row_members(index, row))?.enumerate() {
            let (name, value) = member?;
            // Rows mostly have their columns in one order.
            let is_here = table.names().get(position).is_some_and(|here| **here == *name);
            let position = if is_here { Some(position) } else { positions.get(&*name).copied() };
            let shown = shorten(&name);
            let position = position.ok_or_else(|| {
                Error::invalid(format!("{place}[{index}] has the column '{shown}', which the first row has not"))
            })?;
            if cells[position].replace(value).is_some() {
                return Err(Error::invalid(format!("{place}[{index}] has '{shown}' twice")));
            }
        }
        if let Some(position) = cells.iter().position(Option::is_none) {
            let name = shorten(&table.names()[position]);
            return Err(Error::invalid(format!("{place}[{index}] has no column '{name}', which the first row has")));
        }
        in_order.extend(cells.iter().flatten().copied().map(Cell::Json));
        table.push_row(in_order.drain(..))?;
    }
    table.finish()
}
