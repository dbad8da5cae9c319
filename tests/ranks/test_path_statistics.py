"""Mean and deviation of each path's logits equal the dense oracle's over the sampled items, on
every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model import path_statistics, slices
from dist_vasp.model.build import make_trunk
from dist_vasp.model.sinks import AddToGrad, Drop
from dist_vasp.model.step import MicroBatch
from dist_vasp.parallel.comm import all_reduce
from tests.oracles.dense import dense_rows
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


def _statistics(ranks):
    """The statistics after one step of NEASE and of VASP, after a second pass, and the matrices."""
    slices.BLOCK_COLUMNS, path_statistics.SAMPLE_EVERY = 5, 3
    torch.set_grad_enabled(False)
    x, y = random_rows(N_ROWS, N_ITEMS, 1), random_rows(N_ROWS, N_ITEMS, 2)
    found = {}
    for kind in ("nease", "vasp"):
        model = make_model(kind, N_ITEMS, ranks)
        trunk = make_trunk(model.config, 5, Arithmetic(torch.float64))
        x_G, y_G, mine, padded = gathered(x, y, N_ITEMS, ranks)
        noise = pad_noise(np.zeros((N_ROWS, SMALL["latent"])), mine, padded, torch.float64)
        rows = MicroBatch(x_G, y_G, noise, N_ROWS)
        step = model.gradients(plain(trunk), rows, AddToGrad())
        statistics = model.statistics
        once = statistics.named(all_reduce(statistics.sums, ranks.world).flatten().tolist())
        model.replay(step.activations, Drop())  # the second pass of clipping counts all of it again
        twice = statistics.named(all_reduce(statistics.sums, ranks.world).flatten().tolist())
        found[kind] = once, twice, export(model.slices())
    return found


@pytest.mark.parametrize(("world_size", "replicas"), [(1, 1), (3, 1), (2, 2)])
def test_statistics_are_those_of_every_third_item(world_size, replicas):
    by_rank = run_ranks(_statistics, world_size, replicas=replicas)
    once, _, _ = by_rank[0]["nease"]
    pieces = [piece for rank in by_rank[: world_size // replicas] for piece in rank["nease"][2]]
    W = assemble(pieces)["output.nease.weight"]
    logits = (dense_rows(random_rows(N_ROWS, N_ITEMS, 1), N_ITEMS, torch.float64) @ W)[:, ::3]
    assert once == pytest.approx(
        {
            "nease_logit_mean": logits.mean().item(),
            "nease_logit_std": logits.std(correction=0).item(),
        }
    )
    for kind in ("nease", "vasp"):
        assert by_rank[0][kind][0] == pytest.approx(by_rank[0][kind][1])
    assert list(by_rank[0]["vasp"][0]) == [
        f"{path}_logit_{what}"
        for path in ("decoder", "latent", "nease")
        for what in ("mean", "std")
    ]


def test_nothing_where_no_item_is_in_the_sample():
    statistics = path_statistics.PathStatistics(["nease"], torch.device("cpu"))
    statistics.add(1, [torch.ones(2, 5)], torch.ones(2))  # items 1 to 5
    assert statistics.named(statistics.sums.flatten().tolist()) == {}
