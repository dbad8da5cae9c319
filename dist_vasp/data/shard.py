"""Read shards: WebDataset tars of blocks of users, as `data_tools.shard` writes them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys

from dist_vasp.data.block import Block, concatenate, decode_sample
from dist_vasp.data.hashing import sha256_of
from dist_vasp.data.manifest import Manifest, ShardEntry


def iterate_shard(data: bytes, split: str, n_items: int, where: str) -> Iterator[Block]:
    """Yield the blocks in the bytes of one tar, in order; ValueError where they cannot be read."""
    try:
        for sample in group_by_keys({**m, "__url__": where} for m in _tar_members(data)):
            yield decode_sample(sample, split, n_items, f"{where}, sample {sample['__key__']}")
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
    except Exception as error:  # tarfile and webdataset raise many kinds on damaged archives
        raise ValueError(
            f"{where}: damaged tar archive ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        ) from None


def _tar_members(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the name and bytes of every member; ValueError for anything but plain files.

    The reader of webdataset is not used: it decompresses, skips links, and fills holes of any size.
    """
    if data[257:262] != b"ustar":
        raise ValueError("not an uncompressed tar archive")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            if not member.isreg() or member.issparse():
                raise ValueError(f"member {member.name!r} is not a plain file")
            stream = archive.extractfile(member)
            assert stream is not None
            body = stream.read(len(data))
            if len(body) != member.size:
                raise ValueError(
                    f"member {member.name!r} says {member.size} bytes, {len(body)} follow"
                )
            yield {"fname": member.name, "data": body}


def check_ratings(folder: str | Path, manifest: Manifest) -> None:
    """Raise ValueError where the shards of a folder keep no ratings."""
    if not manifest.keeps_ratings:
        raise ValueError(
            f"data.ratings is true, but the shards in {folder} keep no ratings; shard the data "
            "with --keep_ratings, or set data.ratings to false"
        )


def read_shard(
    folder: str | Path, split: str, entry: ShardEntry, n_items: int, ratings: bool = False
) -> Block:
    """Return all users of one shard as one block, with their ratings only if asked.

    Its size and SHA-256 are compared with the manifest first. ValueError names the file where it is
    missing, was changed or damaged, or holds anything unexpected.
    """
    path = Path(folder) / entry.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); manifest.json lists it; shard the data "
            "again"
        ) from None
    if len(data) != entry.bytes or sha256_of(data) != entry.sha256:
        raise ValueError(
            f"{path} has {len(data)} bytes and SHA-256 {sha256_of(data)[:12]}..., manifest.json "
            f"says {entry.bytes} bytes and {entry.sha256[:12]}...: it was damaged or replaced; "
            "restore it or shard the data again"
        )
    block = concatenate(iterate_shard(data, split, n_items, str(path)))
    counts = (block.n_users, len(block.rows.items), block.n_held_out)
    if counts != (entry.users, entry.interactions, entry.heldout):
        raise ValueError(
            f"{path} holds {counts[0]} users, {counts[1]} interactions and {counts[2]} held-out "
            f"ones, manifest.json says {entry.users}, {entry.interactions} and {entry.heldout}; "
            "shard the data again"
        )
    if not ratings:
        return block.without_ratings()
    if block.rows.values is None:
        raise ValueError(f"{path} holds no ratings; shard the data again with --keep_ratings")
    return block
