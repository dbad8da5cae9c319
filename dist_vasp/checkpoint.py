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
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_vasp.data import positives
from dist_vasp.model.item_layers import ItemSlice
from dist_vasp.parallel.comm import Ranks, agree, all_gather_bytes, all_reduce
from dist_vasp.parallel.launched import launched_world

FORMAT_VERSION = 1
HEADER = "checkpoint.json"
TRUNK = "trunk.safetensors"
_PIECE = re.compile(r"^(.+)\[(\d{1,15}):(\d{1,15})\]$")
_FILE = re.compile(r"trunk\.safetensors|items-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk and what its header says."""

    path: Path
    header: dict[str, Any]
    header_name: str = HEADER

    @property
    def step(self) -> int:
        return self.header["position"]["step"]

    @property
    def remedy(self) -> str:
        """What to do about a damaged file."""
        return "remove this checkpoint and go on from another" if self.header_name == HEADER else "export the run again"


def items_file(index: int, partitions: int) -> str:
    return f"items-{index:05d}-of-{partitions:05d}.safetensors"


# --- writing ---------------------------------------------------------------------------------------------------------


def save(path: Path, header: dict[str, Any], pieces: list[ItemSlice], trunk: dict[str, Tensor], ranks: Ranks) -> None:
    """Write a checkpoint from all ranks together, in the foreground; see `Save`."""
    pending = Save(path, header, pieces, trunk, ranks)
    pending.write()
    pending.commit()


class Save:
    """One checkpoint on its way to disk: prepared and committed by all ranks together, written by each alone.

    `trunk` is only looked at on rank 0, `pieces` only on replica 0. Raises AgreedError on every rank, and leaves nothing
    behind, when the disk is too small or a file cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any], pieces: list[ItemSlice], trunk: dict[str, Tensor], ranks: Ranks) -> None:
        self.path, self.header, self.ranks = path, header, ranks
        self.temporary = path.with_name(f".{path.name}.tmp")
        self._digests: dict[str, str] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self.files: dict[str, dict[str, Tensor]] = {}
        if ranks.is_main and trunk:
            self.files[TRUNK] = trunk
        layout = ranks.layout
        if layout.replica_of(ranks.rank) == 0:
            name = items_file(layout.partition_of(ranks.rank), layout.partitions)
            self.files[name] = {f"{p.name}[{p.lo}:{p.hi}]": p.tensor for p in pieces}
        self.n_bytes = sum(t.numel() * t.element_size() for tensors in self.files.values() for t in tensors.values())
        self._prepare()

    def _prepare(self) -> None:
        """An empty temporary directory on a disk that is large enough."""
        needed = int(all_reduce(torch.tensor(float(self.n_bytes), dtype=torch.float64, device=self.ranks.device), self.ranks.world))
        error: Exception | None = None
        if self.ranks.is_main:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self.temporary, ignore_errors=True)
                free = shutil.disk_usage(self.path.parent).free
                if free < needed * 1.01 + (1 << 20):
                    raise ValueError(
                        f"{self.path.parent} has {free / 1e9:.3g} GB free but the checkpoint needs {needed / 1e9:.3g} GB; "
                        "free some space or move run.dir; earlier checkpoints are good"
                    )
                self.temporary.mkdir()
            except (OSError, ValueError) as raised:
                error = self._unwritable(raised)
        agree(error, self.ranks)

    def write(self) -> None:
        """Write this rank's files, one tensor after the other; an error waits for `commit`."""
        try:
            for name, tensors in self.files.items():
                self._digests[name] = write_safetensors(self.temporary / name, tensors)
        except OSError as raised:
            self._error = self._unwritable(raised)
        except Exception as raised:  # a bug in the thread must not let `commit` call half a checkpoint whole
            self._error = raised
        self.files = {}

    def write_in_background(self) -> bool:
        """Copy this rank's tensors and write them from a thread, if every rank has the memory for a copy; else say False."""
        local_world = launched_world()[3]
        fits = self.n_bytes * local_world < psutil.virtual_memory().available / 2
        if all_reduce(torch.tensor(float(not fits), device=self.ranks.device), self.ranks.world, "max") > 0:
            return False
        self.files = {
            name: {k: t.detach().to("cpu", copy=True) for k, t in tensors.items()} for name, tensors in self.files.items()
        }
        self._thread = threading.Thread(target=self.write, name=f"checkpoint {self.path.name}")
        self._thread.start()
        return True

    @property
    def in_foreground(self) -> bool:
        return self._thread is None

    @property
    def written(self) -> bool:
        """Whether this rank's part is on disk (or has failed)."""
        return self._thread is None or not self._thread.is_alive()

    def commit(self) -> None:
        """Wait for every rank's part, write the header and rename: now the checkpoint exists."""
        if self._thread is not None:
            self._thread.join()
        ranks, error = self.ranks, None
        messages = all_gather_bytes(json.dumps(self._digests).encode(), ranks.world, ranks.device)
        try:
            agree(self._error, ranks)
            if ranks.is_main:
                try:
                    sha256 = {name: digest for message in messages for name, digest in json.loads(message).items()}
                    whole = {"format_version": FORMAT_VERSION, **self.header, "files": dict(sorted(sha256.items()))}
                    whole["header_sha256"] = header_sha256(whole)
                    with open(self.temporary / HEADER, "w") as handle:
                        handle.write(json.dumps(whole, indent=1) + "\n")
                        handle.flush()
                        os.fsync(handle.fileno())
                    sync(self.temporary)
                    shutil.rmtree(self.path, ignore_errors=True)
                    self.temporary.rename(self.path)
                    sync(self.path.parent)
                except OSError as raised:
                    error = self._unwritable(raised)
            agree(error, ranks)
        except ValueError:
            if ranks.is_main:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def abandon(self) -> None:
        """Give up what was started: nothing of it stays on the disk."""
        if self._thread is not None:
            self._thread.join()
        if self.ranks.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _unwritable(self, raised: Exception) -> ValueError:
        if isinstance(raised, ValueError):
            return raised
        what = f"checkpoint {self.path} could not be written ({raised})"
        return ValueError(f"{what}; free some space or move run.dir; earlier checkpoints are good")


def header_sha256(header: dict[str, Any]) -> str:
    """SHA-256 of the header's content, itself excepted: a damaged position or hash must not pass for a real one."""
    content = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_safetensors(path: Path, tensors: dict[str, Tensor], progress: Callable[[int], None] | None = None) -> str:
    """Write fp32 tensors as a safetensors file, one after the other and without a copy of the whole; returns its SHA-256.

    The format is a length, a JSON header and the raw bytes; safetensors' own writer wants all of them in memory at once.
    `progress` is told the bytes of each tensor that is written.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, (name, tensor.dtype)
        start, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as handle:
        for part in (len(text).to_bytes(8, "little"), text):
            handle.write(part)
            digest.update(part)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().numpy().reshape(-1).view("u1").data
            handle.write(data)
            digest.update(data)
            if progress:
                progress(len(data))
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a written file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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


def prune(folder: Path, keep: int, leftovers: bool = True) -> None:
    """Drop all but the `keep` newest step checkpoints and, before a run has writes of its own under way, what others left."""
    for old in _steps(folder)[:-keep]:
        remove(old)
    for leftover in folder.glob(".*.tmp") if leftovers else ():
        folder_of_ours = leftover.is_dir() and not leftover.is_symlink()
        shutil.rmtree(leftover, ignore_errors=True) if folder_of_ours else leftover.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Drop a checkpoint, its header first: from then on it is none."""
    (path / HEADER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / HEADER).is_file())


# --- reading ---------------------------------------------------------------------------------------------------------


def newest(folder: Path) -> Path | None:
    """The step checkpoint with the highest step, None where there is none."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def newest_step(folder: Path) -> int:
    """The step that the name of the newest step checkpoint says; 0 where there is none, or a name says nothing."""
    path = newest(folder)
    digits = path.name.removeprefix("step-") if path else ""
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def find(folder: Path, name: str | None = None) -> Path:
    """The checkpoint `name`, else the best one, else the newest; ValueError lists what there is."""
    if name is not None:
        path = folder / name
    else:
        path = folder / "best" if (folder / "best").exists() else newest(folder) or folder / "best"
    if not (path / HEADER).is_file():
        found = sorted(p.parent.name for p in folder.glob(f"[!.]*/{HEADER}"))
        if not found:
            raise ValueError(f"{folder.parent} holds no checkpoint; name the run.dir of a training run that has saved one")
        raise ValueError(f"{path} is not a checkpoint; {folder} holds {', '.join(found)}; name one of them")
    return path


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the header; ValueError if it is damaged or of another version."""
    return Checkpoint(path, read_header(path / HEADER, FORMAT_VERSION, _check_header, "use another checkpoint of the run"))


def read_header(file: Path, version: int, check: Callable[[dict[str, Any]], None], remedy: str) -> dict[str, Any]:
    """The JSON of `file`, which `check` and its own checksum found in order; ValueError if it is damaged or of another version."""
    try:
        header = json.loads(file.read_text())
        found = header["format_version"]
        if found == version:
            check(header)
            if header["header_sha256"] != header_sha256(header):
                raise ValueError("header_sha256 is not that of its content")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); {remedy}") from None
    if found != version:
        raise ValueError(f"{file} has format_version {found}, this version reads {version}; use the version that wrote it")
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Raise unless everything a reader relies on is there and of its kind: a checksum only says that it is what was written."""
    for key in ("position", "config", "must_match", "vocabulary_sha256", "shards_sha256", "n_items", "optimizer", "files"):
        header[key]
    if not all(is_count(header["position"][k]) for k in ("epoch", "step_in_epoch", "step")):
        raise TypeError("position does not hold three whole numbers")
    if not is_count(header["n_items"]):
        raise TypeError("n_items is not a whole number")
    if not all(isinstance(header[key], str) for key in ("vocabulary_sha256", "shards_sha256")):
        raise TypeError("a hash is not a string")
    if not isinstance(header["config"], dict) or not isinstance(header["must_match"], dict):
        raise TypeError("config or must_match is not a table")
    positives.in_header(header)
    step, mu_product = (header["optimizer"][k] for k in ("step", "mu_product"))
    if not _is_number(step) or step != int(step) or not _is_number(mu_product) or mu_product > 1:
        raise ValueError(f"optimizer is at step {step!r} with mu_product {mu_product!r}")
    for name, digest in header["files"].items():
        if not _FILE.fullmatch(name) or not isinstance(digest, str):
            raise ValueError(f"files lists {name!r}, which is no file of a checkpoint")
    best = header.get("best")
    if not _is_number(header.get("seconds_training", 0.0)) or not isinstance(header.get("evaluation_due", False), bool):
        raise TypeError("seconds_training or evaluation_due is of another kind")
    if best is not None and not all(v is None or _is_number(v) for v in best.values()):
        raise TypeError("best does not hold metrics")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _is_number(value: Any) -> bool:
    """A finite number of 0 or more."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


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
                    f"{file} has SHA-256 {found[:12]}..., {checkpoint.header_name} says {str(digest)[:12]}...: "
                    f"it is damaged; {checkpoint.remedy}"
                )
        except OSError as raised:
            error = ValueError(f"{file} cannot be read ({raised.strerror}); {checkpoint.remedy}")
        except ValueError as raised:
            error = raised
    agree(error, ranks)


@contextmanager
def readable(file: Path, remedy: str) -> Iterator[None]:
    """What safetensors, the disk or we say against `file` becomes a ValueError that names it and says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def read_trunk(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of trunk.safetensors, on the CPU."""
    file = checkpoint.path / TRUNK
    if TRUNK not in checkpoint.header["files"]:
        raise ValueError(f"{checkpoint.path / checkpoint.header_name} lists no {TRUNK}; {checkpoint.remedy}")
    with readable(file, checkpoint.remedy), safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118
            _check_dtype(handle.get_slice(name), file, name)
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def parse_piece(key: str, file: Path | str = "the file") -> tuple[str, int, int]:
    """`NAME[lo:hi]` -> (NAME, lo, hi)."""
    match = _PIECE.match(key)
    if not match:
        raise ValueError(f"{file} holds a tensor {key!r}, expected names like output.nease.weight[0:256]")
    return match[1], int(match[2]), int(match[3])


def _stored_items(checkpoint: Checkpoint) -> Iterator[tuple[Path, Any, str, str, int, int]]:
    """(file, open handle, key, name, lo, hi) of every tensor in the items files; ValueError where one cannot be read."""
    for file_name in sorted(checkpoint.header["files"]):
        if not file_name.startswith("items-"):
            continue
        file = checkpoint.path / file_name
        with readable(file, checkpoint.remedy), safe_open(file, framework="pt") as handle:
            keys = list(handle.keys())
        for key in keys:
            # The file is mapped: what has been read of it counts as this process's memory until it is closed.
            with readable(file, checkpoint.remedy), safe_open(file, framework="pt") as handle:
                yield file, handle, key, *parse_piece(key, file)


def stored_pieces(checkpoint: Checkpoint, names: set[str]) -> Iterator[tuple[str, int, int, int, Tensor]]:
    """(name, item_dim, lo, hi, tensor) of every stored piece of the weights `names`, one at a time.

    Raises ValueError when all have passed, where a weight was not there for every item once.
    """
    n_items = checkpoint.header["n_items"]
    filled: dict[tuple[str, int, int], list[tuple[int, int]]] = {(name, 0, n_items): [] for name in names}
    for file, handle, key, name, lo, hi in _stored_items(checkpoint):
        if name in names:
            item_dim = 1 if name == "output.nease.weight" else 0
            with readable(file, checkpoint.remedy):
                shape = _check_dtype(handle.get_slice(key), file, key)
                if len(shape) <= item_dim or shape[item_dim] != hi - lo or hi > n_items:
                    raise ValueError(f"{file}: {key} has shape {shape} among {n_items} items")
                tensor = handle.get_tensor(key)
            filled[(name, 0, n_items)].append((lo, hi))
            yield name, item_dim, lo, hi, tensor
    _check_filled(checkpoint, filled)


def read_items(checkpoint: Checkpoint, pieces: list[ItemSlice]) -> None:
    """Fill this rank's pieces from whichever files hold their items; only the overlapping parts are read."""
    filled: dict[tuple[str, int, int], list[tuple[int, int]]] = {(p.name, p.lo, p.hi): [] for p in pieces}
    for file, handle, key, name, lo, hi in _stored_items(checkpoint):
        for piece in pieces:
            first, last = max(lo, piece.lo), min(hi, piece.hi)
            if piece.name == name and first < last:
                with readable(file, checkpoint.remedy):
                    _copy_range(handle.get_slice(key), file, key, piece, lo, hi, first, last)
                filled[(piece.name, piece.lo, piece.hi)].append((first, last))
    _check_filled(checkpoint, filled)


def _check_filled(checkpoint: Checkpoint, filled: dict[tuple[str, int, int], list[tuple[int, int]]]) -> None:
    """ValueError unless the ranges of every (name, lo, hi) make up its items, each once."""
    for (name, lo, hi), ranges in filled.items():
        end = lo
        for first, last in sorted(ranges):
            end = last if first == end else -1  # a gap, or items that are stored twice
        if end != hi:
            raise ValueError(f"{checkpoint.path} does not hold {name} for all items {lo} to {hi - 1} once; {checkpoint.remedy}")


def check_numbers(checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError where a loaded tensor holds what no training goes on from: NaN, infinity, numbers whose squares are infinite,
    or a negative second moment."""
    for name, tensor in tensors:
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())  # NaN if any is; no copy of the tensor
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"{checkpoint.path}: {name} holds NaN or infinite numbers; {checkpoint.remedy}")
        if name.endswith(".exp_avg_sq"):
            if low < 0:
                raise ValueError(f"{checkpoint.path}: {name} holds negative numbers; {checkpoint.remedy}")
        elif not torch.isfinite(torch.maximum(-low, high).square()):
            raise ValueError(
                f"{checkpoint.path}: {name} holds numbers from {low.item():.3g} to {high.item():.3g}, beyond what fp32 can compute "
                f"with; {checkpoint.remedy}"
            )


def _check_dtype(stored: Any, file: Path, key: str) -> list[int]:
    """The shape of a stored tensor; ValueError unless it is of fp32."""
    if stored.get_dtype() != "F32":
        raise ValueError(f"{file}: {key} is of dtype {stored.get_dtype()}, expected F32")
    return list(stored.get_shape())


def _copy_range(stored: Any, file: Path, key: str, piece: ItemSlice, lo: int, hi: int, first: int, last: int) -> None:
    expected = list(piece.tensor.shape)
    expected[piece.item_dim] = hi - lo
    shape = _check_dtype(stored, file, key)
    if shape != expected:
        raise ValueError(f"{file}: {key} has shape {shape}, expected {expected}")
    source = [slice(None)] * len(expected)
    target = [slice(None)] * len(expected)
    source[piece.item_dim] = slice(first - lo, last - lo)
    target[piece.item_dim] = slice(first - piece.lo, last - piece.lo)
    piece.tensor[tuple(target)] = stored[tuple(source)].to(piece.tensor)
