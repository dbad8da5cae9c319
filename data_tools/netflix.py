"""Read the Netflix Prize data: `combined_data_*.txt`, or `mv_*.txt` in a folder or tar.

A tar inside the tar of the whole prize is read, too. Both formats list one movie after another: a
line `MOVIE:`, then lines `USER,RATING,DATE`. Lines are parsed in blocks of some megabytes, without
a Python step per row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from data_tools import archives
from dist_vasp.data.tables.csv_blocks import BLOCK_BYTES, MAX_ROW_BYTES
from dist_vasp.data.tables.movielens import read_titles
from dist_vasp.data.tables.streams import open_file, readable

_RATINGS = re.compile(r"(combined_data_\d+|mv_\d+)\.txt$")
_TITLES = re.compile(r"movie_titles\.(csv|txt)$")
_LINE = re.compile(rb"\d{1,9}:|\d{1,18},\d+(\.\d+)?(,[^,]*)?")
_READ = pa.csv.ReadOptions(
    use_threads=False, block_size=2 * BLOCK_BYTES, column_names=["user", "rating", "date"]
)
_CONVERT = pa.csv.ConvertOptions(
    column_types={"user": pa.int64(), "rating": pa.float64()},
    include_columns=["user", "rating"],
    null_values=[""],
)


def holds_ratings(names: list[str]) -> bool:
    return any(_RATINGS.match(archives.base_name(n)) for n in names)


@dataclass(frozen=True)
class _Lines:
    """Whole lines of one file; the first of them has number `line`."""

    name: str
    line: int
    data: bytes


@dataclass
class NetflixSource:
    """The ratings and movie titles in `path`: a folder, a tar, a zip or one file."""

    path: Path
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _titles: dict[int, str] = field(default_factory=dict)

    def match_columns(self) -> tuple[dict[str, str], list[str]]:
        return {role: role for role in ("user", "item", "rating")}, []

    def read_times(self) -> str | None:
        """Return None: the dates of this format are not read."""
        return None

    def batches(self) -> Iterator[pa.RecordBatch]:
        with readable(str(self.path)):
            movie = -1
            block: list[_Lines] = []
            size = 0
            for lines in self._lines():
                block.append(lines)
                size += len(lines.data)
                if size >= BLOCK_BYTES:
                    batch, movie = _parse(block, movie)
                    yield batch
                    block, size = [], 0
            if block:
                yield _parse(block, movie)[0]
            elif movie == -1:
                raise ValueError(
                    f"{self.path} holds no line of combined_data_*.txt or mv_*.txt; expected the "
                    "Netflix Prize data"
                )

    def _lines(self) -> Iterator[_Lines]:
        for member, stream in archives.members(self.path):
            name = archives.base_name(member)
            if _TITLES.match(name):
                self._titles.update(_parse_titles(read_titles(stream, name)))
                continue
            if not _RATINGS.match(name) and not (self.path.is_file() and name == self.path.name):
                continue
            line = 1
            rest = b""
            while data := stream.read(BLOCK_BYTES):
                data = rest + data
                cut = data.rfind(b"\n") + 1
                rest = data[cut:]
                if len(rest) > MAX_ROW_BYTES:
                    raise ValueError(
                        f"{member}, line {line}: more than {MAX_ROW_BYTES:,} bytes without an "
                        "end; expected lines of ratings"
                    )
                if cut:
                    yield _Lines(member, line, data[:cut])
                    line += data.count(b"\n", 0, cut)
            if rest:
                yield _Lines(member, line, rest + b"\n")

    def titles(self) -> dict[int, str] | None:
        """Return movie titles by id, from movie_titles.csv or .txt inside `path` or next to it."""
        for name in ("movie_titles.csv", "movie_titles.txt"):
            file = self.path.parent / name
            if not self._titles and file.is_file():
                self._titles.update(_parse_titles(read_titles(open_file(file), str(file))))
        return self._titles or None


def _parse_titles(text: str) -> dict[int, str]:
    """Parse lines `ID,YEAR,TITLE`; a title may hold commas."""
    rows = (line.split(",", 2) for line in text.splitlines())
    return {
        int(row[0]): row[2]
        for row in rows
        if len(row) == 3 and row[0].isascii() and row[0].isdecimal()
    }


def _parse(block: list[_Lines], movie: int) -> tuple[pa.RecordBatch, int]:
    """Return the ratings of a block and its last movie.

    `movie` is the last one of the block before, which may continue here; -1: none yet.
    """
    data = b"".join(lines.data for lines in block)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    headers = np.flatnonzero((text[ends - 1] == ord(":")) & (ends > starts))
    bounds = np.concatenate([starts[headers], [len(data)]])
    cuts = np.concatenate([[0], ends[headers] + 1])
    body = b"".join(data[a:b] for a, b in zip(cuts.tolist(), bounds.tolist(), strict=True))
    # numbers of ratings before, between and after the headers
    sizes = np.diff(np.concatenate([[-1], headers, [len(ends)]])) - 1
    try:
        movies = [
            movie,
            *(
                int(data[a:b])
                for a, b in zip(starts[headers].tolist(), (ends[headers] - 1).tolist(), strict=True)
            ),
        ]
        rated = (
            pa.csv.read_csv(pa.BufferReader(body), _READ, convert_options=_CONVERT)
            if body
            else _CONVERT_EMPTY
        )
        if (
            rated.num_rows != sizes.sum()
            or min(movies[1:], default=0) < 0
            or (movie < 0 and sizes[0])
        ):
            raise ValueError("lines are not all ratings")
        if (
            rated["user"].null_count
            or rated["rating"].null_count
            or (np.asarray(rated["user"]) < 0).any()
            or np.isnan(rated["rating"]).any()
        ):
            raise ValueError("a rating is incomplete")
    except ValueError as error:
        raise _explain(block, movie, error) from None
    item = pa.array(np.repeat(np.array(movies, np.int64), sizes))
    columns = {name: rated[name].combine_chunks() for name in ("user", "rating")}
    return pa.record_batch(
        {"user": columns["user"], "item": item, "rating": columns["rating"]}
    ), movies[-1]


_CONVERT_EMPTY = pa.table({"user": pa.array([], pa.int64()), "rating": pa.array([], pa.float64())})


def _explain(block: list[_Lines], movie: int, error: ValueError) -> ValueError:
    """Return an error that names the line; found by parsing the block again, line by line."""
    for lines in block:
        for number, line in enumerate(lines.data.splitlines(), lines.line):
            seen = line.decode("latin-1")[:80]
            if not _LINE.fullmatch(line):
                return ValueError(
                    f"{lines.name}, line {number}: {seen!r} is neither 'MOVIE:' nor "
                    "'USER,RATING,DATE'"
                )
            if line.endswith(b":"):
                movie = int(line[:-1])
            elif movie < 0:
                return ValueError(
                    f"{lines.name}, line {number}: the rating {seen!r} comes before any "
                    "'MOVIE:' line"
                )
    return ValueError(f"{block[0].name} from line {block[0].line}: {error}")
