"""What a protocol decides: which users and items go to train, validation and test.

`liang.py`, `hashed.py`, `given.py` and `ordered.py` hold the protocols (DESIGN.md, section 4).
Users and items are ranks among the ascending ids (see interactions.py); item rows are positions in
the vocabulary.

Shapes: U users, I items, V vocabulary items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from dist_vasp.data.block import Block

MIN_ITEMS_TO_HOLD_OUT = 5


class Plan(Protocol):
    """A protocol applied to interactions: everything that is written, block by block."""

    users: dict[str, np.ndarray]  # by split, (U_split,) user ranks in the order of the shards
    vocabulary: np.ndarray  # (V,) item ranks by item row
    popularity: np.ndarray  # (V,) interactions in the train shards
    left_out: dict[str, int]  # counts by reason

    def blocks(self, split: str, sizes: Sequence[int]) -> Iterator[Block]:
        """Yield the users of a split in blocks of `sizes` users, which add up to all of them."""
        ...


def by_popularity(popularity: np.ndarray, in_vocabulary: np.ndarray) -> np.ndarray:
    """Return the items marked in `in_vocabulary`, (I,) bool, by descending popularity and, among
    equals, by ascending id."""
    order = np.argsort(-popularity, kind="stable")
    return order[in_vocabulary[order]]


def rows_of_items(vocabulary: np.ndarray, n_items: int) -> np.ndarray:
    """Return the row of every item, (I,) int64; -1 where it is not in the vocabulary."""
    rows = np.full(n_items, -1, np.int64)
    rows[vocabulary] = np.arange(len(vocabulary))
    return rows


def smallest_of_each(
    user: np.ndarray, values: np.ndarray, sizes: np.ndarray, n_chosen: np.ndarray
) -> np.ndarray:
    """Return True for the `n_chosen` (B,) interactions of each user with the smallest `values`
    (E,), (E,) bool.

    user (E,) ascends in [0, B); sizes (B,) counts the interactions of each user.
    """
    order = np.lexsort((values, user))
    rank = np.empty(len(user), np.int64)
    rank[order] = np.arange(len(user)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank < n_chosen[user]
