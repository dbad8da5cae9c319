"""Protocols `time` and `last`: every user trains on the first interactions, later ones are targets.

The interactions of a user come in the order of their times. The first `n_train` of them are train
interactions, the next `n_validation` the target of validation, and the rest the target of test. In
validation the input is the train interactions, at test these and the validation target.

Shapes: U users, I items, B users of a block, E interactions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_tools.interactions import Interactions, UserBlock
from data_tools.plan import MIN_ITEMS_TO_HOLD_OUT, by_popularity, rows_of_items
from data_tools.split_users import active_users, below_min_items
from data_tools.times import bounds, told
from dist_vasp.data.block import Block
from dist_vasp.data.hashing import hash64, keys_of_ids
from dist_vasp.data.rows import Rows, rows_of_pairs


@dataclass(frozen=True)
class Cuts:
    """How many interactions of some users are for training and validation, and which items are in
    the vocabulary."""

    n_train: np.ndarray  # (B,) int64
    n_validation: np.ndarray  # (B,) int64
    n_vocabulary: np.ndarray  # (B,) int64: the items of the user's first so many interactions


class CutRule(Protocol):
    """Says where the interactions of a user are cut."""

    def __call__(self, block: UserBlock) -> Cuts: ...

    def check(self, cuts: Cuts, data: Interactions) -> None:
        """ValueError where the cuts of all users (U,) leave nothing on one side."""
        ...


class LastRule:
    """The cuts of `last`.

    The last interaction is the target of test and the one before it that of validation, but the
    first is always a train interaction.
    """

    def __call__(self, block: UserBlock) -> Cuts:
        sizes = block.rows.lengths
        n_test = (sizes >= 2).astype(np.int64)
        n_validation = (sizes >= 3).astype(np.int64)
        n_train = sizes - n_test - n_validation
        return Cuts(n_train, n_validation, n_train)

    def check(self, cuts: Cuts, data: Interactions) -> None:
        """Every user has a train interaction."""


@dataclass(frozen=True)
class TimeRule:
    """The cuts of `time`: interactions before `split_time` are train interactions.

    Of a user with n of them, at least 5, the last int(validation_fraction * n), but at least one,
    are the target of validation.
    """

    split_time: float
    validation_fraction: float

    def __call__(self, block: UserBlock) -> Cuts:
        before = block.rows.row_of[block.times < self.split_time]
        n_before = np.bincount(before, minlength=len(block.users)).astype(np.int64)
        enough = n_before >= MIN_ITEMS_TO_HOLD_OUT
        wanted = np.maximum(1, (self.validation_fraction * n_before).astype(np.int64))
        n_validation = np.where(enough & (self.validation_fraction > 0), wanted, 0)
        return Cuts(n_before - n_validation, n_validation, n_before)

    def check(self, cuts: Cuts, data: Interactions) -> None:
        """ValueError unless there are interactions on both sides."""
        total, n_all = int(cuts.n_vocabulary.sum()), int(data.sizes.sum())
        if total in (0, n_all):
            first, last = bounds(data.store.files("times"))
            where = "at or after" if total == 0 else "before"
            raise ValueError(
                f"all {n_all} interactions are {where} {told(self.split_time)}, where training "
                f"ends; their times run from {told(first)} to {told(last)}; choose a --split_time "
                "between them"
            )


def _cuts_of_all(data: Interactions, rule: CutRule) -> Cuts:
    """Return the cuts of all users, (U,) each."""
    n_users = len(data.sizes)
    cuts = Cuts(*(np.zeros(n_users, np.int64) for _ in range(3)))
    for block in data.blocks_in_file_order():
        of_block = rule(block)
        cuts.n_train[block.users] = of_block.n_train
        cuts.n_validation[block.users] = of_block.n_validation
        cuts.n_vocabulary[block.users] = of_block.n_vocabulary
    rule.check(cuts, data)
    return cuts


class OrderedPlan:
    """Every user with a train interaction trains; the users of every split are in the order of the
    hash of (seed, user key)."""

    def __init__(self, data: Interactions, rule: CutRule, min_items: int, seed: int):
        self._data = data
        self._rule = rule
        cuts = _cuts_of_all(data, rule)
        self.user_keys = keys_of_ids(data.user_ids)
        active = active_users(data, min_items)
        trained = active[cuts.n_train[active] > 0]
        n_items = len(data.item_ids)
        popularity = np.zeros(n_items, np.int64)
        in_vocabulary = np.zeros(n_items, bool)
        for block in data.blocks(trained):
            place = _places(block)
            of_user = block.rows.row_of
            in_vocabulary[block.rows.items[place < cuts.n_vocabulary[block.users][of_user]]] = True
            in_train = place < cuts.n_train[block.users][of_user]
            popularity += np.bincount(block.rows.items[in_train], minlength=n_items)
        if not in_vocabulary.any():
            raise ValueError("no user has an interaction to train on; lower --min_items")
        self.vocabulary = by_popularity(popularity, in_vocabulary)
        self.popularity = popularity[self.vocabulary]
        self._rows = rows_of_items(self.vocabulary, n_items)

        order = trained[np.argsort(hash64(seed, self.user_keys[trained]))]
        end = cuts.n_train + cuts.n_validation
        self.users = {
            "train": order,
            "validation": order[cuts.n_validation[order] > 0],
            "test": order[(data.sizes - end)[order] > 0],
        }
        untrained = active[cuts.n_train[active] == 0]
        self.left_out = {
            **below_min_items(data, active),
            "users_without_train_interaction": len(untrained),
            "interactions_of_users_without_train_interaction": int(data.sizes[untrained].sum()),
            "items_without_train_interaction": int((~in_vocabulary).sum()),
            "target_interactions_outside_vocabulary": self._outside_vocabulary(trained),
        }

    def _outside_vocabulary(self, trained: np.ndarray) -> int:
        return sum(
            int((self._rows[block.rows.items] < 0).sum()) for block in self._data.blocks(trained)
        )

    def maker(self, split: str) -> OrderedMaker:
        """See `Plan`."""
        return OrderedMaker(split, self._rule, self._rows, len(self.vocabulary))


@dataclass(frozen=True)
class OrderedMaker:
    """Makes the blocks of one split."""

    split: str
    rule: CutRule
    rows: np.ndarray  # (I,) int64, item rows; -1 outside the vocabulary
    n_items: int

    def __call__(self, block: UserBlock, keys: np.ndarray) -> Block:
        """See `BlockMaker`."""
        cuts = self.rule(block)
        first, second = cuts.n_train, cuts.n_train + cuts.n_validation
        place, user = _places(block), block.rows.row_of
        before = place < (second if self.split == "test" else first)[user]
        if self.split == "train":
            return Block(keys, self._chosen(block, before))
        target = ~before & (place < second[user] if self.split == "validation" else True)
        return Block(keys, self._chosen(block, before), self._chosen(block, target))

    def _chosen(self, block: UserBlock, chosen: np.ndarray) -> Rows:
        """Return the interactions marked in `chosen`, (E,) bool, that are in the vocabulary."""
        row = self.rows[block.rows.items]
        kept = chosen & (row >= 0)
        return rows_of_pairs(block.rows.row_of[kept], row[kept], len(block.users), self.n_items)


def _places(block: UserBlock) -> np.ndarray:
    """Return the position of each interaction among those of its user, (E,) int64."""
    indptr, user = block.rows.indptr, block.rows.row_of
    return np.arange(len(block.rows.items)) - indptr[user]
