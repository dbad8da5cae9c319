"""Protocol `hashed` against plain Python, and what `--like` keeps."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_tools import shard, verify
from data_tools.collect import collect
from data_tools.hashed import hashed_plan, split_of_keys, threshold
from dist_vasp.data.manifest import SPLITS, Manifest, users_file
from tests.oracles.hashed_reference import hash64, hashed, split_of
from tests.support.paths import ROOT
from tests.support.shard_folders import (
    assert_equal_to_reference,
    random_rows,
    read_folder,
    write_csv,
)


def sharded(tmp_path, rows, name: str, *arguments):
    source = write_csv(tmp_path / f"{name}.csv", rows)
    assert shard.main([str(source), str(tmp_path / name), *map(str, arguments)]) == 0
    assert verify.main([str(tmp_path / name)]) == 0
    return tmp_path / name


def splits_of(folder) -> dict:
    """{user id: split}"""
    return {
        user: split
        for split in SPLITS
        for user in pq.read_table(folder / users_file(split))["id"].to_pylist()
    }


def by_user(rows, users) -> list:
    return [row for row in rows if row[0] in users]


# --- the rule -------------------------------------------------------------------------------------


def test_folder_equals_the_reference(tmp_path):
    rows = random_rows()
    arguments = ["--protocol", "hashed", "--val_fraction", 0.2, "--test_fraction", 0.25]
    folder = sharded(tmp_path, rows, "out", *arguments, "--seed", 7, "--users_per_shard", 4)
    expected = hashed(rows, val_fraction=0.2, test_fraction=0.25, seed=7)
    assert_equal_to_reference(read_folder(folder), expected)
    assert [len(expected[split]) > 4 for split in SPLITS] == [True] * 3
    arguments = Manifest.load(folder).preparation["arguments"]
    assert (arguments["val_fraction"], arguments["test_fraction"]) == (0.2, 0.25)


def test_words_and_thresholds_by_hand():
    assert threshold(0.5) == 2**63 and threshold(0.1) == int(0.1 * 2**64) == 1844674407370955264
    page = (ROOT / "docs" / "formats.md").read_text()
    assert f"0x{hash64(98765, 1):016x}" in page and f"0x{hash64(98765, 1, 2):016x}" in page
    for key in (0, 5, 2**63 - 1, 2**64 - 1):
        code = split_of_keys(np.array([key], np.uint64), 3, 0.3, 0.3)[0]
        assert SPLITS[code] == split_of(key, 3, 0.3, 0.3)
    assert split_of_keys(np.array([5], np.uint64), 3, 0.0, 0.0).tolist() == [0]


def test_filters_come_first(tmp_path):
    """Items that too few users have go before the users; held-out items are of the vocabulary."""
    rows = [row for row in random_rows(80, 40, 3) if row[1] % 3 or row[0] % 5 == 0]
    folder = sharded(tmp_path, rows, "out", "--protocol", "hashed", "--min_users", 12)
    liked: dict = {}
    for user, item, rating in rows:
        if rating >= 4:
            liked.setdefault(item, set()).add(user)
    kept = [row for row in rows if len(liked.get(row[1], ())) >= 12]
    assert 0 < len(kept) < len(rows)
    assert_equal_to_reference(read_folder(folder), hashed(kept))


@settings(max_examples=30, deadline=None)
@given(
    ids=st.sets(st.integers(0, 2**62), min_size=20, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    fractions=st.tuples(st.floats(0, 0.45), st.floats(0, 0.45)),
    data=st.data(),
)
def test_added_users_change_no_split(tmp_path_factory, ids, seed, fractions, data):
    """Also items that the others bring, and rows in another order, change nothing."""
    some = data.draw(st.sets(st.sampled_from(sorted(ids)), min_size=1))
    assume("train" in {split_of(user, seed, *fractions) for user in some})
    rows = [(user, 100 + (user + k) % 9) for user in ids for k in range(1 + user % 3)]
    order = data.draw(st.permutations(rows))

    def splits(kept) -> dict:
        batch = pa.table({"user": [u for u, _ in kept], "item": [i for _, i in kept]})
        scratch = tmp_path_factory.mktemp("scratch")
        found, _ = collect(batch.to_batches(), scratch, 4.0, "200MB")
        plan = hashed_plan(found, 1, fractions, seed, None)
        return {
            user: split
            for split in SPLITS
            for user in found.user_ids.take(pa.array(plan.users[split])).to_pylist()
        }

    few, all_of_them = splits([row for row in rows if row[0] in some]), splits(order)
    assert few == {user: all_of_them[user] for user in some}
    assert all_of_them == {user: split_of(user, seed, *fractions) for user in ids}


def test_users_keep_their_split_whoever_else_is_there(tmp_path):
    rows = random_rows(300, 40, 1)
    arguments = ["--protocol", "hashed", "--min_items", 1]
    whole = splits_of(sharded(tmp_path, rows, "whole", *arguments))
    random = np.random.default_rng(0)
    for part in range(3):
        users = set(random.permutation(sorted(whole))[:120].tolist())
        found = splits_of(sharded(tmp_path, by_user(rows, users), f"part{part}", *arguments))
        assert found == {user: whole[user] for user in users}
    other = splits_of(sharded(tmp_path, rows, "other", *arguments, "--seed", 1))
    assert other != whole


def test_text_ids_go_by_their_keys(tmp_path):
    rows = [(f"u{user}", f"i{item}", rating) for user, item, rating in random_rows()]
    folder = sharded(tmp_path, rows, "out", "--protocol", "hashed")
    for split in SPLITS:
        table = pq.read_table(folder / users_file(split))
        keys = table["key"].to_pylist()
        assert {split_of(key, 98765, 0.1, 0.1) for key in keys} <= {split}
        assert keys == sorted(keys, key=lambda key: hash64(98765, key))


@pytest.mark.data
@pytest.mark.slow
def test_ml1m_shares(data_dir, tmp_path):
    source = data_dir / "ml-1m" / "ratings.csv.gz"
    arguments = ["--protocol", "hashed", "--val_fraction", "0.1", "--test_fraction", "0.2"]
    assert shard.main([str(source), str(tmp_path / "out"), *arguments]) == 0
    splits = Manifest.load(tmp_path / "out").splits
    n = sum(split.users for split in splits.values())
    assert n == 6034
    for name, fraction in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        sd = math.sqrt(fraction * (1 - fraction) / n)
        assert abs(splits[name].users / n - fraction) < 3 * sd, name
    with gzip.open(source, "rt") as file:
        next(file)
        rows = [(int(u), int(i), float(r)) for u, i, r in (line.split(",") for line in file)]
    assert_equal_to_reference(read_folder(tmp_path / "out"), hashed(rows, test_fraction=0.2))


# --- like -----------------------------------------------------------------------------------------


def grown(n_old: int = 60):
    """(rows of an old catalogue, rows of one with more users and items)"""
    return random_rows(n_old, 30, 0), random_rows(n_old + 60, 36, 4)


@pytest.mark.parametrize("protocol", ["liang", "hashed"])
def test_like_keeps_the_split_of_old_users(tmp_path, protocol):
    old_rows, new_rows = grown()
    old = splits_of(sharded(tmp_path, old_rows, "old", "--val_users", 8, "--test_users", 12))
    arguments = ["--protocol", protocol, "--min_items", 1, "--like", tmp_path / "old"]
    folder = sharded(tmp_path, new_rows, "new", *arguments)
    new = splits_of(folder)
    assert {user: split for user, split in new.items() if user in old} == old
    shares = 8 / 60, 12 / 60
    strangers = set(new) - set(old)
    assert {user: new[user] for user in strangers} == {
        user: split_of(user, 98765, *shares) for user in strangers
    }
    assert {new[user] for user in strangers} == set(SPLITS)
    if protocol == "hashed":
        expected = hashed(new_rows, 4.0, 1, *shares, kept=old)
        assert_equal_to_reference(read_folder(folder), expected)
    # the fractions stay those of the first shards
    later = sharded(tmp_path, random_rows(150, 36, 5), "later", *arguments[:4], "--like", folder)
    before, after = (Manifest.load(f).preparation["arguments"] for f in (folder, later))
    names = ("val_fraction", "test_fraction")
    assert [after[n] for n in names] == [before[n] for n in names] == list(shares)
    kept = {user: split for user, split in splits_of(later).items() if user in new}
    assert kept == {user: new[user] for user in kept}


def test_like_takes_text_for_numbers(tmp_path):
    rows = random_rows()
    old = splits_of(sharded(tmp_path, rows, "old", "--val_users", 8, "--test_users", 12))
    text = [*rows, *(("anna", item, 5) for item in range(0, 70, 7))]
    new = splits_of(
        sharded(tmp_path, text, "new", "--protocol", "hashed", "--like", tmp_path / "old")
    )
    assert {user: split for user, split in new.items() if user != "anna"} == {
        str(user): split for user, split in old.items()
    }


def test_like_is_told(tmp_path, capsys):
    old_rows, new_rows = grown()
    sharded(tmp_path, old_rows, "old")
    capsys.readouterr()
    sharded(tmp_path, new_rows, "new", "--min_items", 1, "--like", tmp_path / "old")
    out = capsys.readouterr().out
    assert f"60 users keep their split of {tmp_path / 'old'}, 60 users are new there" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val_users", "3", "--like", "old"], "--val_users chooses among all users, but with"),
        (["--protocol", "hashed", "--val_users", "3"], "--val_users belongs to --protocol liang"),
        (["--val_fraction", "0.3"], "--val_fraction belongs to --protocol hashed"),
        (
            ["--protocol", "hashed", "--val_fraction", "0.6", "--test_fraction", "0.4"],
            "--val_fraction 0.6 and --test_fraction 0.4 leave no train user",
        ),
        (["--like", "nowhere"], "nowhere holds no manifest.json"),
        (["--like", "given"], "given is of protocol given, in which held-out users train, too"),
        (["--like", "strangers"], "none of the 60 users is there; are the ids of one kind?"),
        (
            ["--protocol", "given", "--like", "old"],
            "--like belongs to --protocol liang or hashed, but the protocol is given",
        ),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "in.csv", random_rows())
    sharded(tmp_path, random_rows(), "old")
    strangers = [(user + 5000, *rest) for user, *rest in random_rows()]
    sharded(tmp_path, strangers, "strangers")
    marked = [(user, item, "train") for user, item, _ in random_rows()]
    write_csv(tmp_path / "marked.csv", marked, "user,item,split")
    assert shard.main(["marked.csv", "given", "--protocol", "given"]) == 0
    capsys.readouterr()
    assert shard.main(["in.csv", "out", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_manifest_names_the_earlier_shards(tmp_path):
    sharded(tmp_path, random_rows(), "old")
    folder = sharded(tmp_path, random_rows(), "new", "--like", tmp_path / "old")
    raw = json.loads((folder / "manifest.json").read_text())
    assert raw["preparation"]["arguments"]["like"] == Manifest.load(tmp_path / "old").data_sha256
