"""How far the scores of a model trained on ratings are from the held-out ratings (RMSE).

Shapes: G rows of the partition group, C columns of a block, E held-out ratings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vasp.model.sparse import ItemRows


class RatingErrors:
    """Adds up (score - rating)^2 over held-out ratings.

    sums: (2,) float64, the squared errors and the number of ratings of this rank's items.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, first: int, scores_GC: Tensor, held_out: ItemRows) -> None:
        """Take the scores of a block whose first item is `first`."""
        last = first + scores_GC.shape[1]
        error_E = scores_GC[held_out.positions(first, last)].double()
        error_E -= held_out.values_by_item(first, last)
        self.sums[0] += error_E @ error_E
        self.sums[1] += len(error_E)


@dataclass(frozen=True)
class WatchedScorer:
    """A scorer whose scores of held-out ratings `errors` takes on their way."""

    scorer: Callable[[ItemRows], Iterator[tuple[int, Tensor]]]
    held_out: ItemRows
    errors: RatingErrors

    def __call__(self, x: ItemRows) -> Iterator[tuple[int, Tensor]]:
        for first, scores_GC in self.scorer(x):
            self.errors.add(first, scores_GC, self.held_out)
            yield first, scores_GC
