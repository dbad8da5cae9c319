"""Invariant 1: the partitioned model equals the dense oracle, in double precision and without an
engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model import sinks, slices
from dist_vasp.model.build import make_trunk
from dist_vasp.model.sinks import AddToGrad
from dist_vasp.model.step import MicroBatch
from dist_vasp.training.step.optimizer import InPlaceAdam
from tests.oracles.dense import TORCH_OPTIMIZERS, DenseVASP, dense_rows
from tests.support.partitioned import (
    SMALL,
    assemble,
    export,
    gathered,
    make_model,
    pad_noise,
    plain,
    random_rows,
)
from tests.support.ranks import run_ranks

N_ITEMS, N_ROWS = 23, 11
CASES = [
    ("vasp", "focal", True),
    ("vasp", "focal", False),
    ("flvae", "focal", True),
    ("flvae", "multinomial", True),
    ("nease", "focal", True),
    ("nease", "cosine", True),
    ("nease", "mse", True),
    ("nease", "bce", True),
]


def _data():
    x = random_rows(N_ROWS, N_ITEMS, 1, empty=(2, 7))
    y = random_rows(N_ROWS, N_ITEMS, 2, empty=(4, 7))
    noise = np.random.default_rng(3).normal(size=(N_ROWS, SMALL["latent"]))
    return x, y, noise


def partitioned_step(ranks, cases):
    """For each case: parameters before, loss, gradients, scores and parameters after one step, of
    this rank."""
    slices.BLOCK_COLUMNS, sinks.GRADIENT_ROWS = 5, 7
    torch.set_grad_enabled(False)
    found = []
    for kind, loss, latent_head in cases:
        x, y, noise = _data()
        model = make_model(kind, N_ITEMS, ranks, loss, latent_head)
        trunk = make_trunk(model.config, 5, Arithmetic(torch.float64))
        x_G, y_G, mine, padded = gathered(x, y, N_ITEMS, ranks)
        before = export(model.slices())
        trunk_before = (
            {}
            if trunk is None
            else {f"trunk.{n}": p.detach().numpy().copy() for n, p in trunk.named_parameters()}
        )
        scores = [(lo, s.numpy().copy()) for lo, s in model.scores(trunk, x_G)]
        noise_BL = pad_noise(noise, mine, padded, torch.float64)
        rows = MicroBatch(x_G, y_G, noise_BL, N_ROWS)
        losses = model.gradients(plain(trunk), rows, AddToGrad())
        gradients = export(model.slices(), "grad")
        trunk_grads = (
            {}
            if trunk is None
            else {f"trunk.{n}": p.grad.numpy().copy() for n, p in trunk.named_parameters()}
        )
        InPlaceAdam([s.tensor for s in model.slices()], OptimizerConfig(), lr=0.01).step()
        real = x_G.real_rows.numpy()
        found.append(
            {
                "before": before,
                "trunk_before": trunk_before,
                "scores": [(lo, s[real]) for lo, s in scores],
                "losses": (float(losses.reconstruction), float(losses.penalty)),
                "gradients": gradients,
                "trunk_grads": trunk_grads,
                "after": export(model.slices()),
            }
        )
    return found


def check_step(results, dense: DenseVASP, loss: str) -> None:
    """Scores, losses, gradients and one update of all ranks are those of the oracle."""
    x, y, noise = _data()
    dense_x, dense_y = (dense_rows(rows, N_ITEMS, torch.float64) for rows in (x, y))

    log_p = dense.log_p(dense_x, loss)
    for r in results:
        for lo, scores in r["scores"]:
            np.testing.assert_allclose(
                scores, log_p[:, lo : lo + scores.shape[1]].detach(), rtol=1e-10, atol=1e-12
            )

    optimizer = TORCH_OPTIMIZERS["nadam"](list(dense.parameters.values()), 0.01)
    expected = dense.step(dense_x, dense_y, torch.from_numpy(noise), loss, optimizer)
    np.testing.assert_allclose(
        np.sum([r["losses"] for r in results], axis=0),
        expected,
        rtol=1e-10,
        err_msg=f"{dense.kind} {loss}",
    )

    gradients = assemble([p for r in results for p in r["gradients"]])
    gradients |= {
        n: torch.from_numpy(sum(r["trunk_grads"][n] for r in results))
        for n in results[0]["trunk_grads"]
    }
    assert gradients.keys() == dense.gradients.keys()
    for name, grad in dense.gradients.items():
        np.testing.assert_allclose(
            gradients[name], grad, rtol=1e-10, atol=1e-12, err_msg=f"{dense.kind} {loss} {name}"
        )

    # torch's NAdam keeps a float32 factor; the exact rule is held against it in test_optimizer
    for name, p in assemble([p for r in results for p in r["after"]]).items():
        np.testing.assert_allclose(
            p,
            dense.parameters[name].detach(),
            rtol=1e-7,
            atol=1e-9,
            err_msg=f"{dense.kind} {loss} {name}",
        )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_dense_oracle(world_size):
    by_rank = run_ranks(partitioned_step, world_size, CASES)
    for c, (kind, loss, latent_head) in enumerate(CASES):
        results = [ranks[c] for ranks in by_rank]
        parameters = assemble([p for r in results for p in r["before"]])
        parameters |= {n: torch.from_numpy(p) for n, p in results[0]["trunk_before"].items()}
        dense = DenseVASP(
            kind, parameters, SMALL["encoder_layers"], SMALL["decoder_layers"], latent_head
        )
        check_step(results, dense, loss)
        if kind != "flvae":
            after = assemble([p for r in results for p in r["after"]])["output.nease.weight"]
            assert (after.diagonal() == 0).all()


def _initial(ranks):
    torch.set_grad_enabled(False)
    slices.BLOCK_COLUMNS = 4 + ranks.world_size
    return export(make_model("vasp", N_ITEMS, ranks, dtype=torch.float32).slices())


def test_every_layout_starts_from_the_same_matrices():
    whole = [assemble([p for r in run_ranks(_initial, n) for p in r]) for n in (1, 3)]
    for name, p in whole[0].items():
        assert torch.equal(p, whole[1][name]), name
    W = whole[0]["output.nease.weight"]
    assert W.std() > 0.1
    assert (W.diagonal() == 0).all()
    bound = (6 / (2 * N_ITEMS)) ** 0.5
    assert W.abs().max() <= bound
    assert len(W.unique()) > N_ITEMS * (N_ITEMS - 1) * 0.99
