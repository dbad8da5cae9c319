"""Noise of the reparameterisation: the same for every number of ranks and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vasp.data.stream import Batch, StreamOptions, TrainStream
from dist_vasp.training.step.micro_batches import lane_noise
from tests.support.make_shards import write_folder

LATENT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    users = [list(range(n % 9 + 2)) for n in range(83)]
    write_folder(path, train=users, n_items=12, users_per_shard=20)
    return path


def noise(batch: Batch, padding: int = 0, seed: int = 3) -> torch.Tensor:
    n_rows = batch.padded_rows + padding
    return lane_noise(seed, batch, n_rows, LATENT, torch.device("cpu"))


def batches(folder, step: int, world: int) -> list[Batch]:
    options = StreamOptions(25, 12, 3)
    return [TrainStream(folder, options, rank, world).batch(step) for rank in range(world)]


@pytest.mark.parametrize("step", [0, 2, 3])
def test_the_number_of_ranks_does_not_change_the_noise(folder, step):
    (whole,) = batches(folder, step, 1)
    expected = noise(whole)
    assert len(expected) == whole.inputs.n_rows
    for world in (2, 3):
        parts = batches(folder, step, world)
        found = [noise(batch)[: batch.inputs.n_rows] for batch in parts]
        assert torch.equal(torch.cat(found), expected), world
        keys = np.concatenate([batch.user_keys for batch in parts])
        np.testing.assert_array_equal(keys, whole.user_keys)


def test_padded_rows_have_no_noise(folder):
    (batch,) = batches(folder, 1, 1)
    padded = noise(batch, padding=3)
    assert torch.equal(padded[:-3], noise(batch))
    assert (padded[-3:] == 0).all()


def test_every_step_lane_position_and_seed_has_noise_of_its_own(folder):
    rows = [noise(batches(folder, step, 1)[0], seed=seed) for step in range(4) for seed in (3, 4)]
    every = torch.cat(rows)
    assert len(torch.unique(every, dim=0)) == len(every)
    assert abs(float(every.mean())) < 0.1 and abs(float(every.std()) - 1) < 0.1
