"""Ids have one identity: what shard accepts, recommend finds on the same file, and ids come back as
they were written."""

from __future__ import annotations

import csv
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_tools import shard
from dist_vasp.data import ids
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest, users_file
from dist_vasp.data.tables.columns import Reading
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.recommend import recommend_to_file
from tests.unit.ranking.test_recommend import alone, item_table

ROUNDS = int(os.environ.get("ID_ROUNDS", "20"))  # files of each format for the property
LARGEST = 2**63 - 1
NOT_CANONICAL = [
    "",
    "00",
    "007",
    "-1",
    "+1",
    " 1",
    "1 ",
    "1.0",
    "1e3",
    "0x17",
    "1_000",
    "٣",
    "²",
    str(2**63),
    "9" * 19,
    "9" * 40,
    "a",
]


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "1", "10", "9", str(LARGEST), "9" * 18])
def test_canonical_integers_are_numbers(text):
    assert ids.compact(pa.array([text, "5"])).to_pylist() == [int(text), 5]


@pytest.mark.parametrize("text", NOT_CANONICAL)
def test_one_other_text_makes_all_of_a_column_text(text):
    array = pa.array(["5", text, "17"])
    assert ids.compact(array).to_pylist() == ["5", text, "17"]
    assert ids.compact(array.slice(2)).to_pylist() == [17], "of a slice only its own ids count"
    assert ids.find(array, pa.array([17, 5])).tolist() == [1, -1, 0]
    assert ids.find(pa.array([17, 5]), array).tolist() == [2, 0]


@given(
    st.lists(
        st.one_of(
            st.integers(0, 2**64).map(str), st.text(max_size=20), st.sampled_from(NOT_CANONICAL)
        ),
        max_size=8,
    )
)
def test_numeric_only_where_every_id_survives_the_round_trip(texts):
    def survives(text: str) -> bool:
        return (
            text.isascii() and text.isdecimal() and str(int(text)) == text and int(text) <= LARGEST
        )

    found = ids.compact(pa.array(texts, pa.string()))
    assert pa.types.is_integer(found.type) == all(survives(text) for text in texts)
    assert ids.as_text(found).to_pylist() == texts


def test_codes_of_numbers_stay_when_a_text_comes_later():
    index = ids.IdIndex()
    batches = [["5", "17"], [], ["17", "007"], ["5", "7"]]
    codes = [
        index.encode(ids.compact(pa.array(batch, pa.string()))).to_pylist() for batch in batches
    ]
    assert codes == [[0, 1], [], [1, 2], [0, 3]]
    assert index.ids is not None and index.ids.to_pylist() == ["5", "17", "007", "7"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, 3], pa.uint8()), [1, None, 3]),
        (pa.array([LARGEST], pa.uint64()), [LARGEST]),
        (pa.array([1.0, None, float("nan"), -0.0, 2.0**53 - 1]), [1, None, None, 0, 2**53 - 1]),
        (
            pa.array(["NULL", "\\N", "nan", "None", "NA", "", None, "null", " "]),
            [None] * 7 + ["null", " "],
        ),
        (pa.array(["a", None, "NA"]).dictionary_encode(), ["a", None, None]),
        (pa.array([b"a", None], pa.large_binary()), ["a", None]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_columns(column, expected):
    assert ids.of_column(column, range(1, 100), "x").to_pylist() == expected


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.float64(), pa.float32()])
def test_a_number_can_stand_for_a_missing_id(kind):
    column = pa.array([3, -1, 0, 999 if kind.bit_width > 8 else 99], kind)
    assert ids.of_column(column, range(4), "x", ("-1", "0", "999", "NA", "-0", "007")).to_pylist()[
        :3
    ] == [3, None, None]
    with pytest.raises(ValueError, match="the id -1"):
        ids.of_column(column, range(4), "x", ("1",))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, -1]), "row 8: the id -1 is outside 0 to 2.63-1"),
        (pa.array([1, 2**63], pa.uint64()), f"row 8: the id {2**63} is outside"),
        (pa.array([1.0, 0.5]), "row 8: the id 0.5 is not a whole number"),
        (pa.array([1.0, -2.0]), "row 8: the id -2.0 is not a whole number"),
        (pa.array([1.0, float("inf")]), "row 8: the id inf is not a whole number"),
        (pa.array([1.0, 2.0**53]), "row 8: the id .* is not a whole number"),
        (pa.array([1.0, 2.0**24], pa.float32()), r"row 8: .* 2\^24-1"),
        (pa.array(["a", "b" * 5000]), "row 8: the id has more than 4,096 bytes"),
        (pa.array([True]), "of type bool"),
        (pa.array([[1]]), "of type list"),
    ],
)
def test_columns_that_hold_no_ids(column, message):
    with pytest.raises(ValueError, match=message):
        ids.of_column(column, [7, 8], "x")


def test_odd_ids_are_kept_and_said():
    found = ids.remarks("item", pa.array(["a", " 3", "b\t", "NaN", "n/a", "\\N", "book"]), "book")
    assert found == [
        "the item id 'book' is the name of a column; is a row of the input a header?",
        "2 item ids, such as ' 3', begin or end with blanks, which belong to the id",
        "3 item ids, such as 'NaN', look like a missing one; --missing leaves them out",
    ]
    assert (
        ids.remarks("item", pa.array(["a", "nanny", "3"]), "book")
        == ids.remarks("item", pa.array([3]), "book")
        == []
    )


# --- shard and recommend on one file --------------------------------------------------------------

CELLS = st.one_of(
    st.integers(0, 40).map(str),
    st.sampled_from(
        [
            *NOT_CANONICAL,
            "NULL",
            "NaN",
            "\\N",
            'say "hi"',
            "a,b",
            "two\nlines",
            "é",
            "😀",
            "\ufeff7",
            "\u2028",
            "7",
            "17",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
)
ROWS = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=25)


def _scorer(x):
    yield 0, torch.zeros(x.n_rows, x.n_items)


def _write(path, rows, kind):
    if kind == "csv":
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([("user", "item"), *rows])
        path.write_bytes(buffer.getvalue().encode())
    else:
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        numbers = [
            ids.compact(column) if "" not in column.to_pylist() else column for column in columns
        ]
        pq.write_table(pa.table({"user": numbers[0], "item": numbers[1]}), path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@settings(max_examples=ROUNDS, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=ROWS, missing=st.sampled_from([None, "", "17,7"]))
@example(rows=[("007", "0663713"), ("7", "663713")], missing=None)
@example(rows=[("1", " 3"), ("1", "3"), (" 1", "3.0")], missing=None)
def test_what_shard_accepts_recommend_finds(tmp_path_factory, capsys, kind, rows, missing):
    """Every id that comes out is one that went in, and every pair that went in is found again."""
    folder = tmp_path_factory.mktemp("ids")
    path = folder / f"in.{kind}"
    _write(path, rows, kind)
    options = [] if missing is None else ["--missing", missing]
    arguments = [
        str(path),
        str(folder / "o"),
        "--min_items",
        "1",
        "--val_users",
        "0",
        "--test_users",
        "0",
        *options,
    ]
    markers = {"", *(ids.MISSING if missing is None else missing.split(","))}
    present = [(u, i) for u, i in rows if u not in markers and i not in markers]
    status = shard.main(arguments)
    error = capsys.readouterr().err
    assert (status == 0) == bool(present), error
    if not present:
        assert "without a user or an item" in error
        return
    manifest = Manifest.load(folder / "o")
    items = load_items(folder / "o", manifest)
    users = pq.read_table(folder / "o" / users_file("train"))["id"]
    assert set(ids.as_text(items.ids).to_pylist()) == {i for _, i in present}
    assert set(users.cast(pa.string()).to_pylist()) == {u for u, _ in present}
    assert manifest.preparation["rows_read"] == len(rows)
    assert sum(manifest.preparation["left_out"].values()) + len(set(present)) == len(rows)
    reading = Reading(missing=tuple(m for m in markers if m))
    names = ids.as_text(items.ids).to_pylist()
    with open_histories(path, folder, reading=reading) as histories:
        found = {
            (user, names[i])
            for block in histories.blocks(items, 4)
            for user, lo, hi in zip(
                ids.as_text(block.users).to_pylist(),
                block.rows.indptr[:-1],
                block.rows.indptr[1:],
                strict=True,
            )
            for i in block.rows.items[lo:hi]
        }
        assert found == set(present)
        report = recommend_to_file(
            _scorer, histories, items, len(names), folder / "l.parquet", alone(), keep_seen=True
        )
    lists = pq.read_table(folder / "l.parquet")
    listed = {(str(row["user"]), str(row["item"])) for row in lists.to_pylist()}
    assert listed == {(u, i) for u, _ in present for i in names}
    assert f"read {len(rows):,} rows" in report


def test_users_keep_their_spelling_in_a_csv_of_lists(tmp_path):
    """A user's id in the output has the bytes that it has in the input."""
    users = ["007", "7", " 7", 'q"', "a,b", "é", "two\nlines"]
    with open(tmp_path / "h.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("user", "item"), *((user, "x") for user in users)])
    items = item_table(["x", "y"])
    with open_histories(tmp_path / "h.csv", tmp_path) as histories:
        recommend_to_file(_scorer, histories, items, 1, tmp_path / "o.csv", alone())
    with open(tmp_path / "o.csv", newline="", encoding="utf-8") as file:
        assert [row["user"] for row in csv.DictReader(file)] == users
