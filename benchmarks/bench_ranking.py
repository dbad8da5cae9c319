"""Compare the ranking with plain numpy (dense scores, argpartition), alternating in one run.

    python -m benchmarks.bench_ranking --run RUN_DIR

It compares the lists, the time, and the memory that the process needs in addition to the weights.
The ranking takes all users of the split in blocks; numpy takes as many as fit in memory at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from dist_vasp.data.held_out import EvalBlock, evaluation_blocks
from dist_vasp.data.rows import concatenate_rows
from dist_vasp.parallel.start import init_ranks
from dist_vasp.ranking.evaluate import USERS_PER_BLOCK, top_items
from dist_vasp.ranking.load import LoadedModel, load_model

K = 100


def _log_sigmoid(a: np.ndarray) -> np.ndarray:
    return np.minimum(a, 0) - np.log1p(np.exp(-np.abs(a)))


def numpy_lists(
    loaded: LoadedModel, weights: dict[str, np.ndarray], block: EvalBlock, k: int
) -> np.ndarray:
    """(U, k) item rows: dense x, dense matrix products, every score held, argpartition then
    sort."""
    x = np.zeros((block.fold_in.n_rows, len(loaded.items.keys)), np.float32)
    rows = np.repeat(np.arange(block.fold_in.n_rows), block.fold_in.lengths)
    x[rows, block.fold_in.items] = 1
    scores = np.zeros_like(x)
    model, trunk = loaded.model.model, loaded.model.trunk
    if trunk is not None:
        with torch.no_grad():
            (d, z), _ = trunk(torch.from_numpy(x @ weights["input.weight"]), None)
        for name, source in (("output.decoder", d.numpy()), ("output.latent", z.numpy())):
            if f"{name}.weight" in weights:
                scores += _log_sigmoid(
                    source @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
                )
    for piece in (
        model.slices()
    ):  # block by block as it is stored: a copy of W in one piece would not fit beside it
        if piece.name == "output.nease.weight":
            scores[:, piece.lo : piece.hi] += _log_sigmoid(x @ piece.tensor.numpy())
    scores[rows, block.fold_in.items] = -np.inf
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


class Measured:
    """Seconds of every round, and the peak growth of resident memory, by Linux's own record."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.grew = 0

    def run(self, work: Callable[[], np.ndarray]) -> np.ndarray:
        Path("/proc/self/clear_refs").write_text("5")
        before, start = _status("VmRSS"), time.perf_counter()
        result = work()
        self.seconds.append(time.perf_counter() - start)
        self.grew = max(self.grew, _status("VmHWM") - before)
        return result


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def _joined(blocks: list[EvalBlock]) -> EvalBlock:
    keys = np.concatenate([b.user_keys for b in blocks])
    return EvalBlock(
        keys, *(concatenate_rows([getattr(b, n) for b in blocks]) for n in ("fold_in", "held_out"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--shards", default="", help="default: those of the run")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--users",
        type=int,
        default=1 << 30,
        help="users for the ranking; default: all of the split",
    )
    parser.add_argument(
        "--numpy_users", type=int, default=2048, help="users for numpy, all at once"
    )
    parser.add_argument("--users_per_block", type=int, default=USERS_PER_BLOCK)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ranks = init_ranks(device="cpu")
    loaded = load_model(arguments.run, None, ranks)
    weights = {p.name: p.tensor.numpy() for p in loaded.model.model.slices() if p.item_dim == 0}
    shards = arguments.shards or loaded.config.data.shards
    blocks = list(
        evaluation_blocks(shards, arguments.split, arguments.users_per_block, 0, arguments.users)
    )
    few = _joined(
        list(
            evaluation_blocks(
                shards,
                arguments.split,
                USERS_PER_BLOCK,
                0,
                min(arguments.users, arguments.numpy_users),
            )
        )
    )
    scorer, n_items = loaded.model.scores, len(loaded.items.keys)

    def ours() -> np.ndarray:
        return np.concatenate(
            [top_items(scorer, block.fold_in, K, n_items, ranks)[1] for block in blocks]
        )

    sides = {"ours": Measured(), "numpy": Measured()}
    for _ in range(arguments.rounds):
        lists = sides["ours"].run(ours)
        dense = sides["numpy"].run(lambda: numpy_lists(loaded, weights, few, K))
    n = {"ours": len(lists), "numpy": len(dense)}
    same = (lists[: n["numpy"]] == dense).mean()
    print(f"{n_items} items, lists of {K}: {same:.2%} of the places hold the same item")
    rate = {side: n[side] / median(measured.seconds) for side, measured in sides.items()}
    for side, measured in sides.items():
        print(
            f"{side}: {n[side]} users in {median(measured.seconds):.2f} s, "
            f"{rate[side]:.0f} users/s, grew {measured.grew / 1e9:.3f} GB"
        )
    print(
        f"ratio of users/s {rate['ours'] / rate['numpy']:.1f}; of memory "
        f"{sides['ours'].grew / sides['numpy'].grew:.3f}"
    )


if __name__ == "__main__":
    main()
