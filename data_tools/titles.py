"""Titles of items from a file of their own (`--titles`): CSV or Parquet with the item column and `title`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq


def read_titles(path: Path, item_column: str) -> dict[int | str, str]:
    """Titles by id, as number and as text where the id is a number; the first of an item counts. ValueError where the file is no such
    table."""
    wanted = [item_column, "title"]
    try:
        if path.suffix in (".parquet", ".pq"):
            table = pq.read_table(path, columns=wanted)
        else:
            types = dict.fromkeys(wanted, pa.string())
            table = pa_csv.read_csv(path, convert_options=pa_csv.ConvertOptions(column_types=types, include_columns=wanted))
        ids, titles = (table.column(name).cast(pa.string()).to_pylist() for name in wanted)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"--titles {path} cannot be read ({error}); expected CSV or Parquet with the columns {item_column} and title"
        ) from None
    found: dict[int | str, str] = {}
    for one, title in zip(ids, titles, strict=True):
        if one is not None and title is not None:
            found.setdefault(one, title)
            if one.isascii() and one.isdecimal():
                found.setdefault(int(one), title)
    return found
