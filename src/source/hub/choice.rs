//! Which files of a repository are fetched, and where they go: what runs, and what it is read with.
//!
//! Repositories hold one model in many formats, each of which may weigh gigabytes; one of them is taken:
//!
//! * **A graph**, when there is any: `model.onnx`, else `onnx/model.onnx`, else the only `*.onnx` that there is. It
//!   becomes the version's `model.onnx`, at the root, where the server looks for it. Its weights come beside it under
//!   their own names, since the graph says what they are called: `model.onnx_data`, `model.onnx.data`, and other
//!   `*.data` of its folder. Other graphs (quantized, half precision) stay at the Hub, and safetensors too.
//! * **Safetensors** otherwise: all of them, where they are.
//!
//! To either belong the small files of the repository: `*.json`, `*.txt`, `*.md`, `*.model` of sentencepiece, and signatures.
//! Everything else, pickles first of all, is left out without a word.

use std::collections::HashSet;

use crate::source::local::{MODEL_FILE, SAMPLES, TRITON_FILE};

/// What the server calls a version's graph.
const GRAPH: &str = "model.onnx";
/// Endings of the small files that belong to every format.
const SMALL: [&str; 5] = [".json", ".txt", ".md", ".model", ".sig"];
/// Names of an error's list.
const NAMED: usize = 5;

/// The files of the version, and their paths below its folder.
///
/// # Errors
/// What is missing, and what there is.
pub fn version<'a>(paths: &[&'a str]) -> Result<Vec<(&'a str, &'a str)>, String> {
    let is_small = |path: &&&str| SMALL.iter().any(|ending| path.ends_with(ending)) && !is_hidden(path);
    let mut files: Vec<_> = paths.iter().filter(is_small).map(|path| (*path, *path)).collect();
    let of_format: Vec<_> = match graph(paths)? {
        Some(graph) => {
            let weights = paths.iter().filter(|path| is_weights_of(graph, path)).map(|path| (*path, split(path).1));
            weights.chain([(graph, GRAPH)]).collect()
        }
        None => paths.iter().filter(|path| path.ends_with(".safetensors")).map(|path| (*path, *path)).collect(),
    };
    if of_format.is_empty() {
        return Err(format!("a file *.onnx or *.safetensors (there {})", listed(paths)));
    }
    // What comes to the root wins over what is there by chance.
    let taken: HashSet<&str> = of_format.iter().map(|(_, to)| *to).collect();
    files.retain(|(_, to)| !taken.contains(to));
    files.extend(of_format);
    Ok(files)
}

/// The model's settings, when the repository has some at its root, and the files that they may name: sample requests,
/// and labels.
pub fn beside<'a>(paths: &[&'a str]) -> Vec<&'a str> {
    let is_settings = |path: &&str| [MODEL_FILE, TRITON_FILE].contains(path);
    if !paths.iter().any(is_settings) {
        return Vec::new();
    }
    let is_named = |path: &str| match path.split_once('/') {
        Some((folder, _)) => folder == SAMPLES,
        None => path.ends_with(".txt"),
    };
    paths.iter().copied().filter(|path| is_settings(path) || is_named(path)).collect()
}

/// The graph among the files; `None` when there is none.
fn graph<'a>(paths: &[&'a str]) -> Result<Option<&'a str>, String> {
    let graphs: Vec<&str> = paths.iter().copied().filter(|path| path.ends_with(".onnx") && !is_hidden(path)).collect();
    let usual = [GRAPH, "onnx/model.onnx"].iter().find_map(|usual| graphs.iter().find(|path| *path == usual));
    match (usual, graphs.as_slice()) {
        (Some(graph), _) | (None, [graph]) => Ok(Some(graph)),
        (None, []) => Ok(None),
        (None, graphs) => Err(format!("{GRAPH} or onnx/{GRAPH} (there {})", listed(graphs))),
    }
}

/// Whether a file may hold weights of the graph: it lies in the same folder, and has no other graph's name.
fn is_weights_of(graph: &str, path: &str) -> bool {
    let ((folder, graph), (place, name)) = (split(graph), split(path));
    if folder != place {
        return false;
    }
    let is_named = name.strip_prefix(graph).is_some_and(|end| end.starts_with("_data") || end.starts_with(".data"));
    is_named || (name.ends_with(".data") && !name.contains(".onnx") && !is_hidden(name))
}

/// A path's folder and its name in there.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn is_hidden(path: &str) -> bool {
    path.split('/').any(|part| part.starts_with('.'))
}

fn listed(paths: &[&str]) -> String {
    let names: Vec<String> = paths.iter().take(NAMED).map(|path| crate::error::shorten(path)).collect();
    match paths.len() {
        0 => "is nothing".to_owned(),
        1 => format!("is {}", names.join(", ")),
        count if count > NAMED => format!("are {} and {} more", names.join(", "), count - NAMED),
        _ => format!("are {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(paths: &[&str]) -> Vec<String> {
        let mut chosen: Vec<String> = version(paths)
            .unwrap()
            .into_iter()
            .map(|(from, to)| if from == to { from.to_owned() } else { format!("{from} as {to}") })
            .collect();
        chosen.sort();
        chosen
    }

    /// As sentence-transformers publish them.
    #[test]
    fn one_graph_is_taken_with_its_weights_and_what_it_is_read_with() {
        let paths = [
            ".gitattributes",
            ".github/labels.json",
            "1_Pooling/config.json",
            "README.md",
            "config.json",
            "model.safetensors",
            "model.sig",
            "onnx/model.onnx",
            "onnx/model.onnx_data",
            "onnx/model_O2.onnx",
            "onnx/model_fp16.onnx",
            "onnx/model_fp16.onnx_data",
            "onnx/weights-of-any-name.data",
            "openvino/openvino_model.bin",
            "other.data",
            "pytorch_model.bin",
            "sentencepiece.bpe.model",
            "tf_model.h5",
            "tokenizer.json",
            "vocab.txt",
        ];
        let expected = [
            "1_Pooling/config.json",
            "README.md",
            "config.json",
            "model.sig",
            "onnx/model.onnx as model.onnx",
            "onnx/model.onnx_data as model.onnx_data",
            "onnx/weights-of-any-name.data as weights-of-any-name.data",
            "sentencepiece.bpe.model",
            "tokenizer.json",
            "vocab.txt",
        ];
        assert_eq!(chosen(&paths), expected);
    }

    #[test]
    fn a_graph_at_the_root_stays_there_and_a_lone_one_becomes_it() {
        assert_eq!(
            chosen(&["model.onnx", "model.onnx.data", "onnx/model.onnx", "onnx/model.onnx.data"]),
            ["model.onnx", "model.onnx.data"]
        );
        assert_eq!(
            chosen(&["onnx/model_int8.onnx", "onnx/model_int8.onnx_data_1", "model.safetensors"]),
            ["onnx/model_int8.onnx as model.onnx", "onnx/model_int8.onnx_data_1 as model_int8.onnx_data_1"]
        );
    }

    #[test]
    fn safetensors_are_taken_when_there_is_no_graph() {
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let paths = [shards[0], shards[1], "model.safetensors.index.json", "pytorch_model.bin"];
        assert_eq!(chosen(&paths), [shards[0], shards[1], "model.safetensors.index.json"]);
    }

    #[test]
    fn what_is_missing_is_said_with_what_there_is() {
        let error = version(&["config.json", "pytorch_model.bin"]).unwrap_err();
        assert_eq!(error, "a file *.onnx or *.safetensors (there are config.json, pytorch_model.bin)");
        assert!(version(&[]).unwrap_err().contains("there is nothing"));
        let error = version(&["onnx/model_fp16.onnx", "onnx/model_int8.onnx"]).unwrap_err();
        assert!(error.starts_with("model.onnx or onnx/model.onnx (there are onnx/model_fp16.onnx"), "{error}");
        let many = ["a.h5", "b.h5", "c.h5", "d.h5", "e.h5", "f.h5", "g.h5"];
        assert!(version(&many).unwrap_err().ends_with("d.h5, e.h5 and 2 more)"));
    }

    #[test]
    fn settings_lie_beside_the_version_with_what_they_name() {
        let paths = ["config.json", "labels.txt", "model.onnx", "onnx/labels.txt", "warmup/a.json"];
        assert!(beside(&paths).is_empty());
        let with_settings = [&paths[..], &["model.toml"]].concat();
        assert_eq!(beside(&with_settings), ["labels.txt", "warmup/a.json", "model.toml"]);
    }

    #[test]
    fn many_files_take_no_longer_than_as_many_times_one() {
        let names: Vec<String> =
            (0..20_000).map(|number| format!("{number}.{}", ["safetensors", "json"][number % 2])).collect();
        let started = std::time::Instant::now();
        assert_eq!(version(&names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap().len(), names.len());
        assert!(started.elapsed() < std::time::Duration::from_secs(1), "{:?}", started.elapsed());
    }
}
