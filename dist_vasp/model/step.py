"""What goes into one step of a model, and what comes out of it.

Shapes: B rows of this rank, G rows of the partition group, N rows of the whole step, H hidden,
L latent, K width of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dist_vasp.model.sparse import ItemRows

# (W1 x (B, H), noise (B, L) or None) -> sources (B, K) each, penalty of each row (B,)
TrunkCall = Callable[[Tensor, Tensor | None], tuple[Sequence[Tensor], Tensor]]
Sources = dict[int, Tensor]  # by the index of the trunk's output


@dataclass(frozen=True)
class Phase:
    """What the epochs of a phase of the training update.

    encoder: the input side and the trunk. Where they are not updated, inputs have no dropout and
    the loss has no penalty. paths: the paths.
    """

    encoder: bool = True
    paths: bool = True


WHOLE = Phase()


class Prior(Protocol):
    """What the latent code of each of this rank's rows is compared with."""

    def penalty(self, sources: Sequence[Tensor]) -> Tensor:
        """Return the penalty of each row (B,), given the trunk's sources."""
        ...


class TrainedTrunk(Protocol):
    """A trunk in training. What enters `backward` is multiplied by `scale` before.

    An engine that averages over W ranks would otherwise divide by W what is already a sum over N
    rows.
    """

    scale: float

    def __call__(
        self, pre_BH: Tensor, noise_BL: Tensor | None
    ) -> tuple[Sequence[Tensor], Tensor]: ...

    def backward(self, scalar: Tensor) -> None:
        """Run autograd from `scalar` into the trunk."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward and backward pass.

    x, y: inputs and targets of the partition group, padding marked in `real_rows`. noise_BL: of
    this rank's rows. n_rows: N. penalty_weight: of the penalty in the loss of this step. Both are
    scalars on the device in a step that is recorded. phase: what the step updates. prior: gives the
    penalty; None where the trunk does.
    """

    x: ItemRows
    y: ItemRows
    noise_BL: Tensor | None
    n_rows: int | Tensor
    penalty_weight: float | Tensor = 1.0
    phase: Phase = WHOLE
    prior: Prior | None = None


@dataclass(frozen=True)
class Activations:
    """What a second backward pass over the item matrices needs."""

    rows: MicroBatch
    sources: Sources
    weight_G: Tensor
    grad_pre_GH: Tensor | None


@dataclass(frozen=True)
class StepLoss:
    """This rank's part of a step's loss, as scalars on the device; the ranks' parts add up."""

    reconstruction: Tensor
    penalty: Tensor
    activations: Activations
