//! Reads `MLmodel`, which says in which forms (flavors) MLflow has saved a model, and which of its files are needed here.

use std::collections::BTreeSet;

use saphyr_parser::{Event, Parser, ScalarStyle};

use crate::source::{RemoteFile, SourceError, cache::is_pickle_name};

/// The file at the root of every model that MLflow has saved.
pub const MLMODEL: &str = "MLmodel";

/// What the backend expects the graph to be called.
const GRAPH: &str = "model.onnx";
const ONNX: &str = "onnx";

/// What `MLmodel` says of the flavors.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Flavors {
    names: BTreeSet<String>,
    /// The graph's file, or the folder that it lies in.
    data: Option<String>,
    /// Texts of the other flavors, among them the paths of their files.
    others: BTreeSet<String>,
}

/// What is around a text in YAML.
enum Around {
    /// With the key whose value comes next.
    Map(Option<String>),
    List,
}

impl Flavors {
    /// # Errors
    /// What is wrong with the text, when it is no YAML or has no flavors.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut flavors = Self::default();
        let mut around: Vec<Around> = Vec::new();
        for event in Parser::new_from_str(text) {
            let (event, _) = event.map_err(|error| error.to_string())?;
            match event {
                Event::Scalar(text, style, ..) => {
                    if let Some(Around::Map(key @ None)) = around.last_mut() {
                        *key = Some(text.into_owned());
                        flavors.note(&around, None);
                    } else {
                        let is_null = style == ScalarStyle::Plain && matches!(&*text, "" | "~" | "null");
                        flavors.note(&around, Some(text.into_owned()).filter(|_| !is_null));
                        end_of_value(&mut around);
                    }
                }
                // What it repeats has been seen.
                Event::Alias(_) => end_of_value(&mut around),
                Event::MappingStart(..) => around.push(Around::Map(None)),
                Event::SequenceStart(..) => around.push(Around::List),
                Event::MappingEnd | Event::SequenceEnd => {
                    around.pop();
                    end_of_value(&mut around);
                }
                _ => {}
            }
        }
        if flavors.names.is_empty() { Err("it has no flavors".to_owned()) } else { Ok(flavors) }
    }

    /// Takes note of the key or the value that stands there.
    fn note(&mut self, around: &[Around], value: Option<String>) {
        let [Around::Map(Some(top)), Around::Map(Some(flavor)), within @ ..] = around else { return };
        if top != "flavors" {
            return;
        }
        self.names.insert(flavor.clone());
        match (flavor.as_str(), within, value) {
            (ONNX, [Around::Map(Some(key))], Some(value)) if key == "data" => self.data = Some(value),
            (ONNX, ..) | (.., None) => {}
            (.., Some(value)) => drop(self.others.insert(value)),
        }
    }

    /// Whether there is a flavor that can be served.
    ///
    /// # Errors
    /// `Refused`, with the flavors that there are.
    pub fn check(&self) -> Result<(), SourceError> {
        if self.names.contains(ONNX) {
            return Ok(());
        }
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        Err(refused(format!("model has flavors {}; Tidegate runs {ONNX}", names.join(", "))))
    }

    /// Those of the model's files that are needed, at the paths where the backend looks for them: what lies in the graph's
    /// folder and below it (weights beside a graph may have any name), less pickles and what other flavors call theirs;
    /// and of the root `MLmodel` and what tells of the model in JSON or words.
    ///
    /// # Errors
    /// `Refused` when the graph is not among the files, or its place is taken.
    pub fn select(&self, files: Vec<RemoteFile>) -> Result<Vec<RemoteFile>, SourceError> {
        let graph = self.graph(&files)?;
        let folder = graph.rfind('/').map_or("", |end| &graph[..=end]).to_owned();
        let is_or_holds = |other: &str, path: &str| {
            path.strip_prefix(other).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let others: BTreeSet<&str> = self
            .others
            .iter()
            .map(|other| other.trim_start_matches("./").trim_end_matches('/'))
            .filter(|other| !other.is_empty() && !is_or_holds(other, &graph))
            .collect();
        // The file itself, or a folder that it lies in.
        let is_of_other = |path: &str| {
            let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
            ends.into_iter().any(|end| others.contains(&path[..end]))
        };
        let mut kept: Vec<RemoteFile> = Vec::new();
        let (mut inside, mut told) = (Vec::new(), Vec::new());
        for file in files {
            if tells_of_model(&file.path) {
                told.push(file);
            } else if file.path.starts_with(&folder) && !is_pickle_name(&file.path) && !is_of_other(&file.path) {
                inside.push(file);
            }
        }
        let mut taken = BTreeSet::new();
        for mut file in inside.into_iter().chain(told) {
            let is_graph = file.path == graph;
            let path = if is_graph { GRAPH } else { file.path.strip_prefix(&folder).unwrap_or(&file.path) };
            if !taken.insert(path.to_owned()) {
                // What lies with the graph goes before what only tells of it.
                if tells_of_model(&file.path) {
                    continue;
                }
                return Err(refused(format!("the graph is '{graph}', and there is another '{GRAPH}'")));
            }
            file.path = path.to_owned();
            kept.push(file);
        }
        Ok(kept)
    }

    /// The graph's path.
    fn graph(&self, files: &[RemoteFile]) -> Result<String, SourceError> {
        let data = self.data.as_deref().unwrap_or(GRAPH).trim_start_matches("./").trim_end_matches('/');
        if files.iter().any(|file| file.path == data) {
            return Ok(data.to_owned());
        }
        let folder = if matches!(data, "" | ".") { String::new() } else { format!("{data}/") };
        let inside = files.iter().filter_map(|file| Some((file, file.path.strip_prefix(&folder)?)));
        let graphs: Vec<_> = inside.filter(|(_, name)| !name.contains('/') && name.ends_with(".onnx")).collect();
        match &graphs[..] {
            [(file, _)] => Ok(file.path.clone()),
            [] => Err(refused(format!("its graph '{data}' is not among the model's files"))),
            several => match several.iter().find(|(_, name)| *name == GRAPH) {
                Some((file, _)) => Ok(file.path.clone()),
                None => Err(refused(format!("there are {} graphs in '{data}', none called '{GRAPH}'", several.len()))),
            },
        }
    }
}

/// After a value comes the next key.
fn end_of_value(around: &mut [Around]) {
    if let Some(Around::Map(key)) = around.last_mut() {
        *key = None;
    }
}

fn tells_of_model(path: &str) -> bool {
    let ends = [".json", ".txt", ".md", ".sig"];
    !path.contains('/') && (path == MLMODEL || ends.iter().any(|end| path.ends_with(end)))
}

fn refused(reason: String) -> SourceError {
    SourceError::Refused { file: MLMODEL.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = r#"
artifact_path: mlflow-artifacts:/1/models/m-1/artifacts
flavors:
  onnx: {code: null, data: model.onnx, providers: [CUDAExecutionProvider, CPUExecutionProvider]}
  python_function:
    data: model.onnx
    env: &env {conda: conda.yaml, virtualenv: python_env.yaml}
    code: code
    other_env: *env
    artifacts:
      encoder: {path: artifacts/encoder.bin, uri: /tmp/encoder.bin}
    loader_module: mlflow.onnx
    python_model: python_model.pkl
metadata:
  flavors: {sklearn: {}}
signature:
  inputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape":
    [-1, 4]}}]'
"#;

    fn file(path: &str) -> RemoteFile {
        RemoteFile { path: path.into(), size: 1, digest: None, location: path.into(), pin: None, likeness: None }
    }

    /// `path` of each that is kept, with `=location` where that is another.
    fn kept(flavors: &Flavors, paths: &[&str]) -> Result<String, String> {
        let kept = flavors.select(paths.iter().copied().map(file).collect()).map_err(|error| error.to_string())?;
        let shown = kept.into_iter().map(|file| match file.path == file.location {
            true => file.path,
            false => format!("{}={}", file.path, file.location),
        });
        Ok(shown.collect::<Vec<_>>().join(" "))
    }

    fn of_onnx(data: &str) -> Flavors {
        Flavors::parse(&format!("flavors:\n  onnx:\n    data: {data}\n")).unwrap()
    }

    #[test]
    fn what_the_graph_needs_is_taken_and_what_other_flavors_have_is_not() {
        let flavors = Flavors::parse(SAVED).unwrap();
        assert_eq!(flavors.check(), Ok(()));
        let paths = [
            "MLmodel",
            "artifacts/encoder.bin",
            "code/train.py",
            "conda.yaml",
            "input_example.json",
            "python_env.yaml",
            "python_model.pkl",
            "requirements.txt",
            "model.onnx",
            "6e79a3ee.data",
            "data/weights",
        ];
        let taken = "model.onnx 6e79a3ee.data data/weights MLmodel input_example.json requirements.txt";
        assert_eq!(kept(&flavors, &paths).unwrap(), taken);
    }

    #[test]
    fn a_graph_of_another_name_or_in_a_folder_takes_its_weights_along() {
        let paths = ["MLmodel", "onnx/graph.onnx", "onnx/w.data", "onnx/a.json", "a.json", "README.md", "x/y"];
        let taken = "model.onnx=onnx/graph.onnx w.data=onnx/w.data a.json=onnx/a.json MLmodel README.md";
        assert_eq!(kept(&of_onnx("onnx/graph.onnx"), &paths).unwrap(), taken);
        assert_eq!(kept(&of_onnx("onnx"), &paths).unwrap(), taken);
        assert_eq!(kept(&of_onnx("g.onnx"), &["g.onnx", "w"]).unwrap(), "model.onnx=g.onnx w");
        assert_eq!(kept(&of_onnx("."), &["g.onnx", "w"]).unwrap(), "model.onnx=g.onnx w");
        assert_eq!(
            kept(&of_onnx("d"), &["d/a.onnx", "d/model.onnx"]).unwrap(),
            "a.onnx=d/a.onnx model.onnx=d/model.onnx"
        );
        let error = kept(&of_onnx("d"), &["d/a.onnx", "d/b.onnx"]).unwrap_err();
        assert!(error.contains("2 graphs in 'd'"), "{error}");
        let error = kept(&of_onnx("g.onnx"), &["g.onnx", "model.onnx"]).unwrap_err();
        assert!(error.contains("the graph is 'g.onnx', and there is another 'model.onnx'"), "{error}");
        let error = kept(&of_onnx("model.onnx"), &["MLmodel"]).unwrap_err();
        assert!(error.contains("its graph 'model.onnx' is not among the model's files"), "{error}");
    }

    #[test]
    fn other_flavors_are_named() {
        let flavors =
            Flavors::parse("flavors:\n  sklearn: {pickled_model: model.pkl}\n  python_function: {}\n").unwrap();
        let said = "file 'MLmodel' is refused: model has flavors python_function, sklearn; Tidegate runs onnx";
        assert_eq!(flavors.check().unwrap_err().to_string(), said);
    }

    #[test]
    fn what_is_no_mlmodel_is_said() {
        for text in ["", "flavors: []", "flavors: {}", "run_id: 1", "<html>", "metadata: {flavors: {onnx: {}}}"] {
            assert_eq!(Flavors::parse(text), Err("it has no flavors".to_owned()), "{text}");
        }
        assert!(Flavors::parse("a: [").is_err());
        assert!(Flavors::parse("flavors: {onnx: 'x").is_err());
        assert!(Flavors::parse(&"[".repeat(100_000)).is_err());
        let deep = (0..20_000).map(|depth| " ".repeat(depth % 50) + "- ").collect::<String>();
        let _ = Flavors::parse(&deep);
    }

    #[test]
    fn many_files_take_no_longer_than_as_many_times_one() {
        let others: String = (0..20_000).map(|number| format!("    a{number}: code/{number}\n")).collect();
        let flavors = Flavors::parse(&format!("flavors:\n  onnx: {{data: model.onnx}}\n  other:\n{others}")).unwrap();
        let names: Vec<String> =
            (0..20_000).flat_map(|number| [format!("data/{number}"), format!("code/{number}/a.txt")]).collect();
        let files = names.iter().map(String::as_str).chain(["model.onnx"]).map(file).collect();
        let started = std::time::Instant::now();
        assert_eq!(flavors.select(files).unwrap().len(), 20_001);
        assert!(started.elapsed() < std::time::Duration::from_secs(1), "{:?}", started.elapsed());
    }
}
