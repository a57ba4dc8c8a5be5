"""`grpc.health.v1`: one name for the server, one for each model."""

import pytest

from health import check, watch
from models import plus


@pytest.mark.parametrize("service", ["", "iris", "language"])
def test_check(server, service):
    assert check(server, service) == "SERVING"


def test_check_of_an_unknown_name(server):
    assert check(server, "nosuch") == "NOT_FOUND"


@pytest.mark.parametrize("service", ["", "iris"])
def test_watch_begins_with_what_is(server, service):
    with watch(server, service) as watched:
        watched.until("SERVING")
        assert watched.seen == ["SERVING"]
        assert watched.end is None


def test_watch_of_an_unknown_name(server):
    """As the health protocol has it: told so, and kept waiting for the name to appear."""
    with watch(server, "nosuch") as watched:
        watched.until("SERVICE_UNKNOWN")
        assert watched.end is None


def test_watch_follows_a_model(repository, serve):
    repository.add("steady", plus(1))
    server = serve(repository.path)
    with watch(server, "plus") as watched, watch(server) as everything:
        watched.until("SERVICE_UNKNOWN")
        repository.add("plus", plus(1))
        watched.until("SERVING")
        repository.remove("plus")
        watched.until("SERVICE_UNKNOWN")
        assert everything.seen == ["SERVING"]
