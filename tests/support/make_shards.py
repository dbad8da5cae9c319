"""Writes small shard folders for tests, straight through dist_vasp.data.block (no data_tools)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

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
from dist_vasp.data.rows import Rows, indptr_of

Row = Sequence[int] | np.ndarray


def _csr(rows: Sequence[Row]) -> Rows:
    items = np.concatenate(
        [np.empty(0, np.int32), *(np.sort(np.asarray(r, np.int32)) for r in rows)]
    )
    return Rows(indptr_of(np.array([len(r) for r in rows], np.int64)), items)


def make_block(
    keys: np.ndarray, rows: Sequence[Row], heldout: Sequence[Row] | None = None
) -> Block:
    """A block of users from lists of item rows."""
    return Block(keys, _csr(rows), None if heldout is None else _csr(heldout))


def _write_split(
    folder: Path, split: str, block: Block, users_per_shard: int, users_per_block: int
) -> SplitEntry:
    shards = []
    for index, first in enumerate(range(0, block.n_users, users_per_shard)):
        path = folder / shard_name(split, index)
        last = min(first + users_per_shard, block.n_users)
        with webdataset.TarWriter(str(path)) as writer:
            for start in range(first, last, users_per_block):
                piece = _slice(block, start, min(start + users_per_block, last))
                writer.write(encode_block(f"{start:08d}", piece))
        whole = _slice(block, first, last)
        data = path.read_bytes()
        n_interactions = len(whole.rows.items)
        shards.append(
            ShardEntry(
                path.name,
                whole.n_users,
                n_interactions,
                whole.n_held_out,
                len(data),
                sha256_of(data),
            )
        )
    return SplitEntry(block.n_users, len(block.rows.items), block.n_held_out, shards)


def _slice(block: Block, start: int, stop: int) -> Block:
    held_out = None if block.held_out is None else block.held_out.slice(start, stop)
    return Block(block.user_keys[start:stop], block.rows.slice(start, stop), held_out)


def write_folder(
    path: str | Path,
    train: Sequence[Row],
    validation: Sequence[tuple[Row, Row]] = (),
    test: Sequence[tuple[Row, Row]] = (),
    n_items: int | None = None,
    users_per_shard: int = 16,
    users_per_block: int = 8,
    item_ids: Sequence[int] | None = None,
) -> Manifest:
    """Write a complete data folder: train rows, (fold_in, held_out) rows, item ids (default: 1000 +
    item row) as integers.

    User keys count from 1 over train, validation, test. n_items defaults to the largest item row +
    1. Returns the manifest, which is also on disk.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    everything = [*train, *(r for pair in (*validation, *test) for r in pair)]
    if n_items is None:
        n_items = max((int(max(r)) + 1 for r in everything if len(r)), default=1)
    ids = pa.array(
        np.arange(n_items, dtype=np.int64) + 1000
        if item_ids is None
        else np.asarray(item_ids, np.int64)
    )
    item_keys = keys_of_ids(ids)
    popularity = np.bincount(_csr(train).items, minlength=n_items).astype(np.int64)
    columns = {
        "item": np.arange(n_items, dtype=np.int64),
        "id": ids,
        "key": item_keys,
        "popularity": popularity,
    }
    pq.write_table(pa.table(columns), folder / ITEMS_FILE)

    splits, next_key = {}, 1
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        keys = np.arange(next_key, next_key + len(rows), dtype=np.uint64)
        next_key += len(rows)
        heldout = None if split == "train" else [r[1] for r in rows]
        block = make_block(keys, rows if split == "train" else [r[0] for r in rows], heldout)
        splits[split] = _write_split(folder, split, block, users_per_shard, users_per_block)
        pq.write_table(
            pa.table({"key": keys, "id": keys.astype(np.int64)}), folder / users_file(split)
        )
    files = {
        name: sha256_of((folder / name).read_bytes())
        for name in (ITEMS_FILE, *map(users_file, SPLITS))
    }
    manifest = Manifest(
        n_items, vocabulary_sha256(item_keys), splits, files, {"protocol": "made for a test"}
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest
