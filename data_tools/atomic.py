"""Output that exists whole or not at all: written under a temporary name beside it, synced, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_vasp.data.format import MANIFEST


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def check_folder_target(path: Path, overwrite: bool) -> None:
    """ValueError unless a data folder may be written at `path`: it is free, or one of ours and `overwrite` is set."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise ValueError(f"{path} exists and is not a folder; name another output folder")
    if not overwrite:
        raise ValueError(f"{path} exists already; name another output folder, or pass --overwrite to replace it")
    if any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path} is not empty and holds no {MANIFEST}, so it was not written by data_tools.shard: --overwrite does not "
            "delete it; name another output folder, or remove it yourself"
        )


def check_file_target(path: Path, overwrite: bool) -> None:
    """ValueError unless a file may be written at `path`."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file to write")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; name another file, or pass --overwrite to replace it")


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror} ({error.filename}); name another place") from None


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to fill; on success it becomes `path`, on any error it is removed."""
    path = Path(os.path.realpath(path))
    check_folder_target(path, overwrite)
    folder = _temporary(path)
    shutil.rmtree(folder, ignore_errors=True)  # a process of the same number that was killed
    with _writable(path):
        folder.mkdir(parents=True)
    try:
        yield folder
        for file in folder.iterdir():
            _sync(file)
        _sync(folder)
        check_folder_target(path, overwrite)
        old = path.with_name(f"{path.name}.old-{os.getpid()}")
        if path.exists():
            path.rename(old)
        try:
            folder.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write; on success it becomes `path`, on any error it is removed."""
    path = Path(os.path.realpath(path))
    check_file_target(path, overwrite)
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    file = _temporary(path)
    try:
        yield file
        _sync(file)
        check_file_target(path, overwrite)
        file.rename(path)
        _sync(path.parent)
    finally:
        file.unlink(missing_ok=True)
