"""The phases of a training: what an epoch updates, and the encoder before the present phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from dist_vasp.config.schema import Config
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.registry import kind_of
from dist_vasp.model.slices import ItemSlice
from dist_vasp.model.step import MicroBatch, Phase
from dist_vasp.parallel.comm import Ranks
from dist_vasp.turns import in_turn


class Phases:
    """The phase that training is in. It keeps the earlier encoder for a kind that has one."""

    def __init__(self, config: Config, model: PartitionedModel, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        kind = kind_of(config.model.kind)
        self._phases = kind.phases(config.model)
        self._phase: Phase | None = None
        self.earlier = kind.earlier(config, model.storage)
        if self.earlier:
            self.earlier.trunk.to(ranks.device)

    def enter(self, epoch: int, trunk_tensors: Callable[[], Mapping[str, Tensor]]) -> Phase:
        """The phase of `epoch`. Where one begins that updates the encoder, the encoder is copied;
        `trunk_tensors` gives the whole trunk, and all ranks call it together."""
        phase = in_turn(self._phases, epoch)
        if self.earlier and self._model.input and phase.encoder and phase != self._phase:
            self.earlier.take(self._model.input.slices(), trunk_tensors())
        self._phase = phase
        return phase

    def resume(self, epoch: int) -> None:
        """Remember that training has reached `epoch`, whose phase then does not begin again."""
        self._phase = in_turn(self._phases, epoch)

    def with_prior(self, rows: MicroBatch) -> MicroBatch:
        """The rows, with the prior of their latent codes where the penalty needs one."""
        if self.earlier is None or not rows.phase.encoder:
            return rows
        return replace(rows, prior=self.earlier.prior(rows.y, self._ranks.partition_group))

    # --- state ------------------------------------------------------------------------------------

    def slices(self) -> list[ItemSlice]:
        """This rank's slices of the earlier W1."""
        return self.earlier.slices() if self.earlier else []

    def tensors(self) -> dict[str, Tensor]:
        """The earlier trunk, whole, by the names of a checkpoint."""
        return self.earlier.tensors() if self.earlier else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, after the slices are loaded."""
        if self.earlier:
            self.earlier.load(tensors)
