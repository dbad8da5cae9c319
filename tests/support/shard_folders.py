"""Helpers of the data_tools tests: write inputs, read a data folder back by original ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import SPLITS, Manifest, users_file
from dist_vasp.data.shard import read_shard


def write_csv(path: Path, rows, header: str = "user,item,rating") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def random_rows(
    n_users: int = 60, n_items: int = 30, seed: int = 0, ratings: bool = True
) -> list[tuple]:
    """Interactions in random order, about half of the pairs, without duplicates."""
    random = np.random.default_rng(seed)
    pairs = random.permutation(n_users * n_items)[: n_users * n_items // 2]
    values = random.choice([3, 4, 4, 5, 5], len(pairs))
    return [
        (int(p // n_items) + 10, int(p % n_items) * 7, *([int(v)] if ratings else []))
        for p, v in zip(pairs, values, strict=True)
    ]


def read_folder(folder: Path) -> dict:
    """{"items": ids by row, "popularity": {id: n}, split: {user id: (fold-in ids, held-out ids)}}
    in the order of the shards."""
    manifest = Manifest.load(folder)
    items = load_items(folder, manifest)
    ids = items.ids.to_pylist()
    result: dict = {
        "items": ids,
        "popularity": dict(zip(ids, items.popularity.tolist(), strict=True)),
    }
    for split in SPLITS:
        users = pq.read_table(folder / users_file(split))
        name = dict(zip(users["key"].to_pylist(), users["id"].to_pylist(), strict=True))
        result[split] = {}
        for entry in manifest.splits[split].shards:
            block = read_shard(folder, split, entry, manifest.n_items)
            for u, key in enumerate(block.user_keys.tolist()):
                fold_in, held_out = (
                    [] if rows is None else [ids[i] for i in rows.slice(u, u + 1).items]
                    for rows in (block.rows, block.held_out)
                )
                result[split][name[key]] = (fold_in, held_out)
    return result


def assert_equal_to_reference(found: dict, expected: dict) -> None:
    """Same vocabulary in the same order, same users in the same order, same sets of items."""
    assert found["items"] == expected["items"]
    assert found["popularity"] == expected["popularity"]
    for split in SPLITS:
        assert list(found[split]) == list(expected[split])
        for user, (fold_in, held_out) in expected[split].items():
            assert set(found[split][user][0]) == set(fold_in), (split, user)
            assert set(found[split][user][1]) == set(held_out), (split, user)
            assert len(found[split][user][0]) == len(fold_in)
            assert len(found[split][user][1]) == len(held_out)
