"""More text than can be read in time: some are told when to come again, the others get whole answers."""

import json
import random
import re
import threading
from contextlib import closing
from http.client import HTTPConnection

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import GRPC, HTTP
from encoders import add, check_close, expected
from load import ClosedLoop, stock_worker
from server import eventually
from wire import call

# A busy core, and a server that was built without optimization.
pytestmark = pytest.mark.timeout(300)
PATIENCE = 120

MOST = 2
CROWD = 16
ENOUGH = 5

# As much of each text is read, though only its beginning counts.
WHOLE = 60_000
CASES = expected("bert-mean")["cases"]


def long_text(word):
    return f"{word} " * (WHOLE // (len(word) + 1))


TEXTS = [long_text(word) for word in ("boat", "gate", "water", "near")]
SOME, MANY = 10 * TEXTS, 40 * TEXTS


def as_array(texts):
    return np.array([text.encode() for text in texts], object)


def infer(client, texts):
    return client.infer("reader", {"text": as_array(texts)}).as_numpy("embedding")


def quietly(server, texts):
    with GRPC.connect(server) as client:
        return infer(client, texts)


def pending(server):
    reply = call(server.ops, "GET", "/admin/v1/models/reader")
    return sum(each.get("pending_requests", 0) for each in reply.json()["versions"])


def dropped(server, reason):
    """How many requests were given up because of it."""
    page = call(server.ops, "GET", "/metrics").body.decode()
    found = re.search(rf'^tidegate_dropped_requests_total{{[^}}]*reason="{reason}"[^}}]*}} (\d+)', page, re.MULTILINE)
    return int(found[1]) if found else 0


def start(repository, serve, config=""):
    add(repository, "reader", "bert-mean", "instances = 1")
    return serve(repository.path, config=config)


def openai(server, texts, headers=()):
    body = json.dumps({"model": "reader", "input": texts}).encode()
    return call(server.rest, "POST", "/v1/embeddings", body, {"content-type": "application/json", **dict(headers)})


# --- refusals -----------------------------------------------------------------------


def test_a_crowd_with_long_texts_is_partly_sent_away(repository, serve):
    server = start(repository, serve, f"[queue]\nmax_requests = {MOST}\n")
    wanted = dict(zip(TEXTS, quietly(server, TEXTS)))
    assert min(np.abs(wanted[TEXTS[0]] - wanted[text]).max() for text in TEXTS[1:]) > 0.01
    ended = {"http": [], "grpc": [], "openai": []}
    most = [0]

    def stock(number, way, kit):
        rng = random.Random(number)

        def step(client):
            texts = rng.sample(TEXTS, len(TEXTS))
            try:
                found = infer(client, texts)
            except InferenceServerException as error:
                assert error.status() == kit.status("overloaded"), error
                assert "'reader': the queue is full" in error.message(), error
                ended[way].append(False)
            else:
                check_close(found, [wanted[text] for text in texts], way)
                ended[way].append(True)

        return stock_worker(kit, getattr(server, kit.port), step)

    def plain(number):
        rng = random.Random(number)

        def work(going_on):
            while going_on():
                texts = rng.sample(TEXTS, len(TEXTS))
                reply = openai(server, texts)
                if reply.status == 429:
                    assert int(reply.headers["retry-after"]) >= 1
                    assert reply.json()["error"]["code"] == "rate_limit_exceeded"
                else:
                    assert reply.status == 200, reply.body
                    found = [each["embedding"] for each in reply.json()["data"]]
                    check_close(found, [wanted[text] for text in texts], "openai")
                ended["openai"].append(reply.status == 200)

        return work

    def is_enough():
        most[0] = max(most[0], pending(server))
        return all(of.count(True) >= ENOUGH and of.count(False) >= ENOUGH for of in ended.values())

    workers = [
        worker
        for number in range(0, CROWD, 4)
        for worker in (
            stock(number, "http", HTTP),
            stock(number + 1, "grpc", GRPC),
            stock(number + 2, "grpc", GRPC),
            plain(number + 3),
        )
    ]
    with ClosedLoop(workers) as loop:
        eventually(lambda: is_enough() or loop.failures, PATIENCE)
    loop.check()
    # Some are read, some wait for runs, some run; not all of them.
    assert most[0] < CROWD
    refused = sum(of.count(False) for of in ended.values())
    assert dropped(server, "overloaded") + dropped(server, "displaced") >= refused
    eventually(lambda: pending(server) == 0, PATIENCE)
    check_close(quietly(server, TEXTS), [wanted[text] for text in TEXTS], "afterwards")


def test_texts_that_wait_have_so_many_bytes_together(repository, serve):
    """The second is refused while the first is read, since both would have more than twice the limit."""
    server = start(repository, serve, f"[queue]\nmax_bytes = {len(MANY) * WHOLE * 6 // 10}\n")
    with in_background(server, MANY) as ended:
        reply = openai(server, MANY)
        assert not ended, "the first one was too quick"
        assert reply.status == 429, reply.body
        assert "(queue.max_bytes)" in reply.json()["error"]["message"]
        # What has hardly any bytes is read meanwhile.
        reply = openai(server, [CASES[0]["text"] + " " * 300])
        assert reply.status == 200, reply.body
        assert not ended, "the first one was too quick"
    check_close(ended[0], quietly(server, TEXTS)[[*range(4)] * 40], "the first")


# --- nobody waits for it any more ---------------------------------------------------


class in_background:
    """Asks for the embeddings of texts, which are there on leaving; begins when they are being read."""

    def __init__(self, server, texts):
        self.server, self.texts, self.ended = server, texts, []
        self.thread = threading.Thread(target=self.ask)

    def ask(self):
        try:
            with GRPC.connect(self.server) as client:
                self.ended.append(infer(client, self.texts))
        except Exception as error:
            self.ended.append(error)

    def __enter__(self):
        self.thread.start()
        eventually(lambda: pending(self.server) > 0 or self.ended, PATIENCE)
        return self.ended

    def __exit__(self, *_):
        self.thread.join(PATIENCE)
        assert len(self.ended) == 1, "somebody still waits"


def test_a_deadline_ends_the_wait_of_texts(repository, serve):
    server = start(repository, serve)
    alone = quietly(server, TEXTS)
    with in_background(server, MANY) as ended:
        reply = openai(server, SOME, {"x-request-timeout-ms": "50"})
        assert reply.status == 504, reply.body
        assert not ended, "the first one was too quick"
        # Nobody is read for but the first one.
        eventually(lambda: pending(server) <= 1, PATIENCE)
    check_close(ended[0], alone[[*range(4)] * 40], "the first")


def test_texts_of_those_who_left_are_not_read(repository, serve):
    server = start(repository, serve)
    alone = quietly(server, TEXTS)
    with in_background(server, MANY) as ended:
        with closing(HTTPConnection(server.rest)) as visitor:
            body = json.dumps({"model": "reader", "input": MANY}).encode()
            visitor.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
            eventually(lambda: pending(server) == 2, PATIENCE, pause=0.01)
        eventually(lambda: pending(server) <= 1, PATIENCE)
        assert not ended, "the first one was too quick"
    check_close(ended[0], alone[[*range(4)] * 40], "the first")
