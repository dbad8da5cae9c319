"""What a Recommender answers: lists of items, and explanations.

Shapes: U users, K list length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dist_vasp.data.items import ItemTable
from dist_vasp.ranking.histories import RowCounts
from dist_vasp.ranking.recommend import list_table
from dist_vasp.text import one_line

Id = int | str


@dataclass(frozen=True, repr=False)
class Lists:
    """Top-K lists, one row for each history; unpacks as `ids, scores`.

    A data frame library with the Arrow C interface takes it whole: `polars.DataFrame(lists)`.

    ids (U, K): int64, or str objects. scores (U, K): float32, descending; p of the model, or the
    score itself if it is not a probability. A shorter list (fewer than k unseen items, or no known
    item in the history) is padded with id -1 (None for str) and score NaN. users: the users of an
    Arrow table in order of first appearance, with those without a known item at the end; None for
    other input. read: how many likes were used, how many other items were masked, and what was left
    out. notes: lines on how a table was read, and on the ids of filters. popular (U,) bool: users
    whose list is by popularity, where that was asked for; their scores are the items' numbers of
    training interactions.
    """

    ids: np.ndarray
    scores: np.ndarray
    users: pa.Array | None
    read: RowCounts
    notes: tuple[str, ...]
    popular: np.ndarray
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

    def __repr__(self) -> str:
        n_lists, k = self.ids.shape
        n_listed = int((self._rows >= 0).sum())
        return f"Lists({n_lists:,} users, k={k}, {n_listed:,} recommendations)"

    def to_table(self) -> pa.Table:
        """One row per recommendation as launch/recommend.py writes them: user (the row where there
        are no ids), rank, item, score, and title where the model's items have some."""
        users = pa.array(np.arange(len(self.ids))) if self.users is None else self.users
        titles = self._items.titles is not None
        return list_table(users, self.scores, self._rows, self._items, titles=titles)

    def to_pandas(self) -> Any:
        """`to_table` as a pandas.DataFrame; ValueError where pandas is not installed."""
        return _frame_of(self.to_table())

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.to_table().__arrow_c_stream__(requested_schema)


@dataclass(frozen=True)
class Reason:
    """What one past item adds to the logit of the items x items path."""

    item: Id
    weight: float
    title: str | None = None


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        score = f"logit={self.logit}" if self.p is None else f"p={self.p:.4g}"
        name = f"{self.item!r}" if self.title is None else f"{self.item!r}, {self.title!r}"
        return f"Explanation({name}, {score}, {len(self.reasons)} reasons)"

    def __str__(self) -> str:
        """Return lines for a person: the score and its parts, then what each past item adds."""
        parts = {"p": self.p, "p_flvae": self.p_flvae, "p_nease": self.p_nease, "logit": self.logit}
        told = ", ".join(f"{key} {part:.4g}" for key, part in parts.items() if part is not None)
        lines = [f"{_named(self.item, self.title)}: {told}"]
        for reason in self.reasons:
            lines.append(f"  {reason.weight:+8.3f}  {_named(reason.item, reason.title)}")
        if self.rest:
            lines.append(f"  {self.rest:+8.3f}  all other items of the history")
        return "\n".join(lines)

    def to_table(self) -> pa.Table:
        """One row per reason: item, title where the model's items have some, weight."""
        columns: dict[str, list[Any]] = {"item": [reason.item for reason in self.reasons]}
        if self.title is not None:
            columns["title"] = [reason.title for reason in self.reasons]
        columns["weight"] = [reason.weight for reason in self.reasons]
        return pa.table(columns)

    def to_pandas(self) -> Any:
        """`to_table` as a pandas.DataFrame; ValueError where pandas is not installed."""
        return _frame_of(self.to_table())


def _named(item: Id, title: str | None) -> str:
    return one_line(f"{item}" if title is None else f"{item} {title}")


def _frame_of(table: pa.Table) -> Any:
    try:
        return table.to_pandas()
    except ImportError as error:
        raise ValueError(
            f"to_pandas needs pandas, which cannot be imported ({error}); pip install pandas, or "
            "use to_table()"
        ) from None


def title_of(items: ItemTable, row: int) -> str | None:
    """Return the title of an item, None if it has none."""
    return None if items.titles is None else items.titles[row].as_py()


def id_of(items: ItemTable, row: int) -> Id:
    """Return the original id of an item."""
    return items.ids[row].as_py()


def ids_of(items: ItemTable, rows: np.ndarray) -> np.ndarray:
    """Return the original ids of item rows of any shape; -1 or None where the row is -1."""
    flat = rows.reshape(-1)
    if pa.types.is_integer(items.ids.type):
        ids = np.asarray(items.ids.cast(pa.int64()))[flat]
        ids[flat < 0] = -1
        return ids.reshape(rows.shape)
    taken = items.ids.take(pa.array(flat, mask=flat < 0))
    return np.array([*taken.to_pylist(), None], object)[:-1].reshape(rows.shape)
