"""The process itself: how it starts, how it stops under load, and what it leaves behind."""

import http.client
import itertools
import json
import re
import signal
import socket
import threading
import time
import tomllib
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from health import watch
from infer import Question, ask, connect, grpc_raw, raw_request, rest_json
from load import ClosedLoop
from models import plus, slow
from server import ROOT, eventually, launch, run, serve_command
from tensors import as_json, tensor
from wire import TIMEOUT, call, send

# How long the server goes on serving after SIGTERM, and a little less for our clock.
DRAIN_DELAY = 5
STILL_SERVING = DRAIN_DELAY - 0.5

# Still under way when the server stops to accept: a second or more of work.
LONG_RUN = tensor("iterations", "INT64", [1], [4000])


@pytest.fixture
def models(repository):
    repository.add("plus", plus(1))
    repository.add("slow", slow())
    return repository.path


def works(server):
    return ask(server, "rest_json", "plus", one_row(1)).outputs["y"].data == [2]


def one_row(number):
    return tensor("x", "FP32", [1, 1], [number])


def test_no_telemetry_is_kept_or_sent(models, serve):
    """ONNX Runtime would keep a device id and a queue of events in the home of whoever runs it."""
    server = serve(models)
    assert works(server)
    assert server.stop() == 0
    assert list((server.home / "user").rglob("*")) == []
    assert list((server.home / "tmp").rglob("*")) == []


# --- SIGTERM under load -------------------------------------------------------------


def rest_worker(server, ends):
    """Keeps its connection as long as the server does."""

    def work(_):
        connection = http.client.HTTPConnection(server.rest, timeout=TIMEOUT)
        for number in itertools.count():
            response = post(connection, number)
            if response is None:
                break
            # Half an answer raises here, and that is a failure.
            reply = response.read()
            assert response.status == 200, reply
            assert json.loads(reply)["outputs"][0]["data"] == [number + 1]
        ends.append(time.monotonic())

    return work


def post(connection, number):
    """`None` when the connection was closed before anything came back, or refused."""
    body = json.dumps({"inputs": [as_json(one_row(number))]}).encode()
    try:
        send(connection, "POST", "/v2/models/plus/infer", body)
        return connection.getresponse()
    except ConnectionError:
        return None


def grpc_worker(server, ends):
    """Calls until there is nobody left to connect to."""

    def work(_):
        with connect(server) as channel:
            infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            for number in itertools.count():
                try:
                    reply = infer(raw_request(Question("plus", [one_row(number)])), timeout=TIMEOUT)
                except grpc.RpcError as error:
                    if not refused_to_connect(error):
                        raise
                    break
                assert reply.raw_output_contents[0] == one_row(number + 1).packed()
        ends.append(time.monotonic())

    return work


def refused_to_connect(error):
    """A call that was sent and then lost has other words than these."""
    return error.code() == grpc.StatusCode.UNAVAILABLE and re.search(
        "connection refused|failed to connect", error.details(), re.IGNORECASE
    )


def long_rest(server, answers):
    answers.append(rest_json(server, Question("slow", [LONG_RUN])))


def long_grpc(server, answers):
    answers.append(grpc_raw(server, Question("slow", [LONG_RUN])))


def test_sigterm_under_load_loses_nothing(models, serve):
    server, ends, answers = serve(models), [], []
    workers = [make(server, ends) for make in (rest_worker, grpc_worker) for _ in range(8)]
    with watch(server) as watched, ClosedLoop(workers) as loop:
        watched.until("SERVING")
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()

        watched.until("NOT_SERVING")
        eventually(lambda: call(server.rest, "GET", "/v2/health/ready").status == 503, timeout=2)
        assert call(server.rest, "GET", "/v2/health/live").json() == {"live": True}
        assert call(server.ops, "GET", "/readyz").status == 503
        assert call(server.ops, "GET", "/healthz").status == 200
        assert works(server)

        time.sleep(max(0, told + STILL_SERVING - time.monotonic()))
        runs = [
            threading.Thread(target=way, args=[server, answers]) for way in (long_rest, long_grpc)
        ]
        for thread in runs:
            thread.start()
        for thread in runs:
            thread.join()
        loop.join()

    loop.check()
    assert [answer.status for answer in answers if answer.error] == []
    assert len(answers) == 2
    assert len(ends) == len(workers)
    assert min(ends) > told + STILL_SERVING, "a client was turned away before its time"
    assert server.process.wait(TIMEOUT) == 0, server.tail()


def test_a_second_signal_skips_the_wait(models, serve):
    server = serve(models)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.is_running()
    assert server.stop(signal.SIGTERM) == 0
    assert time.monotonic() - start < STILL_SERVING


def test_sigint_does_not_wait(models, serve):
    server = serve(models)
    start = time.monotonic()
    assert server.stop(signal.SIGINT) == 0
    assert time.monotonic() - start < STILL_SERVING


def test_idle_connections_do_not_keep_it(models, serve):
    """Connections without a request and an endless watch end at once."""
    server = serve(models)
    host, port = server.rest.split(":")
    with socket.create_connection((host, int(port))), watch(server) as watched:
        watched.until("SERVING")
        start = time.monotonic()
        assert server.stop(signal.SIGINT) == 0
        assert time.monotonic() - start < STILL_SERVING
        eventually(lambda: watched.end)


# --- the data directory -------------------------------------------------------------


def test_a_killed_server_starts_again(models, serve):
    first = serve(models, name="one")
    assert works(first)
    first.kill()
    assert works(serve(models, name="one"))


def test_a_second_server_is_told_of_the_first(models, serve):
    first = serve(models, name="one")
    (first.home / "second").mkdir()
    second = launch(serve_command(models, first.home), first.home / "second")
    assert second.wait(TIMEOUT) != 0
    message = (first.home / "second" / "stderr").read_text()
    assert re.search(rf"\b{first.process.pid}\b", message), message
    assert works(first)


# --- a start that cannot be ---------------------------------------------------------


def refused(tmp_path, *arguments):
    """What a command says that must fail."""
    done = run(*arguments, home=tmp_path)
    assert done.returncode != 0
    return done.stderr


def test_a_port_in_use_is_named_with_its_flag(models, serve, tmp_path):
    server = serve(models)
    command = serve_command(models, tmp_path)[1:]
    command[command.index("--grpc") + 1] = server.grpc
    message = refused(tmp_path, *command)
    assert server.grpc.split(":")[1] in message
    assert "--grpc" in message


def test_a_missing_runtime_is_named(models, tmp_path):
    missing = tmp_path / "libonnxruntime.so"
    command = serve_command(models, tmp_path, flags=["--onnxruntime", missing])
    assert str(missing) in refused(tmp_path, *command[1:])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("model = 'models'\n", "model"),
        ("[limits]\nmax_mesage_bytes = 1\n", "max_mesage_bytes"),
        ("json_nonfinite = 'maybe'\n", "maybe"),
    ],
)
def test_an_unknown_setting_is_named(models, tmp_path, config, name):
    assert name in refused(tmp_path, *serve_command(models, tmp_path, config)[1:])


# --- the other commands -------------------------------------------------------------


def test_health(models, serve, tmp_path):
    server = serve(models)
    assert run("health", "--ops", server.ops, home=tmp_path).returncode == 0
    server.stop()
    assert run("health", "--ops", server.ops, home=tmp_path).returncode == 1


def test_models(repository, models, serve, tmp_path):
    repository.add("broken", b"this is no model")
    server = serve(models)
    done = run("models", "--ops", server.ops, home=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.lower() for line in done.stdout.splitlines() if line.split()}
    assert "ready" in lines["plus"]
    assert "failed" in lines["broken"]
    assert "first dimension" in done.stdout, "why the requests of `slow` are not batched"


def test_the_default_config_is_complete(tmp_path):
    done = run("config", "--defaults", home=tmp_path)
    assert done.returncode == 0, done.stderr
    defaults = tomllib.loads(done.stdout)
    assert defaults["limits"]["max_message_bytes"] == 64 << 20
    assert defaults["json_nonfinite"] == "literal"


def test_the_default_config_is_accepted(models, serve, tmp_path):
    defaults = run("config", "--defaults", home=tmp_path).stdout
    assert works(serve(models, config=defaults))


def test_help_names_the_commands(tmp_path):
    done = run("--help", home=tmp_path)
    assert done.returncode == 0
    for command in ("serve", "models", "health", "config"):
        assert command in done.stdout


def test_models_can_share_one_thread_pool(repository, serve):
    repository.ship("iris", "digits", "language")
    server = serve(repository.path, config="shared_threads = 3\n")
    for name in ("iris", "digits", "language"):
        body = (ROOT / "models" / name / "request.json").read_bytes()
        assert call(server.rest, "POST", f"/v2/models/{name}/infer", body).status == 200
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    assert names.count("ort-pool") == 2, "three threads, of which one is whoever runs the graph"
