"""Write a plan as a data folder: tars, items.parquet, users-*.parquet and, last, manifest.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset import TarWriter

from data_tools.interactions import Interactions
from data_tools.plan import Plan
from dist_vasp.data.block import Block, encode_block
from dist_vasp.data.hashing import keys_of_ids, sha256_of, vocabulary_sha256
from dist_vasp.data.manifest import (
    ITEMS_FILE,
    MANIFEST,
    SPLITS,
    Manifest,
    ShardEntry,
    SplitEntry,
    shard_name,
    users_file,
)
from dist_vasp.progress import Progress

MAX_USERS_PER_BLOCK = 4096


class _HashedFile:
    """A binary file that computes the SHA-256 of what is written to it."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def _blocks_by_shard(plan: Plan, split: str, users_per_shard: int) -> Iterator[tuple[int, Block]]:
    """Return pairs (shard index, block): blocks of at most 4,096 users of one shard each."""
    n_users = len(plan.users[split])
    shards, sizes = [], []
    for index, first in enumerate(range(0, n_users, users_per_shard)):
        last = min(first + users_per_shard, n_users)
        cuts = range(first, last, MAX_USERS_PER_BLOCK)
        shards += [index] * len(cuts)
        sizes += [min(MAX_USERS_PER_BLOCK, last - cut) for cut in cuts]
    return zip(shards, plan.blocks(split, sizes), strict=True)


def write_split(folder: Path, plan: Plan, split: str, users_per_shard: int) -> SplitEntry:
    """Write the tars of one split. The same plan gives the same bytes."""
    entries: list[ShardEntry] = []
    with Progress(f"writing {split}", len(plan.users[split]), "user", brief=True) as progress:
        for index, blocks in groupby(
            _blocks_by_shard(plan, split, users_per_shard), key=lambda pair: pair[0]
        ):
            name = shard_name(split, index)
            users = interactions = heldout = 0
            with open(folder / name, "wb") as raw:
                file = _HashedFile(raw)
                with TarWriter(file, encoder=False, compress=False, mtime=0) as tar:
                    for number, (_, block) in enumerate(blocks):
                        tar.write(encode_block(f"{split}-{index:06d}-{number:03d}", block))
                        users += block.n_users
                        interactions += len(block.rows.items)
                        heldout += block.n_held_out
                        progress.add(block.n_users)
            entries.append(
                ShardEntry(name, users, interactions, heldout, file.bytes, file.sha256())
            )
    return split_entry(entries)


def count_split(plan: Plan, split: str, users_per_shard: int) -> SplitEntry:
    """Return what `write_split` would, without the sizes and checksums of the tars."""
    entries = []
    for index, pairs in groupby(
        _blocks_by_shard(plan, split, users_per_shard), key=lambda pair: pair[0]
    ):
        blocks = [(block.n_users, len(block.rows.items), block.n_held_out) for _, block in pairs]
        users, interactions, heldout = (sum(column) for column in zip(*blocks, strict=True))
        entries.append(ShardEntry(shard_name(split, index), users, interactions, heldout, 0, ""))
    return split_entry(entries)


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
) -> Manifest:
    """Fill `folder` and return the manifest, which is written last."""
    item_ids = data.item_ids.take(pa.array(plan.vocabulary))
    item_keys, user_keys = keys_of_ids(item_ids), keys_of_ids(data.user_ids)
    splits = {split: write_split(folder, plan, split, users_per_shard) for split in SPLITS}
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
