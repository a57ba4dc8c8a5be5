"""Makes the models that memory and loading are measured with; the files come out the same on every machine.

    python benches/models/sized.py FOLDER

`wide`: a chain of matrix products whose weights have 200 MB. `deep`: a chain of some thousand small operators, 10 MB in
all, which takes ONNX Runtime about 0.4 s to load, as a model of ordinary size does.
"""

import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

OPSETS = [helper.make_opsetid("", 20)]
# Weights so small that no chain of products overflows.
SCALE = 1e-2

WIDE_SIZE, WIDE_LAYERS = 2236, 10  # 10 x 2236² x 4 bytes = 200 MB
DEEP_SIZE, DEEP_LAYERS = 40, 1400  # 1400 x (40² + 40) x 4 bytes = 9 MB


def weights(random, *shape):
    return (random.random(shape, dtype=np.float32) - 0.5) * SCALE


def chain(name, size, layers, bias):
    """`layers` matrix products, each followed by Tanh and, with a bias, an addition that nothing can fold away."""
    random = np.random.default_rng(1)
    nodes, initializers, value = [], [], "x"
    for layer in range(layers):
        initializers.append(numpy_helper.from_array(weights(random, size, size), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"]))
        value = f"m{layer}"
        if bias:
            initializers.append(numpy_helper.from_array(weights(random, size), f"b{layer}"))
            nodes.append(helper.make_node("Add", [value, f"b{layer}"], [f"a{layer}"]))
            nodes.append(helper.make_node("Tanh", [f"a{layer}"], [f"t{layer}"]))
            value = f"t{layer}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["rows", size]) for end in "xy"]
    graph = helper.make_graph(nodes, name, ends[:1], ends[1:], initializers)
    # The version of the format that every ONNX Runtime of ours reads.
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


def save(folder, name, model):
    path = folder / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whoever measures meanwhile sees the old file or the new one.
    staged = path.with_suffix(".staged")
    staged.write_bytes(model.SerializeToString(deterministic=True))
    staged.rename(path)


def main(folder):
    save(folder, "wide", chain("wide", WIDE_SIZE, WIDE_LAYERS, bias=False))
    save(folder, "deep", chain("deep", DEEP_SIZE, DEEP_LAYERS, bias=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
