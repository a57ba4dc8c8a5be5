"""Tensors as plain values, and the shapes they take on the wire."""

import json
import struct
from dataclasses import dataclass

import numpy as np

# How one element of each datatype lies in memory; BF16 as its two bytes.
FORMATS = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "BF16": "<u2",
    "FP32": "<f4",
    "FP64": "<f8",
}
DATATYPES = [*FORMATS, "BYTES"]

# The field of `InferTensorContents` for each datatype that has one.
FIELDS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@dataclass
class Tensor:
    """`data` is a flat list; the elements of BYTES are bytes."""

    name: str
    datatype: str
    shape: list
    data: list

    def packed(self):
        return pack(self.datatype, self.data)


def tensor(name, datatype, shape, data):
    """A `Tensor` of what a test finds handy to write: texts for BYTES, nested lists."""
    flat = flatten(data)
    if datatype == "BYTES":
        flat = [element.encode() if isinstance(element, str) else element for element in flat]
    return Tensor(name, datatype, list(shape), flat)


def flatten(data):
    if not isinstance(data, list):
        return [data]
    return [element for part in data for element in flatten(part)]


def pack(datatype, data):
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(element)) + element for element in data)
    return np.array(data, FORMATS[datatype]).tobytes()


def unpack(datatype, raw):
    if datatype != "BYTES":
        return np.frombuffer(raw, FORMATS[datatype]).tolist()
    elements, offset = [], 0
    while offset < len(raw):
        (length,) = struct.unpack_from("<I", raw, offset)
        elements.append(raw[offset + 4 : offset + 4 + length])
        offset += 4 + length
    return elements


def same_bytes(tensor, datatype, data):
    """Whether the tensor holds exactly these elements, the sign of zero and NaN included."""
    return tensor.datatype == datatype and tensor.packed() == pack(datatype, data)


def as_json(tensor):
    """The tensor as a JSON message has it, with `NaN` and `Infinity` bare."""
    data = tensor.data
    if tensor.datatype == "BYTES":
        data = [element.decode() for element in data]
    return {**described(tensor), "data": data}


def described(tensor):
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}


def binary_message(header, blobs):
    """Body and headers of a request in the binary tensor extension."""
    head = json.dumps(header).encode()
    fields = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return b"".join([head, *blobs]), fields


def split_binary(body, header_length):
    """A reply in the binary tensor extension: its JSON, and one blob for each binary output."""
    message = json.loads(body[:header_length])
    blobs, offset = {}, header_length
    for output in message["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            blobs[output["name"]] = body[offset : offset + size]
            offset += size
    assert offset == len(body), f"{len(body) - offset} bytes too many in the reply"
    return message, blobs
