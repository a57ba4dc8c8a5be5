"""Many requests on one stream, with the stock clients and with frames of our own."""

import queue
import signal
import struct
import threading
import time

import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from clients import GRPC, GRPC_AIO, field
from infer import Question, connect, raw_request
from models import plus, slow
from server import eventually
from tensors import tensor
from wire import TIMEOUT, call, call_frame, frame

STREAM_METHOD = "inference.GRPCInferenceService/ModelStreamInfer"
FINAL = "triton_final_response"
LONG_RUN = 3000
DRAINS_AT_ONCE = '[shutdown]\ndrain_delay = "0s"\n'


class Stream:
    """A stock client with an open stream; `answers` are pairs of result and error, as they came."""

    def __init__(self, server, **more):
        self.client = GRPC.connect(server)
        self.answers = queue.Queue()
        self.client.raw.start_stream(self.take, **more)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.raw.stop_stream(cancel_requests=True)
        self.client.raw.close()

    def take(self, result, error):
        self.answers.put((result, error))

    def ask(self, model, number, **more):
        """Request `number` of a model, which is its input too."""
        arrays = {"x": np.array([[number]], np.float32)}
        request = self.client.request(model, arrays)
        self.client.raw.async_stream_infer(**request, request_id=str(number), **more)

    def run(self, iterations):
        request = self.client.request("slow", {"iterations": np.array([iterations])})
        self.client.raw.async_stream_infer(**request, request_id="slow")

    def has_sent_all(self):
        return self.client.raw._stream._request_queue.empty()

    def answer(self):
        result, error = self.answers.get(timeout=TIMEOUT)
        if error is not None:
            raise error
        return result

    def expect(self, number):
        result = self.answer()
        assert field(result, "id") == str(number)
        assert result.as_numpy("y").item() == number + 1
        return result


def metric(server, series):
    """The value of a series, 0 when it is not there."""
    page = call(server.ops, "GET", "/metrics").body.decode()
    found = [line for line in page.splitlines() if line.startswith(f"{series} ")]
    return int(found[0].removeprefix(series)) if found else 0


def sent_and_done(server):
    """How many requests of `plus` were counted as answered over gRPC."""
    labels = 'model="plus",version="1",protocol="grpc",code="ok",variant="stable"'
    return metric(server, f"tidegate_requests_total{{{labels}}}")


# --- the stock clients --------------------------------------------------------------


def test_a_thousand_requests_on_one_stream(server):
    with Stream(server) as stream:
        for number in range(1000):
            stream.ask("plus", number)
        for number in range(1000):
            stream.expect(number)
        assert stream.answers.empty()


@pytest.mark.parametrize("asked", [True, False])
def test_every_answer_is_the_final_one(server, asked):
    with Stream(server) as stream:
        stream.ask("plus", 1, enable_empty_final_response=asked)
        parameters = stream.expect(1).get_response().parameters
        assert parameters[FINAL].bool_param is True


def test_answers_say_which_version_they_are_from(server):
    with Stream(server) as stream:
        stream.ask("plus", 1)
        parameters = stream.expect(1).get_response().parameters
        told = {name: parameters[name].string_param for name in parameters if name.startswith("x-tidegate-")}
        assert told == {"x-tidegate-version": "1", "x-tidegate-variant": "stable"}


def test_answers_keep_the_order_and_requests_do_not_wait(server):
    before = sent_and_done(server)
    with Stream(server) as stream:
        stream.run(LONG_RUN)
        for number in range(20):
            stream.ask("plus", number)
        eventually(lambda: sent_and_done(server) >= before + 20)
        assert stream.answers.empty(), "the slow one is not done"
        assert field(stream.answer(), "id") == "slow"
        for number in range(20):
            stream.expect(number)


def test_errors_stand_in_their_place(server):
    with Stream(server) as stream:
        stream.ask("plus", 1)
        stream.ask("nosuch", 2)
        stream.ask("plus", 3, sequence_id=7, sequence_start=True)
        stream.ask("plus", 4)
        stream.expect(1)
        for word in ["nosuch", "sequence_id"]:
            with pytest.raises(InferenceServerException, match=word):
                stream.answer()
        stream.expect(4)


def test_errors_name_their_request(server):
    broken = raw_request(Question("nosuch", [one_row(1)], id="seven"))
    with connect(server) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (answer,) = stub.ModelStreamInfer(iter([broken]), timeout=TIMEOUT)
    assert "nosuch" in answer.error_message
    assert answer.infer_response.id == "seven"
    assert not answer.infer_response.outputs


def test_an_error_ends_the_stream_of_whoever_wants_that(server):
    with Stream(server, headers={"triton_grpc_error": "true"}) as stream:
        stream.ask("plus", 1)
        stream.ask("nosuch", 2)
        stream.expect(1)
        with pytest.raises(InferenceServerException) as caught:
            stream.answer()
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        eventually(lambda: not stream.client.raw._stream._active)
        with pytest.raises(InferenceServerException, match="no longer in valid state"):
            stream.ask("plus", 3)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression(server, algorithm):
    with Stream(server, compression_algorithm=algorithm) as stream:
        for number in range(10):
            stream.ask("plus", number)
        for number in range(10):
            stream.expect(number)


def test_the_deadline_of_the_stream(server):
    with Stream(server, stream_timeout=0.5) as stream:
        stream.ask("plus", 1)
        stream.expect(1)
        with pytest.raises(InferenceServerException) as caught:
            stream.answer()
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_a_client_that_cancels(server):
    pending = 'tidegate_pending_requests{model="slow",version="1"}'
    cancelled = 'tidegate_dropped_requests_total{model="slow",version="1",reason="cancelled"}'
    before = metric(server, cancelled)
    with Stream(server) as stream:
        for _ in range(5):
            stream.run(LONG_RUN)
        eventually(lambda: metric(server, pending) == 5)
        stream.client.raw.stop_stream(cancel_requests=True)
        with pytest.raises(InferenceServerException) as caught:
            stream.answer()
        assert caught.value.status() == "StatusCode.CANCELLED"
    eventually(lambda: metric(server, pending) == 0)
    # One or two were running; the others leave the queue without a run.
    eventually(lambda: metric(server, cancelled) >= before + 3)
    with Stream(server) as stream:
        stream.ask("plus", 2)
        stream.expect(2)


def test_aio(server):
    async def requests(client):
        for number in range(100):
            model = "nosuch" if number == 50 else "plus"
            request = client.request(model, {"x": np.array([[number]], np.float32)})
            yield {**request, "request_id": str(number)}

    async def collect(client):
        stream = client.raw.client.stream_infer(requests(client), stream_timeout=TIMEOUT)
        return [answer async for answer in stream]

    with GRPC_AIO.connect(server) as client:
        answers = client.raw.loop.run_until_complete(collect(client))
    assert len(answers) == 100
    for number, (result, error) in enumerate(answers):
        if number == 50:
            assert "nosuch" in error.message()
        else:
            assert error is None
            assert field(result, "id") == str(number)
            assert result.as_numpy("y").item() == number + 1


# --- frames -------------------------------------------------------------------------


def one_row(number):
    return tensor("x", "FP32", [1, 1], [number])


def framed(number):
    request = raw_request(Question("plus", [one_row(number)], id=str(number)))
    return frame(request.SerializeToString())


def answers_in(data):
    """The messages in what a stream sent."""
    while data:
        flag, length = struct.unpack(">BI", data[:5])
        assert flag == 0
        yield service_pb2.ModelStreamInferResponse.FromString(data[5 : 5 + length])
        data = data[5 + length :]


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        (frame(b"\xff" * 11), "INVALID_ARGUMENT"),
        (framed(3)[:-2], "INVALID_ARGUMENT"),
        (framed(3)[:5], "INVALID_ARGUMENT"),
        (framed(3)[:2], "INVALID_ARGUMENT"),
        (b"\x07\0\0\0\0", "INVALID_ARGUMENT"),
        (b"\0\xff\xff\xff\xff", "RESOURCE_EXHAUSTED"),
        (b"", "OK"),
    ],
)
def test_what_came_before_a_broken_message_is_answered(server, broken, status):
    reply = call_frame(server.grpc, STREAM_METHOD, framed(1) + framed(2) + broken)
    assert reply.status == status, reply.error
    answers = list(answers_in(reply.frame))
    assert [answer.infer_response.id for answer in answers] == ["1", "2"]
    assert not any(answer.error_message for answer in answers)


# --- stopping -----------------------------------------------------------------------


def test_sigterm_while_streams_are_open(repository, serve):
    """What was sent is answered; then the streams end, the idle one too, and so does the server."""
    repository.add("plus", plus(1))
    repository.add("slow", slow())
    server = serve(repository.path, config=DRAINS_AT_ONCE)
    with Stream(server) as busy, Stream(server) as idle:
        idle.ask("plus", 1)
        idle.expect(1)
        busy.run(LONG_RUN)
        for number in range(200):
            busy.ask("plus", number)
        # The slow one holds the others up: all have been sent, and most of them not read.
        eventually(lambda: sent_and_done(server) >= 64 and busy.has_sent_all())
        start = time.monotonic()
        ended = queue.Queue()
        threading.Thread(target=lambda: ended.put(server.stop(signal.SIGTERM))).start()
        assert field(busy.answer(), "id") == "slow"
        for number in range(200):
            busy.expect(number)
        for stream in (busy, idle):
            with pytest.raises(InferenceServerException) as caught:
                stream.answer()
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
        assert ended.get(timeout=TIMEOUT) == 0
        assert time.monotonic() - start < 15


def test_many_streams_at_once(server):
    def work(failures, first):
        try:
            with Stream(server) as stream:
                for number in range(first, first + 100):
                    stream.ask("plus", number)
                for number in range(first, first + 100):
                    stream.expect(number)
        except Exception as error:
            failures.append(error)

    failures = []
    threads = [threading.Thread(target=work, args=(failures, 1000 * n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
