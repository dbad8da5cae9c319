"""The probability of a product of sigmoids, without loss of digits.

p = prod_k s_k with s_k = sigmoid(l_k), and q = 1 - p. With u_k = exp(-|l_k|), the one exponential
of a factor, both are sums of positive terms:

    log p = sum_k min(l_k, 0) - log(prod_k (1 + u_k))
    q = (1 - s_1) + s_1 (1 - s_2) + s_1 s_2 (1 - s_3)

Shapes: G rows, C columns of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


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
