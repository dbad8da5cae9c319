"""An items x items path that keeps K inputs for each output item (DESIGN.md, section 10).

    logit of j = offset + sum over k of weight_jk x[ids_jk]

It is `ItemMatrix` on a support (model/support.py), cut by output item: row j of `weight` and `ids`
holds the inputs of output item j. It takes 8 bytes for each of I K weights, and moments.

Shapes: G rows of the partition group, I items, J items of a slice, C items of a block,
K neighbours, F past items of the pairs' rows one after another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vasp.model.paths import BackwardPass, ItemMatrix, ItemToItem, Pairs, Training
from dist_vasp.model.sinks import Sink
from dist_vasp.model.slices import ItemSlice, Storage
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.sparse_columns import gradient_of_weights, weighted_sums
from dist_vasp.model.support import support_width

IDS = ".ids"  # the name of a support is that of its weights, and this
_PAIRS_AT_ONCE = 1 << 16  # past items that are looked up at once


class NeighbourMatrix(ItemToItem):
    """logits = x W + offset, where column j of W is zero outside of `ids_jk`."""

    takes_room = False

    def __init__(
        self,
        storage: Storage,
        neighbours: int,
        part_of: str,
        training: Training,
        offset: float = 0.0,
    ) -> None:
        self.name, self.part_of, self.offset, self.training = "nease", part_of, offset, training
        self.n_items, self.width = storage.n_items, support_width(neighbours, storage.n_items)
        name = f"output.{self.name}.weight"
        self._storage = storage
        self._starts: list[ItemSlice] | None = None
        self.weights = storage.rows(name, self.width)
        self.ids = storage.rows(name + IDS, self.width, torch.int32)
        self._blocks = [self._place(lo, hi) for lo, hi in storage.blocks]

    def _place(self, lo: int, hi: int) -> tuple[int, slice]:
        """The slice that holds a block, and the rows of the block in it."""
        index = next(i for i, piece in enumerate(self.weights) if piece.lo <= lo < piece.hi)
        first = self.weights[index].lo
        return index, slice(lo - first, hi - first)

    def slices(self) -> list[ItemSlice]:
        return list(self.weights)

    def constants(self) -> list[ItemSlice]:
        return list(self.ids)

    def start_slices(self) -> list[ItemSlice]:
        """Storage for the start of W, made when a trainer asks for it: no reader needs one."""
        if self._starts is None:
            start = f"output.{self.name}.weight.start"
            self._starts = self._storage.rows(start, self.width) if self.training.decay else []
        return list(self._starts)

    def initialise(self, seed: int) -> None:
        """Glorot uniform by the K inputs and, on average, K outputs of an item."""
        for piece in self.weights:
            piece.glorot(seed, 2 * self.width)

    def logits(
        self,
        block: int,
        source_GK: Tensor | None,
        x: ItemRows,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        i, rows = self._blocks[block]
        sums_GC = weighted_sums(self.ids[i].tensor[rows], self.weights[i].tensor[rows], x)
        sums_GC = sums_GC.to(dtype or self.weights[i].working.dtype)
        return sums_GC.add_(self.offset) if self.offset else sums_GC

    def backward(self, block: int, grad_GC: Tensor, pass_: BackwardPass, sink: Sink) -> None:
        """Pass dL/dweight of the support to the sink."""
        i, rows = self._blocks[block]
        ids_CK = self.ids[i].tensor[rows]
        grad_CK = gradient_of_weights(ids_CK, grad_GC[:, : len(ids_CK)], pass_.x)
        sink.take(self.weights[i].whole, rows.start, grad_CK)

    def pair_weights(self, pairs: Pairs) -> Tensor:
        """W[i, j] of every past item i of every pair of item j."""
        target_F = pairs.item_E[pairs.pair_F]
        weight_F = torch.zeros(len(target_F), device=target_F.device)
        for weight, ids in zip(self.weights, self.ids, strict=True):
            own = ((target_F >= weight.lo) & (target_F < weight.hi)).nonzero().squeeze(1)
            for some in own.split(_PAIRS_AT_ONCE):
                local = target_F[some] - weight.lo
                is_input_nK = ids.tensor[local] == pairs.history_F[some, None]
                weight_F[some] = (weight.tensor[local] * is_input_nK).sum(dim=1)
        return weight_F

    def similar(self, item: int) -> Iterator[tuple[int, Tensor]]:
        """W[item, j]: what having `item` adds to the logit of j, 0 where it is no input of j."""
        for i, rows in self._blocks:
            weight, ids = self.weights[i], self.ids[i]
            is_input_CK = ids.tensor[rows] == item
            yield weight.lo + rows.start, (weight.tensor[rows] * is_input_CK).sum(dim=1)


def item_to_item(
    storage: Storage,
    neighbours: int,
    part_of: str,
    training: Training,
    offset: float = 0.0,
) -> ItemToItem:
    """The items x items path `nease`: on a support of `neighbours` inputs, or with 0 the exact
    one."""
    if neighbours:
        return NeighbourMatrix(storage, neighbours, part_of, training, offset)
    return ItemMatrix("nease", storage, part_of, offset, training)
