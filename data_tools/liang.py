"""Protocol `liang`: users are split by a permutation.

It follows the notebook that D. Liang et al. published with "Variational Autoencoders for
Collaborative Filtering" (WWW 2018), down to the random numbers.

Shapes: U users, B users of a block, E interactions of a block.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa

from data_tools.hashed import split_of_keys
from data_tools.interactions import Interactions
from data_tools.like import OldSplit
from data_tools.plan import MIN_ITEMS_TO_HOLD_OUT
from data_tools.split_users import SplitUsersPlan, active_users
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.manifest import SPLITS

HELD_OUT_FRACTION = 0.2


def liang_users(n_users: int, val_users: int, test_users: int, seed: int) -> dict[str, np.ndarray]:
    """Return the positions of each split's users among the ascending user ids, in permuted order.

    The last `test_users` are test, the `val_users` before them validation, and the rest train.
    ValueError where no train user remains.
    """
    if val_users + test_users >= n_users:
        raise ValueError(
            f"--val_users {val_users} and --test_users {test_users} leave no train user of "
            f"{n_users} users (after filtering); together they must stay below {n_users}"
        )
    # the random numbers of numpy.random.seed, without its global state
    order = np.random.RandomState(seed).permutation(n_users)
    n_train = n_users - val_users - test_users
    return {
        "train": order[:n_train],
        "validation": order[n_train : n_train + val_users],
        "test": order[n_train + val_users :],
    }


class HeldOutDraw:
    """The notebook's draw of held-out items of one split; users must come in ascending order."""

    def __init__(self, seed: int):
        self._random = np.random.RandomState(seed)

    def mask(self, user_keys: np.ndarray, item_keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return True for held-out interactions, (E,) bool, of users with `sizes` (B,) each; the
        keys play no part."""
        mask = np.zeros(int(sizes.sum()), bool)
        start = 0
        for n in sizes.tolist():
            if n >= MIN_ITEMS_TO_HOLD_OUT:
                chosen = self._random.choice(n, size=int(HELD_OUT_FRACTION * n), replace=False)
                mask[start + chosen] = True
            start += n
        return mask


def liang_plan(
    data: Interactions, min_items: int, val_users: int | None, test_users: int | None, seed: int
) -> SplitUsersPlan:
    """Return the plan of the notebook; ValueError where no train user remains.

    `val_users` and `test_users` None: a tenth of the users each, at most 10,000.
    """
    kept = active_users(data, min_items)
    tenth = min(10_000, len(kept) // 10)
    chosen = liang_users(
        len(kept),
        tenth if val_users is None else val_users,
        tenth if test_users is None else test_users,
        seed,
    )
    return _plan(data, {split: kept[order] for split, order in chosen.items()}, seed)


def liang_plan_like(data: Interactions, min_items: int, old: OldSplit, seed: int) -> SplitUsersPlan:
    """Return the plan in which the users of `old` keep their split, and new ones get theirs by the
    hash of protocol `hashed`, with the fractions of `old`."""
    kept = active_users(data, min_items)
    ids = data.user_ids.take(pa.array(kept))
    new = split_of_keys(keys_of_ids(ids), seed, old.val_fraction, old.test_fraction)
    codes = old.keep(ids, new)
    order = np.random.RandomState(seed).permutation(len(kept))
    return _plan(
        data, {split: kept[order[codes[order] == k]] for k, split in enumerate(SPLITS)}, seed
    )


def _plan(data: Interactions, users: dict[str, np.ndarray], seed: int) -> SplitUsersPlan:
    # Held-out users ascend, as the draw needs it. Train users stay permuted, so that a shard is a
    # random sample. The draw is seeded anew for every split, as in the notebook.
    ordered = {split: u if split == "train" else np.sort(u) for split, u in users.items()}
    return SplitUsersPlan(data, ordered, partial(HeldOutDraw, seed))
