//! The `modelCard` of a bill of materials in CycloneDX, 1.5 and later, in JSON.

use serde_json::{Map, Value};

use super::{Basis, Card, Dataset, MAX_ITEMS, Measured, one, several, take_one, take_several};

/// What a bill of materials says that it is.
const FORMAT: &str = "CycloneDX";
/// The type of a component that has a card.
const MODEL: &str = "machine-learning-model";
/// Components in components.
const MAX_DEPTH: usize = 8;

/// The card of the model that a bill is of, or of the first model in it; `None` when it has no card.
///
/// # Errors
/// What is wrong with the text, when it is no JSON.
pub fn read(text: &str, notes: &mut Vec<String>) -> Result<Option<Card>, String> {
    let bill: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if bill.get("bomFormat").and_then(Value::as_str) != Some(FORMAT) {
        return Ok(None);
    }
    let whole = bill.get("metadata").and_then(|metadata| metadata.get("component"));
    let found = whole.and_then(|component| model(component, 0));
    let found = found.or_else(|| list(&bill, "components").iter().find_map(|component| model(component, 0)));
    Ok(found.map(|component| card(component.clone(), &bill, notes)))
}

/// The component, or the first in it, that is a model with a card.
fn model(component: &Value, depth: usize) -> Option<&Map<String, Value>> {
    let is_model = component.get("type").and_then(Value::as_str) == Some(MODEL);
    if is_model && component.get("modelCard").is_some_and(Value::is_object) {
        return component.as_object();
    }
    let inside = list(component, "components").iter().filter(|_| depth < MAX_DEPTH);
    inside.into_iter().find_map(|component| model(component, depth + 1))
}

fn card(mut component: Map<String, Value>, bill: &Value, notes: &mut Vec<String>) -> Card {
    let mut fields = component.get("modelCard").and_then(Value::as_object).cloned().unwrap_or_default();
    let mut parameters = inner(&mut fields, "modelParameters");
    let mut considerations = inner(&mut fields, "considerations");
    let mut analysis = inner(&mut fields, "quantitativeAnalysis");
    let architectures =
        ["architectureFamily", "modelArchitecture"].map(|key| take_one(&mut parameters, key)).into_iter().flatten();
    let architecture = architectures.collect::<Vec<_>>().join(", ");
    let results = analysis.remove("performanceMetrics").map(|metrics| results(&metrics)).unwrap_or_default();
    let mut card = Card {
        from: Basis::CycloneDx,
        name: take_one(&mut component, "name"),
        version: take_one(&mut component, "version"),
        description: take_one(&mut component, "description"),
        authors: authors(&component),
        licenses: licenses(&component),
        task: take_one(&mut parameters, "task"),
        architecture: Some(architecture).filter(|text| !text.is_empty()),
        datasets: datasets(parameters.get("datasets"), bill),
        results,
        tags: take_several(&mut component, "tags"),
        users: take_several(&mut considerations, "users"),
        use_cases: take_several(&mut considerations, "useCases"),
        limitations: take_several(&mut considerations, "technicalLimitations"),
        ..Card::default()
    };
    for (key, rest) in
        [("modelParameters", parameters), ("considerations", considerations), ("quantitativeAnalysis", analysis)]
    {
        if !rest.is_empty() {
            fields.insert(key.to_owned(), Value::Object(rest));
        }
    }
    card.keep(fields, notes);
    card
}

/// Takes out what a field holds.
fn inner(fields: &mut Map<String, Value>, key: &str) -> Map<String, Value> {
    match fields.remove(key) {
        Some(Value::Object(inner)) => inner,
        Some(other) => {
            fields.insert(key.to_owned(), other);
            Map::new()
        }
        None => Map::new(),
    }
}

/// 1.6 has a list of people; before it was a text. Where neither is, it is whoever publishes it.
fn authors(component: &Map<String, Value>) -> Vec<String> {
    let name = |of: &Value| one(of).or_else(|| one(of.get("name")?)).or_else(|| one(of.get("email")?));
    let people = component.get("authors").and_then(Value::as_array).into_iter().flatten();
    let mut authors: Vec<String> = people.filter_map(name).take(MAX_ITEMS).collect();
    for key in ["author", "manufacturer", "supplier", "publisher"] {
        if authors.is_empty() {
            authors.extend(component.get(key).and_then(name));
        }
    }
    authors
}

fn licenses(component: &Map<String, Value>) -> Vec<String> {
    let license = |choice: &Value| {
        let license = choice.get("license").unwrap_or(choice);
        ["id", "name", "expression"].iter().find_map(|key| one(license.get(key)?))
    };
    let choices = component.get("licenses").and_then(Value::as_array).into_iter().flatten();
    choices.filter_map(license).take(MAX_ITEMS).collect()
}

/// A dataset is described where it is used, or a component of its own.
fn datasets(used: Option<&Value>, bill: &Value) -> Vec<Dataset> {
    let dataset = |used: &Value| {
        let reference = used.get("ref").and_then(Value::as_str);
        let component = reference.and_then(|reference| {
            list(bill, "components").iter().find(|one| one.get("bom-ref").and_then(Value::as_str) == Some(reference))
        });
        let described = component.unwrap_or(used);
        let hash = list(described, "hashes").first();
        let digest = hash.and_then(|hash| Some(format!("{}:{}", one(hash.get("alg")?)?, one(hash.get("content")?)?)));
        let name = described.get("name").and_then(one).or_else(|| reference.map(ToOwned::to_owned));
        Some(Dataset { name: name?, digest, context: used.get("classification").and_then(one) })
    };
    let used = used.and_then(Value::as_array).into_iter().flatten();
    used.filter_map(dataset).take(MAX_ITEMS).collect()
}

fn results(metrics: &Value) -> Vec<Measured> {
    let result = |metric: &Value| {
        Some(Measured {
            metric: metric.get("type").and_then(one)?,
            value: metric.get("value").and_then(one).map_or(Value::Null, Value::String),
            slice: metric.get("slice").map(several).filter(|slices| !slices.is_empty()).map(|all| all.join(", ")),
            ..Measured::default()
        })
    };
    metrics.as_array().into_iter().flatten().filter_map(result).take(MAX_ITEMS).collect()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
