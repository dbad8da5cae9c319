"""One optimizer step: the trunk as a DeepSpeed ZeRO engine, the item matrices beside it.

The item matrices stay outside the engine, because `deepspeed.initialize` overwrites every rank's parameters with rank 0's.
DeepSpeed averages gradients over the world; the loss is already divided by the N rows of the whole step, so what enters
the trunk's backward is multiplied by the world size, and what comes out at its input is divided by it (VASP.gradients).

Shapes: B rows of this rank, N rows of the whole step, L latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_vasp.config import Config
from dist_vasp.data.augment import hash64
from dist_vasp.data.stream import Batch
from dist_vasp.model.item_layers import ItemSlice
from dist_vasp.model.sparse import gather_rows
from dist_vasp.model.vasp import VASP, TrunkCall, make_trunk
from dist_vasp.parallel.comm import Ranks, all_reduce
from dist_vasp.training.optimizer import MOMENTS, SCALARS, InPlaceAdam
from dist_vasp.training.zero import ZeroTrunk


@dataclass(frozen=True)
class StepReport:
    """What a step measured, summed over all ranks: `loss` = `focal` (the reconstruction, whatever its kind) + weighted KL."""

    loss: float
    focal: float
    kl: float
    grad_norm: float
    stop: bool = False  # some rank was asked to stop
    all_written: bool = True  # every rank's part of a checkpoint that goes on in the background is on disk


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer a finite number."""


class Trainer:
    """The model, its trunk engine (None for NEASE alone) and both optimizers."""

    def __init__(self, config: Config, n_items: int, ranks: Ranks) -> None:
        self.config, self.ranks, self.n_items = config, ranks, n_items
        self.model = VASP(config.model, config.loss, n_items, ranks, config.run.seed)
        self.item_optimizer = InPlaceAdam([piece.tensor for piece in self.model.slices()], config.optimizer)
        trunk = make_trunk(config.model, config.run.seed)
        self.trunk = ZeroTrunk(trunk, config, ranks) if trunk else None
        self._stage: int | None = None

    def optimizers(self) -> list[InPlaceAdam]:
        return [self.item_optimizer] + ([self.trunk.optimizer] if self.trunk else [])

    def step(self, batch: Batch, stop: bool = False, written: bool = True) -> StepReport:
        """Gradients of every micro-batch, then one update of everything. Raises DivergedError before anything is updated.

        `stop` and `written` are this rank's words to the others; they travel with the loss.
        """
        self._set_rate(batch.epoch)
        micro_batches = self.config.optimizer.accumulation
        rows = -(-batch.padded_rows // micro_batches)
        noise_BL = self._noise(batch, rows * micro_batches) if self.trunk else None
        world = self.ranks.world_size
        totals = torch.zeros(5, dtype=torch.float64, device=self.ranks.device)

        for start in range(0, rows * micro_batches, rows):
            mine = slice(min(start, batch.inputs.n_rows), min(start + rows, batch.inputs.n_rows))
            csr = [side.slice(mine.start, mine.stop) for side in (batch.inputs, batch.targets)]
            x, y = gather_rows(csr, mine.stop - mine.start, rows, self.n_items, self.ranks.partition_group, self.ranks.device)
            noise = noise_BL[start : start + rows] if noise_BL is not None else None
            backward = self.trunk.backward if self.trunk else None
            share = self.model.gradients(self.trunk, backward, world, x, y, noise, batch.global_rows)
            totals[:2] += torch.stack([share.reconstruction, share.kl])
            if self.trunk and start + rows < rows * micro_batches:
                self.trunk.step()  # counts the micro-batch; the update comes at the last one

        if self.ranks.layout.replicas > 1:
            for piece in self.model.slices():
                piece.tensor.grad = all_reduce(piece.tensor.grad, self.ranks.replica_group)
        totals[2] = self._item_squared_norm() / self.ranks.layout.replicas
        totals[3], totals[4] = float(stop), float(not written)
        reconstruction, kl, squared_norm, stops, unwritten = all_reduce(totals, self.ranks.world).tolist()
        grad_norm = math.sqrt(squared_norm + (self.trunk.squared_norm() if self.trunk else 0.0))
        loss = reconstruction + self.config.loss.kl_weight * kl
        report = StepReport(loss, reconstruction, kl, grad_norm, stops > 0, unwritten == 0)
        if not (math.isfinite(report.loss) and math.isfinite(grad_norm)):
            raise DivergedError(f"step {batch.step + 1}: loss {report.loss}, gradient norm {grad_norm}")

        clip = self.config.optimizer.clip_norm
        for optimizer in self.optimizers():
            optimizer.grad_scale = min(1.0, clip / grad_norm) if clip and grad_norm else 1.0
        if self.trunk:
            self.trunk.step()
        self.item_optimizer.step()
        self.item_optimizer.zero_grad(set_to_none=True)
        return report

    @contextmanager
    def evaluating(self) -> Iterator[TrunkCall | None]:
        """The trunk as a function in evaluation mode, for the time of the body; None for NEASE alone."""
        if self.trunk is None:
            yield None
        else:
            with self.trunk.evaluating() as trunk:
                yield trunk

    # --- state -------------------------------------------------------------------------------------------------------

    def item_pieces(self, moments: bool) -> list[ItemSlice]:
        """This rank's pieces of the item matrices and, if asked, of their moments (`NAME.exp_avg`, `NAME.exp_avg_sq`)."""
        pieces = self.model.slices()
        if not moments:
            return pieces
        states = [(piece, self.item_optimizer.ensure_state(piece.tensor)) for piece in pieces]
        return pieces + [replace(p, name=f"{p.name}.{m}", tensor=state[m]) for p, state in states for m in MOMENTS]

    def trunk_tensors(self, moments: bool) -> dict[str, Tensor]:
        """The whole trunk and, if asked, its moments; all ranks call it together."""
        return self.trunk.tensors(moments) if self.trunk else {}

    def optimizer_scalars(self) -> dict[str, float]:
        """The optimizers' `step` and `mu_product`: one pair for all parameters."""
        state = self.item_optimizer.ensure_state(self.model.slices()[0].tensor)
        return {name: float(state[name]) for name in SCALARS}

    def load_scalars(self, scalars: dict[str, float], epoch: int) -> None:
        """Restore `optimizer_scalars`, and remember the schedule's stage that `epoch`, the last one trained in, lies in."""
        states = [self.item_optimizer.ensure_state(piece.tensor) for piece in self.model.slices()]
        for state in states + (self.trunk.ensure_state() if self.trunk else []):
            for name in SCALARS:
                state[name].fill_(scalars[name])
        self._stage = self.config.stage(epoch)

    # --- parts of a step -----------------------------------------------------------------------------------------------

    def _set_rate(self, epoch: int) -> None:
        """The schedule's rate for `epoch`; where a new stage begins the moments are kept, unless told otherwise."""
        stage = self.config.stage(epoch)
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr(epoch)
            if self.config.optimizer.reset_on_stage and self._stage not in (None, stage):
                optimizer.forget()
        self._stage = stage

    def _noise(self, batch: Batch, n_rows: int) -> Tensor:
        """Standard normal noise of this rank's rows (n_rows, L), drawn per lane: the same for every number of ranks."""
        latent, device = self.config.model.latent, self.ranks.device
        noise = torch.zeros((n_rows, latent), device=device)
        first = 0
        for lane, count in batch.lane_rows:
            key = int(hash64(self.config.run.seed, batch.step, lane))
            generator = torch.Generator(device=device).manual_seed(key)
            noise[first : first + count] = torch.randn((count, latent), generator=generator, device=device)
            first += count
        return noise

    def _item_squared_norm(self) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(piece.tensor.grad).double() ** 2 for piece in self.model.slices()]).sum()
