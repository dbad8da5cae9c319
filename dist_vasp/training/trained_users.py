"""Which users a run's weights have seen: trained-users.parquet of its folder.

A new run that starts from another one (`--init_from`) has seen the users of both. So a held-out
user whom the weights were trained on is found, also when the earlier shards are gone.

Shapes: U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp.checkpoint.header import Header
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.users import read_users
from dist_vasp.files import replacing

FILE = "trained-users.parquet"
_TRAINING_USERS_ARE_HELD_OUT = ("given", "time", "last")  # protocols in which every user trains
_KIND = b"ids"  # of the file's metadata: integer or text


@dataclass(frozen=True)
class Users:
    """Keys of users, as the data folder has them."""

    keys: np.ndarray  # (U,) uint64
    of_integers: bool
    """Whether the ids are integers, which are their own keys."""

    @staticmethod
    def of_split(folder: str | Path, split: str, manifest: Manifest) -> Users:
        """Read the users of a split; ValueError where their file is not the manifest's."""
        keys, ids = read_users(folder, split, manifest)
        return Users(keys, pa.types.is_integer(ids.type))

    def as_text(self) -> Users:
        """Return the users with the keys that their ids have as text."""
        if not self.of_integers:
            return self
        return Users(keys_of_ids(pa.array(self.keys.astype(np.int64)).cast(pa.string())), False)

    def n_in(self, others: Users) -> int:
        """Return how many of these users are among `others`."""
        mine, theirs = self, others
        if mine.of_integers != theirs.of_integers:
            mine, theirs = mine.as_text(), theirs.as_text()
        return int(np.isin(mine.keys, theirs.keys).sum())

    def and_(self, others: Users) -> Users:
        """Return the users of both."""
        mine, theirs = self, others
        if mine.of_integers != theirs.of_integers:
            mine, theirs = mine.as_text(), theirs.as_text()
        return Users(np.union1d(mine.keys, theirs.keys), mine.of_integers)


def write_trained_users(folder: Path, users: Users, remedy: str) -> None:
    """Write the users that the weights of a run will have seen into its folder; ValueError where
    that fails."""
    table = pa.table({"key": users.keys}).replace_schema_metadata(
        {_KIND: b"integer" if users.of_integers else b"text"}
    )
    with replacing(folder / FILE, remedy) as handle:
        pq.write_table(table, handle)


def read_trained_users(run: str | Path, header: Header) -> Users | None:
    """Return the users that the weights of `run` have seen; None where that is not known.

    `header`: of a checkpoint of the run. A run of an earlier version has no such file; then its
    shards are read, if they are still there. ValueError where the file is damaged.
    """
    path = Path(run) / FILE
    if path.is_file():
        try:
            table = pq.read_table(path, columns=["key"])
            kind = (table.schema.metadata or {})[_KIND]
            keys = np.asarray(table.column("key").combine_chunks().cast(pa.uint64()))
            return Users(keys, kind == b"integer")
        except (OSError, KeyError, pa.ArrowException) as error:
            raise ValueError(
                f"{path} cannot be read as the users of a run ({error}); restore it"
            ) from None
    places = [str(header.config.get("data", {}).get("shards", ""))]
    if header.shards_from_run:
        places.append(str(Path(run) / header.shards_from_run))
    for place in filter(None, places):
        try:
            manifest = Manifest.load(place)
            if manifest.shards_sha256 == header.shards_sha256:
                return Users.of_split(place, "train", manifest)
        except ValueError:
            continue
    return None


def check_held_out(
    run: str, header: Header, seen: Users | None, shards: str, manifest: Manifest, allowed: bool
) -> str:
    """Return a remark on the held-out users of `shards` that the weights of `run` have seen, "" if
    there is none.

    seen: the users that they have seen, None where that is not known. ValueError where some are
    held out, unless `allowed`.
    """
    protocol = manifest.preparation.get("protocol")
    if protocol in _TRAINING_USERS_ARE_HELD_OUT:
        if header.data_sha256 == manifest.data_sha256:
            return ""
        return (
            f"--init_from {run}: whether its model has seen held-out interactions of {shards} is "
            f"not known, because in protocol {protocol} every user trains"
        )
    if seen is None:
        return (
            f"--init_from {run}: which users it was trained on is not known (an earlier version "
            f"trained it, and its shards are gone), so nothing tells whether it has seen held-out "
            f"users of {shards}"
        )
    counts = {
        split: Users.of_split(shards, split, manifest).n_in(seen)
        for split in ("validation", "test")
    }
    n_seen = sum(counts.values())
    if not n_seen:
        return ""
    n_users = sum(manifest.splits[split].users for split in counts)
    told = (
        f"--init_from {run}: its model was trained on {n_seen:,} of the {n_users:,} held-out users "
        f"of {shards} ({counts['validation']:,} validation, {counts['test']:,} test)"
    )
    if allowed:
        return f"{told}; their metrics are too high (--allow_leak)"
    raise ValueError(
        f"{told}, whose metrics would be too high; shard again with --like and the earlier shards, "
        "or pass --allow_leak"
    )
