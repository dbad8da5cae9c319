"""What this machine could do at best: rates measured now, and the time they set for a step.

floor = 6 * rows * (trunk weights + I (H + L)) / matrix-product rate
      + 2 * rows * items of a row * (I + H) * bytes of a weight / row-gather rate
      + weights and state read and written once / copy rate

Products and rows have the precision of the run: with bf16 a weight has 2 bytes in them, and the
update writes 2 more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from dist_vasp.config.schema import Config
from dist_vasp.kernels.interface import PLAIN, Kernels
from dist_vasp.kernels.precision import FP32, Precision
from dist_vasp.model.build import measure_size
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.terms import FLOAT


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median seconds of `work` after a warm-up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def measure_rates(
    device: torch.device,
    n_items: int,
    precision: Precision = FP32,
    kernels: Kernels = PLAIN,
    rows: int = 1024,
    items_per_row: int = 64,
) -> Rates:
    """Matrix products, a copy, and sums of rows out of a table of `n_items` rows, in the precision
    of a run. On a GPU the products and the rows are larger, because small ones do not fill it."""
    size, width = (2048, 256) if device.type == "cpu" else (8192, 2048)
    dtype = precision.dtype or torch.float32
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    with precision.scope():
        flops = 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=product), device)
    source = torch.rand(1 << 26, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * FLOAT / _seconds(lambda: target.copy_(source), device)
    table = torch.rand(n_items, width, device=device).to(dtype)
    ids = torch.randint(n_items, (rows * items_per_row,), device=device)
    indptr = torch.arange(0, rows * items_per_row + 1, items_per_row, device=device)
    seconds = _seconds(lambda: kernels.sum_rows(table, ids, indptr), device)
    gather = ids.numel() * width * dtype.itemsize / seconds
    return Rates(flops=flops, copy=copy, gather=gather)


def step_floor(
    config: Config,
    n_items: int,
    partitions: int,
    rows: float,
    items_per_row: float,
    rates: Rates,
    precision: Precision = FP32,
) -> dict[str, float]:
    """Seconds that the rates set for one step of a rank.

    partitions: ranks that share the items. rows: of the whole step. precision: of the rates.
    """
    word = precision.dtype.itemsize if precision.dtype else FLOAT
    model = measure_size(config, n_items, partitions)
    moments = 2 * FLOAT if config.optimizer.item_state == "full" else FLOAT
    updated = 2 * (FLOAT + moments) + (word if precision.dtype else 0)
    products = model.trunk + n_items * sum(model.widths)
    gathered = n_items * model.matrices + model.hidden
    return {
        "matrix products": 6 * rows * products / rates.flops,
        "row gathers": 2 * rows * items_per_row * gathered * word / rates.gather,
        "update": model.parameters * updated / rates.copy,
    }
