"""The description of the operators' port: a validator reads it, and the port keeps to it."""

import json

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from models import plus
from wire import call

MODEL = "/admin/v1/models/{model}"

# What answers GET with 200 on a server where no rollout ever ran, and how the path is filled.
READABLE = {
    "/healthz": "/healthz",
    "/readyz": "/readyz",
    "/version": "/version",
    "/admin/openapi.json": "/admin/openapi.json",
    "/admin/v1/models": "/admin/v1/models",
    MODEL: "/admin/v1/models/iris",
    "/admin/v1/audit": "/admin/v1/audit?model=iris&limit=1",
    "/admin/v1/overrides": "/admin/v1/overrides",
    "/admin/v1/sources": "/admin/v1/sources",
    f"{MODEL}/versions/{{version}}": "/admin/v1/models/iris/versions/1",
}


@pytest.fixture(scope="module")
def document(server):
    return call(server.ops, "GET", "/admin/openapi.json").json()


def check(document, schema, value):
    """`value` is what `schema`, a part of `document`, says."""
    # References are to the document's own root.
    Draft202012Validator(schema | {"components": document["components"]}).validate(value)


def answer(document, path, method, status):
    responses = document["paths"][path][method]["responses"]
    return responses[str(status)]["content"]["application/json"]["schema"]


def test_it_is_valid(document):
    assert document["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(document).validate()


def test_a_broken_one_would_not_be_valid(document):
    broken = json.loads(json.dumps(document))
    del broken["paths"]["/healthz"]["get"]["responses"]["200"]["description"]
    assert list(OpenAPIV31SpecValidator(broken).iter_errors())


def test_every_operation_has_a_name_of_its_own(document):
    names = [each["operationId"] for path in document["paths"].values() for each in path.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", READABLE)
def test_answers_are_as_described(server, document, path):
    reply = call(server.ops, "GET", READABLE[path])
    assert reply.status == 200
    check(document, answer(document, path, "get", 200), reply.json())


def test_what_is_read_but_not_listed_here_fails_or_is_no_json(document):
    others = {path for path, methods in document["paths"].items() if "get" in methods} - set(READABLE)
    assert others == {"/metrics", f"{MODEL}/rollout"}


def test_metrics_are_a_text(server, document):
    described = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert list(described) == [call(server.ops, "GET", "/metrics").headers["content-type"]]


@pytest.mark.parametrize(
    "method, path, filled, status",
    [
        ("GET", f"{MODEL}/rollout", "/admin/v1/models/iris/rollout", 404),
        ("POST", f"{MODEL}/rollout", "/admin/v1/models/iris/rollout", 400),
        ("POST", f"{MODEL}/rollout/{{command}}", "/admin/v1/models/iris/rollout/pause", 404),
        ("PUT", f"{MODEL}/route", "/admin/v1/models/nosuch/route", 404),
        ("GET", "/admin/v1/audit", "/admin/v1/audit?limit=0", 400),
    ],
)
def test_refusals_are_as_described(server, document, method, path, filled, status):
    reply = call(server.ops, method, filled, b"{}" if method != "GET" else None)
    assert reply.status == status, reply.body
    check(document, answer(document, path, method.lower(), status), reply.json())


def test_what_starts_a_rollout_is_described(document):
    body = document["paths"][f"{MODEL}/rollout"]["post"]["requestBody"]["content"]
    schema = body["application/json"]["schema"] | {"components": document["components"]}
    takes = Draft202012Validator(schema).is_valid
    assert takes({"to": "2", "steps": [10, 100], "every": "1m", "margins": {"errors": 0.1}})
    assert takes({"to": "2", "author": "ada", "reason": "better", "sticky": "header:x-user"})
    assert not takes({"steps": [10, 100]})
    assert not takes({"to": "2", "stepps": [10, 100]})
    assert not takes({"to": "2", "on_inconclusive": "wait"})


def test_a_rollout_is_as_described(repository, serve, document):
    """Started over HTTP as the description has it, and told step by step."""
    repository.add("plus", plus(1), settings='[rollout]\non_new_version = "hold"\n')
    repository.add("plus", plus(1), version="2")
    server = serve(repository.path)
    path = "/admin/v1/models/plus"
    stable = call(server.ops, "GET", path).json()["default_version"]
    other = {"1": "2", "2": "1"}[stable]
    start = {"to": other, "steps": [10, 100], "every": "1h"}
    reply = call(server.ops, "POST", f"{path}/rollout", json.dumps(start).encode())
    assert reply.status == 200, reply.body
    check(document, answer(document, f"{MODEL}/rollout", "post", 200), reply.json())
    stale = call(server.ops, "POST", f"{path}/rollout/abort", headers={"if-match": '"0"'})
    assert stale.status == 409
    check(document, answer(document, f"{MODEL}/rollout/{{command}}", "post", 409), stale.json())
    seen = call(server.ops, "GET", f"{path}/rollout")
    check(document, answer(document, f"{MODEL}/rollout", "get", 200), seen.json())
    aborted = call(server.ops, "POST", f"{path}/rollout/abort")
    assert (aborted.status, aborted.json()["phase"]) == (200, "aborted")
    check(document, answer(document, f"{MODEL}/rollout/{{command}}", "post", 200), aborted.json())
    split = {"canary": {"version": other, "percent": 5}}
    routed = call(server.ops, "PUT", f"{path}/route", json.dumps(split).encode())
    check(document, answer(document, f"{MODEL}/route", "put", 200), routed.json())
    for listed in ("overrides", "audit"):
        reply = call(server.ops, "GET", f"/admin/v1/{listed}")
        check(document, answer(document, f"/admin/v1/{listed}", "get", 200), reply.json())
