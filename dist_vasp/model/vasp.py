"""VASP on one page (Vancura and Kordik, arXiv 2102.05774).

    FLVAE(x) = sigmoid(R d + r) * sigmoid(Q z + q)     (d, z) = trunk(W1 x), a deep residual variational autoencoder
    NEASE(x) = sigmoid(W x),  diag(W) = 0              (+ model.nease_offset where W started from the closed form)
    VASP(x)  = FLVAE(x) * NEASE(x)                     both paths must agree
    loss     = mean over rows of (sum over items of focal(VASP(x), y))  +  KL(z)

One step of one rank (DESIGN.md, section 3): its B rows meet the others' of the partition group as
ids; what crosses ranks is of width H + L and never of width I.

Shapes: B rows of this rank, G = P * B rows of the partition group, N rows of the whole step, H
hidden, L latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vasp.config import LossConfig, ModelConfig
from dist_vasp.data.hashing import hash64
from dist_vasp.model.item_layers import NEASE_WEIGHT, InputSide, ItemSlice, OutputSide, Sink
from dist_vasp.model.losses import CosineLoss, MultinomialLoss, make_loss
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.comm import Ranks, all_gather, reduce_scatter

TrunkCall = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
Backward = Callable[[Tensor], None]


@dataclass
class StepLoss:
    """This rank's share of a step's loss, as scalars on the device: the whole is their sum over all
    ranks."""

    reconstruction: Tensor
    kl: Tensor
    replay: Callable[
        [Sink], object
    ]  # hands the same item gradients to another sink, without the trunk


class VASP:
    """The partitioned model of `model.kind`. The trunk is handed in, plain or wrapped by an engine.
    What ease holds as W is its B, and what it scores by is x B (model/ease.py)."""

    def __init__(
        self,
        model: ModelConfig,
        loss: LossConfig,
        n_items: int,
        ranks: Ranks,
        seed: int,
        dtype: torch.dtype = torch.float32,
        initialise: bool = True,
        block_columns: int = 0,
    ) -> None:
        self.config, self.kl_weight, self.n_items = model, loss.kl_weight, n_items
        self.loss = make_loss(loss.kind, loss.alpha, loss.gamma)
        self.part, self.group, self.device = (
            ranks.partition_of_items(n_items),
            ranks.partition_group,
            ranks.device,
        )
        place = (self.device, dtype)
        self.input = InputSide(self.part, self.group, model.hidden, *place) if model.deep else None
        paths = (model.deep, model.latent_head, model.shallow)
        self.output = OutputSide(
            self.part,
            self.group,
            model.hidden,
            model.latent,
            *paths,
            block_columns,
            *place,
            model.nease,
            model.nease_offset,
        )
        if initialise:
            self._glorot(seed)

    def slices(self) -> list[ItemSlice]:
        """Every piece of an item matrix that this rank owns."""
        return (self.input.slices() if self.input else []) + self.output.slices()

    def trained_slices(self) -> list[ItemSlice]:
        """Those that have a gradient: not a W that stays as it started."""
        frozen = set() if self.config.trains_nease else {NEASE_WEIGHT}
        return [piece for piece in self.slices() if piece.name not in frozen]

    def _glorot(self, seed: int) -> None:
        """Glorot uniform by the fan of the whole matrix, zero biases, zero diagonal of W."""
        H, L, I = self.config.hidden, self.config.latent, self.n_items
        fans = {
            "input.weight": I + H,
            "output.decoder.weight": I + H,
            "output.latent.weight": I + L,
            NEASE_WEIGHT: 2 * I,
        }
        for piece in self.slices():
            if piece.name in fans:
                piece.glorot(seed, 1 + list(fans).index(piece.name), fans[piece.name])
        self.output.zero_diagonal()

    def encode(
        self, trunk: TrunkCall | None, x: ItemRows, noise_BL: Tensor | None
    ) -> tuple[Tensor, ...]:
        """This rank's W1 x (B, H), what feeds the output heads, [d z] (B, H+L) or d (B, H), and KL
        (B,)."""
        assert self.input is not None
        assert trunk is not None
        pre_BH = self.input.forward(x).requires_grad_(torch.is_grad_enabled())
        d_BH, z_BL, kl_B = trunk(pre_BH, noise_BL)
        return pre_BH, torch.cat([d_BH, z_BL], dim=1) if self.config.latent_head else d_BH, kl_B

    def gradients(
        self,
        trunk: TrunkCall | None,
        backward: Backward | None,
        trunk_scale: float,
        x: ItemRows,
        y: ItemRows,
        noise_BL: Tensor | None,
        n_rows: int,
        sink: Sink,
    ) -> StepLoss:
        """Forward and backward of one micro-batch; the gradients of this rank's item matrices go to
        `sink`.

        x, y: the G rows of the partition group, padding marked in `real_rows`. `backward` runs
        autograd from a scalar into the trunk; what enters it is multiplied by `trunk_scale`,
        because an engine that averages over W ranks would otherwise divide by W what is already a
        sum over N rows.
        """
        weight_G = self.row_weights(x, y, n_rows)
        if self.input is None:

            def hand_out(to: Sink) -> Tensor:
                return self.output.loss_and_gradients(self.loss, [], x, y, weight_G, to)[0]

            reconstruction = hand_out(sink)
            return StepLoss(reconstruction, torch.zeros_like(reconstruction), hand_out)

        with torch.enable_grad():
            pre_BH, dz_BX, kl_B = self.encode(trunk, x, noise_BL)
        sources = self._sources(all_gather(dz_BX.detach(), self.group))
        reconstruction, grads = self.output.loss_and_gradients(
            self.loss, sources, x, y, weight_G, sink
        )
        grad_dz_BX = reduce_scatter(torch.cat(grads, dim=1), self.group)

        B = len(kl_B)
        real_B = (
            x.real_rows[self.group.rank * B : (self.group.rank + 1) * B].to(kl_B.dtype) / n_rows
        )
        assert backward is not None
        with torch.enable_grad():
            kl = kl_B @ real_B
            backward((self.kl_weight * kl + (dz_BX * grad_dz_BX).sum()) * trunk_scale)
        assert pre_BH.grad is not None
        grad_pre_GH = all_gather(pre_BH.grad / trunk_scale, self.group)
        self.input.backward(x, grad_pre_GH, sink)

        def replay(other: Sink, input_side: InputSide = self.input) -> None:
            self.output.loss_and_gradients(self.loss, sources, x, y, weight_G, other)
            input_side.backward(x, grad_pre_GH, other)

        return StepLoss(reconstruction, kl.detach(), replay)

    def row_weights(self, x: ItemRows, y: ItemRows, n_rows: int) -> Tensor:
        """1/N for a row that counts, 0 for padding; cosine and multinomial loss of an empty input
        or target is 0."""
        counts = x.real_rows
        if isinstance(self.loss, CosineLoss | MultinomialLoss):
            counts = counts & (x.lengths > 0) & (y.lengths > 0)
        return counts.to(self.slices()[0].tensor.dtype) / n_rows

    @torch.no_grad()
    def scores(self, trunk: TrunkCall | None, x: ItemRows) -> Iterator[tuple[int, Tensor]]:
        """(first item, log p (G, C)) of every block of this rank's items, for the G rows of the
        partition group; ease: x B."""
        if self.config.linear:
            yield from (
                (lo, self.output.logits(i, [], x)[0])
                for i, (lo, _) in enumerate(self.output.blocks)
            )
        else:
            yield from self.output.scores(self.sources(trunk, x), x, self.loss)

    @torch.no_grad()
    def sources(self, trunk: TrunkCall | None, x: ItemRows) -> list[Tensor]:
        """What feeds the deep paths, for the G rows of the partition group: [d (G, H), z (G, L)],
        [d], or nothing for NEASE."""
        if self.input is None:
            return []
        _, dz_BX, _ = self.encode(trunk, x, None)
        return self._sources(all_gather(dz_BX, self.group))

    def _sources(self, dz_GX: Tensor) -> list[Tensor]:
        """[d z] -> d, z, each contiguous."""
        widths = [self.config.hidden] + ([self.config.latent] if self.config.latent_head else [])
        return [source.contiguous() for source in dz_GX.split(widths, dim=1)]


def make_trunk(model: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Trunk | None:
    """The trunk of `model`, None where there is no FLVAE. Every rank builds the same one."""
    if not model.deep:
        return None
    trunk_seed = int(hash64(seed, 0))
    return Trunk(
        model.hidden, model.latent, model.encoder_layers, model.decoder_layers, dtype, trunk_seed
    )
