"""What all ranks must know of a step: added up in one all-reduce, read from the device once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_vasp.model.path_statistics import PathStatistics
from dist_vasp.model.step import StepLoss
from dist_vasp.parallel.comm import Ranks, all_reduce
from dist_vasp.training.step.step_report import StepReport

_BEFORE_SUMS = 5  # reconstruction, penalty, squared norm of the item matrices, and two flags

Flags = tuple[bool, bool]  # this rank was asked to stop; its part of a checkpoint is not on disk


class Totals:
    """Adds up and reads the totals of a step.

    Totals are float64 on the device: five scalars, the sums of the paths' statistics, and the
    squared norm of the trunk's gradient where there is a trunk.
    """

    def __init__(self, statistics: PathStatistics, ranks: Ranks) -> None:
        self._statistics, self._ranks = statistics, ranks

    def add_up(
        self, part: StepLoss, squared_norm: Tensor, flags: Flags, of_trunk: Tensor | None
    ) -> Tensor:
        """The totals, given this rank's part of the loss and of the item matrices' squared norm.

        The flags of a rank that is alone are not in them: they are no part of a recorded step.
        """
        replicas = self._ranks.layout.replicas
        scalars = [part.reconstruction, part.penalty, squared_norm / replicas]
        own = torch.stack([scalar.double() for scalar in scalars])
        asked = own.new_zeros(len(flags))
        if self._ranks.world_size > 1:
            asked = torch.tensor(flags, dtype=own.dtype).to(own.device, non_blocking=True)
        mine = torch.cat([own, asked, self._statistics.sums.flatten()])
        totals = all_reduce(mine, self._ranks.world)
        return totals if of_trunk is None else torch.cat([totals, of_trunk[None]])

    def norm(self, totals: Tensor) -> Tensor:
        """The norm of the whole gradient, a scalar on the device."""
        after = totals[_BEFORE_SUMS + self._statistics.sums.numel() :]
        return torch.cat([totals[2:3], after]).sum().sqrt()

    def report(self, totals: Tensor, penalty_weight: float | Tensor, flags: Flags) -> StepReport:
        """Read the totals from the device: the one time that a step waits for it."""
        reconstruction, kl, of_items, stops, unwritten, *rest = totals.tolist()
        n_sums = self._statistics.sums.numel()
        squared_sum = of_items + sum(rest[n_sums:])
        grad_norm = math.sqrt(squared_sum) if squared_sum >= 0 else math.nan
        loss = reconstruction + penalty_weight * kl
        paths = self._statistics.named(rest[:n_sums])
        stop, written = flags[0] or stops > 0, not flags[1] and unwritten == 0
        return StepReport(loss, reconstruction, kl, grad_norm, stop, written, paths)
