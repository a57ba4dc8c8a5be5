"""What a model answers, as Prometheus sees it."""

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infer import WAYS, Question
from models import SETTINGS, SHIPPED, Repository, identity, plus
from server import Server, eventually
from tensors import tensor
from test_metrics import scrape, series_of, value
from wire import call

LABELS = "tidegate_predictions_total"
NAMES = "setosa\nversi\"color\nvirg\\inica\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    home = tmp_path_factory.mktemp("predictions")
    repository = Repository(home / "models")
    repository.ship("iris")
    labelled = f'labels = {{ label = "names.txt" }}\n{SETTINGS}'
    repository.put("named", "1", labelled, lambda folder: copy_named(repository, folder))
    repository.add("plus", plus(1))
    repository.add("quiet", plus(1), settings=f"predictions = false\n{SETTINGS}")
    with Server(repository.path, home) as server:
        yield server


def copy_named(repository, folder):
    (folder / "model.onnx").write_bytes((SHIPPED / "iris" / "1" / "model.onnx").read_bytes())
    (folder.parent / "names.txt").write_text(NAMES)


def send(server, model, rows, way="rest_binary", version=""):
    rows = np.array(rows, np.float32)
    name = "X" if rows.shape[1] == 4 else "x"
    data = tensor(name, "FP32", list(rows.shape), rows.ravel().tolist())
    answer = WAYS[way](server, Question(model, [data], version=version))
    assert answer.status in (200, "OK"), answer.error
    return answer


@pytest.mark.parametrize("way", WAYS)
def test_labels_and_scores_are_those_of_the_answers(running, way):
    rows = np.array([[5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5], [5.0, 3.4, 1.5, 0.2]])
    before = scrape(running)
    answer = send(running, "iris", rows, way)
    after = scrape(running)
    labels = [int(label) for label in answer.outputs["label"].data]
    scores = np.reshape(answer.outputs["probabilities"].data, (3, 3)).max(axis=1)
    assert sorted(set(labels)) == [0, 2]
    for output in ("label", "probabilities"):
        for label in (0, 2):
            have = {"model": "iris", "variant": "stable", "output": output, "label": str(label)}
            came = value(after, LABELS, **have) - value(before, LABELS, **have)
            assert came == labels.count(label), (output, label)
    have = {"model": "iris", "output": "probabilities"}
    counted = [value(samples, "tidegate_prediction_score_count", **have) for samples in (before, after)]
    summed = [value(samples, "tidegate_prediction_score_sum", **have) for samples in (before, after)]
    assert counted[1] - counted[0] == 3
    assert summed[1] - summed[0] == pytest.approx(scores.sum(), rel=1e-6)
    assert value(after, "tidegate_prediction_nonfinite_total", **have) == 0


def test_classes_have_their_names(running):
    send(running, "named", [[5.1, 3.5, 1.4, 0.2], [6.0, 2.7, 4.1, 1.0], [6.3, 3.3, 6.0, 2.5]])
    samples = scrape(running)
    have = {"model": "named", "output": "label"}
    series = [dict(labels) for name, labels in series_of(samples, **have) if name == LABELS]
    shown = {each["label"]: value(samples, LABELS, **each) for each in series}
    assert shown == {**dict.fromkeys(NAMES.splitlines(), 1), "other": 0}


def test_values_have_mean_and_spread(running):
    send(running, "plus", [[1], [2], [np.nan], [6]])
    samples = scrape(running)
    have = {"model": "plus", "variant": "stable", "output": "y"}
    assert value(samples, "tidegate_prediction_mean", **have) == pytest.approx(4)
    assert value(samples, "tidegate_prediction_stddev", **have) == pytest.approx(np.std([2, 3, 7]))
    assert value(samples, "tidegate_prediction_nonfinite_total", **have) == 1
    buckets = {"1": 0, "4": 2, "16": 3, "+Inf": 3}
    for bound, count in buckets.items():
        assert value(samples, "tidegate_prediction_value_bucket", **have, le=bound) == count


def test_who_asks_for_a_version_is_told_apart(running):
    send(running, "plus", [[1]], version="1")
    send(running, "plus", [[1]], way="grpc_raw", version="1")
    samples = scrape(running)
    have = {"model": "plus", "version": "1", "variant": "pinned"}
    assert value(samples, "tidegate_requests_total", **have, code="ok") == 2
    assert value(samples, "tidegate_request_duration_seconds_count", **have) == 2
    assert value(samples, "tidegate_prediction_value_count", **have) == 2


def test_models_need_not_show_what_they_answer(running):
    send(running, "quiet", [[1]])
    samples = scrape(running)
    assert value(samples, "tidegate_requests_total", model="quiet", code="ok") >= 1
    assert not [name for name, _ in series_of(samples, model="quiet") if "prediction" in name]


def test_series_are_bounded_and_vanish(repository, serve):
    """However many labels there are: twenty of an output, and the rest together."""
    repository.add("echo", identity("INT64", ["rows"]))
    server = serve(repository.path)
    for start in range(0, 640, 64):
        labels = list(range(start, start + 64))
        question = Question("echo", [tensor("x", "INT64", [64], labels)])
        assert WAYS["rest_binary"](server, question).status == 200
    often = Question("echo", [tensor("x", "INT64", [3], [639, 639, -5])])
    assert WAYS["rest_binary"](server, often).status == 200
    page = call(server.ops, "GET", "/metrics").body.decode()
    (family,) = [each for each in text_string_to_metric_families(page) if each.name == "tidegate_predictions"]
    shown = {sample.labels["label"]: sample.value for sample in family.samples}
    assert len(shown) == 21
    assert shown["639"] == 3
    assert sum(shown.values()) == 643
    repository.remove("echo")
    eventually(lambda: not series_of(scrape(server), model="echo"), timeout=20)
