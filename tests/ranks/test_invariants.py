"""Invariant 2: a run does not depend on the number of ranks. Real stream, real engine, float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vasp.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from tests.support.make_shards import write_folder
from tests.support.partitioned import assemble, export
from tests.support.ranks import run_ranks

N_ITEMS = 97  # divisible by none of 2, 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Users with tastes: items near a user's own place on a ring, so that there is something to
    learn."""
    rng = np.random.default_rng(0)
    users = []
    for _ in range(400):
        centre, size = rng.integers(N_ITEMS), rng.integers(1, 30)
        users.append(sorted({int(i) for i in (centre + rng.normal(0, 8, size)).round() % N_ITEMS}))
    path = tmp_path_factory.mktemp("shards")
    write_folder(path, train=users, n_items=N_ITEMS, users_per_shard=37)
    return path


def _config(folder) -> Config:
    return Config(
        data=DataConfig(shards=str(folder), batch_size=40),
        model=ModelConfig(hidden=32, latent=16, encoder_layers=4, decoder_layers=3),
        optimizer=OptimizerConfig(schedule=[Stage(1000, 1e-3)]),
        parallel=ParallelConfig(lanes=12),
        run=RunConfig(seed=3),
        device="cpu",
    )


def _run(ranks, config: Config, steps: int):
    from dist_vasp.data.stream import StreamOptions, TrainStream
    from dist_vasp.training.step.engine import Trainer

    options = StreamOptions(config.data.batch_size, config.parallel.lanes, config.run.seed)
    stream = TrainStream(config.data.shards, options, ranks.rank, ranks.world_size)
    trainer = Trainer(config, stream.n_items, ranks)
    losses = [trainer.step(batch).loss for batch in stream.batches(0, steps, 0)]
    trunk = {name: p.numpy().copy() for name, p in trainer.trunk_tensors(False).items()}
    return losses, export(trainer.model.slices()), trunk


@pytest.mark.parametrize(
    ("steps", "worlds"),
    [(60, (2,)), pytest.param(200, (2, 3, 4), marks=pytest.mark.slow)],
)
def test_ranks_do_not_change_the_run(folder, steps, worlds):
    runs = {n: run_ranks(_run, n, _config(folder), steps, timeout=300) for n in (1, *worlds)}
    reference = np.array(runs[1][0][0])
    assert reference[-20:].mean() < 0.8 * reference[:20].mean(), (
        "the run learns nothing, so it shows nothing"
    )
    whole = assemble(runs[1][0][1]) | {
        name: torch.from_numpy(p) for name, p in runs[1][0][2].items()
    }
    for n in worlds:
        losses = np.array(runs[n][0][0])
        assert all(rank[0] == runs[n][0][0] for rank in runs[n])
        np.testing.assert_allclose(losses[:20], reference[:20], rtol=1e-5, err_msg=f"{n} ranks")
        np.testing.assert_allclose(losses, reference, rtol=1e-4, err_msg=f"{n} ranks")
        found = assemble([piece for rank in runs[n] for piece in rank[1]]) | {
            k: torch.from_numpy(p) for k, p in runs[n][0][2].items()
        }
        for name, p in whole.items():
            distance = torch.linalg.vector_norm(found[name] - p) / torch.linalg.vector_norm(p)
            assert distance < 1e-4, f"{n} ranks, {name}: {distance}"
