"""System shared memory, with the stock client's utilities: names on the wire, the same answers."""

import json
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor

from clients import GRPC, HTTP, Client
from infer import Question, ask, grpc_raw
from models import Repository, identity, sum_and_difference
from server import Server
from tensors import described, tensor
from test_metrics import scrape, value
from wire import CODES, CountingProxy, call

ENABLED = "[shared_memory]\nenabled = true\nmax_regions = 4\nmax_bytes = 8_000_000\n"
PICTURE = np.random.default_rng(4).standard_normal((1, 3, 224, 224), dtype=np.float32)
TEXTS = np.array([[b"tide", b"", "größer".encode()]], dtype=np.object_)
A = np.arange(8, dtype=np.int32).reshape(2, 4)
B = np.full((2, 4), 100, dtype=np.int32)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("memory")
    repository = Repository(home / "models")
    repository.add("picture", identity("FP32", ["rows", 3, 224, 224]))
    repository.add("numbers", identity("FP32"))
    repository.add("texts", identity("BYTES"))
    repository.add("simple", sum_and_difference())
    with Server(repository.path, home, ENABLED) as running:
        yield running
        assert running.stop() == 0, running.tail()


@pytest.fixture(params=[HTTP, GRPC], ids=["http", "grpc"])
def kit(request):
    return request.param


@pytest.fixture
def client(kit, server):
    with kit.connect(server) as client:
        yield client
        client.raw.unregister_system_shared_memory()


class Memory:
    """One object of shared memory, registered as the region `name`."""

    def __init__(self, client, name, byte_size, register=True):
        self.client, self.name, self.key = client, name, f"/tidegate-{os.getpid()}-{name}"
        self.handle = shm.create_shared_memory_region(name, self.key, byte_size, create_only=True)
        if register:
            client.raw.register_system_shared_memory(name, self.key, byte_size)

    def put(self, array, offset=0):
        """Its bytes, as the stock utilities write them; how many."""
        if array.dtype == np.object_:
            array = serialize_byte_tensor(array)
            shm.set_shared_memory_region(self.handle, [array], offset)
            return len(array.item())
        shm.set_shared_memory_region(self.handle, [array], offset)
        return array.nbytes

    def get(self, dtype, shape, offset=0):
        return np.array(shm.get_contents_as_numpy(self.handle, dtype, shape, offset))

    def shrink(self, byte_size):
        os.truncate(f"/dev/shm{self.key}", byte_size)


@contextmanager
def memory(client, name, byte_size, **options):
    held = Memory(client, name, byte_size, **options)
    try:
        yield held
    finally:
        shm.destroy_shared_memory_region(held.handle)


def placed_input(client, name, array, region, byte_size, offset=0):
    made = client.kit.package.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_shared_memory(region, byte_size, offset)
    return made


def placed_output(client, name, region, byte_size, offset=0):
    made = client.kit.package.InferRequestedOutput(name)
    made.set_shared_memory(region, byte_size, offset)
    return made


def parameters(client, result, name):
    output = result.get_output(name)
    if client.kit.is_http:
        return output["parameters"]
    kinds = {key: each.WhichOneof("parameter_choice") for key, each in output.parameters.items()}
    return {key: getattr(output.parameters[key], kind) for key, kind in kinds.items()}


def failure(client, code, *words):
    @contextmanager
    def expected():
        with pytest.raises(InferenceServerException) as caught:
            yield
        assert caught.value.status() == client.kit.status(code), caught.value
        for word in words:
            assert word in caught.value.message(), caught.value

    return expected()


# --- the same answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "array"), [("picture", PICTURE), ("numbers", A.astype(np.float32)), ("texts", TEXTS)]
)
def test_inputs_and_outputs_in_regions_are_what_they_are_in_messages(client, model, array):
    ordinary = client.raw.infer(model, [client.input("x", array)]).as_numpy("y")
    with memory(client, "in", 700_000) as given, memory(client, "out", 700_000) as taken:
        size = given.put(array, offset=64)
        inputs = [placed_input(client, "x", array, "in", size, 64)]
        outputs = [placed_output(client, "y", "out", 650_000, 8)]
        result = client.raw.infer(model, inputs, outputs=outputs)
        expected = {"region": "out", "offset": 8, "byte_size": size}
        expected = {f"shared_memory_{key}": value for key, value in expected.items()}
        assert parameters(client, result, "y") == expected
        shape = [int(each) for each in shape_of(result)]
        assert shape == list(array.shape)
        found = taken.get(array.dtype.type, shape, 8)
        assert found.dtype == ordinary.dtype
        if model == "texts":
            assert found.tolist() == ordinary.tolist() == array.tolist()
        else:
            assert found.tobytes() == ordinary.tobytes() == array.tobytes()
        # Around the output nothing was touched.
        buffer = bytes(taken.handle._mpsm_handle.buf)
        assert not any(buffer[:8]) and not any(buffer[8 + size :])


def shape_of(result):
    output = result.get_output("y")
    return output["shape"] if isinstance(output, dict) else output.shape


def test_some_tensors_may_lie_in_regions_and_some_be_sent(client):
    with memory(client, "in", 64) as given, memory(client, "out", 64) as taken:
        size = given.put(A)
        inputs = [placed_input(client, "a", A, "in", size), client.input("b", B)]
        outputs = [client.output("difference"), placed_output(client, "sum", "out", size)]
        result = client.raw.infer("simple", inputs, outputs=outputs)
        assert (result.as_numpy("difference") == A - B).all()
        assert (taken.get(np.int32, A.shape) == A + B).all()
        # The other input, and everything back in the message.
        inputs = [client.input("a", A), placed_input(client, "b", A, "in", size)]
        assert (client.raw.infer("simple", inputs).as_numpy("sum") == A + A).all()


def test_one_object_may_hold_everything(client):
    with memory(client, "all", 96) as held:
        held.put(A)
        held.put(B, 32)
        a = placed_input(client, "a", A, "all", 32)
        b = placed_input(client, "b", B, "all", 32, 32)
        # Over an input, which has been read when it is written.
        over = placed_output(client, "sum", "all", 32)
        behind = placed_output(client, "difference", "all", 32, 64)
        client.raw.infer("simple", [a, b], outputs=[over, behind])
        assert (held.get(np.int32, A.shape) == A + B).all()
        assert (held.get(np.int32, A.shape, 64) == A - B).all()


def test_regions_are_read_anew_for_each_request(client):
    with memory(client, "in", 32) as given, memory(client, "out", 32) as taken:
        for row in range(3):
            array = np.full((1, 8), row, dtype=np.float32)
            given.put(array)
            inputs = [placed_input(client, "x", array, "in", 32)]
            client.raw.infer("numbers", inputs, outputs=[placed_output(client, "y", "out", 32)])
            assert (taken.get(np.float32, array.shape) == array).all()


def test_many_at_once_do_not_mix(kit, server, client):
    """Each thread its own place in one region; batches are made of several."""
    with memory(client, "in", 16 * 32) as given, memory(client, "out", 16 * 32) as taken:

        def visit(number):
            array = np.full((1, 8), number, dtype=np.float32)
            with kit.connect(server) as own:
                for _ in range(20):
                    given.put(array, 32 * number)
                    inputs = [placed_input(own, "x", array, "in", 32, 32 * number)]
                    outputs = [placed_output(own, "y", "out", 32, 32 * number)]
                    own.raw.infer("numbers", inputs, outputs=outputs)
                    assert (taken.get(np.float32, (1, 8), 32 * number) == array).all()

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(visit, range(16)))


def test_streams_use_regions_too(server):
    with (
        GRPC.connect(server) as client,
        memory(client, "in", 32) as given,
        memory(client, "out", 32) as taken,
    ):
        given.put(A)
        answers = queue.Queue()
        client.raw.start_stream(lambda result, error: answers.put((result, error)))
        inputs = [placed_input(client, "a", A, "in", 32), client.input("b", B)]
        outputs = [placed_output(client, "sum", "out", 32)]
        client.raw.async_stream_infer("simple", inputs, outputs=outputs)
        result, error = answers.get(timeout=30)
        assert error is None
        assert parameters(client, result, "sum")["shared_memory_byte_size"] == 32
        assert (taken.get(np.int32, A.shape) == A + B).all()
        lost = placed_input(client, "a", A, "gone", 32)
        client.raw.async_stream_infer("simple", [lost, inputs[1]])
        _, error = answers.get(timeout=30)
        assert "input 'a'" in error.message() and "region 'gone'" in error.message()
        client.raw.stop_stream()
        client.raw.unregister_system_shared_memory()


def test_no_tensor_bytes_are_moved_over_the_wire(kit, server):
    """602 KB in and out, and less than 4 KB through the socket, registration included."""
    with CountingProxy(getattr(server, kit.port)) as proxy:
        with Client(kit, proxy.address) as client:
            size = PICTURE.nbytes
            with memory(client, "in", size) as given, memory(client, "out", size):
                given.put(PICTURE)
                inputs = [placed_input(client, "x", PICTURE, "in", size)]
                outputs = [placed_output(client, "y", "out", size)]
                client.raw.infer("picture", inputs, outputs=outputs)
                client.raw.unregister_system_shared_memory()
        assert proxy.sent + proxy.received < 4096


# --- regions -----------------------------------------------------------------------------------


def status(client, name=""):
    """name → (key, offset, byte_size) of what is registered."""
    told = client.raw.get_system_shared_memory_status(name)
    if client.kit.is_http:
        return {each["name"]: (each["key"], each["offset"], each["byte_size"]) for each in told}
    assert all(key == each.name for key, each in told.regions.items())
    return {key: (each.key, each.offset, each.byte_size) for key, each in told.regions.items()}


def test_regions_come_and_go(client, server):
    assert status(client) == {}
    with memory(client, "one", 64) as one, memory(client, "two", 128, register=False) as two:
        client.raw.register_system_shared_memory("two", two.key, 100, offset=28)
        expected = {"one": (one.key, 0, 64), "two": (two.key, 28, 100)}
        assert status(client) == expected
        assert status(client, "two") == {"two": expected["two"]}
        samples = scrape(server)
        assert value(samples, "tidegate_shared_memory_regions") == 2
        assert value(samples, "tidegate_shared_memory_bytes") == 164
        client.raw.unregister_system_shared_memory("one")
        client.raw.unregister_system_shared_memory("one")
        assert status(client) == {"two": expected["two"]}
        with failure(client, "not_found", "'one'"):
            client.raw.get_system_shared_memory_status("one")
        client.raw.unregister_system_shared_memory()
        assert status(client) == {}
        # Neither protocol has regions of its own.
        client.raw.register_system_shared_memory("one", one.key, 64)
        with GRPC.connect(server) as other:
            assert list(status(other)) == ["one"]
    # The object is its owner's; the server keeps what it has open and makes no new one.
    assert not os.path.exists(f"/dev/shm{one.key}")


def test_the_offset_of_the_region_counts(client):
    with memory(client, "in", 96, register=False) as given:
        given.put(A, 40)
        client.raw.register_system_shared_memory("in", given.key, 40, offset=32)
        inputs = [placed_input(client, "a", A, "in", 32, 8), client.input("b", B)]
        assert (client.raw.infer("simple", inputs).as_numpy("sum") == A + B).all()


def test_what_cannot_be_registered(client):
    def register(name, key, byte_size, offset=0):
        client.raw.register_system_shared_memory(name, key, byte_size, offset)

    with memory(client, "one", 64) as one:
        with failure(client, "invalid_argument", "'one'", "registered already"):
            register("one", one.key, 64)
        for size, offset in [(65, 0), (64, 1), (0, 0), (2**63, 2**63), (2**64 - 1, 1)]:
            with failure(client, "invalid_argument", "'r'"):
                register("r", one.key, size, offset)
        hostname = "/etc/hostname"
        for key in ["", "/", "/..", f"/../..{hostname}", f"/{hostname}", f"/a/../..{hostname}"]:
            with failure(client, "invalid_argument", "'r'", "key"):
                register("r", key, 1)
        with failure(client, "not_found", "/tidegate-not-there"):
            register("r", "/tidegate-not-there", 1)
        for name in ["r1", "r2", "r3"]:
            register(name, one.key, 64)
        with failure(client, "too_large", "shared_memory.max_regions"):
            register("r4", one.key, 64)
    with memory(client, "big", 9_000_000, register=False) as big:
        client.raw.unregister_system_shared_memory()
        with failure(client, "too_large", "shared_memory.max_bytes"):
            register("big", big.key, 9_000_000)
        assert status(client) == {}


# --- what can go wrong -------------------------------------------------------------------------


def test_mistakes_name_the_tensor_and_the_region(client):
    def infer(inputs, outputs=None):
        client.raw.infer("simple", inputs, outputs=outputs)

    with memory(client, "r", 64):
        sent = [client.input("a", A), client.input("b", B)]
        with failure(client, "not_found", "model 'simple'", "input 'a'", "region 'gone'"):
            infer([placed_input(client, "a", A, "gone", 32), sent[1]])
        with failure(client, "invalid_argument", "model 'simple'", "'a'", "takes 32", "is 28"):
            infer([placed_input(client, "a", A, "r", 28), sent[1]])
        with failure(client, "invalid_argument", "input 'a'", "region 'r'", "beyond the 64 bytes"):
            infer([placed_input(client, "a", A, "r", 32, 40), sent[1]])
        with failure(client, "not_found", "output 'sum'", "region 'gone'"):
            infer(sent, [placed_output(client, "sum", "gone", 32)])
        with failure(client, "invalid_argument", "model 'simple'", "'sum'", "takes 32", "the 31"):
            infer(sent, [placed_output(client, "sum", "r", 31)])
        with failure(client, "invalid_argument", "output 'sum'", "beyond the 64 bytes"):
            infer(sent, [placed_output(client, "sum", "r", 64, 1)])
        with failure(client, "invalid_argument", "model 'simple'", "no output 'product'"):
            infer(sent, [placed_output(client, "product", "r", 32)])


def test_texts_must_fill_their_bytes(client):
    with memory(client, "r", 64) as held:
        size = held.put(TEXTS)
        for wrong in [size - 1, size + 4, 3]:
            with failure(client, "invalid_argument", "model 'texts'", "'x'"):
                client.raw.infer("texts", [placed_input(client, "x", TEXTS, "r", wrong)])


def test_an_object_that_shrinks_kills_nobody(client, server):
    whole = PICTURE.nbytes
    with memory(client, "in", whole) as given, memory(client, "out", whole) as taken:
        given.put(PICTURE)
        inputs = [placed_input(client, "x", PICTURE, "in", whole)]
        outputs = [placed_output(client, "y", "out", whole)]
        for held, name in [(taken, "output 'y'"), (given, "input 'x'")]:
            for size in [whole - 1, 4096, 0]:
                held.shrink(size)
                with failure(client, "invalid_argument", "model 'picture'", name, "smaller than"):
                    client.raw.infer("picture", inputs, outputs=outputs)
                assert os.path.getsize(f"/dev/shm{held.key}") == size
        assert server.is_running() and client.raw.is_server_ready()


def test_inputs_are_bounded_like_messages(kit, repository, serve):
    repository.add("numbers", identity("FP32"))
    config = f"{ENABLED}[limits]\nmax_message_bytes = 10_000\n"
    array = np.zeros((1, 4000), dtype=np.float32)
    server = serve(repository.path, config=config)
    with kit.connect(server) as client, memory(client, "r", array.nbytes):
        inputs = [placed_input(client, "x", array, "r", array.nbytes)]
        with failure(client, "too_large", "model 'numbers'", "input 'x'", "max_message_bytes"):
            client.raw.infer("numbers", inputs)


# --- who may, and whether at all ---------------------------------------------------------------


def test_it_is_off_unless_enabled(kit, repository, serve):
    repository.add("simple", sum_and_difference())
    server = serve(repository.path)
    with kit.connect(server) as client, memory(client, "r", 64, register=False) as held:
        assert "system_shared_memory" not in client.describe("get_server_metadata")["extensions"]
        for refused in [
            lambda: client.raw.register_system_shared_memory("r", held.key, 64),
            client.raw.get_system_shared_memory_status,
            client.raw.unregister_system_shared_memory,
        ]:
            with failure(client, "unimplemented", "shared_memory.enabled"):
                refused()
        inputs = [placed_input(client, "a", A, "r", 32), client.input("b", B)]
        with failure(client, "unimplemented", "input 'a'", "shared_memory.enabled"):
            client.raw.infer("simple", inputs)
        inputs = [client.input("a", A), client.input("b", B)]
        with failure(client, "unimplemented", "output 'sum'"):
            client.raw.infer("simple", inputs, outputs=[placed_output(client, "sum", "r", 32)])
        assert not any(name.startswith("tidegate_shared_memory") for name, _ in scrape(server))


def test_metadata_tells_when_it_is_on(client):
    extensions = client.describe("get_server_metadata")["extensions"]
    assert "system_shared_memory" in extensions
    assert extensions == sorted(extensions)


def test_it_takes_the_token_where_there_is_one(kit, repository, serve):
    repository.add("simple", sum_and_difference())
    server = serve(repository.path, config=f'token = "s3cret"\n{ENABLED}')
    bearer = {"authorization": "Bearer s3cret"}
    with kit.connect(server) as client, memory(client, "r", 64, register=False) as held:
        with failure(client, "unauthenticated", "token"):
            client.raw.register_system_shared_memory("r", held.key, 64)
        client.raw.register_system_shared_memory("r", held.key, 64, headers=bearer)
        for refused in [
            client.raw.get_system_shared_memory_status,
            client.raw.unregister_system_shared_memory,
        ]:
            with failure(client, "unauthenticated", "token"):
                refused()
        held.put(A)
        inputs = [placed_input(client, "a", A, "r", 32), client.input("b", B)]
        with failure(client, "unauthenticated", "input 'a'", "token"):
            client.raw.infer("simple", inputs)
        assert (client.raw.infer("simple", inputs, headers=bearer).as_numpy("sum") == A + B).all()
        # What uses no region needs no token.
        inputs = [client.input("a", A), client.input("b", B)]
        assert (client.raw.infer("simple", inputs).as_numpy("sum") == A + B).all()
        client.raw.unregister_system_shared_memory(headers=bearer)


def test_nobody_may_relay_others(client, server):
    """A web page on this machine is not a program on this machine."""
    with memory(client, "r", 64) as held:
        held.put(A)
        origin = {"Origin": "http://localhost:1234"}
        where = {"shared_memory_region": "r", "shared_memory_byte_size": 32}
        inputs = [described(tensor(name, "INT32", [2, 4], [])) for name in "ab"]
        inputs = [each | {"parameters": where} for each in inputs]
        body = json.dumps({"inputs": inputs}).encode()
        assert call(server.rest, "POST", "/v2/models/simple/infer", body).status == 200
        for verb, path, payload in [
            ("POST", "/v2/models/simple/infer", body),
            ("GET", "/v2/systemsharedmemory/status", b""),
            ("POST", "/v2/systemsharedmemory/unregister", b""),
        ]:
            reply = call(server.rest, verb, path, payload, origin)
            assert reply.status == CODES["forbidden"][0], path
            assert "origin" in reply.json()["error"]
        assert list(status(client)) == ["r"]


def test_ordinary_requests_are_what_they_were(server):
    rows = tensor("x", "FP32", [1, 2], [1.5, -2])
    assert ask(server, "rest_json", "numbers", rows).outputs["y"].data == [1.5, -2]
    assert grpc_raw(server, Question("numbers", [rows])).outputs["y"].data == [1.5, -2]
