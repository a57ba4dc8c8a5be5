"""Folders of models: what is served, what is refused and why, and what happens when it changes."""

import itertools
import re
import shutil
import time

import numpy as np
import pytest

from clients import GRPC, HTTP, Client, field
from infer import WAYS, Question, ask
from load import ClosedLoop, stock_worker
from models import (
    EXTERNAL_WEIGHTS,
    SETTINGS,
    SHIPPED,
    Repository,
    copy_into,
    identity,
    plus,
    save,
    with_external_data,
    zipmap,
)
from server import Server, eventually
from tensors import tensor
from wire import call

SWAPS = 20


def index(server):
    """(model, version) → the entry of the repository index."""
    entries = call(server.rest, "POST", "/v2/repository/index").json()
    return {(entry["name"], entry["version"]): entry for entry in entries}


def ready_versions(server, name):
    return [v for (n, v), entry in index(server).items() if n == name and entry["state"] == "READY"]


def entry_of(server, name):
    (entry,) = [entry for (n, _), entry in index(server).items() if n == name]
    return entry


def wait_for_version(server, name, version):
    eventually(lambda: answering_version(server, name) == version, timeout=30)


def answering_version(server, name):
    answer = ask_plus(server, name)
    return answer.version if answer.status == 200 else None


def ask_plus(server, name="plus", version=""):
    question = Question(name, [tensor("x", "FP32", [1, 1], [1])], version=version)
    return WAYS["rest_json"](server, question)


# --- what can be in a folder --------------------------------------------------------


def unsupported():
    """An operator set that no runtime has."""
    graph = identity("FP32")
    graph.opset_import[0].version = 99
    return graph


# A file that is there and long enough, so that only the rule can refuse it.
ABSOLUTE = SHIPPED / "iris" / "1" / "model.onnx"

# Name → graph, settings, and expressions that the reason must match.
BROKEN = {
    "corrupt": (b"this is no model", SETTINGS, ["protobuf|corrupt|parse"]),
    "empty": (b"", SETTINGS, ["."]),
    "unsupported": (unsupported(), SETTINGS, ["opset"]),
    "missing_data": (with_external_data("gone.bin"), SETTINGS, ["gone.bin"]),
    "climbing_data": (with_external_data("../../outside.bin"), SETTINGS, [r"outside\.bin"]),
    "hidden_climb": (with_external_data("./../../outside.bin"), SETTINGS, [r"outside\.bin"]),
    "absolute_data": (with_external_data(str(ABSOLUTE)), SETTINGS, [re.escape(str(ABSOLUTE))]),
    "no_tensor": (zipmap(with_tensor=False), SETTINGS, ["zipped", "tensor"]),
    "unknown_key": (plus(1), "max_batchsize = 4\n", ["max_batchsize"]),
    "unknown_option": (plus(1), "[options]\nintra_threads = 1\n", ["intra_threads"]),
    "wrong_type": (plus(1), 'instances = "two"\n', ["instances"]),
    "no_toml": (plus(1), "max_batch_size = = 4\n", [r"model\.toml"]),
    "no_device": (plus(1), '[options]\ndevice = "cuda:0"\n', ["cuda"]),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Good models in every form a folder allows, beside broken ones of every kind."""
    home = tmp_path_factory.mktemp("mixed")
    repository = Repository(home / "models")
    for name, (graph, settings, _) in BROKEN.items():
        repository.add(name, graph, settings=settings)
    add_good_models(repository, home)
    with Server(repository.path, home) as server:
        yield server
        assert server.stop() == 0


def add_good_models(repository, home):
    repository.add("plus", plus(1))
    repository.add("zipmap", zipmap(with_tensor=True))
    (repository.path / "outside.bin").write_bytes(EXTERNAL_WEIGHTS.tobytes())
    external = repository.add("external", with_external_data("weights.bin"))
    (external / "weights.bin").write_bytes(EXTERNAL_WEIGHTS.tobytes())

    bare = repository.path / "bare"
    bare.mkdir()
    save(plus(1), bare / "model.onnx")

    linked = repository.path / "linked"
    linked.mkdir()
    copy_into(external, home / "elsewhere")
    (linked / "1").symlink_to(home / "elsewhere")

    repository.add("several", plus(2), version="2")
    for version in (9, 10):
        repository.add("several", plus(version), version=str(version))
    (repository.path / "several" / "v11").mkdir()
    save(plus(11), repository.path / "several" / "v11" / "model.onnx")
    (repository.path / ".hidden" / "1").mkdir(parents=True)
    save(plus(1), repository.path / ".hidden" / "1" / "model.onnx")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_says_why(mixed, name):
    entry = entry_of(mixed, name)
    assert entry["state"] == "UNAVAILABLE"
    for expression in BROKEN[name][2]:
        assert re.search(expression, entry["reason"], re.IGNORECASE), entry["reason"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_not_ready(mixed, name):
    reply = call(mixed.rest, "GET", f"/v2/models/{name}/ready")
    assert (reply.status, reply.json()) == (503, {"name": name, "ready": False})
    question = Question(name, [tensor("x", "FP32", [1, 1], [1])])
    for way, status in {"rest_json": 503, "grpc_raw": "UNAVAILABLE"}.items():
        answer = WAYS[way](mixed, question)
        assert answer.status == status
        assert name in answer.error


def test_broken_models_over_grpc(mixed):
    with Client(GRPC, mixed.grpc) as client:
        models = client.describe("get_model_repository_index")["models"]
    broken = {each["name"]: each for each in models if each["state"] == "UNAVAILABLE"}
    assert broken.keys() == BROKEN.keys()
    assert all(each["reason"] for each in broken.values())


def test_broken_models_do_not_unready_the_server(mixed):
    assert call(mixed.rest, "GET", "/v2/health/ready").status == 200
    assert call(mixed.ops, "GET", "/readyz").status == 200


@pytest.mark.parametrize("name", ["plus", "bare"])
def test_good_models_beside_them(mixed, name):
    answer = ask_plus(mixed, name, version="1")
    assert answer.outputs["y"].data == [2]


@pytest.mark.parametrize("name", ["external", "linked"])
def test_external_data_and_links(mixed, name):
    answer = ask(mixed, "grpc_raw", name, tensor("x", "FP32", [1, 4], [0, 0, 0, 0]))
    assert answer.outputs["y"].data == [1, 2, 3, 4]


def test_zipmap_is_left_out(mixed):
    answer = ask(mixed, "rest_json", "zipmap", tensor("X", "FP32", [1, 4], [1, 1, 1, 1]))
    assert answer.outputs.keys() == {"probabilities"}
    assert answer.outputs["probabilities"].data == [0.25] * 4
    metadata = call(mixed.rest, "GET", "/v2/models/zipmap").json()
    assert [output["name"] for output in metadata["outputs"]] == ["probabilities"]
    told = call(mixed.ops, "GET", "/admin/v1/models/zipmap").body.decode()
    for text in (mixed.log(), told):
        assert re.search("zipmap.{0,20}false", text, re.IGNORECASE), (
            "how to export without it is not said"
        )


def test_the_highest_version_is_the_default(mixed):
    """By number, not by text; folders that are no number are no versions."""
    assert ask_plus(mixed, "several").version == "10"
    assert ("several", "v11") not in index(mixed)
    assert not any(name.startswith(".") for name, _ in index(mixed))


# --- what changes while it is served ------------------------------------------------


@pytest.fixture
def living(repository, serve):
    """A server whose only model is version 1 of `plus`, which adds 1."""
    repository.add("plus", plus(1))
    return serve(repository.path)


def clients_that_check(server, answered):
    """Eight stock clients; each answer must be that of the version it says it is from."""

    def step(client):
        number = next(answered)
        result = client.infer("plus", {"x": np.array([[number]], dtype=np.float32)})
        version = field(result, "model_version")
        assert result.as_numpy("y").item() == number + int(version)
        time.sleep(0.005)

    return [
        stock_worker(kit, getattr(server, kit.port), step) for kit in [HTTP, GRPC] for _ in range(4)
    ]


@pytest.mark.timeout(240)
def test_swaps_under_load(repository, living):
    answered = itertools.count()
    with ClosedLoop(clients_that_check(living, answered)) as loop:
        for version in range(2, SWAPS + 2):
            repository.add("plus", plus(version), version=str(version))
            wait_for_version(living, "plus", str(version))
            shutil.rmtree(repository.path / "plus" / str(version - 1))
    loop.check()
    assert next(answered) > 10 * SWAPS
    eventually(lambda: ready_versions(living, "plus") == [str(SWAPS + 1)])


def test_the_old_version_is_gone(repository, living):
    repository.add("plus", plus(2), version="2")
    wait_for_version(living, "plus", "2")
    eventually(lambda: ready_versions(living, "plus") == ["2"])
    assert ask_plus(living, version="1").status in (404, 503)
    assert ask_plus(living, version="2").outputs["y"].data == [3]


def test_a_slow_copy_is_waited_for(repository, living):
    """Written in place, a piece every half second: nothing is read before it is all there."""
    data = plus(2).SerializeToString()
    folder = repository.path / "plus" / "2"
    folder.mkdir()
    piece = len(data) // 5 + 1
    with ClosedLoop(clients_that_check(living, itertools.count())) as loop:
        with (folder / "model.onnx").open("wb", buffering=0) as file:
            for start in range(0, len(data), piece):
                file.write(data[start : start + piece])
                time.sleep(0.5)
                assert ask_plus(living).version == "1"
                assert index(living).get(("plus", "2"), {}).get("state") != "UNAVAILABLE"
        wait_for_version(living, "plus", "2")
    loop.check()


def test_a_failed_version_leaves_the_running_one(repository, living):
    repository.add("plus", b"this is no model", version="2")
    eventually(lambda: index(living).get(("plus", "2"), {}).get("state") == "UNAVAILABLE", 20)
    assert index(living)["plus", "2"]["reason"]
    assert ready_versions(living, "plus") == ["1"]
    assert ask_plus(living).outputs["y"].data == [2]
    assert ask_plus(living, version="2").status == 503
    repository.add("plus", plus(3), version="3")
    wait_for_version(living, "plus", "3")


def test_a_new_model_and_a_deleted_one(repository, living):
    repository.add("visitor", plus(5))
    wait_for_version(living, "visitor", "1")
    repository.remove("visitor")
    eventually(lambda: ask_plus(living, "visitor").status == 404, timeout=20)
    assert not ready_versions(living, "visitor")
    assert ask_plus(living).status == 200


def test_an_empty_repository_is_ready(repository, serve):
    server = serve(repository.path)
    assert call(server.ops, "GET", "/readyz").status == 200
    assert index(server) == {}


# --- --model-control ----------------------------------------------------------------


def test_explicit_loads_what_is_named(repository, serve):
    repository.ship("iris", "digits")
    flags = ["--model-control", "explicit", "--load-model", "iris"]
    server = serve(repository.path, flags=flags)
    assert ready_versions(server, "iris") == ["1"]
    assert ready_versions(server, "digits") == []


def test_explicit_loads_everything_for_a_star(repository, serve):
    repository.ship("iris", "digits")
    flags = ["--model-control", "explicit", "--load-model", "*"]
    server = serve(repository.path, flags=flags)
    assert ready_versions(server, "iris") == ready_versions(server, "digits") == ["1"]


def test_none_keeps_what_was_there(repository, serve):
    repository.add("plus", plus(1))
    server = serve(repository.path, flags=["--model-control", "none"])
    repository.add("plus", plus(2), version="2")
    repository.add("visitor", plus(5))
    time.sleep(4)
    assert answering_version(server, "plus") == "1"
    assert ask_plus(server, "visitor").status == 404
