"""The input side: x -> W1 x, partitioned by item (DESIGN.md, section 3).

Each rank sums the rows of W1 that it owns, and a reduce_scatter over the partition group gives
every rank the sums of its own rows.

Shapes: B rows of this rank, G = P * B rows of the partition group, J items of this rank, H hidden.
"""

from __future__ import annotations

from torch import Tensor

from dist_vasp.model.sinks import Sink, SumOfRows
from dist_vasp.model.slices import ItemSlice, Storage
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.comm import Group, reduce_scatter


class InputSide:
    """W1 (I, H), cut by item."""

    def __init__(self, storage: Storage, hidden: int) -> None:
        self.hidden, self._kernels = hidden, storage.arithmetic.kernels
        self._slices = storage.rows("input.weight", hidden)

    def slices(self) -> list[ItemSlice]:
        return list(self._slices)

    def initialise(self, seed: int, n_items: int) -> None:
        for piece in self._slices:
            piece.glorot(seed, n_items + self.hidden)

    def forward(self, x: ItemRows, group: Group) -> Tensor:
        """Rows of the group -> W1 x of this rank's rows, (B, H)."""
        sums = [
            self._kernels.sum_rows(p.working, *x.restricted(p.lo, p.hi), p.whole.dtype)
            for p in self._slices
        ]
        partial_GH = sums[0]
        for more in sums[1:]:
            partial_GH = partial_GH + more
        return reduce_scatter(partial_GH, group)

    def backward(self, x: ItemRows, grad_GH: Tensor, sink: Sink) -> None:
        """Pass dL/dW1 to the sink, given dL/d(W1 x) of the group's rows."""
        for piece in self._slices:
            items = (piece.lo, piece.hi)
            sink.take_sum(piece.whole, SumOfRows(grad_GH, x, items, kernels=self._kernels))
