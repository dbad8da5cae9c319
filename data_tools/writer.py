"""Write a plan as a data folder: tars, items.parquet, users-*.parquet and, last, manifest.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.interactions import Interactions
from data_tools.plan import Plan
from data_tools.shards import count_shard, shards_of, write_shard
from dist_vasp.data.hashing import keys_of_ids, sha256_of, vocabulary_sha256
from dist_vasp.data.manifest import (
    ITEMS_FILE,
    MANIFEST,
    SPLITS,
    Manifest,
    ShardEntry,
    SplitEntry,
    users_file,
)
from dist_vasp.progress import Progress


def write_split(
    folder: Path, data: Interactions, plan: Plan, split: str, users_per_shard: int
) -> SplitEntry:
    """Write the tars of one split. The same plan gives the same bytes."""
    entries: list[ShardEntry] = []
    make = plan.maker(split)
    with Progress(f"writing {split}", len(plan.users[split]), "user", brief=True) as progress:
        for shard in shards_of(data, plan, split, users_per_shard):
            entries.append(write_shard(folder / shard.name, shard, data.store, make))
            progress.add(len(shard.keys))
    return split_entry(entries)


def count_split(data: Interactions, plan: Plan, split: str, users_per_shard: int) -> SplitEntry:
    """Return what `write_split` would, without the sizes and checksums of the tars."""
    make = plan.maker(split)
    shards = shards_of(data, plan, split, users_per_shard)
    return split_entry([count_shard(shard, data.store, make) for shard in shards])


def split_entry(shards: list[ShardEntry]) -> SplitEntry:
    return SplitEntry(
        sum(s.users for s in shards),
        sum(s.interactions for s in shards),
        sum(s.heldout for s in shards),
        shards,
    )


def check_unique_keys(data: Interactions, plan: Plan) -> None:
    """ValueError where two users, or two items of the vocabulary, have the same key."""
    items = data.item_ids.take(pa.array(plan.vocabulary))
    _check_keys("item", items, keys_of_ids(items))
    users = data.user_ids.take(pa.array(np.unique(np.concatenate(list(plan.users.values())))))
    _check_keys("user", users, keys_of_ids(users))


def _check_keys(kind: str, ids: pa.Array, keys: np.ndarray) -> None:
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(same):
        one, other = (ids[int(order[same[0] + i])].as_py() for i in (0, 1))
        raise ValueError(
            f"{kind} ids {one!r} and {other!r} have the same 64-bit key; rename one of "
            "them in the input"
        )


def write_folder(
    folder: Path,
    data: Interactions,
    plan: Plan,
    titles: dict[Any, str] | None,
    users_per_shard: int,
    preparation: dict[str, Any],
    write: Callable[[str, int], SplitEntry],
) -> Manifest:
    """Fill `folder` and return the manifest, which is written last.

    `write` writes the tars of a split, of so many users each.
    """
    item_ids = data.item_ids.take(pa.array(plan.vocabulary))
    item_keys, user_keys = keys_of_ids(item_ids), keys_of_ids(data.user_ids)
    splits = {split: write(split, users_per_shard) for split in SPLITS}
    items: dict[str, Any] = {
        "item": np.arange(len(plan.vocabulary), dtype=np.int32),
        "id": item_ids,
        "key": item_keys,
        "popularity": plan.popularity,
    }
    if titles:
        items["title"] = pa.array([titles.get(i) for i in item_ids.to_pylist()], pa.string())
    pq.write_table(pa.table(items), folder / ITEMS_FILE)
    for split in SPLITS:
        users = plan.users[split]
        pq.write_table(
            pa.table({"key": user_keys[users], "id": data.user_ids.take(pa.array(users))}),
            folder / users_file(split),
        )
    files = {
        name: sha256_of((folder / name).read_bytes())
        for name in (ITEMS_FILE, *map(users_file, SPLITS))
    }
    manifest = Manifest(
        len(plan.vocabulary), vocabulary_sha256(item_keys), splits, files, preparation
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest
