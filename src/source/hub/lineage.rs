//! What the Hub says of a commit beside its files.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::source::lineage::{Dataset, Lineage};

/// Fields of the answer that are tags here.
const TOLD: [(&str, &str); 3] =
    [("pipeline_tag", "pipeline_tag"), ("library_name", "library_name"), ("lastModified", "last_modified")];
/// What tags begin with that name a dataset.
const DATASET: &str = "dataset";
/// What tags without a key go by.
const BARE: &str = "tags";
/// Tags of one repository; none has more than a hundred.
const MAX_TAGS: usize = 1000;

/// What the Hub's answer about a commit says of it, at which `branch` points.
pub fn lineage(about: &Value, commit: &str, branch: Option<&str>) -> Lineage {
    let text = |key: &str| about[key].as_str().filter(|text| !text.is_empty()).map(ToOwned::to_owned);
    let mut tags: BTreeMap<String, String> =
        TOLD.iter().filter_map(|(key, tag)| Some(((*tag).to_owned(), text(key)?))).collect();
    let mut datasets = Vec::new();
    for tag in about["tags"].as_array().into_iter().flatten().filter_map(Value::as_str).take(MAX_TAGS) {
        let (key, value) = tag.split_once(':').unwrap_or((BARE, tag));
        if key == DATASET {
            datasets.push(Dataset { name: value.to_owned(), ..Dataset::default() });
            continue;
        }
        let said = tags.entry(key.to_owned()).or_default();
        if !said.is_empty() {
            said.push_str(", ");
        }
        said.push_str(value);
    }
    Lineage {
        version: Some(commit.to_owned()),
        aliases: branch.map(ToOwned::to_owned).into_iter().collect(),
        tags,
        datasets,
        git_commit: Some(commit.to_owned()),
        author: text("author"),
        ..Lineage::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_hubs_tags_have_keys() {
        let about = json!({
            "id": "acme/tiny", "author": "acme", "sha": "c0ffee", "lastModified": "2026-01-02T03:04:05.000Z",
            "pipeline_tag": "text-classification", "library_name": null, "downloads": 7,
            "tags": ["onnx", "en", "dataset:glue", "license:apache-2.0", "base_model:a/b", "base_model:finetune:a/b", 3],
        });
        let found = lineage(&about, "c0ffee", Some("main"));
        let tags: Vec<_> = found.tags.iter().map(|(key, text)| format!("{key}={text}")).collect();
        let expected = "base_model=a/b, finetune:a/b last_modified=2026-01-02T03:04:05.000Z license=apache-2.0 \
                        pipeline_tag=text-classification tags=onnx, en";
        assert_eq!(tags.join(" "), expected);
        assert_eq!(
            (found.author.as_deref(), found.aliases, found.datasets.len()),
            (Some("acme"), vec!["main".into()], 1)
        );
        assert_eq!(found.version, found.git_commit);
        let bare = lineage(&Value::Null, "c0ffee", None);
        assert_eq!((bare.version.as_deref(), bare.tags.len()), (Some("c0ffee"), 0));
    }
}
