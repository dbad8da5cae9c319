"""--repeats, --min_users and --core of data_tools.shard against straight-line references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools import shard
from dist_vasp.data.format import Manifest
from dist_vasp.data.positives import PositiveRule
from tests.liang_reference import liang
from tests.shard_folders import assert_equal_to_reference, read_folder, write_csv

SPLIT = {"val_users": 4, "test_users": 5}
OPTIONS = [word for name, n in SPLIT.items() for word in (f"--{name}", str(n))]


def rows_of(seed: int, n_rows: int = 1400) -> list[tuple[int, int, int]]:
    """(user, item, rating): items from common to rare, many pairs several times."""
    random = np.random.default_rng(seed)
    users = random.integers(100, 160, n_rows)
    items = (60 * random.random(n_rows) ** 2).astype(int) * 3
    return list(zip(users.tolist(), items.tolist(), random.choice([1, 3, 4, 5], n_rows).tolist(), strict=True))


def chosen(rows: list[tuple[int, int, int]], repeats: str) -> list[tuple[int, int, int]]:
    """One row for each pair that is a positive, in input order."""
    decides: dict[tuple[int, int], int] = {}
    for n, (user, item, rating) in enumerate(rows):
        pair = (user, item)
        if repeats == "first" and rating < 4:
            continue
        if pair not in decides or repeats == "last" or (repeats == "max" and rating > rows[decides[pair]][2]):
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
    assert manifest.preparation["rows_read"] == len(rows) == rows_used(manifest) + rows_left_out(manifest)


def test_first_and_last_differ():
    rows = rows_of(1)
    assert set(chosen(rows, "first")) != set(chosen(rows, "last"))
    assert {row[:2] for row in chosen(rows, "first")} == {row[:2] for row in chosen(rows, "max")}


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize(("min_users", "min_items"), [(1, 5), (2, 1), (8, 6), (10, 5)])
def test_items_with_few_users(tmp_path, core, min_users, min_items):
    rows = rows_of(2)
    options = ["--min_users", str(min_users), "--min_items", str(min_items), *(["--core"] if core else [])]
    manifest = run(tmp_path, rows, *options)
    left = without_rare(chosen(rows, "first"), min_users, min_items, core)
    assert_equal_to_reference(read_folder(tmp_path / "out"), liang(left, min_items=min_items, **SPLIT))
    assert manifest.preparation["rows_read"] == len(rows) == rows_used(manifest) + rows_left_out(manifest)
    arguments = manifest.preparation["arguments"]
    assert (arguments["min_users"], arguments["min_items"], arguments["core"]) == (min_users, min_items, core)


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
    rows = [(u, i, "train") for u in range(8) for i in range(6)] + [(u, 2, "test") for u in range(8)]
    source = write_csv(tmp_path / "in.csv", rows, "user,item,split")
    options = ["--protocol", "given", "--validation_fraction", "0"]
    for repeats, n_test in (("first", 0), ("last", 8)):
        assert shard.main([str(source), str(tmp_path / repeats), *options, "--repeats", repeats]) == 0
        manifest = Manifest.load(tmp_path / repeats)
        assert manifest.splits["test"].heldout == 0 if not n_test else manifest.splits["test"].heldout < n_test
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
        (["--protocol", "given", "--min_users", "2"], "--min_users belongs to --protocol liang"),
        (["--protocol", "given", "--core"], "--core belongs to --protocol liang"),
        (["--protocol", "given", "--repeats", "max"], "--repeats max takes ratings, which --protocol given does not read"),
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
