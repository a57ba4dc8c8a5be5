"""The protocol, case by case; the cases are data, in `conformance/`.

infer.json   an inference, asked in each way: JSON and binary over REST, raw and typed over gRPC
rest.json    calls of REST paths
json.json    infer bodies that are JSON, or are not
binary.json  infer bodies with headers: binary tensors, compression, limits
grpc.json    calls of gRPC methods
frames.json  calls that no gRPC library would make, unary and on a stream

A case says which `code` it must get; one table tells what that is over each protocol.
`error_contains` are expressions that the message must match, `reply` is a part of the reply
that must be there, `reply_has` an entry of the list that the reply is.
"""

import json
import re
import socket
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2_grpc

from infer import WAYS, Question, ask, connect, rest_error
from models import Repository, add_small_models
from parts import build, build_part, request_message
from server import Server
from tensors import same_bytes, tensor
from wire import CODES, TIMEOUT, call, call_frame, frame

LIMIT = 1 << 20
CASES = Path(__file__).resolve().parent / "conformance"
INFER_METHOD = "inference.GRPCInferenceService/ModelInfer"
STREAM_METHOD = "inference.GRPCInferenceService/ModelStreamInfer"


def cases(file):
    """Parametrizes a test with the cases of a file."""
    found = json.loads((CASES / file).read_text())
    names = [case["name"] for case in found]
    assert len(set(names)) == len(names), f"two cases of {file} have one name"
    return pytest.mark.parametrize("case", found, ids=names)


@pytest.fixture(scope="module", params=[256 << 10, 0], ids=["inline", "aside"])
def server(request, tmp_path_factory):
    """With a limit of 1 MiB; whatever it is sent, it is the same process in the end.

    Whether a message is read where connections are served, or is too long for that, shows nowhere.
    """
    home = tmp_path_factory.mktemp("conformance")
    repository = Repository(home / "models")
    repository.ship("iris", "language")
    add_small_models(repository)
    config = f"[limits]\nmax_message_bytes = {LIMIT}\nmax_inline_bytes = {request.param}\n"
    with Server(repository.path, home, config) as running:
        yield running
        assert running.stop() == 0, running.tail()


@pytest.fixture(autouse=True)
def unharmed(server):
    yield
    assert server.is_running(), f"the case ended the server:\n{server.tail()}"


def expect(case, status, error):
    """Checks status and message of what came back."""
    assert status in CODES[case["code"]], f"{status}: {error}"
    if case["code"] == "ok":
        return
    assert len(error.split()) >= 3, f"no sentence: {error!r}"
    for expression in case.get("error_contains", []):
        assert re.search(expression, error, re.IGNORECASE), f"no {expression!r} in {error!r}"


def expect_part(expected, got, path="reply"):
    """Every key of `expected` must be in `got`; lists must be as long."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert key in got, f"{path} has no {key!r}: {got}"
            expect_part(value, got[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{path} is {got}"
        for index, value in enumerate(expected):
            expect_part(value, got[index], f"{path}[{index}]")
    else:
        assert got == expected, f"{path} is {got}"


def expect_headers(case, headers):
    for name, expression in case.get("reply_headers", {}).items():
        assert re.search(expression, headers.get(name, "")), f"{name} is {headers.get(name)!r}"


# --- inference, in every way --------------------------------------------------------


def infer_cases():
    found = json.loads((CASES / "infer.json").read_text())
    return [
        pytest.param(case, way, id=f"{case['name']}: {way}")
        for case in found
        for way in case.get("ways", WAYS)
    ]


@pytest.mark.parametrize(("case", "way"), infer_cases())
def test_infer(server, case, way):
    inputs = [read_tensor(each) for each in case["inputs"]]
    more = {key: case[key] for key in ("outputs", "version", "id", "parameters") if key in case}
    answer = WAYS[way](server, Question(case["model"], inputs, **more))
    expect(case, answer.status, answer.error)
    if case["code"] == "ok":
        assert (answer.model, answer.version) == (case["model"], "1")
        assert answer.id == case.get("id", "")
        assert answer.outputs.keys() == case["reply"].keys()
        for name, expected in case["reply"].items():
            assert answer.outputs[name] == read_tensor({"name": name, **expected})


def read_tensor(fields):
    data = [build_part(each) if isinstance(each, dict) else each for each in fields["data"]]
    return tensor(fields["name"], fields["datatype"], fields["shape"], data)


# --- REST ---------------------------------------------------------------------------


def expect_rest(case, reply):
    expect(case, reply.status, "" if reply.status == 200 else rest_error(reply))
    expect_headers(case, reply.headers)
    if "reply" in case:
        expect_part(case["reply"], reply.json())
    if "reply_has" in case:
        assert any(case["reply_has"].items() <= each.items() for each in reply.json())


@cases("rest.json")
def test_rest(server, case):
    body = build(case["body"]) if "body" in case else None
    reply = call(server.rest, case["method"], case["path"], body, case.get("headers"))
    expect_rest(case, reply)


@cases("json.json")
def test_json(server, case):
    post_inference(server, case)


@cases("binary.json")
def test_binary(server, case):
    post_inference(server, case)


def post_inference(server, case):
    parts = [build_part(part) for part in case["body"]]
    first = len(parts[0]) if parts else 0
    lengths = {"{first}": str(first), "{first+1}": str(first + 1)}
    headers = {name: lengths.get(text, text) for name, text in case.get("headers", {}).items()}
    body = parts if case.get("chunked") else b"".join(parts)
    reply = call(server.rest, "POST", f"/v2/models/{case['model']}/infer", body, headers)
    expect_rest(case, reply)


# --- gRPC ---------------------------------------------------------------------------


@cases("grpc.json")
def test_grpc(server, case):
    request = request_message(case["call"], case.get("message", {}))
    try:
        reply, error = call_method(server, case["call"], request), None
    except grpc.RpcError as refusal:
        reply, error = None, refusal
    expect(case, error.code().name if error else "OK", error and error.details())
    if reply is None:
        return
    fields = json_format.MessageToDict(
        reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    expect_part(case.get("reply", {}), fields)
    if "reply_has" in case:
        assert any(case["reply_has"].items() <= each.items() for each in fields["models"])


def call_method(server, name, request):
    with connect(server) as channel:
        method = getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), name)
        if name == "ModelStreamInfer":
            return next(method(iter([request]), timeout=TIMEOUT))
        return method(request, timeout=TIMEOUT)


@pytest.mark.parametrize("method", [INFER_METHOD, STREAM_METHOD])
@cases("frames.json")
def test_frames(server, case, method):
    sent = build(case["bytes"]) if "bytes" in case else framed(case)
    if method == STREAM_METHOD and "stream_code" in case:
        case = case | {"code": case["stream_code"]}
    reply = call_frame(server.grpc, case.get("method", method), sent, case.get("headers"))
    expect(case, reply.status, reply.error)
    expect_headers(case, reply.headers)
    if "reply_flag" in case:
        assert reply.frame[0] == case["reply_flag"]


def framed(case):
    return frame(build(case["frame"]), case.get("compressed", False))


# --- all of them together -----------------------------------------------------------


def test_half_open_and_slow_clients_keep_nobody_waiting(server):
    """Connections that send nothing, half a head or half a body, on both data ports."""
    head = b"POST /v2/models/plus/infer HTTP/1.1\r\nHost: a\r\n"
    beginnings = [b"", b"POST /v2/mod", head, head + b"Content-Length: 100\r\n\r\n{"]
    with ExitStack() as stack:
        for address in (server.rest, server.grpc):
            for beginning in beginnings * 25:
                host, port = address.split(":")
                slow = stack.enter_context(socket.create_connection((host, int(port))))
                slow.sendall(beginning)
        still_answers(server)
    still_answers(server)


def test_the_server_is_unharmed(server):
    """The last word: after everything above, every way still gets its answer."""
    still_answers(server)


def still_answers(server):
    for way in WAYS:
        y = ask(server, way, "plus", tensor("x", "FP32", [2, 1], [1, 2])).outputs["y"]
        assert same_bytes(y, "FP32", [2, 3])
