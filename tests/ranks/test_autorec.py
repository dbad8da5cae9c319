"""`autorec`: the partitioned model equals its dense oracle on 1 to 3 ranks."""

from __future__ import annotations

import pytest
import torch

from tests.oracles.autorec import DenseAutoRec
from tests.ranks.test_vasp import check_step, partitioned_step
from tests.support.partitioned import SMALL, assemble
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_dense_oracle(world_size):
    by_rank = run_ranks(partitioned_step, world_size, [("autorec", "squared", False)])
    results = [cases[0] for cases in by_rank]
    parameters = assemble([piece for r in results for piece in r["before"]])
    parameters |= {name: torch.from_numpy(p) for name, p in results[0]["trunk_before"].items()}
    layers = SMALL["encoder_layers"], SMALL["decoder_layers"]
    check_step(results, DenseAutoRec("autorec", parameters, *layers), "squared")
