"""The real step through DeepSpeed against the dense oracle (invariant 1, float32) and across layouts (invariant 2)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dist_vasp.config import Config, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, Stage
from dist_vasp.data.stream import Batch
from tests.dense import TORCH_OPTIMIZERS, DenseVASP, dense_rows
from tests.partitioned import SMALL, assemble, csr, export, random_rows, randomise, share
from tests.ranks import run_ranks

N_ITEMS, N_ROWS, LR, STEPS = 23, 12, 0.01, 3


def _config(name: str = "nadam", kind: str = "vasp", accumulation: int = 1, replicas: int = 1, clip: float = 0.0) -> Config:
    return Config(
        model=ModelConfig(kind=kind, **SMALL),
        loss=LossConfig(),
        optimizer=OptimizerConfig(name=name, schedule=[Stage(10, LR)], accumulation=accumulation, clip_norm=clip),
        parallel=ParallelConfig(replicas=replicas),
        run=RunConfig(seed=5),
        device="cpu",
    )


def _rows(step: int) -> tuple[list[list[int]], list[list[int]]]:
    return random_rows(N_ROWS, N_ITEMS, 10 + step, empty=(3,)), random_rows(N_ROWS, N_ITEMS, 20 + step, empty=(5,))


def _batch(step: int, ranks) -> Batch:
    """Every row is a lane of its own, so that noise can be matched row by row."""
    x, y = _rows(step)
    mine, padded = share(N_ROWS, ranks)
    lanes = tuple((lane, 1) for lane in range(mine.start, mine.stop))
    n = mine.stop - mine.start
    return Batch(0, step, csr(x[mine]), csr(y[mine]), np.arange(n, dtype=np.uint64), lanes, n, N_ROWS, N_ROWS, padded)


def _train(ranks, configs: list[Config]):
    from dist_vasp.training.engine import Trainer

    torch.set_grad_enabled(False)
    found = []
    for config in configs:
        trainer = Trainer(config, N_ITEMS, ranks)
        trainer.engine.module.requires_grad_(True)
        randomise(trainer.model.slices(), 5)
        before = export(trainer.model.slices())
        trunk_before = {f"trunk.{n}": p.detach().numpy().copy() for n, p in trainer.trunk.named_parameters()}
        reports = [dataclasses.astuple(trainer.step(_batch(step, ranks))) for step in range(STEPS)]
        trunk_after = {f"trunk.{n}": p.detach().numpy().copy() for n, p in trainer.trunk.named_parameters()}
        found.append(
            dict(before=before, trunk_before=trunk_before, reports=reports, after=export(trainer.model.slices()), trunk=trunk_after)
        )
    return found


def _noise(step: int) -> torch.Tensor:
    from dist_vasp.data.augment import hash64

    keys = [int(hash64(np.uint64(5), np.uint64(step), np.uint64(lane))) for lane in range(N_ROWS)]
    return torch.cat([torch.randn((1, SMALL["latent"]), generator=torch.Generator().manual_seed(key)) for key in keys])


def _dense(parameters, name: str, clip: float):
    """Losses, gradient norms and final parameters of the same steps, in double precision."""
    dense = DenseVASP("vasp", {n: p.double() for n, p in parameters.items()}, SMALL["encoder_layers"], SMALL["decoder_layers"])
    optimizer = TORCH_OPTIMIZERS[name](list(dense.parameters.values()), LR)
    reports = []
    for step in range(STEPS):
        x, y = (dense_rows(rows, N_ITEMS, torch.float64) for rows in _rows(step))
        reconstruction, kl = dense.step(x, y, _noise(step).double(), "focal", None)
        norm = float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in dense.gradients.values()])))
        if clip:
            for p in dense.parameters.values():
                p.grad.mul_(min(1.0, clip / norm))
        optimizer.step()
        reports.append((reconstruction + kl, reconstruction, kl, norm))
    return reports, dense.parameters


CASES = [("nadam", 1, 0.0), ("adam", 1, 0.0), ("adamw", 1, 0.0), ("nadam", 3, 0.0), ("nadam", 1, 0.05), ("nadam", 2, 0.05)]


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
def test_steps_equal_dense_oracle(world_size, replicas):
    configs = [_config(name, accumulation=accumulation, replicas=replicas, clip=clip) for name, accumulation, clip in CASES]
    by_rank = run_ranks(_train, world_size, configs, replicas=replicas)
    for c, (name, _, clip) in enumerate(CASES):
        results = [r[c] for r in by_rank][: world_size // replicas]
        parameters = assemble([p for r in results for p in r["before"]])
        parameters |= {n: torch.from_numpy(p) for n, p in results[0]["trunk_before"].items()}
        reports, expected = _dense(parameters, name, clip)
        found = assemble([p for r in results for p in r["after"]]) | {
            n: torch.from_numpy(p) for n, p in results[0]["trunk"].items()
        }
        for r in results:
            np.testing.assert_allclose(r["reports"], reports, rtol=2e-6, err_msg=f"{name} {clip}")
        # Adam divides by the root of a squared gradient: where a gradient is nearly zero its rounding is what moves the entry
        for n, p in found.items():
            difference = torch.linalg.vector_norm(p.double() - expected[n]) / (torch.linalg.vector_norm(expected[n]) + 1e-3)
            assert difference < 2e-5, f"{name} {n}: {difference}"
