"""A block of users, and how it is stored as one sample of a WebDataset tar.

A sample holds numpy arrays: `user_keys`, `indptr` and `items`; in validation and test also
`heldout_indptr` and `heldout_items`. Shards that keep ratings have `values`, and `heldout_values`,
beside the items. Nothing is unpickled.

Shapes: U users of a block, E interactions of a block.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dist_vasp.data.rows import Rows, concatenate_rows

_DTYPES: dict[str, np.dtype[Any]] = {
    "user_keys": np.dtype("<u8"),
    "indptr": np.dtype("<i8"),
    "items": np.dtype("<i4"),
    "heldout_indptr": np.dtype("<i8"),
    "heldout_items": np.dtype("<i4"),
    "values": np.dtype("<f4"),
    "heldout_values": np.dtype("<f4"),
}
_TRAIN_MEMBERS = ("user_keys", "indptr", "items")
_HELD_OUT_MEMBERS = (*_TRAIN_MEMBERS, "heldout_indptr", "heldout_items")


@dataclass(frozen=True)
class Block:
    """Users and their items, as rows of items.parquet.

    In validation and test `rows` are the fold-in and `held_out` the target. Train blocks have no
    held-out items (None).
    """

    user_keys: np.ndarray  # (U,) uint64
    rows: Rows  # U rows
    held_out: Rows | None = None  # U rows

    @property
    def n_users(self) -> int:
        return len(self.user_keys)

    @property
    def n_held_out(self) -> int:
        """The number of held-out interactions."""
        return 0 if self.held_out is None else len(self.held_out.items)

    def without_ratings(self) -> Block:
        """Return the block with interactions alone."""
        held_out = None if self.held_out is None else replace(self.held_out, values=None)
        return Block(self.user_keys, replace(self.rows, values=None), held_out)

    def check(self, n_items: int, where: str) -> None:
        """Raise ValueError, naming `where`, unless this is a legal block over `n_items` items."""
        self.rows.check(self.n_users, n_items, f"{where}: items")
        if self.held_out is not None:
            self.held_out.check(self.n_users, n_items, f"{where}: heldout_items")


def concatenate(blocks: Iterable[Block]) -> Block:
    """Return one block of all the users of `blocks`, in order."""
    blocks = list(blocks)
    if len(blocks) == 1:
        return blocks[0]
    held_out = [block.held_out for block in blocks if block.held_out is not None]
    return Block(
        np.concatenate([np.empty(0, np.uint64), *(block.user_keys for block in blocks)]),
        concatenate_rows([block.rows for block in blocks]),
        concatenate_rows(held_out) if held_out else None,
    )


def encode_block(key: str, block: Block) -> dict[str, Any]:
    """Return the sample that `webdataset.TarWriter.write` takes, with the members
    `KEY.user_keys.npy`, `KEY.indptr.npy`, ..."""
    arrays = {
        "user_keys": block.user_keys,
        "indptr": block.rows.indptr,
        "items": block.rows.items,
    }
    if block.rows.values is not None:
        arrays["values"] = block.rows.values
    if block.held_out is not None:
        arrays["heldout_indptr"] = block.held_out.indptr
        arrays["heldout_items"] = block.held_out.items
        if block.held_out.values is not None:
            arrays["heldout_values"] = block.held_out.values
    sample: dict[str, Any] = {"__key__": key}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array, dtype=_DTYPES[name]), allow_pickle=False)
        sample[f"{name}.npy"] = buffer.getvalue()
    return sample


def decode_sample(sample: dict[str, Any], split: str, n_items: int, where: str) -> Block:
    """Return the block in one WebDataset sample, with ratings where it keeps them.

    ValueError names `where` and the member that is missing, unexpected or malformed.
    """
    names: tuple[str, ...] = _TRAIN_MEMBERS if split == "train" else _HELD_OUT_MEMBERS
    members = {k for k in sample if not k.startswith("__")}
    if "values.npy" in members:
        names += ("values",) if split == "train" else ("values", "heldout_values")
    expected = {f"{name}.npy" for name in names}
    if members != expected:
        extra, missing = sorted(members - expected), sorted(expected - members)
        raise ValueError(
            f"{where}: unexpected members {extra}, missing members {missing}; a {split} sample has "
            f"{sorted(expected)}"
        )
    arrays = {name: _decode_array(name, sample[f"{name}.npy"], where) for name in names}
    held_out = None
    if "heldout_items" in arrays:
        values = arrays.get("heldout_values")
        held_out = Rows(arrays["heldout_indptr"], arrays["heldout_items"], values)
    rows = Rows(arrays["indptr"], arrays["items"], arrays.get("values"))
    block = Block(arrays["user_keys"], rows, held_out)
    block.check(n_items, where)
    return block


def _decode_array(name: str, data: bytes, where: str) -> np.ndarray:
    """Return the one-dimensional array in the bytes of an .npy file.

    ValueError where the header does not describe exactly these bytes.
    """
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
