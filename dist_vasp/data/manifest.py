"""The manifest of a data folder: what `manifest.json` says, and the names of the other files.

A data folder holds WebDataset tars (`shard.py`), `manifest.json`, `items.parquet` (`items.py`) and
one `users-SPLIT.parquet` per split (DESIGN.md, section 4).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import LARGEST_MANIFEST, read_json, reason
from dist_vasp.data import positives
from dist_vasp.data.positives import PositiveRule

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
ITEMS_FILE = "items.parquet"
_LARGEST_COUNT = 1 << 48  # products with the lanes of an epoch still fit 64 bits


def users_file(split: str) -> str:
    """Return the name of the file that maps the user keys of `split` to original ids."""
    return f"users-{split}.parquet"


def shard_name(split: str, index: int) -> str:
    """Return `train-000000.tar`, `train-000001.tar`, ..."""
    return f"{split}-{index:06d}.tar"


def default_users_per_shard(n_train_users: int) -> int:
    return max(1, min(4096, math.ceil(n_train_users / 64)))


@dataclass(frozen=True)
class ShardEntry:
    """One tar: counts of its users, interactions (fold-in) and held-out interactions, and its
    checksum."""

    name: str
    users: int
    interactions: int
    heldout: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """One split: totals and its shards in order."""

    users: int
    interactions: int
    heldout: int
    shards: list[ShardEntry] = field(default_factory=list)


KEEP_RATINGS = "keep_ratings"  # an argument of data_tools.shard


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    n_items: int
    vocabulary_sha256: str
    splits: dict[str, SplitEntry]
    files: dict[str, str]  # SHA-256 of items.parquet and users-*.parquet
    preparation: dict[str, Any]  # protocol, arguments, counts of what was left out
    format_version: int = FORMAT_VERSION

    @property
    def shards_sha256(self) -> str:
        """A hash of the training data: the vocabulary and every training shard, in order."""
        digest = hashlib.sha256(self.vocabulary_sha256.encode())
        for shard in self.splits["train"].shards:
            digest.update(shard.sha256.encode())
        return digest.hexdigest()

    @property
    def keeps_ratings(self) -> bool:
        """Whether the shards hold the ratings of the interactions."""
        arguments = self.preparation.get("arguments")
        return isinstance(arguments, dict) and arguments.get(KEEP_RATINGS) is True

    @property
    def positives(self) -> PositiveRule | None:
        """The rule that made the positives, None where it is unknown."""
        return positives.of_preparation(self.preparation)

    @property
    def data_sha256(self) -> str:
        """A hash of all data: the vocabulary and every shard of every split, in order."""
        digest = hashlib.sha256(self.vocabulary_sha256.encode())
        for split in SPLITS:
            for shard in self.splits[split].shards:
                digest.update(f"{split} {shard.sha256}".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def load(folder: str | Path) -> Manifest:
        """Read `folder/manifest.json`.

        ValueError if it is missing, malformed or of another format version.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no {MANIFEST}; expected a folder written by `python -m "
                "data_tools.shard`"
            )
        try:
            raw = read_json(path, LARGEST_MANIFEST)
            if raw["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"format_version is {raw['format_version']}, this version reads "
                    f"{FORMAT_VERSION}; shard the data again"
                )
            splits = {name: _split_from_json(name, raw["splits"][name]) for name in SPLITS}
            manifest = Manifest(
                n_items=_count(raw["n_items"]),
                vocabulary_sha256=str(raw["vocabulary_sha256"]),
                splits=splits,
                files={str(k): str(v) for k, v in raw["files"].items()},
                preparation=dict(raw["preparation"]),
            )
            positives.of_preparation(manifest.preparation)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}); correct that, or shard the data again"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a manifest of this project: {reason(error)}") from None
        return manifest


def files_of(folder: Path) -> set[str]:
    """Return the names of all files of a data folder.

    ValueError where data_tools.shard did not write the folder, so that nothing deletes it.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is not empty and holds no {MANIFEST}, so it was not written by "
            "data_tools.shard: "
            "--overwrite does not delete it; name another output folder, or remove it yourself"
        )
    manifest = Manifest.load(folder)
    return {
        MANIFEST,
        *manifest.files,
        *(shard.name for split in manifest.splits.values() for shard in split.shards),
    }


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST_COUNT:
        raise ValueError(f"{value!r:.100} is not a count")
    return value


def _split_from_json(split: str, raw: dict[str, Any]) -> SplitEntry:
    shards = [
        ShardEntry(
            name=str(s["name"]),
            users=_count(s["users"]),
            interactions=_count(s["interactions"]),
            heldout=_count(s["heldout"]),
            bytes=_count(s["bytes"]),
            sha256=str(s["sha256"]),
        )
        for s in raw["shards"]
    ]
    for i, shard in enumerate(shards):
        if shard.name != shard_name(split, i):
            raise ValueError(
                f"shard {i} of {split} is named {shard.name!r}, expected {shard_name(split, i)!r}"
            )
    entry = SplitEntry(
        _count(raw["users"]), _count(raw["interactions"]), _count(raw["heldout"]), shards
    )
    for total in ("users", "interactions", "heldout"):
        if getattr(entry, total) != sum(getattr(s, total) for s in shards):
            raise ValueError(
                f"{split}.{total} is {getattr(entry, total)}, its shards add up to another number"
            )
    return entry
