"""What models cost in memory, by the kernel's proportional set size, and that loading them stays behind requests."""

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import dropwhile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from clients import HTTP
from models import model, value
from server import eventually

EXPLICIT = ["--model-control", "explicit"]
SIZE, LAYERS = 1448, 8  # 8 × 1448² × 4 bytes = 67 MB
WEIGHTS = LAYERS * SIZE * SIZE * 4
SETTINGS = "[options]\nintra_op_threads = 1\n"
ROWS = np.linspace(-1, 1, 2 * SIZE, dtype=np.float32).reshape(2, SIZE)


def matrices(layers=LAYERS):
    """A chain of products: as any large model, nearly all weights of matrices."""
    random = np.random.default_rng(0)
    names = ["x", *(f"t{layer}" for layer in range(1, layers)), "y"]
    weights = [
        numpy_helper.from_array(
            (random.random((SIZE, SIZE), dtype=np.float32) - 0.5) / 16, f"w{layer}"
        )
        for layer in range(layers)
    ]
    nodes = [
        helper.make_node("MatMul", [names[layer], f"w{layer}"], [names[layer + 1]])
        for layer in range(layers)
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


def kernels():
    """Graphs whose weights ONNX Runtime rewrites or repacks, each in another way, by name; x → y."""
    random = np.random.default_rng(1)

    def weights(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    def graph(nodes, shape, output, initializers):
        return model(nodes, [value("x", "FP32", shape)], [value("y", "FP32", output)], initializers)

    node = helper.make_node
    row = ["n", 256]
    quantized = random.integers(-128, 127, (256, 512), dtype=np.int8)
    return {
        "convolution": graph(
            [
                node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
                node("BatchNormalization", ["a", "scale", "bias", "mean", "variance"], ["b"]),
                node("Conv", ["b", "deep"], ["y"], pads=[1, 1, 1, 1]),
            ],
            ["n", 3, 16, 16],
            ["n", 64, 16, 16],
            {
                "w": weights(64, 3, 3, 3),
                "scale": weights(64),
                "bias": weights(64),
                "mean": weights(64),
                "variance": np.ones(64, dtype=np.float32),
                "deep": weights(64, 64, 3, 3),
            },
        ),
        "transposed": graph(
            [
                node("Transpose", ["w"], ["t"], perm=[1, 0]),
                node("MatMul", ["x", "t"], ["a"]),
                node("Gemm", ["a", "v", "b"], ["y"], transB=1),
            ],
            row,
            ["n", 300],
            {"w": weights(400, 256), "v": weights(300, 400), "b": weights(300)},
        ),
        "recurrent": graph(
            [node("LSTM", ["x", "w", "r"], ["y"], hidden_size=128)],
            [4, 2, 100],
            [4, 1, 2, 128],
            {"w": weights(1, 512, 100), "r": weights(1, 512, 128)},
        ),
        "quantized": graph(
            [
                node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
                node("MatMulInteger", ["q", "w", "z"], ["i"]),
                node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                node("Mul", ["f", "s"], ["y"]),
            ],
            row,
            ["n", 512],
            {"w": quantized},
        ),
        "twice": graph(
            [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "w"], ["y"])],
            [256, 256],
            [256, 256],
            {"w": weights(256, 256)},
        ),
    }


@pytest.fixture
def both_ways(repository, serve):
    """Every graph of `kernels`, alone and as two instances that share weights."""
    for name, graph in kernels().items():
        repository.add(f"{name}_alone", graph, settings=f"instances = 1\n{SETTINGS}")
        shared = f"instances = 2\n{SETTINGS}share_prepacked_weights = true\n"
        repository.add(f"{name}_shared", graph, settings=shared)
    return serve(repository.path)


def test_shared_weights_change_no_bit_of_any_answer(both_ways):
    maps = Path(f"/proc/{both_ways.process.pid}/maps").read_text()
    # One mapping of each file for each instance, at least.
    assert len(re.findall(r"/weights-\S+/weights \(deleted\)", maps)) >= 2 * len(kernels())
    random = np.random.default_rng(2)
    with HTTP.connect(both_ways) as client:
        for name, graph in kernels().items():
            dims = graph.graph.input[0].type.tensor_type.shape.dim
            x = random.standard_normal([dim.dim_value or 3 for dim in dims], dtype=np.float32)
            alone, *shared = [
                client.infer(f"{name}_{kind}", {"x": x}).as_numpy("y")
                for kind in ["alone", *["shared"] * 4]
            ]
            assert all(np.array_equal(answer, alone) for answer in shared), name


def test_a_load_beside_traffic_is_idle_work(repository, serve):
    """The thread that loads gives way to any other, and hands its place to no thread that serves."""
    repository.ship("iris")
    server = serve(repository.path, flags=[*EXPLICIT, "--load-model", "iris"])
    repository.add("matrices", matrices(layers=1), settings="instances = 2\n[options]\nintra_op_threads = 2\n")
    loading = []

    with HTTP.connect(server) as client:
        with ThreadPoolExecutor() as pool:
            loaded = pool.submit(load_apart, server)
            while not loaded.done():
                loading.append(policies(server, "load"))
        loaded.result()
        answer(client)
    inherited = policies(server, "main")
    # A thread begins as the one that started it; with luck it is seen before it steps back.
    loading = [found for found in loading if found]
    begun = list(dropwhile(lambda found: found != {5}, loading))
    assert begun and all(found == {5} for found in begun) and len(loading) - len(begun) <= 1, loading
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
