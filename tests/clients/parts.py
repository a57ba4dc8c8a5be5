"""Message bodies as the conformance files write them: a list of parts, one after another."""

import base64
import gzip
import json
import zlib

from google.protobuf import json_format
from tritonclient.grpc import service_pb2

from infer import Question, raw_request
from tensors import pack, tensor


def build(parts):
    """The bytes of all parts. A text stands for itself; what an object means its first key says."""
    return b"".join(build_part(part) for part in parts)


def build_part(part):
    if isinstance(part, str):
        return part.encode()
    match part:
        case {"hex": digits}:
            return bytes.fromhex(digits)
        case {"repeat": text, "times": times}:
            return text.encode() * times
        case {"json": value}:
            return json.dumps(value).encode()
        case {"pack": datatype, "data": data}:
            return pack(datatype, data)
        case {"gzip": parts}:
            return cut(gzip.compress(build(parts), mtime=0), part)
        case {"deflate": parts}:
            return cut(zlib.compress(build(parts)), part)
        case {"plus": number}:
            return question("plus", tensor("x", "FP32", [1, 1], [number]))
        case {"slow": iterations}:
            return question("slow", tensor("iterations", "INT64", [1], [iterations]))
    raise ValueError(f"unknown part {part}")


def cut(data, part):
    """Without its last `cut` bytes."""
    return data[: len(data) - part.get("cut", 0)]


def question(model, asked):
    """A `ModelInferRequest` that is right."""
    return raw_request(Question(model, [asked])).SerializeToString()


def request_message(call, fields):
    """The request of a gRPC method, from JSON in which `{"bytes": parts}` stands for bytes."""
    method = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[call]
    message = getattr(service_pb2, method.input_type.name)()
    return json_format.ParseDict(as_base64(fields), message)


def as_base64(value):
    match value:
        case {"bytes": parts}:
            return base64.b64encode(build(parts)).decode()
        case dict():
            return {key: as_base64(each) for key, each in value.items()}
        case list():
            return [as_base64(each) for each in value]
    return value
