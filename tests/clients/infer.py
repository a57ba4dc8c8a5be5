"""One inference, asked for in every way the protocol has: the same question, the same answer."""

import json
from dataclasses import dataclass, field

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tensors import (
    FIELDS,
    Tensor,
    as_json,
    binary_message,
    described,
    split_binary,
    tensor,
    unpack,
)
from wire import TIMEOUT, call


@dataclass
class Question:
    """`inputs` are `Tensor`s, `outputs` names (all when `None`)."""

    model: str
    inputs: list
    outputs: list | None = None
    version: str = ""
    id: str = ""
    parameters: dict = field(default_factory=dict)

    def path(self):
        version = f"/versions/{self.version}" if self.version else ""
        return f"/v2/models/{self.model}{version}/infer"

    def message(self, inputs, **parameters):
        message = {"inputs": inputs}
        if self.id:
            message["id"] = self.id
        if parameters := self.parameters | parameters:
            message["parameters"] = parameters
        if self.outputs is not None:
            message["outputs"] = [{"name": name} for name in self.outputs]
        return message


@dataclass
class Answer:
    """`status` is a number over REST, a name over gRPC; `error` is empty when all went well."""

    status: int | str
    error: str = ""
    model: str = ""
    version: str = ""
    id: str = ""
    outputs: dict = field(default_factory=dict)


def rest_json(server, question):
    message = question.message([as_json(each) for each in question.inputs])
    body = json.dumps(message).encode()
    return read_rest(call(server.rest, "POST", question.path(), body))


def rest_binary(server, question):
    blobs = [each.packed() for each in question.inputs]
    inputs = [
        {**described(each), "parameters": {"binary_data_size": len(blob)}}
        for each, blob in zip(question.inputs, blobs, strict=True)
    ]
    message = question.message(inputs, binary_data_output=True)
    body, headers = binary_message(message, blobs)
    return read_rest(call(server.rest, "POST", question.path(), body, headers))


def grpc_raw(server, question):
    return ask_grpc(server, raw_request(question))


def grpc_typed(server, question):
    request = grpc_request(question)
    for message, each in zip(request.inputs, question.inputs, strict=True):
        getattr(message.contents, FIELDS[each.datatype]).extend(each.data)
    return ask_grpc(server, request)


WAYS = {way.__name__: way for way in (rest_json, rest_binary, grpc_raw, grpc_typed)}
# The ways that carry every datatype.
BINARY_WAYS = ["rest_binary", "grpc_raw"]


def read_rest(reply):
    if reply.status != 200:
        return Answer(reply.status, rest_error(reply))
    length = reply.headers.get("inference-header-content-length")
    if length is None:
        assert reply.headers["content-type"].startswith("application/json"), reply.headers
        message, blobs = reply.json(), {}
    else:
        assert reply.headers["content-type"] == "application/octet-stream", reply.headers
        message, blobs = split_binary(reply.body, int(length))
    outputs = [read_output(output, blobs) for output in message["outputs"]]
    return Answer(
        reply.status,
        model=message["model_name"],
        version=message["model_version"],
        id=message.get("id", ""),
        outputs={output.name: output for output in outputs},
    )


def read_output(output, blobs):
    name, datatype = output["name"], output["datatype"]
    if name in blobs:
        return Tensor(name, datatype, output["shape"], unpack(datatype, blobs[name]))
    return tensor(name, datatype, output["shape"], output["data"])


def rest_error(reply):
    """The sentence of an error reply, which is JSON whatever went wrong."""
    content_type = reply.headers.get("content-type", "none")
    assert content_type.startswith("application/json"), f"{reply.status} as {content_type}"
    message = reply.json()
    assert list(message) == ["error"], message
    assert isinstance(message["error"], str), message
    return message["error"]


def grpc_request(question):
    request = service_pb2.ModelInferRequest(
        model_name=question.model, model_version=question.version, id=question.id
    )
    for each in question.inputs:
        request.inputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
    for name in question.outputs or []:
        request.outputs.add(name=name)
    for name, value in question.parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
        setattr(request.parameters[name], kind[type(value)], value)
    return request


def raw_request(question):
    request = grpc_request(question)
    request.raw_input_contents.extend(each.packed() for each in question.inputs)
    return request


def ask_grpc(server, request):
    try:
        with connect(server) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return read_grpc(stub.ModelInfer(request, timeout=TIMEOUT))
    except grpc.RpcError as error:
        return Answer(error.code().name, error.details())


def connect(server):
    """A channel of its own: by default all of a process share one connection."""
    return grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)])


def read_grpc(reply):
    assert len(reply.raw_output_contents) == len(reply.outputs), "one raw entry for each output"
    outputs = {
        output.name: Tensor(
            output.name, output.datatype, list(output.shape), unpack(output.datatype, raw)
        )
        for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }
    return Answer("OK", "", reply.model_name, reply.model_version, reply.id, outputs)


def ask(server, way, model, *inputs, **more):
    """The answer to a question that must succeed."""
    answer = WAYS[way](server, Question(model, list(inputs), **more))
    assert answer.status in (200, "OK"), f"{way}: {answer.status} {answer.error}"
    return answer
