//! `Card`: what a model is for, what it was made from, how good it is, and who may use it, in its authors' words.
//!
//! Authors write it in the front matter of `README.md`, as the Hugging Face Hub has it, or as the `modelCard` of a
//! component in CycloneDX. Of a model that has neither, what its run says makes one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::Path,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Lineage, lineage::Dataset, yaml};
use crate::error::{abridge, shorten};

mod cyclonedx;
mod readme;

/// What the front matter lies in, at the root of a version's folder.
const README: &str = "README.md";
/// Bytes of a README that are read: front matter with results of hundreds of tests has 200 KB.
const MAX_README: u64 = 1 << 20;
/// Bytes of a bill of materials.
const MAX_BILL: u64 = 8 << 20;
/// Files that may be bills of materials and are looked into.
const MAX_BILLS: usize = 8;
/// Bytes of all that has no field of its own.
const MAX_EXTRA: usize = 64 << 10;
/// Fields in notes on what there is no room for.
const MOST_NAMED: usize = 5;
/// Items of one list.
const MAX_ITEMS: usize = 1000;
/// Characters of one text.
const MAX_TEXT: usize = 4096;

/// A model card. What its authors did not say is null or empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Card {
    /// What it was made from.
    pub from: Basis,
    /// The file that it was read from, below the version's folder; null when it is from the run.
    pub file: Option<String>,
    pub name: Option<String>,
    pub version: Option<String>,
    pub description: Option<String>,
    pub authors: Vec<String>,
    /// As SPDX or the Hub abbreviates them.
    pub licenses: Vec<String>,
    pub languages: Vec<String>,
    /// The library that it was made with.
    pub library: Option<String>,
    /// What it does: `text-classification`, for instance.
    pub task: Option<String>,
    pub architecture: Option<String>,
    /// Models that it was made from.
    pub base_models: Vec<String>,
    pub datasets: Vec<Dataset>,
    /// How good it was.
    pub results: Vec<Measured>,
    pub tags: Vec<String>,
    /// Whom it is for, what for, and what it cannot do.
    pub users: Vec<String>,
    pub use_cases: Vec<String>,
    pub limitations: Vec<String>,
    /// What it was trained with.
    pub parameters: BTreeMap<String, String>,
    /// The run that made it.
    pub run_id: Option<String>,
    /// The commit of the code that made it.
    pub git_commit: Option<String>,
    /// Everything else of the front matter, or of the `modelCard`, as it was said.
    pub extra: Map<String, Value>,
}

/// What a card was made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// The front matter of the README.
    Readme,
    /// The model card of a bill of materials.
    CycloneDx,
    /// What the registry knows of the run that made the model.
    #[default]
    Run,
}

/// How good a model was in one respect.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Measured {
    pub metric: String,
    /// As it was written: a number, or a text.
    pub value: Value,
    pub task: Option<String>,
    pub dataset: Option<String>,
    /// The part of the data that it holds for.
    pub slice: Option<String>,
}

/// A card, and what could not be read on the way to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    pub card: Option<Card>,
    pub notes: Vec<String>,
}

impl Card {
    /// Of a version whose files lie in `folder` and whose paths below it are `files`.
    pub fn find<'a>(folder: &Path, files: impl Iterator<Item = &'a str>, lineage: Option<&Lineage>) -> Found {
        let mut notes = Vec::new();
        let (mut has_readme, mut bills) = (false, BTreeSet::new());
        for path in files.filter(|path| !path.contains('/')) {
            has_readme |= path == README;
            if is_bill(path) {
                bills.insert(path);
            }
        }
        let readme = has_readme.then_some((README, readme::read as Reader)).into_iter();
        let bills = bills.into_iter().take(MAX_BILLS).map(|path| (path, cyclonedx::read as Reader));
        for (path, reader) in readme.chain(bills) {
            let text = if path == README { beginning(&folder.join(path)) } else { whole(&folder.join(path)) };
            match text.and_then(|text| reader(&text, &mut notes)) {
                Ok(Some(card)) => {
                    let card = Card { file: Some(path.to_owned()), ..card };
                    return Found { card: Some(card), notes };
                }
                Ok(None) => {}
                Err(reason) => notes.push(format!("{}: {}", shorten(path), abridge(&reason))),
            }
        }
        Found { card: lineage.and_then(Card::of_run), notes }
    }

    /// The text of the first example in the README of a version whose files lie in `folder`: what the Hub's own pages fill
    /// their field with.
    pub fn example(folder: &Path) -> Option<String> {
        let card = readme::read(&beginning(&folder.join(README)).ok()?, &mut Vec::new()).ok()??;
        card.extra.get("widget")?.as_array()?.iter().find_map(|example| one(example.get("text")?))
    }

    /// What is known of the run that made a version; `None` when nothing says that one did.
    fn of_run(lineage: &Lineage) -> Option<Self> {
        lineage.run_id.as_ref()?;
        let result = |(metric, value): (&String, &Option<f64>)| Measured {
            metric: metric.clone(),
            value: value.map_or(Value::Null, Value::from),
            ..Measured::default()
        };
        Some(Self {
            from: Basis::Run,
            version: lineage.version.clone(),
            description: lineage.description.clone(),
            authors: lineage.author.iter().cloned().collect(),
            datasets: lineage.datasets.clone(),
            results: lineage.metrics.iter().map(result).collect(),
            parameters: lineage.parameters.clone(),
            run_id: lineage.run_id.clone(),
            git_commit: lineage.git_commit.clone(),
            ..Self::default()
        })
    }

    /// Keeps what has no field of its own, as far as there is room for it.
    fn keep(&mut self, rest: Map<String, Value>, notes: &mut Vec<String>) {
        let (mut left, mut left_out) = (MAX_EXTRA, 0);
        for (key, value) in rest {
            let bytes = key.len() + value.to_string().len();
            match left.checked_sub(bytes) {
                Some(less) => {
                    left = less;
                    self.extra.insert(key, value);
                }
                None => {
                    left_out += 1;
                    if left_out <= MOST_NAMED {
                        notes.push(format!("'{}' has {bytes} bytes and is not shown", shorten(&key)));
                    }
                }
            }
        }
        if left_out > MOST_NAMED {
            notes.push(format!("{} more fields are not shown", left_out - MOST_NAMED));
        }
    }
}

/// Reads a card from a file's text, and notes what it leaves out; `None` when the file has none.
type Reader = fn(&str, &mut Vec<String>) -> Result<Option<Card>, String>;

/// Whether a file has a name that bills of materials in CycloneDX go by.
fn is_bill(path: &str) -> bool {
    matches!(path, "bom.json" | "sbom.json" | "mlbom.json" | "cyclonedx.json") || path.ends_with(".cdx.json")
}

/// The lines that a README begins with.
fn beginning(path: &Path) -> Result<String, String> {
    let mut bytes = bytes(path, MAX_README)?;
    if bytes.len() as u64 == MAX_README {
        // It may end within a line.
        bytes.truncate(bytes.iter().rposition(|byte| *byte == b'\n').unwrap_or_default());
    }
    // Only the front matter counts, whatever the rest is written in.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A bill of materials.
fn whole(path: &Path) -> Result<String, String> {
    let bytes = bytes(path, MAX_BILL + 1)?;
    if bytes.len() as u64 > MAX_BILL {
        return Err(format!("it has more than {MAX_BILL} bytes"));
    }
    String::from_utf8(bytes).map_err(|error| error.to_string())
}

/// At most so many bytes of a file. What is no plain file may never end.
fn bytes(path: &Path, most: u64) -> Result<Vec<u8>, String> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if path.metadata()?.is_file() {
            File::open(path)?.take(most).read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    };
    read().map_err(|error| error.to_string())
}

/// A value as a text of its own; `None` of what has parts, or is nothing.
fn one(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if text.trim().is_empty() => None,
        Value::String(text) => Some(clipped(text.trim())),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A value as texts: those of a list, or its own.
fn several(value: &Value) -> Vec<String> {
    match value {
        Value::Array(list) => list.iter().filter_map(one).take(MAX_ITEMS).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// Takes the field `key` out as one text. What is none stays.
fn take_one(fields: &mut Map<String, Value>, key: &str) -> Option<String> {
    let text = one(fields.get(key)?)?;
    fields.remove(key);
    Some(text)
}

/// Takes the field `key` out as texts. A list of which any is more than a text stays, too.
fn take_several(fields: &mut Map<String, Value>, key: &str) -> Vec<String> {
    let Some(value) = fields.get(key) else { return Vec::new() };
    let texts = several(value);
    if value.as_array().map_or(1, Vec::len) == texts.len() {
        fields.remove(key);
    }
    texts
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
