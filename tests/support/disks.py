"""Small filesystems to write on: full ones and read-only ones.

Tests that need one skip where none can be mounted.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*options: str) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no filesystem can be mounted here ({done.stderr.strip()})")


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """An empty filesystem of `size` at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Leave no more than `leave` bytes free on the filesystem of `folder`."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as handle:
        try:
            while True:
                handle.write(b"\0" * 4096)
        except OSError:
            pass
        if leave:
            handle.truncate(max(0, handle.tell() - leave))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make the filesystem mounted at `folder` read-only for a while."""
    _mount("-o", "remount,ro", str(folder))
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
