"""Links: how the logits of several paths become one score (DESIGN.md, section 2).

    product    p = prod_k sigmoid(l_k)            all paths must agree (VASP, section 3.3)
    sum        p = sigmoid(sum_k l_k)             one path is enough (wide and deep)
    softmax    p = softmax over items of sum_k l_k
    identity   score = sum_k l_k                  no probability: the closed form, autorec

A loss is a function of the link's `factors`; `spread` takes its gradients back to the paths.

Shapes: G rows, C columns of a block; every tensor is (G, C) unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sum_log_sigmoid(logits: list[Tensor]) -> Tensor:
    """log of a product of sigmoids."""
    total = logsigmoid(logits[0])
    for logit in logits[1:]:
        total = total + logsigmoid(logit)
    return total


class Product:
    """Product of the paths' sigmoids."""

    is_probability = True
    normalised = False  # whether a score needs the sum over all items

    def factors(self, logits: list[Tensor]) -> list[Tensor]:
        """What the loss is a function of: one tensor of logits per sigmoid."""
        return logits

    def spread(self, grads: list[Tensor], n_paths: int) -> list[Tensor]:
        """Gradients by the factors -> gradients by the paths' logits."""
        return grads

    def score(self, logits: list[Tensor], normaliser_G: Tensor | None = None) -> Tensor:
        """log p, or the score itself where there is no probability."""
        return sum_log_sigmoid(logits)


class Sum(Product):
    """One sigmoid of the sum of the paths' logits."""

    def factors(self, logits: list[Tensor]) -> list[Tensor]:
        return [sum(logits[1:], logits[0])]

    def spread(self, grads: list[Tensor], n_paths: int) -> list[Tensor]:
        return grads * n_paths

    def score(self, logits: list[Tensor], normaliser_G: Tensor | None = None) -> Tensor:
        return logsigmoid(self.factors(logits)[0])


class Softmax(Sum):
    """Softmax over all items of the sum of the paths' logits."""

    normalised = True

    def score(self, logits: list[Tensor], normaliser_G: Tensor | None = None) -> Tensor:
        assert normaliser_G is not None
        return self.factors(logits)[0] - normaliser_G[:, None]


class Identity(Sum):
    """The sum of the paths' logits as it is."""

    is_probability = False

    def score(self, logits: list[Tensor], normaliser_G: Tensor | None = None) -> Tensor:
        return self.factors(logits)[0]


Link = Product | Sum | Softmax | Identity


def log_sum_exp(logits: list[Tensor]) -> Tensor:
    """log sum exp over the items of a block of the sum of the paths' logits: (G,)."""
    return torch.logsumexp(sum(logits[1:], logits[0]), dim=1)
