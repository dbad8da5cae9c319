"""Distinct interactions grouped by user, stored in scratch files and read in blocks of users.

`data_tools.collect` writes the scratch files. A user or an item is numbered by its rank among the
ascending ids.

Shapes: U users, I items, E interactions, B users of a block.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_vasp.data.rows import Rows, indptr_of

TRAIN, TEST, VALIDATION = 0, 1, 2  # split codes
_USERS_PER_BLOCK = 4096
# of what may lie beside the items
_TYPES = {"splits": np.uint8, "times": np.float64, "ratings": np.float64}


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
    splits: np.ndarray  # (E,) uint8 split codes; empty where they are not kept
    times: np.ndarray  # (E,) float64; empty where they are not kept
    ratings: np.ndarray  # (E,) float64; empty where they are not kept


@dataclass(frozen=True)
class Interactions:
    """Distinct interactions by user, in input order within a user.

    They lie in the file `items` of `folder`, a uint32 each. `beside` names what lies in a file of
    its own: `splits`, split codes of a byte each, `times` and `ratings`, a float64 each. The folder
    must outlive this object.
    """

    user_ids: pa.Array  # (U,) int64 or string, ascending
    item_ids: pa.Array  # (I,) int64 or string, ascending
    starts: np.ndarray  # (U,) int64, position of a user's first interaction in the files
    sizes: np.ndarray  # (U,) int64, distinct interactions of a user
    beside: tuple[str, ...]
    folder: Path

    def blocks(self, users: np.ndarray, sizes: Sequence[int] | None = None) -> Iterator[UserBlock]:
        """Yield `users`, in this order, in blocks of `sizes` users (default: 4,096 each)."""
        bounds = (
            np.cumsum([0, *sizes])
            if sizes is not None
            else np.append(np.arange(0, len(users), _USERS_PER_BLOCK), len(users))
        )
        with ExitStack() as opened:
            files = {}
            for name in ("items", *self.beside):
                files[name] = os.open(self.folder / name, os.O_RDONLY)
                opened.callback(os.close, files[name])
            for first, last in itertools.pairwise(bounds.tolist()):
                block = users[first:last]
                starts, lengths = self.starts[block], self.sizes[block]
                items = np.frombuffer(_read(files["items"], starts, lengths, 4), np.uint32)
                beside = {name: np.empty(0, kind) for name, kind in _TYPES.items()}
                for name in self.beside:
                    width = np.dtype(_TYPES[name]).itemsize
                    data = _read(files[name], starts, lengths, width)
                    beside[name] = np.frombuffer(data, _TYPES[name])
                rows = Rows(indptr_of(lengths), items)
                yield UserBlock(block, rows, **beside)

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
    names = ("items", *data.beside)
    with ExitStack() as opened:
        files = {name: opened.enter_context(open(folder / name, "wb")) for name in names}
        for block in data.blocks_in_file_order():
            kept = ~dropped[block.rows.items]
            rows = block.rows.where(kept)
            files["items"].write(new_rank[rows.items].astype(np.uint32).tobytes())
            for name in data.beside:
                files[name].write(getattr(block, name)[kept].tobytes())
            sizes[block.users] = rows.lengths
    for name in names:
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
