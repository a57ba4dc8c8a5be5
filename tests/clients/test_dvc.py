"""Models that DVC tracks: its own program adds and pushes them, the server reads the pointer files."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import boto3
import pytest
from mirrored import CONFIG, SOON, adds_weights, answers, graph, log_has, versions, weights
from models import with_external_data
from moto.server import ThreadedMotoServer
from server import ROOT, eventually

DVC = Path(os.environ.get("DVC", ROOT / ".venv" / "dvc" / "bin" / "dvc"))


class Checkout:
    """A folder that DVC works in, without git."""

    def __init__(self, path, remote):
        self.path = path
        path.mkdir()
        self.dvc("init", "--no-scm")
        self.dvc("config", "core.analytics", "false")
        self.dvc("remote", "add", "--default", "store", str(remote))

    def dvc(self, *arguments):
        assert DVC.exists(), f"{DVC} is missing: make test-clients installs it, or set DVC"
        # Its settings and locks, too, stay with the test.
        own = {"HOME": str(self.path.parent), "DVC_NO_ANALYTICS": "1", "DVC_TEST": "true"}
        done = subprocess.run(
            [DVC, *arguments],
            cwd=self.path,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def add(self, name, files):
        """Tracks a file, or a folder of files, and pushes it; nothing of it stays but the pointer."""
        target = self.path / name
        if isinstance(files, bytes):
            target.write_bytes(files)
        else:
            shutil.rmtree(target, ignore_errors=True)
            for path, content in files.items():
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(content)
        self.dvc("add", "--quiet", name)
        self.dvc("push", "--quiet")
        shutil.rmtree(self.path / ".dvc" / "cache")
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    def uri(self, pointer):
        return f"dvc://{self.path}#{pointer}"


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "checkout", tmp_path / "remote")


def test_a_tracked_file_is_served_and_followed(checkout, serve):
    checkout.add("plus.onnx", graph(1))
    server = serve(checkout.uri("plus.onnx.dvc"), config=CONFIG)
    assert answers(server) == 2
    assert versions(server) == [md5(graph(1))[:12]]

    checkout.add("plus.onnx", graph(10))
    eventually(lambda: answers(server) == 11, SOON)
    assert server.stop() == 0


def test_a_content_that_is_another_is_refused(checkout, serve, tmp_path):
    checkout.add("plus.onnx", graph(1))
    server = serve(checkout.uri("plus.onnx.dvc"), config=CONFIG)
    assert answers(server) == 2
    pointer = checkout.path / "plus.onnx.dvc"
    aside = Checkout(tmp_path / "aside", tmp_path / "remote")
    aside.add("plus.onnx", graph(66))
    name = md5(graph(66))
    spoiled = tmp_path / "remote" / "files" / "md5" / name[:2] / name[2:]
    spoiled.chmod(0o600)
    spoiled.write_bytes(graph(66)[::-1])
    pointer.write_text((aside.path / "plus.onnx.dvc").read_text())
    eventually(lambda: log_has(server, "not mirrored", f"expected md5:{name}"), SOON)
    assert answers(server) == 2
    spoiled.write_bytes(graph(66))
    eventually(lambda: answers(server) == 67, SOON)
    assert server.stop() == 0


def test_a_tracked_folder_is_served(checkout, serve):
    external = with_external_data("data/weights.bin").SerializeToString()
    checkout.add("sums", {"model.onnx": external, "data/weights.bin": weights()})
    server = serve(checkout.uri("sums.dvc"), config=CONFIG)
    assert adds_weights(server, "sums")
    assert server.stop() == 0


def test_the_cache_of_a_checkout_does_without_its_remote(checkout, serve, tmp_path):
    checkout.add("plus.onnx", graph(1))
    checkout.dvc("fetch", "--quiet")
    shutil.rmtree(tmp_path / "remote")
    server = serve(checkout.uri("plus.onnx.dvc"), config=CONFIG)
    assert answers(server) == 2
    assert server.stop() == 0


def test_a_remote_may_be_a_bucket(serve, tmp_path, monkeypatch):
    storage = ThreadedMotoServer(port=0, verbose=False)
    storage.start()
    try:
        _, port = storage.get_host_and_port()
        for name, setting in {
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ALLOW_HTTP": "true",
        }.items():
            monkeypatch.setenv(name, setting)
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="models")
        checkout = Checkout(tmp_path / "checkout", "s3://models/dvc")
        checkout.add("plus.onnx", graph(1))
        server = serve(checkout.uri("plus.onnx.dvc"), config=CONFIG)
        assert answers(server) == 2
        external = with_external_data("data/weights.bin").SerializeToString()
        checkout.add("sums", {"model.onnx": external, "data/weights.bin": weights()})
        other = serve(checkout.uri("sums.dvc"), name="folder", config=CONFIG)
        assert adds_weights(other, "sums")
        assert server.stop() == other.stop() == 0
    finally:
        storage.stop()
