"""Convert interaction histories with original ids to item rows (history_file.py reads the files).

Unknown items are ignored and counted. Users without a known item are reported.

Shapes: U users, E interactions, I items.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_vasp.data import ids
from dist_vasp.data.items import ItemTable
from dist_vasp.data.positives import PositiveRule, positive_rows
from dist_vasp.data.role_columns import ServingColumns
from dist_vasp.data.rows import Rows, indptr_of
from dist_vasp.data.tables.values import of_memory

NO_KNOWN_ITEM = "no item of the history is in the vocabulary"
NO_ITEM_LEFT = "no item is left to list: the user has seen all that may be listed"
NO_LIKE = "no known item of the history is a positive of the rule the model was trained with"


@dataclass(frozen=True)
class RowCounts:
    """How the rows of histories were used; the other five counts add up to `rows`.

    likes: pairs of a user and an item that are input of the model. disliked: other pairs, whose
    items are masked. repeated: further rows of the same pairs. unknown: rows of items outside the
    vocabulary. missing: rows without an id.
    """

    rows: int = 0
    likes: int = 0
    disliked: int = 0
    repeated: int = 0
    unknown: int = 0
    missing: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def line(self, keep_seen: bool = False) -> str:
        """Return one line for the user."""
        further = "further items seen" if keep_seen else "further items masked"
        used = (
            f"read {self.rows:,} rows: {self.likes:,} likes used as input, {self.disliked:,} "
            f"{further}"
        )
        left_out = {
            "repeated": self.repeated,
            "of unknown items": self.unknown,
            "without an id": self.missing,
        }
        return "; left out: ".join(
            [used, ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n) or "nothing"]
        )


@dataclass(frozen=True)
class Histories:
    """The users with a like among the known items, in order of first appearance, and the others."""

    users: pa.Array  # (U,) original ids
    rows: Rows  # U rows: the items they like
    seen: Rows  # U rows: all items they have seen, liked or not
    skipped: pa.Array  # users without a like among the known items
    reasons: pa.Array  # why each of them was skipped
    counts: RowCounts

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_unknown(self) -> int:
        """Rows with an item outside the vocabulary."""
        return self.counts.unknown


def find_items(original: pa.Array, items: ItemTable) -> np.ndarray:
    """Return the item rows of original ids, (E,) int32, -1 where unknown.

    Ids are compared as text: 17 in a CSV equals 17 in a column of integers.
    """
    return ids.find(original, items.ids)


def known_rows(owner: np.ndarray, item_rows: np.ndarray, n_users: int, n_items: int) -> Rows:
    """Return the rows of E pairs, without repeats and without pairs of item row -1."""
    listed = item_rows >= 0
    pairs = np.unique(owner[listed].astype(np.int64) * n_items + item_rows[listed])
    users, rows = np.divmod(pairs, n_items)
    return Rows(indptr_of(np.bincount(users, minlength=n_users)), rows.astype(np.int32))


def histories_of(
    user_ids: pa.Array,
    item_rows: np.ndarray,
    n_items: int,
    rule: PositiveRule | None = None,
    ratings: np.ndarray | None = None,
    times: np.ndarray | None = None,
) -> Histories:
    """Return the histories in E rows of a table. Without ratings every row is a like."""
    encoded = user_ids.dictionary_encode()
    users, owner = encoded.dictionary, np.asarray(encoded.indices).astype(np.int64)
    seen = known_rows(owner, item_rows, len(users), n_items)
    rows = seen
    if rule is not None and ratings is not None:
        rows = liked_rows(owner, item_rows, len(users), n_items, rule, ratings, times)
    has_likes = rows.lengths > 0
    reasons = np.where(seen.lengths[~has_likes] > 0, NO_LIKE, NO_KNOWN_ITEM)
    kept = np.flatnonzero(has_likes)
    likes = rows.take(kept)
    return Histories(
        users.filter(pa.array(has_likes)),
        likes,
        likes if rows is seen else seen.take(kept),
        users.filter(pa.array(~has_likes)),
        pa.array(reasons.tolist(), pa.string()),
        count_rows(item_rows, rows, seen),
    )


def count_rows(item_rows: np.ndarray, likes: Rows, seen: Rows) -> RowCounts:
    """Return how E rows with these item rows (-1: unknown) were used."""
    n_known = int((item_rows >= 0).sum())
    return RowCounts(
        rows=len(item_rows),
        likes=len(likes.items),
        disliked=len(seen.items) - len(likes.items),
        repeated=n_known - len(seen.items),
        unknown=len(item_rows) - n_known,
    )


def liked_rows(
    owner: np.ndarray,
    item_rows: np.ndarray,
    n_users: int,
    n_items: int,
    rule: PositiveRule,
    ratings: np.ndarray,
    times: np.ndarray | None = None,
) -> Rows:
    """Return the rows of the pairs that are positives, from E rated pairs in input order."""
    known = np.flatnonzero(item_rows >= 0)
    pairs = owner[known].astype(np.int64) * n_items + item_rows[known]
    liked = known[
        positive_rows(rule, pairs, ratings[known], None if times is None else times[known])
    ]
    return known_rows(owner[liked], item_rows[liked], n_users, n_items)


def histories_of_table(
    table: pa.Table,
    columns: ServingColumns,
    items: ItemTable,
    rule: PositiveRule | None,
    where: str,
) -> Histories:
    """Return the histories of a table in memory; rows without an id are dropped and counted."""
    missing = ids.MISSING if rule is None or rule.missing is None else rule.missing
    numbers = range(1, len(table) + 1)
    values = {
        role: ids.of_column(table.column(name), numbers, f"{where}: column {name!r}", missing)
        for role, name in (("user", columns.user), ("item", columns.item))
    }
    for role, name in (("rating", columns.rating), ("time", columns.time)):
        if name is not None:
            values[role] = of_memory(table.column(name), role, f"{where}: column {name!r}")
    present = pc.and_(values["user"].is_valid(), values["item"].is_valid())
    kept = {role: column.filter(present) for role, column in values.items()}
    ratings, times = (
        np.asarray(kept[role]) if role in kept else None for role in ("rating", "time")
    )
    histories = histories_of(
        kept["user"], find_items(kept["item"], items), len(items.keys), rule, ratings, times
    )
    n_missing = len(table) - len(kept["user"])
    counts = histories.counts + RowCounts(rows=n_missing, missing=n_missing)
    return replace(histories, counts=counts)
