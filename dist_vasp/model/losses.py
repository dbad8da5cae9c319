"""Losses of one block of items, and their gradients in closed form. No collectives.

A loss is a function of the factors that a link gives (model/links.py). The prediction is a product
of sigmoids, one per factor: p = prod_k s_k with s_k = sigmoid(l_k), and q = 1 - p
(model/probability.py).

A loss is a function of (log p, log q); with its two slopes S_p = dL/d(log p) and S_q = dL/d(log q),

    dL/dl_k = (1 - s_k) * (S_p - S_q * p/q) = (1 - s_k)/q * (q * S_p - p * S_q)

Focal loss: Lin et al. 2017 (arXiv 1708.02002), as used by VASP (arXiv 2102.05774), section 3.1.
Multinomial: Liang et al. 2018 (arXiv 1802.05814), equation 2. Cosine: VASP, section 3.2.

Shapes: G rows, C columns of the block. Targets are the positions (rows, columns) of the ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dist_vasp.kernels.interface import PLAIN, Kernels
from dist_vasp.model.links import log_sum_exp, sum_log_sigmoid
from dist_vasp.model.probability import Probability, probability

Positions = tuple[Tensor, Tensor]  # rows (E,), columns (E,) of the ones of a block


def _mask(ones: Positions, shape: tuple[int, ...]) -> Tensor:
    """Where the ones of a block are: bool of a shape."""
    is_one = torch.zeros(shape, dtype=torch.bool, device=ones[0].device)
    is_one.index_put_(ones, is_one.new_ones(()))  # a Python number would come from the host
    return is_one


@dataclass
class Loss:
    """A loss over blocks of items.

    row_statistics: how many numbers per row it needs over all items first (`row_stats`).
    skips_empty_rows: whether a row with an empty input or target has no loss.
    takes_room: whether `ones` may name a column behind the last one, which is no item.
    kernels: compute the pass over a block. Logits may be of lower precision than the weights of
    the rows: then the gradients are, too, and everything between is of the higher.
    """

    row_statistics: ClassVar[int] = 0
    skips_empty_rows: ClassVar[bool] = False
    takes_room: bool = field(default=False, init=False)
    kernels: Kernels = field(default=PLAIN, compare=False, repr=False, kw_only=True)

    def row_stats(self, logits: list[Tensor], ones: Positions) -> Tensor:
        """The statistics of the rows over one block: (G, row_statistics)."""
        raise TypeError(f"{type(self).__name__} has no row statistics")  # pragma: no cover

    def combine(self, parts: Tensor) -> Tensor:
        """The statistics of several blocks (n, G, row_statistics) -> of all of them."""
        return parts.sum(dim=0)

    def row_loss(self, stats: Tensor) -> Tensor:
        """The part of the loss that follows from the row statistics alone: (G,)."""
        return torch.zeros_like(stats[:, 0])

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The block's weighted loss (scalar) and its gradient by each factor's logits (G, C)."""
        raise TypeError(f"{type(self).__name__} does not define a block")  # pragma: no cover

    def rated_block(
        self, logits: list[Tensor], rated: Positions, rating_E: Tensor, weight_G: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """As `block`, over the rated items (E,) alone, whose targets are their ratings."""
        raise TypeError(f"{type(self).__name__} takes no ratings")  # pragma: no cover


@dataclass
class ElementwiseLoss(Loss):
    """A loss that is a sum over items of a function of (log p, log q, y)."""

    def __post_init__(self) -> None:
        self._entries = self.kernels.fuse(self.entries)

    def slopes(
        self, of: Probability, is_one: Tensor, stats: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(L, S_p, S_q) of every entry; `is_one` says where y is 1."""
        raise TypeError(f"{type(self).__name__} does not define its slopes")  # pragma: no cover

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        is_one = _mask(ones, logits[0].shape)
        # With one weight per row the compiler would make several loops.
        weight_GC = weight_G[:, None].expand_as(is_one).contiguous()
        loss, grads = self._entries(
            logits, is_one, weight_GC, None if stats is None else stats[:, None]
        )
        return weight_G @ loss.sum(dim=1), grads

    def entries(
        self, logits: list[Tensor], is_one: Tensor, weight: Tensor, stats: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of every entry, and its weighted gradient by each path, (G, C) each."""
        of = probability([logit.to(weight.dtype) for logit in logits])
        loss, slope_p, slope_q = self.slopes(of, is_one, stats)
        common = (of.q * slope_p - of.p * slope_q) * weight
        return loss, [(share * common).to(logits[0].dtype) for share in of.shares]


@dataclass
class FocalLoss(ElementwiseLoss):
    """y=1: -alpha q^gamma log p;  y=0: -(1 - alpha) p^gamma log q."""

    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.takes_room = self.kernels.updates_alone

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        if self.kernels.updates_alone:
            n_padded = self.kernels.padded(logits[0].shape[1] + 1)  # one column for no item
            is_one = _mask(ones, (len(weight_G), n_padded))
            return self.kernels.focal(logits, is_one, weight_G, self.alpha, self.gamma)
        return super().block(logits, ones, weight_G, stats)

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

    Row statistics: <p, y>, |p|^2 and |y|^2.
    """

    row_statistics: ClassVar[int] = 3
    skips_empty_rows: ClassVar[bool] = True

    def row_stats(self, logits: list[Tensor], ones: Positions) -> Tensor:
        """This block's share of (<p, y>, |p|^2, |y|^2): (G, 3)."""
        p = torch.exp(sum_log_sigmoid(logits))
        share = p.new_zeros((p.shape[0], 3))
        share[:, 1] = (p * p).sum(dim=1)
        if self.kernels.updates_alone:  # a GPU would add in another order every time
            share[:, 0] = (p * _mask(ones, p.shape)).sum(dim=1)
        else:
            share[:, 0].index_add_(0, ones[0], p[ones])
        share[:, 2].index_add_(0, ones[0], torch.ones_like(ones[0], dtype=p.dtype))
        return share

    def row_loss(self, stats: Tensor) -> Tensor:
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
class MultinomialLoss(Loss):
    """-sum_j y_j log softmax(l)_j with l the sum of the paths' logits.

    Row statistics: log sum exp l and the number of ones.
    """

    row_statistics: ClassVar[int] = 2
    skips_empty_rows: ClassVar[bool] = True

    def row_stats(self, logits: list[Tensor], ones: Positions) -> Tensor:
        """This block's (log sum exp, number of ones): (G, 2)."""
        total = sum(logits[1:], logits[0])
        count = total.new_zeros(total.shape[0]).index_add_(
            0, ones[0], torch.ones_like(ones[0], dtype=total.dtype)
        )
        return torch.stack([log_sum_exp(logits), count], dim=1)

    def combine(self, shares: Tensor) -> Tensor:
        """(shares, G, 2) -> (G, 2)."""
        return torch.stack(
            [torch.logsumexp(shares[..., 0], dim=0), shares[..., 1].sum(dim=0)], dim=1
        )

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        assert stats is not None
        total = sum(logits[1:], logits[0]).to(weight_G.dtype)
        rows, columns = ones
        log_softmax = total - stats[:, :1]
        loss = -(weight_G[rows] * log_softmax[ones]).sum()
        grad = torch.exp(log_softmax) * (stats[:, 1] * weight_G)[:, None]
        grad[rows, columns] -= weight_G[rows]
        return loss, [grad.to(logits[0].dtype)] * len(logits)


@dataclass
class ScoreError(Loss):
    """(y - l)^2 over all items or over the rated ones, with l the sum of the paths' logits."""

    def block(
        self, logits: list[Tensor], ones: Positions, weight_G: Tensor, stats: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        error = sum(logits[1:], logits[0]).to(weight_G.dtype, copy=True)
        error[ones] -= 1
        grad = (2 * weight_G)[:, None] * error
        return weight_G @ (error * error).sum(dim=1), [grad.to(logits[0].dtype)] * len(logits)

    def rated_block(
        self, logits: list[Tensor], rated: Positions, rating_E: Tensor, weight_G: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        score = sum(logits[1:], logits[0])
        weight_E = weight_G[rated[0]]
        error_E = score[rated].to(weight_G.dtype) - rating_E
        grad = torch.zeros_like(score)
        grad[rated] = (2 * weight_E * error_E).to(score.dtype)
        return weight_E @ (error_E * error_E), [grad] * len(logits)


_LOSSES: dict[str, type[Loss]] = {
    "focal": FocalLoss,
    "bce": BinaryCrossEntropy,
    "mse": SquaredError,
    "cosine": CosineLoss,
    "multinomial": MultinomialLoss,
    "squared": ScoreError,
}


def make_loss(kind: str, alpha: float = 0.25, gamma: float = 2.0, kernels: Kernels = PLAIN) -> Loss:
    """The loss that `loss.kind` names."""
    if kind == "focal":
        return FocalLoss(alpha, gamma, kernels=kernels)
    return _LOSSES[kind](kernels=kernels)
