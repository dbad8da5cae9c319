"""Protocol `hashed`: a keyed hash decides the split of a user and the held-out items.

Nothing depends on the other users, so a user keeps the split when the catalogue grows, and any
engine can compute the same shards (docs/formats.md has the rule).

Shapes: U users, B users of a block, E interactions of a block.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa

from data_tools.interactions import Interactions
from data_tools.like import OldSplit
from data_tools.plan import smallest_of_each
from data_tools.split_users import SplitUsersPlan, active_users
from dist_vasp.data.hashing import hash64, keys_of_ids
from dist_vasp.data.manifest import SPLITS

DEFAULT_FRACTION = 0.1  # of the users, for validation and for test


def threshold(fraction: float) -> int:
    """Return floor(fraction * 2^64); the product is exact."""
    return int(fraction * 2.0**64)


def split_of_keys(
    user_keys: np.ndarray, seed: int, val_fraction: float, test_fraction: float
) -> np.ndarray:
    """Return the split of each user, (U,) int8: its place in SPLITS.

    With h the hash of (seed, user key) and T, V the thresholds of the two fractions: test where
    h < T, validation where T <= h < T + V, else train. ValueError unless the fractions stay below 1
    together.
    """
    n_test, n_held = threshold(test_fraction), threshold(test_fraction) + threshold(val_fraction)
    if n_held >= 1 << 64:
        raise ValueError(
            f"--val_fraction {val_fraction:g} and --test_fraction {test_fraction:g} leave no train "
            "user; together they must stay below 1"
        )
    hashes = hash64(seed, user_keys)
    codes = np.zeros(len(user_keys), np.int8)
    codes[hashes < np.uint64(n_held)] = SPLITS.index("validation")
    codes[hashes < np.uint64(n_test)] = SPLITS.index("test")
    return codes


class HashedHeldOut:
    """Holds out the floor(n / 5) of a user's n items with the smallest hashes of (seed, user key,
    item key); these are all different, because the item keys are."""

    def __init__(self, seed: int):
        self._seed = seed

    def mask(self, user_keys: np.ndarray, item_keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return True for held-out interactions, (E,) bool; see `HeldOut`."""
        user = np.repeat(np.arange(len(sizes)), sizes)
        hashes = hash64(self._seed, user_keys[user], item_keys)
        return smallest_of_each(user, hashes, sizes, sizes // 5)


def hashed_plan(
    data: Interactions,
    min_items: int,
    fractions: tuple[float, float],
    seed: int,
    old: OldSplit | None,
) -> SplitUsersPlan:
    """Return the plan; fractions: of the users, for validation and for test. The users of `old`
    keep their split.

    The users of every split are ordered by their hash. ValueError where no train user remains.
    """
    kept = active_users(data, min_items)
    ids = data.user_ids.take(pa.array(kept))
    keys = keys_of_ids(ids)
    codes = split_of_keys(keys, seed, *fractions)
    if old:
        codes = old.keep(ids, codes)
    if not (codes == 0).any():
        raise ValueError(
            f"all {len(kept)} users fall to validation or test; lower --val_fraction and "
            "--test_fraction"
        )
    order = np.argsort(hash64(seed, keys))
    users = {split: kept[order[codes[order] == k]] for k, split in enumerate(SPLITS)}
    return SplitUsersPlan(data, users, partial(HashedHeldOut, seed))
