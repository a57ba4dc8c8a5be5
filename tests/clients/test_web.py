"""Models from a web server that lists its folders: Debian's nginx with its WebDAV module."""

import base64
import hashlib
import json
import os
import socket
import subprocess
import time

import pytest
from infer import Question, rest_json
from mirrored import memory
from models import plus
from server import eventually, run
from tensors import tensor
from wire import call

SOON = 30
CONFIG = '[follow]\ninterval = "250ms"\n'
PART = 16 << 20
LARGE = 16 * PART
# Of a server that has something to do, the heap breathes too.
MOST_MEMORY = 64 << 20

NGINX = """
load_module /usr/lib/nginx/modules/ngx_http_dav_ext_module.so;
{user}
daemon off;
pid {home}/pid;
error_log {home}/error.log;
events {{}}
http {{
    access_log {home}/access.log;
    client_body_temp_path {home}/body;
    log_format ranges '$request_method $uri $http_range';
    log_format sent '$request_method $uri $body_bytes_sent';
    server {{
        listen 127.0.0.1:{port};
        root {home}/root;
        access_log {home}/ranges.log ranges;
        access_log {home}/sent.log sent;
        dav_ext_methods PROPFIND OPTIONS;
        location /private/ {{ auth_basic models; auth_basic_user_file {home}/users; dav_ext_methods PROPFIND OPTIONS; }}
        location /slow/ {{ limit_rate 16m; dav_ext_methods PROPFIND OPTIONS; }}
    }}
}}
"""


class Nginx:
    def __init__(self, home, port):
        self.home, self.address = home, f"127.0.0.1:{port}"
        (home / "root").mkdir()
        secret = base64.b64encode(hashlib.sha1(b"s3cret").digest()).decode()
        (home / "users").write_text(f"ada:{{SHA}}{secret}\n")
        user = "user root;" if os.geteuid() == 0 else ""
        (home / "conf").write_text(NGINX.format(home=home, port=port, user=user))
        self.start()

    def start(self):
        home = self.home
        self.process = subprocess.Popen(["nginx", "-p", home, "-c", home / "conf", "-e", home / "error.log"])
        host, port = self.address.split(":")
        try:
            eventually(lambda: socket.create_connection((host, int(port)), 1).close() or True)
        except AssertionError:
            self.stop()
            raise

    def put(self, path, content):
        content = content if isinstance(content, bytes) else content.SerializeToString()
        target = self.home / "root" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # In one go, as rsync and cp to another name do it.
        beside = target.with_name(f".{target.name}")
        beside.write_bytes(content)
        beside.rename(target)

    def put_zeros(self, path, size):
        """A file of zeros that takes no room here."""
        target = self.home / "root" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.truncate(size)

    def ranges(self, path):
        """The ranges that were asked for, in order."""
        lines = (self.home / "ranges.log").read_text().splitlines()
        return [line.split(" ", 2)[2] for line in lines if line.startswith(f"GET /{path} ")]

    def sent(self, path):
        """Bytes of a file in all answers that have come to an end."""
        lines = (self.home / "sent.log").read_text().splitlines()
        return sum(int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"GET /{path} "))

    def stop(self):
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def nginx(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Nginx(tmp_path_factory.mktemp("nginx"), port)
    yield server
    server.stop()


def answers(server, model="plus", number=1):
    answer = rest_json(server, Question(model, [tensor("x", "FP32", [1, 1], [number])]))
    return None if answer.error else answer.outputs["y"].data[0]


def test_a_web_server_is_followed(nginx, serve):
    nginx.put("models/plus/1/model.onnx", plus(1))
    nginx.put("models/plus/model.toml", b"[options]\nintra_op_threads = 1\n")
    server = serve(f"http://{nginx.address}/models", config=CONFIG)
    assert answers(server) == 2

    nginx.put("models/plus/2/model.onnx", plus(10))
    eventually(lambda: answers(server) == 11, SOON)
    # As long as before, so that only its time tells.
    nginx.put("models/plus/2/model.onnx", plus(20))
    eventually(lambda: answers(server) == 21, SOON)

    nginx.stop()
    eventually(lambda: "out of reach since" in run("models", "--ops", server.ops, home=server.home).stdout, SOON)
    assert answers(server) == 21


def test_a_login_is_sent_and_not_shown(nginx, serve):
    nginx.put("private/plus/1/model.onnx", plus(1))
    place, cache = f"{nginx.address}/private", ["--cache", "../cache"]
    server = serve(f"http://ada:s3cret@{place}", config=CONFIG, flags=cache)
    assert answers(server) == 2
    listed = run("models", "--ops", server.ops, home=server.home).stdout
    assert f"http://{place} answered" in listed
    assert "s3cret" not in listed + server.log()
    assert server.stop() == 0

    server = serve(f"http://ada:wr0ng@{place}", name="wrong", config=CONFIG, flags=cache)
    assert answers(server) == 2
    eventually(lambda: "refuses" in server.log() and "401" in server.log(), SOON)
    assert "wr0ng" not in server.log()


def test_a_large_file_takes_little_memory_and_goes_on_after_a_crash(nginx, serve):
    nginx.put("slow/plus/1/model.onnx", plus(1))
    flags = ["--cache", "cache"]
    server = serve(f"http://{nginx.address}/slow", config=CONFIG, flags=flags)
    assert answers(server) == 2
    idle = memory(server)

    large = "slow/plus/2/weights.data"
    nginx.put_zeros(large, LARGE)
    nginx.put("slow/plus/2/model.onnx", plus(10))
    most = 0

    def parts():
        nonlocal most
        most = max(most, memory(server))
        lists = list((server.home / "cache" / "partial").glob("*.parts"))
        return {int(line) for line in lists[0].read_text().splitlines()[1:]} if lists else set()

    before = eventually(lambda: parts() if len(parts()) >= 8 else None, SOON)
    assert most - idle < MOST_MEMORY
    server.kill()
    server = serve(f"http://{nginx.address}/slow", config=CONFIG, flags=flags)
    assert answers(server) == 2
    eventually(lambda: answers(server) == 11, SOON)
    asked = nginx.ranges(large)
    for part in before:
        assert asked.count(f"bytes={part * PART}-{(part + 1) * PART - 1}") == 1, part


def test_a_stop_in_the_middle_is_no_wait(nginx, serve):
    nginx.put("slow/plus/1/model.onnx", plus(1))
    server = serve(f"http://{nginx.address}/slow", config=CONFIG)
    nginx.put_zeros("slow/plus/2/weights.data", LARGE)
    nginx.put("slow/plus/2/model.onnx", plus(10))
    eventually(lambda: "bytes fetched since" in run("models", "--ops", server.ops, home=server.home).stdout, SOON)
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 5


def settings(repository, name, text):
    folder = repository.path / name
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".model.toml"
    beside.write_text(text)
    beside.rename(folder / "model.toml")


def test_models_name_their_own_places(nginx, repository, serve):
    nginx.put("one/1/model.onnx", plus(1))
    nginx.put("many/fraud/1/model.onnx", plus(2))
    nginx.put("many/other/1/model.onnx", plus(3))
    repository.add("here", plus(5))
    settings(repository, "single", f'source = "http://{nginx.address}/one"\nversions = "all"\n')
    settings(repository, "fraud", f'source = "http://{nginx.address}/many"\n')
    settings(repository, "strange", f'source = "http://{nginx.address}/many"\n')
    server = serve(repository.path, config=CONFIG)
    # Ready means that what there is to fetch was tried.
    assert [answers(server, name) for name in ("here", "single", "fraud")] == [6, 2, 3]
    listed = run("models", "--ops", server.ops, home=server.home).stdout
    assert f"http://{nginx.address}/one answered" in listed
    assert "there are several models (fraud, other, …) and none is called 'strange'" in listed

    # Each goes on by itself, as its own settings say; and what was fetched outlives the place and the server.
    nginx.put("one/2/model.onnx", plus(10))
    eventually(lambda: answers(server, "single") == 11, SOON)
    first = Question("single", [tensor("x", "FP32", [1, 1], [1])], version="1")
    assert rest_json(server, first).outputs["y"].data == [2]
    nginx.stop()
    assert server.stop() == 0
    server = serve(repository.path, config=CONFIG)
    assert [answers(server, name) for name in ("here", "single", "fraud")] == [6, 11, 3]


def test_settings_may_change_their_place(nginx, repository, serve):
    nginx.put("one/1/model.onnx", plus(1))
    nginx.put("two/1/model.onnx", plus(2))
    repository.add("here", plus(5))
    server = serve(repository.path, config=CONFIG)
    settings(repository, "m", f'source = "http://{nginx.address}/one"\n')
    eventually(lambda: answers(server, "m") == 2, SOON)
    settings(repository, "m", "source = 7\n")
    eventually(lambda: "model.toml" in run("models", "--ops", server.ops, home=server.home).stdout, SOON)
    assert answers(server, "m") == 2
    # What runs stays until the other place has something to take its place.
    settings(repository, "m", 'source = "http://127.0.0.1:1/none"\n')
    eventually(lambda: "127.0.0.1:1" in run("models", "--ops", server.ops, home=server.home).stdout, SOON)
    for _ in range(30):
        time.sleep(0.1)
        assert answers(server, "m") == 2
    settings(repository, "m", f'source = "http://{nginx.address}/two"\n')

    def came():
        answer = answers(server, "m")
        assert answer in (2, 3)
        return answer == 3

    eventually(came, SOON)
    (repository.path / "m" / "model.toml").unlink()
    eventually(lambda: f"{nginx.address}/two" not in run("models", "--ops", server.ops, home=server.home).stdout, SOON)
    assert answers(server, "here") == 6


def test_a_load_waits_for_the_first_version(nginx, repository, serve):
    for version in (1, 2):
        nginx.put(f"one/{version}/model.onnx", plus(version))
    settings(repository, "m", f'source = "http://{nginx.address}/one"\nversions = {{ latest = 2 }}\n')
    server = serve(repository.path, config=CONFIG, flags=["--model-control", "explicit"])
    answer = call(server.rest, "POST", "/v2/repository/models/m/load", b"{}")
    assert (answer.status, answers(server, "m")) == (200, 3)
    assert json.loads(call(server.rest, "GET", "/v2/models/m").body)["versions"] == ["1", "2"]
    nginx.put("one/3/model.onnx", plus(10))
    time.sleep(4)
    assert answers(server, "m") == 3, "nobody asked for it"
    assert call(server.rest, "POST", "/v2/repository/models/m/load", b"{}").status == 200
    assert answers(server, "m") == 11


def test_a_version_shows_what_it_is_and_where_it_is_from(nginx, repository, serve):
    content = plus(1).SerializeToString()
    nginx.put("one/1/model.onnx", content)
    repository.add("here", plus(1))
    settings(repository, "m", f'source = "http://{nginx.address}/one"\n')
    server = serve(repository.path, config=CONFIG)
    sha256 = hashlib.sha256(content).hexdigest()
    whole = hashlib.sha256(f"model.onnx\0{sha256}\n".encode()).hexdigest()
    shown = {}
    for name in ("m", "here"):
        answer = call(server.ops, "GET", f"/admin/v1/models/{name}/versions/1")
        assert answer.status == 200
        shown[name] = json.loads(answer.body)
        assert shown[name]["digest"] == f"sha256:{whole}"
        assert shown[name]["files"] == [{"path": "model.onnx", "bytes": len(content), "sha256": sha256}]
    assert (shown["m"]["source"], shown["here"]["source"]) == (f"http://{nginx.address}/one", None)

    printed = run("models", "show", "m", "--ops", server.ops, home=server.home).stdout
    assert f"sha256:{whole}" in printed and f"http://{nginx.address}/one" in printed
    missing = run("models", "show", "m", "7", "--ops", server.ops, home=server.home)
    assert missing.returncode != 0 and "model 'm' has no version '7'; it has 1" in missing.stderr
    unknown = call(server.ops, "GET", "/admin/v1/models/none/versions/1")
    assert unknown.status == 404
