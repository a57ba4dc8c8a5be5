"""MLflow's scoring protocol: data frames, CSV and tensors on a path for each model."""

import csv
import gzip
import io
import json

import numpy as np
import pytest

from encoders import FOLDER, check_close
from models import identity, plus
from shapes import CSV, TEXTS, answer, expected, flowers, pictures, post, refusal, same, texts
from wire import call

IRIS = "/models/iris/invocations"
WITH_CHARSET = {"Content-Type": "application/json; charset=UTF-8"}
NAMES = ["sepal length", "sepal width", "petal length", "petal width"]


def split(rows, names=NAMES):
    """What `DataFrame.to_dict("split")` gives."""
    return {"index": list(range(len(rows))), "columns": names, "data": rows}


def records(rows, names=NAMES):
    return [dict(zip(names, row, strict=True)) for row in rows]


def as_csv(rows, names=NAMES, **dialect):
    out = io.StringIO()
    writer = csv.writer(out, **dialect)
    writer.writerows([names, *rows])
    return out.getvalue()


def is_right(predictions, right):
    """A list with a record for each row."""
    labels = [row["label"] for row in predictions] == right["label"].tolist()
    return labels and same([row["probabilities"] for row in predictions], right["probabilities"])


# --- tables -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (lambda rows: {"dataframe_split": split(rows)}, WITH_CHARSET),
        (lambda rows: {"dataframe_split": {"data": rows}, "params": None}, {}),
        (lambda rows: {"dataframe_records": records(rows), "params": {"top_k": [3]}}, {}),
        (as_csv, CSV),
        (lambda rows: as_csv(rows, quoting=csv.QUOTE_ALL, lineterminator="\n"), CSV),
    ],
    ids=["split", "unnamed", "records", "csv", "quoted csv"],
)
@pytest.mark.parametrize("path", [IRIS, "/models/iris/versions/1/invocations"])
def test_columns_are_the_rows_of_a_matrix(server, path, body, headers):
    rows = flowers()
    reply = answer(server, path, body(rows.tolist()), headers)
    assert list(reply) == ["predictions"]
    assert is_right(reply["predictions"], expected("iris", X=rows))


def test_columns_of_a_models_names(server):
    """Whatever their order, and passing over the rest."""
    rows = [["passed over", t, 0] for t in TEXTS]
    for body, headers in [
        ({"dataframe_split": split(rows, ["note", "text", "n"])}, {}),
        ({"dataframe_records": records(rows, ["note", "text", "n"])}, {}),
        (as_csv(rows, ["note", "text", "n"]), CSV),
    ]:
        predictions = answer(server, "/models/language/invocations", body, headers)["predictions"]
        right = expected("language", text=texts())
        assert [row["language"] for row in predictions] == right["language"].tolist()
        assert same([row["probabilities"] for row in predictions], right["probabilities"])


def test_fields_with_commas_quotes_and_lines(server):
    """y = x for texts of shape [rows, columns]; a byte order mark is no part of a name."""
    words = ['a, "b"', "two\nlines", "", "007", "ü"]
    body = "\ufeff" + as_csv([[word] for word in words], ["x"], quoting=csv.QUOTE_ALL)
    path = "/models/identity_bytes/invocations"
    assert answer(server, path, body, CSV)["predictions"] == [[word] for word in words]


def test_cells_that_are_lists(server):
    rows = [[image] for image in pictures().tolist()]
    body = {"dataframe_split": split(rows, ["image"])}
    reply = answer(server, "/models/digits/invocations", body)
    assert same(reply["predictions"], expected("digits", image=pictures())["logits"])
    columns = {"a": [1, 2, 3, 4], "b": [4, 3, 2, 1]}
    reply = answer(server, "/models/simple/invocations", {"dataframe_records": [columns]})
    assert reply["predictions"] == [{"sum": [5, 5, 5, 5], "difference": [-3, -1, 1, 3]}]


def test_missing_values_are_no_numbers(server):
    path = "/models/identity_fp32/invocations"
    for body, headers in [
        ({"dataframe_split": split([[1, None], [None, 2]], ["p", "q"])}, {}),
        ({"dataframe_records": records([[1, None], [None, 2]], ["p", "q"])}, {}),
        ("p,q\n1,\nNaN,2\n", CSV),
    ]:
        got = answer(server, path, body, headers)["predictions"]
        nan = float("nan")
        assert np.array_equal(got, [[1, nan], [nan, 2]], equal_nan=True)


def test_an_empty_table(server):
    assert answer(server, "/models/plus/invocations", "x\n", CSV)["predictions"] == []


def test_texts_of_encoders(serve, repository):
    """A column of texts is enough, whatever else the model takes; pairs are two columns."""
    names = ("bert-mean", "bert-classification", "bert-reranker")
    cases = {}
    for name in names:
        repository.copy(name, FOLDER / name, settings="")
        cases[name] = json.loads((FOLDER / name / "expected.json").read_text())["cases"]
    server = serve(repository.path)

    def ask(name, body, headers=None):
        return answer(server, f"/models/{name}/invocations", body, headers or {})["predictions"]

    embedded = cases["bert-mean"]
    rows = [[case["text"]] for case in embedded]
    wanted = [case["embedding"] for case in embedded]
    for body, headers in [
        ({"dataframe_split": split(rows, ["text"])}, {}),
        ({"dataframe_records": records(rows, ["text"])}, {}),
        ({"dataframe_split": split(rows, ["document"])}, {}),
        (as_csv(rows, ["text"], quoting=csv.QUOTE_ALL), CSV),
    ]:
        check_close(ask("bert-mean", body, headers), wanted)
    ids = {"input_ids": embedded[0]["input_ids"]}
    check_close(ask("bert-mean", {"dataframe_records": [ids]}), wanted[:1])

    classified = cases["bert-classification"]
    rows = [[case["text"]] for case in classified]
    predictions = ask("bert-classification", {"dataframe_split": split(rows, ["text"])})
    assert [each["label"] for each in predictions] == [case["label"] for case in classified]
    check_close([each["scores"] for each in predictions], [case["scores"] for case in classified])

    ranked = cases["bert-reranker"]
    pairs = [case["pair"] for case in ranked]
    scores = [case["rerank_score"] for case in ranked]
    body = {"dataframe_split": split(pairs, ["query", "passage"])}
    check_close(ask("bert-reranker", body), scores)
    body = {"dataframe_split": split([[pair] for pair in pairs], ["text"])}
    check_close(ask("bert-reranker", body), scores)
    status, message = refusal(
        server, "/models/bert-mean/invocations", {"dataframe_split": split(pairs, ["a", "b"])}
    )
    assert status == 400
    assert "'text'" in message


# --- tensors ------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_tensors_of_several_outputs(server, key):
    rows = flowers()
    right = expected("iris", X=rows)
    predictions = answer(server, IRIS, {key: rows.tolist()})["predictions"]
    assert predictions["label"] == right["label"].tolist()
    assert same(predictions["probabilities"], right["probabilities"])


def test_tensors_of_one_output(server):
    images = pictures()
    for body in ({"inputs": {"image": images.tolist()}}, {"instances": images.tolist()}):
        reply = answer(server, "/models/digits/invocations", body)
        assert same(reply["predictions"], expected("digits", image=images)["logits"])


# --- what goes wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "body", "headers", "status", "words"),
    [
        ("nosuch", {"inputs": []}, {}, 404, ["nosuch"]),
        ("iris", {}, {}, 400, ["iris", "exactly one", "dataframe_split"]),
        ("iris", {"inputs": [], "instances": []}, {}, 400, ["iris", "exactly one"]),
        ("iris", [], {}, 400, ["iris", "object"]),
        ("iris", "{", {}, 400, ["iris", "JSON"]),
        ("iris", "a,b\n1,2\n", {}, 400, ["iris", "JSON"]),
        ("iris", "a,b\n1,2\n", CSV, 400, ["iris", "'a', 'b'", "X", "[-1, 4]"]),
        ("iris", "", CSV, 400, ["iris", "columns"]),
        ("iris", as_csv([[1, 2, 3, "four"]]), CSV, 400, ["iris", "row 0", "petal width", "four"]),
        ("iris", as_csv([[1, 2, 3, 4], [1, 2, 3]]), CSV, 400, ["iris", "row 1", "3 cells"]),
        ("iris", 'a,"b', CSV, 400, ["iris", "line 1", "quote"]),
        ("iris", b"\xff", CSV, 400, ["iris", "UTF-8"]),
        ("iris", "a", {"Content-Type": "text/csv; charset=latin-1"}, 400, ["iris", "latin-1"]),
        ("iris", {"dataframe_split": split([[1, 2, 3]])}, {}, 400, ["iris", "row 0", "3 cells"]),
        ("iris", {"dataframe_split": split([[1, 2, 3, "x"]])}, {}, 400, ["row 0", "petal width"]),
        ("iris", {"dataframe_records": [{"a": 1}, {"b": 1}]}, {}, 400, ["iris", "'a'"]),
        ("simple", {"dataframe_records": [{"a": 1}]}, {}, 400, ["simple", "no column 'b'"]),
        ("plus", {"inputs": [[1]], "params": 7}, {}, 400, ["plus", "params"]),
        ("plus", {"inputs": [[1]], "params": {"timeout": -1}}, {}, 400, ["plus", "timeout"]),
        ("identity_int8", "x\n128\n", CSV, 400, ["row 0", "'x'", "-128 to 127", "128"]),
        ("identity_int8", "x,y\n,1\n", CSV, 400, ["row 0", "'x'", "got ''"]),
    ],
)
def test_refusals(server, model, body, headers, status, words):
    got, message = refusal(server, f"/models/{model}/invocations", body, headers)
    assert got == status, message
    for word in words:
        assert word in message, message


def test_compression_and_limits(serve, repository):
    repository.add("identity", identity("FP32"))
    server = serve(repository.path, config="[limits]\nmax_message_bytes = 100000\n")
    path = "/models/identity/invocations"
    table = as_csv([["0.5"] * 100] * 200, list(range(100)))
    reply = post(server, path, gzip.compress(table.encode()), CSV | {"Content-Encoding": "gzip"})
    assert (reply.status, reply.headers["content-encoding"]) == (200, "gzip")
    assert reply.json()["predictions"] == [[0.5] * 100] * 200
    plain = post(server, path, {"inputs": [[0.5] * 5000]}, {"Accept-Encoding": "gzip"})
    assert plain.headers["content-encoding"] == "gzip"
    bomb = gzip.compress(b"0" * 200_000)
    assert refusal(server, path, bomb, CSV | {"Content-Encoding": "gzip"})[0] == 413
    assert refusal(server, path, "x\n", CSV | {"Content-Encoding": "br"})[0] == 415


def test_a_timeout_in_params(server):
    """A microsecond is over before the request is read."""
    body = {"inputs": [[1]], "params": {"timeout": 1}}
    got, message = refusal(server, "/models/plus/invocations", body)
    assert got == 504, message


# --- a server of one model ----------------------------------------------------------


def test_the_only_model(serve, repository):
    repository.add("plus", plus(1))
    server = serve(repository.path)
    assert answer(server, "/invocations", {"inputs": [[1]]})["predictions"] == [[2]]
    assert answer(server, "/invocations", "x\n3\n", CSV)["predictions"] == [[4]]
    assert refusal(server, "/invocations", "{")[0] == 400


def test_no_model_and_several(server, serve, repository):
    status, message = refusal(server, "/invocations", {"inputs": [[1]]})
    assert status == 400
    assert "/models/digits/invocations" in message
    assert " more" in message
    empty = serve(repository.path)
    assert refusal(empty, "/invocations", {"inputs": [[1]]})[0] == 404


@pytest.mark.parametrize("path", ["/ping", "/health"])
def test_probes(server, path):
    reply = call(server.rest, "GET", path)
    assert (reply.status, reply.body) == (200, b"")


def test_the_payload_of_a_client(server):
    """What MLflow's own client writes: a data frame's `to_json`, and the reply's first key."""
    body = json.dumps({"dataframe_split": split(flowers(2).tolist())}, separators=(",", ":"))
    reply = post(server, IRIS, body, {"Content-Type": "application/json", "Accept": "*/*"})
    assert next(iter(reply.json())) == "predictions"
