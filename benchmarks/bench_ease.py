"""Closed-form EASE against numpy.linalg.inv of the same float64 matrix, alternating: python -m
benchmarks.bench_ease --shards DIR --value 600

Each inverse runs in a process of its own: the peak of resident memory less what it held just
before, its Gram matrix included, is what the inverse took. The Gram matrix is made by both in the
same way and not counted. `--conditioning` measures instead how exact float32 is on ever worse
matrices.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from dist_vasp.data.manifest import Manifest
from dist_vasp.model.ease import SWEEP_COLUMNS, SymmetricColumns, add_gram, add_to_diagonal, invert
from dist_vasp.parallel.comm import Ranks
from dist_vasp.parallel.start import init_ranks
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.training.closed_form.ease import training_blocks


def gram(shards: str, value: float, dtype: torch.dtype, ranks: Ranks) -> SymmetricColumns:
    manifest = Manifest.load(shards)
    n = manifest.n_items
    columns = [
        torch.zeros((n, hi - lo), dtype=dtype)
        for lo, hi in ranks.partition_of_items(n).blocks(SWEEP_COLUMNS)
    ]
    G = SymmetricColumns(columns, n, ranks, SWEEP_COLUMNS)
    for block in training_blocks(shards, manifest):
        add_gram(G, to_item_rows(block.rows, block.n_users, n, ranks.device))
    add_to_diagonal(G, value)
    return G


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def one(side: str, shards: str, value: float) -> dict[str, Any]:
    """Seconds, peak GB of the process, what the inverse took of it, and some entries of P that both
    sides must share."""
    G = gram(shards, value, torch.float64, init_ranks(device="cpu"))
    if side == "numpy":
        G.fill()
        dense = torch.cat(G.columns, dim=1).numpy()
        G.columns.clear()
    before, start = psutil.Process().memory_info().rss / 1e9, time.perf_counter()
    if side == "numpy":
        P = np.linalg.inv(dense)
    else:
        invert(G)
    seconds, peak = time.perf_counter() - start, _peak()
    if side == "ours":
        P = -torch.cat(G.columns, dim=1).numpy()
    checked = P[:: len(P) // 50, :: len(P) // 50]
    return {"seconds": seconds, "peak": peak, "grew": peak - before, "entries": checked.tolist()}


def conditioning(shards: str) -> None:
    """Relative error of P in the Frobenius norm, against numpy.linalg.inv in float64."""
    ranks = init_ranks(device="cpu")
    print("| lambda | condition | sweep | LAPACK Cholesky | LAPACK LU |\n|---|---|---|---|---|")
    for value in (600.0, 10.0, 0.1, 0.001):
        G = gram(shards, value, torch.float64, ranks)
        G.fill()
        dense = torch.cat(G.columns, dim=1)
        eigenvalues = torch.linalg.eigvalsh(dense)
        exact = torch.from_numpy(np.linalg.inv(dense.numpy()))
        row = [f"{value:g}", f"{eigenvalues[-1] / eigenvalues[0]:.1e}"]
        single = dense.float()
        G = gram(shards, value, torch.float32, ranks)

        def sweep(G: SymmetricColumns = G) -> torch.Tensor:
            invert(G)
            return -torch.cat(G.columns, dim=1)

        for inverse in (
            sweep,
            lambda A=single: torch.cholesky_inverse(torch.linalg.cholesky(A)),
            lambda A=single: torch.linalg.inv(A),
        ):
            try:
                row.append(f"{((inverse().double() - exact).norm() / exact.norm()).item():.1e}")
            except (ValueError, RuntimeError):
                row.append("not positive definite")
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--value", type=float, default=600.0, help="lambda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--conditioning", action="store_true")
    parser.add_argument(
        "--side", choices=["ours", "numpy"], help="internal: one measurement, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one(arguments.side, arguments.shards, arguments.value)))
        return
    if arguments.conditioning:
        conditioning(arguments.shards)
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "numpy": []}
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_ease",
        "--shards",
        arguments.shards,
        "--value",
        str(arguments.value),
    ]
    for _ in range(arguments.rounds):
        for side, measured in found.items():
            out = subprocess.run(
                [*command, "--side", side], capture_output=True, text=True, check=True
            ).stdout
            measured.append(json.loads(out.splitlines()[-1]))
    for side, measured in found.items():
        seconds, peak, grew = (
            median(m[name] for m in measured) for name in ("seconds", "peak", "grew")
        )
        print(
            f"{side}: {seconds:.2f} s, peak of the process {peak:.3f} GB, "
            f"{grew:.3f} GB of it for the inverse",
            flush=True,
        )
    ratio = median(
        n["seconds"] / o["seconds"] for o, n in zip(found["ours"], found["numpy"], strict=True)
    )
    ours, numpys = (np.array(found[side][0]["entries"]) for side in ("ours", "numpy"))
    error = np.linalg.norm(ours - numpys) / np.linalg.norm(numpys)
    print(
        f"numpy takes {ratio:.2f} times as long; {ours.size} entries of P differ "
        f"by {error:.1e} in their norm"
    )


if __name__ == "__main__":
    main()
