"""Choose the reader of an input: by --format, or by the name of the file, folder or archive."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import pyarrow as pa

from data_tools import archives, netflix
from data_tools.netflix import NetflixSource
from dist_vasp.data.tables import movielens
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.inputs import (
    check_file,
    expand,
    kind_of,
    names_in,
    one_kind,
    tables_among,
)
from dist_vasp.data.tables.read import Table, open_table
from dist_vasp.data.tables.streams import readable

Inputs: TypeAlias = str | Path | Sequence[str | Path]
FORMATS = ("csv", "parquet", "movielens", "netflix")

__all__ = ["FORMATS", "Columns", "Reading", "Source", "infer_format", "open_source"]


class Source(Protocol):
    """An input that can be read more than once, in the same order."""

    @property
    def left_out(self) -> dict[str, int]:
        """Counts of the rows that `batches` left out, by reason."""
        ...

    @property
    def notes(self) -> list[str]:
        """Other remarks on the input for the user; complete once `batches` has run."""
        ...

    def match_columns(self) -> tuple[dict[str, str], list[str]]:
        """Return the names of the columns that are read, by role, and of those that are not.

        This reads no rows.
        """
        ...

    def read_times(self) -> str | None:
        """Read the column timestamp, too, if there is one; return its name."""
        ...

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield batches as in dist_vasp/data/tables/read.py; ValueError for bad input."""
        ...

    def titles(self) -> dict[int, str] | None:
        """Return titles by item id, complete once `batches` has run; None if there are none."""
        ...


@dataclass
class TableSource:
    """A table in CSV or Parquet, optionally with titles from another file."""

    table: Table
    titles_of: movielens.MovieLens | None = None

    @property
    def left_out(self) -> dict[str, int]:
        return self.table.left_out

    def match_columns(self) -> tuple[dict[str, str], list[str]]:
        names, unused = self.table.match_columns()
        # of the files after the first
        later = [name for name in self.table.unused if name not in names.values()]
        return names, list(dict.fromkeys([*unused, *later]))

    def read_times(self) -> str | None:
        _, unused = self.table.match_columns()
        if "timestamp" not in unused:
            return None
        self.table = self.table.with_columns(replace(self.table.columns, time="timestamp"))
        return "timestamp"

    @property
    def notes(self) -> list[str]:
        return self.table.notes()

    def batches(self) -> Iterator[pa.RecordBatch]:
        return self.table.batches()

    def titles(self) -> dict[int, str] | None:
        return self.titles_of.titles() if self.titles_of is not None else None


def infer_format(inputs: Inputs) -> str:
    """Return the format of the inputs by their names, or by the names of the files in them.

    ValueError where the names do not tell it.
    """
    paths = _paths(inputs)
    formats = {_format_of(path) for path in paths}
    if len(formats) > 1:
        raise ValueError(
            f"the inputs are {' and '.join(sorted(formats))} by their names; pass --format, or "
            "name files of one kind"
        )
    return formats.pop()


def _paths(inputs: Inputs) -> list[Path]:
    """Return the paths that one or several inputs name."""
    several = [inputs] if isinstance(inputs, str | Path) else inputs
    return [path for text in several for path in expand(str(text))]


def _format_of(path: Path) -> str:
    name = path.name.lower()
    if path.is_dir() or (archives.is_zip(name) and path.is_file()):
        with readable(str(path)):
            inside = names_in(path)
        if netflix.holds_ratings(inside) or any(
            archives.base_name(n) == "training_set.tar" for n in inside
        ):
            return "netflix"
        if movielens.find(path) is not None:
            return "movielens"
        tables = tables_among(inside, None if path.is_dir() else "csv")
        one_kind(path, tables)
        return next(iter(tables.values()), "csv")
    if netflix.holds_ratings([name]) or archives.is_tar(name):
        return "netflix"
    if path.is_file() and movielens.find(path) is not None:
        return "movielens"
    kind = "csv" if ".zip/" in str(path).lower() else kind_of(name)
    if kind is None:
        if os.path.lexists(path):
            check_file(path)
        raise ValueError(
            f"cannot tell the format of {path} from its name; pass --format, one of "
            f"{', '.join(FORMATS)}"
        )
    return kind


def open_source(
    inputs: Inputs,
    name: str | None = None,
    columns: Columns | None = None,
    reading: Reading | None = None,
) -> Source:
    """Return the reader of `inputs` in format `name` (None: inferred).

    ValueError where the format has fixed columns and others are named.
    """
    columns, reading = columns or Columns(), reading or Reading()
    fixed = (
        replace(columns, time=None) == Columns()
        and columns.time in (None, "timestamp")
        and reading == Reading(missing=reading.missing)
    )
    inferred = name or infer_format(inputs)
    if name is None and inferred == "movielens" and not fixed:
        inferred = "csv"  # the user names columns: read it as a plain table
    if inferred in ("csv", "parquet"):
        return TableSource(
            open_table(
                [inputs] if isinstance(inputs, str | Path) else inputs, columns, reading, inferred
            )
        )
    if not fixed or (inferred == "netflix" and columns.time is not None):
        raise ValueError(
            f"the {inferred} format has fixed columns and no split; leave out --*_column, "
            "--delimiter "
            "and the like, or pass --format csv or parquet"
        )
    paths = _paths(inputs)
    if len(paths) != 1:
        raise ValueError(
            f"the {inferred} format is read from one file, folder or archive, {len(paths)} are "
            "named; name one"
        )
    if not paths[0].is_dir():
        check_file(paths[0])
    if inferred == "netflix":
        return NetflixSource(paths[0])
    ratings = movielens.find(paths[0], any_header=True)
    if ratings is None and paths[0].is_file() and not archives.is_zip(paths[0].name):
        ratings = movielens.MovieLens(paths[0].parent, paths[0].name)
    if ratings is None:
        raise ValueError(
            f"{paths[0]} holds no {', '.join(movielens.RATINGS)}; expected a MovieLens data set"
        )
    table = Table(
        [ratings.file()],
        ratings.columns(columns.time is not None),
        ratings.reading(reading.missing),
    )
    return TableSource(table, ratings)
