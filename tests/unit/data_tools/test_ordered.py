"""Protocols `time` and `last` against pandas, on synthetic and on real data."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import shard, verify
from data_tools.times import bounds, kth_smallest, moment, told
from dist_vasp.data.manifest import Manifest
from tests.oracles import ordered_reference as oracle
from tests.oracles.hashed_reference import hash64
from tests.support.shard_folders import read_folder


def random_frame(seed: int = 0, n_rows: int = 900, rated: bool = True) -> pd.DataFrame:
    """Rows in random order, with repeated pairs and equal times; items become popular late."""
    random = np.random.default_rng(seed)
    times = random.integers(0, 400, n_rows)
    user = random.integers(0, 45, n_rows)
    item = (random.random(n_rows) * (10 + times / 10)).astype(int) * 3
    columns = {"user": user, "item": item, "rating": random.integers(3, 6, n_rows), "time": times}
    return pd.DataFrame(columns).drop(columns=[] if rated else ["rating"])


def sharded(folder, frame: pd.DataFrame, *arguments, name: str = "out"):
    frame.rename(columns={"time": "timestamp"}).to_csv(folder / f"{name}.csv", index=False)
    source, out = str(folder / f"{name}.csv"), str(folder / name)
    assert shard.main([source, out, *map(str, arguments)]) == 0
    assert verify.main([out]) == 0
    return folder / name


def assert_same(found: dict, expected: dict, seed: int = 98765) -> None:
    """The vocabulary, and of every user the sets of items; users by the hash of their keys."""
    assert found["items"] == expected["items"]
    assert found["popularity"] == expected["popularity"]
    for split in ("train", "validation", "test"):
        assert list(found[split]) == sorted(expected[split], key=lambda key: hash64(seed, key))
        for user, parts in expected[split].items():
            got = found[split][user]
            assert [sorted(part) for part in got] == [sorted(part) for part in parts], (split, user)


# --- last -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rated", [True, False])
@pytest.mark.parametrize("min_items", [1, 5])
def test_last_equals_pandas(tmp_path, rated, min_items):
    frame = random_frame(1, 300, rated)
    found = sharded(tmp_path, frame, "--protocol", "last", "--min_items", min_items)
    expected = oracle.last(frame, min_items=min_items)
    assert_same(read_folder(found), expected)
    assert all(len(held_out) <= 1 for _, held_out in expected["test"].values())
    assert any(not held_out for _, held_out in expected["test"].values()), "no item is new"


def test_last_by_hand(tmp_path):
    """The validation item is input at test; small users keep their first item for training."""
    rows = [(1, 10, 3), (1, 30, 1), (1, 20, 2), (1, 40, 4), (2, 10, 1), (2, 20, 2), (3, 10, 5)]
    rows += [(4, item, time) for time, item in enumerate((40, 30, 20, 10))]
    frame = pd.DataFrame(rows, columns=["user", "item", "time"])
    found = read_folder(sharded(tmp_path, frame, "--protocol", "last", "--min_items", 1))
    sets = {
        split: {user: (set(inputs), target) for user, (inputs, target) in found[split].items()}
        for split in ("train", "validation", "test")
    }
    assert sets["train"] == {1: ({20, 30}, []), 2: ({10}, []), 3: ({10}, []), 4: ({30, 40}, [])}
    assert sets["validation"] == {1: ({20, 30}, [10]), 4: ({30, 40}, [20])}
    assert sets["test"] == {1: ({10, 20, 30}, [40]), 2: ({10}, [20]), 4: ({20, 30, 40}, [10])}


def test_last_without_times_follows_the_input(tmp_path, capsys):
    frame = random_frame(2).drop(columns="time")
    found = sharded(tmp_path, frame, "--protocol", "last")
    assert (
        "ordered in the order of the input, because no times were read" in capsys.readouterr().out
    )
    assert_same(read_folder(found), oracle.last(frame))


def test_filters_come_before_the_last_item(tmp_path):
    frame = random_frame(3)
    found = sharded(tmp_path, frame, "--protocol", "last", "--min_users", 8, "--core")
    kept = frame[frame["rating"] >= 4].drop_duplicates(["user", "item"])
    while True:
        users, items = kept.groupby("user").size(), kept.groupby("item").size()
        smaller = kept[
            kept["user"].isin(users[users >= 5].index) & kept["item"].isin(items[items >= 8].index)
        ]
        if len(smaller) == len(kept):
            break
        kept = smaller
    rest = frame[frame["item"].isin(kept["item"]) & frame["user"].isin(kept["user"])]
    assert 0 < len(rest) < len(frame)
    assert_same(read_folder(found), oracle.last(rest))


@pytest.mark.data
@pytest.mark.slow
def test_last_on_ml1m_equals_pandas(data_dir, tmp_path):
    source = data_dir / "ml-1m" / "ratings.csv.gz"
    assert shard.main([str(source), str(tmp_path / "out"), "--protocol", "last"]) == 0
    frame = pd.read_csv(source)
    assert list(frame.columns) == ["user", "item", "rating"]
    found = read_folder(tmp_path / "out")
    kept = frame[frame["rating"] >= 4].drop_duplicates(["user", "item"])
    items = kept.groupby("user")["item"].agg(list)
    items = items[items.map(len) >= 5]
    assert set(found["train"]) == set(found["validation"]) == set(found["test"]) == set(items.index)
    counts = pd.Series(list(itertools.chain.from_iterable(i[:-2] for i in items))).value_counts()
    assert found["popularity"] == counts.to_dict()
    known = set(counts.index)
    for user, listed in items.items():
        assert sorted(found["train"][user][0]) == sorted(listed[:-2])
        inputs, target = found["validation"][user]
        assert sorted(inputs) == sorted(listed[:-2])
        assert target == [item for item in listed[-2:-1] if item in known]
        inputs, target = found["test"][user]
        assert sorted(inputs) == sorted(item for item in listed[:-1] if item in known)
        assert target == [item for item in listed[-1:] if item in known]
    assert len(found["test"]) == 6034


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0, 0.1, 0.4])
@pytest.mark.parametrize("rated", [True, False])
def test_time_equals_pandas(tmp_path, fraction, rated):
    frame = random_frame(4, 700, rated)
    arguments = ["--protocol", "time", "--split_time", 300, "--validation_fraction", fraction]
    found = sharded(tmp_path, frame, *arguments, "--seed", 3)
    expected = oracle.time(frame, 300, validation_fraction=fraction)
    assert_same(read_folder(found), expected, seed=3)
    left_out = Manifest.load(found).preparation["left_out"]
    assert left_out["target_interactions_outside_vocabulary"] > 0, "no item is new"
    assert bool(expected["validation"]) == bool(fraction)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.9])
def test_quantile_equals_pandas(tmp_path, quantile):
    frame = random_frame(5)
    arguments = ["--protocol", "time", "--split_quantile", quantile, "--min_items", 2]
    found = sharded(tmp_path, frame, *arguments)
    assert_same(read_folder(found), oracle.time(frame, quantile=quantile, min_items=2))


def test_users_who_come_late_are_left_out(tmp_path):
    frame = random_frame(6)
    frame.loc[frame["user"] < 6, "time"] += 400
    found = sharded(tmp_path, frame, "--protocol", "time", "--split_time", 350)
    assert_same(read_folder(found), oracle.time(frame, 350))
    left_out = Manifest.load(found).preparation["left_out"]
    assert left_out["users_without_train_interaction"] == 6
    late = frame[(frame["user"] < 6) & (frame["rating"] >= 4)].drop_duplicates(["user", "item"])
    assert left_out["interactions_of_users_without_train_interaction"] == len(late)


def test_dates(tmp_path, capsys):
    frame = random_frame(7)
    start = pd.Timestamp("2024-01-01")
    dated = frame.assign(timestamp=start + pd.to_timedelta(frame["time"], "h")).drop(columns="time")
    arguments = ["--protocol", "time", "--split_time", "2024-01-13T12:00:00"]
    found = sharded(tmp_path, dated, *arguments)
    assert "training ends before 2024-01-13T12:00:00 of timestamp" in capsys.readouterr().out
    assert_same(read_folder(found), oracle.time(frame, 12.5 * 24))


def test_arguments_are_in_the_manifest(tmp_path):
    frame = random_frame(8)
    found = sharded(tmp_path, frame, "--protocol", "time", "--split_quantile", 0.8)
    raw = json.loads((found / "manifest.json").read_text())["preparation"]
    assert raw["protocol"] == "time" and raw["positives"]["time_column"] == "timestamp"
    times = sorted(oracle._positives(frame, 4.0)["time"])
    assert raw["arguments"]["split_time"] == times[int(0.8 * len(times))]
    assert raw["arguments"]["validation_fraction"] == 0.1


def test_the_highest_rating_counts_at_its_own_time(tmp_path):
    frame = random_frame(9)
    found = sharded(tmp_path, frame, "--protocol", "last", "--repeats", "max")
    best = frame.sort_values("rating", ascending=False, kind="stable")
    best = best.drop_duplicates(["user", "item"]).sort_index()
    assert_same(read_folder(found), oracle.last(best))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "time"], "--protocol time: --split_time and --split_quantile say where"),
        (
            ["--protocol", "time", "--split_time", "3", "--split_quantile", "0.5"],
            "--split_time and --split_quantile both say where training ends; pass one of the two",
        ),
        (
            ["--protocol", "time", "--split_time", "1000"],
            "interactions are before 1000, where training ends; their times run from 0 to 399",
        ),
        (
            ["--protocol", "time", "--split_time", "0"],
            "interactions are at or after 0, where training ends",
        ),
        (
            ["--protocol", "time", "--split_time", "tomorrow"],
            "--split_time: 'tomorrow' is neither a number nor a date such as 2024-01-31",
        ),
        (["--protocol", "time", "--split_quantile", "0"], "0 is not above 0 and below 1"),
        (["--split_quantile", "0.5"], "--split_quantile belongs to --protocol time"),
        (
            ["--protocol", "last", "--validation_fraction", "0"],
            "belongs to --protocol given or time",
        ),
        (["--protocol", "last", "--val_users", "3"], "--val_users belongs to --protocol liang"),
    ],
)
def test_wrong_options(tmp_path, capsys, arguments, message):
    frame = random_frame().rename(columns={"time": "timestamp"})
    frame.to_csv(tmp_path / "in.csv", index=False)
    assert shard.main([str(tmp_path / "in.csv"), str(tmp_path / "out"), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_time_needs_times(tmp_path, capsys):
    random_frame().drop(columns="time").to_csv(tmp_path / "in.csv", index=False)
    arguments = ["--protocol", "time", "--split_quantile", "0.5"]
    assert shard.main([str(tmp_path / "in.csv"), str(tmp_path / "out"), *arguments]) == 2
    assert "the input has no column 'timestamp'; pass --time_column" in capsys.readouterr().err


# --- the k-th time --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=60), st.data())
def test_kth_smallest(tmp_path_factory, times, data):
    path = tmp_path_factory.mktemp("times") / "times"
    np.array(times, np.float64).tofile(path)
    k = data.draw(st.integers(0, len(times) - 1))
    assert kth_smallest([path], k) == sorted(times)[k]
    assert bounds([path]) == (min(times), max(times))


def test_kth_smallest_of_several_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.times._PER_READ", 7)
    times = np.random.default_rng(0).integers(0, 30, 100) * 1e9
    times.tofile(tmp_path / "times")
    found = [kth_smallest([tmp_path / "times"], k) for k in range(100)]
    assert found == sorted(times.tolist())


def test_moments():
    assert moment("978300760") == 978300760.0 and moment("-1.5") == -1.5
    assert moment("2024-01-31") == moment("2024-01-31T00:00:00Z") == 1706659200e6
    assert moment("2024-01-31T02:00:00+02:00") == 1706659200e6
    assert told(1706659200e6) == "2024-01-31T00:00:00" and told(978300760.0) == "978300760"
