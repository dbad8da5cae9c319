"""Sums between ranks, as training makes them: whether they come out right, how fast they are.

Under a launcher the job's own ranks take part; else some are started here, as processes of their
own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dist_vasp.doctor.findings import Finding, error, ok, warning
from dist_vasp.parallel.comm import Ranks, all_gather, all_reduce, barrier, reduce_scatter

_ELEMENTS = 1 << 24  # 64 MB of fp32
_SLOW = 50e6  # bytes/s: below, a step of a real model spends its time here
_PATIENCE_S = 180.0
_REPEATS = 3


def measure(ranks: Ranks) -> dict[str, Any]:
    """Seconds and bytes/s of 64 MB summed over all ranks, seconds of 8 bytes, and whether every
    collective gave the right numbers. All ranks call it together."""
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
        f"{library} between {found['ranks']} ranks: 64 MB summed in {1000 * found['seconds']:.0f} ms ({rate / 1e9:.2f} GB/s on the wire), "
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
            "name a faster network with parallel.interface, and start no more ranks than there are cores",
        )
    return ok("round trip", text)


def start_here(script: Path, n: int, device: str, threads: int) -> Finding:
    """Start `n` ranks of `script` on this machine, which `measure` and print the result, and judge
    it."""
    do = "see what the ranks said; a firewall on the loopback, or a GPU that another job holds, are the usual reasons"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {
        "WORLD_SIZE": n,
        "LOCAL_SIZE": n,
        "LOCAL_WORLD_SIZE": n,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = (
        os.environ | {k: str(v) for k, v in place.items()} | {"OMP_NUM_THREADS": str(threads)}
    )
    command = [sys.executable, str(script), "--round_trip", "--device", device]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(n)
    ]
    try:
        said = [process.communicate(timeout=_PATIENCE_S) for process in processes]
    except subprocess.TimeoutExpired:
        return error("round trip", f"{n} ranks did not finish within {_PATIENCE_S:.0f} s", do)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    failed = next((r for r in range(n) if processes[r].returncode), None)
    if failed is not None:
        lines = [line for line in said[failed][1].splitlines() if line.strip()] or [
            "it said nothing"
        ]
        return error(
            "round trip",
            f"rank {failed} of {n} ended with status {processes[failed].returncode}: {lines[-1]}",
            do,
        )
    return judge(json.loads(said[0][0].splitlines()[-1]))
