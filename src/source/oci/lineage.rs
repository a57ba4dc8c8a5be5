//! What an artifact's annotations and settings say of the model in it.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::source::lineage::{Dataset, Lineage};

/// What the annotations begin with that the OCI has given a meaning.
const OCI: &str = "org.opencontainers.image.";
/// Fields of ModelPack's descriptor that are tags here, as they are called there.
const DESCRIBED: [&str; 7] = ["name", "family", "title", "vendor", "docURL", "sourceURL", "createdAt"];
/// Fields of ModelPack's settings, likewise.
const SET: [&str; 5] = ["architecture", "format", "paramSize", "precision", "quantization"];

/// What is known of an artifact with these annotations and settings, at which `tag` points.
pub fn lineage(annotations: &BTreeMap<String, String>, config: &Value, tag: Option<&str>) -> Lineage {
    // Images are annotated where they are built, in their settings.
    let mut tags = texts(&config["config"]["Labels"]);
    tags.extend(annotations.clone());
    // A plain `version` may be a label of the image that it was built on.
    let (meant, mut tags): (BTreeMap<_, _>, BTreeMap<_, _>) =
        tags.into_iter().partition(|(key, _)| key.starts_with(OCI));
    tags.extend(meant.into_iter().map(|(key, text)| (key[OCI.len()..].to_owned(), text)));
    let descriptor = &config["descriptor"];
    let mut say = |key: &str, text: Option<String>| {
        if let Some(text) = text {
            tags.entry(key.to_owned()).or_insert(text);
        }
    };
    for (key, from) in [("authors", "authors"), ("licenses", "licenses"), ("version", "version")] {
        say(key, list(&descriptor[from]));
    }
    say("revision", list(&descriptor["revision"]));
    say("description", list(&descriptor["description"]));
    DESCRIBED.iter().for_each(|key| say(key, list(&descriptor[*key])));
    SET.iter().for_each(|key| say(key, list(&config["config"][*key])));
    say("authors", list(&config["author"]));
    say("created", list(&config["created"]));
    let datasets = descriptor["datasetsURL"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Lineage {
        version: tags.remove("version"),
        aliases: tag.map(ToOwned::to_owned).into_iter().collect(),
        description: tags.remove("description"),
        datasets: datasets.map(|url| Dataset { name: url.to_owned(), ..Dataset::default() }).collect(),
        git_commit: tags.remove("revision"),
        author: tags.remove("authors"),
        tags,
        ..Lineage::default()
    }
}

/// The texts of a map.
fn texts(map: &Value) -> BTreeMap<String, String> {
    let texts = map.as_object().into_iter().flatten();
    texts.filter_map(|(key, value)| Some((key.clone(), list(value)?))).collect()
}

/// A text, or several in one; `None` of what is none, or empty.
fn list(value: &Value) -> Option<String> {
    let texts: Vec<&str> = match value {
        Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
        other => other.as_str().into_iter().collect(),
    };
    Some(texts.join(", ")).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn annotations_of_the_oci_have_a_meaning() {
        let annotations = [
            ("org.opencontainers.image.revision", "c0ffee"),
            ("org.opencontainers.image.source", "https://git.example/iris"),
            ("org.opencontainers.image.version", "1.2"),
            ("com.acme.team", "flowers"),
        ];
        let annotations = annotations.map(|(key, text)| (key.to_owned(), text.to_owned())).into();
        // As an image has them.
        let config = json!({
            "created": "2026-01-02T03:04:05Z", "author": "ada", "architecture": "amd64",
            "config": {"Labels": {"org.opencontainers.image.version": "1.1", "maintainer": "eve"}, "Cmd": ["/bin/sh"]},
        });
        let found = lineage(&annotations, &config, Some("latest"));
        let tags = [
            ("com.acme.team", "flowers"),
            ("created", "2026-01-02T03:04:05Z"),
            ("maintainer", "eve"),
            ("source", "https://git.example/iris"),
        ];
        let expected = Lineage {
            version: Some("1.2".into()),
            aliases: vec!["latest".into()],
            git_commit: Some("c0ffee".into()),
            author: Some("ada".into()),
            tags: tags.map(|(key, text)| (key.to_owned(), text.to_owned())).into(),
            ..Lineage::default()
        };
        assert_eq!(found, expected);
        assert_eq!(lineage(&BTreeMap::new(), &json!([]), None), Lineage::default());
    }

    #[test]
    fn labels_without_a_meaning_stand_behind_those_with_one() {
        let annotations = [("org.opencontainers.image.version".to_owned(), "1.2".to_owned())].into();
        let config = json!({"config": {"Labels": {"version": "9.4", "org.opencontainers.image.revision": "c0ffee"}}});
        let found = lineage(&annotations, &config, None);
        assert_eq!((found.version.as_deref(), found.git_commit.as_deref()), (Some("1.2"), Some("c0ffee")));
        let found = lineage(&BTreeMap::new(), &config, None);
        assert_eq!(found.version.as_deref(), Some("9.4"));
    }

    #[test]
    fn a_model_pack_describes_itself() {
        let config = json!({
            "descriptor": {
                "name": "iris", "family": "forest", "version": "3", "revision": "c0ffee", "authors": ["ada", "eve"],
                "licenses": ["Apache-2.0", "MIT"], "description": "Species", "datasetsURL": ["https://data.example/iris"],
                "createdAt": "2026-01-02T03:04:05Z",
            },
            "config": {"architecture": "transformer", "format": "onnx", "precision": "fp32", "capabilities": {}},
            "modelfs": {"type": "layers", "diffIds": []},
        });
        let annotations = [("org.opencontainers.image.version".to_owned(), "4".to_owned())].into();
        let found = lineage(&annotations, &config, None);
        let said = (found.version.as_deref(), found.author.as_deref(), found.git_commit.as_deref());
        assert_eq!(said, (Some("4"), Some("ada, eve"), Some("c0ffee")));
        assert_eq!(
            (found.description.as_deref(), found.datasets[0].name.as_str()),
            (Some("Species"), "https://data.example/iris")
        );
        let tags: Vec<_> = found.tags.iter().map(|(key, text)| format!("{key}={text}")).collect();
        let expected = "architecture=transformer createdAt=2026-01-02T03:04:05Z family=forest format=onnx \
                        licenses=Apache-2.0, MIT name=iris precision=fp32";
        assert_eq!(tags.join(" "), expected);
    }
}
