"""--repeats, --min_users and --core of data_tools.shard against straight-line references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools import shard
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.positives import PositiveRule
from tests.oracles.liang_reference import liang
from tests.support.shard_folders import assert_equal_to_reference, read_folder, write_csv

SPLIT = {"val_users": 4, "test_users": 5}
OPTIONS = [word for name, n in SPLIT.items() for word in (f"--{name}", str(n))]


def rows_of(seed: int, n_rows: int = 1400) -> list[tuple[int, int, int]]:
    """(user, item, rating): items from common to rare, many pairs several times."""
    random = np.random.default_rng(seed)
    users = random.integers(100, 160, n_rows)
    items = (60 * random.random(n_rows) ** 2).astype(int) * 3
    return list(
        zip(
            users.tolist(),
            items.tolist(),
            random.choice([1, 3, 4, 5], n_rows).tolist(),
            strict=True,
        )
    )


def chosen(rows: list[tuple[int, int, int]], repeats: str) -> list[tuple[int, int, int]]:
    """One row for each pair that is a positive, in input order."""
    decides: dict[tuple[int, int], int] = {}
    for n, (user, item, rating) in enumerate(rows):
        pair = (user, item)
        if repeats == "first" and rating < 4:
            continue
        if (
            pair not in decides
            or repeats == "last"
            or (repeats == "max" and rating > rows[decides[pair]][2])
        ):
            decides[pair] = n
    return [rows[n] for n in sorted(decides.values()) if rows[n][2] >= 4]


def without_rare(rows: list[tuple], min_users: int, min_items: int, core: bool) -> list[tuple]:
    """Drop items, then users, over and over with `core`; items alone without."""
    while True:
        users_of: dict[int, set] = {}
        for user, item, _ in rows:
            users_of.setdefault(item, set()).add(user)
        left = [row for row in rows if len(users_of[row[1]]) >= min_users]
        if not core:
            return left
        items_of: dict[int, set] = {}
        for user, item, _ in left:
            items_of.setdefault(user, set()).add(item)
        left = [row for row in left if len(items_of[row[0]]) >= min_items]
        if len(left) == len(rows):
            return rows
        rows = left


def run(tmp_path: Path, rows: list[tuple], *options: str) -> Manifest:
    source = write_csv(tmp_path / "in.csv", rows)
    assert shard.main([str(source), str(tmp_path / "out"), *OPTIONS, *options]) == 0
    return Manifest.load(tmp_path / "out")


def rows_left_out(manifest: Manifest) -> int:
    left_out = manifest.preparation["left_out"]
    return sum(n for reason, n in left_out.items() if not reason.startswith(("users_", "items_")))


def rows_used(manifest: Manifest) -> int:
    return sum(split.interactions + split.heldout for split in manifest.splits.values())


@pytest.mark.parametrize("repeats", ["first", "last", "max"])
def test_repeats(tmp_path, repeats):
    rows = rows_of(1)
    manifest = run(tmp_path, rows, "--repeats", repeats)
    assert_equal_to_reference(read_folder(tmp_path / "out"), liang(chosen(rows, repeats), **SPLIT))
    assert manifest.positives == PositiveRule(
        rating_column="rating", min_rating=4.0, repeats=repeats, missing=manifest.positives.missing
    )
    assert (
        manifest.preparation["rows_read"]
        == len(rows)
        == rows_used(manifest) + rows_left_out(manifest)
    )


@pytest.mark.parametrize(
    "how", ["named", "timestamp", "ratings.dat", "ratings.csv", "partition of folders"]
)
def test_the_last_by_time(tmp_path, capsys, how):
    """Rows come in any order; the times are in a column that is named or called timestamp."""
    rows = rows_of(1)
    times = np.random.default_rng(5).permutation(len(rows)).tolist()
    timed = [(*row, time) for row, time in zip(rows, times, strict=True)]
    source, options = tmp_path / "in.csv", []
    if how == "ratings.dat":
        source = tmp_path / "ratings.dat"
        source.write_text("".join("::".join(map(str, row)) + "\n" for row in timed))
    elif how == "partition of folders":
        for name, part in (("0", timed[:700]), ("1", timed[700:])):
            (tmp_path / "in" / f"part={name}").mkdir(parents=True)
            write_csv(
                tmp_path / "in" / f"part={name}" / "a.csv", part, "user,item,rating,timestamp"
            )
        source = tmp_path / "in"
    else:
        names = {"named": "user,item,rating,when", "timestamp": "user,item,rating,timestamp"}
        source = tmp_path / ("ratings.csv" if how == "ratings.csv" else "in.csv")
        write_csv(source, timed, names.get(how, "userId,movieId,rating,timestamp"))
        options = ["--time_column", "when"] if how == "named" else []
    assert (
        shard.main([str(source), str(tmp_path / "out"), *OPTIONS, "--repeats", "last", *options])
        == 0
    )
    # the row that is last by time decides; it keeps its place in the input
    decides: dict[tuple, tuple] = {}
    for n, (user, item, rating, time) in enumerate(timed):
        decides[user, item] = max(decides.get((user, item), (-1,)), (time, n, rating))
    left = [
        rows[n] for _, n, rating in sorted(decides.values(), key=lambda one: one[1]) if rating >= 4
    ]
    assert_equal_to_reference(read_folder(tmp_path / "out"), liang(left, **SPLIT))
    rule = Manifest.load(tmp_path / "out").positives
    assert rule is not None and rule.time_column == ("when" if how == "named" else "timestamp")
    assert rule.user_column == ("userId" if how.startswith("ratings") else "user")
    assert f"the last by {rule.time_column} counts" in capsys.readouterr().out


def test_the_last_of_the_input_where_there_is_no_time(tmp_path, capsys):
    run(tmp_path, rows_of(1), "--repeats", "last")
    assert "of several ratings of a pair the last in input order counts" in capsys.readouterr().out


def test_the_default_looks_at_no_time(tmp_path):
    """Liang et al. drop duplicates in input order; a column of times changes nothing."""
    rows = rows_of(1)
    assert_equal_to_reference_after(
        tmp_path, [(*row, len(rows) - n) for n, row in enumerate(rows)], chosen(rows, "first")
    )


def assert_equal_to_reference_after(tmp_path: Path, timed: list[tuple], left: list[tuple]) -> None:
    source = write_csv(tmp_path / "in.csv", timed, "user,item,rating,timestamp")
    assert shard.main([str(source), str(tmp_path / "out"), *OPTIONS]) == 0
    assert_equal_to_reference(read_folder(tmp_path / "out"), liang(left, **SPLIT))
    rule = Manifest.load(tmp_path / "out").positives
    assert rule is not None and rule.time_column is None


@pytest.mark.parametrize(
    ("header", "options", "line"),
    [
        (
            "user,item,Rating",
            [],
            "columns not used: Rating; --rating_column Rating reads ratings from it",
        ),
        (
            "user,item,stars",
            [],
            "columns not used: stars; --rating_column stars reads ratings from it",
        ),
        ("user,item,genre", [], "columns not used: genre"),
        ("user,item,rating", [], ""),
        (
            "user,item,fold",
            [],
            "columns not used: fold; --protocol given --split_column fold follows it",
        ),
        ("User_ID,item,x", ["--user_column", "User_ID"], "columns not used: x"),
        (
            "user,item,date",
            ["--repeats", "last"],
            "columns not used: date; --time_column date reads times from it",
        ),
    ],
)
def test_columns_that_are_not_used_are_named(tmp_path, capsys, header, options, line):
    source = write_csv(
        tmp_path / "in.csv", [(u, i, 5) for u in range(30) for i in range(6)], header
    )
    assert shard.main([str(source), str(tmp_path / "out"), "--dry_run", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [one.strip() for one in printed if "not used" in one] == ([line] if line else [])
    implicit = any(
        "implicit feedback: no rating column was read, every row counts" in one for one in printed
    )
    assert implicit == (header != "user,item,rating")


def test_first_and_last_differ():
    rows = rows_of(1)
    assert set(chosen(rows, "first")) != set(chosen(rows, "last"))
    assert {row[:2] for row in chosen(rows, "first")} == {row[:2] for row in chosen(rows, "max")}


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize(("min_users", "min_items"), [(1, 5), (2, 1), (8, 6), (10, 5)])
def test_items_with_few_users(tmp_path, core, min_users, min_items):
    rows = rows_of(2)
    options = [
        "--min_users",
        str(min_users),
        "--min_items",
        str(min_items),
        *(["--core"] if core else []),
    ]
    manifest = run(tmp_path, rows, *options)
    left = without_rare(chosen(rows, "first"), min_users, min_items, core)
    assert_equal_to_reference(
        read_folder(tmp_path / "out"), liang(left, min_items=min_items, **SPLIT)
    )
    assert (
        manifest.preparation["rows_read"]
        == len(rows)
        == rows_used(manifest) + rows_left_out(manifest)
    )
    arguments = manifest.preparation["arguments"]
    assert (arguments["min_users"], arguments["min_items"], arguments["core"]) == (
        min_users,
        min_items,
        core,
    )


def test_the_core_needs_several_rounds():
    """Else --core and once could not be told apart."""
    positives = chosen(rows_of(2), "first")
    once = {row[:2] for row in without_rare(positives, 10, 5, False)}
    core = {row[:2] for row in without_rare(positives, 10, 5, True)}
    users_of: dict[int, set] = {}
    for user, item in once:
        users_of.setdefault(user, set()).add(item)
    assert core < {pair for pair in once if len(users_of[pair[0]]) >= 5}


def test_repeats_and_core_together(tmp_path):
    rows = rows_of(3)
    manifest = run(tmp_path, rows, "--repeats", "last", "--min_users", "6", "--core")
    left = without_rare(chosen(rows, "last"), 6, 5, True)
    assert_equal_to_reference(read_folder(tmp_path / "out"), liang(left, **SPLIT))
    assert manifest.preparation["left_out"]["items_below_min_users"] > 0


def test_given_takes_the_split_of_the_row_that_decides(tmp_path):
    rows = [(u, i, "train") for u in range(8) for i in range(6)] + [
        (u, 2, "test") for u in range(8)
    ]
    source = write_csv(tmp_path / "in.csv", rows, "user,item,split")
    options = ["--protocol", "given", "--validation_fraction", "0"]
    for repeats, n_test in (("first", 0), ("last", 8)):
        assert (
            shard.main([str(source), str(tmp_path / repeats), *options, "--repeats", repeats]) == 0
        )
        manifest = Manifest.load(tmp_path / repeats)
        assert (
            manifest.splits["test"].heldout == 0
            if not n_test
            else manifest.splits["test"].heldout < n_test
        )
        assert manifest.positives.is_implicit and manifest.positives.repeats == repeats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min_users", "500"], "no item has 500 users or more (the most is "),
        (
            ["--min_users", "20", "--min_items", "30", "--core"],
            "no set of users and items has 30 items a user and 20 users an item",
        ),
        (["--min_users", "0"], "--min_users: '0' is not an integer of at least 1"),
        (["--repeats", "all"], "--repeats: invalid choice: 'all'"),
        (
            ["--protocol", "given", "--min_users", "2"],
            "--min_users belongs to --protocol liang, hashed, time or last",
        ),
        (
            ["--protocol", "given", "--core"],
            "--core belongs to --protocol liang, hashed, time or last",
        ),
        (
            ["--repeats", "max", "--time_column", "rating"],
            "--time_column orders the rows for --repeats first and last, but it is max",
        ),
        (["--repeats", "last", "--time_column", "when"], "has no column 'when'"),
        (
            ["--protocol", "given", "--repeats", "max"],
            "--repeats max takes ratings, which --protocol given does not read",
        ),
    ],
)
def test_what_is_refused(tmp_path, capsys, options, message):
    source = write_csv(tmp_path / "in.csv", rows_of(1))
    assert shard.main([str(source), str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_max_needs_ratings(tmp_path, capsys):
    source = write_csv(tmp_path / "in.csv", [row[:2] for row in rows_of(1)], "user,item")
    assert shard.main([str(source), str(tmp_path / "out"), "--repeats", "max"]) == 2
    assert "no rating column was read; pass --rating_column NAME" in capsys.readouterr().err
