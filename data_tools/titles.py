"""Titles of items from a file of their own (`--titles`): CSV or Parquet with the item column and
`title`."""

from __future__ import annotations

from pathlib import Path

from dist_vasp.data import ids
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.read import open_table


def read_titles(
    path: Path, item_column: str, reading: Reading | None = None
) -> dict[int | str, str]:
    """Titles by id, as number and as text where the id is a number; the first of an item counts.

    ValueError where the file is no such table.
    """
    columns = Columns(user=None, item=item_column, title="title", optional_rating=False)
    found: dict[int | str, str] = {}
    try:
        for batch in open_table([path], columns, reading).batches():
            for one, title in zip(
                ids.as_text(batch["item"]).to_pylist(), batch["title"].to_pylist(), strict=True
            ):
                if title:
                    found.setdefault(one, title)
                    if str(number := int(one) if one.isascii() and one.isdecimal() else -1) == one:
                        found.setdefault(number, title)
    except ValueError as error:
        raise ValueError(
            f"--titles {error}; expected CSV or Parquet with the columns {item_column} and title"
        ) from None
    return found
