"""What the protocols share that split users: `liang` and `hashed`.

Validation and test users take no part in training; a fifth of their items is held out.

Shapes: U users, I items, V vocabulary items, B users of a block, E interactions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from data_tools.interactions import Interactions, UserBlock
from data_tools.plan import by_popularity, rows_of_items
from dist_vasp.data.block import Block
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.rows import rows_of_pairs


class HeldOut(Protocol):
    """Chooses the held-out items of one split, block by block, in the order of its users."""

    def mask(self, user_keys: np.ndarray, item_keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return True for held-out interactions, (E,) bool.

        user_keys (B,) and sizes (B,) of the users, item_keys (E,) of their interactions.
        """
        ...


def active_users(data: Interactions, min_items: int) -> np.ndarray:
    """Return the ranks of the users with at least `min_items` items, ascending; ValueError where
    there is none."""
    kept = np.flatnonzero(data.sizes >= min_items)
    if not len(kept):
        raise ValueError(
            f"no user has {min_items} items or more (the most is {int(data.sizes.max())} of "
            f"{len(data.sizes)} users); lower --min_items"
        )
    return kept


def below_min_items(data: Interactions, kept: np.ndarray) -> dict[str, int]:
    """Return the counts of the users that are not `kept`, and of their interactions."""
    return {
        "users_below_min_items": len(data.sizes) - len(kept),
        "interactions_of_users_below_min_items": int(data.sizes.sum() - data.sizes[kept].sum()),
    }


class SplitUsersPlan:
    """Users in three splits; the vocabulary is the items of the train users.

    users: by split, ranks of users in the order of the shards; together they are all that have
    enough items. held_out: makes a `HeldOut` for each split.
    """

    def __init__(
        self,
        data: Interactions,
        users: dict[str, np.ndarray],
        held_out: Callable[[], HeldOut],
    ):
        self.users = users
        self._data = data
        self._held_out = held_out
        self.user_keys = keys_of_ids(data.user_ids)
        counts = np.zeros(len(data.item_ids), np.int64)
        for block in data.blocks(np.sort(users["train"])):
            counts += np.bincount(block.rows.items, minlength=len(counts))
        self.vocabulary = by_popularity(counts, counts > 0)
        self.popularity = counts[self.vocabulary]
        self._item_keys = keys_of_ids(data.item_ids.take(pa.array(self.vocabulary)))
        self._rows = rows_of_items(self.vocabulary, len(counts))
        self.left_out = {
            **below_min_items(data, np.concatenate(list(users.values()))),
            "items_without_train_interaction": len(counts) - len(self.vocabulary),
            "heldout_user_interactions_outside_vocabulary": self._outside_vocabulary(),
        }

    def _outside_vocabulary(self) -> int:
        users = np.concatenate([self.users["validation"], self.users["test"]])
        return sum(
            int((self._rows[block.rows.items] < 0).sum()) for block in self._data.blocks(users)
        )

    def maker(self, split: str) -> SplitUsersMaker:
        """See `Plan`."""
        return SplitUsersMaker(split == "train", self._rows, self._item_keys, self._held_out())


@dataclass(frozen=True)
class SplitUsersMaker:
    """Makes the blocks of one split."""

    is_train: bool
    rows: np.ndarray  # (I,) int64, item rows; -1 outside the vocabulary
    item_keys: np.ndarray  # (V,) uint64, by item row
    held_out: HeldOut

    def __call__(self, block: UserBlock, keys: np.ndarray) -> Block:
        """See `BlockMaker`."""
        n_users, n_items = len(keys), len(self.item_keys)
        user, row = block.rows.row_of, self.rows[block.rows.items]
        known = row >= 0
        user, row = user[known], row[known]
        if self.is_train:
            return Block(keys, rows_of_pairs(user, row, n_users, n_items))
        sizes = np.bincount(user, minlength=n_users)
        held = self.held_out.mask(keys, self.item_keys[row], sizes)
        return Block(
            keys,
            rows_of_pairs(user[~held], row[~held], n_users, n_items),
            rows_of_pairs(user[held], row[held], n_users, n_items),
        )
