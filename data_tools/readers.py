"""Which reader reads an input: by --format, or by the name of the file, folder or archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from data_tools import archives, netflix
from data_tools.movielens import RATINGS, MovieLensSource
from data_tools.netflix import NetflixSource
from data_tools.tables import Columns, CsvSource, ParquetSource, TextIdsError, readable

FORMATS = ("csv", "parquet", "movielens", "netflix")
_CSV_SUFFIXES = (".csv", ".csv.gz")

__all__ = ["FORMATS", "Columns", "Source", "TextIdsError", "infer_format", "open_source"]


class Source(Protocol):
    """An input that can be read more than once, in the same order."""

    def batches(self, text: frozenset[str] = frozenset()) -> Iterator[pa.RecordBatch]:
        """Batches with `user`, `item` and perhaps `rating` and `split`; `text` are the roles whose ids are strings.

        Raises TextIdsError(role) where a CSV id column must be read as strings; ValueError for bad input.
        """
        ...

    def titles(self) -> dict[int, str] | None:
        """Titles by item id, complete once `batches` has run; None where the input has none."""
        ...


def infer_format(path: Path) -> str:
    """The format that the name of `path` (or of the files in it) tells; ValueError where it tells none."""
    name = path.name.lower()
    if path.is_dir() or archives.is_zip(name):
        with readable(str(path)):
            inside = archives.names(path)
        if netflix.holds_ratings(inside) or any(archives.base_name(n) == "training_set.tar" for n in inside):
            return "netflix"
        if path.is_dir() and inside and all(n.lower().endswith(".parquet") for n in inside):
            return "parquet"
        if any(archives.base_name(n) in RATINGS for n in inside):
            return "movielens"
        if path.is_dir() and inside and all(n.lower().endswith(_CSV_SUFFIXES) for n in inside):
            return "csv"
    elif netflix.holds_ratings([name]) or archives.is_tar(name):
        return "netflix"
    elif name == "ratings.dat" or (name == "ratings.csv" and _has_movielens_header(path)):
        return "movielens"
    elif name.endswith(_CSV_SUFFIXES):
        return "csv"
    elif name.endswith((".parquet", ".pq")):
        return "parquet"
    raise ValueError(f"cannot tell the format of {path} from its name; pass --format, one of {', '.join(FORMATS)}")


def _has_movielens_header(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.readline(1000).startswith((b"userId,movieId,", b"\xef\xbb\xbfuserId,movieId,"))


def open_source(path: Path, name: str | None, columns: Columns) -> Source:
    """The reader of `path` in format `name` (None: inferred); ValueError where there is none, or columns do not apply."""
    if not path.exists():
        raise ValueError(f"the input {path} does not exist; name a file or folder")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"the input {path} is a pipe or device, which cannot be read twice; write it to a file first")
    name = name or infer_format(path)
    if name in ("csv", "parquet"):
        suffixes = _CSV_SUFFIXES if name == "csv" else (".parquet",)
        paths = sorted(p for p in path.rglob("*") if p.name.lower().endswith(suffixes)) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"the folder {path} holds no {' or '.join(suffixes)} file")
        return CsvSource(paths, columns) if name == "csv" else ParquetSource(paths, columns)
    if columns != Columns():
        raise ValueError(f"the {name} format has fixed columns and no split; leave out --*_column, or pass --format csv or parquet")
    return MovieLensSource(path) if name == "movielens" else NetflixSource(path)
