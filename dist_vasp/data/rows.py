"""Sparse rows in CSR form: the one type for interactions by user on the host.

Shapes: B rows (usually users), E interactions, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """B rows of item numbers: row b holds `items[indptr[b]:indptr[b + 1]]`, ascending.

    values: the rating of each interaction; None where every interaction counts as 1.
    """

    indptr: np.ndarray  # (B+1,) int64
    items: np.ndarray  # (E,) int32
    values: np.ndarray | None = None  # (E,) float32

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Interactions per row, (B,) int64."""
        return np.diff(self.indptr)

    @property
    def row_of(self) -> np.ndarray:
        """The row of each interaction, (E,) int64."""
        return np.repeat(np.arange(self.n_rows), self.lengths)

    def slice(self, start: int, stop: int) -> Rows:
        """Return rows start to stop (consecutive); the items are a view."""
        first, last = self.indptr[start], self.indptr[stop]
        values = None if self.values is None else self.values[first:last]
        return Rows(self.indptr[start : stop + 1] - first, self.items[first:last], values)

    def where(self, keep: np.ndarray) -> Rows:
        """Return the same rows with only the interactions marked in `keep`, (E,) bool."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
        values = None if self.values is None else self.values[keep]
        return Rows(before[self.indptr], self.items[keep], values)

    def take(self, order: np.ndarray) -> Rows:
        """Return the rows numbered in `order`, (n,) int64, in that order."""
        lengths = self.lengths[order]
        indptr = indptr_of(lengths)
        source = np.repeat(self.indptr[order] - indptr[:-1], lengths)
        source += np.arange(len(source))
        values = None if self.values is None else self.values[source]
        return Rows(indptr, self.items[source], values)

    def check(self, n_rows: int, n_items: int, where: str) -> None:
        """Raise ValueError, naming `where`, unless these are `n_rows` rows of ascending items in
        [0, n_items)."""
        indptr, items = self.indptr, self.items
        if (
            len(indptr) != n_rows + 1
            or indptr[0] != 0
            or indptr[-1] != len(items)
            or (np.diff(indptr) < 0).any()
        ):
            raise ValueError(
                f"{where}: the index pointer does not describe {n_rows} users with {len(items)} "
                "interactions"
            )
        if self.values is not None and len(self.values) != len(items):
            raise ValueError(f"{where}: {len(self.values)} ratings of {len(items)} interactions")
        if self.values is not None and not np.isfinite(self.values).all():
            raise ValueError(f"{where}: a rating is not a finite number")
        if len(items) == 0:
            return
        if items.min() < 0 or items.max() >= n_items:
            raise ValueError(
                f"{where}: item rows go from {items.min()} to {items.max()}, expected 0 to "
                f"{n_items - 1}"
            )
        ascending = np.diff(items) > 0
        starts = indptr[1:-1]
        ascending[starts[(starts > 0) & (starts < len(items))] - 1] = True
        if not ascending.all():
            raise ValueError(f"{where}: a user's item rows are not strictly ascending")


def indptr_of(lengths: np.ndarray) -> np.ndarray:
    """Return the index pointer, (B+1,) int64, of rows with these lengths, (B,)."""
    indptr = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    return indptr


def rows_of_pairs(
    row: np.ndarray, item: np.ndarray, n_rows: int, n_items: int, values: np.ndarray | None = None
) -> Rows:
    """Return the rows that hold the pairs (row, item), each (E,) int64 and distinct.

    `row` ascends in [0, n_rows); the items of a row may come in any order. values: (E,) ratings.
    """
    pairs = row * n_items + item
    if values is None:
        pairs.sort()
    else:
        order = np.argsort(pairs)
        pairs, values = pairs[order], values[order].astype(np.float32)
    indptr = indptr_of(np.bincount(row, minlength=n_rows))
    return Rows(indptr, (pairs - row * n_items).astype(np.int32), values)


def concatenate_rows(parts: Sequence[Rows]) -> Rows:
    """Return all rows of `parts`, in order; no parts give no rows. All have ratings, or none."""
    lengths = np.concatenate([np.empty(0, np.int64), *(p.lengths for p in parts)])
    items = np.concatenate([np.empty(0, np.int32), *(p.items for p in parts)])
    values = [part.values for part in parts if part.values is not None]
    assert len(values) in (0, len(parts)), "some rows have ratings, others none"
    return Rows(indptr_of(lengths), items, np.concatenate(values) if values else None)
