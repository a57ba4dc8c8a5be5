//! The check against a scripted session, with cases that are made here instead of read.

use std::{path::Path, time::Duration};

use super::*;
use crate::{
    backend::TensorSpec,
    tensor::{Data, Shape},
};

/// Two rows of two scores, and the index of the larger; the graph takes the scores as they are.
struct Scripted {
    signature: Signature,
    takes: Duration,
    /// What is added to each score.
    offset: f32,
}

impl Session for Scripted {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        std::thread::sleep(self.takes);
        let Data::Plain(bytes) = &inputs[0].data else { unreachable!() };
        let scores: Vec<f32> = bytes.as_chunks().0.iter().map(|raw| f32::from_le_bytes(*raw) + self.offset).collect();
        if scores.contains(&f32::NEG_INFINITY) {
            return Err(Error::invalid("refused"));
        }
        let labels: Vec<i64> = scores.as_chunks().0.iter().map(|[zero, one]| i64::from(one > zero)).collect();
        Ok(vec![label_tensor(&labels), score_tensor("scores", &scores)])
    }
}

fn score_tensor(name: &str, scores: &[f32]) -> Tensor {
    let shape: Shape = [scores.len() / 2, 2].as_slice().into();
    let data = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
    Tensor::new(name.into(), DType::Fp32, shape, Data::Plain(data)).unwrap()
}

fn label_tensor(labels: &[i64]) -> Tensor {
    let data = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
    Tensor::new("label".into(), DType::Int64, [labels.len()].as_slice().into(), Data::Plain(data)).unwrap()
}

fn case(inputs: &[f32], outputs: Vec<Tensor>) -> Case {
    Case { inputs: vec![score_tensor("x", inputs)], outputs }
}

fn session(offset: f32, takes: Duration) -> Box<dyn Session> {
    let spec = |name: &str, dtype, shape: &[i64]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
    let signature = Signature {
        inputs: vec![spec("x", DType::Fp32, &[-1, 2])],
        outputs: vec![spec("label", DType::Int64, &[-1]), spec("scores", DType::Fp32, &[-1, 2])],
        ..Signature::default()
    };
    Box::new(Scripted { signature, takes, offset })
}

fn examine(settings: Settings, cases: &[Case], offset: f32) -> Result<Outcome, String> {
    let check = Check { settings, folders: Default::default(), stable: None };
    let outcome = check.examine("m", session(offset, Duration::ZERO).as_mut(), cases, 0);
    outcome.map_err(|error| error.message)
}

fn run(check: &Check, decode: DecodeCases) -> Result<Option<Outcome>, String> {
    let mut session = session(0.0, Duration::ZERO);
    check.run("m", [(Device::Cpu, &mut session)].into_iter(), decode).map_err(|error| error.message)
}

/// The first is labelled 1 and the second 0.
const TWO: [f32; 4] = [0.25, 0.75, 0.5, 0.0];

#[test]
fn right_answers_pass_and_are_counted() {
    let cases = [
        case(&TWO, vec![score_tensor("scores", &TWO), label_tensor(&[1, 0])]),
        case(&TWO[..2], vec![label_tensor(&[1])]),
    ];
    let outcome = examine(Settings::default(), &cases, 0.00005).unwrap();
    assert_eq!((outcome.cases, outcome.labels, outcome.accuracy), (2, 5, 1.0));
    assert!(outcome.max_difference > 0.00004 && outcome.max_difference < 0.0001, "{outcome:?}");
}

#[test]
fn wrong_answers_name_the_case_the_output_and_the_element() {
    let right = case(&TWO, vec![score_tensor("scores", &TWO)]);
    let message = examine(Settings::default(), std::slice::from_ref(&right), 0.5).unwrap_err();
    let words = "element 0 is 0.75, expected 0.25: 0.5 apart, and golden.max_difference allows 0.0001";
    assert_eq!(message, format!("cases[0]: output 'scores': {words}"));
    let wide = Settings { max_difference: Some(0.5), ..Settings::default() };
    assert!(examine(wide.clone(), std::slice::from_ref(&right), 0.5).is_ok());
    let labels = case(&TWO, vec![label_tensor(&[1, 1])]);
    let message = examine(wide, &[right, labels], 0.5).unwrap_err();
    assert_eq!(message, "cases[1]: output 'label': element 1 is 0, expected 1");
}

#[test]
fn accuracies_count_labels_of_each_output() {
    let cases = [
        case(&TWO, vec![score_tensor("scores", &[0.1, 0.2, 0.4, 0.3]), label_tensor(&[1, 0])]),
        case(&TWO, vec![score_tensor("scores", &[0.1, 0.2, 0.3, 0.4]), label_tensor(&[1, 0])]),
    ];
    let at_least = |min_accuracy| Settings { min_accuracy: Some(min_accuracy), ..Settings::default() };
    let outcome = examine(at_least(0.75), &cases, 0.0).unwrap();
    assert_eq!((outcome.labels, outcome.accuracy), (8, 0.75));
    let message = examine(at_least(0.8), &cases, 0.0).unwrap_err();
    assert_eq!(
        message,
        "output 'scores': 3 of 4 labels agree, an accuracy of 0.7500, and golden.min_accuracy is 0.8; the first that \
         does not: cases[1]: row 1 is class 0, expected class 1"
    );
    let both = Settings { max_difference: Some(0.2), ..at_least(0.5) };
    assert!(examine(both, &cases, 0.0).unwrap_err().contains("golden.max_difference allows 0.2"));
}

#[test]
fn what_proves_nothing_or_cannot_be_compared_fails() {
    let renamed = |name: &str, tensor: Tensor| Tensor { name: name.into(), ..tensor };
    let empty = Tensor::new("label".into(), DType::Int64, [0].as_slice().into(), Data::Plain(Bytes::new())).unwrap();
    for (outputs, words) in [
        (vec![], "expects no output"),
        (vec![empty], "output 'label' is expected without elements"),
        (vec![renamed("y", label_tensor(&[1, 0]))], "the model has no output 'y'; its outputs are 'label', 'scores'"),
        (vec![label_tensor(&[1, 0]), label_tensor(&[1, 0])], "output 'label' is expected twice"),
        (vec![renamed("label", score_tensor("y", &TWO))], "output 'label' is INT64, expected FP32"),
        (vec![renamed("scores", label_tensor(&[1, 0]))], "output 'scores' is FP32, expected INT64"),
        (vec![label_tensor(&[1])], "output 'label' has shape [2], expected [1]"),
    ] {
        let message = examine(Settings::default(), &[case(&TWO, outputs)], 0.0).unwrap_err();
        assert!(message.starts_with("cases[0]: ") && message.contains(words), "{message}");
    }
    let good = || vec![label_tensor(&[1, 0])];
    let wrong_input = Case { inputs: vec![score_tensor("z", &TWO)], outputs: good() };
    let message = examine(Settings::default(), &[wrong_input], 0.0).unwrap_err();
    assert_eq!(message, "cases[0]: model 'm' has no input 'z'; its inputs are 'x'");
    let refused = case(&[f32::NEG_INFINITY; 4], good());
    assert_eq!(examine(Settings::default(), &[refused], 0.0).unwrap_err(), "cases[0]: refused");
}

#[test]
fn numbers_one_for_each_row_are_no_scores() {
    let spec = TensorSpec { name: "y".into(), dtype: DType::Fp32, shape: vec![-1] };
    let line = |shape: i64, got: [f32; 2], expected: [f32; 2]| {
        let signature =
            Signature { outputs: vec![TensorSpec { shape: vec![shape], ..spec.clone() }], ..Signature::default() };
        let flat = |values: [f32; 2]| Tensor { shape: [2].as_slice().into(), ..score_tensor("y", &values) };
        let case = Case { inputs: vec![], outputs: vec![flat(expected)] };
        case.compare(&signature, &[flat(got)], Tolerance::new(None)).unwrap().remove(0).agreed
    };
    assert_eq!(line(-1, [1.0, 2.0], [1.0, 3.0]), 1, "rows, of which one is right");
    assert_eq!(line(2, [1.0, 2.0], [1.0, 3.0]), 1, "scores, whose largest is where it should be");
    assert_eq!(line(2, [2.0, 1.0], [1.0, 2.0]), 0);
    assert_eq!(line(-1, [2.0, 1.0], [1.0, 2.0]), 0);
}

#[test]
fn time_is_limited_for_each_case_by_itself() {
    let settings = Settings { max_latency: Some(Duration::from_millis(5)), ..Settings::default() };
    let check = Check { settings, folders: Default::default(), stable: None };
    let cases = [case(&TWO, vec![label_tensor(&[1, 0])])];
    let message = check.examine("m", session(0.0, Duration::from_millis(6)).as_mut(), &cases, 0).unwrap_err().message;
    assert!(message.starts_with("cases[0]: it takes ") && message.ends_with("golden.max_latency is 5ms"), "{message}");
    let settings = Settings { max_latency: Some(Duration::from_secs(60)), ..Settings::default() };
    let check = Check { settings, ..check };
    let outcome = check.examine("m", session(0.0, Duration::from_millis(6)).as_mut(), &cases, 0).unwrap();
    assert!(outcome.latency >= Duration::from_millis(6), "{outcome:?}");
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// Cases whose number is the text's length; no right answer for an odd one.
fn by_length(text: &Bytes) -> Result<Vec<Case>, Error> {
    let label = i64::from(text.len().is_multiple_of(2));
    Ok(vec![case(&TWO[..2], vec![label_tensor(&[label])]); text.len()])
}

#[test]
fn the_own_file_of_a_version_wins_and_a_wish_needs_one() {
    let folder = tempfile::tempdir().unwrap();
    let (own, beside) = (folder.path().join("m/1"), folder.path().join("m"));
    let check = |settings| Check { settings, folders: [own.clone(), beside.clone()], stable: None };
    assert_eq!(run(&check(Settings::default()), by_length), Ok(None));
    let wish = Settings { max_difference: Some(1.0), ..Settings::default() };
    let message = run(&check(wish), by_length).unwrap_err();
    assert!(
        message.starts_with("golden check: golden.max_difference is set, and there is no golden.json in "),
        "{message}"
    );

    write(&beside.join("golden.json"), "1234");
    assert_eq!(run(&check(Settings::default()), by_length).unwrap().unwrap().cases, 4);
    write(&own.join("golden.json"), "12");
    assert_eq!(run(&check(Settings::default()), by_length).unwrap().unwrap().cases, 2);
    let named = Settings { file: Some("other.json".to_owned()), ..Settings::default() };
    let message = run(&check(named.clone()), by_length).unwrap_err();
    assert!(message.contains("golden.file is set, and there is no other.json in "), "{message}");
    write(&beside.join("other.json"), "1");
    let message = run(&check(named), by_length).unwrap_err();
    assert!(message.contains("m/other.json: cases[0]: output 'label': element 0 is 1, expected 0"), "{message}");
}

#[test]
fn files_that_cannot_be_used_fail_whatever_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("golden.json");
    let check = || Check {
        settings: Settings::default(),
        folders: [folder.path().join("1"), folder.path().to_owned()],
        stable: None,
    };
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert!(run(&check(), by_length).unwrap_err().contains("golden.json: No such file"));
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(run(&check(), by_length).unwrap_err().ends_with("golden.json: not a file"));
    std::fs::remove_dir(&path).unwrap();
    write(&path, "");
    assert!(run(&check(), by_length).unwrap_err().ends_with("golden.json: it has no cases, which proves nothing"));
    std::fs::File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
    assert!(run(&check(), by_length).unwrap_err().ends_with("golden.json: larger than 67108864 bytes"));
}

#[test]
fn every_device_is_examined_and_the_worst_counts() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("golden.json"), "12");
    let check = |max_difference| Check {
        settings: Settings { max_difference: Some(max_difference), ..Settings::default() },
        folders: [folder.path().to_owned(), folder.path().to_owned()],
        stable: None,
    };
    let scores: DecodeCases = |_| Ok(vec![case(&TWO, vec![score_tensor("scores", &TWO)])]);
    let run = |check: Check| {
        let mut sessions =
            [session(0.25, Duration::ZERO), session(0.5, Duration::ZERO), session(0.125, Duration::ZERO)];
        let devices = [Device::Cpu, Device::Cuda(1), Device::Cuda(2)].into_iter();
        check.run("m", devices.zip(&mut sessions), scores).map_err(|error| error.message)
    };
    assert_eq!(run(check(0.5)).unwrap().unwrap().max_difference, 0.5);
    assert!(run(check(0.3)).unwrap_err().contains("golden.json: on cuda:1: cases[0]: "));
}
