"""TensorFlow Serving's REST interface, and KServe's V1 protocol, which speaks the same."""

import base64
import json

import numpy as np
import pytest
from onnx import helper

from models import identity, model, plus, value
from server import eventually
from shapes import TEXTS, answer, expected, flowers, pictures, post, refusal, same, texts
from wire import call


def path(name, version=None):
    return f"/v1/models/{name}" + (f"/versions/{version}" if version else "") + ":predict"


def get(server, path):
    reply = call(server.rest, "GET", path)
    return reply.status, reply.json()


# --- rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, "1"])
@pytest.mark.parametrize("named", [False, True])
def test_rows_of_several_outputs(server, named, version):
    rows = flowers()
    right = expected("iris", X=rows)
    instances = [{"X": row} if named else row for row in rows.tolist()]
    reply = answer(server, path("iris", version), {"instances": instances})
    assert list(reply) == ["predictions"]
    assert [row["label"] for row in reply["predictions"]] == right["label"].tolist()
    got = [row["probabilities"] for row in reply["predictions"]]
    assert same(got, right["probabilities"])


def test_rows_of_one_output(server):
    images = pictures()
    body = {"signature_name": "serving_default", "instances": images.tolist()}
    reply = answer(server, path("digits"), body)
    assert same(reply["predictions"], expected("digits", image=images)["logits"])


def test_rows_of_several_inputs(server):
    instances = [{"a": [1, 2, 3, 4], "b": [10, 20, 30, 40]}, {"b": [0, 0, 0, 1], "a": [5, 6, 7, 8]}]
    reply = answer(server, path("simple"), {"instances": instances})
    assert reply["predictions"] == [
        {"sum": [11, 22, 33, 44], "difference": [-9, -18, -27, -36]},
        {"sum": [5, 6, 7, 9], "difference": [5, 6, 7, 7]},
    ]


def test_texts(server):
    right = expected("language", text=texts())
    coded = [TEXTS[0], *({"b64": base64.b64encode(each.encode()).decode()} for each in TEXTS[1:])]
    for instances in (TEXTS, coded, [{"text": each} for each in coded]):
        reply = answer(server, path("language"), {"instances": instances})
        assert [row["language"] for row in reply["predictions"]] == right["language"].tolist()
        assert same([row["probabilities"] for row in reply["predictions"]], right["probabilities"])


# --- columns ------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_columns_of_several_outputs(server, named):
    rows = flowers()
    right = expected("iris", X=rows)
    inputs = {"X": rows.tolist()} if named else rows.tolist()
    reply = answer(server, path("iris"), {"inputs": inputs})
    assert list(reply) == ["outputs"]
    assert reply["outputs"]["label"] == right["label"].tolist()
    assert same(reply["outputs"]["probabilities"], right["probabilities"])


def test_columns_of_one_output(server):
    images = pictures()
    reply = answer(server, path("digits"), {"inputs": images.tolist()})
    assert same(reply["outputs"], expected("digits", image=images)["logits"])


def test_columns_of_several_inputs(server):
    inputs = {"b": [[1, 1, 1, 1]], "a": [[1, 2, 3, 4]]}
    assert answer(server, path("simple"), {"inputs": inputs})["outputs"] == {
        "sum": [[2, 3, 4, 5]],
        "difference": [[0, 1, 2, 3]],
    }


def test_scalars_and_fixed_shapes(server):
    assert answer(server, path("scalar"), {"inputs": 2.5})["outputs"] == 2.5
    fixed = [[1, 2, 3], [4, 5, 6]]
    assert answer(server, path("fixed"), {"inputs": fixed})["outputs"] == fixed


# --- values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("bool", [True, False]),
        ("uint8", [0, 255]),
        ("int8", [-128, 127]),
        ("uint16", [0, 65535]),
        ("int16", [-32768, 32767]),
        ("uint32", [0, 2**32 - 1]),
        ("int32", [-(2**31), 2**31 - 1]),
        ("uint64", [0, 2**64 - 1]),
        ("int64", [-(2**63), 2**63 - 1]),
        ("fp16", [0.5, -65504.0]),
        ("bf16", [0.5, -2.0]),
        ("fp32", [0.1, -1e30]),
        ("fp64", [0.1, 1e300]),
        ("bytes", ["ü\"\\\n", ""]),
    ],
)
def test_every_type_both_ways(server, datatype, values):
    where = path(f"identity_{datatype}")
    assert answer(server, where, {"instances": [values, values]})["predictions"] == [values, values]
    assert answer(server, where, {"inputs": {"x": [values]}})["outputs"] == [values]


def test_sixteen_bits_are_rounded(server):
    """What comes back is the nearest number there is, as a float of 32 bits."""
    for datatype, kept in (("fp16", 11), ("bf16", 8)):
        ((got,),) = answer(server, path(f"identity_{datatype}"), {"inputs": [[0.1]]})["outputs"]
        assert abs(got - 0.1) <= 0.1 * 2**-kept
        assert got != 0.1
    status, message = refusal(server, path("identity_fp16"), {"inputs": [[1e6]]})
    assert status == 400
    assert "FP16" in message


def test_numbers_that_are_none(server):
    """Both ways as literals, by default; Python's JSON speaks them."""
    values = [float("nan"), float("inf"), float("-inf")]
    (got,) = answer(server, path("identity_fp32"), {"instances": [values]})["predictions"]
    assert np.array_equal(got, values, equal_nan=True)


def test_numbers_that_are_none_as_configured(serve, repository):
    repository.add("identity", identity("FP32"))
    body = {"instances": [[float("inf")]]}
    null = serve(repository.path, "null", config='json_nonfinite = "null"\n')
    assert answer(null, path("identity"), body)["predictions"] == [[None]]
    error = serve(repository.path, "error", config='json_nonfinite = "error"\n')
    status, message = refusal(error, path("identity"), body)
    assert status == 400
    assert "identity" in message
    assert "Infinity" in message


def test_base64_by_name(serve, repository):
    """By TensorFlow's convention outputs whose names end in `_bytes` are base64."""
    graph = identity("BYTES", ["rows"])
    graph.graph.output[0].name = graph.graph.node[0].output[0] = "y_bytes"
    repository.add("blobs", graph)
    server = serve(repository.path)
    values = [{"b64": base64.b64encode(each).decode()} for each in ("ü".encode(), b"text", b"")]
    for instances in (values, ["ü", "text", ""]):
        reply = answer(server, path("blobs"), {"instances": instances})
        assert reply["predictions"] == values
    # Strings of ONNX Runtime are UTF-8, whichever way they come in.
    status, message = refusal(server, path("blobs"), {"instances": [{"b64": "/w=="}]})
    assert status == 400
    assert "UTF-8" in message


# --- what goes wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("nosuch", {"instances": [1]}, 404, ["nosuch"]),
        ("iris", {}, 400, ["iris", "instances", "inputs"]),
        ("iris", {"instances": [[1, 2, 3, 4]], "inputs": []}, 400, ["iris", "both"]),
        ("iris", {"instances": []}, 400, ["iris", "no rows"]),
        ("iris", {"instances": [[1, 2, 3]]}, 400, ["iris", "X", "[-1, 4]", "[1, 3]"]),
        ("iris", {"instances": [[1, 2, 3, "4"]]}, 400, ["iris", "instances", "element 3"]),
        ("iris", {"instances": [[1, 2, 3, 4], [1]]}, 400, ["iris", "rows of 4 and of 1"]),
        ("iris", {"instances": [{"Y": 1}]}, 400, ["iris", "instances[0]", "'Y'", "'X'"]),
        ("iris", {"inputs": [[1e39, 0, 0, 0]]}, 400, ["iris", "FP32"]),
        ("iris", {"inputs": [], "signature_name": "x"}, 400, ["iris", "signature_name"]),
        ("simple", {"instances": [[1]]}, 400, ["simple", "'a', 'b'"]),
        ("simple", {"instances": [{"a": [1, 2, 3, 4]}]}, 400, ["simple", "'b'", "missing"]),
        ("scalar", {"instances": [1]}, 400, ["scalar", "x", "[1]"]),
        ("limited", {"instances": [[1]] * 5}, 400, ["limited", "4"]),
        ("identity_uint8", {"inputs": [[256]]}, 400, ["0 to 255", "256"]),
        ("identity_bytes", {"inputs": [[{"b64": "?"}]]}, 400, ["base64"]),
        ("iris", "[" * 100_000, 400, ["iris", "JSON"]),
        ("iris", '{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}", 400, ["iris", "64"]),
        ("iris", b'{"inputs": [[1, 2, 3, 4]]', 400, ["iris", "JSON"]),
    ],
)
def test_refusals(server, name, body, status, words):
    got, message = refusal(server, path(name), body)
    assert got == status, message
    for word in words:
        assert word in message, message


def test_rows_need_rows(serve, repository):
    """The model's only output is a scalar, which the other format can give back."""
    node = helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0)
    shape = ["rows"]
    repository.add("most", model([node], [value("x", "FP32", shape)], [value("most", "FP32", [])]))
    server = serve(repository.path)
    assert answer(server, path("most"), {"inputs": [1, 3, 2]})["outputs"] == 3
    status, message = refusal(server, path("most"), {"instances": [1, 3, 2]})
    assert status == 400
    for word in ("most", "scalar", "'inputs'"):
        assert word in message


@pytest.mark.parametrize("verb", ["classify", "regress", "explain", "x"])
@pytest.mark.parametrize("where", ["iris", "iris/versions/1", "nosuch"])
def test_other_verbs_are_not_here(server, verb, where):
    status, message = refusal(server, f"/v1/models/{where}:{verb}", {})
    assert status == 501
    assert f":{verb}" in message
    assert ":predict" in message


@pytest.mark.parametrize(
    ("method", "where"), [("GET", "iris:predict"), ("POST", "iris"), ("POST", "iris/versions/1")]
)
def test_wrong_verbs(server, method, where):
    reply = call(server.rest, method, f"/v1/models/{where}", b"{}" if method == "POST" else None)
    assert reply.status == 405
    assert list(reply.json()) == ["error"]


def test_small_bodies_stay_small(serve, repository):
    """Seven times as many bytes in memory as on the wire are refused before they are there."""
    repository.ship("language")
    server = serve(repository.path, config="[limits]\nmax_message_bytes = 100000\n")
    body = json.dumps({"instances": [""] * 20_000})
    assert len(body) < 100_000
    status, message = refusal(server, path("language"), body)
    assert status == 413
    assert "max_message_bytes" in message
    status, message = refusal(server, path("language"), {"instances": ["x" * 100_000]})
    assert status == 413


def test_the_requests_count(serve, repository):
    repository.add("plus", plus(1))
    server = serve(repository.path)
    assert answer(server, path("plus"), {"instances": [[1]]})["predictions"] == [[2]]
    assert post(server, path("plus"), {}).status == 400

    def counted():
        (entry,) = get(server, "/v2/models/plus/stats")[1]["model_stats"]
        return entry["inference_stats"]["success"]["count"]

    assert eventually(lambda: counted() == 1)
    lines = call(server.ops, "GET", "/metrics").body.decode().splitlines()
    requests = [line for line in lines if 'model="plus"' in line and 'protocol="rest"' in line]
    assert any('code="ok"' in line and line.endswith(" 1") for line in requests), requests
    assert any('code="invalid_argument"' in line for line in requests), requests


# --- status and metadata ------------------------------------------------------------


def available(version):
    ok = {"error_code": "OK", "error_message": ""}
    return {"version": version, "state": "AVAILABLE", "status": ok}


@pytest.mark.parametrize("where", ["iris", "iris/versions/1"])
def test_status(server, where):
    both = {"name": "iris", "ready": True, "model_version_status": [available("1")]}
    status, body = get(server, f"/v1/models/{where}")
    # OpenAI's clients ask there for a model.
    theirs = {"id", "object", "created", "owned_by"} if where == "iris" else set()
    assert (status, {name: body[name] for name in both}) == (200, both)
    assert set(body) == set(both) | theirs


@pytest.mark.parametrize("where", ["nosuch", "iris/versions/9", "nosuch/metadata"])
def test_status_of_what_is_not_there(server, where):
    status, body = get(server, f"/v1/models/{where}")
    assert status == 404
    assert where.split("/")[0] in body["error"]


def test_status_of_versions(serve, repository):
    """A version that fails is told of beside one that serves; alone it makes the model unready."""
    repository.add("mixed", plus(1), version="1")
    repository.add("mixed", b"no graph", version="2")
    repository.add("broken", b"no graph")
    server = serve(repository.path)
    status, body = get(server, "/v1/models/mixed")
    first, second = body["model_version_status"]
    assert (status, body["ready"], first) == (200, True, available("1"))
    assert (second["version"], second["state"]) == ("2", "END")
    assert second["status"]["error_code"] == "UNKNOWN"
    assert second["status"]["error_message"]
    status, body = get(server, "/v1/models/mixed/versions/2")
    assert (status, body["ready"], body["model_version_status"]) == (503, False, [second])
    status, body = get(server, "/v1/models/broken")
    assert (status, body["name"], body["ready"]) == (503, "broken", False)
    assert post(server, path("broken"), {"instances": [[1]]}).status == 503


def test_list(server):
    status, body = get(server, "/v1/models")
    assert status == 200
    # OpenAI's list is at the same path.
    assert set(body) == {"models", "object", "data"}
    assert {"iris", "digits", "language"} <= set(body["models"])


@pytest.mark.parametrize("where", ["iris", "iris/versions/1"])
def test_metadata(server, where):
    status, body = get(server, f"/v1/models/{where}/metadata")
    assert status == 200
    assert body["model_spec"] == {"name": "iris", "signature_name": "", "version": "1"}
    signature = body["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"

    def tensor(side, name):
        info = signature[side][name]
        return info["dtype"], [dim["size"] for dim in info["tensor_shape"]["dim"]]

    assert tensor("inputs", "X") == ("DT_FLOAT", ["-1", "4"])
    assert tensor("outputs", "label") == ("DT_INT64", ["-1"])
    assert tensor("outputs", "probabilities") == ("DT_FLOAT", ["-1", "3"])
