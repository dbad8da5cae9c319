"""The few calls of Spark that data_tools makes, in this process and without Java.

Rows are shuffled and sorted by pyarrow. Each task may run twice, as a speculative one does.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


@contextmanager
def elsewhere() -> Iterator[None]:
    """Executors work in folders of their own."""
    home = os.getcwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(home)


@dataclass
class Frame:
    """Partitions of rows."""

    parts: list[list[pa.RecordBatch]]
    times: int

    def mapInArrow(self, function, _schema):  # noqa: N802
        found = []
        for part in self.parts:
            for _ in range(self.times):  # the last attempt's rows count
                with elsewhere():
                    batches = list(copy.deepcopy(function)(iter(part)))
            found.append(batches)
        return Frame(found, self.times)

    def repartition(self, n: int, column: str) -> Frame:
        rows = [batch for part in self.parts for batch in part]
        if not rows:
            return Frame([[] for _ in range(n)], self.times)
        table = pa.Table.from_batches(rows)
        where = np.asarray(table[column]) % n
        cut = [table.filter(pa.array(where == k)) for k in range(n)]
        return Frame([part.to_batches(max_chunksize=7) for part in cut], self.times)

    def sortWithinPartitions(self, *names: str) -> Frame:  # noqa: N802
        keys = [(name, "ascending") for name in names]
        found = [
            pa.Table.from_batches(part).sort_by(keys).to_batches(max_chunksize=5) if part else []
            for part in self.parts
        ]
        return Frame(found, self.times)

    def selectExpr(self, *expressions: str) -> Frame:  # noqa: N802
        n = int(expressions[1].split("), ")[1].split(")")[0])
        ids = np.concatenate([np.asarray(batch["id"]) for part in self.parts for batch in part])
        return Frame([[pa.record_batch({"id": ids, "part": ids % n})]], 1)

    def collect(self) -> list[Any]:
        return [row for part in self.parts for batch in part for row in batch.to_pylist()]


class Context:
    master, uiWebUrl, defaultParallelism = "pretended", None, 3

    def __init__(self, times: int):
        self._times = times

    def parallelize(self, values, _n):
        return Values(list(values), self._times)

    def broadcast(self, value):
        return Broadcast(value)


@dataclass
class Values:
    values: list[Any]
    times: int

    def map(self, function):
        with elsewhere():
            return Values([[function(v) for _ in range(self.times)][-1] for v in self.values], 1)

    def collect(self):
        return self.values


@dataclass
class Broadcast:
    value: Any

    def unpersist(self):
        pass


class Session:
    def __init__(self, times: int = 1):
        self.sparkContext = Context(times)
        self._times = times

    def range(self, start: int, stop: int | None = None, step: int = 1, n: int = 1) -> Frame:
        ids = np.arange(*((0, start) if stop is None else (start, stop)))
        batches = [[pa.record_batch({"id": part})] for part in np.array_split(ids, n)]
        return Frame(batches, self._times)


@contextmanager
def session(_master: str | None = None, times: int = 1) -> Iterator[Session]:
    yield Session(times)
