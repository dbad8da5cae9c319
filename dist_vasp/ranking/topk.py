"""Select the k best items per user exactly: top-k over a partition's columns, then a merge.

Items are ordered by descending score, ties by item row. `torch.topk` guarantees neither which of
several equal scores it selects nor their order, and equal scores are common (popularity counts,
saturated probabilities). This module makes the result the same on every device and partitioning.

A score of -inf marks an item that must not be listed. Lists are padded with id -1 and score -inf.

Shapes: U users, J columns of scores, K list length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_ITEM = -1


def local_topk(scores_UJ: Tensor, k: int, item_offset: int = 0) -> tuple[Tensor, Tensor]:
    """Return (scores, ids) of the min(k, J) best columns of every row, (U, min(k, J)) each.

    scores_UJ: float32 or float64; column j is item row item_offset + j. ids: int64. ValueError for
    NaN, which cannot be ranked.
    """
    n_columns = scores_UJ.shape[1]
    k = min(k, n_columns)
    if k == 0 or len(scores_UJ) == 0:
        return scores_UJ[:, :k], torch.empty(
            scores_UJ.shape[0], k, dtype=torch.int64, device=scores_UJ.device
        )
    # one more than k: the selection can only be wrong where the next score equals the k-th
    best, columns = torch.topk(scores_UJ, min(k + 1, n_columns), dim=1)
    if best[:, 0].isnan().any():  # topk ranks NaN first
        raise ValueError(
            "scores contain NaN, which cannot be ranked: the model has diverged; use an earlier "
            "checkpoint"
        )
    last = best[:, k - 1]
    tied = (
        (best[:, -1] == last) & (last > -torch.inf)
        if k < n_columns
        else torch.zeros_like(last, dtype=torch.bool)
    )
    best, columns = best[:, :k], columns[:, :k].contiguous()
    rows = tied.nonzero().squeeze(1)
    if len(rows):
        columns[rows] = _lowest_of_the_tied(scores_UJ[rows], last[rows], k)
    columns = columns.sort(dim=1).values
    best, order = scores_UJ.gather(1, columns).sort(dim=1, descending=True, stable=True)
    ids = columns.gather(1, order) + item_offset
    return best, ids.masked_fill_(best == -torch.inf, NO_ITEM)


def _lowest_of_the_tied(scores_RJ: Tensor, last_R: Tensor, k: int) -> Tensor:
    """Return columns (R, k), ascending: all above the k-th score `last_R`, and the lowest columns
    with that score."""
    above = scores_RJ > last_R[:, None]
    equal = scores_RJ == last_R[:, None]
    vacant = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= vacant))
    return chosen.nonzero()[:, 1].reshape(len(scores_RJ), k)


def merge_topk(scores: Sequence[Tensor], ids: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return (scores, ids) of the k best items of several partitions, (U, k) each, padded.

    scores[p], ids[p]: (U, K_p) as local_topk returns them, of disjoint items. The order of the
    partitions does not matter.
    """
    all_scores, all_ids = torch.cat(list(scores), dim=1), torch.cat(list(ids), dim=1)
    missing = k - all_scores.shape[1]
    if missing > 0:
        all_scores = torch.nn.functional.pad(all_scores, (0, missing), value=-torch.inf)
        all_ids = torch.nn.functional.pad(all_ids, (0, missing), value=NO_ITEM)
    all_ids, order = all_ids.sort(dim=1)
    best, order = all_scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    best, order = best[:, :k], order[:, :k]
    return best, all_ids.gather(1, order).masked_fill_(best == -torch.inf, NO_ITEM)


class TopK:
    """Keeps the k best items over blocks of columns, so that no (U, J) matrix is needed.

    Blocks come in ascending order of items.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._scores: Tensor | None = None  # (U, at most k)
        self._ids: Tensor | None = None
        self._end = 0  # first item of the next block

    def update(self, scores_UC: Tensor, item_offset: int) -> None:
        """Add columns item_offset to item_offset + C of the same users; ValueError for NaN."""
        assert item_offset >= self._end, (item_offset, self._end)
        self._end = item_offset + scores_UC.shape[1]
        if self._scores is None or self._ids is None:
            self._scores, self._ids = local_topk(scores_UC, self.k, item_offset)
            return
        # the list comes before the block, so that positions of equal scores ascend with the ids
        n_listed = self._ids.shape[1]
        self._scores, position = local_topk(torch.cat([self._scores, scores_UC], dim=1), self.k)
        listed = self._ids.gather(1, position.clamp(0, n_listed - 1)) if n_listed else position
        new = position - n_listed + item_offset
        self._ids = torch.where(position >= n_listed, new, listed).masked_fill_(
            position == NO_ITEM, NO_ITEM
        )

    def result(self) -> tuple[Tensor, Tensor]:
        """Return (scores, ids), (U, k) each, padded; needs at least one block."""
        assert self._scores is not None, "TopK.result before any update"
        assert self._ids is not None
        return merge_topk([self._scores], [self._ids], self.k)
