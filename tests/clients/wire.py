"""The wire with no client library in between: plain HTTP, gRPC frames, a proxy that counts."""

import gzip
import http.client
import json
import socket
import struct
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

TIMEOUT = 30

# What each way of failing is called over REST and over gRPC.
CODES = {
    "ok": (200, "OK"),
    "invalid_argument": (400, "INVALID_ARGUMENT"),
    "unauthenticated": (401, "UNAUTHENTICATED"),
    "forbidden": (403, "PERMISSION_DENIED"),
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


def call_frame(address, method, body, headers=None):
    """One gRPC call whose frames and headers no gRPC library would send.

    `method` is `Service/Method`; `body` is all that follows the head.
    """
    fields = {":method": "POST", ":scheme": "http", ":path": f"/{method}", ":authority": address}
    fields |= {"content-type": "application/grpc", "te": "trailers"} | (headers or {})
    reply, data = {}, b""
    for event in exchange(address, fields, body):
        if isinstance(event, ResponseReceived | TrailersReceived):
            reply |= dict(event.headers)
        elif isinstance(event, DataReceived):
            data += event.data
    assert "grpc-status" in reply, f"no status in {reply}"
    name = status_name(int(reply["grpc-status"]))
    return FrameReply(name, unquote(reply.get("grpc-message", "")), reply, data)


def exchange(address, fields, body):
    """Everything that happens on an HTTP/2 stream until the server has ended it."""
    host, port = address.split(":")
    connection = H2Connection(H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    connection.send_headers(1, fields.items(), end_stream=not body)
    with socket.create_connection((host, int(port)), TIMEOUT) as stream:
        while True:
            body = send_what_fits(connection, body)
            stream.sendall(connection.data_to_send())
            received = stream.recv(1 << 16)
            for event in connection.receive_data(received):
                yield event
                if isinstance(event, StreamEnded | StreamReset):
                    return
            if not received:
                return


def send_what_fits(connection, body):
    """Sends as much as the peer has room for; what is left."""
    while body:
        room = min(connection.local_flow_control_window(1), connection.max_outbound_frame_size)
        if room == 0:
            break
        part, body = body[:room], body[room:]
        connection.send_data(1, part, end_stream=not body)
    return body


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
