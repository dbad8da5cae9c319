"""`run_ranks(fn, world_size, *args)`: run a function on several ranks in processes of their own and
return what each returned.

Ranks are forked from one process that has imported the libraries (preload.py), so that a rank
starts within milliseconds and nothing that it changes outlives it. gloo with a file rendezvous, one
thread per rank, a hard timeout; the first failing rank's traceback is shown and the survivors are
ended.
"""

from __future__ import annotations

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from tests.support.paths import PYTHONPATH


@cache
def rank_context() -> Any:
    """Processes that are forked from one that has loaded the libraries; it is started once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": PYTHONPATH}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # jemalloc has a thread
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    return context


def _worker(
    fn: Callable,
    rank: int,
    layout: Layout,
    rendezvous: str,
    results: Any,
    environment: dict[str, str],
    args: tuple,
) -> None:
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(layout.world_size),
            LOCAL_RANK=str(rank),
            LOCAL_SIZE=str(layout.world_size),
            DS_ACCELERATOR="cpu",
        )
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=layout.world_size,
            timeout=timedelta(seconds=60),
        )
        results.put((rank, True, fn(form_groups(rank, layout, torch.device("cpu")), *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, replicas: int = 1, timeout: float = 120
) -> list[Any]:
    """[fn(ranks, *args) of rank 0, of rank 1, ...]; `fn` must be importable, results must pickle
    (use numpy)."""
    layout = Layout.of(world_size, 0, replicas)
    context = rank_context()
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        processes = [
            context.Process(
                target=_worker,
                args=(fn, rank, layout, rendezvous, results, dict(os.environ), args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(found) < world_size:
                try:
                    rank, ok, value = results.get(timeout=0.5)
                except queue.Empty:
                    dead = [
                        r
                        for r, p in enumerate(processes)
                        if not p.is_alive() and r not in found and p.exitcode
                    ]
                    if dead:
                        pytest.fail(
                            f"rank {dead[0]} died with status "
                            f"{processes[dead[0]].exitcode} and said nothing"
                        )
                    if time.monotonic() > deadline:
                        pytest.fail(
                            f"ranks {sorted(set(range(world_size)) - set(found))} "
                            f"did not finish within {timeout} s"
                        )
                    continue
                if not ok:
                    pytest.fail(f"rank {rank} failed:\n{value}")
                found[rank] = value
        finally:
            for process in processes:
                process.join(timeout=10 if len(found) == world_size else 0)
                if process.is_alive():
                    process.terminate()
                    process.join()
        return [found[rank] for rank in range(world_size)]
