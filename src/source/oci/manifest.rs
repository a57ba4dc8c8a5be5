//! What a registry says an artifact consists of, and which of it are a model's files.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::unpack::is_below;

/// Platforms as images name this machine's.
const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
/// The folder of an image that its model lies in.
pub const IMAGE_FOLDER: &str = "models";

/// ModelPack's own types, and those of its drafts.
const MODEL_PACK: [&str; 2] = ["application/vnd.cncf.model.", "application/vnd.cnai.model."];
/// What there may be of a model in ModelPack that a server needs.
const MODEL_PARTS: [&str; 3] = ["weight", "weight.config", "doc"];
const MODEL_PATHS: [&str; 2] = ["org.cncf.model.filepath", "org.cnai.model.filepath"];
/// A file's name, as ORAS and others have it.
const TITLE: &str = "org.opencontainers.image.title";
/// Says of a file that it is a packed folder, and so does the type in which ORAS for Python pushes them.
const UNPACK: &str = "io.deis.oras.content.unpack";
const PACKED_FOLDER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const IMAGE_CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// A manifest, or an index of several.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    annotations: Annotations,
}

/// What somebody says of a content; null when nobody says anything.
type Annotations = Option<BTreeMap<String, String>>;

/// Where a content is, and what it is.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    media_type: String,
    pub digest: String,
    /// In bytes.
    pub size: u64,
    artifact_type: Option<String>,
    annotations: Annotations,
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

/// What an artifact's layers are.
#[derive(Debug)]
pub enum Contents<'a> {
    /// A file system, of which `models/` is the model.
    Image(&'a [Descriptor]),
    Files(Vec<(Packing, &'a Descriptor)>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packing {
    /// The file of this path.
    Raw(String),
    /// Files whose paths stand in it, of the folder of this path when it is one.
    Archive(Option<String>),
}

impl Manifest {
    /// # Errors
    /// In words, when it is none.
    pub fn read(json: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(json).map_err(|error| format!("its manifest: {error}"))?;
        match (&manifest.layers, &manifest.manifests) {
            (Some(_), Some(_)) => Err("its manifest is one of an artifact and of several at once".to_owned()),
            (None, None) => Err("its manifest has neither layers nor manifests".to_owned()),
            _ => Ok(manifest),
        }
    }

    /// Of an index, the manifest to use; `None` of what is no index.
    ///
    /// # Errors
    /// In words, when none of it is for this machine.
    pub fn choose(&self) -> Result<Option<&Descriptor>, String> {
        let Some(manifests) = &self.manifests else { return Ok(None) };
        let is_model = |one: &&Descriptor| one.artifact_type.as_ref().is_some_and(|of| model_pack(of).is_some());
        let is_ours = |one: &&Descriptor| {
            one.platform.as_ref().is_some_and(|of| of.os == "linux" && of.architecture == ARCHITECTURE)
        };
        let chosen = manifests.iter().find(is_model).or_else(|| manifests.iter().find(is_ours));
        // What is for any machine says nothing of one.
        let chosen = chosen.or_else(|| match manifests.as_slice() {
            [only] if only.platform.is_none() => Some(only),
            _ => None,
        });
        chosen.map(Some).ok_or_else(|| {
            let platforms = manifests.iter().map(|one| match &one.platform {
                Some(platform) => format!("{}/{}", platform.os, platform.architecture),
                None => one.artifact_type.clone().unwrap_or_else(|| one.media_type.clone()),
            });
            let found = platforms.take(8).collect::<Vec<_>>().join(", ");
            format!("expected a model or an image for linux/{ARCHITECTURE} in its index, found: {found}")
        })
    }

    /// With what is said of it in the index that it was chosen from, and of the index itself.
    pub fn chosen_from(self, index: &Self, chosen: &Descriptor) -> Self {
        let nearest_last = [&index.annotations, &chosen.annotations, &self.annotations];
        let annotations = nearest_last.into_iter().flatten().flat_map(Clone::clone).collect();
        Self { annotations: Some(annotations), ..self }
    }

    /// What is said of it.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.annotations.as_ref().unwrap_or(&NONE)
    }

    /// Where its settings are.
    pub fn config(&self) -> Option<&Descriptor> {
        self.config.as_ref()
    }

    /// What its layers are.
    ///
    /// # Errors
    /// In words, when none of them is a file.
    pub fn contents(&self) -> Result<Contents<'_>, String> {
        let layers = self.layers.as_deref().unwrap_or_default();
        if self.config.as_ref().is_some_and(|config| IMAGE_CONFIGS.contains(&config.media_type.as_str())) {
            return Ok(Contents::Image(layers));
        }
        let mut files = Vec::new();
        for layer in layers {
            let path = MODEL_PATHS.iter().chain(&[TITLE]).find_map(|key| layer.annotation(key));
            let raw = |path: Option<&str>| path.map(|path| Packing::Raw(path.to_owned()));
            let packing = match model_pack(&layer.media_type) {
                Some((part, _)) if !MODEL_PARTS.contains(&part) => continue,
                Some((_, packing)) if packing.starts_with("tar") => Some(Packing::Archive(None)),
                Some((_, "raw")) => raw(path),
                Some(_) => return Err(format!("a layer of the type '{}' is not read here", layer.media_type)),
                // What has no name is for somebody else.
                None if path.is_none() => continue,
                None if layer.is_folder() => Some(Packing::Archive(path.map(ToOwned::to_owned))),
                None => raw(path),
            };
            let packing = packing.ok_or_else(|| format!("a file of the type '{}' has no path", layer.media_type))?;
            files.push((packing, layer));
        }
        if files.is_empty() {
            let mut types: Vec<&str> = layers.iter().map(|layer| layer.media_type.as_str()).take(8).collect();
            types.dedup();
            return Err(format!(
                "expected a ModelPack artifact, files pushed with ORAS, or an image; its layers are of the types: {}",
                types.join(", ")
            ));
        }
        Ok(Contents::Files(files))
    }
}

impl Descriptor {
    fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }

    fn is_folder(&self) -> bool {
        self.media_type == PACKED_FOLDER || self.annotation(UNPACK).is_some_and(|set| set.eq_ignore_ascii_case("true"))
    }
}

/// What part of a model a type of ModelPack's says, and how it is packed.
fn model_pack(media_type: &str) -> Option<(&str, &str)> {
    let rest = MODEL_PACK.iter().find_map(|start| media_type.strip_prefix(start))?;
    // The manifest's own type has neither.
    Some(rest.split_once(".v1.").unwrap_or((rest, "")))
}

/// The path below the folder of an image's model; `None` of the folder itself.
pub fn in_image(path: &str) -> Option<&str> {
    is_below(path, IMAGE_FOLDER).then(|| &path[IMAGE_FOLDER.len() + 1..])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn layer(media_type: &str, annotations: Value) -> Value {
        json!({"mediaType": media_type, "digest": "sha256:00", "size": 1, "annotations": annotations})
    }

    fn files(layers: &[Value]) -> Result<Vec<Packing>, String> {
        let config = layer("application/vnd.oci.empty.v1+json", Value::Null);
        let manifest = Manifest::read(json!({"config": config, "layers": layers}).to_string().as_bytes())?;
        match manifest.contents()? {
            Contents::Files(files) => Ok(files.into_iter().map(|(packing, _)| packing).collect()),
            Contents::Image(_) => Err("an image".to_owned()),
        }
    }

    #[test]
    fn a_model_pack_has_weights_settings_and_documents() {
        let path = |path: &str| json!({"org.cncf.model.filepath": path});
        let layers = [
            layer("application/vnd.cncf.model.weight.v1.raw", path("model.onnx")),
            layer("application/vnd.cnai.model.weight.config.v1.raw", json!({"org.cnai.model.filepath": "config.json"})),
            layer("application/vnd.cncf.model.doc.v1.tar+gzip", path("docs")),
            layer("application/vnd.cncf.model.code.v1.raw", path("train.py")),
            layer("application/vnd.cncf.model.dataset.v1.tar", path("data")),
        ];
        let raw = |path: &str| Packing::Raw(path.to_owned());
        assert_eq!(files(&layers).unwrap(), [raw("model.onnx"), raw("config.json"), Packing::Archive(None)]);
        let error = files(&[layer("application/vnd.cncf.model.weight.v1.raw", Value::Null)]).unwrap_err();
        assert!(error.contains("has no path"), "{error}");
        let error = files(&[layer("application/vnd.cncf.model.weight.v1.squashfs", path("a"))]).unwrap_err();
        assert!(error.contains("weight.v1.squashfs' is not read here"), "{error}");
    }

    #[test]
    fn other_artifacts_have_files_with_titles() {
        let layers = [
            layer("application/vnd.oci.image.layer.v1.tar", json!({TITLE: "model.onnx"})),
            layer("application/vnd.oci.image.layer.v1.tar+gzip", json!({TITLE: "data"})),
            layer("application/vnd.acme.folder", json!({TITLE: "more", UNPACK: "True"})),
            layer("application/vnd.dev.cosign.simplesigning.v1+json", Value::Null),
        ];
        let folder = |path: &str| Packing::Archive(Some(path.to_owned()));
        assert_eq!(files(&layers).unwrap(), [Packing::Raw("model.onnx".to_owned()), folder("data"), folder("more")]);
        let error = files(&layers[3..]).unwrap_err();
        assert!(error.ends_with("types: application/vnd.dev.cosign.simplesigning.v1+json"), "{error}");
    }

    #[test]
    fn an_image_is_known_by_its_settings() {
        for media_type in IMAGE_CONFIGS {
            let json = json!({"config": layer(media_type, Value::Null), "layers": [layer("a", json!({TITLE: "a"}))]});
            let manifest = Manifest::read(json.to_string().as_bytes()).unwrap();
            assert!(matches!(manifest.contents().unwrap(), Contents::Image([_])));
        }
    }

    #[test]
    fn of_an_index_this_machine_s_is_chosen() {
        let one = |digest: &str, more: Value| {
            let mut one = json!({"mediaType": "m", "digest": digest, "size": 1});
            one.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            one
        };
        let choose = |manifests: &[Value]| {
            let manifest = Manifest::read(json!({ "manifests": manifests }).to_string().as_bytes()).unwrap();
            manifest.choose().map(|chosen| chosen.unwrap().digest.clone())
        };
        let on = |architecture: &str| json!({"platform": {"os": "linux", "architecture": architecture}});
        let (other, ours) = (one("other", on("s390x")), one("ours", on(ARCHITECTURE)));
        let model = one("model", json!({"artifactType": "application/vnd.cncf.model.manifest.v1+json"}));
        assert_eq!(choose(&[other.clone(), ours.clone()]).unwrap(), "ours");
        assert_eq!(choose(&[other.clone(), ours, model]).unwrap(), "model");
        assert_eq!(choose(&[one("only", json!({}))]).unwrap(), "only");
        assert!(choose(&[other]).unwrap_err().ends_with("found: linux/s390x"));
        for wrong in ["{}", "[]", r#"{"layers": [], "manifests": []}"#, r#"{"layers": [{"digest": "a", "size": -1}]}"#]
        {
            assert!(Manifest::read(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
