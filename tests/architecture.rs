//! Imports run only downward, and each foreign crate has one home.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// Top-level modules by layer; a module may import only from layers below its own.
const LAYERS: [(u8, &[&str]); 12] = [
    (0, &["error"]),
    (1, &["tensor", "id", "stats", "priority", "heap"]),
    (2, &["metrics", "logging"]),
    (3, &["backend", "source", "rollout"]),
    (4, &["observe", "text"]),
    (5, &["model"]),
    (6, &["engine", "control"]),
    (7, &["api"]),
    (8, &["config"]),
    (9, &["server"]),
    (10, &["cli"]),
    (11, &["main", "lib"]),
];

/// The only places (files, or folders and the file of the same name) that may name a foreign crate.
const HOMES: [(&str, &[&str]); 39] = [
    ("ort", &["backend/onnx"]),
    ("candle_core", &["backend/candle"]),
    ("candle_nn", &["backend/candle"]),
    ("rayon", &["backend/candle"]),
    ("safetensors", &["backend/candle"]),
    ("libc", &["priority", "heap"]),
    ("tokenizers", &["text"]),
    ("half", &["backend/onnx", "backend/candle", "model/warmup", "api/codec", "observe/compare"]),
    ("prost", &["backend/onnx", "api"]),
    ("tonic", &["api"]),
    ("tonic_health", &["api/health"]),
    ("tonic_reflection", &["api/reflection"]),
    ("prost_reflect", &["control/pbtxt", "api/reflection"]),
    ("miette", &["control/pbtxt"]),
    ("base64", &["api", "source/object", "source/oci", "source/signed"]),
    ("twox_hash", &["rollout/route", "source/local"]),
    ("rusqlite", &["control/store"]),
    ("hmac", &["api/hooks"]),
    ("sha2", &["control/store", "source/digest", "api/hooks"]),
    ("md5", &["source/digest"]),
    ("sha1", &["source/digest"]),
    ("object_store", &["source/object"]),
    ("reqwest", &["source"]),
    ("saphyr_parser", &["source/yaml", "source/mlflow/flavor", "source/dvc/pointer"]),
    ("async_trait", &["source"]),
    (
        "tempfile",
        &[
            "control/upload",
            "source/cache",
            "source/oci",
            "backend/onnx/shared",
            "backend/onnx/testing",
            "backend/candle/testing",
        ],
    ),
    ("axum", &["api", "server"]),
    ("hyper_util", &["api/listen", "cli"]),
    ("socket2", &["api/listen"]),
    ("flate2", &["api/compression", "source/oci"]),
    ("ruzstd", &["source/oci"]),
    ("metrics_exporter_prometheus", &["metrics"]),
    ("metrics_process", &["metrics"]),
    ("webpki", &["source/signed"]),
    ("rustls_pki_types", &["source/signed"]),
    ("arc_swap", &["model/catalog"]),
    ("notify", &["server"]),
    ("tracing_subscriber", &["logging"]),
    ("clap", &["cli", "control"]),
];

fn sources() -> BTreeMap<String, String> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { collect(&path, files) } else { files.push(path) }
        }
    }
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let mut files = Vec::new();
    collect(root, &mut files);
    let name = |path: &Path| path.strip_prefix(root).unwrap().with_extension("").to_str().unwrap().to_owned();
    files.retain(|path| !path.components().any(|part| matches!(part.as_os_str().to_str(), Some("tests" | "tests.rs"))));
    files.iter().map(|path| (name(path), code(&std::fs::read_to_string(path).unwrap()))).collect()
}

/// The text without comments and without what follows the first test module.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    text[..end].lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn layer(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(_, modules)| modules.contains(&module)).map(|(layer, _)| *layer)
}

/// Top-level modules that `code` reaches through `crate::…` or `tidegate::…`, also inside braces.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for start in ["crate::", "tidegate::"] {
        for (position, _) in code.match_indices(start) {
            let rest = &code[position + start.len()..];
            if let Some(group) = rest.strip_prefix('{') {
                let mut depth = 1;
                let mut word = String::new();
                for letter in group.chars() {
                    match letter {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        _ => {}
                    }
                    if depth == 0 || (depth == 1 && (letter == ',' || letter == ':')) {
                        found.insert(word.trim().to_owned());
                        word.clear();
                    } else if depth == 1 && letter != '}' {
                        word.push(letter);
                    }
                    if depth == 0 {
                        break;
                    }
                }
            } else {
                found.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
            }
        }
    }
    found.retain(|module| layer(module).is_some());
    found
}

#[test]
fn every_module_has_a_layer() {
    for file in sources().keys() {
        let module = file.split('/').next().unwrap();
        assert!(layer(module).is_some(), "src/{file}.rs: give {module} a layer in tests/architecture.rs");
    }
}

#[test]
fn imports_run_downward() {
    let mut wrong = Vec::new();
    for (file, code) in sources() {
        let module = file.split('/').next().unwrap();
        for import in imports(&code).iter().filter(|import| *import != module) {
            if layer(import) >= layer(module) {
                wrong.push(format!("src/{file}.rs imports {import}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn foreign_crates_have_one_home() {
    let mut wrong = Vec::new();
    for (file, code) in sources() {
        for (name, homes) in HOMES {
            let at_home = homes.iter().any(|home| file == *home || file.starts_with(&format!("{home}/")));
            let named = code.match_indices(&format!("{name}::")).any(|(position, _)| {
                !code[..position].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
                    || (code[..position].ends_with("::")
                        && !code[..position - 2].ends_with(|c: char| c.is_alphanumeric()))
            });
            if named && !at_home {
                wrong.push(format!("src/{file}.rs names {name}, whose home is {homes:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn files_say_what_they_are_for() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    for file in sources().keys() {
        let text = std::fs::read_to_string(format!("{root}/{file}.rs")).unwrap();
        assert!(text.starts_with("//! "), "src/{file}.rs does not begin with a sentence about itself");
    }
}

#[test]
fn imports_are_found() {
    let code = "use crate::{error::Error, model::{catalog::Catalog, load}, tensor};\nlet x = crate::id::shorten(y);";
    let found: Vec<_> = imports(code).into_iter().collect();
    assert_eq!(found, ["error", "id", "model", "tensor"]);
}
