"""The shard format: what data_tools writes and dist_vasp.data.stream reads (DESIGN.md, section 4).

A data folder holds WebDataset tars, `manifest.json`, `items.parquet` and one `users-SPLIT.parquet`
per split. One sample of a tar is a block of users in CSR form, five numpy arrays at most. Nothing
here unpickles.

Shapes: U users of a block, E interactions of a block, I items of the vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.tariterators import group_by_keys

from dist_vasp.bounded_json import LARGEST_MANIFEST, read_json, reason
from dist_vasp.data import positives
from dist_vasp.data.positives import PositiveRule

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
ITEMS_FILE = "items.parquet"
_DTYPES: dict[str, np.dtype[Any]] = {
    "user_keys": np.dtype("<u8"),
    "indptr": np.dtype("<i8"),
    "items": np.dtype("<i4"),
    "heldout_indptr": np.dtype("<i8"),
    "heldout_items": np.dtype("<i4"),
}
_TRAIN_MEMBERS = ("user_keys", "indptr", "items")
_LARGEST_COUNT = 1 << 48  # products with the lanes of an epoch still fit 64 bits


def users_file(split: str) -> str:
    """Name of the file that maps the user keys of `split` to original ids."""
    return f"users-{split}.parquet"


def shard_name(split: str, index: int) -> str:
    """`train-000000.tar`, `train-000001.tar`, ..."""
    return f"{split}-{index:06d}.tar"


# --- blocks of users ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """U users in CSR form.

    `items[indptr[u]:indptr[u + 1]]` are user u's item rows, ascending and without repeats; in validation and test
    they are the fold-in, and `heldout_items` the target. Train blocks have no held-out arrays (None).
    """

    user_keys: np.ndarray  # (U,) uint64
    indptr: np.ndarray  # (U+1,) int64
    items: np.ndarray  # (E,) int32, rows of items.parquet
    heldout_indptr: np.ndarray | None = None  # (U+1,) int64
    heldout_items: np.ndarray | None = None  # int32

    @property
    def n_users(self) -> int:
        return len(self.user_keys)

    def check(self, n_items: int, where: str) -> None:
        """Raise ValueError, naming `where`, unless the arrays form a legal block over `n_items`
        items."""
        if (self.heldout_indptr is None) != (self.heldout_items is None):
            raise ValueError(
                f"{where}: heldout_indptr and heldout_items come together, only one is present"
            )
        _check_csr(self.indptr, self.items, self.n_users, n_items, f"{where}: items")
        if self.heldout_indptr is not None and self.heldout_items is not None:
            _check_csr(
                self.heldout_indptr,
                self.heldout_items,
                self.n_users,
                n_items,
                f"{where}: heldout_items",
            )


def _check_csr(
    indptr: np.ndarray, items: np.ndarray, n_users: int, n_items: int, where: str
) -> None:
    if (
        len(indptr) != n_users + 1
        or indptr[0] != 0
        or indptr[-1] != len(items)
        or (np.diff(indptr) < 0).any()
    ):
        raise ValueError(
            f"{where}: the index pointer does not describe {n_users} users with {len(items)} "
            "interactions"
        )
    if len(items) == 0:
        return
    if items.min() < 0 or items.max() >= n_items:
        raise ValueError(
            f"{where}: item rows go from {items.min()} to {items.max()}, expected 0 to "
            f"{n_items - 1}"
        )
    ascending = np.diff(items) > 0
    starts = indptr[1:-1]
    ascending[starts[(starts > 0) & (starts < len(items))] - 1] = True
    if not ascending.all():
        raise ValueError(f"{where}: a user's item rows are not strictly ascending")


def concatenate(blocks: Iterable[Block]) -> Block:
    """One block of all the users of `blocks`, in order."""
    blocks = list(blocks)
    if len(blocks) == 1:
        return blocks[0]
    has_heldout = bool(blocks) and blocks[0].heldout_indptr is not None
    pointers = [b.heldout_indptr for b in blocks]
    return Block(
        user_keys=np.concatenate([np.empty(0, np.uint64), *(b.user_keys for b in blocks)]),
        indptr=_concatenate_indptr([b.indptr for b in blocks]),
        items=np.concatenate([np.empty(0, np.int32), *(b.items for b in blocks)]),
        heldout_indptr=_concatenate_indptr(pointers) if has_heldout else None,  # type: ignore
        heldout_items=np.concatenate([b.heldout_items for b in blocks]) if has_heldout else None,  # type: ignore[misc]
    )


def _concatenate_indptr(pointers: list[np.ndarray]) -> np.ndarray:
    lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(p) for p in pointers)])
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def encode_block(key: str, block: Block) -> dict[str, Any]:
    """The sample that `webdataset.TarWriter.write` takes: `KEY.user_keys.npy`, `KEY.indptr.npy`,
    ..."""
    sample: dict[str, Any] = {"__key__": key}
    for name, dtype in _DTYPES.items():
        array = getattr(block, name)
        if array is not None:
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array, dtype=dtype), allow_pickle=False)
            sample[f"{name}.npy"] = buffer.getvalue()
    return sample


def _decode_array(name: str, data: bytes, where: str) -> np.ndarray:
    """The one-dimensional array in the bytes of an .npy file; its header is believed only if the
    size agrees."""
    buffer = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(buffer) != (1, 0):
            raise ValueError("expected npy format 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(buffer, max_header_size=1024)
    except Exception as error:
        raise ValueError(f"{where}: {name}.npy is not a readable npy array ({error})") from None
    body = data[buffer.tell() :]
    if dtype != _DTYPES[name] or len(shape) != 1 or len(body) != shape[0] * dtype.itemsize:
        raise ValueError(
            f"{where}: {name}.npy says dtype {dtype} and shape {shape} over {len(body)} bytes, "
            f"expected one dimension of {_DTYPES[name]} that fills them"
        )
    return np.frombuffer(body, dtype=dtype)


def decode_sample(sample: dict[str, Any], split: str, n_items: int, where: str) -> Block:
    """The block in one WebDataset sample; ValueError names `where` and the member that does not
    belong."""
    names = _TRAIN_MEMBERS if split == "train" else tuple(_DTYPES)
    members = {k for k in sample if not k.startswith("__")}
    expected = {f"{name}.npy" for name in names}
    if members != expected:
        extra, missing = sorted(members - expected), sorted(expected - members)
        raise ValueError(
            f"{where}: unexpected members {extra}, missing members {missing}; a {split} sample "
            f"has {sorted(expected)}"
        )
    block = Block(**{name: _decode_array(name, sample[f"{name}.npy"], where) for name in names})
    block.check(n_items, where)
    return block


# --- manifest -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardEntry:
    """One tar: its users, interactions (fold-in) and held-out interactions, size in bytes and
    SHA-256."""

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


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a data folder."""

    n_items: int
    vocabulary_sha256: str
    splits: dict[str, SplitEntry]
    files: dict[str, str]  # SHA-256 of items.parquet and users-*.parquet
    preparation: dict[str, Any]  # protocol, arguments, counts of what was left out
    format_version: int = FORMAT_VERSION

    @property
    def shards_sha256(self) -> str:
        """Identifies the training data: the vocabulary and every training shard, in order."""
        digest = hashlib.sha256(self.vocabulary_sha256.encode())
        for shard in self.splits["train"].shards:
            digest.update(shard.sha256.encode())
        return digest.hexdigest()

    @property
    def positives(self) -> PositiveRule | None:
        """The rule that made the positives; None where the manifest does not say."""
        return positives.of_preparation(self.preparation)

    @property
    def data_sha256(self) -> str:
        """Identifies all of the data: the vocabulary and every shard of every split, in order."""
        digest = hashlib.sha256(self.vocabulary_sha256.encode())
        for split in SPLITS:
            for shard in self.splits[split].shards:
                digest.update(f"{split} {shard.sha256}".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def load(folder: str | Path) -> Manifest:
        """Read `folder/manifest.json`; ValueError if it is missing, malformed or of another format
        version."""
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
    """The names of all files of a data folder.

    ValueError where it is none of ours, so that nothing deletes it.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is not empty and holds no {MANIFEST}, so it was not written by "
            "data_tools.shard: --overwrite does not "
            "delete it; name another output folder, or remove it yourself"
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


# --- reading a shard ------------------------------------------------------------------------------


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def iterate_shard(data: bytes, split: str, n_items: int, where: str) -> Iterator[Block]:
    """The blocks in the bytes of one tar, in order; ValueError where they cannot be read."""
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
    """Name and bytes of every member.

    webdataset's own reader would decompress, skip links and fill holes of any size.
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


def read_shard(folder: str | Path, split: str, entry: ShardEntry, n_items: int) -> Block:
    """All users of one shard as one block, after its size and SHA-256 were compared with the
    manifest.

    Raises ValueError naming the file when it is missing, was changed or damaged, or holds anything
    unexpected.
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
            f"says {entry.bytes} bytes and "
            f"{entry.sha256[:12]}...: it was damaged or replaced; restore it or shard the data "
            "again"
        )
    block = concatenate(iterate_shard(data, split, n_items, str(path)))
    heldout = 0 if block.heldout_items is None else len(block.heldout_items)
    found = (block.n_users, len(block.items), heldout)
    if found != (entry.users, entry.interactions, entry.heldout):
        raise ValueError(
            f"{path} holds {found[0]} users, {found[1]} interactions and {found[2]} held-out ones, "
            f"manifest.json says {entry.users}, {entry.interactions} and {entry.heldout}; shard "
            "the data again"
        )
    return block


# --- ids and keys ---------------------------------------------------------------------------------


def default_users_per_shard(n_train_users: int) -> int:
    return max(1, min(4096, math.ceil(n_train_users / 64)))


def keys_of_ids(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The uint64 key of every id: the id itself where integer, else the first 8 bytes of its
    BLAKE2b digest."""
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.cast(pa.int64())).astype(np.uint64)
    digests = b"".join(
        hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids.to_pylist()
    )
    return np.frombuffer(digests, dtype="<u8").copy()


def vocabulary_sha256(keys: np.ndarray) -> str:
    """Identifies a vocabulary: the item keys in row order. Shape (I,), uint64."""
    return hashlib.sha256(np.ascontiguousarray(keys, dtype="<u8").tobytes()).hexdigest()


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
    """Read items.parquet of a data folder and hold it against the manifest's vocabulary; ValueError
    where they differ."""
    path = Path(folder) / ITEMS_FILE
    try:
        with open(path, "rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); shard the data again"
        ) from None
    if found != manifest.files.get(ITEMS_FILE):
        _check_length(
            path, manifest.n_items, manifest.vocabulary_sha256
        )  # another preparation's file is the likelier mistake
        raise ValueError(
            f"{path} has SHA-256 {found[:12]}..., {MANIFEST} says "
            f"{manifest.files.get(ITEMS_FILE, 'nothing')[:12]}...: "
            "it was damaged or replaced; restore it or shard the data again"
        )
    return read_items_file(path, manifest.n_items, manifest.vocabulary_sha256)


def read_items_file(
    path: Path, n_items: int, expected_sha256: str, source: Path | None = None
) -> ItemTable:
    """Read an items.parquet that must hold the vocabulary with this hash; ValueError where it does
    not.

    `source`: the file that it is a copy of, which the error then names.
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
    if not np.array_equal(
        keys_of_ids(columns["id"]), keys
    ):  # the hash is of the keys: this carries it over to the ids
        raise ValueError(f"{path}: the keys do not belong to the ids; {_RESTORE_ITEMS}")
    titles = table.column("title").combine_chunks() if "title" in table.column_names else None
    return ItemTable(columns["id"], keys, np.asarray(columns["popularity"]), titles)


def _check_length(path: Path, n_items: int, expected_sha256: str) -> None:
    """ValueError unless the file says that it holds `n_items` rows; only its footer is read, and
    nothing of that length made."""
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
    """What went wrong, without the path that Arrow repeats."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _another_preparation(n_items: int, expected_sha256: str) -> str:
    wanted = f"expected {n_items} items and {expected_sha256[:12]}..."
    return f"{wanted}: it comes from another preparation; {_RESTORE_ITEMS}"


def _check_item_columns(table: pa.Table) -> None:
    """Integers and ids, none missing; a title may be. KeyError where a column is."""
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
