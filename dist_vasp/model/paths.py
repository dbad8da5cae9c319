"""Paths: each turns its source into logits of one block of items (DESIGN.md, section 2).

                 W1 (J,H)                  R (J,H)   Q (J,L)   W (I,J)
    x_G --> [ input side ] --> trunk --> [        paths        ] --> logits of a block (G,C)

`DenseHead` multiplies an output of the trunk by a matrix with one row per item: R d + r and
Q z + q. `ItemMatrix` sums rows of an items x items matrix with a zero diagonal: W x.
model/neighbours.py has the same W on a support.

The gradient of a block's weights goes to a `Sink` as soon as it exists and is not kept. The
gradient to the source is computed from the old weights first.

Shapes: G rows of the partition group, I items, J items of a slice, C items of a block, K width of a
source, E pairs of a row and an item, F past items of the pairs' rows one after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vasp.model.sinks import Sink, SumOfRows
from dist_vasp.model.slices import ItemSlice, Storage
from dist_vasp.model.sparse import ItemRows

_PAIRS_AT_ONCE = 4096  # rows of a head that are gathered at once
_ROWS_AT_ONCE = 4096  # rows of a head that are compared at once


@dataclass(frozen=True)
class Training:
    """How a path takes part in training.

    trained: its weights have gradients and moments. in_loss: the loss sees its logits. rate: factor
    of the learning rate. decay: each step draws the weights to their start by this times the rate.
    """

    trained: bool = True
    in_loss: bool = True
    rate: float = 1.0
    decay: float = 0.0


@dataclass(frozen=True)
class Pairs:
    """E pairs of a row and an item, and the items of the rows' histories one after another.

    row_E, item_E: the pairs. history_F: past items. pair_F: the pair that each belongs to.
    """

    row_E: Tensor
    item_E: Tensor
    history_F: Tensor
    pair_F: Tensor


class Path(ABC):
    """One path into the logits.

    name: stored weights are `output.NAME.*`, logged statistics `NAME_logit_mean`.
    part_of: the published model that the path belongs to, such as flvae or nease.
    source: index of the trunk's output that it reads, None for x itself.
    training: how it takes part in training.
    takes_room: whether it can read rows with room for more items, as a recorded step has them.
    """

    name: str
    part_of: str
    source: int | None = None
    training: Training = Training()
    takes_room: bool = True

    @abstractmethod
    def slices(self) -> list[ItemSlice]:
        """Every slice of weights that this rank owns."""

    def start_slices(self) -> list[ItemSlice]:
        """Copies of the weights at their start, for paths that are drawn to it."""
        return []

    def constants(self) -> list[ItemSlice]:
        """Slices that are stored beside the weights and never trained."""
        return []

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Fill the weights for the start of a training."""

    @abstractmethod
    def logits(
        self,
        block: int,
        source_GK: Tensor | None,
        x: ItemRows,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The logits (G, C) of a block, of a dtype, that of the products by default."""

    @abstractmethod
    def backward(self, block: int, grad_GC: Tensor, pass_: BackwardPass, sink: Sink) -> None:
        """Take dL/dlogits of a block: add dL/dsource, then pass dL/dweights to the sink."""

    def end_backward(self, pass_: BackwardPass, sink: Sink) -> None:
        """Pass on what was added up over the blocks."""

    @abstractmethod
    def similar(self, item: int) -> Iterator[tuple[int, Tensor]]:
        """(first item, scores (C,)) of all items: how near each is to `item`."""


class BackwardPass:
    """What one backward pass over the blocks adds up for a path.

    source_GK, x: what the path read. grad_source_GK: dL/dsource, None where nobody asks for it.
    grad_bias: one for each slice.
    """

    def __init__(
        self,
        source_GK: Tensor | None,
        x: ItemRows,
        biases: list[ItemSlice],
        to_trunk: bool = True,
    ) -> None:
        self.source_GK, self.x = source_GK, x
        self.grad_source_GK: Tensor | None = None
        if source_GK is not None and to_trunk:
            self.grad_source_GK = torch.zeros_like(source_GK, dtype=biases[0].whole.dtype)
        self.grad_bias = [torch.zeros_like(bias.whole) for bias in biases]


class DenseHead(Path):
    """logits = source A^T + a, with A (I, K) and a (I,) cut by item."""

    def __init__(self, name: str, source: int, width: int, storage: Storage) -> None:
        self.name, self.part_of, self.source, self.width = name, "flvae", source, width
        self.weights = storage.rows(f"output.{name}.weight", width)
        self.biases = storage.rows(f"output.{name}.bias")
        self.n_items = storage.n_items
        self._kernels = storage.arithmetic.kernels
        self._blocks = [self._place(lo, hi) for lo, hi in storage.blocks]

    def _place(self, lo: int, hi: int) -> tuple[int, int, int]:
        """(index of the slice that holds a block, first and last row of the block and its padding
        in it)."""
        index = next(i for i, piece in enumerate(self.weights) if piece.lo <= lo < piece.hi)
        first = self.weights[index].lo
        return index, lo - first, lo - first + self._kernels.padded(hi - lo)

    def slices(self) -> list[ItemSlice]:
        pairs = zip(self.weights, self.biases, strict=True)
        return [piece for pair in pairs for piece in pair]

    def initialise(self, seed: int) -> None:
        for piece in self.weights:
            piece.glorot(seed, self.n_items + self.width)

    def logits(
        self,
        block: int,
        source_GK: Tensor | None,
        x: ItemRows,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        assert source_GK is not None
        i, lo, hi = self._blocks[block]
        bias_C, weight_CK = self.biases[i].whole[lo:hi], self.weights[i].working[lo:hi]
        if dtype not in (None, weight_CK.dtype):
            return self._kernels.product(source_GK, weight_CK.T, dtype).add_(bias_C)
        return torch.addmm(bias_C.to(weight_CK.dtype), source_GK, weight_CK.T)

    def backward(self, block: int, grad_GC: Tensor, pass_: BackwardPass, sink: Sink) -> None:
        assert pass_.source_GK is not None
        i, lo, hi = self._blocks[block]
        weight_CK, bias_J = self.weights[i].working[lo:hi], pass_.grad_bias[i]
        if pass_.grad_source_GK is not None and weight_CK.dtype == pass_.grad_source_GK.dtype:
            pass_.grad_source_GK.addmm_(grad_GC, weight_CK)
        elif pass_.grad_source_GK is not None:
            pass_.grad_source_GK += grad_GC @ weight_CK
        bias_J[lo:hi] = grad_GC.sum(dim=0, dtype=bias_J.dtype)
        sink.take_product(self.weights[i].whole, lo, grad_GC, pass_.source_GK)

    def end_backward(self, pass_: BackwardPass, sink: Sink) -> None:
        for bias, grad_J in zip(self.biases, pass_.grad_bias, strict=True):
            sink.take(bias.whole, 0, grad_J)

    def pair_logits(self, source_GK: Tensor, pairs: Pairs) -> Tensor:
        """The logit of each pair (E,), 0 where another rank owns the item."""
        logit_E = torch.zeros(len(pairs.row_E), device=pairs.row_E.device)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            own = ((pairs.item_E >= weight.lo) & (pairs.item_E < weight.hi)).nonzero().squeeze(1)
            for some in own.split(_PAIRS_AT_ONCE):
                local = pairs.item_E[some] - weight.lo
                products = weight.tensor[local] * source_GK[pairs.row_E[some]]
                logit_E[some] = products.sum(dim=1) + bias.tensor[local]
        return logit_E

    def similar(self, item: int) -> Iterator[tuple[int, Tensor]]:
        """Cosine of the items' rows of A, which is symmetric."""
        wanted = next(p.tensor[item - p.lo] for p in self.weights if p.lo <= item < p.hi)
        for piece in self.weights:
            for lo in range(0, piece.hi - piece.lo, _ROWS_AT_ONCE):
                rows = piece.tensor[lo : lo + _ROWS_AT_ONCE]
                yield piece.lo + lo, torch.cosine_similarity(rows, wanted[None], dim=1)


class ItemToItem(Path):
    """A path whose logit is `offset` and the sum of what each item of the history adds."""

    offset: float = 0.0

    @abstractmethod
    def pair_weights(self, pairs: Pairs) -> Tensor:
        """What every past item of every pair adds (F,), 0 where another rank owns the item of the
        pair."""


class ItemMatrix(ItemToItem):
    """logits = x W + offset, W (I, I) with a zero diagonal, cut by output item.

    Column j of W holds the weights into output item j.
    """

    def __init__(
        self,
        name: str,
        storage: Storage,
        part_of: str,
        offset: float = 0.0,
        training: Training = Training(),
    ) -> None:
        self.name, self.part_of, self.offset, self.training = name, part_of, offset, training
        self.n_items = storage.n_items
        self.blocks = storage.columns(f"output.{name}.weight")
        self._storage, self._kernels = storage, storage.arithmetic.kernels
        self._starts: list[ItemSlice] | None = None

    def slices(self) -> list[ItemSlice]:
        return list(self.blocks)

    def start_slices(self) -> list[ItemSlice]:
        """Storage for the start of W, made when a trainer asks for it: no reader needs one."""
        if self._starts is None:
            start = f"output.{self.name}.weight.start"
            self._starts = self._storage.columns(start) if self.training.decay else []
        return list(self._starts)

    def columns(self) -> list[Tensor]:
        """The blocks (I, C) of W, in item order."""
        return [piece.tensor for piece in self.blocks]

    def initialise(self, seed: int) -> None:
        for piece in self.blocks:
            piece.glorot(seed, 2 * self.n_items)
            torch.diagonal(piece.tensor[piece.lo : piece.hi]).zero_()

    def logits(
        self,
        block: int,
        source_GK: Tensor | None,
        x: ItemRows,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        sums_GC = self._kernels.sum_rows(self.blocks[block].working, x.items, x.indptr, dtype)
        return sums_GC.add_(self.offset) if self.offset else sums_GC

    def backward(self, block: int, grad_GC: Tensor, pass_: BackwardPass, sink: Sink) -> None:
        """Pass dL/dW to the sink; the diagonal has no gradient."""
        piece = self.blocks[block]
        everywhere = (0, self.n_items)
        gradient = SumOfRows(grad_GC, pass_.x, everywhere, piece.lo, self._kernels)
        sink.take_sum(piece.whole, gradient)

    def pair_weights(self, pairs: Pairs) -> Tensor:
        """W[i, j] of every past item i of every pair of item j."""
        target_F = pairs.item_E[pairs.pair_F]
        order = torch.argsort(target_F, stable=True)  # pairs of one block lie side by side
        sorted_F = target_F[order]
        weight_F = torch.zeros(len(target_F), device=target_F.device)
        for piece in self.blocks:
            bounds = torch.tensor([piece.lo, piece.hi], device=target_F.device)
            first, last = torch.searchsorted(sorted_F, bounds).tolist()
            if first < last:
                where = order[first:last]
                rows, columns = pairs.history_F[where], sorted_F[first:last] - piece.lo
                weight_F[where] = piece.tensor[rows, columns]
        return weight_F

    def similar(self, item: int) -> Iterator[tuple[int, Tensor]]:
        """W[item, j]: what having `item` adds to the logit of j. It is directed."""
        for piece in self.blocks:
            yield piece.lo, piece.tensor[item].clone()
