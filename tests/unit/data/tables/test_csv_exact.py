"""What data_tools.shard and launch/recommend.py read from a CSV equals Python's csv module.

The files are generated, and their cells cross the borders of blocks. Either the rows are equal, or
there is an error that names the row. CSV_FILES=2000 in the environment runs more files.
"""

from __future__ import annotations

import os
import re

import pyarrow as pa
import pytest

from data_tools.readers import open_source
from dist_vasp.data import ids
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.items import ItemTable
from dist_vasp.data.tables import csv_blocks
from dist_vasp.ranking.history_file import open_histories
from tests.oracles.csv_files import CsvFile, generate

N_FILES = int(os.environ.get("CSV_FILES", "100"))
STRICTER = re.compile(r"lines that look like rows of the table")


def _vocabulary(rows: list[tuple[str, str, str]]) -> ItemTable:
    items = ids.compact(pa.array(list(dict.fromkeys(item for _, item, _ in rows)), pa.string()))
    return ItemTable(items, keys_of_ids(items), None)


def read_for_shards(file: CsvFile) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for batch in open_source(file.path, "csv", file.columns, file.reading).batches():
        columns = [ids.as_text(batch["user"]), ids.as_text(batch["item"]), batch["title"]]
        rows += zip(*(column.to_pylist() for column in columns), strict=True)
    return rows


def read_as_histories(file: CsvFile) -> dict[str, set[str]]:
    items = _vocabulary(file.expected.rows)
    names = ids.as_text(items.ids).to_pylist()
    found: dict[str, set[str]] = {}
    with open_histories(file.path, file.path.parent, reading=file.reading) as histories:
        for block in histories.blocks(items, 3):
            assert not len(block.skipped) and block.n_unknown == 0
            bounds = block.rows.indptr
            for user, lo, hi in zip(
                ids.as_text(block.users).to_pylist(), bounds[:-1], bounds[1:], strict=True
            ):
                assert user not in found
                found[user] = {names[i] for i in block.rows.items[lo:hi]}
    return found


def _checked(file: CsvFile, read, expected) -> str:
    """Return the outcome, equal or an error with the right row; anything else fails."""
    try:
        found = read(file)
    except ValueError as error:
        text = str(error)
        if file.expected.error_row is None and "without a user or an item" in text:
            assert not file.expected.rows
            return "equal"
        assert re.search(r"row [\d,]+", text), text
        if STRICTER.search(text):
            assert file.damaged, text  # the csv module reads these rows as one cell
            return "error about a stray quote"
        assert file.expected.error_row is not None, text
        row = int(re.search(r"row ([\d,]+)", text)[1].replace(",", ""))
        if "NUL" in text:  # a block is searched for NUL before its rows are split
            assert row >= file.expected.error_row, (text, file.expected.error_row)
        else:
            assert row == file.expected.error_row, (text, file.expected.error_row)
        return "error"
    assert file.expected.error_row is None, (
        f"row {file.expected.error_row} is wrong and nothing was said"
    )
    assert found == expected, "silently different"
    return "equal"


@pytest.mark.parametrize("first", range(0, N_FILES, 50))
def test_rows_are_those_of_the_csv_module_or_there_is_an_error(tmp_path, monkeypatch, first):
    outcomes: dict[str, int] = {}
    for seed in range(first, min(first + 50, N_FILES)):
        file = generate(seed, tmp_path)
        monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", file.block)
        of_user: dict[str, set[str]] = {}
        for user, item, _ in file.expected.rows:
            of_user.setdefault(user, set()).add(item)
        for read, expected in ((read_for_shards, file.expected.rows), (read_as_histories, of_user)):
            try:
                outcome = _checked(file, read, expected)
            except AssertionError as error:
                raise AssertionError(
                    f"file {seed}, {read.__name__}: {error}\n{file.data!r}"
                ) from None
            outcomes[f"{read.__name__} {outcome}"] = (
                outcomes.get(f"{read.__name__} {outcome}", 0) + 1
            )
    print(outcomes)
