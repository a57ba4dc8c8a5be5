"""Text models under load: versions that come and go, queues that are too short, and whole answers nevertheless."""

import json
import random
import threading
import time

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import GRPC, HTTP, field
from encoders import (
    add,
    check_close,
    expected,
    texts_of,
    tokens_of,
    with_weights,
)
from load import ClosedLoop, stock_worker
from server import eventually
from wire import call

# A busy core, and a server that was built without optimization.
pytestmark = pytest.mark.timeout(300)
PATIENCE = 120

# Small parts, so that requests have many.
ROWS = 3
IN_PARTS = f"max_batch_size = {ROWS}"
SWAPS = 3
MOST_TEXTS = 25

MEAN = expected("bert-mean")
CASES = MEAN["cases"]
WANTED = np.float32([case["embedding"] for case in CASES])

# Seconds that a long request takes when nobody else asks.
LONG = 1.0


def other(tensors):
    """The same tensors but for the embeddings of words, which are those of others."""
    turned = {name: array[::-1] for name, array in tensors.items() if name.endswith("word_embeddings.weight")}
    assert turned
    return tensors | turned


def some_cases(rng):
    return [rng.randrange(len(CASES)) for _ in range(rng.randint(1, MOST_TEXTS))]


def inputs_of(places, as_tokens):
    cases = [CASES[place] for place in places]
    return tokens_of(cases) if as_tokens else {"text": texts_of(cases)}


def quietly(server, model="swapped", kit=GRPC, **more):
    """Version and embeddings of every case when nobody else asks."""
    with kit.connect(server) as client:
        result = client.infer(model, {"text": texts_of(CASES)}, **more)
        return field(result, "model_version"), result.as_numpy("embedding")


def apart(one, another):
    """Whether every row of the one can be told from the same row of the other."""
    return np.abs(one - another).max(axis=1).min() > 0.01


def versions(server, model="swapped"):
    """State of each version, by its name."""
    reply = call(server.ops, "GET", f"/admin/v1/models/{model}")
    return {each["version"]: each for each in reply.json()["versions"]}


def pending(server, model="swapped"):
    return sum(each.get("pending_requests", 0) for each in versions(server, model).values())


def refused_with(error, code):
    return error.status() in {kit.status(code) for kit in (HTTP, GRPC)}


# --- a version replaced by another --------------------------------------------------


def test_swaps_under_load(repository, serve):
    """Each answer is wholly that of the version it says it is from, however many parts it had."""
    change = with_weights(other)
    add(repository, "swapped", "bert-mean", IN_PARTS)
    add(repository, "after", "bert-mean", IN_PARTS, change)
    server = serve(repository.path)
    version, before = quietly(server)
    assert version == "1"
    check_close(before, WANTED)
    _, after = quietly(server, "after")
    assert apart(before, after)

    # Even versions are the one, odd versions the other.
    answers = [after, before]
    newest, seen = [1], set()

    def worker(number, kit):
        rng = random.Random(number)

        def step(client):
            places = some_cases(rng)
            oldest = newest[0]
            result = client.infer("swapped", inputs_of(places, as_tokens=rng.random() < 0.4))
            version = int(field(result, "model_version"))
            assert version >= oldest, f"version {version} answers a request that came after {oldest} had begun"
            check_close(result.as_numpy("embedding"), answers[version % 2][places], f"version {version}")
            seen.add(version)

        return stock_worker(kit, getattr(server, kit.port), step)

    with ClosedLoop([worker(2 * number + at, kit) for number in range(3) for at, kit in enumerate((HTTP, GRPC))]) as loop:
        for version in range(2, SWAPS + 2):
            eventually(lambda version=version: version - 1 in seen or loop.failures, PATIENCE)
            add(repository, "swapped", "bert-mean", change=change if version % 2 == 0 else None, version=str(version))
            eventually(lambda version=version: quietly(server)[0] == str(version), PATIENCE)
            newest[0] = version
        eventually(lambda: SWAPS + 1 in seen or loop.failures, PATIENCE)
    loop.check()
    assert seen == set(range(1, SWAPS + 2))
    eventually(lambda: list(versions(server)) == [str(SWAPS + 1)], PATIENCE)
    version, last = quietly(server)
    check_close(last, answers[int(version) % 2])


def test_versions_with_tokenizers_of_their_own(repository, serve):
    """Half of the requests for each; texts become tokens as the version has it that answers."""
    settings = f'versions = "all"\n{IN_PARTS}\n[rollout]\non_new_version = "hold"\n'
    add(repository, "shared", "bert-mean", settings)
    add(repository, "shared", "roberta", version="2")
    server = serve(repository.path)
    eventually(lambda: [each["state"] for each in versions(server, "shared").values()] == ["ready", "ready"], PATIENCE)
    split = {"stable": "1", "canary": {"version": "2", "percent": 50}}
    reply = call(server.ops, "PUT", "/admin/v1/models/shared/route", json.dumps(split).encode())
    assert reply.status == 200, reply.body

    texts = [case["text"] for case in CASES]
    known = {"1": CASES, "2": expected("roberta")["cases"]}
    assert [case["text"] for case in known["2"]] == texts
    embeddings = {version: np.float32([case["embedding"] for case in cases]) for version, cases in known.items()}
    lengths = {version: [len(case["input_ids"]) for case in cases] for version, cases in known.items()}
    assert apart(*embeddings.values())
    assert lengths["1"] != lengths["2"]
    seen = {"http": set(), "grpc": set(), "openai": set()}

    def protocol(number, way, kit):
        rng = random.Random(number)

        def step(client):
            places = some_cases(rng)
            result = client.infer("shared", inputs_of(places, as_tokens=False))
            version = field(result, "model_version")
            check_close(result.as_numpy("embedding"), embeddings[version][places], f"version {version}")
            seen[way].add(version)

        return stock_worker(kit, getattr(server, kit.port), step)

    def openai(number):
        rng = random.Random(number)

        def work(going_on):
            while going_on():
                places = some_cases(rng)
                body = {"model": "shared", "input": [texts[place] for place in places]}
                headers = {"content-type": "application/json"}
                reply = call(server.rest, "POST", "/v1/embeddings", json.dumps(body).encode(), headers)
                assert reply.status == 200, reply.body
                version, answer = reply.headers["x-tidegate-version"], reply.json()
                found = [each["embedding"] for each in answer["data"]]
                check_close(found, embeddings[version][places], f"version {version}")
                used = sum(lengths[version][place] for place in places)
                assert answer["usage"] == {"prompt_tokens": used, "total_tokens": used}, version
                seen["openai"].add(version)

        return work

    workers = [worker for number in range(2) for worker in (
        protocol(10 + number, "http", HTTP), protocol(20 + number, "grpc", GRPC), openai(30 + number)
    )]
    with ClosedLoop(workers) as loop:
        eventually(lambda: all(found == {"1", "2"} for found in seen.values()) or loop.failures, PATIENCE)
    loop.check()


# --- a queue that a request fills ---------------------------------------------------


# Texts of a request that is more than the queue takes, and answers that each client must have got.
MANY = [place % len(CASES) for place in range(60)]
EACH = 20


@pytest.mark.parametrize("most", [1, 2, 4])
def test_requests_whose_parts_fill_the_queue(repository, serve, most):
    """Where nothing else waits they are answered. Else they are answered or refused, as a whole; others go on."""
    add(repository, "swapped", "bert-mean", "max_batch_size = 1\ninstances = 1")
    server = serve(repository.path, config=f"[queue]\nmax_requests = {most}\n")
    for kit in (HTTP, GRPC):
        for as_tokens in (False, True):
            with kit.connect(server) as client:
                result = client.infer("swapped", inputs_of(MANY, as_tokens))
            check_close(result.as_numpy("embedding"), WANTED[MANY], "alone")

    answered, ended = {}, []

    def asked(client, places, as_tokens, worker):
        try:
            result = client.infer("swapped", inputs_of(places, as_tokens))
        except InferenceServerException as error:
            assert refused_with(error, "overloaded"), error
            assert "swapped" in error.message()
            return False
        check_close(result.as_numpy("embedding"), WANTED[places], worker)
        answered[worker] = answered.get(worker, 0) + 1
        return True

    def crowd(number, kit):
        return stock_worker(
            kit, getattr(server, kit.port), lambda client: ended.append(asked(client, MANY, number % 2 == 1, "crowd"))
        )

    def alone(number, kit):
        worker = f"{kit.port} {number}"
        return worker, stock_worker(
            kit, getattr(server, kit.port), lambda client: asked(client, [number], number % 2 == 1, worker)
        )

    def is_enough():
        # Sooner or later the queue is too short for one of the crowd.
        return all(answered.get(worker, 0) >= EACH for worker in few) and len(ended) >= EACH and False in ended

    few = dict(alone(number, kit) for number in range(2) for kit in (HTTP, GRPC))
    crowds = [crowd(number, kit) for number in range(2) for kit in (HTTP, GRPC)]
    with ClosedLoop([*few.values(), *crowds]) as loop:
        eventually(lambda: is_enough() or loop.failures, PATIENCE)
    loop.check()
    eventually(lambda: pending(server) == 0, PATIENCE)
    check_close(quietly(server)[1], WANTED)


# --- a version that goes away -------------------------------------------------------


def long_enough(server):
    """So many texts that they take a while."""
    places = MANY
    with GRPC.connect(server) as client:
        while True:
            start = time.monotonic()
            client.infer("swapped", inputs_of(places, as_tokens=False))
            if time.monotonic() - start > LONG or len(places) > 30_000:
                return places
            places = 2 * places


def ask_in_background(server, kit, places, as_tokens, ended):
    """`ended` gets the embeddings or the refusal."""

    def ask():
        with kit.connect(server) as client:
            try:
                result = client.infer("swapped", inputs_of(places, as_tokens))
                ended.append(result.as_numpy("embedding"))
            except Exception as error:
                ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


EXPLICIT = ["--model-control", "explicit", "--load-model", "*"]
WAYS = [(HTTP, False), (GRPC, False), (GRPC, True)]


def unload_amid(server, places):
    """What becomes of long requests in whose midst the model is unloaded."""
    ended = []
    threads = [ask_in_background(server, kit, places, as_tokens, ended) for kit, as_tokens in WAYS]
    # All have begun, as they have no more than their share in the queue.
    eventually(lambda: pending(server) > 2 * (len(WAYS) - 1) or ended, PATIENCE)
    with GRPC.connect(server) as client:
        client.raw.unload_model("swapped")
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "somebody still waits"
    assert len(ended) == len(WAYS)
    return ended


def test_unloading_waits_for_every_part(repository, serve):
    add(repository, "swapped", "bert-mean", IN_PARTS)
    server = serve(repository.path, flags=EXPLICIT, config='[shutdown]\ndrain_timeout = "10m"\n')
    places = long_enough(server)
    for found in unload_amid(server, places):
        assert not isinstance(found, Exception), found
        check_close(found, WANTED[places])


def test_who_takes_longer_than_unloading_may_is_told(repository, serve):
    add(repository, "swapped", "bert-mean", IN_PARTS)
    server = serve(repository.path, flags=EXPLICIT, config='[shutdown]\ndrain_timeout = "100ms"\n')
    places = long_enough(server)
    ended = unload_amid(server, places)
    assert any(isinstance(found, Exception) for found in ended), "nobody was cut short"
    for found in ended:
        if isinstance(found, Exception):
            assert refused_with(found, "not_ready"), found
            assert "'swapped'" in found.message(), found
            assert "unloaded" in found.message(), found
        else:
            check_close(found, WANTED[places])
    with GRPC.connect(server) as client:
        client.raw.load_model("swapped")
    check_close(quietly(server)[1], WANTED)


def test_a_long_request_outlives_its_version(repository, serve):
    """Where a successor is there, it begins anew what the old version has no time for."""
    add(repository, "swapped", "bert-mean", IN_PARTS)
    server = serve(repository.path, config='[shutdown]\ndrain_timeout = "100ms"\n')
    places = long_enough(server)
    add(repository, "after", "bert-mean", IN_PARTS, with_weights(other))
    eventually(lambda: call(server.rest, "GET", "/v2/models/after/ready").status == 200, PATIENCE)
    _, after = quietly(server, "after")
    answers = []

    def ask(client):
        result = client.infer("swapped", inputs_of(places, as_tokens=False))
        version = field(result, "model_version")
        check_close(result.as_numpy("embedding"), {"1": WANTED, "2": after}[version][places], version)
        answers.append(version)

    with ClosedLoop(stock_worker(kit, getattr(server, kit.port), ask) for kit in (HTTP, GRPC)) as loop:
        eventually(lambda: "1" in answers or loop.failures, PATIENCE)
        add(repository, "swapped", "bert-mean", change=with_weights(other), version="2")
        eventually(lambda: "2" in answers or loop.failures, PATIENCE)
    loop.check()
