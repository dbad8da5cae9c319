"""Losses of one block of item columns and their gradients in closed form: elementwise, no
collectives.

A model's prediction is a product of sigmoids, one per path: p = prod_k s_k with s_k = sigmoid(l_k),
and q = 1 - p. With u_k = exp(-|l_k|), the one exponential that a path costs, both are made of
positive terms only, so no digits are lost:

    log p = sum_k min(l_k, 0) - log(prod_k (1 + u_k))          q = (1 - s_1) + s_1 (1 - s_2) + s_1 s_2 (1 - s_3)

A loss is a function of (log p, log q); with its two slopes S_p = dL/d(log p) and S_q = dL/d(log q),

    dL/dl_k = (1 - sigmoid(l_k)) * (S_p - S_q * p/q) = (1 - sigmoid(l_k))/q * (q * S_p - p * S_q)

Focal loss: Lin et al. 2017 (arXiv 1708.02002), as used by VASP (arXiv 2102.05774), section 3.1.
Multinomial: Liang et al. 2018 (arXiv 1802.05814), equation 2. Cosine: VASP, section 3.2.

Shapes: G rows, C columns of the block. Targets are the positions (rows, columns) of the ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dist_vasp.parallel.kernels import Fuse

Positions = tuple[Tensor, Tensor]  # rows (E,), columns (E,) of the ones of a block


@dataclass
class Probability:
    """p and q = 1 - p of a product of sigmoids, their logarithms, and (1 - sigmoid) / q of each
    path; all (G, C)."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    shares: list[Tensor]


def probability(logits: list[Tensor]) -> Probability:
    """Of a product of sigmoids, exact for p near 0 and near 1 and finite for every logit.

    Where all logits are so large that 1 + u_k is 1 (above 17 in float32), q is the sum of the u_k:
    all are then taken exp(shift) times too large, so that none is lost to underflow, and q and log
    p are scaled back.
    """
    shift = (reduce(torch.minimum, logits) + math.log(torch.finfo(logits[0].dtype).eps / 4)).clamp(
        min=0
    )
    nothing = torch.zeros_like(shift)
    below, spread, q, p, misses = nothing, nothing, nothing, nothing + 1, []
    for logit in logits:
        u = torch.exp(shift - logit.abs())
        larger = 1 / (1 + u)
        smaller = u * larger
        hit, miss = torch.where(logit > 0, larger, smaller), torch.where(logit > 0, smaller, larger)
        misses.append(miss)
        below = below + logit.clamp(max=0)
        spread = spread + u + spread * u  # prod (1 + u_k) - 1
        q, p = q + p * miss, p * hit
    scale, over_q = torch.exp(-shift), 1 / q
    log_p = below - torch.log1p(spread * scale)
    log_q = torch.where(p < 0.5, torch.log1p(-p), torch.log(q)) - shift
    return Probability(p, q * scale, log_p, log_q, [miss * over_q for miss in misses])


def sum_log_sigmoid(logits: list[Tensor]) -> Tensor:
    """log p alone: what ranking needs."""
    total = logsigmoid(logits[0])
    for logit in logits[1:]:
        total = total + logsigmoid(logit)
    return total


class ElementwiseLoss:
    """A loss that is a sum over items of a function of (log p, log q, y)."""

    def slopes(
        self, of: Probability, is_one: Tensor, stats: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(L, S_p, S_q) of every entry; `is_one` says where y is 1."""
        raise TypeError(f"{type(self).__name__} does not define its slopes")  # pragma: no cover

    def fuse(self, fuse: Fuse) -> None:
        """Have the pass over a whole block compiled."""
        self.entries = fuse(self.entries)  # type: ignore[method-assign]

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The block's weighted loss (scalar) and its gradient with respect to each path's logits,
        (G, C) each."""
        is_one = torch.zeros(logits[0].shape, dtype=torch.bool, device=weight_G.device)
        is_one[ones] = True
        weight_GC = (
            weight_G[:, None].expand_as(is_one).contiguous()
        )  # of one number a row the compiler makes several loops
        loss, grads = self.entries(
            logits, is_one, weight_GC, None if stats is None else stats[:, None]
        )
        return weight_G @ loss.sum(dim=1), grads

    def entries(
        self, logits: list[Tensor], is_one: Tensor, weight: Tensor, stats: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of every entry, and its weighted gradient by each path, (G, C) each."""
        of = probability(logits)
        loss, slope_p, slope_q = self.slopes(of, is_one, stats)
        common = (of.q * slope_p - of.p * slope_q) * weight
        return loss, [share * common for share in of.shares]


@dataclass
class FocalLoss(ElementwiseLoss):
    """y=1: -alpha q^gamma log p;  y=0: -(1 - alpha) p^gamma log q."""

    alpha: float = 0.25
    gamma: float = 2.0

    def slopes(self, of, is_one, stats):
        log_hit = torch.where(is_one, of.log_p, of.log_q)
        power = torch.where(is_one, of.q, of.p) ** self.gamma
        modulator = torch.where(is_one, -self.alpha * power, (self.alpha - 1) * power)
        loss = modulator * log_hit
        slope_miss = self.gamma * loss
        return (
            loss,
            torch.where(is_one, modulator, slope_miss),
            torch.where(is_one, slope_miss, modulator),
        )


@dataclass
class BinaryCrossEntropy(ElementwiseLoss):
    """y=1: -log p;  y=0: -log q."""

    def slopes(self, of, is_one, stats):
        y = is_one.to(of.p.dtype)
        return -torch.where(is_one, of.log_p, of.log_q), -y, y - 1


@dataclass
class SquaredError(ElementwiseLoss):
    """(y - p)^2."""

    def slopes(self, of, is_one, stats):
        loss = torch.where(is_one, of.q, of.p) ** 2
        return loss, torch.where(is_one, 0.0, 2 * loss), torch.where(is_one, 2 * loss, 0.0)


@dataclass
class CosineLoss(ElementwiseLoss):
    """1 - <p, y> / (|p| |y|) of each row.

    Row statistics: <p, y> and |p|^2, summed over the blocks and partitions, and |y|^2.
    """

    def row_stats(self, logits: list[Tensor], ones: Positions) -> Tensor:
        """This block's share of (<p, y>, |p|^2, |y|^2): (G, 3)."""
        p = torch.exp(sum_log_sigmoid(logits))
        share = p.new_zeros((p.shape[0], 3))
        share[:, 1] = (p * p).sum(dim=1)
        share[:, 0].index_add_(0, ones[0], p[ones])
        share[:, 2].index_add_(0, ones[0], torch.ones_like(ones[0], dtype=p.dtype))
        return share

    def combine(self, shares: Tensor) -> Tensor:
        """(shares, G, 3) -> (G, 3)."""
        return shares.sum(dim=0)

    def row_loss(self, stats: Tensor) -> Tensor:
        """(G,)"""
        return 1 - stats[:, 0] / self._norms(stats)

    @staticmethod
    def _norms(stats: Tensor) -> Tensor:
        tiny = torch.finfo(stats.dtype).tiny
        return stats[..., 1].clamp(min=tiny).sqrt() * stats[..., 2].clamp(min=1).sqrt()

    def slopes(self, of, is_one, stats):
        p, norms = of.p, self._norms(stats)
        # one division after the other: |p|^3 would underflow where every p is below 1e-15
        pull = stats[..., 0] / norms / stats[..., 1].clamp(min=torch.finfo(stats.dtype).tiny)
        nothing = torch.zeros_like(p)
        return nothing, p * (p * pull - torch.where(is_one, 1 / norms, 0.0)), nothing


@dataclass
class MultinomialLoss:
    """-sum_j y_j log softmax(l)_j with l the sum of the paths' logits.

    Row statistics: log sum exp l and the number of ones.
    """

    def row_stats(self, logits: list[Tensor], ones: Positions) -> Tensor:
        """This block's (log sum exp, number of ones): (G, 2)."""
        total = sum(logits[1:], logits[0])
        count = total.new_zeros(total.shape[0]).index_add_(
            0, ones[0], torch.ones_like(ones[0], dtype=total.dtype)
        )
        return torch.stack([torch.logsumexp(total, dim=1), count], dim=1)

    def combine(self, shares: Tensor) -> Tensor:
        """(shares, G, 2) -> (G, 2)."""
        return torch.stack(
            [torch.logsumexp(shares[..., 0], dim=0), shares[..., 1].sum(dim=0)], dim=1
        )

    def row_loss(self, stats: Tensor) -> Tensor:
        """(G,) zeros: the loss is summed over the ones of each block."""
        return torch.zeros_like(stats[:, 0])

    def fuse(self, fuse: Fuse) -> None:
        """Nothing to compile: a block is a handful of operations."""

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        assert stats is not None
        total = sum(logits[1:], logits[0])
        rows, columns = ones
        log_softmax = total - stats[:, :1]
        loss = -(weight_G[rows] * log_softmax[ones]).sum()
        grad = torch.exp(log_softmax) * (stats[:, 1] * weight_G)[:, None]
        grad[rows, columns] -= weight_G[rows]
        return loss, [grad] * len(logits)


RowLoss = CosineLoss | MultinomialLoss  # the losses that need row statistics first
Loss = FocalLoss | BinaryCrossEntropy | SquaredError | RowLoss


def make_loss(kind: str, alpha: float = 0.25, gamma: float = 2.0) -> Loss:
    """The loss that `loss.kind` names."""
    losses: dict[str, Loss] = {
        "focal": FocalLoss(alpha, gamma),
        "bce": BinaryCrossEntropy(),
        "mse": SquaredError(),
        "cosine": CosineLoss(),
        "multinomial": MultinomialLoss(),
    }
    return losses[kind]
