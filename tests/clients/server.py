"""A server of a test's own: started on free ports, watched, and stopped by its process id."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from wire import call

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("TIDEGATE_BIN", ROOT / "target" / "release" / "tidegate"))
ONNXRUNTIME = os.environ.get("ORT_DYLIB_PATH", str(ROOT / ".onnxruntime"))

START_TIMEOUT = 180
STOP_TIMEOUT = 45
PORTS = {"REST": "rest", "gRPC": "grpc", "ops": "ops"}
ADDRESS = re.compile(r"^\s*(REST|gRPC|ops)\b\D*([\d.]+:\d+)", re.MULTILINE)


class Server:
    """One process. `rest`, `grpc` and `ops` are its addresses, as `host:port`.

    It is ready, unless nobody wants to wait for that.
    """

    def __init__(self, models, home, config="", flags=(), host="127.0.0.1", wait=True):
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.process = launch(serve_command(models, home, config, flags, host), home)
        try:
            addresses = eventually(self.printed_addresses, START_TIMEOUT)
            self.rest, self.grpc, self.ops = (addresses[port] for port in PORTS.values())
            if wait:
                eventually(self.is_ready, START_TIMEOUT)
        except AssertionError as error:
            self.kill()
            raise AssertionError(
                f"the server did not start; its log ends:\n{self.tail()}"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.is_running():
            self.stop()

    def printed_addresses(self):
        assert self.is_running(), f"ended with {self.process.returncode}"
        found = ADDRESS.findall((self.home / "stdout").read_text())
        addresses = {PORTS[label]: address for label, address in found}
        return addresses if len(addresses) == len(PORTS) else None

    def is_ready(self):
        assert self.is_running(), f"ended with {self.process.returncode}"
        return call(self.rest, "GET", "/v2/health/ready").status == 200

    def is_running(self):
        return self.process.poll() is None

    def stop(self, number=signal.SIGINT):
        """The exit code. A server that outlives its time is killed, and that is a failure."""
        self.process.send_signal(number)
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not stop; its log ends:\n{self.tail()}") from None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def log(self):
        return (self.home / "stderr").read_text(errors="replace")

    def tail(self, lines=40):
        return "\n".join(self.log().splitlines()[-lines:])


def serve_command(models, home, config="", flags=(), host="127.0.0.1"):
    command = [BINARY, "serve", "--models", models, "--data", home / "data"]
    for port in PORTS.values():
        command += [f"--{port}", f"{host}:0"]
    if config:
        file = home / "tidegate-under-test.toml"
        file.write_text(config)
        command += ["--config", file]
    return [*command, *flags]


def launch(command, home):
    own = {"TMPDIR": home / "tmp", "HOME": home / "user"}
    for folder in own.values():
        folder.mkdir(exist_ok=True)
    with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
        return subprocess.Popen(
            command,
            cwd=home,
            env=environment() | {name: str(folder) for name, folder in own.items()},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def run(*arguments, home, timeout=30):
    """A command of the binary that ends by itself."""
    return subprocess.run(
        [BINARY, *arguments],
        cwd=home,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def environment():
    """Ours without the settings of the server, which reads `TIDEGATE_…` too."""
    assert BINARY.exists(), f"{BINARY} is missing: build it, or set TIDEGATE_BIN"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
    # The server must keep ONNX Runtime's telemetry off by itself.
    inherited.pop("ORT_DISABLE_TELEMETRY", None)
    return inherited | {"ORT_DYLIB_PATH": ONNXRUNTIME}


def eventually(probe, timeout=10, pause=0.05):
    """The first true answer of `probe`; a probe that raises an OSError is asked again."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            answer = probe()
        except OSError as error:
            answer, last = None, error
        else:
            last = answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout} s; last: {last!r}"
        time.sleep(pause)
