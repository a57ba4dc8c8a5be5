//! Which files are which model's, in places that hold nothing but files: Triton's layout, or a single model.

use std::collections::BTreeMap;

use super::{
    Look, RemoteFile, RemoteModel, RemoteVersion, digest,
    local::{MODEL_FILE, TRITON_FILE},
    pointer::POINTER_FILE,
};
use crate::{
    error::shorten,
    id::{ModelName, Version},
};

/// Models by name, each with the files of its versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    models: BTreeMap<ModelName, Files>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Files {
    beside: Vec<RemoteFile>,
    versions: BTreeMap<u64, Vec<RemoteFile>>,
}

impl Layout {
    /// Sorts files, whose paths begin at the place's root. They are one model called `single` when versions or settings
    /// lie at the root, and a repository when they lie in folders of it.
    ///
    /// Where there is both, it is a repository: somebody has put a stray file beside the models.
    pub fn of(files: Vec<RemoteFile>, single: &str) -> Self {
        let is_of_repository = |file: &RemoteFile| {
            let mut parts = file.path.split('/');
            let (model, version) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            parts.next().is_some() && number(version).is_some() && number(model).is_none()
        };
        let is_repository = files.iter().any(is_of_repository);
        let is_single = !is_repository
            && files.iter().any(|file| match file.path.split_once('/') {
                None => is_settings(&file.path) || is_graph(&file.path),
                // A folder `1` of a repository is a model with versions in it; that of a model has files.
                Some((first, rest)) => number(first).is_some() && !rest.contains('/'),
            });
        let mut layout = Self::default();
        if is_single {
            layout.add(single, files);
            return layout;
        }
        let mut folders: BTreeMap<String, Vec<RemoteFile>> = BTreeMap::new();
        for file in files {
            // What lies beside the models is none of theirs.
            if let Some((folder, rest)) = file.path.split_once('/') {
                let (folder, rest) = (folder.to_owned(), rest.to_owned());
                folders.entry(folder).or_default().push(RemoteFile { path: rest, ..file });
            }
        }
        folders.into_iter().for_each(|(folder, files)| layout.add(&folder, files));
        layout
    }

    fn add(&mut self, name: &str, files: Vec<RemoteFile>) {
        let name = match ModelName::parse(name) {
            Ok(name) => name,
            Err(error) => {
                tracing::debug!(folder = shorten(name), %error, "folder is no model");
                return;
            }
        };
        let mut model = Files::default();
        for file in files {
            match file.path.split_once('/').and_then(|(first, rest)| Some((number(first)?, rest.to_owned()))) {
                Some((number, path)) => {
                    model.versions.entry(number).or_default().push(RemoteFile { path, ..file });
                }
                // It is ours to write; a place of files has no pointers.
                None if file.path == POINTER_FILE => {}
                None => model.beside.push(file),
            }
        }
        // A graph beside no versions is the only one, and what lies around it is its own.
        if model.versions.is_empty() && model.beside.iter().any(|file| is_graph(&file.path)) {
            let (beside, files) = model.beside.into_iter().partition(|file| is_settings(&file.path));
            model = Files { beside, versions: BTreeMap::from([(1, files)]) };
        }
        let has_settings = model.beside.iter().any(|file| is_settings(&file.path));
        if has_settings || !model.versions.is_empty() {
            self.models.insert(name, model);
        }
    }

    /// What the place holds, without the files of versions.
    pub fn look(&self) -> Look {
        let of_model = |files: &Files| RemoteModel {
            versions: files.versions.iter().filter_map(|(number, files)| shown(*number, files)).collect(),
            default: None,
            beside: files.beside.clone(),
        };
        Look { models: self.models.iter().map(|(name, files)| (name.clone(), of_model(files))).collect() }
    }

    /// The files of a version, as long as it is at the revision that was seen.
    pub fn artifact(&self, model: &ModelName, version: &RemoteVersion) -> Option<&Vec<RemoteFile>> {
        let files = self.models.get(model)?.versions.get(&version.version.number()?)?;
        (revision(files) == version.revision).then_some(files)
    }
}

fn shown(number: u64, files: &[RemoteFile]) -> Option<RemoteVersion> {
    Some(RemoteVersion { version: Version::parse(&number.to_string()).ok()?, revision: revision(files) })
}

/// What stands for the files as they are now.
fn revision(files: &[RemoteFile]) -> String {
    let mut texts: Vec<[String; 3]> = files
        .iter()
        .map(|file| [file.path.clone(), file.size.to_string(), file.pin.clone().unwrap_or_default()])
        .collect();
    texts.sort_unstable();
    digest::of_texts(&texts.iter().flatten().map(String::as_str).collect::<Vec<_>>())
}

/// The number of a version's folder: a plain one, from 1 on.
fn number(folder: &str) -> Option<u64> {
    Version::parse(folder).ok()?.number().filter(|number| *number > 0)
}

fn is_settings(path: &str) -> bool {
    [MODEL_FILE, TRITON_FILE].contains(&path)
}

fn is_graph(path: &str) -> bool {
    !path.contains('/') && path.ends_with(".onnx")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> RemoteFile {
        RemoteFile {
            path: path.into(),
            size: 1,
            digest: None,
            location: path.into(),
            pin: Some("a".into()),
            likeness: None,
        }
    }

    /// `model: beside | version: files`, for each model.
    fn sorted(paths: &[&str]) -> Vec<String> {
        let layout = Layout::of(paths.iter().copied().map(file).collect(), "single");
        let list = |files: &[RemoteFile]| files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>().join(" ");
        let of_model = |(name, files): (&ModelName, &Files)| {
            let versions = files.versions.iter().map(|(number, files)| format!(" | {number}: {}", list(files)));
            format!("{name}: {}{}", list(&files.beside), versions.collect::<String>())
        };
        layout.models.iter().map(of_model).collect()
    }

    #[test]
    fn a_repository_has_models_in_folders() {
        let paths = [
            "README.md",
            "iris/model.toml",
            "iris/warmup/a.json",
            "iris/1/model.onnx",
            "iris/1/data/weights",
            "iris/10/model.onnx",
            "iris/2/model.onnx",
            "iris/01/model.onnx",
            "digits/model.onnx",
            "digits/config.pbtxt",
            "digits/labels.txt",
            "notes/todo.txt",
            "a b/1/model.onnx",
        ];
        let expected = [
            "digits: config.pbtxt | 1: model.onnx labels.txt",
            "iris: model.toml warmup/a.json 01/model.onnx | 1: model.onnx data/weights | 2: model.onnx | 10: model.onnx",
        ];
        assert_eq!(sorted(&paths), expected);
        assert_eq!(sorted(&["7/1/model.onnx"]), ["7:  | 1: model.onnx"]);
        // Strays do not make one model of a repository.
        for stray in ["test.onnx", "model.toml", "7/notes.txt"] {
            assert_eq!(sorted(&["m/1/model.onnx", stray]), ["m:  | 1: model.onnx"], "{stray}");
        }
    }

    #[test]
    fn a_single_model_has_versions_or_a_graph_at_the_root() {
        assert_eq!(sorted(&["1/model.onnx", "model.toml"]), ["single: model.toml | 1: model.onnx"]);
        assert_eq!(sorted(&["model.onnx", "weights.data"]), ["single:  | 1: model.onnx weights.data"]);
        let told = ["m/1/README.md", "m/1/a.cdx.json", "m/1/model.onnx"];
        assert_eq!(sorted(&told), ["m:  | 1: README.md a.cdx.json model.onnx"]);
        assert!(sorted(&[]).is_empty());
    }

    #[test]
    fn a_revision_stands_for_every_file_of_a_version_alone() {
        let paths = ["m/1/model.onnx", "m/2/model.onnx", "m/2/data"];
        let files: Vec<RemoteFile> = paths.iter().copied().map(file).collect();
        let look = |files: &[RemoteFile]| {
            let layout = Layout::of(files.to_vec(), "");
            (layout.clone(), layout.look().models["m"].versions.clone())
        };
        let (layout, before) = look(&files);
        let mut changed = files.clone();
        changed[2].pin = Some("b".into());
        let (newer, after) = look(&changed);
        assert_eq!(before[0], after[0]);
        assert_ne!(before[1], after[1]);
        let model = ModelName::parse("m").unwrap();
        assert_eq!(layout.artifact(&model, &before[1]).unwrap().len(), 2);
        assert_eq!(newer.artifact(&model, &before[1]), None);
        changed.reverse();
        assert_eq!(look(&changed).1, after);
    }
}
