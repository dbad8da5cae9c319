"""What a Recommender answers: lists of items, and explanations.

Shapes: U users, K list length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dist_vasp.data.items import ItemTable
from dist_vasp.ranking.histories import RowCounts
from dist_vasp.ranking.recommend import list_table

Id = int | str


@dataclass(frozen=True)
class Lists:
    """Top-K lists, one row for each history; unpacks as `ids, scores`.

    ids (U, K): int64, or str objects. scores (U, K): float32, descending; p of the model, or the
    score itself if it is not a probability. A shorter list (fewer than k unseen items, or no known
    item in the history) is padded with id -1 (None for str) and score NaN. users: the users of an
    Arrow table in order of first appearance, with those without a known item at the end; None for
    other input. read: how many likes were used, how many other items were masked, and what was left
    out. notes: lines on how a table was read, and on the ids of filters.
    """

    ids: np.ndarray
    scores: np.ndarray
    users: pa.Array | None
    read: RowCounts
    notes: tuple[str, ...]
    _rows: np.ndarray  # (U, K) item rows
    _items: ItemTable

    @property
    def n_unknown(self) -> int:
        """Interactions whose item the model does not know; they were ignored."""
        return self.read.unknown

    @property
    def rows(self) -> np.ndarray:
        """(U, K) int64 item rows of `ids`, -1 where a list has ended."""
        return self._rows

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.ids
        yield self.scores

    def to_table(self) -> pa.Table:
        """One row per recommendation as launch/recommend.py writes them: user (the row where there
        are no ids), rank, item, score."""
        users = pa.array(np.arange(len(self.ids))) if self.users is None else self.users
        table = list_table(users, self.scores, self._rows, self._items)
        if self._items.titles is not None:
            rows = self._rows[self._rows >= 0]
            table = table.append_column("title", self._items.titles.take(pa.array(rows)))
        return table


@dataclass(frozen=True)
class Reason:
    """What one past item adds to the logit of the items x items path."""

    item: Id
    weight: float
    title: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Why a history leads to `item`.

    The logit of the items x items path is the sum over the history of W[past item, item]: `reasons`
    are the largest of these, descending, `rest` is the sum of the others, and `logit` is all of it
    (model.nease_offset, 0 in most models, is added to it). Of vasp p = p_flvae * p_nease; of
    wide_deep they are what each part alone would give.
    A part that the model does not have is None (`reasons` empty). Where a score is no probability,
    as of the closed form, p, p_flvae and p_nease are None and `logit` is the score.

    For an ensemble `reasons`, `rest` and `logit` are the members' weighted sums, and `members` are
    their own explanations.
    """

    item: Id
    title: str | None
    p: float | None
    p_flvae: float | None
    p_nease: float | None
    logit: float | None
    reasons: list[Reason]
    rest: float
    members: tuple[Explanation, ...] = ()
