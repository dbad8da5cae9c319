"""What a protocol decides: which users and items go to train, validation and test.

`liang.py`, `hashed.py`, `given.py` and `ordered.py` hold the protocols (DESIGN.md, section 4).
Users and items are ranks among the ascending ids (see interactions.py); item rows are positions in
the vocabulary.

Shapes: U users, I items, V vocabulary items.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from data_tools.interactions import UserBlock
from dist_vasp.data.block import Block

MIN_ITEMS_TO_HOLD_OUT = 5


class BlockMaker(Protocol):
    """Turns the interactions of some users into a block of a shard.

    It depends on no other user of the split, except in `liang`, whose blocks must be made in order.
    """

    def __call__(self, block: UserBlock, keys: np.ndarray) -> Block:
        """Return the block of users with these keys, (B,) uint64."""
        ...


class Plan(Protocol):
    """A protocol applied to interactions: everything that is written."""

    user_keys: np.ndarray  # (U,) uint64
    users: dict[str, np.ndarray]  # by split, (U_split,) user ranks in the order of the shards
    vocabulary: np.ndarray  # (V,) item ranks by item row
    popularity: np.ndarray  # (V,) interactions in the train shards
    left_out: dict[str, int]  # counts by reason

    def maker(self, split: str) -> BlockMaker:
        """Return what makes the blocks of a split, from the first one on."""
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
