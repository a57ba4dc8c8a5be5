"""Clients in closed loops: each asks, waits for the answer, and asks again.

As a script it saturates a server from a process of its own, so that whoever measures
the server does not share an interpreter with the load:

    python load.py GRPC_ADDRESS CLIENTS SECONDS
"""

import random
import sys
import threading
import time
import traceback

import numpy as np

from clients import GRPC, Client


class ClosedLoop:
    """Threads that repeat a call until they are stopped, or it raises.

    Each of `workers` is called in a thread of its own with the function that says whether to
    go on; it makes its client there, because the HTTP client belongs to the thread that made it.
    """

    def __init__(self, workers):
        self.stopping = threading.Event()
        self.failures = []
        self.threads = [threading.Thread(target=self.run, args=[worker]) for worker in workers]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join()

    def join(self):
        for thread in self.threads:
            thread.join()

    def run(self, worker):
        try:
            worker(lambda: not self.stopping.is_set())
        except Exception:
            self.failures.append(traceback.format_exc())

    def check(self):
        assert not self.failures, f"{len(self.failures)} failed; the first:\n{self.failures[0]}"


def stock_worker(kit, address, step):
    """A worker that repeats `step(client)` with a stock client of its own."""

    def work(going_on):
        with Client(kit, address) as client:
            while going_on():
                step(client)

    return work


def file_of(seed):
    """An input for `magika`: 2048 of 256 byte values, or 256 for none."""
    rng = random.Random(seed)
    length = rng.randrange(2, 2049)
    row = [rng.randrange(256) for _ in range(length)] + [256] * (2048 - length)
    return np.array([row], dtype=np.int32)


def saturate(address, clients, seconds):
    def ask(client):
        client.infer("magika", {"bytes": file_of(1)})

    with ClosedLoop(stock_worker(GRPC, address, ask) for _ in range(clients)) as loop:
        print("running", flush=True)
        time.sleep(seconds)
    loop.check()


if __name__ == "__main__":
    saturate(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
