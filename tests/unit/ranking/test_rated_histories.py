"""Histories with ratings in Python: likes are the input, everything seen is masked, and the rule
comes from the shards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse

from data_tools.shard import main as shard
from dist_vasp import Recommender
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.data.ids import MISSING
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.tables.columns import Reading
from dist_vasp.ranking.accepted import history_lists, id_list
from dist_vasp.ranking.ensemble import describe_ensemble, load_ranker
from dist_vasp.ranking.histories import RowCounts
from dist_vasp.ranking.history_columns import history_columns
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.make_lists import one_rank
from launch.train import main as train
from tests.support.make_shards import write_folder
from tests.support.rated_histories import (
    IDS,
    N_ITEMS,
    RULE,
    K,
    a_run,
    command,
    expected_lists,
    found_lists,
    lists_in,
    rows_of,
    split_by_user,
    table_of,
    written,
)
from tests.support.runs import write_run
from tests.support.shard_folders import read_folder
from tests.support.sizes import sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("repeats", ["first", "last", "max"])
@pytest.mark.parametrize("by_time", [False, True])
def test_a_table_follows_the_rule(folder, repeats, by_time):
    rule = PositiveRule(
        rating_column="rating",
        min_rating=4.0,
        repeats=repeats,
        time_column="timestamp" if by_time else None,
    )
    r, rows = Recommender.load(a_run(folder, rule)), rows_of()
    liked, seen = split_by_user(rows, repeats, by_time)
    lists = r.recommend(table_of(rows), K)
    assert found_lists(lists) == expected_lists(r, liked, seen)
    n_seen, n_liked, n_unknown = (
        sum(map(len, seen.values())),
        sum(map(len, liked.values())),
        sum(i not in IDS for _, i, *_ in rows),
    )
    repeated = len(rows) - n_unknown - n_seen
    assert lists.read == RowCounts(len(rows), n_liked, n_seen - n_liked, repeated, n_unknown, 0)
    assert lists.read.disliked > 0 and repeated > 0 and n_unknown > 0, "or nothing was tested"
    nobody = {user for user, *_ in rows} - set(liked)
    assert 0 in nobody and set(lists.users.to_pylist()[-len(nobody) :]) == nobody, (
        "who likes nothing comes last"
    )
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
    assert found_lists(r.recommend(table, K, **named)) == found_lists(
        r.recommend(table_of(rows), K)
    )
    with pytest.raises(ValueError, match=r"the table has no column 'user'; .*pass user_column="):
        r.recommend(table, K)
    with pytest.raises(
        ValueError, match="rating_column is 'stars', but histories are no table; leave it out"
    ):
        r.recommend([[1000]], K, rating_column="stars")


def test_rows_without_an_id_are_counted(folder):
    r = Recommender.load(a_run(folder, RULE))
    table = pa.table(
        {
            "user": ["a", None, "b", "NULL"],
            "item": ["1000", "1003", "", "1000"],
            "rating": [5, 5, 5, 5],
        }
    )
    lists = r.recommend(table, K)
    assert lists.users.to_pylist() == ["a"] and lists.read == RowCounts(4, 1, 0, 0, 0, 3)


def test_ratings_that_are_none(folder):
    r = Recommender.load(a_run(folder, RULE))
    for ratings in ([5, None], ["5", "five"]):
        with pytest.raises(
            ValueError, match=r"the table.*row 2: .*rating|the table.*row 2: 'five' is not a number"
        ):
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
    assert {
        u: [i for i in row if i != -1] for u, row in enumerate(lists.ids.tolist()) if row[0] != -1
    } == expected
    ones = matrix.copy()
    ones.data[:] = 1
    np.testing.assert_array_equal(
        r.recommend(ones, K).ids, r.recommend(matrix, K, all_positive=True).ids
    )
    implicit = Recommender.load(a_run(folder, PositiveRule()))
    np.testing.assert_array_equal(
        implicit.recommend(ones, K).ids, implicit.recommend(matrix, K).ids
    )
    ones.data = ones.data.astype(float)
    ones.data[0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        r.recommend(ones, K)
    with pytest.raises(ValueError, match="the matrix holds complex128, expected numbers"):
        r.recommend(ones.astype(complex), K)
    twice = scipy.sparse.coo_matrix(([2, 3, 1], ([0, 0, 0], [4, 4, 7])), shape=(1, N_ITEMS))
    np.testing.assert_array_equal(r.recommend(twice, K).ids, r.recommend(twice.tocsr(), K).ids)
    assert r.recommend(twice, K).read == RowCounts(2, 1, 1, 0, 0, 0), (
        "2 and 3 add up to a rating of 5"
    )


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
    """An object of a class that pretends to come from a library of frames; iterating gives names of
    columns."""
    kind = type(
        name, (), {"__iter__": lambda self: iter(["user", "item"]), "__module__": module, **members}
    )
    return kind()


EXPECTED = (
    r", expected one of: lists of ids, a SciPy sparse matrix, or a table with the Arrow C "
    r"interface \(pandas, polars, pyarrow, DuckDB\); pass "
)
FRAMES = [
    (a_frame("polars.lazyframe.frame", "LazyFrame"), r"polars\.LazyFrame", r"frame\.collect\(\)"),
    (
        a_frame("modin.pandas.dataframe", "DataFrame"),
        r"modin\.DataFrame",
        r"a pyarrow\.Table made from it",
    ),
    (
        a_frame("pyspark.sql.dataframe", "DataFrame"),
        r"pyspark\.DataFrame",
        r"frame\.toArrow\(\)",
    ),
    (
        a_frame("somewhere.else", "Frame", __dataframe__=None),
        r"somewhere\.Frame",
        r"a pyarrow\.Table made from it",
    ),
]


@pytest.mark.parametrize(("frame", "name", "remedy"), FRAMES)
def test_frames_are_refused_by_name(folder, frame, name, remedy):
    r = Recommender.load(a_run(folder, RULE))
    with pytest.raises(ValueError, match=f"histories are a {name}{EXPECTED}{remedy}"):
        r.recommend(frame, K)
    for call in (
        lambda: r.recommend([frame], K),
        lambda: r.recommend([[1000]], K, filter_items=frame),
        lambda: r.recommend([[1000]], K, restrict_to=frame),
        lambda: r.explain(frame, 1000),
    ):
        with pytest.raises(ValueError, match=f"is a {name}, expected a list of ids; pass one col"):
            call()


def test_arrays_that_are_ids_are_read(folder):
    r = Recommender.load(a_run(folder, RULE))
    series = a_frame(
        "pandas.core.series", "Series", ndim=1, __iter__=lambda self: iter([1000, 1003])
    )
    expected = r.recommend([[1000, 1003]], K).ids
    for history in (
        series,
        np.array([1000, 1003]),
        pa.array([1000, 1003]),
        pa.chunked_array([[1000], [1003]]),
        {1000, 1003},
    ):
        np.testing.assert_array_equal(r.recommend([history], K).ids, expected)
        assert sorted(id_list(history, "x")) == [1000, 1003]
    np.testing.assert_array_equal(r.recommend(pa.array([[1000, 1003]]), K).ids, expected)
    np.testing.assert_array_equal(r.recommend(np.array([[1000, 1003]]), K).ids, expected)


def test_an_array_as_wide_as_the_catalogue_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), as wide as the catalogue"):
        history_lists(np.zeros((2, 3), int), 3)
    for ids in (
        pa.table({"user": [1], "item": [2]}),
        pa.record_batch({"item": [2]}),
        np.zeros((2, 2), int),
        "abc",
        {1: 2},
        7,
    ):
        with pytest.raises(ValueError, match="x is "):
            id_list(ids, "x")


# --- where the rule comes from -------------------------------------------------------------------


def test_a_run_of_before_asks_its_shards(folder, tmp_path):
    """Its checkpoint holds no rule; the arguments in the manifest of its shards do, where they are
    still the same ones."""
    path = tmp_path / "run"
    write_run(path, IDS, "nease")
    best = path / "checkpoints" / "best"
    manifest = write_folder(tmp_path / "shards", [[0, 1, 2], [1, 2]], n_items=N_ITEMS, item_ids=IDS)
    preparation = {"protocol": "liang", "arguments": {"min_rating": 3.5}}
    (tmp_path / "shards" / "manifest.json").write_text(
        replace(manifest, preparation=preparation).to_json()
    )
    header = json.loads((best / "checkpoint.json").read_text())
    header["config"]["data"]["shards"] = str(tmp_path / "shards")
    for hash_of_shards, expected in (
        (manifest.shards_sha256, PositiveRule(rating_column="rating", min_rating=3.5)),
        ("another", None),
    ):
        header["shards_sha256"] = hash_of_shards
        header["header_sha256"] = header_sha256(header)
        (best / "checkpoint.json").write_text(json.dumps(header))
        assert Recommender.load(path).positives == expected
        output = tmp_path / f"export-{hash_of_shards[:7]}"
        Recommender.load(path).export(output)
        assert Recommender.load(output).positives == expected


def test_training_keeps_the_rule_of_its_shards(tmp_path, capsys):
    rows = [(u, i, 3 + (u + i) % 3) for u in range(40) for i in range(u % 5, 20, 2)]
    source = written(tmp_path, "in.csv", rows, "who,what,Stars")
    names = ["--user_column", "who", "--item_column", "what", "--rating_column", "Stars"]
    assert (
        shard(
            [str(source), str(tmp_path / "shards"), *names, "--min_items", "2", "--repeats", "max"]
        )
        == 0
    )
    expected = PositiveRule("who", "what", "Stars", None, 4.0, "max", MISSING)
    assert Manifest.load(tmp_path / "shards").positives == expected
    small = sizes()
    for kind, options in (
        (
            "vasp",
            [
                *small,
                "--run.max_steps",
                "2",
                "--data.batch_size",
                "16",
                "--data.workers",
                "0",
                "--parallel.lanes",
                "4",
            ],
        ),
        ("ease", []),
    ):
        run = tmp_path / kind
        train(
            [
                "--data.shards",
                str(tmp_path / "shards"),
                "--run.dir",
                str(run),
                "--model.kind",
                kind,
                "--device",
                "cpu",
                *options,
            ]
        )
        shutil.move(tmp_path / "shards", tmp_path / "away")  # the run knows it by itself
        assert Recommender.load(run).positives == expected
        output = tmp_path / f"{kind}.parquet"
        printed = command(capsys, "--run", run, "--histories", source, "--k", 3, "--output", output)
        assert str(expected) in printed and lists_in(output)
        shutil.move(tmp_path / "away", tmp_path / "shards")


@pytest.mark.slow
def test_members_of_an_ensemble_agree(folder, tmp_path):
    renamed = PositiveRule("u", "i", "r", None, 4.0)
    stricter = PositiveRule(rating_column="rating", min_rating=5.0)
    runs = {
        name: a_run(folder, rule)
        for name, rule in (
            ("a", RULE),
            ("b", renamed),
            ("c", stricter),
            ("d", PositiveRule()),
            ("e", None),
        )
    }

    def combined(*names: str) -> Path:
        output = tmp_path / "-".join(names)
        output.mkdir()
        (output / "ensemble.json").write_text(
            describe_ensemble(output, [runs[name] for name in names], [1.0] * len(names))
        )
        return output

    alone = one_rank()
    for names, expected in (
        (("a", "b"), RULE),
        (("b", "a"), renamed),
        (("e", "a"), RULE),
        (("e", "e"), None),
    ):
        assert load_ranker(combined(*names), None, alone).positives == expected
    for names in (("a", "c"), ("a", "d"), ("e", "c", "a")):
        with pytest.raises(ValueError, match="was trained on other positives than"):
            combined(*names)
    (tmp_path / "late").mkdir()
    text = describe_ensemble(tmp_path / "late", [runs["a"], runs["b"]], [1.0, 1.0])
    (tmp_path / "late" / "ensemble.json").write_text(text)
    shutil.copytree(runs["b"], tmp_path / "kept", symlinks=True)
    try:
        shutil.rmtree(runs["b"])
        shutil.copytree(runs["c"], runs["b"], symlinks=True)  # trained anew, on other positives
        with pytest.raises(ValueError, match="was trained on other positives than"):
            load_ranker(tmp_path / "late", None, alone)
    finally:
        shutil.rmtree(runs["b"])
        shutil.copytree(tmp_path / "kept", runs["b"], symlinks=True)


@pytest.mark.parametrize("repeats", ["first", "last", "max"])
@pytest.mark.parametrize(
    "options",
    [[], ["--time_column", "timestamp"], ["--min_rating", "2.5"], ["--missing", "3,nothing"]],
)
def test_training_and_serving_have_the_same_positives(tmp_path, repeats, options):
    """The rows of the train shards are the likes that recommend reads out of the same file."""
    if repeats == "max" and "--time_column" in options:
        return
    random = np.random.default_rng(len(options))
    rows = [
        (*random.integers(0, 9, 2), random.choice([1, 2, 2.5, 3, 4, 5]), random.integers(0, 9))
        for _ in range(400)
    ]
    source = written(tmp_path, "in.csv", rows)
    split = [
        "--min_items",
        "1",
        "--val_users",
        "0",
        "--test_users",
        "0",
        "--repeats",
        repeats,
        *options,
    ]
    assert shard([str(source), str(tmp_path / "shards"), *split]) == 0
    manifest = Manifest.load(tmp_path / "shards")
    rule = manifest.positives
    assert rule is not None and rule.missing is not None
    trained = {
        user: set(items) for user, (items, _) in read_folder(tmp_path / "shards")["train"].items()
    }
    table = load_items(tmp_path / "shards", manifest)
    reading = Reading(missing=rule.missing)
    columns, _ = history_columns([str(source)], reading, rule, {})
    served: dict[int, set[int]] = {}
    with open_histories(source, tmp_path, columns, reading, rule) as histories:
        for block in histories.blocks(table, 3):
            for u, user in enumerate(block.users.to_pylist()):
                rows_of_user = block.rows.items[block.rows.indptr[u] : block.rows.indptr[u + 1]]
                served[user] = {table.ids[int(i)].as_py() for i in rows_of_user}
    assert served == trained
