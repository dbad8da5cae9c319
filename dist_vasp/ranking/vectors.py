"""Vectors of items and users whose inner product is the sum of the dense heads' logits.

    item (I, D): [R_i, Q_i, r_i + q_i]      user (U, D): [d, z, 1]

A softmax, one sigmoid and the identity are monotone in this sum, so that it ranks as the model
does. A product of sigmoids and an items x items path are no inner product of vectors of width D;
there it finds candidates.

Shapes: U users, I items, D the width of all sources, and 1.
"""

from __future__ import annotations

import numpy as np
import torch

from dist_vasp.data.rows import Rows
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.ranking.scoring import TrainedModel
from dist_vasp.ranking.sources import Sources

_USERS_AT_ONCE = 4096


def item_vectors(sources: Sources) -> np.ndarray:
    """Return (I, D) float32; ValueError for a model without a dense head, or an ensemble."""
    heads = _model_of(sources).model.heads
    weights = [torch.cat([piece.tensor for piece in head.weights]) for head in heads]
    biases = [torch.cat([piece.tensor for piece in head.biases]) for head in heads]
    bias_I1 = torch.stack(biases).sum(dim=0)[:, None]
    return torch.cat([*weights, bias_I1], dim=1).numpy()


def user_vectors(sources: Sources, rows: Rows) -> np.ndarray:
    """Return (U, D) float32 of histories; ValueError as of `item_vectors`."""
    trained = _model_of(sources)
    parts = [
        _of_users(trained, rows.slice(start, min(start + _USERS_AT_ONCE, rows.n_rows)))
        for start in range(0, rows.n_rows, _USERS_AT_ONCE)
    ]
    width = 1 + sum(head.width for head in trained.model.heads)
    return np.concatenate([np.empty((0, width), np.float32), *parts])


@torch.no_grad()
def _of_users(trained: TrainedModel, rows: Rows) -> np.ndarray:
    x = to_item_rows(rows, rows.n_rows, trained.n_items, torch.device("cpu"))
    found = trained.model.sources(trained.trunk, x)
    read = [found[head.source] for head in trained.model.heads if head.source is not None]
    return torch.cat([*read, torch.ones(rows.n_rows, 1)], dim=1).numpy()


def _model_of(sources: Sources) -> TrainedModel:
    if isinstance(sources.model, TrainedModel) and sources.model.model.heads:
        return sources.model
    if isinstance(sources.model, TrainedModel):
        why = "scores items by an items x items matrix alone, which has no vectors"
    else:
        why = "adds the scores of several models; load one of its members"
    raise ValueError(f"a model of kind {sources.kind} {why}")
