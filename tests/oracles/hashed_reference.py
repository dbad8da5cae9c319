"""Protocol `hashed` told straight, in Python integers: the oracle of data_tools.

It shares no code with data_tools. The rule is that of docs/formats.md.
"""

from __future__ import annotations

from fractions import Fraction

MASK = 2**64 - 1


def mix(h: int) -> int:
    """The finaliser of splitmix64."""
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK
    return h ^ (h >> 31)


def hash64(*words: int) -> int:
    state = len(words)
    for word in words:
        state = mix((state + (word + 1) * 0x9E3779B97F4A7C15) & MASK)
    return state


def split_of(key: int, seed: int, val_fraction: float, test_fraction: float) -> str:
    h = hash64(seed, key)
    n_test = int(Fraction(test_fraction) * 2**64)
    n_validation = int(Fraction(val_fraction) * 2**64)
    if h < n_test:
        return "test"
    return "validation" if h < n_test + n_validation else "train"


def hashed(
    rows, min_rating=4.0, min_items=5, val_fraction=0.1, test_fraction=0.1, seed=98765, kept=None
):
    """`rows`: (user, item, rating) triples of whole numbers in input order; a key is the id.

    `kept`: {user: split} of earlier shards. Returns what liang_reference.liang does, the users of
    every split in the order of their hash.
    """
    history: dict = {}
    for user, item, rating in rows:
        if rating >= min_rating:
            items = history.setdefault(user, [])
            if item not in items:
                items.append(item)
    users = [user for user, items in history.items() if len(items) >= min_items]
    users.sort(key=lambda user: hash64(seed, user))
    of_split: dict = {"train": [], "validation": [], "test": []}
    for user in users:
        split = split_of(user, seed, val_fraction, test_fraction)
        of_split[(kept or {}).get(user, split)].append(user)

    popularity: dict = {}
    for user in of_split["train"]:
        for item in history[user]:
            popularity[item] = popularity.get(item, 0) + 1
    result: dict = {
        "items": sorted(popularity, key=lambda item: (-popularity[item], item)),
        "popularity": popularity,
        "train": {user: (history[user], []) for user in of_split["train"]},
    }
    for split in ("validation", "test"):
        result[split] = {}
        for user in of_split[split]:
            items = [item for item in history[user] if item in popularity]
            by_hash = sorted(items, key=lambda item: hash64(seed, user, item))
            held_out = by_hash[: len(items) // 5]
            fold_in = [item for item in items if item not in held_out]
            result[split][user] = (fold_in, held_out)
    return result
