//! The front matter of a README, as the Hugging Face Hub has it.

use serde_json::{Map, Value};

use super::{Basis, Card, Dataset, MAX_ITEMS, Measured, clipped, one, take_one, take_several, yaml};

/// What is before and after the front matter.
const FENCE: &str = "---";

/// The card in a README; `None` when it begins with no front matter.
///
/// # Errors
/// What is wrong with the front matter, in words.
pub fn read(text: &str, notes: &mut Vec<String>) -> Result<Option<Card>, String> {
    let Some(front) = front(text)? else { return Ok(None) };
    let fields = match yaml::read(front)? {
        Value::Object(fields) if !fields.is_empty() => fields,
        Value::Object(_) | Value::Null => return Ok(None),
        _ => return Err("expected names and values in its front matter".to_owned()),
    };
    Ok(Some(card(fields, notes)))
}

/// What stands between the first line of the text and the next of three dashes.
fn front(text: &str) -> Result<Option<&str>, String> {
    let text = text.trim_start_matches('\u{feff}').trim_start();
    let Some(rest) = text.strip_prefix(FENCE) else { return Ok(None) };
    let Some((_, rest)) = rest.split_once('\n').filter(|(first, _)| first.trim().is_empty()) else {
        return Ok(None);
    };
    let mut end = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end() == FENCE {
            return Ok(Some(&rest[..end]));
        }
        end += line.len();
    }
    Err("its front matter does not end: no line of --- after the first".to_owned())
}

fn card(mut fields: Map<String, Value>, notes: &mut Vec<String>) -> Card {
    let results = fields.get("model-index").map(results).unwrap_or_default();
    let name = fields.get("model-index").and_then(|index| one(index.get(0)?.get("name")?));
    let dataset = |name: String| Dataset { name, ..Dataset::default() };
    let mut card = Card {
        from: Basis::Readme,
        name: take_one(&mut fields, "model_name").or(name),
        version: take_one(&mut fields, "version"),
        description: take_one(&mut fields, "description").or_else(|| take_one(&mut fields, "model_summary")),
        authors: ["authors", "author", "model_creator", "developers"]
            .iter()
            .flat_map(|key| take_several(&mut fields, key))
            .collect(),
        licenses: licenses(&mut fields),
        languages: take_several(&mut fields, "language"),
        library: take_one(&mut fields, "library_name"),
        task: take_one(&mut fields, "pipeline_tag"),
        base_models: take_several(&mut fields, "base_model"),
        datasets: take_several(&mut fields, "datasets").into_iter().map(dataset).collect(),
        tags: take_several(&mut fields, "tags"),
        results,
        ..Card::default()
    };
    card.keep(fields, notes);
    card
}

/// `other` stands for what has a name and a link of its own.
fn licenses(fields: &mut Map<String, Value>) -> Vec<String> {
    let licenses = take_several(fields, "license");
    match take_one(fields, "license_name") {
        Some(name) if licenses.iter().all(|license| license == "other") => vec![name],
        Some(name) => licenses.into_iter().chain([name]).collect(),
        None => licenses,
    }
}

/// Every metric of every result of an index of models.
fn results(index: &Value) -> Vec<Measured> {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let named = |value: Option<&Value>, keys: [&str; 2]| keys.iter().find_map(|key| one(value?.get(key)?));
    let mut found = Vec::new();
    for result in list(Some(index)).iter().flat_map(|model| list(model.get("results"))) {
        let (task, dataset) = (result.get("task"), result.get("dataset"));
        for metric in list(result.get("metrics")) {
            let Some(name) = named(Some(&metric), ["name", "type"]) else { continue };
            let value = match metric.get("value") {
                Some(Value::String(text)) => Value::String(clipped(text)),
                Some(value @ (Value::Number(_) | Value::Bool(_))) => value.clone(),
                // What has parts stays in the index.
                _ => Value::Null,
            };
            found.push(Measured {
                metric: name,
                value,
                task: named(task, ["type", "name"]),
                dataset: named(dataset, ["name", "type"]),
                slice: named(dataset, ["split", "config"]),
            });
        }
    }
    found.truncate(MAX_ITEMS);
    found
}
