"""What a run ran on, for environment.json: versions, devices, ranks, hosts.

No names of users, hosts or folders.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_vasp.parallel.comm import Ranks, all_gather_bytes
from dist_vasp.parallel.launched import launched_world

LIBRARIES = ("dist_vasp", "torch", "deepspeed", "numpy", "pyarrow", "webdataset")


def describe(ranks: Ranks) -> dict[str, Any]:
    """The environment as rank 0 sees it, and the number of hosts. All ranks call it together."""
    host = hashlib.blake2b(socket.gethostname().encode(), digest_size=8).hexdigest()
    hosts = set(all_gather_bytes(host.encode(), ranks.world, ranks.device))
    on_cuda = ranks.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name(ranks.device) if on_cuda else "cpu",
        "cuda": torch.version.cuda if on_cuda else None,
        "collectives": "nccl" if on_cuda else "gloo",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "ranks": ranks.world_size,
        "ranks_per_host": launched_world()[3],
        "hosts": len(hosts),
        "partitions": ranks.layout.partitions,
        "replicas": ranks.layout.replicas,
    }


def version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Memory:
    """The bytes that this process uses now, for metrics.jsonl."""

    def __init__(self, device: torch.device) -> None:
        self._process, self._cuda = psutil.Process(), device if device.type == "cuda" else None

    def now(self) -> dict[str, int]:
        found = {"memory": self._process.memory_info().rss}
        if self._cuda is not None:
            found["device_memory"] = torch.cuda.max_memory_allocated(self._cuda)
        return found
