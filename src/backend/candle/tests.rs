use std::path::Path;

use serde_json::json;

use super::{
    testing::{Checkpoint, HIDDEN, Stored, VOCABULARY, checkpoint},
    *,
};

const FAMILIES: [&str; 6] = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert"];

fn load(folder: &Path, options: &Options, instances: usize) -> Result<Vec<Box<dyn Session>>, Error> {
    Candle::open().unwrap().load(&folder.join(weights::FILE_NAME), options, instances)
}

fn open(checkpoint: &Checkpoint) -> Box<dyn Session> {
    open_with(checkpoint, &Options::default())
}

fn open_with(checkpoint: &Checkpoint, options: &Options) -> Box<dyn Session> {
    load(checkpoint.write().path(), options, 1).unwrap().remove(0)
}

fn gpus() -> usize {
    Candle::open().unwrap().gpus()
}

fn refusal(checkpoint: &Checkpoint) -> String {
    let folder = checkpoint.write();
    let error = load(folder.path(), &Options::default(), 1).err().unwrap();
    assert_eq!(error.code, Code::InvalidArgument, "{error}");
    error.message.replace(&format!("{}", folder.path().display()), "FOLDER")
}

fn input(name: &str, shape: &[usize], values: &[i64]) -> Tensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new(name.into(), tensor::DType::Int64, shape.into(), Data::Plain(bytes)).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    let Data::Plain(bytes) = &tensor.data else { panic!("strings") };
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn assert_close(left: &[f32], right: &[f32], tolerance: f32, what: &str) {
    assert_eq!(left.len(), right.len(), "{what}");
    for (left, right) in left.iter().zip(right) {
        assert!((left - right).abs() <= tolerance, "{what}: {left} and {right}");
    }
}

/// Token ids that are none of padding, different for each `seed`.
fn text(length: usize, seed: usize) -> Vec<i64> {
    (0..length).map(|place| 2 + ((place * 7 + seed * 13) % (VOCABULARY - 2)) as i64).collect()
}

/// Texts behind each other, padded with `padding` to the same length, and the mask.
fn padded(texts: &[Vec<i64>], length: usize, padding: i64) -> [Tensor; 2] {
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for text in texts {
        ids.extend(text.iter().copied().chain(std::iter::repeat(padding)).take(length));
        mask.extend((0..length).map(|place| i64::from(place < text.len())));
    }
    let shape = [texts.len(), length];
    [input("input_ids", &shape, &ids), input("attention_mask", &shape, &mask)]
}

#[test]
fn signatures_are_those_of_an_export() {
    for family in FAMILIES {
        for is_classifier in [false, true] {
            let session = open(&checkpoint(family, is_classifier));
            let signature = session.signature();
            let names: Vec<_> = signature.inputs.iter().map(|spec| &*spec.name).collect();
            let expected: &[&str] = match family {
                "bert" => &["input_ids", "attention_mask", "token_type_ids"],
                _ => &["input_ids", "attention_mask"],
            };
            assert_eq!(names, expected);
            assert_eq!(signature.optional.len(), expected.len() - 1);
            assert!(signature.inputs.iter().all(|spec| spec.dtype == tensor::DType::Int64 && spec.shape == [-1, -1]));
            let output = &signature.outputs[0];
            match is_classifier {
                true => assert_eq!((&*output.name, &output.shape[..]), ("logits", &[-1, 3][..])),
                false => assert_eq!((&*output.name, &output.shape[..]), ("last_hidden_state", &[-1, -1, 16][..])),
            }
        }
    }
}

#[test]
fn neither_company_nor_padding_changes_a_text() {
    let texts: Vec<Vec<i64>> = [5, 1, 12, 7].iter().enumerate().map(|(seed, &length)| text(length, seed)).collect();
    for family in FAMILIES {
        for is_classifier in [false, true] {
            let mut pooled = checkpoint(family, is_classifier);
            for pooling in ["cls", "mean"] {
                pooled.config["classifier_pooling"] = json!(pooling);
                let mut session = open(&pooled);
                let padding = if family.contains("bert") && family != "bert" { 1 } else { 0 };
                let together = session.run(&padded(&texts, 15, padding)).unwrap().remove(0);
                let together = floats(&together);
                for (row, text) in texts.iter().enumerate() {
                    let what = format!("{family} {is_classifier} {pooling} {row}");
                    let alone = session.run(&[input("input_ids", &[1, text.len()], text)]).unwrap().remove(0);
                    let alone = floats(&alone);
                    assert!(
                        alone.iter().all(|value| value.is_finite()) && alone.iter().any(|value| *value != alone[0])
                    );
                    let width = together.len() / texts.len();
                    let same = &together[row * width..][..alone.len()];
                    assert_close(same, &alone, 1e-5, &what);
                }
            }
        }
    }
}

/// Else warm-up would find that texts must not share runs.
#[test]
fn company_changes_no_text_in_any_type() {
    let texts: Vec<Vec<i64>> = (0..20).map(|seed| text(18 - seed % 3, seed)).collect();
    for family in FAMILIES {
        for dtype in [ComputeType::Float16, ComputeType::Bfloat16] {
            let mut session = open_with(&checkpoint(family, true), &Options { dtype, ..Options::default() });
            let together = floats(&session.run(&padded(&texts, 18, 1)).unwrap()[0]);
            for (together, text) in together.chunks(3).zip(&texts) {
                let alone = session.run(&[input("input_ids", &[1, text.len()], text)]).unwrap().remove(0);
                assert_close(together, &floats(&alone), 1e-5, &format!("{family} {dtype:?}"));
            }
        }
    }
}

#[test]
fn a_row_of_padding_spoils_no_other() {
    for family in FAMILIES {
        for options in [ComputeType::Float32, ComputeType::Float16, ComputeType::Bfloat16] {
            let options = Options { dtype: options, ..Options::default() };
            let mut session = open_with(&checkpoint(family, false), &options);
            let both = session.run(&padded(&[text(6, 1), Vec::new()], 9, 1)).unwrap().remove(0);
            let both = floats(&both);
            assert!(both.iter().all(|value| value.is_finite()), "{family} {options:?}");
            let alone = floats(&session.run(&[input("input_ids", &[1, 6], &text(6, 1))]).unwrap()[0]);
            assert_close(&both[..alone.len()], &alone, 0.1, family);
        }
    }
}

#[test]
fn a_mask_of_ones_and_types_of_zero_are_taken_for_granted() {
    let mut session = open(&checkpoint("bert", false));
    let ids = input("input_ids", &[2, 3], &[2, 3, 4, 5, 6, 7]);
    let mask = input("attention_mask", &[2, 3], &[1; 6]);
    let types = |values: &[i64]| input("token_type_ids", &[2, 3], values);
    let mut run = |inputs: &[Tensor]| session.run(inputs).unwrap().remove(0);
    let plain = run(std::slice::from_ref(&ids));
    assert_eq!(run(&[ids.clone(), mask.clone()]), plain);
    assert_eq!(run(&[ids.clone(), mask, types(&[0; 6])]), plain);
    assert_eq!(run(&[ids.clone(), types(&[0; 6])]), plain);
    assert_ne!(run(&[ids, types(&[0, 1, 1, 0, 1, 1])]), plain);
}

#[test]
fn names_may_have_their_models_before_them_or_not() {
    for (family, prefix) in
        [("bert", "bert."), ("roberta", "roberta."), ("distilbert", "distilbert."), ("modernbert", "model.")]
    {
        let ids = input("input_ids", &[1, 4], &text(4, 1));
        let run = |checkpoint: &Checkpoint| open(checkpoint).run(std::slice::from_ref(&ids)).unwrap();
        let bare = checkpoint(family, false);
        let mut masked = bare.renamed(|name| format!("{prefix}{name}"));
        let class = masked.config["architectures"][0].as_str().unwrap().replace("Model", "ForMaskedLM");
        masked.config["architectures"] = json!([class]);
        assert_eq!(run(&masked), run(&bare));
        let classifier = checkpoint(family, true);
        let stripped = classifier.renamed(|name| name.strip_prefix(prefix).unwrap_or(name).to_owned());
        assert_eq!(run(&stripped), run(&classifier));
    }
    let newer = checkpoint("bert", false);
    let older = newer.renamed(|name| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    });
    let ids = input("input_ids", &[1, 4], &text(4, 1));
    let run = |checkpoint: &Checkpoint| open(checkpoint).run(std::slice::from_ref(&ids)).unwrap();
    assert_eq!(run(&older), run(&newer));
}

#[test]
fn types_change_little() {
    for family in FAMILIES {
        for is_classifier in [false, true] {
            let checkpoint = checkpoint(family, is_classifier);
            let ids = [input("input_ids", &[2, 5], &text(10, 3))];
            let exact = floats(&open(&checkpoint).run(&ids).unwrap()[0]);
            for dtype in [ComputeType::Float16, ComputeType::Bfloat16] {
                let mut session = open_with(&checkpoint, &Options { dtype, ..Options::default() });
                let about = floats(&session.run(&ids).unwrap()[0]);
                let tolerance = if dtype == ComputeType::Float16 { 0.02 } else { 0.15 };
                assert_close(&about, &exact, tolerance, &format!("{family} {is_classifier} {dtype:?}"));
            }
        }
    }
}

#[test]
fn instances_and_threads_change_nothing() {
    let folder = checkpoint("bert", false).write();
    let ids = [input("input_ids", &[3, 6], &text(18, 3))];
    let mut results = Vec::new();
    for threads in [1, 3] {
        let options = Options { intra_op_threads: Some(threads), ..Options::default() };
        let sessions = load(folder.path(), &options, 2).unwrap();
        assert_eq!(sessions.len(), 2);
        for mut session in sessions {
            assert_eq!(session.signature().on_thread, threads == 1);
            results.push(session.run(&ids).unwrap());
            // As executors do, which are other threads than those that load.
            results.push(
                std::thread::spawn(move || session.run(&[input("input_ids", &[3, 6], &text(18, 3))]))
                    .join()
                    .unwrap()
                    .unwrap(),
            );
        }
    }
    assert!(results.iter().all(|result| *result == results[0]));
}

/// candle's own threads for operators on elements, which all of the process would share.
#[test]
#[cfg(target_os = "linux")]
fn large_batches_stay_in_the_pool_of_their_session() {
    for family in FAMILIES {
        let mut session = open(&checkpoint(family, true));
        session.run(&padded(&vec![text(17, 1); 512], 18, 1)).unwrap();
    }
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    let names: Vec<String> = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(name).collect();
    assert!(!names.iter().any(|name| name.starts_with("candle-bp")), "{names:?}");
}

#[test]
fn wrong_inputs_are_named() {
    let mut bert = open(&checkpoint("bert", false));
    let ids = || input("input_ids", &[1, 3], &[2, 3, 4]);
    let mut message = |inputs: &[Tensor]| {
        let error = bert.run(inputs).unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        error.message
    };
    assert_eq!(message(&[]), "input 'input_ids' is missing");
    assert_eq!(
        message(&[input("input_ids", &[2, 2], &[2, 3, 40, 4])]),
        "input 'input_ids': [1, 0] is 40; token ids are 0 to 39"
    );
    assert_eq!(
        message(&[input("input_ids", &[1, 2], &[2, -1])]),
        "input 'input_ids': [0, 1] is -1; token ids are 0 to 39"
    );
    assert_eq!(
        message(&[input("input_ids", &[1, 1], &[1 << 32])]),
        "input 'input_ids': [0, 0] is 4294967296; token ids are 0 to 39"
    );
    assert_eq!(
        message(&[input("input_ids", &[1, 21], &[2; 21])]),
        "input 'input_ids' has 21 tokens in a row; the model takes at most 20"
    );
    for shape in [[0, 3], [3, 0], [0, 0]] {
        let expected = format!("input 'input_ids' must have at least one row and one token, has shape {shape:?}");
        assert_eq!(message(&[input("input_ids", &shape, &[])]), expected);
    }
    assert!(message(&[input("input_ids", &[3], &[2, 3, 4])]).contains("one row for each text"));
    assert_eq!(
        message(&[ids(), input("attention_mask", &[3, 1], &[1; 3])]),
        "input 'attention_mask' must have the shape of 'input_ids', [1, 3], has [3, 1]"
    );
    assert_eq!(
        message(&[ids(), input("attention_mask", &[1, 3], &[1, 1, 2])]),
        "input 'attention_mask': [0, 2] is 2; mask values are 0 to 1"
    );
    assert_eq!(
        message(&[ids(), input("token_type_ids", &[1, 3], &[0, 2, 0])]),
        "input 'token_type_ids': [0, 1] is 2; token types are 0 to 1"
    );
    let mut roberta = open(&checkpoint("roberta", false));
    let ids = input("input_ids", &[1, 19], &[2; 19]);
    assert!(roberta.run(&[ids]).unwrap_err().message.ends_with("the model takes at most 18"));
    assert!(roberta.run(&[input("input_ids", &[1, 18], &[2; 18])]).is_ok());
}

#[test]
fn configuration_and_weights_must_agree() {
    let mut more_words = checkpoint("bert", false);
    more_words.config["vocab_size"] = json!(41);
    assert_eq!(
        refusal(&more_words),
        "FOLDER: tensor 'embeddings.word_embeddings.weight' must have shape [41, 16] by config.json, has [40, 16]"
    );
    let mut more_classes = checkpoint("distilbert", true);
    more_classes.config["id2label"] = json!({"0": "a", "1": "b"});
    assert_eq!(
        refusal(&more_classes),
        "FOLDER: tensor 'classifier.weight' must have shape [2, 16] by config.json, has [3, 16]"
    );
    let mut more_layers = checkpoint("modernbert", true);
    more_layers.config["num_hidden_layers"] = json!(5);
    assert!(refusal(&more_layers).starts_with("FOLDER: tensor 'model.layers.4.attn_norm.weight' is missing"));
    for family in FAMILIES {
        for is_classifier in [false, true] {
            let whole = checkpoint(family, is_classifier);
            for index in 0..whole.tensors.len() {
                let mut rest = whole.clone();
                let (name, stored) = rest.tensors.remove(index);
                let message = refusal(&rest);
                assert!(
                    message.contains(&format!("tensor '{}", stem(&name))) && message.contains("is missing"),
                    "{message}"
                );
                let mut flat = whole.clone();
                let values = [stored.values.clone(), vec![0.0]].concat();
                *flat.tensor(&name) = Stored { shape: vec![values.len()], values, ..stored };
                let message = refusal(&flat);
                assert!(message.contains(&name) && message.contains("must have shape"), "{message}");
            }
        }
    }

    /// The name up to where words may be called by its absence.
    fn stem(name: &str) -> &str {
        if name.ends_with("word_embeddings.weight") || name.ends_with("tok_embeddings.weight") { "" } else { name }
    }
}

/// What runs on a GPU, as far as a CPU can tell.
#[test]
fn candles_own_operators_give_the_same() {
    let texts = [text(17, 1), text(4, 2), text(18, 3)];
    for family in FAMILIES {
        for is_classifier in [false, true] {
            let folder = checkpoint(family, is_classifier).write();
            let run = |ops: Ops, dtype: ComputeType| {
                let path = folder.path().join(weights::FILE_NAME);
                let model = Model::read(&path, dtype, ops, &candle_core::Device::Cpu).unwrap();
                let batch = inputs::read(&padded(&texts, 18, 1), &model.architecture).unwrap();
                let output = model.run(&batch).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let width = output.len() / texts.len();
                // What becomes of padding does not matter.
                let kept = |(text, values): (&Vec<i64>, &[f32])| {
                    values[..if is_classifier { width } else { width / 18 * text.len() }].to_vec()
                };
                texts.iter().zip(output.chunks(width)).flat_map(kept).collect::<Vec<f32>>()
            };
            let ours = run(Ops::Passes, ComputeType::Float32);
            for (dtype, tolerance) in
                [(ComputeType::Float32, 2e-5), (ComputeType::Float16, 0.03), (ComputeType::Bfloat16, 0.2)]
            {
                let what = format!("{family} {is_classifier} {dtype:?}");
                assert_close(&run(Ops::Plain, dtype), &ours, tolerance, &what);
            }
        }
    }
}

#[test]
fn what_is_no_encoder_is_refused_with_a_list() {
    let mut other = checkpoint("bert", false);
    other.config["model_type"] = json!("gpt2");
    let message = refusal(&other);
    assert!(message.starts_with("FOLDER/config.json: model_type 'gpt2' is not supported; supported are"), "{message}");
    let folder = other.write();
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    let message = load(folder.path(), &Options::default(), 1).err().unwrap().message;
    assert!(message.contains("config.json: No such file"), "{message}");
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(load(folder.path(), &Options::default(), 1).err().unwrap().message.contains("config.json: not JSON"));
    std::fs::write(folder.path().join("config.json"), "[]").unwrap();
    assert!(load(folder.path(), &Options::default(), 1).err().unwrap().message.contains("must be a JSON object"));
}

#[test]
fn options_that_cannot_be_had_are_errors() {
    let folder = checkpoint("bert", false).write();
    let error = |options: Options| load(folder.path(), &options, 1).err().unwrap();
    // No machine has as many GPUs.
    let gpu = error(Options { device: Device::Cuda(1000), ..Options::default() });
    assert_eq!(gpu.code, Code::NotReady);
    let reason = gpu.message.strip_prefix("device 'cuda:1000' cannot be had: ").unwrap();
    match (cfg!(feature = "cuda"), gpus() > 0) {
        (false, _) => assert!(reason.starts_with("the server was built without the feature cuda"), "{reason}"),
        (true, false) => assert!(reason.contains("NVIDIA"), "{reason}"),
        (true, true) => assert!(reason.contains("invalid device ordinal"), "{reason}"),
    }
    assert_eq!(
        error(Options { intra_op_threads: Some(0), ..Options::default() }).message,
        "intra_op_threads must be 1 to 1024, is 0"
    );
    let session_config = [("a".to_owned(), "b".to_owned())].into();
    assert_eq!(
        error(Options { session_config, ..Options::default() }).message,
        "session_config is for ONNX models, and the model runs on candle"
    );
}

#[test]
fn hidden_states_have_the_size_of_the_model() {
    let output = open(&checkpoint("bert", false)).run(&[input("input_ids", &[2, 3], &text(6, 1))]).unwrap().remove(0);
    assert_eq!(&output.shape[..], [2, 3, HIDDEN]);
}

/// One text of `tests/encoders`, with what transformers gives for it.
#[derive(serde::Deserialize)]
struct Case {
    input_ids: Vec<i64>,
    attention_mask: Vec<i64>,
    token_type_ids: Option<Vec<i64>>,
    logits: Option<Vec<f32>>,
    last_hidden_state: Option<Vec<Vec<f32>>>,
}

#[derive(serde::Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

#[test]
fn numbers_are_those_of_transformers() {
    assert_numbers(Device::Cpu, 1.0);
    if gpus() > 0 {
        // It adds up in another order, and has functions of its own.
        assert_numbers(Device::Cuda(0), 10.0);
    }
}

/// Holds all of `tests/encoders` against a device whose differences may be so many times a CPU's.
fn assert_numbers(device: Device, times: f32) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/encoders");
    let mut compared = 0;
    for model in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let read = |name: &str| std::fs::read(model.join(name)).unwrap();
        let Reference { cases } = serde_json::from_slice(&read("expected.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&read("config.json")).unwrap();
        let padding = config["pad_token_id"].as_i64().unwrap_or(0);
        let mut session = load(&model, &Options { device, ..Options::default() }, 1).unwrap().remove(0);
        let takes_types = session.signature().inputs.len() == 3;
        let longest = cases.iter().map(|case| case.input_ids.len()).max().unwrap();
        let row = |values: &[i64], length: usize, filler: i64| -> Vec<i64> {
            values.iter().copied().chain(std::iter::repeat(filler)).take(length).collect()
        };
        let inputs = |cases: &[&Case], length: usize| {
            let of = |name: &str, values: fn(&Case) -> Option<&Vec<i64>>, filler| {
                let none = vec![0; length];
                let rows = cases.iter().flat_map(|case| row(values(case).unwrap_or(&none), length, filler));
                input(name, &[cases.len(), length], &rows.collect::<Vec<_>>())
            };
            let ids = of("input_ids", |case| Some(&case.input_ids), padding);
            let mask = of("attention_mask", |case| Some(&case.attention_mask), 0);
            let types = takes_types.then(|| of("token_type_ids", |case| case.token_type_ids.as_ref(), 0));
            [ids, mask].into_iter().chain(types).collect::<Vec<_>>()
        };
        let all: Vec<&Case> = cases.iter().collect();
        let together = floats(&session.run(&inputs(&all, longest)).unwrap()[0]);
        for (index, case) in cases.iter().enumerate() {
            let alone = floats(&session.run(&inputs(&[case], case.input_ids.len())).unwrap()[0]);
            let width = together.len() / cases.len();
            let what = format!("{} {index} on {device}", model.display());
            // States of up to 4, after layers that make differences larger.
            assert_close(&together[index * width..][..alone.len()], &alone, times * 3e-5, &what);
            let states = case.last_hidden_state.as_ref().map(|states| states.concat());
            if let Some(expected) = case.logits.as_ref().or(states.as_ref()) {
                // Of the states there are the first rows.
                assert_close(&alone[..expected.len()], expected, times * 1e-4, &what);
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 36);
}
