"""Write shards of synthetic users in seconds: python -m benchmarks.synthetic_shards OUT --items
17769 --users 61440 --interactions 7500000

Items have popularities with a long tail, users have lengths with a long tail and no tastes. For
tastes, and at any size, use data_tools.synthesize.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from tests.support.make_shards import write_folder

POPULARITY_SIGMA = 1.6
ACTIVITY_SIGMA = 0.8
MARGIN = 1.25  # draws over items wanted: an item that a user draws twice counts once


def draw_users(
    n_users: int, n_items: int, mean_items: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Item rows of each user, at least two of them."""
    weights = np.exp(POPULARITY_SIGMA * rng.standard_normal(n_items))
    bounds = np.cumsum(weights / weights.sum())
    lengths = np.exp(ACTIVITY_SIGMA * rng.standard_normal(n_users))
    lengths = np.clip(lengths * mean_items / lengths.mean(), 2, n_items // 2).astype(int)
    draws = (lengths * MARGIN).astype(int) + 2
    items = np.searchsorted(bounds, rng.random(draws.sum()))
    ends = np.cumsum(draws)
    return [
        np.unique(np.minimum(items[end - n : end], n_items - 1))[:length]
        for end, n, length in zip(ends, draws, lengths, strict=True)
    ]


def write_synthetic(
    folder: str | Path, n_items: int, n_users: int, interactions: int, n_test: int = 0
) -> None:
    """Write a data folder of training users and `n_test` test users with 20% of theirs held out."""
    rng = np.random.default_rng(0)
    users = draw_users(n_users + n_test, n_items, interactions / n_users, rng)
    tests = []
    for user in users[n_users:]:
        shuffled = rng.permutation(user)
        cut = max(1, len(user) // 5)
        tests.append((np.sort(shuffled[cut:]), np.sort(shuffled[:cut])))
    write_folder(
        folder,
        train=users[:n_users],
        test=tests,
        n_items=n_items,
        users_per_shard=8192,
        users_per_block=512,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--items", type=int, default=17_769)
    parser.add_argument("--users", type=int, default=61_440)
    parser.add_argument("--interactions", type=int, default=7_500_000)
    parser.add_argument("--test_users", type=int, default=0)
    a = parser.parse_args()
    start = time.monotonic()
    write_synthetic(a.output, a.items, a.users, a.interactions, a.test_users)
    print(f"{a.output}: {a.users:,} users in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
