"""Priorities, timeouts and full levels, as the stock clients ask for them."""

import re
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import GRPC, GRPC_AIO, HTTP, HTTP_AIO
from models import SETTINGS, Repository, slow
from server import Server, eventually
from wire import call

KITS = {"http": HTTP, "http_aio": HTTP_AIO, "grpc": GRPC, "grpc_aio": GRPC_AIO}

# Level 1 is for the request that keeps the executor busy.
LEVELS = f"""{SETTINGS}
[queue]
priority_levels = 4
default_priority = 4

[queue.priority.2]
max_size = 1

[queue.priority.3]
default_timeout = "50ms"
"""

# Longer than it takes to queue a few requests, and hardly any time at all.
LONG, SHORT = 3000, 50


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("schedule")
    repository = Repository(home / "models")
    repository.add("levels", slow(), settings=LEVELS)
    repository.add("plain", slow())
    with Server(repository.path, home) as running:
        yield running


@pytest.fixture(params=KITS)
def kit(request):
    return KITS[request.param]


def infer(server, kit, model="levels", iterations=SHORT, **more):
    with kit.connect(server) as client:
        return client.infer(model, {"iterations": np.array([iterations])}, **more)


def refused(server, kit, **more):
    """Status and sentence of a request that must fail."""
    with pytest.raises(InferenceServerException) as caught:
        infer(server, kit, **more)
    return caught.value.status(), caught.value.message()


def queued(server, count):
    """Waits until so many requests to the model `levels` are submitted and not answered."""
    eventually(lambda: pending(server) == count, 30, pause=0.01)


def pending(server):
    """Requests submitted to the model `levels` and not answered."""
    page = call(server.ops, "GET", "/metrics").body.decode()
    found = re.search(r'^tidegate_pending_requests\{model="levels",version="1"\} (\S+)$', page, re.M)
    return float(found[1])


@contextmanager
def occupied(server):
    """While the only executor is busy; afterwards everything has been answered."""
    queued(server, 0)
    occupant = started(infer, server, GRPC, iterations=LONG, priority=1)
    queued(server, 1)
    yield occupant
    occupant.join()
    queued(server, 0)


def started(target, *arguments, **more):
    thread = threading.Thread(target=target, args=arguments, kwargs=more)
    thread.start()
    return thread


def test_the_urgent_are_answered_first(server, kit):
    answered = []

    def ask(priority):
        infer(server, kit, priority=priority)
        answered.append(priority)

    with occupied(server) as occupant:
        visitors = []
        for count, priority in enumerate([0, 4, 2, 1], start=2):
            visitors.append(started(ask, priority))
            queued(server, count)
        assert occupant.is_alive(), "the executor was not busy for long enough"
        for visitor in visitors:
            visitor.join()
    assert answered == [1, 2, 0, 4]


def test_a_level_there_is_not_is_the_default(server, kit):
    assert infer(server, kit, priority=5).as_numpy("y").item() == 1


def test_a_model_without_levels_takes_any(server, kit):
    assert infer(server, kit, "plain", priority=5).as_numpy("y").item() == 1


def test_a_full_level(server, kit):
    with occupied(server) as occupant:
        waiting = started(infer, server, kit, priority=2)
        queued(server, 2)
        status, sentence = refused(server, kit, priority=2)
        assert status == kit.status("overloaded")
        assert "queue.max_size" in sentence and "level 2" in sentence
        assert occupant.is_alive()
        waiting.join()


def test_the_timeout_of_the_queue(server, kit):
    with occupied(server) as occupant:
        status, sentence = refused(server, kit, priority=3)
        assert status == kit.status("deadline_exceeded")
        assert "'levels'" in sentence and "queue.default_timeout" in sentence
        assert occupant.is_alive(), "rejected while the executor is busy"


def test_the_timeout_of_a_request(server, kit):
    with occupied(server) as occupant:
        # At once when it is clear that it cannot be kept, else when it is over.
        status, sentence = refused(server, kit, timeout=100_000)
        assert status == kit.status("deadline_exceeded")
        assert "'levels'" in sentence
        assert occupant.is_alive(), "the run in progress was not waited for"
