"""Check a data folder against its own manifest, and report every fault.

    python -m data_tools.verify OUT_DIR

Exit status 0 and one line if the folder is sound, otherwise 2 and one line for each fault.

Shapes: U users of a shard, V items of the vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools import cli
from dist_vasp import command_line
from dist_vasp.data.block import Block
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.items import ItemTable, load_items
from dist_vasp.data.manifest import ITEMS_FILE, MANIFEST, SPLITS, Manifest, users_file
from dist_vasp.data.shard import read_shard
from dist_vasp.progress import Progress
from dist_vasp.text import one_line

MAX_EXAMPLES = 3


@dataclass
class _Seen:
    """What the shards of one split hold: user keys in order, and the count of each item row."""

    keys: list[np.ndarray] = field(default_factory=list)
    popularity: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    is_complete: bool = True  # every shard could be read


def faults(folder: Path) -> Iterator[str]:
    """Yield every fault of a data folder, one line each."""
    try:
        manifest = Manifest.load(folder)
    except ValueError as error:
        yield str(error)
        return
    yield from _foreign_files(folder, manifest)
    yield from _changed_files(folder, manifest)
    items: ItemTable | None = None
    try:
        items = load_items(folder, manifest)
    except ValueError as error:
        yield str(error)
    seen = {}
    n_users = sum(split.users for split in manifest.splits.values())
    with Progress("verifying", n_users, "user", brief=True) as progress:
        for split in SPLITS:
            # the length of the file, because the manifest's number may be absurd
            known = len(items.ids) if items is not None else 0
            seen[split] = _Seen(popularity=np.zeros(known, np.int64))
            yield from _shards(folder, manifest, split, seen[split], progress)
    if items is not None:
        yield from _vocabulary(folder / ITEMS_FILE, items, seen["train"])
    for split in SPLITS:
        yield from _users(folder / users_file(split), split, seen[split])
    yield from _across_splits(manifest, seen)


def _foreign_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    listed = {
        MANIFEST,
        *manifest.files,
        *(shard.name for split in manifest.splits.values() for shard in split.shards),
    }
    for path in sorted(folder.iterdir()):
        if path.name not in listed:
            yield f"{path}: {MANIFEST} does not list it; remove it"


def _changed_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    expected = {ITEMS_FILE, *map(users_file, SPLITS)}
    for name in sorted(expected - set(manifest.files)):
        yield f"{folder / MANIFEST}: it lists no SHA-256 of {name}"
    for name in sorted(set(manifest.files) - expected):
        yield f"{folder / MANIFEST}: it lists {name!r}, which is no file of this format"
    for name in sorted(expected & set(manifest.files)):
        try:
            with open(folder / name, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            yield f"{folder / name}: cannot be read ({error.strerror}); {MANIFEST} lists it"
            continue
        if actual != manifest.files[name]:
            yield (
                f"{folder / name}: SHA-256 is {actual[:12]}..., {MANIFEST} says "
                f"{manifest.files[name][:12]}..."
            )


def _shards(
    folder: Path, manifest: Manifest, split: str, seen: _Seen, progress: Progress
) -> Iterator[str]:
    for entry in manifest.splits[split].shards:
        progress.add(entry.users)
        try:
            block = read_shard(folder, split, entry, manifest.n_items, manifest.keeps_ratings)
        except ValueError as error:
            seen.is_complete = False
            yield str(error)
            continue
        if entry.users == 0:
            yield f"{folder / entry.name}: it holds no users"
        seen.keys.append(block.user_keys)
        if len(seen.popularity):
            seen.popularity += np.bincount(block.rows.items, minlength=manifest.n_items)
        overlap = _users_with_overlap(block)
        if len(overlap):
            yield (
                f"{folder / entry.name}: fold-in and held-out items of {_some('user', overlap)} "
                "overlap"
            )


def _users_with_overlap(block: Block) -> np.ndarray:
    """Return the keys of users who have an item both in the fold-in and held out."""
    if block.held_out is None:
        return np.empty(0, np.uint64)
    n_items = 1 + int(max(block.rows.items.max(initial=0), block.held_out.items.max(initial=0)))
    fold_in, held_out = (
        rows.row_of * n_items + rows.items for rows in (block.rows, block.held_out)
    )
    return block.user_keys[np.unique(np.intersect1d(fold_in, held_out) // n_items)]


def _vocabulary(path: Path, items: ItemTable, train: _Seen) -> Iterator[str]:
    yield from _ids_and_keys(path, "item", items.ids, items.keys)
    rank = np.empty(len(items.ids), np.int64)
    rank[np.asarray(pc.array_sort_indices(items.ids))] = np.arange(len(items.ids))
    steps = np.diff(items.popularity)
    wrong = np.flatnonzero((steps > 0) | ((steps == 0) & (np.diff(rank) <= 0)))
    if len(wrong):
        yield (
            f"{path}: items are not by descending popularity with ties by ascending id, first at "
            f"row {wrong[0] + 1}"
        )
    if train.is_complete:
        differ = np.flatnonzero(items.popularity != train.popularity)
        if len(differ):
            row = differ[0]
            yield (
                f"{path}: popularity of {len(differ)} items differs from the train shards, first "
                f"at row {row}: "
                f"{items.popularity[row]} here, {train.popularity[row]} there"
            )


def _users(path: Path, split: str, seen: _Seen) -> Iterator[str]:
    try:
        table = pq.read_table(path, columns=["key", "id"])
        table.validate(full=True)
        if not pa.types.is_integer(table["key"].type) or table["key"].null_count:
            raise ValueError(f"keys are {table['key'].type} with {table['key'].null_count} missing")
        keys, ids = np.asarray(table["key"]).astype(np.uint64), table["id"].combine_chunks()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        yield f"{path}: cannot be read as the users of {split} (columns key, id): {error}"
        return
    yield from _ids_and_keys(path, "user", ids, keys)
    in_shards = np.concatenate([np.empty(0, np.uint64), *seen.keys])
    if seen.is_complete and not np.array_equal(keys, in_shards):
        if len(keys) != len(in_shards):
            yield f"{path}: it lists {len(keys)} users, the {split} shards hold {len(in_shards)}"
        elif np.array_equal(np.sort(keys), np.sort(in_shards)):
            yield f"{path}: its users are those of the {split} shards, in another order"
        else:
            yield (
                f"{path}: the {split} shards hold {_some('user', np.setdiff1d(in_shards, keys))}, "
                "which it does not list"
            )
    repeated = _repeated(in_shards)
    if len(repeated):
        yield f"{path.parent}: {_some('user', repeated)} is in the {split} shards more than once"


def _ids_and_keys(path: Path, kind: str, ids: pa.Array, keys: np.ndarray) -> Iterator[str]:
    if (
        not (
            pa.types.is_int64(ids.type)
            or pa.types.is_string(ids.type)
            or pa.types.is_large_string(ids.type)
        )
        or ids.null_count
    ):
        yield (
            f"{path}: {kind} ids are {ids.type} with {ids.null_count} missing; expected int64 or "
            "string, none missing"
        )
        return
    if pc.count_distinct(ids).as_py() != len(ids):
        yield f"{path}: some {kind} id is listed more than once"
    wrong = np.flatnonzero(keys_of_ids(ids) != keys)
    if len(wrong):
        yield (
            f"{path}: the key of {len(wrong)} {kind} ids does not belong to the id, first at row "
            f"{wrong[0]}"
        )


def _across_splits(manifest: Manifest, seen: dict[str, _Seen]) -> Iterator[str]:
    """Check the users across splits.

    In `liang` and `hashed` no user is in two splits; in `given`, `time` and `last` every held-out
    user is a train user.
    """
    users = {split: np.concatenate([np.empty(0, np.uint64), *s.keys]) for split, s in seen.items()}
    if manifest.preparation.get("protocol") in ("given", "time", "last"):
        for split in ("validation", "test"):
            strangers = np.setdiff1d(users[split], users["train"])
            if seen["train"].is_complete and len(strangers):
                yield (
                    f"{split} shards hold {_some('user', strangers)} without a row in the train "
                    "shards"
                )
        return
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            both = np.intersect1d(users[one], users[other])
            if len(both):
                yield f"{one} and {other} shards share {_some('user', both)}"


def _repeated(keys: np.ndarray) -> np.ndarray:
    values, counts = np.unique(keys, return_counts=True)
    return values[counts > 1]


def _some(kind: str, keys: np.ndarray) -> str:
    """Return a text such as `2 users (keys 5, 9)`, with a few examples."""
    examples = ", ".join(str(k) for k in keys[:MAX_EXAMPLES]) + (
        ", ..." if len(keys) > MAX_EXAMPLES else ""
    )
    return (
        f"{len(keys)} {kind}{'s' if len(keys) != 1 else ''} (key{'s' if len(keys) != 1 else ''} "
        f"{examples})"
    )


def _command(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise ValueError(
            f"{args.folder} is not a folder; pass one that `python -m data_tools.shard` wrote"
        )
    n_faults = 0
    for fault in faults(args.folder):
        n_faults += 1
        print("error: " + one_line(fault), file=sys.stderr)
    if n_faults:
        return 2
    manifest = Manifest.load(args.folder)
    users = ", ".join(f"{split.users:,} {name}" for name, split in manifest.splits.items())
    shards = sum(len(split.shards) for split in manifest.splits.values())
    print(f"{args.folder}: sound; {users} users, {manifest.n_items:,} items, {shards} shards")
    return 0


def parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog=command_line.program("verify", "python -m data_tools.{}"),
        description="Check a data folder; name every fault.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="OUT_DIR",
        help="written by `dist-vasp shard`, also as --shards OUT_DIR",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), _command, argv, last_word="--shards")


if __name__ == "__main__":
    sys.exit(main())
