"""Makes the models for images of 602 KB that the benchmark serves; the files come out the same on every machine.

    python benches/models/make.py FOLDER

`identity` gives the image back and shows what carrying it costs; `convolution` is a small network of one to three
milliseconds, which gives ten scores.
"""

import sys
from pathlib import Path

import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIDE = 3, 224
SCORES = 10
# Opset and IR version that ONNX Runtime has known for years.
OPSET, IR_VERSION = 17, 8


def tensor(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])


def save(folder, name, nodes, output, weights=()):
    image = tensor("image", [CHANNELS, SIDE, SIDE])
    graph = helper.make_graph(nodes, name, [image], [output], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    path = folder / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def identity(folder):
    copy = helper.make_node("Identity", ["image"], ["same"])
    save(folder, "identity", [copy], tensor("same", [CHANNELS, SIDE, SIDE]))


def convolution(folder):
    random = numpy.random.default_rng(0)
    weights, nodes, previous, channels = [], [], "image", CHANNELS

    def weight(name, *shape):
        # Uniform with the variance that keeps activations in range.
        bound = (3.0 / numpy.prod(shape[1:])) ** 0.5
        values = (random.random(shape) * 2 - 1) * bound
        weights.append(numpy_helper.from_array(values.astype(numpy.float32), name))
        return name

    for layer, width in enumerate(WIDTHS):
        kernel = weight(f"kernel_{layer}", width, channels, 3, 3)
        nodes.append(
            helper.make_node("Conv", [previous, kernel], [f"sum_{layer}"], strides=[2, 2], pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node("Relu", [f"sum_{layer}"], [f"layer_{layer}"]))
        previous, channels = f"layer_{layer}", width
    nodes.append(helper.make_node("GlobalAveragePool", [previous], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["features"]))
    nodes.append(helper.make_node("Gemm", ["features", weight("scores_of", SCORES, channels)], ["scores"], transB=1))
    save(folder, "convolution", nodes, tensor("scores", [SCORES]), weights)


# Channels after each halving of the sides: 1.5 ms on a core of today.
WIDTHS = [24, 48, 96]

if __name__ == "__main__":
    identity(Path(sys.argv[1]))
    convolution(Path(sys.argv[1]))
