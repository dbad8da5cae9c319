"""Histories in, lists with original ids out; nothing dropped silently, nothing half-written."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.items import ItemTable
from dist_vasp.data.rows import Rows
from dist_vasp.data.tables.columns import Reading
from dist_vasp.model.build import make_trunk
from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking import recommend as module
from dist_vasp.ranking.evaluate import model_scorer, top_items
from dist_vasp.ranking.histories import Histories, histories_of
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.recommend import recommend_to_file
from dist_vasp.ranking.writers import check_output, skipped_file
from tests.oracles.dense import dense_rows
from tests.oracles.rounding import ELEMENTARY, SAFETY, UNIT, bounded_scores, each_within
from tests.support.partitioned import dense_of, make_model
from tests.support.ranks import run_ranks


def item_table(ids: list, titles: list[str] | None = None) -> ItemTable:
    array = pa.array(ids)
    return ItemTable(
        array,
        keys_of_ids(array),
        np.arange(len(ids))[::-1].copy(),
        pa.array(titles) if titles else None,
    )


NUMBERED = item_table(list(range(1000, 1013)))
NAMED = item_table(["apple", "NA", "ü, quoted", "007", "null"])


def alone() -> Ranks:
    return form_groups(0, Layout(1, 1, 1), torch.device("cpu"))


def read_histories(path: Path, items: ItemTable, reading: Reading | None = None) -> Histories:
    """All of a file as one block."""
    with open_histories(path, path.parent, reading=reading) as file:
        blocks = list(file.blocks(items, 10**9))
        assert len(blocks) <= 1 and file.n_users == sum(b.n_users + len(b.skipped) for b in blocks)
        nothing = histories_of(pa.array([], file.user_type), np.empty(0, np.int32), len(items.keys))
    return blocks[0] if blocks else nothing


def lists_of(histories: Histories) -> dict:
    rows = histories.rows
    return {
        user: rows.items[a:b].tolist()
        for user, a, b in zip(
            histories.users.to_pylist(), rows.indptr[:-1], rows.indptr[1:], strict=True
        )
    }


def write(path: Path, users: list, items: list, other: bool = False) -> Path:
    columns = (
        {"item": items, "stars": [3] * len(users), "user": users}
        if other
        else {"user": users, "item": items}
    )
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with (
            pa.CompressedOutputStream(str(path), "gzip")
            if path.suffix == ".gz"
            else pa.OSFile(str(path), "wb") as out
        ):
            pa_csv.write_csv(table, out)
    return path


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h.csv", "h.csv.gz", "h.parquet"])
@pytest.mark.parametrize("other", [False, True])
def test_whole_numbers(tmp_path, name, other):
    path = write(tmp_path / name, [7, 3, 7, 7, 9, 3], [1004, 1001, 1000, 1004, 5, 77], other)
    histories = read_histories(path, NUMBERED)
    assert lists_of(histories) == {
        7: [0, 4],
        3: [1],
    }  # in order of appearance, ascending, without repeats
    assert histories.skipped.to_pylist() == [9]
    assert histories.n_unknown == 2
    assert histories.n_users == 2
    assert (histories.rows.indptr.dtype, histories.rows.items.dtype) == (np.int64, np.int32)


@pytest.mark.parametrize("name", ["h.csv", "h.csv.gz", "h.parquet"])
def test_text(tmp_path, name):
    path = write(
        tmp_path / name,
        ["ann", "NA", "007", "ann", "7", "7"],
        ["NA", "ü, quoted", "007", "apple", "null", "nothing"],
    )
    histories = read_histories(path, NAMED, Reading(missing=()))
    assert lists_of(histories) == {"ann": [0, 1], "NA": [2], "007": [3], "7": [4]}
    assert histories.n_unknown == 1
    assert lists_of(read_histories(path, NAMED)) == {"ann": [0], "007": [3], "7": [4]}


@pytest.mark.parametrize("name", ["h.csv", "h.csv.gz", "h.parquet"])
def test_rows_without_an_id_are_left_out_and_counted(tmp_path, name):
    path = write(
        tmp_path / name, ["ann", "", "NULL", "bob", "bob"], ["1000", "1001", "1001", "None", "1002"]
    )
    with open_histories(path, tmp_path) as file:
        assert (file.left_out.missing, file.left_out.rows) == (3, 3)
    histories = read_histories(path, NUMBERED)
    assert lists_of(histories) == {"ann": [0], "bob": [2]}
    assert histories.counts.rows == 2


def test_numbers_and_text_meet(tmp_path):
    """A vocabulary of numbers is found by text and the other way round."""
    as_text = write(tmp_path / "h.parquet", ["a", "a"], ["1002", "x"])
    assert lists_of(read_histories(as_text, NUMBERED)) == {"a": [2]}
    as_numbers = write(tmp_path / "g.parquet", [1, 1], [11, 12])
    assert lists_of(read_histories(as_numbers, item_table(["12", "13"]))) == {1: [0]}


@pytest.mark.parametrize(
    "types",
    [(pa.large_string(), pa.large_string()), (pa.int32(), pa.uint16()), (pa.int64(), pa.float64())],
)
def test_other_widths(tmp_path, types):
    text = pa.types.is_large_string(types[0])
    table = pa.table(
        {
            "user": pa.array(["1", "2"] if text else [1, 2], types[0]),
            "item": pa.array(["1001", "1000"] if text else [1001, 1000], types[1]),
        }
    )
    pq.write_table(table, tmp_path / "h.parquet")
    assert [
        sorted(v) for v in lists_of(read_histories(tmp_path / "h.parquet", NUMBERED)).values()
    ] == [[1], [0]]


def test_categories_that_nobody_has_are_no_users(tmp_path):
    users = pa.DictionaryArray.from_arrays(pa.array([1, 1]), pa.array(["x", "y", "z"]))
    pq.write_table(pa.table({"user": users, "item": [1000, 1001]}), tmp_path / "h.parquet")
    histories = read_histories(tmp_path / "h.parquet", NUMBERED)
    assert lists_of(histories) == {"y": [0, 1]}
    assert len(histories.skipped) == 0


def test_a_late_change_of_type_is_text_throughout(tmp_path):
    path = tmp_path / "h.csv"
    path.write_text("user,item\n" + "".join(f"{u},1000\n" for u in range(150_000)) + "late,1001\n")
    histories = read_histories(path, NUMBERED)
    assert pa.types.is_string(histories.users.type)
    assert histories.users[150_000].as_py() == "late"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("h.csv", b"user,item\n1,\n,1000\n", r"h\.csv: all 2 rows are without a user or an item"),
        ("h.csv", b"", r"h\.csv is empty; expected a header line with the names of the columns"),
        ("h.csv", b"user,item\n1\n", r"h\.csv, row 2: 1 cells where the header has 2"),
        (
            "h.csv",
            b'user,item\n1,2\n"1,2\n',
            r"h\.csv, row 3: the quote that opens here never closes",
        ),
        (
            "h.csv",
            b"user,movie\n1,2\n",
            r"has no column 'item'; its columns, separated by ',', are 'user', "
            r"'movie'; pass --item_column",
        ),
        (
            "h.csv",
            b"user,item\n1,\xff\n",
            r"h\.csv, row 2: the byte 0xff is not UTF-8 text; .*--encoding",
        ),
        ("h.csv.gz", b"user,item\n1,1000\n", r"h\.csv\.gz cannot be read"),
        ("h.csv.gz", gzip.compress(b"user,item\n1,1000\n" * 9)[:-9], r"h\.csv\.gz cannot be read"),
        ("h.parquet", b"", r"h\.parquet cannot be read"),
        ("h.parquet", b"PAR1 no it is not PAR1", r"h\.parquet cannot be read"),
        ("h", b"user,item\n", r"cannot tell the format of .*h from its name"),
        ("h.csv", None, r"the input .*h\.csv does not exist"),
        ("h.parquet", None, r"the input .*h\.parquet does not exist"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_histories(tmp_path / name, NUMBERED)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [None, None], "item": [1000, 1001]}, "all 2 rows are without a user or an item"),
        (
            {"user": [1, -2], "item": [1000, 1001]},
            "column 'user', row 2: the id -2 is outside 0 to 2.63-1",
        ),
        (
            {"user": [1.0, 2.5], "item": [1000, 1001]},
            "column 'user', row 2: the id 2.5 is not a whole number",
        ),
        ({"user": [[1], [2]], "item": [1000, 1001]}, "column 'user' is of type list"),
        ({"user": [1, 2], "item": [[1000], [1001]]}, "column 'item' is of type list"),
        ({"user": [b"\xff"], "item": [1000]}, "column 'user', row 1: the id is not UTF-8 text"),
        ({"item": [1000]}, "has no column 'user'; its columns are 'item'"),
    ],
)
def test_parquet_columns_that_cannot_be_used(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "h.parquet")
    with pytest.raises(ValueError, match=message):
        read_histories(tmp_path / "h.parquet", NUMBERED)


# --- writing --------------------------------------------------------------------------------------

PAIRS = [(u, 1000 + (3 * u + j) % 13) for u in range(1, 12) for j in range(u)] + [
    (50, 1),
    (51, 2),
    (50, 3),
    (1, 4),
]
K = 5
EXP = SAFETY * ELEMENTARY * UNIT  # two exponentials of one float32


@pytest.fixture
def pairs(tmp_path) -> None:
    write(tmp_path / "histories.parquet", *map(list, zip(*PAIRS, strict=True)))


def _histories(tmp_path: Path) -> Histories:
    return read_histories(tmp_path / "histories.parquet", NUMBERED)


def exact_p(rows: Rows) -> np.ndarray:
    """p of every item for these histories, (U, 13), by the oracle."""
    model = make_model("vasp", 13, alone(), dtype=torch.float32)
    listed = [rows.items[a:b].tolist() for a, b in itertools.pairwise(rows.indptr)]
    with torch.no_grad():
        x = dense_rows(listed, 13, torch.float64)
        return dense_of(model, make_trunk(model.config, 5)).log_p(x).exp().numpy()


def _recommend(ranks, tmp_path, name):
    module.USERS_PER_BLOCK = 4
    model = make_model("vasp", 13, ranks, dtype=torch.float32)
    scorer = model_scorer(model, make_trunk(model.config, 5))
    with open_histories(tmp_path / "histories.parquet", tmp_path) as histories:
        return recommend_to_file(scorer, histories, NUMBERED, K, tmp_path / name, ranks)


def to_file(scorer, path: Path, items: ItemTable, k: int, output: Path, *more, **options) -> str:
    with open_histories(path, path.parent) as histories:
        return recommend_to_file(scorer, histories, items, k, output, alone(), *more, **options)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "USERS_PER_BLOCK", 4)


def table_of(path: Path) -> pa.Table:
    return pq.read_table(path) if path.suffix == ".parquet" else pa_csv.read_csv(path)


@pytest.mark.parametrize("name", ["lists.csv", "lists.parquet"])
def test_lists(tmp_path, pairs, small_blocks, name):
    report = _recommend(alone(), tmp_path, name)
    table, histories = table_of(tmp_path / name), _histories(tmp_path)
    assert table.column_names == ["user", "rank", "item", "score"]
    model = make_model("vasp", 13, alone(), dtype=torch.float32)
    log_p, rows = top_items(
        model_scorer(model, make_trunk(model.config, 5)), histories.rows, K, 13, alone()
    )
    found = list(zip(*(table.column(c).to_pylist() for c in table.column_names), strict=True))
    expected = [
        (
            user,
            rank + 1,
            1000 + int(rows[u, rank]),
            pytest.approx(float(np.exp(log_p[u, rank])), rel=EXP),
        )
        for u, user in enumerate(histories.users.to_pylist())
        for rank in range(K)
        if rows[u, rank] >= 0
    ]
    assert found == expected
    by_user: dict = {}
    for user, rank, item, score in found:
        by_user.setdefault(user, []).append((rank, item, score))
        assert 0 < score < 1
        assert (user, item) not in PAIRS, "a seen item was recommended"
    for user, entries in by_user.items():
        assert [rank for rank, _, _ in entries] == list(
            range(1, min(K, 13 - user) + 1)
        )  # user u has seen u items
        scores = [score for _, _, score in entries]
        assert scores == sorted(scores, reverse=True)
    assert list(by_user) == list(range(1, 12))
    skipped = pa_csv.read_csv(skipped_file(tmp_path / name))
    assert skipped.to_pydict() == {
        "user": [50, 51],
        "reason": ["no item of the history is in the vocabulary"] * 2,
    }
    assert (
        f"{len(found)} recommendations for 11 users; 2 users without a list" in report
        and "4 of unknown items" in report
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["histories.parquet", name, "lists.skipped.csv"]
    )


def test_every_number_of_ranks_writes_the_same_lists(tmp_path, pairs, small_blocks):
    _recommend(alone(), tmp_path, "one.parquet")
    reports = run_ranks(_recommend, 3, tmp_path, "three.parquet")
    one, three = (pq.read_table(tmp_path / name) for name in ("one.parquet", "three.parquet"))
    assert one.drop(["score"]).equals(three.drop(["score"]))
    histories = _histories(tmp_path)
    place = {user: u for u, user in enumerate(histories.users.to_pylist())}
    users = [place[user] for user in one["user"].to_pylist()]
    items = [item - 1000 for item in one["item"].to_pylist()]
    exact, bounds = bounded_scores(lambda: exact_p(histories.rows))
    for table in (one, three):
        each_within(table["score"], exact[users, items], bounds[users, items], "p in a file")
    assert reports[0].startswith(f"{tmp_path / 'three.parquet'}: {one.num_rows} recommendations")


def constant_scorer(x):
    """Items in row order."""
    yield 0, -torch.arange(13.0).repeat(x.n_rows, 1)


def test_text_ids_and_titles(tmp_path):
    items = item_table([f"i{i}" for i in range(13)], [f"Title {i}" for i in range(13)])
    path = write(tmp_path / "h.csv", ["a", "a", "b"], ["i0", "i2", "i1"])
    report = to_file(constant_scorer, path, items, 2, tmp_path / "o.csv", show=1)
    lines = (tmp_path / "o.csv").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in lines] == [
        '"user","rank","item"',
        '"a",1,"i1"',
        '"a",2,"i3"',
        '"b",1,"i0"',
        '"b",2,"i2"',
    ]
    assert [float(line.rpartition(",")[2]) for line in lines[1:]] == pytest.approx(
        np.exp([-1.0, -3.0, 0.0, -2.0])
    )
    assert report.splitlines()[:3] == [
        "user a",
        "  history  Title 0, Title 2",
        "  list     Title 1 (0.368), Title 3 (0.050)",
    ]
    assert "user b" not in report


def test_progress_and_a_skipped_file_of_before(tmp_path, small_blocks):
    skipped_file(tmp_path / "o.csv").write_text("user,reason\n")
    path = write(tmp_path / "h.csv", list(range(9)), [1000] * 9)
    done: list[int] = []
    to_file(constant_scorer, path, NUMBERED, 1, tmp_path / "o.csv", done.append)
    assert done == [4, 8, 9]
    assert not skipped_file(tmp_path / "o.csv").exists()


@pytest.mark.parametrize("name", ["o.csv", "o.parquet"])
def test_no_users(tmp_path, name):
    path = tmp_path / "h.csv"
    path.write_text("user,item\n")
    report = to_file(constant_scorer, path, NUMBERED, 3, tmp_path / name)
    assert "0 recommendations for 0 users" in report
    assert table_of(tmp_path / name).num_rows == 0


@pytest.mark.parametrize(
    ("items", "shown"), [(["5", "6"], "5, 6"), (["1000.0", " 1000"], "'1000.0', ' 1000'")]
)
def test_no_known_item_at_all_is_an_error_that_shows_how_ids_are_written(tmp_path, items, shown):
    path = write(tmp_path / "h.csv", [1, 2], items)
    message = (
        f"h.csv: no item is known to the model.* written {shown}, those of the model "
        f"1000, 1001, 1002; ids must be equal"
    )
    with pytest.raises(ValueError, match=message):
        to_file(constant_scorer, path, NUMBERED, 3, tmp_path / "o.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["h.csv"]


@pytest.mark.parametrize("name", ["o.csv", "o.parquet"])
def test_nothing_is_half_written_when_the_scorer_raises(tmp_path, small_blocks, name):
    def breaks_in_the_second_block(x, calls=[]):  # noqa: B006 - counts the calls
        calls.append(1)
        if len(calls) % 2 == 0:
            raise ValueError("the model is broken")
        yield from constant_scorer(x)

    path = write(tmp_path / "h.csv", list(range(9)), [1000] * 9)
    before = b""
    for earlier in (False, True):
        if earlier:
            to_file(constant_scorer, path, NUMBERED, 2, tmp_path / name)
            before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match="the model is broken"):
            to_file(breaks_in_the_second_block, path, NUMBERED, 2, tmp_path / name)
        assert {p.name for p in tmp_path.iterdir()} == {"h.csv"} | ({name} if earlier else set())
    assert (tmp_path / name).read_bytes() == before


def test_output_is_checked(tmp_path):
    existing = tmp_path / "there.csv"
    existing.write_text('"user","rank","item","score"\n')
    check_output(existing, True)
    check_output(tmp_path / "new.parquet", False)
    for output, message in (
        (existing, r"there\.csv exists; pass --overwrite to replace it"),
        (tmp_path / "o.txt", r"ends in \.txt, expected one of \.csv, \.parquet, \.jsonl"),
        (tmp_path / "o", r"ends in nothing, expected"),
        (tmp_path / "no" / "o.csv", r"the folder .*no does not exist; create it first"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(output, False)
    path = write(tmp_path / "h.csv", [1], [1000])
    with pytest.raises(ValueError, match="does not exist; create it first"):
        to_file(constant_scorer, path, NUMBERED, 1, tmp_path / "missing" / "o.csv")


@pytest.mark.parametrize("name", ["o.csv", "o.parquet", "o.jsonl"])
def test_only_earlier_lists_are_replaced(tmp_path, name):
    path, output = write(tmp_path / "h.csv", [1, 2], [1000, 77]), tmp_path / name
    to_file(constant_scorer, path, NUMBERED, 1, output)
    before = output.read_bytes()
    to_file(constant_scorer, path, NUMBERED, 1, output)
    to_file(constant_scorer, path, NUMBERED, 1, output, overwrite=True)
    assert output.read_bytes() == before
    for spoilt, mine in ((output, b"user,item\n1,2\n"), (skipped_file(output), b"mine")):
        kept = spoilt.read_bytes()
        spoilt.write_bytes(mine)
        with pytest.raises(
            ValueError, match=rf"{spoilt.name} exists and was not written by this command"
        ):
            to_file(constant_scorer, path, NUMBERED, 1, output, overwrite=True)
        assert spoilt.read_bytes() == mine
        spoilt.write_bytes(kept)


def test_the_histories_are_not_taken_for_the_skipped_users_of_before(tmp_path):
    path = tmp_path / "lists.skipped.csv"
    path.write_text("user,reason\n")
    with pytest.raises(ValueError, match="is the file of --histories, which would be lost"):
        check_output(tmp_path / "lists.csv", True, [("--histories", path)])


@pytest.mark.parametrize("name", ["o.csv", "o.parquet", "o.jsonl"])
def test_who_has_seen_everything_is_told_with_the_reason(tmp_path, small_blocks, name):
    rows = [(7, 1000 + i) for i in range(13)] + [(8, 1000), (9, 5)]
    path = write(tmp_path / "h.csv", *map(list, zip(*rows, strict=True)))
    report = to_file(constant_scorer, path, NUMBERED, 3, tmp_path / name)
    assert "3 recommendations for 1 users; 2 users without a list are in" in report
    skipped = pa_csv.read_csv(skipped_file(tmp_path / name)).to_pylist()
    assert {row["user"]: row["reason"][:22] for row in skipped} == {
        9: "no item of the history",
        7: "no item is left to lis",
    }
    assert "26 recommendations for 2 users; 1 users" in to_file(
        constant_scorer, path, NUMBERED, 13, tmp_path / name, keep_seen=True
    )


def test_nobody_has_an_unseen_item(tmp_path):
    path = write(tmp_path / "h.csv", [7, 8], [1000, 1000])
    allowed = np.arange(13) == 0
    with pytest.raises(
        ValueError,
        match="2 users have seen every item that may be listed, so that nobody gets a "
        "list; pass --keep_",
    ):
        to_file(constant_scorer, path, NUMBERED, 3, tmp_path / "o.csv", allowed=allowed)
    assert "2 recommendations for 2" in to_file(
        constant_scorer, path, NUMBERED, 3, tmp_path / "o.csv", allowed=allowed, keep_seen=True
    )
