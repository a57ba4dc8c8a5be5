//! What the backend does with models, whole and broken.

use std::collections::BTreeMap;
use std::fs;

use bytes::Bytes;

use super::*;
use crate::tensor::Data;

fn load(directory: &Path, options: &Options) -> Result<Box<dyn Session>, Error> {
    testing::runtime().load(&directory.join(FILE_NAME), options, 1).map(|mut sessions| sessions.remove(0))
}

/// The message with which loading fails, without the path of the model file.
fn refusal(directory: &Path, options: &Options) -> (Code, String) {
    let error = load(directory, options).err().unwrap();
    let prefix = format!("{}: ", directory.join(FILE_NAME).display());
    let message = error.message.strip_prefix(&prefix).unwrap_or_else(|| panic!("no file named: {error}"));
    (error.code, message.replace(&directory.display().to_string(), "DIR"))
}

fn floats(name: &str, shape: &[usize], elements: &[f32]) -> Tensor {
    let bytes = Bytes::copy_from_slice(bytemuck::cast_slice(elements));
    Tensor::new(name.into(), DType::Fp32, shape.into(), Data::Plain(bytes)).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let Data::Plain(bytes) = &tensor.data else { panic!("strings") };
    bytes.chunks(4).map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap())).collect()
}

#[test]
fn a_shipped_model_classifies() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/iris/1");
    let mut session = load(&directory, &Options::default()).unwrap();
    let signature = session.signature();
    assert_eq!(signature.inputs, [TensorSpec { name: "X".into(), dtype: DType::Fp32, shape: vec![-1, 4] }]);
    assert_eq!(
        signature.outputs,
        [
            TensorSpec { name: "label".into(), dtype: DType::Int64, shape: vec![-1] },
            TensorSpec { name: "probabilities".into(), dtype: DType::Fp32, shape: vec![-1, 3] },
        ]
    );
    assert_eq!(signature.notes, Vec::<String>::new());
    let outputs = session.run(&[floats("X", &[2, 4], &[5.1, 3.5, 1.4, 0.2, 6.7, 3.0, 5.2, 2.3])]).unwrap();
    assert_eq!(outputs[0].data, Data::Plain([0i64, 2].iter().flat_map(|label| label.to_le_bytes()).collect()));
    assert_eq!(&outputs[1].shape[..], [2, 3]);
    let sum: f32 = values(&outputs[1]).iter().sum();
    assert!((sum - 2.0).abs() < 1e-5, "{sum}");
}

#[test]
fn files_may_change_once_a_model_is_loaded() {
    let width = 50_000;
    let directory = testing::directory(testing::add_external(width as i64, "./weights.bin", 8));
    let weights: Vec<f32> = (0..width).map(|i| i as f32).collect();
    let file = directory.path().join("weights.bin");
    fs::write(&file, [&[7u8; 8], bytemuck::cast_slice::<f32, u8>(&weights)].concat()).unwrap();

    let options = Options { share_prepacked_weights: Some(true), ..Options::default() };
    let mut sessions = testing::runtime().load(&directory.path().join(FILE_NAME), &options, 2).unwrap();
    fs::write(&file, "").unwrap();
    fs::write(directory.path().join(FILE_NAME), "garbage").unwrap();
    // Memory that the loader gave back, if it gave back too much, is overwritten.
    let noise: Vec<Vec<u8>> = (0..64).map(|i| vec![0xff; width * 4 + 8 + i]).collect();
    for session in &mut sessions {
        let outputs = session.run(&[floats("x", &[1, width], &vec![1.0; width])]).unwrap();
        let expected: Vec<f32> = weights.iter().map(|weight| weight + 1.0).collect();
        assert_eq!(values(&outputs[0]), expected);
    }
    drop(noise);
}

/// `y = tanh(x · w)` over rows of `width` floats, often enough to have `layers` matrices.
fn products(width: usize, layers: usize) -> testing::Graph {
    let kind = testing::tensor(1, Some(&[-1, width as i64]));
    let ends = (vec![testing::value("x", kind.clone())], vec![testing::value("y", kind)]);
    let name = |layer: usize| if layer == layers { "y".to_owned() } else { format!("x{layer}") };
    let mut graph = testing::graph(vec![testing::node("Tanh", &["x"], &["x0"])], ends.0, ends.1);
    for layer in 0..layers {
        let (weights, product) = (format!("w{layer}"), format!("p{layer}"));
        graph.nodes.push(testing::node("MatMul", &[&name(layer), &weights], &[&product]));
        graph.nodes.push(testing::node("Tanh", &[&product], &[&name(layer + 1)]));
        let elements: Vec<f32> = (0..width * width).map(|i| ((i * 7919 + layer) % 1013) as f32 / 5e4 - 1e-2).collect();
        graph.initializers.push(testing::Initializer {
            dims: vec![width as i64; 2],
            element: 1,
            name: weights,
            raw: bytemuck::cast_slice(&elements).to_vec(),
            ..Default::default()
        });
    }
    graph
}

/// Pages of files below `folder` that this process has mapped.
fn mappings_below(folder: &Path) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(&*folder.to_string_lossy())).count()
}

#[test]
fn a_small_model_is_steady_and_says_whose_time_it_takes() {
    let iris = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/iris/1");
    let threads = |count| Options { intra_op_threads: Some(count), ..Options::default() };
    let alone = load(&iris, &threads(1)).unwrap();
    assert!(alone.signature().steady && alone.signature().on_thread);
    let shared = load(&iris, &threads(2)).unwrap();
    assert!(shared.signature().steady && !shared.signature().on_thread);
    let open = testing::directory(testing::identity(DType::Fp32, &[-1, -1]));
    assert!(!load(open.path(), &threads(1)).unwrap().signature().steady, "a row may be of any length");
}

#[test]
fn instances_map_one_file_and_answer_as_one_alone() {
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits/1");
    let made = testing::directory(products(256, 3));
    let scratch = tempfile::tempdir().unwrap();
    let left_over = scratch.path().join("weights-of-a-killed-server");
    fs::create_dir(&left_over).unwrap();
    let runtime = OnnxRuntime::open(Some(testing::runtime().path()), None).unwrap();
    let runtime = runtime.with_scratch(scratch.path().to_owned());
    for (directory, mapped) in [(made.path(), true), (&digits, false)] {
        let alone = Options { intra_op_threads: Some(1), ..Options::default() };
        let mut alone = load(directory, &alone).unwrap();
        let spec = alone.signature().inputs[0].clone();
        let shape: Vec<usize> = spec.shape.iter().map(|&size| usize::try_from(size).unwrap_or(3)).collect();
        let elements: Vec<f32> = (0..shape.iter().product()).map(|i| (i % 17) as f32 / 4.0).collect();
        let input = floats(&spec.name, &shape, &elements);
        let expected = alone.run(std::slice::from_ref(&input)).unwrap();

        let options = Options { share_prepacked_weights: Some(true), intra_op_threads: Some(1), ..Options::default() };
        let mut sessions = runtime.load(&directory.join(FILE_NAME), &options, 3).unwrap();
        assert_eq!(mappings_below(scratch.path()) >= 3, mapped, "{}", directory.display());
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "the files are left behind");
        for session in &mut sessions {
            assert_eq!(session.signature(), alone.signature());
            assert_eq!(session.run(std::slice::from_ref(&input)).unwrap(), expected);
        }
    }
    assert!(!left_over.exists());
    assert_eq!(mappings_below(scratch.path()), 0, "sessions are gone, and their mappings are not");
}

#[test]
fn without_a_place_to_share_them_instances_hold_weights_of_their_own() {
    let nowhere = tempfile::tempdir().unwrap().path().join("nowhere");
    let runtime = OnnxRuntime::open(Some(testing::runtime().path()), None).unwrap().with_scratch(nowhere);
    let directory = testing::directory(testing::identity(DType::Fp32, &[-1]));
    let options = Options { share_prepacked_weights: Some(true), ..Options::default() };
    let mut sessions = runtime.load(&directory.path().join(FILE_NAME), &options, 2).unwrap();
    let notes = sessions[0].signature().notes.join("; ");
    assert!(notes.starts_with("its instances hold weights of their own: no file can be written: "), "{notes}");
    for session in &mut sessions {
        assert_eq!(session.run(&[floats("x", &[1], &[1.5])]).unwrap(), [floats("y", &[1], &[1.5])]);
    }
}

#[test]
fn external_data_may_lie_in_a_subdirectory() {
    let directory = testing::directory(testing::add_external(2, "sub/w.bin", 0));
    fs::create_dir(directory.path().join("sub")).unwrap();
    fs::write(directory.path().join("sub/w.bin"), bytemuck::cast_slice(&[10.0f32, 20.0])).unwrap();
    let mut session = load(directory.path(), &Options::default()).unwrap();
    let outputs = session.run(&[floats("x", &[1, 2], &[1.0, 2.0])]).unwrap();
    assert_eq!(values(&outputs[0]), [11.0, 22.0]);
}

#[test]
fn missing_external_data_is_named() {
    let directory = testing::directory(testing::add_external(2, "w.bin", 0));
    let (code, message) = refusal(directory.path(), &Options::default());
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.starts_with("tensor 'w': cannot read external data DIR/w.bin: "), "{message}");
}

#[test]
fn unusable_models_are_refused_with_the_reason() {
    let refused = |bytes: &[u8]| {
        let (code, message) = refusal(testing::directory_of(bytes).path(), &Options::default());
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(!message.contains("/onnxruntime"), "{message}");
        message
    };
    assert!(refused(b"garbage").starts_with("not an ONNX model: "));
    assert!(refused(b"").contains("cannot load the model"));
    let kind = testing::tensor(1, Some(&[-1]));
    let ends = || (vec![testing::value("x", kind.clone())], vec![testing::value("y", kind.clone())]);

    let (inputs, outputs) = ends();
    let unknown = testing::graph(vec![testing::node("Frobnicate", &["x"], &["y"])], inputs, outputs);
    let message = refused(&testing::encode(unknown, 17));
    assert!(message.contains("Frobnicate"), "{message}");

    let message = refused(&testing::encode(testing::identity(DType::Fp32, &[-1]), 9999));
    assert!(message.contains("opset"), "{message}");

    let truncated = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits/1/model.onnx")).unwrap();
    assert!(refused(&truncated[..truncated.len() / 2]).starts_with("not an ONNX model: "));

    let directory = tempfile::tempdir().unwrap();
    let (_, message) = refusal(directory.path(), &Options::default());
    assert_eq!(message, "No such file or directory (os error 2)");
}

#[test]
fn outputs_that_are_no_tensors_are_left_out() {
    let kind = testing::tensor(1, Some(&[-1]));
    let nodes = vec![testing::node("SequenceConstruct", &["x"], &["s"]), testing::node("Identity", &["x"], &["y"])];
    let sequence = testing::value("s", testing::sequence(kind.clone()));
    let both = vec![sequence.clone(), testing::value("y", kind.clone())];
    let inputs = vec![testing::value("x", kind)];
    let directory = testing::directory(testing::graph(nodes.clone(), inputs.clone(), both));
    let mut session = load(directory.path(), &Options::default()).unwrap();
    assert_eq!(session.signature().notes, ["output 's' is a sequence, which no response can carry, and is left out"]);
    let outputs = session.run(&[floats("x", &[2], &[1.0, 2.0])]).unwrap();
    assert_eq!(outputs, [floats("y", &[2], &[1.0, 2.0])]);

    let directory = testing::directory(testing::graph(nodes, inputs, vec![sequence]));
    let (_, message) = refusal(directory.path(), &Options::default());
    assert!(message.starts_with("the model has no output that a response can carry: output 's' is"), "{message}");
}

#[test]
fn inputs_that_no_request_can_carry_are_refused() {
    let message = |op: &str, input: testing::Type, output: testing::Type| {
        let nodes = vec![testing::node(op, &["x"], &["y"])];
        let graph = testing::graph(nodes, vec![testing::value("x", input)], vec![testing::value("y", output)]);
        refusal(testing::directory(graph).path(), &Options::default()).1
    };
    let floats = testing::tensor(1, Some(&[-1]));
    assert_eq!(
        message("SequenceLength", testing::sequence(floats), testing::tensor(7, Some(&[]))),
        "input 'x' is a sequence, which no request can carry"
    );
    let shapeless = testing::tensor(1, None);
    assert_eq!(
        message("Identity", shapeless.clone(), shapeless),
        "input 'x' has no shape; export the model with one, -1 standing for dimensions that vary"
    );
}

#[test]
fn inputs_with_a_default_are_not_asked_for() {
    let kind = testing::tensor(1, Some(&[2]));
    let mut graph = testing::add_external(2, "w.bin", 0);
    graph.inputs.push(testing::value("w", kind));
    let directory = testing::directory(graph);
    fs::write(directory.path().join("w.bin"), bytemuck::cast_slice(&[10.0f32, 20.0])).unwrap();
    let mut session = load(directory.path(), &Options::default()).unwrap();
    assert_eq!(session.signature().inputs.len(), 1);
    let outputs = session.run(&[floats("x", &[1, 2], &[1.0, 2.0])]).unwrap();
    assert_eq!(values(&outputs[0]), [11.0, 22.0]);
}

#[test]
fn every_option_is_taken() {
    let directory = testing::directory(testing::identity(DType::Fp32, &[-1]));
    for optimization in
        [OptimizationLevel::Disable, OptimizationLevel::Basic, OptimizationLevel::Extended, OptimizationLevel::All]
    {
        let options = Options {
            intra_op_threads: Some(2),
            inter_op_threads: Some(2),
            spinning: true,
            optimization,
            memory_pattern: Some(true),
            flush_to_zero: true,
            share_prepacked_weights: Some(true),
            session_config: BTreeMap::from([("session.disable_prepacking".into(), "1".into())]),
            ..Options::default()
        };
        let sessions = testing::runtime().load(&directory.path().join(FILE_NAME), &options, 3).unwrap();
        assert_eq!(sessions.len(), 3);
        for mut session in sessions {
            assert_eq!(session.run(&[floats("x", &[1], &[1.5])]).unwrap(), [floats("y", &[1], &[1.5])]);
        }
    }
    let none = Options { intra_op_threads: Some(0), ..Options::default() };
    assert_eq!(refusal(directory.path(), &none).1, "intra_op_threads must be 1 to 1024, is 0");
    let borrowing = BTreeMap::from([(BORROWING_ENTRIES[0].to_owned(), "1".to_owned())]);
    let borrowing = Options { session_config: borrowing, ..Options::default() };
    let (_, message) = refusal(directory.path(), &borrowing);
    assert_eq!(message, "session_config 'session.use_ort_model_bytes_directly' cannot be set here");
}

#[test]
fn a_device_that_cannot_be_had_fails_the_model() {
    let directory = testing::directory(testing::identity(DType::Fp32, &[-1]));
    let options = Options { device: Device::Cuda(99), ..Options::default() };
    let (code, message) = refusal(directory.path(), &options);
    assert_eq!(code, Code::NotReady);
    assert!(message.starts_with("device 'cuda:99' cannot be had: "), "{message}");
}

#[test]
fn a_failed_run_says_why_and_spares_the_session() {
    let kind = testing::tensor(1, Some(&[-1]));
    let inputs = vec![testing::value("a", kind.clone()), testing::value("b", kind.clone())];
    let nodes = vec![testing::node("Add", &["a", "b"], &["y"])];
    let directory = testing::directory(testing::graph(nodes, inputs, vec![testing::value("y", kind)]));
    let mut session = load(directory.path(), &Options::default()).unwrap();
    let uneven = [floats("a", &[2], &[0.0; 2]), floats("b", &[3], &[0.0; 3])];
    let error = session.run(&uneven).unwrap_err();
    assert_eq!(error.code, Code::Internal, "nothing says that the model works");
    assert!(error.message.starts_with("the model failed: "), "{error}");
    assert!(error.message.contains("2 by 3") && !error.message.contains("::"), "{error}");
    let outputs = session.run(&[floats("a", &[1], &[1.0]), floats("b", &[1], &[2.0])]).unwrap();
    assert_eq!(values(&outputs[0]), [3.0]);
    assert_eq!(session.run(&uneven).unwrap_err().code, Code::InvalidArgument);
}

#[test]
fn the_rewritten_graph_can_be_kept_and_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("model.onnx");
    let options = Options { optimized_model: Some(kept.clone()), ..Options::default() };
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits/1");
    let signature = load(&digits, &options).unwrap().signature().clone();
    assert!(kept.is_file());
    let options = Options { optimization: OptimizationLevel::Disable, ..Options::default() };
    assert_eq!(*load(folder.path(), &options).unwrap().signature(), signature);
}

/// The scheduling policy in the text of a thread's `stat`.
fn policy(stat: &str) -> u32 {
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(38).unwrap().parse().unwrap()
}

#[test]
fn pool_threads_have_an_executor_s_priority_and_not_the_loader_s() {
    testing::runtime();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/iris/1");
    let options = Options { intra_op_threads: Some(2), inter_op_threads: Some(2), ..Options::default() };
    let ours = policy(&fs::read_to_string("/proc/thread-self/stat").unwrap());
    let executor = thread::spawn(|| {
        crate::priority::be_patient();
        rustix::process::nice(0).unwrap()
    });
    let executor = executor.join().unwrap();
    let loader = thread::spawn(move || {
        rustix::process::nice(10).unwrap();
        crate::priority::step_back();
        load(&directory, &options).unwrap()
    });
    let session = loader.join().unwrap();
    let mut found = 0;
    for entry in fs::read_dir("/proc/self/task").unwrap() {
        // Threads of other tests come and go.
        let Ok(stat) = fs::read_to_string(entry.unwrap().path().join("stat")) else { continue };
        // The name is in parentheses; nice is the 17th field behind it.
        let (name, fields) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
        if name.starts_with("ort-") {
            let nice: i32 = fields.split_whitespace().nth(16).unwrap().parse().unwrap();
            assert_eq!(nice, executor, "{name}");
            assert_eq!(policy(&stat), ours, "{name}");
            found += 1;
        }
    }
    // The spawner and at least one thread per pool, which carries the spawner's name until it sets its own.
    assert!(found >= 3, "{found} threads");
    drop(session);
}

#[test]
fn messages_lose_their_places() {
    assert_eq!(tidy("Add node:\n  2 by 3 "), "Add node: 2 by 3");
    assert_eq!(
        tidy("Status: /src/core/op.h:560 void a::Init(std::b<c, int (d)>, e) axis == 1 was false. 2 by 3"),
        "Status: axis == 1 was false. 2 by 3"
    );
    assert_eq!(tidy("/src/v.h:9 const T& a::Get() const [with T = a::S] IsS() was false."), "IsS() was false.");
    assert_eq!(tidy("/src/v.cc:9 something (odd) happened"), "something (odd) happened");
    assert_eq!(tidy("at 10:30 (a::b) ends"), "at 10:30 (a::b) ends");
}
