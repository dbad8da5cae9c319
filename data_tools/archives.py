"""Members of zip and tar archives as streams, and files of folders in the same form. Nothing is extracted, ever."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES)


def is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def base_name(member: str) -> str:
    return PurePosixPath(member).name


def members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, stream) of every regular file in a folder, a zip, a tar or a tar inside a tar; or of the file itself.

    Folders and zips go by name, tars in their own order. A stream is valid until the next one is asked for.
    """
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            if is_tar(file.name):
                with open(file, "rb") as raw:
                    yield from _tar_members(raw)
                continue
            with open(file, "rb") as stream:
                yield file.name, stream
    elif is_zip(path.name):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    with archive.open(name) as stream:
                        yield name, stream
    elif is_tar(path.name):
        with open(path, "rb") as raw:
            yield from _tar_members(raw)
    else:
        with open(path, "rb") as stream:
            yield path.name, stream


def _tar_members(raw: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=raw, mode="r|*") as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isreg() else None
            if stream is None:
                continue
            if is_tar(member.name):
                yield from _tar_members(stream)
            else:
                yield member.name, stream


def names(path: Path) -> list[str]:
    """File names of a folder or zip, without reading the files."""
    if path.is_dir():
        return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    with zipfile.ZipFile(path) as archive:
        return sorted(n for n in archive.namelist() if not n.endswith("/"))
