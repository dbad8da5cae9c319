"""Find and describe the MovieLens data sets as GroupLens distributes them.

The ratings are in `ratings.csv` (20M, 25M), `ratings.dat` (1M, 10M) or `u.data` (100K), in a folder
or a zip.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.inputs import File, names_in
from dist_vasp.data.tables.streams import open_file, open_member, readable

RATINGS = ("ratings.csv", "ratings.dat", "u.data")
TITLES = ("movies.csv", "movies.dat", "u.item")
MAX_TITLES_BYTES = 64 << 20
_NAMES = ("userId", "movieId", "rating", "timestamp")
_HEADER = b"userId,movieId,rating"
_DELIMITERS = {".dat": "::", ".item": "|"}


@dataclass(frozen=True)
class MovieLens:
    """The ratings file `member` in `path`, a folder or a zip."""

    path: Path
    member: str

    @property
    def where(self) -> str:
        return f"{self.path}, {self.member}" if is_zip(self.path) else str(self.path / self.member)

    def columns(self, with_time: bool = False) -> Columns:
        """Return the columns of the ratings file; the times only if wanted."""
        return Columns(*_NAMES[:3], time=_NAMES[3] if with_time else None)

    def file(self) -> File:
        return File(
            self.where, "csv", self.path / self.member, partial(_open, self.path, self.member)
        )

    def reading(self, missing: Sequence[str]) -> Reading:
        """Return the format of the file."""
        if self.member.endswith(".csv"):
            return Reading(",", missing=tuple(missing))
        delimiter = "::" if self.member.endswith(".dat") else "\t"
        return Reading(delimiter, header=False, names=_NAMES, quoting=False, missing=tuple(missing))

    def titles(self) -> dict[int, str] | None:
        """Return movie titles by id; None without a file of titles."""
        member = _find(self.path, TITLES, str(Path(self.member).parent))
        if member is None:
            return None
        with readable(f"{self.path}, {member}"):
            lines = read_titles(_open(self.path, member), f"{self.path}, {member}").splitlines()
        delimiter = _DELIMITERS.get(Path(member).suffix)
        rows = [line.split(delimiter) for line in lines] if delimiter else list(csv.reader(lines))
        return {
            int(row[0]): row[1]
            for row in rows
            if len(row) > 1 and row[0].isascii() and row[0].isdecimal()
        }


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def find(path: Path, any_header: bool = False) -> MovieLens | None:
    """Return the ratings file at `path`, or in that folder or zip; None if there is none.

    A `ratings.csv` needs the header of MovieLens, unless `any_header` is True.
    """
    if not path.is_dir() and not is_zip(path):
        if path.name.lower() not in RATINGS:
            return None
        ratings = MovieLens(path.parent, path.name)
    else:
        with readable(str(path)):
            member = _find(path, RATINGS)
        if member is None:
            return None
        ratings = MovieLens(path, member)
    if any_header or not ratings.member.endswith(".csv"):
        return ratings
    with readable(ratings.where):
        stream = _open(ratings.path, ratings.member)
        try:
            head = stream.read(100).removeprefix(b"\xef\xbb\xbf")
            return ratings if head.startswith(_HEADER) else None
        finally:
            stream.close()


def _find(path: Path, wanted: Sequence[str], folder: str | None = None) -> str | None:
    """Return the least deep member with one of these names, or the one in `folder`."""
    if path.is_dir() and folder is not None:
        names = [str(Path(folder, w)) for w in wanted if (path / folder / w).is_file()]
    else:
        names = [
            n
            for n in names_in(path)
            if Path(n).name in wanted and folder in (None, str(Path(n).parent))
        ]
    return min(names, key=lambda n: (n.count("/"), n), default=None)


def _open(path: Path, member: str) -> Any:
    return open_member(path, member) if is_zip(path) else open_file(path / member)


def read_titles(stream: Any, where: str) -> str:
    """Return the text of a title file: UTF-8 in newer data sets, Latin-1 in older ones.

    ValueError where the file is too large.
    """
    data: bytes = stream.read(MAX_TITLES_BYTES + 1)
    stream.close()
    if len(data) > MAX_TITLES_BYTES:
        raise ValueError(
            f"{where} has more than {MAX_TITLES_BYTES:,} bytes, too many for titles; remove it, "
            "or name --titles"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")
