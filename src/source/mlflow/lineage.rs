//! What MLflow knows of a version: its tags and aliases, and the run that made it.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::source::lineage::{Dataset, Lineage, Names};

/// The tags of a run that say where its code is from, and who ran it.
const COMMIT: &str = "mlflow.source.git.commit";
const USER: &str = "mlflow.user";
/// The tag of a dataset that says what it was used for.
const CONTEXT: &str = "mlflow.data.context";

/// A version of a registered model, as far as its lineage goes.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Registered {
    version: String,
    description: String,
    current_stage: String,
    pub run_id: String,
    aliases: Vec<String>,
    tags: Vec<Pair>,
}

/// A registered model, as far as its versions' names go.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Called {
    aliases: Vec<Alias>,
    /// The newest of each stage.
    latest_versions: Vec<Latest>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Alias {
    alias: String,
    version: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Latest {
    version: String,
    #[serde(flatten)]
    named: Named,
}

/// What a version is called.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Named {
    aliases: Vec<String>,
    current_stage: String,
    tags: Vec<Pair>,
}

/// A run.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Run {
    data: Data,
    inputs: Inputs,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Data {
    metrics: Vec<Metric>,
    params: Vec<Pair>,
    tags: Vec<Pair>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Inputs {
    dataset_inputs: Vec<Input>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Input {
    tags: Vec<Pair>,
    dataset: Used,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Used {
    name: String,
    digest: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Pair {
    key: String,
    value: String,
}

/// MLflow writes what is no finite number as a text.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Metric {
    key: String,
    value: Value,
}

/// What is known of a version, and of its run when that is known.
pub fn lineage(version: Registered, run: Option<Run>) -> Lineage {
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    let Run { data, inputs } = run.unwrap_or_default();
    let mut of_run = pairs(data.tags);
    let datasets = inputs.dataset_inputs.into_iter().map(|input| Dataset {
        name: input.dataset.name,
        digest: some(input.dataset.digest),
        context: pairs(input.tags).remove(CONTEXT),
    });
    Lineage {
        version: some(version.version),
        aliases: version.aliases,
        stage: stage(version.current_stage),
        description: some(version.description),
        tags: pairs(version.tags),
        run_id: some(version.run_id),
        parameters: pairs(data.params),
        metrics: data.metrics.into_iter().map(|metric| (metric.key, metric.value.as_f64())).collect(),
        datasets: datasets.collect(),
        git_commit: of_run.remove(COMMIT),
        author: of_run.remove(USER),
    }
}

/// What the versions of a model are called, of which the registry has just pointed at one.
pub fn names(model: Called, pointed: Option<(String, Named)>) -> Names {
    let latest = model.latest_versions.into_iter().map(|latest| (latest.version, latest.named));
    let mut names =
        Names { aliases: model.aliases.into_iter().map(|one| (one.alias, one.version)).collect(), ..Names::default() };
    for (version, named) in latest.chain(pointed) {
        names.stages.insert(version.clone(), stage(named.current_stage));
        names.tags.insert(version, pairs(named.tags));
    }
    names
}

/// MLflow has a stage for what is in none.
fn stage(name: String) -> Option<String> {
    Some(name).filter(|name| !matches!(name.as_str(), "" | "None"))
}

fn pairs(pairs: Vec<Pair>) -> BTreeMap<String, String> {
    pairs.into_iter().map(|pair| (pair.key, pair.value)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_is_read_as_mlflow_has_it() {
        let version = json!({
            "name": "iris-rf", "version": "3", "current_stage": "None", "run_id": "0d1f", "status": "READY",
            "tags": [{ "key": "validation_status", "value": "passed" }], "aliases": ["challenger"],
        });
        let run = json!({
            "info": { "run_id": "0d1f", "status": "FINISHED" },
            "data": {
                "metrics": [
                    { "key": "accuracy", "value": 0.97, "timestamp": 1, "step": 0 },
                    { "key": "loss", "value": "NaN", "timestamp": 1, "step": 0 },
                ],
                "params": [{ "key": "n_estimators", "value": "100" }],
                "tags": [
                    { "key": "mlflow.user", "value": "ada" },
                    { "key": "mlflow.source.git.commit", "value": "c0ffee" },
                ],
            },
            "inputs": { "dataset_inputs": [{
                "tags": [{ "key": "mlflow.data.context", "value": "training" }],
                "dataset": { "name": "iris_train", "digest": "1f1c13b5", "source_type": "local", "source": "{}" },
            }] },
        });
        let found = lineage(serde_json::from_value(version).unwrap(), Some(serde_json::from_value(run).unwrap()));
        assert_eq!(
            serde_json::to_value(found).unwrap(),
            json!({
                "version": "3", "aliases": ["challenger"], "stage": null, "description": null,
                "tags": { "validation_status": "passed" }, "run_id": "0d1f",
                "parameters": { "n_estimators": "100" }, "metrics": { "accuracy": 0.97, "loss": null },
                "datasets": [{ "name": "iris_train", "digest": "1f1c13b5", "context": "training" }],
                "git_commit": "c0ffee", "author": "ada",
            })
        );
        let bare = lineage(serde_json::from_value(json!({ "version": "1" })).unwrap(), None);
        assert_eq!(bare, Lineage { version: Some("1".to_owned()), ..Lineage::default() });
    }
}
