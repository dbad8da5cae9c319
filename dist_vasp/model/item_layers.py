"""Input and output side of VASP, partitioned by item (DESIGN.md, section 3).

Each rank of a partition group owns the items J = [start, stop): rows J of W1, R and Q, entries J of
the biases, columns J of the NEASE matrix W (column j holds the weights into output item j).

              W1_J (J,H)          R_J (J,H)   Q_J (J,L)   W_J (I,J)
    x_G  --> [ input side ] ...  [          output side          ] --> logits of J, loss, gradients
              sum over J             one block of items at a time: no (G, J) tensor is ever held
              reduce_scatter

A block's weight gradient is handed to a `Sink` as soon as it exists and is not kept: the sink
updates the weights at once, or adds it up, or takes its norm. The gradient to the trunk is taken
from the old weights first.

Shapes: B rows of this rank, G = P * B rows of the partition group, I items, J items of this rank, C
items of a block, H hidden width, L latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vasp.data.hashing import hash64
from dist_vasp.model.losses import Loss, MultinomialLoss, RowLoss, sum_log_sigmoid
from dist_vasp.model.path_statistics import PathStatistics
from dist_vasp.model.sparse import ItemRows, sum_rows
from dist_vasp.parallel.comm import Group, all_gather, reduce_scatter
from dist_vasp.parallel.partition import ItemPartition

BLOCK_COLUMNS = (
    256  # a block of logits and its gather stay in a CPU core's cache (docs/experiments.md)
)
GPU_BLOCK_COLUMNS = 2048  # fewer, larger kernels; not measured yet
GRADIENT_ROWS = 1024  # input items whose gradient is held at once: made, used and dropped in cache
FUSED_GRADIENT_ROWS = 8192  # the same where a compiled update takes them: fewer, larger calls

NEASE_WEIGHT = "output.nease.weight"

# (parameter, first row of it, gradient of the rows from there on)
Sink = Callable[[Tensor, int, Tensor], None]


def accumulate(parameter: Tensor, first: int, grad: Tensor) -> None:
    """The sink that keeps gradients: adds them up in `parameter.grad`."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad[first : first + len(grad)] += grad


@dataclass(frozen=True)
class ItemSlice:
    """One stored piece of an item matrix: the items [lo, hi) along dimension `item_dim` of
    `tensor`."""

    name: str
    lo: int
    hi: int
    item_dim: int
    tensor: Tensor

    def glorot(self, seed: int, name_id: int, fan: int) -> None:
        """Draw each item's vector from a generator of its own, so that every layout starts from the
        same matrix."""
        bound = (6 / fan) ** 0.5
        keys = hash64(seed, name_id, np.arange(self.lo, self.hi, dtype=np.uint64))
        by_item = self.tensor.movedim(self.item_dim, 0)
        width = by_item.shape[1]
        for start in range(0, self.hi - self.lo, 1024):
            rows = [
                torch.rand(width, generator=torch.Generator().manual_seed(int(key))) * (2 * bound)
                - bound
                for key in keys[start : start + 1024]
            ]
            by_item[start : start + len(rows)] = torch.stack(rows).to(by_item)


class InputSide:
    """x -> W1 x for this rank's own rows: local sums over J, then a reduce_scatter over the
    partition group."""

    def __init__(
        self,
        part: ItemPartition,
        group: Group,
        hidden: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.part, self.group = part, group
        self.weight_JH = torch.zeros((part.size, hidden), device=device, dtype=dtype)

    def slices(self) -> list[ItemSlice]:
        return [ItemSlice("input.weight", self.part.start, self.part.stop, 0, self.weight_JH)]

    def forward(self, x: ItemRows) -> Tensor:
        """Rows of the group -> (B, H) of this rank."""
        partial_GH = sum_rows(self.weight_JH, *x.restricted(self.part.start, self.part.stop))
        return reduce_scatter(partial_GH, self.group)

    def backward(self, x: ItemRows, grad_GH: Tensor, sink: Sink) -> None:
        """Hand dL/dW1_J to the sink, some rows at a time, given dL/d(W1 x) of the group's rows."""
        for lo, hi in self.part.blocks(GRADIENT_ROWS):
            sink(self.weight_JH, lo - self.part.start, sum_rows(grad_GH, *x.rows_by_item(lo, hi)))


@dataclass(frozen=True)
class Head:
    """One deep path into the logits: weight @ source + bias, for this rank's items."""

    name: str
    weight_JK: Tensor
    bias_J: Tensor

    def logits(self, source_GK: Tensor, lo: int, hi: int) -> Tensor:
        return torch.addmm(self.bias_J[lo:hi], source_GK, self.weight_JK[lo:hi].T)

    def backward(
        self, source_GK: Tensor, grads: HeadGradients, grad_GC: Tensor, lo: int, hi: int, sink: Sink
    ) -> None:
        """Add dL/dsource, from the weights as they still are, then hand the block's weight gradient
        to the sink."""
        grads.source_GK.addmm_(grad_GC, self.weight_JK[lo:hi])
        grads.bias_J[lo:hi] = grad_GC.sum(dim=0)
        sink(self.weight_JK, lo, grad_GC.T @ source_GK)


@dataclass(frozen=True)
class HeadGradients:
    """What a pass over the blocks adds up for a head: dL/dsource and dL/dbias."""

    source_GK: Tensor
    bias_J: Tensor


class OutputSide:
    """(d, z, x) -> one list of logits per path for this rank's items: R d + r, Q z + q, W x.

    `deep`, `latent_head` and `shallow` say which paths there are: FLVAE has the first two, NEASE the last, VASP all. What goes
    into the deep paths is the list `sources`: [d (G, H)] or [d (G, H), z (G, L)], empty for NEASE. `nease_offset` is added to W x;
    `nease` says whether W is trained with the product, frozen in it, or apart from the loss (config.ModelConfig).
    """

    def __init__(
        self,
        part: ItemPartition,
        group: Group,
        hidden: int,
        latent: int,
        deep: bool,
        latent_head: bool,
        shallow: bool,
        block_columns: int,
        device: torch.device,
        dtype: torch.dtype,
        nease: str = "trained",
        nease_offset: float = 0.0,
    ) -> None:
        self.part, self.group, self.gradient_rows = part, group, GRADIENT_ROWS
        self.nease, self.nease_offset = nease, nease_offset
        self.block_columns = block_columns or (
            BLOCK_COLUMNS if device.type == "cpu" else GPU_BLOCK_COLUMNS
        )
        self.blocks = part.blocks(self.block_columns)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        widths = {"output.decoder": hidden} if deep else {}
        widths |= {"output.latent": latent} if deep and latent_head else {}
        self.heads = [
            Head(name, zeros(part.size, width), zeros(part.size)) for name, width in widths.items()
        ]
        # W is stored block by block: a bag over a contiguous (I, C) table stays in cache.
        self.W_IC = [zeros(part.n_items, hi - lo) for lo, hi in self.blocks] if shallow else []
        in_loss = shallow and nease != "apart"
        names = [name.removeprefix("output.") for name in widths] + (["nease"] if in_loss else [])
        self.statistics = PathStatistics(names, device)

    def zero_diagonal(self) -> None:
        """No item may predict itself."""
        for (lo, _), W_IC in zip(self.blocks, self.W_IC, strict=False):
            self._diagonal(W_IC, lo).zero_()

    @staticmethod
    def _diagonal(block_IC: Tensor, lo: int) -> Tensor:
        """The entries of W's diagonal that lie in the block of columns starting at item `lo`: a
        view (C,)."""
        return torch.diagonal(block_IC[lo : lo + block_IC.shape[1]])

    def slices(self) -> list[ItemSlice]:
        whole = (self.part.start, self.part.stop)
        pieces = []
        for head in self.heads:
            pieces += [
                ItemSlice(f"{head.name}.weight", *whole, 0, head.weight_JK),
                ItemSlice(f"{head.name}.bias", *whole, 0, head.bias_J),
            ]
        return pieces + [
            ItemSlice(NEASE_WEIGHT, lo, hi, 1, W)
            for (lo, hi), W in zip(self.blocks, self.W_IC, strict=False)
        ]

    def logits(
        self, block: int, sources: list[Tensor], x: ItemRows, in_loss: bool = False
    ) -> list[Tensor]:
        """The block's logits, (G, C) per path, in the order R, Q, W; without W where it is no part
        of the loss (`in_loss`)."""
        lo, hi = (b - self.part.start for b in self.blocks[block])
        paths = [
            head.logits(source, lo, hi) for head, source in zip(self.heads, sources, strict=True)
        ]
        if self.W_IC and not (in_loss and self.nease == "apart"):
            shallow_GC = sum_rows(self.W_IC[block], x.items, x.indptr)
            paths.append(shallow_GC.add_(self.nease_offset) if self.nease_offset else shallow_GC)
        return paths

    def row_stats(
        self, loss: RowLoss, sources: list[Tensor], x: ItemRows, y: ItemRows | None
    ) -> Tensor:
        """The row statistics of `loss` over all items of all partitions: a first pass over the
        blocks. (G, n)"""
        nothing = torch.zeros(0, dtype=torch.int64, device=x.items.device)
        shares = [
            loss.row_stats(
                self.logits(i, sources, x),
                y.positions(lo, hi) if y is not None else (nothing, nothing),
            )
            for i, (lo, hi) in enumerate(self.blocks)
        ]
        local = loss.combine(torch.stack(shares))
        return loss.combine(all_gather(local[None], self.group))

    def loss_and_gradients(
        self,
        loss: Loss,
        sources: list[Tensor],
        x: ItemRows,
        y: ItemRows,
        weight_G: Tensor,
        sink: Sink,
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass over the blocks: forward, loss and backward of each, before the next.

        Returns this rank's share of the loss (scalar) and of the gradient to each source; both are
        sums over partitions still to be taken.
        """
        stats, total = None, weight_G.new_zeros(())
        if isinstance(loss, RowLoss):
            stats = self.row_stats(loss, sources, x, y)
            total = weight_G @ loss.row_loss(stats) / self.group.size
        head_grads = [
            HeadGradients(torch.zeros_like(source), torch.zeros_like(head.bias_J))
            for head, source in zip(self.heads, sources, strict=True)
        ]
        for i, (item_lo, item_hi) in enumerate(self.blocks):
            lo, hi = item_lo - self.part.start, item_hi - self.part.start
            logits = self.logits(i, sources, x, True)
            self.statistics.add(item_lo, logits, weight_G)
            block_loss, grads = loss.block(logits, y.positions(item_lo, item_hi), weight_G, stats)
            total = total + block_loss
            for head, source, head_grad, grad_GC in zip(
                self.heads, sources, head_grads, grads, strict=False
            ):
                head.backward(source, head_grad, grad_GC, lo, hi, sink)
            if self.W_IC and self.nease == "trained":
                self._shallow_backward(i, grads[-1], x, sink)
        for head, head_grad in zip(self.heads, head_grads, strict=True):
            sink(head.bias_J, 0, head_grad.bias_J)
        return total, [head_grad.source_GK for head_grad in head_grads]

    def _shallow_backward(self, block: int, grad_GC: Tensor, x: ItemRows, sink: Sink) -> None:
        """Hand dL/dW of the block to the sink, some input items at a time; W's diagonal has no
        gradient."""
        lo, hi = self.blocks[block]
        for first in range(0, self.part.n_items, self.gradient_rows):
            last = min(first + self.gradient_rows, self.part.n_items)
            grad_RC = sum_rows(grad_GC, *x.rows_by_item(first, last))
            on_diagonal = range(max(lo, first), min(hi, last))
            if on_diagonal:
                torch.diagonal(
                    grad_RC[
                        on_diagonal.start - first :, on_diagonal.start - lo : on_diagonal.stop - lo
                    ]
                ).zero_()
            sink(self.W_IC[block], first, grad_RC)

    def scores(
        self, sources: list[Tensor], x: ItemRows, loss: Loss
    ) -> Iterator[tuple[int, Tensor]]:
        """(first item, log p (G, C)) of every block, in item order; a multinomial model's p is its
        softmax."""
        stats = (
            self.row_stats(loss, sources, x, None) if isinstance(loss, MultinomialLoss) else None
        )
        for i, (lo, _) in enumerate(self.blocks):
            paths = self.logits(i, sources, x)
            yield (
                lo,
                sum_log_sigmoid(paths)
                if stats is None
                else sum(paths[1:], paths[0]) - stats[:, :1],
            )
