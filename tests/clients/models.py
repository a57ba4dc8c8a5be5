"""The models that tests need, as graphs of a few nodes, and a repository to put them in."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

SHIPPED = Path(__file__).resolve().parents[2] / "models"

# One thread in every operator, so that sums are added up in one order everywhere.
SETTINGS = "[options]\nintra_op_threads = 1\n"

ELEMENT_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
OPSETS = {"": 20, "ai.onnx.ml": 3}


class Repository:
    """A folder of models. What is added appears at once: it is written elsewhere, then renamed."""

    def __init__(self, path):
        self.path = path
        self.staging = path / ".staging"
        self.staging.mkdir(parents=True)

    def add(self, name, graph, version="1", settings=SETTINGS):
        """A version that is `graph`: bytes, or anything that serializes."""
        return self.put(name, version, settings, lambda folder: save(graph, folder / "model.onnx"))

    def copy(self, name, source, settings=SETTINGS):
        """Version 1 with the files of the folder `source`."""
        return self.put(name, "1", settings, lambda folder: copy_into(source, folder))

    def triton(self, name, graph, config, versions=("1",), file="model.onnx", more=None):
        """A model as Triton's users lay it out; `more` are further files, by path and content."""
        staged = self.staging / name
        for path, content in (more or {}).items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).write_bytes(content)
        for version in versions:
            (staged / version / file).parent.mkdir(parents=True)
            save(graph, staged / version / file)
        (staged / "config.pbtxt").write_text(config)
        staged.rename(self.path / name)

    def put(self, name, version, settings, write):
        """The folder of a new version that `write` fills; `settings` count for a new model."""
        staged = self.staging / name
        folder = staged / version
        folder.mkdir(parents=True)
        write(folder)
        model = self.path / name
        if model.exists():
            folder.rename(model / version)
            staged.rmdir()
        else:
            (staged / "model.toml").write_text(settings)
            staged.rename(model)
        return model / version

    def ship(self, *names):
        for name in names:
            self.copy(name, SHIPPED / name / "1")

    def remove(self, name):
        """Out of the repository in one step, then from the disk."""
        gone = self.staging / f"removed-{name}"
        (self.path / name).rename(gone)
        shutil.rmtree(gone)


def add_small_models(repository):
    """One model of a node or two for each thing that can be special about a model."""
    for datatype in ELEMENT_TYPES:
        repository.add(f"identity_{datatype.lower()}", identity(datatype))
    repository.add("plus", plus(1))
    repository.add("simple", sum_and_difference())
    repository.add("slow", slow())
    repository.add("scalar", identity("FP32", []))
    repository.add("fixed", identity("FP32", [2, 3]))
    repository.add("limited", identity("FP32"), settings=f"max_batch_size = 4\n{SETTINGS}")


def save(graph, file):
    file.write_bytes(graph if isinstance(graph, bytes) else graph.SerializeToString())


def copy_into(source, folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)


def magika():
    """The folder of the ONNX model inside the `magika` package, which need not be imported."""
    (package,) = importlib.util.find_spec("magika").submodule_search_locations
    (file,) = Path(package).glob("models/*/model.onnx")
    return file.parent


def identity(datatype, shape=("rows", "columns")):
    """x → y, the same."""
    return model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", datatype, shape)],
        [value("y", datatype, shape)],
    )


def plus(number, datatype="FP32", width=1):
    """x → y = x + number: tells which version answered."""
    return model(
        [helper.make_node("Add", ["x", "number"], ["y"])],
        [value("x", datatype, ["rows", width])],
        [value("y", datatype, ["rows", width])],
        {"number": helper.tensor_dtype_to_np_dtype(ELEMENT_TYPES[datatype]).type(number)},
    )


def sum_and_difference():
    """a, b → sum = a + b, difference = a - b."""
    row = ["rows", 4]
    return model(
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Sub", ["a", "b"], ["difference"]),
        ],
        [value("a", "INT32", row), value("b", "INT32", row)],
        [value("sum", "INT32", row), value("difference", "INT32", row)],
    )


def with_default():
    """x, bias (with the value 10 when it is not given) → y = x + bias."""
    return model(
        [helper.make_node("Add", ["x", "bias"], ["y"])],
        [value("x", "FP32", ["rows", 2]), value("bias", "FP32", ["bias_rows", 1])],
        [value("y", "FP32", ["rows", 2])],
        {"bias": np.float32([[10]])},
    )


def flat():
    """x without a second dimension → y = 2x, likewise."""
    return model(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [value("x", "FP32", ["rows"])],
        [value("y", "FP32", ["rows"])],
    )


def slow():
    """iterations → y = 1, after as many products of 256 by 256 matrices (0.2 to 0.5 ms each)."""
    square = (256, 256)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["matrix", "unit"], ["product"]),
            helper.make_node("Identity", ["going"], ["still_going"]),
        ],
        "body",
        [
            value("iteration", "INT64", []),
            value("going", "BOOL", []),
            value("matrix", "FP32", square),
        ],
        [value("still_going", "BOOL", []), value("product", "FP32", square)],
    )
    return model(
        [
            helper.make_node("Loop", ["iterations", "go", "unit"], ["last"], body=body),
            helper.make_node("ReduceMax", ["last"], ["most"], keepdims=0),
            helper.make_node("Reshape", ["most", "one"], ["y"]),
        ],
        [value("iterations", "INT64", [1])],
        [value("y", "FP32", [1])],
        {"unit": np.eye(256, dtype=np.float32), "go": np.array(True), "one": np.array([1])},
    )


def zipmap(*, with_tensor):
    """X → the sequence of maps that scikit-learn's converter makes, beside a tensor or alone."""
    pairs = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    )
    zipped = helper.make_value_info("zipped", helper.make_sequence_type_proto(pairs))
    nodes = [
        helper.make_node("Softmax", ["X"], ["probabilities"]),
        helper.make_node(
            "ZipMap",
            ["probabilities"],
            ["zipped"],
            domain="ai.onnx.ml",
            classlabels_int64s=[0, 1, 2, 3],
        ),
    ]
    outputs = [value("probabilities", "FP32", ["rows", 4])] if with_tensor else []
    return model(nodes, [value("X", "FP32", ["rows", 4])], [*outputs, zipped])


def with_external_data(location):
    """y = x + weights, with the four float32 weights in the file `location`."""
    graph = model(
        [helper.make_node("Add", ["x", "weights"], ["y"])],
        [value("x", "FP32", ["rows", 4])],
        [value("y", "FP32", ["rows", 4])],
        {"weights": EXTERNAL_WEIGHTS},
    )
    (weights,) = graph.graph.initializer
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, "offset": "0", "length": "16"}.items():
        weights.external_data.add(key=key, value=text)
    return graph


EXTERNAL_WEIGHTS = np.array([1, 2, 3, 4], dtype=np.float32)


def value(name, datatype, shape):
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[datatype], shape)


def model(nodes, inputs, outputs, constants=None, opsets=OPSETS):
    initializers = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    return helper.make_model(
        helper.make_graph(nodes, "graph", inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid(*opset) for opset in opsets.items()],
        ir_version=9,
    )
