//! `ModelSpec`: what one model.toml may say; without one, the graph is the configuration.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{backend::Options, error::Error, id::Version};

/// How instances and threads divide the cores when a model does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// One instance that uses all cores for one batch.
    #[default]
    Latency,
    /// One instance per core, each on one thread.
    Throughput,
}

/// Which of the versions in a repository are served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VersionPolicy {
    /// The so many highest numbers.
    Latest(usize),
    /// Every one.
    All,
    /// These.
    Specific(Vec<String>),
}

impl Default for VersionPolicy {
    fn default() -> Self {
        VersionPolicy::Latest(1)
    }
}

/// The settings of one model, in `model.toml` beside its versions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSpec {
    /// Copies of the model that run side by side. Default: 1, or one per core with `profile = "throughput"`.
    pub instances: Option<usize>,
    /// How instances and threads divide the cores: "latency" or "throughput". Default: the server's.
    pub profile: Option<Profile>,
    /// Rows one request may have; also the largest batch. Default: no limit for requests.
    pub max_batch_size: Option<usize>,
    /// Whether requests share runs: true without proof, false never. Default: when warm-up proves it safe.
    pub batching: Option<bool>,
    /// Which versions are served: { latest = N }, "all", or { specific = ["1", "3"] }.
    pub versions: VersionPolicy,
    /// Sample requests (protocol JSON, relative to the model's folder) to warm up with; a failing one fails the load.
    pub warmup: Vec<PathBuf>,
    /// Files that name an output's classes, one a line: { OUTPUT = "labels.txt" }, relative to the model's folder. A
    /// change of a *.txt file there loads the model anew.
    pub labels: BTreeMap<String, PathBuf>,
    /// How the graph runs.
    pub options: Options,
}

impl ModelSpec {
    /// Reads `path`; the defaults when there is no file.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file and the key.
    pub fn read(path: Option<&Path>) -> Result<Self, Error> {
        let Some(path) = path else { return Ok(Self::default()) };
        let named = |error: String| Error::invalid(format!("{}: {}", path.display(), error.trim()));
        let text = std::fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
        let spec: ModelSpec = toml::from_str(&text).map_err(|error| named(error.to_string()))?;
        spec.validate().map_err(named)?;
        let kept = spec.options.optimized_model.as_ref().map(std::path::absolute).transpose();
        let folder = path.parent().map(std::path::absolute).transpose();
        if let (Ok(Some(kept)), Ok(Some(folder))) = (kept, folder)
            && kept.starts_with(folder)
        {
            // Each load would change the files that it loads.
            return Err(named("options.optimized_model must lie outside the model's folder".to_owned()));
        }
        Ok(spec)
    }

    fn validate(&self) -> Result<(), String> {
        let positive = [
            ("instances", self.instances),
            ("max_batch_size", self.max_batch_size),
            ("options.intra_op_threads", self.options.intra_op_threads),
            ("options.inter_op_threads", self.options.inter_op_threads),
        ];
        if let Some((key, _)) = positive.into_iter().find(|(_, value)| *value == Some(0)) {
            return Err(format!("{key} must be at least 1"));
        }
        match &self.versions {
            VersionPolicy::Latest(0) => Err("versions.latest must be at least 1".to_owned()),
            VersionPolicy::Specific(list) => list
                .iter()
                .find_map(|text| Version::parse(text).err())
                .map_or(Ok(()), |error| Err(format!("versions.specific: {error}"))),
            VersionPolicy::Latest(_) | VersionPolicy::All => Ok(()),
        }
    }

    /// The number of instances on a machine with `cores` cores.
    pub fn instances(&self, server: Profile, cores: usize) -> usize {
        self.instances.unwrap_or(match self.profile.unwrap_or(server) {
            Profile::Latency => 1,
            Profile::Throughput => cores,
        })
    }

    /// The options with the threads per operator filled in: all cores, or one in the throughput profile.
    pub fn resolved_options(&self, server: Profile, cores: usize) -> Options {
        let threads = self.options.intra_op_threads.unwrap_or(match self.profile.unwrap_or(server) {
            Profile::Latency => (cores / self.instances(server, cores)).max(1),
            Profile::Throughput => 1,
        });
        Options { intra_op_threads: Some(threads), ..self.options.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Device;

    fn read(text: &str) -> Result<ModelSpec, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.toml");
        std::fs::write(&path, text).unwrap();
        ModelSpec::read(Some(&path)).map_err(|error| error.message)
    }

    #[test]
    fn a_full_file_is_read() {
        let spec = read(
            "instances = 2\nmax_batch_size = 16\nversions = { latest = 2 }\nwarmup = [\"a.json\"]\n\
             labels = { y = \"y.txt\" }\n\
             [options]\ndevice = \"cuda:1\"\nintra_op_threads = 3\nsession_config = { \"a.b\" = \"1\" }\n",
        )
        .unwrap();
        assert_eq!(spec.options.device, Device::Cuda(1));
        assert_eq!(spec.labels["y"], Path::new("y.txt"));
        assert_eq!(spec.versions, VersionPolicy::Latest(2));
        assert_eq!(read("versions = \"all\"").unwrap().versions, VersionPolicy::All);
        assert_eq!(read("").unwrap(), ModelSpec::default());
    }

    #[test]
    fn mistakes_name_the_key() {
        for (text, word) in [
            ("instance = 2", "instance"),
            ("instances = 0", "instances"),
            ("[options]\ndevice = \"gpu\"", "gpu"),
            ("[options]\nthreads = 1", "threads"),
            ("versions = { latest = 0 }", "versions.latest"),
            ("versions = { specific = [\"a/b\"] }", "a/b"),
            ("instances = \"two\"", "instances"),
        ] {
            let message = read(text).unwrap_err();
            assert!(message.contains(word) && message.contains("model.toml"), "{message}");
        }
    }

    #[test]
    fn a_load_may_not_change_what_it_loads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.toml");
        let read = |kept: &Path| {
            let text = format!("[options]\noptimized_model = \"{}\"", kept.display());
            std::fs::write(&path, text).unwrap();
            ModelSpec::read(Some(&path))
        };
        let inside = read(&folder.path().join("1/optimized.onnx")).unwrap_err();
        assert!(inside.message.contains("options.optimized_model must lie outside"), "{inside}");
        assert!(read(Path::new("/elsewhere/optimized.onnx")).is_ok());
    }

    #[test]
    fn profiles_divide_the_cores() {
        let spec = ModelSpec::default();
        assert_eq!(spec.instances(Profile::Throughput, 8), 8);
        assert_eq!(spec.resolved_options(Profile::Throughput, 8).intra_op_threads, Some(1));
        assert_eq!(spec.resolved_options(Profile::Latency, 8).intra_op_threads, Some(8));
        let two = ModelSpec { instances: Some(2), ..spec };
        assert_eq!(two.resolved_options(Profile::Latency, 8).intra_op_threads, Some(4));
    }
}
