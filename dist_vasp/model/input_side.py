"""The input side: x -> W1 x, partitioned by item (DESIGN.md, section 3).

Each rank sums the rows of W1 that it owns, and a reduce_scatter over the partition group gives
every rank the sums of its own rows. A kind may scale the rows of x (`UnitLength`).

Shapes: B rows of this rank, G = P * B rows of the partition group, J items of this rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dist_vasp.model.sinks import Sink, SumOfRows
from dist_vasp.model.slices import ItemSlice, Storage
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.comm import Group, reduce_scatter


@dataclass(frozen=True)
class UnitLength:
    """Scales each row of x to Euclidean length 1: by 1 / sqrt(n), n the items of the row.

    dropout: share p of the items that training leaves out. Liang et al. 2018 scale the whole row
    and then drop: 1 / (sqrt(n) (1 - p)). Here n counts the items that are left, on average 1 - p of
    them, so training scales by 1 / sqrt(n (1 - p)): the same on average.
    """

    dropout: float = 0.0

    def factors(self, x: ItemRows, training: bool, like: Tensor) -> Tensor:
        """The factor of each row, (G, 1) of the dtype of `like`; of an empty row it is finite."""
        n_G1 = x.lengths.clamp(min=1).to(like.dtype)[:, None]
        return (n_G1 * (1 - self.dropout)).rsqrt() if training else n_G1.rsqrt()


class InputSide:
    """W1 (I, H), cut by item. `scale`: of the rows of x, None where they are used as they are."""

    def __init__(
        self,
        storage: Storage,
        hidden: int,
        scale: UnitLength | None = None,
        name: str = "input.weight",
    ) -> None:
        self.hidden, self.scale, self._kernels = hidden, scale, storage.arithmetic.kernels
        self._slices = storage.rows(name, hidden)

    def slices(self) -> list[ItemSlice]:
        return list(self._slices)

    def initialise(self, seed: int, n_items: int) -> None:
        for piece in self._slices:
            piece.glorot(seed, n_items + self.hidden)

    def forward(self, x: ItemRows, group: Group, training: bool = False) -> Tensor:
        """Rows of the group -> W1 x of this rank's rows, (B, H)."""
        sums = [self._sum(piece, x) for piece in self._slices]
        partial_GH = sums[0]
        for more in sums[1:]:
            partial_GH = partial_GH + more
        if self.scale is not None:
            partial_GH = partial_GH * self.scale.factors(x, training, partial_GH)
        return reduce_scatter(partial_GH, group)

    def _sum(self, piece: ItemSlice, x: ItemRows) -> Tensor:
        """The part of W1 x that the items of one slice give, (G, H)."""
        bags, dtype = x.restricted(piece.lo, piece.hi), piece.whole.dtype
        if x.values is None:
            return self._kernels.sum_rows(piece.working, *bags, dtype)
        values = x.restricted_values(piece.lo, piece.hi)
        return self._kernels.sum_weighted_rows(piece.working, *bags, values).to(dtype)

    def backward(self, x: ItemRows, grad_GH: Tensor, sink: Sink) -> None:
        """Pass dL/dW1 to the sink, given dL/d(W1 x) of the group's rows in training."""
        if self.scale is not None:
            grad_GH = grad_GH * self.scale.factors(x, True, grad_GH)
        for piece in self._slices:
            items = (piece.lo, piece.hi)
            sink.take_sum(piece.whole, SumOfRows(grad_GH, x, items, kernels=self._kernels))
