"""The log turned up and down while the server runs, with every flavour of the stock client."""

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from clients import GRPC, GRPC_AIO, HTTP, HTTP_AIO
from models import plus
from server import eventually

KITS = pytest.mark.parametrize(
    "kit", [HTTP, HTTP_AIO, GRPC, GRPC_AIO], ids=["http", "http.aio", "grpc", "grpc.aio"]
)
DEFAULTS = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


@pytest.fixture
def living(repository, serve):
    repository.add("plus", plus(1))
    return serve(repository.path)


def plain(client, told):
    """Settings as a dict of plain values; gRPC wraps each in the field of its type."""
    if client.kit.is_http:
        return told
    return {key: next(iter(value.values())) for key, value in told["settings"].items()}


def settings(client):
    return plain(client, client.describe("get_log_settings"))


def change(client, **wishes):
    return plain(client, client.describe("update_log_settings", wishes))


def requests_logged(server, client):
    """Whether a request is logged, which it is at debug."""
    before = server.log().count("request_id=")
    client.infer("plus", {"x": np.ones((1, 1), dtype=np.float32)}, request_id="looked-for")
    return server.log().count("request_id=") > before


@KITS
def test_levels(living, kit):
    with kit.connect(living) as client:
        assert settings(client) == DEFAULTS
        assert not requests_logged(living, client)
        assert change(client, log_verbose_level=1) == DEFAULTS | {"log_verbose_level": 1}
        assert settings(client) == DEFAULTS | {"log_verbose_level": 1}
        eventually(lambda: requests_logged(living, client))
        quiet = {"log_verbose_level": 0, "log_info": False, "log_format": "ISO8601"}
        assert change(client, **quiet) == DEFAULTS | quiet
        assert not requests_logged(living, client)
        assert change(client, **DEFAULTS) == DEFAULTS


@KITS
@pytest.mark.parametrize(
    ("wishes", "code", "words"),
    [
        ({"log_info": False, "log_file": "somewhere"}, "unimplemented", ["log_file"]),
        ({"log_info": False, "log_format": "json"}, "invalid_argument", ["log_format", "ISO8601"]),
        ({"log_info": False, "log_errors": True}, "invalid_argument", ["log_errors", "log_error,"]),
        ({"log_info": None}, "invalid_argument", ["log_info", "true or false"]),
    ],
    ids=["file", "format", "unknown", "null"],
)
def test_mistakes_change_nothing(living, kit, wishes, code, words):
    with kit.connect(living) as client:
        with pytest.raises(InferenceServerException) as caught:
            client.raw.update_log_settings(wishes)
        assert caught.value.status() == kit.status(code)
        for word in words:
            assert word in caught.value.message()
        assert settings(client) == DEFAULTS


@KITS
def test_what_the_configuration_says_is_where_it_starts(repository, serve, kit):
    server = serve(repository.path, config='[log]\nlevel = "warn,tidegate=debug"\n')
    with kit.connect(server) as client:
        assert settings(client) == DEFAULTS | {"log_verbose_level": 1}
