"""The step of a model that is partitioned by item, over any list of paths (DESIGN.md, section 3).

One step of one rank: its B rows meet the others' of the partition group as ids. What crosses ranks
has the width of the trunk's input and outputs and never the width I of the catalogue.

    pre = W1 x          input side, reduce_scatter                          (B, H)
    sources = trunk     replicated; then all_gather                         (G, K) each
    logits = paths      one block of items at a time: no (G, J) tensor is ever held
    loss                a function of the link's factors; gradients go to a `Sink`

Shapes: B rows of this rank, G = P * B rows of the partition group, N rows of the whole step,
H hidden, L latent, K width of a source, C items of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_vasp.model.input_side import InputSide
from dist_vasp.model.links import Link, log_sum_exp
from dist_vasp.model.losses import Loss
from dist_vasp.model.path_statistics import PathStatistics
from dist_vasp.model.paths import BackwardPass, DenseHead, ItemToItem, Path
from dist_vasp.model.sinks import Drop, Sink
from dist_vasp.model.slices import ItemSlice, Storage
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.step import (
    WHOLE,
    Activations,
    MicroBatch,
    Phase,
    Sources,
    StepLoss,
    TrainedTrunk,
    TrunkCall,
)
from dist_vasp.parallel.comm import Group, Ranks, all_gather, reduce_scatter


@dataclass(frozen=True)
class Parts:
    """What a kind of model is made of, over one storage. `input` is None without a trunk."""

    storage: Storage
    input: InputSide | None
    paths: tuple[Path, ...]
    link: Link


class PartitionedModel:
    """The paths of a model over this rank's items. The trunk is passed in by the caller."""

    def __init__(self, parts: Parts, loss: Loss, ranks: Ranks) -> None:
        self.loss = loss
        self.storage, self.input, self.link = parts.storage, parts.input, parts.link
        self.paths, self.n_items = parts.paths, parts.storage.n_items
        self.precision = parts.storage.arithmetic.precision
        self._dtype = parts.storage.arithmetic.dtype
        self.group: Group = ranks.partition_group
        self.in_loss = [path for path in self.paths if path.training.in_loss]
        self.source_ids = sorted({p.source for p in self.paths if p.source is not None})
        self.statistics = PathStatistics([path.name for path in self.in_loss], ranks.device)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The ranges of items that are computed together."""
        return self.storage.blocks

    @property
    def heads(self) -> list[DenseHead]:
        """The paths that read an output of the trunk."""
        return [path for path in self.paths if isinstance(path, DenseHead)]

    @property
    def matrices(self) -> list[ItemToItem]:
        """The items x items paths."""
        return [path for path in self.paths if isinstance(path, ItemToItem)]

    def slices(self) -> list[ItemSlice]:
        """Every slice of an item matrix that this rank owns."""
        pieces = self.input.slices() if self.input else []
        return pieces + [p for path in self.paths for p in (*path.slices(), *path.constants())]

    def trained_slices(self, phase: Phase = WHOLE) -> list[ItemSlice]:
        """Those that have a gradient in a phase, by default in any; first those of the input."""
        pieces = self.input.slices() if self.input and phase.encoder else []
        trained = [path for path in self.paths if path.training.trained and phase.paths]
        return pieces + [piece for path in trained for piece in path.slices()]

    def initialise(self, seed: int) -> None:
        """Glorot uniform by the fan of the whole matrix, zero biases, zero diagonals."""
        if self.input:
            self.input.initialise(seed, self.n_items)
        for path in self.paths:
            path.initialise(seed)

    def refresh(self) -> None:
        """Make the copies that products read anew: the weights have changed."""
        for piece in self.slices():
            piece.refresh()

    # --- one step ----------------------------------------------------------------------------

    def gradients(self, trunk: TrainedTrunk | None, rows: MicroBatch, sink: Sink) -> StepLoss:
        """Forward and backward of one micro-batch; gradients of item matrices go to `sink`."""
        weight_G = self.row_weights(rows)
        if self.input is None:
            with self.group.clock("output"):
                reconstruction, _ = self._loss_and_gradients({}, rows, weight_G, sink)
            kept = Activations(rows, {}, weight_G, None)
            return StepLoss(reconstruction, torch.zeros_like(reconstruction), kept)

        assert trunk is not None
        to_trunk = rows.phase.encoder
        with torch.set_grad_enabled(to_trunk):
            pre_BH, joined_BX, penalty_B = self._encode(trunk, rows, to_trunk)
        sources = self._split(all_gather(joined_BX.detach(), self.group))
        with self.group.clock("output"):
            reconstruction, grads = self._loss_and_gradients(
                sources, rows, weight_G, sink, to_trunk
            )
        if not to_trunk:
            kept = Activations(rows, sources, weight_G, None)
            return StepLoss(reconstruction, torch.zeros_like(reconstruction), kept)
        grad_joined_BX = reduce_scatter(torch.cat(grads, dim=1), self.group)

        B = len(penalty_B)
        own = slice(self.group.rank * B, (self.group.rank + 1) * B)
        real_B = rows.x.real_rows[own].to(penalty_B.dtype) / rows.n_rows
        with torch.enable_grad():
            penalty = penalty_B @ real_B
            total = rows.penalty_weight * penalty + (joined_BX * grad_joined_BX).sum()
            trunk.backward(total * trunk.scale)
        assert pre_BH.grad is not None
        grad_pre_GH = all_gather(pre_BH.grad / trunk.scale, self.group)
        with self.group.clock("input"):
            self.input.backward(rows.x, grad_pre_GH, sink)
        kept = Activations(rows, sources, weight_G, grad_pre_GH)
        return StepLoss(reconstruction, penalty.detach(), kept)

    def replay(self, kept: Activations, sink: Sink) -> None:
        """Recompute the gradients of the item matrices for another sink, without the trunk."""
        with self.group.clock("output"):
            self._loss_and_gradients(kept.sources, kept.rows, kept.weight_G, sink, to_trunk=False)
        if self.input is not None and kept.grad_pre_GH is not None:
            with self.group.clock("input"):
                self.input.backward(kept.rows.x, kept.grad_pre_GH, sink)

    def row_weights(self, rows: MicroBatch) -> Tensor:
        """1/N for a row that counts, 0 for padding and where the loss skips empty rows: (G,)."""
        x, y, counts = rows.x, rows.y, rows.x.real_rows
        if self.loss.skips_empty_rows:
            counts = counts & (x.lengths > 0) & (y.lengths > 0)
        return counts.to(self._dtype) / rows.n_rows

    def _encode(
        self, trunk: TrunkCall, rows: MicroBatch, training: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W1 x (B, H), the sources that paths read side by side (B, X), the penalty (B,)."""
        assert self.input is not None
        with self.group.clock("input"):
            pre_BH = self.input.forward(rows.x, self.group, training)
        pre_BH = pre_BH.requires_grad_(torch.is_grad_enabled())
        sources, penalty_B = trunk(pre_BH, rows.noise_BL)
        if rows.prior is not None:
            penalty_B = rows.prior.penalty(sources)
        used = [sources[i] for i in self.source_ids]
        return pre_BH, torch.cat(used, dim=1) if len(used) > 1 else used[0], penalty_B

    def _split(self, joined_GX: Tensor) -> Sources:
        """The sources out of what `_encode` has joined, each contiguous."""
        widths = {head.source: head.width for head in self.heads}
        parts = joined_GX.split([widths[i] for i in self.source_ids], dim=1)
        return {
            i: self.precision.cast(part).contiguous()
            for i, part in zip(self.source_ids, parts, strict=True)
        }

    def _logits(
        self,
        paths: Sequence[Path],
        block: int,
        sources: Sources,
        x: ItemRows,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """One (G, C) tensor of logits per path, without the padding, of a dtype."""
        lo, hi = self.blocks[block]
        read = [None if path.source is None else sources[path.source] for path in paths]
        return [
            path.logits(block, source_GK, x, dtype)[:, : hi - lo]
            for path, source_GK in zip(paths, read, strict=True)
        ]

    def _row_stats(self, sources: Sources, rows: MicroBatch) -> Tensor:
        """The statistics that the loss needs, over all items of all partitions: (G, n)."""
        parts = []
        for i, (lo, hi) in enumerate(self.blocks):
            logits = self._logits(self.in_loss, i, sources, rows.x)
            factors = [factor.to(self._dtype) for factor in self.link.factors(logits)]
            parts.append(self.loss.row_stats(factors, rows.y.positions(lo, hi)))
        local = self.loss.combine(torch.stack(parts))
        return self.loss.combine(all_gather(local[None], self.group))

    def _loss_and_gradients(
        self,
        sources: Sources,
        rows: MicroBatch,
        weight_G: Tensor,
        sink: Sink,
        to_trunk: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass over the blocks: forward, loss and backward of each, before the next.

        Returns this rank's part of the loss (scalar) and, `to_trunk`, of the gradient to each
        source; both are sums over partitions still to be taken. Paths that the phase does not
        update pass no gradient to the sink.
        """
        stats, total = None, weight_G.new_zeros(())
        sink = sink if rows.phase.paths else Drop()
        if self.loss.row_statistics:
            stats = self._row_stats(sources, rows)
            total = weight_G @ self.loss.row_loss(stats) / self.group.size
        passes = {
            path: self._backward_pass(path, sources, rows.x, to_trunk) for path in self.in_loss
        }
        for i, (lo, hi) in enumerate(self.blocks):
            logits = self._logits(self.in_loss, i, sources, rows.x)
            self.statistics.add(lo, logits, weight_G)
            factors = self.link.factors(logits)
            ones = rows.y.positions(lo, hi)
            if rows.y.values is None:
                block_loss, grads = self.loss.block(factors, ones, weight_G, stats)
            else:
                rating_E = rows.y.values_by_item(lo, hi).to(weight_G.dtype)
                block_loss, grads = self.loss.rated_block(factors, ones, rating_E, weight_G)
            total = total + block_loss
            spread = self.link.spread([self._padded(grad, hi - lo) for grad in grads], len(logits))
            for path, grad_GC in zip(self.in_loss, spread, strict=True):
                if path.training.trained:
                    path.backward(i, grad_GC, passes[path], sink)
                elif path.source is not None:  # its source may be trained
                    path.backward(i, grad_GC, passes[path], Drop())
        for path in self.in_loss:
            if path.training.trained:
                path.end_backward(passes[path], sink)
        return total, self._source_gradients(passes)

    def _padded(self, grad: Tensor, n: int) -> Tensor:
        """The gradient (G, n) of a block, or wider, with zeros for the padding of its items."""
        width = self.storage.arithmetic.kernels.padded(n)
        return grad if grad.shape[1] == width else pad(grad, (0, width - n))

    def _backward_pass(
        self, path: Path, sources: Sources, x: ItemRows, to_trunk: bool
    ) -> BackwardPass:
        source = None if path.source is None else sources[path.source]
        biases = path.biases if isinstance(path, DenseHead) else []
        return BackwardPass(source, x, biases, to_trunk)

    def _source_gradients(self, passes: dict[Path, BackwardPass]) -> list[Tensor]:
        """dL/dsource in the order of `source_ids`."""
        grads: dict[int, Tensor] = {}
        for path, done in passes.items():
            if path.source is not None and done.grad_source_GK is not None:
                earlier = grads.get(path.source)
                grads[path.source] = (
                    done.grad_source_GK if earlier is None else earlier + done.grad_source_GK
                )
        return [grads[i] for i in self.source_ids if i in grads]

    # --- scores ------------------------------------------------------------------------------

    @torch.no_grad()
    def sources(self, trunk: TrunkCall | None, x: ItemRows) -> Sources:
        """What the dense heads read, for the G rows of the partition group, without noise."""
        if self.input is None:
            return {}
        assert trunk is not None
        with self.precision.scope():
            _, joined_BX, _ = self._encode(trunk, MicroBatch(x, x, None, x.n_rows), False)
        return self._split(all_gather(joined_BX, self.group))

    @torch.no_grad()
    def scores(
        self, trunk: TrunkCall | None, x: ItemRows, allowed_I: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first item, scores (G, C)) of every block of this rank's items, in item order.

        A score is log p, or the sum of the logits where the link has no probability. With
        `allowed_I` (bool) it is -inf elsewhere, and a block without an allowed item is left out.
        """
        self.storage.before_reading(x.items)
        sources = self.sources(trunk, x)
        normaliser_G = self._normaliser(sources, x) if self.link.normalised else None
        for i, (lo, hi) in enumerate(self.blocks):
            if allowed_I is not None and not allowed_I[lo:hi].any():
                continue
            logits = self._logits(self.paths, i, sources, x, self._dtype)
            scores_GC = self.link.score(logits, normaliser_G)
            if allowed_I is not None:
                scores_GC[:, ~allowed_I[lo:hi]] = -torch.inf
            yield lo, scores_GC

    def _normaliser(self, sources: Sources, x: ItemRows) -> Tensor:
        """log sum exp of the paths' summed logits over all items: (G,)."""
        blocks = range(len(self.blocks))
        logits = (self._logits(self.paths, i, sources, x, self._dtype) for i in blocks)
        parts = [log_sum_exp(block) for block in logits]
        local_G = torch.logsumexp(torch.stack(parts), dim=0)
        return torch.logsumexp(all_gather(local_G[None], self.group), dim=0)
