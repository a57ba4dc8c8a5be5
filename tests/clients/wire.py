"""The wire with no client library in between: plain HTTP, gRPC frames, a proxy that counts."""

import gzip
import http.client
import json
import re
import socket
import struct
import subprocess
import tempfile
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import grpc

TIMEOUT = 30

# What each way of failing is called over REST and over gRPC.
CODES = {
    "ok": (200, "OK"),
    "invalid_argument": (400, "INVALID_ARGUMENT"),
    "not_found": (404, "NOT_FOUND"),
    "wrong_verb": (405, None),
    "too_large": (413, "RESOURCE_EXHAUSTED"),
    "unknown_encoding": (415, "UNIMPLEMENTED"),
    "overloaded": (429, "RESOURCE_EXHAUSTED"),
    "unimplemented": (501, "UNIMPLEMENTED"),
    "not_ready": (503, "UNAVAILABLE"),
    "deadline_exceeded": (504, "DEADLINE_EXCEEDED"),
}

DECODERS = {"identity": bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}


@dataclass
class Reply:
    """An HTTP reply; header names in lower case."""

    status: int
    headers: dict
    body: bytes

    def json(self):
        encoding = self.headers.get("content-encoding", "identity")
        return json.loads(DECODERS[encoding](self.body))


@dataclass
class FrameReply:
    """A unary gRPC reply as it came: the status by name and the message's frame, flag included."""

    status: str
    error: str
    headers: dict
    frame: bytes


def call(address, method, path, body=None, headers=None, timeout=TIMEOUT):
    """One request on a connection of its own, with no header that was not asked for.

    A `body` of bytes has a length; any other iterable goes out in chunks.
    """
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        send(connection, method, path, body, headers or {})
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, fields, response.read())
    finally:
        connection.close()


def send(connection, method, path, body=None, headers=()):
    chunked = body is not None and not isinstance(body, bytes)
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in dict(headers).items():
        connection.putheader(name, value)
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    elif body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    # A server may refuse a body before it has seen the end of it.
    with suppress(BrokenPipeError, ConnectionResetError):
        for part in body if chunked else filter(None, [body]):
            connection.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        if chunked:
            connection.send(b"0\r\n\r\n")


def call_frame(address, method, frame, headers=None):
    """One gRPC call whose frame and headers no library would send.

    `method` is `Service/Method`; the call is curl's, because stock gRPC allows neither.
    """
    with tempfile.TemporaryDirectory() as folder:
        sent, got, fields = (Path(folder) / name for name in ("sent", "got", "fields"))
        sent.write_bytes(frame)
        got.touch()
        command = ["curl", "-sS", "--http2-prior-knowledge", "--max-time", str(TIMEOUT)]
        command += ["--data-binary", f"@{sent}", "--output", got, "--dump-header", fields]
        for name, value in {"content-type": "application/grpc", "te": "trailers"}.items():
            command += ["--header", f"{name}: {value}"]
        for name, value in (headers or {}).items():
            command += ["--header", f"{name}: {value}"]
        done = subprocess.run([*command, f"http://{address}/{method}"], capture_output=True)
        # A refused upload is no error here as long as a status came back.
        found = dict(re.findall(r"^([\w-]+): ?(.*?)\r?$", fields.read_text(), re.MULTILINE))
        assert "grpc-status" in found, f"no status in {found}; curl: {done.stderr.decode()}"
        name = status_name(int(found["grpc-status"]))
        return FrameReply(name, unquote(found.get("grpc-message", "")), found, got.read_bytes())


def frame(message, compressed=False):
    return struct.pack(">BI", compressed, len(message)) + message


def status_name(number):
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


class CountingProxy:
    """Sits between a client and a server and counts what passes: `sent` up, `received` down."""

    def __init__(self, target):
        self.target = target
        self.sent = self.received = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:{1}".format(*self.listener.getsockname())
        self.sockets = [self.listener]
        spawn(self.accept)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def accept(self):
        host, port = self.target.split(":")
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection((host, int(port)))
                self.sockets += [client, server]
                spawn(self.pump, client, server, "sent")
                spawn(self.pump, server, client, "received")

    def pump(self, source, sink, counter):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, counter, getattr(self, counter) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def reset(self):
        self.sent = self.received = 0


def spawn(target, *arguments):
    threading.Thread(target=target, args=arguments, daemon=True).start()
