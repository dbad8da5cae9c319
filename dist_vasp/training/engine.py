"""One optimizer step: the trunk as a DeepSpeed ZeRO engine, the item matrices beside it.

The item matrices stay outside the engine, because `deepspeed.initialize` overwrites every rank's
parameters with rank 0's. DeepSpeed averages gradients over the world; the loss is already divided
by the N rows of the whole step, so what enters the trunk's backward is multiplied by the world
size, and what comes out at its input is divided by it (VASP.gradients).

Shapes: B rows of this rank, N rows of the whole step, L latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dist_vasp.config import Config
from dist_vasp.data.hashing import hash64
from dist_vasp.data.stream import Batch
from dist_vasp.model.item_layers import (
    FUSED_GRADIENT_ROWS,
    NEASE_WEIGHT,
    ItemSlice,
    Sink,
    accumulate,
)
from dist_vasp.model.sparse import ItemRows, RowExchange
from dist_vasp.model.vasp import VASP, StepLoss, TrunkCall, make_trunk
from dist_vasp.parallel.comm import Ranks, all_reduce
from dist_vasp.parallel.kernels import Fuse, kernels, plain
from dist_vasp.training.optimizer import MOMENTS, SCALARS, InPlaceAdam
from dist_vasp.training.zero import ZeroTrunk


@dataclass(frozen=True)
class StepReport:
    """What a step measured, summed over all ranks: `loss` = `focal` (the reconstruction, whatever
    its kind) + weighted KL."""

    loss: float
    focal: float
    kl: float
    grad_norm: float
    stop: bool = False  # some rank was asked to stop
    all_written: bool = (
        True  # every rank's part of a checkpoint that goes on in the background is on disk
    )
    paths: dict[str, float] = field(
        default_factory=dict
    )  # mean and deviation of each path's logits (model/path_statistics.py)


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer a finite number."""


@dataclass(frozen=True)
class MicroBatch:
    """Input and target rows of the partition group, and the noise of this rank's own."""

    x: ItemRows
    y: ItemRows
    noise_BL: Tensor | None


class Trainer:
    """The model, its trunk engine (None for NEASE alone) and both optimizers."""

    def __init__(self, config: Config, n_items: int, ranks: Ranks) -> None:
        self.config, self.ranks, self.n_items = config, ranks, n_items
        self.model = VASP(
            config.model,
            config.loss,
            n_items,
            ranks,
            config.run.seed,
            block_columns=config.parallel.block_columns,
        )
        fuse, self.remark = kernels(
            config.parallel.compile, sum(piece.tensor.numel() for piece in self.model.slices())
        )
        self.model.loss.fuse(fuse)
        # By item_dim: 1 is NEASE's W, which has a learning rate of its own.
        self.item_optimizers = {
            dim: self._item_optimizer(dim, fuse)
            for dim in {p.item_dim for p in self.model.trained_slices()}
        }
        self.start_of_W: list[ItemSlice] = []  # what optimizer.nease_decay draws W to
        if config.optimizer.nease_decay:
            pieces = [p for p in self.model.slices() if p.name == NEASE_WEIGHT]
            self.start_of_W = [
                replace(p, name=f"{p.name}.start", tensor=torch.zeros_like(p.tensor))
                for p in pieces
            ]
        self._start_of = dict(
            zip(self.model.output.W_IC, (piece.tensor for piece in self.start_of_W), strict=False)
        )
        self._item_dim = {piece.tensor: piece.item_dim for piece in self.model.slices()}
        if config.optimizer.item_state == "lean":
            self.model.output.gradient_rows = (
                n_items  # a column's second moment wants the whole column
            )
        elif fuse is not plain:
            self.model.output.gradient_rows = FUSED_GRADIENT_ROWS
        trunk = make_trunk(config.model, config.run.seed)
        self.trunk = ZeroTrunk(trunk, config, ranks, fuse) if trunk else None
        self._squared_norm = torch.zeros(
            (), device=ranks.device
        )  # of this rank's item gradients in the step under way
        self._ahead: dict[
            int, list[RowExchange]
        ] = {}  # by step: rows that are already on their way
        self._stage: int | None = None

    def _item_optimizer(self, dim: int, fuse: Fuse) -> InPlaceAdam:
        params = [p.tensor for p in self.model.trained_slices() if p.item_dim == dim]
        lean = self.config.optimizer.item_state == "lean"
        return InPlaceAdam(
            [{"params": params, "lean_dim": dim if lean else None}],
            self.config.optimizer,
            fuse=fuse,
        )

    def optimizers(self) -> list[InPlaceAdam]:
        return [*self.item_optimizers.values()] + ([self.trunk.optimizer] if self.trunk else [])

    def step(
        self, batch: Batch, stop: bool = False, written: bool = True, following: Batch | None = None
    ) -> StepReport:
        """One update of everything from one batch; the ids of the `following` one travel meanwhile.

        A block of an item matrix is updated as soon as its gradient exists, and the gradient dropped. With clipping the pass
        over the blocks runs twice (norm, then update); with accumulation the gradients are kept until the last micro-batch.
        `stop` and `written` are this rank's words to the others; they travel with the loss. Raises DivergedError when the loss
        or a gradient is not finite: weights in memory are void then.
        """
        self._set_rate(batch.epoch)
        clip, micro_batches = self.config.optimizer.clip_norm, self._micro_batches(batch)
        if following is not None:
            self._ahead = {following.step: self._exchange(following)}
        for optimizer in self.item_optimizers.values():
            optimizer.begin_step()
        self._squared_norm.zero_()
        statistics = self.model.output.statistics
        statistics.sums.zero_()
        if len(micro_batches) > 1:
            share = self._accumulate(micro_batches, batch.global_rows)
        else:
            share = self._gradients(
                micro_batches[0], batch.global_rows, self._measure if clip else self._update
            )

        # One all-reduce for what every rank must know.
        words = [share.reconstruction, share.kl, self._squared_norm / self.ranks.layout.replicas]
        own = torch.stack(
            [
                *(w.double() for w in words),
                *torch.tensor([stop, not written]).to(words[0].device).double(),
            ]
        )
        totals = all_reduce(torch.cat([own, statistics.sums.flatten()]), self.ranks.world).tolist()
        reconstruction, kl, squared_norm, stops, unwritten = totals[: len(own)]
        if self.trunk:
            squared_norm += self.trunk.squared_norm()
        grad_norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
        loss = reconstruction + self.config.loss.kl_weight * kl
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(f"step {batch.step + 1}: loss {loss}, gradient norm {grad_norm}")

        scale = min(1.0, clip / grad_norm) if clip and grad_norm else 1.0
        for optimizer in self.optimizers():
            optimizer.grad_scale = scale
        if len(micro_batches) > 1:
            for piece in self.model.trained_slices():
                assert piece.tensor.grad is not None
                self._apply(piece.tensor, 0, piece.tensor.grad)
                piece.tensor.grad = None
        elif clip:
            share.replay(self._update)
        if self.trunk:
            self.trunk.step()
        paths = statistics.named(totals[len(own) :])
        return StepReport(loss, reconstruction, kl, grad_norm, stops > 0, unwritten == 0, paths)

    @contextmanager
    def evaluating(self) -> Iterator[TrunkCall | None]:
        """The trunk as a function in evaluation mode, for the time of the body; None for NEASE
        alone."""
        if self.trunk is None:
            yield None
        else:
            with self.trunk.evaluating() as trunk:
                yield trunk

    def close(self) -> None:
        """No step comes after this: what the trainer holds is free with the last reference to it."""
        if self.trunk:
            self.trunk.close()

    # --- state -------------------------------------------------------------------------------------------------------

    def item_pieces(self, moments: bool) -> list[ItemSlice]:
        """This rank's pieces of the item matrices and, if asked, of their moments (`NAME.exp_avg`,
        `NAME.exp_avg_sq`)."""
        pieces = self.model.slices()
        if not moments:
            return pieces
        states = [(piece, self._state_of(piece)) for piece in self.model.trained_slices()]
        moments_of = [
            replace(p, name=f"{p.name}.{m}", tensor=state[m])
            for p, state in states
            for m in MOMENTS
        ]
        return pieces + moments_of + self.start_of_W

    def _state_of(self, piece: ItemSlice) -> dict[str, Tensor]:
        return self.item_optimizers[piece.item_dim].ensure_state(piece.tensor)

    def trunk_tensors(self, moments: bool) -> dict[str, Tensor]:
        """The whole trunk and, if asked, its moments; all ranks call it together."""
        return self.trunk.tensors(moments) if self.trunk else {}

    def optimizer_scalars(self) -> dict[str, float]:
        """The optimizers' `step` and `mu_product`: one pair for all parameters."""
        state = self._state_of(self.model.trained_slices()[0])
        return {name: float(state[name]) for name in SCALARS}

    def load_scalars(self, scalars: dict[str, float], epoch: int) -> None:
        """Restore `optimizer_scalars`, and remember the schedule's stage that `epoch`, the last one
        trained in, lies in."""
        states = [self._state_of(piece) for piece in self.model.trained_slices()]
        for state in states + (self.trunk.ensure_state() if self.trunk else []):
            for name in SCALARS:
                state[name].fill_(scalars[name])
        self._stage = self.config.stage(epoch)

    # --- parts of a step -----------------------------------------------------------------------------------------------

    def _set_rate(self, epoch: int) -> None:
        """The schedule's rate for `epoch`; where a new stage begins the moments are kept, unless
        told otherwise."""
        stage = self.config.stage(epoch)
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr(epoch) * (
                    self.config.optimizer.nease_lr
                    if optimizer is self.item_optimizers.get(1)
                    else 1
                )
            optimizer.grad_scale = 1.0
            if self.config.optimizer.reset_on_stage and self._stage not in (None, stage):
                optimizer.forget()
        self._stage = stage

    def _exchange(self, batch: Batch) -> list[RowExchange]:
        """Start sending the batch's rows, in `optimizer.accumulation` slices, to the partition
        group."""
        n = self.config.optimizer.accumulation
        rows = -(-batch.padded_rows // n)
        exchanges = []
        for start in range(0, rows * n, rows):
            first, last = (min(b, batch.inputs.n_rows) for b in (start, start + rows))
            csr = [side.slice(first, last) for side in (batch.inputs, batch.targets)]
            exchanges.append(
                RowExchange(
                    csr,
                    last - first,
                    rows,
                    self.n_items,
                    self.ranks.partition_group,
                    self.ranks.device,
                )
            )
        return exchanges

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """The step's rows, gathered over the partition group, and the noise of this rank's own."""
        exchanges = self._ahead.pop(batch.step, None) or self._exchange(batch)
        noise_NL: list[Tensor | None] = [None] * len(exchanges)
        if self.trunk:
            rows = -(-batch.padded_rows // len(exchanges))
            noise_NL = list(self._noise(batch, rows * len(exchanges)).split(rows))
        found = []
        for exchange, noise_BL in zip(exchanges, noise_NL, strict=True):
            x, y = exchange.finish()
            found.append(MicroBatch(x, y, noise_BL))
        return found

    def _noise(self, batch: Batch, n_rows: int) -> Tensor:
        """Standard normal noise of this rank's rows (n_rows, L), drawn per lane: the same for every
        number of ranks."""
        latent, device = self.config.model.latent, self.ranks.device
        noise = torch.zeros((n_rows, latent), device=device)
        first = 0
        for lane, count in batch.lane_rows:
            key = int(hash64(self.config.run.seed, batch.step, lane))
            generator = torch.Generator(device=device).manual_seed(key)
            noise[first : first + count] = torch.randn(
                (count, latent), generator=generator, device=device
            )
            first += count
        return noise

    def _gradients(self, rows: MicroBatch, n_rows: int, sink: Sink) -> StepLoss:
        def backward(scalar: Tensor) -> None:
            for exchange in (e for exchanges in self._ahead.values() for e in exchanges):
                exchange.advance()
            assert self.trunk is not None
            self.trunk.backward(scalar)

        return self.model.gradients(
            self.trunk, backward, self.ranks.world_size, rows.x, rows.y, rows.noise_BL, n_rows, sink
        )

    def _accumulate(self, micro_batches: list[MicroBatch], n_rows: int) -> StepLoss:
        """Gradients of all micro-batches, kept in `.grad` and summed over the replicas; the sum of
        their losses."""
        shares = []
        for i, rows in enumerate(micro_batches):
            shares.append(self._gradients(rows, n_rows, accumulate))
            if self.trunk and i + 1 < len(micro_batches):
                self.trunk.step()  # counts the micro-batch; the update comes at the last one
        for piece in self.model.trained_slices():
            assert piece.tensor.grad is not None
            piece.tensor.grad = self._over_replicas(piece.tensor.grad)
            self._squared_norm += _squared(piece.tensor.grad)
        return StepLoss(
            sum(s.reconstruction for s in shares),  # type: ignore[arg-type]
            sum(s.kl for s in shares),  # type: ignore[arg-type]
            shares[-1].replay,
        )

    def _over_replicas(self, grad: Tensor) -> Tensor:
        """The gradient summed over the ranks that own the same items."""
        return all_reduce(grad, self.ranks.replica_group)

    def _measure(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        """The sink of clipping's first pass: only the norm is kept."""
        self._squared_norm += _squared(self._over_replicas(grad))

    def _update(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        """The sink that applies a gradient and drops it."""
        self._squared_norm += self._apply(parameter, first, self._over_replicas(grad))

    def _apply(self, parameter: Tensor, first: int, grad: Tensor) -> Tensor:
        """Update the rows of an item matrix from `first` on; W is first drawn to where it started.
        Returns the gradient's squared norm."""
        optimizer = self.item_optimizers[self._item_dim[parameter]]
        start = self._start_of.get(parameter)
        if start is not None:
            rows = slice(first, first + len(grad))
            parameter[rows].lerp_(
                start[rows], optimizer.param_groups[0]["lr"] * self.config.optimizer.nease_decay
            )
        return optimizer.update(parameter, first, grad)


def _squared(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad) ** 2
