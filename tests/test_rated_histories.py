"""Histories with ratings: likes are the input, everything seen is masked; the same from Python, files and any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse

from dist_vasp import Recommender
from dist_vasp.data.positives import PositiveRule
from dist_vasp.ranking.accepted import history_lists, id_list
from dist_vasp.ranking.histories import Read
from tests.runs import write_run

N_ITEMS = 31
IDS = [1000 + 3 * i for i in range(N_ITEMS)]
RULE = PositiveRule(rating_column="rating", min_rating=4.0)
K = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def a_run(folder: Path, rule: PositiveRule | None, partitions: int = 1) -> Path:
    path = folder / f"{hash(rule)}-{partitions}"
    if not path.is_dir():
        write_run(path, IDS, "vasp", partitions, rule=rule)
    return path


def rows_of(seed: int = 0, n_users: int = 14) -> list[tuple[int, int, int, int]]:
    """(user, item, rating, time) in any order; pairs repeat, one item in ten is unknown, user 0 likes nothing."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(n_users):
        for _ in range(int(random.integers(4, 14))):
            item = int(random.choice([*IDS, 5, 6, 7]))
            rows.append((user, item, int(random.integers(1, 4 if user == 0 else 6)), int(random.integers(0, 50))))
    return [rows[n] for n in random.permutation(len(rows))]


def split_by_user(rows, repeats: str, by_time: bool = False) -> tuple[dict[int, set], dict[int, set]]:
    """(liked, seen) known items of every user, told straight."""
    pairs: dict[tuple[int, int], list] = {}
    for user, item, rating, time in rows:
        if item in IDS:
            pairs.setdefault((user, item), []).append((rating, time))
    liked: dict[int, set] = {}
    seen: dict[int, set] = {}
    for (user, item), given in pairs.items():
        decides = max(given, key=lambda g: g[0])[0]
        if repeats == "last":
            decides = given[max(range(len(given)), key=lambda n: (given[n][1] if by_time else 0, n))][0]
        seen.setdefault(user, set()).add(item)
        if decides >= 4:
            liked.setdefault(user, set()).add(item)
    return liked, seen


def expected_lists(r: Recommender, liked: dict[int, set], seen: dict[int, set]) -> dict[int, list[int]]:
    """Lists from the likes alone, with what was seen taken out of them by hand."""
    lists = {}
    for user, items in liked.items():
        ranked = r.recommend([sorted(items)], N_ITEMS, mask_input=False).ids[0].tolist()
        lists[user] = [item for item in ranked if item not in seen[user]][:K]
    return lists


def found_lists(lists) -> dict[int, list[int]]:
    pairs = zip(lists.users.to_pylist(), lists.ids.tolist(), strict=True)
    return {user: [i for i in row if i != -1] for user, row in pairs if row[0] != -1}


def table_of(rows) -> pa.Table:
    return pa.table(dict(zip(("user", "item", "rating", "timestamp"), map(list, zip(*rows, strict=True)), strict=True)))


@pytest.mark.parametrize("repeats", ["first", "last", "max"])
@pytest.mark.parametrize("by_time", [False, True])
def test_a_table_follows_the_rule(folder, repeats, by_time):
    rule = PositiveRule(rating_column="rating", min_rating=4.0, repeats=repeats, time_column="timestamp" if by_time else None)
    r, rows = Recommender.load(a_run(folder, rule)), rows_of()
    liked, seen = split_by_user(rows, repeats, by_time)
    lists = r.recommend(table_of(rows), K)
    assert found_lists(lists) == expected_lists(r, liked, seen)
    n_seen, n_liked, n_unknown = sum(map(len, seen.values())), sum(map(len, liked.values())), sum(i not in IDS for _, i, *_ in rows)
    repeated = len(rows) - n_unknown - n_seen
    assert lists.read == Read(len(rows), n_liked, n_seen - n_liked, repeated, n_unknown, 0)
    assert lists.read.disliked > 0 and repeated > 0 and n_unknown > 0, "or nothing was tested"
    nobody = {user for user, *_ in rows} - set(liked)
    assert 0 in nobody and set(lists.users.to_pylist()[-len(nobody) :]) == nobody, "who likes nothing comes last"
    assert set(lists.ids[-len(nobody) :].ravel()) == {-1}, "who likes nothing has no list"


def test_everything_can_be_a_like(folder):
    r, rows = Recommender.load(a_run(folder, RULE)), rows_of()
    _, seen = split_by_user(rows, "first")
    lists = r.recommend(table_of(rows), K, all_positive=True)
    assert found_lists(lists) == expected_lists(r, seen, seen) and lists.read.disliked == 0
    plain = r.recommend(table_of(rows).select(["user", "item"]), K)
    assert found_lists(plain) == found_lists(lists)
    assert plain.notes[0] == "the table has no column rating: every row is taken as a like"


@pytest.mark.parametrize("rule", [None, PositiveRule()])
def test_ratings_are_not_read_where_training_did_not(folder, rule):
    r, rows = Recommender.load(a_run(folder, rule)), rows_of()
    _, seen = split_by_user(rows, "first")
    lists = r.recommend(table_of(rows), K)
    assert found_lists(lists) == expected_lists(r, seen, seen)
    assert ("not known" in lists.notes[0]) == (rule is None)


def test_named_columns(folder):
    r, rows = Recommender.load(a_run(folder, RULE)), rows_of()
    table = table_of(rows).rename_columns(["who", "what", "stars", "timestamp"])
    named = {"user_column": "who", "item_column": "what", "rating_column": "stars"}
    assert found_lists(r.recommend(table, K, **named)) == found_lists(r.recommend(table_of(rows), K))
    with pytest.raises(ValueError, match=r"the table has no column 'user'; .*pass user_column="):
        r.recommend(table, K)
    with pytest.raises(ValueError, match="rating_column is 'stars', but histories are no table; leave it out"):
        r.recommend([[1000]], K, rating_column="stars")


def test_rows_without_an_id_are_counted(folder):
    r = Recommender.load(a_run(folder, RULE))
    table = pa.table({"user": ["a", None, "b", "NULL"], "item": ["1000", "1003", "", "1000"], "rating": [5, 5, 5, 5]})
    lists = r.recommend(table, K)
    assert lists.users.to_pylist() == ["a"] and lists.read == Read(4, 1, 0, 0, 0, 3)


def test_ratings_that_are_none(folder):
    r = Recommender.load(a_run(folder, RULE))
    for ratings in ([5, None], ["5", "five"]):
        with pytest.raises(ValueError, match=r"the table.*row 2: .*rating|the table.*row 2: 'five' is not a number"):
            r.recommend(pa.table({"user": [1, 1], "item": [1000, 1003], "rating": ratings}), K)


def test_a_matrix_of_ratings(folder):
    """Ones are likes; other numbers are ratings, as in a table."""
    r, rows = (
        Recommender.load(a_run(folder, RULE)),
        [row for row in {row[:2]: row for row in rows_of()}.values() if row[1] in IDS],
    )
    users, items, ratings = np.array([(u, IDS.index(i), s) for u, i, s, _ in rows]).T
    matrix = scipy.sparse.csr_matrix((ratings, (users, items)), shape=(14, N_ITEMS))
    lists = r.recommend(matrix, K)
    expected = found_lists(r.recommend(table_of(rows), K))
    assert {u: [i for i in row if i != -1] for u, row in enumerate(lists.ids.tolist()) if row[0] != -1} == expected
    ones = matrix.copy()
    ones.data[:] = 1
    np.testing.assert_array_equal(r.recommend(ones, K).ids, r.recommend(matrix, K, all_positive=True).ids)
    implicit = Recommender.load(a_run(folder, PositiveRule()))
    np.testing.assert_array_equal(implicit.recommend(ones, K).ids, implicit.recommend(matrix, K).ids)
    ones.data = ones.data.astype(float)
    ones.data[0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        r.recommend(ones, K)


def test_an_export_keeps_the_rule(folder, tmp_path):
    r = Recommender.load(a_run(folder, RULE))
    r.export(tmp_path / "export")
    exported = Recommender.load(tmp_path / "export")
    assert exported.positives == RULE
    table = table_of(rows_of())
    np.testing.assert_array_equal(exported.recommend(table, K).ids, r.recommend(table, K).ids)
    exported.export(tmp_path / "again")
    assert Recommender.load(tmp_path / "again").positives == RULE


# --- objects that are not read -------------------------------------------------------------------


def a_frame(module: str, name: str, **members):
    """An object of a class that pretends to come from a library of frames; iterating gives names of columns."""
    kind = type(name, (), {"__iter__": lambda self: iter(["user", "item"]), "__module__": module, **members})
    return kind()


FRAMES = [
    (a_frame("pandas.core.frame", "DataFrame", ndim=2), r"a pandas\.DataFrame, .*pass pyarrow\.Table\.from_pandas\(frame\)"),
    (a_frame("polars.dataframe.frame", "DataFrame"), r"a polars\.DataFrame, .*pass frame\.to_arrow\(\)"),
    (a_frame("polars.lazyframe.frame", "LazyFrame"), r"a polars\.LazyFrame, .*pass frame\.collect\(\)\.to_arrow\(\)"),
    (a_frame("modin.pandas.dataframe", "DataFrame"), r"a modin\.DataFrame, .*pass a pyarrow\.Table"),
    (a_frame("somewhere.else", "Frame", __arrow_c_stream__=None), r"a somewhere\.Frame, which is not read"),
    (a_frame("somewhere.else", "Frame", __dataframe__=None), r"a somewhere\.Frame, which is not read"),
]


@pytest.mark.parametrize(("frame", "message"), FRAMES)
def test_frames_are_refused_by_name(folder, frame, message):
    r = Recommender.load(a_run(folder, RULE))
    for call in (
        lambda: r.recommend(frame, K),
        lambda: r.recommend([frame], K),
        lambda: r.recommend([[1000]], K, filter_items=frame),
        lambda: r.recommend([[1000]], K, restrict_to=frame),
        lambda: r.explain(frame, 1000),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_arrays_that_are_ids_are_read(folder):
    r = Recommender.load(a_run(folder, RULE))
    series = a_frame("pandas.core.series", "Series", ndim=1, __iter__=lambda self: iter([1000, 1003]))
    expected = r.recommend([[1000, 1003]], K).ids
    for history in (series, np.array([1000, 1003]), pa.array([1000, 1003]), pa.chunked_array([[1000], [1003]]), {1000, 1003}):
        np.testing.assert_array_equal(r.recommend([history], K).ids, expected)
        assert sorted(id_list(history, "x")) == [1000, 1003]
    np.testing.assert_array_equal(r.recommend(pa.array([[1000, 1003]]), K).ids, expected)
    np.testing.assert_array_equal(r.recommend(np.array([[1000, 1003]]), K).ids, expected)


def test_an_array_as_wide_as_the_catalogue_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), as wide as the catalogue"):
        history_lists(np.zeros((2, 3), int), 3)
    for ids in (pa.table({"user": [1], "item": [2]}), pa.record_batch({"item": [2]}), np.zeros((2, 2), int), "abc", {1: 2}, 7):
        with pytest.raises(ValueError, match="x is "):
            id_list(ids, "x")
