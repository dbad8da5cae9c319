"""Losses of one block of item columns and their gradients in closed form: elementwise, no collectives.

A model's prediction is a product of sigmoids, one per path: p = prod_k sigmoid(l_k), and q = 1 - p. Both are kept as
logarithms, so every logit gives a finite loss and gradient:

    log p = sum_k log sigmoid(l_k)
    log q = log(1 - p), built path by path: 1 - s*t = (1 - s) + s*(1 - t), a sum of positive terms

A loss is a function of (log p, log q); with its two slopes S_p = dL/d(log p) and S_q = dL/d(log q),

    dL/dl_k = S_p * (1 - sigmoid(l_k)) - S_q * p/q * (1 - sigmoid(l_k))

Focal loss: Lin et al. 2017 (arXiv 1708.02002), as used by VASP (arXiv 2102.05774), section 3.1. Multinomial: Liang et
al. 2018 (arXiv 1802.05814), equation 2. Cosine: VASP, section 3.2.

Shapes: G rows, C columns of the block. Targets are the positions (rows, columns) of the ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dist_vasp.parallel.kernels import Fuse

Positions = tuple[Tensor, Tensor]  # rows (E,), columns (E,) of the ones of a block


@dataclass
class LogProbability:
    """log p and log q of a product of sigmoids, and log(1 - sigmoid) of each path; all (G, C)."""

    log_p: Tensor
    log_q: Tensor
    log_complements: list[Tensor]


def log_probability(logits: list[Tensor]) -> LogProbability:
    """log p, log(1 - p) and each path's log(1 - sigmoid), exact for p near 0 and near 1."""
    log_p = logsigmoid(logits[0])
    complements = [log_p - logits[0]]
    log_q = complements[0]
    for logit in logits[1:]:
        log_s = logsigmoid(logit)
        complements.append(log_s - logit)
        log_q = torch.logaddexp(log_q, log_p + complements[-1])
        log_p = log_p + log_s
    # Where p is small, log(1 - p) is near 0 and the sum above has lost its digits.
    log_q = torch.where(log_p < -math.log(2), torch.log1p(-torch.exp(log_p)), log_q)
    return LogProbability(log_p, log_q, complements)


def sum_log_sigmoid(logits: list[Tensor]) -> Tensor:
    """log p alone: what ranking needs."""
    total = logsigmoid(logits[0])
    for logit in logits[1:]:
        total = total + logsigmoid(logit)
    return total


class ElementwiseLoss:
    """A loss that is a sum over items of a function of (log p, log q, y)."""

    def slopes(
        self, log_p: Tensor, log_q: Tensor, positive: bool, stats: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(L, S_p, S_q) where y is 1 (`positive`) or 0; None stands for a slope that is zero everywhere."""
        raise TypeError(f"{type(self).__name__} does not define its slopes")  # pragma: no cover

    def fuse(self, fuse: Fuse) -> None:
        """Have the pass over a whole block compiled."""
        self.zeros = fuse(self.zeros)  # type: ignore[method-assign]

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The block's weighted loss (scalar) and its gradient with respect to each path's logits, (G, C) each.

        All entries are taken as y = 0 first; the few ones are then put in at their positions.
        """
        rows, columns = ones
        is_one = torch.zeros(logits[0].shape, dtype=torch.bool, device=weight_G.device)
        is_one[rows, columns] = True
        loss_G, grads = self.zeros(logits, is_one, weight_G[:, None], None if stats is None else stats[:, None])
        at_ones, weight_E = log_probability([l[ones] for l in logits]), weight_G[rows]
        loss_E, grads_E = self._entries(at_ones, weight_E, True, None if stats is None else stats[rows])
        for grad, grad_E in zip(grads, grads_E, strict=True):
            grad[rows, columns] = grad_E
        return weight_G @ loss_G + weight_E @ loss_E, grads

    def zeros(self, logits: list[Tensor], is_one: Tensor, weight: Tensor, stats: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Each row's loss over the entries with y = 0, (G,); the weighted gradient (G, C) by each path as if every y were 0."""
        loss, grads = self._entries(log_probability(logits), weight, False, stats)
        return torch.where(is_one, 0.0, loss).sum(dim=1), grads

    def _entries(self, lp: LogProbability, weight: Tensor, positive: bool, stats: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The loss of each entry, and its weighted gradient by each path."""
        loss, slope_p, slope_q = self.slopes(lp.log_p, lp.log_q, positive, stats)
        odds, grads = lp.log_p - lp.log_q, []
        for log_complement in lp.log_complements:
            by_p = torch.exp(log_complement) * slope_p if slope_p is not None else 0.0
            by_q = torch.exp(odds + log_complement) * slope_q if slope_q is not None else 0.0
            grads.append((by_p - by_q) * weight)
        return loss, grads


@dataclass
class FocalLoss(ElementwiseLoss):
    """y=1: -alpha q^gamma log p;  y=0: -(1 - alpha) p^gamma log q."""

    alpha: float = 0.25
    gamma: float = 2.0

    def slopes(self, log_p, log_q, positive, stats):
        log_hit, log_miss, alpha = (log_p, log_q, self.alpha) if positive else (log_q, log_p, 1 - self.alpha)
        modulator = -alpha * torch.exp(self.gamma * log_miss)
        loss = modulator * log_hit
        slope_miss = self.gamma * loss
        return (loss, modulator, slope_miss) if positive else (loss, slope_miss, modulator)


@dataclass
class BinaryCrossEntropy(ElementwiseLoss):
    """y=1: -log p;  y=0: -log q."""

    def slopes(self, log_p, log_q, positive, stats):
        minus = torch.full_like(log_p, -1.0)
        return (-log_p, minus, None) if positive else (-log_q, None, minus)


@dataclass
class SquaredError(ElementwiseLoss):
    """(y - p)^2."""

    def slopes(self, log_p, log_q, positive, stats):
        loss = torch.exp(2 * (log_q if positive else log_p))
        return (loss, None, 2 * loss) if positive else (loss, 2 * loss, None)


@dataclass
class CosineLoss(ElementwiseLoss):
    """1 - <p, y> / (|p| |y|) of each row. Row statistics: <p, y> and |p|^2, summed over the blocks and partitions, and |y|^2."""

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

    def slopes(self, log_p, log_q, positive, stats):
        p, norms = torch.exp(log_p), self._norms(stats)
        # one division after the other: |p|^3 would underflow where every p is below 1e-15
        pull = stats[..., 0] / norms / stats[..., 1].clamp(min=torch.finfo(stats.dtype).tiny)
        if not positive:
            return torch.zeros_like(p), p * p * pull, None
        return torch.zeros_like(p), p * (p * pull - 1 / norms), None


@dataclass
class MultinomialLoss:
    """-sum_j y_j log softmax(l)_j with l the sum of the paths' logits. Row statistics: log sum exp l and the number of ones."""

    def row_stats(self, logits: list[Tensor], ones: Positions) -> Tensor:
        """This block's (log sum exp, number of ones): (G, 2)."""
        total = sum(logits[1:], logits[0])
        count = total.new_zeros(total.shape[0]).index_add_(0, ones[0], torch.ones_like(ones[0], dtype=total.dtype))
        return torch.stack([torch.logsumexp(total, dim=1), count], dim=1)

    def combine(self, shares: Tensor) -> Tensor:
        """(shares, G, 2) -> (G, 2)."""
        return torch.stack([torch.logsumexp(shares[..., 0], dim=0), shares[..., 1].sum(dim=0)], dim=1)

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
