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
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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
READY_SECONDS, STEP_SECONDS = 300.0, 300.0


def make_step(side: str, config: Config, n_items: int, ranks: Ranks) -> Callable[..., float]:
    """What takes a batch, and the one after it, and returns the loss."""
    if side == "ours":
        from dist_vasp.training.engine import Trainer

        trainer = Trainer(config, n_items, ranks)
        return lambda batch, following: trainer.step(batch, following=following).loss
    precision = choose_precision(config.parallel.wanted_precision, ranks.device).name
    plain = PlainTrainer(config, n_items, ranks.device, precision, side == "compiled")
    return lambda batch, following: plain.step(batch)


def serve(side: str, config: Config, threads: int, pipe: Connection) -> None:
    """Be one side: take steps as the pipe names them."""
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
        if number == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = wait()
        loss = step(batches.pop(number), batches[number + 1])
        seconds = wait() - start
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident
        pipe.send((seconds, loss, peak))


def receive(pipe: Connection, process: Any, seconds: float, what: str) -> Any:
    """The next message of a side; RuntimeError where it has ended or takes too long."""
    deadline = time.monotonic() + seconds
    while not pipe.poll(1.0):
        if not process.is_alive():
            raise RuntimeError(f"the process of {what} ended with status {process.exitcode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} took more than {seconds:.0f} s")
    return pipe.recv()


def measure(config: Config, sides: list[str], steps: int, threads: int) -> dict[str, Any]:
    """Seconds of each step, losses and peak memory, by side; and the device's name."""
    context = mp.get_context("spawn")
    device, found, serving = "", {}, {}
    try:
        for side in sides:
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(side, config, threads, there), daemon=True
            )
            process.start()
            serving[side] = here, process
            found[side] = {"seconds": [], "losses": [], "peak": 0}
        for side, (pipe, process) in serving.items():
            device = receive(pipe, process, READY_SECONDS, side)
        for number in range(WARM_UP + steps):
            for side, (pipe, process) in serving.items():
                pipe.send(number)
                taken, loss, peak = receive(pipe, process, STEP_SECONDS, f"a step of {side}")
                found[side]["losses"].append(loss)
                found[side]["peak"] = peak
                if number >= WARM_UP:
                    found[side]["seconds"].append(taken)
        for pipe, process in serving.values():
            pipe.send(None)
            process.join(timeout=30)
    finally:
        for _, process in serving.values():
            if process.is_alive():
                process.terminate()
    return {"device": device, "sides": found}


def summarise(config: Config, measured: dict[str, Any]) -> dict[str, Any]:
    """What the JSON holds: medians by side, and how many times as long as ours each takes."""
    ours = measured["sides"]["ours"]["seconds"]
    users, sides = config.data.batch_size, {}
    for side, of in measured["sides"].items():
        seconds = median(of["seconds"])
        ratios = [theirs / mine for mine, theirs in zip(ours, of["seconds"], strict=True)]
        sides[side] = {
            "ms": 1e3 * seconds,
            "users_per_second": users / seconds,
            "peak_gb": of["peak"] / 1e9,
            "times_ours": median(ratios),
            "losses": of["losses"][:WARM_UP],
        }
    on_gpu = measured["device"] != "cpu"
    wanted = config.parallel.wanted_precision
    precision = choose_precision(wanted, torch.device("cuda" if on_gpu else "cpu")).name
    return {
        "device": measured["device"],
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
    add("--json", default="", metavar="FILE")
    a, rest = parser.parse_known_args()
    sides = ["ours", *(side for side in a.against.split(",") if side)]
    if not set(sides) <= set(SIDES):
        parser.error(f"--against is {a.against!r}, expected plain, compiled or plain,compiled")
    with tempfile.TemporaryDirectory() as folder:
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
        result = summarise(config, measure(config, sides, a.steps, a.threads))
    print(table(result))
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
