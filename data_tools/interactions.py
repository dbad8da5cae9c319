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
from typing import Protocol

import numpy as np
import pyarrow as pa

from dist_vasp.data.rows import Rows, indptr_of

TRAIN, TEST, VALIDATION = 0, 1, 2  # split codes
_USERS_PER_BLOCK = 4096
_BYTES_PER_READ = 1 << 25
# of the items, and of what may lie beside them
_TYPES = {"items": np.uint32, "splits": np.uint8, "times": np.float64, "ratings": np.float64}


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

    users: np.ndarray  # (B,) int64, ranks
    rows: Rows  # B rows of item ranks, uint32, in input order
    splits: np.ndarray  # (E,) uint8 split codes; empty where they are not kept
    times: np.ndarray  # (E,) float64; empty where they are not kept
    ratings: np.ndarray  # (E,) float64; empty where they are not kept


class Store(Protocol):
    """Where the interactions of users lie, one user after another."""

    @property
    def folder(self) -> Path:
        """The folder of the scratch files."""
        ...

    @property
    def beside(self) -> tuple[str, ...]:
        """What lies beside the items, of which each is a uint32: `splits`, split codes of a byte
        each, `times` and `ratings`, a float64 each."""
        ...

    def read(self, name: str, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return the entries of some users, (E,): user b has `sizes[b]` from number `starts[b]`.

        name: `items`, or one of those beside them.
        """
        ...

    def files(self, name: str) -> list[Path]:
        """Return the files of `name`, in the order of the store."""
        ...

    def remove(self) -> None:
        """Remove the scratch files, which can no longer be read."""
        ...


@dataclass(frozen=True)
class FolderStore:
    """One scratch file for the items, and one for each of those beside them."""

    folder: Path
    beside: tuple[str, ...] = ()

    def read(self, name: str, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """See `Store`."""
        kind = np.dtype(_TYPES[name])
        ends = starts + sizes
        is_ascending = len(starts) > 0 and bool((starts[1:] >= ends[:-1]).all())
        if is_ascending and (ends[-1] - starts[0]) * kind.itemsize <= _BYTES_PER_READ:
            places = [(int(starts[0]), int(ends[-1] - starts[0]))]  # with what lies between
        else:
            places = list(zip(starts.tolist(), sizes.tolist(), strict=True))
        with open(self.folder / name, "rb", buffering=0) as file:
            parts = [
                os.pread(file.fileno(), n * kind.itemsize, start * kind.itemsize)
                for start, n in places
            ]
        values = np.frombuffer(b"".join(parts), kind)
        if len(values) == sizes.sum():
            return values
        indptr = indptr_of(sizes)
        source = np.repeat(starts - starts[0] - indptr[:-1], sizes)
        return values[source + np.arange(len(source))]

    def files(self, name: str) -> list[Path]:
        """See `Store`."""
        return [self.folder / name]

    def remove(self) -> None:
        """See `Store`."""
        for name in ("items", *self.beside):
            (self.folder / name).unlink()


def read_block(store: Store, users: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> UserBlock:
    """Return the interactions of `users` (B,), who lie in `store` at `starts` (B,) with `sizes`
    (B,) each."""
    items = store.read("items", starts, sizes)
    beside = {
        name: store.read(name, starts, sizes) if name in store.beside else np.empty(0, kind)
        for name, kind in _TYPES.items()
        if name != "items"
    }
    return UserBlock(users, Rows(indptr_of(sizes), items), **beside)


@dataclass(frozen=True)
class Interactions:
    """Distinct interactions by user, in input order within a user.

    The store must outlive this object.
    """

    user_ids: pa.Array  # (U,) int64 or string, ascending
    item_ids: pa.Array  # (I,) int64 or string, ascending
    starts: np.ndarray  # (U,) int64, position of a user's first interaction in the store
    sizes: np.ndarray  # (U,) int64, distinct interactions of a user
    store: Store

    def blocks(self, users: np.ndarray, sizes: Sequence[int] | None = None) -> Iterator[UserBlock]:
        """Yield `users`, in this order, in blocks of `sizes` users (default: 4,096 each)."""
        bounds = (
            np.cumsum([0, *sizes])
            if sizes is not None
            else np.append(np.arange(0, len(users), _USERS_PER_BLOCK), len(users))
        )
        for first, last in itertools.pairwise(bounds.tolist()):
            block = users[first:last]
            yield read_block(self.store, block, self.starts[block], self.sizes[block])

    def blocks_in_file_order(self) -> Iterator[UserBlock]:
        """Yield all users in the order in which they lie in the store."""
        yield from self.blocks(np.argsort(self.starts, kind="stable"))


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
    folder = data.store.folder / "kept"
    folder.mkdir()
    new_rank = np.cumsum(~dropped, dtype=np.int64) - 1
    sizes = np.zeros(len(data.sizes), np.int64)
    names = ("items", *data.store.beside)
    with ExitStack() as opened:
        files = {name: opened.enter_context(open(folder / name, "wb")) for name in names}
        for block in data.blocks_in_file_order():
            kept = ~dropped[block.rows.items]
            rows = block.rows.where(kept)
            files["items"].write(new_rank[rows.items].astype(np.uint32).tobytes())
            for name in data.store.beside:
                files[name].write(getattr(block, name)[kept].tobytes())
            sizes[block.users] = rows.lengths
    data.store.remove()
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
        store=FolderStore(folder, data.store.beside),
    )
