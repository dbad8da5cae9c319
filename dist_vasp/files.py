"""Write files and folders so that they appear complete, or not at all.

An output is written under an unpredictable temporary name next to its own, synced and renamed. The
temporary file is removed on an error or a signal. What a killed process left is removed by the next
command that writes the same output. `dist_vasp.places` says where an output may be written.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dist_vasp.locks import open_lock
from dist_vasp.places import Inputs, check_file, check_folder, check_writable_file, unwritable
from dist_vasp.temporary import RawOutput, explained, finish, hidden_name, sync, temporary_file

_ENDING = r"[0-9a-f]{16}\.(tmp|old)"  # of a temporary name
_LEFTOVER = re.compile(rf"\..+\.{_ENDING}")
# errors of filesystems without hard links
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
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
    """Yield a file to write; it appears at `path` if the block ends without an error.

    ValueError where it may not be written (see `places.check_file`), where writing fails, and where
    another command is writing it.
    """
    check = partial(check_file, path, option, overwrite, ours, inputs, make_parents=make_parents)
    target = check()
    with (
        parents(target, option),
        sole_writer(target, option),
        temporary_file(target, option) as (handle, temporary),
    ):
        check()  # another command may have written it meanwhile
        yield handle
        finish(handle)
        check()
        with explained(target, option):
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
    """Yield an empty folder to fill; it appears at `path` if the block ends without an error.

    With `overwrite` it replaces an earlier folder, which is removed afterwards. ValueError where it
    may not be written (see `places.check_folder`), where writing fails, and where another command
    is writing it.
    """
    check = partial(check_folder, path, option, overwrite, files_of, inputs, make_parents)
    target = check()
    with parents(target, option), sole_writer(target, option):
        check()  # another command may have written it meanwhile
        temporary = hidden_name(target, f"{secrets.token_hex(8)}.tmp")
        exists = False
        try:  # entered before the folder is there, because a signal may come at any moment
            try:
                temporary.mkdir()
            except OSError as error:
                exists = error.errno == errno.EEXIST  # it belongs to another process
                raise unwritable(error, target, option) from None
            with explained(target, option, within=temporary):
                yield temporary
                for file in temporary.iterdir():
                    sync(file)
                sync(temporary)
            check()
            with explained(target, option):
                _replace_folder(temporary, target)
        finally:
            if not exists:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing(path: Path, remedy: str = "") -> Iterator[BinaryIO]:
    """Yield a file to write that replaces one in a folder of this process, such as run.dir."""
    check_writable_file(path)
    with temporary_file(path, "", remedy) as (handle, temporary):
        yield handle
        finish(handle)
        with explained(path, "", remedy):
            _appear(temporary, path, replace=True)


@contextmanager
def replacing_all(folder: Path, names: Sequence[str], remedy: str = "") -> Iterator[list[BinaryIO]]:
    """Yield several files to write; none of them appears before all are on the disk."""
    with ExitStack() as stack:
        handles = [
            stack.enter_context(replacing(folder / name, remedy)) for name in reversed(names)
        ][::-1]
        yield handles
        for handle in handles:
            finish(handle)


def replace_text(path: Path, text: str, remedy: str = "") -> None:
    """Replace a text file in a folder of this process; ValueError where writing fails."""
    with replacing(path, remedy) as handle:
        handle.write(text.encode())


def rename_folder(temporary: Path, path: Path) -> None:
    """Give a folder that is complete and synced the name `path`, which must be free."""
    os.rename(temporary, path)
    sync(path.parent)


def replace_link(link: Path, target: str) -> None:
    """Make `link` a link to `target`, in one step."""
    fresh = hidden_name(link, f"{secrets.token_hex(8)}.tmp")
    fresh.symlink_to(target)
    os.replace(fresh, link)


def open_append(path: Path, remedy: str = "") -> BinaryIO:
    """Open a file in a folder of this process to write at its end; never through a link."""
    check_writable_file(path)
    with explained(path, "", remedy):
        if path.exists() and path.stat().st_nlink > 1:
            # a copy of the folder that was made with hard links keeps its content
            with temporary_file(path, "", remedy) as (handle, temporary):
                handle.write(path.read_bytes())
                finish(handle)
                _appear(temporary, path, replace=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return io.BufferedWriter(RawOutput(os.open(path, flags, 0o666), path, "", remedy))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes in a folder of this process."""
    for entry in os.scandir(folder):
        if _LEFTOVER.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


@contextmanager
def parents(path: Path, option: str) -> Iterator[None]:
    """Make the folders above an output; if the block fails, remove those that are empty."""
    missing = [folder for folder in path.parents if not folder.exists()]
    with explained(path, option):
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
    """Hold the lock on an output, so that no other command writes it; ValueError where one does.

    The lock is on the file `.NAME.lock` next to the output, and ends with the process. Where the
    filesystem has no locks, two commands write under different names, and the later one wins.
    """
    lock = hidden_name(path, "lock")
    descriptor, held = None, False
    try:
        with explained(path, option):
            descriptor, held = open_lock(lock)
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


def _appear(temporary: Path, path: Path, replace: bool) -> None:
    """Give the temporary file its name, in one step.

    FileExistsError where the name exists and `replace` is False.
    """
    if replace:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.rename(temporary, path)  # the caller has just checked that the name is free
    sync(path.parent)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Give the temporary folder its name, and remove the folder that had it.

    The earlier folder is put back where that fails.
    """
    if not path.exists():
        os.rename(temporary, path)
    elif _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)  # the earlier folder has this name now
    else:
        # if this process is killed here, `_clear` restores the name
        old = hidden_name(path, f"{secrets.token_hex(8)}.old")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; return False where the system or filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0


def _clear(path: Path) -> None:
    """Remove the temporary files of killed processes for this output.

    A folder that one of them had renamed gets its name back.
    """
    start = hidden_name(path, "").name
    for entry in sorted(os.scandir(path.parent), key=lambda entry: entry.name):
        ending = entry.name.removeprefix(start)
        if not entry.name.startswith(start) or not re.fullmatch(_ENDING, ending):
            continue
        if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
            continue
        with suppress(OSError):
            if ending.endswith(".old") and not os.path.lexists(path):
                os.rename(entry.path, path)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
