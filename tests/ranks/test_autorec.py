"""`autorec`: the partitioned model equals its dense oracle on 1 to 3 ranks, with and without
ratings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_vasp.data.rows import Rows
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model import sinks
from dist_vasp.model.build import make_trunk
from dist_vasp.model.norms import SharedItems
from dist_vasp.model.sinks import AddToGrad
from dist_vasp.model.sparse import gather_rows
from dist_vasp.model.step import MicroBatch
from dist_vasp.training.step.item_sinks import Norm
from tests.oracles.autorec import DenseAutoRec
from tests.ranks.test_vasp import check_step, partitioned_step
from tests.support.partitioned import (
    SMALL,
    assemble,
    csr,
    export,
    make_model,
    plain,
    random_rows,
    share,
)
from tests.support.ranks import run_ranks

N_ITEMS, N_ROWS = 23, 11
LAYERS = SMALL["encoder_layers"], SMALL["decoder_layers"]


def _parameters(results) -> dict[str, torch.Tensor]:
    parameters = assemble([piece for r in results for piece in r["before"]])
    return parameters | {n: torch.from_numpy(p) for n, p in results[0]["trunk_before"].items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_dense_oracle(world_size):
    by_rank = run_ranks(partitioned_step, world_size, [("autorec", "squared", False)])
    results = [cases[0] for cases in by_rank]
    check_step(results, DenseAutoRec("autorec", _parameters(results), *LAYERS), "squared")


def _rated() -> Rows:
    """Ratings of 1 to 5; two users have none."""
    rows = csr(random_rows(N_ROWS, N_ITEMS, 1, empty=(2, 7)))
    ratings = np.random.default_rng(2).integers(1, 6, len(rows.items))
    return replace(rows, values=ratings.astype(np.float32))


def _rated_step(ranks):
    """Scores, loss and gradients of a step on ratings, and the squared norm of the gradients."""
    torch.set_grad_enabled(False)
    sinks.GRADIENT_ROWS = 7
    model = make_model("autorec", N_ITEMS, ranks, "squared")
    trunk = make_trunk(model.config, 5, Arithmetic(torch.float64))
    before = export(model.slices())
    mine, padded = share(N_ROWS, ranks)
    own = _rated().slice(mine.start, mine.stop)
    n_real, group = mine.stop - mine.start, ranks.partition_group
    x, y = gather_rows([own, own], n_real, padded, N_ITEMS, group, ranks.device)
    scores = [(lo, s[x.real_rows].numpy().copy()) for lo, s in model.scores(trunk, x)]
    batch = MicroBatch(x, y, None, N_ROWS)
    trunk_before = {f"trunk.{n}": p.numpy().copy() for n, p in trunk.named_parameters()}
    norm = Norm(ranks.replica_group, SharedItems(), torch.zeros((), dtype=torch.float64))
    norm.begin()
    model.gradients(plain(trunk), batch, norm)
    norm.end()
    trunk.zero_grad()
    loss = model.gradients(plain(trunk), batch, AddToGrad()).reconstruction
    return {
        "before": before,
        "trunk_before": trunk_before,
        "scores": scores,
        "loss": float(loss),
        "gradients": export(model.slices(), "grad"),
        "trunk": {f"trunk.{n}": p.grad.numpy().copy() for n, p in trunk.named_parameters()},
        "squared_norm": float(norm.squared_norm),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_loss_of_ratings_is_that_of_the_observed_ones(world_size):
    results = run_ranks(_rated_step, world_size)
    oracle = DenseAutoRec("autorec", _parameters(results), *LAYERS)
    rows = _rated()
    ratings = torch.zeros(N_ROWS, N_ITEMS, dtype=torch.float64)
    ratings[rows.row_of, rows.items] = torch.from_numpy(rows.values).double()
    (scores,), _ = oracle.forward(ratings)
    for r in results:
        for lo, found in r["scores"]:
            expected = scores[:, lo : lo + found.shape[1]].detach()
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    loss = ((ratings - scores)[ratings > 0] ** 2).sum() / N_ROWS
    loss.backward()
    assert sum(r["loss"] for r in results) == pytest.approx(float(loss.detach()), rel=1e-10)
    gradients = assemble([piece for r in results for piece in r["gradients"]])
    squared = sum(float((grad * grad).sum()) for grad in gradients.values())
    # norms without gradients are kept in float32
    assert sum(r["squared_norm"] for r in results) == pytest.approx(squared, rel=1e-5)
    gradients |= {
        n: torch.from_numpy(sum(r["trunk"][n] for r in results)) for n in results[0]["trunk"]
    }
    for name, p in oracle.parameters.items():
        np.testing.assert_allclose(gradients[name], p.grad, rtol=1e-10, atol=1e-12, err_msg=name)
