"""Temporary files next to an output, and errors of writing as messages for the user."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dist_vasp.places import unwritable


def hidden_name(path: Path, ending: str) -> Path:
    """Return `.NAME.ENDING` in the folder of `path`; a long name is replaced by its hash."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}.{ending}")


def finish(handle: BinaryIO) -> None:
    """Flush what was written to the disk.

    Of outputs that belong together, finish all before the first appears.
    """
    handle.flush()
    os.fsync(handle.fileno())


def sync(path: Path) -> None:
    """Flush a written file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RawOutput(io.FileIO):
    """A file whose failed writes raise the user's error, whichever library writes."""

    def __init__(self, descriptor: int, path: Path, option: str, remedy: str) -> None:
        super().__init__(descriptor, "w")
        self._error = (path, option, remedy)

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            raise unwritable(error, *self._error) from None


class _Output(io.BufferedWriter):
    """A file that ignores what a library writes after `abandon`."""

    _abandoned = False

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes if self._abandoned else super().write(data)

    def flush(self) -> None:
        if not self._abandoned:
            super().flush()

    def abandon(self) -> None:
        self._abandoned = True
        self.raw.close()


@contextmanager
def explained(
    path: Path, option: str, remedy: str = "", within: Path | None = None
) -> Iterator[None]:
    """Turn an OSError of the body into the user's error about `path`.

    With `within`, only an error about the disk or about a file in that folder.
    """
    try:
        yield
    except OSError as error:
        of_the_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
        of_the_folder = (
            isinstance(error.filename, str) and within is not None and str(within) in error.filename
        )
        if within is None or of_the_disk or of_the_folder:
            raise unwritable(error, path, option, remedy) from None
        raise


@contextmanager
def temporary_file(path: Path, option: str, remedy: str = "") -> Iterator[tuple[BinaryIO, Path]]:
    """Yield a new file next to `path`, and its name; it is removed when the block ends."""
    temporary = hidden_name(path, f"{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    exists, handle = False, None
    try:  # entered before the file is there, because a signal may come at any moment
        try:
            raw = RawOutput(os.open(temporary, flags, 0o666), path, option, remedy)
        except OSError as error:
            exists = error.errno == errno.EEXIST  # it belongs to another process
            raise unwritable(error, path, option, remedy) from None
        handle = _Output(raw, 1 << 16)
        yield handle, temporary
    finally:
        if not exists:
            with suppress(OSError):
                temporary.unlink()
        if handle is not None:
            handle.abandon()
