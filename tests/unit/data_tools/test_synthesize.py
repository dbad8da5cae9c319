"""Synthetic data: exact counts, no repeats, one file per seed, long tails, and tastes that a model
can find."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import synthesize
from data_tools.synthesize import Tastes, activity, draw_block


def make(path, users=300, items=80, interactions=6000, *more):
    arguments = [
        "--users",
        str(users),
        "--items",
        str(items),
        "--interactions",
        str(interactions),
        *map(str, more),
    ]
    assert synthesize.main([str(path), *arguments]) == 0
    table = pq.read_table(path)
    assert table.column_names == ["user", "item"]
    return np.asarray(table["user"]), np.asarray(table["item"])


@pytest.mark.parametrize(
    ("users", "items", "interactions"),
    [(1, 1, 1), (10, 10, 100), (3, 50, 149), (5, 7, 5), (5000, 40, 20_000), (300, 20_000, 9000)],
)
def test_counts_are_exact(tmp_path, users, items, interactions):
    user, item = make(tmp_path / "x.parquet", users, items, interactions)
    assert len(user) == interactions
    assert len(np.unique(user * (items + 1) + item)) == interactions
    np.testing.assert_array_equal(np.unique(user), np.arange(1, users + 1))
    assert item.min() >= 1
    assert item.max() <= items


def test_a_seed_fixes_the_file(tmp_path):
    make(tmp_path / "a.parquet")
    np.random.seed(1)  # the global generator has no say
    make(tmp_path / "b.parquet")
    make(tmp_path / "c.parquet", 300, 80, 6000, "--seed", 1)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert (tmp_path / "a.parquet").read_bytes() != (tmp_path / "c.parquet").read_bytes()


def test_activity_has_a_long_tail():
    counts = activity(463_435, 17_769, 56_880_037, np.random.default_rng(0))
    assert counts.sum() == 56_880_037
    assert 80 < np.median(counts) < 120
    assert counts.min() >= 5
    assert 2000 < counts.max() < 10_000


def test_draws_follow_the_weights():
    # with one item per user, every draw is an independent one from the user's mixture: compare with
    # its expectation
    tastes = Tastes.draw(30, np.random.default_rng(0))
    _, item = draw_block(np.ones(40_000, np.int64), tastes, np.random.default_rng(1))
    share = np.bincount(item, minlength=30) / 40_000
    n = len(tastes.probability) - 1
    expected = (
        tastes.probability[:n].mean(0) * (1 - synthesize.POPULAR)
        + tastes.probability[n] * synthesize.POPULAR
    )
    assert (abs(share - expected) < 6 * np.sqrt(expected / 40_000) + 1e-4).all()


def test_large_appetites_take_the_whole_catalogue():
    tastes = Tastes.draw(50, np.random.default_rng(0))
    counts = np.array([50, 1, 49, 0, 25])
    user, item = draw_block(counts, tastes, np.random.default_rng(1))
    np.testing.assert_array_equal(np.bincount(user, minlength=5), counts)
    assert len(np.unique(user * 50 + item)) == counts.sum()


def test_a_model_beats_popularity(tmp_path):
    """Closed-form EASE on 2,000 users x 500 items: at least twice popularity's NDCG@100, on
    popularity that has a tail."""
    user, item = make(tmp_path / "x.parquet", 2000, 500, 80_000)
    dense = np.zeros((2000, 500))
    dense[user - 1, item - 1] = 1
    popularity = dense.sum(0)
    assert np.sort(popularity)[-50:].sum() > 0.25 * len(user)
    random = np.random.default_rng(0)
    train, test = dense[:1700], dense[1700:]
    held = (random.random(test.shape) < 0.2) & (test > 0)
    fold_in = test * ~held
    gram = train.T @ train + 100 * np.eye(500)
    inverse = np.linalg.inv(gram)
    ease = -inverse / np.diag(inverse)
    np.fill_diagonal(ease, 0)
    assert ndcg(fold_in @ ease, fold_in, held) > 2 * ndcg(
        np.tile(train.sum(0), (300, 1)), fold_in, held
    )


def ndcg(scores, fold_in, held):
    order = np.argsort(-np.where(fold_in > 0, -np.inf, scores), 1, kind="stable")[:, :100]
    discount = 1 / np.log2(np.arange(2, 102))
    gain = (np.take_along_axis(held, order, 1) * discount).sum(1)
    ideal = np.array([discount[: min(100, n)].sum() for n in held.sum(1)])
    return (gain[ideal > 0] / ideal[ideal > 0]).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "3", "--items", "4", "--interactions", "13"], "13 is more than the 12 pairs"),
        (
            ["--users", "9", "--items", "4", "--interactions", "8"],
            "leaves some of the 9 users without any",
        ),
    ],
)
def test_impossible_sizes(tmp_path, capsys, arguments, message):
    assert synthesize.main([str(tmp_path / "x.parquet"), *arguments]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.startswith("error: ")
    assert captured.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_bad_numbers_are_refused_by_the_parser(tmp_path, value, capsys):
    assert (
        synthesize.main(
            [str(tmp_path / "x.parquet"), "--users", value, "--items", "4", "--interactions", "8"]
        )
        == 2
    )
    assert capsys.readouterr().err.startswith(
        f"error: --users: '{value}' is not an integer of at least 1"
    )


def test_an_existing_file_is_kept(tmp_path, capsys):
    path = tmp_path / "x.parquet"
    arguments = [str(path), "--users", "3", "--items", "4", "--interactions", "6"]
    assert synthesize.main(arguments) == 0
    assert synthesize.main(arguments) == 2
    assert "exists; pass --overwrite to replace it" in capsys.readouterr().err
    assert synthesize.main([*arguments, "--overwrite"]) == 0
    assert pq.read_table(path).num_rows == 6
    for mine in (b"mine", pa.table({"user": pa.array([1]), "item": pa.array([1])})):
        path.write_bytes(mine) if isinstance(mine, bytes) else pq.write_table(mine, path)
        before = path.read_bytes()
        assert synthesize.main([*arguments, "--overwrite"]) == 2
        assert "exists and was not written by this command" in capsys.readouterr().err
        assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def failing(*_):
        yield next(iter(real(3, 4, 6, 0)))
        raise RuntimeError("a bug")

    real = synthesize.blocks
    monkeypatch.setattr(synthesize, "blocks", failing)
    with pytest.raises(RuntimeError):
        synthesize.main(
            [str(tmp_path / "x.parquet"), "--users", "3", "--items", "4", "--interactions", "6"]
        )
    assert list(tmp_path.iterdir()) == []
