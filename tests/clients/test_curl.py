"""The examples that people paste: curl and the requests that ship with the models."""

import json
import subprocess

import pytest

from models import SHIPPED
from tensors import pack

SHIPPED_MODELS = ["iris", "digits", "language"]


def curl(*arguments, code=0):
    done = subprocess.run(["curl", "-sS", "--max-time", "30", *arguments], capture_output=True)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout


def url(server, path):
    return f"http://{server.rest}{path}"


def sample(model):
    return SHIPPED / model / "request.json"


@pytest.mark.parametrize("model", SHIPPED_MODELS)
@pytest.mark.parametrize("way", ["--data", "--data-binary", "--json"])
def test_the_sample_request(server, model, way):
    """`-d` says it sends a form; nobody who pastes an example wants to hear of it."""
    reply = json.loads(curl(way, f"@{sample(model)}", url(server, f"/v2/models/{model}/infer")))
    (given,) = json.loads(sample(model).read_text())["inputs"]
    assert (reply["model_name"], reply["model_version"]) == (model, "1")
    for output in reply["outputs"]:
        assert output["shape"][0] == given["shape"][0]


def test_what_the_samples_are(server):
    """The first flower is a setosa, the texts are what they are written in."""
    path = "/v2/models/{}/infer"
    flowers = json.loads(curl("-d", f"@{sample('iris')}", url(server, path.format("iris"))))
    assert flowers["outputs"][0]["name"] == "label"
    assert flowers["outputs"][0]["data"] == [0, 1, 2]
    texts = json.loads(curl("-d", f"@{sample('language')}", url(server, path.format("language"))))
    assert texts["outputs"][0]["data"] == ["en", "fr", "de"]


@pytest.mark.parametrize("path", ["live", "ready"])
def test_health(server, path):
    assert json.loads(curl("--fail", url(server, f"/v2/health/{path}"))) == {path: True}


def test_fail_fails(server):
    curl("--fail", "-o", "/dev/null", url(server, "/v2/models/nosuch"), code=22)


def test_compressed(server, tmp_path):
    """`--compressed` gets gzip for a long JSON reply, and plain JSON for a short one."""
    zeros = {"name": "x", "datatype": "FP32", "shape": [1, 5000], "data": [0] * 5000}
    body = tmp_path / "body"
    body.write_text(json.dumps({"inputs": [zeros]}))
    long = url(server, "/v2/models/identity_fp32/infer")
    short = url(server, "/v2/models/iris/infer")

    reply = curl("--compressed", "-D", "-", "-d", f"@{body}", long).decode()
    assert "content-encoding: gzip" in reply.lower()
    assert json.loads(reply.split("\r\n\r\n")[-1])["outputs"][0]["data"] == [0] * 5000
    for plain in (
        curl("--compressed", "-D", "-", "-d", f"@{sample('iris')}", short),
        curl("-D", "-", "-d", f"@{body}", long),
    ):
        assert b"content-encoding" not in plain.lower()


def test_a_binary_request(server, tmp_path):
    """curl asks for leave (`Expect: 100-continue`) before it sends as much as this."""
    values = pack("FP32", list(range(300_000)))
    head = {"name": "x", "datatype": "FP32", "shape": [1, 300_000]}
    head["parameters"] = {"binary_data_size": len(values)}
    message = {"inputs": [head], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    text = json.dumps(message).encode()
    body, reply = tmp_path / "body", tmp_path / "reply"
    body.write_bytes(text + values)
    length = ["-H", f"Inference-Header-Content-Length: {len(text)}"]
    arguments = ["--data-binary", f"@{body}", "-o", reply, *length]
    curl(*arguments, url(server, "/v2/models/identity_fp32/infer"))
    assert reply.read_bytes().startswith(b'{"model_name":"identity_fp32"')
    assert reply.read_bytes().endswith(values)


def test_one_connection_for_several_requests(server):
    twice = [url(server, "/v2/health/live")] * 2
    assert curl("-w", "%{num_connects}", "-o", "/dev/null", "-o", "/dev/null", *twice) == b"10"
