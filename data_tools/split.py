"""The two protocols of DESIGN.md, section 4: who and what is train, validation and test.

`liang`: users are split, following the notebook that D. Liang et al. published with "Variational Autoencoders for
Collaborative Filtering" (WWW 2018), to the random number. `given`: a column splits the interactions of every user.

Users and items are ranks among the ascending ids (see interactions.py); item rows are positions in
the vocabulary. Shapes: U users, I items, V vocabulary items, B users of a block, E interactions of
a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from data_tools.interactions import TEST, TRAIN, VALIDATION, Interactions
from dist_vasp.data.format import Block, keys_of_ids

MIN_ITEMS_TO_HOLD_OUT = 5
HELD_OUT_SHARE = 0.2
DEFAULT_VALIDATION_FRACTION = 0.1


class Plan(Protocol):
    """A protocol applied to interactions: everything that is written, block by block."""

    users: dict[str, np.ndarray]  # by split, (U_split,) user ranks in the order of the shards
    vocabulary: np.ndarray  # (V,) item ranks by item row
    popularity: np.ndarray  # (V,) interactions in the train shards
    left_out: dict[str, int]

    def blocks(self, split: str, sizes: Sequence[int]) -> Iterator[Block]:
        """The users of a split in CSR form, in blocks of `sizes` users that add up to all of them."""
        ...


# --- shared ---------------------------------------------------------------------------------------


def by_popularity(popularity: np.ndarray, in_vocabulary: np.ndarray) -> np.ndarray:
    """Item ranks by descending popularity, ties by ascending id; only items of `in_vocabulary`,
    (I,) bool."""
    order = np.argsort(-popularity, kind="stable")
    return order[in_vocabulary[order]]


def _rows_of_items(vocabulary: np.ndarray, n_items: int) -> np.ndarray:
    """(I,) int64: the row of every item, -1 where it has none."""
    rows = np.full(n_items, -1, np.int64)
    rows[vocabulary] = np.arange(len(vocabulary))
    return rows


def _csr(
    user: np.ndarray, row: np.ndarray, n_users: int, n_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """indptr (B+1,) and item rows (E,) int32, ascending within a user; `user` (E,) ascending in [0,
    B)."""
    pairs = np.sort(user * n_rows + row)
    indptr = np.concatenate(
        [np.zeros(1, np.int64), np.cumsum(np.bincount(user, minlength=n_users))]
    )
    return indptr, (pairs - user * n_rows).astype(np.int32)


# --- liang ----------------------------------------------------------------------------------------


def liang_users(n_users: int, val_users: int, test_users: int, seed: int) -> dict[str, np.ndarray]:
    """Positions among the ascending user ids, by split, in permuted order: the last `test_users`
    are test, those before validation, the rest train. ValueError where no train user is left."""
    if val_users + test_users >= n_users:
        raise ValueError(
            f"--val_users {val_users} and --test_users {test_users} leave no train user of "
            f"{n_users} users (after filtering); "
            f"together they must stay below {n_users}"
        )
    order = np.random.RandomState(seed).permutation(
        n_users
    )  # the stream of numpy.random.seed, without its global state
    n_train = n_users - val_users - test_users
    return {
        "train": order[:n_train],
        "validation": order[n_train : n_train + val_users],
        "test": order[n_train + val_users :],
    }


class HeldOutDraw:
    """The notebook's held-out fold of one split: users must come in ascending order of id."""

    def __init__(self, seed: int):
        self._random = np.random.RandomState(seed)

    def mask(self, sizes: np.ndarray) -> np.ndarray:
        """True for held-out interactions, (E,) bool, of users with `sizes` (B,) interactions each."""
        mask = np.zeros(int(sizes.sum()), bool)
        start = 0
        for n in sizes.tolist():
            if n >= MIN_ITEMS_TO_HOLD_OUT:
                mask[
                    start + self._random.choice(n, size=int(HELD_OUT_SHARE * n), replace=False)
                ] = True
            start += n
        return mask


class LiangPlan:
    """Protocol `liang`: validation and test users are not seen in training; a fifth of their items
    is held out."""

    def __init__(
        self,
        data: Interactions,
        min_items: int,
        val_users: int | None,
        test_users: int | None,
        seed: int,
    ):
        """`val_users` and `test_users` None: a tenth of the users each, at most 10,000."""
        kept = np.flatnonzero(data.sizes >= min_items)
        if not len(kept):
            raise ValueError(
                f"no user has {min_items} items or more (the most is {int(data.sizes.max())} of "
                f"{len(data.sizes)} users); lower --min_items"
            )
        self._data, self._seed = data, seed
        self._keys = keys_of_ids(data.user_ids)
        tenth = min(10_000, len(kept) // 10)
        chosen = liang_users(
            len(kept),
            tenth if val_users is None else val_users,
            tenth if test_users is None else test_users,
            seed,
        )
        # held-out users ascend, as the draw needs it; train users stay permuted, so that a shard is
        # a random sample
        self.users = {
            split: kept[order] if split == "train" else np.sort(kept[order])
            for split, order in chosen.items()
        }

        counts = np.zeros(len(data.item_ids), np.int64)
        for _, _, items, _ in data.blocks(np.sort(self.users["train"])):
            counts += np.bincount(items, minlength=len(counts))
        self.vocabulary = by_popularity(counts, counts > 0)
        self.popularity = counts[self.vocabulary]
        self._rows = _rows_of_items(self.vocabulary, len(counts))
        self.left_out = {
            "users_below_min_items": len(data.sizes) - len(kept),
            "interactions_of_users_below_min_items": int(data.sizes.sum() - data.sizes[kept].sum()),
            "items_without_train_interaction": len(counts) - len(self.vocabulary),
            "heldout_user_interactions_outside_vocabulary": self._outside_vocabulary(),
        }

    def _outside_vocabulary(self) -> int:
        users = np.concatenate([self.users["validation"], self.users["test"]])
        return sum(
            int((self._rows[items] < 0).sum()) for _, _, items, _ in self._data.blocks(users)
        )

    def blocks(self, split: str, sizes: Sequence[int]) -> Iterator[Block]:
        draw = HeldOutDraw(self._seed)  # reseeded for every split, as in the notebook
        for users, indptr, items, _ in self._data.blocks(self.users[split], sizes):
            user = np.repeat(np.arange(len(users)), np.diff(indptr))
            row = self._rows[items]
            known = row >= 0
            user, row = user[known], row[known]
            if split == "train":
                yield Block(self._keys[users], *_csr(user, row, len(users), len(self.vocabulary)))
                continue
            held = draw.mask(np.bincount(user, minlength=len(users)))
            fold_in = _csr(user[~held], row[~held], len(users), len(self.vocabulary))
            yield Block(
                self._keys[users],
                *fold_in,
                *_csr(user[held], row[held], len(users), len(self.vocabulary)),
            )


# --- given ----------------------------------------------------------------------------------------


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a bijection of 64-bit words that spreads every bit. (E,) uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pair_hash(user_keys: np.ndarray, item_keys: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit hash of (seed, user key, item key), (E,) uint64."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = _mix(np.full(1, seed, np.uint64) + step)
    return _mix(_mix(_mix(user_keys + step) ^ state) + step ^ _mix(item_keys ^ step))


def moved_to_validation(
    user: np.ndarray, hashes: np.ndarray, n_users: int, fraction: float
) -> np.ndarray:
    """(E,) bool: of each user with at least 5 train items the int(fraction * n), at least 1, of
    smallest hash.

    `user` (E,) ascending in [0, B); depends on keys alone, not on the order of input, blocks or users.
    """
    sizes = np.bincount(user, minlength=n_users)
    take = np.where(
        sizes >= MIN_ITEMS_TO_HOLD_OUT, np.maximum(1, (fraction * sizes).astype(np.int64)), 0
    ) * (fraction > 0)
    order = np.lexsort((hashes, user))
    rank = np.empty(len(user), np.int64)
    rank[order] = np.arange(len(user)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank < take[user]


class GivenPlan:
    """Protocol `given`: every user trains on its train items, which are also its fold-in in
    validation and test."""

    def __init__(self, data: Interactions, validation_fraction: float | None, seed: int):
        """`validation_fraction` None: 0.1, or 0 where the data has validation interactions of its
        own."""
        self._data, self._seed = data, seed
        self._user_keys, self._item_keys = keys_of_ids(data.user_ids), keys_of_ids(data.item_ids)
        n_users, n_items = len(data.user_ids), len(data.item_ids)
        of_split = self._count(n_users)
        if of_split[VALIDATION].any() and validation_fraction:
            raise ValueError(
                f"the split column marks {int(of_split[VALIDATION].sum())} interactions as "
                "validation and --validation_fraction "
                f"{validation_fraction:g} would add others; pass --validation_fraction 0 or leave "
                "it out"
            )
        default = 0.0 if of_split[VALIDATION].any() else DEFAULT_VALIDATION_FRACTION
        self.fraction = default if validation_fraction is None else validation_fraction

        trained = of_split[TRAIN] > 0
        if not trained.any():
            raise ValueError(
                "the split column marks no interaction as train (0 or train); nothing could be "
                "learned from this input"
            )
        in_vocabulary, popularity = np.zeros(n_items, bool), np.zeros(n_items, np.int64)
        validated = (of_split[VALIDATION] > 0) & trained
        targets = np.zeros(n_items, np.int64)
        for users, _, user, items, splits in self._columns(np.flatnonzero(trained)):
            in_vocabulary[items[splits == TRAIN]] = (
                True  # before the move, so that the fraction does not shape the vocabulary
            )
            targets += np.bincount(items[splits != TRAIN], minlength=n_items)
            moved = self._move(users, user, items, splits)
            validated[users[user[moved]]] = True
            popularity += np.bincount(items[splits == TRAIN], minlength=n_items)
        self.vocabulary = by_popularity(popularity, in_vocabulary)
        self.popularity = popularity[self.vocabulary]
        self._rows = _rows_of_items(self.vocabulary, n_items)

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

    def _count(self, n_users: int) -> np.ndarray:
        """Interactions of every user by split code, (3, U)."""
        counts = np.zeros((3, n_users), np.int64)
        for users, _, user, _, splits in self._columns(np.arange(n_users)):
            for code in (TRAIN, TEST, VALIDATION):
                counts[code, users] = np.bincount(user[splits == code], minlength=len(users))
        return counts

    def _columns(
        self, users: np.ndarray, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        for block, indptr, items, splits in self._data.blocks(users, sizes):
            yield (
                block,
                indptr,
                np.repeat(np.arange(len(block)), np.diff(indptr)),
                items,
                splits.copy(),
            )

    def _move(
        self, users: np.ndarray, user: np.ndarray, items: np.ndarray, splits: np.ndarray
    ) -> np.ndarray:
        """Turn the train interactions chosen by hash into validation ones, in place; their
        positions."""
        train = np.flatnonzero(splits == TRAIN)
        hashes = pair_hash(
            self._user_keys[users[user[train]]], self._item_keys[items[train]], self._seed
        )
        moved = train[moved_to_validation(user[train], hashes, len(users), self.fraction)]
        splits[moved] = VALIDATION
        return moved

    def blocks(self, split: str, sizes: Sequence[int]) -> Iterator[Block]:
        target = {"train": None, "validation": VALIDATION, "test": TEST}[split]
        for users, _, user, items, splits in self._columns(self.users[split], sizes):
            self._move(users, user, items, splits)
            rows, n_users = self._rows[items], len(users)
            parts: list[np.ndarray] = []
            for code in (TRAIN,) if target is None else (TRAIN, target):
                chosen = (splits == code) & (rows >= 0)
                parts += _csr(user[chosen], rows[chosen], n_users, len(self.vocabulary))
            yield Block(self._user_keys[users], *parts)
