"""A step of ours beside plain torch, alternating on the same batches: python -m benchmarks.step
--config configs/netflix.yaml --shards DIR --against plain,compiled --json step.json

plain: dense x, autograd, torch.optim.NAdam (benchmarks/plain_torch.py). compiled: the same with
forward and loss under torch.compile. Both compute in the precision of ours: bf16 is autocast.

Each side lives in a process of its own, so that each has its own peak memory. Only one computes at
a time. Reading a batch is not timed, because loaders do it ahead; what a side makes of it is.
Without --shards, synthetic users are made in a temporary folder (--items --users --interactions).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.plain_torch import PlainTrainer
from benchmarks.synthetic_shards import write_synthetic
from dist_vasp.config import command_line as configs
from dist_vasp.config.schema import Config
from dist_vasp.data.stream import Batch
from dist_vasp.kernels.precision import choose_precision
from dist_vasp.parallel.comm import Ranks
from dist_vasp.parallel.start import init_ranks
from dist_vasp.training.batches import make_stream

SIDES = ("ours", "plain", "compiled")
WARM_UP = 4


def make_step(side: str, config: Config, n_items: int, ranks: Ranks) -> Callable[..., float]:
    """What takes a batch, and the one after it, and returns the loss."""
    if side == "ours":
        from dist_vasp.training.step.engine import Trainer

        trainer = Trainer(config, n_items, ranks)
        return lambda batch, following: trainer.step(batch, following=following).loss
    precision = choose_precision(config.parallel.wanted_precision, ranks.device).name
    plain = PlainTrainer(config, n_items, ranks.device, precision, side == "compiled")
    return lambda batch, following: plain.step(batch)


def serve(side: str, config: Config, threads: int, cache: str, pipe: Connection) -> None:
    """Be one side: take steps as the pipe names them. cache: where plain torch compiles to."""
    if side == "compiled":
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    ranks = init_ranks(device=config.device, threads=threads)
    on_gpu = ranks.device.type == "cuda"
    stream = make_stream(config, ranks)
    step = make_step(side, config, stream.n_items, ranks)
    pipe.send(torch.cuda.get_device_name() if on_gpu else "cpu")
    batches: dict[int, Batch] = {}

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    while (number := pipe.recv()) is not None:
        for wanted in (number, number + 1):
            if wanted not in batches:
                batches[wanted] = stream.batch(wanted)
        if number == 0 and on_gpu:  # a replayed step allocates nothing: the first ones count
            torch.cuda.reset_peak_memory_stats()
        start = wait()
        loss = step(batches.pop(number), batches[number + 1])
        seconds = wait() - start
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident
        pipe.send((seconds, loss, peak))


class Side:
    """A side in a process of its own, and what was measured of it.

    error: why it takes no more steps, "" while it does.
    """

    def __init__(self, name: str, config: Config, threads: int, cache: str, wait: float) -> None:
        self.name, self.error, self._wait = name, "", wait
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0
        context = mp.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(
            target=serve, args=(name, config, threads, cache, there), daemon=True
        )
        self._process.start()
        there.close()

    def device(self) -> str:
        """Wait until it is built; the device's name, "" where it failed."""
        return self._receive() or ""

    def step(self, number: int) -> None:
        """Take a step, unless one has failed."""
        if self.error:
            return
        self._pipe.send(number)
        found = self._receive()
        if found:
            seconds, loss, self.peak = found
            self.losses.append(loss)
            if number >= WARM_UP:
                self.seconds.append(seconds)

    def end(self) -> None:
        """End the process."""
        if not self.error:
            self._pipe.send(None)
            self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self) -> Any:
        """The next message; None, and a word in `error`, where there is none."""
        try:
            if self._pipe.poll(self._wait):
                return self._pipe.recv()
            self.error = f"no answer in {self._wait:.0f} s"
        except EOFError:
            self.error = "its process ended"
        return None


@dataclass(frozen=True)
class Measured:
    """The device's name, and the sides: ours first."""

    device: str
    sides: list[Side]


def measure(
    config: Config, names: list[str], steps: int, threads: int, cache: str, wait: float
) -> Measured:
    """Take steps in turn; ours must take all, another side may fail. wait: seconds."""
    sides = [Side(name, config, threads, cache, wait) for name in names]
    try:
        device = "".join([side.device() for side in sides][:1])
        for number in range(WARM_UP + steps):
            for side in sides:
                side.step(number)
            if sides[0].error:
                raise RuntimeError(f"ours: {sides[0].error}")
    finally:
        for side in sides:
            side.end()
    return Measured(device, sides)


def summarise(config: Config, measured: Measured) -> dict[str, Any]:
    """What the JSON holds: medians by side, and how many times as long as ours each takes."""
    ours = measured.sides[0].seconds
    users = config.data.batch_size
    sides: dict[str, dict[str, Any]] = {}
    for side in measured.sides:
        if side.error:
            sides[side.name] = {"error": side.error}
            continue
        seconds = median(side.seconds)
        ratios = [theirs / mine for mine, theirs in zip(ours, side.seconds, strict=True)]
        sides[side.name] = {
            "ms": 1e3 * seconds,
            "users_per_second": users / seconds,
            "peak_gb": side.peak / 1e9,
            "times_ours": median(ratios),
            "losses": side.losses[:WARM_UP],
        }
    on_gpu = measured.device != "cpu"
    wanted = config.parallel.wanted_precision
    precision = choose_precision(wanted, torch.device("cuda" if on_gpu else "cpu")).name
    return {
        "device": measured.device,
        "torch": torch.__version__,
        "precision": precision,
        "users_per_step": users,
        "steps": len(ours),
        "sides": sides,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['precision']}, "
        f"{result['users_per_step']} users a step; medians of {result['steps']} steps in turn",
        "",
        "| | ms a step | users/s | peak GB | times ours |",
        "|---|---|---|---|---|",
    ]
    for side, of in result["sides"].items():
        if "error" in of:
            lines.append(f"| {side} | failed: {of['error']} | | | |")
            continue
        lines.append(
            f"| {side} | {of['ms']:.1f} | {of['users_per_second']:,.0f} | {of['peak_gb']:.2f} | "
            f"{of['times_ours']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config", required=True)
    add("--shards", default="", help="a data folder; default: synthetic users")
    add("--items", type=int, default=17_769)
    add("--users", type=int, default=20_480)
    add("--interactions", type=int, default=2_500_000)
    add("--against", default="plain,compiled", help="plain, compiled or both; empty: ours alone")
    add("--steps", type=int, default=20)
    add("--precision", default="", help="fp32, tf32 or bf16; default: parallel.precision")
    add("--threads", type=int, default=0, help="of each side on a CPU; 0: all cores")
    add("--wait", type=float, default=300, help="seconds that a side may build or take a step")
    add("--json", default="", metavar="FILE")
    a, rest = parser.parse_known_args()
    sides = ["ours", *(side for side in a.against.split(",") if side)]
    if not set(sides) <= set(SIDES):
        parser.error(f"--against is {a.against!r}, expected plain, compiled or plain,compiled")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        shards = a.shards
        if not shards:
            shards = folder
            write_synthetic(folder, a.items, a.users, a.interactions)
        options = ["--config", a.config, "--data.shards", shards, *rest]
        config, _ = configs.parse(configs.make_parser("step", ""), options)
        if a.precision:
            parallel = replace(config.parallel, precision=a.precision, trunk_dtype="")
            config = replace(config, parallel=parallel)
        if config.model.kind != "vasp" or config.loss.kind != "focal":
            parser.error("plain torch is VASP with the focal loss; pass a config of that")
        result = summarise(config, measure(config, sides, a.steps, a.threads, cache, a.wait))
    print(table(result))
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
