"""Describe where a run runs, for environment.json: versions, devices, ranks, hosts.

It contains no names of users or hosts, and folders only as the command names them.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_vasp.parallel.comm import Ranks, all_gather_bytes
from dist_vasp.parallel.launched import launched_world
from dist_vasp.versions import version

_PROJECT = Path(__file__).resolve().parents[2]
_GIT_S = 10.0  # for which git may look for changes
LIBRARIES = ("dist_vasp", "torch", "deepspeed", "numpy", "pyarrow", "webdataset")


def describe(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Return the environment of this rank, which computes on `device`, and the number of hosts; all
    ranks call it together."""
    host = hashlib.blake2b(socket.gethostname().encode(), digest_size=8).hexdigest()
    hosts = set(all_gather_bytes(host.encode(), ranks.world, ranks.device))
    on_cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit() if ranks.is_main else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "cuda": torch.version.cuda if on_cuda else None,
        "collectives": "nccl" if on_cuda else "gloo",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "ranks": ranks.world_size,
        "ranks_per_host": launched_world().local_world,
        "hosts": len(hosts),
        "partitions": ranks.layout.partitions,
        "replicas": ranks.layout.replicas,
    }


def command() -> str:
    """Return the command that started this process, without what a launcher adds."""
    program = Path(sys.argv[0])
    if program.stem == "ipykernel_launcher":  # its arguments name a file of the user's
        return "a notebook"
    name = "/".join(program.parts[-2:]) if program.suffix == ".py" else program.name
    typed = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    return f"{name} {shlex.join(typed)}".strip()


def commit() -> str | None:
    """Return the commit of the sources, with `-dirty` where files were changed; None where they
    are not in a git checkout."""
    if not (_PROJECT / ".git").exists():
        return None
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            ask, cwd=_PROJECT, capture_output=True, text=True, timeout=_GIT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Memory:
    """The bytes that this process uses now, for metrics.jsonl."""

    def __init__(self, device: torch.device) -> None:
        self._process = psutil.Process()
        self._cuda = device if device.type == "cuda" else None

    def now(self) -> dict[str, int]:
        result = {"memory": self._process.memory_info().rss}
        if self._cuda is not None:
            result["device_memory"] = torch.cuda.max_memory_allocated(self._cuda)
        return result
