"""Protocol `given`: a column of the input splits the interactions of every user.

Shapes: U users, I items, B users of a block, E interactions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_tools.interactions import TEST, TRAIN, VALIDATION, Interactions, UserBlock
from data_tools.plan import (
    MIN_ITEMS_TO_HOLD_OUT,
    by_popularity,
    rows_of_items,
    smallest_of_each,
)
from dist_vasp.data.block import Block
from dist_vasp.data.hashing import keys_of_ids, pair_hash
from dist_vasp.data.rows import rows_of_pairs

DEFAULT_VALIDATION_FRACTION = 0.1


def moved_to_validation(
    user: np.ndarray, hashes: np.ndarray, n_users: int, fraction: float
) -> np.ndarray:
    """Return which train interactions become validation interactions, (E,) bool.

    Each user with n train items, at least 5, gives the int(fraction * n) of smallest hash, but at
    least 1. `user` (E,) ascends in [0, B). The result depends on the hashes alone, not on the order
    of the input, the blocks or the users.
    """
    sizes = np.bincount(user, minlength=n_users)
    n_moved = np.where(
        sizes >= MIN_ITEMS_TO_HOLD_OUT, np.maximum(1, (fraction * sizes).astype(np.int64)), 0
    ) * (fraction > 0)
    return smallest_of_each(user, hashes, sizes, n_moved)


class GivenPlan:
    """Every user trains on its train items, which are also its fold-in in validation and test."""

    def __init__(self, data: Interactions, validation_fraction: float | None, seed: int):
        """`validation_fraction` None: 0.1, or 0 where the input has validation interactions."""
        self.user_keys = keys_of_ids(data.user_ids)
        of_split = _count_by_split(data)
        self.fraction = _fraction(int(of_split[VALIDATION].sum()), validation_fraction)
        self._move = Move(keys_of_ids(data.item_ids), self.fraction, seed)

        trained = of_split[TRAIN] > 0
        if not trained.any():
            raise ValueError(
                "the split column marks no interaction as train (0 or train); nothing could be "
                "learned from this input"
            )
        n_items = len(data.item_ids)
        in_vocabulary = np.zeros(n_items, bool)
        popularity = np.zeros(n_items, np.int64)
        targets = np.zeros(n_items, np.int64)
        validated = (of_split[VALIDATION] > 0) & trained
        for block in data.blocks(np.flatnonzero(trained)):
            items, before = block.rows.items, block.splits
            # before the move, so that the vocabulary does not depend on the fraction
            in_vocabulary[items[before == TRAIN]] = True
            targets += np.bincount(items[before != TRAIN], minlength=n_items)
            after = self._move(block, self.user_keys[block.users])
            validated[block.users[block.rows.row_of[before != after]]] = True
            popularity += np.bincount(items[after == TRAIN], minlength=n_items)
        self.vocabulary = by_popularity(popularity, in_vocabulary)
        self.popularity = popularity[self.vocabulary]
        self._rows = rows_of_items(self.vocabulary, n_items)

        ascending = np.flatnonzero(trained)
        order = np.random.RandomState(seed).permutation(len(ascending))
        self.users = {
            "train": ascending[order],
            "validation": np.flatnonzero(validated),
            "test": np.flatnonzero(trained & (of_split[TEST] > 0)),
        }
        self.left_out = {
            "users_without_train_interaction": int((~trained).sum()),
            "interactions_of_users_without_train_interaction": int(data.sizes[~trained].sum()),
            "items_without_train_interaction": int((~in_vocabulary).sum()),
            "target_interactions_outside_vocabulary": int(targets[~in_vocabulary].sum()),
        }

    def maker(self, split: str) -> GivenMaker:
        """See `Plan`."""
        target = {"train": None, "validation": VALIDATION, "test": TEST}[split]
        return GivenMaker(target, self._move, self._rows, len(self.vocabulary))


def _count_by_split(data: Interactions) -> np.ndarray:
    """Return the interactions of every user by split code, (3, U)."""
    n_users = len(data.user_ids)
    counts = np.zeros((3, n_users), np.int64)
    for block in data.blocks_in_file_order():
        user = block.rows.row_of
        for code in (TRAIN, TEST, VALIDATION):
            chosen = user[block.splits == code]
            counts[code, block.users] = np.bincount(chosen, minlength=len(block.users))
    return counts


@dataclass(frozen=True)
class Move:
    """Turns some train interactions into validation ones."""

    item_keys: np.ndarray  # (I,) uint64
    fraction: float
    seed: int

    def __call__(self, block: UserBlock, keys: np.ndarray) -> np.ndarray:
        """Return the split codes after the move, (E,) uint8, of users with these keys (B,)."""
        train = np.flatnonzero(block.splits == TRAIN)
        user = block.rows.row_of[train]
        hashes = pair_hash(keys[user], self.item_keys[block.rows.items[train]], self.seed)
        splits = block.splits.copy()
        moved = moved_to_validation(user, hashes, len(keys), self.fraction)
        splits[train[moved]] = VALIDATION
        return splits


@dataclass(frozen=True)
class GivenMaker:
    """Makes the blocks of one split."""

    target: int | None  # the split code of the target; None in train
    move: Move
    rows: np.ndarray  # (I,) int64, item rows; -1 outside the vocabulary
    n_items: int

    def __call__(self, block: UserBlock, keys: np.ndarray) -> Block:
        """See `BlockMaker`."""
        splits, n_users = self.move(block, keys), len(keys)
        user, row = block.rows.row_of, self.rows[block.rows.items]
        parts = []
        for code in (TRAIN,) if self.target is None else (TRAIN, self.target):
            chosen = (splits == code) & (row >= 0)
            values = block.ratings[chosen] if len(block.ratings) else None
            parts.append(rows_of_pairs(user[chosen], row[chosen], n_users, self.n_items, values))
        return Block(keys, *parts)


def _fraction(n_validation: int, asked: float | None) -> float:
    """Return the fraction of train items to move; ValueError where the input has a validation split
    of its own."""
    if n_validation and asked:
        raise ValueError(
            f"the split column marks {n_validation} interactions as validation and "
            f"--validation_fraction {asked:g} would add others; pass --validation_fraction 0 or "
            "leave it out"
        )
    default = 0.0 if n_validation else DEFAULT_VALIDATION_FRACTION
    return default if asked is None else asked
