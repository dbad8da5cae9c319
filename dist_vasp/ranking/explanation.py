"""Explain one item of one history in original ids: the answer of `Recommender.explain`.

Shapes: I items.
"""

from __future__ import annotations

import torch

from dist_vasp.data.items import ItemTable
from dist_vasp.model.sparse import ItemRows
from dist_vasp.ranking.explain import explain_pairs
from dist_vasp.ranking.lists import Explanation, Reason, id_of, title_of
from dist_vasp.ranking.scoring import Ensemble, Model
from dist_vasp.ranking.topk import NO_ITEM


def explanation(model: Model, items: ItemTable, x: ItemRows, row: int, n: int) -> Explanation:
    """Return why the history `x`, one row, leads to the item `row`, with the n largest reasons."""
    wanted = torch.zeros(model.n_items, dtype=torch.bool)
    wanted[row] = True
    score = next(s[0, row - lo] for lo, s in model.scores(x, wanted))
    pair = (torch.tensor([0]), torch.tensor([row]), score[None])
    told = explain_pairs(model, x, *pair, max(n, len(x.items)))
    reasons, rest, logit = [], 0.0, None
    if told.items_EN is not None:
        assert told.weights_EN is not None
        assert told.shallow_E is not None
        pairs = zip(told.items_EN[0].tolist(), told.weights_EN[0].tolist(), strict=True)
        past = [(i, weight) for i, weight in pairs if i != NO_ITEM]
        reasons = [Reason(id_of(items, i), weight, title_of(items, i)) for i, weight in past[:n]]
        rest, logit = sum(weight for _, weight in past[n:]), float(told.shallow_E[0])
    factors = (told.log_p_flvae_E, told.log_p_nease_E)
    p_flvae, p_nease = (None if p is None else float(p.exp()[0]) for p in factors)
    members: tuple[Explanation, ...] = ()
    if isinstance(model, Ensemble):
        members = tuple(explanation(member, items, x, row, n) for member in model.members)
    return Explanation(
        item=id_of(items, row),
        title=title_of(items, row),
        p=float(score.exp()) if model.is_probability else None,
        p_flvae=p_flvae,
        p_nease=p_nease,
        logit=logit,
        reasons=reasons,
        rest=rest,
        members=members,
    )
