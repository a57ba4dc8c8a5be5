//! The files of one model that were packed by somebody else: brought to where a version's folder has them.

use std::collections::BTreeSet;

use super::{RemoteFile, cache::is_pickle_name};

/// What a version's folder calls its graph.
const GRAPH: &str = "model.onnx";

/// The files as a version's folder has them: without the folders that all of the model lies in, and with the only graph
/// called `model.onnx`. Beside weights that can be served, what cannot be is left out: programs and pickles.
///
/// # Errors
/// In words, when there is no graph and no weights among them, or several of which none is the model.
pub fn arrange(mut files: Vec<RemoteFile>) -> Result<Vec<RemoteFile>, String> {
    let leaves = |path: &str| path.starts_with('/') || path.split('/').any(|part| part == "..");
    if let Some(file) = files.iter().find(|file| leaves(&file.path)) {
        return Err(format!("the path '{}' leaves the folder", crate::error::abridge(&file.path)));
    }
    let of = |ending: &str| {
        let paths = files.iter().map(|file| file.path.clone()).filter(|path| path.ends_with(ending));
        paths.collect::<Vec<String>>()
    };
    let (graphs, weights) = (of(".onnx"), of(".safetensors"));
    let found = if graphs.is_empty() { &weights } else { &graphs };
    let folder = match found.as_slice() {
        [] => return Err(format!("expected a .onnx or .safetensors file, found: {}", shown(&of("")))),
        found => the_folder(found).ok_or_else(|| format!("expected one model, found: {}", shown(found)))?,
    };
    files.retain(|file| !file.path.ends_with(".py") && !is_pickle_name(&file.path));
    let below = |path: &str| path.strip_prefix(&folder).is_some_and(|rest| !rest.is_empty());
    // What lies with the graph goes before what is around it.
    let inside: BTreeSet<String> =
        files.iter().filter(|file| below(&file.path)).map(|file| file.path[folder.len()..].to_owned()).collect();
    let first = |path: &str| path.split('/').next().unwrap_or_default().to_owned();
    let taken: BTreeSet<String> = inside.iter().map(|path| first(path)).collect();
    files.retain(|file| below(&file.path) || !taken.contains(&first(&file.path)));
    for file in &mut files {
        if below(&file.path) {
            file.path.drain(..folder.len());
        }
    }
    let is_graph = |file: &&mut RemoteFile| file.path.ends_with(".onnx") && !file.path.contains('/');
    let names: Vec<String> = files.iter_mut().filter(is_graph).map(|file| file.path.clone()).collect();
    match names.as_slice() {
        [] => {}
        names if names.iter().any(|name| name == GRAPH) => {}
        [_] => files.iter_mut().filter(is_graph).for_each(|file| file.path = GRAPH.to_owned()),
        names => return Err(format!("expected {GRAPH} or a single .onnx file, found: {}", shown(names))),
    }
    Ok(files)
}

/// The folder that the model lies in, with a slash at its end: the topmost of those with a graph, when there is no other
/// beside it, or the only one that has a graph by the usual name.
fn the_folder(paths: &[String]) -> Option<String> {
    let folder = |path: &String| path[..path.rfind('/').map_or(0, |end| end + 1)].to_owned();
    let only = |mut folders: Vec<String>| {
        folders.sort_unstable_by_key(|folder| (folder.matches('/').count(), folder.clone()));
        folders.dedup();
        let top = folders.first()?.clone();
        folders.iter().all(|folder| folder.starts_with(&top)).then_some(top)
    };
    let usual = |path: &&String| path.rsplit('/').next() == Some(GRAPH);
    only(paths.iter().map(folder).collect()).or_else(|| only(paths.iter().filter(usual).map(folder).collect()))
}

/// Some of them, for people.
fn shown(paths: &[String]) -> String {
    const MOST: usize = 8;
    let mut text: Vec<String> = paths.iter().take(MOST).map(|path| crate::error::shorten(path)).collect();
    if paths.len() > MOST {
        text.push(format!("{} more", paths.len() - MOST));
    }
    if text.is_empty() { "nothing".to_owned() } else { text.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arranged(paths: &[&str]) -> Result<Vec<String>, String> {
        let file = |path: &&str| RemoteFile {
            path: (*path).to_owned(),
            size: 1,
            digest: None,
            location: String::new(),
            pin: None,
            likeness: None,
        };
        arrange(paths.iter().map(file).collect()).map(|files| files.into_iter().map(|file| file.path).collect())
    }

    #[test]
    fn a_graph_comes_to_the_root_with_what_is_its_own() {
        let cases: [(&[&str], &[&str]); 9] = [
            (
                &["config.json", "onnx/config.json", "data", "onnx/data/a", "onnx/model.onnx"],
                &["config.json", "data/a", "model.onnx"],
            ),
            (&["model.onnx", "labels.txt"], &["model.onnx", "labels.txt"]),
            (&["iris.onnx", "iris.data"], &["model.onnx", "iris.data"]),
            (&["models/iris/1/model.onnx", "models/iris/1/a/b"], &["model.onnx", "a/b"]),
            (
                &["README.md", "onnx/model.onnx", "onnx/model.onnx_data"],
                &["README.md", "model.onnx", "model.onnx_data"],
            ),
            (&["model.onnx", "variants/small.onnx"], &["model.onnx", "variants/small.onnx"]),
            (&["a/small.onnx", "b/model.onnx"], &["a/small.onnx", "model.onnx"]),
            (&["m/model.onnx", "m/train.py", "m/a.pkl", "pytorch_model.bin"], &["model.onnx"]),
            (&["bert/model.safetensors", "bert/config.json"], &["model.safetensors", "config.json"]),
        ];
        for (paths, expected) in cases {
            assert_eq!(arranged(paths).unwrap(), expected, "{paths:?}");
        }
    }

    #[test]
    fn no_model_or_several_are_none() {
        let said = |paths: &[&str]| arranged(paths).unwrap_err();
        assert_eq!(said(&[]), "expected a .onnx or .safetensors file, found: nothing");
        assert_eq!(said(&["a.pkl", "b.py"]), "expected a .onnx or .safetensors file, found: a.pkl, b.py");
        assert_eq!(said(&["1/model.onnx", "2/model.onnx"]), "expected one model, found: 1/model.onnx, 2/model.onnx");
        assert_eq!(said(&["../a/model.onnx"]), "the path '../a/model.onnx' leaves the folder");
        assert!(said(&["/models/model.onnx"]).contains("leaves the folder"));
        assert_eq!(said(&["a.onnx", "b.onnx"]), "expected model.onnx or a single .onnx file, found: a.onnx, b.onnx");
        let many: Vec<String> = (0..10).map(|number| format!("{number}.bin")).collect();
        let error = said(&many.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(error.ends_with("6.bin, 7.bin, 2 more"), "{error}");
    }
}
