"""Read the held-out users of a data folder: what the model sees, and what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_vasp.data.block import Block
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows, concatenate_rows
from dist_vasp.data.shard import read_shard


@dataclass(frozen=True)
class EvalBlock:
    """Consecutive held-out users: the model sees `fold_in` and is asked for `held_out`, which may
    be empty."""

    user_keys: np.ndarray  # (U,) uint64
    fold_in: Rows  # U rows
    held_out: Rows  # U rows

    def slice(self, start: int, stop: int) -> EvalBlock:
        """Return the users start to stop."""
        return EvalBlock(
            self.user_keys[start:stop],
            self.fold_in.slice(start, stop),
            self.held_out.slice(start, stop),
        )

    def followed_by(self, other: EvalBlock) -> EvalBlock:
        """Return the users of both blocks, in order."""
        return EvalBlock(
            np.concatenate([self.user_keys, other.user_keys]),
            concatenate_rows([self.fold_in, other.fold_in]),
            concatenate_rows([self.held_out, other.held_out]),
        )


def evaluation_blocks(
    folder: str | Path,
    split: str,
    users_per_block: int,
    start: int = 0,
    stop: int | None = None,
    manifest: Manifest | None = None,
    ratings: bool = False,
) -> Iterator[EvalBlock]:
    """Yield the users start to stop of `split` ("validation" or "test") in order, in blocks of
    `users_per_block`; the last one may hold fewer.

    The blocks do not depend on the shards, and every rank of a partition group iterates the same
    ones. Memory holds one shard and one block. Shards before `start` are not read. `manifest`: one
    that the caller has already read, so that shards replaced since then are an error. With
    `ratings` the rows carry them. ValueError where a shard is damaged or has no ratings.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"split is {split!r}, expected validation or test")
    assert users_per_block >= 1, users_per_block
    manifest = manifest or Manifest.load(folder)
    entry = manifest.splits[split]
    stop = entry.users if stop is None else min(stop, entry.users)
    waiting: EvalBlock | None = None
    position = 0
    for shard in entry.shards:
        first, last = max(start - position, 0), min(stop - position, shard.users)
        position += shard.users
        if first >= last:
            continue
        read = read_shard(folder, split, shard, manifest.n_items, ratings)
        block = _eval_block(read).slice(first, last)
        waiting = block if waiting is None else waiting.followed_by(block)
        n, done = len(waiting.user_keys), 0
        while n - done >= users_per_block:
            yield waiting.slice(done, done + users_per_block)
            done += users_per_block
        waiting = waiting.slice(done, n)
    if waiting is not None and len(waiting.user_keys):
        yield waiting


def _eval_block(block: Block) -> EvalBlock:
    assert block.held_out is not None
    return EvalBlock(block.user_keys, block.rows, block.held_out)
