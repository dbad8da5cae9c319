"""Protocol `liang`: users are split.

It follows the notebook that D. Liang et al. published with "Variational Autoencoders for
Collaborative Filtering" (WWW 2018), down to the random numbers.

Shapes: U users, I items, B users of a block, E interactions of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_tools.interactions import Interactions
from data_tools.plan import MIN_ITEMS_TO_HOLD_OUT, by_popularity, rows_of_items
from dist_vasp.data.block import Block
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.rows import rows_of_pairs

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

    def mask(self, sizes: np.ndarray) -> np.ndarray:
        """Return True for held-out interactions, (E,) bool, of users with `sizes` (B,) each."""
        mask = np.zeros(int(sizes.sum()), bool)
        start = 0
        for n in sizes.tolist():
            if n >= MIN_ITEMS_TO_HOLD_OUT:
                chosen = self._random.choice(n, size=int(HELD_OUT_FRACTION * n), replace=False)
                mask[start + chosen] = True
            start += n
        return mask


class LiangPlan:
    """Validation and test users take no part in training; a fifth of their items is held out."""

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
        self._data = data
        self._seed = seed
        self._keys = keys_of_ids(data.user_ids)
        tenth = min(10_000, len(kept) // 10)
        chosen = liang_users(
            len(kept),
            tenth if val_users is None else val_users,
            tenth if test_users is None else test_users,
            seed,
        )
        # Held-out users ascend, as the draw needs it. Train users stay permuted, so that a shard is
        # a random sample.
        self.users = {
            split: kept[order] if split == "train" else np.sort(kept[order])
            for split, order in chosen.items()
        }
        counts = np.zeros(len(data.item_ids), np.int64)
        for block in data.blocks(np.sort(self.users["train"])):
            counts += np.bincount(block.rows.items, minlength=len(counts))
        self.vocabulary = by_popularity(counts, counts > 0)
        self.popularity = counts[self.vocabulary]
        self._rows = rows_of_items(self.vocabulary, len(counts))
        self.left_out = {
            "users_below_min_items": len(data.sizes) - len(kept),
            "interactions_of_users_below_min_items": int(data.sizes.sum() - data.sizes[kept].sum()),
            "items_without_train_interaction": len(counts) - len(self.vocabulary),
            "heldout_user_interactions_outside_vocabulary": self._outside_vocabulary(),
        }

    def _outside_vocabulary(self) -> int:
        users = np.concatenate([self.users["validation"], self.users["test"]])
        return sum(
            int((self._rows[block.rows.items] < 0).sum()) for block in self._data.blocks(users)
        )

    def blocks(self, split: str, sizes: Sequence[int]) -> Iterator[Block]:
        draw = HeldOutDraw(self._seed)  # seeded anew for every split, as in the notebook
        n_items = len(self.vocabulary)
        for block in self._data.blocks(self.users[split], sizes):
            user, row = block.rows.row_of, self._rows[block.rows.items]
            known = row >= 0
            user, row = user[known], row[known]
            keys, n_users = self._keys[block.users], len(block.users)
            if split == "train":
                yield Block(keys, rows_of_pairs(user, row, n_users, n_items))
                continue
            held = draw.mask(np.bincount(user, minlength=n_users))
            yield Block(
                keys,
                rows_of_pairs(user[~held], row[~held], n_users, n_items),
                rows_of_pairs(user[held], row[held], n_users, n_items),
            )
