"""Checkpoints: a directory of safetensors and JSON that loads on any layout (DESIGN.md, section 5).
Nothing is pickled.

    checkpoints/step-00000180/   trunk.safetensors                  parameters of the trunk and their moments, whole
                                 items-00000-of-00002.safetensors   partition 0's pieces of every item matrix and moment
                                 items-00001-of-00002.safetensors
                                 checkpoint.json                    position, config, vocabulary, layout, SHA-256 of each file
    checkpoints/best -> best-00000180/                              the same without moments

A tensor of an items file is named `NAME[lo:hi]` by the global items it covers. A checkpoint is
written to a temporary directory, synced and renamed: it exists whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import resource
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dist_vasp.bounded_json import read_json, reason
from dist_vasp.data import positives
from dist_vasp.model.item_layers import NEASE_WEIGHT, ItemSlice
from dist_vasp.parallel.agree import agree
from dist_vasp.parallel.comm import Ranks, all_gather_bytes, all_reduce
from dist_vasp.parallel.launched import launched_world
from dist_vasp.temporary import sync
from dist_vasp.tensor_file import TensorFile, write_safetensors

FORMAT_VERSION = 1
HEADER = "checkpoint.json"
TRUNK = "trunk.safetensors"
MOST_FILES = 1 << 14  # of a checkpoint: one for each partition
_PIECE = re.compile(r"^(.+)\[(\d{1,15}):(\d{1,15})\]$")
_FILE = re.compile(r"trunk\.safetensors|items-\d{5}-of-\d{5}\.safetensors")
_ATTEMPT = re.compile(r"[0-9a-f]{0,32}")
_VANISHED = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)
_READ_BYTES = 4 << 20  # of a stored tensor that are read at a time where it is copied in part


class GoneError(ValueError):
    """A checkpoint is no longer where it was found: a training may have replaced it meanwhile."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk: what its header says, and its files, which stay open.

    They are opened once, together. What is verified is what is read later, even if the names are
    removed or replaced.
    """

    path: Path
    header: dict[str, Any]
    header_name: str = HEADER
    handles: dict[str, BufferedReader] = field(default_factory=dict, repr=False)

    @property
    def step(self) -> int:
        return self.header["position"]["step"]

    @property
    def name(self) -> str:
        """The name of its folder; that of a copied `best`, which is no link any more, by its step."""
        return (
            f"best-{self.step:08d}"
            if self.path.name == "best" and "position" in self.header
            else self.path.name
        )

    @property
    def remedy(self) -> str:
        """What to do about a damaged file."""
        return (
            "remove this checkpoint and resume from another"
            if self.header_name == HEADER
            else "export the run again"
        )

    def tensors(self, name: str) -> TensorFile:
        """A safetensors file that the header lists; ValueError where it is none."""
        with readable(self.path / name, self.remedy):
            return TensorFile(self.handles[name], self.path / name)

    def close(self) -> None:
        for handle in self.handles.values():
            handle.close()


def items_file(index: int, partitions: int) -> str:
    return f"items-{index:05d}-of-{partitions:05d}.safetensors"


# --- writing ---------------------------------------------------------------------------------------------------------


def save(
    path: Path,
    header: dict[str, Any],
    pieces: list[ItemSlice],
    trunk: dict[str, Tensor],
    ranks: Ranks,
) -> None:
    """Write a checkpoint from all ranks together, in the foreground; see `Save`."""
    pending = Save(path, header, pieces, trunk, ranks)
    pending.write()
    pending.commit()


class Save:
    """One checkpoint on its way to disk: prepared and committed by all ranks together, written by
    each alone.

    `trunk` is only looked at on rank 0, `pieces` only on replica 0. Raises AgreedError on every rank, and leaves nothing
    behind, when the disk is too small or a file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        pieces: list[ItemSlice],
        trunk: dict[str, Tensor],
        ranks: Ranks,
    ) -> None:
        self.path, self.header, self.ranks = path, header, ranks
        token = all_gather_bytes(secrets.token_hex(8).encode(), ranks.world, ranks.device)[
            0
        ].decode()
        self.temporary = path.with_name(f".{path.name}.{token}.tmp")
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
        self.n_bytes = sum(
            t.numel() * t.element_size()
            for tensors in self.files.values()
            for t in tensors.values()
        )
        self._prepare()

    def _prepare(self) -> None:
        """An empty temporary directory on a disk that is large enough."""
        needed = int(
            all_reduce(
                torch.tensor(float(self.n_bytes), dtype=torch.float64, device=self.ranks.device),
                self.ranks.world,
            )
        )
        error: Exception | None = None
        if self.ranks.is_main:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
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
        except (
            Exception
        ) as raised:  # a bug in the thread must not let `commit` call half a checkpoint whole
            self._error = raised
        self.files = {}

    def write_in_background(self) -> bool:
        """Copy this rank's tensors and write them from a thread, if every rank has the memory for a
        copy; else say False."""
        local_world = launched_world()[3]
        fits = self.n_bytes * local_world < psutil.virtual_memory().available / 2
        if (
            all_reduce(
                torch.tensor(float(not fits), device=self.ranks.device), self.ranks.world, "max"
            )
            > 0
        ):
            return False
        self.files = {
            name: {k: t.detach().to("cpu", copy=True) for k, t in tensors.items()}
            for name, tensors in self.files.items()
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
                    sha256 = {
                        name: digest
                        for message in messages
                        for name, digest in json.loads(message).items()
                    }
                    whole = {
                        "format_version": FORMAT_VERSION,
                        **self.header,
                        "files": dict(sorted(sha256.items())),
                    }
                    whole["header_sha256"] = header_sha256(whole)
                    with open(self.temporary / HEADER, "w") as handle:
                        handle.write(json.dumps(whole, indent=1) + "\n")
                        handle.flush()
                        os.fsync(handle.fileno())
                    sync(self.temporary)
                    remove(self.path)
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
    """SHA-256 of the header's content, itself excepted: a damaged position or hash must not pass
    for a real one."""
    content = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove(path: Path) -> None:
    """Drop a checkpoint, its header first: from then on it is none.

    Of a link only the link goes.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    (path / HEADER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


# --- reading ---------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the header and open the files.

    ValueError if it is damaged or of another version, GoneError if it is not there.
    """
    return open_files(
        path, HEADER, FORMAT_VERSION, _check_header, "use another checkpoint of the run"
    )


def header_of(path: Path) -> dict[str, Any] | None:
    """The header alone of a checkpoint; None where it has none that is sound."""
    try:
        return read_header(path / HEADER, FORMAT_VERSION, _check_header, "")
    except (OSError, ValueError):
        return None


def open_files(
    path: Path, header_name: str, version: int, check: Callable[[dict[str, Any]], None], remedy: str
) -> Checkpoint:
    """Open the folder, its header and every file that this lists, so that all of them are of one
    moment."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    handles: dict[str, BufferedReader] = {}
    file = path / header_name
    try:
        header = read_header(file, version, check, remedy, folder)
        _allow_open_files(len(header["files"]))
        for name in header["files"]:
            file = path / name
            handles[name] = _open_regular(name, folder)
    except OSError as error:
        for handle in handles.values():
            handle.close()
        raise _unreadable(file, error, remedy) from None
    finally:
        os.close(folder)
    return Checkpoint(path, header, header_name, handles)


def _open_regular(name: str, folder: int) -> BufferedReader:
    handle = open(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder), "rb")  # noqa: SIM115
    if not os.path.isfile(handle.fileno()):
        handle.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return handle


def _allow_open_files(n: int) -> None:
    """Raise the limit of open files for a checkpoint of many partitions."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * n + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE,
                (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard),
            )


def _unreadable(file: Path, error: OSError, remedy: str) -> ValueError:
    if error.errno in _VANISHED:
        return GoneError(
            f"{file} cannot be read ({error.strerror}): another command may have replaced it meanwhile; "
            f"start the same command again, or {remedy}"
        )
    return ValueError(f"{file} cannot be read ({error.strerror}); {remedy}")


def read_header(
    file: Path,
    version: int,
    check: Callable[[dict[str, Any]], None],
    remedy: str,
    folder: int | None = None,
) -> dict[str, Any]:
    """The JSON of `file`, which `check` and its own checksum found in order; ValueError if it is
    damaged or of another version.

    With `folder`, an open folder, the file is looked up in it. OSError where it cannot be read.
    """
    try:
        header = read_json(file if folder is None else file.name, folder=folder)
        found = header["format_version"]
        if found == version:
            check(header)
            if header["header_sha256"] != header_sha256(header):
                raise ValueError("header_sha256 is not that of its content")
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(f"{file} is damaged ({reason(error):.300}); {remedy}") from None
    if found != version:
        raise ValueError(
            f"{file} has format_version {found!r:.20}, this version reads {version}; use the version that wrote it"
        )
    return header


def _check_header(header: dict[str, Any]) -> None:
    """Raise unless everything a reader relies on is there and of its kind: a checksum only says
    that it is what was written."""
    for key in (
        "position",
        "config",
        "must_match",
        "vocabulary_sha256",
        "shards_sha256",
        "n_items",
        "optimizer",
        "files",
    ):
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
    if not all(isinstance(header.get(key, ""), str) for key in ("data_sha256", "shards_from_run")):
        raise TypeError("data_sha256 or shards_from_run is not text")
    if len(header["files"]) > MOST_FILES:
        raise ValueError(
            f"files lists {len(header['files']):,} files, expected at most {MOST_FILES:,}"
        )
    for name, digest in header["files"].items():
        if not _FILE.fullmatch(name) or not isinstance(digest, str):
            raise ValueError(f"files lists {name!r}, which is no file of a checkpoint")
    best = header.get("best")
    if not _is_number(header.get("seconds_training", 0.0)) or not isinstance(
        header.get("evaluation_due", False), bool
    ):
        raise TypeError("seconds_training or evaluation_due is of another kind")
    if best is not None and not all(v is None or _is_number(v) for v in best.values()):
        raise TypeError("best does not hold metrics")
    for which in (header.get("best_checkpoint"), {"step": 0, "attempt": header.get("attempt", "")}):
        if which is not None and not (
            is_count(which["step"]) and _ATTEMPT.fullmatch(which["attempt"])
        ):
            raise ValueError("attempt or best_checkpoint is of another kind")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _is_number(value: Any) -> bool:
    """A finite number of 0 or more."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
    )  # JSON has longer numbers than a float


def verify(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Check every open file against its SHA-256; the ranks share the files out and agree before
    anything is loaded."""
    error: Exception | None = None
    for i, (name, digest) in enumerate(sorted(checkpoint.header["files"].items())):
        if i % ranks.world_size != ranks.rank or error:
            continue
        file, handle = checkpoint.path / name, checkpoint.handles[name]
        try:
            handle.seek(0)
            found = hashlib.file_digest(handle, "sha256").hexdigest()
            if found != digest:
                raise ValueError(
                    f"{file} has SHA-256 {found[:12]}..., {checkpoint.header_name} says {str(digest)[:12]}...: "
                    f"it is damaged; {checkpoint.remedy}"
                )
        except OSError as raised:
            error = _unreadable(file, raised, checkpoint.remedy)
        except ValueError as raised:
            error = raised
    agree(error, ranks)


@contextmanager
def readable(file: Path, remedy: str) -> Iterator[None]:
    """What the disk or we say against `file` becomes a ValueError that names it and says what to
    do."""
    try:
        yield
    except OSError as error:
        raise _unreadable(file, error, remedy) from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def read_trunk(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of trunk.safetensors, on the CPU."""
    if TRUNK not in checkpoint.header["files"]:
        raise ValueError(
            f"{checkpoint.path / checkpoint.header_name} lists no {TRUNK}; {checkpoint.remedy}"
        )
    stored = checkpoint.tensors(TRUNK)
    with readable(stored.path, checkpoint.remedy):
        return {name: stored.read(name) for name in stored}


def parse_piece(key: str, file: Path | str = "the file") -> tuple[str, int, int]:
    """`NAME[lo:hi]` -> (NAME, lo, hi)."""
    match = _PIECE.match(key)
    if not match:
        raise ValueError(
            f"{file} holds a tensor {key!r:.80}, expected names like output.nease.weight[0:256]"
        )
    return match[1], int(match[2]), int(match[3])


def _stored_items(checkpoint: Checkpoint) -> Iterator[tuple[TensorFile, str, str, int, int]]:
    """(file, key, name, lo, hi) of every tensor in the items files; ValueError where one cannot be
    read."""
    for file_name in sorted(checkpoint.header["files"]):
        if file_name.startswith("items-"):
            stored = checkpoint.tensors(file_name)
            for key in stored:
                with readable(stored.path, checkpoint.remedy):
                    name, lo, hi = parse_piece(key, stored.path)
                yield stored, key, name, lo, hi


def stored_pieces(
    checkpoint: Checkpoint, names: set[str]
) -> Iterator[tuple[str, int, int, int, Tensor]]:
    """(name, item_dim, lo, hi, tensor) of every stored piece of the weights `names`, one at a time.

    Raises ValueError when all have passed, where a weight was not there for every item once.
    """
    n_items = checkpoint.header["n_items"]
    filled: dict[tuple[str, int, int], list[tuple[int, int]]] = {
        (name, 0, n_items): [] for name in names
    }
    for stored, key, name, lo, hi in _stored_items(checkpoint):
        if name in names:
            item_dim = 1 if name == NEASE_WEIGHT else 0
            with readable(stored.path, checkpoint.remedy):
                shape = stored.shape(key)
                if len(shape) <= item_dim or shape[item_dim] != hi - lo or hi > n_items:
                    raise ValueError(
                        f"{stored.path}: {key} has shape {list(shape)} among {n_items} items"
                    )
                tensor = stored.read(key)
            filled[(name, 0, n_items)].append((lo, hi))
            yield name, item_dim, lo, hi, tensor
    _check_filled(checkpoint, filled)


def read_items(checkpoint: Checkpoint, pieces: list[ItemSlice]) -> None:
    """Fill this rank's pieces from whichever files hold their items; only the overlapping parts are
    read."""
    filled: dict[tuple[str, int, int], list[tuple[int, int]]] = {
        (p.name, p.lo, p.hi): [] for p in pieces
    }
    for stored, key, name, lo, hi in _stored_items(checkpoint):
        for piece in pieces:
            first, last = max(lo, piece.lo), min(hi, piece.hi)
            if piece.name == name and first < last:
                with readable(stored.path, checkpoint.remedy):
                    _copy_range(stored, key, piece, lo, hi, first, last)
                filled[(piece.name, piece.lo, piece.hi)].append((first, last))
    _check_filled(checkpoint, filled)


def _check_filled(
    checkpoint: Checkpoint, filled: dict[tuple[str, int, int], list[tuple[int, int]]]
) -> None:
    """ValueError unless the ranges of every (name, lo, hi) make up its items, each once."""
    for (name, lo, hi), ranges in filled.items():
        end = lo
        for first, last in sorted(ranges):
            end = last if first == end else -1  # a gap, or items that are stored twice
        if end != hi:
            raise ValueError(
                f"{checkpoint.path} does not hold {name} for all items {lo} to {hi - 1} once; {checkpoint.remedy}"
            )


def check_numbers(checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError where a loaded tensor holds what no training goes on from: NaN, infinity, numbers
    whose squares are infinite, or a negative second moment."""
    for name, tensor in tensors:
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())  # NaN if any is; no copy of the tensor
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(
                f"{checkpoint.path}: {name} holds NaN or infinite numbers; {checkpoint.remedy}"
            )
        if name.endswith(".exp_avg_sq"):
            if low < 0:
                raise ValueError(
                    f"{checkpoint.path}: {name} holds negative numbers; {checkpoint.remedy}"
                )
        elif not torch.isfinite(torch.maximum(-low, high).square()):
            raise ValueError(
                f"{checkpoint.path}: {name} holds numbers from {low.item():.3g} to {high.item():.3g}, beyond what fp32 can compute "
                f"with; {checkpoint.remedy}"
            )


def _copy_range(
    stored: TensorFile, key: str, piece: ItemSlice, lo: int, hi: int, first: int, last: int
) -> None:
    """Copy the items first to last of a stored tensor of items lo to hi, some rows at a time."""
    expected = list(piece.tensor.shape)
    expected[piece.item_dim] = hi - lo
    shape = list(stored.shape(key))
    if shape != expected:
        raise ValueError(f"{stored.path}: {key} has shape {shape}, expected {expected}")
    rows, columns = (first - lo, last - lo), slice(None)
    target = piece.tensor.narrow(piece.item_dim, first - piece.lo, last - first)
    if piece.item_dim:
        rows, columns = (0, shape[0]), slice(first - lo, last - lo)
    at_once = max(1, _READ_BYTES // (4 * max(math.prod(shape[1:]), 1)))
    for start in range(*rows, at_once):
        stop = min(start + at_once, rows[1])
        found = stored.read(key, start, stop)
        target[start - rows[0] : stop - rows[0]] = (
            found[:, columns] if piece.item_dim else found
        ).to(target)
