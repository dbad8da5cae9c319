"""The weights of an ensemble's members, fitted on validation users.

    minimise over w >= 0    mean over users of  - sum_i t_ui log p_ui
    p_u = softmax over unseen items i of  sum_m w_m s_mui

s_mui is the score of member m, and t_ui is 1 / n_u for the n_u held-out items of user u. This is
the likelihood of a logarithmic opinion pool (Genest and Zidek 1986; Heskes 1998), convex in w. What
a user has seen is never listed, so the pool leaves it out. A member that adds nothing gets 0.

Shapes: M members, U users, I items, B users of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from dist_vasp.data.held_out import EvalBlock, evaluation_blocks
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.evaluate import USERS_PER_BLOCK, Scorer, to_item_rows
from dist_vasp.ranking.load import check_vocabulary, load_model

_ROOM = 2 << 30  # bytes for the scores of all members
_BLOCK_BYTES = 1 << 27  # of a block's scores in float64
_LEAST_USERS = 50  # fewer say little about a weight
_NOTHING = 1e-6  # a weight below this part of the largest, on scores of one scale, is 0


@dataclass(frozen=True)
class Fitted:
    """weights: of each member, 0 where it adds nothing. n_users of all_users validation users."""

    weights: tuple[float, ...]
    n_users: int
    all_users: int


def fit_on_validation(
    runs: Sequence[str],
    folder: str,
    ranks: Ranks,
    tick: Callable[[int], None] = lambda done: None,
) -> Fitted:
    """Load one member after another, score the validation users of `folder`, and fit the weights.

    Where the scores of all users do not fit 2 GiB, the first ones are taken. `tick(members done)`
    is called after each. ValueError where there are too few users, or another vocabulary.
    """
    manifest = Manifest.load(folder)
    all_users, n_items = manifest.splits["validation"].users, manifest.n_items
    if not all_users:
        raise ValueError(
            f"{folder} has 0 validation users; prepare the data with some, or give --weights "
            "instead of --fit"
        )
    n_users = min(all_users, _ROOM // (4 * len(runs) * n_items))
    if n_users < min(_LEAST_USERS, all_users):
        raise ValueError(
            f"{folder} has {all_users:,} validation users, and the scores of {n_users:,} fit "
            f"memory with {len(runs)} members of {n_items:,} items; expected {_LEAST_USERS} or "
            "more, so give --weights instead of --fit"
        )
    blocks = list(
        evaluation_blocks(folder, "validation", USERS_PER_BLOCK, stop=n_users, manifest=manifest)
    )
    scores_MUI = torch.empty((len(runs), n_users, n_items))
    for m, run in enumerate(runs):
        loaded = load_model(run, None, ranks)
        check_vocabulary(loaded.checkpoint.header, folder, manifest)
        write_scores(loaded.model.scores, blocks, scores_MUI[m], ranks)
        tick(m + 1)
    held_UI, seen_UI = (
        torch.cat([_as_mask(rows, n_items) for rows in part])
        for part in ([b.held_out for b in blocks], [b.fold_in for b in blocks])
    )
    return Fitted(fit(scores_MUI, held_UI, seen_UI), n_users, all_users)


@torch.no_grad()
def write_scores(
    scorer: Scorer, blocks: Sequence[EvalBlock], scores_UI: Tensor, ranks: Ranks
) -> None:
    """Write the scores of all items for the users of `blocks`."""
    first = 0
    for block in blocks:
        n = block.fold_in.n_rows
        x = to_item_rows(block.fold_in, n, scores_UI.shape[1], ranks.device)
        for lo, scores_BC in scorer(x):
            scores_UI[first : first + n, lo : lo + scores_BC.shape[1]] = scores_BC
        first += n


def fit(scores_MUI: Tensor, held_UI: Tensor, seen_UI: Tensor) -> tuple[float, ...]:
    """The weights w (M,), to 6 digits. held_UI, seen_UI: bool; users without held-out items do not
    count. ValueError where no item is held out, or a score is not finite."""
    if not held_UI.any():
        raise ValueError("no validation user has held-out items; give --weights instead of --fit")
    # members' scores are of different size: w is searched on a common scale
    scale_M = np.array([float(scores_UI.double().std()) for scores_UI in scores_MUI])
    if not np.isfinite(scale_M).all():
        raise ValueError(
            f"a score of member {int(np.argmin(np.isfinite(scale_M))) + 1} is not a finite number; "
            "leave that run out"
        )
    scale_M = np.where(scale_M > 0, scale_M, 1.0)
    M, _, n_items = scores_MUI.shape
    together = max(1, _BLOCK_BYTES // (8 * M * n_items))

    def loss(w_M: np.ndarray) -> tuple[float, np.ndarray]:
        total, gradient_M = 0.0, torch.zeros(M, dtype=torch.float64)
        raw_M = torch.from_numpy(w_M / scale_M)
        for first in range(0, scores_MUI.shape[1], together):
            some = slice(first, first + together)
            of_block, slope_M = _of_block(scores_MUI[:, some], held_UI[some], seen_UI[some], raw_M)
            total += of_block
            gradient_M += slope_M
        n = int(held_UI.any(dim=1).sum())
        return total / n, gradient_M.numpy() / n / scale_M

    found = minimize(
        loss,
        np.full(M, 1.0 / M),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * M,
        options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-7},
    )
    w_M = np.where(found.x > _NOTHING * found.x.max(), found.x, 0.0)
    return tuple(float(f"{w:.6g}") for w in w_M / scale_M)


def _of_block(
    scores_MBI: Tensor, held_BI: Tensor, seen_BI: Tensor, w_M: Tensor
) -> tuple[float, Tensor]:
    """The sum over the users of a block of -sum_i t log p, and its gradient for w."""
    scores_MBI, n_B1 = scores_MBI.double(), held_BI.sum(dim=1, keepdim=True)
    pool_BI = torch.einsum("m,mbi->bi", w_M, scores_MBI)
    log_p_BI = torch.log_softmax(pool_BI.masked_fill(seen_BI, -torch.inf), dim=1)
    t_BI = held_BI.double() / n_B1.clamp(min=1)
    total = -torch.where(held_BI, t_BI * log_p_BI, 0.0).sum()
    p_BI = torch.where(n_B1 > 0, log_p_BI.exp(), 0.0)  # a user without held-out items adds nothing
    return float(total), torch.einsum("bi,mbi->m", p_BI - t_BI, scores_MBI)


def _as_mask(rows: Rows, n_items: int) -> Tensor:
    """(U, I), True at the items of each user."""
    mask_UI = torch.zeros((rows.n_rows, n_items), dtype=torch.bool)
    x = to_item_rows(rows, rows.n_rows, n_items, mask_UI.device)
    mask_UI[x.positions(0, n_items)] = True
    return mask_UI
