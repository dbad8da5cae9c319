"""Protocol `liang` told straight, in plain Python and numpy: the oracle of data_tools. Shares no
code with it.

Follows the notebook of D. Liang et al. 2018 step by step: filter, split users, vocabulary, held-out
fold.
"""

from __future__ import annotations

import numpy as np


def liang(rows, min_rating=4.0, min_items=5, val_users=10, test_users=10, seed=98765):
    """`rows`: (user, item, rating) triples in input order, rating None for implicit feedback.

    Returns {"items": ids in row order, "popularity": {id: count}, "train"/"validation"/"test":
    {user: (fold-in, held-out)}}, the users in the order of the split (train permuted, the others
    ascending), the item ids of a user in input order.
    """
    history: dict = {}
    for user, item, rating in rows:
        if rating is None or rating >= min_rating:
            items = history.setdefault(user, [])
            if item not in items:
                items.append(item)
    users = sorted(user for user, items in history.items() if len(items) >= min_items)

    np.random.seed(seed)
    permuted = [users[i] for i in np.random.permutation(len(users))]
    n_train = len(users) - val_users - test_users
    of_split = {
        "train": permuted[:n_train],
        "validation": sorted(permuted[n_train : n_train + val_users]),
        "test": sorted(permuted[n_train + val_users :]),
    }

    popularity: dict = {}
    for user in of_split["train"]:
        for item in history[user]:
            popularity[item] = popularity.get(item, 0) + 1
    result: dict = {
        "items": sorted(popularity, key=lambda item: (-popularity[item], item)),
        "popularity": popularity,
    }
    result["train"] = {user: (history[user], []) for user in of_split["train"]}
    for split in ("validation", "test"):
        np.random.seed(seed)
        result[split] = {}
        for user in of_split[split]:
            items = [item for item in history[user] if item in popularity]
            held = np.zeros(len(items), dtype=bool)
            if len(items) >= 5:
                held[np.random.choice(len(items), size=int(0.2 * len(items)), replace=False)] = True
            fold_in = [item for item, out in zip(items, held, strict=True) if not out]
            result[split][user] = (
                fold_in,
                [item for item, out in zip(items, held, strict=True) if out],
            )
    return result
