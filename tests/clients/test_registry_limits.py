"""Places of models at their limits: thousands of versions, a login that ends, a full disk, a server that breaks off."""

import json
import socket
import subprocess
import time

import boto3
import pytest
from mirrored import CONFIG, SOON, answers, log_has, memory, versions
from models import plus
from moto.iam.models import iam_backends
from moto.s3.models import s3_backends
from server import eventually
from test_buckets import Bucket
from test_mlflow import bucket_settings
from test_web import LARGE, MOST_MEMORY, PART, Nginx
from wire import call

# For those who wait for a place to come back.
IMPATIENT = CONFIG + 'max_interval = "1s"\n'
KEYS = 3_500
# What looking at many versions may leave behind: the heap breathes.
MOST_GROWTH = 24 << 20
GIGABYTE = 1 << 30


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket()
    for name, setting in bucket_settings(bucket).items():
        monkeypatch.setenv(name, setting)
    bucket.open()
    yield bucket
    bucket.close()


@pytest.fixture
def nginx(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Nginx(tmp_path_factory.mktemp("nginx"), port)
    yield server
    server.stop()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MiB, and what changes that."""
    place = tmp_path / "disk"
    place.mkdir()
    made = mount("-t", "tmpfs", "-o", "size=32m", "tmpfs", place)
    if made.returncode:
        pytest.skip(f"a small file system is to be mounted, which is not permitted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True, timeout=10)


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=10)


def states(server):
    """What the server says of the places that it follows."""
    return json.loads(call(server.ops, "GET", "/admin/v1/sources").body)


def away(server):
    """Why the one place does not answer."""
    (state,) = states(server)
    return state["error"] if state["away_since"] else None


def problem(server):
    """Why a version of the one place is not mirrored."""
    (state,) = states(server)
    return next((problem["error"] for problem in state["problems"]), None)


def test_a_policy_that_ends_takes_nothing_away(bucket, serve, monkeypatch):
    """A key of a bucket may read it, then no longer, then it may again; then there is no such key."""
    bucket.put("plus/1/model.onnx", plus(1))
    users = boto3.client("iam", endpoint_url=bucket.endpoint)
    users.create_user(UserName="bob")
    key = users.create_access_key(UserName="bob")["AccessKey"]
    allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    permit = {"UserName": "bob", "PolicyName": "reads", "PolicyDocument": policy}
    users.put_user_policy(**permit)
    held = iam_backends["123456789012"]["aws"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    # From now on moto asks who calls, and whether he may.
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    server = serve("s3://models", config=IMPATIENT)
    assert answers(server) == 2

    held.delete_user_policy("bob", "reads")
    error = eventually(lambda: away(server), SOON)
    assert error == "s3://models refuses: 403 Forbidden: AccessDenied: Access Denied"
    put_beside(bucket, {"plus/2/model.onnx": plus(10).SerializeToString()})
    time.sleep(3)
    assert (answers(server), versions(server)) == (2, ["1"])
    held.put_user_policy("bob", "reads", policy)
    eventually(lambda: answers(server) == 11, SOON)
    assert away(server) is None

    held.delete_access_key(key["AccessKeyId"], "bob")
    error = eventually(lambda: away(server), SOON)
    assert "s3://models refuses: 403 Forbidden: InvalidAccessKeyId: " in error
    assert answers(server) == 11
    assert key["SecretAccessKey"] not in server.log()
    assert server.stop() == 0


def put_beside(bucket, contents):
    """Past the wire: the API writes some hundred keys a second, and asks who calls."""
    store = s3_backends["123456789012"]["aws"]
    for key, content in contents.items():
        store.put_object("models", key, content)


def test_a_bucket_of_thousands_of_versions(bucket, serve):
    first, last = (plus(number).SerializeToString() for number in (1, 10))
    put_beside(bucket, {f"plus/{number}/model.onnx": first for number in range(1, KEYS)})
    put_beside(bucket, {f"plus/{KEYS}/model.onnx": last})
    begun = time.monotonic()
    server = serve("s3://models", config=CONFIG)
    print(f"ready after {time.monotonic() - begun:.1f} s")
    assert (answers(server), versions(server)) == (11, [str(KEYS)])
    idle = memory(server)
    put_beside(bucket, {f"plus/{KEYS + 1}/model.onnx": plus(20).SerializeToString()})
    eventually(lambda: answers(server) == 21, SOON)
    eventually(lambda: versions(server) == [str(KEYS + 1)], SOON)
    # What is selected is fetched, and nothing else.
    assert len({path for path, _ in bucket.reads}) == 2
    print(f"memory grew from {idle >> 20} by {memory(server) - idle >> 10} KiB")
    assert memory(server) - idle < MOST_GROWTH
    assert server.stop() == 0


def test_a_full_disk_keeps_what_runs_until_there_is_room(nginx, small_disk, serve):
    nginx.put("plus/1/model.onnx", plus(1))
    server = serve(f"http://{nginx.address}/", config=IMPATIENT, flags=["--cache", small_disk / "cache"])
    assert answers(server) == 2
    nginx.put_zeros("plus/2/weights.data", 64 << 20)
    nginx.put("plus/2/model.onnx", plus(10))
    is_full = "the disk of the cache is full"
    assert is_full in eventually(lambda: problem(server), SOON)
    assert log_has(server, "not mirrored", is_full, "No space left on device")
    assert (answers(server), versions(server)) == (2, ["1"])
    # What did not fit takes nothing away from what does.
    assert sum(file.stat().st_blocks for file in small_disk.rglob("*") if file.is_file()) * 512 < 1 << 20
    mount("-o", "remount,size=128m", small_disk).check_returncode()
    eventually(lambda: answers(server) == 11, SOON)
    assert problem(server) is None

    # To the last byte, so that not even a file of hundred bytes has a place.
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    nginx.put("plus/3/model.onnx", plus(20))
    assert is_full in eventually(lambda: problem(server), SOON)
    assert (answers(server), versions(server)) == (11, ["2"])
    filler.unlink()
    eventually(lambda: answers(server) == 21, SOON)
    assert problem(server) is None
    assert server.stop() == 0


def test_a_place_that_breaks_off_is_gone_on_with(nginx, serve):
    """The web server ends in the middle of a file, and comes back a while later."""
    nginx.put("slow/plus/1/model.onnx", plus(1))
    server = serve(f"http://{nginx.address}/slow", config=IMPATIENT, flags=["--cache", "cache"])
    assert answers(server) == 2
    large = "slow/plus/2/weights.data"
    nginx.put_zeros(large, LARGE)
    nginx.put("slow/plus/2/model.onnx", plus(10))

    def parts():
        """Those that are there, of the file that is on its way."""
        lists = list((server.home / "cache" / "partial").glob("*.parts"))
        return lists[0].read_text().splitlines()[1:] if lists else []

    eventually(lambda: len(parts()) >= 4, SOON)
    nginx.stop()
    eventually(lambda: log_has(server, "not mirrored", "does not answer") and away(server), SOON)
    there = len(parts())
    assert answers(server) == 2
    assert 4 <= there < LARGE // PART
    before = nginx.sent(large)
    nginx.start()
    eventually(lambda: answers(server) == 11, SOON)
    after = nginx.sent(large) - before
    print(f"{there} of {LARGE // PART} parts before, {after / PART:.1f} parts after")
    assert after == LARGE - there * PART
    assert away(server) is None and problem(server) is None
    assert server.stop() == 0


def test_two_gigabytes_take_little_memory(nginx, serve):
    nginx.put("plus/1/model.onnx", plus(1))
    server = serve(f"http://{nginx.address}/", config=CONFIG, flags=["--cache", "cache"])
    assert answers(server) == 2
    idle = most = memory(server)
    nginx.put_zeros("plus/2/weights.data", 2 * GIGABYTE)
    nginx.put("plus/2/model.onnx", plus(10))
    begun = time.monotonic()

    def came():
        nonlocal most
        most = max(most, memory(server))
        return answers(server) == 11

    eventually(came, 2 * SOON)
    print(f"{time.monotonic() - begun:.1f} s, at most {most - idle >> 20} MiB above {idle >> 20} MiB")
    assert most - idle < MOST_MEMORY
    assert server.stop() == 0
