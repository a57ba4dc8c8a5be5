"""Every datatype, every rank and every way in: what goes through `Identity` must come back."""

import json
import math

import pytest

from infer import BINARY_WAYS, WAYS, Question, ask, rest_error
from models import identity
from tensors import DATATYPES, binary_message, described, same_bytes, tensor
from wire import call

# Six elements of each, the awkward ones.
SAMPLES = {
    "BOOL": [True, False, True, True, False, False],
    "UINT8": [0, 1, 127, 128, 254, 255],
    "UINT16": [0, 1, 256, 32767, 32768, 65535],
    "UINT32": [0, 1, 65536, 2**31 - 1, 2**31, 2**32 - 1],
    "UINT64": [0, 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1],
    "INT8": [0, 1, -1, 127, -127, -128],
    "INT16": [0, 1, -1, 256, 32767, -32768],
    "INT32": [0, 1, -1, 65536, 2**31 - 1, -(2**31)],
    "INT64": [0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63)],
    "FP16": [0.0, -0.0, 1.5, 65504.0, 6e-8, math.inf],
    "BF16": [0x0000, 0x8000, 0x3FC0, 0x7F7F, 0x0001, 0xFF80],
    "FP32": [0.1, -0.0, 1e-45, 3.4028234663852886e38, 16777217.0, -1.17549435e-38],
    "FP64": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, -2.2250738585072014e-308],
    "BYTES": ["", "a", "grüße ☃ 🚀", 'quote " slash \\ line\n\ttab\x01', "ab" * 2000, " \u2028 "],
}
BINARY_ONLY = {"FP16", "BF16"}
NONFINITE = [math.nan, math.inf, -math.inf]


def ways(datatype):
    return BINARY_WAYS if datatype in BINARY_ONLY else list(WAYS)


EVERY_WAY = [(datatype, way) for datatype in DATATYPES for way in ways(datatype)]


def through_identity(server, way, datatype, shape, data):
    """y, after x has been sent; its name and shape are checked."""
    x = tensor("x", datatype, shape, data)
    y = ask(server, way, f"identity_{datatype.lower()}", x).outputs["y"]
    assert y.shape == list(shape)
    assert same_bytes(y, datatype, x.data), f"{y.data} for {x.data}"


@pytest.mark.parametrize(("datatype", "way"), EVERY_WAY)
def test_every_datatype(server, datatype, way):
    through_identity(server, way, datatype, [2, 3], SAMPLES[datatype])


@pytest.mark.parametrize(("datatype", "way"), EVERY_WAY)
def test_empty_tensors(server, datatype, way):
    through_identity(server, way, datatype, [0, 3], [])


@pytest.mark.parametrize("datatype", sorted(BINARY_ONLY))
def test_no_json_for_half_floats(server, datatype):
    model, x = f"identity_{datatype.lower()}", tensor("x", datatype, [1, 1], [1])
    answer = WAYS["rest_json"](server, Question(model, [x]))
    assert answer.status == 400
    for word in (model, "x", datatype, "binary"):
        assert word in answer.error

    blob = x.packed()
    head = {**described(x), "parameters": {"binary_data_size": len(blob)}}
    body, headers = binary_message({"inputs": [head]}, [blob])
    reply = call(server.rest, "POST", f"/v2/models/{model}/infer", body, headers)
    assert reply.status == 400
    for word in (model, "y", datatype, "binary"):
        assert word in rest_error(reply)


@pytest.mark.parametrize("way", WAYS)
def test_scalars(server, way):
    y = ask(server, way, "scalar", tensor("x", "FP32", [], [2.5])).outputs["y"]
    assert (y.shape, y.data) == ([], [2.5])


@pytest.mark.parametrize("way", WAYS)
def test_fixed_shapes(server, way):
    x = tensor("x", "FP32", [2, 3], [1, 2, 3, 4, 5, 6])
    y = ask(server, way, "fixed", x).outputs["y"]
    assert (y.shape, y.data) == ([2, 3], [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("way", WAYS)
def test_several_inputs_and_outputs(server, way):
    a = tensor("a", "INT32", [2, 4], [1, 2, 3, 4, 5, 6, 7, 8])
    b = tensor("b", "INT32", [2, 4], [10] * 8)
    outputs = ask(server, way, "simple", b, a).outputs
    assert outputs["sum"].data == [11, 12, 13, 14, 15, 16, 17, 18]
    assert outputs["difference"].data == [-9, -8, -7, -6, -5, -4, -3, -2]
    assert [each.shape for each in outputs.values()] == [[2, 4], [2, 4]]


@pytest.mark.parametrize("way", WAYS)
def test_the_rows_of_a_limited_model(server, way):
    """`max_batch_size = 4` lets four rows through; the conformance suite has the fifth."""
    x = tensor("x", "FP32", [4, 1], [1, 2, 3, 4])
    assert ask(server, way, "limited", x).outputs["y"].data == [1, 2, 3, 4]


def test_nested_data(server):
    a = {"name": "a", "datatype": "INT32", "shape": [2, 4]}
    b = {**a, "name": "b", "data": [1, 2, 3, 4, 5, 6, 7, 8]}
    a["data"] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    body = json.dumps({"inputs": [a, b]}, indent=2).encode()
    reply = call(server.rest, "POST", "/v2/models/simple/infer", body).json()
    (difference,) = [each for each in reply["outputs"] if each["name"] == "difference"]
    assert difference["data"] == [0] * 8


# --- NaN and Infinity, which JSON does not have -------------------------------------


def infer_nonfinite(server, datatype="FP32"):
    x = {"name": "x", "datatype": datatype, "shape": [1, 3], "data": NONFINITE}
    body = json.dumps({"inputs": [x]}).encode()
    assert b"[NaN, Infinity, -Infinity]" in body
    return call(server.rest, "POST", f"/v2/models/identity_{datatype.lower()}/infer", body)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_nonfinite_numbers_are_written_bare(server, datatype):
    reply = infer_nonfinite(server, datatype)
    assert reply.status == 200
    assert b"[NaN,Infinity,-Infinity]" in reply.body.replace(b" ", b"")


@pytest.mark.parametrize("way", WAYS)
def test_nonfinite_numbers_every_way(server, way):
    through_identity(server, way, "FP32", [1, 3], NONFINITE)


@pytest.fixture
def serve_nonfinite(repository, serve):
    def start(policy):
        repository.add("identity_fp32", identity("FP32"))
        return serve(repository.path, config=f'json_nonfinite = "{policy}"\n')

    return start


def test_nonfinite_numbers_as_null(serve_nonfinite):
    reply = infer_nonfinite(serve_nonfinite("null"))
    assert reply.status == 200
    assert reply.json()["outputs"][0]["data"] == [None, None, None]


def test_nonfinite_numbers_as_an_error(serve_nonfinite):
    """The client can help itself by asking for binary outputs, so it is told so."""
    server = serve_nonfinite("error")
    reply = infer_nonfinite(server)
    assert reply.status == 400
    for word in ("identity_fp32", "y", "binary"):
        assert word in rest_error(reply)
    through_identity(server, "rest_binary", "FP32", [1, 3], NONFINITE)
