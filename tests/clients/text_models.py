"""Models whose signatures are those of text models, and what they answer.

A text counts as the number that it is the word for, and a list of token ids as their sum.
"""

import numpy as np
from onnx import TensorProto, helper

from models import SETTINGS, model, plus, slow, value

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OTHER = 0.5
SCALE = np.float32([[1, 2, -1, 0.5]])
SHIFT = np.float32([[0, 1, 0, 3]])
OPTIONAL = "".join(
    f'[[inputs]]\nname = "{name}"\noptional = true\n'
    for name in ("text", "input_ids", "attention_mask")
)
EITHER = f"{OPTIONAL}{SETTINGS}"


def numbers(texts):
    return np.float32([WORDS.index(text) + 1 if text in WORDS else OTHER for text in texts])


def vectors(numbers):
    """What a model answers that does not normalize."""
    return np.float32(numbers).reshape(-1, 1) * SCALE + SHIFT


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def add_one_of_each_kind(repository):
    repository.add("embedder", embedding(), settings=EITHER)
    repository.add("ranker", reranker())
    repository.add("plus", plus(1))


def embedding(*, normalized=False):
    """text, or input_ids with attention_mask → embedding; `EITHER` makes them optional."""
    graph = model(
        [
            lookup("text", "text_numbers"),
            helper.make_node("Mul", ["input_ids", "attention_mask"], ["ids"]),
            helper.make_node("ReduceSum", ["ids", "second"], ["sums"], keepdims=0),
            helper.make_node("Cast", ["sums"], ["id_numbers"], to=TensorProto.FLOAT),
            helper.make_node("Concat", ["text_numbers", "id_numbers"], ["numbers"], axis=0),
            helper.make_node("Unsqueeze", ["numbers", "second"], ["column"]),
            helper.make_node("Mul", ["column", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
            helper.make_node("LpNormalization", ["shifted"], ["normalized"], axis=1, p=2)
            if normalized
            else helper.make_node("Identity", ["shifted"], ["normalized"]),
            helper.make_node("Identity", ["normalized"], ["embedding"]),
        ],
        [
            value("text", "BYTES", ["rows"]),
            value("input_ids", "INT64", ["lists", "length"]),
            value("attention_mask", "INT64", ["lists", "length"]),
        ],
        [value("embedding", "FP32", ["any", 4])],
        {
            "second": np.array([1]),
            "scale": SCALE,
            "shift": SHIFT,
            "input_ids": np.zeros((0, 1), np.int64),
            "attention_mask": np.zeros((0, 1), np.int64),
        },
    )
    graph.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [0], []))
    return graph


def unmasked():
    """text, or input_ids → embedding."""
    graph = embedding()
    graph.graph.node[1].CopyFrom(helper.make_node("Identity", ["input_ids"], ["ids"]))
    del graph.graph.input[2]
    (unused,) = [each for each in graph.graph.initializer if each.name == "attention_mask"]
    graph.graph.initializer.remove(unused)
    return graph


def reranker():
    """text → rerank_score: how much greater the second of each pair is."""
    return model(
        [
            lookup("text", "numbers"),
            helper.make_node("MatMul", ["numbers", "difference"], ["column"]),
            helper.make_node("Squeeze", ["column", "second"], ["rerank_score"]),
        ],
        [value("text", "BYTES", ["rows", 2])],
        [value("rerank_score", "FP32", ["rows"])],
        {"difference": np.float32([[-1], [1]]), "second": np.array([1])},
    )


def slow_embedding():
    """text → embedding, for the word "long" after 4,000 products of matrices."""
    graph = slow().graph
    graph.node[-1].output[0] = "ones"
    return model(
        [
            lookup("text", "numbers", ["long"], [4000]),
            helper.make_node("ReduceMax", ["numbers", "first"], ["wanted"], keepdims=1),
            helper.make_node("Cast", ["wanted"], ["iterations"], to=TensorProto.INT64),
            *graph.node,
            helper.make_node("Unsqueeze", ["numbers", "one"], ["column"]),
            helper.make_node("Mul", ["column", "ones"], ["embedding"]),
        ],
        [value("text", "BYTES", ["rows"])],
        [value("embedding", "FP32", ["rows", 1])],
        {
            "first": np.array([0]),
            "unit": np.eye(256, dtype=np.float32),
            "go": np.array(True),
            "one": np.array([1]),
        },
    )


def lookup(source, target, words=tuple(WORDS), values=tuple(range(1, 10))):
    return helper.make_node(
        "LabelEncoder",
        [source],
        [target],
        domain="ai.onnx.ml",
        keys_strings=list(words),
        values_floats=[float(each) for each in values],
        default_float=OTHER,
    )
