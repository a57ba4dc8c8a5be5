"""The stock clients, all four behind the same few calls."""

import asyncio
from dataclasses import dataclass
from types import ModuleType

import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import np_to_triton_dtype

from wire import CODES


class Blocking:
    """An asyncio client whose coroutines run to their end when they are called."""

    def __init__(self, make):
        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(self.made(make))

    @staticmethod
    async def made(make):
        return make()

    def __getattr__(self, name):
        method = getattr(self.client, name)
        return lambda *args, **kwargs: self.loop.run_until_complete(method(*args, **kwargs))

    def together(self, name, calls):
        """One call of the method for each keyword dict, all in flight at once."""

        async def gathered():
            return await asyncio.gather(*(getattr(self.client, name)(**each) for each in calls))

        return self.loop.run_until_complete(gathered())

    def close(self):
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


@dataclass(frozen=True)
class Kit:
    """What one flavour of the client calls its things, and where it wants to connect."""

    package: ModuleType
    port: str
    client: type
    asynchronous: bool
    compression: str
    describe: dict

    @property
    def is_http(self):
        return self.port == "rest"

    def open(self, address):
        if self.asynchronous:
            return Blocking(lambda: self.client(address))
        return self.client(address)

    def connect(self, server):
        return Client(self, getattr(server, self.port))

    def status(self, code):
        """How an `InferenceServerException` tells this code."""
        number, name = CODES[code]
        return str(number) if self.is_http else f"StatusCode.{name}"


def http_kit(client, asynchronous):
    return Kit(tritonclient.http, "rest", client, asynchronous, "request_compression_algorithm", {})


def grpc_kit(client, asynchronous):
    as_json = {"as_json": True}
    return Kit(tritonclient.grpc, "grpc", client, asynchronous, "compression_algorithm", as_json)


HTTP = http_kit(tritonclient.http.InferenceServerClient, asynchronous=False)
HTTP_AIO = http_kit(tritonclient.http.aio.InferenceServerClient, asynchronous=True)
GRPC = grpc_kit(tritonclient.grpc.InferenceServerClient, asynchronous=False)
GRPC_AIO = grpc_kit(tritonclient.grpc.aio.InferenceServerClient, asynchronous=True)


class Client:
    """A stock client, closed on leaving. `raw` is the client itself."""

    def __init__(self, kit, address):
        self.kit = kit
        self.raw = kit.open(address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.raw.close()

    def describe(self, method, *args):
        """The reply of a call that describes something, as a dict; gRPC writes int64 as text."""
        return getattr(self.raw, method)(*args, **self.kit.describe)

    def infer(self, model, arrays, outputs=None, binary=True, **more):
        """`arrays` by input name; `outputs` are names, all when `None`."""
        request = self.request(model, arrays, outputs, binary)
        return self.raw.infer(**request, **more)

    def request(self, model, arrays, outputs=None, binary=True):
        inputs = [self.input(name, array, binary) for name, array in arrays.items()]
        requested = outputs and [self.output(name, binary) for name in outputs]
        return {"model_name": model, "inputs": inputs, "outputs": requested}

    def input(self, name, array, binary=True):
        datatype = np_to_triton_dtype(array.dtype)
        made = self.kit.package.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array, **self.binary(binary))
        return made

    def output(self, name, binary=True):
        return self.kit.package.InferRequestedOutput(name, **self.binary(binary))

    def binary(self, binary):
        return {"binary_data": binary} if self.kit.is_http else {}


def field(result, name):
    """A field of an infer reply, which is a dict over HTTP and a message over gRPC."""
    response = result.get_response()
    return response[name] if isinstance(response, dict) else getattr(response, name)
