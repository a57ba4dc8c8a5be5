"""What following models in a registry costs while nothing changes there: processor time, beside the same models in folders.

    .venv/bin/python benches/polling.py [--models 100] [--seconds 60] [--interval 10s] [--most 1.0]

Starts a registry that answers as MLflow does, in a process of its own, and two servers of the binary in `TIDEGATE_BIN`
(by default the release build): each model of the first has a `model.toml` that names its alias there, each of the second
has one that names nothing, and its version beside it. Both are left alone for the seconds given. Prints what each of them took; exits with 1 when what
following adds is more than `--most` percent of a core.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "clients"))

from server import Server, eventually  # noqa: E402
from wire import call  # noqa: E402

FILES = {
    "MLmodel": b"artifact_path: model\nflavors:\n  onnx:\n    data: model.onnx\n    onnx_version: 1.23.2\n",
    "model.onnx": (ROOT / "models" / "iris" / "1" / "model.onnx").read_bytes(),
}
API, ARTIFACTS = "/api/2.0/mlflow/", "/api/2.0/mlflow-artifacts/artifacts"
# Until the first look of each, and what it leads to, are over.
READY_TIMEOUT = 180


class Registry(BaseHTTPRequestHandler):
    """Every model has one version, with the alias `live`; `looks` counts who asked for that."""

    protocol_version = "HTTP/1.1"
    # An answer goes out in two pieces, of which the second must not wait.
    disable_nagle_algorithm = True
    looks = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        name = parse_qs(url.query).get("name", [""])[0]
        match url.path.removeprefix(API):
            case "registered-models/alias":
                with self.looks.get_lock():
                    self.looks.value += 1
                return self.give({"model_version": version(name)})
            case "model-versions/get":
                return self.give({"model_version": version(name)})
            case "model-versions/get-download-uri":
                return self.give({"artifact_uri": f"mlflow-artifacts:/{name}"})
        if url.path == ARTIFACTS:
            files = [{"path": path, "is_dir": False, "file_size": len(content)} for path, content in FILES.items()]
            return self.give({"files": files})
        content = FILES.get(url.path.rsplit("/", 1)[1])
        if url.path.startswith(ARTIFACTS) and content:
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            return self.answer(206, content[start : end + 1], f"bytes {start}-{end}/{len(content)}")
        return self.answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"}')

    def give(self, value):
        self.answer(200, json.dumps(value).encode())

    def answer(self, status, body, content_range=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)


def version(name):
    """As long as a real one."""
    told = {"name": name, "version": "1", "creation_timestamp": 1795229128394, "last_updated_timestamp": 1795229131363}
    told |= {"current_stage": "None", "description": "", "source": "models:/m-e5a23e5226cb4cf188ae9c7e1af68838"}
    return told | {"run_id": "", "status": "READY", "run_link": "", "aliases": ["live"]}


def serve_registry(port, looks):
    Registry.looks = looks
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    port.send(server.server_port)
    server.serve_forever()


def processor_seconds(server):
    """What the process has taken so far, in user and in system mode."""
    stat = Path(f"/proc/{server.process.pid}/stat").read_text()
    return sum(map(int, stat.rsplit(") ", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def ready(server):
    """The models that have been loaded; those that are on their way are named, too."""
    index = json.loads(call(server.rest, "POST", "/v2/repository/index", b"{}").body)
    return {model["name"] for model in index if model.get("state") == "READY"}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", type=int, default=100)
    arguments.add_argument("--seconds", type=int, default=60)
    arguments.add_argument("--interval", default="10s", help="of the looks; 10s is the server's default")
    arguments.add_argument("--most", type=float, default=1.0, help="percent of a core")
    given = arguments.parse_args()
    names = [f"m{number:03}" for number in range(given.models)]
    config = f'[follow]\ninterval = "{given.interval}"\n'

    with ExitStack() as running:
        home = Path(running.enter_context(tempfile.TemporaryDirectory()))
        heard, told = multiprocessing.Pipe(duplex=False)
        looks = multiprocessing.Value("i", 0)
        registry = multiprocessing.Process(target=serve_registry, args=(told, looks), daemon=True)
        registry.start()
        running.callback(registry.terminate)
        address = f"127.0.0.1:{heard.recv()}"
        for name in names:
            followed, folder = home / "followed" / name, home / "folders" / name / "1"
            followed.mkdir(parents=True)
            folder.mkdir(parents=True)
            (followed / "model.toml").write_text(f'source = "mlflow://{address}/{name}@live"\n')
            (folder.parent / "model.toml").write_text('versions = { latest = 1 }\n')
            (folder / "model.onnx").write_bytes(FILES["model.onnx"])
        servers = {}
        for kind in ("folders", "followed"):
            server = Server(home / kind, home / f"{kind}-server", config=config, wait=False)
            servers[kind] = running.enter_context(server)
        for server in servers.values():
            eventually(server.is_ready, READY_TIMEOUT)
            eventually(lambda server=server: ready(server) == set(names), READY_TIMEOUT)
        # Until what starting leaves behind is done.
        time.sleep(5)
        before, looked = {kind: processor_seconds(server) for kind, server in servers.items()}, looks.value
        begun = time.monotonic()
        time.sleep(given.seconds)
        seconds = time.monotonic() - begun
        taken = {kind: processor_seconds(server) - before[kind] for kind, server in servers.items()}
        looked = looks.value - looked

    for kind, taken_by in taken.items():
        print(f"{kind:<9}{taken_by:7.2f} s of processor time in {seconds:.0f} s: {100 * taken_by / seconds:.2f} % of a core")
    added = 100 * (taken["followed"] - taken["folders"]) / seconds
    each = 1e3 * (taken["followed"] - taken["folders"]) / max(looked, 1)
    print(f"following {given.models} models adds {added:.2f} % of a core: {looked} looks of {each:.2f} ms")
    return int(added > given.most)


if __name__ == "__main__":
    sys.exit(main())
