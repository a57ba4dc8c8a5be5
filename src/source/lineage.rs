//! `Lineage`: what a registry knows of a version beyond its files; and `Provenance`: that, and the files themselves.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::Path,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    ModelSignature, RemoteModel, SourceError,
    cache::mirror::{self, Manifest, Stored},
    card::{self, Card},
    digest::{self, Hasher},
    local,
};

/// Bytes that are read of a file at a time.
const CHUNK: usize = 1 << 20;

/// What a registry knows of a version, as far as it does: whom it was made by, from what, and how good it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lineage {
    /// The registry's own name of the version.
    pub version: Option<String>,
    /// Names that pointed at it as of the last look.
    pub aliases: Vec<String>,
    pub stage: Option<String>,
    pub description: Option<String>,
    pub tags: BTreeMap<String, String>,
    /// The run that made it.
    pub run_id: Option<String>,
    pub parameters: BTreeMap<String, String>,
    /// By name; null for what is no finite number.
    pub metrics: BTreeMap<String, Option<f64>>,
    pub datasets: Vec<Dataset>,
    /// The commit of the code that made it; where the files themselves are in git, the commit that they were taken from.
    pub git_commit: Option<String>,
    pub author: Option<String>,
}

/// What a model was made from, or measured with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Dataset {
    pub name: String,
    /// As the registry has it.
    pub digest: Option<String>,
    /// What it was used for: `training`, for instance.
    pub context: Option<String>,
}

/// What a place calls the versions of a model, which may change while their files stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The version that each name points at. No other name points at any.
    pub aliases: BTreeMap<String, String>,
    /// The stages of some versions; of others nothing new is known.
    pub stages: BTreeMap<String, Option<String>>,
    /// The tags of some versions, likewise.
    pub tags: BTreeMap<String, BTreeMap<String, String>>,
}

/// What is known of a version's files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Provenance {
    /// `sha256:` of the files' lines `path NUL sha256 LF`, sorted by path.
    pub digest: String,
    pub files: BTreeMap<String, Stored>,
    /// Where they are from, and the revision they had there; `None` of a folder's own.
    pub origin: Option<(String, String)>,
    pub lineage: Option<Lineage>,
    /// What the files say of the model, else the run that made it.
    pub card: card::Found,
    /// What MLflow has told clients that it takes and gives.
    pub signature: Option<ModelSignature>,
}

impl Names {
    /// Of a place where one name points at what a look shows, and nothing else has a name.
    pub fn of_pointer(name: &str, shown: &RemoteModel) -> Self {
        let pointed = shown.default.iter().map(|version| (name.to_owned(), version.to_string()));
        Self { aliases: pointed.collect(), ..Self::default() }
    }

    /// Writes what `version` is called now into what was known of it. Whether that is something else.
    pub fn renew(&self, version: &str, known: &mut Lineage) -> bool {
        let before = known.clone();
        let pointing = self.aliases.iter().filter(|(_, pointed)| *pointed == version);
        known.aliases = pointing.map(|(name, _)| name.clone()).collect();
        if let Some(stage) = self.stages.get(version) {
            known.stage.clone_from(stage);
        }
        if let Some(tags) = self.tags.get(version) {
            known.tags.clone_from(tags);
        }
        *known != before
    }
}

impl Provenance {
    /// Of the version whose files lie in `files`: what was written down when they were mirrored; of others, what they
    /// are now, for which all of them are read.
    ///
    /// # Errors
    /// When the files cannot be read.
    pub fn of(files: &Path) -> Result<Self, SourceError> {
        let mut found = Self::of_files(files)?;
        found.card = Card::find(files, found.files.keys().map(String::as_str), found.lineage.as_ref());
        match ModelSignature::find(files) {
            Ok(signature) => found.signature = signature,
            Err(reason) => found.card.notes.push(crate::error::abridge(&reason)),
        }
        Ok(found)
    }

    fn of_files(files: &Path) -> Result<Self, SourceError> {
        if let Some(manifest) = mirror::manifest_of(files) {
            let Manifest { uri, revision, digest, files, lineage } = manifest;
            return Ok(Self { digest, files, origin: Some((uri, revision)), lineage, ..Self::default() });
        }
        let mut hashed = BTreeMap::new();
        for (path, file) in local::files_of(files).map_err(|error| SourceError::disk(files, &error))? {
            hashed.insert(path, hash(&file).map_err(|error| SourceError::disk(&file, &error))?);
        }
        let digest = digest::of_artifact(hashed.iter().map(|(path, (sha256, _))| (path.as_str(), sha256)));
        let stored = |(path, (sha256, size)): (String, ([u8; 32], u64))| {
            (path, Stored { sha256: digest::encode(&sha256), size })
        };
        Ok(Self { digest: digest.to_string(), files: hashed.into_iter().map(stored).collect(), ..Self::default() })
    }
}

/// The SHA-256 of a file, and its length.
fn hash(path: &Path) -> io::Result<([u8; 32], u64)> {
    let mut file = File::open(path)?;
    let (mut hasher, mut size) = (Hasher::new(None, 0), 0);
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            read => {
                hasher.update(&chunk[..read]);
                size += read as u64;
            }
        }
    }
    Ok((hasher.finish("").map_err(io::Error::other)?, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folders_own_version_is_hashed_and_its_settings_are_none_of_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("data")).unwrap();
        for (path, text) in [("model.onnx", "graph"), ("data/weights", "w"), ("model.toml", "instances = 1")] {
            std::fs::write(folder.path().join(path), text).unwrap();
        }
        let found = Provenance::of(folder.path()).unwrap();
        let files: Vec<(&str, u64)> = found.files.iter().map(|(path, one)| (path.as_str(), one.size)).collect();
        assert_eq!(files, [("data/weights", 1), ("model.onnx", 5)]);
        // printf 'w' | sha256sum
        assert_eq!(
            found.files["data/weights"].sha256,
            "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"
        );
        assert_eq!((found.origin, found.lineage), (None, None));
        let before = found.digest;
        std::fs::write(folder.path().join("model.onnx"), "other").unwrap();
        assert_ne!(Provenance::of(folder.path()).unwrap().digest, before);
        assert!(Provenance::of(&folder.path().join("gone")).is_err());
    }
}
