"""The health service of gRPC, as probes and balancers call it."""

import threading
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from infer import connect
from server import eventually
from wire import TIMEOUT

name_of = health_pb2.HealthCheckResponse.ServingStatus.Name


def check(server, service=""):
    """The status by name, or the code of the refusal."""
    try:
        with connect(server) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT)
            return name_of(reply.status)
    except grpc.RpcError as error:
        return error.code().name


class Watch:
    """What a watch has reported so far, oldest first, and how it ended."""

    def __init__(self, stream):
        self.stream = stream
        self.seen = []
        self.end = None
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        try:
            for reply in self.stream:
                self.seen.append(name_of(reply.status))
            self.end = "OK"
        except grpc.RpcError as error:
            self.end = error.code().name

    def until(self, status):
        """Waits until the last report is `status`."""
        eventually(lambda: self.seen and self.seen[-1] == status, timeout=20)


@contextmanager
def watch(server, service=""):
    with connect(server) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        yield Watch(health_pb2_grpc.HealthStub(channel).Watch(request))
