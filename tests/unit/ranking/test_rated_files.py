"""Files with ratings: the command reads them by the rule of the training, on any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_vasp import Recommender
from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.tables.columns import Reading
from dist_vasp.ranking import recommend as recommend_module
from dist_vasp.ranking.ensemble import load_ranker
from dist_vasp.ranking.explain import model_explainer
from dist_vasp.ranking.filters import allowed_items
from dist_vasp.ranking.history_columns import history_columns
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.make_lists import one_rank
from dist_vasp.ranking.recommend import recommend_to_file
from tests.support.ranks import run_ranks
from tests.support.rated_histories import (
    IDS,
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("repeats", ["first", "last", "max"])
def test_a_file_follows_the_rule(folder, tmp_path, capsys, repeats):
    """The command on a shuffled file gives the lists and counts of a table in memory."""
    by_time = repeats == "last"
    rule = PositiveRule(
        rating_column="rating",
        min_rating=4.0,
        repeats=repeats,
        time_column="timestamp" if by_time else None,
    )
    path, rows = a_run(folder, rule), rows_of()
    source = written(tmp_path, "h.csv", rows)
    printed = command(
        capsys, "--run", path, "--histories", source, "--k", K, "--output", tmp_path / "l.parquet"
    )
    r = Recommender.load(path)
    liked, seen = split_by_user(rows, repeats, by_time)
    found = r.recommend(table_of(rows), K)
    assert lists_in(tmp_path / "l.parquet") == expected_lists(r, liked, seen) == found_lists(found)
    read = found.read
    assert printed.splitlines()[-1] == (
        f"read {len(rows):,} rows: {read.likes:,} likes used as input, "
        f"{read.disliked:,} further items masked; left out: "
        f"{read.repeated:,} repeated, {read.unknown:,} of unknown items"
    )
    assert str(rule) in printed
    skipped = (tmp_path / "l.skipped.csv").read_text().splitlines()[1:]
    nobody = {user for user, *_ in rows} - set(liked)
    assert {int(line.split(",")[0]) for line in skipped} == nobody
    assert all("is a positive of the rule" in line for line in skipped)


def test_everything_in_a_file_can_be_a_like(folder, tmp_path, capsys):
    path, rows = a_run(folder, RULE), rows_of()
    source, plain = (
        written(tmp_path, "h.csv", rows),
        written(tmp_path, "p.csv", [row[:2] for row in rows], "user,item"),
    )
    _, seen = split_by_user(rows, "first")
    printed = command(
        capsys,
        "--run",
        path,
        "--histories",
        source,
        "--k",
        K,
        "--output",
        tmp_path / "a.parquet",
        "--all_positive",
    )
    assert (
        "every row is taken as a like (--all_positive)" in printed
        and " 0 further items masked" in printed
    )
    printed = command(
        capsys, "--run", path, "--histories", plain, "--k", K, "--output", tmp_path / "b.parquet"
    )
    assert "p.csv has no column rating: every row is taken as a like" in printed
    r = Recommender.load(path)
    assert (
        lists_in(tmp_path / "a.parquet")
        == lists_in(tmp_path / "b.parquet")
        == expected_lists(r, seen, seen)
    )
    unknown = a_run(folder, None)
    printed = command(
        capsys,
        "--run",
        unknown,
        "--histories",
        source,
        "--k",
        K,
        "--output",
        tmp_path / "c.parquet",
    )
    assert (
        printed.count(
            "warning: what made a positive in training is not known, every row is taken as a like"
        )
        == 1
    )
    assert lists_in(tmp_path / "c.parquet") == lists_in(tmp_path / "a.parquet")


def test_filters_of_the_command(folder, tmp_path, capsys):
    path, rows = a_run(folder, RULE), rows_of()
    source = written(tmp_path, "h.csv", rows)
    gone, only = IDS[::3], IDS[::2]
    (tmp_path / "gone.txt").write_text("".join(f"{i}\n" for i in [*gone, 5]))
    pq.write_table(pa.table({"item": pa.array([*only, 6])}), tmp_path / "only.parquet")
    liked, _ = split_by_user(rows, "first")
    r = Recommender.load(path)
    table = table_of(rows)
    for options, kept, python in (
        (["--filter_items", tmp_path / "gone.txt"], set(IDS) - set(gone), {"filter_items": gone}),
        (["--restrict_to", tmp_path / "only.parquet"], set(only), {"restrict_to": only}),
        (
            [
                "--restrict_to",
                tmp_path / "only.parquet",
                "--filter_items",
                tmp_path / "gone.txt",
                "--keep_seen",
            ],
            set(only) - set(gone),
            {"restrict_to": only, "filter_items": gone, "mask_input": False},
        ),
    ):
        output = tmp_path / "l.parquet"
        printed = command(
            capsys,
            "--run",
            path,
            "--histories",
            source,
            "--k",
            K,
            "--output",
            output,
            "--overwrite",
            *options,
        )
        lists = lists_in(output)
        assert set(lists) == set(liked) and {i for items in lists.values() for i in items} <= kept
        assert lists == found_lists(r.recommend(table, K, **python))
        assert printed.count(", 1 of them not in the vocabulary") == len(
            [o for o in options if str(o).startswith(("--f", "--r"))]
        )
        assert ("further items seen" in printed) == ("--keep_seen" in options)
    printed = command(
        capsys,
        "--run",
        path,
        "--histories",
        source,
        "--k",
        40,
        "--output",
        output,
        "--overwrite",
        "--keep_seen",
    )
    assert all(sorted(items) == IDS for items in lists_in(output).values()), (
        "seen items are listed, too"
    )


def test_columns_of_the_shards_and_named_ones(folder, tmp_path, capsys):
    rows = rows_of()
    rule = PositiveRule("uid", "movie", "stars", None, 4.0)
    path = a_run(folder, rule)
    names = ("uid,movie,stars,t", "user,item,stars,t", "a,b,c,d")
    printed, lists = [], []
    for n, header in enumerate(names):
        options = (
            ["--user_column", "a", "--item_column", "b", "--rating_column", "c"] if n == 2 else []
        )
        source, output = written(tmp_path, f"h{n}.csv", rows, header), tmp_path / f"l{n}.parquet"
        printed.append(
            command(
                capsys, "--run", path, "--histories", source, "--k", K, "--output", output, *options
            )
        )
        lists.append(lists_in(output))
    assert (
        lists[0]
        == lists[1]
        == lists[2]
        == found_lists(Recommender.load(a_run(folder, RULE)).recommend(table_of(rows), K))
    )
    assert "made from" not in printed[0] and "columns not used: t" in printed[0]
    assert "has no column uid, which the shards were made from; column user is read" in printed[1]


def test_who_likes_nothing_at_all_is_an_error(folder, tmp_path, capsys):
    source = written(tmp_path, "h.csv", [(u, i, 3, 0) for u in range(3) for i in IDS[:4]])
    with pytest.raises(
        ValueError,
        match=r"12 rows are of items that the model knows, and none is a like, .*--all_positive",
    ):
        command(
            capsys,
            "--run",
            a_run(folder, RULE),
            "--histories",
            source,
            "--k",
            K,
            "--output",
            tmp_path / "l.parquet",
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.csv"]


def test_a_filter_is_not_overwritten(folder, tmp_path, capsys):
    source, gone = (
        written(tmp_path, "h.csv", rows_of()),
        written(tmp_path, "gone.csv", [(1000,)], "item"),
    )
    for options in (["--filter_items", gone], ["--restrict_to", gone]):
        with pytest.raises(ValueError, match=r"gone\.csv"):
            command(
                capsys,
                "--run",
                a_run(folder, RULE),
                "--histories",
                source,
                "--output",
                gone,
                "--overwrite",
                *options,
            )
    assert gone.read_text() == "item\n1000\n"


def _lists_of(ranks, run: Path, source: Path, output: Path) -> str:
    recommend_module.USERS_PER_BLOCK = 5
    ranker = load_ranker(run, None, ranks)
    columns, _ = history_columns([str(source)], Reading(), ranker.positives, {})
    allowed, _ = allowed_items(ranker.items, str(source.with_name("gone.txt")), None)
    explainer = model_explainer(ranker.model)
    with open_histories(source, output.parent, columns, Reading(), ranker.positives) as histories:
        return recommend_to_file(
            ranker.model.scores,
            histories,
            ranker.items,
            K,
            output,
            ranks,
            n_reasons=2,
            explainer=explainer,
            allowed=allowed,
        )


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_every_layout_gives_the_same_lists(folder, tmp_path, n_ranks):
    source = written(tmp_path, "h.csv", rows_of())
    (tmp_path / "gone.txt").write_text("".join(f"{i}\n" for i in IDS[::4]))
    path = a_run(folder, RULE)
    one = _lists_of(one_rank(), path, source, tmp_path / "1.parquet")
    several = run_ranks(_lists_of, n_ranks, path, source, tmp_path / f"{n_ranks}.parquet")
    assert one.splitlines()[-1] == several[0].splitlines()[-1]
    expected, found = (pq.read_table(tmp_path / f"{n}.parquet") for n in (1, n_ranks))
    liked, seen = split_by_user(rows_of(), "first")
    because: dict[int, set] = {}
    for row in found.to_pylist():
        because.setdefault(row["user"], set()).update({row["because_1"], row["because_2"]} - {None})
        assert row["item"] not in seen[row["user"]] and row["item"] not in IDS[::4]
    assert all(items <= liked[user] for user, items in because.items()), "only likes are reasons"
    for name in expected.column_names:
        if pa.types.is_floating(expected[name].type):
            np.testing.assert_allclose(expected[name].to_numpy(), found[name].to_numpy(), rtol=1e-5)
        else:
            assert expected[name].equals(found[name]), name
