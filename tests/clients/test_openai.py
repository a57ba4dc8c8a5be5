"""OpenAI's embeddings and list of models, asked by OpenAI's own client."""

import base64
import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from encoders import add, onnx_body, with_config
from models import plus, save
from server import ROOT, eventually
from shapes import post
from text_models import (
    EITHER,
    OPTIONAL,
    SETTINGS,
    embedding,
    numbers,
    slow_embedding,
    unit,
    unmasked,
    vectors,
)
from wire import call

PATH = "/v1/embeddings"
ENCODERS = ROOT / "tests" / "encoders"
TEXTS = ["one", "nine", "", "Größe 🌊"]


@pytest.fixture(scope="module")
def server(text_server):
    return text_server


def connect(server):
    return openai.OpenAI(base_url=f"http://{server.rest}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    return connect(server)


def embedded(answer):
    assert answer.object == "list"
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    assert {each.object for each in answer.data} == {"embedding"}
    return np.array([each.embedding for each in answer.data])


def refusal(server, body, path=PATH, headers=None):
    """Status, type and message of an answer that must be none."""
    reply = post(server, path, body, headers or {})
    assert reply.headers["content-type"] == "application/json", reply
    message = reply.json()
    assert list(message) == ["error"], message
    assert set(message["error"]) == {"message", "type", "param", "code"}, message
    return reply.status, message["error"]["type"], message["error"]["message"]


# --- vectors ------------------------------------------------------------------------


def test_texts(client):
    """The client asks for base64 on its own accord."""
    answer = client.embeddings.create(model="embedder", input=TEXTS)
    assert answer.model == "embedder"
    assert np.array_equal(embedded(answer), vectors(numbers(TEXTS)))
    one = client.embeddings.create(model="embedder", input=TEXTS[1])
    assert np.array_equal(embedded(one), vectors([9]))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (0, 0)


def test_the_only_model_needs_no_name(client):
    answer = client.embeddings.create(model="", input="two")
    assert (answer.model, embedded(answer).tolist()) == ("embedder", vectors([2]).tolist())


def test_numbers_and_base64(server, client):
    floats = client.embeddings.create(model="embedder", input=TEXTS, encoding_format="float")
    assert np.array_equal(embedded(floats), vectors(numbers(TEXTS)))
    raw = post(server, PATH, {"input": "two", "encoding_format": "base64", "user": "me"}).json()
    (coded,) = raw["data"]
    got = np.frombuffer(base64.b64decode(coded["embedding"]), "<f4")
    assert np.array_equal(got, vectors([2])[0])
    plain = post(server, PATH, {"input": "two"}).json()
    assert plain["data"][0]["embedding"] == vectors([2])[0].tolist()


def test_token_ids(client):
    answer = client.embeddings.create(model="embedder", input=[3, 4, 5])
    assert np.array_equal(embedded(answer), vectors([12]))
    answer = client.embeddings.create(model="embedder", input=[[1], [2, 3, 4], [5, 6]])
    assert np.array_equal(embedded(answer), vectors([1, 9, 11]))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (6, 6)


def test_fewer_dimensions(client):
    answer = client.embeddings.create(model="embedder", input=TEXTS, dimensions=2)
    expected = unit(vectors(numbers(TEXTS))[:, :2])
    assert np.allclose(embedded(answer), expected, atol=1e-6)
    answer = client.embeddings.create(model="embedder", input=TEXTS, dimensions=4)
    assert np.allclose(embedded(answer), unit(vectors(numbers(TEXTS))), atol=1e-6)


def test_a_long_request(client):
    """Longer than what is read where connections are served."""
    texts = ["six", "x" * 100] * 4000
    answer = client.embeddings.create(model="embedder", input=texts)
    assert np.array_equal(embedded(answer), vectors(numbers(texts)))
    lists = [[index] * 40 for index in range(4000)]
    answer = client.embeddings.create(model="embedder", input=lists)
    assert np.array_equal(embedded(answer), vectors([40 * index for index in range(4000)]))


def test_packed_requests(server):
    body = gzip.compress(json.dumps({"input": ["one"] * 1000}).encode())
    reply = post(server, PATH, body, {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"})
    assert reply.headers["content-encoding"] == "gzip"
    assert len(reply.json()["data"]) == 1000


def test_lists_of_one_length_need_no_mask(serve, repository):
    settings = OPTIONAL.rsplit("[[inputs]]", 1)[0] + SETTINGS
    repository.add("unmasked", unmasked(), settings=settings)
    client = connect(serve(repository.path))
    answer = client.embeddings.create(model="unmasked", input=[[1, 2], [3, 4]])
    assert np.array_equal(embedded(answer), vectors([3, 7]))
    with pytest.raises(openai.BadRequestError, match="attention_mask.*one length, got 1 and 2"):
        client.embeddings.create(model="unmasked", input=[[1], [3, 4]])


def test_an_encoder(serve, repository):
    """The same vectors by every way, and its tokens counted without padding."""
    repository.copy("encoder", ENCODERS / "bert-cls", settings="")
    server = serve(repository.path)
    client = connect(server)
    cases = json.loads((ENCODERS / "bert-cls" / "expected.json").read_text())["cases"]
    texts, lists, right = (
        [case[name] for case in cases] for name in ("text", "input_ids", "embedding")
    )
    for given in (texts, lists):
        answer = client.embeddings.create(model="encoder", input=given)
        assert np.allclose(embedded(answer), right, atol=1e-4)
        assert answer.usage.total_tokens == sum(map(len, lists))
    by_text = client.embeddings.create(model="encoder", input=texts)
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    (output,) = post(server, "/v2/models/encoder/infer", {"inputs": [tensor]}).json()["outputs"]
    assert np.allclose(np.ravel(embedded(by_text)), output["data"], atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="encoder.*99999"):
        client.embeddings.create(model="encoder", input=[1, 99999])


CANARY = """versions = "all"
[rollout]
on_new_version = "canary"
every = "1h"
steps = [50, 100]
"""


def test_a_canary_with_other_integers(serve, repository):
    """Token ids become what the version takes that was drawn for them."""

    def taking(datatype):
        def change(folder):
            (folder / "model.safetensors").unlink()
            with_config(hidden_size=8)(folder)
            (folder / "onnx").mkdir()
            save(onnx_body(datatype), folder / "onnx" / "model.onnx")

        return change

    add(repository, "encoder", "bert-mean", CANARY, taking("INT64"))
    server = serve(repository.path)
    case = json.loads((ENCODERS / "bert-mean" / "expected.json").read_text())["cases"][0]
    wanted = post(server, PATH, {"input": case["input_ids"]}).json()["data"]
    add(repository, "encoder", "bert-mean", CANARY, taking("INT32"), version="2")

    def phase():
        return call(server.ops, "GET", "/admin/v1/models/encoder/rollout").json().get("phase")

    eventually(lambda: phase() == "canary", 60)
    versions = set()
    for given in [case["input_ids"], case["text"]] * 20:
        reply = post(server, PATH, {"input": given})
        assert reply.status == 200, reply.body
        assert np.allclose(reply.json()["data"][0]["embedding"], wanted[0]["embedding"], atol=1e-5)
        versions.add(reply.headers["x-tidegate-version"])
    assert versions == {"1", "2"}


# --- models -------------------------------------------------------------------------


def test_the_list_of_models(client):
    listed = {each.id: each for each in client.models.list()}
    assert set(listed) == {"embedder", "ranker", "plus"}
    assert (listed["plus"].object, listed["plus"].owned_by) == ("model", "tidegate")
    assert 0 <= time.time() - listed["plus"].created < 600


def test_one_model(server, client):
    """The answer has what KServe's and TensorFlow Serving's clients look for, too."""
    for listed in client.models.list():
        model = client.models.retrieve(listed.id)
        assert (model.id, model.object, model.owned_by) == (listed.id, "model", "tidegate")
        assert model.created == listed.created
    both = call(server.rest, "GET", "/v1/models/plus").json()
    assert (both["name"], both["ready"]) == ("plus", True)
    assert both["model_version_status"][0]["state"] == "AVAILABLE"
    with pytest.raises(openai.NotFoundError) as told:
        client.models.retrieve("nosuch")
    assert "nosuch" in told.value.body


def test_a_model_that_is_not_ready(serve, repository):
    repository.add("broken", b"no graph")
    with pytest.raises(openai.InternalServerError) as told:
        connect(serve(repository.path)).models.retrieve("broken")
    assert told.value.status_code == 503


def test_only_what_is_ready_is_listed(serve, repository):
    repository.add("first", embedding(), settings=EITHER)
    repository.add("second", embedding(), settings=EITHER)
    repository.add("broken", b"no graph")
    server = serve(repository.path)
    client = connect(server)
    assert {each.id for each in client.models.list()} == {"first", "second"}
    known = call(server.rest, "GET", "/v1/models").json()["models"]
    assert known == ["broken", "first", "second"]
    several = "names no model.*2: 'first', 'second'"
    with pytest.raises(openai.BadRequestError, match=several) as told:
        client.embeddings.create(model="", input="one")
    assert told.value.param == "model"
    assert embedded(client.embeddings.create(model="second", input="one")).shape == (1, 4)
    with pytest.raises(openai.InternalServerError, match="broken") as told:
        client.embeddings.create(model="broken", input="one")
    assert told.value.status_code == 503


# --- what goes wrong ----------------------------------------------------------------


def test_the_client_raises_its_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="unknown model 'nosuch'") as told:
        client.embeddings.create(model="nosuch", input="one")
    assert (told.value.code, told.value.param) == ("model_not_found", "model")
    for name in ("plus", "ranker"):
        with pytest.raises(openai.BadRequestError, match=f"'{name}' is no embedding model"):
            client.embeddings.create(model=name, input="one")
    with pytest.raises(openai.BadRequestError, match="dimensions must be 4 at most.*got 5") as told:
        client.embeddings.create(model="embedder", input="one", dimensions=5)
    assert told.value.type == "invalid_request_error"


def test_no_embedding_model_at_all(serve, repository):
    repository.add("plus", plus(1))
    server = serve(repository.path)
    with pytest.raises(openai.NotFoundError, match="no embedding model is ready"):
        connect(server).embeddings.create(model="", input="one")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", ["JSON"]),
        (b'{"input": "\xff"}', ["JSON", "unicode"]),
        ("[]", ["object"]),
        ({}, ["'input'"]),
        ({"input": None}, ["'input'"]),
        ({"input": 7}, ["input", "7"]),
        ({"input": []}, ["empty"]),
        ({"input": ["a", 1]}, ["input[1]", "string"]),
        ({"input": [1, "a"]}, ["input", "element 1", "integer"]),
        ({"input": [[1], []]}, ["input[1]", "no token ids"]),
        ({"input": [1, -7]}, ["token id 1", "negative", "-7"]),
        ({"input": [[2], [1, -7]]}, ["input[1]", "token id 1", "negative"]),
        ({"input": [1.5]}, ["integer", "1.5"]),
        ('{"input": "\\ud800"}', ["input", "Unicode"]),
        ('{"input": "a", "input": "b"}', ["'input' twice"]),
        ({"input": "a", "model": 1}, ["model", "string"]),
        ({"input": "a", "dimensions": 0}, ["dimensions", "1 at least"]),
        ({"input": "a", "dimensions": -1}, ["dimensions", "1 at least"]),
        ({"input": "a", "dimensions": "2"}, ["dimensions"]),
        ({"input": "a", "encoding_format": "int8"}, ["encoding_format", "base64", "int8"]),
        ({"input": ["a"] * 70_000}, ["65536", "queue.max_rows"]),
    ],
)
def test_refusals(server, body, words):
    status, kind, message = refusal(server, body)
    assert (status, kind) == (400, "invalid_request_error"), message
    for word in words:
        assert word in message, message


def test_padding_is_bounded(server):
    """A megabyte of ids that would be a hundred thousand as many."""
    body = {"input": [list(range(100_000))] + [[1]] * 60_000}
    status, _, message = refusal(server, body)
    assert status == 413
    assert "limits.max_message_bytes" in message


def test_what_is_refused_before_it_is_read(server):
    status, kind, message = refusal(server, {"input": "a"}, headers={"Content-Encoding": "br"})
    assert (status, kind) == (415, "invalid_request_error")
    assert "br" in message
    status, _, message = refusal(server, {"input": "a"}, headers={"x-request-timeout-ms": "soon"})
    assert status == 400
    assert "x-request-timeout-ms" in message
    assert call(server.rest, "GET", PATH).status == 405


def test_a_variant_is_for_operators(serve, repository):
    repository.add("embedder", embedding(), settings=EITHER)
    server = serve(repository.path, flags=["--token", "s3cret"])
    client = connect(server)
    variant = {"x-tidegate-variant": "stable"}
    with pytest.raises(openai.AuthenticationError, match="token"):
        client.embeddings.create(model="embedder", input="one", extra_headers=variant)
    operator = client.with_options(api_key="s3cret")
    answer = operator.embeddings.with_raw_response.create(
        model="embedder", input="one", extra_headers=variant
    )
    assert answer.headers["x-tidegate-version"] == "1"


def test_overload_and_deadlines(serve, repository):
    repository.add("slow", slow_embedding())
    server = serve(repository.path, config="[queue]\nmax_requests = 1\n")
    client = connect(server)
    assert embedded(client.embeddings.create(model="slow", input="short")).tolist() == [[0.5]]

    def ask(_):
        try:
            return client.embeddings.create(model="slow", input="long")
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(8) as crowd:
        answers = list(crowd.map(ask, range(8)))
    refused = [each for each in answers if isinstance(each, openai.RateLimitError)]
    assert 0 < len(refused) < 8
    assert refused[0].code == "rate_limit_exceeded"
    assert int(refused[0].response.headers["retry-after"]) >= 1
    with pytest.raises(openai.InternalServerError, match="deadline") as told:
        soon = {"x-request-timeout-ms": "50"}
        client.embeddings.create(model="slow", input="long", extra_headers=soon)
    assert told.value.status_code == 504


def test_the_requests_count(serve, repository):
    repository.add("embedder", embedding(), settings=EITHER)
    server = serve(repository.path)
    assert post(server, PATH, {"input": "one"}).status == 200
    assert post(server, PATH, {"input": "one", "dimensions": 9}).status == 400
    assert post(server, PATH, {"input": []}).status == 400

    def lines(*words):
        page = call(server.ops, "GET", "/metrics").body.decode().splitlines()
        return [line for line in page if all(word in line for word in ('protocol="rest"', *words))]

    ok = ('model="embedder"', 'code="ok"')
    assert eventually(lambda: any(line.endswith(" 1") for line in lines(*ok)))
    assert any(line.endswith(" 1") for line in lines('model="embedder"', 'code="invalid_argument"'))
