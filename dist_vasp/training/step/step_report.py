"""What a step has measured, or that it has diverged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepReport:
    """What a step measured, summed over all ranks.

    loss = focal + (KL weight of the step) * kl, where focal is the reconstruction loss of any kind.
    stop: some rank was asked to stop. all_written: every rank's part of a checkpoint is on disk.
    paths: mean and deviation of each path's logits (model/path_statistics.py).
    """

    loss: float
    focal: float
    kl: float
    grad_norm: float
    stop: bool = False
    all_written: bool = True
    paths: dict[str, float] = field(default_factory=dict)


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer a finite number."""
