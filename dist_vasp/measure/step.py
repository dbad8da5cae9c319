"""One job of a benchmark: some steps on real batches, and where the time of each went.

A part excludes the parts inside it: a collective of the input side counts as communication. On a
GPU the clock waits for the device wherever a part begins or ends, so the parts add up, and the
whole is slower than training, which replays a recorded step (training/step/captured_step.py).
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from dist_vasp.config.schema import Config
from dist_vasp.parallel.clock import Clock
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training.batches import make_stream, with_next
from dist_vasp.training.floor import measure_rates, step_floor
from dist_vasp.training.step.engine import Trainer
from dist_vasp.training.step.zero import watch_traffic

LABELS = ("input", "trunk", "output", "optimizer", "communication", "data wait", "other")


class StopWatch(Clock):
    """Adds up the seconds of each part, less those of the parts inside it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        self._device = device

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            self.seconds[part] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Measured:
    """What one rank has measured of a job; times in seconds, means and medians are of one step."""

    rank: int
    threads: int
    steps: int
    step_seconds: float
    users_per_second: float
    rows_per_step: float
    items_per_row: float
    n_items: int
    parts: dict[str, float]
    bytes_moved: dict[str, float]
    peak_memory: int
    peak_device_memory: int
    rates: dict[str, float]
    floor: dict[str, float]


def _count_traffic(ranks: Ranks) -> None:
    """Count what the trunk's engine sends, beside what our own collectives send."""
    watch_traffic(
        lambda collective, n_bytes: ranks.world.count(
            f"trunk: {collective}", n_bytes, time.perf_counter()
        )
    )


def measure(config: Config, ranks: Ranks, steps: int, warm_up: int = 2) -> Measured:
    """Train `steps` steps after a warm-up, then measure the machine's rates."""
    stream = make_stream(config, ranks)
    # Its workers start before the model exists.
    batches = with_next(stream.batches(0, warm_up + steps, config.data.workers))
    clock = StopWatch(ranks.device)
    trainer = Trainer(config, stream.n_items, ranks.timed_by(clock))
    if trainer.trunk and ranks.world_size > 1:
        _count_traffic(ranks)
    step_seconds, users, rows, items = [], 0, 0, 0
    before: dict[str, int] = {}
    start = time.perf_counter()
    for done, (batch, following) in enumerate(batches):
        if done == warm_up:
            clock.seconds.clear()
            before = ranks.bytes_moved()
        arrived = time.perf_counter()
        trainer.step(batch, following=following)
        now = time.perf_counter()
        if done >= warm_up:
            clock.seconds["data wait"] += arrived - start
            step_seconds.append(now - start)
            users += batch.global_users
            rows += batch.global_rows
            items += len(batch.inputs.items) * ranks.world_size
        start = time.perf_counter()
    total = sum(step_seconds)
    clock.seconds["other"] = total - sum(clock.seconds.values())
    moved = {
        name: (value - before.get(name, 0)) / steps for name, value in ranks.bytes_moved().items()
    }
    device_memory = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    precision = trainer.precision
    kernels = trainer.model.storage.arithmetic.kernels
    del trainer
    rates = measure_rates(ranks.device, stream.n_items, precision, kernels)
    rows_per_step, items_per_row = rows / steps, items / max(rows, 1)
    n_items, partitions = stream.n_items, ranks.layout.partitions
    share = rows_per_step / ranks.world_size
    floor = step_floor(config, n_items, partitions, share, items_per_row, rates, precision)
    return Measured(
        rank=ranks.rank,
        threads=torch.get_num_threads(),
        steps=steps,
        step_seconds=median(step_seconds),
        users_per_second=users / total,
        rows_per_step=rows_per_step,
        items_per_row=items_per_row,
        n_items=stream.n_items,
        parts={label: clock.seconds.get(label, 0.0) / steps for label in LABELS},
        bytes_moved=moved,
        peak_memory=peak_memory,
        peak_device_memory=device_memory,
        rates={"flops": rates.flops, "copy": rates.copy, "gather": rates.gather},
        floor=floor,
    )
