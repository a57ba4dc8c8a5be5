//! Reads the files that hold a model's weights when the model file itself does not.
//!
//! They are read into memory, never mapped, so that whoever overwrites them cannot crash a server that uses them.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    iter,
    path::{Component, Path},
    sync::Arc,
};

use super::graph::{Model, Site, Tensor};
use crate::{error::Error, id::shorten};

/// A file's name exactly as the model spells it, by which ONNX Runtime asks for it, and the file's content.
pub type Weights = (String, Arc<[u8]>);

/// Reads every file that the model's tensors refer to, relative to `directory`.
///
/// # Errors
/// `InvalidArgument` when a file is missing, shorter than the model says, or not below `directory`; the message names
/// the tensor.
pub fn read(model: &Model, directory: &Path) -> Result<Vec<Weights>, Error> {
    let mut files: BTreeMap<&str, Vec<&Tensor>> = BTreeMap::new();
    for (site, tensor) in model.external_tensors() {
        if site == Site::Nested {
            return Err(Error::invalid(format!(
                "tensor '{}': external data is served for the main graph's initializers and constants only; save this \
                 tensor inside the model file",
                shorten(&tensor.name)
            )));
        }
        files.entry(location(tensor)?).or_default().push(tensor);
    }
    files
        .into_iter()
        .map(|(location, tensors)| {
            let path = directory.join(location);
            let content = content(&path).map_err(|error| {
                let name = shorten(&tensors[0].name);
                let message = format!("tensor '{name}': cannot read external data {}: {error}", path.display());
                Error::unread(&error, message)
            })?;
            for tensor in tensors {
                check_length(tensor, &path, content.len())?;
            }
            Ok((location.to_owned(), content))
        })
        .collect()
}

/// Where the tensor's elements lie, provided that it is a relative path that stays below the model's directory.
fn location(tensor: &Tensor) -> Result<&str, Error> {
    let name = shorten(&tensor.name);
    let location = tensor
        .entry("location")
        .filter(|location| !location.is_empty())
        .ok_or_else(|| Error::invalid(format!("tensor '{name}': external data without a location")))?;
    let inside = Path::new(location).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if inside && !location.contains('\0') {
        Ok(location)
    } else {
        Err(Error::invalid(format!(
            "tensor '{name}': external data location '{}' must be a relative path without '..'",
            shorten(location)
        )))
    }
}

fn check_length(tensor: &Tensor, path: &Path, length: usize) -> Result<(), Error> {
    let name = shorten(&tensor.name);
    let number = |key: &str| match tensor.entry(key) {
        None => Ok(0),
        Some(text) => text.parse::<u64>().map_err(|_| {
            Error::invalid(format!("tensor '{name}': external data {key} '{}' is not a number", shorten(text)))
        }),
    };
    let end = number("offset")?.saturating_add(number("length")?);
    if end > length as u64 {
        return Err(Error::invalid(format!(
            "tensor '{name}': external data {} has {length} bytes, the model needs {end}",
            path.display()
        )));
    }
    Ok(())
}

/// The whole file, in memory that sessions can share. Goes around `fs::read`, whose vector would be copied once more.
fn content(path: &Path) -> std::io::Result<Arc<[u8]>> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("not a file"));
    }
    let length = usize::try_from(metadata.len()).map_err(std::io::Error::other)?;
    let mut content: Arc<[u8]> = iter::repeat_n(0, length).collect();
    if let Some(buffer) = Arc::get_mut(&mut content) {
        file.read_exact(buffer)?;
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        backend::onnx::graph::{Attribute, EXTERNAL, Entry, Graph, Node},
        error::Code,
    };

    fn model(entries: &[(&str, &str)]) -> Model {
        let external_data =
            entries.iter().map(|(key, value)| Entry { key: key.to_string(), value: value.to_string() }).collect();
        let tensor = Tensor { name: "w".into(), external_data, data_location: EXTERNAL };
        Model { graph: Some(Graph { initializers: vec![tensor], ..Graph::default() }), functions: Vec::new() }
    }

    #[test]
    fn files_are_found_by_the_name_in_the_model() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("sub")).unwrap();
        fs::write(directory.path().join("sub/w.bin"), [1, 2, 3, 4]).unwrap();
        for location in ["sub/w.bin", "./sub/w.bin"] {
            let model = model(&[("location", location), ("offset", "1"), ("length", "3")]);
            let weights = read(&model, directory.path()).unwrap();
            assert_eq!(weights, [(location.to_owned(), Arc::from([1u8, 2, 3, 4]))]);
        }
        std::os::unix::fs::symlink("sub/w.bin", directory.path().join("link")).unwrap();
        assert!(read(&model(&[("location", "link")]), directory.path()).is_ok());
        assert!(read(&Model::default(), directory.path()).unwrap().is_empty());
    }

    #[test]
    fn nested_tensors_are_refused() {
        let inner = model(&[("location", "w.bin")]).graph;
        let attribute = Attribute { graph: inner, ..Attribute::default() };
        let node = Node { op_type: "If".into(), attributes: vec![attribute] };
        let outer = Graph { nodes: vec![node], ..Graph::default() };
        let model = Model { graph: Some(outer), functions: Vec::new() };
        let error = read(&model, Path::new(".")).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.starts_with("tensor 'w': external data is served for the main graph"), "{error}");
    }

    #[test]
    fn unusable_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("w.bin"), [0; 7]).unwrap();
        let message = |entries: &[(&str, &str)]| {
            let error = read(&model(entries), directory.path()).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument);
            error.message.replace(&directory.path().display().to_string(), "DIR")
        };
        assert_eq!(
            message(&[("location", "w.bin"), ("offset", "4"), ("length", "4")]),
            "tensor 'w': external data DIR/w.bin has 7 bytes, the model needs 8"
        );
        assert_eq!(
            message(&[("location", "no.bin")]),
            "tensor 'w': cannot read external data DIR/no.bin: No such file or directory (os error 2)"
        );
        assert_eq!(message(&[("location", ".")]), "tensor 'w': cannot read external data DIR/.: not a file");
        for bad in ["/etc/passwd", "../w.bin", "sub/../../w.bin"] {
            assert_eq!(
                message(&[("location", bad)]),
                format!("tensor 'w': external data location '{bad}' must be a relative path without '..'")
            );
        }
        assert_eq!(message(&[]), "tensor 'w': external data without a location");
        assert_eq!(
            message(&[("location", "w.bin"), ("offset", "-1")]),
            "tensor 'w': external data offset '-1' is not a number"
        );
        let huge = u64::MAX.to_string();
        assert!(message(&[("location", "w.bin"), ("offset", &huge), ("length", &huge)]).contains("has 7 bytes"));
    }
}
