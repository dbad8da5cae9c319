"""Open a folder of weights, check its files, and read tensors out of them.

The header and every file that it lists are opened once, together. What is verified is what is read
later, even if the names are removed or replaced meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Generic, TypeVar

from dist_vasp.checkpoint.header import Header, ModelHeader
from dist_vasp.checkpoint.json_header import read_header
from dist_vasp.parallel.agree import agree
from dist_vasp.parallel.comm import Ranks
from dist_vasp.tensor_file import TensorFile

_PIECE = re.compile(r"^(.+)\[(\d{1,15}):(\d{1,15})\]$")
_VANISHED = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)

H = TypeVar("H", bound=ModelHeader)
H_co = TypeVar("H_co", bound=ModelHeader, covariant=True)


class GoneError(ValueError):
    """A checkpoint is no longer where it was found: a training may have replaced it meanwhile."""


@dataclass(frozen=True)
class Checkpoint(Generic[H_co]):
    """A folder of weights, of a checkpoint or an export: its header and its open files."""

    path: Path
    header: H_co
    handles: dict[str, BufferedReader] = field(default_factory=dict, repr=False)

    @property
    def step(self) -> int:
        """The optimizer step of a checkpoint."""
        assert isinstance(self.header, Header)
        return self.header.position.step

    @property
    def name(self) -> str:
        """The name of its folder. A copy of `best` that is no link is named by its step."""
        is_best = self.path.name == "best" and isinstance(self.header, Header)
        return f"best-{self.step:08d}" if is_best else self.path.name

    @property
    def remedy(self) -> str:
        """What to do about a damaged file."""
        return self.header.FIX_FILE

    def tensors(self, name: str) -> TensorFile:
        """Return a safetensors file that the header lists; ValueError where it is none."""
        with readable(self.path / name, self.remedy):
            return TensorFile(self.handles[name], self.path / name)

    def close(self) -> None:
        for handle in self.handles.values():
            handle.close()


@dataclass(frozen=True)
class StoredItems:
    """One tensor of an items file: the items [lo, hi) of `name` along `axis`."""

    file: TensorFile
    key: str
    name: str
    lo: int
    hi: int
    axis: int


# --- opening --------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> Checkpoint[Header]:
    """Read the header and open the files.

    ValueError if it is damaged or of another version, GoneError if it is not there.
    """
    return open_model_folder(Header, path)


def header_of(path: Path) -> Header | None:
    """Return the header alone of a checkpoint; None where it has none that is sound."""
    try:
        return read_header(Header, path)
    except (OSError, ValueError):
        return None


def open_model_folder(kind: type[H], path: Path) -> Checkpoint[H]:
    """Open a folder, its header and every file that this lists, so that all are of one moment.

    ValueError and GoneError as `open_checkpoint`.
    """
    remedy = kind.FIX_HEADER
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error, remedy) from None
    handles: dict[str, BufferedReader] = {}
    file = path / kind.FILE
    try:
        header = read_header(kind, path, folder)
        _allow_open_files(len(header.files))
        for name in header.files:
            file = path / name
            handles[name] = _open_regular(name, folder)
    except OSError as error:
        for handle in handles.values():
            handle.close()
        raise _unreadable(file, error, remedy) from None
    finally:
        os.close(folder)
    return Checkpoint(path, header, handles)


def _open_regular(name: str, folder: int) -> BufferedReader:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    handle = open(os.open(name, flags, dir_fd=folder), "rb")  # noqa: SIM115 - the caller closes it
    if not os.path.isfile(handle.fileno()):
        handle.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return handle


def _allow_open_files(n: int) -> None:
    """Raise the limit of open files for a checkpoint of many partitions."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * n + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


# --- checking -------------------------------------------------------------------------------------


def verify(checkpoint: Checkpoint[ModelHeader], ranks: Ranks) -> None:
    """Check every open file against its SHA-256; the ranks share the files out and agree before
    anything is loaded."""
    error: Exception | None = None
    files = sorted(checkpoint.header.files.items())
    for name, digest in files[ranks.rank :: ranks.world_size]:
        try:
            _verify_file(checkpoint, name, digest)
        except OSError as raised:
            error = _unreadable(checkpoint.path / name, raised, checkpoint.remedy)
        except ValueError as raised:
            error = raised
        if error:
            break
    agree(error, ranks)


def _verify_file(checkpoint: Checkpoint[ModelHeader], name: str, digest: str) -> None:
    handle = checkpoint.handles[name]
    handle.seek(0)
    found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != digest:
        raise ValueError(
            f"{checkpoint.path / name} has SHA-256 {found[:12]}..., {checkpoint.header.FILE} says "
            f"{digest[:12]}...: it is damaged; {checkpoint.remedy}"
        )


def _unreadable(file: Path, error: OSError, remedy: str) -> ValueError:
    if error.errno in _VANISHED:
        return GoneError(
            f"{file} cannot be read ({error.strerror}): another command may have replaced it "
            f"meanwhile; start the same command again, or {remedy}"
        )
    return ValueError(f"{file} cannot be read ({error.strerror}); {remedy}")


@contextmanager
def readable(file: Path, remedy: str) -> Iterator[None]:
    """Turn what the disk or a check says against `file` into a ValueError that names it and says
    what to do."""
    try:
        yield
    except OSError as error:
        raise _unreadable(file, error, remedy) from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


# --- tensors --------------------------------------------------------------------------------------


def parse_piece(key: str, file: Path | str = "the file") -> tuple[str, int, int]:
    """Return (NAME, lo, hi) of a tensor's name `NAME[lo:hi]`; ValueError where it is none."""
    match = _PIECE.match(key)
    if not match:
        raise ValueError(
            f"{file} holds a tensor {key!r:.80}, expected names like output.nease.weight[0:256]"
        )
    return match[1], int(match[2]), int(match[3])


def stored_items(checkpoint: Checkpoint[ModelHeader]) -> Iterator[StoredItems]:
    """Yield every tensor of the items files, in no order; ValueError where one cannot be read."""
    for file_name in checkpoint.header.items_files():
        file = checkpoint.tensors(file_name)
        for key in file:
            with readable(file.path, checkpoint.remedy):
                name, lo, hi = parse_piece(key, file.path)
                axis = checkpoint.header.axis_of(name)
            yield StoredItems(file, key, name, lo, hi, axis)
