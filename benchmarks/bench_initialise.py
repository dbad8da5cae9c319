"""Initial weights and noise: python -m benchmarks.bench_initialise [--config configs/netflix.yaml]
[--items 17769] [--threads 2] [--device cpu]

Builds the model of a config with its initial weights, as a run on one rank does, and makes the
noise of 2,048 rows: seconds, and nanoseconds a number.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dist_vasp.config.command_line import load
from dist_vasp.kernels.random import Normal, fill, row_keys
from dist_vasp.model.build import make_trunk, new_model
from dist_vasp.parallel.comm import Group, Ranks
from dist_vasp.parallel.partition import Layout

ROWS = 2048


def timed(what: str, numbers: int, work: Callable[[], Any]) -> Any:
    """Run `work` and print its time."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"{what}: {numbers / 1e6:.1f}M in {seconds:.3f} s, {seconds / numbers * 1e9:.2f} ns each")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/netflix.yaml")
    parser.add_argument("--items", type=int, default=17_769)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config, device, alone = load(arguments.config), torch.device(arguments.device), Group(1, 0)
    ranks = Ranks(0, Layout(1, 1, 1), device, alone, alone, alone)
    start = time.perf_counter()
    model = new_model(config, arguments.items, ranks)
    print(f"allocate and clear the item matrices: {time.perf_counter() - start:.3f} s")
    n = sum(piece.tensor.numel() for piece in model.slices())
    timed("fill the item matrices", n, lambda: model.initialise(1))
    trunk = make_trunk(config.model)
    if trunk is None:
        return
    n = sum(p.numel() for p in trunk.parameters())
    timed("build and fill the trunk, on the CPU", n, lambda: make_trunk(config.model, 1))
    noise = torch.zeros(ROWS, trunk.noise_width, device=device)
    for n_step in range(3):
        keys = row_keys(1, "noise", n_step, np.arange(ROWS))
        timed("noise of a step", noise.numel(), lambda keys=keys: fill(noise, keys, Normal()))


if __name__ == "__main__":
    main()
