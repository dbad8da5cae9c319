"""Ratings from the input through the shards into batches, and RMSE against the held-out ones."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import shard, verify
from dist_vasp.data.held_out import evaluation_blocks
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows, concatenate_rows
from dist_vasp.data.shard import read_shard
from dist_vasp.data.stream import StreamOptions, TrainStream
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking.evaluate import evaluate

N_USERS, N_ITEMS = 40, 13


@dataclass(frozen=True)
class Prepared:
    """A data folder and the rows that it was made from: (user, item) -> (rating, split)."""

    folder: Path
    rows: dict[tuple[int, int], tuple[float, str]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    rng, rows = np.random.default_rng(0), {}
    for user in range(N_USERS):
        for item in rng.choice(N_ITEMS, rng.integers(3, N_ITEMS), replace=False):
            rating = float(rng.integers(1, 11)) / 2
            rows[user, int(item)] = rating, "test" if rng.random() < 0.3 else "train"
    folder = tmp_path_factory.mktemp("rated")
    with open(folder / "in.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "rating", "split"])
        writer.writerows((u, i, *of_pair) for (u, i), of_pair in rows.items())
    arguments = ["--protocol", "given", "--keep_ratings", "--validation_fraction", "0"]
    assert shard.main([str(folder / "in.csv"), str(folder / "out"), *arguments]) == 0
    return Prepared(folder / "out", rows)


def _pairs(folder: Path, user_keys: np.ndarray, rows: Rows) -> dict[tuple[int, int], float]:
    """(user, item) -> rating by the original ids; a key is the id."""
    ids = np.asarray(load_items(folder, Manifest.load(folder)).ids)
    users = np.repeat(user_keys.astype(np.int64), rows.lengths)
    pairs = zip(users.tolist(), ids[rows.items].tolist(), strict=True)
    assert rows.values is not None and rows.values.dtype == np.float32
    return dict(zip(pairs, rows.values.tolist(), strict=True))


def test_every_rating_stays_beside_its_item(prepared):
    assert verify.main([str(prepared.folder)]) == 0
    manifest = Manifest.load(prepared.folder)
    assert manifest.keeps_ratings
    stream = TrainStream(prepared.folder, StreamOptions(7, 2, halves=False, ratings=True))
    found: dict[tuple[int, int], float] = {}
    for step in range(stream.steps_per_epoch):
        batch = stream.batch(step)
        found |= _pairs(prepared.folder, batch.user_keys, batch.inputs)
        assert np.array_equal(batch.inputs.values, batch.targets.values)
    train = {p: rating for p, (rating, split) in prepared.rows.items() if split == "train"}
    assert found == train
    held_out: dict[tuple[int, int], float] = {}
    for block in evaluation_blocks(prepared.folder, "test", 8, ratings=True):
        held_out |= _pairs(prepared.folder, block.user_keys, block.held_out)
    known = {item for _, item in train}
    test = {p: rating for p, (rating, split) in prepared.rows.items() if split == "test"}
    assert held_out == {p: rating for p, rating in test.items() if p[1] in known}


def test_ratings_are_not_read_unless_asked_for(prepared):
    manifest = Manifest.load(prepared.folder)
    entry = manifest.splits["test"].shards[0]
    block = read_shard(prepared.folder, "test", entry, manifest.n_items)
    assert block.rows.values is None and block.held_out.values is None
    stream = TrainStream(prepared.folder, StreamOptions(7, 2, halves=True))
    assert stream.batch(0).inputs.values is None


def test_rows_without_some_keep_the_ratings_of_the_others():
    rows = Rows(
        np.array([0, 2, 2, 5]), np.arange(5, dtype=np.int32), np.arange(5, dtype=np.float32)
    )
    assert rows.slice(1, 3).values.tolist() == [2, 3, 4]
    assert rows.take(np.array([2, 0])).values.tolist() == [2, 3, 4, 0, 1]
    assert rows.where(rows.items % 2 == 0).values.tolist() == [0, 2, 4]
    assert concatenate_rows([rows, rows.slice(0, 1)]).values.tolist() == [0, 1, 2, 3, 4, 0, 1]
    broken = Rows(rows.indptr, rows.items, np.full(5, np.nan, np.float32))
    with pytest.raises(ValueError, match="a rating is not a finite number"):
        broken.check(3, 5, "here")


def _score(x: ItemRows) -> Iterator[tuple[int, torch.Tensor]]:
    """The mean rating of the user plus a tenth of the item's row, in two blocks."""
    sums = torch.zeros(x.n_rows).index_add_(0, x.row_of, x.values)
    mean_G1 = (sums / x.lengths.clamp(min=1))[:, None]
    for lo, hi in ((0, 5), (5, x.n_items)):
        yield lo, mean_G1 + torch.arange(lo, hi) / 10


def test_rmse_equals_that_of_a_loop_over_the_input(prepared):
    alone = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))
    result = evaluate(_score, prepared.folder, "test", alone, ratings=True).result()
    ids = load_items(prepared.folder, Manifest.load(prepared.folder)).ids.to_pylist()
    of_user: dict[int, list[float]] = {}
    for (user, _), (rating, split) in prepared.rows.items():
        if split == "train":
            of_user.setdefault(user, []).append(rating)
    errors = [
        float(np.mean(of_user[user])) + ids.index(item) / 10 - rating
        for (user, item), (rating, split) in prepared.rows.items()
        if split == "test" and user in of_user and item in ids
    ]
    assert result["n_ratings"] == len(errors) > 50
    assert result["rmse"] == pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=1e-6)
