//! Loading a version: files to warmed sessions, everything that can fail done before anyone is served.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Batching, golden,
    labels::{self, Labels},
    promised,
    schedule::Schedule,
    service_time::ServiceTime,
    warmup::{self, Sample, Wanted, described::DescribedRequest},
};
use crate::{
    backend::{Backend, Backends, Device, InstanceGroup, Interface, Options, Session, Signature},
    error::{Code, Error, abridge},
    id::{ModelName, Version},
    metrics::VersionMetrics,
    source::{
        ModelSignature,
        card::Card,
        signed::{self, Outcome, Policy, SIGNATURE_FILE, State, Verified},
    },
    tensor::{DType, Data, Tensor},
    text::{self, Front},
};

/// Turns a sample request in the protocol's JSON into tensors; given by the layer that knows JSON.
pub type DecodeSample = fn(&[u8]) -> Result<Vec<Tensor>, Error>;

/// Turns the example of a request that MLflow keeps with a model into tensors, likewise.
pub type DecodeExample = fn(&[u8], &Signature) -> Result<Vec<Tensor>, Error>;

/// The file of that example, in a version's folder.
const EXAMPLE: &str = "serving_input_example.json";

/// How long a version waits for another try whose files changed while they were loaded.
const CHANGED_RETRY: Duration = Duration::from_secs(1);

/// How long a version waits for another try whose signature does not hold for a reason that may pass.
const PASSING_RETRY: Duration = Duration::from_secs(30);

/// What the layer that knows JSON reads for a load.
#[derive(Clone, Copy)]
pub struct Decode {
    pub sample: DecodeSample,
    pub example: DecodeExample,
    pub cases: golden::DecodeCases,
}

/// Copies of one model.
type Sessions = Vec<Box<dyn Session>>;

/// What a version is to be made of.
pub struct Plan {
    pub name: ModelName,
    pub version: Version,
    pub files: PathBuf,
    /// The backend that the author asked for, by name.
    pub backend: Option<String>,
    /// The model's file in `files`, when it is not the backend's usual one.
    pub file_name: Option<String>,
    pub interface: Interface,
    pub options: Options,
    /// Instances in all, or in each group that does not count its own.
    pub instances: usize,
    /// Where instances run; when empty, on the device in `options`.
    pub groups: Vec<InstanceGroup>,
    /// Cores that the operator threads of all instances divide, unless `options` counts the threads.
    pub cores: usize,
    pub max_batch_size: Option<usize>,
    /// `None`: when warm-up proves that it is safe.
    pub batching: Option<bool>,
    pub schedule: Schedule,
    /// Files with the names of classes, by output.
    pub labels: BTreeMap<String, PathBuf>,
    /// Sample requests the author configured; one that fails, fails the load.
    pub configured_samples: Vec<PathBuf>,
    /// Sample requests the author described, and the folder of their files; they count as configured.
    pub described_samples: (Vec<DescribedRequest>, PathBuf),
    /// Folders that may hold sample requests.
    pub sample_folders: Vec<PathBuf>,
    /// Whether the signature that MLflow keeps with a model must be that of the graph.
    pub check_signature: bool,
    /// How raw text is taken, where the model has a tokenizer.
    pub text: text::Settings,
    /// What it must pass before it takes any traffic.
    pub golden: golden::Check,
    /// What the author wants clients to read in the configuration.
    pub parameters: BTreeMap<String, String>,
    /// Whether metrics show what it answers.
    pub predictions: bool,
    /// What operators should know of the model's configuration.
    pub notes: Vec<String>,
    /// What is asked of its signature, before anything else of its files is opened.
    pub signature: signed::Check,
    /// Whether its files lie where nobody but the server writes.
    pub is_mirrored: bool,
    /// Where the outcomes of the checks show.
    pub metrics: Arc<VersionMetrics>,
}

/// A version ready to serve.
pub struct Loaded {
    pub facts: Facts,
    pub sessions: Vec<Box<dyn Session>>,
    pub service: ServiceTime,
}

/// What is known of a version once it is loaded, and never changes.
pub struct Facts {
    pub name: ModelName,
    pub version: Version,
    /// What requests must look like: the graph's signature behind the declared interface.
    pub signature: Signature,
    /// What the author declared of inputs and outputs.
    pub interface: Interface,
    /// Where the instances run, and how many there.
    pub places: Vec<(Device, usize)>,
    pub backend: &'static str,
    pub platform: &'static str,
    /// The file the graph came from.
    pub model_file: String,
    pub batching: Batching,
    /// Rows one request may have, when its author set a limit.
    pub max_batch_size: Option<usize>,
    /// How requests wait, as its author wants them to.
    pub schedule: Schedule,
    pub labels: Labels,
    /// Where the labels came from, by output.
    pub label_files: BTreeMap<String, PathBuf>,
    /// What its author wants clients to read in the configuration.
    pub parameters: BTreeMap<String, String>,
    /// Whether metrics show what it answers.
    pub predictions: bool,
    /// How the graph runs, as far as its settings and the profile say.
    pub options: Options,
    /// How it passed its golden check, if it has one.
    pub golden: Option<golden::Outcome>,
    /// How its signature was found, when anybody looked.
    pub signature_found: Option<Arc<Outcome>>,
    /// How it takes raw text, if it does.
    pub text: Option<Arc<Front>>,
    pub load_duration: Duration,
}

/// Loads, warms, measures and checks; blocks for as long as that takes.
///
/// # Errors
/// What the signature over its files, the backend, the signature that was promised, a configured sample request or the
/// golden check says.
pub fn load(mut plan: Plan, backends: &Backends, decode: Decode) -> Result<Loaded, Error> {
    let start = Instant::now();
    let verified = check_signature(&mut plan)?;
    let (backend, file) = backends.open(&plan.files, plan.backend.as_deref(), plan.file_name.as_deref())?;
    if verified.as_ref().is_some_and(|verified| !verified.covers(&file)) {
        let note = spoil(&plan, &format!("file '{}' is none that can be signed", file.display()))?;
        plan.notes.push(note);
    }
    let places = places(&plan, backend.as_ref())?;
    let sessions = load_sessions(&plan, backend.as_ref(), &file, &places)?;
    let mut notes = Vec::new();
    let (mut sessions, front) = behind_front(&plan, backend.as_ref(), sessions, &mut notes)?;
    plan.notes.append(&mut notes);
    let Some(first) = sessions.first_mut() else {
        return Err(Error::internal(format!("model '{}': the backend gave no session", plan.name)));
    };
    let mut signature = first.signature().clone();
    signature.notes.extend_from_slice(&plan.notes);
    let notes = check_promised(&plan, &signature)?;
    signature.notes.extend(notes);
    if let (Some(true), Some(reason)) = (plan.batching, signature.unbatchable()) {
        return Err(Error::invalid(format!("the model is to be batched, and {reason}")));
    }
    for note in &signature.notes {
        tracing::warn!(model = %plan.name, version = %plan.version, "{note}");
    }
    let labels = labels::read(&plan.labels, &signature).map_err(|error| error.of_model(plan.name.as_str()))?;
    let mut samples = collect_samples(&plan, &signature, decode)?;
    if let Some(front) = &front {
        // Tokens that were made up without the vocabulary are no text to measure.
        let (name, inputs) = ("of made-up tokens".into(), front.sample());
        samples.insert(0, Sample { name, inputs, required: false, runs: 1 });
    }
    let most = if front.is_some() { warmup::MAX_SWEEP_TEXTS } else { warmup::MAX_SWEEP_ROWS };
    let rows_limit = plan.max_batch_size.unwrap_or(most).min(most);
    let wanted = Wanted { batching: plan.batching, limit: rows_limit, sizes: &plan.schedule.preferred_batch_sizes };
    let warmed = warmup::warm(first.as_mut(), &samples, &wanted, plan.name.as_str())?;
    for session in &mut sessions[1..] {
        warmup::rewarm(session.as_mut(), &warmed);
    }
    let golden = check_golden(&plan, &mut sessions, &places, decode.cases)?;
    if verified.is_some_and(|verified| !verified.still_holds(plan.is_mirrored)) {
        let note = spoil(&plan, "the files changed while they were loaded")
            .map_err(|error| Error { retry_after: Some(CHANGED_RETRY), ..error })?;
        tracing::warn!(model = %plan.name, version = %plan.version, "{note}");
        signature.notes.push(note);
    }
    let facts = Facts {
        name: plan.name,
        version: plan.version,
        signature,
        interface: plan.interface,
        places,
        backend: backend.name(),
        platform: backend.platform(),
        model_file: plan.file_name.unwrap_or_else(|| name_of(&file, &plan.files, backend.as_ref())),
        batching: warmed.batching,
        max_batch_size: plan.max_batch_size,
        schedule: plan.schedule,
        labels,
        label_files: plan.labels,
        parameters: plan.parameters,
        predictions: plan.predictions,
        options: plan.options,
        golden,
        signature_found: plan.signature.found().map(Arc::new),
        text: front,
        load_duration: start.elapsed(),
    };
    Ok(Loaded { facts, sessions, service: warmed.service })
}

/// Has the version's signature verified, and its files when it holds; they are returned then.
fn check_signature(plan: &mut Plan) -> Result<Option<Verified>, Error> {
    let start = Instant::now();
    let verified = plan.signature.run(&plan.files, SystemTime::now());
    let Some(found) = plan.signature.found() else { return Ok(None) };
    plan.metrics.signature_checked(found.state.as_str());
    match (&found.signer, found.policy) {
        (Some(signer), _) => tracing::info!(
            model = %plan.name,
            version = %plan.version,
            method = signer.method,
            signer = signer.key.as_ref().or(signer.identity.as_ref()),
            seconds = start.elapsed().as_secs_f64(),
            "signature verified"
        ),
        (None, Policy::Enforce) => {
            let error = refused(plan, found.reason.as_deref().unwrap_or_default());
            return Err(Error { retry_after: found.passes.then_some(PASSING_RETRY), ..error });
        }
        (None, Policy::Warn | Policy::Off) => {
            plan.notes.push(format!("{SIGNATURE_FILE}: {}", found.reason.as_deref().unwrap_or_default()));
        }
    }
    Ok(verified)
}

/// Takes back that a version is verified. Where it is served all the same, returns what operators should know.
fn spoil(plan: &Plan, reason: &str) -> Result<String, Error> {
    plan.signature.spoil(reason);
    plan.metrics.signature_checked(State::Refused.as_str());
    match plan.signature.policy() {
        Policy::Enforce => Err(refused(plan, reason)),
        Policy::Warn | Policy::Off => Ok(format!("{SIGNATURE_FILE}: {reason}")),
    }
}

fn refused(plan: &Plan, reason: &str) -> Error {
    let message = format!("model '{}' version '{}' is refused: {SIGNATURE_FILE}: {reason}", plan.name, plan.version);
    Error::new(Code::Forbidden, message)
}

/// The devices that the plan asks for, and the number of instances on each.
fn places(plan: &Plan, backend: &dyn Backend) -> Result<Vec<(Device, usize)>, Error> {
    if plan.groups.is_empty() {
        return Ok(vec![(plan.options.device, plan.instances)]);
    }
    let mut places: Vec<(Device, usize)> = Vec::new();
    for group in &plan.groups {
        for device in group.devices(backend.gpus())? {
            let count = group.count.unwrap_or(plan.instances);
            match places.iter_mut().find(|(known, _)| *known == device) {
                Some((_, sum)) => *sum += count,
                None => places.push((device, count)),
            }
        }
    }
    Ok(places)
}

/// What the file is called in the folder of its version.
fn name_of(file: &Path, files: &Path, backend: &dyn Backend) -> String {
    let other = backend.other_file_names().iter().find(|name| file == files.join(name));
    (*other.unwrap_or(&backend.file_name())).to_owned()
}

/// Loads every instance behind the declared interface.
fn load_sessions(
    plan: &Plan,
    backend: &dyn Backend,
    file: &Path,
    places: &[(Device, usize)],
) -> Result<Sessions, Error> {
    let instances: usize = places.iter().map(|(_, count)| count).sum();
    let threads = plan.options.intra_op_threads.unwrap_or((plan.cores / instances.max(1)).max(1));
    let mut sessions = Vec::with_capacity(instances);
    for &(device, count) in places {
        let options = Options { device, intra_op_threads: Some(threads), ..plan.options.clone() };
        for session in backend.load(file, &options, count)? {
            sessions.push(plan.interface.before(session)?);
        }
    }
    Ok(sessions)
}

/// Puts the sessions of a model that has a tokenizer behind what takes its texts.
fn behind_front(
    plan: &Plan,
    backend: &dyn Backend,
    mut sessions: Sessions,
    notes: &mut Vec<String>,
) -> Result<(Sessions, Option<Arc<Front>>), Error> {
    let Some(first) = sessions.first_mut().filter(|_| plan.text.enabled != Some(false)) else {
        return Ok((sessions, None));
    };
    let wanted = plan.text.enabled == Some(true) || backend.takes_tokens();
    match Front::open(&plan.files, &plan.text, first.as_mut(), wanted) {
        // Graphs were served as they are before anybody asked for text.
        Err(error) if !wanted => {
            notes.push(format!("it takes no raw text: {error}"));
            Ok((sessions, None))
        }
        Err(error) => Err(error),
        Ok(None) => Ok((sessions, None)),
        Ok(Some(front)) => {
            notes.extend(front.note().map(str::to_owned));
            Ok((sessions.into_iter().map(|session| front.before(session)).collect(), Some(front)))
        }
    }
}

/// What operators should know of the signature that MLflow keeps with the model.
fn check_promised(plan: &Plan, signature: &Signature) -> Result<Vec<String>, Error> {
    if !plan.check_signature {
        return Ok(Vec::new());
    }
    match ModelSignature::find(&plan.files) {
        Ok(None) => Ok(Vec::new()),
        Ok(Some(promised)) => promised::check(&promised, signature, &plan.interface),
        Err(reason) => Ok(vec![format!("MLflow's signature is not checked: {}", abridge(&reason))]),
    }
}

/// Has the first instance on each device pass the golden check, and shows how that went.
fn check_golden(
    plan: &Plan,
    sessions: &mut [Box<dyn Session>],
    places: &[(Device, usize)],
    decode: golden::DecodeCases,
) -> Result<Option<golden::Outcome>, Error> {
    let mut rest = sessions;
    let first_of_each = places.iter().filter_map(|&(device, count)| {
        let (here, others) = std::mem::take(&mut rest).split_at_mut_checked(count)?;
        rest = others;
        Some((device, here.first_mut()?))
    });
    let result = plan.golden.run(plan.name.as_str(), first_of_each, decode);
    match &result {
        Ok(None) => {}
        Ok(Some(outcome)) => {
            plan.metrics.golden_check(true);
            tracing::info!(
                model = %plan.name,
                version = %plan.version,
                cases = outcome.cases,
                labels = outcome.labels,
                accuracy = outcome.accuracy,
                max_difference = outcome.max_difference,
                slowest_seconds = outcome.latency.as_secs_f64(),
                "golden check passed"
            );
        }
        Err(_) => plan.metrics.golden_check(false),
    }
    result
}

/// Configured samples first, then those in the folders, and the example that came with the version. Only a configured one
/// can fail the load, and the example when it can be read and does not run.
fn collect_samples(plan: &Plan, signature: &Signature, decode: Decode) -> Result<Vec<Sample>, Error> {
    let content = |path: &Path| std::fs::read(path).map_err(|error| Error::invalid(error.to_string()));
    let read = |path: &Path| -> Result<Vec<Tensor>, Error> {
        signature.arrange(plan.name.as_str(), (decode.sample)(&content(path)?)?)
    };
    let name = |path: &Path| -> Arc<str> { path.display().to_string().into() };
    let mut samples = Vec::new();
    for path in &plan.configured_samples {
        let inputs =
            read(path).map_err(|error| Error { message: format!("warm-up {}: {error}", path.display()), ..error })?;
        samples.push(Sample { name: name(path), inputs, required: true, runs: 1 });
    }
    let (described, folder) = &plan.described_samples;
    for request in described {
        let inputs = request.build(signature, folder).and_then(|inputs| signature.arrange(plan.name.as_str(), inputs));
        let inputs =
            inputs.map_err(|error| Error { message: format!("warm-up '{}': {error}", request.name), ..error })?;
        samples.push(Sample { name: request.name.as_str().into(), inputs, required: true, runs: request.count });
    }
    for path in plan.sample_folders.iter().flat_map(|folder| json_files(folder)) {
        match read(&path) {
            Ok(inputs) => samples.push(Sample { name: name(&path), inputs, required: false, runs: 1 }),
            Err(error) => {
                tracing::warn!(model = %plan.name, sample = %path.display(), %error, "warm-up sample skipped");
            }
        }
    }
    if let Some(inputs) = text_example(&plan.files, signature) {
        let name = format!("the example of {}", plan.files.display()).into();
        samples.push(Sample { name, inputs: vec![inputs], required: false, runs: 1 });
    }
    let path = plan.files.join(EXAMPLE);
    if path.is_file() {
        let inputs = content(&path).and_then(|body| (decode.example)(&body, signature));
        match inputs.and_then(|inputs| signature.arrange(plan.name.as_str(), inputs)) {
            Ok(inputs) => samples.push(Sample { name: name(&path), inputs, required: true, runs: 1 }),
            // Examples of tables say less than the graph wants to know.
            Err(error) => {
                tracing::warn!(model = %plan.name, sample = %path.display(), %error, "example skipped");
            }
        }
    }
    Ok(samples)
}

/// The example of a README as the input of a graph that takes one text a row and nothing else.
fn text_example(files: &Path, signature: &Signature) -> Option<Tensor> {
    let [spec] = signature.inputs.as_slice() else { return None };
    if spec.dtype != DType::Bytes || spec.shape.iter().any(|size| !matches!(size, -1 | 1)) {
        return None;
    }
    let text = Card::example(files)?;
    let shape = spec.shape.iter().map(|_| 1).collect();
    Tensor::new(spec.name.clone(), spec.dtype, shape, Data::Strings(vec![text.into()])).ok()
}

fn json_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "json") && path.is_file())
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::TensorSpec,
        metrics::Metrics,
        source::signed::tests::{Folder, tick},
    };

    /// Writes a file each time that it loads a model.
    struct Writing {
        file_name: &'static str,
        path: PathBuf,
    }

    struct Copying(Signature);

    impl Backend for Writing {
        fn name(&self) -> &'static str {
            "writing"
        }

        fn file_name(&self) -> &'static str {
            self.file_name
        }

        fn platform(&self) -> &'static str {
            "writing"
        }

        fn gpus(&self) -> usize {
            0
        }

        fn load(&self, _: &Path, _: &Options, _: usize) -> Result<Vec<Box<dyn Session>>, Error> {
            tick();
            std::fs::write(&self.path, "graph").unwrap();
            let spec = |name: &str| TensorSpec { name: name.into(), dtype: DType::Fp32, shape: vec![-1] };
            let signature = Signature { inputs: vec![spec("x")], outputs: vec![spec("y")], ..Signature::default() };
            Ok(vec![Box::new(Copying(signature))])
        }
    }

    impl Session for Copying {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
            Ok(vec![Tensor { name: "y".into(), ..inputs[0].clone() }])
        }
    }

    fn plan(folder: &Folder, signature: signed::Check) -> Plan {
        Plan {
            name: ModelName::parse("m").unwrap(),
            version: Version::parse("1").unwrap(),
            files: folder.files.clone(),
            backend: None,
            file_name: None,
            interface: Interface::default(),
            options: Options::default(),
            instances: 1,
            groups: Vec::new(),
            cores: 1,
            max_batch_size: None,
            batching: Some(false),
            schedule: Schedule::default(),
            labels: BTreeMap::new(),
            configured_samples: Vec::new(),
            described_samples: (Vec::new(), folder.files.clone()),
            sample_folders: Vec::new(),
            text: text::Settings::default(),
            check_signature: false,
            golden: golden::Check {
                settings: golden::Settings::default(),
                folders: [folder.files.clone(), folder.files.clone()],
                stable: None,
            },
            parameters: BTreeMap::new(),
            predictions: false,
            notes: Vec::new(),
            signature,
            is_mirrored: false,
            metrics: Metrics::new("test", "none").version("m", "1"),
        }
    }

    #[test]
    fn what_shows_after_a_version_was_verified_is_treated_as_the_policy_says() {
        let decode = Decode {
            sample: |_| Err(Error::invalid("none")),
            example: |_, _| Err(Error::invalid("none")),
            cases: |_| Err(Error::invalid("none")),
        };
        let cases = [
            ("model.onnx", "model.onnx", "the files changed while they were loaded", Some(CHANGED_RETRY)),
            (".git/model.onnx", "../beside", "is none that can be signed", None),
        ];
        for (file_name, written, expected, retry_after) in cases {
            for policy in [Policy::Warn, Policy::Enforce] {
                let (folder, signature) = Folder::signed(policy);
                folder.write(".git/model.onnx", "graph");
                let backend = Writing { file_name, path: folder.files.join(written) };
                let backends = Backends::new([Arc::new(backend) as Arc<dyn Backend>]);
                let result = load(plan(&folder, signature.clone()), &backends, decode);
                match (policy, result) {
                    (Policy::Enforce, Err(error)) => {
                        assert!(error.message.contains(expected), "{error}");
                        assert_eq!((error.code, error.retry_after), (Code::Forbidden, retry_after));
                    }
                    (Policy::Warn, Ok(loaded)) => {
                        let notes = &loaded.facts.signature.notes;
                        assert!(notes.iter().any(|note| note.contains(expected)), "{notes:?}");
                        assert_eq!(loaded.facts.signature_found.unwrap().state, State::Refused);
                    }
                    (_, result) => panic!("{policy:?}: {:?}", result.err()),
                }
                let found = signature.found().unwrap();
                assert_eq!((found.state, found.signer), (State::Refused, None));
                assert!(found.reason.unwrap().contains(expected));
            }
        }
    }

    #[test]
    fn the_example_of_a_readme_is_for_graphs_of_texts() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("README.md"), "---\nwidget:\n- text: A fine day\n---\n").unwrap();
        let graph = |dtype, shape: &[i64]| {
            let input = TensorSpec { name: "text".into(), dtype, shape: shape.to_vec() };
            Signature { inputs: vec![input], ..Signature::default() }
        };
        let example = |dtype, shape| text_example(folder.path(), &graph(dtype, shape));
        let found = example(DType::Bytes, &[-1, 1]).unwrap();
        assert_eq!((&found.shape[..], &found.data), (&[1, 1][..], &Data::Strings(vec!["A fine day".into()])));
        assert_eq!(example(DType::Bytes, &[-1]).unwrap().shape[..], [1]);
        assert_eq!((example(DType::Bytes, &[-1, 2]), example(DType::Int64, &[-1])), (None, None));
        assert_eq!(text_example(folder.path(), &Signature::default()), None);
    }
}
