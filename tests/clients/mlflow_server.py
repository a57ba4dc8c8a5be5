"""A real MLflow tracking server, and models as one logs and registers them there."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from server import eventually
from wire import call

# Booting takes 20 s on two idle cores.
START_TIMEOUT = 110
OWN = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
# What the model is served with is of no interest here; finding it out takes half a minute.
SERVED_WITH = ["onnxruntime"]


class Mlflow:
    """One server, with its database and files in `home`."""

    def __init__(self, home, artifacts=None, flags=(), environment=(), wait=True):
        home.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.home, self.address = home, f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--workers", "1", "--serve-artifacts"]
        command += ["--artifacts-destination", artifacts or str(home / "artifacts"), *flags]
        # Reports to this server, whatever the machine has.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=home,
                env=inherited | OWN | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The processes that it starts end with it.
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self):
        try:
            eventually(self.is_ready, START_TIMEOUT, pause=0.2)
        except BaseException:
            self.stop()
            print((self.home / "log").read_text(errors="replace")[-4000:])
            raise

    def is_ready(self):
        assert self.process.poll() is None, f"MLflow ended with {self.process.returncode}"
        return call(self.address, "GET", "/health").status == 200

    def connect(self, environment, login=""):
        """Makes MLflow, and a client of this server. It is imported here, for that takes seconds."""
        for name, setting in OWN.items():
            environment.setenv(name, setting)
        # MLflow itself writes it when it is told of a server.
        environment.setenv("MLFLOW_TRACKING_URI", "")
        import mlflow

        self.module, self.tracking_uri = mlflow, f"http://{login}{self.address}"
        self.client = mlflow.MlflowClient(self.tracking_uri, self.tracking_uri)

    def run(self):
        """A run on this server, as a context."""
        self.module.set_tracking_uri(self.tracking_uri)
        return self.module.start_run()

    def uri(self, model, login=""):
        return f"mlflow://{login}{self.address}/{model}"

    def stop(self):
        """At once: nothing of it is kept, and it takes its time to end by itself."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def log_onnx(server, graph, name):
    """The next version of the model `name`."""
    with server.run():
        done = server.module.onnx.log_model(
            graph, name="model", registered_model_name=name, pip_requirements=SERVED_WITH
        )
    return str(done.registered_model_version)


def log_folder(server, graph, name, home, source=None):
    """The next version of the model `name`, as MLflow 2 has them: a folder among the files of a run, or at `source`."""
    server.module.onnx.save_model(graph, str(home), pip_requirements=SERVED_WITH)
    with server.run() as run:
        if source is None:
            server.module.log_artifacts(str(home), "model")
    if not server.client.search_registered_models(f"name='{name}'"):
        server.client.create_registered_model(name)
    source = source or f"{run.info.artifact_uri}/model"
    return str(server.client.create_model_version(name, source, run_id=run.info.run_id).version)
