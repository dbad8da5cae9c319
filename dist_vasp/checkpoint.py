"""Checkpoints: a directory of safetensors and JSON that loads on any layout (DESIGN.md, section 5). Nothing is pickled.

    checkpoints/step-00000180/   trunk.safetensors                  parameters of the trunk and their moments, whole
                                 items-00000-of-00002.safetensors   partition 0's pieces of every item matrix and moment
                                 items-00001-of-00002.safetensors
                                 checkpoint.json                    position, config, vocabulary, layout, SHA-256 of each file
    checkpoints/best -> best-00000180/                              the same without moments

A tensor of an items file is named `NAME[lo:hi]` by the global items it covers. A checkpoint is written to a temporary
directory, synced and renamed: it exists whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_vasp.model.item_layers import ItemSlice
from dist_vasp.parallel.comm import Ranks, agree, all_gather_bytes, all_reduce, barrier

FORMAT_VERSION = 1
HEADER = "checkpoint.json"
TRUNK = "trunk.safetensors"
_PIECE = re.compile(r"^(.+)\[(\d+):(\d+)\]$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk and what its header says."""

    path: Path
    header: dict[str, Any]

    @property
    def step(self) -> int:
        return self.header["position"]["step"]


def items_file(index: int, partitions: int) -> str:
    return f"items-{index:05d}-of-{partitions:05d}.safetensors"


# --- writing ---------------------------------------------------------------------------------------------------------


def save(path: Path, header: dict[str, Any], pieces: list[ItemSlice], trunk: dict[str, Tensor], ranks: Ranks) -> None:
    """Write a checkpoint from all ranks together; `trunk` is only looked at on rank 0, `pieces` only on replica 0.

    Raises AgreedError on every rank, and leaves nothing behind, when the disk is too small or a file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    layout = ranks.layout
    files: dict[str, dict[str, Tensor]] = {}
    if ranks.is_main and trunk:
        files[TRUNK] = trunk
    if layout.replica_of(ranks.rank) == 0:
        name = items_file(layout.partition_of(ranks.rank), layout.partitions)
        files[name] = {f"{p.name}[{p.lo}:{p.hi}]": p.tensor for p in pieces}
    n_bytes = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
    needed = int(all_reduce(torch.tensor(float(n_bytes), dtype=torch.float64, device=ranks.device), ranks.world))

    error: Exception | None = None
    if ranks.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(path.parent).free
            if free < needed * 1.01 + (1 << 20):
                raise ValueError(
                    f"{path.parent} has {free / 1e9:.2f} GB free but the checkpoint needs {needed / 1e9:.2f} GB; "
                    "free some space or move run.dir; earlier checkpoints are good"
                )
            temporary.mkdir()
        except (OSError, ValueError) as raised:
            error = _writable(path, raised)
    agree(error, ranks)

    digests: dict[str, str] = {}
    try:
        for name, tensors in files.items():
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary / name)
            os.chmod(temporary / name, 0o666 & ~_umask())  # safetensors writes for the owner alone
            digests[name] = _sync_and_digest(temporary / name)
    except (OSError, SafetensorError) as raised:
        error = _writable(path, raised)
    messages = all_gather_bytes(json.dumps(digests).encode(), ranks.world, ranks.device)
    try:
        agree(error, ranks)
    except ValueError:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    if ranks.is_main:
        try:
            sha256 = {name: digest for message in messages for name, digest in json.loads(message).items()}
            whole = {"format_version": FORMAT_VERSION, **header, "files": dict(sorted(sha256.items()))}
            (temporary / HEADER).write_text(json.dumps(whole, indent=1) + "\n")
            _sync_and_digest(temporary / HEADER)
            _sync_directory(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            _sync_directory(path.parent)
        except OSError as raised:
            error = _writable(path, raised)
            shutil.rmtree(temporary, ignore_errors=True)
    agree(error, ranks)
    barrier(ranks.world)


def _writable(path: Path, raised: Exception) -> ValueError:
    if isinstance(raised, ValueError):
        return raised
    return ValueError(
        f"checkpoint {path} could not be written ({raised}); free some space or move run.dir; earlier checkpoints are good"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_and_digest(file: Path) -> str:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_best_at(path: Path) -> None:
    """Make `best` beside `path` a link to it, in one atomic step, and drop the best ones before."""
    link, fresh = path.with_name("best"), path.with_name(".best.tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(path.name)
    os.replace(fresh, link)
    for old in path.parent.glob("best-*"):
        if old.name != path.name:
            shutil.rmtree(old, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Drop all but the `keep` newest step checkpoints, and what an interrupted write left."""
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / HEADER).is_file())


# --- reading ---------------------------------------------------------------------------------------------------------


def newest(folder: Path) -> Path | None:
    """The step checkpoint with the highest step, None where there is none."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def find(folder: Path, name: str | None = None) -> Path:
    """The checkpoint `name`, else the best one, else the newest; ValueError lists what there is."""
    if name is not None:
        path = folder / name
    else:
        path = folder / "best" if (folder / "best").exists() else newest(folder) or folder / "best"
    if not (path / HEADER).is_file():
        found = sorted(p.parent.name for p in folder.glob(f"*/{HEADER}"))
        raise ValueError(f"{path} is not a checkpoint; {folder} holds {', '.join(found) or 'none'}")
    return path


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the header; ValueError if it is damaged or of another version."""
    try:
        header = json.loads((path / HEADER).read_text())
        version = header["format_version"]
        for key in ("position", "config", "vocabulary_sha256", "shards_sha256", "n_items", "optimizer", "files"):
            header[key]
        if not all(isinstance(header["position"][k], int) for k in ("epoch", "step_in_epoch", "step")):
            raise TypeError("position does not hold three whole numbers")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / HEADER} is damaged ({error!r}); use another checkpoint of the run") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path / HEADER} has format_version {version}, this version reads {FORMAT_VERSION}")
    return Checkpoint(path, header)


def verify(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Hold every file against its SHA-256; the ranks share the files out and agree before anything is loaded."""
    error: Exception | None = None
    for i, (name, digest) in enumerate(sorted(checkpoint.header["files"].items())):
        if i % ranks.world_size != ranks.rank or error:
            continue
        file = checkpoint.path / name
        try:
            with open(file, "rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
            if found != digest:
                raise ValueError(
                    f"{file} has SHA-256 {found[:12]}..., checkpoint.json says {str(digest)[:12]}...: "
                    "it is damaged; remove this checkpoint and go on from another"
                )
        except OSError as raised:
            error = ValueError(f"{file} cannot be read ({raised.strerror}); remove this checkpoint and go on from another")
        except ValueError as raised:
            error = raised
    agree(error, ranks)


def read_trunk(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of trunk.safetensors, on the CPU."""
    file = checkpoint.path / TRUNK
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}); use another checkpoint of the run") from None


def read_items(checkpoint: Checkpoint, pieces: list[ItemSlice]) -> None:
    """Fill this rank's pieces from whichever files hold their items; only the overlapping parts are read."""
    missing = {(p.name, p.lo, p.hi): p.hi - p.lo for p in pieces}
    for name in sorted(checkpoint.header["files"]):
        if not name.startswith("items-"):
            continue
        file = checkpoint.path / name
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    match = _PIECE.match(key)
                    if not match:
                        raise ValueError(f"{file} holds a tensor {key!r}, expected names like output.nease.weight[0:256]")
                    stored_name, lo, hi = match[1], int(match[2]), int(match[3])
                    for piece in pieces:
                        first, last = max(lo, piece.lo), min(hi, piece.hi)
                        if piece.name == stored_name and first < last:
                            _copy_range(handle.get_slice(key), file, key, piece, lo, hi, first, last)
                            missing[(piece.name, piece.lo, piece.hi)] -= last - first
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as safetensors ({error}); use another checkpoint of the run") from None
    gaps = [key for key, left in missing.items() if left]
    if gaps:
        name, lo, hi = gaps[0]
        raise ValueError(
            f"{checkpoint.path} does not hold {name} for all items {lo} to {hi - 1}; use another checkpoint of the run"
        )


def _copy_range(stored: Any, file: Path, key: str, piece: ItemSlice, lo: int, hi: int, first: int, last: int) -> None:
    expected = list(piece.tensor.shape)
    expected[piece.item_dim] = hi - lo
    if stored.get_shape() != expected:
        raise ValueError(f"{file}: {key} has shape {stored.get_shape()}, expected {expected}")
    source = [slice(None)] * len(expected)
    target = [slice(None)] * len(expected)
    source[piece.item_dim] = slice(first - lo, last - lo)
    target[piece.item_dim] = slice(first - piece.lo, last - piece.lo)
    piece.tensor[tuple(target)] = stored[tuple(source)].to(piece.tensor)
