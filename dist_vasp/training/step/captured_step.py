"""A step of one GPU as a CUDA graph: recorded once, then replayed with the rows of other batches.

A step is some hundred kernels, which a GPU runs faster than a host launches them. A replay is one
launch. A recorded step reads and writes the same addresses every time, so rows are copied into
buffers. Those of the ids hold more than a batch; what lies beyond a batch is no item.

Shapes: G rows, E interactions, L latent width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dist_vasp.kernels.interface import Kernels
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.step import MicroBatch
from dist_vasp.progress import say

Compute = Callable[[MicroBatch], Tensor]

_MOST_SHAPES = 4  # numbers of rows that have a graph; others are computed without one
_ROOM = 1.125  # ids of a buffer, times those of the batch that it was made for
_ALIGN = 1024  # ids


class Recorder:
    """Records calls as CUDA graphs. They share their memory: one runs at a time.

    torch gives that memory up with the last graph that uses it, and then refuses to record another
    graph into it. So a first graph, of one small tensor, lives as long as the recorder: a step may
    be recorded anew after its graph has been dropped.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool, self._device = torch.cuda.graph_pool_handle(), device
        self._keeps_pool: object = None

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record a call, which does not run; what runs it, and where its result will lie.

        RuntimeError where that is impossible.
        """
        if self._keeps_pool is None:
            self._keeps_pool = self._record(lambda: torch.zeros(1, device=self._device))
        return self._record(compute)

    def _record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = compute()
        return graph.replay, result


class CapturedStep:
    """Computes steps. The first one of each number of rows runs as it is and compiles; the next one
    is recorded.

    compute: rows -> result, a tensor. Numbers of Python that it uses must be equal in every step;
    `forget` where one has changed.
    """

    def __init__(self, compute: Compute, kernels: Kernels, device: torch.device) -> None:
        self._compute, self._kernels, self._record = compute, kernels, Recorder(device)
        self._shapes: dict[int, _Shape] = {}
        self._fails = False

    def run(self, rows: MicroBatch) -> Tensor:
        """Return what `compute` gives for these rows; the next call overwrites it."""
        if self._fails or rows.x.values is not None:
            return self._compute(rows)
        shape = self._shapes.get(rows.x.n_rows)
        if shape is None or not shape.holds(rows):
            if shape is None and len(self._shapes) >= _MOST_SHAPES:
                return self._compute(rows)
            shape = self._shapes[rows.x.n_rows] = _Shape(rows)
            shape.fill(rows)
            return self._compute(shape.rows())
        shape.fill(rows)
        if shape.recorded is None and not self._recorded(shape):
            return self._compute(rows)
        assert shape.recorded is not None
        replay, result = shape.recorded
        replay()
        return result

    def _recorded(self, shape: _Shape) -> bool:
        """Record the step of a shape; False, and a word to the user, where that is impossible."""
        try:
            shape.recorded = self._record(lambda: self._compute(shape.rows()))
        except RuntimeError as error:
            self._fails = True
            why = str(error).partition("\n")[0]
            say(f"warning: steps are slower than they could be: no CUDA graph of one ({why})")
            return False
        self._kernels.end_recording()
        return True

    def forget(self) -> None:
        """Record every step anew."""
        self._shapes.clear()


class _Shape:
    """The buffers of batches with one number of rows, and their recorded step."""

    def __init__(self, rows: MicroBatch) -> None:
        device = rows.x.items.device
        self._x, self._y = _with_room(rows.x), _with_room(rows.y)
        self._noise_BL = None if rows.noise_BL is None else torch.empty_like(rows.noise_BL)
        self._n_rows, self._penalty_weight = torch.zeros(2, device=device).unbind()
        self.recorded: tuple[Callable[[], None], Tensor] | None = None

    def holds(self, rows: MicroBatch) -> bool:
        """Whether a batch fits into the buffers."""
        pairs = ((rows.x, self._x), (rows.y, self._y))
        return all(len(batch.items) <= len(buffer.items) for batch, buffer in pairs)

    def fill(self, rows: MicroBatch) -> None:
        """Copy the rows of a batch into the buffers."""
        _copy(rows.x, self._x)
        _copy(rows.y, self._y)
        if self._noise_BL is not None and rows.noise_BL is not None:
            self._noise_BL.copy_(rows.noise_BL)
        self._n_rows.fill_(rows.n_rows)
        self._penalty_weight.fill_(rows.penalty_weight)

    def rows(self) -> MicroBatch:
        """The rows in the buffers, with nothing that was derived from earlier ones."""
        x, y = replace(self._x), replace(self._y)
        return MicroBatch(x, y, self._noise_BL, self._n_rows, self._penalty_weight)


def _with_room(rows: ItemRows) -> ItemRows:
    """Buffers for rows like these."""
    room = -(-int(len(rows.items) * _ROOM + 1) // _ALIGN) * _ALIGN
    return ItemRows(
        torch.empty_like(rows.indptr),
        rows.items.new_empty(room),
        rows.n_items,
        torch.empty_like(rows.real_rows),
        has_room=True,
    )


def _copy(rows: ItemRows, buffer: ItemRows) -> None:
    n = len(rows.items)
    buffer.indptr.copy_(rows.indptr)
    buffer.items[:n] = rows.items
    buffer.items[n:] = rows.n_items
    buffer.real_rows.copy_(rows.real_rows)
