"""Files of items to leave out or to keep to, and the columns that files of histories are read
by."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.ranking.filters import allowed_items
from dist_vasp.ranking.history_columns import history_columns
from tests.unit.ranking.test_recommend import item_table

ITEMS = item_table([f"i{n}" for n in range(9)])
NUMBERS = item_table(list(range(100, 109)))


def written(folder: Path, name: str, content: str | bytes | pa.Table) -> str:
    path = folder / name
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "rows", "counts"),
    [
        ("a.csv", "item\ni1\ni5\n", [1, 5], "2 ids, 0 of them"),
        ("a.csv", "title,item\nx,i1\ny,i5\nz,other\n", [1, 5], "3 ids, 1 of them"),
        ("a.csv.gz", gzip.compress(b"item\ni1\n", mtime=0), [1], "1 ids, 0 of them"),
        ("a.tsv", "title\titem\nx\ti1\n", [1], "1 ids, 0 of them"),
        (
            "a.parquet",
            pa.table({"item": ["i1", "i5", None]}),
            [1, 5],
            "2 ids, 0 of them not in the vocabulary; 1 rows without an id",
        ),
        ("a.txt", "i1\ni5\n", [1, 5], "2 ids, 0 of them"),
        ("a.txt", "item\r\ni1\r\ni5", [1, 5], "2 ids, 0 of them"),
        ("a.txt", "i1,5\ni5\n", [5], "2 ids, 1 of them"),
        ("a.txt", "\ufeffi1\n", [1], "1 ids, 0 of them"),
        ("a.txt", "", [], "0 ids, 0 of them"),
        ("a.txt", " i1\n", [], "1 ids, 1 of them"),
        ("a.csv", "item\n", [], "0 ids, 0 of them"),
        (
            "a.csv",
            "item\nNULL\ni1\n",
            [1],
            "1 ids, 0 of them not in the vocabulary; 1 rows without an id",
        ),
    ],
)
def test_files_of_ids(tmp_path, name, content, rows, counts):
    path = written(tmp_path, name, content)
    allowed, notes = allowed_items(ITEMS, path, None)
    assert allowed is not None and np.flatnonzero(~allowed).tolist() == rows
    assert len(notes) == 1 and notes[0].startswith(f"--filter_items {path}: {counts}")
    if rows:
        allowed, _ = allowed_items(ITEMS, None, path)
        assert allowed is not None and np.flatnonzero(allowed).tolist() == rows


def test_numbers_and_texts_are_one_id(tmp_path):
    for name, content in (("a.txt", "101\n0101\n103\n"), ("a.csv", "item\n103\n101\n")):
        allowed, _ = allowed_items(NUMBERS, written(tmp_path, name, content), None)
        assert allowed is not None and np.flatnonzero(~allowed).tolist() == [1, 3]
    floats = written(tmp_path, "f.parquet", pa.table({"item": [101.0, 103.0]}))
    allowed, _ = allowed_items(NUMBERS, floats, None)
    assert allowed is not None and np.flatnonzero(~allowed).tolist() == [1, 3]


def test_both_together(tmp_path):
    gone, only = (
        written(tmp_path, "gone.txt", "i2\ni3\n"),
        written(tmp_path, "only.txt", "i1\ni2\n"),
    )
    allowed, notes = allowed_items(ITEMS, gone, only)
    assert allowed is not None and np.flatnonzero(allowed).tolist() == [1]
    assert [note.split(" ")[0] for note in notes] == ["--restrict_to", "--filter_items"]
    assert allowed_items(ITEMS, None, None) == (None, [])


def test_the_item_column(tmp_path):
    path = written(tmp_path, "a.csv", "movie,item\ni1,i2\n")
    for column, row in (
        ("movie", 1),
        ("item", 2),
        ("title", 2),
    ):  # the last one is not there: item is
        allowed, _ = allowed_items(ITEMS, path, None, column)
        assert allowed is not None and np.flatnonzero(~allowed).tolist() == [row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "i1\ni2\n",
            "a.csv is no CSV or Parquet file with a column 'item', and no .txt "
            "file with an id a line",
        ),
        ("a.csv", "17\n18\n", "a.csv is no CSV or Parquet file with a column 'item'"),
        ("a.xlsx", "item\n", "a.xlsx is no CSV or Parquet file with a column 'item'"),
        (
            "a.parquet",
            pa.table({"id": ["i1"]}),
            "a.parquet is no CSV or Parquet file with a column 'item'",
        ),
        ("a.csv", "item,item\ni1,i2\n", "has more than one column 'item'"),
        ("a.txt", b"i1\n\xff\n", "row 2: the byte 0xff is not UTF-8"),
        ("a.parquet", pa.table({"item": [0.5]}), "is not a whole number"),
        ("nowhere/a.txt", None, "does not exist"),
    ],
)
def test_files_that_hold_no_ids(tmp_path, name, content, message):
    path = str(tmp_path / name) if content is None else written(tmp_path, name, content)
    for options in ((path, None), (None, path)):
        with pytest.raises(ValueError) as error:
            allowed_items(ITEMS, *options)
        assert message in str(error.value) and str(error.value).startswith(
            "--filter_items" if options[0] else "--restrict_to"
        )


def test_no_item_is_left(tmp_path):
    strangers = written(tmp_path, "a.txt", "x\ny\n")
    with pytest.raises(
        ValueError, match=r"--restrict_to .*a\.txt leave no item that the model knows"
    ):
        allowed_items(ITEMS, None, strangers)
    everything = written(tmp_path, "all.txt", "\n".join(ITEMS.ids.to_pylist()))
    with pytest.raises(ValueError, match=r"--filter_items .*all\.txt leave no item"):
        allowed_items(ITEMS, everything, None)


# --- columns of histories ------------------------------------------------------------------------

RULE = PositiveRule("uid", "movie", "stars", None, 4.0)


@pytest.mark.parametrize(
    ("header", "asked", "expected", "note"),
    [
        ("uid,movie,stars", {}, ("uid", "movie", "stars"), None),
        ("stars;movie;uid", {}, ("uid", "movie", "stars"), None),
        (
            "user,item,stars",
            {},
            ("user", "item", "stars"),
            "has no column uid, which the shards were made from; column user is read",
        ),
        (
            "user,movie",
            {},
            ("user", "movie", None),
            "has no column stars: every row is taken as a like",
        ),
        ("a,b,c", {"user": "c", "item": "a", "rating": "b"}, ("c", "a", "b"), None),
        (" uid , movie , stars ", {}, ("uid", "movie", "stars"), None),
        (
            "uid:token,movie:token,stars:float",
            {},
            ("uid:token", "movie:token", "stars:float"),
            None,
        ),
        (
            "uid,movie,Stars",
            {},
            ("uid", "movie", None),
            "--rating_column Stars reads ratings from it",
        ),
    ],
)
def test_columns_of_a_file(tmp_path, header, asked, expected, note):
    path = written(tmp_path, "h.csv", header + "\n")
    columns, notes = history_columns([path], Reading(), RULE, asked)
    assert columns == Columns(expected[0], expected[1], expected[2], optional_rating=False)
    assert any(note in one for one in notes) if note else notes == []


def test_a_name_with_and_without_blanks(tmp_path):
    path = written(tmp_path, "h.csv", "user, user,item\n1,9,2\n")
    columns, _ = history_columns([path], Reading(), None, {})
    assert (columns.user, columns.item) == ("user", "item")


def test_a_format_can_be_named(tmp_path):
    path = written(tmp_path, "histories", "user,item\n1,2\n")
    columns, _ = history_columns([path], Reading(), None, {}, kind="csv")
    assert (columns.user, columns.item) == ("user", "item")
    with pytest.raises(ValueError, match="cannot tell the format"):
        history_columns([path], Reading(), None, {})


def test_columns_without_a_header(tmp_path):
    path = written(tmp_path, "h.csv", "7,8,5\n")
    columns, notes = history_columns(
        [path], Reading(header=False), RULE, {"user": "1", "item": "2", "rating": "3"}
    )
    assert (columns.user, columns.item, columns.rating, notes) == ("1", "2", "3", [])
    columns, notes = history_columns([path], Reading(header=False), PositiveRule(), {})
    assert (columns.user, columns.item, columns.rating) == ("1", "2", None)
    assert notes == ["columns not used: 3"]


def test_columns_of_movielens(tmp_path):
    """Its files have no header, or one of their own; the shards may come from either, or from
    another table."""
    header = "userId,movieId,rating,timestamp\n"
    for name, content in (("ratings.dat", "1::2::5::9\n"), ("ratings.csv", header + "1,2,5,9\n")):
        path = written(tmp_path, name, content)
        for rule in (
            PositiveRule("userId", "movieId", "rating", None, 4.0),
            PositiveRule("user", "item", "rating", None, 4.0),
        ):
            columns, notes = history_columns([path], Reading(), rule, {})
            assert (columns.user, columns.item, columns.rating) == ("userId", "movieId", "rating")
            assert notes[-1] == "columns not used: timestamp" and len(notes) == (
                1 if rule.user_column == "userId" else 3
            )


def test_columns_of_folders(tmp_path):
    (tmp_path / "uid=7").mkdir()
    written(tmp_path / "uid=7", "a.csv", "movie,stars\n1,5\n")
    columns, notes = history_columns([str(tmp_path)], Reading(), RULE, {})
    assert (columns.user, columns.item, columns.rating, notes) == ("uid", "movie", "stars", [])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"user": "who"}, "has no column 'who'"),
        ({"rating": "score"}, "has no column 'score'"),
        ({"item": "what"}, "has no column 'what'"),
    ],
)
def test_columns_that_are_not_there(tmp_path, asked, message):
    path = written(tmp_path, "h.csv", "uid,movie,stars\n")
    with pytest.raises(ValueError, match=message):
        history_columns([path], Reading(), RULE, asked)
