"""MovieLens as GroupLens distributes it: `ratings.csv` (20M, 25M) or `ratings.dat` (1M, 10M), in a folder or its zip."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from data_tools import archives
from data_tools.tables import Columns, TextIdsError, csv_batches, readable

RATINGS = ("ratings.csv", "ratings.dat")
_CSV_COLUMNS = Columns("userId", "movieId", "rating")
_DAT_NAMES = ["userId", "movieId", "rating", "timestamp"]


class ColonFile(io.RawIOBase):
    """`ratings.dat` with its `::` turned into `,`, readable in one direction."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._held = stream, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._held + self._stream.read(size)
        self._held = b""
        if data.endswith(b":") and (more := self._stream.read(1)):
            data += more  # a separator may be cut in two: keep its first half company
        return data.replace(b"::", b",")

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class MovieLensSource:
    """`path` is a folder, a zip, or the ratings file itself."""

    path: Path

    def _find(self, wanted: tuple[str, ...]) -> str | None:
        """The member of folder or zip, or the file beside the ratings file, with one of these names."""
        if not self.path.is_dir() and not archives.is_zip(self.path.name):
            beside = {p.name: p.name for p in (self.path.parent / w for w in wanted) if p.is_file()}
            return self.path.name if wanted == RATINGS else next((beside[w] for w in wanted if w in beside), None)
        with readable(str(self.path)):
            found = [n for n in archives.names(self.path) if archives.base_name(n) in wanted]
        return min(found, key=lambda n: (n.count("/"), n), default=None)

    def _open(self, member: str) -> IO[bytes]:
        if self.path.is_dir():
            return open(self.path / member, "rb")
        if archives.is_zip(self.path.name):
            archive = zipfile.ZipFile(self.path)
            stream = archive.open(member)
            archive.close()  # the file stays open until the member is closed
            return stream
        return open(self.path.parent / member, "rb")

    def batches(self, text: frozenset[str] = frozenset()) -> Iterator[pa.RecordBatch]:
        member = self._find(RATINGS)
        if member is None:
            raise ValueError(f"{self.path} holds neither ratings.csv nor ratings.dat; expected a MovieLens data set")
        where = str(self.path) if archives.base_name(member) == self.path.name else f"{self.path}, {member}"
        dat = member.endswith(".dat")

        def opener() -> Any:
            stream = self._open(member)
            return pa.PythonFile(ColonFile(stream) if dat else stream, mode="r")

        try:
            yield from csv_batches(opener, where, _CSV_COLUMNS, frozenset(), _DAT_NAMES if dat else None)
        except TextIdsError as found:
            raise ValueError(
                f"{where}: a {found.column} id is not a non-negative integer, as MovieLens ids are; pass --format csv"
            ) from None

    def titles(self) -> dict[int, str] | None:
        """Movie titles by id, where movies.csv or movies.dat is at hand."""
        member = self._find(("movies.csv", "movies.dat"))
        if member is None:
            return None
        with readable(f"{self.path}, {member}"), self._open(member) as stream:
            lines = decoded(stream.read()).splitlines()
        rows = [line.split("::") for line in lines] if member.endswith(".dat") else list(csv.reader(lines))
        return {int(row[0]): row[1] for row in rows if len(row) > 1 and row[0].isdecimal()}


def decoded(data: bytes) -> str:
    """Text of a title file: UTF-8 in the newer data sets, Latin-1 in the older."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")
