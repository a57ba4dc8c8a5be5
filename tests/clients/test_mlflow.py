"""Models from MLflow's registry: by alias, version and stage, as MLflow itself logs and registers them."""

import base64
import json
import sqlite3
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from infer import Question, grpc_raw, rest_json
from mirrored import memory
from mlflow_server import SERVED_WITH, Mlflow, log_folder, log_onnx
from models import model, plus, value
from onnx import helper
from server import eventually, run
from signing import Signer, keys, only, policy
from tensors import tensor
from test_buckets import Bucket
from wire import call

# Starting MLflow takes 20 s, and longer on busy cores.
pytestmark = pytest.mark.timeout(300)

INTERVAL = 1
CONFIG = f'[follow]\ninterval = "{INTERVAL}s"\n'
SOON = 30
WIDTH = 1024
# More bytes than come in one part where parts can be asked for.
BALLAST = 40 << 20
SECRET = "correct-horse-battery"
VERSIONS = 10_000
# What a few looks may leave behind: the heap breathes.
MOST_GROWTH = 24 << 20


@pytest.fixture(scope="module", autouse=True)
def booting(tmp_path_factory):
    """The server of `guarded`. It boots while the tests run that need none, or another one."""
    bucket = Bucket()
    home = tmp_path_factory.mktemp("guarded")
    users = home / "users.ini"
    users.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = ada\nauth_cache_ttl_seconds = 60\n"
        f"admin_password = {SECRET}\ndatabase_uri = sqlite:///{home}/users.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    settings = bucket_settings(bucket) | {
        "MLFLOW_S3_ENDPOINT_URL": bucket.endpoint,
        "MLFLOW_AUTH_CONFIG_PATH": str(users),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "tests",
    }
    flags = ["--app-name", "basic-auth"]
    server = Mlflow(home, artifacts="s3://models/kept", flags=flags, environment=settings, wait=False)
    server.bucket = bucket
    yield server
    server.stop()
    bucket.close()


@pytest.fixture(scope="module")
def guarded(booting, tmp_path_factory):
    """A server with users of its own, that keeps its artifacts in a bucket and passes them on."""
    with pytest.MonkeyPatch.context() as environment:
        for name, setting in bucket_settings(booting.bucket).items():
            environment.setenv(name, setting)
        booting.bucket.open()
    booting.wait()
    with pytest.MonkeyPatch.context() as environment:
        booting.connect(environment, login=f"ada:{SECRET}@")
        graph = model(
            [helper.make_node("Add", ["x", "number"], ["y"])],
            [value("x", "FP32", ["rows", 1])],
            [value("y", "FP32", ["rows", 1])],
            {"number": np.float32(3), "ballast": np.zeros(BALLAST, dtype=np.uint8)},
        )
        log_folder(booting, graph, "plus", tmp_path_factory.mktemp("plus") / "model")
        booting.client.set_registered_model_alias("plus", "live", "1")
    return booting


@pytest.fixture(scope="module")
def iris(mlflow):
    """Version 1 is the champion, 2 in production."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier

    samples, species = load_iris(return_X_y=True)
    samples = samples.astype(np.float32)
    classifiers = []
    for trees in (3, 10):
        forest = RandomForestClassifier(n_estimators=trees, random_state=0).fit(samples, species)
        graph = to_onnx(forest, samples[:1], options={"zipmap": False}, target_opset=15)
        version = log_onnx(mlflow, graph, "iris-rf")
        assert version == str(len(classifiers) + 1)
        classifiers.append(forest)
    mlflow.client.set_registered_model_alias("iris-rf", "champion", "1")
    call_quietly(mlflow.client.transition_model_version_stage, "iris-rf", "2", "Production")
    return SimpleNamespace(samples=samples, first=classifiers[0], second=classifiers[1])


@pytest.fixture(scope="module")
def steps(mlflow):
    """The model `plus`, of which version n adds n."""
    for number in (1, 2):
        assert log_onnx(mlflow, plus(number), "plus") == str(number)
    mlflow.client.set_registered_model_alias("plus", "live", "1")


def call_quietly(function, *arguments):
    """Stages are deprecated, and MLflow says so each time."""
    with pytest.warns(FutureWarning):
        function(*arguments)


def answers(server, model="plus", number=1):
    answer = rest_json(server, Question(model, [tensor("x", "FP32", [1, 1], [number])]))
    return None if answer.error else answer.outputs["y"].data[0]


def served(server, model):
    """The version that answers."""
    return json.loads(call(server.rest, "GET", f"/v2/models/{model}").body)["versions"]


def log_has(server, *words):
    return any(all(word in line for word in words) for line in server.log().splitlines())


def status(server):
    (status,) = json.loads(call(server.ops, "GET", "/admin/v1/sources").body)
    return status


def test_the_tutorial(mlflow, iris, serve):
    server = serve(mlflow.uri("iris-rf@champion"), config=CONFIG)
    rows = iris.samples[::10]
    question = Question("iris-rf", [tensor("X", "FP32", list(rows.shape), rows.ravel().tolist())])
    for way in (rest_json, grpc_raw):
        answer = way(server, question)
        assert not answer.error and answer.version == "1"
        assert list(answer.outputs["label"].data) == iris.first.predict(rows).tolist()
        probabilities = np.reshape(answer.outputs["probabilities"].data, (len(rows), 3))
        np.testing.assert_allclose(probabilities, iris.first.predict_proba(rows), atol=1e-6)
    assert status(server)["uri"] == mlflow.uri("iris-rf@champion")
    files = {path.name for path in server.home.rglob("iris-rf/1/*")}
    assert files == {"MLmodel", "model.onnx", "requirements.txt"}
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("pointer", "version"), [("1", "1"), ("2", "2"), ("Production", "2"), ("latest", "2"), ("none", "1")]
)
def test_a_version_a_stage_and_the_latest(mlflow, iris, serve, pointer, version):
    server = serve(mlflow.uri(f"iris-rf/{pointer}"))
    assert served(server, "iris-rf") == [version]


def test_the_server_of_the_environment(mlflow, steps, serve, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(AssertionError, match="MLFLOW_TRACKING_URI is not set"):
        serve("models:/plus@live", "without")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{mlflow.address}/")
    assert answers(serve("models:/plus@live")) == 2


def test_a_version_shows_how_it_was_made(mlflow, iris, serve):
    import mlflow as module
    import pandas

    with mlflow.run() as run_made:
        module.log_params({"trees": 7})
        module.log_metrics({"accuracy": 0.97})
        frame = pandas.DataFrame(iris.samples[:5])
        module.log_input(module.data.from_pandas(frame, name="iris_train"), context="training")
        done = module.onnx.log_model(
            plus(1), name="model", registered_model_name="made", pip_requirements=["onnxruntime"]
        )
    version = str(done.registered_model_version)
    mlflow.client.set_model_version_tag("made", version, "validation_status", "passed")
    mlflow.client.set_registered_model_alias("made", "live", version)
    server = serve(mlflow.uri("made@live"))
    shown = json.loads(call(server.ops, "GET", f"/admin/v1/models/made/versions/{version}").body)
    assert shown["source"] == mlflow.uri("made@live") and shown["digest"].startswith("sha256:")
    lineage = shown["lineage"]
    assert (lineage["version"], lineage["aliases"], lineage["run_id"]) == (version, ["live"], run_made.info.run_id)
    assert (lineage["parameters"], lineage["metrics"]) == ({"trees": "7"}, {"accuracy": 0.97})
    assert lineage["tags"]["validation_status"] == "passed"
    (dataset,) = lineage["datasets"]
    assert (dataset["name"], dataset["context"]) == ("iris_train", "training") and dataset["digest"]
    printed = run("models", "show", "made", "--ops", server.ops, home=server.home).stdout
    assert run_made.info.run_id in printed and "accuracy = 0.97" in printed and "iris_train" in printed


def test_weights_beside_the_graph_come_along(mlflow, serve):
    weights = np.arange(WIDTH, dtype=np.float32)
    graph = model(
        [helper.make_node("Add", ["x", "weights"], ["y"])],
        [value("x", "FP32", ["rows", WIDTH])],
        [value("y", "FP32", ["rows", WIDTH])],
        {"weights": weights},
    )
    log_onnx(mlflow, graph, "wide")
    server = serve(mlflow.uri("wide/1"))
    answer = rest_json(server, Question("wide", [tensor("x", "FP32", [1, WIDTH], [0.5] * WIDTH)]))
    assert answer.outputs["y"].data == (weights + 0.5).tolist()
    beside = [path for path in server.home.rglob("wide/1/*.data")]
    assert len(beside) == 1 and beside[0].stat().st_size >= weights.nbytes


def test_a_version_from_the_files_of_a_run(mlflow, serve, tmp_path):
    log_folder(mlflow, plus(4), "classic", tmp_path / "model")
    assert answers(serve(mlflow.uri("classic/latest")), "classic") == 5


def test_a_version_that_lies_in_a_bucket(mlflow, serve, bucket, tmp_path):
    """As of a server without --serve-artifacts: its clients read the bucket themselves."""
    home = tmp_path / "model"
    log_folder(mlflow, plus(6), "direct", home, source="s3://models/a b/direct")
    for file in home.iterdir():
        bucket.put(f"a b/direct/{file.name}", file.read_bytes())
    assert answers(serve(mlflow.uri("direct/1")), "direct") == 7


def test_a_version_that_only_mlflow_can_read_is_refused(mlflow, serve, tmp_path):
    log_folder(mlflow, plus(6), "there", tmp_path / "model", source="dbfs:/models/there")
    server = serve(mlflow.uri("there/1"))
    assert log_has(server, "not mirrored", "lies at 'dbfs:/models/there'", "--serve-artifacts")


def test_another_flavor_is_refused_in_words(mlflow, serve):
    from sklearn.dummy import DummyClassifier

    dummy = DummyClassifier().fit([[0.0]], [0])
    with mlflow.run():
        mlflow.module.sklearn.log_model(
            dummy, name="model", registered_model_name="dummy", pip_requirements=["scikit-learn"]
        )
    server = serve(mlflow.uri("dummy/1"))
    said = "model has flavors python_function, sklearn; Tidegate runs onnx"
    assert log_has(server, "not mirrored", said)
    assert said in run("models", "--ops", server.ops, home=server.home).stdout


def test_moving_the_alias(mlflow, steps, serve):
    server = serve(mlflow.uri("plus@live"), config=CONFIG)
    assert answers(server) == 2
    seen, failed, done = [], [], threading.Event()

    def predict():
        while not done.is_set():
            try:
                answer = rest_json(server, Question("plus", [tensor("x", "FP32", [1, 1], [1])]))
            except OSError as error:
                failed.append(error)
                continue
            if answer.error:
                failed.append(answer)
            else:
                seen.append(answer.outputs["y"].data[0])

    predicting = threading.Thread(target=predict)
    predicting.start()
    try:
        for version in (2, 1):
            mlflow.client.set_registered_model_alias("plus", "live", str(version))
            eventually(lambda expected=version + 1: seen[-1:] == [expected], SOON)
            time.sleep(3 * INTERVAL)
    finally:
        done.set()
        predicting.join()
        mlflow.client.set_registered_model_alias("plus", "live", "1")
    assert not failed, failed[:3]
    changes = [one for one, before in zip(seen, [None, *seen], strict=False) if one != before]
    assert changes == [2, 3, 2]
    assert server.stop() == 0


def test_an_alias_that_vanishes(mlflow, steps, serve):
    mlflow.client.set_registered_model_alias("plus", "passing", "2")
    server = serve(mlflow.uri("plus@passing"), config=CONFIG)
    assert answers(server) == 3 and not status(server).get("away_since")
    mlflow.client.delete_registered_model_alias("plus", "passing")
    away = eventually(lambda: status(server) if status(server).get("away_since") else None, SOON)
    assert f"alias 'passing' of model 'plus' is not at {mlflow.uri('plus@passing')}" in away["error"]
    time.sleep(2 * INTERVAL)
    assert answers(server) == 3
    mlflow.client.set_registered_model_alias("plus", "passing", "1")
    eventually(lambda: answers(server) == 2, SOON)
    assert not status(server).get("away_since")


@pytest.fixture
def crowd(mlflow, tmp_path):
    """A model of 10,000 versions, of which the first adds 1, the last 2, and the others can be read by nobody.

    They are rows of the server's database: its API makes 27 a second.
    """
    for number in (1, 2):
        log_folder(mlflow, plus(number), "crowd", tmp_path / f"crowd-{number}")
    database = sqlite3.connect(mlflow.home / "mlflow.db", timeout=30)
    with database:
        database.execute("UPDATE model_versions SET version = ? WHERE name = 'crowd' AND version = 2", [VERSIONS])
        database.execute(
            "WITH RECURSIVE numbers(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)"
            " INSERT INTO model_versions (name, version, creation_time, last_updated_time, current_stage, source,"
            "                             status, workspace)"
            " SELECT name, n, creation_time, last_updated_time, current_stage, 'dbfs:/gone', status, workspace"
            " FROM model_versions, numbers WHERE name = 'crowd' AND version = 1",
            [VERSIONS - 1],
        )
    database.close()
    mlflow.client.set_registered_model_alias("crowd", "live", "1")


def test_a_model_of_ten_thousand_versions(mlflow, crowd, repository, serve):
    pointers = {"alias": "crowd@live", "first": "crowd/1", "number": f"crowd/{VERSIONS}"}
    pointers |= {"latest": "crowd/latest", "stage": "crowd/none"}
    for name, pointer in pointers.items():
        folder = repository.path / name
        folder.mkdir()
        (folder / "model.toml").write_text(f'source = "{mlflow.uri(pointer)}"\n')
    server = serve(repository.path, config=CONFIG)
    last = [str(VERSIONS)]
    expected = {"alias": ["1"], "first": ["1"], "number": last, "latest": last, "stage": last}
    assert {name: served(server, name) for name in pointers} == expected
    assert [answers(server, name) for name in ("first", "number")] == [2, 3]
    idle = memory(server)
    for look in ("alias?name=crowd&alias=live", "get-latest-versions?name=crowd"):
        begun = time.monotonic()
        assert call(mlflow.address, "GET", f"/api/2.0/mlflow/registered-models/{look}").status == 200
        print(f"{look} took {1e3 * (time.monotonic() - begun):.0f} ms")

    begun = time.monotonic()
    mlflow.client.set_registered_model_alias("crowd", "live", str(VERSIONS))
    eventually(lambda: answers(server, "alias") == 3, SOON)
    print(f"the alias was followed within {time.monotonic() - begun:.1f} s")
    # A few looks later.
    time.sleep(2 * INTERVAL)
    assert memory(server) - idle < MOST_GROWTH
    states = json.loads(call(server.ops, "GET", "/admin/v1/sources").body)
    assert not any(state["away_since"] or state["problems"] for state in states), states
    assert server.stop() == 0


def test_a_model_that_is_not_there_is_said(mlflow, serve):
    said = refused(serve, mlflow.uri("nowhere@champion"))
    assert "alias 'champion' of model 'nowhere' is not at" in said


def refused(serve, uri):
    """What a server says that does not become ready, for there is nothing that it could serve."""
    server = serve(uri, f"refused-{time.monotonic_ns()}", wait=False)
    eventually(lambda: log_has(server, "out of reach"), SOON)
    assert not server.is_ready()
    return server.log()


def test_a_login_is_asked_for(guarded, serve, monkeypatch):
    said = refused(serve, guarded.uri("plus@live"))
    assert "refuses: 401 Unauthorized: You are not authenticated" in said
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said
    said = refused(serve, guarded.uri("plus@live", login="ada:wrong-one@"))
    assert "refuses: 401 Unauthorized" in said and "wrong-one" not in said

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    # Such a server fetches a file from its bucket anew for each part of it that is asked for.
    guarded.bucket.reads.clear()
    server = serve(guarded.uri("plus@live"))
    assert answers(server) == 4
    reads = [read for read in guarded.bucket.reads if read[0].endswith(("/model.onnx", ".data"))]
    assert reads and len(set(reads)) == len(reads), reads
    assert SECRET not in server.log()


def test_a_login_that_ends_takes_nothing_away(guarded, serve, tmp_path):
    """A user's password is changed, and later changed back; then there is no such user."""

    def administer(method, what, **told):
        login = base64.b64encode(f"ada:{SECRET}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        body = json.dumps({"username": "bob", **told}).encode()
        answer = call(guarded.address, method, f"/api/2.0/mlflow/users/{what}", body, headers)
        assert answer.status == 200, answer.body

    for number in (1, 2):
        log_folder(guarded, plus(number), "lent", tmp_path / f"lent-{number}")
    guarded.client.set_registered_model_alias("lent", "live", "1")
    right, other = "right-horse-battery", "other-horse-battery"
    administer("POST", "create", password=right)
    uri = guarded.uri("lent@live", login=f"bob:{right}@")
    server = serve(uri, config=CONFIG + 'max_interval = "1s"\n')
    assert answers(server, "lent") == 2

    administer("PATCH", "update-password", password=other)
    eventually(lambda: "refuses: 401 Unauthorized" in (status(server)["error"] or ""), SOON)
    guarded.client.set_registered_model_alias("lent", "live", "2")
    time.sleep(2 * INTERVAL)
    assert answers(server, "lent") == 2 and status(server)["away_since"]
    administer("PATCH", "update-password", password=right)
    eventually(lambda: answers(server, "lent") == 3, SOON)
    assert not status(server)["away_since"]

    administer("DELETE", "delete")
    eventually(lambda: "refuses: 401 Unauthorized" in (status(server)["error"] or ""), SOON)
    assert answers(server, "lent") == 3
    assert right not in server.log()
    assert server.stop() == 0


def test_a_restart_without_mlflow_serves_from_the_cache(guarded, serve):
    uri, cache = guarded.uri("plus@live", login=f"ada:{SECRET}@"), ["--cache", "cache"]
    server = serve(uri, config=CONFIG, flags=cache)
    assert answers(server) == 4
    guarded.stop()
    eventually(lambda: log_has(server, "out of reach"), SOON)
    assert answers(server) == 4
    assert server.stop() == 0

    server = serve(uri, config=CONFIG, flags=cache)
    assert answers(server) == 4
    away = eventually(lambda: status(server) if status(server).get("away_since") else None, SOON)
    assert away["uri"] == guarded.uri("plus@live") and "does not answer" in away["error"]
    assert SECRET not in server.log()


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket()
    for name, setting in bucket_settings(bucket).items():
        monkeypatch.setenv(name, setting)
    bucket.open()
    yield bucket
    bucket.close()


def bucket_settings(bucket):
    return {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": bucket.endpoint,
        "AWS_ALLOW_HTTP": "true",
    }


def test_the_example_of_a_version_is_its_smoke_test(repository, serve):
    """The file that MLflow keeps beside a model, in a folder as it is."""
    graph = model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [value("x", "INT64", ["rows"])],
        [value("y", "FP32", ["rows"])],
        {"table": np.float32([10, 20])},
    )

    def with_example(text):
        def write(folder):
            (folder / "model.onnx").write_bytes(graph.SerializeToString())
            (folder / "serving_input_example.json").write_text(text)

        return write

    repository.put("m", "1", "", with_example('{"inputs": {"x": [1]}}'))
    server = serve(repository.path)
    assert served(server, "m") == ["1"] and not log_has(server, "example skipped")
    # What it holds does not run.
    repository.put("m", "2", "", with_example('{"inputs": {"x": [7]}}'))
    eventually(lambda: log_has(server, "loading failed", "serving_input_example.json"), SOON)
    assert served(server, "m") == ["1"]
    # What cannot be read says nothing of the model.
    repository.put("m", "3", "", with_example('{"inputs": {"z": [7]}}'))
    eventually(lambda: served(server, "m") == ["3"], SOON)
    assert log_has(server, "example skipped", "m/3")


def test_a_signed_version_is_verified(mlflow, serve, tmp_path):
    """What describes the environments of other flavors is signed, too, and is not fetched."""
    ada, folder = Signer(tmp_path), tmp_path / "logged"
    mlflow.module.onnx.save_model(plus(1), str(folder), pip_requirements=SERVED_WITH)
    ada.sign(folder)
    assert ada.accepts(folder)
    with mlflow.run() as run:
        mlflow.module.log_artifacts(str(folder), "model")
    mlflow.client.create_registered_model("signed")
    source = f"{run.info.artifact_uri}/model"
    mlflow.client.create_model_version("signed", source, run_id=run.info.run_id)
    config = CONFIG + policy("enforce", keys=keys(ada))
    server = serve(mlflow.uri("signed/latest"), config=config)
    assert answers(server, "signed") == 2, server.tail()
    assert only(server, "signed")["signed"]["state"] == "verified"
