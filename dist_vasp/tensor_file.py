"""Read and write safetensors files of fp32 and int32 tensors: a length, a JSON header and the raw
numbers.

The header is checked against the file's size before it is used. A file is read through one open
descriptor, so that the bytes that were verified are those that are mapped or copied, even if the
file is renamed meanwhile. The reader of the safetensors library opens files by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dist_vasp.bounded_json import parse_json

MOST_TENSORS = 1 << 16  # of a file
_LARGEST_HEADER = 32 << 20  # bytes
_MOST_DIMENSIONS = 8
_LARGEST_SIZE = 1 << 48
_DTYPES = {"F32": torch.float32, "I32": torch.int32}  # 4 bytes each
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    start: int  # byte in the file
    end: int
    dtype: torch.dtype = torch.float32


def check_dtype(where: str, found: torch.dtype, wanted: torch.dtype) -> None:
    """Raise ValueError where a stored tensor is of another dtype than `wanted`."""
    if found != wanted:
        raise ValueError(
            f"{where} is of dtype {_DTYPE_NAMES[found]}, expected {_DTYPE_NAMES[wanted]}"
        )


class TensorFile:
    """An open safetensors file; ValueError names `path` where the header does not fit the bytes."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self.path = path
        self._handle = handle
        try:
            self.stored, self.metadata = _parse_header(handle.fileno())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return a copy of a tensor, or of its rows `first` to `last`; read nothing else."""
        stored = self.stored[name]
        shape, start, end = stored.shape, stored.start, stored.end
        if last is not None:
            row = 4 * math.prod(shape[1:])
            start, end = start + first * row, start + last * row
            shape = (last - first, *shape[1:])
        tensor = torch.empty(shape, dtype=stored.dtype)
        if tensor.numel():
            view = tensor.numpy().reshape(-1).view("u1").data
            while start < end:
                n_bytes = os.preadv(
                    self._handle.fileno(), [view[len(view) - (end - start) :]], start
                )
                if not n_bytes:
                    raise ValueError(f"{self.path} ends at byte {start:,}, expected {end:,}")
                start += n_bytes
        return tensor

    def map(self) -> tuple[dict[str, Tensor], mmap.mmap]:
        """Return every tensor as a read-only view of the file's pages, and the mapping."""
        pages = mmap.mmap(self._handle.fileno(), 0, access=mmap.ACCESS_READ)
        tensors = {}
        for name, stored in self.stored.items():
            n = math.prod(stored.shape)
            with warnings.catch_warnings():
                # "the buffer is not writable": nothing writes to it
                warnings.simplefilter("ignore", UserWarning)
                flat = (
                    torch.frombuffer(pages, dtype=stored.dtype, count=n, offset=stored.start)
                    if n
                    else torch.zeros(0, dtype=stored.dtype)
                )
            tensors[name] = flat.view(stored.shape)
        return tensors, pages


def _parse_header(descriptor: int) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return where each tensor lies, and the metadata; ValueError unless the tensors fill the file
    without gaps."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(
            f"its header has {length:,} bytes, the file {size:,}; expected at most "
            f"{_LARGEST_HEADER:,}"
        )
    header = parse_json(os.pread(descriptor, length, 8))
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    metadata = _texts(header.pop("__metadata__", None))
    if len(header) > MOST_TENSORS:
        raise ValueError(f"it lists {len(header):,} tensors, expected at most {MOST_TENSORS:,}")
    tensors = {name: _stored(name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.end)):
        if stored.start != end:
            raise ValueError(
                f"a tensor begins at byte {stored.start:,}, the one before ends at {end:,}"
            )
        end = stored.end
    if end != size or end % 4:
        raise ValueError(f"its tensors end at byte {end:,}, the file at {size:,}")
    return tensors, metadata


def _texts(metadata: Any) -> dict[str, str]:
    """Return the entries of the metadata that are text, which is all that the format allows."""
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return {name: text for name, text in entries if isinstance(text, str)}


def _stored(name: str, entry: Any, begin: int) -> Stored:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        raise ValueError(f"{name!r:.80} is not described")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name:.80} is of dtype {dtype!s:.20}, expected F32 or I32")
    shape, offsets = entry["shape"], entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name:.80} has shape {shape!r:.80} at {offsets!r:.80}")
    if not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in (*shape, *offsets)):
        raise ValueError(f"{name:.80} has shape {shape!r:.80} at {offsets!r:.80}")
    start, end = offsets
    if end - start != 4 * math.prod(shape) or (begin + start) % 4:
        raise ValueError(
            f"{name:.80} of shape {shape} lies in bytes {start} to {end}, expected "
            f"{4 * math.prod(shape):,} of them"
        )
    return Stored(tuple(shape), begin + start, begin + end, _DTYPES[dtype])


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], progress: Callable[[int], None] | None = None
) -> str:
    """Write fp32 and int32 tensors as a new safetensors file, one after another; return its
    SHA-256.

    The writer of the library needs all of them in memory at once. `progress` is called with the
    number of bytes of each tensor.
    """
    with open(path, "xb") as handle:
        digest = write_tensors(handle, tensors, progress)
        handle.flush()
        os.fsync(handle.fileno())
    return digest


def write_tensors(
    handle: BinaryIO,
    tensors: dict[str, Tensor],
    progress: Callable[[int], None] | None = None,
    metadata: dict[str, str] | None = None,
) -> str:
    """Write the content of a safetensors file, as `write_safetensors`; return its SHA-256.

    `metadata` is text about the file, which `TensorFile.metadata` returns.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    assert len(tensors) <= MOST_TENSORS, len(tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype in _DTYPE_NAMES, (name, tensor.dtype)
        start, end = end, end + tensor.numel() * 4
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (len(text).to_bytes(8, "little"), text):
        handle.write(part)
        digest.update(part)
    for tensor in tensors.values():
        data = tensor.detach().cpu().contiguous().numpy().reshape(-1).view("u1").data
        handle.write(data)
        digest.update(data)
        if progress:
            progress(len(data))
    return digest.hexdigest()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file as a read-only view of its pages.

    ValueError where the file is malformed.
    """
    with open(path, "rb") as handle:
        return TensorFile(handle, path).map()[0]
