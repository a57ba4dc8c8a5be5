"""More than can be answered in time: some are told when to come again, and nothing is wasted."""

import json
import threading
import time

import pytest
from tritonclient.grpc import service_pb2_grpc

from infer import Question, ask, connect, grpc_raw, raw_request
from models import plus, slow
from server import eventually
from tensors import as_json, tensor
from wire import call

RUN = tensor("iterations", "INT64", [1], [3000])
NOTHING = tensor("iterations", "INT64", [1], [1])
CROWD = 80
PATIENCE = 4


@pytest.fixture
def server(repository, serve):
    """It has learned that a run of `slow` takes the better part of a second, or more."""
    repository.add("slow", slow())
    repository.add("plus", plus(1))
    server = serve(repository.path)
    for _ in range(3):
        ask(server, "grpc_raw", "slow", RUN)
    return server


def crowd_over_rest(server):
    """The replies of those who got one before they went away."""
    body = json.dumps({"inputs": [as_json(RUN)]}).encode()
    replies = []

    def visit():
        try:
            reply = call(server.rest, "POST", "/v2/models/slow/infer", body, timeout=PATIENCE)
            replies.append(reply)
        except TimeoutError:
            pass

    visitors = [threading.Thread(target=visit) for _ in range(CROWD)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    return replies


def crowd_over_grpc(server):
    """Name of the status of each call that ended before the others were cancelled."""
    with connect(server) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        calls = [infer.future(raw_request(Question("slow", [RUN]))) for _ in range(CROWD)]
        time.sleep(PATIENCE)
        ended = [each.code().name for each in calls if each.done()]
        for each in calls:
            each.cancel()
    return ended


def nobody_waits_for_the_crowd(server):
    """Those who went away are not worked for: the run in progress ends, and the queue is empty."""
    eventually(lambda: grpc_raw(server, Question("slow", [NOTHING])).status == "OK", 2 * PATIENCE)


def test_a_crowd_is_partly_sent_away_over_rest(server):
    replies = crowd_over_rest(server)
    assert {reply.status for reply in replies} <= {200, 429}
    refused = [reply for reply in replies if reply.status == 429]
    assert refused
    for reply in refused:
        assert "slow" in reply.json()["error"]
        assert int(reply.headers["retry-after"]) >= 1
    nobody_waits_for_the_crowd(server)


def test_a_crowd_is_partly_sent_away_over_grpc(server):
    ended = crowd_over_grpc(server)
    assert set(ended) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert "RESOURCE_EXHAUSTED" in ended
    nobody_waits_for_the_crowd(server)


def test_other_models_do_not_notice(server):
    crowd = threading.Thread(target=crowd_over_rest, args=[server])
    crowd.start()
    time.sleep(1)
    start = time.monotonic()
    ask(server, "rest_json", "plus", tensor("x", "FP32", [1, 1], [1]))
    assert time.monotonic() - start < 1
    crowd.join()
