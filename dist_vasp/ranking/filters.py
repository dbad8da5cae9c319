"""Read files of item ids that lists must exclude (--filter_items) or contain (--restrict_to).

A CSV or Parquet file has the item column; a text file (.txt, .txt.gz, ...) has one id a line.
Shapes: I items.
"""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

from dist_vasp.data import ids
from dist_vasp.data.items import ItemTable
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.read import Table, open_table
from dist_vasp.data.tables.streams import unpacked_name

_ONE_CELL = "\x1f"  # a unit separator, which does not occur in ids


def allowed_items(
    items: ItemTable,
    filter_items: str | None,
    restrict_to: str | None,
    item_column: str = "item",
    reading: Reading | None = None,
) -> tuple[np.ndarray | None, list[str]]:
    """Return which items may be listed, (I,) bool (None: all), and notes on the files.

    reading: the encoding of the files, and texts that stand for a missing id. ValueError where a
    file cannot be read, or no item may be listed.
    """
    if filter_items is None and restrict_to is None:
        return None, []
    allowed, notes = np.ones(len(items.keys), bool), []
    for option, path in (("--restrict_to", restrict_to), ("--filter_items", filter_items)):
        if path is None:
            continue
        rows, note = _read(path, option, items, item_column, reading or Reading())
        notes.append(note)
        if option == "--restrict_to":
            allowed[:] = False
        allowed[rows] = option == "--restrict_to"
    if not allowed.any():
        raise ValueError(
            f"{' and '.join(note.split(':')[0] for note in notes)} leave no item that the model "
            "knows; name other ids"
        )
    return allowed, notes


def _read(
    path: str, option: str, items: ItemTable, item_column: str, reading: Reading
) -> tuple[np.ndarray, str]:
    """Return the item rows of the ids in a file, and a note on how many are known."""
    try:
        listed, left_out = _ids_of(path, item_column, reading)
    except ValueError as error:
        text = str(error)
        if "has no column" in text or "cannot tell the format" in text:
            text = (
                f"{path} is no CSV or Parquet file with a column {item_column!r}, and no .txt "
                "file with an id a line; name one"
            )
        raise ValueError(f"{option}: {text}") from None
    rows = ids.find(listed, items.ids)
    if (
        len(rows)
        and rows[0] < 0
        and _is_text_file(path)
        and ids.as_text(listed[:1])[0].as_py() in (item_column, "item")
    ):
        rows = rows[1:]  # a header
    return rows[rows >= 0], counted(
        f"{option} {path}", len(rows), int((rows < 0).sum()), sum(left_out.values())
    )


def counted(what: str, n: int, n_unknown: int, n_missing: int = 0) -> str:
    """Return a note on the ids of a filter."""
    note = f"{what}: {n:,} ids, {n_unknown:,} of them not in the vocabulary"
    return note + (f"; {n_missing:,} rows without an id left out" if n_missing else "")


def _is_text_file(path: str) -> bool:
    return unpacked_name(path.lower()).endswith(".txt")


def _ids_of(path: str, item_column: str, reading: Reading) -> tuple[pa.Array, dict[str, int]]:
    """Return the ids in a file, and counts of the rows left out, by reason."""
    if _is_text_file(path):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            return pa.array([], pa.int64()), {}
        lines = Reading(
            _ONE_CELL, reading.encoding, header=False, quoting=False, missing=reading.missing
        )
        return _column(open_table([path], _only("1"), lines))
    table = open_table(
        [path], _only(item_column), Reading(encoding=reading.encoding, missing=reading.missing)
    )
    if item_column != "item":
        try:
            table.match_columns()
        except ValueError as error:
            table = table.with_columns(_only("item"))
            try:
                table.match_columns()
            except ValueError:
                raise error from None
    return _column(table)


def _only(item_column: str) -> Columns:
    return Columns(user=None, item=item_column, optional_rating=False)


def _column(table: Table) -> tuple[pa.Array, dict[str, int]]:
    joined = ids.join([batch["item"] for batch in table.batches()])
    return joined, table.left_out
