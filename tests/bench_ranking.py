"""Our ranking against straight numpy (dense scores, argpartition) in one run, alternating: python -m tests.bench_ranking --run RUN_DIR

Both rank the first `--users` users of a split; the lists are compared, and the peak of what each allocates beside the weights.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from statistics import median

import numpy as np
import torch

from dist_vasp.data.stream import EvalBlock, concatenate_rows, evaluation_blocks
from dist_vasp.parallel.comm import init_ranks
from dist_vasp.ranking.evaluate import USERS_PER_BLOCK, model_scorer, top_items
from dist_vasp.ranking.load import LoadedModel, load_model


def _log_sigmoid(a: np.ndarray) -> np.ndarray:
    return np.minimum(a, 0) - np.log1p(np.exp(-np.abs(a)))


def numpy_lists(loaded: LoadedModel, weights: dict[str, np.ndarray], block: EvalBlock, k: int) -> np.ndarray:
    """(U, k) item rows: dense x, dense matrix products, every score held, argpartition then sort."""
    x = np.zeros((block.fold_in.n_rows, len(loaded.items.keys)), np.float32)
    rows = np.repeat(np.arange(block.fold_in.n_rows), block.fold_in.lengths)
    x[rows, block.fold_in.items] = 1
    scores = np.zeros_like(x)
    if loaded.trunk is not None:
        with torch.no_grad():
            d, z, _ = loaded.trunk(torch.from_numpy(x @ weights["input.weight"]), None)
        for name, source in (("output.decoder", d.numpy()), ("output.latent", z.numpy())):
            if f"{name}.weight" in weights:
                scores += _log_sigmoid(source @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    if "output.nease.weight" in weights:
        scores += _log_sigmoid(x @ weights["output.nease.weight"])
    scores[rows, block.fold_in.items] = -np.inf
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--users", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ranks = init_ranks(device="cpu")
    loaded = load_model(arguments.run, None, ranks)
    pieces: dict[str, list[np.ndarray]] = {}
    for piece in loaded.model.slices():
        pieces.setdefault(piece.name, []).append(piece.tensor.numpy())
    weights = {name: np.concatenate(parts, axis=1 if name.endswith("nease.weight") else 0) for name, parts in pieces.items()}
    blocks = list(evaluation_blocks(loaded.config.data.shards, arguments.split, USERS_PER_BLOCK, 0, arguments.users))
    everyone = EvalBlock(
        np.concatenate([b.user_keys for b in blocks]),
        *(concatenate_rows([getattr(b, n) for b in blocks]) for n in ("fold_in", "held_out")),
    )
    scorer, seconds, n_items = model_scorer(loaded.model, loaded.trunk), {"ours": [], "numpy": []}, len(loaded.items.keys)
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        ours = np.concatenate([top_items(scorer, block.fold_in, 100, n_items, ranks)[1] for block in blocks])
        seconds["ours"].append(time.perf_counter() - start)
        tracemalloc.start()
        start = time.perf_counter()
        dense = numpy_lists(loaded, weights, everyone, 100)
        seconds["numpy"].append(time.perf_counter() - start)
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        same = (ours == dense).mean()
    n = len(everyone.user_keys)
    print(f"{n} users, {n_items} items: {same:.2%} of the places hold the same item")
    for side, taken in seconds.items():
        print(f"{side}: {median(taken):.2f} s, {n / median(taken):.0f} users/s")
    held = 4 * USERS_PER_BLOCK * (2048 + 256 * 12)
    print(
        f"ratio {median(d / o for o, d in zip(seconds['ours'], seconds['numpy'], strict=True)):.1f}; beside the weights numpy held "
    )
    print(f"{numpy_peak / 1e9:.2f} GB at its peak, our blocks about {held / 1e9:.3f} GB whatever the number of users")


if __name__ == "__main__":
    main()
