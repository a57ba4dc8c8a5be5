//! Cards as authors write them, from files in a folder.

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// What is found among files with these contents.
fn find(files: &[(&str, &str)], lineage: Option<&Lineage>) -> Found {
    let folder = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    Card::find(folder.path(), files.iter().map(|(path, _)| *path), lineage)
}

/// A card as documents show it, without what it does not say.
fn shown(found: Found) -> Value {
    let mut card = serde_json::to_value(found.card).unwrap();
    if let Value::Object(fields) = &mut card {
        fields.retain(|_, value| !matches!(value, Value::Null) && *value != json!([]) && *value != json!({}));
    }
    card
}

fn of_run() -> Lineage {
    Lineage {
        version: Some("3".into()),
        run_id: Some("0d1f".into()),
        author: Some("ada".into()),
        git_commit: Some("c0ffee".into()),
        parameters: [("trees".to_owned(), "7".to_owned())].into(),
        metrics: [("accuracy".to_owned(), Some(0.97)), ("loss".to_owned(), None)].into(),
        ..Lineage::default()
    }
}

const README: &str = "---
license: other
license_name: acme-open
language: [en, de]
library_name: transformers
pipeline_tag: text-classification
tags:
- onnx
- sentiment
base_model: distilbert/distilbert-base-uncased
datasets:
- glue
model-index:
- name: tiny
  results:
  - task: {type: text-classification, name: Text Classification}
    dataset: {type: glue, name: GLUE SST-2, split: validation}
    metrics:
    - {type: accuracy, value: 0.91, name: Accuracy, verified: true}
    - {type: f1, value: '0.9'}
widget:
- text: What a fine day
inference: false
---
# Tiny
---
not: this
";

#[test]
fn the_front_matter_of_a_readme_is_a_card() {
    let mut found = shown(find(&[("README.md", README), ("model.onnx", "")], Some(&of_run())));
    let extra = found["extra"].take();
    let result = |metric: &str, value: Value| {
        json!({
            "metric": metric, "value": value, "task": "text-classification", "dataset": "GLUE SST-2",
            "slice": "validation",
        })
    };
    assert_eq!(
        found,
        json!({
            "from": "readme", "file": "README.md", "name": "tiny", "licenses": ["acme-open"], "languages": ["en", "de"],
            "library": "transformers", "task": "text-classification", "tags": ["onnx", "sentiment"],
            "base_models": ["distilbert/distilbert-base-uncased"],
            "datasets": [{"name": "glue", "digest": null, "context": null}],
            "results": [result("Accuracy", json!(0.91)), result("f1", json!("0.9"))],
            "extra": null,
        })
    );
    assert_eq!(extra["inference"], json!(false));
    assert_eq!(extra["widget"], json!([{"text": "What a fine day"}]));
    assert_eq!(extra["model-index"][0]["results"][0]["metrics"][0]["verified"], json!(true));
    assert_eq!(extra.as_object().unwrap().len(), 3);
}

#[test]
fn a_readmes_example_is_its_first_text() {
    let folder = tempfile::tempdir().unwrap();
    let example = |readme: &str| {
        std::fs::write(folder.path().join("README.md"), readme).unwrap();
        Card::example(folder.path())
    };
    assert_eq!(example(README).as_deref(), Some("What a fine day"));
    assert_eq!(example("---\nwidget: [{src: a.png}, {text: [a]}, {text: b}]\n---\n").as_deref(), Some("b"));
    assert_eq!((example("---\nwidget: text\n---\n"), example("# Tiny")), (None, None));
}

#[test]
fn a_bill_of_materials_has_the_card_of_its_model() {
    let bill = json!({
        "bomFormat": "CycloneDX", "specVersion": "1.6",
        "metadata": {"component": {"type": "application", "name": "shop"}},
        "components": [
            {"type": "library", "name": "onnx"},
            {"type": "data", "bom-ref": "d1", "name": "iris_train", "hashes": [{"alg": "SHA-256", "content": "ab"}]},
            {"type": "application", "components": [{
                "type": "machine-learning-model", "name": "iris", "version": "3", "description": "Tells species apart",
                "authors": [{"name": "Ada", "email": "ada@acme.example"}], "tags": ["flowers"],
                "licenses": [{"license": {"id": "Apache-2.0"}}, {"expression": "MIT OR BSD-2-Clause"}],
                "modelCard": {
                    "bom-ref": "c",
                    "modelParameters": {
                        "approach": {"type": "supervised"}, "task": "classification",
                        "architectureFamily": "forest", "modelArchitecture": "random forest",
                        "datasets": [{"ref": "d1"}, {"type": "dataset", "name": "more", "classification": "public"}],
                        "inputs": [{"format": "float32"}],
                    },
                    "quantitativeAnalysis": {
                        "performanceMetrics": [{"type": "accuracy", "value": "0.97", "slice": "spring"}],
                        "graphics": {"description": "none"},
                    },
                    "considerations": {
                        "users": ["botanists"], "useCases": ["herbaria"], "technicalLimitations": ["three species"],
                        "ethicalConsiderations": [{"name": "none", "mitigationStrategy": "none"}],
                    },
                },
            }]},
        ],
    });
    let text = bill.to_string();
    let expected = json!({
        "from": "cyclonedx", "file": "iris.cdx.json", "name": "iris", "version": "3",
        "description": "Tells species apart", "authors": ["Ada"], "licenses": ["Apache-2.0", "MIT OR BSD-2-Clause"],
        "task": "classification", "architecture": "forest, random forest", "tags": ["flowers"],
        "datasets": [
            {"name": "iris_train", "digest": "SHA-256:ab", "context": null},
            {"name": "more", "digest": null, "context": "public"},
        ],
        "results": [{"metric": "accuracy", "value": "0.97", "task": null, "dataset": null, "slice": "spring"}],
        "users": ["botanists"], "use_cases": ["herbaria"], "limitations": ["three species"],
        "extra": {
            "bom-ref": "c",
            "modelParameters": {
                "approach": {"type": "supervised"}, "inputs": [{"format": "float32"}],
                "datasets": [{"ref": "d1"}, {"type": "dataset", "name": "more", "classification": "public"}],
            },
            "quantitativeAnalysis": {"graphics": {"description": "none"}},
            "considerations": {"ethicalConsiderations": [{"name": "none", "mitigationStrategy": "none"}]},
        },
    });
    let found = find(&[("bom.json", r#"{"bomFormat": "CycloneDX"}"#), ("iris.cdx.json", &text)], Some(&of_run()));
    assert_eq!((shown(found.clone()), found.notes), (expected, vec![]));
    // What the README says goes before.
    let found = find(&[("bom.json", &text), ("README.md", "---\nlicense: mit\n---\n")], None);
    assert_eq!(found.card.unwrap().from, Basis::Readme);
}

#[test]
fn a_run_makes_a_card_where_there_is_none() {
    let plain = [("README.md", "# Iris\n"), ("docs/README.md", README), ("bom.json", r#"{"spdxVersion": "2.3"}"#)];
    let found = find(&plain, Some(&of_run()));
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    let result = |metric: &str, value: Value| json!({"metric": metric, "value": value, "task": null, "dataset": null, "slice": null});
    assert_eq!(
        shown(found),
        json!({
            "from": "run", "version": "3", "authors": ["ada"], "parameters": {"trees": "7"}, "run_id": "0d1f",
            "git_commit": "c0ffee", "results": [result("accuracy", json!(0.97)), result("loss", Value::Null)],
        })
    );
    assert_eq!(find(&plain, Some(&Lineage::default())), Found::default());
    assert_eq!(find(&[], None), Found::default());
}

#[test]
fn what_is_broken_is_noted_and_stands_in_nobodys_way() {
    let noted = |path: &str, text: &str| {
        let found = find(&[(path, text)], Some(&of_run()));
        assert_eq!(found.card.unwrap().from, Basis::Run);
        found.notes.join("; ")
    };
    assert!(noted("README.md", "---\nlicense: [mit\n---\n").starts_with("README.md: "));
    assert!(noted("README.md", "---\nlicense: mit\n").contains("does not end"));
    assert!(noted("README.md", "---\n- mit\n---\n").contains("expected names and values"));
    assert!(noted("bom.json", "{").starts_with("bom.json: "));
    assert!(noted("a.cdx.json", &format!("\"{}\"", "a".repeat(MAX_BILL as usize))).contains("more than 8388608 bytes"));
    for none in ["", "---\n{}\n---\n", "---", "----\n", "--- \n---\n", "---x\n---\n"] {
        assert_eq!(noted("README.md", none), "", "{none}");
    }
    let folder = tempfile::tempdir().unwrap();
    let found = Card::find(folder.path(), ["README.md"].into_iter(), None);
    assert!(found.notes[0].contains("No such file"), "{:?}", found.notes);
    std::fs::write(folder.path().join("README.md"), b"---\nlicense: mit\n---\nR\xe9sum\xe9\n").unwrap();
    let found = Card::find(folder.path(), ["README.md"].into_iter(), None);
    assert_eq!((found.card.unwrap().licenses, found.notes), (vec!["mit".to_owned()], vec![]));
}

#[test]
fn long_texts_and_much_of_the_rest_are_left_out() {
    let prose = "word ".repeat(400_000);
    let long = format!("\u{feff}---\r\nlicense: MIT\r\nmine: {}\r\ntags: 3\r\n---\r\n{prose}", "x".repeat(MAX_EXTRA));
    let found = find(&[("README.md", &long)], None);
    assert_eq!(found.notes, [format!("'mine' has {} bytes and is not shown", MAX_EXTRA + 6)]);
    let card = found.card.unwrap();
    assert_eq!((card.licenses.as_slice(), card.tags.as_slice()), (&["MIT".to_owned()][..], &["3".to_owned()][..]));
    assert!(card.extra.is_empty());
    let long = format!("---\nlicense: {}\nlanguage: [en, [de]]\n---\n", "x".repeat(MAX_TEXT + 1));
    let card = find(&[("README.md", &long)], None).card.unwrap();
    assert_eq!(card.licenses[0].chars().count(), MAX_TEXT + 1);
    // What is not understood stays as it is.
    assert_eq!((card.languages.len(), &card.extra["language"]), (1, &json!(["en", ["de"]])));
}

#[test]
fn few_of_many_fields_without_room_are_named() {
    let many: String = (0..3000).map(|at| format!("field{at:04}: {}\n", "x".repeat(100))).collect();
    let found = find(&[("README.md", &format!("---\n{many}---\n"))], None);
    let shown = found.card.unwrap().extra.len();
    assert_eq!((found.notes.len(), shown > 500), (MOST_NAMED + 1, true));
    assert_eq!(found.notes[MOST_NAMED], format!("{} more fields are not shown", 3000 - shown - MOST_NAMED));
}

#[test]
fn how_good_it_is_has_no_parts() {
    let metrics = "[{type: a, value: [1, 2]}, {type: b, value: {c: 1}}, {type: d, value: 0.5}, {type: e, value: high}]";
    let text = format!("---\nmodel-index: [{{name: m, results: [{{metrics: {metrics}}}]}}]\n---\n");
    let results = find(&[("README.md", &text)], None).card.unwrap().results;
    let values: Vec<Value> = results.into_iter().map(|result| result.value).collect();
    assert_eq!(values, [Value::Null, Value::Null, json!(0.5), json!("high")]);
}

proptest! {
    /// Authors write what they like.
    #[test]
    fn no_text_is_too_odd(text in r#"([a-z]{0,3}|[-:\[\]{}&*!|>'#",?%@` \n\t~0-9.]){0,60}"#) {
        let mut notes = Vec::new();
        let _ = readme::read(&format!("---\n{text}\n---\n"), &mut notes);
        let _ = cyclonedx::read(&text, &mut notes);
        let _ = crate::source::ModelSignature::parse(&text);
    }
}
