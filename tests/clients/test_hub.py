"""Models from the Hugging Face Hub, as the Hub's own client downloads them too."""

import json
import os
import re
import subprocess
import sys

import pytest
from hub_server import Hub
from infer import Question, rest_json
from models import SHIPPED, plus
from server import eventually, run
from tensors import tensor
from wire import call

SOON = 30
CONFIG = '[follow]\ninterval = "1s"\n'
SMALL = {"README.md": b"# plus\n", "config.json": b"{}", ".gitattributes": b"*.onnx filter=lfs\n"}
CLIENT = "import sys, huggingface_hub as hub; print(hub.snapshot_download(sys.argv[1]))"


@pytest.fixture
def hub(monkeypatch):
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield hub
    hub.close()


def download(repository, home):
    """The folder that the real client downloads a repository to, which keeps what it has in `home`."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, repository],
        env=os.environ | {"HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def answers(server, model="plus", number=1):
    answer = rest_json(server, Question(model, [tensor("x", "FP32", [1, 1], [number])]))
    return None if answer.error else answer.outputs["y"].data[0]


def versions(server, model="plus"):
    return json.loads(call(server.rest, "GET", f"/v2/models/{model}").body)["versions"]


def listed(server):
    """What `tidegate models` says."""
    return run("models", "--ops", server.ops, home=server.home).stdout


def problem(server):
    """What the place says, or the first version that is not mirrored."""
    (status,) = json.loads(call(server.ops, "GET", "/admin/v1/sources").body)
    return status["error"] or next((problem["error"] for problem in status["problems"]), None)


def fetched(hub):
    """Files that were read from the Hub or its store."""
    return hub.stored + [asked for asked in hub.asked if "/resolve/" in asked]


def test_the_real_client_takes_this_for_a_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    files = SMALL | {"onnx/model.onnx": plus(1), "weights.bin": b"\0" * 1000, "a/b c.txt": b""}
    commit = hub.commit("acme/plus", files)
    folder = download("acme/plus", tmp_path)
    assert folder.endswith(f"models--acme--plus/snapshots/{commit}")
    for path, content in files.items():
        content = content if isinstance(content, bytes) else content.SerializeToString()
        assert open(f"{folder}/{path}", "rb").read() == content
    assert len(hub.stored) == 2
    assert any(f"tree/{commit}" in asked and "cursor=2" in asked for asked in hub.asked)


def test_a_repository_is_served_and_followed(hub, serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    others = {"onnx/model_int8.onnx": plus(7), "model.safetensors": b"weights", "pytorch_model.bin": b"\x80\x02}q\0."}
    first = hub.commit("acme/plus", SMALL | others | {"onnx/model.onnx": plus(1)})
    server = serve("hf://acme/plus", config=CONFIG)
    assert (answers(server), versions(server)) == (2, [first])
    # The token went nowhere else, and of the many formats one was read.
    names = re.findall(r"name=([^&]+)", " ".join(hub.stored))
    assert set(names) == {"onnx%2Fmodel.onnx"}
    mirrored = {path.name for path in (server.home / "data").rglob(f"{first}/*")}
    assert mirrored == {"model.onnx", "README.md", "config.json"}

    # The branch says which commit is the newest, and hashes have no order of their own.
    for number in (10, 20, 30, 40):
        commit = hub.commit("acme/plus", {"model.onnx": plus(number)})
        eventually(lambda: answers(server) == number + 1, SOON)
        assert commit in versions(server)
    hub.repositories["acme/plus"].branches["main"] = first
    eventually(lambda: answers(server) == 2, SOON)
    assert server.stop() == 0
    assert "hf_right" not in server.log()


def test_a_shipped_model_answers_as_from_a_folder(hub, serve):
    hub.commit("acme/iris", SMALL | {"model.onnx": (SHIPPED / "iris/1/model.onnx").read_bytes()})
    server = serve("hf://acme/iris", config=CONFIG)
    request = (SHIPPED / "iris/request.json").read_bytes()
    reply = call(server.rest, "POST", "/v2/models/iris/infer", request)
    assert reply.status == 200 and len(json.loads(reply.body)["outputs"]) == 2


def test_settings_come_with_the_repository(hub, serve):
    settings = {"model.toml": b'labels = { y = "labels.txt" }\n', "labels.txt": b"zero\none\n"}
    hub.commit("acme/plus", settings | {"model.onnx": plus(1)})
    server = serve("hf://acme/plus", config=CONFIG)
    assert answers(server) == 2
    (folder,) = (server.home / "data").rglob("models/plus")
    assert {"model.toml", "labels.txt"} <= {path.name for path in folder.iterdir()}


def test_a_commit_that_cannot_be_had_leaves_the_one_before(hub, serve):
    first = hub.commit("acme/plus", {"model.onnx": plus(1)})
    server = serve("hf://acme/plus", config=CONFIG)
    assert answers(server) == 2

    second = hub.commit("acme/plus", {"model.onnx": plus(10)})
    digest = hub.repositories["acme/plus"].commits[second]["model.onnx"].sha256
    hub.spoiled[digest] = plus(9).SerializeToString()
    eventually(lambda: f"expected sha256:{digest}" in (problem(server) or ""), SOON)
    assert versions(server) == [first]
    hub.commit("acme/plus", {"pytorch_model.bin": b""})
    eventually(lambda: "*.onnx or *.safetensors (there is pytorch_model.bin)" in (problem(server) or ""), SOON)
    assert (answers(server), versions(server)) == (2, [first])
    broken = hub.commit("acme/plus", {"model.onnx": b"no graph"})
    eventually(lambda: re.search(rf"{broken}\S* +failed", listed(server)), SOON)
    assert (answers(server), versions(server)) == (2, [first])

    hub.commit("acme/plus", {"model.onnx": plus(20)})
    eventually(lambda: answers(server) == 21, SOON)
    assert problem(server) is None


def test_branches_and_commits_are_named(hub, serve):
    old = hub.commit("acme/plus", {"model.onnx": plus(1)})
    hub.commit("acme/plus", {"model.onnx": plus(10)}, branch="refs/pr/1")
    hub.commit("acme/plus", {"model.onnx": plus(20)})
    server = serve("hf://acme/plus@refs/pr/1", config=CONFIG)
    assert answers(server) == 11
    server.stop()
    server = serve(f"hf://acme/plus@{old}", name="pinned", config=CONFIG)
    assert (answers(server), versions(server)) == (2, [old])


def test_a_token_that_is_refused_is_said_and_takes_nothing_away(hub, serve, monkeypatch):
    hub.commit("acme/plus", {"model.onnx": plus(1)}, token="hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    cache = ["--cache", "../cache"]
    server = serve("hf://acme/plus", config=CONFIG, flags=cache)
    assert answers(server) == 2
    assert server.stop() == 0

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    server = serve("hf://acme/plus", name="wrong", config=CONFIG, flags=cache)
    assert answers(server) == 2
    eventually(lambda: "refuses: 401 Unauthorized, Invalid credentials" in listed(server), SOON)
    assert "hf_wrong" not in server.log() + listed(server)
    assert server.stop() == 0

    monkeypatch.delenv("HF_TOKEN")
    server = serve("hf://acme/plus", name="without", config=CONFIG, flags=cache)
    assert answers(server) == 2
    eventually(lambda: "or it is private and not for this HF_TOKEN" in listed(server), SOON)


def test_a_gated_repository_says_what_to_do(hub, serve):
    hub.commit("acme/open", {"model.onnx": plus(1)})
    hub.commit("acme/plus", {"model.onnx": plus(1)}, token="hf_right", gated=True)
    server = serve("hf://acme/plus", config=CONFIG)
    eventually(lambda: "it is gated" in (problem(server) or ""), SOON)
    # As `hf auth login` leaves it, read anew at each call.
    token = server.home / "user/.cache/huggingface/token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_right\n")
    eventually(lambda: answers(server) == 2, SOON)


def test_what_the_client_downloaded_is_not_fetched_again(hub, serve, tmp_path, monkeypatch):
    hub.commit("acme/plus", SMALL | {"onnx/model.onnx": plus(1)})
    home = tmp_path / "huggingface"
    download("acme/plus", home)
    before = fetched(hub)
    monkeypatch.setenv("HF_HOME", str(home))
    server = serve("hf://acme/plus", config=CONFIG)
    assert answers(server) == 2
    assert fetched(hub) == before

    # What is new is; and what has been spoiled on this machine.
    second = hub.commit("acme/plus", {"onnx/model.onnx": plus(10)})
    download("acme/plus", home)
    digest = hub.repositories["acme/plus"].commits[second]["onnx/model.onnx"].sha256
    server.stop()
    blob = home / "hub/models--acme--plus/blobs" / digest
    blob.write_bytes(blob.read_bytes()[::-1])
    before = len(fetched(hub))
    server = serve("hf://acme/plus", name="spoiled", config=CONFIG)
    eventually(lambda: answers(server) == 11, SOON)
    assert len(fetched(hub)) > before


def test_offline_there_is_what_the_client_downloaded(hub, serve, tmp_path, monkeypatch):
    commit = hub.commit("acme/plus", SMALL | {"onnx/model.onnx": plus(1)})
    home = tmp_path / "huggingface"
    download("acme/plus", home)
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server = serve("hf://acme/plus", config=CONFIG)
    assert (answers(server), versions(server)) == (2, [commit])
    assert len(hub.asked) == asked
    assert "hf://acme/plus answered 20" in listed(server)
    server.stop()

    # The download alone is no reason to do without the Hub when nobody has said so.
    hub.close()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server = serve("hf://acme/plus", name="away", config=CONFIG, flags=["--cache", server.home / "data/cache"])
    assert answers(server) == 2
    eventually(lambda: "hf://acme/plus is out of reach since 20" in listed(server), SOON)
