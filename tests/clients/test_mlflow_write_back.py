"""What MLflow's registry knows of the versions that are served from it: tags, metrics of runs, and the alias."""

import base64
import json
import socket
import threading
import time
from contextlib import suppress

import pytest
from infer import Question, rest_json
from mlflow_server import Mlflow, log_onnx
from mirrored import answers
from models import model, plus, value
from onnx import helper
from server import eventually, run
from tensors import tensor
from wire import CountingProxy, call, spawn

# Starting MLflow takes 20 s, and longer on busy cores.
pytestmark = pytest.mark.timeout(300)

SOON = 40
SECRET = "correct-horse-battery"
OWNER, READER = f"ada:{SECRET}@", f"bob:{SECRET}@"
FOLLOW = '[follow]\ninterval = "1s"\nmax_interval = "4s"\n'
TAGS = "[write_back]\ntags = true\n"


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    """A server where `ada` may do everything and `bob` may read, with versions 1 and 2 of a graph, and 3 that is none."""
    home = tmp_path_factory.mktemp("mlflow")
    users = home / "users.ini"
    users.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = ada\nauth_cache_ttl_seconds = 300\n"
        f"admin_password = {SECRET}\ndatabase_uri = sqlite:///{home}/users.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    settings = {"MLFLOW_AUTH_CONFIG_PATH": str(users), "MLFLOW_FLASK_SERVER_SECRET_KEY": "tests"}
    server = Mlflow(home, flags=["--app-name", "basic-auth"], environment=settings)
    try:
        body = json.dumps({"username": "bob", "password": SECRET}).encode()
        login = base64.b64encode(f"ada:{SECRET}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        assert call(server.address, "POST", "/api/2.0/mlflow/users/create", body, headers).status == 200
        with pytest.MonkeyPatch.context() as environment:
            server.connect(environment, login=OWNER)
            for graph in (plus(1), plus(2), unknown()):
                log_onnx(server, graph, "template")
            yield server
    finally:
        server.stop()


def unknown():
    """A graph of an operator that nobody knows."""
    node = helper.make_node("Nope", ["x"], ["y"], domain="nobody")
    rows = [value(name, "FP32", ["rows", 1]) for name in "xy"]
    return model([node], rows[:1], rows[1:], opsets={"": 20, "nobody": 1})


def register(mlflow, name, *templates):
    """A model whose versions have the files and runs of those of `template`; version 1 is live."""
    mlflow.client.create_registered_model(name)
    for template in templates:
        found = mlflow.client.get_model_version("template", template)
        logged = found.source.removeprefix("models:/")
        mlflow.client.create_model_version(name, found.source, run_id=found.run_id, model_id=logged)
    mlflow.client.set_registered_model_alias(name, "live", "1")


def sourced(repository, mlflow, name, settings, address=None):
    """A model of a folder, whose versions come from the registry."""
    uri = f"mlflow://{OWNER}{address or mlflow.address}/{name}@live"
    (repository.path / name).mkdir(parents=True)
    (repository.path / name / "model.toml").write_text(f'source = "{uri}"\n{settings}')


def tags(mlflow, name, version):
    return mlflow.client.get_model_version(name, version).tags


def pointed(mlflow, name, alias):
    return str(mlflow.client.get_registered_model(name).aliases.get(alias))


def status(server):
    (found,) = json.loads(call(server.ops, "GET", "/admin/v1/sources").body)
    return found["write_back"]


def tell(server, *arguments):
    told = run("rollout", *arguments, "--ops", server.ops, "--json", home=server.home)
    assert told.returncode == 0, told.stderr


def phase(server, name):
    return call(server.ops, "GET", f"/admin/v1/models/{name}/rollout").json().get("phase")


def digest(server, name, version):
    return call(server.ops, "GET", f"/admin/v1/models/{name}/versions/{version}").json()["digest"]


def test_tags_appear_and_a_restart_finds_them(mlflow, serve):
    register(mlflow, "tagged", "1", "2")
    uri = mlflow.uri("tagged@live", login=OWNER)
    server = serve(uri, config=FOLLOW + TAGS)
    assert answers(server, "tagged") == 2
    found = eventually(lambda: len(found := tags(mlflow, "tagged", "1")) == 2 and found, SOON)
    assert found == {"tidegate.digest": digest(server, "tagged", "1"), "tidegate.state": "ready"}
    assert status(server)["last"] and not status(server)["error"]
    assert server.stop() == 0
    server = serve(uri, name="again", config=FOLLOW + TAGS)
    eventually(lambda: (status(server) or {}).get("last"), SOON)
    page = call(server.ops, "GET", "/metrics").body.decode()
    lines = [line for line in page.splitlines() if line.startswith("tidegate_source_write_backs_total{")]
    counts = {line.split('outcome="')[1].split('"')[0]: line.split()[-1] for line in lines}
    assert counts == {"written": "0", "unchanged": "1", "denied": "0", "failed": "0"}
    assert SECRET not in server.log() and SECRET not in page
    mlflow.client.set_registered_model_alias("tagged", "live", "2")
    eventually(lambda: tags(mlflow, "tagged", "2").get("tidegate.state") == "ready", SOON)
    eventually(lambda: tags(mlflow, "tagged", "1")["tidegate.state"] == "unloaded", SOON)
    assert answers(server, "tagged") == 3


def test_a_version_that_does_not_load_is_failed(mlflow, repository, serve):
    register(mlflow, "broken", "1", "3")
    sourced(repository, mlflow, "broken", TAGS)
    server = serve(repository.path, config=FOLLOW)
    eventually(lambda: tags(mlflow, "broken", "1").get("tidegate.state") == "ready", SOON)
    mlflow.client.set_registered_model_alias("broken", "live", "2")
    state = eventually(lambda: tags(mlflow, "broken", "2").get("tidegate.state"), SOON)
    assert state.startswith("failed: ") and "Nope" in state
    assert answers(server, "broken") == 2 and tags(mlflow, "broken", "1")["tidegate.state"] == "ready"


CANARY = """[rollout]
on_new_version = "canary"
steps = [50, 100]
every = "1h"
[write_back]
tags = true
promoted_alias = "champion"
"""


def test_the_alias_follows_a_canary_there_and_back(mlflow, repository, serve):
    register(mlflow, "canary", "1", "2")
    mlflow.client.set_registered_model_alias("canary", "champion", "1")
    sourced(repository, mlflow, "canary", CANARY)
    server = serve(repository.path, config=FOLLOW)
    eventually(lambda: call(server.ops, "GET", "/admin/v1/models/canary").json()["epoch"] == 1, SOON)
    mlflow.client.set_registered_model_alias("canary", "live", "2")
    eventually(lambda: phase(server, "canary") == "canary", SOON)
    time.sleep(2)
    assert pointed(mlflow, "canary", "champion") == "1"
    tell(server, "promote", "canary")
    eventually(lambda: pointed(mlflow, "canary", "champion") == "2", SOON)
    found = eventually(lambda: len(found := tags(mlflow, "canary", "2")) == 4 and found, SOON)
    assert found["tidegate.rollout"] == "promoted (canary, canary/r1)"
    assert found["tidegate.alias"].startswith("champion: set by canary/r1 at ")
    assert (found["tidegate.state"], found["tidegate.digest"]) == ("ready", digest(server, "canary", "2"))
    assert status(server)["alias"].startswith("alias 'champion' was set to version 2 by canary/r1")

    # Killed, another server knows what was done; what somebody does to the alias since is not undone.
    server.kill()
    mlflow.client.set_registered_model_alias("canary", "champion", "1")
    server = serve(repository.path, config=FOLLOW)
    eventually(lambda: (status(server) or {}).get("last"), SOON)
    time.sleep(3)
    assert pointed(mlflow, "canary", "champion") == "1"
    mlflow.client.set_registered_model_alias("canary", "champion", "2")
    tell(server, "rollback", "canary", "--reason", "customers complain")
    eventually(lambda: pointed(mlflow, "canary", "champion") == "1", SOON)
    rolled_back = "rolled_back: customers complain (canary, canary/r1)"
    eventually(lambda: tags(mlflow, "canary", "2")["tidegate.rollout"] == rolled_back, SOON)
    assert answers(server, "canary") == 2


def test_an_alias_that_somebody_else_has_moved_stays_there(mlflow, repository, serve):
    register(mlflow, "moved", "1", "2", "2")
    sourced(repository, mlflow, "moved", CANARY)
    server = serve(repository.path, config=FOLLOW)
    eventually(lambda: call(server.ops, "GET", "/admin/v1/models/moved").json()["epoch"] == 1, SOON)
    mlflow.client.set_registered_model_alias("moved", "live", "2")
    eventually(lambda: phase(server, "moved") == "canary", SOON)
    mlflow.client.set_registered_model_alias("moved", "champion", "3")
    tell(server, "promote", "moved")
    said = eventually(lambda: status(server)["alias"], SOON)
    assert "was not set to version 2 by moved/r1" in said and said.endswith("meanwhile, to version 3")
    assert "the alias is left alone" in server.log()
    assert said in run("models", "--ops", server.ops, home=server.home).stdout
    time.sleep(2)
    assert pointed(mlflow, "moved", "champion") == "3"


def test_what_was_served_arrives_at_the_run(mlflow, serve):
    # With a run of its own.
    log_onnx(mlflow, plus(1), "measured")
    mlflow.client.set_registered_model_alias("measured", "live", "1")
    version = mlflow.client.get_model_version("measured", "1")
    config = FOLLOW + '[write_back]\nmetrics = true\nmetrics_interval = "2s"\n'
    server = serve(mlflow.uri("measured@live", login=OWNER), config=config)
    for _ in range(7):
        assert answers(server, "measured") == 2

    def history(key):
        return mlflow.client.get_metric_history(version.run_id, key)

    def asked():
        return sum(one.value for one in history("serve.requests"))

    # What was asked between the looks is seen by the next one, and what was asked for last when the server stops.
    eventually(lambda: asked() == 7, SOON)
    assert [one.value for one in history("serve.errors")] == [0] * len(history("serve.errors"))
    assert 0 < history("serve.p50_ms")[0].value <= history("serve.p99_ms")[0].value < 5000
    assert history("serve.requests")[0].step == history("serve.requests")[0].timestamp // 2000
    assert answers(server, "measured") == 2
    assert server.stop() == 0
    # A registry on busy cores may not answer in the moment that it gets.
    is_late = "what was served last is not written back: it took too long" in server.log()
    assert asked() == 8 or (asked() == 7 and is_late)
    assert tags(mlflow, "measured", "1") == {}


def test_who_may_not_write_serves_all_the_same(mlflow, serve):
    register(mlflow, "guarded", "1")
    server = serve(mlflow.uri("guarded@live", login=READER), config=FOLLOW + TAGS)
    denied = eventually(lambda: (found := status(server)) and found["error"] and found, SOON)
    assert "refuses: 403 Forbidden: Permission denied" in denied["error"] and denied["since"]
    assert answers(server, "guarded") == 2 and tags(mlflow, "guarded", "1") == {}
    listed = run("models", "--ops", server.ops, home=server.home).stdout
    assert "not written back since" in listed and "403 Forbidden" in listed
    assert SECRET not in server.log()


class Door(CountingProxy):
    """A way to MLflow that can be shut, and opened again."""

    def shut(self):
        self.__exit__()

    def open(self):
        host, port = self.address.split(":")
        self.listener = socket.create_server((host, int(port)))
        self.sockets = [self.listener]
        spawn(self.accept)


def test_without_mlflow_no_request_fails_and_all_is_written_later(mlflow, repository, serve):
    register(mlflow, "away", "1", "2")
    with Door(mlflow.address) as door:
        sourced(repository, mlflow, "away", f'versions = "all"\n{CANARY}metrics = true\n', address=door.address)
        server = serve(repository.path, config=FOLLOW)
        eventually(lambda: call(server.ops, "GET", "/admin/v1/models/away").json()["epoch"] == 1, SOON)
        mlflow.client.set_registered_model_alias("away", "live", "2")
        eventually(lambda: phase(server, "away") == "canary", SOON)
        with Asking(server, "away") as asking:
            door.shut()
            tell(server, "promote", "away")
            error = eventually(lambda: status(server)["error"], SOON)
            assert "does not answer" in error
            assert pointed(mlflow, "away", "champion") == "None"
            time.sleep(2)
            door.open()
            eventually(lambda: pointed(mlflow, "away", "champion") == "2", SOON)
            rollout = "promoted (canary, away/r1)"
            eventually(lambda: tags(mlflow, "away", "2").get("tidegate.rollout") == rollout, SOON)
            eventually(lambda: not status(server)["error"], SOON)
        assert asking.count > 0 and not asking.failed, asking.failed[:3]


class Asking:
    """Asks a model without a pause."""

    def __init__(self, server, name):
        self.server, self.name, self.count, self.failed = server, name, 0, []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.ask)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def ask(self):
        question = Question(self.name, [tensor("x", "FP32", [1, 1], [1])])
        while not self.done.is_set():
            try:
                answer = rest_json(self.server, question)
                self.failed += [answer.error] if answer.error else []
            except OSError as error:
                self.failed.append(error)
            self.count += 1
            time.sleep(0.01)


def test_a_model_from_elsewhere_cannot_be_written_back(repository, serve):
    repository.add("plus", plus(1), settings=TAGS)
    server = serve(repository.path, wait=False)

    def reason():
        with suppress(KeyError):
            (version,) = call(server.ops, "GET", "/admin/v1/models/plus").json()["versions"]
            return version["state"] == "failed" and version["reason"]

    said = eventually(reason, SOON)
    assert "model.toml: write_back is for a model of MLflow's registry: expected source to be mlflow://" in said
    with pytest.raises(AssertionError, match="expected models to be mlflow://host:5000/name@alias"):
        serve(repository.path, name="other", config=TAGS)
