//! The names of a model's classes, read from text files with one name a line.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::file;
use crate::{backend::Signature, error::Error};

/// Names of classes by output; a class's index is its line.
pub type Labels = BTreeMap<Arc<str>, Arc<[Box<str>]>>;

/// Bytes of one file: half a million names, more than any classifier has.
const MAX_BYTES: u64 = 16 << 20;

/// Reads the files that `files` names by output.
///
/// # Errors
/// `InvalidArgument` naming the output that the graph has not, or the file that cannot be used.
pub fn read(files: &BTreeMap<String, PathBuf>, signature: &Signature) -> Result<Labels, Error> {
    files
        .iter()
        .map(|(output, path)| {
            let spec = signature.outputs.iter().find(|spec| *spec.name == **output).ok_or_else(|| {
                let known: Vec<String> = signature.outputs.iter().map(|spec| format!("'{}'", spec.name)).collect();
                Error::invalid(format!(
                    "labels: the model has no output '{output}'; its outputs are {}",
                    known.join(", ")
                ))
            })?;
            let text = read_text(path).map_err(|reason| {
                Error::invalid(format!("labels of output '{output}': {}: {reason}", path.display()))
            })?;
            Ok((spec.name.clone(), text.lines().map(Box::from).collect()))
        })
        .collect()
}

fn read_text(path: &Path) -> Result<String, String> {
    let bytes = file::read(path, MAX_BYTES)?;
    // Every answer must be able to go out as JSON.
    String::from_utf8(bytes).map_err(|error| format!("not UTF-8 after byte {}", error.utf8_error().valid_up_to()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::TensorSpec, tensor::DType};

    fn read_one(output: &str, content: Option<&[u8]>) -> Result<Labels, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("labels.txt");
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let spec = TensorSpec { name: "y".into(), dtype: DType::Fp32, shape: vec![-1, 3] };
        let signature = Signature { outputs: vec![spec], ..Signature::default() };
        read(&BTreeMap::from([(output.to_owned(), path)]), &signature)
    }

    #[test]
    fn a_line_is_a_name() {
        let names = |content: &[u8]| read_one("y", Some(content)).unwrap().remove("y").unwrap().to_vec();
        assert_eq!(names(b"cat\nsea lion\r\n\nd\xc3\xa9".as_slice()), ["cat", "sea lion", "", "dé"].map(Box::from));
        assert_eq!(names(b"").len(), 0);
    }

    #[test]
    fn mistakes_are_named() {
        for (output, content, word) in [
            ("x", Some(b"a".to_vec()), "no output 'x'; its outputs are 'y'"),
            ("y", None, "labels.txt: No such file"),
            ("y", Some(b"ab\xff".to_vec()), "not UTF-8 after byte 2"),
            ("y", Some(vec![b'a'; MAX_BYTES as usize + 1]), "larger than 16777216 bytes"),
        ] {
            let message = read_one(output, content.as_deref()).unwrap_err().message;
            assert!(message.contains(word) && message.contains(&format!("output '{output}'")), "{message}");
        }
        assert_eq!(read_one("y", Some(&vec![b'a'; MAX_BYTES as usize])).unwrap()["y"].len(), 1);
    }
}
