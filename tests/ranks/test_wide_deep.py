"""`wide_deep`: the partitioned model equals its dense oracle on 1 to 3 ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.oracles.dense import DenseVASP
from tests.ranks.test_vasp import check_step, partitioned_step
from tests.support.partitioned import SMALL, assemble
from tests.support.ranks import run_ranks


@dataclass
class DenseWideDeep(DenseVASP):
    """One sigmoid of the sum of VASP's three paths."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        paths, kl = super().forward(x, noise)
        assert len(paths) == 3
        return [paths[0] + paths[1] + paths[2]], kl


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_dense_oracle(world_size):
    by_rank = run_ranks(partitioned_step, world_size, [("wide_deep", "focal", True)])
    results = [cases[0] for cases in by_rank]
    parameters = assemble([piece for r in results for piece in r["before"]])
    parameters |= {name: torch.from_numpy(p) for name, p in results[0]["trunk_before"].items()}
    layers = SMALL["encoder_layers"], SMALL["decoder_layers"]
    check_step(results, DenseWideDeep("wide_deep", parameters, *layers), "focal")
    after = assemble([piece for r in results for piece in r["after"]])["output.nease.weight"]
    assert (after.diagonal() == 0).all()
