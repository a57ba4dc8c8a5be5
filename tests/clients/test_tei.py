"""text-embeddings-inference's embed and rerank, in plain HTTP and by the Hub's client."""

import gzip
import json

import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from encoders import add, with_file
from models import Repository, plus
from server import ROOT, Server, eventually
from shapes import answer, post
from text_models import EITHER, embedding, numbers, reranker, unit, vectors
from wire import call

ENCODERS = ROOT / "tests" / "encoders"
TEXTS = ["one", "nine", "", "Größe 🌊"]


@pytest.fixture(scope="module")
def server(text_server):
    return text_server


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """Two models of each kind, of which one embedding model normalizes."""
    home = tmp_path_factory.mktemp("crowded")
    repository = Repository(home / "models")
    repository.add("plain", embedding(), settings=EITHER)
    repository.add("unit", embedding(normalized=True), settings=EITHER)
    repository.add("ranker", reranker())
    repository.add("another", reranker())
    with Server(repository.path, home) as running:
        yield running


def refusal(server, path, body, headers=None):
    """Status, type and message of an answer that must be none."""
    reply = post(server, path, body, headers or {})
    assert reply.headers["content-type"] == "application/json", reply
    message = reply.json()
    assert set(message) == {"error", "error_type"}, message
    return reply.status, message["error_type"], message["error"]


# --- embed --------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, {"model": "embedder"}, {"model": None}])
def test_texts_become_vectors(server, model):
    right = vectors(numbers(TEXTS))
    got = answer(server, "/embed", {"inputs": TEXTS, "normalize": False} | model)
    assert got == right.tolist()
    for normalize in ({}, {"normalize": True}):
        got = answer(server, "/embed", {"inputs": TEXTS, "truncate": True} | normalize | model)
        assert np.allclose(got, unit(right), atol=1e-6)


def test_one_text_is_a_list_too(server):
    got = answer(server, "/embed", {"inputs": "two", "normalize": False, "prompt_name": None})
    assert got == vectors([2]).tolist()


def test_token_ids(server):
    for inputs, sums in (([1, 2], [3]), ([[1, 2], [3]], [3, 3]), ([[7], [1, 2, 3]], [7, 6])):
        got = answer(server, "/embed", {"inputs": inputs, "normalize": False})
        assert got == vectors(sums).tolist()


def test_fewer_dimensions(server):
    right = vectors(numbers(TEXTS))[:, :3]
    got = answer(server, "/embed", {"inputs": TEXTS, "dimensions": 3})
    assert np.allclose(got, unit(right), atol=1e-6)
    got = answer(server, "/embed", {"inputs": TEXTS, "dimensions": 3, "normalize": False})
    assert got == right.tolist()


def test_what_is_normalized_stays_so(crowded):
    body = {"inputs": TEXTS, "model": "unit"}
    got = answer(crowded, "/embed", body)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    same = answer(crowded, "/v1/embeddings", {"input": TEXTS, "model": "unit"})
    assert [each["embedding"] for each in same["data"]] == got
    status, kind, message = refusal(crowded, "/embed", body | {"normalize": False})
    assert (status, kind) == (400, "Validation")
    assert "'unit': its vectors are normalized" in message


def test_the_hubs_client(server):
    client = InferenceClient(f"http://{server.rest}/embed")
    right = vectors([9])
    assert np.array_equal(client.feature_extraction("nine", normalize=False), right)
    got = client.feature_extraction("nine", normalize=True, truncate=True)
    assert np.allclose(got, unit(right), atol=1e-6)
    with pytest.raises(HfHubHTTPError, match="prompt_name"):
        client.feature_extraction("nine", prompt_name="query")


# --- rerank -------------------------------------------------------------------------


def test_texts_are_put_in_order(server):
    body = {"query": "two", "texts": ["one", "nine", "five", "nine"]}
    expected = [
        {"index": 1, "score": 7.0},
        {"index": 3, "score": 7.0},
        {"index": 2, "score": 3.0},
        {"index": 0, "score": -1.0},
    ]
    assert answer(server, "/rerank", body) == expected
    flags = {"raw_scores": False, "return_text": False, "truncate": False, "model": "ranker"}
    assert answer(server, "/rerank", body | flags) == expected
    named = answer(server, "/rerank", body | {"return_text": True})
    assert named == [each | {"text": body["texts"][each["index"]]} for each in expected]


def test_a_long_packed_request(server):
    texts = ["nine", "x" * 100] * 4000
    body = gzip.compress(json.dumps({"query": "one", "texts": texts}).encode())
    ranks = answer(server, "/rerank", body, {"Content-Encoding": "gzip"})
    assert [each["index"] for each in ranks] == [*range(0, 8000, 2), *range(1, 8000, 2)]


def test_encoders(serve, repository):
    """Texts that are too long are cut or refused, as the request likes."""
    for name in ("bert-cls", "bert-reranker"):
        repository.copy(name, ENCODERS / name, settings="")
    server = serve(repository.path)
    long = "the boat waits near the gate " * 100
    for truncate in (None, True):
        assert len(answer(server, "/embed", {"inputs": long, "truncate": truncate})) == 1
    status, kind, message = refusal(server, "/embed", {"inputs": long, "truncate": False})
    assert (status, kind) == (413, "Validation")
    assert "bert-cls" in message
    assert "64" in message
    cases = json.loads((ENCODERS / "bert-reranker" / "expected.json").read_text())["cases"]
    query = cases[0]["pair"][0]
    pairs = [case for case in cases if case["pair"][0] == query]
    body = {"query": query, "texts": [case["pair"][1] for case in pairs]}
    scores = {each["index"]: each["score"] for each in answer(server, "/rerank", body)}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    # The model's own are logits, which a sigmoid puts between 0 and 1.
    for index, case in enumerate(pairs):
        assert abs(scores[index] - sigmoid(case["rerank_score"])) < 1e-4
    body = {"query": long, "texts": ["a"], "truncate": False}
    assert refusal(server, "/rerank", body)[:2] == (413, "Validation")


def sigmoid(logit):
    return 1 / (1 + np.exp(-np.float64(logit)))


@pytest.mark.parametrize("name", ["bert-reranker", "xlm-roberta-reranker"])
def test_scores_and_logits(serve, repository, name):
    """One model's own scores are logits, the other's are between 0 and 1."""
    repository.copy(name, ENCODERS / name, settings="")
    server = serve(repository.path)
    cases = json.loads((ENCODERS / name / "expected.json").read_text())["cases"]
    query = cases[0]["pair"][0]
    cases = [case for case in cases if case["pair"][0] == query]
    texts = [case["pair"][1] for case in cases]
    own = np.array([case["rerank_score"] for case in cases])

    def asked(**flags):
        ranks = answer(server, "/rerank", {"query": query, "texts": texts} | flags)
        by_index = {each["index"]: each["score"] for each in ranks}
        return np.array([by_index[index] for index in range(len(texts))])

    scores, logits = asked(), asked(raw_scores=True)
    assert np.array_equal(asked(raw_scores=False), scores)
    assert np.allclose(sigmoid(logits), scores, atol=1e-6)
    is_own_raw = name == "bert-reranker"
    assert np.allclose(logits if is_own_raw else scores, own, atol=1e-4)
    # The protocol's own output is the model's, whatever others ask for.
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts), 2]}
    body = {"inputs": [tensor | {"data": [[query, text] for text in texts]}]}
    (output,) = answer(server, f"/v2/models/{name}/infer", body)["outputs"]
    assert (output["name"], output["shape"]) == ("rerank_score", [len(texts)])
    assert np.allclose(output["data"], own, atol=1e-4)


# --- prompts and ends ---------------------------------------------------------------

PROMPTS = {"prompts": {"near": "near the ", "gate": "gate "}, "default_prompt_name": None}
PROMPTED = with_file("config_sentence_transformers.json", PROMPTS)
LONG = "the boat waits near the gate " * 20


def test_prompts(serve, repository):
    add(repository, "prompted", "bert-mean", "", PROMPTED)
    server = serve(repository.path)
    plain = answer(server, "/embed", {"inputs": ["near the boat", "gate waits", "boat"]})
    one = answer(server, "/embed", {"inputs": "boat", "prompt_name": "near"})
    other = answer(server, "/embed", {"inputs": ["waits"], "prompt_name": "gate"})
    none = answer(server, "/embed", {"inputs": ["boat"], "prompt_name": None})
    assert np.allclose([*one, *other, *none], plain, atol=1e-5)
    body = {"inputs": "boat", "prompt_name": "far"}
    status, kind, message = refusal(server, "/embed", body)
    assert (status, kind) == (400, "Validation")
    assert "'prompted'" in message
    assert "'gate', 'near'" in message
    client = InferenceClient(f"http://{server.rest}/embed")
    got = client.feature_extraction("boat", prompt_name="near")
    assert np.allclose(got, plain[:1], atol=1e-5)


def test_the_end_that_is_cut(serve, repository):
    for name in ("bert-mean", "bert-reranker"):
        repository.copy(name, ENCODERS / name, settings="[text]\nmax_length = 16\n")
    server = serve(repository.path)

    def embedded(text, side):
        return answer(server, "/embed", {"inputs": text, "truncation_direction": side})

    left, right = (embedded(f"tide {LONG} harbour", side) for side in ("Left", "right"))
    assert np.allclose(left, embedded(f"gate {LONG} harbour", "left"), atol=1e-5)
    assert np.allclose(right, embedded(f"tide {LONG} gate", "Right"), atol=1e-5)
    assert np.abs(np.subtract(left, right)).max() > 1e-3
    body = {"query": "the boat", "texts": [f"tide {LONG} harbour"]}
    ends = [
        answer(server, "/rerank", body | {"truncation_direction": side})[0]["score"]
        for side in ("Left", "Right")
    ]
    assert abs(ends[0] - ends[1]) > 1e-6


SHADOWED = """versions = "all"
[text]
truncate = false
[rollout]
on_new_version = "shadow"
shadow = 100.0
every = "1h"
"""


def test_copies_keep_what_a_request_wants(serve, repository):
    """Its prompt, the end that is cut, and that anything is cut, which the model's settings would refuse."""
    add(repository, "shadowed", "bert-mean", SHADOWED, PROMPTED)
    server = serve(repository.path, config='[shadow]\nmax_cpu = 1.0\nmax_wait = "1h"\n')
    add(repository, "shadowed", "bert-mean", SHADOWED, PROMPTED, version="2")

    def rollout():
        return call(server.ops, "GET", "/admin/v1/models/shadowed/rollout").json()

    eventually(lambda: rollout().get("phase") == "shadow", 60)
    body = {"inputs": f"tide {LONG} harbour"}
    assert refusal(server, "/embed", body)[0] == 413
    wishes = ({}, {"truncation_direction": "Left"}, {"prompt_name": "near"})
    for wish in wishes:
        answer(server, "/embed", body | {"truncate": True} | wish)

    def compared():
        copies = rollout()["copies"]
        return copies and copies["compared"] + copies["failed"] + copies["missing"] == len(wishes) and copies

    copies = eventually(compared, 60)
    assert (copies["compared"], copies["disagreed"]) == (len(wishes), 0), copies
    (output,) = copies["outputs"]
    assert output["max_difference"] < 1e-5


# --- what goes wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "refused", "words"),
    [
        ("/embed", "{", (400, "Validation"), ["JSON"]),
        ("/embed", b'{"inputs": "\xff"}', (400, "Validation"), ["JSON"]),
        ("/embed", [], (422, "Validation"), ["object"]),
        ("/embed", {}, (422, "Validation"), ["'inputs'"]),
        ("/embed", {"inputs": {}}, (422, "Validation"), ["inputs", "list of strings"]),
        ("/embed", {"inputs": []}, (400, "Empty"), ["empty"]),
        ("/embed", {"inputs": ["a", None]}, (422, "Validation"), ["inputs[1]", "null"]),
        ("/embed", {"inputs": [[1], [-1]]}, (422, "Validation"), ["inputs[1]", "negative"]),
        ("/embed", {"inputs": "a", "truncate": "yes"}, (422, "Validation"), ["truncate", "yes"]),
        ("/embed", {"inputs": "a", "normalize": 1}, (422, "Validation"), ["normalize"]),
        ("/embed", {"inputs": "a", "dimensions": 0}, (422, "Validation"), ["dimensions"]),
        ("/embed", {"inputs": "a", "dimensions": 5}, (413, "Validation"), ["4 at most", "5"]),
        ("/embed", {"inputs": "a", "prompt_name": "q"}, (400, "Validation"), ["prompt_name"]),
        ("/embed", {"inputs": [1], "prompt_name": "q"}, (422, "Validation"), ["prompt_name", "ids"]),
        (
            "/embed",
            {"inputs": "a", "truncation_direction": "Left"},
            (400, "Validation"),
            ["truncation_direction", "'embedder'"],
        ),
        (
            "/embed",
            {"inputs": "a", "truncation_direction": "up"},
            (422, "Validation"),
            ["truncation_direction", "'Left' or 'Right'"],
        ),
        ("/embed", {"inputs": ["a"] * 70_000}, (413, "Validation"), ["65536"]),
        ("/embed", {"inputs": "a", "model": "nosuch"}, (404, "Validation"), ["nosuch"]),
        ("/embed", {"inputs": "a", "model": "ranker"}, (424, "Backend"), ["ranker", "embedding"]),
        ("/rerank", {"texts": ["a"]}, (422, "Validation"), ["'query'"]),
        ("/rerank", {"query": "a"}, (422, "Validation"), ["'texts'"]),
        ("/rerank", {"query": "a", "texts": []}, (400, "Empty"), ["empty"]),
        ("/rerank", {"query": "a", "texts": "b"}, (422, "Validation"), ["texts", "list"]),
        ("/rerank", {"query": "a", "texts": [["b"]]}, (422, "Validation"), ["texts[0]"]),
        ("/rerank", {"query": 1, "texts": ["b"]}, (422, "Validation"), ["query"]),
        (
            "/rerank",
            {"query": "a", "texts": ["b"], "raw_scores": True},
            (400, "Validation"),
            ["raw_scores"],
        ),
        (
            "/rerank",
            {"query": "a", "texts": ["b"], "model": "plus"},
            (424, "Backend"),
            ["plus", "reranking"],
        ),
    ],
)
def test_refusals(server, path, body, refused, words):
    status, kind, message = refusal(server, path, body)
    assert (status, kind) == refused, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/embed", {"inputs": "a"}, "'plain', 'unit'"),
        ("/rerank", {"query": "a", "texts": ["b"]}, "'another', 'ranker'"),
    ],
)
def test_several_models_want_a_name(crowded, path, body, names):
    status, kind, message = refusal(crowded, path, body)
    assert (status, kind) == (400, "Validation")
    assert message.endswith(f"there are 2: {names}")


def test_no_model_of_the_kind(serve, repository):
    repository.add("plus", plus(1))
    server = serve(repository.path)
    status, kind, message = refusal(server, "/embed", {"inputs": "a"})
    assert (status, kind, message) == (424, "Backend", "no embedding model is ready")
    status, kind, message = refusal(server, "/rerank", {"query": "a", "texts": ["b"]})
    assert (status, kind, message) == (424, "Backend", "no reranking model is ready")
