"""A batch on its way to the ranks of a partition group, as micro-batches.

The ids of the next batch travel while this one is computed. Noise is a function of the seed, the
step, the lane and the position in the lane, so that every number of ranks has the same.

Shapes: B rows of this rank, L latent width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dist_vasp.config.schema import Config
from dist_vasp.data.stream import Batch
from dist_vasp.kernels.random import Normal, fill, row_keys
from dist_vasp.model.sparse import RowExchange
from dist_vasp.model.step import MicroBatch
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training.step.lone_trunk import LoneTrunk
from dist_vasp.training.step.zero import ZeroTrunk

_GPU_ROWS = 64


class MicroBatches:
    """Cuts batches into `optimizer.accumulation` micro-batches and sends their ids to the group.

    latent: width of the noise, 0 for a model that needs none.
    """

    def __init__(self, config: Config, n_items: int, ranks: Ranks, latent: int) -> None:
        self.n, self.seed = config.optimizer.accumulation, config.run.seed
        self.n_items, self.ranks, self.latent = n_items, ranks, latent
        self._loss = config.loss
        self._ahead: dict[int, list[RowExchange]] = {}  # by step: rows that are on their way

    def send(self, batch: Batch | None) -> None:
        """Start sending the rows of the batch that comes next."""
        if batch is not None:
            self._ahead = {batch.step: self._exchange(batch)}

    def advance(self) -> None:
        """Let the rows that are on their way travel on."""
        for exchanges in self._ahead.values():
            for exchange in exchanges:
                exchange.advance()

    def receive(self, batch: Batch) -> list[MicroBatch]:
        """The batch's rows, gathered over the partition group, and the noise of this rank's own."""
        exchanges = self._ahead.pop(batch.step, None) or self._exchange(batch)
        noise_NL: list[Tensor | None] = [None] * len(exchanges)
        if self.latent:
            rows, device = self._rows(batch), self.ranks.device
            noise = lane_noise(self.seed, batch, rows * len(exchanges), self.latent, device)
            noise_NL = list(noise.split(rows))
        penalty_weight = self._loss.kl_weight_at(batch.step)
        micro_batches = []
        for exchange, noise_BL in zip(exchanges, noise_NL, strict=True):
            x, y = exchange.finish()
            micro_batches.append(MicroBatch(x, y, noise_BL, batch.global_rows, penalty_weight))
        return micro_batches

    def _rows(self, batch: Batch) -> int:
        """Rows of a micro-batch, padded; on a GPU to a multiple, so that most steps have one shape
        and nothing is compiled anew."""
        rows = -(-batch.padded_rows // self.n)
        align = _GPU_ROWS if self.ranks.device.type == "cuda" else 1
        return -(-rows // align) * align

    def _exchange(self, batch: Batch) -> list[RowExchange]:
        rows = self._rows(batch)
        group, device = self.ranks.partition_group, self.ranks.device
        exchanges = []
        for start in range(0, rows * self.n, rows):
            first, last = (min(b, batch.inputs.n_rows) for b in (start, start + rows))
            csr = [side.slice(first, last) for side in (batch.inputs, batch.targets)]
            exchanges.append(RowExchange(csr, last - first, rows, self.n_items, group, device))
        return exchanges


class OverlappedTrunk:
    """The trunk of one step: while its backward runs, the next batch's ids travel."""

    def __init__(self, trunk: LoneTrunk | ZeroTrunk, scale: float, batches: MicroBatches) -> None:
        self.trunk, self.scale, self.batches = trunk, scale, batches

    def __call__(self, pre_BH: Tensor, noise_BL: Tensor | None) -> tuple[Sequence[Tensor], Tensor]:
        return self.trunk(pre_BH, noise_BL)

    def backward(self, scalar: Tensor) -> None:
        self.batches.advance()
        self.trunk.backward(scalar)


def lane_noise(seed: int, batch: Batch, n_rows: int, latent: int, device: torch.device) -> Tensor:
    """Return the standard normal noise of this rank's rows, (n_rows, latent), 0 in padded rows."""
    lanes, counts = np.array(batch.lane_rows, np.int64).reshape(-1, 2).T
    firsts = np.cumsum(counts) - counts
    positions = np.arange(counts.sum()) - np.repeat(firsts, counts)
    keys = row_keys(seed, "noise", batch.step, np.repeat(lanes, counts), positions)
    noise_NL = torch.zeros((n_rows, latent), device=device)
    fill(noise_NL[: len(keys)], keys, Normal())
    return noise_NL
