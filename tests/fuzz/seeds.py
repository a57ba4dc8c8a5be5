"""Writes the requests that the fuzzer starts from into seeds/: one of each kind, so that it need not find them.

Run with the clients of tests/clients/requirements.txt. What the fuzzer itself finds worth keeping, such as an input
that once failed, lies in the same folders under a name that starts with "found-" and is left alone.
"""

import gzip
import json
import pathlib
import struct
import zlib

import numpy as np
from tritonclient.grpc import service_pb2 as pb

SEEDS = pathlib.Path(__file__).parent / "seeds"
INTEGERS = ["UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"]
FLOATS = ["FP32", "FP64"]
# The order of the server's own list, in which raw_request counts types.
TYPES = ["BOOL", *INTEGERS, "FP16", "BF16", *FLOATS, "BYTES"]


def write(target: str, seeds: dict[str, bytes]) -> None:
    folder = SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if not old.name.startswith("found-"):
            old.unlink()
    for name, seed in seeds.items():
        (folder / name).write_bytes(seed)


def tensor(datatype: str, shape: list[int], **members: object) -> dict:
    return {"name": "x", "datatype": datatype, "shape": shape, **members}


def strings(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def rest_body() -> dict[str, bytes]:
    full = {
        "id": "a\"b",
        "parameters": {"timeout": 1500, "priority": 2, "binary_data_output": True, "f": 0.5, "s": "t"},
        "inputs": [tensor("INT32", [2, 2], data=[[1, -2], [3, 4]], parameters={"k": "v"})],
        "outputs": [{"name": "y", "parameters": {"binary_data": False}}, {"name": "z"}],
        "unknown": {"nested": [1, None]},
    }
    where = {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": 4}
    placed = {
        "inputs": [tensor("FP32", [1, 2], parameters=where), tensor("INT8", [1], data=[1]) | {"name": "sent"}],
        "outputs": [{"name": "y", "parameters": where}],
    }

    def one(datatype: str, data: list) -> bytes:
        return json.dumps({"inputs": [tensor(datatype, list(np.shape(data)), data=data)]}).encode()

    return {
        "full": json.dumps(full).encode(),
        "spaced": json.dumps(full, indent=1).encode(),
        "placed": json.dumps(placed).encode(),
        "bool": one("BOOL", [True, False, 1, 0]),
        **{datatype.lower(): one(datatype, [[1, 2], [3, 4.0]]) for datatype in INTEGERS},
        **{datatype.lower(): one(datatype, [0.1, -2e10, 3]) for datatype in FLOATS},
        "literals": one("FP32", [float("nan"), float("inf"), -float("inf"), 1.5]),
        "texts": one("BYTES", ["", "plain", "a\\\"\n\u00e9\u2028\U0001f30a"]),
        "surrogate": b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud83c\\udf0a"]}]}',
        "scalar": b'{"inputs":[{"name":"x","datatype":"FP64","shape":[],"data":[1]}]}',
        "empty": b'{"inputs":[{"name":"x","datatype":"FP32","shape":[0,3],"data":[]}],"outputs":null}',
        "huge": b'{"inputs":[{"name":"x","datatype":"INT8","shape":[4294967296,4294967296],"data":[1]}]}',
        "deep": json.dumps({"inputs": [tensor("INT8", [1] * 64, data=np.ones([1] * 32).tolist())]}).encode(),
        "long-name": json.dumps({"inputs": [tensor("INT8", [2], data=[1]) | {"name": "n" * 5000}]}).encode(),
        "long-text": json.dumps({"inputs": "t" * 5000}).encode(),
    }


def binary_header() -> dict[str, bytes]:
    def whole(inputs: list[tuple[dict, bytes]], **members: object) -> bytes:
        sized = [entry | {"parameters": {"binary_data_size": len(data)}} for entry, data in inputs]
        header = json.dumps({"inputs": sized, **members}).encode()
        return b"\0" + struct.pack("<H", len(header)) + header + b"".join(data for _, data in inputs)

    dice = np.random.default_rng(1)
    return {
        "one": whole([(tensor("FP32", [2, 2]), bytes(16))]),
        "mixed": whole([(tensor("INT64", [1]), bytes(8)), (tensor("BYTES", [2]), strings(b"tide", b""))], id="i"),
        "bool": whole([(tensor("BOOL", [3]), b"\0\1\1")], outputs=[{"name": "y", "parameters": {"binary_data": True}}]),
        "empty": whole([(tensor("BF16", [0]), b"")]),
        "short": whole([(tensor("INT16", [2]), bytes(4))])[:-1],
        **{f"dice-{index}": b"\1" + dice.bytes(200 * index) for index in range(1, 5)},
    }


def raw_request() -> dict[str, bytes]:
    def raw(datatype: str, shape: list[int], body: bytes) -> bytes:
        return bytes([TYPES.index(datatype), len(shape), *(size & 0xFF for size in shape)]) + body

    return {
        "fixed": raw("FP32", [2, 2], bytes(16)),
        "free": raw("INT16", [-1, -1, 3], bytes(12)),
        "two-free": raw("INT8", [-1, -1, -1], bytes(4)),
        "text": raw("BYTES", [-1, 1], b"hello"),
        "empty": raw("UINT8", [-1, 0, -1], b""),
        "huge": raw("FP64", [127, 127, -1], bytes(8)),
    }


def protobuf() -> dict[str, bytes]:
    def message(datatype: str, shape: list[int], **contents: object) -> pb.ModelInferRequest:
        request = pb.ModelInferRequest(model_name="m", model_version="1", id="i")
        request.inputs.add(name="x", datatype=datatype, shape=shape).contents.MergeFrom(
            pb.InferTensorContents(**contents)
        )
        return request

    fields = {"BOOL": "bool_contents", "INT8": "int_contents", "INT64": "int64_contents", "UINT16": "uint_contents",
              "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents"}
    seeds = {datatype.lower(): message(datatype, [2], **{field: [1, 0]}) for datatype, field in fields.items()}
    seeds["bytes"] = message("BYTES", [2], bytes_contents=[b"tide", b""])
    seeds["empty"] = message("FP16", [0])
    raw = message("FP16", [2])
    raw.raw_input_contents.append(bytes(4))
    raw.inputs.add(name="t", datatype="BYTES", shape=[1, 2])
    raw.raw_input_contents.append(strings(b"tide", b"gate"))
    raw.outputs.add(name="y").parameters["binary_data"].bool_param = True
    for name, value in {"int64_param": 5, "string_param": "s", "double_param": 0.5, "uint64_param": 7}.items():
        setattr(raw.parameters[name], name, value)
    raw.inputs[0].parameters["k"].int64_param = -1
    seeds["raw"] = raw
    placed = message("INT8", [1])
    placed.raw_input_contents.append(b"\1")
    placed.inputs.add(name="p", datatype="FP32", shape=[1, 2])
    placed.outputs.add(name="y")
    for each in (placed.inputs[1], placed.outputs[0]):
        each.parameters["shared_memory_region"].string_param = "r"
        each.parameters["shared_memory_byte_size"].int64_param = 8
        each.parameters["shared_memory_offset"].uint64_param = 4
    seeds["placed"] = placed
    return {name: seed.SerializeToString(deterministic=True) for name, seed in seeds.items()}


def compressed_body() -> dict[str, bytes]:
    text = b'{"inputs":[]}' * 20
    limit = struct.pack("<H", 1000)
    packed = gzip.compress(text, mtime=0)
    named = bytearray(packed)
    named[3] |= 8
    named[10:10] = b"name\0"
    return {
        "gzip": b"\0" + limit + packed,
        "gzip-row": b"\0" + limit + packed + packed,
        "gzip-named": b"\0" + limit + bytes(named),
        "deflate": b"\1" + limit + zlib.compress(text),
        "bomb": b"\1" + limit + zlib.compress(bytes(100_000)),
        "identity": b"\2" + limit + b"gzip;q=0.5, deflate;q=1, *;q=0",
    }


def model_config() -> dict[str, bytes]:
    seeds = {
        "batched": """
            name: "m"  # list [ without a colon follows
            platform: "onnxruntime_onnx"
            max_batch_size: 8
            input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] }, { name: "s" dims: 1 reshape { shape: [ ] } } ]
            output # between the name and its list
            [ { name: "y" data_type: TYPE_STRING dims: [ -1 ] label_filename: "labels.txt" } ]
            dynamic_batching { max_queue_delay_microseconds: 100 preferred_batch_size: [ 4, 8 ] }
        """,
        "scheduled": """
            backend: 'onnxruntime' default_model_filename: "net.onnx"
            dynamic_batching {
              priority_levels: 3 default_priority_level: 2
              default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 max_queue_size: 9 }
              priority_queue_policy { key: 1 value: { allow_timeout_override: true } }
            }
            version_policy: { specific { versions: [ 1, 3 ] } }
        """,
        "placed": """
            instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_AUTO rate_limiter { priority: 1 } } ]
            optimization { graph { level: 1 } priority: PRIORITY_MAX }
            parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
            parameters [ { key: "execution_mode" value { string_value: "1" } }, { key: "a[b" value { } } ]
            version_policy { latest { num_versions: 2 } }
        """,
        "warmed": """
            model_warmup [ {
              name: "zeros" batch_size: 4 count: 2
              inputs { key: "x" value: { data_type: TYPE_INT64 dims: [ 2 ] zero_data: true } }
              inputs { key: "z" value: { data_type: TYPE_STRING dims: 1 input_data_file: "f" } }
            } ]
            metric_tags { key: "a" value: "b" }
        """,
        "refused": "ensemble_scheduling { step [ { model_name: \"a\" model_version: -1 } ] }",
        "unclosed": "name: \"m\\n\" input [ { name: \"x\"",
        "long-name": f"name: \"{'n' * 5000}\"",
        "long-word": "w" * 5000,
        "deep": "input { reshape " * 100,
        "json": """{"name": "m", "max_batch_size": 4, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["2"]}],
            "instance_group": [{"count": 1, "kind": "KIND_CPU"}], "versionPolicy": {"latest": {"num_versions": 2}}}""",
        "json-long-input": f'{{"input": [{{"name": "{"n" * 5000}", "dims": ["0"]}}]}}',
        "json-long-text": f'{{"max_batch_size": "{"t" * 5000}"}}',
        "json-long-name": f'{{"{"n" * 5000}": 1}}',
    }
    return {name: text.encode() for name, text in seeds.items()}


def other_shapes() -> dict[str, bytes]:
    csv, generate, predict, invocations = (bytes([shape]) for shape in range(4))
    # By the models of the target.
    matrix, pair, text, scalars = (bytes([model]) for model in [0, 1, 2, 3])
    return {
        "csv": csv + pair + b'a,b\r\n1,"x ""y"""\n-2,z\n',
        "csv-matrix": csv + matrix + b"0,1\n1.5,NaN\n",
        "generate": generate + text + b'{"a":"tide","id":"i","temperature":0.5,"parameters":{"k":true}}',
        "predict-rows": predict + matrix + b'{"signature_name":"serving_default","instances":[[1,2],[3,4.5]]}',
        "predict-named": predict + pair + b'{"instances":[{"a":1,"b":["x"]},{"a":2,"b":[{"b64":"dGlkZQ=="}]}]}',
        "predict-columns": predict + pair + b'{"inputs":{"a":[1,2],"b":[["x"],["y"]]}}',
        "split": invocations + pair + b'{"dataframe_split":{"columns":["a","b"],"index":[0],"data":[[1,"x"]]}}',
        "records": invocations + pair + b'{"dataframe_records":[{"a":1,"b":"x"},{"b":"y","a":2}]}',
        "inputs": invocations + scalars + b'{"inputs":{"a":[[[1,2]]],"b":-Infinity},"params":{"timeout":5}}',
    }


def texts() -> dict[str, bytes]:
    openai, embed, rerank = (bytes([shape]) for shape in range(3))
    # By the models of the target.
    bare, narrow, masked, short = (bytes([model]) for model in range(4))
    return {
        "openai": openai + masked + b'{"model":"m","input":["tide","gate"],"encoding_format":"base64","user":"u"}',
        "openai-ids": openai + short + b'{"input":[[1,2],[3]],"dimensions":1}',
        "openai-one": openai + narrow + b'{"input":"tide","dimensions":2,"encoding_format":"float"}',
        "embed": embed + masked + b'{"inputs":["tide"],"truncate":true,"normalize":false,"prompt_name":null}',
        "embed-ids": embed + bare + b'{"inputs":[1,2,3],"truncation_direction":"Right","model":""}',
        "rerank": rerank + masked + b'{"query":"q","texts":["a","b"],"raw_scores":false,"return_text":true}',
    }


if __name__ == "__main__":
    for target in [
        rest_body, binary_header, raw_request, protobuf, compressed_body, model_config, other_shapes, texts
    ]:
        write(target.__name__, target())
