"""What ranks items: one trained model, or several whose scores are added.

An ensemble is VASP's own product (arXiv 2102.05774, section 3.3) with more factors: in log space
every member adds weight * log p (of the closed form weight * x B), and an item is listed where all
members agree. A weight is the exponent of its member's p.

Shapes: G rows of the partition group, C columns of a block, E pairs of a row and an item, F past
items of the pairs' rows one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.paths import Pairs
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.step import TrunkCall
from dist_vasp.parallel.comm import all_reduce


@dataclass(frozen=True)
class PairParts:
    """What a model's paths say about E pairs of a row and an item.

    weight_F: what each past item adds to the items x items path, None without one. log_p: log
    probability of each published model that is a part of this one, (E,), where it has one.
    """

    weight_F: Tensor | None
    log_p: dict[str, Tensor]


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to score: its paths over some storage, and its trunk."""

    model: PartitionedModel
    trunk: TrunkCall | None = None

    @property
    def n_items(self) -> int:
        return self.model.n_items

    @property
    def is_probability(self) -> bool:
        """Whether a score is log p; else it is ranked by as it stands."""
        return self.model.link.is_probability

    @property
    def has_reasons(self) -> bool:
        """Whether a past item's part in a score can be told."""
        return bool(self.model.matrices)

    def scores(self, x: ItemRows, allowed_I: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first item, scores (G, C)) of every block of items, in item order.

        With `allowed_I` (bool) -inf elsewhere; a block without an allowed item is left out.
        """
        return self.model.scores(self.trunk, x, allowed_I)

    @torch.no_grad()
    def pair_parts(self, x: ItemRows, pairs: Pairs) -> PairParts:
        """Single numbers and single rows of the matrices are read, never a block."""
        model, link = self.model, self.model.link
        sources = model.sources(self.trunk, x)
        by_part: dict[str, list[Tensor]] = {}
        weight_F = None
        for head in model.heads:
            assert head.source is not None
            logit_E = all_reduce(head.pair_logits(sources[head.source], pairs), model.group)
            by_part.setdefault(head.part_of, []).append(logit_E)
        for matrix in model.matrices:
            own_F = all_reduce(matrix.pair_weights(pairs), model.group)
            logit_E = sum_by_pair(own_F, pairs) + matrix.offset
            by_part.setdefault(matrix.part_of, []).append(logit_E)
            weight_F = own_F if weight_F is None else weight_F + own_F
        if not link.is_probability or link.normalised:
            return PairParts(weight_F, {})
        return PairParts(weight_F, {part: link.score(logits) for part, logits in by_part.items()})

    @torch.no_grad()
    def pair_weights(self, pairs: Pairs) -> Tensor | None:
        """What each past item adds to the items x items paths (F,); None without one."""
        parts = [all_reduce(m.pair_weights(pairs), self.model.group) for m in self.model.matrices]
        return torch.stack(parts).sum(dim=0) if parts else None


@dataclass(frozen=True)
class Ensemble:
    """Several models that rank together: the sum of their scores, weighted."""

    members: tuple[TrainedModel, ...]
    weights: tuple[float, ...]
    is_probability = False

    @property
    def n_items(self) -> int:
        return self.members[0].n_items

    @property
    def has_reasons(self) -> bool:
        return any(member.has_reasons for member in self.members)

    def scores(self, x: ItemRows, allowed_I: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """As of one model; the members may cut the items into different blocks."""
        streams = [member.scores(x, allowed_I) for member in self.members]
        for first, blocks in common_blocks(streams):
            total_GC = blocks[0] * self.weights[0]
            for scores_GC, weight in zip(blocks[1:], self.weights[1:], strict=True):
                total_GC.add_(scores_GC, alpha=weight)
            yield first, total_GC

    def pair_parts(self, x: ItemRows, pairs: Pairs) -> PairParts:
        """The members' weighted sum of what each past item adds to the items x items path."""
        total_F = None
        for member, weight in zip(self.members, self.weights, strict=True):
            weight_F = member.pair_weights(pairs)
            if weight_F is not None:
                total_F = weight_F * weight if total_F is None else total_F + weight_F * weight
        return PairParts(total_F, {})


Model = TrainedModel | Ensemble


def sum_by_pair(weight_F: Tensor, pairs: Pairs) -> Tensor:
    """The sum of the past items' weights of each pair: (E,)."""
    return weight_F.new_zeros(len(pairs.row_E)).index_add_(0, pairs.pair_F, weight_F)


def common_blocks(
    streams: Sequence[Iterator[tuple[int, Tensor]]],
) -> Iterator[tuple[int, list[Tensor]]]:
    """(first item, one (G, C) tensor of each stream) over ranges of items that all streams hold."""
    waiting = [next(stream, None) for stream in streams]
    while all(block is not None for block in waiting):
        held = [block for block in waiting if block is not None]
        first = max(lo for lo, _ in held)
        stop = min(lo + scores.shape[1] for lo, scores in held)
        if first < stop:
            yield first, [scores[:, first - lo : stop - lo] for lo, scores in held]
        for k, (lo, scores) in enumerate(held):
            if lo + scores.shape[1] <= stop:
                waiting[k] = next(streams[k], None)
            elif lo < stop:
                waiting[k] = (stop, scores[:, stop - lo :])
