"""RLAE, RDLAE, data-adaptive normalisation and lambda by popularity against a dense oracle, on 1, 2
and 3 ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.config.schema import Config, DataConfig, ModelConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.build import new_model
from dist_vasp.model.closed_form import solve
from dist_vasp.model.ease import add_to_diagonal, invert, scale_diagonal, to_weights
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training.closed_form import ease as fit_ease
from tests.oracles import closed_form as oracle
from tests.oracles.rounding import stored
from tests.ranks.test_ease import columns_of, dense, gram
from tests.support.make_shards import write_folder
from tests.support.ranks import run_ranks
from tests.unit.ranking.test_recommend import alone

I, WIDTH = 37, 8
EVERY = {"lambda": 3.0, "dropout": 0.3, "xi": 0.1, "item_exponent": -0.4, "lambda_exponent": 0.6}
CASES = [
    {"lambda": 3.0, "xi": 0.05},
    {"lambda": 40.0, "xi": 0.2},
    {"lambda": 3.0, "xi": 1.0},
    {"lambda": 3.0, "dropout": 0.3, "xi": 0.1},
    {"lambda": 3.0, "item_exponent": -0.5},
    {"lambda": 3.0, "lambda_exponent": 1.0},
    EVERY,
]


def users() -> list[list[int]]:
    """Items of falling popularity; the last one has no user."""
    rng = np.random.default_rng(3)
    odds = 0.5 / np.arange(1, I) ** 0.7
    return [np.flatnonzero(rng.random(I - 1) < odds).tolist() or [0] for _ in range(150)]


X = dense(users(), I)


def model_of(keys: dict[str, float]) -> ModelConfig:
    return ModelConfig(kind="ease", **{f"ease_{name}": value for name, value in keys.items()})


def _solved(ranks: Ranks) -> list[np.ndarray]:
    return [_solve(ranks, keys, torch.float64) for keys in CASES]


def _solve(ranks: Ranks, keys: dict[str, float], dtype: torch.dtype) -> np.ndarray:
    B = columns_of(ranks, I, WIDTH, dtype)
    gram(B, users())
    solve(B, torch.from_numpy(X.sum(axis=0)), model_of(keys))
    return torch.cat(B.columns, dim=1).numpy()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_b_is_that_of_the_oracle(world_size):
    by_rank = run_ranks(_solved, world_size)
    for k, keys in enumerate(CASES):
        B = np.concatenate([found[k] for found in by_rank], axis=1)
        np.testing.assert_allclose(B, oracle.weights(X, keys), rtol=0, atol=1e-10, err_msg=keys)
        assert (np.diag(B) == 0).all()


@pytest.mark.parametrize("keys", CASES[:4], ids=str)
def test_the_conditions_of_the_optimum_hold(keys):
    """The gradient is 0 off the diagonal; on it the multiplier is 0, or more and B_jj is xi."""
    B, problem = _solve(alone(), keys, torch.float64), oracle.problem(X, keys)
    A = problem.G + np.diag(problem.ridge_I)
    free = 1 - problem.ridge_I * np.diag(np.linalg.inv(A))
    np.fill_diagonal(B, np.minimum(free, keys["xi"]))
    gradient = A @ B - problem.G
    multiplier = -np.diag(gradient)
    off = gradient + np.diag(multiplier)
    assert np.abs(off).max() <= 1e-9 * np.abs(A).max()
    at_limit = free > keys["xi"]
    assert (multiplier[at_limit] > 0).all()
    np.testing.assert_allclose(multiplier[~at_limit], 0, atol=1e-9 * np.abs(A).max())
    if keys["xi"] < 1:
        assert at_limit.any() and (~at_limit).any(), "both conditions are tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_defaults_are_ease_bitwise(dtype, dropout):
    keys = {"lambda": 0.3, "dropout": dropout}
    off = {"xi": 0.0, "item_exponent": 0.0, "lambda_exponent": 0.0}
    B = columns_of(alone(), I, WIDTH, dtype)
    gram(B, users())
    if dropout:
        scale_diagonal(B, 1 / (1 - dropout))
    add_to_diagonal(B, 0.3)
    invert(B)
    to_weights(B)
    expected = torch.cat(B.columns, dim=1).numpy()
    assert np.array_equal(_solve(alone(), keys | off, dtype), expected)


def test_scaled_columns_are_a_lambda_by_popularity():
    """EASE on X D^s, with B scaled back, has the ridge lambda p^(-2 s)."""
    popularity = np.maximum(X.sum(axis=0), 1)
    scale = (popularity / X.sum(axis=0).mean()) ** -0.3
    scaled = np.diag(scale) @ X.T @ X @ np.diag(scale)
    inside = oracle.Problem(scaled, np.full(I, 3.0), 0.0).solution()
    B = np.diag(scale) @ inside @ np.diag(1 / scale)
    found = _solve(alone(), {"lambda": 3.0, "lambda_exponent": 0.6}, torch.float64)
    np.testing.assert_allclose(found, B, rtol=0, atol=1e-10)


def test_xi_decides_which_items_are_constrained_and_1_none():
    """Between EASE and ridge regression the columns change one by one."""
    ridge = oracle.problem(X, {"lambda": 3.0, "xi": 1.0}).solution()
    np.fill_diagonal(ridge, 0)
    found = _solve(alone(), {"lambda": 3.0, "xi": 1.0}, torch.float64)
    np.testing.assert_allclose(found, ridge, rtol=0, atol=1e-10)


def _fitted(ranks: Ranks, folder: Path, dtype: str) -> np.ndarray:
    model = replace(model_of(EVERY), ease_user_exponent=-0.5, ease_dtype=dtype)
    config = Config(model=model, data=DataConfig(shards=str(folder)))
    config = replace(config, parallel=replace(config.parallel, block_columns=WIDTH))
    columns = new_model(config, I, ranks).matrices[0].columns()
    fit_ease.fit(columns, WIDTH, config, Manifest.load(folder), ranks)
    return torch.cat(columns, dim=1).numpy()


@pytest.mark.parametrize("world_size", [1, 2])
def test_fitted_from_shards_it_is_that_of_the_oracle(tmp_path, world_size):
    """With weighted users, from the counts of the training shards."""
    write_folder(tmp_path, users(), n_items=I)
    by_rank = run_ranks(_fitted, world_size, tmp_path, "fp64")
    expected = oracle.weights(X, EVERY | {"user_exponent": -0.5})
    stored(np.concatenate(by_rank, axis=1), expected, "B with every key")
