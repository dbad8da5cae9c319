"""Distinct interactions grouped by user, stored in scratch files and read in blocks of users.

`data_tools.collect` writes the scratch files. A user or an item is numbered by its rank among the
ascending ids.

Shapes: U users, I items, E interactions, B users of a block.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_vasp.data.rows import Rows, indptr_of

TRAIN, TEST, VALIDATION = 0, 1, 2  # split codes
_USERS_PER_BLOCK = 4096
_FILES = ("items", "splits")


@dataclass
class Summary:
    """What was read, and which rows were left out before any split."""

    rows: int = 0
    below_min_rating: int = 0
    duplicates: int = 0
    has_ratings: bool = False  # without ratings every row is a positive


@dataclass(frozen=True)
class UserBlock:
    """Some users and their interactions."""

    users: np.ndarray  # (B,) int64
    rows: Rows  # B rows of item ranks, uint32, in input order
    splits: np.ndarray  # (E,) uint8 split codes; 0 where the input has none


@dataclass(frozen=True)
class Interactions:
    """Distinct interactions by user, in input order within a user.

    They lie in the file `items` of `folder`, a uint32 each, and their split codes in the file
    `splits`, a byte each. The folder must outlive this object.
    """

    user_ids: pa.Array  # (U,) int64 or string, ascending
    item_ids: pa.Array  # (I,) int64 or string, ascending
    starts: np.ndarray  # (U,) int64, position of a user's first interaction in the files
    sizes: np.ndarray  # (U,) int64, distinct interactions of a user
    has_splits: bool
    folder: Path

    def blocks(self, users: np.ndarray, sizes: Sequence[int] | None = None) -> Iterator[UserBlock]:
        """Yield `users`, in this order, in blocks of `sizes` users (default: 4,096 each)."""
        bounds = (
            np.cumsum([0, *sizes])
            if sizes is not None
            else np.append(np.arange(0, len(users), _USERS_PER_BLOCK), len(users))
        )
        items_file = os.open(self.folder / "items", os.O_RDONLY)
        splits_file = os.open(self.folder / "splits", os.O_RDONLY) if self.has_splits else -1
        try:
            for first, last in itertools.pairwise(bounds.tolist()):
                block = users[first:last]
                starts, lengths = self.starts[block], self.sizes[block]
                items = np.frombuffer(_read(items_file, starts, lengths, 4), np.uint32)
                splits = np.zeros(len(items), np.uint8)
                if self.has_splits:
                    splits = np.frombuffer(_read(splits_file, starts, lengths, 1), np.uint8)
                yield UserBlock(block, Rows(indptr_of(lengths), items), splits)
        finally:
            os.close(items_file)
            if splits_file >= 0:
                os.close(splits_file)

    def blocks_in_file_order(self) -> Iterator[UserBlock]:
        """Yield all users in the order in which they lie in the files."""
        yield from self.blocks(np.argsort(self.starts, kind="stable"))


def _read(file: int, starts: np.ndarray, sizes: np.ndarray, width: int) -> bytes:
    """Return the entries of `width` bytes of some users, one user after another.

    User b has `sizes[b]` entries from number `starts[b]`.
    """
    ends = starts + sizes
    if len(starts) and np.array_equal(starts[1:], ends[:-1]):  # neighbours in the file: one read
        starts, sizes = starts[:1], np.array([ends[-1] - starts[0]])
    return b"".join(
        [
            os.pread(file, n * width, start * width)
            for start, n in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
    )


def item_counts(data: Interactions) -> np.ndarray:
    """Return the number of users of every item, (I,) int64."""
    counts = np.zeros(len(data.item_ids), np.int64)
    for block in data.blocks_in_file_order():
        counts += np.bincount(block.rows.items, minlength=len(counts))
    return counts


def without_items(data: Interactions, dropped: np.ndarray) -> Interactions:
    """Return the interactions without the items marked in `dropped`, (I,) bool, and without the
    users who lose all their items.

    The result lies in new scratch files; `data` can no longer be read.
    """
    folder = data.folder / "kept"
    folder.mkdir()
    new_rank = np.cumsum(~dropped, dtype=np.int64) - 1
    sizes = np.zeros(len(data.sizes), np.int64)
    with open(folder / "items", "wb") as items_file, open(folder / "splits", "wb") as splits_file:
        for block in data.blocks_in_file_order():
            kept = ~dropped[block.rows.items]
            rows = block.rows.where(kept)
            items_file.write(new_rank[rows.items].astype(np.uint32).tobytes())
            if data.has_splits:
                splits_file.write(block.splits[kept].tobytes())
            sizes[block.users] = rows.lengths
    for name in _FILES:
        (data.folder / name).unlink()
    order = np.argsort(data.starts, kind="stable")
    starts = np.empty(len(sizes), np.int64)
    starts[order] = np.cumsum(sizes[order]) - sizes[order]
    remaining = np.flatnonzero(sizes)
    return replace(
        data,
        user_ids=data.user_ids.take(pa.array(remaining)),
        item_ids=data.item_ids.filter(pa.array(~dropped)),
        starts=starts[remaining],
        sizes=sizes[remaining],
        folder=folder,
    )
