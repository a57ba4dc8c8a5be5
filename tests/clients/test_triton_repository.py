"""A repository as Triton's users have it, config.pbtxt and all, served as it is."""

import struct
import subprocess

import numpy as np
import pytest

from clients import GRPC, GRPC_AIO, HTTP, HTTP_AIO
from models import flat, identity, sum_and_difference, with_default
from server import BINARY, Server
from wire import call

KITS = [HTTP, HTTP_AIO, GRPC, GRPC_AIO]

# In Triton's own style: lists of messages without a colon, dimensions without the batch.
SIMPLE = """
name: "simple"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [
  {
    name: "a"
    data_type: TYPE_INT32
    dims: [ 4 ]
  },
  {
    name: "b"
    data_type: TYPE_INT32
    dims: [ 4 ]
  }
]
output [
  {
    name: "difference"
    data_type: TYPE_INT32
    dims: [ 4 ]
  },
  {
    name: "sum"
    data_type: TYPE_INT32
    dims: [ 4 ]
  }
]
version_policy: { all { } }
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  priority_levels: 2
  default_priority_level: 2
  priority_queue_policy { key: 1 value { timeout_action: DELAY default_timeout_microseconds: 1000000 } }
}
instance_group [
  {
    count: 2
    kind: KIND_CPU
  }
]
model_warmup [
  {
    name: "a row from a file, three times"
    batch_size: 3
    inputs {
      key: "a"
      value: { data_type: TYPE_INT32 dims: [ 4 ] input_data_file: "a.raw" }
    }
    inputs {
      key: "b"
      value: { data_type: TYPE_INT32 dims: [ 4 ] random_data: true }
    }
  }
]
"""

UNBATCHED = """
backend: "onnxruntime"
model_warmup {
  name: "as Triton wants it"
  batch_size: 1
  inputs { key: "x" value: { data_type: TYPE_FP32 dims: [ 2, 3 ] zero_data: true } }
}
input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1, 3 ] }
"""

RESHAPED = """
max_batch_size: 4
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1, 1 ] reshape { shape: [ ] } } ]
"""

OPTIONAL = """
input [ { name: "bias" data_type: TYPE_FP32 dims: [ -1, 1 ] optional: true } ]
"""

NAMED_FILE = """
default_model_filename: "net.onnx"
output [ { name: "y" label_filename: "classes.txt" } ]
optimization { graph { level: -1 } execution_accelerators { cpu_execution_accelerator [ { name: "openvino" } ] } }
parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
parameters { key: "execution_mode" value: { string_value: "1" } }
parameters { key: "team" value: { string_value: "vision" } }
parameters { key: "enable_mem_arena" value: { string_value: "1" } }
parameters { key: "memory.enable_memory_arena_shrinkage" value: { string_value: "cpu:0" } }
parameters { key: "session.intra_op.allow_spinning" value: { string_value: "0" } }
"""

# Name → configuration, graph, and what the reason must say.
FAILING = {
    "sequence": ("sequence_batching { }", identity("FP32"), "sequence_batching is not supported"),
    "gpu": ("instance_group [ { kind: KIND_GPU } ]", identity("FP32"), "no GPU can be used"),
    "python": ('backend: "python"', identity("FP32"), "backend 'python' is not supported"),
    "renamed": ('name: "other"', identity("FP32"), "name is 'other'"),
    "mistyped": ("max_batch_size: 2\ninputs [ { } ]", identity("FP32"), "line 2, column 1"),
    "wrong_dims": (
        'max_batch_size: 2 input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, 4 ] } ]',
        identity("FP32", ["rows", 3]),
        "declared with shape [-1, 3, 4]",
    ),
    "wrong_type": (
        'input [ { name: "x" data_type: TYPE_INT8 dims: [ -1, -1 ] } ]',
        identity("FP32"),
        "declared as INT8",
    ),
    "greedy": (
        'max_batch_size: 4 model_warmup [ { name: "w" batch_size: 200000000 inputs { key: "x" value: '
        '{ data_type: TYPE_FP32 dims: [ 1 ] input_data_file: "gone.raw" } } } ]',
        identity("FP32"),
        "batch_size 200000000 is more than max_batch_size",
    ),
    "leaky": (
        'output [ { name: "y" label_filename: "../simple/config.pbtxt" } ]',
        identity("FP32"),
        "output.label_filename: '../simple/config.pbtxt' must lie in the model's folder",
    ),
    "fixed_batch": ("max_batch_size: 8", identity("FP32", [2, 3]), "fixed first dimension 2"),
    "cold": (
        'model_warmup [ { name: "w" batch_size: 1 inputs { key: "x" value: '
        '{ data_type: TYPE_FP32 dims: [ 1, 1 ] input_data_file: "gone.raw" } } } ]',
        identity("FP32"),
        "gone.raw",
    ),
}


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    from models import Repository

    home = tmp_path_factory.mktemp("triton")
    repository = Repository(home / "models")
    row = struct.pack("<4i", 1, 2, 3, 4)
    simple = sum_and_difference()
    repository.triton("simple", simple, SIMPLE, versions=("1", "3"), more={"warmup/a.raw": row})
    repository.triton("unbatched", identity("FP32", ["rows", 3]), UNBATCHED)
    repository.triton("reshaped", flat(), RESHAPED)
    repository.triton("optional", with_default(), OPTIONAL)
    labels = {"classes.txt": b"cat\ndog\n"}
    repository.triton("named_file", identity("FP32"), NAMED_FILE, file="net.onnx", more=labels)
    repository.triton("in_a_folder", identity("FP32"), "", file="model.onnx/model.onnx")
    for name, (config, graph, _) in FAILING.items():
        repository.triton(name, graph, config)
    repository.triton("both", identity("FP32"), "", more={"model.toml": b""})
    with Server(repository.path, home) as running:
        yield running


def config_of(client, model):
    config = client.describe("get_model_config", model)
    return config.get("config", config)


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: f"{kit.port}-{kit.asynchronous}")
def test_the_configured_model_answers(triton, kit):
    a, b = np.arange(8, dtype=np.int32).reshape(2, 4), np.full((2, 4), 5, np.int32)
    with kit.connect(triton) as client:
        for version in ("", "1", "3"):
            answer = client.infer("simple", {"a": a, "b": b}, model_version=version)
            assert np.array_equal(answer.as_numpy("sum"), a + b)
            assert np.array_equal(answer.as_numpy("difference"), a - b)
        metadata = client.describe("get_model_metadata", "simple")
        assert metadata["versions"] == ["1", "3"]
        assert [each["name"] for each in metadata["outputs"]] == ["difference", "sum"]
        assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, 4]


@pytest.mark.parametrize("kit", [HTTP, GRPC], ids=["http", "grpc"])
def test_the_configuration_comes_back(triton, kit):
    with kit.connect(triton) as client:
        config = config_of(client, "simple")
        assert (config["name"], config["platform"], config["backend"]) == (
            "simple",
            "onnxruntime_onnx",
            "onnxruntime",
        )
        assert config["max_batch_size"] == 8
        assert [int(size) for size in config["input"][0]["dims"]] == [4]
        assert config["input"][0]["data_type"] == "TYPE_INT32"
        assert "all" in config["version_policy"]
        (group,) = config["instance_group"]
        assert (group["kind"], group["count"]) == ("KIND_CPU", 2)
        batching = config["dynamic_batching"]
        assert batching["preferred_batch_size"] == [4, 8]
        assert int(batching["max_queue_delay_microseconds"]) == 100
        assert batching["priority_queue_policy"]["1"]["timeout_action"] == "DELAY"
        reshaped = config_of(client, "reshaped")
        assert [int(size) for size in reshaped["output"][0]["dims"]] == [1, 1]
        assert reshaped["input"][0]["reshape"].get("shape", []) == []
        named = config_of(client, "named_file")
        assert named["default_model_filename"] == "net.onnx"
        assert named["output"][0]["label_filename"] == "classes.txt"
        given = {key: value["string_value"] for key, value in named["parameters"].items()}
        assert (given["team"], given["intra_op_thread_count"]) == ("vision", "1")
        assert int(named["optimization"]["graph"]["level"]) == -1
        assert config_of(client, "optional")["input"][1]["optional"] is True


def test_the_largest_batch_is_a_limit(triton):
    with HTTP.connect(triton) as client:
        rows = np.zeros((9, 4), np.int32)
        with pytest.raises(Exception, match="8 rows at most"):
            client.infer("simple", {"a": rows, "b": rows})


def test_without_batch_dimension_dims_are_the_whole_shape(triton):
    x = np.ones((2, 3), np.float32)
    with GRPC.connect(triton) as client:
        assert np.array_equal(client.infer("unbatched", {"x": x}).as_numpy("y"), x)
        config = config_of(client, "unbatched")
        assert config.get("max_batch_size", 0) == 0
        assert [int(size) for size in config["input"][0]["dims"]] == [-1, 3]
        assert "dynamic_batching" not in config


@pytest.mark.parametrize("kit", [HTTP, GRPC], ids=["http", "grpc"])
def test_shapes_are_as_declared(triton, kit):
    with kit.connect(triton) as client:
        answer = client.infer("reshaped", {"x": np.float32([[1], [2]])}).as_numpy("y")
        assert answer.shape == (2, 1, 1)
        assert answer.ravel().tolist() == [2, 4]
        with pytest.raises(Exception, match=r"must have shape \[-1, 1\]"):
            client.infer("reshaped", {"x": np.float32([1, 2])})


@pytest.mark.parametrize("kit", [HTTP, GRPC], ids=["http", "grpc"])
def test_optional_inputs_may_be_left_out(triton, kit):
    x = np.float32([[1, 2]])
    with kit.connect(triton) as client:
        assert client.infer("optional", {"x": x}).as_numpy("y").tolist() == [[11, 12]]
        given = {"bias": np.float32([[5]]), "x": x}
        assert client.infer("optional", given).as_numpy("y").tolist() == [[6, 7]]
        with pytest.raises(Exception, match="input 'x' is missing"):
            client.infer("optional", {"bias": np.float32([[5]])})


@pytest.mark.parametrize("name", ["named_file", "in_a_folder"])
def test_the_file_may_have_another_place(triton, name):
    x = np.float32([[1, 2]])
    with HTTP.connect(triton) as client:
        assert np.array_equal(client.infer(name, {"x": x}).as_numpy("y"), x)


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: f"{kit.port}-{kit.asynchronous}")
def test_classes_have_the_names_in_the_label_file(triton, kit):
    with kit.connect(triton) as client:
        wanted = [kit.package.InferRequestedOutput("y", class_count=1)]
        given = [client.input("x", np.float32([[1, 2]]))]
        answer = client.raw.infer("named_file", given, outputs=wanted)
        assert answer.as_numpy("y").tolist() == [[b"2.000000:1:dog"]]


def test_what_has_no_effect_is_said(triton):
    models = {model["name"]: model for model in call(triton.ops, "GET", "/admin/v1/models").json()}
    (version,) = models["named_file"]["versions"]
    assert any("execution_accelerators" in note for note in version["notes"])
    log = (triton.home / "stderr").read_text()
    assert log.count("optimization.execution_accelerators in config.pbtxt has no effect") == 1


@pytest.mark.parametrize("name", [*FAILING, "both"])
def test_what_cannot_be_done_is_refused(triton, name):
    index = call(triton.rest, "POST", "/v2/repository/index").json()
    (entry,) = [entry for entry in index if entry["name"] == name]
    wanted = "keep one of them" if name == "both" else FAILING[name][2]
    assert entry["state"] == "UNAVAILABLE"
    assert wanted in entry["reason"]


def test_the_languages_are_turned_into_each_other(tmp_path):
    def convert(file):
        command = [BINARY, "config", "convert", file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    pbtxt, toml = tmp_path / "config.pbtxt", tmp_path / "model.toml"
    pbtxt.write_text(SIMPLE)
    toml.write_text(convert(pbtxt))
    assert "max_batch_size = 8" in toml.read_text()
    again = tmp_path / "again.pbtxt"
    again.write_text(convert(toml))
    assert convert(again) == toml.read_text()
    assert convert(pbtxt) == toml.read_text()

    pbtxt.write_text("max_batch_size 8")
    wrong = subprocess.run([BINARY, "config", "convert", pbtxt], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "line 1, column 16" in wrong.stderr
