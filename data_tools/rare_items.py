"""Drop items that too few users have.

Once: items first, then users, as `filter_triplets` of Liang et al. 2018 does. An item may end up
with fewer users than asked for.

Until nothing changes (`--core`): the k-core, which is the largest set of users and items in which
every user has `min_items` of the items and every item has `min_users` of the users.

Memory holds only counts. Shapes: U users, I items.
"""

from __future__ import annotations

import numpy as np

from data_tools.interactions import Interactions, item_counts, without_items
from dist_vasp.progress import Progress


def drop_rare_items(
    data: Interactions, min_users: int, min_items: int, core: bool
) -> tuple[Interactions, dict[str, int]]:
    """Drop items with fewer than `min_users` users; return the rest, and counts by reason.

    With `core`, users who keep fewer than `min_items` items do not count as users of an item, and
    this repeats until nothing changes. These users stay in the result: the protocol drops and
    counts them. ValueError where no item remains.
    """
    if min_users <= 1 and not core:
        return data, {}
    counts = item_counts(data)
    kept = _core(data, min_users, min_items) if core else counts >= min_users
    if not kept.any():
        reason = (
            f"no item has {min_users} users or more (the most is {int(counts.max())}); "
            "lower --min_users"
        )
        if core and counts.max() >= min_users:
            reason = (
                f"no set of users and items has {min_items} items a user and {min_users} users "
                "an item; lower --min_items or --min_users"
            )
        raise ValueError(f"the input has no interaction to keep: {reason}")
    rest = data if kept.all() else without_items(data, ~kept)
    return rest, {
        "items_below_min_users": int((~kept).sum()),
        "interactions_of_items_below_min_users": int(counts[~kept].sum()),
        "users_of_these_items_alone": len(data.sizes) - len(rest.sizes),
    }


def _core(data: Interactions, min_users: int, min_items: int) -> np.ndarray:
    """Return which items are in the k-core, (I,) bool."""
    kept = np.ones(len(data.item_ids), bool)
    with Progress("dropping rare items", None, "round", brief=True) as progress:
        while True:
            counts = np.zeros(len(kept), np.int64)
            for block in data.blocks_in_file_order():
                rows = block.rows.where(kept[block.rows.items])
                in_core = (rows.lengths >= min_items)[rows.row_of]
                counts += np.bincount(rows.items[in_core], minlength=len(kept))
            progress.add(1)
            smaller = kept & (counts >= min_users)
            if np.array_equal(smaller, kept):
                return kept
            kept = smaller
