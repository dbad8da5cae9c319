"""The weights of an ensemble that give the best lists of validation users, by one metric.

Coordinate ascent on the metric itself (Metzler and Croft 2007, Information Retrieval 10, section
3.1): from the best member alone, the change of one weight that raises the metric most is made,
until none raises it. The likelihood of fit_weights.py looks at the whole catalogue, and a member
that is best at the top of the list is not always most likely.

Only candidates are ranked: the items that some member has among its first ones. Each member is
loaded twice, to find them and to score them, so that one model is in memory at a time.

Shapes: M members, U users, B users of a block, C candidates of a user, K length of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vasp.config.metric_names import Metric
from dist_vasp.data.held_out import EvalBlock, evaluation_blocks
from dist_vasp.data.manifest import Manifest
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.evaluate import USERS_PER_BLOCK, Scorer, to_item_rows, top_items
from dist_vasp.ranking.load import check_vocabulary, load_model
from dist_vasp.ranking.topk import NO_ITEM, local_topk
from dist_vasp.ranking.user_metrics import UserMetrics

LEAST_CANDIDATES = 200  # of a member
_ROOM = 2 << 30  # bytes for the scores of all candidates
_FIRST = tuple(2.0**-e for e in range(8))  # of a member without weight, in parts of the largest
_FACTORS = (0.0, 0.25, 0.5, 0.7, 0.85, 1.2, 1.4, 2.0, 4.0)  # of a member with a weight
_MOST_CHANGES = 100


@dataclass(frozen=True)
class Candidates:
    """What a choice of weights is measured on.

    blocks: the users, of `all_users` validation users. ids: of each block, item rows (B, C)
    ascending, padded with NO_ITEM at the end. scores: of each block, (M, B, C), -inf where there is
    no item.
    """

    blocks: list[EvalBlock]
    ids: list[Tensor]
    scores: list[Tensor]
    all_users: int


@dataclass(frozen=True)
class FittedByMetric:
    """weights: of each member, 0 where it adds nothing. value: of the metric, with them. alone: of
    each member. n_users of all_users validation users."""

    weights: tuple[float, ...]
    value: float
    alone: tuple[float, ...]
    n_users: int
    all_users: int


def gather(
    runs: Sequence[str],
    folder: str,
    metric: Metric,
    ranks: Ranks,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[Candidates, UserMetrics]:
    """Find and score the candidates of the validation users of `folder`, and what measures them.

    Where the scores do not fit 2 GiB, the first users are taken. Recall divides as the first member
    says. `tick(members loaded)` is called after each, twice as many in all. ValueError where there
    are no validation users with a target, or another vocabulary.
    """
    manifest = Manifest.load(folder)
    all_users = manifest.splits["validation"].users
    each = min(max(LEAST_CANDIDATES, 2 * metric.k), manifest.n_items)
    most = min(each * len(runs), manifest.n_items)  # candidates of a user
    n_users = min(all_users, _ROOM // (most * (4 * len(runs) + 8) + 8 * each * len(runs)))
    blocks = list(
        evaluation_blocks(folder, "validation", USERS_PER_BLOCK, stop=n_users, manifest=manifest)
    )
    if not any(block.held_out.lengths.any() for block in blocks):
        raise ValueError(
            f"{folder} has no validation user with held-out items; prepare the data with some, or "
            "give --weights instead of --fit"
        )

    def first_of(run: str) -> tuple[list[Tensor], str]:
        loaded = load_model(run, None, ranks)
        check_vocabulary(loaded.checkpoint.header, folder, manifest)
        scorer, n_items = loaded.model.scores, manifest.n_items
        found = [_first(scorer, block, each, n_items, ranks) for block in blocks]
        return found, loaded.config.run.recall_denominator

    def score(m: int, run: str) -> None:
        scorer = load_model(run, None, ranks).model.scores
        for block, ids_BC, scores_MBC in zip(blocks, ids, scores, strict=True):
            _score(scorer, block, ids_BC, scores_MBC[m], manifest.n_items, ranks)

    of_members, denominators = [], []
    for m, run in enumerate(runs):
        found, denominator = first_of(run)
        of_members.append(found)
        denominators.append(denominator)
        tick(m + 1)
    ids = [_union(of_block) for of_block in zip(*of_members, strict=True)]
    of_members.clear()
    scores = [torch.empty((len(runs), *of_block.shape)) for of_block in ids]
    for m, run in enumerate(runs):
        score(m, run)
        tick(len(runs) + m + 1)
    metrics = UserMetrics((metric,), denominators[0])
    return Candidates(blocks, ids, scores, all_users), metrics


def _first(scorer: Scorer, block: EvalBlock, n: int, n_items: int, ranks: Ranks) -> Tensor:
    """The first n unseen items of each user, (B, n)."""
    return torch.from_numpy(top_items(scorer, block.fold_in, n, n_items, ranks)[1])


def _union(of_members: Sequence[Tensor]) -> Tensor:
    """The items of all members, each once, ascending, (B, C), padded with NO_ITEM at the end."""
    ids_BC = torch.cat(list(of_members), dim=1).sort(dim=1).values
    again = torch.zeros_like(ids_BC, dtype=torch.bool)
    again[:, 1:] = ids_BC[:, 1:] == ids_BC[:, :-1]
    last = torch.iinfo(ids_BC.dtype).max
    ids_BC = ids_BC.masked_fill(again | (ids_BC == NO_ITEM), last).sort(dim=1).values
    ids_BC = ids_BC[:, : int((ids_BC != last).sum(dim=1).max())]
    return ids_BC.masked_fill(ids_BC == last, NO_ITEM)


@torch.no_grad()
def _score(
    scorer: Scorer, block: EvalBlock, ids_BC: Tensor, out_BC: Tensor, n_items: int, ranks: Ranks
) -> None:
    """Write a member's scores of the candidates."""
    x = to_item_rows(block.fold_in, block.fold_in.n_rows, n_items, ranks.device)
    out_BC.fill_(-torch.inf)
    for lo, scores_BJ in scorer(x):
        rows, columns = ((ids_BC >= lo) & (ids_BC < lo + scores_BJ.shape[1])).nonzero(as_tuple=True)
        out_BC[rows, columns] = scores_BJ.cpu()[rows, ids_BC[rows, columns] - lo]


def search(
    candidates: Candidates,
    metrics: UserMetrics,
    tick: Callable[[int], None] = lambda done: None,
) -> FittedByMetric:
    """The weights, to 6 digits. `tick(changes made)` is called after each; ValueError where a score
    is not finite."""
    scale_M = _scales(candidates)
    M = len(scale_M)

    def value(w_M: np.ndarray) -> float:
        return _metric(candidates, w_M / scale_M, metrics)

    alone = tuple(value(one) for one in np.eye(M))
    w_M, best = np.eye(M)[int(np.argmax(alone))], max(alone)
    for done in range(_MOST_CHANGES):
        tick(done)
        tried = [(value(changed), changed) for changed in _changes(w_M)]
        highest, changed = max(tried, key=lambda one: one[0], default=(best, w_M))
        if highest <= best:
            break
        best, w_M = highest, changed
    weights = tuple(float(f"{w:.6g}") for w in w_M / scale_M)
    n_users = sum(len(block.user_keys) for block in candidates.blocks)
    return FittedByMetric(weights, best, alone, n_users, candidates.all_users)


def _changes(w_M: np.ndarray) -> list[np.ndarray]:
    """All changes of one weight, but for those that only scale all weights."""
    changes = []
    for m, w in enumerate(w_M):
        if np.count_nonzero(w_M) == 1 and w:
            continue  # a factor of the only weight changes no list
        for new in (w * factor for factor in _FACTORS) if w else (w_M.max() * f for f in _FIRST):
            changed = w_M.copy()
            changed[m] = new
            changes.append(changed)
    return changes


def _metric(candidates: Candidates, w_M: np.ndarray, metrics: UserMetrics) -> float:
    """The mean over the users with a target."""
    values = []
    used = [(m, float(w)) for m, w in enumerate(w_M) if w]
    k = max(metric.k for metric in metrics.metrics)
    for block, ids_BC, scores_MBC in zip(
        candidates.blocks, candidates.ids, candidates.scores, strict=True
    ):
        total_BC = torch.zeros_like(scores_MBC[0])
        for m, w in used:
            total_BC.add_(scores_MBC[m], alpha=w)
        columns = local_topk(total_BC, k)[1]
        listed = torch.where(columns >= 0, ids_BC.gather(1, columns.clamp(min=0)), NO_ITEM)
        (of_users,) = metrics.of_target(listed.numpy(), block.held_out).values()
        values.append(of_users)
    return float(np.nanmean(np.concatenate(values)))


def _scales(candidates: Candidates) -> np.ndarray:
    """The standard deviation of each member's scores, (M,); 1 where all are equal."""
    scales = []
    for m in range(len(candidates.scores[0])):
        of_member = torch.cat(
            [s[m][ids >= 0] for s, ids in zip(candidates.scores, candidates.ids, strict=True)]
        )
        if not of_member.isfinite().all():
            raise ValueError(
                f"a score of member {m + 1} is not a finite number; leave that run out"
            )
        scales.append(float(of_member.double().std(correction=0)))
    return np.array([scale if scale > 0 else 1.0 for scale in scales])
