"""Read titles of items from a separate file (`--titles`): CSV or Parquet with the item column and
`title`."""

from __future__ import annotations

from pathlib import Path

from dist_vasp.data import ids
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.read import open_table


def read_titles(
    path: Path, item_column: str, reading: Reading | None = None
) -> dict[int | str, str]:
    """Return titles by item id; the first title of an item counts.

    A numeric id is a key twice: as a number and as text. ValueError where the file is not such a
    table.
    """
    columns = Columns(user=None, item=item_column, title="title", optional_rating=False)
    titles: dict[int | str, str] = {}
    try:
        for batch in open_table([path], columns, reading).batches():
            for one, title in zip(
                ids.as_text(batch["item"]).to_pylist(), batch["title"].to_pylist(), strict=True
            ):
                if title:
                    titles.setdefault(one, title)
                    if str(number := int(one) if one.isascii() and one.isdecimal() else -1) == one:
                        titles.setdefault(number, title)
    except ValueError as error:
        raise ValueError(
            f"--titles {error}; expected CSV or Parquet with the columns {item_column} and title"
        ) from None
    return titles
