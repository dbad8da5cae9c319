"""Items that too few users have: dropped once, or together with users of too few items until
nothing changes.

Once: items first, then users, as `filter_triplets` of Liang et al. 2018 does; an item may end up
with fewer users than asked for. Until nothing changes: the k-core, the largest set of users and
items in which every user has `min_items` of the items and every item `min_users` of the users.

Only counts are held; the interactions pass by in blocks. Shapes: U users, I items, E interactions.
"""

from __future__ import annotations

import numpy as np

from data_tools.cli import Progress
from data_tools.interactions import Interactions, item_counts, without_items


def drop_rare_items(
    data: Interactions, min_users: int, min_items: int, core: bool
) -> tuple[Interactions, dict[str, int]]:
    """Drop items with fewer than `min_users` users; returns the rest and what was left out.

    With `core` the users who keep fewer than `min_items` items do not count, until nothing changes;
    they are still in the result, for the protocol to leave out and count. ValueError where no item
    is left.
    """
    if min_users <= 1 and not core:
        return data, {}
    counts = item_counts(data)
    kept = _core(data, min_users, min_items) if core else counts >= min_users
    if not kept.any():
        reason = (
            f"no item has {min_users} users or more (the most is {int(counts.max())}); lower "
            "--min_users"
        )
        if core and counts.max() >= min_users:
            reason = (
                f"no set of users and items has {min_items} items a user and {min_users} users an "
                "item; lower --min_items or --min_users"
            )
        raise ValueError(f"the input has no interaction to keep: {reason}")
    rest = data if kept.all() else without_items(data, ~kept)
    return rest, {
        "items_below_min_users": int((~kept).sum()),
        "interactions_of_items_below_min_users": int(counts[~kept].sum()),
        "users_of_these_items_alone": len(data.sizes) - len(rest.sizes),
    }


def _core(data: Interactions, min_users: int, min_items: int) -> np.ndarray:
    """The items of the core, (I,) bool."""
    kept, order = np.ones(len(data.item_ids), bool), np.argsort(data.starts, kind="stable")
    with Progress("dropping rare items", "rounds") as progress:
        while True:
            counts = np.zeros(len(kept), np.int64)
            for users, indptr, items, _ in data.blocks(order):
                owner = np.repeat(np.arange(len(users)), np.diff(indptr))
                among_kept = kept[items]
                sizes = np.bincount(owner[among_kept], minlength=len(users))
                counts += np.bincount(
                    items[among_kept & (sizes >= min_items)[owner]], minlength=len(kept)
                )
            progress.add(1)
            smaller = kept & (counts >= min_users)
            if np.array_equal(smaller, kept):
                return kept
            kept = smaller
