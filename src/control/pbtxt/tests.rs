use std::time::Duration;

use super::*;
use crate::{
    backend::{Declaration, Device, DeviceKind, InstanceGroup, OptimizationLevel, Options},
    model::{
        catalog::VersionPolicy,
        schedule::{Level, TimeoutAction},
        warmup::described::Filling,
    },
    tensor::DType,
};

/// A configuration in the style of Triton's users: lists without colons, comments, every field that is honoured.
const FULL: &str = r#"
name: "resnet"  # the folder's name [no list]
platform: "onnxruntime_onnx"
max_batch_size: 8
default_model_filename: "net.onnx"
input [
  {
    name: "image"
    data_type: TYPE_FP32
    format: FORMAT_NCHW
    dims: [ 3, 224, 224 ]
  },
  {
    name: "scale"
    data_type: TYPE_FP32
    dims: [ 1 ]
    reshape { shape: [ ] }
    optional: true
  }
]
output # the classes
[
  { name: "label" data_type: TYPE_STRING dims: [ -1 ] label_filename: "classes.txt" }
]
version_policy: { specific { versions: [ 1, 3 ] } }
instance_group [ { count: 2 kind: KIND_CPU rate_limiter { priority: 1 } } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 250
  preserve_ordering: true
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1000 allow_timeout_override: true }
  priority_queue_policy [ { key: 1 value { max_queue_size: 7 } } ]
}
optimization { graph { level: 1 } priority: PRIORITY_MAX }
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
parameters { key: "inter_op_thread_count" value: { string_value: "0" } }
parameters [
  { key: "execution_mode" value { string_value: "1" } },
  { key: "enable_mem_arena" value { string_value: "1" } },
  { key: "enable_mem_pattern" value { string_value: "1" } },
  { key: "memory.enable_memory_arena_shrinkage" value { string_value: "cpu:0" } },
  { key: "session.disable_prepacking" value { string_value: "1" } },
  { key: "gpu_mem_limit" value { string_value: "1024" } },
  { key: "cudnn_conv_algo_search" value { string_value: "1" } },
  { key: "team" value { string_value: "vision [a]" } }
]
model_warmup [{
  name: "zeros"
  batch_size: 4
  inputs { key: "image" value: { data_type: TYPE_FP32 dims: [ 3, 224, 224 ] zero_data: true } }
  count: 2
}]
metric_tags { key: "a" value: "b" }
"#;

fn name() -> ModelName {
    ModelName::parse("resnet").unwrap()
}

fn refused(text: &str) -> String {
    from_text(text, &name()).unwrap_err().message
}

#[test]
fn everything_that_is_honoured_is_read() {
    let spec = from_text(FULL, &name()).unwrap();
    assert_eq!(spec.backend.as_deref(), Some("onnxruntime"));
    assert_eq!(spec.file_name.as_deref(), Some("net.onnx"));
    assert_eq!((spec.max_batch_size, spec.batching), (Some(8), Some(true)));
    let image = Declaration {
        name: "image".into(),
        datatype: Some(DType::Fp32),
        shape: Some(vec![-1, 3, 224, 224]),
        ..Declaration::default()
    };
    let scale = Declaration {
        name: "scale".into(),
        datatype: Some(DType::Fp32),
        shape: Some(vec![-1, 1]),
        reshape: Some(vec![-1]),
        optional: true,
    };
    assert_eq!(spec.inputs, [image, scale]);
    assert_eq!(spec.outputs[0].datatype, Some(DType::Bytes));
    assert_eq!(spec.outputs[0].shape, Some(vec![-1, -1]));
    assert_eq!(spec.labels["label"], std::path::Path::new("classes.txt"));
    assert_eq!(spec.versions, VersionPolicy::Specific(vec!["1".into(), "3".into()]));
    assert_eq!(spec.instance_group, [InstanceGroup { count: Some(2), kind: DeviceKind::Cpu, gpus: vec![] }]);
    let Options { device, optimization, intra_op_threads, inter_op_threads, parallel, .. } = spec.options;
    assert_eq!((device, optimization), (Device::Cpu, OptimizationLevel::Extended));
    assert_eq!((intra_op_threads, inter_op_threads, parallel), (Some(2), None, Some(true)));
    assert_eq!((spec.options.memory_arena, spec.options.memory_pattern), (Some(true), Some(true)));
    assert_eq!(spec.options.arena_shrinkage.as_deref(), Some("cpu:0"));
    assert_eq!(spec.options.session_config["session.disable_prepacking"], "1");
    assert_eq!(spec.parameters["team"], "vision [a]");
    assert_eq!(spec.options.cuda["gpu_mem_limit"], "1024");
    assert_eq!(spec.options.cuda["cudnn_conv_algo_search"], "HEURISTIC");
    let queue = &spec.queue;
    assert_eq!((queue.max_delay, &queue.preferred_batch_sizes[..]), (Duration::from_micros(250), &[4, 8][..]));
    assert_eq!((queue.priority_levels, queue.default_priority), (3, 2));
    let usual = Level {
        timeout_action: TimeoutAction::Delay,
        default_timeout: Duration::from_millis(1),
        allow_timeout_override: true,
        max_size: 0,
    };
    assert_eq!(queue.levels(), [Level { max_size: 7, ..Level::default() }, usual, usual]);
    let warmup = &spec.warmup_requests[0];
    assert_eq!((warmup.batch_size, warmup.count, &warmup.inputs["image"].data), (Some(4), 2, &Filling::Zero));
}

#[test]
fn what_has_no_effect_is_noted_once() {
    let notes = from_text(FULL, &name()).unwrap().notes;
    for field in
        ["metric_tags", "input.format", "instance_group.rate_limiter", "optimization.priority", "preserve_ordering"]
    {
        assert_eq!(notes.iter().filter(|note| note.contains(field)).count(), 1, "{field}: {notes:?}");
    }
    assert_eq!(notes.len(), 5, "{notes:?}");
}

#[test]
fn complaints_stay_short() {
    let long = "n".repeat(10_000);
    for message in [
        refused(&format!("name: \"{long}\"")),
        refused(&format!("input [ {{ name: \"{long}\" dims: [ 0 ] }} ]")),
        refused(&format!("backend: \"onnxruntime\" {long}: 1")),
        from_json(&format!(r#"{{"max_batch_size": "{long}"}}"#), &name()).unwrap_err().message,
        from_json(&format!(r#"{{"{long}": 1}}"#), &name()).unwrap_err().message,
    ] {
        assert!(message.len() < 600, "{message}");
    }
}

#[test]
fn what_would_change_answers_is_refused_by_name() {
    for (text, field) in [
        ("ensemble_scheduling { step [ { model_name: \"a\" } ] }", "ensemble_scheduling"),
        ("platform: \"ensemble\"", "platform"),
        ("platform: \"tensorrt_plan\"", "platform"),
        ("sequence_batching { }", "sequence_batching"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled"),
        ("batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: \"a\" source_input: \"b\" } ]", "batch_input"),
        ("batch_output [ { target_name: \"a\" } ]", "batch_output"),
        ("input [ { name: \"a\" allow_ragged_batch: true } ]", "input.allow_ragged_batch"),
        ("input [ { name: \"a\" is_shape_tensor: true } ]", "input.is_shape_tensor"),
        ("output [ { name: \"a\" is_shape_tensor: true } ]", "output.is_shape_tensor"),
        ("model_operations { op_library_filename: \"x.so\" }", "model_operations"),
        ("model_repository_agents { agents [ { name: \"checksum\" } ] }", "model_repository_agents"),
        ("instance_group [ { kind: KIND_MODEL } ]", "KIND_MODEL"),
        ("instance_group [ { count: -1 } ]", "instance_group.count"),
        ("max_batch_size: -1", "max_batch_size"),
        ("optimization { graph { level: 9 } }", "optimization.graph.level"),
        ("parameters { key: \"execution_mode\" value { string_value: \"fast\" } }", "execution_mode"),
        ("parameters { key: \"intra_op_thread_count\" value { string_value: \"-1\" } }", "intra_op_thread_count"),
        ("default_model_filename: \"../x\"", "default_model_filename '../x'"),
        ("output [ { name: \"y\" label_filename: \"/etc/passwd\" } ]", "output.label_filename: '/etc/passwd'"),
        ("output [ { name: \"y\" label_filename: \"/versions.x\" } ]", "output.label_filename: '/versions.x'"),
        (
            "input [ { name: \"a\" } ] model_warmup [ { name: \"w\" batch_size: 2 } ]",
            "model_warmup 'w': batch_size is 2",
        ),
        ("max_batch_size: 4 model_warmup [ { name: \"w\" batch_size: 5 } ]", "model_warmup: 'w': batch_size 5"),
        ("input [ { name: \"a\" dims: [ 2 ] reshape { shape: [ 3 ] } } ]", "cannot become"),
        ("input [ { data_type: TYPE_FP32 } ]", "needs a name"),
        ("dynamic_batching { priority_levels: 2 }", "dynamic_batching.default_priority_level"),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: [ 8 ] }", "dynamic_batching.preferred_batch_size"),
        ("dynamic_batching { preferred_batch_size: [ -8 ] }", "preferred_batch_size"),
        ("name: \"vgg\"", "'vgg'"),
    ] {
        let message = refused(text);
        assert!(message.contains(field), "{text}: {message}");
    }
    assert!(from_text("model_transaction_policy { decoupled: false }", &name()).is_ok());
}

#[test]
fn mistakes_are_found_by_line_and_column() {
    for (text, place) in [
        ("name: \"a\"\nmax_batch: 8", "line 2, column 1: "),
        ("input [ {\n  name: \"a\"\n  dims: [ x ]\n} ]", "line 3, column 11: "),
        // The colon that was put in does not count.
        ("input [ { nome: \"a\" } ]", "line 1, column 11: "),
        ("instance_group [ { kind: KIND_TPU } ]", "line 1, column 26: "),
        ("input [ {", "line 1, column 10: "),
        ("# größe\n\tname: 3", "line 2, column 8: "),
    ] {
        let message = refused(text);
        assert!(message.starts_with(place), "{text}: {message}");
    }
}

#[test]
fn batching_follows_max_batch_size() {
    let of = |text: &str| {
        let spec = from_text(text, &name()).unwrap();
        (spec.max_batch_size, spec.batching)
    };
    assert_eq!(of("max_batch_size: 4"), (Some(4), Some(true)));
    assert_eq!(of("input [ { name: \"a\" dims: [ 2 ] } ]"), (None, Some(false)));
    // A file that describes no tensors leaves that to the graph.
    assert_eq!(of("instance_group [ { count: 2 } ]"), (None, None));
}

#[test]
fn warm_up_has_rows_where_the_model_has() {
    let warmup = |text: &str| {
        let sample = "model_warmup [ { name: \"w\" batch_size: 1 } , { name: \"none\" } ]";
        let spec = from_text(&format!("{text} {sample}"), &name()).unwrap();
        assert!(spec.notes.iter().any(|note| note.contains("'none'")), "{:?}", spec.notes);
        assert_eq!(spec.warmup_requests.len(), 1);
        spec.warmup_requests[0].batch_size
    };
    assert_eq!(warmup("max_batch_size: 2"), Some(1));
    assert_eq!(warmup("input [ { name: \"a\" dims: [ 2 ] } ]"), None);
    // Such a file leaves the rows to the graph.
    assert_eq!(warmup("instance_group [ { count: 1 } ]"), Some(1));
}

#[test]
fn a_mark_of_the_encoding_is_no_mistake() {
    let spec = from_text("\u{feff}version_policy { latest { } }", &name()).unwrap();
    assert_eq!(spec.versions, VersionPolicy::Latest(1));
}

#[test]
fn json_says_the_same() {
    let text = from_text(FULL, &name()).unwrap();
    let mut message = DynamicMessage::new(descriptor().unwrap());
    message.merge_text_format(&colons::insert(FULL).text).unwrap();
    assert_eq!(from_json(&fields(&message).unwrap().to_string(), &name()).unwrap(), text);
    assert_eq!(from_json(&serde_json::to_string(&message).unwrap(), &name()).unwrap(), text);

    let message = from_json("{\"max_batch\": 3}", &name()).unwrap_err().message;
    assert!(message.contains("max_batch"), "{message}");
    assert!(from_json("{} x", &name()).is_err());
    assert!(from_json("[]", &name()).is_err());
}

#[test]
fn both_languages_say_the_same() {
    let spec = ModelSpec { notes: vec![], ..from_text(FULL, &name()).unwrap() };
    assert_eq!(ModelSpec::from_toml(&spec.to_toml().unwrap()).unwrap(), spec);
    let (text, left_out) = to_text(&spec).unwrap();
    assert_eq!((from_text(&text, &name()).unwrap(), left_out), (spec, vec![]), "{text}");
}

#[test]
fn what_the_other_language_lacks_is_named() {
    let spec = ModelSpec::from_toml(
        "profile = \"throughput\"\nwarmup = [\"a.json\"]\nmax_batch_size = 4\ncheck_signature = false\n[golden]\nmin_accuracy = 1\n\
         [options]\noptimized_model = \"/x\"\ndtype = \"float16\"",
    )
    .unwrap();
    let (_, left_out) = to_text(&spec).unwrap();
    assert_eq!(
        left_out,
        [
            "profile",
            "max_batch_size",
            "warmup",
            "check_signature",
            "golden",
            "options.dtype",
            "options.optimized_model"
        ]
    );
}

#[test]
fn answers_show_every_field() {
    let config = to_json(&[]).unwrap();
    assert_eq!(config["max_batch_size"], 0);
    assert_eq!(config["input"], serde_json::json!([]));
}
