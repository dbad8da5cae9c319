"""The closed form of a linear item-item model, from the Gram matrix of the training users.

EASE (Steck 2019, arXiv 1905.03375) and what generalises it. Every default gives EASE.

    minimise |W (X - X B)|^2 + |R B|^2  subject to  B_jj <= xi
    G = X^T W^2 X,  P = (G + R^2)^-1,  B_ij = -P_ij kappa_j  (i != j)

    X_ui   = 1 for an interaction; for an auxiliary one the value of ease_auxiliary, which counts
             neither in n nor in p
    W^2_u  = (n_u / mean n)^user_exponent                 users: n_u items in the history
    R^2_j  = lambda (p_j / mean p)^lambda_exponent + G_jj dropout / (1 - dropout)
    kappa_j = max(R^2_j, (1 - xi) / P_jj)
    score_j = p_j^item_exponent  sum_i x_i p_i^-item_exponent B_ij      items: p_i users

- `dropout`: EDLAE (Steck 2020, arXiv 1911.02459), the ridge regression whose inputs lose that share
  of their items, in expectation.
- `xi`: RLAE, and with dropout RDLAE (Moon, Kim and Lee 2023, arXiv 2305.12922). The Lagrangian of
  column j is stationary where (G + R^2) B_j = (G - mu_j I) e_j, so B = I - P diag(R^2 + mu). Its
  diagonal is 1 - P_jj (R^2_j + mu_j). Either mu_j = 0 and that is at most xi, or mu_j > 0 and that
  is xi: kappa_j = R^2_j + mu_j is the larger of the two. At xi = 0, kappa_j = 1 / P_jj (EASE),
  because P_jj <= 1 / R^2_j; at xi = 1 it is R^2_j (ridge regression without a constraint).
- `user_exponent` and `item_exponent`: data-adaptive normalisation (DAN; Park, Yoon, Kim and Lee
  2025, arXiv 2504.05805). Its beta is -user_exponent, and its item normalisation D^a B D^-a, where
  D is the diagonal matrix of the p, is item_exponent -a. The item exponents are part of the B that
  is stored, so scores are x B of raw histories.
- `lambda_exponent`: a fit to the items' columns scaled by p^s, with B scaled back, has the ridge
  lambda p^(-2 s): |D^-s B D^s|^2 in column j is |D^-s B_j|^2 but for a factor.

The diagonal of B is stored as 0, whatever xi is: B_jj counts in the score of j for users who have
j, and seen items are not recommended. Only the other entries of the column depend on xi.

Shapes: I items, J this rank's items, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vasp.model.ease import (
    SymmetricColumns,
    add_to_diagonal,
    invert,
    scale_diagonal,
    to_weights,
)
from dist_vasp.model.kinds.ease import EaseKeys


def solve(
    G: SymmetricColumns,
    popularity_I: Tensor,
    keys: EaseKeys,
    tick: Callable[[int], None] = lambda done: None,
) -> None:
    """G -> B in place, whole columns with a zero diagonal.

    G: the Gram matrix of the weighted users. popularity_I: (I,) float64, training users of each
    item, on the device of G. `tick(blocks done)` is called after each block of columns. Raises
    AgreedError on every rank where G plus its ridge is singular in its precision.
    """
    # an item that no training user has (its users are all held out) counts as an item of one user
    relative_I = popularity_I.clamp(min=1) / popularity_I.mean()
    lambda_I = keys.ease_lambda * relative_I**keys.ease_lambda_exponent
    ridge = _ridge(G, lambda_I, keys.ease_dropout) if keys.ease_xi else None
    if keys.ease_dropout:
        scale_diagonal(G, 1 / (1 - keys.ease_dropout))
    add_to_diagonal(G, lambda_I)
    invert(G, tick)
    to_weights(G, ridge, keys.ease_xi)
    if keys.ease_item_exponent:
        _scale_items(G, relative_I**keys.ease_item_exponent)


def _ridge(G: SymmetricColumns, lambda_I: Tensor, dropout: float) -> list[Tensor]:
    """R^2 of this rank's columns, (C,) for each block, before G is changed."""
    ridge = []
    for c, column in G.own():
        items = slice(*G.blocks[c])
        of_dropout_C = torch.diagonal(column[items]).double() * (dropout / (1 - dropout))
        ridge.append((lambda_I[items] + of_dropout_C).to(column.dtype))
    return ridge


def _scale_items(B: SymmetricColumns, factor_I: Tensor) -> None:
    """B_ij <- B_ij factor_j / factor_i, whole columns, in place."""
    for c, column in B.own():
        factor = factor_I.to(column.dtype)
        column.mul_(factor[slice(*B.blocks[c])]).div_(factor[:, None])
