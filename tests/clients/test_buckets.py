"""Models from an S3 bucket: mirrored, followed, verified, and served on when the bucket is away."""

import json
import os
import pickle
import threading

import boto3
import pytest
from infer import Question, rest_json
from models import plus
from moto.server import DomainDispatcherApplication, create_backend_app
from server import eventually, run
from tensors import tensor
from werkzeug.serving import make_server
from wire import call

CONFIG = '[follow]\ninterval = "250ms"\n'
# A version settles for two seconds before it is taken.
SOON = 30
PARTS = 3
PART = 16 << 20


class Bucket:
    """moto's S3 on a port of its own, and what the tests do to it on the way."""

    def __init__(self, port=0):
        application = DomainDispatcherApplication(create_backend_app)
        self.before = lambda path: None
        self.spoiled = set()
        self.reads = []

        def on_the_way(environ, start_response):
            path = environ["PATH_INFO"]
            if environ["REQUEST_METHOD"] == "GET" and not path.endswith("/models"):
                self.reads.append((path, environ.get("HTTP_RANGE")))
                self.before(path)
            body = application(environ, start_response)
            if any(path.endswith(name) for name in self.spoiled):
                return (piece[: len(piece) // 2] for piece in body)
            return body

        self.server = make_server("127.0.0.1", port, on_the_way, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def open(self):
        self.client = boto3.client("s3", endpoint_url=self.endpoint)
        call(self.endpoint.removeprefix("http://"), "POST", "/moto-api/reset")
        self.client.create_bucket(Bucket="models")

    def put(self, key, content):
        content = content if isinstance(content, bytes) else content.SerializeToString()
        self.client.put_object(Bucket="models", Key=key, Body=content)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket()
    for name, setting in {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": bucket.endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, setting)
    bucket.open()
    yield bucket
    if bucket.thread.is_alive():
        bucket.close()


def answers(server, model="plus", number=1):
    answer = rest_json(server, Question(model, [tensor("x", "FP32", [1, 1], [number])]))
    return None if answer.error else answer.outputs["y"].data[0]


def log_has(server, *words):
    return any(all(word in line for word in words) for line in server.log().splitlines())


def test_a_bucket_is_served_and_followed(bucket, serve):
    bucket.put("team/plus/1/model.onnx", plus(1))
    bucket.put("team/plus/model.toml", b'[options]\nintra_op_threads = 1\n')
    bucket.put("elsewhere/other/1/model.onnx", plus(9))
    server = serve("s3://models/team", config=CONFIG)
    # Ready means that the mirror has been filled.
    assert answers(server) == 2
    assert answers(server, "other") is None

    bucket.put("team/plus/2/model.onnx", plus(10))
    eventually(lambda: answers(server) == 11, SOON)

    bucket.put("team/plus/2/model.onnx", plus(20))
    eventually(lambda: answers(server) == 21, SOON)

    bucket.client.delete_object(Bucket="models", Key="team/plus/2/model.onnx")
    bucket.put("team/plus/1/model.onnx", plus(5))
    eventually(lambda: answers(server) == 6, SOON)
    assert server.stop() == 0


def listed(server):
    """What `tidegate models` says."""
    return run("models", "--ops", server.ops, home=server.home).stdout


def gauge(server, name):
    """A metric of the bucket."""
    page = call(server.ops, "GET", "/metrics").body.decode()
    series = next(line for line in page.splitlines() if line.startswith(f"tidegate_source_{name}{{"))
    assert 'source="s3://models"' in series
    return float(series.rsplit(" ", 1)[1])


def test_a_prefix_may_be_a_single_model(bucket, serve):
    bucket.put("team/plus/7/model.onnx", plus(1))
    server = serve("s3://models/team/plus/", config=CONFIG)
    assert answers(server) == 2
    assert json.loads(call(server.rest, "GET", "/v2/models/plus").body)["versions"] == ["7"]


def test_without_its_models_a_server_waits_and_says_so(bucket, serve):
    bucket.put("plus/1/model.onnx", plus(1))
    bucket.close()
    # Somebody who looks often, and does not give up.
    config = CONFIG + 'max_interval = "1s"\n'
    server = serve("s3://models", config=config, flags=["--model-control", "explicit"], wait=False)

    def away():
        (status,) = json.loads(call(server.ops, "GET", "/admin/v1/sources").body)
        return status if status["failures"] > 1 else None

    status = eventually(away, SOON)
    assert status["answered"] is None and status["away_since"] and status["given_up"] is None
    assert "s3://models does not answer" in status["error"]
    assert "s3://models is out of reach since 20" in listed(server)
    assert not server.is_ready()
    for order in ("load", "unload"):
        refused = call(server.rest, "POST", f"/v2/repository/models/plus/{order}", {})
        assert refused.status == 503
        assert "models are still being mirrored from s3://models" in refused.json()["error"]
    assert not server.is_ready()

    again = Bucket(int(bucket.endpoint.rsplit(":", 1)[1]))
    try:
        eventually(server.is_ready, SOON)
        loaded = call(server.rest, "POST", "/v2/repository/models/plus/load", {})
        assert loaded.status == 200, loaded.body
        assert answers(server) == 2
        assert server.stop() == 0
    finally:
        again.close()


def test_versions_that_nobody_wants_make_room(bucket, serve):
    bucket.put("plus/1/model.onnx", plus(1))
    server = serve("s3://models", config=CONFIG, flags=["--cache", "cache"])
    bucket.put("plus/2/model.onnx", plus(10))
    eventually(lambda: answers(server) == 11, SOON)

    def kept():
        done = run("cache", "ls", "--cache", "cache", "--json", home=server.home)
        assert done.returncode == 0, done.stderr
        return {version for file in json.loads(done.stdout) for version in file["versions"]}

    eventually(lambda: kept() == {"plus/2"}, SOON)
    # What cannot be loaded leaves the one before it; it is there still, and does not come anew.
    reads = len(bucket.reads)
    bucket.put("plus/3/model.onnx", b"no model at all")
    eventually(lambda: log_has(server, "loading failed"), SOON)
    assert answers(server) == 11
    assert server.stop() == 0

    # Started anew with another cache, the one before it is fetched.
    server = serve("s3://models", name="other", config=CONFIG, flags=["--cache", "cache"])
    eventually(lambda: answers(server) == 11, SOON)
    assert len(bucket.reads) > reads
    assert kept() == {"plus/2", "plus/3"}


def test_a_restart_without_the_bucket_serves_from_the_cache(bucket, serve):
    bucket.put("plus/1/model.onnx", plus(1))
    cache = ["--cache", "cache"]
    server = serve("s3://models", config=CONFIG, flags=cache)
    assert answers(server) == 2
    assert gauge(server, "up") == 1
    bucket.close()
    eventually(lambda: log_has(server, "out of reach"), SOON)
    assert answers(server) == 2
    assert gauge(server, "up") == 0
    assert server.stop() == 0
    assert (server.home / "cache" / "blobs").is_dir()

    server = serve("s3://models", config=CONFIG, flags=cache)
    assert answers(server) == 2
    eventually(lambda: log_has(server, "out of reach"), SOON)
    assert "s3://models is out of reach since 20" in listed(server)
    (status,) = json.loads(call(server.ops, "GET", "/admin/v1/sources").body)
    assert status["uri"] == "s3://models" and status["failures"] > 0 and status["away_since"] and status["error"]
    assert server.stop() == 0


def test_a_problem_is_shown_until_it_is_over(bucket, serve):
    bucket.put("plus/1/model.onnx", plus(1))
    server = serve("s3://models", config=CONFIG)
    assert "s3://models answered 20" in listed(server)
    bucket.put("plus/2/model.onnx", plus(10))
    bucket.put("plus/2/weights.pkl", b"")
    eventually(lambda: gauge(server, "problems") == 1, SOON)
    assert "version 2 of plus is not mirrored since 20" in listed(server)
    bucket.client.delete_object(Bucket="models", Key="plus/2/weights.pkl")
    eventually(lambda: answers(server) == 11, SOON)
    assert gauge(server, "problems") == 0
    assert "not mirrored" not in listed(server)


def test_settings_from_a_bucket_do_not_write_to_this_machine(bucket, serve, tmp_path):
    bucket.put("plus/1/model.onnx", plus(1))
    bucket.put("evil/1/model.onnx", plus(2))
    bucket.put("evil/model.toml", f'[options]\noptimized_model = "{tmp_path}/written.onnx"\n'.encode())
    server = serve("s3://models", config=CONFIG)
    assert answers(server) == 2
    assert answers(server, "evil") is None
    assert "options.optimized_model is not taken from settings that are mirrored" in listed(server)
    assert not (tmp_path / "written.onnx").exists()


def test_the_cache_is_listed_checked_and_emptied(bucket, serve):
    bucket.put("plus/1/model.onnx", plus(1))
    bucket.put("plus/2/model.onnx", plus(2))
    # Settings first, so that both versions are wanted.
    bucket.put("plus/model.toml", b'versions = "all"\n')
    server = serve("s3://models", config=CONFIG, flags=["--cache", "cache"])
    eventually(lambda: json.loads(call(server.rest, "GET", "/v2/models/plus").body)["versions"] == ["1", "2"], SOON)

    def cache(action, expected=0):
        done = run("cache", action, "--cache", "cache", "--json", home=server.home)
        assert done.returncode == expected, done.stderr
        return json.loads(done.stdout)

    kept = {version: file for file in cache("ls") for version in file["versions"] or ["settings"]}
    assert set(kept) == {"plus/1", "plus/2", "settings"} and all(file["used"] for file in kept.values())
    assert cache("verify") == {"files": 3, "bytes": sum(file["bytes"] for file in kept.values()), "broken": []}

    bucket.client.delete_object(Bucket="models", Key="plus/2/model.onnx")
    eventually(lambda: not any(file["versions"] == ["plus/2"] for file in cache("ls")), SOON)
    busy = run("cache", "prune", "--cache", "cache", home=server.home)
    assert busy.returncode == 1 and "in use by another process" in busy.stderr
    assert server.stop() == 0
    assert cache("prune") == {"freed_bytes": kept["plus/2"]["bytes"]}
    assert len(cache("ls")) == 2

    spoiled = server.home / kept["plus/1"]["path"]
    spoiled.chmod(0o600)
    spoiled.write_bytes(spoiled.read_bytes()[::-1])
    (broken,) = cache("verify", expected=2)["broken"]
    assert broken["versions"] == ["plus/1"] and kept["plus/1"]["digest"] in broken["error"]

    repair = run("cache", "verify", "--repair", "--cache", "cache", home=server.home)
    assert repair.returncode == 2 and "1 broken" in repair.stdout, repair.stderr
    assert cache("verify")["broken"] == []
    server = serve("s3://models", config=CONFIG, flags=["--cache", "cache"])
    eventually(lambda: answers(server) == 2, SOON)
    assert cache("verify")["broken"] == []


def test_bytes_that_change_between_list_and_read_are_refused(bucket, serve):
    bucket.put("plus/1/model.onnx", plus(1))
    server = serve("s3://models", config=CONFIG)
    changes = iter(range(100, 1000))

    def change(path):
        if path.endswith("/2/model.onnx"):
            bucket.put("plus/2/model.onnx", plus(next(changes)))

    bucket.before = change
    bucket.put("plus/2/model.onnx", plus(10))
    eventually(lambda: log_has(server, "not mirrored", "model.onnx changed while"), SOON)
    assert answers(server) == 2

    bucket.before = lambda path: None
    bucket.put("plus/2/model.onnx", plus(10))
    eventually(lambda: answers(server) == 11, SOON)


def test_truncated_bytes_are_not_published(bucket, serve):
    bucket.put("plus/1/model.onnx", plus(1))
    server = serve("s3://models", config=CONFIG)
    bucket.spoiled = {"/2/model.onnx"}
    bucket.put("plus/2/model.onnx", plus(10))
    eventually(lambda: log_has(server, "not mirrored", "version"), SOON)
    assert answers(server) == 2
    bucket.spoiled = set()
    eventually(lambda: answers(server) == 11, SOON)


@pytest.mark.parametrize("name", ["weights.pkl", "weights.data"])
def test_a_pickle_is_refused_by_name_and_by_content(bucket, serve, name):
    bucket.put("plus/1/model.onnx", plus(1))
    server = serve("s3://models", config=CONFIG)
    bucket.put(f"plus/2/{name}", pickle.dumps({"weights": list(range(100))}))
    bucket.put("plus/2/model.onnx", plus(10))
    eventually(lambda: log_has(server, "not mirrored", f"file '{name}' is refused", "pickle"), SOON)
    assert answers(server) == 2
    published = {path.name for path in server.home.rglob("*") if path.is_file()}
    assert name not in published


def test_what_models_share_is_read_once(bucket, serve):
    shared = plus(1)
    bucket.put("plus/1/model.onnx", shared)
    bucket.put("same/1/model.onnx", shared)
    server = serve("s3://models", config=CONFIG)
    assert answers(server) == answers(server, "same") == 2
    assert len([path for path, _ in bucket.reads if path.endswith("model.onnx")]) == 1


def test_a_large_file_comes_in_ranges(bucket, serve):
    bucket.put("plus/1/weights.data", os.urandom(PARTS * PART))
    bucket.put("plus/1/model.onnx", plus(1))
    server = serve("s3://models", config=CONFIG)
    assert answers(server) == 2
    ranges = {wanted for path, wanted in bucket.reads if path.endswith("weights.data")}
    expected = {f"bytes={part * PART}-{(part + 1) * PART - 1}" for part in range(PARTS)}
    assert ranges == expected


def test_an_unknown_scheme_is_said_at_start(serve):
    with pytest.raises(AssertionError, match="scheme 'ftp' is not known"):
        serve("ftp://host/models")
