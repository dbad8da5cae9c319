"""One shard: the sorted rows of its users in, one tar and one row of the manifest out.

Nothing here knows which engine sorted the rows. The same users and plan give the same bytes.

Shapes: B users of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.interactions import Interactions, Store, read_block
from data_tools.plan import BlockMaker, Plan
from dist_vasp.data.block import Block, encode_block
from dist_vasp.data.manifest import ShardEntry, shard_name

MAX_USERS_PER_BLOCK = 4096


@dataclass(frozen=True)
class Shard:
    """The users of one shard in order, and where their interactions lie in the store."""

    split: str
    index: int
    keys: np.ndarray  # (B,) uint64
    starts: np.ndarray  # (B,) int64
    sizes: np.ndarray  # (B,) int64

    @property
    def name(self) -> str:
        return shard_name(self.split, self.index)

    def blocks(self, store: Store, make: BlockMaker) -> Iterator[Block]:
        """Yield the users in blocks of at most 4,096."""
        for first in range(0, len(self.keys), MAX_USERS_PER_BLOCK):
            part = slice(first, first + MAX_USERS_PER_BLOCK)
            keys = self.keys[part]
            block = read_block(store, np.arange(len(keys)), self.starts[part], self.sizes[part])
            yield make(block, keys)


def shards_of(data: Interactions, plan: Plan, split: str, users_per_shard: int) -> Iterator[Shard]:
    """Yield the shards of a split."""
    users = plan.users[split]
    for index, first in enumerate(range(0, len(users), users_per_shard)):
        of_shard = users[first : first + users_per_shard]
        keys, starts, sizes = plan.user_keys, data.starts, data.sizes
        yield Shard(split, index, keys[of_shard], starts[of_shard], sizes[of_shard])


def write_shard(path: Path, shard: Shard, store: Store, make: BlockMaker) -> ShardEntry:
    """Write a shard to `path` and return its row of the manifest."""
    from webdataset import TarWriter  # it imports torch, which takes seconds

    with open(path, "wb") as raw:
        file = _HashedFile(raw)
        with TarWriter(file, encoder=False, compress=False, mtime=0) as tar:

            def write(number: int, block: Block) -> None:
                tar.write(encode_block(f"{shard.split}-{shard.index:06d}-{number:03d}", block))

            counted = _counted(shard, store, make, write)
    return replace(counted, bytes=file.bytes, sha256=file.sha256())


def count_shard(shard: Shard, store: Store, make: BlockMaker) -> ShardEntry:
    """Return what `write_shard` would, without the size and checksum of the tar."""
    return _counted(shard, store, make, lambda number, block: None)


def _counted(
    shard: Shard, store: Store, make: BlockMaker, write: Callable[[int, Block], None]
) -> ShardEntry:
    """Pass each block with its number to `write`; return the counts of all."""
    users = interactions = heldout = 0
    for number, block in enumerate(shard.blocks(store, make)):
        write(number, block)
        users += block.n_users
        interactions += len(block.rows.items)
        heldout += block.n_held_out
    return ShardEntry(shard.name, users, interactions, heldout, 0, "")


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
