"""The stock HTTP clients, synchronous and asyncio."""

import numpy as np
import pytest
import tritonclient.http

from clients import HTTP, HTTP_AIO, Client
from contract import KIB, SENTENCES, SETOSA, A, B, ClientContract


class HttpContract(ClientContract):
    """What only HTTP has: tensors as JSON or as binary, and the reply's encoding by request."""

    @pytest.mark.parametrize("binary_in", [True, False])
    @pytest.mark.parametrize("binary_out", [True, False])
    def test_json_and_binary(self, client, binary_in, binary_out):
        result = client.raw.infer(
            "iris",
            [client.input("X", SETOSA, binary_in)],
            outputs=[client.output("label", binary_out), client.output("probabilities")],
        )
        assert result.as_numpy("label").tolist() == [0]
        assert result.as_numpy("probabilities").argmax() == 0
        assert is_binary(result, "label") is binary_out
        assert is_binary(result, "probabilities") is True

    def test_json_and_binary_inputs_in_one_message(self, client):
        inputs = [client.input("a", A, binary=False), client.input("b", B)]
        result = client.raw.infer("simple", inputs)
        assert (result.as_numpy("difference") == A - B).all()
        inputs = [client.input("a", A), client.input("b", B, binary=False)]
        result = client.raw.infer("simple", inputs)
        assert (result.as_numpy("difference") == A - B).all()

    @pytest.mark.parametrize("binary", [True, False])
    def test_texts_as_json_and_as_binary(self, client, binary):
        result = client.infer("language", {"text": SENTENCES}, ["language"], binary)
        texts = result.as_numpy("language").tolist()
        assert texts == ([b"en", b"de"] if binary else ["en", "de"])

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_json_replies_are_compressed_when_asked(self, server, algorithm):
        asked = {"response_compression_algorithm": algorithm}
        sent, received = self.transferred(server, binary=False, **asked)
        assert sent > 128 * KIB
        assert received < 16 * KIB

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_binary_replies_are_not(self, server, algorithm):
        asked = {"response_compression_algorithm": algorithm}
        _, received = self.transferred(server, binary=True, **asked)
        assert received > 256 * KIB


class TestHttp(HttpContract):
    kit = HTTP

    def test_async_infer(self, server):
        rows = [np.array([[n]], dtype=np.float32) for n in range(32)]
        with tritonclient.http.InferenceServerClient(server.rest, concurrency=8) as raw:
            pending = [raw.async_infer("plus", [plus_input(row)]) for row in rows]
            answers = [each.get_result(timeout=30).as_numpy("y").item() for each in pending]
        assert answers == [n + 1 for n in range(32)]


class TestHttpAio(HttpContract):
    kit = HTTP_AIO

    def test_many_at_once(self, server):
        with Client(HTTP_AIO, server.rest) as client:
            rows = [np.array([[n]], dtype=np.float32) for n in range(32)]
            results = client.raw.together("infer", [client.request("plus", {"x": x}) for x in rows])
        assert [each.as_numpy("y").item() for each in results] == [n + 1 for n in range(32)]


def plus_input(row):
    made = tritonclient.http.InferInput("x", list(row.shape), "FP32")
    made.set_data_from_numpy(row)
    return made


def is_binary(result, output):
    return "binary_data_size" in result.get_output(output).get("parameters", {})
