"""Requests in other servers' shapes, and what ONNX Runtime says to them in this process."""

import json

import numpy as np
import onnxruntime

from models import SHIPPED
from wire import call

JSON = {"Content-Type": "application/json"}
CSV = {"Content-Type": "text/csv"}
TEXTS = ["Where is the station?", "Wo ist der Bahnhof, bitte?", "Où est la gare ?"]

# Rows that share a run may have their sums added up in another order.
RELATIVE = 1e-5
ABSOLUTE = 1e-7


def expected(model, **inputs):
    """Output name → array."""
    session = onnxruntime.InferenceSession(SHIPPED / model / "1" / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def flowers(count=20):
    rng = np.random.default_rng(1)
    return rng.uniform([4.3, 2.0, 1.0, 0.1], [7.9, 4.4, 6.9, 2.5], (count, 4)).astype(np.float32)


def pictures(count=3):
    return np.random.default_rng(2).integers(0, 17, (count, 1, 8, 8)).astype(np.float32)


def texts(words=TEXTS):
    return np.array(words, dtype=np.object_)


def same(got, array):
    """Whether a JSON value is what ONNX Runtime answered."""
    if array.dtype.kind in "OUS":
        return got == array.tolist()
    got = np.array(got)
    return got.shape == array.shape and np.allclose(got, array, RELATIVE, ABSOLUTE)


def post(server, path, body, headers=JSON):
    if not isinstance(body, bytes):
        body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return call(server.rest, "POST", path, body, headers)


def answer(server, path, body, headers=JSON):
    """The JSON of an answer that must be one."""
    reply = post(server, path, body, headers)
    assert reply.status == 200, (reply.status, reply.body)
    assert reply.headers["content-type"] == "application/json"
    return reply.json()


def refusal(server, path, body, headers=JSON):
    """Status and sentence of an answer that must be none."""
    reply = post(server, path, body, headers)
    assert reply.headers["content-type"] == "application/json", reply
    message = reply.json()
    assert list(message) == ["error"], message
    return reply.status, message["error"]
