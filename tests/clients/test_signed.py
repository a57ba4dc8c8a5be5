"""Signed models: what the signing tool of OpenSSF signs is served, what it would refuse is not."""

import json
import re

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hub_server import Hub
from mirrored import CONFIG, SOON, answers, graph
from models import EXTERNAL_WEIGHTS, save, with_external_data
from registry import Registry
from server import Server, eventually, run
from signing import Certified, Signer, details, keys, only, policy
from test_buckets import bucket  # noqa: F401
from wire import call


def signed(repository, signer, version, number, model="plus", more=None, then=lambda _: None):
    """Adds a version that is signed, with `more` files; `then` does something to it after that."""

    def write(folder):
        save(graph(number), folder / "model.onnx")
        for path, content in (more or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        signer.sign(folder)
        then(folder)

    return repository.put(model, version, "", write)


def has_failed(server, version, model="plus"):
    """What is known of a version that has failed."""

    def probe():
        found = details(server, version, model)
        return found if found and found["state"] == "failed" else None

    return eventually(probe, SOON)


def checks(server, version, outcome, model="plus"):
    """How many looks at a signature had this outcome."""
    page = call(server.ops, "GET", "/metrics").body.decode()
    labels = f'{{model="{model}",version="{version}",outcome="{outcome}"}}'
    series = rf"^tidegate_signature_checks_total{re.escape(labels)} (\S+)$"
    found = re.search(series, page, re.MULTILINE)
    return float(found[1]) if found else 0


@pytest.fixture
def ada(tmp_path):
    return Signer(tmp_path)


def test_what_is_signed_by_a_trusted_key_is_served(repository, serve, ada):
    folder = signed(
        repository, ada, "1", 1, more={".gitignore": b"*.tmp\n", "notes/read.md": b"hello"}
    )
    assert ada.accepts(folder)
    server = serve(repository.path, config=policy("enforce", keys=keys(ada)))
    assert answers(server) == 2
    shown = details(server, "1")["signed"]
    assert (shown["state"], shown["policy"], shown["method"]) == ("verified", "enforce", "key")
    assert shown["key"] in (folder / "model.sig").read_text()
    assert shown["reason"] is None
    assert shown["identity"] is None
    listed = run("models", "show", "plus", "--ops", server.ops, home=server.home).stdout
    assert f"signed       verified by key {shown['key']}\n" in listed
    assert checks(server, "1", "verified") == 1
    assert server.stop() == 0


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1])
def test_every_curve_of_the_tool_is_known(repository, serve, tmp_path, curve):
    signer = Signer(tmp_path, curve=curve)
    assert signer.accepts(signed(repository, signer, "1", 1))
    assert answers(serve(repository.path, config=policy("enforce", keys=keys(signer)))) == 2


def change_weights(folder):
    save(graph(666), folder / "model.onnx")


def change_payload(folder):
    """Has the signature name the file that is there, under the signature over another payload."""
    text = (folder / "model.sig").read_text()
    bundle = json.loads(text)
    payload = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = payload[:-8] + ("A" * 4) + payload[-4:]
    (folder / "model.sig").write_text(json.dumps(bundle))


def link(folder):
    elsewhere = folder.parents[3] / "elsewhere.onnx"
    (folder / "model.onnx").rename(elsewhere)
    (folder / "model.onnx").symlink_to(elsewhere)


SPOILED = {
    "changed": (change_weights, "file 'model.onnx' is not what was signed: expected sha256:"),
    "extra": (
        lambda folder: (folder / "extra.json").write_text("{}"),
        "file 'extra.json' is not among the files that were signed",
    ),
    "missing": (
        lambda folder: (folder / "labels.txt").unlink(),
        "file 'labels.txt' was signed and is missing",
    ),
    "tampered": (
        change_payload,
        "the signature over its payload is not of the key that is trusted",
    ),
    "linked": (link, "file 'model.onnx' is a symlink; expected a file"),
    "garbage": (
        lambda folder: (folder / "model.sig").write_text("garbage"),
        "it is no Sigstore bundle in JSON",
    ),
}


def test_what_was_changed_is_refused_and_what_runs_stays(repository, serve, ada):
    signed(repository, ada, "1", 1)
    server = serve(repository.path, config=policy("enforce", keys=keys(ada)))
    assert answers(server) == 2
    for version, (how, (spoil, reason)) in enumerate(SPOILED.items(), start=2):
        folder = signed(repository, ada, str(version), 10, more={"labels.txt": b"a\n"}, then=spoil)
        assert not ada.accepts(folder), how
        failed = has_failed(server, version)
        begin = f"model 'plus' version '{version}' is refused: model.sig: "
        assert failed["reason"].startswith(begin + reason), failed["reason"]
        assert failed["signed"]["state"] == "refused"
        assert failed["signed"]["method"] is None
        assert begin + failed["signed"]["reason"] == failed["reason"]
        assert answers(server) == 2
        assert checks(server, version, "refused") == 1
    # Signed anew, it is what was signed.
    folder = repository.path / "plus" / "2"
    ada.sign(folder)
    assert ada.accepts(folder)
    eventually(lambda: answers(server) == 667, SOON)


def test_signatures_of_others_are_refused(repository, serve, ada, tmp_path):
    eve = Signer(tmp_path, "eve")
    folder = signed(repository, eve, "1", 1)
    assert eve.accepts(folder)
    assert not ada.accepts(folder)
    server = serve(repository.path, config=policy("enforce", keys=keys(ada)))
    assert "it is signed with the key" in has_failed(server, "1")["reason"]
    assert answers(server) is None
    # Of other models they are taken.
    config = '[signatures]\npolicy = "enforce"\n'
    for models, signer in (("team-*", ada), ("*", eve)):
        config += (
            f'[[signatures.trusted]]\nmodels = "{models}"\nkeys = {json.dumps(keys(signer))}\n'
        )
    signed(repository, eve, "1", 1, model="team-a")
    server = serve(repository.path, "other", config=config)
    assert answers(server) == 2
    assert has_failed(server, "1", "team-a")


def test_without_a_signature_it_depends_on_the_policy(repository, serve, ada):
    repository.add("plus", graph(1))
    warned = serve(repository.path, "warned", config=policy("warn", keys=keys(ada)))
    assert answers(warned) == 2
    reason = "there is none; expected the file model.sig in the version's folder"
    shown = details(warned, "1")["signed"]
    assert (shown["state"], shown["policy"], shown["reason"]) == ("unsigned", "warn", reason)
    assert f"model.sig: {reason}" in warned.log()
    (version,) = json.loads(call(warned.ops, "GET", "/admin/v1/models/plus").body)["versions"]
    assert f"model.sig: {reason}" in version["notes"]
    assert checks(warned, "1", "unsigned") == 1

    enforced = serve(repository.path, "enforced", config=policy("enforce", keys=keys(ada)))
    assert reason in has_failed(enforced, "1")["reason"]
    assert details(enforced, "1")["signed"]["state"] == "unsigned"
    assert answers(enforced) is None

    # Nobody is trusted for it.
    config = policy("enforce", keys=keys(ada), models="team-*")
    stranger = serve(repository.path, "stranger", config=config)
    assert "no entry of signatures.trusted fits this model" in has_failed(stranger, "1")["reason"]

    off = serve(repository.path, "off", config=policy("off", keys=keys(ada)))
    assert answers(off) == 2
    assert details(off, "1")["signed"] is None
    assert "tidegate_signature_checks_total{" not in call(off.ops, "GET", "/metrics").body.decode()


def test_what_is_refused_is_served_with_a_warning_where_that_is_the_policy(repository, serve, ada):
    signed(repository, ada, "1", 1, then=change_weights)
    server = serve(repository.path, config=policy("warn", keys=keys(ada)))
    assert answers(server) == 667
    shown = details(server, "1")["signed"]
    assert shown["state"] == "refused"
    assert "file 'model.onnx' is not what was signed" in shown["reason"]


def test_weights_beside_the_graph_are_covered(repository, serve, ada):
    def write(folder):
        save(with_external_data("weights.bin"), folder / "model.onnx")
        (folder / "weights.bin").write_bytes(EXTERNAL_WEIGHTS.tobytes())
        ada.sign(folder)

    folder = repository.put("heavy", "1", "", write)
    server = serve(repository.path, config=policy("enforce", keys=keys(ada)))
    assert details(server, "1", "heavy")["signed"]["state"] == "verified"
    changed = bytearray(EXTERNAL_WEIGHTS.tobytes())
    changed[0] ^= 1
    (folder / "weights.bin").write_bytes(changed)

    def is_refused():
        reason = details(server, "1", "heavy")["reason"]
        return "file 'weights.bin' is not what was signed" in reason

    eventually(is_refused, SOON)
    # What runs are the files that were verified.
    assert details(server, "1", "heavy")["state"] == "ready"
    assert details(server, "1", "heavy")["signed"]["state"] == "verified"


def test_a_chain_of_certificates_is_verified_up_to_a_trusted_root(repository, serve, tmp_path, ada):
    certified = Certified(tmp_path)
    folder = signed(repository, certified, "1", 1)
    assert certified.accepts(folder)
    trusted = {"certificates": [str(certified.root)]}
    server = serve(repository.path, config=policy("enforce", identity="ada@example.org", **trusted))
    assert answers(server) == 2
    shown = details(server, "1")["signed"]
    assert (shown["method"], shown["identity"]) == ("certificate", "ada@example.org, ada")
    changed = signed(repository, certified, "2", 10, then=change_weights)
    assert not certified.accepts(changed)
    assert "file 'model.onnx' is not what was signed" in has_failed(server, "2")["reason"]

    (tmp_path / "other").mkdir()
    other = Certified(tmp_path / "other")
    assert not other.accepts(folder)
    for name, expected, config in [
        (
            "root",
            "not signed with the key of the authority",
            policy("enforce", certificates=[str(other.root)]),
        ),
        ("key", "no certificates are trusted", policy("enforce", keys=keys(ada))),
        (
            "identity",
            "expected 'eve@example.org'",
            policy("enforce", identity="eve@example.org", **trusted),
        ),
    ]:
        refusing = serve(repository.path, name, config=config)
        assert expected in has_failed(refusing, "1")["reason"]


def test_a_certificate_that_has_expired_counts_no_longer(repository, serve, tmp_path):
    """The tool takes the first moment of the signer's certificate for that of the signature."""
    certified = Certified(tmp_path, since=20, until=-10)
    assert certified.accepts(signed(repository, certified, "1", 1))
    server = serve(repository.path, config=policy("enforce", certificates=[str(certified.root)]))
    assert "a certificate of its chain has expired on" in has_failed(server, "1")["reason"]


def test_keys_that_cannot_be_read_keep_the_server_from_starting(repository, tmp_path, ada):
    for file, expected in [
        (str(tmp_path / "gone.pem"), "gone.pem: No such file"),
        (str(ada.private), "ada.key: it holds a private key"),
    ]:
        with pytest.raises(AssertionError, match=expected):
            Server(repository.path, tmp_path / "server", config=policy("enforce", keys=[file]))


def test_mirrored_versions_are_verified_too(bucket, serve, ada, tmp_path):  # noqa: F811
    def put(version, number, then=lambda _: None):
        folder = tmp_path / version
        folder.mkdir()
        save(graph(number), folder / "model.onnx")
        ada.sign(folder)
        then(folder)
        for file in sorted(folder.iterdir()):
            bucket.put(f"plus/{version}/{file.name}", file.read_bytes())
        return folder

    put("1", 1)
    server = serve("s3://models", config=CONFIG + policy("enforce", keys=keys(ada)))
    assert answers(server) == 2
    assert details(server, "1")["signed"]["state"] == "verified"
    assert not ada.accepts(put("2", 10, change_weights))
    failed = has_failed(server, "2")
    assert "file 'model.onnx' is not what was signed" in failed["reason"]
    assert answers(server) == 2
    put("3", 20)
    eventually(lambda: answers(server) == 21, SOON)


def packed(ada, folder, files):
    """The content of a signed folder, by path."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    ada.sign(folder)
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# What is not fetched of them would not be opened either.
LEFT_OUT = {"train.py": b"import os", "weights.pkl": b"x", "config.json": b"{}", "README.md": b"#"}


def test_a_repository_of_a_hub_is_verified_unless_its_files_are_moved(
    serve, ada, tmp_path, monkeypatch
):
    hub = Hub()
    try:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        files = {"model.onnx": graph(1), ".gitattributes": b"*.onnx filter=lfs\n"} | LEFT_OUT
        hub.commit("org/plus", packed(ada, tmp_path / "kept", files))
        config = CONFIG + policy("enforce", keys=keys(ada))
        server = serve("hf://org/plus", config=config)
        assert answers(server) == 2
        assert only(server)["signed"]["state"] == "verified"

        moved = {"onnx/model.onnx": graph(1)} | LEFT_OUT
        hub.commit("org/moved", packed(ada, tmp_path / "moved", moved))
        server = serve("hf://org/moved", "other", config=config)
        reason = only(server, "moved")["reason"]
        assert "file 'model.onnx' is not among the files that were signed" in reason
    finally:
        hub.close()


def test_a_packed_model_is_verified(serve, ada, tmp_path):
    registry = Registry(tmp_path / "registry")
    try:
        files = packed(ada, tmp_path / "packed", {"model.onnx": graph(1)} | LEFT_OUT)
        registry.model_pack("signed/plus", "v1", files)
        config = CONFIG + policy("enforce", keys=keys(ada))
        server = serve(f"oci://{registry.host}/signed/plus:v1", config=config)
        assert answers(server) == 2
        assert only(server)["signed"]["state"] == "verified"
    finally:
        registry.close()
