"""Calls by clients that know nothing but what the server says of itself."""

import threading
import time

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from infer import connect
from tensors import pack, unpack
from wire import TIMEOUT, call_frame, frame

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
# The messages of both are the same.
VERSIONS = ["v1", "v1alpha"]
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]


def service(version):
    return f"grpc.reflection.{version}.ServerReflection"


SERVICES = {INFERENCE, HEALTH, *map(service, VERSIONS)}


@pytest.fixture
def channel(server):
    with connect(server) as channel:
        yield channel


def reflect(channel, version):
    return channel.stream_stream(
        f"/{service(version)}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )


def ask(channel, version, **fields):
    """The replies to requests that are sent on one stream, each with one of the fields."""
    requests = [reflection_pb2.ServerReflectionRequest(**{k: v}) for k, v in fields.items()]
    return list(reflect(channel, version)(iter(requests), timeout=TIMEOUT))


def files(channel, version, **fields):
    (reply,) = ask(channel, version, **fields)
    found = reply.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(each) for each in found]


def pool_of(channel, version, symbol):
    """Everything that `symbol` needs, fetched file by file."""
    pool = descriptor_pool.DescriptorPool()
    added = set()

    def add(file):
        for name in file.dependency:
            if name not in added:
                for needed in files(channel, version, file_by_filename=name):
                    add(needed)
        if file.name not in added:
            added.add(file.name)
            pool.Add(file)

    for file in files(channel, version, file_containing_symbol=symbol):
        add(file)
    return pool


def call_by_description(channel, pool, service, method, fields):
    """A unary call, as JSON in and out."""
    described = pool.FindServiceByName(service).methods_by_name[method]
    request = message_factory.GetMessageClass(described.input_type)()
    reply = message_factory.GetMessageClass(described.output_type)
    call = channel.unary_unary(
        f"/{service}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=reply.FromString,
    )
    answer = call(json_format.ParseDict(fields, request), timeout=TIMEOUT)
    return json_format.MessageToDict(answer, preserving_proto_field_name=True), answer


@pytest.mark.parametrize("version", VERSIONS)
def test_services_are_listed(channel, version):
    (reply,) = ask(channel, version, list_services="")
    assert {each.name for each in reply.list_services_response.service} == SERVICES


@pytest.mark.parametrize("version", VERSIONS)
def test_several_questions_on_one_stream(channel, version):
    """The one in the middle has no answer, and the stream goes on."""
    found, unknown, listed = ask(
        channel,
        version,
        file_containing_symbol=f"{INFERENCE}.ModelInfer",
        file_by_filename="no-such.proto",
        list_services="",
    )
    assert found.HasField("file_descriptor_response")
    assert unknown.error_response.error_code == NOT_FOUND
    assert "no-such.proto" in unknown.error_response.error_message
    assert unknown.original_request.file_by_filename == "no-such.proto"
    assert listed.HasField("list_services_response")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "question",
    [
        {"file_by_filename": "no-such.proto"},
        {"file_containing_symbol": "no.such.Thing"},
        {"file_containing_symbol": "inference"},
        {"file_containing_extension": {"containing_type": "no.Such", "extension_number": 1}},
        {
            "file_containing_extension": {
                "containing_type": "inference.ModelConfig",
                "extension_number": 1,
            }
        },
        {"all_extension_numbers_of_type": "no.Such"},
    ],
    ids=str,
)
def test_what_nobody_knows(channel, version, question):
    (reply,) = ask(channel, version, **question)
    assert reply.error_response.error_code == NOT_FOUND
    assert len(reply.error_response.error_message.split()) >= 3


@pytest.mark.parametrize("version", VERSIONS)
def test_a_message_without_extensions(channel, version):
    (reply,) = ask(channel, version, all_extension_numbers_of_type="inference.ModelConfig")
    numbers = reply.all_extension_numbers_response
    assert numbers.base_type_name == "inference.ModelConfig"
    assert list(numbers.extension_number) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_comes_with_those_it_needs(channel, version):
    found = files(channel, version, file_containing_symbol=INFERENCE)
    assert [each.name for each in found] == ["inference.proto", "model_config.proto"]


@pytest.mark.parametrize("version", VERSIONS)
def test_no_protobuf(server, version):
    reply = call_frame(server.grpc, f"{service(version)}/ServerReflectionInfo", frame(b"\xff\xff"))
    assert reply.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_method(server, version):
    reply = call_frame(server.grpc, f"{service(version)}/Nothing", b"")
    assert reply.status == "UNIMPLEMENTED"
    assert "Nothing" in reply.error


@pytest.mark.parametrize("version", VERSIONS)
def test_an_inference_from_the_description_alone(channel, version):
    pool = pool_of(channel, version, INFERENCE)
    alive, _ = call_by_description(channel, pool, INFERENCE, "ServerLive", {})
    assert alive == {"live": True}
    request = {
        "model_name": "plus",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 1], "contents": {"fp32_contents": [41]}}
        ],
    }
    fields, message = call_by_description(channel, pool, INFERENCE, "ModelInfer", request)
    assert fields["outputs"] == [{"name": "y", "datatype": "FP32", "shape": ["1", "1"]}]
    assert unpack("FP32", message.raw_output_contents[0]) == [42]
    assert message.raw_output_contents[0] == pack("FP32", [42])


@pytest.mark.parametrize("version", VERSIONS)
def test_health_from_the_description_alone(channel, version):
    pool = pool_of(channel, version, HEALTH)
    status, _ = call_by_description(channel, pool, HEALTH, "Check", {"service": "plus"})
    assert status == {"status": "SERVING"}


def test_an_open_stream_holds_nothing_up(repository, serve):
    server = serve(repository.path, config='[shutdown]\ndrain_delay = "0s"\n')
    done = threading.Event()

    def requests():
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        done.wait()

    with connect(server) as channel:
        replies = reflect(channel, "v1")(requests())
        assert next(replies).HasField("list_services_response")
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 10
        done.set()


def test_the_stock_database(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == SERVICES
    pool = descriptor_pool.DescriptorPool(database)
    config = pool.FindMessageTypeByName("inference.ModelConfig")
    assert config.fields_by_name["max_batch_size"].number == 4
    fields, _ = call_by_description(channel, pool, INFERENCE, "ModelConfig", {"name": "plus"})
    assert fields["config"]["name"] == "plus"


def test_the_stock_database_and_what_nobody_knows(channel):
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    for find in (pool.FindFileByName, pool.FindMessageTypeByName, pool.FindServiceByName):
        with pytest.raises(KeyError):
            find("no.such.Thing")
    assert pool.FindServiceByName(HEALTH).methods_by_name["Check"].name == "Check"
