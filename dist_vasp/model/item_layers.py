"""Input and output side of VASP, partitioned by item (DESIGN.md, section 3).

Each rank of a partition group owns the items J = [start, stop): rows J of W1, R and Q, entries J of the biases, columns
J of the NEASE matrix W (column j holds the weights into output item j).

              W1_J (J,H)          R_J (J,H)   Q_J (J,L)   W_J (I,J)
    x_G  --> [ input side ] ...  [          output side          ] --> logits of J, loss, gradients
              sum over J             one block of columns at a time: no (G, J) tensor is ever held
              reduce_scatter

Shapes: B rows of this rank, G = P * B rows of the partition group, I items, J items of this rank, C columns of a block,
H hidden width, L latent width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vasp.data.augment import hash64
from dist_vasp.model.losses import Loss, MultinomialLoss, sum_log_sigmoid
from dist_vasp.model.sparse import ItemRows, sum_rows
from dist_vasp.parallel.comm import Group, all_gather, reduce_scatter
from dist_vasp.parallel.partition import ItemPartition

BLOCK_COLUMNS = 256  # a block of logits and its gather stay in cache (docs/experiments.md)


@dataclass(frozen=True)
class ItemSlice:
    """One stored piece of an item matrix: the items [lo, hi) along dimension `item_dim` of `tensor`."""

    name: str
    lo: int
    hi: int
    item_dim: int
    tensor: Tensor

    def glorot(self, seed: int, name_id: int, fan: int) -> None:
        """Draw each item's vector from a generator of its own, so that every layout starts from the same matrix."""
        bound = (6 / fan) ** 0.5
        keys = hash64(np.uint64(seed), np.uint64(name_id), np.arange(self.lo, self.hi, dtype=np.uint64))
        by_item = self.tensor.movedim(self.item_dim, 0)
        width = by_item.shape[1]
        for start in range(0, self.hi - self.lo, 1024):
            rows = [
                torch.rand(width, generator=torch.Generator().manual_seed(int(key))) * (2 * bound) - bound
                for key in keys[start : start + 1024]
            ]
            by_item[start : start + len(rows)] = torch.stack(rows).to(by_item)


def _accumulate(parameter: Tensor, grad: Tensor) -> None:
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


class InputSide:
    """x -> W1 x for this rank's own rows: local sums over J, then a reduce_scatter over the partition group."""

    def __init__(self, part: ItemPartition, group: Group, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        self.part, self.group = part, group
        self.weight_JH = torch.zeros((part.size, hidden), device=device, dtype=dtype)

    def slices(self) -> list[ItemSlice]:
        return [ItemSlice("input.weight", self.part.start, self.part.stop, 0, self.weight_JH)]

    def forward(self, x: ItemRows) -> Tensor:
        """Rows of the group -> (B, H) of this rank."""
        partial_GH = sum_rows(self.weight_JH, *x.restricted(self.part.start, self.part.stop))
        return reduce_scatter(partial_GH, self.group)

    def accumulate_gradient(self, x: ItemRows, grad_BH: Tensor) -> None:
        """Add dL/dW1_J, given dL/d(W1 x) of this rank's rows."""
        grad_GH = all_gather(grad_BH, self.group)
        _accumulate(self.weight_JH, sum_rows(grad_GH, *x.rows_by_item(self.part.start, self.part.stop)))


class OutputSide:
    """(d, z, x) -> one list of logits per path for this rank's items: R d + r, Q z + q, W x.

    `deep`, `latent_head` and `shallow` say which paths there are: FLVAE has the first two, NEASE the last, VASP all.
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
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.part, self.group = part, group
        self.blocks = part.blocks(BLOCK_COLUMNS)
        J, I = part.size, part.n_items

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.R_JH, self.r_J = (zeros(J, hidden), zeros(J)) if deep else (None, None)
        self.Q_JL, self.q_J = (zeros(J, latent), zeros(J)) if deep and latent_head else (None, None)
        # W is stored block by block: a bag over a contiguous (I, C) table stays in cache.
        self.W_IC = [zeros(I, hi - lo) for lo, hi in self.blocks] if shallow else None

    def zero_diagonal(self) -> None:
        """No item may predict itself."""
        for (lo, _), W_IC in zip(self.blocks, self.W_IC or [], strict=False):
            self._diagonal(W_IC, lo).zero_()

    @staticmethod
    def _diagonal(block_IC: Tensor, lo: int) -> Tensor:
        """The entries of W's diagonal that lie in the block of columns starting at item `lo`: a view (C,)."""
        return torch.diagonal(block_IC[lo : lo + block_IC.shape[1]])

    def slices(self) -> list[ItemSlice]:
        whole = (self.part.start, self.part.stop)
        named = {
            "output.decoder.weight": self.R_JH,
            "output.decoder.bias": self.r_J,
            "output.latent.weight": self.Q_JL,
            "output.latent.bias": self.q_J,
        }
        pieces = [ItemSlice(name, *whole, 0, tensor) for name, tensor in named.items() if tensor is not None]
        if self.W_IC is not None:
            pieces += [ItemSlice("output.nease.weight", lo, hi, 1, W) for (lo, hi), W in zip(self.blocks, self.W_IC, strict=True)]
        return pieces

    def logits(self, block: int, d_GH: Tensor | None, z_GL: Tensor | None, x: ItemRows) -> list[Tensor]:
        """The block's logits, (G, C) per path, in the order R, Q, W."""
        lo, hi = (b - self.part.start for b in self.blocks[block])
        paths = []
        if self.R_JH is not None:
            paths.append(torch.addmm(self.r_J[lo:hi], d_GH, self.R_JH[lo:hi].T))
        if self.Q_JL is not None:
            paths.append(torch.addmm(self.q_J[lo:hi], z_GL, self.Q_JL[lo:hi].T))
        if self.W_IC is not None:
            paths.append(sum_rows(self.W_IC[block], x.items, x.indptr))
        return paths

    def row_stats(self, loss: Loss, d_GH: Tensor | None, z_GL: Tensor | None, x: ItemRows, y: ItemRows | None) -> Tensor:
        """The row statistics of `loss` over all items of all partitions: a first pass over the blocks. (G, n)"""
        nothing = torch.zeros(0, dtype=torch.int64, device=x.items.device)
        shares = [
            loss.row_stats(self.logits(i, d_GH, z_GL, x), y.positions(lo, hi) if y is not None else (nothing, nothing))
            for i, (lo, hi) in enumerate(self.blocks)
        ]
        local = loss.combine(torch.stack(shares))
        return loss.combine(all_gather(local[None], self.group))

    def loss_and_gradients(
        self, loss: Loss, d_GH: Tensor | None, z_GL: Tensor | None, x: ItemRows, y: ItemRows, weight_G: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One pass over the blocks: forward, loss and backward of each, before the next.

        Adds the gradients of this rank's matrices to their `.grad`. Returns this rank's share of the loss (scalar), and its
        share of dL/dd (G, H) and dL/dz (G, L): both are sums over partitions still to be taken.
        """
        stats = self.row_stats(loss, d_GH, z_GL, x, y) if loss.needs_row_stats else None
        total = weight_G @ loss.row_loss(stats) / self.group.size if stats is not None else weight_G.new_zeros(())
        grad_d = torch.zeros_like(d_GH) if d_GH is not None else None
        grad_z = torch.zeros_like(z_GL) if z_GL is not None else None
        heads = [(self.R_JH, self.r_J, d_GH, grad_d), (self.Q_JL, self.q_J, z_GL, grad_z)]
        heads = [head for head in heads if head[0] is not None]
        for weight, bias, _, _ in heads:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            bias.grad = torch.zeros_like(bias) if bias.grad is None else bias.grad

        for i, (item_lo, item_hi) in enumerate(self.blocks):
            lo, hi = item_lo - self.part.start, item_hi - self.part.start
            block_loss, grads = loss.block(self.logits(i, d_GH, z_GL, x), y.positions(item_lo, item_hi), weight_G, stats)
            total = total + block_loss
            for (weight, bias, source, grad_source), grad_GC in zip(heads, grads, strict=False):
                weight.grad[lo:hi].addmm_(grad_GC.T, source)
                bias.grad[lo:hi].add_(grad_GC.sum(dim=0))
                grad_source.addmm_(grad_GC, weight[lo:hi])
            if self.W_IC is not None:
                grad_IC = sum_rows(grads[-1], *x.rows_by_item(0, self.part.n_items))
                self._diagonal(grad_IC, item_lo).zero_()
                _accumulate(self.W_IC[i], grad_IC)
        return total, grad_d, grad_z

    def scores(self, d_GH: Tensor | None, z_GL: Tensor | None, x: ItemRows, loss: Loss) -> Iterator[tuple[int, Tensor]]:
        """(first item, log p (G, C)) of every block, in item order; a multinomial model's p is its softmax."""
        stats = self.row_stats(loss, d_GH, z_GL, x, None) if isinstance(loss, MultinomialLoss) else None
        for i, (lo, _) in enumerate(self.blocks):
            paths = self.logits(i, d_GH, z_GL, x)
            if stats is not None:
                yield lo, sum(paths[1:], paths[0]) - stats[:, :1]
            else:
                yield lo, sum_log_sigmoid(paths)
