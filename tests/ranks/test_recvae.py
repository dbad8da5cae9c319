"""`recvae`: step and training equal the dense oracle on 1 to 3 ranks; a resumed training is bitwise
the same."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_vasp.checkpoint import write
from dist_vasp.checkpoint.read import open_checkpoint, verify
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.config.schema import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from dist_vasp.data.stream import Batch
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.kernels.random import Normal, fill, row_keys
from dist_vasp.model import slices
from dist_vasp.model.build import make_trunk, new_model
from dist_vasp.model.kinds.recvae import CompositePrior
from dist_vasp.model.registry import kind_of
from dist_vasp.model.sinks import AddToGrad
from dist_vasp.model.step import MicroBatch, Phase
from tests.oracles.dense import TORCH_OPTIMIZERS, dense_rows
from tests.oracles.recvae import DenseRecVae, mixture_density
from tests.oracles.rounding import Bounded, bounded, within
from tests.ranks.test_checkpoint import HEADER
from tests.support.partitioned import (
    assemble,
    csr,
    export,
    gathered,
    pad_noise,
    plain,
    random_rows,
    randomise,
    share,
)
from tests.support.ranks import run_ranks

SLOW = pytest.mark.slow

N_ITEMS, N_ROWS, LATENT, LAYERS = 23, 12, 3, 3
GAMMA, DROPOUT, LR = 0.02, 0.4, 0.01
MODEL = ModelConfig(
    kind="recvae",
    hidden=6,
    latent=LATENT,
    encoder_layers=LAYERS,
    recvae_encoder_epochs=2,
    recvae_decoder_epochs=1,
)


def _config(
    name: str = "adam", accumulation: int = 1, clip: float = 0.0, stage: int = 1, replicas: int = 1
) -> Config:
    return Config(
        data=DataConfig(input_dropout=DROPOUT),
        model=MODEL,
        loss=LossConfig(kind="multinomial", kl_weight=GAMMA),
        optimizer=OptimizerConfig(
            name=name, schedule=[Stage(10, LR)], accumulation=accumulation, clip_norm=clip
        ),
        parallel=ParallelConfig(zero_stage=stage, replicas=replicas),
        run=RunConfig(seed=5),
        device="cpu",
    )


def _rows(step: int) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs, as if some of the targets were dropped; a user has none, another lost all of his."""
    y = random_rows(N_ROWS, N_ITEMS, 20 + step, empty=(5,))
    return [row[: -(-len(row) * 2 // 3)] if b != 3 else [] for b, row in enumerate(y)], y


def test_the_prior_is_the_mixture():
    generator = torch.Generator().manual_seed(1)
    z, mu, logvar, old_mu, old_logvar = torch.randn(
        (5, 4, LATENT), generator=generator, dtype=torch.float64
    )
    n = torch.tensor([0.0, 1.0, 2.0, 7.0], dtype=torch.float64)
    log_q = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(z)
    expected = n * (log_q - mixture_density(z, old_mu, old_logvar)).sum(1)
    found = CompositePrior(old_mu, old_logvar, n).penalty((z, mu, logvar))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- one step, in double precision and without an engine ------------------------------------------


def _steps(ranks):
    """For both phases: weights, losses, gradients and scores of this rank."""
    slices.BLOCK_COLUMNS = 5
    torch.set_grad_enabled(False)
    found = []
    for encoder in (True, False):
        arithmetic, config = Arithmetic(torch.float64), _config()
        model = new_model(config, N_ITEMS, ranks, arithmetic)
        model.initialise(5)
        randomise(model.slices(), 5)
        trunk = make_trunk(MODEL, 5, arithmetic)
        earlier = kind_of("recvae").earlier(config, model.storage)
        before = export(model.slices())
        old = {n: p + 0.1 * torch.sin(3 * p) for n, p in trunk.named_parameters()}
        earlier.take(model.input.slices(), old)
        for piece in earlier.slices():
            piece.tensor.mul_(1.5)
        x, y, mine, padded = gathered(*_rows(0), N_ITEMS, ranks)
        noise = np.random.default_rng(3).normal(size=(N_ROWS, LATENT))
        noise_BL = pad_noise(noise, mine, padded, torch.float64)
        prior = earlier.prior(y, ranks.partition_group) if encoder else None
        phase = Phase(encoder=encoder, paths=not encoder)
        rows = MicroBatch(x, y, noise_BL, N_ROWS, GAMMA, phase, prior)
        scores = [(lo, s[x.real_rows].numpy().copy()) for lo, s in model.scores(trunk, x)]
        losses = model.gradients(plain(trunk), rows, AddToGrad())
        pieces = model.slices()
        found.append(
            {
                "before": before,
                "trunk": {f"trunk.{n}": p.numpy().copy() for n, p in trunk.named_parameters()},
                "old": export(earlier.slices()),
                "old_trunk": {f"trunk.{n}": p.numpy().copy() for n, p in old.items()},
                "scores": scores,
                "losses": (float(losses.reconstruction), float(losses.penalty)),
                "gradients": export([p for p in pieces if p.tensor.grad is not None], "grad"),
                "of_trunk": {
                    f"trunk.{n}": p.grad.numpy().copy()
                    for n, p in trunk.named_parameters()
                    if p.grad is not None
                },
            }
        )
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_of_each_phase_equals_the_dense_oracle(world_size):
    by_rank = run_ranks(_steps, world_size)
    for k, encoder in enumerate((True, False)):
        results = [rank[k] for rank in by_rank]
        of_trunk = {n: torch.from_numpy(p) for n, p in results[0]["trunk"].items()}
        old = {n: torch.from_numpy(p) for n, p in results[0]["old_trunk"].items()}
        old["input.weight"] = assemble([p for r in results for p in r["old"]])["input.weight.old"]
        parameters = assemble([p for r in results for p in r["before"]]) | of_trunk
        dense = DenseRecVae(parameters, LAYERS, DROPOUT, old)
        x, y = (dense_rows(rows, N_ITEMS, torch.float64) for rows in _rows(0))
        scores = dense.log_p(x).detach()
        for r in results:
            for lo, found in r["scores"]:
                expected = scores[:, lo : lo + found.shape[1]]
                np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        noise = torch.from_numpy(np.random.default_rng(3).normal(size=(N_ROWS, LATENT)))
        expected = dense.step(x, y, noise, encoder, GAMMA)
        losses = np.sum([r["losses"] for r in results], axis=0)
        np.testing.assert_allclose(losses, expected, rtol=1e-10, atol=1e-12)
        gradients = assemble([p for r in results for p in r["gradients"]])
        for name in results[0]["of_trunk"]:
            gradients[name] = torch.from_numpy(sum(r["of_trunk"][name] for r in results))
        wanted = {n: p.grad for n, p in dense.parameters.items() if p.grad is not None}
        assert gradients.keys() == wanted.keys()
        assert ("input.weight" in wanted) == encoder
        for name, grad in wanted.items():
            np.testing.assert_allclose(
                gradients[name], grad, rtol=1e-10, atol=1e-12, err_msg=f"{encoder} {name}"
            )


# --- training through the engine, over some phases ------------------------------------------------

STEPS = 8  # two an epoch: two epochs of the encoder, one of the decoder, and one of the encoder
REPORTED = ("loss", "reconstruction", "kl", "grad_norm")
CASES = [
    ("adam", 1, 0.0, 1),
    ("nadam", 2, 0.0, 3),
    ("adamw", 1, 0.5, 0),
    ("nadam", 2, 0.5, 2),
]


def _batch(step: int, ranks) -> Batch:
    """Every row is a lane of its own, so that noise can be matched row by row."""
    x, y = _rows(step)
    if not _is_encoder(step):
        x = y
    mine, padded = share(N_ROWS, ranks)
    n = mine.stop - mine.start
    keys, lanes = np.arange(n, dtype=np.uint64), tuple((b, 1) for b in range(mine.start, mine.stop))
    parts = csr(x[mine]), csr(y[mine]), keys, lanes
    return Batch(step // 2, step, *parts, n, N_ROWS, N_ROWS, padded)


def _is_encoder(step: int) -> bool:
    return step // 2 % 3 < 2


def _state(trainer) -> tuple[list, dict[str, np.ndarray]]:
    """Weights, moments and old encoder, of this rank's items and of the whole trunk."""
    trunk = {f"trunk.{name}": p.numpy().copy() for name, p in trainer.trunk_tensors(True).items()}
    return export(trainer.item_pieces(True)), trunk


def _train(ranks, cases):
    from dist_vasp.training.step.engine import Trainer

    found = []
    for case in cases:
        trainer = Trainer(_config(*case, replicas=ranks.layout.replicas), N_ITEMS, ranks)
        randomise(trainer.model.slices(), 5)
        states, reports = [_state(trainer)], []
        for step in range(STEPS):
            reports.append(dataclasses.astuple(trainer.step(_batch(step, ranks)))[:4])
        found.append(([*states, _state(trainer)], reports, trainer.optimizer_scalars()))
    return found


def _whole(states) -> dict[str, torch.Tensor]:
    items = assemble([piece for rank in states for piece in rank[0]])
    return {name: p.double() for name, p in items.items()} | {
        name: torch.from_numpy(p).double() for name, p in states[0][1].items()
    }


def _noise(step: int) -> torch.Tensor:
    noise = torch.empty(N_ROWS, LATENT)
    fill(noise, row_keys(5, "noise", step, np.arange(N_ROWS), 0), Normal())
    return noise


NOISE = [_noise(step) for step in range(STEPS)]


def _dense(parameters: dict[str, torch.Tensor], name: str, clip: float):
    """The oracle's answer: the reports of each step, the last weights and the old encoder's."""
    dense = DenseRecVae(parameters, LAYERS, DROPOUT)
    encoder = dense.encoder_names()
    optimizers = {
        phase: TORCH_OPTIMIZERS[name](
            [p for n, p in dense.parameters.items() if (n in encoder) == phase], LR
        )
        for phase in (True, False)
    }
    found = {}
    for step in range(STEPS):
        phase = _is_encoder(step)
        if phase and (step == 0 or not _is_encoder(step - 1)):
            dense.copy_encoder()
        x, y = _rows(step)
        inputs, targets = (
            dense_rows(rows, N_ITEMS, torch.float64) for rows in (x if phase else y, y)
        )
        reconstruction, kl = dense.step(inputs, targets, NOISE[step].double(), phase, GAMMA)
        grads = [p.grad for p in dense.parameters.values() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])))
        for grad in grads:
            grad.mul_(min(1.0, clip / norm) if clip else 1.0)
        optimizers[phase].step()
        numbers = (reconstruction + GAMMA * kl, reconstruction, kl, norm)
        found |= {f"report {step} {n}": v for n, v in zip(REPORTED, numbers, strict=True)}
    found |= {f"last {n}": p.detach().clone() for n, p in dense.parameters.items()}
    return found | {f"last {n}.old": p.clone() for n, p in dense.old.items()}


_ORACLES: dict[tuple, Bounded] = {}


def _oracle(case: tuple, start: dict[str, torch.Tensor]) -> Bounded:
    """The oracle's answer to a case and its bounds; every layout starts from the same weights."""
    parameters = {n: p for n, p in start.items() if ".exp_avg" not in n and ".old" not in n}
    if case not in _ORACLES:
        _ORACLES[case] = bounded(lambda: _dense(parameters, case[0], case[2]))
    return _ORACLES[case]


@pytest.mark.parametrize(
    ("world_size", "replicas", "cases"),
    [
        pytest.param(1, 1, CASES, marks=SLOW),
        (2, 1, CASES[::2]),
        pytest.param(2, 1, CASES[1::2], marks=SLOW),
        *(pytest.param(*of, CASES, marks=SLOW) for of in ((3, 1), (4, 2))),
    ],
)
def test_training_equals_the_dense_oracle(world_size, replicas, cases):
    by_rank = run_ranks(_train, world_size, cases, replicas=replicas)
    for c, case in enumerate(cases):
        states = [rank[c][0] for rank in by_rank][: world_size // replicas]
        start, last = (_whole([s[k] for s in states]) for k in (0, 1))
        oracle = _oracle(case, start)
        for rank in by_rank:
            for step, report in enumerate(rank[c][1]):
                for name, value in zip(REPORTED, report, strict=True):
                    within(value, oracle, f"report {step} {name}", f"{case}")
            scalars = rank[c][2]
            assert (scalars["step"], scalars["paths_step"]) == (6, 2)
        for name in oracle.exact:
            if name.startswith("last "):
                within(last[name.removeprefix("last ")], oracle, name, f"{case}")


# --- resuming -------------------------------------------------------------------------------------


def _resumed(ranks, folder, saves):
    """The state after STEPS steps in one go, and of trainers that begin at checkpoints of it."""
    from dist_vasp.training.step.engine import Trainer

    found = []
    for case in CASES[:2]:
        config = _config(*case)
        whole = Trainer(config, N_ITEMS, ranks)
        reports = []
        for step in range(STEPS):
            if step in saves:
                path = folder / f"{case[3]}-{step}" / f"step-{step:08d}"
                header = replace(HEADER, optimizer=whole.optimizer_scalars())
                write.save(path, header, whole.item_pieces(True), whole.trunk_tensors(True), ranks)
            reports.append(whole.step(_batch(step, ranks)))
        found.append([(_state(whole), reports)])
        for first in saves:
            resumed = Trainer(config, N_ITEMS, ranks)
            opened = open_checkpoint(folder / f"{case[3]}-{first}" / f"step-{first:08d}")
            verify(opened, ranks)
            shapes = resumed.trunk_shapes()
            resumed.load_trunk(load_weights(opened, resumed.item_pieces(True), shapes))
            resumed.load_scalars(opened.header.optimizer, (first - 1) // 2)
            later = [resumed.step(_batch(step, ranks)) for step in range(first, STEPS)]
            found[-1].append((_state(resumed), reports[:first] + later))
    return found


SAVES = (1, 3, 4, 5, 6)  # in a phase of the encoder, at its end, in one of the decoder, at its end


@SLOW
def test_a_resumed_training_is_bitwise_the_same(tmp_path):
    for by_rank in run_ranks(_resumed, 2, tmp_path, SAVES):
        for case in by_rank:
            (items, trunk), reports = case[0]
            for (items_resumed, trunk_resumed), reports_resumed in case[1:]:
                assert reports == reports_resumed
                for piece, again in zip(items, items_resumed, strict=True):
                    assert piece[:4] == again[:4] and np.array_equal(piece[4], again[4]), piece[0]
                assert trunk.keys() == trunk_resumed.keys()
                for name, expected in trunk.items():
                    assert np.array_equal(expected, trunk_resumed[name]), name
