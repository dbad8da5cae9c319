"""The shard command: what it writes, that it writes all or nothing, and what it says of bad
input."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from data_tools import collect, shard, shards, writer
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import SPLITS, Manifest
from dist_vasp.data.shard import iterate_shard
from tests.oracles.liang_reference import liang
from tests.support.shard_folders import (
    assert_equal_to_reference,
    random_rows,
    read_folder,
    write_csv,
)

SPLIT = ["--val_users", "6", "--test_users", "7"]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return write_csv(folder / "in.csv", random_rows())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fails(capsys, arguments, message: str, status: int = 2) -> str:
    """The command ends with `status` and exactly one line on stderr, which holds `message`."""
    assert shard.main([str(a) for a in arguments]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert captured.out == ""
    return captured.err


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("per_shard", [1, 7, 1000])
def test_shards_do_not_change_the_users(tmp_path, source, per_shard):
    out = tmp_path / "out"
    assert shard.main([str(source), str(out), *SPLIT, "--users_per_shard", str(per_shard)]) == 0
    assert_equal_to_reference(read_folder(out), liang(random_rows(), val_users=6, test_users=7))
    for split in Manifest.load(out).splits.values():
        assert all(entry.users == per_shard for entry in split.shards[:-1])


def test_large_shards_hold_blocks_of_limited_size(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shards, "MAX_USERS_PER_BLOCK", 4)
    out = tmp_path / "out"
    assert shard.main([str(source), str(out), *SPLIT, "--users_per_shard", "10"]) == 0
    manifest = Manifest.load(out)
    assert [entry.users for entry in manifest.splits["train"].shards] == [10, 10, 10, 10, 7]
    data = (out / "train-000001.tar").read_bytes()
    assert [block.n_users for block in iterate_shard(data, "train", manifest.n_items, "x")] == [
        4,
        4,
        2,
    ]
    assert b"train-000001-002.items.npy" in data
    assert_equal_to_reference(read_folder(out), liang(random_rows(), val_users=6, test_users=7))


def test_same_input_same_bytes(tmp_path, source, monkeypatch):
    assert shard.main([str(source), str(tmp_path / "a"), *SPLIT]) == 0
    monkeypatch.setattr(
        collect, "ROWS_PER_BATCH", 50
    )  # neither batches nor the clock leave a trace
    monkeypatch.setattr(time, "time", lambda: 12345.0)
    assert shard.main([str(source), str(tmp_path / "b"), *SPLIT, "--memory_limit", "100MB"]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_all_formats_give_the_same_shards(tmp_path):
    rows = random_rows()
    csv = write_csv(tmp_path / "a.csv", rows)
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(csv.read_bytes())
    columns = dict(
        zip(("user", "item", "rating"), map(pa.array, zip(*rows, strict=True)), strict=True)
    )
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::0\n" for u, i, r in rows))
    tars = []
    for name in ("a.csv", "a.csv.gz", "a.parquet", "ratings.dat"):
        assert shard.main([str(tmp_path / name), str(tmp_path / "out" / name), *SPLIT]) == 0
        tars.append(
            {n: d for n, d in contents(tmp_path / "out" / name).items() if n != "manifest.json"}
        )
    assert tars[0] == tars[1] == tars[2] == tars[3]


def test_implicit_feedback_keeps_every_row(tmp_path):
    rows = random_rows(ratings=False)
    source = write_csv(tmp_path / "a.csv", rows, "user,item")
    assert shard.main([str(source), str(tmp_path / "out"), *SPLIT]) == 0
    expected = liang([(*row, None) for row in rows], val_users=6, test_users=7)
    assert_equal_to_reference(read_folder(tmp_path / "out"), expected)


def test_string_ids(tmp_path):
    rows = [(f"u{u}", "é" * (i % 3) + str(i), r) for u, i, r in random_rows()]
    source = write_csv(tmp_path / "a.csv", rows)
    assert shard.main([str(source), str(tmp_path / "out"), *SPLIT]) == 0
    assert_equal_to_reference(read_folder(tmp_path / "out"), liang(rows, val_users=6, test_users=7))


def test_one_late_string_makes_all_ids_strings(tmp_path):
    rows = [*random_rows(), ("late", 7, 5)]
    source = write_csv(tmp_path / "a.csv", rows)
    assert shard.main([str(source), str(tmp_path / "out"), *SPLIT]) == 0
    found = read_folder(tmp_path / "out")
    assert_equal_to_reference(
        found, liang([(str(u), i, r) for u, i, r in rows], val_users=6, test_users=7)
    )
    assert isinstance(found["items"][0], int)


def test_titles(tmp_path):
    (tmp_path / "ratings.dat").write_text(
        "".join(f"{u}::{i}::{r}::0\n" for u, i, r in random_rows())
    )
    (tmp_path / "movies.dat").write_text("".join(f"{i}::Movie {i}::x\n" for i in range(0, 150, 7)))
    assert shard.main([str(tmp_path / "ratings.dat"), str(tmp_path / "out"), *SPLIT]) == 0
    items = load_items(tmp_path / "out", Manifest.load(tmp_path / "out"))
    assert items.titles is not None
    assert items.titles.to_pylist() == [
        f"Movie {i}" if i < 150 else None for i in items.ids.to_pylist()
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("text", [False, True])
def test_titles_of_a_file_of_their_own(tmp_path, suffix, text):
    rows = [(u, f"no. {i}" if text else i, r) for u, i, r in random_rows()]
    ids = sorted({i for _, i, _ in rows})[::2]
    table = pa.table(
        {
            "extra": [0] * (len(ids) + 1),
            "item": [*ids, ids[0]],
            "title": [f"Movie, {i}" for i in ids] + ["another"],
        }
    )
    (pq.write_table if suffix == "parquet" else pa_csv.write_csv)(
        table, tmp_path / f"titles.{suffix}"
    )
    arguments = [
        str(write_csv(tmp_path / "a.csv", rows)),
        str(tmp_path / "out"),
        *SPLIT,
        "--titles",
    ]
    assert shard.main([*arguments, str(tmp_path / f"titles.{suffix}")]) == 0
    items = load_items(tmp_path / "out", Manifest.load(tmp_path / "out"))
    assert items.titles is not None
    assert items.titles.to_pylist() == [
        f"Movie, {i}" if i in ids else None for i in items.ids.to_pylist()
    ]


def test_a_file_without_titles_is_named(tmp_path, source, capsys):
    assert shard.main([str(source), str(tmp_path / "out"), "--titles", str(source)]) == 2
    assert "expected CSV or Parquet with the columns item and title" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_default_split_is_a_tenth_each(tmp_path, source):
    assert shard.main([str(source), str(tmp_path / "out")]) == 0
    splits = Manifest.load(tmp_path / "out").splits
    assert [splits[s].users for s in SPLITS] == [48, 6, 6]


def test_what_was_left_out_is_counted(tmp_path, capsys):
    rows = [(u, i, 5) for u in range(10) for i in range(6)]
    rows += [(0, 0, 5), (1, 1, 5), (20, 1, 5), (20, 2, 5), (3, 3, 2)]
    source = write_csv(tmp_path / "a.csv", rows)
    assert (
        shard.main([str(source), str(tmp_path / "out"), "--val_users", "1", "--test_users", "1"])
        == 0
    )
    preparation = Manifest.load(tmp_path / "out").preparation
    assert preparation["rows_read"] == 65
    assert {reason: n for reason, n in preparation["left_out"].items() if n} == {
        "rows_below_min_rating": 1,
        "duplicate_rows": 2,
        "users_below_min_items": 1,
        "interactions_of_users_below_min_items": 2,
    }
    out = capsys.readouterr().out
    assert "8 users, 48 interactions" in out
    assert "2 duplicate rows" in out


def test_dry_run_writes_nothing(tmp_path, source, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert shard.main([str(source), str(tmp_path / "deep" / "out"), *SPLIT, "--dry_run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert shard.main([str(source), str(tmp_path / "deep" / "out"), *SPLIT]) == 0
    real = capsys.readouterr().out
    assert "would hold" in printed
    assert [line for line in printed.splitlines() if "users," in line] == [
        line for line in real.splitlines() if "users," in line
    ]


# --- all or nothing -------------------------------------------------------------------------------


def test_existing_output(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert shard.main([str(source), str(out), *SPLIT]) == 0
    before = contents(out)
    capsys.readouterr()
    fails(capsys, [source, out, "--seed", "1", *SPLIT], "exists already")
    fails(capsys, [source, out, "--overwrite", "--val_users", "60"], "leave no train user")
    assert contents(out) == before
    assert shard.main([str(source), str(out), "--seed", "1", "--overwrite", *SPLIT]) == 0
    assert contents(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_overwrite_spares_what_is_not_ours(tmp_path, source, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    fails(capsys, [source, tmp_path / "home", "--overwrite"], "not written by data_tools.shard")
    fails(capsys, [source, source, "--overwrite"], "is not a folder")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert shard.main([str(source), str(tmp_path / "empty"), "--overwrite"]) == 0


def test_output_that_cannot_be_written(tmp_path, source, capsys):
    fails(
        capsys,
        [source, source / "out"],
        "out cannot be written (Not a directory); choose another place",
    )
    fails(
        capsys,
        [source, source / "deep" / "out"],
        "out cannot be written (Not a directory); choose another place",
    )


def test_output_through_a_link(tmp_path, source):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        assert shard.main([str(source), str(tmp_path / "link"), "--overwrite"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "link", "real"]


@pytest.mark.parametrize("step", ["write_split", "check_unique_keys", "sha256_of"])
def test_failure_leaves_nothing(tmp_path, source, monkeypatch, step):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(shard if step == "check_unique_keys" else writer, step, broken)
    with pytest.raises(RuntimeError):
        shard.main([str(source), str(tmp_path / "out")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_full_disk_is_one_line(tmp_path, source, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_split", full)
    fails(
        capsys,
        [source, tmp_path / "out"],
        "out cannot be written (No space left on device); free some space or choose another",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_terminated_leaves_nothing(tmp_path, source, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(writer, "write_split", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert shard.main([str(source), str(tmp_path / "out")]) == 128 + signal.SIGTERM
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_leftovers_of_a_killed_command_are_no_data_folder(tmp_path, source):
    leftover = tmp_path / f".out.{'0' * 16}.tmp"
    leftover.mkdir()
    (leftover / "train-000000.tar").write_text("half")
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        Manifest.load(leftover)
    assert shard.main([str(source), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert b"half" not in contents(tmp_path / "out").values()


@pytest.mark.parametrize("foreign", ["notes.txt", "train-000099.tar", ".hidden"])
def test_overwrite_spares_a_folder_with_something_else_in_it(tmp_path, source, capsys, foreign):
    out = tmp_path / "out"
    assert shard.main([str(source), str(out)]) == 0
    (out / foreign).write_text("mine")
    capsys.readouterr()
    fails(
        capsys, [source, out, "--overwrite"], f"holds '{foreign}', which this command did not write"
    )
    (out / "manifest.json").write_text("{}")
    fails(capsys, [source, out, "--overwrite"], "is not a manifest of this project")
    assert (out / foreign).read_text() == "mine"


def test_overwrite_spares_an_input(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert shard.main([str(source), str(out)]) == 0
    capsys.readouterr()
    fails(
        capsys,
        [source, out, "--overwrite", "--titles", out / "items.parquet"],
        "of --titles, which would be lost",
    )
    fails(capsys, [out, out, "--overwrite"], "is the folder of INPUT, which would be lost")
    assert (out / "manifest.json").is_file()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            "user,thing,rating\n1,2,5\n",
            [],
            "has no column 'item'; its columns, separated by ',', are 'user', 'thing', 'rating'",
        ),
        (
            "user,item\n1,2\n",
            ["--rating_column", "stars"],
            "has no column 'stars'; its columns, separated by ',', are 'user', 'item'",
        ),
        ("", [], "is empty"),
        ("user,item,rating\n", [], "it holds no rows"),
        (
            "user,item,rating\n1,2,3\n1,3,2\n",
            [],
            "all 2 rows have a rating below 4; lower --min_rating",
        ),
        (
            "user,item,rating\n1,2,5\n1,3,five\n",
            [],
            "column 'rating', row 3: 'five' is not a number",
        ),
        (
            "user,item,rating\n1,2,5\n1,3,5\n",
            [],
            "no user has 5 items or more (the most is 2 of 1 users); lower --min_items",
        ),
        ("user,item\n,2\n1,NULL\n", [], "all 2 rows are without a user or an item"),
        (
            "user,item,split\n1,2,0\n1,3,7\n",
            ["--protocol", "given"],
            "the split column holds '7'; expected 0 or train",
        ),
        ("user,item\n1,2\n", ["--protocol", "given"], "has no column 'split'"),
        ("user,item,split\n1,2,1\n", ["--protocol", "given"], "marks no interaction as train"),
        (
            "user,item\n1,2\n",
            ["--protocol", "given", "--val_users", "3"],
            "--val_users belongs to --protocol liang",
        ),
        (
            "user,item\n1,2\n",
            ["--validation_fraction", "0"],
            "--validation_fraction belongs to --protocol given",
        ),
        ("user,item\n1,2\n", ["--format", "movielens"], "has no column 'userId'"),
        ("user,item\n1,2\n", ["--format", "parquet"], "cannot be read"),
    ],
)
def test_bad_input(tmp_path, capsys, text, arguments, message):
    source = tmp_path / "in.csv"
    source.write_text(text)
    fails(capsys, [source, tmp_path / "out", *arguments], message)
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


def test_too_many_held_out_users(tmp_path, source, capsys):
    fails(
        capsys,
        [source, tmp_path / "out", "--val_users", "30", "--test_users", "30"],
        "leave no train user of 60 users",
    )
    assert not (tmp_path / "out").exists()


def test_other_bad_input(tmp_path, source, capsys):
    out = tmp_path / "out"
    fails(capsys, [tmp_path / "missing.csv", out], "missing.csv does not exist")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(source.read_bytes())[:-50])
    fails(capsys, [tmp_path / "cut.csv.gz", out], "cut off or damaged")
    os.mkfifo(tmp_path / "pipe.csv")
    fails(capsys, [tmp_path / "pipe.csv", out], "is a pipe or device")
    (tmp_path / "in.xyz").write_text("")
    fails(capsys, [tmp_path / "in.xyz", out], "pass --format")
    for ids, message in (
        (pa.array([3, -1]), "the id -1"),
        (pa.array([3, 2**63], pa.uint64()), f"the id {2**63}"),
    ):
        pq.write_table(pa.table({"user": ids, "item": pa.array([1, 2])}), tmp_path / "a.parquet")
        fails(capsys, [tmp_path / "a.parquet", out], message)
    assert not out.exists()


def test_two_ids_with_one_key(tmp_path, capsys, monkeypatch):
    rows = [(f"u{u}", i, r) for u, i, r in random_rows()]
    source = write_csv(tmp_path / "a.csv", rows)
    real = writer.keys_of_ids
    monkeypatch.setattr(
        writer,
        "keys_of_ids",
        lambda ids: real(ids) if pa.types.is_integer(ids.type) else real(ids) % np.uint64(3),
    )
    error = fails(capsys, [source, tmp_path / "out"], "have the same 64-bit key")
    assert error.count("'u") == 2
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path, source, capsys):
    assert shard.main([str(source), str(source), "--debug"]) == 2
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert captured.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", str(2**32)],
        ["--min_items", "0"],
        ["--validation_fraction", "1"],
        ["--memory_limit", "1"],
    ],
)
def test_the_parser_refuses(tmp_path, source, arguments, capsys):
    assert shard.main([str(source), str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {arguments[0]}: ")


def test_as_a_command(tmp_path, source):
    command = [sys.executable, "-m", "data_tools.shard", str(source)]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "48 users" in done.stdout
    failed = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
