"""Loading and unloading by request, with every flavour of the stock client."""

import json
import socket
import time
from contextlib import closing

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import GRPC, GRPC_AIO, HTTP, HTTP_AIO, field
from load import ClosedLoop, stock_worker
from models import plus
from server import eventually

EXPLICIT = ["--model-control", "explicit"]
KITS = pytest.mark.parametrize(
    "kit", [HTTP, HTTP_AIO, GRPC, GRPC_AIO], ids=["http", "http.aio", "grpc", "grpc.aio"]
)
ONE = np.ones((1, 1), dtype=np.float32)
UPLOADED = plus(41).SerializeToString()
TOKEN = "a-token-that-nobody-guesses"


def answer_of(client, model="plus"):
    return client.infer(model, {"x": ONE}).as_numpy("y").item()


def index(client):
    """(model, version) → state and reason."""
    told = client.describe("get_model_repository_index")
    entries = told if client.kit.is_http else told.get("models", [])
    return {
        (each["name"], each.get("version", "")): (each.get("state", ""), each.get("reason", ""))
        for each in entries
    }


def refused(call, *args, **kwargs):
    with pytest.raises(InferenceServerException) as caught:
        call(*args, **kwargs)
    return caught.value.status(), caught.value.message()


def uploads(server):
    return sorted(server.home.glob("tmp/tidegate-uploads-*/*"))


@pytest.fixture
def models(repository):
    repository.add("plus", plus(1))
    return repository.path


@KITS
def test_load_and_unload(models, repository, serve, kit):
    server = serve(models, flags=EXPLICIT)
    with kit.connect(server) as client:
        assert index(client) == {("plus", "1"): ("UNAVAILABLE", "unloaded")}
        assert client.raw.is_server_ready()
        client.raw.load_model("plus")
        assert client.raw.is_model_ready("plus")
        assert answer_of(client) == 2
        assert index(client)["plus", "1"][0] == "READY"

        repository.add("plus", plus(2), version="2")
        client.raw.load_model("plus")
        assert answer_of(client) == 3
        assert ("plus", "1") not in index(client)

        client.raw.unload_model("plus", unload_dependents=True)
        status, message = refused(answer_of, client)
        assert status == kit.status("not_found")
        assert "plus" in message
        assert index(client)["plus", "2"] == ("UNAVAILABLE", "unloaded")
        client.raw.unload_model("plus")
        client.raw.load_model("plus")
        assert answer_of(client) == 3

        for method in (client.raw.load_model, client.raw.unload_model):
            status, message = refused(method, "nosuch")
            assert status == kit.status("not_found")
            assert "nosuch" in message


@KITS
def test_a_model_that_cannot_be_loaded(models, repository, serve, kit):
    repository.add("broken", b"this is no model")
    with kit.connect(serve(models, flags=EXPLICIT)) as client:
        status, message = refused(client.raw.load_model, "broken")
        assert status == kit.status("invalid_argument")
        assert "broken" in message
        state, reason = index(client)["broken", "1"]
        assert state == "UNAVAILABLE"
        assert reason in message


@KITS
def test_a_configuration(models, serve, kit):
    with kit.connect(serve(models, flags=EXPLICIT)) as client:
        client.raw.load_model("plus", config=json.dumps({"max_batch_size": 2}))
        assert max_batch_size(client) == 2
        status, message = refused(client.infer, "plus", {"x": np.ones((3, 1), dtype=np.float32)})
        assert status == kit.status("invalid_argument")
        assert "max_batch_size" in message
        status, message = refused(
            client.raw.load_model, "plus", config=json.dumps({"ensemble_scheduling": {}})
        )
        assert status == kit.status("invalid_argument")
        assert "ensemble_scheduling" in message
        assert max_batch_size(client) == 2
        client.raw.load_model("plus")
        assert max_batch_size(client) != 2


def max_batch_size(client):
    told = client.describe("get_model_config", "plus")
    return int((told if client.kit.is_http else told["config"])["max_batch_size"])


@KITS
def test_files(models, serve, kit):
    server = serve(models, flags=[*EXPLICIT, "--allow-model-upload"])
    with kit.connect(server) as client:
        client.raw.load_model("plus")
        files = {"file:1/model.onnx": UPLOADED}
        client.raw.load_model("plus", config="{}", files=files)
        assert answer_of(client) == 42
        assert len(uploads(server)) == 1
        client.raw.load_model("plus")
        assert answer_of(client) == 2
        assert uploads(server) == []

        client.raw.load_model("guest", config="{}", files=files)
        assert answer_of(client, "guest") == 42
        client.raw.unload_model("guest")
        assert uploads(server) == []
        assert not (models / "guest").exists()

        status, message = refused(client.raw.load_model, "plus", files=files)
        assert status == kit.status("invalid_argument")
        assert "config" in message
        for path in ("../../plus/1/model.onnx", "1/../../model.onnx", "/model.onnx", "0/model.onnx"):
            wrong = {f"file:{path}": UPLOADED}
            status, message = refused(client.raw.load_model, "plus", config="{}", files=wrong)
            assert status == kit.status("invalid_argument")
            assert path in message
        assert uploads(server) == []
        assert answer_of(client) == 2


@KITS
def test_files_are_off_by_default(models, serve, kit):
    with kit.connect(serve(models, flags=EXPLICIT)) as client:
        files = {"file:1/model.onnx": UPLOADED}
        status, message = refused(client.raw.load_model, "plus", config="{}", files=files)
        assert status == kit.status("forbidden")
        assert "allow_model_upload" in message


def test_a_killed_server_leaves_uploads_that_the_next_one_removes(models, serve):
    flags = [*EXPLICIT, "--allow-model-upload"]
    server = serve(models, flags=flags)
    with HTTP.connect(server) as client:
        client.raw.load_model("plus", config="{}", files={"file:1/model.onnx": UPLOADED})
    server.kill()
    assert len(uploads(server)) == 1
    server = serve(models, flags=flags)
    assert uploads(server) == []
    assert server.stop() == 0


@KITS
def test_other_modes_refuse(server, kit):
    with kit.connect(server) as client:
        for method in (client.raw.load_model, client.raw.unload_model):
            status, message = refused(method, "iris")
            assert status == kit.status("not_ready")
            assert "watch" in message
            assert "--model-control explicit" in message


@KITS
def test_the_token(models, serve, kit):
    server = serve(models, config=f'token = "{TOKEN}"\n', flags=EXPLICIT)
    right = {"authorization": f"Bearer {TOKEN}"}
    with kit.connect(server) as client:
        for headers in (None, {"authorization": f"Bearer {TOKEN[:-1]}"}):
            for method in (client.raw.load_model, client.raw.unload_model):
                status, message = refused(method, "plus", headers=headers)
                assert status == kit.status("unauthenticated")
                assert TOKEN[:-1] not in message
            status, _ = refused(client.raw.update_log_settings, {"log_info": True}, headers=headers)
            assert status == kit.status("unauthenticated")
        client.raw.load_model("plus", headers=right)
        assert answer_of(client) == 2
        client.raw.update_log_settings({"log_verbose_level": 2}, headers=right)
        client.raw.unload_model("plus", headers=right)
    assert server.stop() == 0
    assert TOKEN not in server.log() + (server.home / "stdout").read_text()


def test_without_a_token_only_this_machine_may(models, serve):
    """Asked at an address of this machine that is not loopback, the server sees a stranger."""
    server = serve(models, flags=EXPLICIT, host=own_address())
    for kit in (HTTP, GRPC):
        with kit.connect(server) as client:
            status, message = refused(client.raw.load_model, "plus")
            assert status == kit.status("forbidden")
            assert "TIDEGATE_TOKEN" in message


def own_address():
    """An address of this machine that others can reach; nothing is sent to find it."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return probe.getsockname()[0]


@KITS
def test_loads_under_traffic(models, repository, serve, kit):
    server = serve(models, flags=[*EXPLICIT, "--load-model", "plus"])
    answered = []

    def step(client):
        number = len(answered)
        result = client.infer("plus", {"x": np.array([[number]], dtype=np.float32)})
        version = field(result, "model_version")
        assert result.as_numpy("y").item() == number + int(version)
        answered.append(version)
        time.sleep(0.005)

    workers = [
        stock_worker(each, getattr(server, each.port), step)
        for each in (HTTP, GRPC)
        for _ in range(3)
    ]
    with ClosedLoop(workers) as loop, kit.connect(server) as client:
        for version in range(2, 8):
            # Each version answers before the next one comes.
            eventually(lambda: answered.count(str(version - 1)) >= 10 or loop.failures)
            repository.add("plus", plus(version), version=str(version))
            client.raw.load_model("plus")
            assert answer_of(client) == 1 + version
    loop.check()
