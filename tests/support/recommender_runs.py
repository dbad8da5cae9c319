"""Runs with random weights for tests of the Python interface, and their dense oracle.

Shapes: U histories, I items.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from tests.oracles.dense import dense_rows
from tests.support.invoke import run_script
from tests.support.runs import write_run

N_ITEMS = 37
NUMBERS = [1000 + 3 * i for i in range(N_ITEMS)]
NAMES = [f"i{i}" for i in range(N_ITEMS)]
TITLES = [f"Title {i}" for i in range(N_ITEMS)]
KINDS = ["vasp", "flvae", "nease"]
RANDOM = np.random.default_rng(3)
HISTORY_ROWS = [
    sorted(RANDOM.choice(N_ITEMS, size=n, replace=False).tolist()) for n in (1, 2, 5, 9, 3, 30, 36)
]
K = 6


def command(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script(script, *arguments, "--device", "cpu")


def a_run(
    runs: Path,
    kind: str,
    partitions: int = 2,
    ids: list = NUMBERS,
    titles: list[str] | None = None,
    **more,
):
    """(run directory, its dense oracle)"""
    path = runs / f"{kind}-{partitions}-{ids[0]}-{bool(titles)}-{'-'.join(map(str, more.values()))}"
    shutil.rmtree(path, ignore_errors=True)
    return path, write_run(path, ids, kind, partitions, titles, **more)


def ids_of(rows: list[list[int]], ids: list = NUMBERS) -> list[list]:
    return [[ids[i] for i in row] for row in rows]


def dense_p(dense, rows: list[list[int]], loss: str = "focal") -> np.ndarray:
    with torch.no_grad():
        paths, _ = dense.forward(dense_rows(rows, N_ITEMS, torch.float64))
        if loss == "multinomial":
            return torch.softmax(sum(paths), dim=1).numpy()
        return torch.stack([torch.sigmoid(path) for path in paths]).prod(dim=0).numpy()


def dense_lists(
    p: np.ndarray,
    rows: list[list[int]],
    k: int,
    allowed: np.ndarray | None = None,
    mask: bool = True,
) -> list[list[int]]:
    """Item rows of the k best, ties to the lower row."""
    lists = []
    for u, row in enumerate(rows):
        banned = set(row) if mask else set()
        candidates = [
            i for i in range(N_ITEMS) if i not in banned and (allowed is None or allowed[i])
        ]
        lists.append(sorted(candidates, key=lambda i: (-p[u, i], i))[:k])
    return lists


def unpadded(ids: np.ndarray, missing: object = -1) -> list[list]:
    return [[i for i in row if i != missing] for row in ids.tolist()]
