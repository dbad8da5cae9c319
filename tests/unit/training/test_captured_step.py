"""A recorded step is recorded anew where rows need more room, or numbers of Python have changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_vasp.data.rows import Rows, indptr_of
from dist_vasp.kernels.interface import PLAIN
from dist_vasp.model.sparse import gather_rows
from dist_vasp.model.step import MicroBatch
from dist_vasp.parallel.comm import Group
from dist_vasp.training.step.captured_step import CapturedStep

N_ITEMS = 5000
CPU = torch.device("cpu")


class Pools:
    """The memory of CUDA graphs, as torch counts its users: once there were some and all are gone,
    nothing can be recorded into it."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self.recorded = 0
        self._handles = 0

    def handle(self) -> int:
        self._handles += 1
        return self._handles

    @contextmanager
    def record(self, graph: Graph, pool: int) -> Iterator[None]:
        if pool in self.users and self.users[pool] == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.users[pool] += 1
        self.recorded += 1
        graph.pools, graph.pool = self, pool
        yield


class Graph:
    pools: Pools
    pool: int

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        self.pools.users[self.pool] -= 1


@pytest.fixture
def pools(monkeypatch):
    pools = Pools()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", pools.handle)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", pools.record)
    return pools


def batch(n_ids: int) -> MicroBatch:
    rows = Rows(indptr_of(np.array([n_ids])), np.arange(n_ids, dtype=np.int32))
    x, y = gather_rows([rows, rows], 1, 1, N_ITEMS, Group(size=1, rank=0), CPU)
    return MicroBatch(x, y, None, 1, 0.0)


def compute(rows: MicroBatch) -> Tensor:
    return torch.zeros(1)


def test_a_step_is_recorded_anew_when_its_graph_is_gone(pools, capsys):
    step = CapturedStep(compute, PLAIN, CPU)
    step.run(batch(10))
    assert pools.recorded == 0
    for n_ids in (10, 10):
        step.run(batch(n_ids))
    assert pools.recorded == 2  # one of them keeps the memory
    for n_ids in (3000, 3000, 10):  # more than the buffers hold, which drops the graph
        step.run(batch(n_ids))
    assert pools.recorded == 3
    step.forget()
    for n_ids in (10, 10):
        step.run(batch(n_ids))
    assert pools.recorded == 4
    assert "no CUDA graph" not in "".join(capsys.readouterr())


def test_where_nothing_can_be_recorded_steps_are_computed(pools, monkeypatch, capsys):
    def refuse(graph: Graph, pool: int) -> None:
        graph.pools, graph.pool = pools, pool
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    step = CapturedStep(lambda rows: rows.x.indptr[-1], PLAIN, CPU)
    assert [int(step.run(batch(n))) for n in (4, 4, 5)] == [4, 4, 5]
    said = "".join(capsys.readouterr())
    assert said.count("no CUDA graph of one (operation not permitted)") == 1
