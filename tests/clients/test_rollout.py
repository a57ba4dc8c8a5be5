"""A rollout as an operator sees it: steered by the command line, asked by Triton's clients, killed at any moment."""

import json
import os
import random
import threading
from contextlib import suppress

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from models import flat, plus
from server import eventually, run
from wire import call

USERS = [f"user-{number}" for number in range(40)]


def tell(server, *arguments):
    """What the command line says of the model's rollout."""
    result = run("rollout", *arguments, "--ops", server.ops, "--json", home=server.home)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def status(server):
    return call(server.ops, "GET", "/admin/v1/models/plus/rollout").json()


def reach(server, phase):
    eventually(lambda: status(server).get("phase") == phase)


def outline(server):
    """What must be as it was before the server was killed."""
    known = status(server)
    keys = ("id", "phase", "step", "weight_percent", "stable", "candidate", "sticky", "epoch")
    return {key: known[key] for key in keys}, split(server)


def split(server):
    """The version for each user over REST, which must be that over gRPC."""
    versions = {}
    value = np.array([[1.0]], np.float32)
    with triton_http.InferenceServerClient(server.rest) as rest:
        tensor = triton_http.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(value)
        for user in USERS:
            answer = rest.infer("plus", [tensor], headers={"x-user-id": user})
            versions[user] = answer.get_response()["model_version"]
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        tensor = triton_grpc.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(value)
        for user in USERS:
            answer = client.infer("plus", [tensor], headers={"x-user-id": user})
            assert answer.get_response().model_version == versions[user], user
    return versions


def hold(repository):
    settings = 'versions = "all"\n[rollout]\non_new_version = "hold"\n'
    repository.add("plus", plus(1), settings=settings)
    repository.add("plus", plus(1), version="2")


def verified(server):
    result = run("audit", "verify", "--data", server.home / "data", home=server.home)
    assert result.returncode == 0, result.stdout + result.stderr


def test_killed_at_each_phase_it_goes_on_as_before(repository, serve):
    hold(repository)
    server = serve(repository.path)
    # The newest version of a new repository is the one that serves.
    plan = ("--every", "1h", "--shadow", "100", "--steps", "30,60,100")
    start = ("start", "plus", "--to", "1", "--sticky", "header:x-user-id", *plan)

    def killed(phase, server):
        reach(server, phase)
        before = outline(server)
        assert before[0]["phase"] == phase
        server.kill()
        verified(server)
        again = serve(repository.path)
        assert outline(again) == before, phase
        verified(again)
        return again

    tell(server, *start)
    server = killed("shadow", server)
    tell(server, "advance", "plus")
    server = killed("canary", server)
    shares = set(split(server).values())
    assert shares == {"1", "2"}, "both versions answer"
    tell(server, "pause", "plus")
    server = killed("paused", server)
    tell(server, "resume", "plus")
    tell(server, "advance", "plus")
    server = killed("canary", server)
    assert status(server)["step"] == 1
    tell(server, "promote", "plus")
    server = killed("watching", server)
    assert set(split(server).values()) == {"1"}
    tell(server, "rollback", "plus")
    server = killed("rolled_back", server)
    assert set(split(server).values()) == {"2"}
    tell(server, *start)
    reach(server, "shadow")
    tell(server, "abort", "plus")
    server = killed("aborted", server)
    assert set(split(server).values()) == {"2"}


def test_killed_before_the_candidate_is_ready_it_waits_for_it(repository, serve):
    settings = '[rollout]\non_new_version = "canary"\nevery = "1h"\nsteps = [50, 100]\n'
    repository.add("plus", plus(1), settings=settings)
    server = serve(repository.path)
    eventually(lambda: call(server.ops, "GET", "/admin/v1/models/plus").json()["epoch"] == 1)
    repository.add("plus", plus(1), version="2")
    # Its files settle for a second.
    reach(server, "pending")
    server.kill()
    server = serve(repository.path)
    reach(server, "canary")
    assert status(server)["id"] == "plus/r1"
    verified(server)


def test_killed_at_any_moment_it_comes_to_its_end(repository, serve):
    hold(repository)
    server = serve(repository.path)
    seed = int(os.environ.get("TIDEGATE_SEED", "7"))
    moments = random.Random(seed)
    tell(server, "start", "plus", "--to", "1", "--every", "300ms", "--steps", "20,60,100", "--min-samples", "10")
    for _ in range(12):
        stop = threading.Event()
        asking = threading.Thread(target=ask_until, args=(server, stop))
        asking.start()
        stop.wait(moments.uniform(0.05, 0.8))
        server.kill()
        stop.set()
        asking.join()
        verified(server)
        server = serve(repository.path)
    stop = threading.Event()
    asking = threading.Thread(target=ask_until, args=(server, stop))
    asking.start()
    try:
        eventually(lambda: status(server)["phase"] in ("watching", "done"), 60)
    finally:
        stop.set()
        asking.join()
    assert set(split(server).values()) == {"1"}
    phases = [change["to"] for change in status(server)["history"]]
    assert phases[:4] == ["canary", "canary", "canary", "promoting"], phases


def ask_until(server, stop):
    """Asks, though the server may be gone."""
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]})
    while not stop.is_set():
        with suppress(OSError):
            call(server.rest, "POST", "/v2/models/plus/infer", body.encode())


def one_number(server, shape):
    """Asks with a shape that has no types."""
    path, key = {"V1": ("/v1/models/plus:predict", "instances"), "MLflow": ("/models/plus/invocations", "inputs")}[shape]
    body = json.dumps({key: [[0.1]]}).encode()
    return call(server.rest, "POST", path, body, {"content-type": "application/json"})


def states(server):
    return [version["state"] for version in call(server.ops, "GET", "/admin/v1/models/plus").json()["versions"]]


def test_shapes_without_types_have_those_of_the_version_that_answers(repository, serve):
    """Requests that are drawn once they are read, by a number of the server's own."""
    repository.add("plus", plus(1), settings='[rollout]\non_new_version = "hold"\n')
    server = serve(repository.path)
    repository.add("plus", plus(2, "FP64"), version="2")
    eventually(lambda: states(server) == ["ready", "ready"])
    split = {"stable": "1", "canary": {"version": "2", "percent": 50}}
    assert call(server.ops, "PUT", "/admin/v1/models/plus/route", json.dumps(split).encode()).status == 200
    answers = set()
    for shape in ["V1", "MLflow"] * 20:
        reply = one_number(server, shape)
        assert reply.status == 200, reply.body
        answers.add((shape, reply.headers["x-tidegate-version"], reply.json()["predictions"][0][0]))
    assert answers == {(shape, *answer) for shape in ["V1", "MLflow"] for answer in [("1", 1.1), ("2", 2.1)]}


@pytest.mark.parametrize("datatype, because", [("FP64", "shape"), ("INT64", "integer")])
def test_what_only_the_stable_version_would_take_is_the_candidates_fault(repository, serve, datatype, because):
    repository.add("plus", plus(1), settings='[rollout]\non_new_version = "hold"\n')
    server = serve(repository.path)
    repository.add("plus", plus(2, datatype, width=2), version="2")
    eventually(lambda: states(server) == ["ready", "ready"])
    tell(server, "start", "plus", "--to", "2", "--steps", "50,100", "--every", "2s")
    refusals = set()

    def is_given_up():
        reply = one_number(server, "V1")
        assert (reply.status, reply.headers["x-tidegate-version"]) in [(200, "1"), (400, "2")], reply.body
        if reply.status == 400:
            refusals.add(reply.json()["error"])
        return status(server)["phase"] == "aborted"

    eventually(is_given_up)
    assert "requests failed" in status(server)["history"][-1]["reason"]
    assert len(refusals) == 1, refusals
    assert because in refusals.pop()
