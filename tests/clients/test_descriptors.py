"""Our .proto files must say exactly what the public client was built from.

The text in `proto/` is ours; its names, numbers and types are not. Both sides
are flattened to facts, one line for each field, enum value and method, and the
facts must be equal: nothing missing, nothing different, nothing surplus.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from tritonclient.grpc import model_config_pb2, service_pb2

PROTO = Path(__file__).resolve().parents[2] / "proto"

# Our file, and what the client has in its place.
FILES = {
    "inference.proto": service_pb2.DESCRIPTOR,
    "model_config.proto": model_config_pb2.DESCRIPTOR,
}

FieldProto = descriptor_pb2.FieldDescriptorProto

LABELS = {
    FieldProto.LABEL_OPTIONAL: "singular",
    FieldProto.LABEL_REQUIRED: "required",
    FieldProto.LABEL_REPEATED: "repeated",
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our files by name, compiled and linked in a pool of their own.

    The default pool already holds the client's `inference` package.
    """
    out = tmp_path_factory.mktemp("descriptors") / "set.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}"]
    command += ["--include_imports", f"--descriptor_set_out={out}", *FILES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"the compiler refused our files:\n{done.stderr}"

    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        pool.Add(file)
    return {name: file_proto(pool.FindFileByName(name)) for name in FILES}


def file_proto(descriptor):
    proto = descriptor_pb2.FileDescriptorProto()
    descriptor.CopyToProto(proto)
    return proto


def facts(file):
    """Everything in the file that can reach the wire: subject → statement."""
    found = {"package": file.package, "syntax": file.syntax}
    for enum in file.enum_type:
        found.update(enum_facts(enum, enum.name))
    for message in file.message_type:
        found.update(message_facts(message, message.name))
    for service in file.service:
        found[f"service {service.name}"] = "present"
        for method in service.method:
            found[f"method {service.name}.{method.name}"] = method_fact(method)
    return found


def message_facts(message, path):
    kind = "map entry" if message.options.map_entry else "plain"
    found = {f"message {path}": kind}
    for field in message.field:
        found[f"field {path}.{field.name}"] = field_fact(field, message)
    for enum in message.enum_type:
        found.update(enum_facts(enum, f"{path}.{enum.name}"))
    for nested in message.nested_type:
        found.update(message_facts(nested, f"{path}.{nested.name}"))
    return found


def field_fact(field, message):
    kind = FieldProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    words = [f"number {field.number}, {LABELS[field.label]} {kind}", field.type_name]
    if field.HasField("oneof_index"):
        words.append(f"in oneof {message.oneof_decl[field.oneof_index].name}")
    if field.proto3_optional:
        words.append("with explicit presence")
    if field.options.HasField("packed"):
        words.append(f"packed = {field.options.packed}")
    return " ".join(filter(None, words))


def enum_facts(enum, path):
    found = {f"enum {path}": "present"}
    for value in enum.value:
        found[f"enum value {path}.{value.name}"] = f"number {value.number}"
    return found


def method_fact(method):
    request = "stream " * method.client_streaming + method.input_type
    response = "stream " * method.server_streaming + method.output_type
    return f"({request}) returns ({response})"


def differences(ours, theirs):
    """One readable line for each subject on which the two sides disagree."""
    lines = []
    for subject in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(subject), theirs.get(subject)
        if here is None:
            lines.append(f"missing: {subject}: {there}")
        elif there is None:
            lines.append(f"surplus: {subject}: {here}")
        elif here != there:
            lines.append(f"differs: {subject}: ours {here}; theirs {there}")
    return lines


@pytest.mark.parametrize("name", FILES)
def test_same_as_the_client(ours, name):
    lines = differences(facts(ours[name]), facts(file_proto(FILES[name])))
    if lines:
        pytest.fail(f"proto/{name}:\n  " + "\n  ".join(lines), pytrace=False)


def test_every_method_is_there(ours):
    """Also guards the comparison against having had nothing to compare."""
    methods = [s for s in facts(ours["inference.proto"]) if s.startswith("method ")]
    assert len(methods) == 20, f"20 methods expected, found {methods}"


def test_a_difference_is_reported():
    theirs = file_proto(service_pb2.DESCRIPTOR)
    changed = file_proto(service_pb2.DESCRIPTOR)
    messages = {message.name: message for message in changed.message_type}
    messages["ServerLiveResponse"].field[0].number = 7
    messages["ServerReadyResponse"].field[0].name = "prepared"
    methods = {method.name: method for method in changed.service[0].method}
    methods["ModelInfer"].server_streaming = True

    signature = "(.inference.ModelInferRequest) returns ({}.inference.ModelInferResponse)"
    assert differences(facts(changed), facts(theirs)) == [
        "differs: field ServerLiveResponse.live:"
        " ours number 7, singular bool; theirs number 1, singular bool",
        "surplus: field ServerReadyResponse.prepared: number 1, singular bool",
        "missing: field ServerReadyResponse.ready: number 1, singular bool",
        "differs: method GRPCInferenceService.ModelInfer:"
        f" ours {signature.format('stream ')}; theirs {signature.format('')}",
    ]
