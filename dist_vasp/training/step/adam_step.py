"""The numbers of one step of Adam, AdamW or Nadam (training/step/optimizer.py has the formulas)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.kernels.interface import AdamStep


class Factors(NamedTuple):
    """The scalars of one step's update as tensors: a compiled update would be compiled anew for
    every other number, and a captured one would keep it.

    whole: all of an AdamStep, which kernels read.
    """

    whole: Tensor
    of_grad: Tensor
    of_momentum: Tensor
    of_root: Tensor
    shrink: Tensor


def factors_in(whole: Tensor) -> Factors:
    """The factors in a tensor of the numbers of an AdamStep, as views of it."""
    named = dict(zip(AdamStep._fields, whole.unbind(), strict=True))
    return Factors(whole, *(named[name] for name in Factors._fields[1:]))


class Beside(NamedTuple):
    """What lies beside a parameter.

    copy: in the precision of the products, written by the update. start: each step draws the
    weights to it, by `decay` times the learning rate.
    """

    copy: Tensor | None = None
    start: Tensor | None = None
    decay: float = 0.0


def step_numbers(
    c: OptimizerConfig, lr: float, t: float, mu_product: float
) -> tuple[AdamStep, float]:
    """The numbers of step t, counted from 1, and mu_t, which is 1 but for Nadam.

    mu_product: the product of mu_1 to mu_(t-1).
    """
    of_grad, of_momentum, mu = 0.0, lr / (1 - c.beta1**t), 1.0
    if c.name == "nadam":
        mu, mu_next = (c.beta1 * (1 - 0.5 * 0.96 ** (s * c.momentum_decay)) for s in (t, t + 1))
        product = mu_product * mu
        of_grad = lr * (1 - mu) / (1 - product)
        of_momentum = lr * mu_next / (1 - product * mu_next)
    numbers = (of_grad, of_momentum, (1 - c.beta2**t) ** -0.5, 1 - lr * c.weight_decay)
    rest = (1 - c.beta1, 1 - c.beta2)
    return AdamStep(c.beta1, c.beta2, c.eps, *numbers, *rest, grad_scale=1.0), mu
