"""The one way in which a file or a folder of ours appears: whole, or not at all.

It is written under an unpredictable temporary name beside its own, synced and renamed. The temporary one is removed on
any error and on a signal; what a killed process left is removed by the next command that writes the same output.
`dist_vasp.places` says where an output may be written.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dist_vasp.places import Inputs, check_file, check_folder, check_writable_file, unwritable

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.(tmp|old)")
_NO_LOCKS = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EBADF,
)  # of filesystems without flock
_NO_LINKS = (
    errno.EPERM,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EMLINK,
)  # of filesystems without hard links
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def new_file(
    path: str | Path,
    option: str = "",
    overwrite: bool | None = None,
    ours: Callable[[Path], bool] | None = None,
    inputs: Inputs = (),
    make_parents: bool = False,
) -> Iterator[BinaryIO]:
    """Yield a file to write; it appears at `path` when the block ends, and not at all when the
    block fails.

    ValueError where it may not be written (see `places.check_file`), where it cannot be, and where
    another command is writing it.
    """

    def check() -> Path:
        return check_file(path, option, overwrite, ours, inputs, make_parents=make_parents)

    target = check()
    with (
        parents(target, option),
        sole_writer(target, option),
        _temporary_file(target, option) as (handle, temporary),
    ):
        check()  # another command may have written it until now
        yield handle
        finish(handle)
        check()
        with _explained(target, option):
            _appear(temporary, target, replace=overwrite is not False)


@contextmanager
def new_folder(
    path: str | Path,
    option: str = "",
    overwrite: bool | None = None,
    files_of: Callable[[Path], Collection[str]] | None = None,
    inputs: Inputs = (),
    make_parents: bool = False,
) -> Iterator[Path]:
    """Yield an empty folder to fill; it appears at `path` when the block ends, and not at all when
    the block fails.

    With `overwrite` it takes the place of an earlier folder, which is removed afterwards.
    ValueError where it may not be written (see `places.check_folder`), where it cannot be, and
    where another command is writing it.
    """

    def check() -> Path:
        return check_folder(path, option, overwrite, files_of, inputs, make_parents)

    target = check()
    with parents(target, option), sole_writer(target, option):
        check()  # another command may have written it until now
        temporary = _beside(target, f"{secrets.token_hex(8)}.tmp")
        taken = False
        try:  # from before the folder is there: a signal may come at any moment
            try:
                temporary.mkdir()
            except OSError as error:
                taken = error.errno == errno.EEXIST
                raise unwritable(error, target, option) from None
            with _explained(target, option, within=temporary):
                yield temporary
                for file in temporary.iterdir():
                    sync(file)
                sync(temporary)
            check()
            with _explained(target, option):
                _replace_folder(temporary, target)
        finally:
            if not taken:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing(path: Path, remedy: str = "") -> Iterator[BinaryIO]:
    """Yield a file to write in place of one in a folder that this process owns, such as run.dir."""
    check_writable_file(path)
    with _temporary_file(path, "", remedy) as (handle, temporary):
        yield handle
        finish(handle)
        with _explained(path, "", remedy):
            _appear(temporary, path, replace=True)


@contextmanager
def replacing_all(folder: Path, names: Sequence[str], remedy: str = "") -> Iterator[list[BinaryIO]]:
    """Yield several files to write that belong together: none of them appears before all are on the
    disk."""
    with ExitStack() as stack:
        handles = [
            stack.enter_context(replacing(folder / name, remedy)) for name in reversed(names)
        ][::-1]
        yield handles
        for handle in handles:
            finish(handle)


def replace_text(path: Path, text: str, remedy: str = "") -> None:
    """Write a text file in a folder that this process owns.

    ValueError where it cannot be written.
    """
    with replacing(path, remedy) as handle:
        handle.write(text.encode())


def open_append(path: Path, remedy: str = "") -> BinaryIO:
    """Open a file inside a folder that this process owns to write at its end; never through a link."""
    check_writable_file(path)
    with _explained(path, "", remedy):
        if (
            path.exists() and path.stat().st_nlink > 1
        ):  # a copy of the folder made with hard links keeps its own content
            with _temporary_file(path, "", remedy) as (handle, temporary):
                handle.write(path.read_bytes())
                finish(handle)
                _appear(temporary, path, replace=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return io.BufferedWriter(_Raw(os.open(path, flags, 0o666), path, "", remedy))


def finish(handle: BinaryIO) -> None:
    """Bring what was written to the disk.

    Of outputs that belong together, finish all before the first appears.
    """
    handle.flush()
    os.fsync(handle.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process has left in a folder that this process owns."""
    for entry in os.scandir(folder):
        if _LEFTOVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


def lock_or_owner(path: Path) -> io.FileIO | str:
    """Take the lock of a folder that this process will own until it ends, and write into `path` who
    owns it.

    Returns the open file that holds the lock, which goes when it is closed or the process ends; or,
    where another process holds it, what that one has written there. The file is never a link. A
    filesystem without locks refuses nobody.
    """
    descriptor = os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
    )
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EEXIST, f"{path} is not a regular file", str(path))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 500, 0).decode(errors="replace").strip()
        os.close(descriptor)
        return owner
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return io.FileIO(descriptor, "r+")


def sync(path: Path) -> None:
    """Bring a written file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def parents(path: Path, option: str) -> Iterator[None]:
    """Make the folders above an output; those that are still empty go when the block fails."""
    missing = [folder for folder in path.parents if not folder.exists()]
    with _explained(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def sole_writer(path: Path, option: str = "") -> Iterator[None]:
    """Hold the lock on an output, so that no other command writes it. ValueError where one does
    already.

    The lock belongs to the open file `.NAME.lock` beside the output: it goes with the process,
    however that ends. Where the filesystem has no locks, two commands write under names of their
    own, and the later one stays.
    """
    lock = _beside(path, "lock")
    descriptor, held = None, False
    try:
        with _explained(path, option):
            descriptor, held = _lock(lock)
        if descriptor is None:
            raise ValueError(
                (
                    f"{option} {path} is being written by another command; wait for it to end, or "
                    "choose another name"
                ).lstrip()
            )
        if held:
            _clear(path)
        yield
    finally:
        if held:
            with suppress(OSError):
                lock.unlink()
        if descriptor is not None:
            os.close(descriptor)


# --- inside ---------------------------------------------------------------------------------------


class _Raw(io.FileIO):
    """A file whose failed writes are errors for the user, whichever library writes."""

    def __init__(self, descriptor: int, path: Path, option: str, remedy: str) -> None:
        super().__init__(descriptor, "w")
        self._error = (path, option, remedy)

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            raise unwritable(error, *self._error) from None


class _Output(io.BufferedWriter):
    """A file that takes what a library still writes when it is given up, and drops it."""

    given_up = False

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes if self.given_up else super().write(data)

    def flush(self) -> None:
        if not self.given_up:
            super().flush()


@contextmanager
def _explained(
    path: Path, option: str, remedy: str = "", within: Path | None = None
) -> Iterator[None]:
    """Turn an OSError into the user's error.

    With `within`, only one that is about writing into that folder.
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
def _temporary_file(path: Path, option: str, remedy: str = "") -> Iterator[tuple[BinaryIO, Path]]:
    temporary = _beside(path, f"{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    taken, handle = False, None
    try:  # from before the file is there: a signal may come at any moment
        try:
            raw = _Raw(os.open(temporary, flags, 0o666), path, option, remedy)
        except OSError as error:
            taken = error.errno == errno.EEXIST
            raise unwritable(error, path, option, remedy) from None
        handle = _Output(raw, 1 << 16)
        yield handle, temporary
    finally:
        if not taken:
            with suppress(OSError):
                temporary.unlink()
        if handle is not None:
            handle.given_up = True
            handle.raw.close()


def _appear(temporary: Path, path: Path, replace: bool) -> None:
    """Give the temporary file its name, in one step.

    FileExistsError where that exists and `replace` is False.
    """
    if replace:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.rename(temporary, path)  # checked just before
    sync(path.parent)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Give the temporary folder its name; what had the name is removed afterwards, and put back if
    that fails."""
    if not path.exists():
        os.rename(temporary, path)
    elif _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)  # the earlier one now
    else:
        old = _beside(
            path, f"{secrets.token_hex(8)}.old"
        )  # if we are killed here, `_clear` gives it its name back
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0


def _beside(path: Path, ending: str) -> Path:
    """`.NAME.ENDING` in the same folder; a long name is replaced by its hash."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}.{ending}")


def _lock(lock: Path) -> tuple[int | None, bool]:
    """The open lock file and whether it is locked (a filesystem may have no locks); None where
    another has the lock."""
    while True:
        descriptor = os.open(
            lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
        )
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EEXIST, "its lock file is not a regular file", str(lock))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.lstat()):
                    return descriptor, True
            os.close(descriptor)  # its holder has just removed it
        except BlockingIOError:
            os.close(descriptor)
            return None, False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise


def _clear(path: Path) -> None:
    """Remove what killed processes have left of this output; a folder that one of them had moved
    aside comes back."""
    start = _beside(path, "").name
    for entry in sorted(os.scandir(path.parent), key=lambda entry: entry.name):
        ending = entry.name.removeprefix(start)
        mine = (
            entry.stat(follow_symlinks=False).st_uid == os.geteuid()
            if entry.name.startswith(start)
            else False
        )
        if not mine or not re.fullmatch(r"[0-9a-f]{16}\.(tmp|old)", ending):
            continue
        with suppress(OSError):
            if ending.endswith(".old") and not os.path.lexists(path):
                os.rename(entry.path, path)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
