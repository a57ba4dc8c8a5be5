"""What the tests ask of servers whose models are mirrored, and what they put in the models' place."""

import json
import re
from pathlib import Path

from infer import Question, rest_json
from models import EXTERNAL_WEIGHTS, plus
from tensors import tensor
from wire import call

CONFIG = '[follow]\ninterval = "250ms"\n'
# Until something new is looked at, fetched and loaded.
SOON = 30


def graph(number):
    return plus(number).SerializeToString()


def weights():
    """The file beside `models.with_external_data`."""
    return EXTERNAL_WEIGHTS.tobytes()


def answers(server, model="plus", number=1):
    answer = rest_json(server, Question(model, [tensor("x", "FP32", [1, 1], [number])]))
    return None if answer.error else answer.outputs["y"].data[0]


def adds_weights(server, model):
    """Whether `models.with_external_data` answers with its weights."""
    answer = rest_json(server, Question(model, [tensor("x", "FP32", [1, 4], [0, 0, 0, 0])]))
    assert not answer.error, server.tail()
    return list(answer.outputs["y"].data) == EXTERNAL_WEIGHTS.tolist()


def versions(server, model="plus"):
    return json.loads(call(server.rest, "GET", f"/v2/models/{model}").body)["versions"]


def log_has(server, *words):
    return any(all(word in line for word in words) for line in server.log().splitlines())


def memory(server):
    """Bytes of the process that are no file's."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10
