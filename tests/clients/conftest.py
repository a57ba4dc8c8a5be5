"""Servers and repositories that the tests share.

One server with every model runs for the whole session; tests that count, break or stop
something start their own with `serve`.
"""

import pytest

pytest.register_assert_rewrite("contract", "infer", "load")

from mlflow_server import Mlflow  # noqa: E402
from models import Repository, add_small_models, magika  # noqa: E402
from server import Server  # noqa: E402
from text_models import add_one_of_each_kind  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Every model that tests only read from. It must end as it should: with exit code 0."""
    home = tmp_path_factory.mktemp("shared")
    repository = Repository(home / "models")
    repository.ship("iris", "digits", "language")
    repository.copy("magika", magika())
    add_small_models(repository)
    with Server(repository.path, home) as running:
        yield running
        assert running.stop() == 0, running.tail()


@pytest.fixture(scope="module")
def text_server(tmp_path_factory):
    """One embedding model, one reranker, and a model that is neither."""
    home = tmp_path_factory.mktemp("texts")
    repository = Repository(home / "models")
    add_one_of_each_kind(repository)
    with Server(repository.path, home) as running:
        yield running


@pytest.fixture(scope="session")
def mlflow(tmp_path_factory):
    """A registry of MLflow, and MLflow's own client of it. It takes 20 s to boot, so all tests that want one share it."""
    server = Mlflow(tmp_path_factory.mktemp("mlflow"))
    try:
        # MLflow leaves settings in the environment.
        with pytest.MonkeyPatch.context() as environment:
            server.connect(environment)
            yield server
    finally:
        server.stop()


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "models")


@pytest.fixture
def serve(tmp_path):
    """Starts servers that end with the test."""
    started = []

    def start(models, name="server", **options):
        started.append(Server(models, tmp_path / name, **options))
        return started[-1]

    yield start
    for running in started:
        running.__exit__()
