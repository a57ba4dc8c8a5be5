"""Models from a registry of OCI artifacts: ModelPack, files of ORAS, and images with a model in them."""

import base64
import json
import subprocess
import time

import oras.client
import pytest
from mirrored import CONFIG, SOON, adds_weights, answers, graph, log_has, versions, weights
from models import with_external_data
from registry import INDEX, PACKINGS, Registry
from server import eventually


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.close()


def short(pushed):
    """The version that a pushed manifest is."""
    return pushed["digest"].removeprefix("sha256:")[:12]


def test_a_model_pack_is_served_and_its_tag_followed(registry, serve):
    first = registry.model_pack("moving/plus", "v1", {"plus.onnx": graph(1)})
    server = serve(f"oci://{registry.host}/moving/plus:v1", config=CONFIG)
    assert answers(server) == 2
    assert versions(server) == [short(first)]

    second = registry.model_pack("moving/plus", "v1", {"plus.onnx": graph(10)})
    eventually(lambda: answers(server) == 11, SOON)
    eventually(lambda: short(second) in versions(server), SOON)

    registry.model_pack("moving/plus", "other", {"plus.onnx": graph(100)})
    pinned = f"oci://{registry.host}/moving/plus@{first['digest']}"
    other = serve(pinned, name="pinned", config=CONFIG)
    assert answers(other) == 2
    assert server.stop() == other.stop() == 0


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_layers_are_unpacked(registry, serve, packing):
    repository = f"packed/{packing.replace('+', '-')}/sums"
    external = with_external_data("weights.bin").SerializeToString()
    registry.model_pack(
        repository,
        "latest",
        {"model.onnx": external},
        [(packing, {"./weights.bin": weights(), "docs/": None, "docs/notes.txt": b"notes"})],
    )
    server = serve(f"oci://{registry.host}/{repository}", config=CONFIG)
    assert adds_weights(server, "sums")
    scratch = server.home / "data" / "cache" / "staging"
    eventually(lambda: not list(scratch.iterdir()), SOON)
    assert server.stop() == 0


def test_what_the_client_of_oras_pushes_is_served(registry, serve, tmp_path, monkeypatch):
    folder = tmp_path / "pushed"
    (folder / "data").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(with_external_data("data/weights.bin").SerializeToString())
    (folder / "data" / "weights.bin").write_bytes(weights())
    (folder / "train.py").write_text("import os")
    monkeypatch.chdir(folder)
    client = oras.client.OrasClient(insecure=True)
    client.push(
        target=f"{registry.host}/oras/sums:v2",
        files=["model.onnx", "train.py", "data"],
        disable_path_validation=True,
    )
    server = serve(f"oci://{registry.host}/oras/sums:v2", config=CONFIG)
    assert adds_weights(server, "sums")
    published = {path.name for path in (server.home / "data").rglob("*") if path.is_file()}
    assert {"weights.bin", "model.onnx"} <= published and "train.py" not in published
    assert server.stop() == 0


def test_an_image_is_unpacked_layer_by_layer(registry, serve):
    below = {
        "bin": "usr/bin",
        "etc/": None,
        "etc/passwd": b"root",
        "models/": None,
        "models/model.onnx": graph(1),
        "models/weights.pkl": b"\x80\x04N.",
        "models/link": "model.onnx",
    }
    above = {"models/model.onnx": graph(10), "models/.wh.link": b"", "models/labels.txt": b"a\n"}
    ours = registry.image("image/plus", "amd64", [below, above])
    other = registry.image("image/plus", "s390x", [{"models/model.onnx": graph(99)}])
    platforms = [(other, "s390x"), (ours, "amd64"), (ours, "arm64")]
    manifests = [
        one | {"platform": {"os": "linux", "architecture": name}} for one, name in platforms
    ]
    index = {"mediaType": INDEX, "manifests": manifests}
    pushed = registry.manifest("image/plus", "v1", index)
    server = serve(f"oci://{registry.host}/image/plus:v1", config=CONFIG)
    assert answers(server) == 11
    assert versions(server) == [short(pushed)]
    published = {path.name for path in (server.home / "data").rglob("*") if path.is_file()}
    assert "labels.txt" in published and not {"passwd", "weights.pkl"} & published

    registry.image("image/plus", "v1", [below])
    eventually(lambda: log_has(server, "not mirrored", "'link' is refused", "symbolic link"), SOON)
    assert answers(server) == 11
    assert server.stop() == 0


def test_a_tag_that_moves_to_what_does_not_load_leaves_what_runs(registry, serve):
    registry.model_pack("broken/plus", "v1", {"model.onnx": graph(1)})
    server = serve(f"oci://{registry.host}/broken/plus:v1", config=CONFIG)
    assert answers(server) == 2
    registry.model_pack("broken/plus", "v1", {"model.onnx": b"no graph"})
    eventually(lambda: log_has(server, "loading failed"), SOON)
    # Some looks later.
    time.sleep(3)
    assert answers(server) == 2
    registry.model_pack("broken/plus", "v1", {"model.onnx": graph(10)})
    eventually(lambda: answers(server) == 11, SOON)
    assert server.stop() == 0


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_what_its_digest_says_is_refused(registry, serve, packed):
    repository = f"spoiled{int(packed)}/plus"
    registry.model_pack(repository, "v1", {"model.onnx": graph(1)})
    server = serve(f"oci://{registry.host}/{repository}:v1", config=CONFIG)
    assert answers(server) == 2
    # Spoiled under a tag that the server does not follow.
    moved = push_spoiled(registry, repository, packed)
    registry.manifest(repository, "v1", moved)
    eventually(lambda: log_has(server, "not mirrored", "expected sha256:"), SOON)
    assert answers(server) == 2
    assert server.stop() == 0


def push_spoiled(registry, repository, packed):
    if packed:
        pushed = registry.image(repository, "next", [{"models/model.onnx": graph(66)}])
    else:
        pushed = registry.model_pack(repository, "next", {"model.onnx": graph(66)})
    accept = {"Accept": pushed["mediaType"]}
    answer = registry.call("GET", f"/v2/{repository}/manifests/next", headers=accept)
    manifest = json.load(answer)
    registry.spoil(manifest["layers"][0]["digest"])
    return manifest


def test_what_holds_no_model_says_what_it_holds(registry, serve):
    registry.model_pack("none/plus", "v1", {"model.onnx": graph(1)})
    server = serve(f"oci://{registry.host}/none/plus:v1", config=CONFIG)
    assert answers(server) == 2
    registry.model_pack("none/plus", "v1", {"notes.txt": b"x", "model.gguf": b"y"})
    eventually(lambda: log_has(server, "not mirrored", "found: notes.txt, model.gguf"), SOON)
    assert answers(server) == 2
    assert server.stop() == 0


def test_a_registry_wants_a_login(serve, tmp_path, monkeypatch):
    made = subprocess.run(
        ["htpasswd", "-Bbn", "ada", "s3cret"], capture_output=True, check=True, timeout=10
    )
    (tmp_path / "htpasswd").write_bytes(made.stdout)
    auth = {"auth": {"htpasswd": {"realm": "shelf", "path": str(tmp_path / "htpasswd")}}}
    login = base64.b64encode(b"ada:s3cret").decode()
    registry = Registry(tmp_path / "registry", auth, login)
    try:
        registry.model_pack("closed/plus", "v1", {"model.onnx": graph(1)})
        uri = f"oci://{registry.host}/closed/plus:v1"
        server = serve(f"oci://ada:s3cret@{registry.host}/closed/plus:v1", config=CONFIG)
        assert answers(server) == 2
        assert "s3cret" not in server.log()
        assert server.stop() == 0

        docker = tmp_path / "docker"
        docker.mkdir()
        (docker / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
        monkeypatch.setenv("DOCKER_CONFIG", str(docker))
        server = serve(uri, name="docker", config=CONFIG)
        assert answers(server) == 2
        assert server.stop() == 0

        # What was mirrored is served, and the status says that nothing new is to be had.
        (docker / "config.json").unlink()
        server = serve(uri, name="docker", config=CONFIG)
        assert answers(server) == 2
        eventually(lambda: log_has(server, "out of reach", "refuses: it wants a login"), SOON)
        assert server.stop() == 0
    finally:
        registry.close()


def test_a_restart_without_the_registry_serves_from_the_cache(serve, tmp_path):
    registry = Registry(tmp_path / "registry")
    try:
        registry.model_pack("kept/plus", "v1", {"model.onnx": graph(1)})
        uri = f"oci://{registry.host}/kept/plus:v1"
        server = serve(uri, config=CONFIG)
        assert answers(server) == 2
        assert server.stop() == 0
    finally:
        registry.close()
    server = serve(uri, config=CONFIG)
    assert answers(server) == 2
    eventually(lambda: log_has(server, "out of reach"), SOON)
    assert server.stop() == 0
