"""Mean and standard deviation of each path's logits, from a sample of the catalogue that every
layout takes alike.

VASP's p is a product: where one path's logits grow while the other's stand still, the deep and the
shallow part of the model no longer share the work. Every SAMPLE_EVERY-th item is looked at, on
logits that the step has anyway; the sums travel with the loss.

Shapes: G rows of the partition group, C columns of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLE_EVERY = 61  # a prime, so that the sample runs through the positions of a block


class PathStatistics:
    """Sums over (sampled items, real rows): `sums` (paths, 3), float64, holds the count, the sum
    and the sum of squares."""

    def __init__(self, paths: list[str], device: torch.device) -> None:
        self.paths = paths
        self.sums = torch.zeros((len(paths), 3), dtype=torch.float64, device=device)

    def add(self, first_item: int, logits: list[Tensor], weight_G: Tensor) -> None:
        """Take the sample out of one block, whose first column is `first_item`; rows of weight 0
        are padding."""
        first = -first_item % SAMPLE_EVERY
        if first >= logits[0].shape[1]:
            return
        real_G1 = (weight_G > 0).to(weight_G.dtype)[:, None]
        for sums, logits_GC in zip(self.sums, logits, strict=True):
            sample = logits_GC[:, first::SAMPLE_EVERY] * real_G1
            sums += torch.stack(
                [real_G1.sum() * sample.shape[1], sample.sum(), (sample * sample).sum()]
            )

    def named(self, totals: list[float]) -> dict[str, float]:
        """{PATH_logit_mean, PATH_logit_std} from `sums` summed over all ranks; nothing where no
        item was in the sample."""
        found = {}
        for i, path in enumerate(self.paths):
            count, total, squares = totals[3 * i : 3 * i + 3]
            if count:
                found[f"{path}_logit_mean"] = total / count
                found[f"{path}_logit_std"] = math.sqrt(
                    max(0.0, squares / count - (total / count) ** 2)
                )
        return found
