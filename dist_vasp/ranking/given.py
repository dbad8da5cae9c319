"""Histories and ids as a caller passes them: lists, matrices and tables become item rows.

Shapes: U users, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import scipy.sparse

from dist_vasp.data.items import ItemTable
from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.role_columns import serving_columns
from dist_vasp.data.rows import Rows, indptr_of
from dist_vasp.ranking.accepted import as_table, find_ids, history_lists
from dist_vasp.ranking.histories import (
    RowCounts,
    count_rows,
    histories_of_table,
    known_rows,
    liked_rows,
)
from dist_vasp.ranking.listable import Listable, UserFilters

# Sequence[Iterable[Id]] | scipy.sparse matrix | an object with the Arrow C interface.
HistoriesLike: TypeAlias = Any


@dataclass(frozen=True)
class Given:
    """Histories as they were passed: likes, everything seen, and what was read."""

    rows: Rows
    seen: Rows
    read: RowCounts
    users: pa.Array | None = None
    notes: tuple[str, ...] = ()


class GivenReader:
    """Reads histories and ids against the vocabulary `items` and the rule of positives."""

    def __init__(self, items: ItemTable, positives: PositiveRule | None) -> None:
        self.items, self.positives, self.n_items = items, positives, len(items.keys)

    def read(
        self,
        histories: HistoriesLike,
        asked: Mapping[str, str | None] | None = None,
        all_positive: bool = False,
    ) -> Given:
        """Read histories of any of these kinds; ValueError, by the name of its class, for another.

        asked: names of columns that the caller gave, by role. all_positive: every row is a like.
        """
        named = {role: name for role, name in (asked or {}).items() if name is not None}
        table = as_table(histories)
        if table is not None:
            return self._read_table(table, named, all_positive)
        if named:
            role = next(iter(named))
            raise ValueError(
                f"{role}_column is {named[role]!r}, but histories are no table; leave it out"
            )
        if scipy.sparse.issparse(histories):
            return self._read_matrix(histories, all_positive)
        lists = history_lists(histories, self.n_items)
        item_rows = self.find([*chain.from_iterable(lists)], "the histories")
        owner = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
        rows = known_rows(owner, item_rows, len(lists), self.n_items)
        return Given(rows, rows, count_rows(item_rows, rows, rows))

    def _read_table(
        self, table: pa.Table, asked: Mapping[str, str | None], all_positive: bool
    ) -> Given:
        columns = serving_columns(
            table.column_names, self.positives, asked, "the table", all_positive, dashes=""
        )
        found = histories_of_table(table, columns, self.items, self.positives, "the table")

        def with_skipped(rows: Rows) -> Rows:
            return Rows(
                indptr_of(np.append(rows.lengths, np.zeros(len(found.skipped), np.int64))),
                rows.items,
            )

        rows = with_skipped(found.rows)
        seen = rows if found.seen is found.rows else with_skipped(found.seen)
        return Given(
            rows, seen, found.counts, pa.concat_arrays([found.users, found.skipped]), columns.notes
        )

    def _read_matrix(self, matrix: Any, all_positive: bool) -> Given:
        """Non-zero entries are seen items.

        They are ratings where the rule reads ratings and not all of them are 1.
        """
        if matrix.ndim != 2 or matrix.shape[1] != self.n_items:
            raise ValueError(
                f"the matrix has shape {matrix.shape}, expected (users, {self.n_items}): columns "
                "are item rows"
            )
        if matrix.dtype.kind not in "biuf":
            raise ValueError(f"the matrix holds {matrix.dtype}, expected numbers; convert it first")
        x = matrix.tocsr()
        if not x.has_canonical_format:  # entries that are stored several times add up
            x = x.copy()
            x.sum_duplicates()
        x = x.tocoo()
        stored = x.data != 0
        owner, item_rows, values = (
            x.row[stored],
            x.col[stored],
            np.asarray(x.data[stored], np.float64),
        )
        if not np.isfinite(values).all():
            raise ValueError("the matrix holds values that are not finite; leave those entries out")
        rows = seen = known_rows(owner, item_rows, x.shape[0], self.n_items)
        if (
            self.positives is not None
            and not self.positives.is_implicit
            and not all_positive
            and (values != 1).any()
        ):
            rows = liked_rows(owner, item_rows, x.shape[0], self.n_items, self.positives, values)
        return Given(rows, seen, count_rows(item_rows, rows, seen))

    def find(self, ids: Sequence[Any], what: str) -> np.ndarray:
        """Return the item rows of ids, -1 where unknown; ValueError unless they are all whole
        numbers or all strings."""
        return find_ids(ids, self.items.ids, what)

    def listable(self, given: Given, filter_items: Any, restrict_to: Any) -> Listable:
        """Return the items that may be listed for the users of `given`."""
        filters = UserFilters(self.items.ids, given.users, given.rows.n_rows)
        return filters.read(filter_items, restrict_to)
