"""Triton's generate extension: flat JSON in and out, whole or as server-sent events."""

import gzip
import json

import pytest

from shapes import TEXTS, answer, expected, post, refusal, same, texts
from wire import call

PATH = "/v2/models/language/generate"


@pytest.mark.parametrize("path", [PATH, "/v2/models/language/versions/1/generate"])
def test_one_text(server, path):
    reply = answer(server, path, {"text": TEXTS[1]})
    assert (reply["model_name"], reply["model_version"]) == ("language", "1")
    assert "id" not in reply
    right = expected("language", text=texts(TEXTS[1:2]))
    assert reply["language"] == right["language"][0] == "de"
    assert same(reply["probabilities"], right["probabilities"].reshape(-1))


def test_several_texts_come_back_flat(server):
    reply = answer(server, PATH, {"text": TEXTS})
    right = expected("language", text=texts())
    assert reply["language"] == right["language"].tolist()
    assert same(reply["probabilities"], right["probabilities"].reshape(-1))


def test_the_id_comes_back(server):
    body = {"id": "über-17", "text": TEXTS[0], "stream": False, "parameters": {"temperature": 0}}
    assert answer(server, PATH, body)["id"] == "über-17"


def test_parameters_may_name_inputs(server):
    body = {"parameters": {"text": TEXTS[1], "temperature": 0}}
    assert answer(server, PATH, body) == answer(server, PATH, {"text": TEXTS[1]})


@pytest.mark.parametrize(
    "headers", [{}, {"Accept": "text/event-stream"}, {"Accept-Encoding": "gzip"}]
)
def test_a_stream_has_one_event(server, headers):
    body = {"id": "7", "text": TEXTS[0] * 40}
    reply = post(server, PATH + "_stream", body, headers)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-encoding" not in reply.headers
    assert reply.body.startswith(b"data: {")
    assert reply.body.endswith(b"}\n\n")
    assert reply.body.count(b"\n") == 2
    assert json.loads(reply.body[len("data: ") :]) == answer(server, PATH, body)


def test_line_ends_stay_inside_an_event(server):
    reply = post(server, "/v2/models/identity_bytes/generate_stream", {"x": ["a\n\ndata: b", "\r"]})
    assert reply.body.count(b"\n") == 2
    assert json.loads(reply.body[len("data: ") :])["y"] == ["a\n\ndata: b", "\r"]


def test_the_shape_is_the_models(server):
    """[rows, columns]: one row of one text, one row of three."""
    path = "/v2/models/identity_bytes/generate"
    assert answer(server, path, {"x": "ü\t\"'"})["y"] == "ü\t\"'"
    assert answer(server, path, {"x": ["a", "", "c"]})["y"] == ["a", "", "c"]
    assert answer(server, path, {"x": []})["y"] == []


@pytest.mark.parametrize("way", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("model", "body", "status", "words"),
    [
        ("nosuch", {"text": "x"}, 404, ["nosuch"]),
        ("language/versions/9", {"text": "x"}, 404, ["language", "9"]),
        ("iris", {"X": [1, 2, 3, 4]}, 400, ["iris", "text", "no input is BYTES"]),
        ("language", {}, 400, ["language", "text", "missing"]),
        ("language", {"text": 5}, 400, ["language", "text", "string"]),
        ("language", {"text": None}, 400, ["language", "text", "null"]),
        ("language", {"text": "x", "more": {}}, 400, ["language", "more", "parameter"]),
        ("language", {"text": "x", "parameters": 1}, 400, ["language", "parameters"]),
        ("language", {"text": "x", "parameters": {"text": "x"}}, 400, ["language", "text", "twice"]),
        ("language", {"text": "x", "id": 1}, 400, ["language", "id"]),
        ("language", {"text": "x", "sequence_id": 1}, 501, ["language", "sequence"]),
        ("language", {"text": "x", "timeout": "soon"}, 400, ["language", "timeout"]),
        ("language", [], 400, ["language", "object"]),
        ("language", "{", 400, ["language", "JSON"]),
        ("language", "", 400, ["language", "JSON"]),
        ("language", b'{"text": "\xff"}', 400, ["language", "JSON"]),
    ],
)
def test_refusals(server, way, model, body, status, words):
    """Nothing is streamed before all is known, so that errors have their status on both routes."""
    got, message = refusal(server, f"/v2/models/{model}/{way}", body)
    assert got == status, message
    for word in words:
        assert word in message


def test_deadlines_count(server):
    got, message = refusal(server, PATH, {"text": TEXTS[0]}, {"X-Request-Timeout-Ms": "0"})
    assert (got, "deadline" in message) == (504, True), message


def test_compression(server):
    packed = gzip.compress(json.dumps({"text": TEXTS[0]}).encode())
    reply = post(server, PATH, packed, {"Content-Encoding": "gzip"})
    assert (reply.status, reply.headers["content-encoding"]) == (200, "gzip")
    assert reply.json()["language"] == "en"
    long = post(server, PATH, {"text": TEXTS * 100}, {"Accept-Encoding": "gzip"})
    assert long.headers["content-encoding"] == "gzip"
    assert len(long.json()["language"]) == 300


def test_other_verbs(server):
    reply = call(server.rest, "GET", PATH)
    assert reply.status == 405
    assert list(reply.json()) == ["error"]
