"""Why an item is recommended: what each past item adds to the shallow path, and how far the two
paths agree.

    shallow logit of item j = sum over the history's items i of W[i, j]      (VASP paper, section 3.2: one linear layer)
    p = p_flvae * p_nease,   p_nease = sigmoid(shallow logit + model.nease_offset)

The deep path has no such sum; of it only its probability is told.

Shapes: E pairs of a user and an item, F = the pairs' history items one after another, N reasons per
pair, K as width of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dist_vasp.model.item_layers import OutputSide
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.vasp import VASP, TrunkCall
from dist_vasp.parallel.comm import Ranks, all_reduce
from dist_vasp.ranking.mapped import MappedModel
from dist_vasp.ranking.topk import NO_ITEM

_PAIRS_AT_ONCE = 4096  # rows of R and Q that are gathered at once


@dataclass(frozen=True)
class Reasons:
    """For each of E pairs the N past items that add most to the shallow path, and the factors of p.

    None: no such path.
    """

    items_EN: Tensor | None  # int64 item rows, -1 where the history is shorter than N
    weights_EN: (
        Tensor | None
    )  # what each adds to the shallow logit, descending; 0 where there is none
    shallow_E: Tensor | None  # the shallow logit: the sum over the whole history
    log_p_flvae_E: Tensor | None
    log_p_nease_E: Tensor | None


# (users as rows, row of each pair (E,), item of each pair (E,), log p or score of each pair (E,),
# N) -> reasons
Explainer = Callable[[ItemRows, Tensor, Tensor, Tensor, int], Reasons]


def mapped_explainer(model: MappedModel) -> Explainer:
    def explain(x: ItemRows, row_E: Tensor, item_E: Tensor, score_E: Tensor, n: int) -> Reasons:
        weight_F, deep_E = pair_parts(model.outputs, model.sources(x), x, row_E, item_E)
        return _reasons(
            x, row_E, score_E, n, weight_F, deep_E, model.outputs[0], model.config.linear
        )

    return explain


def model_explainer(model: VASP, trunk: TrunkCall | None, ranks: Ranks) -> Explainer:
    """For a model that ranks share: each adds the pairs whose item it owns.

    Every rank passes the same users and pairs.
    """

    def explain(x: ItemRows, row_E: Tensor, item_E: Tensor, score_E: Tensor, n: int) -> Reasons:
        parts = pair_parts([model.output], model.sources(trunk, x), x, row_E, item_E)
        weight_F, deep_E = (all_reduce(part, ranks.partition_group) for part in parts)
        return _reasons(x, row_E, score_E, n, weight_F, deep_E, model.output, model.config.linear)

    return explain


@torch.no_grad()
def pair_parts(
    outputs: Sequence[OutputSide], sources: list[Tensor], x: ItemRows, row_E: Tensor, item_E: Tensor
) -> tuple[Tensor, Tensor]:
    """W[i, j] of every history item i of every pair (F,), and log p of the deep path of every pair (E,); 0 where none of
    `outputs` owns the pair's item. Single numbers and single rows are read, never a block."""
    history_F, pair_F = _histories_of(x, row_E)
    weight_F = torch.zeros(len(history_F), device=row_E.device)
    deep_E = torch.zeros(len(row_E), device=row_E.device)
    order = torch.argsort(item_E[pair_F], stable=True)  # so that a block's pairs lie side by side
    item_sorted_F = item_E[pair_F][order]
    for output in outputs:
        part = output.part
        own = ((item_E >= part.start) & (item_E < part.stop)).nonzero().squeeze(1)
        for some in own.split(_PAIRS_AT_ONCE) if output.heads else ():
            local = item_E[some] - part.start
            for head, source_UK in zip(output.heads, sources, strict=True):
                logit = (head.weight_JK[local] * source_UK[row_E[some]]).sum(dim=1) + head.bias_J[
                    local
                ]
                deep_E[some] += logsigmoid(logit)
        for (lo, hi), W_IC in zip(output.blocks, output.W_IC, strict=False):
            first, last = torch.searchsorted(
                item_sorted_F, torch.tensor([lo, hi], device=row_E.device)
            ).tolist()
            if first < last:
                where = order[first:last]
                weight_F[where] = W_IC[history_F[where], item_sorted_F[first:last] - lo]
    return weight_F, deep_E


def _histories_of(x: ItemRows, row_E: Tensor) -> tuple[Tensor, Tensor]:
    """The history items of every pair's user one after another (F,), and the pair each belongs to
    (F,)."""
    length_E = x.lengths[row_E]
    pair_F = torch.repeat_interleave(torch.arange(len(row_E), device=row_E.device), length_E)
    first_E = length_E.cumsum(0) - length_E
    place_F = torch.arange(len(pair_F), device=row_E.device) - first_E[pair_F]
    return x.items[x.indptr[row_E][pair_F] + place_F], pair_F


def _reasons(
    x: ItemRows,
    row_E: Tensor,
    score_E: Tensor,
    n: int,
    weight_F: Tensor,
    deep_E: Tensor,
    output: OutputSide,
    linear: bool,
) -> Reasons:
    """The largest n of every pair's weights, ties to the lower item row."""
    if not output.W_IC:
        return Reasons(None, None, None, score_E, None)  # the deep path alone: p itself
    history_F, pair_F = _histories_of(x, row_E)
    order = torch.argsort(weight_F, descending=True, stable=True)
    order = order[torch.argsort(pair_F[order], stable=True)]
    length_E = x.lengths[row_E]
    first_E = length_E.cumsum(0) - length_E
    place_F = torch.arange(len(order), device=row_E.device) - first_E[pair_F]
    kept = place_F < n
    items_EN = row_E.new_full((len(row_E), n), NO_ITEM)
    weights_EN = weight_F.new_zeros((len(row_E), n))
    items_EN[pair_F[kept], place_F[kept]] = history_F[order[kept]]
    weights_EN[pair_F[kept], place_F[kept]] = weight_F[order[kept]]
    shallow_E = weight_F.new_zeros(len(row_E)).index_add_(0, pair_F, weight_F)
    if linear:
        return Reasons(items_EN, weights_EN, shallow_E, None, None)
    return Reasons(
        items_EN,
        weights_EN,
        shallow_E,
        deep_E if output.heads else None,
        logsigmoid(shallow_E + output.nease_offset),
    )
