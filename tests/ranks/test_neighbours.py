"""An items x items matrix on a support: which inputs it keeps, its closed form, its training, and a
run of it, against dense oracles."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_vasp.config.checks import check
from dist_vasp.config.schema import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model import closed_form_on_support, co_occurrence, slices, sparse_columns
from dist_vasp.model.build import make_trunk, new_model
from dist_vasp.model.closed_form_on_support import solve_on_support
from dist_vasp.model.co_occurrence import CoOccurrence
from dist_vasp.model.neighbours import NeighbourMatrix
from dist_vasp.model.sinks import AddToGrad
from dist_vasp.model.sparse_columns import gradient_of_weights, sparse_product, sum_of_pairs
from dist_vasp.model.step import MicroBatch
from dist_vasp.model.support import supports_of
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.evaluate import to_item_rows, top_items
from dist_vasp.ranking.load import load_model
from dist_vasp.recommender import Recommender
from dist_vasp.training.closed_form.support import SupportFit
from dist_vasp.training.step.optimizer import InPlaceAdam
from tests.oracles import closed_form as oracle
from tests.oracles.dense import DenseVASP
from tests.oracles.rounding import stored
from tests.ranks.test_closed_form import CASES, EVERY, I, X, model_of, users
from tests.ranks.test_ease import (
    N_ITEMS,
    arguments,
    dense,
    figures,
    held_out,
    tastes,
    train_matrix,
    write_shards,
)
from tests.ranks.test_ease import oracle as ease_oracle
from tests.ranks.test_memory import Allocations
from tests.ranks.test_vasp import N_ITEMS as N_TRAINED
from tests.ranks.test_vasp import N_ROWS, _data, check_step
from tests.ranks.test_wide_deep import DenseWideDeep
from tests.support.invoke import fails, succeeds
from tests.support.make_shards import write_folder
from tests.support.partitioned import SMALL, assemble, csr, gathered, pad_noise, plain, random_rows
from tests.support.ranks import run_ranks
from tests.unit.ranking.test_recommend import alone

K = 6


def expected_support(x: np.ndarray, width: int) -> np.ndarray:
    """In exact arithmetic: by squared cosine, ties by item row."""
    n = (x.T @ x).astype(int)
    rows = []
    for j in range(len(n)):
        others = [i for i in range(len(n)) if i != j]
        others.sort(key=lambda i: (-Fraction(int(n[i, j]) ** 2, max(int(n[i, i]), 1)), i))
        rows.append(sorted(others[:width]))
    return np.array(rows)


def dense_of(ids_JK: np.ndarray, weight_JK: np.ndarray, n_items: int) -> np.ndarray:
    """W (I, J)."""
    W = np.zeros((n_items, len(ids_JK)))
    W[ids_JK, np.arange(len(ids_JK))[:, None]] = weight_JK
    return W


# --- the support ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, K, I - 1])
def test_the_support_is_the_nearest_items_in_every_range(monkeypatch, width):
    monkeypatch.setattr(co_occurrence, "_MOST_ENTRIES", 70)
    counts = CoOccurrence(csr(users()), I)
    expected = expected_support(X, width)
    for start, stop in [(0, I), (0, 13), (13, 36), (36, I)]:
        found = supports_of(counts, start, stop, width)
        np.testing.assert_array_equal(found, expected[start:stop])


def test_equal_cosines_go_to_the_lower_row():
    """Items 1 to 4 have the same users, and item 5 has none."""
    counts = CoOccurrence(csr([[0, 1, 2, 3, 4], [1, 2, 3, 4]]), 6)
    found = supports_of(counts, 0, 6, 2)
    assert found.tolist() == [[1, 2], [2, 3], [1, 3], [1, 2], [1, 2], [0, 1]]


# --- the closed form ------------------------------------------------------------------------------


def solved(
    keys: dict[str, float], ids: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    model = replace(model_of(keys), ease_dtype="fp64")
    B_JK = torch.zeros(ids.shape, dtype=torch.float64)
    counts = CoOccurrence(csr(users()), I, weights)
    solve_on_support(counts, ids, B_JK, 0, model, alone())
    return dense_of(ids, B_JK.numpy(), I)


@pytest.mark.parametrize("keys", CASES, ids=lambda keys: "+".join(keys))
def test_all_inputs_give_the_dense_closed_form(monkeypatch, keys):
    monkeypatch.setattr(closed_form_on_support, "items_of_a_pass", lambda *sizes: 10)
    found = solved(keys, expected_support(X, I - 1))
    np.testing.assert_allclose(found, oracle.weights(X, keys), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_work_covers_all_items_and_is_even(n):
    counts = CoOccurrence(csr(users()), I)
    work = np.zeros(I)
    for user in users():
        work[user] += len(user)
    work += co_occurrence._PRODUCTS_OF_A_CALL
    for start, stop in [(0, I), (7, 7), (3, 20)]:
        bounds = counts.equal_work(start, stop, n)
        assert (bounds[0], bounds[-1], len(bounds)) == (start, stop, n + 1)
        parts = [work[lo:hi].sum() for lo, hi in pairwise(bounds)]
        assert sum(parts) == work[start:stop].sum()
        assert max(parts) <= work[start:stop].sum() / n + 2 * work.max()


def test_a_support_gives_the_ridge_regression_on_it():
    ids = expected_support(X, K)
    found = solved({"lambda": 3.0}, ids)
    G = X.T @ X
    for j, S in enumerate(ids):
        column = np.zeros(I)
        column[S] = np.linalg.solve(G[np.ix_(S, S)] + 3.0 * np.eye(K), G[S, j])
        np.testing.assert_allclose(found[:, j], column, rtol=0, atol=1e-12)


def test_a_singular_system_is_an_error_that_names_the_item():
    """Without a ridge two items of the same users are one too many: of four users, so that every
    library finds a second pivot of exactly 0."""
    counts = CoOccurrence(csr([[0, 1, 2]] * 4), 3)
    ids = np.array([[1, 2], [0, 2], [0, 1]], np.int32)
    model = model_of({"lambda": 0.0})
    with pytest.raises(AgreedError, match="not positive definite on the support of item row 0 in"):
        solve_on_support(counts, ids, torch.zeros(3, 2), 0, model, alone())


def _fitted(ranks: Ranks, folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    every = {f"ease_{name}": value for name, value in EVERY.items()}
    found = []
    for width in (K, I - 1):
        model = ModelConfig(
            kind="ease", neighbours=width, ease_user_exponent=-0.5, ease_dtype="fp64", **every
        )
        config = Config(model=model, data=DataConfig(shards=str(folder)))
        (path,) = new_model(config, I, ranks).matrices
        assert isinstance(path, NeighbourMatrix)
        fit = SupportFit(config, Manifest.load(folder), ranks)
        fit.choose(path)
        fit.solve(path, model)
        found.append((path.ids[0].tensor.numpy(), path.weights[0].tensor.numpy()))
    return found


@pytest.mark.parametrize(
    ("world_size", "replicas"), [(1, 1), (3, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_from_shards_with_every_key(tmp_path, world_size, replicas):
    write_folder(tmp_path, users(), n_items=I)
    by_rank = run_ranks(_fitted, world_size, tmp_path, replicas=replicas)
    for p, rank in enumerate(by_rank):
        same = by_rank[p % (world_size // replicas)]
        for found, expected in zip(rank, same, strict=True):
            np.testing.assert_array_equal(found[0], expected[0])
    by_rank = by_rank[: world_size // replicas]
    few, every = (np.concatenate([rank[case][0] for rank in by_rank]) for case in (0, 1))
    np.testing.assert_array_equal(few, expected_support(X, K))
    weights = np.concatenate([rank[1][1] for rank in by_rank])
    expected = oracle.weights(X, EVERY | {"user_exponent": -0.5})
    stored(dense_of(every, weights, I), expected, "B on all inputs")


# --- products and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("most", [1 << 22, 5])
def test_products_and_gradients_are_those_of_the_dense_matrix(monkeypatch, most):
    monkeypatch.setattr(sparse_columns, "_MOST_PAIRS", most)
    rows, rng = random_rows(9, I, 1, empty=(2,)), np.random.default_rng(0)
    x = to_item_rows(csr(rows), 10, I, torch.device("cpu"))
    dense_x = np.zeros((10, I))
    for g, row in enumerate(rows):
        dense_x[g, row] = 1
    ids = torch.from_numpy(expected_support(X, K)[:11].astype(np.int32))
    weight = torch.from_numpy(rng.normal(size=ids.shape))
    expected = dense_x @ dense_of(ids.numpy(), weight.numpy(), I)
    for product in (sparse_product, sum_of_pairs):
        np.testing.assert_allclose(product(ids, weight, x), expected, rtol=0, atol=1e-12)
    grad = torch.from_numpy(rng.normal(size=(10, 11)))
    whole = dense_x.T @ grad.numpy()
    for largest in (1 << 24, 0):
        monkeypatch.setattr(sparse_columns, "_MOST_GRADIENT", largest)
        found = gradient_of_weights(ids, grad, x)
        np.testing.assert_allclose(
            found, whole[ids.numpy(), np.arange(11)[:, None]], rtol=0, atol=1e-12
        )


# --- training -------------------------------------------------------------------------------------

TRAINED = [("nease", "focal"), ("nease", "cosine"), ("vasp", "focal"), ("wide_deep", "focal")]


def _support(n_items: int) -> np.ndarray:
    """K inputs of each item, at random."""
    rng = np.random.default_rng(4)
    others = [np.delete(np.arange(n_items), j) for j in range(n_items)]
    return np.stack([np.sort(rng.choice(of, K, replace=False)) for of in others])


def _pieces(model, what: str) -> list[tuple[str, int, int, int, np.ndarray]]:
    """As `export`, with W and its gradient as dense columns."""
    (path,) = model.matrices
    found = []
    for piece in model.trained_slices():
        values = piece.tensor if what == "tensor" else piece.tensor.grad
        axis, array = piece.item_dim, values.numpy().copy()
        if piece.name == "output.nease.weight":
            axis, array = 1, dense_of(path.ids[0].tensor.numpy(), array, model.n_items)
        found.append((piece.name, piece.lo, piece.hi, axis, array))
    return found


def _trained_step(ranks: Ranks) -> list[dict]:
    slices.BLOCK_COLUMNS = 5
    torch.set_grad_enabled(False)
    found = []
    for kind, loss in TRAINED:
        x, y, noise = _data()
        config = ModelConfig(kind=kind, neighbours=K, **SMALL)
        whole = Config(model=config, loss=LossConfig(kind=loss))
        model = new_model(whole, N_TRAINED, ranks, Arithmetic(torch.float64))
        model.initialise(5)
        ids = model.matrices[0].ids[0]
        ids.tensor.copy_(torch.from_numpy(_support(N_TRAINED)[ids.lo : ids.hi]))
        trunk = make_trunk(config, 5, Arithmetic(torch.float64))
        named = dict(trunk.named_parameters()) if trunk is not None else {}
        x_G, y_G, mine, padded = gathered(x, y, N_TRAINED, ranks)
        of_step = {"before": _pieces(model, "tensor")}
        of_step["trunk_before"] = {f"trunk.{n}": p.numpy().copy() for n, p in named.items()}
        real = x_G.real_rows.numpy()
        scores = [(lo, s.numpy()[real]) for lo, s in model.scores(trunk, x_G)]
        noise_BL = pad_noise(noise, mine, padded, torch.float64)
        rows = MicroBatch(x_G, y_G, noise_BL, N_ROWS)
        losses = model.gradients(plain(trunk), rows, AddToGrad())
        of_step |= {
            "scores": scores,
            "losses": (float(losses.reconstruction), float(losses.penalty)),
            "gradients": _pieces(model, "grad"),
            "trunk_grads": {f"trunk.{n}": p.grad.numpy().copy() for n, p in named.items()},
        }
        InPlaceAdam([s.tensor for s in model.trained_slices()], OptimizerConfig(), lr=0.01).step()
        found.append(of_step | {"after": _pieces(model, "tensor")})
    return found


def _masked(kind: type[DenseVASP]) -> type[DenseVASP]:
    """The oracle, whose W is zero outside of the support."""

    @dataclass
    class Masked(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, noise: Tensor | None = None):
            name = "output.nease.weight"
            support = _support(N_TRAINED)
            mask = torch.from_numpy(dense_of(support, np.ones(support.shape), N_TRAINED))
            whole, self.parameters = self.parameters, dict(self.parameters)
            self.parameters[name] = whole[name] * mask
            try:
                return super().forward(x, noise)
            finally:
                self.parameters = whole

    return Masked


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_is_that_of_the_dense_oracle_masked_to_the_support(world_size):
    by_rank = run_ranks(_trained_step, world_size)
    for case, (kind, loss) in enumerate(TRAINED):
        results = [rank[case] for rank in by_rank]
        parameters = assemble([piece for r in results for piece in r["before"]])
        parameters |= {n: torch.from_numpy(p) for n, p in results[0]["trunk_before"].items()}
        layers = SMALL["encoder_layers"], SMALL["decoder_layers"]
        oracle_of = _masked(DenseWideDeep if kind == "wide_deep" else DenseVASP)
        check_step(results, oracle_of(kind, parameters, *layers), loss)


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("neighbours") / "shards")


def test_a_run_on_all_inputs_has_the_figures_of_dense_ease(shards, tmp_path, call):
    from launch.train import main

    run = tmp_path / "run"
    call(main, *arguments(shards, run, "--model.ease_lambda", "40", "--model.neighbours", N_ITEMS))
    result = json.loads((run / "result.json").read_text())
    expected = figures(ease_oracle(train_matrix(), 40.0), held_out(60, 2))
    for name, value in expected.items():
        assert result["test"][name] == pytest.approx(value, abs=1e-4), name
    (path,) = load_model(run, None, alone()).model.model.matrices
    B = dense_of(path.ids[0].tensor.numpy(), path.weights[0].tensor.numpy(), N_ITEMS)
    stored(B, ease_oracle(train_matrix(), 40.0), "B on all inputs")


def test_lists_explanations_and_similar_items_of_a_run_and_its_export(shards, tmp_path, call):
    """The search for lambda uses the same support for every value."""
    from launch.train import main

    run = tmp_path / "run"
    call(main, *arguments(shards, run, "--model.neighbours", K))
    value = json.loads((run / "result.json").read_text())["ease_lambda"]
    ids = expected_support(train_matrix(), K)
    G, B = train_matrix().T @ train_matrix(), np.zeros((N_ITEMS, N_ITEMS))
    for j, S in enumerate(ids):
        B[S, j] = np.linalg.solve(G[np.ix_(S, S)] + value * np.eye(K), G[S, j])
    Recommender.load(run).export(tmp_path / "model")
    history = [1003, 1001, 1007]
    rows = [item - 1000 for item in history]
    x = np.zeros(N_ITEMS)
    x[rows] = 1
    x_B = x @ B
    for folder in (run, tmp_path / "model"):
        r = Recommender.load(folder)
        listed, scores = r.recommend([history], k=10)
        np.testing.assert_allclose(scores[0], x_B[listed[0] - 1000], rtol=1e-5, atol=1e-6)
        assert (np.diff(scores[0]) <= 0).all()
        best = int(listed[0, 0])
        told = r.explain(history, best)
        weights = {reason.item: reason.weight for reason in told.reasons}
        assert weights == pytest.approx(
            {i: B[i - 1000, best - 1000] for i in history}, rel=1e-5, abs=1e-6
        )
        near, nearness = r.similar_items(1001, k=5)
        np.testing.assert_allclose(nearness, B[1, near - 1000], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "flvae"}, r"neighbours is 5, expected 0 with model\.kind flvae"),
        ({"neighbours": -1}, r"neighbours is -1, expected 0 or more, and finite"),
    ],
)
def test_what_has_no_support_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        check(Config(model=ModelConfig(**{"kind": "ease", "neighbours": 5} | keys)))


def trained(shards: Path, run: Path, steps: int, *more: str) -> list[str]:
    data = ["--data.shards", str(shards), "--run.dir", str(run), "--device", "cpu"]
    steps_of = ["--run.max_steps", str(steps), "--run.checkpoint_every_steps", "3"]
    sizes = [f"--model.{name}={value}" for name, value in SMALL.items()]
    batch = ["--data.batch_size", "64", "--data.workers", "0"]
    return [*data, *steps_of, *sizes, *batch, "--model.neighbours", str(K), *more]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), marks=pytest.mark.slow),
        (
            "--model.init_from_ease=closed_form",
            "--model.ease_lambda=40",
            "--optimizer.nease_decay=0.1",
            "--optimizer.item_state=lean",
            "--optimizer.clip_norm=1",
        ),
    ],
    ids=["trained", "from the closed form"],
)
def test_a_training_that_stopped_resumes_bitwise(shards, tmp_path, call, more):
    from launch.train import main

    call(main, *trained(shards, tmp_path / "whole", 6, *more))
    for steps in (3, 6):
        call(main, *trained(shards, tmp_path / "resumed", steps, *more))
    whole, resumed = (
        load_model(tmp_path / name, "step-00000006", alone()).checkpoint.header.files
        for name in ("whole", "resumed")
    )
    assert whole == resumed and len(whole) == 2
    (path,) = load_model(tmp_path / "whole", "step-00000006", alone()).model.model.matrices
    np.testing.assert_array_equal(path.ids[0].tensor, expected_support(train_matrix(), K))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_starts_from_a_run_with_the_same_inputs(shards, tmp_path, ranks):
    closed, scale = tmp_path / "closed", 8.0
    succeeds(
        "train", *arguments(shards, closed, f"--model.neighbours={K}", "--model.ease_lambda=40")
    )
    start = [
        "--model.kind=nease",
        f"--model.init_from_ease={closed}",
        f"--model.nease_scale={scale}",
    ]
    still = ["--optimizer.schedule", '[{"epochs": 1, "lr": 0}]']
    out = succeeds("train", *trained(shards, tmp_path / "run", 1, *start, *still), ranks=ranks)
    assert "choosing" not in out
    there, here = (
        load_model(tmp_path / name, None, alone()).model.model.matrices[0]
        for name in ("closed", "run")
    )
    assert torch.equal(here.ids[0].tensor, there.ids[0].tensor)
    assert torch.equal(here.weights[0].tensor, scale * there.weights[0].tensor)


def test_a_start_with_other_inputs_is_refused(shards, tmp_path):
    closed = tmp_path / "closed"
    succeeds(
        "train", *arguments(shards, closed, f"--model.neighbours={K}", "--model.ease_lambda=40")
    )
    start = [
        "--model.kind=nease",
        f"--model.init_from_ease={closed}",
        f"--model.neighbours={K + 1}",
    ]
    text = fails("train", *trained(shards, tmp_path / "run", 1, *start))
    assert f"closed has model.neighbours {K}, expected {K + 1} as this run" in text


def _by_ids(path: NeighbourMatrix, ids: np.ndarray) -> dict[tuple[int, int], float]:
    """The weights by the original ids of input and output item."""
    inputs, weights = ids[path.ids[0].tensor.numpy()], path.weights[0].tensor.numpy()
    outputs = np.repeat(ids[:, None], inputs.shape[1], axis=1)
    pairs = zip(inputs.flat, outputs.flat, strict=True)
    return dict(zip(pairs, weights.flat, strict=True))


def test_another_vocabulary_keeps_the_weights_of_inputs_it_had(shards, tmp_path, call):
    """Items in another order, two of them new; the inputs are those of the new data."""
    from launch.train import main

    call(main, *trained(shards, tmp_path / "old", 3, "--model.kind", "nease"))
    ids = np.random.default_rng(2).permutation(N_ITEMS) + 1000
    ids[:2] = 5000, 5001
    rows = [np.unique(np.append(row, row[0] % 2)) for row in tastes(400, 5)]
    write_folder(tmp_path / "new", rows, held_out(150, 1), n_items=N_ITEMS, item_ids=ids)
    given = trained(tmp_path / "new", tmp_path / "grown", 1, "--model.kind", "nease")
    still = ["--optimizer.schedule", '[{"epochs": 1, "lr": 0}]', "--allow_leak"]
    call(main, *given, *still, "--init_from", tmp_path / "old")
    before, after = (
        load_model(tmp_path / name, step, alone()).model.model.matrices[0]
        for name, step in (("old", "step-00000003"), ("grown", "step-00000001"))
    )
    expected = expected_support(dense(rows, N_ITEMS), K)
    np.testing.assert_array_equal(after.ids[0].tensor, expected)
    old = _by_ids(before, np.arange(N_ITEMS) + 1000)
    new = _by_ids(after, ids)
    n_same = len(old.keys() & new.keys())
    assert all(new[pair] == old[pair] for pair in old.keys() & new.keys())
    assert 0 < n_same < N_ITEMS * K


def test_nothing_of_rows_times_items_is_made(tmp_path, call, monkeypatch):
    """By torch or numpy, in a closed form, a training and their evaluations."""
    from launch.train import main

    n_items, n_test, rng = 5000, 100, np.random.default_rng(0)
    rows = [np.sort(rng.choice(n_items, 12, replace=False)) for _ in range(400)]
    pairs = [(row[:9], row[9:]) for row in rows[300:]]
    write_folder(tmp_path / "shards", rows[:300], pairs[:20], pairs, n_items=n_items)
    monkeypatch.setattr(sparse_columns, "_MOST_GRADIENT", 0)
    manifest = Manifest.load(tmp_path / "shards")
    config = Config(
        model=ModelConfig(kind="ease", neighbours=K, ease_lambda=9.0),
        data=DataConfig(shards=str(tmp_path / "shards")),
    )
    histories = csr([history.tolist() for history, _ in pairs])

    def fit_and_list() -> None:
        model = new_model(config, n_items, alone())
        fit = SupportFit(config, manifest, alone())
        fit.choose(model.matrices[0])
        fit.solve(model.matrices[0], config.model)
        top_items(partial(model.scores, None), histories, 50, n_items, alone())

    with Allocations() as mode:
        fit_and_list()
        call(main, *trained(tmp_path / "shards", tmp_path / "run", 3, "--model.kind", "vasp"))
    tracemalloc.start()
    fit_and_list()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n_items**2, f"{peak:,} bytes by numpy and Python"
    for (shape, n_bytes), operation in mode.seen.items():
        numbers = int(np.prod(shape))
        assert numbers < n_test * n_items, f"{operation} gives {shape}, {n_bytes:,} bytes"
