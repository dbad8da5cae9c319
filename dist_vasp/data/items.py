"""Read the item table of a data folder, `items.parquet`, and check it against the vocabulary.

Shapes: I items of the vocabulary.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp.data.hashing import keys_of_ids, vocabulary_sha256
from dist_vasp.data.manifest import ITEMS_FILE, MANIFEST, Manifest

_RESTORE_ITEMS = (
    "restore it from a copy: a data folder, its runs and their exports hold the same file"
)


@dataclass(frozen=True)
class ItemTable:
    """items.parquet: original ids, keys and training popularity by item row."""

    ids: pa.Array  # (I,) int64 or string
    keys: np.ndarray  # (I,) uint64
    popularity: np.ndarray  # (I,) int64
    titles: pa.Array | None = None  # (I,) string


def load_items(folder: str | Path, manifest: Manifest) -> ItemTable:
    """Read items.parquet of a data folder; ValueError where it differs from the manifest."""
    path = Path(folder) / ITEMS_FILE
    try:
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); shard the data again"
        ) from None
    if digest != manifest.files.get(ITEMS_FILE):
        # the likelier mistake is a file of another preparation
        _check_length(path, manifest.n_items, manifest.vocabulary_sha256)
        listed = manifest.files.get(ITEMS_FILE, "nothing")[:12]
        raise ValueError(
            f"{path} has SHA-256 {digest[:12]}..., {MANIFEST} says {listed}...: "
            "it was damaged or replaced; restore it or shard the data again"
        )
    return read_items_file(path, manifest.n_items, manifest.vocabulary_sha256)


def read_items_file(
    path: Path, n_items: int, expected_sha256: str, source: Path | None = None
) -> ItemTable:
    """Read an items.parquet; ValueError unless it holds the vocabulary with this hash.

    `source`: the file of which it is a copy, which the error names instead.
    """
    if source is not None:
        try:
            return read_items_file(path, n_items, expected_sha256)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), str(source))) from None
    _check_length(path, n_items, expected_sha256)
    try:
        table = pq.read_table(path)
        _check_item_columns(table)
        columns = {
            name: table.column(name).combine_chunks()
            for name in ("item", "id", "key", "popularity")
        }
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read as the item table ({_reason(error)}); {_RESTORE_ITEMS}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_RESTORE_ITEMS}") from None
    rows, keys = np.asarray(columns["item"]), np.asarray(columns["key"]).astype(np.uint64)
    if not np.array_equal(rows, np.arange(n_items)) or vocabulary_sha256(keys) != expected_sha256:
        raise ValueError(
            (
                f"{path} lists {len(rows)} items whose vocabulary hash is "
                f"{vocabulary_sha256(keys)[:12]}..., "
            )
            + _another_preparation(n_items, expected_sha256)
        )
    if not np.array_equal(keys_of_ids(columns["id"]), keys):  # the hash covers only the keys
        raise ValueError(f"{path}: the keys do not belong to the ids; {_RESTORE_ITEMS}")
    titles = table.column("title").combine_chunks() if "title" in table.column_names else None
    return ItemTable(columns["id"], keys, np.asarray(columns["popularity"]), titles)


def _check_length(path: Path, n_items: int, expected_sha256: str) -> None:
    """ValueError unless the file has `n_items` rows; only its footer is read."""
    try:
        n_rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read as the item table ({_reason(error)}); {_RESTORE_ITEMS}"
        ) from None
    if n_rows != n_items:
        raise ValueError(
            f"{path} lists {n_rows} items of another vocabulary, "
            + _another_preparation(n_items, expected_sha256)
        )


def _reason(error: Exception) -> str:
    """Return the reason of an error, without the path that Arrow repeats."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _another_preparation(n_items: int, expected_sha256: str) -> str:
    wanted = f"expected {n_items} items and {expected_sha256[:12]}..."
    return f"{wanted}: it comes from another preparation; {_RESTORE_ITEMS}"


def _check_item_columns(table: pa.Table) -> None:
    """ValueError for a wrong type or a missing value, KeyError for a missing column.

    Titles may be missing.
    """
    table.validate(full=True)
    for name in ("item", "id", "key", "popularity"):
        column = table.column(name)
        text = name == "id" and (
            pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        )
        if column.null_count or not (pa.types.is_integer(column.type) or text):
            raise ValueError(
                f"column {name} is {column.type} with {column.null_count} missing, expected "
                "integers, none missing"
            )
    if "title" in table.column_names and not pa.types.is_string(table.column("title").type):
        raise ValueError(f"column title is {table.column('title').type}, expected string")
