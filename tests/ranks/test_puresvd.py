"""`puresvd`: the factors, their search and a run of them, against numpy's decomposition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.commands import train as command
from dist_vasp.model.truncated_svd import WeightedUsers, right_singular_vectors
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.load import load_model
from dist_vasp.recommender import Recommender
from tests.oracles import puresvd as oracle
from tests.ranks.test_closed_form import I, X, users
from tests.ranks.test_ease import figures, held_out, lines_of, tastes, train_matrix, write_shards
from tests.support.invoke import fails, succeeds
from tests.support.partitioned import csr
from tests.support.ranks import run_ranks
from tests.unit.ranking.test_recommend import alone

RANK, CONVERGED = 5, 200
EXPONENTS = [(0.0, 0.0), (-1.0, -0.5), (0.5, 0.3)]
# V V^T has norm 1. Rounding of float32 in the products turns V by eps times the condition of its
# gap, which is below 300 here, and the scales of items multiply that by their ratio.
TOLERANCE = 300 * torch.finfo(torch.float32).eps


def _factors(ranks: Ranks, rank: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each exponents: V, the scale of the own items, and the singular values."""
    found = []
    for exponents in EXPONENTS:
        weighted = WeightedUsers(csr(users()), I, rank + 32, exponents, ranks)
        factors = right_singular_vectors(weighted, rank, CONVERGED)
        found.append(
            (factors.V_Jk.numpy(), weighted.scale_J1.numpy(), factors.values_k.cpu().numpy())
        )
    return found


def _weights(by_rank: list, case: int) -> np.ndarray:
    V = np.concatenate([found[case][0] for found in by_rank]).astype(np.float64)
    scale = np.concatenate([found[case][1] for found in by_rank]).astype(np.float64)
    return scale * (V @ V.T) / scale.T


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_projection_is_that_of_the_oracle(world_size, monkeypatch):
    by_rank = run_ranks(_factors, world_size, RANK)
    for case, (user_exponent, item_exponent) in enumerate(EXPONENTS):
        expected = oracle.weights(X, RANK, user_exponent, item_exponent)
        spread = np.ptp(np.log(by_rank[0][case][1])) if item_exponent else 0.0
        found = _weights(by_rank, case)
        assert np.abs(found - expected).max() <= TOLERANCE * np.exp(spread)


def test_singular_values_and_orthonormal_vectors():
    (V, _, values), *_ = _factors(alone(), RANK)
    expected = np.linalg.svd(X)[1][:RANK]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(V.T @ V, np.eye(RANK), atol=1e-5)


def test_users_in_blocks_are_the_same_users(monkeypatch):
    whole = _factors(alone(), RANK)
    monkeypatch.setattr("dist_vasp.model.truncated_svd.BLOCK_BYTES", 4 * (RANK + 32) * 7)
    for found, expected in zip(_factors(alone(), RANK), whole, strict=True):
        V, scale = found[0].astype(np.float64), found[1]
        W = expected[0].astype(np.float64)
        np.testing.assert_allclose(V @ V.T, W @ W.T, atol=TOLERANCE)
        assert (scale == expected[1]).all()


def test_more_vectors_than_the_matrix_has_are_zeros():
    """Three users span three dimensions; an item without users has none."""
    three = [[0, 1, 2], [2, 3], [0, 4]]
    x = np.zeros((3, 6))
    for u, items in enumerate(three):
        x[u, items] = 1
    factors = right_singular_vectors(WeightedUsers(csr(three), 6, 6, (0, 0), alone()), 5, 50)
    V = factors.V_Jk.numpy()
    assert (factors.values_k > 0).sum() == 3 and (V[:, 3:] == 0).all() and (V[5] == 0).all()
    np.testing.assert_allclose(V @ V.T, oracle.weights(x, 5), atol=1e-5)


# --- a run ----------------------------------------------------------------------------------------

SEARCH = [
    *("--search.svd_user_exponent", "[0, -1]", "--search.svd_item_exponent", "[0, -0.5]"),
    *("--run.best_by", "recall@20"),
]


def arguments(shards: Path, run_dir: Path, *more: str) -> list[str]:
    data = ["--data.shards", str(shards), "--run.dir", str(run_dir), "--device", "cpu"]
    svd = ["--model.kind", "puresvd", "--model.svd_rank", "4", "--model.svd_iterations", "100"]
    return [*svd, *data, *more]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("svd") / "shards")


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("svd") / "run"
    out = succeeds("train", *arguments(shards, path, *SEARCH), ranks=2)
    assert "rank 4, 4 combinations of svd_user_exponent, svd_item_exponent" in out
    assert "user exponent -1, item exponent -0.5: validation Recall@20 0." in out
    return path


def test_the_best_exponents_are_kept_and_tested(run):
    expected = {
        (a, b): figures(oracle.weights(train_matrix(), 4, a, b), held_out(150, 1))["recall@20"]
        for a in (0.0, -1.0)
        for b in (0.0, -0.5)
    }
    lines = [line for line in lines_of(run) if line.get("split") == "validation"]
    found = {(n["svd_user_exponent"], n["svd_item_exponent"]): n["recall@20"] for n in lines}
    assert found == pytest.approx(expected, abs=1e-9)
    result = json.loads((run / "result.json").read_text())
    best = max(expected, key=expected.__getitem__)
    assert (result["svd_user_exponent"], result["svd_item_exponent"]) == best
    tested = figures(oracle.weights(train_matrix(), 4, *best), held_out(60, 2))
    for name, value in tested.items():
        assert result["test"][name] == pytest.approx(value, abs=1e-9), name


def test_a_recommender_lists_by_it_and_so_does_its_export(run, tmp_path):
    loaded = load_model(run, None, alone())
    B = oracle.weights(train_matrix(), 4, *_chosen(loaded))
    history = tastes(1, 5)[0]
    scores = B[history].sum(axis=0)
    scores[history] = -np.inf
    known = np.array(loaded.items.ids.to_pylist())
    best = known[np.argsort(-scores)[:5]]
    Recommender.load(run).export(tmp_path / "model")
    for folder in (run, tmp_path / "model"):
        ids, _ = Recommender.load(folder).recommend([known[history].tolist()], 5)
        assert ids.tolist() == [best.tolist()]


def _chosen(loaded) -> tuple[float, float]:
    return loaded.config.model.svd_user_exponent, loaded.config.model.svd_item_exponent


def test_the_same_command_evaluates_it_again_and_another_rank_is_refused(run, shards, call, capsys):
    call(command.main, *arguments(shards, run, *SEARCH))
    out = capsys.readouterr().out
    assert f"rank 4, {run} already holds user exponent" in out and "it is evaluated again" in out
    text = fails("train", *arguments(shards, run, *SEARCH, "--model.svd_rank", "3"))
    assert "model.svd_rank was 4 and is now 3" in text


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--search.ease_lambda", "[10, 20]"],
            "search svd_rank, svd_user_exponent, svd_item_exponent",
        ),
        (["--model.neighbours", "3"], "0 with model.kind puresvd"),
        (["--model.svd_rank", "0"], "1 to 16384"),
        (["--model.svd_iterations", "0"], "1 to 1000"),
        (["--model.svd_item_exponent", "9"], "-1 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(shards, tmp_path, more, expected):
    assert expected in fails("train", *arguments(shards, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_are_searched(shards, tmp_path, ranks):
    """Each rank is a model of other shapes, and the best one is loaded with its own."""
    more = ["--search.svd_rank", "[2, 9, 4]", "--model.svd_user_exponent", "-0.5"]
    more += ["--run.best_by", "recall@20"]
    out = succeeds("train", *arguments(shards, tmp_path / "run", *more), ranks=ranks)
    assert "3 combinations of svd_rank" in out and "rank 9: validation Recall@20 0." in out
    expected = {
        k: figures(oracle.weights(train_matrix(), k, -0.5, 0), held_out(150, 1))["recall@20"]
        for k in (2, 9, 4)
    }
    found = {line["svd_rank"]: line["recall@20"] for line in lines_of(tmp_path / "run")}
    assert found == pytest.approx(expected, abs=1e-9)
    best = max(expected, key=expected.__getitem__)
    result = json.loads((tmp_path / "run/result.json").read_text())
    tested = figures(oracle.weights(train_matrix(), best, -0.5, 0), held_out(60, 2))
    assert (
        result["svd_rank"]
        == best
        == load_model(tmp_path / "run", None, alone()).config.model.svd_rank
    )
    for name, value in tested.items():
        assert result["test"][name] == pytest.approx(value, abs=1e-9), name


def test_a_dry_run_says_what_it_costs(shards, tmp_path):
    out = succeeds("train", *arguments(shards, tmp_path / "run", "--dry_run"))
    assert (
        "rank 4, 4,575 interactions" in out
        and "eigenvectors" in out
        and "time for one setting" in out
    )
