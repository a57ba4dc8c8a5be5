"""Outputs as their best classes, with every stock client."""

import numpy as np
import pytest
from ml_dtypes import bfloat16
from tritonclient.utils import InferenceServerException

from clients import GRPC, GRPC_AIO, HTTP, HTTP_AIO
from infer import rest_error
from models import Repository, identity
from server import Server, eventually
from wire import call

KITS = {"http": HTTP, "http_aio": HTTP_AIO, "grpc": GRPC, "grpc_aio": GRPC_AIO}
SCORES = np.array([[0.25, 0.9, -1, 0.5], [4, 4, 1e6, np.nan]], np.float32)
NAMES = "cat\nsea lion\n\nd\u00e9j\u00e0 vu\n"
LABELLED = 'labels = { y = "labels.txt" }\n[options]\nintra_op_threads = 1\n'


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A server whose models answer with their input; one knows its classes by name."""
    home = tmp_path_factory.mktemp("classification")
    repository = Repository(home / "models")
    for datatype in ("FP32", "FP16", "BF16", "FP64", "INT64", "UINT8", "BOOL", "BYTES"):
        repository.add(f"identity_{datatype.lower()}", identity(datatype))
    repository.add("fixed", identity("FP32", [2, 3]))
    repository.add("column", identity("FP32", ["rows"]))
    repository.add("deep", identity("FP32", ["rows", 2, 2]))
    repository.put("named", "1", LABELLED, add_named)
    with Server(repository.path, home) as running:
        yield running


def add_named(folder):
    (folder / "model.onnx").write_bytes(identity("FP32").SerializeToString())
    (folder.parent / "labels.txt").write_text(NAMES)


@pytest.fixture(params=KITS)
def client(request, labelled):
    with KITS[request.param].connect(labelled) as client:
        yield client


def classes(client, model, array, count, binary=True):
    """The texts of the classes, in the shape they came in."""
    wanted = client.kit.package.InferRequestedOutput
    output = wanted("y", class_count=count, **client.binary(binary))
    request = {**client.request(model, {"x": array}), "outputs": [output]}
    found = client.raw.infer(**request).as_numpy("y")
    assert found.dtype == np.object_
    as_text = np.vectorize(lambda each: each.decode() if isinstance(each, bytes) else each)
    return as_text(found) if found.size else found


def test_the_best_of_each_row(client):
    assert classes(client, "identity_fp32", SCORES, 2).tolist() == [
        ["0.900000:1", "0.500000:3"],
        ["1000000.000000:2", "4.000000:0"],
    ]


def test_classes_in_json(client):
    found = classes(client, "identity_fp32", SCORES[:1], 1, binary=False)
    assert found.tolist() == [["0.900000:1"]]


def test_no_more_than_there_are(client):
    found = classes(client, "identity_fp32", SCORES, 100)
    assert found.shape == (2, 4)
    assert found[1].tolist() == ["1000000.000000:2", "4.000000:0", "4.000000:1", "nan:3"]


def test_none_means_values(client):
    output = client.kit.package.InferRequestedOutput("y", class_count=0)
    request = {**client.request("identity_fp32", {"x": SCORES}), "outputs": [output]}
    assert client.raw.infer(**request).as_numpy("y").dtype == np.float32


def test_labels(client):
    assert classes(client, "named", SCORES, 4).tolist() == [
        ["0.900000:1:sea lion", "0.500000:3:d\u00e9j\u00e0 vu", "0.250000:0:cat", "-1.000000:2"],
        ["1000000.000000:2", "4.000000:0:cat", "4.000000:1:sea lion", "nan:3:d\u00e9j\u00e0 vu"],
    ]


@pytest.mark.parametrize(
    ("model", "array", "expected"),
    [
        ("identity_fp16", np.array([[0.1, 0.2]], np.float16), [["0.199951:1"]]),
        ("identity_bf16", np.array([[-2, 0.9]], bfloat16), [["0.898438:1"]]),
        ("identity_fp64", np.array([[0.1, 1 / 3]]), [["0.333333:1"]]),
        ("identity_int64", np.array([[2**62, 2**62 + 1]]), [["4611686018427387905:1"]]),
        ("identity_uint8", np.array([[3, 255, 7]], np.uint8), [["255:1"]]),
        ("fixed", np.array([[1, 2, 3], [9, 8, 7]], np.float32), ["9.000000:3"]),
        ("column", np.array([1, 5], np.float32), [["1.000000:0"], ["5.000000:0"]]),
        ("deep", np.array([[[1, 2], [4, 3]]], np.float32), [["4.000000:2"]]),
    ],
)
def test_types_and_shapes(client, model, array, expected):
    assert classes(client, model, array, 1).tolist() == expected


@pytest.mark.parametrize("model", ["identity_bool", "identity_bytes"])
def test_what_has_no_order(client, model):
    values = {"identity_bool": np.array([[True]]), "identity_bytes": np.array([["a"]], np.object_)}
    with pytest.raises(InferenceServerException, match=f"{model}.*'y' is B(OOL|YTES)") as caught:
        classes(client, model, values[model], 1)
    assert caught.value.status() == client.kit.status("invalid_argument")


def test_a_count_that_is_none(client):
    wanted = "'classification' must be a whole number"
    with pytest.raises(InferenceServerException, match=wanted) as caught:
        classes(client, "identity_fp32", SCORES, -1)
    assert caught.value.status() == client.kit.status("invalid_argument")


@pytest.mark.parametrize("count", [150_000, 2**31 - 1])
def test_more_texts_than_are_allowed(client, count):
    row = np.full((1, 150_000), -1e308)
    with pytest.raises(InferenceServerException, match="identity_fp64.*'y'.*fewer") as caught:
        classes(client, "identity_fp64", row, count)
    assert caught.value.status() == client.kit.status("too_large")
    assert classes(client, "identity_fp64", row, 10_000).shape == (1, 10_000)


# --- label files --------------------------------------------------------------------


def test_new_labels_load_the_model_anew(repository, serve):
    folder = repository.put("named", "1", LABELLED, add_named).parent
    server = serve(repository.path)
    with GRPC.connect(server) as client:
        assert classes(client, "named", SCORES[:1], 1).item() == "0.900000:1:sea lion"
        (folder / "labels.txt").write_text("a\nb\nc\n")

        def is_new():
            return classes(client, "named", SCORES[:1], 1).item() == "0.900000:1:b"

        eventually(is_new, timeout=20)


def test_a_label_file_that_is_not_there(repository, serve):
    repository.add("good", identity("FP32"))
    repository.put("bad", "1", LABELLED, add_unlabelled)
    server = serve(repository.path)
    reply = call(server.rest, "GET", "/v2/models/bad/config")
    assert reply.status == 503
    assert "labels.txt" in rest_error(reply)
    assert "'y'" in rest_error(reply)


def add_unlabelled(folder):
    add_named(folder)
    (folder.parent / "labels.txt").unlink()
