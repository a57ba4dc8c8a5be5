//! `ModelSpec`: what one model.toml may say; without one, the graph is the configuration.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pbtxt;
use crate::{
    backend::{Declaration, Device, InstanceGroup, Interface, Options},
    error::Error,
    id::{Alias, ModelName, Version},
    model::{catalog::VersionPolicy, golden, schedule::Schedule, warmup::described::DescribedRequest},
    rollout,
    source::{SourceUri, WriteBack, local},
    text,
};

/// The alias that is followed where no other one is named.
const CHAMPION: &str = "champion";

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

/// The settings of one model, in `model.toml` beside its versions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSpec {
    /// The model's name, which is its folder's; another one fails the model.
    pub name: Option<String>,
    /// Where its versions come from, in place of folders beside this file: the URI of a repository or a single model as
    /// `--models` takes it, or a folder, seen from this file. What else lies there beside versions does not count.
    #[schemars(with = "Option<String>")]
    pub source: Option<SourceUri>,
    /// What runs the model: "onnxruntime". Default: what knows the file.
    pub backend: Option<String>,
    /// The model's file in each version's folder. Default: "model.onnx".
    pub file_name: Option<String>,
    /// Copies of the model that run side by side. Default: 1, or one per core with `profile = "throughput"`.
    pub instances: Option<usize>,
    /// Copies by kind of device, in place of `instances` and `options.device`: { count = 2, kind = "auto", "cpu" or
    /// "gpu", gpus = [0] }. On GPUs the count is for each; "auto" is the GPUs when there are any, else the CPU.
    pub instance_group: Vec<InstanceGroup>,
    /// How instances and threads divide the cores: "latency" or "throughput". Default: the server's.
    pub profile: Option<Profile>,
    /// Inputs as clients see them: { name, datatype = "FP32", shape = [-1, 4], reshape = [-1, 2, 2] (as the graph sees
    /// it), optional = false }. What is left out is as in the graph.
    pub inputs: Vec<Declaration>,
    /// Outputs, likewise; when there are any, the model gives only these.
    pub outputs: Vec<Declaration>,
    /// Rows one request may have; also the largest batch. Default: no limit for requests.
    pub max_batch_size: Option<usize>,
    /// Whether requests share runs: true without proof (a graph that cannot be batched then fails), false never.
    /// Default: when warm-up proves it safe.
    pub batching: Option<bool>,
    /// Which versions are served: { latest = N }, "all", or { specific = ["1", "3"] }.
    pub versions: VersionPolicy,
    /// The alias (`tidegate models alias`) whose version is the one to serve as soon as it is set; until then, and of
    /// models whose source has a pointer of its own, it has no effect. Default: "champion".
    #[schemars(with = "Option<String>")]
    pub alias: Option<Alias>,
    /// Sample requests (protocol JSON, relative to the model's folder) to warm up with; a failing one fails the load.
    pub warmup: Vec<PathBuf>,
    /// Described sample requests, which count like those of `warmup`: { name, batch_size, count = 1, inputs.NAME =
    /// { datatype, dims (without the batch), data = "zero", "random" or { file = "in the folder warmup" } } }.
    pub warmup_requests: Vec<DescribedRequest>,
    /// Whether the signature that MLflow keeps with a model must be that of the graph; one that is not fails the load.
    /// Default: true.
    pub check_signature: Option<bool>,
    /// What a version must pass before it takes any traffic.
    pub golden: golden::Settings,
    /// How requests wait for their run.
    pub queue: Schedule,
    /// Files that name an output's classes, one a line: { OUTPUT = "labels.txt" }, relative to the model's folder. A
    /// change of a *.txt file there loads the model anew.
    pub labels: BTreeMap<String, PathBuf>,
    /// Values that clients read in the model's configuration; they have no effect here.
    pub parameters: BTreeMap<String, String>,
    /// How the graph runs.
    pub options: Options,
    /// How raw text is taken, of a model that has a tokenizer: { truncate, max_length, prompt, pooling, normalize }.
    pub text: text::Settings,
    /// Whether metrics show what the model answers: how often each label came (at most 20 for an output, and the rest
    /// together), what winning classes scored, the values of outputs of one number, and how many elements of any output
    /// of floats are NaN or infinite. Labels are shown by their text. What judges a rollout looks at answers in any
    /// case. Default: true.
    pub predictions: Option<bool>,
    /// What becomes of new versions, and how they take over.
    pub rollout: rollout::plan::Settings,
    /// What MLflow's registry is told of the versions, of a model whose `source` is there.
    pub write_back: WriteBack,
    /// What operators should know of the file, such as fields that have no effect here.
    #[serde(skip)]
    pub notes: Vec<String>,
}

impl ModelSpec {
    /// Reads the settings of `model`: one model.toml or config.pbtxt; the defaults when there is neither.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file and the key.
    pub fn read(settings: &[PathBuf], model: &ModelName) -> Result<Self, Error> {
        let path = match settings {
            [] => return Ok(Self::default()),
            [path] => path,
            _ => {
                let names: Vec<_> = settings.iter().map(|path| path.display().to_string()).collect();
                return Err(Error::invalid(format!("{}: keep one of them", names.join(" and "))));
            }
        };
        let named = |error: String| Error::invalid(format!("{}: {}", path.display(), error.trim()));
        let text = std::fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
        let spec = if path.file_name().is_some_and(|name| name == local::TRITON_FILE) {
            pbtxt::parse(&text).map_err(|error| named(error.message))?
        } else {
            Self::from_toml(&text).map_err(named)?
        };
        spec.check_name(model).map_err(named)?;
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

    /// # Errors
    /// When settings that came from elsewhere would have ONNX Runtime write to this machine's disk, or take numbers for
    /// addresses of its memory.
    pub fn checked_for(self, is_mirror: bool) -> Result<Self, Error> {
        let refused =
            |key: &str| Err(Error::invalid(format!("options.{key} is not taken from settings that are mirrored")));
        let options = &self.options;
        if !is_mirror {
            return Ok(self);
        }
        if self.source.is_some() {
            return Err(Error::invalid("source is not taken from settings that are mirrored"));
        }
        if options.optimized_model.is_some() {
            return refused("optimized_model");
        }
        let is_harmless = |key: &&String| {
            ["session.", "optimization.", "mlas."].iter().any(|start| key.starts_with(start))
                && !["file", "path", "folder"].iter().any(|place| key.contains(place))
        };
        if let Some(key) = options.session_config.keys().find(|key| !is_harmless(key)) {
            return refused(&format!("session_config.\"{key}\""));
        }
        if let Some(key) = options.cuda.keys().find(|key| key.contains("external") || key.contains("stream")) {
            return refused(&format!("cuda.\"{key}\""));
        }
        Ok(self)
    }

    /// # Errors
    /// What is wrong, naming the key.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        let spec: ModelSpec = toml::from_str(text).map_err(|error| {
            // The line that it quotes may have a login in it.
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count();
            match text.lines().nth(line) {
                Some(quoted) if quoted.contains('@') => format!("line {}: {}", line + 1, error.message()),
                _ => error.to_string(),
            }
        })?;
        spec.validate().map(|()| spec)
    }

    /// The text of a model.toml that says what is not said by default.
    ///
    /// # Errors
    /// When the spec cannot be put in TOML.
    pub fn to_toml(&self) -> Result<String, String> {
        let table = |spec: &ModelSpec| toml::Table::try_from(spec).map_err(|error| error.to_string());
        let mut said = table(self)?;
        without(&mut said, &table(&Self::default())?);
        toml::to_string_pretty(&said).map_err(|error| error.to_string())
    }

    /// # Errors
    /// When the file is another model's.
    pub(super) fn check_name(&self, model: &ModelName) -> Result<(), String> {
        match &self.name {
            Some(name) if name != model.as_str() => {
                Err(format!("name is '{}', and the model is '{model}'", crate::id::shorten(name)))
            }
            _ => Ok(()),
        }
    }

    /// # Errors
    /// What is wrong, naming the key.
    pub(super) fn validate(&self) -> Result<(), String> {
        if let Some(file) = &self.file_name
            && (!lies_within(Path::new(file)) || Path::new(file).components().count() > 1)
        {
            return Err(format!("file_name '{file}' must be a file in the version's folder"));
        }
        let files = self.labels.values().map(|file| ("labels", file));
        let files = files.chain(self.warmup.iter().map(|file| ("warmup", file)));
        if let Some((key, file)) = { files }.find(|(_, file)| !lies_within(file)) {
            return Err(format!("{key}: '{}' must lie in the model's folder", file.display()));
        }
        let groups = self.instance_group.iter().map(|group| ("instance_group.count", group.count));
        let positive = [
            ("instances", self.instances),
            ("max_batch_size", self.max_batch_size),
            ("options.intra_op_threads", self.options.intra_op_threads),
            ("options.inter_op_threads", self.options.inter_op_threads),
        ];
        if let Some((key, _)) = positive.into_iter().chain(groups).find(|(_, value)| *value == Some(0)) {
            return Err(format!("{key} must be at least 1"));
        }
        if !self.instance_group.is_empty() && (self.instances.is_some() || self.options.device != Device::Cpu) {
            return Err("instance_group stands in place of instances and options.device".to_owned());
        }
        if self.options.memory_arena == Some(false) && self.options.arena_shrinkage.is_some() {
            return Err(
                "options.arena_shrinkage needs the arena that options.memory_arena = false takes away".to_owned()
            );
        }
        self.validate_tensors()?;
        self.warmup_requests
            .iter()
            .try_for_each(|request| request.validate(self.max_batch_size))
            .map_err(|error| format!("warmup_requests: {error}"))?;
        self.golden.validate()?;
        self.queue.validate(self.max_batch_size)?;
        self.rollout.plan().map_err(|error| error.message)?;
        self.write_back.validate("source", self.source.as_ref())?;
        match &self.versions {
            VersionPolicy::Latest(0) => Err("versions.latest must be at least 1".to_owned()),
            VersionPolicy::Specific(list) => list
                .iter()
                .find_map(|text| Version::parse(text).err())
                .map_or(Ok(()), |error| Err(format!("versions.specific: {error}"))),
            VersionPolicy::Latest(_) | VersionPolicy::All => Ok(()),
        }
    }

    fn validate_tensors(&self) -> Result<(), String> {
        for (key, list) in [("inputs", &self.inputs), ("outputs", &self.outputs)] {
            for (index, declared) in list.iter().enumerate() {
                declared.validate().map_err(|error| format!("{key}: {error}"))?;
                if list[..index].iter().any(|other| other.name == declared.name) {
                    return Err(format!("{key}: '{}' is declared twice", declared.name));
                }
            }
        }
        match self.outputs.iter().find(|output| output.optional) {
            Some(output) => Err(format!("outputs: '{}' cannot be optional", output.name)),
            None => Ok(()),
        }
    }

    /// The alias that says which version is the one to serve.
    pub fn followed_alias(&self) -> &str {
        self.alias.as_ref().map_or(CHAMPION, Alias::as_str)
    }

    pub fn interface(&self) -> Interface {
        Interface { inputs: self.inputs.clone(), outputs: self.outputs.clone() }
    }

    /// The number of instances (of each group that does not say its own) on a machine with `cores` cores.
    pub fn instances(&self, server: Profile, cores: usize) -> usize {
        self.instances.unwrap_or(match self.profile.unwrap_or(server) {
            Profile::Latency => 1,
            Profile::Throughput => cores,
        })
    }

    /// The options with the threads per operator filled in where the profile says: one in the throughput profile, else
    /// what all instances leave each other.
    pub fn resolved_options(&self, server: Profile) -> Options {
        let threads = match self.profile.unwrap_or(server) {
            Profile::Latency => self.options.intra_op_threads,
            Profile::Throughput => self.options.intra_op_threads.or(Some(1)),
        };
        Options { intra_op_threads: threads, ..self.options.clone() }
    }
}

/// Whether a path only leads further down.
fn lies_within(path: &Path) -> bool {
    let down = |part: Component<'_>| matches!(part, Component::Normal(_));
    path.components().any(down) && path.components().all(|part| down(part) || part == Component::CurDir)
}

/// Takes out of `said` what is the same in `default`.
fn without(said: &mut toml::Table, default: &toml::Table) {
    for (key, usual) in default {
        match (said.get_mut(key), usual) {
            (Some(value), usual) if value == usual => drop(said.remove(key)),
            (Some(toml::Value::Table(inner)), toml::Value::Table(usual)) => without(inner, usual),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn name() -> ModelName {
        ModelName::parse("m").unwrap()
    }

    fn read(text: &str) -> Result<ModelSpec, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.toml");
        std::fs::write(&path, text).unwrap();
        ModelSpec::read(&[path], &name()).map_err(|error| error.message)
    }

    #[test]
    fn a_full_file_is_read() {
        let spec = read(
            "instances = 2\nmax_batch_size = 16\nversions = { latest = 2 }\nwarmup = [\"a.json\"]\n\
             labels = { y = \"./y.txt\" }\n\
             [queue]\nmax_delay = \"2ms\"\npriority_levels = 2\ndefault_priority = 2\n\
             [queue.priority.1]\nmax_size = 9\n\
             [options]\ndevice = \"cuda:1\"\nintra_op_threads = 3\nsession_config = { \"a.b\" = \"1\" }\n",
        )
        .unwrap();
        assert_eq!(spec.options.device, Device::Cuda(1));
        assert_eq!(spec.labels["y"], Path::new("./y.txt"));
        assert_eq!(spec.versions, VersionPolicy::Latest(2));
        assert_eq!((spec.queue.max_delay, spec.queue.levels()[0].max_size), (Duration::from_millis(2), 9));
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
            ("name = \"other\"", "'other'"),
            ("source = \"ftp://host/m\"", "scheme 'ftp' is not known"),
            ("file_name = \"../x.onnx\"", "../x.onnx"),
            ("file_name = \"a/x.onnx\"", "a/x.onnx"),
            ("labels = { y = \"/etc/passwd\" }", "labels: '/etc/passwd'"),
            ("labels = { y = \"a/../../b.txt\" }", "labels: 'a/../../b.txt'"),
            ("warmup = [\"../a.json\"]", "warmup: '../a.json'"),
            (
                "max_batch_size = 4\n[[warmup_requests]]\nname = \"w\"\nbatch_size = 8\ninputs = {}",
                "warmup_requests: 'w'",
            ),
            ("instances = 2\ninstance_group = [{ kind = \"cpu\" }]", "instance_group"),
            ("instance_group = [{ count = 0 }]", "instance_group.count"),
            ("[options]\nmemory_arena = false\narena_shrinkage = \"cpu:0\"", "options.arena_shrinkage"),
            ("inputs = [{ name = \"x\", datatype = \"FP8\" }]", "FP8"),
            ("inputs = [{ name = \"x\" }, { name = \"x\" }]", "twice"),
            ("outputs = [{ name = \"y\", optional = true }]", "cannot be optional"),
            ("max_batch_size = 4\n[queue]\npreferred_batch_sizes = [8]", "queue.preferred_batch_sizes"),
            ("[queue]\npriority_levels = 2", "queue.default_priority"),
            ("[queue.priority.1]\nmax = 3", "max"),
            ("[golden]\nfile = \"1/golden.json\"", "golden.file '1/golden.json'"),
            ("[write_back]\ntags = true", "expected source to be mlflow://host:5000/name@alias"),
            (
                "source = \"models:/m@a\"\n[write_back]\npromoted_alias = \"v3\"",
                "write_back.promoted_alias 'v3': expected",
            ),
            ("[write_back]\nalias = \"champion\"", "promoted_alias"),
            ("[golden]\nmin_accuracy = 90", "golden.min_accuracy"),
            ("[golden]\nlatency = \"1s\"", "latency"),
        ] {
            let message = read(text).unwrap_err();
            assert!(message.contains(word) && message.contains("model.toml"), "{message}");
        }
    }

    #[test]
    fn a_login_in_a_source_shows_in_no_mistake() {
        for source in ["s3://KEY:SECRET@bucket", "https://ada:SECRET@host/x?y", "https://ada:SECRET@host\\q"] {
            let message = read(&format!("# where\nsource = \"{source}\"")).unwrap_err();
            assert!(message.contains("line 2") && !message.contains("SECRET"), "{message}");
        }
        assert!(read("source = \"https://ada:SECRET@host\"\ninstances = 0").is_err_and(|it| !it.contains("SECRET")));
    }

    #[test]
    fn a_load_may_not_change_what_it_loads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.toml");
        let read = |kept: &Path| {
            let text = format!("[options]\noptimized_model = \"{}\"", kept.display());
            std::fs::write(&path, text).unwrap();
            ModelSpec::read(std::slice::from_ref(&path), &name())
        };
        let inside = read(&folder.path().join("1/optimized.onnx")).unwrap_err();
        assert!(inside.message.contains("options.optimized_model must lie outside"), "{inside}");
        assert!(read(Path::new("/elsewhere/optimized.onnx")).is_ok());
    }

    #[test]
    fn profiles_divide_the_cores() {
        let spec = ModelSpec::default();
        assert_eq!(spec.instances(Profile::Throughput, 8), 8);
        assert_eq!(spec.resolved_options(Profile::Throughput).intra_op_threads, Some(1));
        assert_eq!(spec.resolved_options(Profile::Latency).intra_op_threads, None);
    }

    #[test]
    fn mirrored_settings_reach_neither_the_disk_nor_memory() {
        let checked = |text: &str, is_mirror| ModelSpec::from_toml(text).unwrap().checked_for(is_mirror);
        for key in [
            "optimized_model = \"/etc/x\"",
            "session_config = { \"ep.context_file_path\" = \"/etc/x\" }",
            "session_config = { \"session.model_external_initializers_file_folder_path\" = \"/etc\" }",
            "cuda = { gpu_external_alloc = \"140000\" }",
            "cuda = { user_compute_stream = \"140000\" }",
        ] {
            let text = format!("[options]\n{key}");
            assert!(checked(&text, false).is_ok(), "{key}");
            let error = checked(&text, true).unwrap_err();
            assert!(error.message.contains("is not taken from settings that are mirrored"), "{error}");
        }
        let elsewhere = ModelSpec::from_toml("source = \"s3://bucket/m\"").unwrap();
        assert!(elsewhere.checked_for(true).unwrap_err().message.starts_with("source is not taken"));
        let harmless = "[options]\nsession_config = { \"session.set_denormal_as_zero\" = \"1\" }\ncuda = { gpu_mem_limit = \"1\" }";
        assert!(checked(harmless, true).is_ok());
    }
}
