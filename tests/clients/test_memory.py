"""What models cost in memory, by the kernel's proportional set size, and that loading them stays behind requests."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from clients import HTTP
from server import eventually

EXPLICIT = ["--model-control", "explicit"]
SIZE, LAYERS = 1448, 8  # 8 × 1448² × 4 bytes = 67 MB
WEIGHTS = LAYERS * SIZE * SIZE * 4
SETTINGS = "[options]\nintra_op_threads = 1\n"
ROWS = np.linspace(-1, 1, 2 * SIZE, dtype=np.float32).reshape(2, SIZE)


def matrices():
    """A chain of products: as any large model, nearly all weights of matrices."""
    random = np.random.default_rng(0)
    names = ["x", *(f"t{layer}" for layer in range(1, LAYERS)), "y"]
    weights = [
        numpy_helper.from_array(
            (random.random((SIZE, SIZE), dtype=np.float32) - 0.5) / 16, f"w{layer}"
        )
        for layer in range(LAYERS)
    ]
    nodes = [
        helper.make_node("MatMul", [names[layer], f"w{layer}"], [names[layer + 1]])
        for layer in range(LAYERS)
    ]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", SIZE]) for end in "xy"]
    graph = helper.make_graph(nodes, "matrices", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def pss(server):
    """Bytes that are this process's, pages that others use too by their share."""
    text = Path(f"/proc/{server.process.pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def answer(client, rows=ROWS):
    return client.infer("matrices", {"x": rows}).as_numpy("y")


def test_instances_share_weights_and_give_them_back(repository, serve):
    graph = matrices()
    repository.add("matrices", graph, settings=f"instances = 1\n{SETTINGS}")
    server = serve(repository.path, flags=EXPLICIT)
    idle = pss(server)
    with HTTP.connect(server) as client:
        client.raw.load_model("matrices")
        alone = answer(client)
        one = (pss(server) - idle) / WEIGHTS
        client.raw.unload_model("matrices")
        # An unloaded model is dropped after the answer.
        eventually(lambda: (pss(server) - idle) / WEIGHTS < 0.25)

        settings = repository.path / "matrices" / "model.toml"
        settings.write_text(f"instances = 4\n{SETTINGS}")
        client.raw.load_model("matrices")
        assert np.array_equal(answer(client), alone)
        four = (pss(server) - idle) / WEIGHTS
        assert "its instances hold weights of their own" not in server.log()
        assert not list((server.home / "data").glob("weights-*")), "the folder outlives the load"
        client.raw.unload_model("matrices")
        eventually(lambda: (pss(server) - idle) / WEIGHTS < 0.25)
    assert one < 1.25, one
    assert four < 1.4, four


def test_a_load_beside_traffic_is_idle_work(repository, serve):
    """The thread that loads gives way to any other, and hands its place to no thread that serves."""
    repository.ship("iris")
    server = serve(repository.path, flags=[*EXPLICIT, "--load-model", "iris"])
    repository.add("matrices", matrices(), settings="instances = 2\n[options]\nintra_op_threads = 2\n")
    loading = set()

    with HTTP.connect(server) as client:
        with ThreadPoolExecutor() as pool:
            loaded = pool.submit(load_apart, server)
            while not loaded.done():
                loading |= policies(server, "load")
        loaded.result()
        answer(client)
    inherited = policies(server, "main")
    assert loading == {5}, loading
    serving = policies(server, "run-") | policies(server, "ort-")
    assert serving == inherited, (serving, inherited)


def load_apart(server):
    with HTTP.connect(server) as client:
        client.raw.load_model("matrices")


def policies(server, name):
    """The scheduling policies of the process's threads by a name; "main" is the first thread."""
    found = set()
    pid = server.process.pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            stat = (task / "stat").read_text()
        except OSError:
            continue  # It has ended.
        thread, fields = stat.split("(", 1)[1].rsplit(")", 1)
        if thread.startswith(name) or (name == "main" and task.name == str(pid)):
            found.add(int(fields.split()[38]))
    return found
