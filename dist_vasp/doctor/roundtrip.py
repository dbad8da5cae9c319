"""Sums between ranks, as training makes them: whether they come out right, how fast they are.

Under a launcher the job's own ranks take part; else some are started here, as processes of their
own.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dist_vasp.doctor.findings import Finding, error, ok, warning
from dist_vasp.parallel.comm import Ranks, all_gather, all_reduce, barrier, reduce_scatter
from dist_vasp.parallel.local_ranks import LocalRanks

_ELEMENTS = 1 << 24  # 64 MB of fp32
_SLOW = 50e6  # bytes/s: below, a step of a real model spends its time here
_PATIENCE_S = 180.0
_REPEATS = 3


def measure(ranks: Ranks) -> dict[str, Any]:
    """Return how long collectives take and whether each returned the right numbers.

    Seconds and bytes/s of 64 MB summed over all ranks, and seconds of 8 bytes. All ranks call it
    together.
    """
    n, rank, device = ranks.world_size, ranks.rank, ranks.device
    local = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    total = n * (n + 1) / 2
    right = bool((all_reduce(local, ranks.world) == total).all())
    few = torch.full((n, 2), float(rank + 1), device=device)
    right &= bool((reduce_scatter(few, ranks.world) == total).all()) if n > 1 else True
    right &= all_gather(few[:1], ranks.world)[:, 0].tolist() == [float(r + 1) for r in range(n)]
    seconds: list[float] = []
    latency: list[float] = []
    for taken, sent in ((seconds, local), (latency, few[0])):
        for _ in range(_REPEATS):
            barrier(ranks.world)
            start = time.perf_counter()
            float(all_reduce(sent, ranks.world)[0])  # waits for a device, too
            taken.append(time.perf_counter() - start)
    wrong = float(all_reduce(torch.tensor(float(not right), device=device), ranks.world, "max"))
    moved = 2 * (n - 1) / n * local.numel() * local.element_size()
    return {
        "ranks": n,
        "device": device.type,
        "right": wrong == 0,
        "seconds": median(seconds),
        "bytes_per_second": moved / median(seconds),
        "latency": median(latency),
    }


def judge(found: dict[str, Any]) -> Finding:
    library = "NCCL" if found["device"] == "cuda" else "gloo"
    rate = found["bytes_per_second"]
    text = (
        f"{library} between {found['ranks']} ranks: 64 MB summed in {1000 * found['seconds']:.0f} "
        f"ms ({rate / 1e9:.2f} GB/s on the wire), "
        f"8 bytes in {1000 * found['latency']:.2f} ms"
    )
    if not found["right"]:
        return error(
            "round trip",
            f"{text}; some sums were wrong",
            "test memory and network of this machine; do not train on it",
        )
    if rate < _SLOW:
        return warning(
            "round trip",
            text,
            "name a faster network with parallel.interface, and start no more ranks than there are "
            "cores",
        )
    return ok("round trip", text)


def start_here(n: int, device: str, threads: int) -> Finding:
    """Start `n` ranks on this machine, which `measure`, and judge what they found."""
    do = (
        "see what the ranks printed; a firewall on the loopback, or a GPU that another job holds, "
        "are the usual reasons"
    )
    with TemporaryDirectory() as folder, ExitStack() as files:
        result = Path(folder, "result.json")
        paths = [Path(folder, f"rank-{rank}.log") for rank in range(n)]
        logs = [files.enter_context(open(path, "wb")) for path in paths]
        arguments = ["doctor", "--round_trip", str(result), "--device", device]
        with LocalRanks(arguments, n, logs, threads) as ranks:
            status = ranks.wait(_PATIENCE_S)
            statuses = ranks.statuses
        if status is None:
            return error("round trip", f"{n} ranks did not finish within {_PATIENCE_S:.0f} s", do)
        if status:
            rank = statuses.index(status)
            lines = [line for line in paths[rank].read_text().splitlines() if line.strip()]
            said = lines[-1] if lines else "it printed nothing"
            text = f"rank {rank} of {n} ended with status {status}: {said}"
            return error("round trip", text, do)
        return judge(json.loads(result.read_text()))
