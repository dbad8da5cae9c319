"""Read the files of folders, zip archives and tar archives as streams.

Nothing is extracted to disk.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dist_vasp.data.tables.inputs import is_hidden, names_in, walk
from dist_vasp.data.tables.streams import open_member

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES)


def is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def base_name(member: str) -> str:
    return PurePosixPath(member).name


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, stream) of every regular file in a folder, a zip, a tar or a tar inside a tar.

    For another file, yield the file itself. Folders and zips are read by name, tars in their own
    order. Hidden files are skipped. A stream is valid until the next one is requested.
    """
    if path.is_dir():
        for file in sorted(walk(path, [])):
            with open(file, "rb") as stream:
                if is_tar(file.name):
                    yield from _tar_members(stream)
                else:
                    yield file.name, stream
    elif is_zip(path.name):
        for name in names_in(path):
            member = open_member(path, name)
            yield name, member
            member.close()
    else:
        with open(path, "rb") as stream:
            if is_tar(path.name):
                yield from _tar_members(stream)
            else:
                yield path.name, stream


def _tar_members(raw: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=raw, mode="r|*") as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isreg() else None
            if stream is None or is_hidden(base_name(member.name)):
                continue
            if is_tar(member.name):
                yield from _tar_members(stream)
            else:
                yield member.name, stream
