"""Why an item is recommended: what each past item adds, and how far the paths agree.

    logit of item j = sum over the history's items i of W[i, j]    (VASP paper, section 3.2)
    p_nease = sigmoid(logit + model.nease_offset);   of vasp p = p_flvae * p_nease

The deep path has no such sum; of it only its probability is told.

Shapes: E pairs of a row and an item, F past items of the pairs' rows one after another, N reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dist_vasp.model.paths import Pairs
from dist_vasp.model.sparse import ItemRows
from dist_vasp.ranking.scoring import Model, PairParts, sum_by_pair
from dist_vasp.ranking.topk import NO_ITEM


@dataclass(frozen=True)
class Reasons:
    """For each of E pairs the N past items that add most, and the factors of p.

    None: the model has no such path.
    """

    items_EN: Tensor | None  # int64 item rows, -1 where the history is shorter than N
    weights_EN: Tensor | None  # what each adds to the logit, descending; 0 where there is none
    shallow_E: Tensor | None  # the logit: the sum over the whole history
    log_p_flvae_E: Tensor | None
    log_p_nease_E: Tensor | None


# (users as rows, row of each pair (E,), item (E,), score (E,), N) -> reasons
Explainer = Callable[[ItemRows, Tensor, Tensor, Tensor, int], Reasons]


def model_explainer(model: Model) -> Explainer:
    """`explain_pairs` of one model. Where ranks share it, all of them call it together."""
    return partial(explain_pairs, model)


def explain_pairs(
    model: Model, x: ItemRows, row_E: Tensor, item_E: Tensor, score_E: Tensor, n: int
) -> Reasons:
    """The largest n reasons for each pair; ties go to the lower item row.

    row_E, item_E: row of `x` and item of each pair; every rank passes the same. score_E: the
    model's score of each pair.
    """
    history_F, pair_F = _histories_of(x, row_E)
    pairs = Pairs(row_E, item_E, history_F, pair_F)
    parts = model.pair_parts(x, pairs)
    if parts.weight_F is None:
        return Reasons(None, None, None, score_E if model.is_probability else None, None)
    items_EN, weights_EN = _largest(x, pairs, parts, n)
    log_p_flvae_E, log_p_nease_E = parts.log_p.get("flvae"), parts.log_p.get("nease")
    shallow_E = sum_by_pair(parts.weight_F, pairs)
    return Reasons(items_EN, weights_EN, shallow_E, log_p_flvae_E, log_p_nease_E)


def _histories_of(x: ItemRows, row_E: Tensor) -> tuple[Tensor, Tensor]:
    """The past items of every pair's row one after another (F,), and the pair of each (F,)."""
    length_E = x.lengths[row_E]
    pair_F = torch.repeat_interleave(torch.arange(len(row_E), device=row_E.device), length_E)
    first_E = length_E.cumsum(0) - length_E
    place_F = torch.arange(len(pair_F), device=row_E.device) - first_E[pair_F]
    return x.items[x.indptr[row_E][pair_F] + place_F], pair_F


def _largest(x: ItemRows, pairs: Pairs, parts: PairParts, n: int) -> tuple[Tensor, Tensor]:
    """Items and weights (E, N) of every pair's largest weights, descending."""
    weight_F, pair_F, row_E = parts.weight_F, pairs.pair_F, pairs.row_E
    assert weight_F is not None
    order = torch.argsort(weight_F, descending=True, stable=True)
    order = order[torch.argsort(pair_F[order], stable=True)]
    length_E = x.lengths[row_E]
    first_E = length_E.cumsum(0) - length_E
    place_F = torch.arange(len(order), device=row_E.device) - first_E[pair_F]
    kept = place_F < n
    items_EN = row_E.new_full((len(row_E), n), NO_ITEM)
    weights_EN = weight_F.new_zeros((len(row_E), n))
    items_EN[pair_F[kept], place_F[kept]] = pairs.history_F[order[kept]]
    weights_EN[pair_F[kept], place_F[kept]] = weight_F[order[kept]]
    return items_EN, weights_EN
