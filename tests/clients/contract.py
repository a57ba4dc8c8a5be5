"""What every flavour of the stock client may expect; each flavour's file runs these tests."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import Client, field
from server import eventually
from wire import CountingProxy

SETOSA = np.array([[5.1, 3.5, 1.4, 0.2]], dtype=np.float32)
SENTENCES = np.array(["Where is the station?", "Wo ist der Bahnhof, bitte?"], dtype=np.object_)
A = np.arange(8, dtype=np.int32).reshape(2, 4)
B = np.full((2, 4), 100, dtype=np.int32)

KIB = 1024
# Compresses to almost nothing, so that a compressed message cannot be mistaken.
ZEROS = np.zeros((256, 256), dtype=np.float32)


class ClientContract:
    """A subclass says which `kit` it is about."""

    @pytest.fixture
    def client(self, server):
        with self.kit.connect(server) as client:
            yield client

    # --- what the server says of itself ---------------------------------------------

    def test_live_and_ready(self, client):
        assert client.raw.is_server_live() is True
        assert client.raw.is_server_ready() is True
        assert client.raw.is_model_ready("iris") is True
        assert client.raw.is_model_ready("iris", "1") is True

    def test_server_metadata(self, client):
        metadata = client.describe("get_server_metadata")
        assert metadata["name"] == "tidegate"
        assert metadata["version"][0].isdigit()
        assert {
            "binary_tensor_data",
            "model_configuration",
            "schedule_policy",
            "statistics",
        } <= set(metadata["extensions"])

    @pytest.mark.parametrize("version", ["", "1"])
    def test_model_metadata(self, client, version):
        metadata = client.describe("get_model_metadata", "iris", version)
        assert metadata["name"] == "iris"
        assert metadata["versions"] == ["1"]
        assert metadata["platform"] == "onnxruntime_onnx"
        assert [signature(each) for each in metadata["inputs"]] == [("X", "FP32", [-1, 4])]
        assert [signature(each) for each in metadata["outputs"]] == [
            ("label", "INT64", [-1]),
            ("probabilities", "FP32", [-1, 3]),
        ]

    @pytest.mark.parametrize("version", ["", "1"])
    def test_model_config(self, client, version):
        config = self.config(client, "limited", version)
        assert config["name"] == "limited"
        assert config["platform"] == "onnxruntime_onnx"
        assert int(config["max_batch_size"]) == 4
        (declared,) = config["input"]
        assert (declared["name"], declared["data_type"]) == ("x", "TYPE_FP32")
        # As in Triton: with a batch size, `dims` are those of one row.
        assert [int(size) for size in declared["dims"]] == [-1]

    def config(self, client, *args):
        config = client.describe("get_model_config", *args)
        return config if self.kit.is_http else config["config"]

    def test_statistics(self, client):
        before = counts(client, "plus", "1")
        for _ in range(3):
            client.infer("plus", {"x": np.zeros((2, 1), dtype=np.float32)})
        expected = [before[0] + 6, before[1] + 3, before[2] + 3]
        eventually(lambda: counts(client, "plus", "1") == expected)
        assert counts(client, "plus") == expected

    def test_statistics_of_all_models(self, client):
        everything = client.describe("get_inference_statistics")["model_stats"]
        assert {"iris", "digits", "language", "magika"} <= {each["name"] for each in everything}

    def test_repository_index(self, client):
        index = client.describe("get_model_repository_index")
        models = index if self.kit.is_http else index["models"]
        (iris,) = [each for each in models if each["name"] == "iris"]
        assert (iris["version"], iris["state"]) == ("1", "READY")

    # --- inference ------------------------------------------------------------------

    @pytest.mark.parametrize("version", ["", "1"])
    def test_infer(self, client, version):
        result = client.infer("iris", {"X": SETOSA}, model_version=version)
        assert result.as_numpy("label").tolist() == [0]
        probabilities = result.as_numpy("probabilities")
        assert probabilities.shape == (1, 3)
        assert probabilities.argmax() == 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)

    def test_the_id_comes_back(self, client):
        assert field(client.infer("iris", {"X": SETOSA}, request_id="über-17"), "id") == "über-17"

    def test_some_outputs(self, client):
        result = client.infer("simple", {"a": A, "b": B}, outputs=["difference"])
        assert (result.as_numpy("difference") == A - B).all()
        assert result.as_numpy("sum") is None

    def test_inputs_in_any_order(self, client):
        result = client.infer("simple", {"b": B, "a": A})
        assert (result.as_numpy("sum") == A + B).all()
        assert (result.as_numpy("difference") == A - B).all()

    def test_texts_both_ways(self, client):
        result = client.infer("language", {"text": SENTENCES})
        assert result.as_numpy("language").tolist() == [b"en", b"de"]

    def test_a_large_tensor(self, client):
        """32 MiB each way, within the default limit of 64 MiB."""
        large = np.arange(8 << 20, dtype=np.float32).reshape(1, -1)
        result = client.infer("identity_fp32", {"x": large})
        assert (result.as_numpy("y") == large).all()

    # --- what goes wrong ------------------------------------------------------------

    @pytest.mark.parametrize(
        ("model", "version", "code", "words"),
        [
            ("nosuch", "", "not_found", ["nosuch"]),
            ("iris", "9", "not_found", ["iris", "9"]),
            ("simple", "", "invalid_argument", ["simple", "X"]),
        ],
    )
    def test_errors(self, client, model, version, code, words):
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, {"X": SETOSA}, model_version=version)
        assert caught.value.status() == self.kit.status(code)
        for word in words:
            assert word in caught.value.message()

    def test_metadata_of_an_unknown_model(self, client):
        with pytest.raises(InferenceServerException, match="nosuch") as caught:
            client.describe("get_model_metadata", "nosuch")
        assert caught.value.status() == self.kit.status("not_found")

    def test_a_deadline_ends_the_wait(self, server, client):
        """The `timeout` parameter, in µs, of a request that queues behind a run of seconds."""
        with busy(server, self.kit, iterations=6000):
            start = time.monotonic()
            with pytest.raises(InferenceServerException) as caught:
                client.infer("slow", {"iterations": np.array([1])}, timeout=200_000)
            took = time.monotonic() - start
        assert caught.value.status() == self.kit.status("deadline_exceeded")
        assert took < 1, "the answer came with the end of the run, not with the deadline"

    # --- compression ----------------------------------------------------------------

    def test_nothing_is_compressed_unasked(self, server):
        sent, received = self.transferred(server)
        assert sent > 256 * KIB
        assert received > 256 * KIB

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_a_compressed_request_gets_a_compressed_reply(self, server, algorithm):
        sent, received = self.transferred(server, **{self.kit.compression: algorithm})
        assert sent < 16 * KIB
        assert received < 16 * KIB

    def transferred(self, server, binary=True, **options):
        """Bytes up and down for one inference with a quarter of a MiB of zeros each way."""
        with CountingProxy(getattr(server, self.kit.port)) as proxy:
            with Client(self.kit, proxy.address) as client:
                assert client.raw.is_server_live()
                proxy.reset()
                result = client.infer("identity_fp32", {"x": ZEROS}, ["y"], binary, **options)
            assert (result.as_numpy("y") == ZEROS).all()
            return proxy.sent, proxy.received


@contextmanager
def busy(server, kit, iterations):
    """While entered, one request to the model `slow` is running."""

    def occupy():
        with kit.connect(server) as client:
            client.infer("slow", {"iterations": np.array([iterations])})

    thread = threading.Thread(target=occupy)
    thread.start()
    time.sleep(0.3)
    try:
        yield
    finally:
        thread.join()


def signature(tensor):
    return tensor["name"], tensor["datatype"], [int(size) for size in tensor["shape"]]


def counts(client, *model):
    """Rows, executions and successes of one version."""
    (statistics,) = client.describe("get_inference_statistics", *model)["model_stats"]
    success = statistics.get("inference_stats", {}).get("success", {})
    values = [statistics.get("inference_count", 0), statistics.get("execution_count", 0)]
    return [int(value) for value in [*values, success.get("count", 0)]]
