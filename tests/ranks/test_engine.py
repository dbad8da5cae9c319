"""The real step through DeepSpeed against the dense oracle (invariant 1, float32) and across
layouts (invariant 2)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dist_vasp.config.schema import (
    Config,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from dist_vasp.data.stream import Batch
from dist_vasp.kernels.random import Normal, fill, row_keys
from tests.oracles.dense import TORCH_OPTIMIZERS, DenseVASP, dense_rows
from tests.oracles.rounding import Bounded, bounded, within
from tests.support.partitioned import SMALL, assemble, csr, export, random_rows, randomise, share
from tests.support.ranks import run_ranks

N_ITEMS, N_ROWS, LR, STEPS = 23, 12, 0.01, 3
REPORTED = ("loss", "reconstruction", "kl", "grad_norm")


def _config(
    name: str = "nadam",
    kind: str = "vasp",
    accumulation: int = 1,
    replicas: int = 1,
    clip: float = 0.0,
    stage: int = 1,
) -> Config:
    return Config(
        model=ModelConfig(kind=kind, **SMALL),
        loss=LossConfig(),
        optimizer=OptimizerConfig(
            name=name, schedule=[Stage(10, LR)], accumulation=accumulation, clip_norm=clip
        ),
        parallel=ParallelConfig(replicas=replicas, zero_stage=stage),
        run=RunConfig(seed=5),
        device="cpu",
    )


def _rows(step: int) -> tuple[list[list[int]], list[list[int]]]:
    return random_rows(N_ROWS, N_ITEMS, 10 + step, empty=(3,)), random_rows(
        N_ROWS, N_ITEMS, 20 + step, empty=(5,)
    )


def _batch(step: int, ranks) -> Batch:
    """Every row is a lane of its own, so that noise can be matched row by row."""
    x, y = _rows(step)
    mine, padded = share(N_ROWS, ranks)
    lanes = tuple((lane, 1) for lane in range(mine.start, mine.stop))
    n = mine.stop - mine.start
    return Batch(
        0,
        step,
        csr(x[mine]),
        csr(y[mine]),
        np.arange(n, dtype=np.uint64),
        lanes,
        n,
        N_ROWS,
        N_ROWS,
        padded,
    )


def _train(ranks, configs: list[Config]):
    from dist_vasp.training.step.engine import Trainer

    found = []
    for config in configs:
        trainer = Trainer(config, N_ITEMS, ranks)
        randomise(trainer.model.slices(), 5)
        states = [_state(trainer)]
        reports = []
        for step in range(STEPS):
            reports.append(dataclasses.astuple(trainer.step(_batch(step, ranks)))[:4])
            states += [_state(trainer)] if step in (0, STEPS - 1) else []
        found.append({"states": states, "reports": reports})
    return found


def _state(trainer):
    """Parameters and moments, of the items this rank owns and of the whole trunk."""
    trunk = {f"trunk.{name}": p.numpy().copy() for name, p in trainer.trunk_tensors(True).items()}
    return export(trainer.item_pieces(True)), trunk


def _whole(states):
    """One dictionary of whole float64 tensors out of the ranks' states."""
    items = assemble([piece for rank in states for piece in rank[0]])
    return {name: p.double() for name, p in items.items()} | {
        name: torch.from_numpy(p).double() for name, p in states[0][1].items()
    }


def _noise(step: int) -> torch.Tensor:
    """The noise of a step in which every lane has one row."""
    noise = torch.empty(N_ROWS, SMALL["latent"])
    fill(noise, row_keys(5, "noise", step, np.arange(N_ROWS), 0), Normal())
    return noise


NOISE = [_noise(step) for step in range(STEPS)]


def _dense(parameters, name: str, clip: float) -> dict[str, torch.Tensor | float]:
    """The oracle's answer in double precision: `report K NAME` of step K, `gradient NAME` of the
    first step, `first NAME` and `last NAME`, the parameters after the first and the last step."""
    dense = DenseVASP("vasp", parameters, SMALL["encoder_layers"], SMALL["decoder_layers"])
    optimizer = TORCH_OPTIMIZERS[name](list(dense.parameters.values()), LR)
    found: dict[str, torch.Tensor | float] = {}
    for step in range(STEPS):
        x, y = (dense_rows(rows, N_ITEMS, torch.float64) for rows in _rows(step))
        reconstruction, kl = dense.step(x, y, NOISE[step].double(), "focal", None)
        gradients = torch.cat([g.flatten() for g in dense.gradients.values()])
        norm = float(torch.linalg.vector_norm(gradients))
        scale = min(1.0, clip / norm) if clip else 1.0
        for p in dense.parameters.values():
            p.grad.mul_(scale)
        if step == 0:
            found |= {f"gradient {n}": g * scale for n, g in dense.gradients.items()}
        optimizer.step()
        numbers = (reconstruction + kl, reconstruction, kl, norm)
        found |= {f"report {step} {n}": v for n, v in zip(REPORTED, numbers, strict=True)}
        for when in ("first",) * (step == 0) + ("last",) * (step == STEPS - 1):
            found |= {f"{when} {n}": p.detach().clone() for n, p in dense.parameters.items()}
    return found


_ORACLES: dict[tuple, tuple[dict[str, torch.Tensor], Bounded]] = {}


def _oracle(case: tuple, parameters: dict[str, torch.Tensor]) -> Bounded:
    """The oracle's answer to a case and its bounds; every layout starts from the same
    parameters."""
    if case not in _ORACLES:
        _ORACLES[case] = parameters, bounded(lambda: _dense(parameters, case[0], case[2]))
    before, oracle = _ORACLES[case]
    assert all(torch.equal(before[n], p) for n, p in parameters.items())
    return oracle


CASES = [
    ("nadam", 1, 0.0, 1),
    ("adam", 1, 0.0, 2),
    ("adamw", 1, 0.0, 3),
    ("nadam", 3, 0.0, 1),
    ("nadam", 1, 0.05, 0),
    ("nadam", 2, 0.05, 2),
    ("adam", 2, 0.05, 3),
    ("adam", 2, 0.05, 0),
]


@pytest.mark.parametrize(
    ("world_size", "replicas", "cases"),
    [
        pytest.param(1, 1, CASES, marks=pytest.mark.slow),
        (2, 1, CASES[2:6]),
        pytest.param(2, 1, CASES[:2] + CASES[6:], marks=pytest.mark.slow),
        pytest.param(3, 1, CASES, marks=pytest.mark.slow),
        (2, 2, CASES[4:6]),
        pytest.param(2, 2, CASES[:4] + CASES[6:], marks=pytest.mark.slow),
        pytest.param(4, 2, CASES, marks=pytest.mark.slow),
    ],
)
def test_steps_equal_dense_oracle(world_size, replicas, cases):
    configs = [
        _config(name, accumulation=accumulation, replicas=replicas, clip=clip, stage=stage)
        for name, accumulation, clip, stage in cases
    ]
    by_rank = run_ranks(_train, world_size, configs, replicas=replicas)
    for c, case in enumerate(cases):
        results = [rank[c] for rank in by_rank][: world_size // replicas]
        start, first, last = (_whole([r["states"][k] for r in results]) for k in range(3))
        parameters = {n: p for n, p in start.items() if ".exp_avg" not in n}
        oracle = _oracle(case, parameters)
        for rank in by_rank:
            for step, report in enumerate(rank[c]["reports"]):
                for name, value in zip(REPORTED, report, strict=True):
                    within(value, oracle, f"report {step} {name}", f"{case}")
        for n in parameters:
            # after one step the first moment is (1 - beta1) times the gradient
            within(first[f"{n}.exp_avg"] / 0.1, oracle, f"gradient {n}", f"{case}")
            within(first[n], oracle, f"first {n}", f"{case}")
            within(last[n], oracle, f"last {n}", f"{case}")
