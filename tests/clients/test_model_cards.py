"""What is known of a version: its card, the signature that MLflow promised, and its names at its place."""

import json
import subprocess

import numpy as np
import pytest
from hub_server import Hub
from infer import Question, rest_json
from mirrored import CONFIG, SOON, answers, graph, log_has
from mlflow_server import SERVED_WITH, Mlflow
from models import plus
from registry import MODEL, Registry
from server import eventually, run
from tensors import tensor
from wire import call

# Starting MLflow takes 20 s, and longer on busy cores.
pytestmark = pytest.mark.timeout(300)

FRONT = """---
license: apache-2.0
language: [en]
pipeline_tag: tabular-regression
model-index:
- name: plus
  results:
  - task: {type: tabular-regression}
    dataset: {name: numbers, type: acme/numbers}
    metrics: [{type: mae, value: 0.25}]
---
# plus
"""


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    server = Mlflow(tmp_path_factory.mktemp("mlflow"))
    try:
        # MLflow leaves settings in the environment.
        with pytest.MonkeyPatch.context() as environment:
            server.connect(environment)
            yield server
    finally:
        server.stop()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    yield hub
    hub.close()


def log(mlflow, name, signature, onnx=None, **more):
    """The next version of a model that has this signature, and its run."""
    with mlflow.run() as made:
        mlflow.module.log_params({"step": 1})
        mlflow.module.log_metrics({"mae": 0.5})
        done = mlflow.module.onnx.log_model(
            onnx or plus(1),
            name="model",
            registered_model_name=name,
            pip_requirements=SERVED_WITH,
            signature=signature,
            **more,
        )
    return str(done.registered_model_version), made.info.run_id


def tensors(**shapes):
    """A list of tensors in MLflow's words: name to type and shape; `_` stands for none."""
    from mlflow.types import Schema, TensorSpec

    named = [(None if name == "_" else name, *spec) for name, spec in shapes.items()]
    return Schema([TensorSpec(np.dtype(kind), shape, name) for name, kind, shape in named])


def columns(*kinds):
    from mlflow.types import ColSpec, Schema

    return Schema([ColSpec(kind, name) for name, kind in kinds])


def signature(inputs, outputs=None):
    from mlflow.models import ModelSignature

    return ModelSignature(inputs=inputs, outputs=outputs)


def shown(server, model, version):
    answer = call(server.ops, "GET", f"/admin/v1/models/{model}/versions/{version}")
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def printed(server, *arguments):
    return run("models", "show", *arguments, "--ops", server.ops, home=server.home).stdout


def state(server, model):
    (version,) = json.loads(call(server.ops, "GET", f"/admin/v1/models/{model}").body)["versions"]
    return version


def test_the_signature_is_shown_and_a_card_made_of_the_run(mlflow, serve):
    promised = signature(tensors(x=("float32", (-1, 1))), tensors(y=("float32", (-1, 1))))
    version, made = log(mlflow, "promised", promised, metadata={"team": "flowers"})
    server = serve(mlflow.uri("promised/1"))
    assert answers(server, "promised") == 2
    found = shown(server, "promised", version)
    spec = {"dtype": "float32", "shape": [-1, 1]}
    assert found["signature"] == {
        "inputs": [{"name": "x", "type": "tensor", "tensor-spec": spec}],
        "outputs": [{"name": "y", "type": "tensor", "tensor-spec": spec}],
        "params": None,
    }
    card = found["card"]
    assert (card["from"], card["run_id"], card["parameters"]) == ("run", made, {"step": "1"})
    (result,) = card["results"]
    assert (result["metric"], result["value"], found["card_notes"]) == ("mae", 0.5, [])
    assert not state(server, "promised")["notes"]
    said = printed(server, "promised")
    assert "input        x float32 [-1,1]" in said and "card         made from the run" in said
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "reason"),
    [
        (
            "wide",
            {"_": ("float32", (-1, 4))},
            None,
            "input 'x' is float32 [-1, 4], and the graph has FP32 [-1, 1]",
        ),
        ("whole", {"x": ("int64", (-1, 1))}, None, "input 'x' is int64 [-1, 1], and the graph has FP32 [-1, 1]"),
        ("other", {"z": ("float32", (-1, 1))}, None, "it has an input 'z', and the graph's inputs are 'x'"),
        (
            "answer",
            {"x": ("float32", (-1, 1))},
            {"label": ("int64", (-1,))},
            "it has an output 'label', and the graph's outputs are 'y'",
        ),
    ],
)
def test_a_signature_that_is_not_the_graphs_fails_the_load(mlflow, serve, tmp_path, name, inputs, outputs, reason):
    log(mlflow, name, signature(tensors(**inputs), outputs and tensors(**outputs)))
    models = tmp_path / "models"
    (models / name).mkdir(parents=True)
    settings = models / name / "model.toml"
    settings.write_text(f'source = "{mlflow.uri(f"{name}/1")}"\n')
    server = serve(models, config=CONFIG)
    said = eventually(lambda: state(server, name)["reason"], SOON)
    assert f"MLflow's signature does not fit the graph: {reason}" in said and "check_signature = false" in said
    assert rest_json(server, Question(name, [tensor("x", "FP32", [1, 1], [1])])).error
    if name == "wide":
        settings.write_text(f"{settings.read_text()}check_signature = false\n")
        eventually(lambda: answers(server, name) == 2, SOON)


def test_what_mlflow_casts_is_noted(mlflow, serve):
    log(mlflow, "table", signature(columns(("length", "double"))))
    server = serve(mlflow.uri("table/1"))
    assert answers(server, "table") == 2
    said = "columns of MLflow's signature that become FP32 in input 'x': 'length double'"
    assert said in state(server, "table")["notes"] and log_has(server, said)
    body = json.dumps({"dataframe_split": {"columns": ["length"], "data": [[2.5]]}}).encode()
    answer = call(server.rest, "POST", "/invocations", body, {"Content-Type": "application/json"})
    assert answer.status == 200, answer.body

    log(mlflow, "tensor", signature(tensors(_=("float64", (-1, 1))), tensors(_=("int64", (-1,)))))
    server = serve(mlflow.uri("tensor/1"), name="tensor")
    assert answers(server, "tensor") == 2
    assert "input 'x' is float64 [-1, 1]" in state(server, "tensor")["notes"][0]


def test_a_signature_inferred_from_examples_fits_the_graph(mlflow, serve, tmp_path):
    """As most people have theirs: of inputs, and of what the graph or the model that it was made from says to them."""
    from mlflow.models import infer_signature
    from skl2onnx import to_onnx
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    samples, species = load_iris(return_X_y=True)
    classifier = LogisticRegression(max_iter=200).fit(samples, species)
    samples = samples.astype(np.float32)
    onnx = to_onnx(classifier, samples[:1], options={"zipmap": False}, target_opset=15)
    example = samples[:2]
    saved = tmp_path / "saved"
    mlflow.module.onnx.save_model(onnx, str(saved), pip_requirements=SERVED_WITH)
    of_onnx = mlflow.module.pyfunc.load_model(str(saved)).predict(samples)
    of_sklearn = classifier.predict(samples)
    for output in (of_onnx, of_sklearn):
        inferred = infer_signature(samples, output)
        version, _ = log(mlflow, "inferred", inferred, onnx, input_example=example)
        server = serve(mlflow.uri(f"inferred/{version}"), name=f"inferred-{version}")
        rows = tensor("X", "FP32", [2, 4], example.ravel().tolist())
        assert not rest_json(server, Question("inferred", [rows])).error
        assert shown(server, "inferred", version)["signature"]["inputs"]
        # The example is the first request that it gets.
        assert not log_has(server, "example skipped")


def test_names_move_while_files_stay(mlflow, serve, tmp_path):
    for _ in range(2):
        log(mlflow, "named", None)
    client = mlflow.client
    client.set_registered_model_alias("named", "live", "1")
    client.set_registered_model_alias("named", "old", "1")
    # What the alias has left is served on, so that it has a document.
    models = tmp_path / "models"
    (models / "named").mkdir(parents=True)
    (models / "named" / "model.toml").write_text(f'source = "{mlflow.uri("named@live")}"\nversions = "all"\n')
    server = serve(models, config=CONFIG)
    eventually(lambda: state_of(server, "1") == "ready", SOON)

    def named(version):
        lineage = shown(server, "named", version)["lineage"]
        return sorted(lineage["aliases"]), lineage["stage"], lineage["tags"]

    assert named("1") == (["live", "old"], None, {})
    client.set_model_version_tag("named", "1", "validation", "passed")
    eventually(lambda: named("1") == (["live", "old"], None, {"validation": "passed"}), SOON)
    with pytest.warns(FutureWarning):
        client.transition_model_version_stage("named", "1", "Production")
    eventually(lambda: named("1")[1] == "Production", SOON)
    client.set_registered_model_alias("named", "live", "2")
    eventually(lambda: state_of(server, "2") == "ready", SOON)
    eventually(lambda: named("1")[0] == ["old"] and named("2")[0] == ["live"], SOON)
    assert server.stop() == 0


def state_of(server, version, model="named"):
    versions = json.loads(call(server.ops, "GET", f"/admin/v1/models/{model}").body)["versions"]
    return next((one["state"] for one in versions if one["version"] == version), None)


def test_the_hubs_front_matter_is_the_card(hub, serve):
    files = {"model.onnx": plus(1), "README.md": FRONT.encode(), "docs/README.md": b"---\nlicense: none\n---\n"}
    first = hub.commit("acme/plus", files)
    server = serve("hf://acme/plus", config=CONFIG)
    found = shown(server, "plus", first)
    card = found["card"]
    assert (card["from"], card["file"], card["name"]) == ("readme", "README.md", "plus")
    assert (card["licenses"], card["languages"], card["task"]) == (["apache-2.0"], ["en"], "tabular-regression")
    (result,) = card["results"]
    assert (result["metric"], result["value"], result["dataset"]) == ("mae", 0.25, "numbers")
    lineage = found["lineage"]
    assert (lineage["version"], lineage["git_commit"], lineage["aliases"]) == (first, first, ["main"])
    said = printed(server, "plus")
    assert "card         README.md" in said and "mae = 0.25 (numbers)" in said and "apache-2.0" in said

    # Broken front matter keeps nothing from being served.
    second = hub.commit("acme/plus", {"model.onnx": plus(10), "README.md": b"---\nlicense: [\n---\n"})
    eventually(lambda: answers(server) == 11, SOON)
    found = shown(server, "plus", second)
    assert found["card"] is None and found["card_notes"][0].startswith("README.md: ")
    assert "note         README.md: " in printed(server, "plus")
    assert shown(server, "plus", second)["lineage"]["aliases"] == ["main"]
    assert server.stop() == 0


def test_a_bill_of_materials_in_a_folder_is_the_card(repository, serve):
    folder = repository.add("plus", plus(1))
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "metadata": {
            "component": {
                "type": "machine-learning-model",
                "name": "plus",
                "version": "1.0",
                "licenses": [{"license": {"id": "MIT"}}],
                "modelCard": {
                    "modelParameters": {"task": "regression", "datasets": [{"type": "dataset", "name": "numbers"}]},
                    "quantitativeAnalysis": {"performanceMetrics": [{"type": "mae", "value": "0.25"}]},
                    "considerations": {"technicalLimitations": ["adds one"]},
                },
            }
        },
    }
    (folder / "plus.cdx.json").write_text(json.dumps(bill))
    server = serve(repository.path)
    card = shown(server, "plus", "1")["card"]
    assert (card["from"], card["file"], card["version"]) == ("cyclonedx", "plus.cdx.json", "1.0")
    assert (card["licenses"], card["task"], card["limitations"]) == (["MIT"], "regression", ["adds one"])
    assert (card["datasets"][0]["name"], card["results"][0]["value"]) == ("numbers", "0.25")
    assert "limits     adds one" in printed(server, "plus")


def test_a_folder_that_mlflow_saved_is_held_to_its_signature(mlflow, repository, serve, tmp_path):
    saved = tmp_path / "saved"
    promised = signature(tensors(x=("float32", (-1, 3))))
    mlflow.module.onnx.save_model(plus(1), str(saved), pip_requirements=SERVED_WITH, signature=promised)
    repository.copy("plus", saved)
    server = serve(repository.path, wait=False)
    eventually(lambda: state_of(server, "1", "plus") == "failed", SOON)
    assert "input 'x' is float32 [-1, 3], and the graph has FP32 [-1, 1]" in state(server, "plus")["reason"]
    assert shown(server, "plus", "1")["signature"]["inputs"]


def test_a_registrys_annotations_are_the_lineage(tmp_path, serve):
    registry = Registry(tmp_path / "registry")
    try:
        path = "org.cncf.model.filepath"
        layers = [
            registry.blob("acme/plus", graph(1), f"{MODEL}weight.v1.raw", {path: "plus.onnx"}),
            registry.blob("acme/plus", FRONT.encode(), f"{MODEL}doc.v1.raw", {path: "README.md"}),
        ]
        config = json.dumps({"descriptor": {"family": "adders", "version": "1.0", "revision": "c0ffee"}}).encode()
        config = registry.blob("acme/plus", config, f"{MODEL}config.v1+json")
        pushed = registry.artifact("acme/plus", "live", layers, config)
        version = pushed["digest"].removeprefix("sha256:")[:12]
        server = serve(f"oci://{registry.host}/acme/plus:live", config=CONFIG)
        found = shown(server, "plus", version)
        lineage = found["lineage"]
        assert (lineage["version"], lineage["git_commit"], lineage["aliases"]) == ("1.0", "c0ffee", ["live"])
        assert (lineage["tags"]["family"], found["card"]["from"]) == ("adders", "readme")
        assert server.stop() == 0
    finally:
        registry.close()


def test_a_checkouts_commit_is_the_lineage(tmp_path, serve):
    checkout = tmp_path / "checkout"
    (checkout / ".dvc").mkdir(parents=True)

    def git(*arguments):
        own = ["-c", "user.name=ada", "-c", "user.email=ada@acme.example", "-c", "init.defaultBranch=main"]
        done = subprocess.run(["git", *own, *arguments], cwd=checkout, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    import hashlib

    content = graph(1)
    md5 = hashlib.md5(content).hexdigest()
    kept = checkout / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    out = {"md5": md5, "size": len(content), "hash": "md5", "path": "plus.onnx", "desc": "Adds one"}
    (checkout / "plus.onnx.dvc").write_text(json.dumps({"outs": [out], "meta": {"team": "flowers"}}))
    git("init", "--quiet")
    git("add", "plus.onnx.dvc")
    git("commit", "--quiet", "--no-gpg-sign", "-m", "Track it")
    server = serve(f"dvc://{checkout}#plus.onnx.dvc", config=CONFIG)
    lineage = shown(server, "plus", md5[:12])["lineage"]
    assert (lineage["git_commit"], lineage["aliases"]) == (git("rev-parse", "HEAD"), ["main"])
    assert (lineage["description"], lineage["tags"]) == ("Adds one", {"team": "flowers"})
    git("switch", "--quiet", "-c", "next")
    eventually(lambda: shown(server, "plus", md5[:12])["lineage"]["aliases"] == ["next"], SOON)
