"""The stock gRPC clients, synchronous and asyncio."""

import queue
import time

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import GRPC, GRPC_AIO
from contract import ClientContract

ROWS = [np.array([[n]], dtype=np.float32) for n in range(32)]


class GrpcContract(ClientContract):
    """What only gRPC has: deadlines of the call itself."""

    def test_client_timeout(self, client):
        start = time.monotonic()
        with pytest.raises(InferenceServerException) as caught:
            client.infer("slow", {"iterations": np.array([6000])}, client_timeout=0.2)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert time.monotonic() - start < 1

    def test_a_timeout_that_is_kept(self, client):
        result = client.infer("plus", {"x": ROWS[3]}, client_timeout=30)
        assert result.as_numpy("y").item() == 4


class TestGrpc(GrpcContract):
    kit = GRPC

    def test_async_infer(self, client):
        answers = queue.Queue()

        def ask(n):
            def done(result, error):
                answers.put((n, error or result.as_numpy("y").item()))

            client.raw.async_infer(**client.request("plus", {"x": ROWS[n]}), callback=done)

        for n in range(32):
            ask(n)
        collected = dict(answers.get(timeout=30) for _ in range(32))
        assert collected == {n: n + 1 for n in range(32)}

    def test_async_infer_of_an_unknown_model(self, client):
        errors = queue.Queue()
        client.raw.async_infer(
            **client.request("nosuch", {"x": ROWS[0]}),
            callback=lambda result, error: errors.put(error),
        )
        assert errors.get(timeout=30).status() == "StatusCode.NOT_FOUND"


class TestGrpcAio(GrpcContract):
    kit = GRPC_AIO

    def test_many_at_once(self, client):
        calls = [client.request("plus", {"x": row}) for row in ROWS]
        results = client.raw.together("infer", calls)
        assert [each.as_numpy("y").item() for each in results] == [n + 1 for n in range(32)]
