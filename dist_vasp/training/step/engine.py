"""One optimizer step: the trunk, of several ranks a DeepSpeed ZeRO engine, and the item matrices.

The item matrices stay outside the engine, because `deepspeed.initialize` overwrites every rank's
parameters with rank 0's. DeepSpeed averages gradients over the world, but the loss is already
divided by the N rows of the whole step. So what enters the trunk's backward is multiplied by the
world size, and what comes out at its input is divided by it (PartitionedModel.gradients).

Shapes: B rows of this rank, N rows of the whole step, L latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dist_vasp.config.schema import Config
from dist_vasp.data.stream import Batch
from dist_vasp.kernels.choose import choose_kernels
from dist_vasp.kernels.compiled import COMPILED
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.kernels.precision import choose_precision
from dist_vasp.kernels.random import seconds_to_fill
from dist_vasp.model.build import make_trunk, measure_size, new_model
from dist_vasp.model.norms import SharedItems
from dist_vasp.model.sinks import AddToGrad
from dist_vasp.model.slices import ItemSlice
from dist_vasp.model.step import MicroBatch, Phase, StepLoss, TrunkCall
from dist_vasp.parallel.clock import Clock
from dist_vasp.parallel.comm import Ranks, all_reduce
from dist_vasp.progress import Waiting
from dist_vasp.training.step.captured_step import CapturedStep
from dist_vasp.training.step.item_groups import copies_and_starts, item_groups
from dist_vasp.training.step.item_sinks import Norm, Update, squared
from dist_vasp.training.step.lone_trunk import LoneTrunk
from dist_vasp.training.step.micro_batches import MicroBatches, OverlappedTrunk
from dist_vasp.training.step.optimizer import MOMENTS, InPlaceAdam
from dist_vasp.training.step.phases import Phases
from dist_vasp.training.step.scalars import restore_scalars, scalars_of
from dist_vasp.training.step.step_report import DivergedError, StepReport
from dist_vasp.training.step.totals import Totals
from dist_vasp.training.step.zero import ZeroTrunk


class Trainer:
    """The model, its trunk engine (None without a trunk) and both optimizers."""

    def __init__(self, config: Config, n_items: int, ranks: Ranks) -> None:
        self.config, self.ranks, self.n_items = config, ranks, n_items
        size = measure_size(config, n_items, ranks.layout.partitions)
        show = ranks.is_main
        with Waiting("compiling a first function, 5 to 15 s in all", show) as compiling:
            compile = config.parallel.compile
            kernels, self.remark = choose_kernels(compile, size.items, ranks.device)
        # The functions of the first step take about half as long again.
        self.seconds_to_compile = kernels.seconds_to_compile
        if kernels is COMPILED:
            self.seconds_to_compile = 1.5 * compiling.seconds
        self.precision = choose_precision(config.parallel.wanted_precision, ranks.device)
        arithmetic = Arithmetic(precision=self.precision, kernels=kernels)
        estimate = seconds_to_fill(size.items, ranks.device)
        with Waiting(f"building {size.items / 1e6:.1f}M item weights", show, estimate):
            self.model = new_model(config, n_items, ranks, arithmetic)
            self.model.initialise(config.run.seed)
        self._copies_are_current = False
        self.item_optimizer = InPlaceAdam(
            item_groups(self.model, config.optimizer),
            config.optimizer,
            kernels=kernels,
            beside=copies_and_starts(self.model),
        )
        self._shared = SharedItems()
        keeps = kernels.updates_alone and len(self.model.blocks) == 1 and ranks.layout.replicas == 1
        zero = torch.zeros((), device=ranks.device)
        self._norm = Norm(ranks.replica_group, self._shared, zero, keeps, arithmetic)
        self._update = Update(
            self.item_optimizer, ranks.replica_group, self._shared, kernels, ranks.clock
        )
        self._accumulated = AddToGrad()
        self._totals = Totals(self.model.statistics, ranks)
        estimate = seconds_to_fill(size.trunk, ranks.device)
        what = f"building the trunk ({size.trunk / 1e6:.1f}M weights)"
        with Waiting(what, show, estimate):
            trunk = make_trunk(config.model, config.run.seed, arithmetic)
            self.trunk: LoneTrunk | ZeroTrunk | None = None
            if trunk and ranks.world_size == 1:
                self.trunk = LoneTrunk(trunk, config, ranks, arithmetic)
            elif trunk:
                self.trunk = ZeroTrunk(trunk, config, ranks, kernels)
        self._phases = Phases(config, self.model, ranks)
        noise_width = trunk.noise_width if trunk else 0
        self.batches = MicroBatches(config, n_items, ranks, noise_width)
        self._step_trunk = (
            OverlappedTrunk(self.trunk, ranks.world_size, self.batches) if self.trunk else None
        )
        can = self._can_be_captured()
        self._captured = CapturedStep(self._recordable, kernels, ranks.device) if can else None
        self._stage: int | None = None

    def _can_be_captured(self) -> bool:
        """Whether a step is the same kernels at the same addresses in every step."""
        return (
            self.ranks.world_size == 1
            and type(self.ranks.clock) is Clock
            and self.ranks.device.type == "cuda"
            and self.model.loss.takes_room
            and len(self.model.blocks) == 1
            and self.batches.n == 1
            and self._phases.earlier is None
            and all(path.takes_room for path in self.model.paths)
        )

    def optimizers(self) -> list[InPlaceAdam]:
        return [self.item_optimizer, *([self.trunk.optimizer] if self.trunk else [])]

    def step(
        self, batch: Batch, stop: bool = False, written: bool = True, following: Batch | None = None
    ) -> StepReport:
        """Update all weights from one batch, and send the ids of the `following` one meanwhile.

        A block of an item matrix is updated as soon as its gradient exists, and the gradient is
        dropped. With clipping the pass over the blocks runs twice (norm, then update). With
        accumulation the gradients are kept until the last micro-batch. `stop` and `written` are
        flags that this rank sends with the loss. DivergedError when the loss or a gradient is not
        finite; the weights in memory are invalid then.
        """
        self._set_rate(batch.epoch)
        phase = self._phases.enter(batch.epoch, lambda: self.trunk_tensors(moments=False))
        self._refresh()
        micro_batches = [replace(rows, phase=phase) for rows in self.batches.receive(batch)]
        self.item_optimizer.begin_step([p.whole for p in self.model.trained_slices(phase)])
        if self.trunk and phase.encoder:
            self.trunk.begin_step()
        if self._captured is None:
            self.batches.send(following)
            totals = self._compute(micro_batches, (stop, not written))
        else:
            totals = self._captured.run(micro_batches[0])
            self.batches.send(following)
        report = self._totals.report(totals, micro_batches[0].penalty_weight, (stop, not written))
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            raise DivergedError(
                f"step {batch.step + 1}: loss {report.loss}, gradient norm {report.grad_norm}"
            )
        return report

    def _recordable(self, rows: MicroBatch) -> Tensor:
        """A step of one rank."""
        return self._compute([rows], (False, False))

    def _compute(self, micro_batches: list[MicroBatch], flags: tuple[bool, bool]) -> Tensor:
        """Update all weights; what every rank must know of it, on the device (totals.py)."""
        for begins in (self._shared, self._norm, self._update):
            begins.begin()
        self.model.statistics.sums.zero_()
        clip = self.config.optimizer.clip_norm
        with self.precision.scope():
            trains_trunk = self.trunk and micro_batches[0].phase.encoder
            micro_batches = [self._phases.with_prior(rows) for rows in micro_batches]
            part, squared_norm = self._gradients(micro_batches)
            if not clip:
                self._apply(part, len(micro_batches))
            of_trunk = self.trunk.squared_norm() if self.trunk and trains_trunk else None
            totals = self._totals.add_up(part, squared_norm, flags, of_trunk)
            if clip:  # the update must wait for the norm
                scale = (clip / self._totals.norm(totals)).clamp(max=1.0)
                for optimizer in self.optimizers():
                    optimizer.grad_scale = scale if self._update.alone else float(scale)
                self._apply(part, len(micro_batches))
        return totals

    def _apply(self, part: StepLoss, n_micro_batches: int) -> None:
        """Update what has not been updated as its gradient came."""
        phase = part.activations.rows.phase
        if n_micro_batches > 1:
            self._apply_accumulated(phase)
        elif self.config.optimizer.clip_norm:
            if self._norm.keeps:
                self._norm.pass_on(self._update)
            else:
                self.model.replay(part.activations, self._update)
            self._update.end()
        if self.trunk and phase.encoder:
            self.trunk.step()

    def _refresh(self) -> None:
        """Make the copies of the weights before their first use; the update keeps them current."""
        if not self._copies_are_current:
            self.model.refresh()
            if self.trunk:
                self.trunk.refresh()
            self._copies_are_current = True

    def _gradients(self, micro_batches: list[MicroBatch]) -> tuple[StepLoss, Tensor]:
        """This rank's part of the loss, and of the squared norm of the item matrices' gradient."""
        if len(micro_batches) > 1:
            return self._accumulate(micro_batches)
        sink = self._norm if self.config.optimizer.clip_norm else self._update
        part = self.model.gradients(self._step_trunk, micro_batches[0], sink)
        sink.end()
        return part, sink.squared_norm

    @contextmanager
    def evaluating(self) -> Iterator[TrunkCall | None]:
        """The trunk as a function in evaluation mode, for the time of the body; None for NEASE
        alone."""
        self._refresh()
        with self.precision.scope():
            if self.trunk is None:
                yield None
            else:
                with self.trunk.evaluating() as trunk:
                    yield trunk

    def close(self) -> None:
        """End training, so that the memory is free with the last reference to this object."""
        if self.trunk:
            self.trunk.close()

    # --- state ------------------------------------------------------------------------------------

    def item_pieces(self, moments: bool) -> list[ItemSlice]:
        """This rank's slices of the item matrices.

        With `moments` those of `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.start` and `NAME.old` too.
        """
        pieces = self.model.slices()
        if not moments:
            return pieces
        states = [(piece, self._state_of(piece)) for piece in self.model.trained_slices()]
        moments_of = [p.like(f"{p.name}.{m}", state[m]) for p, state in states for m in MOMENTS]
        starts = [piece for path in self.model.paths for piece in path.start_slices()]
        return pieces + moments_of + starts + self._phases.slices()

    def _state_of(self, piece: ItemSlice) -> dict[str, Tensor]:
        return self.item_optimizer.ensure_state(piece.whole)

    def trunk_tensors(self, moments: bool) -> dict[str, Tensor]:
        """The whole trunk and, if asked, its moments and the earlier trunk; all ranks call it
        together."""
        old = self._phases.tensors() if moments else {}
        return (self.trunk.tensors(moments) if self.trunk else {}) | old

    def trunk_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that `trunk_tensors(moments=True)` gives."""
        shapes = self.trunk.shapes(moments=True) if self.trunk else {}
        return shapes | {name: tuple(t.shape) for name, t in self._phases.tensors().items()}

    def load_trunk(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `trunk_tensors(moments=True)` gave, after the item pieces are loaded."""
        if self.trunk:
            self.trunk.load(tensors)
        self._phases.load(tensors)

    def optimizer_scalars(self) -> dict[str, float]:
        """The steps that the optimizers have made, and what follows from them (scalars.py)."""
        pieces = self.model.trained_slices()
        return scalars_of(self._state_of(pieces[0]), self._state_of(pieces[-1]))

    def load_scalars(self, scalars: dict[str, float], epoch: int) -> None:
        """Restore `optimizer_scalars`, and remember the schedule's stage and the phase that
        `epoch`, the last one trained in, lies in."""
        encoder, paths = (
            [self._state_of(piece) for piece in self.model.trained_slices(phase)]
            for phase in (Phase(paths=False), Phase(encoder=False))
        )
        trunk = self.trunk.ensure_state() if self.trunk else []
        restore_scalars(scalars, encoder + trunk, paths)
        self._stage = self.config.stage(epoch)
        self._phases.resume(epoch)
        self._copies_are_current = False  # the weights were loaded, too
        if self._captured:
            self._captured.forget()

    # --- parts of a step --------------------------------------------------------------------------

    def _set_rate(self, epoch: int) -> None:
        """The schedule's rate for `epoch`; where a new stage begins the moments are kept, unless
        told otherwise."""
        stage = self.config.stage(epoch)
        lr = self.config.lr(epoch)
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            optimizer.grad_scale = 1.0
            if self.config.optimizer.reset_on_stage and self._stage not in (None, stage):
                optimizer.forget()
        if self._captured and self._stage != stage:
            self._captured.forget()  # rates are numbers of Python in a recorded step
        self._stage = stage

    def _accumulate(self, micro_batches: list[MicroBatch]) -> tuple[StepLoss, Tensor]:
        """Keep the gradients of all micro-batches in `.grad`, summed over the replicas.

        Returns the sum of their losses, and the squared norm of the gradients.
        """
        device = self.ranks.device
        squared_norm = torch.zeros((), device=device)
        reconstruction, penalty = torch.zeros((), device=device), torch.zeros((), device=device)
        for i, rows in enumerate(micro_batches):
            part = self.model.gradients(self._step_trunk, rows, self._accumulated)
            reconstruction, penalty = reconstruction + part.reconstruction, penalty + part.penalty
            if self.trunk and rows.phase.encoder and i + 1 < len(micro_batches):
                self.trunk.step()  # counts the micro-batch; the update comes at the last one
        for piece in self.model.trained_slices(rows.phase):
            assert piece.whole.grad is not None
            piece.whole.grad = all_reduce(piece.whole.grad, self.ranks.replica_group)
            squared_norm += squared(piece.whole.grad)
        return StepLoss(reconstruction, penalty, part.activations), squared_norm

    def _apply_accumulated(self, phase: Phase) -> None:
        """Update the item matrices from their `.grad`, which is summed over the replicas."""
        for piece in self.model.trained_slices(phase):
            grad = piece.whole.grad
            assert grad is not None
            piece.whole.grad = None
            if self._update.alone:
                self._update.take(piece.whole, 0, grad)
            else:
                with self.ranks.clock("optimizer"):
                    self.item_optimizer.update(piece.whole, 0, grad)
        self._update.end()
