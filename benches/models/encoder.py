"""Makes the ONNX graph of a BERT encoder in the Hugging Face layout, for candle to be held against.

    python benches/models/encoder.py MODEL FOLDER [EXPECTED]

`FOLDER/minilm/1` gets the files that say how texts become tokens and embeddings, and `onnx/model.onnx`: token ids in, the
last hidden state out, in the operators that PyTorch's exporter writes, so that ONNX Runtime finds what it fuses. EXPECTED are
the texts and embeddings of tests/encoders/minilm.json.gz; with it the graph is run, and fails when it gives others.
"""

import base64
import gzip
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# What ONNX Runtime has known for years; the first with LayerNormalization.
OPSET, IR_VERSION = 17, 8
INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
# What says how texts become tokens, and embeddings of what comes out.
FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
]
# What padding gets before the softmax, so that nothing is left of it.
HIDDEN = np.finfo(np.float32).min
# How far from the reference an embedding may be.
TOLERANCE = 1e-4
# Rows of a batch when the graph is checked.
ROWS = 16


def main(source, folder, expected=None):
    config = json.loads((source / "config.json").read_text())
    kind = config.get("model_type"), config.get("hidden_act"), config.get("position_embedding_type", "absolute")
    if kind != ("bert", "gelu", "absolute"):
        raise SystemExit(f"{source}: only BERT with gelu and absolute positions is made, not {', '.join(map(str, kind))}")
    version = folder / "minilm" / "1"
    for file in FILES:
        (version / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, version / file)
    path = version / "onnx" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    # Whoever measures meanwhile sees the old file or the new one.
    staged = path.with_suffix(".staged")
    staged.write_bytes(encoder(config, read(source / "model.safetensors")).SerializeToString(deterministic=True))
    if expected:
        check(staged, json.loads(gzip.decompress(expected.read_bytes())))
    staged.rename(path)


def read(file):
    """The tensors of a safetensors file, by name."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        name.removeprefix("bert."): np.frombuffer(data[slice(*each["data_offsets"])], DTYPES[each["dtype"]])
        .astype(np.float32)
        .reshape(each["shape"])
        for name, each in header.items()
        if each["dtype"].startswith("F")
    }


class Graph:
    """Nodes in order, and what is constant in them."""

    def __init__(self, weights):
        self.weights, self.nodes, self.initializers = weights, [], {}

    def add(self, kind, *inputs, **attributes):
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(self, name, value):
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def number(self, value):
        return self.constant(f"number_{value}", np.float32(value))

    def integers(self, *values):
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def weight(self, name):
        return self.constant(name, self.weights[name])

    def linear(self, name, value):
        product = self.add("MatMul", value, self.constant(f"{name}.weight", self.weights[f"{name}.weight"].T))
        return self.add("Add", self.weight(f"{name}.bias"), product)

    def normalized(self, name, value, epsilon):
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", value, scale, bias, axis=-1, epsilon=epsilon)

    def gelu(self, value):
        error = self.add("Erf", self.add("Div", value, self.number(2**0.5)))
        product = self.add("Mul", value, self.add("Add", error, self.number(1.0)))
        return self.add("Mul", product, self.number(0.5))


def encoder(config, weights):
    graph, epsilon = Graph(weights), config["layer_norm_eps"]
    ids, mask, types = INPUTS
    words = graph.add("Gather", graph.weight("embeddings.word_embeddings.weight"), ids)
    kinds = graph.add("Gather", graph.weight("embeddings.token_type_embeddings.weight"), types)
    length = graph.add("Slice", graph.add("Shape", ids), graph.integers(1), graph.integers(2))
    table = graph.weight("embeddings.position_embeddings.weight")
    places = graph.add("Slice", table, graph.integers(0), length, graph.integers(0))
    summed = graph.add("Add", graph.add("Add", words, kinds), places)
    hidden = graph.normalized("embeddings.LayerNorm", summed, epsilon)
    wide = graph.add("Unsqueeze", graph.add("Unsqueeze", mask, graph.integers(1)), graph.integers(2))
    kept = graph.add("Sub", graph.number(1.0), graph.add("Cast", wide, to=TensorProto.FLOAT))
    bias = graph.add("Mul", kept, graph.number(HIDDEN))
    for layer in range(config["num_hidden_layers"]):
        hidden = block(graph, f"encoder.layer.{layer}", hidden, bias, config)
    graph.nodes.append(helper.make_node("Identity", [hidden], ["last_hidden_state"]))
    tokens = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in INPUTS]
    states = ["batch", "length", config["hidden_size"]]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, states)
    made = helper.make_graph(graph.nodes, "encoder", tokens, [output], list(graph.initializers.values()))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def block(graph, name, hidden, bias, config):
    heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]
    width = config["hidden_size"] // heads

    def split(which, order):
        value = graph.linear(f"{name}.attention.self.{which}", hidden)
        return graph.add("Transpose", graph.add("Reshape", value, graph.integers(0, 0, heads, width)), perm=order)

    query, key = split("query", [0, 2, 1, 3]), split("key", [0, 2, 3, 1])
    scores = graph.add("Div", graph.add("MatMul", query, key), graph.number(width**0.5))
    shares = graph.add("Softmax", graph.add("Add", scores, bias), axis=-1)
    context = graph.add("MatMul", shares, split("value", [0, 2, 1, 3]))
    context = graph.add("Transpose", context, perm=[0, 2, 1, 3])
    context = graph.add("Reshape", context, graph.integers(0, 0, heads * width))
    attended = graph.add("Add", graph.linear(f"{name}.attention.output.dense", context), hidden)
    hidden = graph.normalized(f"{name}.attention.output.LayerNorm", attended, epsilon)
    inner = graph.gelu(graph.linear(f"{name}.intermediate.dense", hidden))
    summed = graph.add("Add", graph.linear(f"{name}.output.dense", inner), hidden)
    return graph.normalized(f"{name}.output.LayerNorm", summed, epsilon)


def check(path, expected):
    """Fails when mean embeddings of length 1 are not those that are expected."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = expected["input_ids"]
    wanted = np.frombuffer(base64.b64decode(expected["embeddings"]), "<f4").reshape(len(rows), -1)
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        ids, mask = (np.zeros((len(some), max(map(len, some))), np.int64) for _ in range(2))
        for row, tokens in enumerate(some):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        (states,) = session.run(None, dict(zip(INPUTS, [ids, mask, np.zeros_like(ids)], strict=True)))
        found = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        apart = np.abs(found - wanted[start : start + ROWS]).max()
        if not apart <= TOLERANCE:
            raise SystemExit(f"{path}: an embedding of texts {start} to {start + len(some) - 1} is {apart} apart")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
